"""train.py and finetune.py killed at random moments, many of them during a save, and resumed: bit for bit the
undisturbed run.

    KILLS=50 KILL_SEED=7 python -m pytest -n0 -s tests/test_killed.py      50 kills of each; the suite makes 4
"""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
KILLS, SEED = int(os.environ.get("KILLS", 4)), int(os.environ.get("KILL_SEED", 0))
STEPS = 20 + 4 * KILLS
TINY = ["--model", "tiny", "--rank", "8", "--batch-size", "2", "--seq-len", "32", "--dtype", "float32"]

def start(script, settings, *args):
    code = (f"import sys, {script} as m; from common.cli import command; "
            f"command(lambda: m.main(sys.argv[1:], **{settings!r}))")
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

def finish(process):
    error = process.communicate()[1]
    assert process.returncode == 0, error

def saved_step(out):
    """The step of the last whole state, 0 if there is none yet."""
    for name in ("state", "state.previous"):
        try:
            return json.loads((out / name / "state.json").read_text())["step"]
        except (OSError, ValueError):  # it is being replaced
            continue
    return 0

def killed(process, out, draw, startup):
    """Kill the process: in its first seconds, a moment after one or two more steps, or in the save that follows
    them. False if it ended before."""
    when = draw.choice(["start", "step", "step", "save", "save"])
    goal = saved_step(out) + draw.randint(1, 2)
    if when == "start":
        time.sleep(draw.uniform(0, startup))
    else:
        while process.poll() is None and saved_step(out) < goal:
            time.sleep(0.001)
        while when == "save" and process.poll() is None and not (out / "state.partial").exists():
            time.sleep(0.0002)
        time.sleep(draw.uniform(0, 0.02 if when == "save" else 0.1))
    process.kill()
    error = process.communicate()[1]
    assert process.returncode in (0, -signal.SIGKILL), error
    return process.returncode != 0

def losses(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len({r["step"] for r in rows}) == len(rows), "a step stands twice"
    return [(r["step"], r["loss"], r.get("val_loss")) for r in rows]

def assert_same_run(a, b):
    assert losses(a) == losses(b)
    files = sorted(f.relative_to(a) for folder in (a, a / "state") for f in folder.glob("*.safetensors"))
    assert len(files) >= 3, "the model or adapter in the folder and in its state, and the optimizer"
    for file in files:
        ours, theirs = load_file(a / file), load_file(b / file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours), file

@pytest.mark.slow
@pytest.mark.parametrize("script", ["train", "finetune"])
def test_killed_at_any_moment_and_resumed_equals_undisturbed(script, tmp_path, text_file):
    """A save follows every step, so that many kills fall into one: then something called partial is left."""
    common = ["--max-iters", STEPS, "--save-interval", 1]
    if script == "train":
        common += [*TINY, "--data", text_file, "--log-interval", 1]
        settings = dict(dropout=0.1, eval_tokens=64)
    else:
        base, rows = tmp_path / "base", tmp_path / "rows.json"
        finish(start("train", {}, *TINY, "--data", text_file, "--max-iters", 2, "--out-dir", base))
        rows.write_text(json.dumps([dict(instruction="Say it.", input=f"number {i}", output=f"it is {i * i}")
                                    for i in range(40)]))
        common += ["--base", base, "--task", rows, "--batch-size", 2, "--eval-limit", 0]
        settings = dict(dtype="float32", log_interval=1)
    whole, out, draw = tmp_path / "whole", tmp_path / "killed", random.Random(SEED)
    process, began = start(script, settings, *common, "--out-dir", whole), time.time()
    while process.poll() is None and not saved_step(whole):
        time.sleep(0.01)
    startup = time.time() - began
    finish(process)
    kills = during_saves = 0
    while kills < KILLS:
        again = ["--resume"] if any(out.glob("state")) or any(out.glob("state.previous")) else []
        process = start(script, {} if again else settings, *(again or common), "--out-dir", out)
        assert killed(process, out, draw, startup), f"the run was over after {kills} kills"
        kills += 1
        during_saves += any(out.glob("*.partial*"))
    print(f"\n{script}.py: {kills} kills, {during_saves} during a save, step {saved_step(out)} of {STEPS}")
    finish(start(script, {}, "--resume", "--out-dir", out))
    assert_same_run(whole, out)
