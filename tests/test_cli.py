"""What every command does beside its work: one user a folder, one line when stopped, any environment."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.cli import InputError, alone_in, check_folder, move_aside

ROOT = Path(__file__).resolve().parent.parent
HOLDER = """
import sys, time; sys.path.insert(0, {root!r})
from common.cli import alone_in
with alone_in({folder!r}):
    print("in", flush=True)
    time.sleep(60)
"""

@pytest.fixture
def holder(tmp_path):
    """A process that uses tmp_path/run."""
    code = HOLDER.format(root=str(ROOT), folder=str(tmp_path / "run"))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"in\n"
    yield process
    process.kill()
    process.wait()

def test_a_folder_has_one_user_and_a_dead_process_is_none(holder, tmp_path):
    message = f"process {holder.pid} uses .*run: wait for its end, or choose another --out-dir"
    with pytest.raises(InputError, match=message), alone_in(tmp_path / "run"):
        pass
    holder.kill()
    holder.wait()
    with alone_in(tmp_path / "run"):
        (tmp_path / "run" / "result").write_text("mine")
        assert move_aside(tmp_path / "run") == tmp_path / "run-1"
        assert os.listdir(tmp_path / "run") == [] and os.listdir(tmp_path / "run-1") == ["result"]
        with pytest.raises(InputError, match=f"process {os.getpid()} uses"), alone_in(tmp_path / "run"):
            pass
    assert os.listdir(tmp_path / "run") == [], "it was there before, and stays"

def test_a_folder_with_a_hidden_file_is_not_empty(tmp_path):
    (tmp_path / ".git").mkdir()
    with pytest.raises(InputError, match="is not empty: choose a new folder"):
        check_folder(tmp_path, new=True)

def test_a_refused_command_leaves_no_folder(tmp_path):
    with pytest.raises(InputError), alone_in(tmp_path / "run"):
        raise InputError("no")
    assert not (tmp_path / "run").exists()

@pytest.mark.parametrize("command", ["train.py", "finetune.py", "eval.py", "decompose.py --model none --rank 4"])
def test_every_command_that_writes_a_folder_asks_for_it(command, holder, tmp_path, run):
    done = run(*command.split(), "--out-dir", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr == (f"error: process {holder.pid} uses {tmp_path}/run: wait for its end, or choose "
                           "another --out-dir\n")

def test_of_several_processes_the_first_one_asks_and_none_waits(holder, tmp_path, run):
    begin = time.monotonic()
    done = run("train.py", "--max-iters", 1, "--out-dir", tmp_path / "run", processes=2)
    assert done.returncode == 1 and f"error (process 0): process {holder.pid} uses" in done.stderr
    assert time.monotonic() - begin < 25

LITTLE = ("--model", "tiny", "--rank", 8, "--batch-size", 2, "--seq-len", 32, "--max-iters", 2)

@pytest.mark.parametrize("variables", [dict(WORLD_SIZE="2"), dict(RANK="3"), dict(RANK="", WORLD_SIZE=""),
                                       dict(RANK="1", WORLD_SIZE="2")])
def test_variables_that_another_program_left_are_no_torchrun(variables, tmp_path, text_file, run):
    done = run("train.py", *LITTLE, "--data", text_file, "--out-dir", tmp_path / "run", env=variables)
    assert done.returncode == 0 and (tmp_path / "run" / "summary.json").exists(), done.stderr

def test_text_is_utf8_whatever_the_locale(tmp_path, text_file, run):
    place = tmp_path / "Ünïcödé 数据"
    place.mkdir()
    text = "„Größe“ 数据 " * 500 + text_file.read_text(encoding="utf-8")[:50_000]
    (place / "täxt.txt").write_text(text, encoding="utf-8")
    plain = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    done = run("train.py", *LITTLE, "--data", place / "täxt.txt", "--out-dir", place / "öut", env=plain,
               settings=dict(vocabulary=400))
    assert done.returncode == 0, done.stderr
    done = run("sample.py", "--model", place / "öut", "--prompt", "„Größe“", "--max-new-tokens", 8, env=plain)
    assert done.returncode == 0 and done.stdout.startswith("„Größe“"), done.stderr

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_before_its_loop_a_run_says_one_line(number, tmp_path, text_file):
    line = [sys.executable, "train.py", *map(str, LITTLE), "--data", text_file, "--out-dir", tmp_path / "run"]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("device ")
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in stderr
    assert f"stopped by {signal.Signals(number).name}: what was not saved before is lost\n" in stderr
    assert not (tmp_path / "run").exists()
