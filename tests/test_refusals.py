"""What users type wrong, in every command: one line that names the value, exit code 2, and nothing lost."""
import shutil

import pytest
import torch

import bench
import checkpoint
import decompose
import eval as evaluation
import finetune
import pipeline
import sample
import train
from checkpoint import save_model
from common.cli import InputError, command
from common.tokenizer import train_tokenizer
from model import Config, Transformer

MAINS = dict(train=train.main, finetune=finetune.main, eval=evaluation.main, sample=sample.main, checkpoint=checkpoint.main,
             decompose=decompose.main, pipeline=pipeline.main, bench=bench.main)

@pytest.fixture(scope="module")
def place(tmp_path_factory, text_file):
    """A folder with a model, its int8 twin, a text, and a file where a folder is wanted."""
    path = tmp_path_factory.mktemp("place")
    (path / "book.txt").write_text(text_file.read_text()[:60_000])
    (path / "few.txt").write_text("hello world how are")
    torch.manual_seed(0)
    model = Transformer(Config("llama", vocab_size=400, context=64, blocks=1, heads=2, kv_heads=1, width=32, ffn=48)).eval()
    save_model(path / "base", model, train_tokenizer([(path / "book.txt").read_text()], 400))
    checkpoint.main(["quantize", str(path / "base"), str(path / "int8"), "--bits", "8"])
    (path / "file").write_text("in the way")
    (path / "adapter").mkdir()
    return path

TRAIN = "train --model tiny --rank 8 --max-iters 1 --seq-len 32 --data book.txt --out-dir run "

@pytest.mark.parametrize("line, message", [
    (TRAIN + "--out-dir file", "file is a file: choose another folder"),
    (TRAIN + "--out-dir file/x", "file is a file: choose another folder"),
    (TRAIN + "--seed 99999999999999999999999", "--seed: must be a whole number from 0 to 2^62, got 99999999999999999999999"),
    (TRAIN + "--lr nan", "--lr: must be a finite number above 0, got nan"),
    (TRAIN + "--data few.txt", "tokens, too few to train on and to validate with"),
    ("finetune --base base --task made-up --out-dir file", "file is a file: choose another folder"),
    ("eval --model base --data book.txt --out-dir file", "file is a file: choose another folder"),
    ("eval --model int8 --bits 4 --data book.txt --out-dir x", "int8 has 8-bit weights already: leave --bits 4 out"),
    ("decompose --model base --rank 4 --out-dir file/x", "file is a file: choose another folder"),
    ("checkpoint quantize base file", "file is a file: choose another folder"),
    ("checkpoint quantize base .", ". is the current folder: choose a new one"),
    ("checkpoint quantize int8 x --bits 4", "int8 has 8-bit weights already"),
    ("checkpoint quantize tiny x --random-init --calibration book.txt", "not allowed with argument"),
    ("checkpoint export base base", "base is not empty: choose a new folder"),
    ("checkpoint info cut", "can't be read"),
    ("checkpoint info list", "list"),
    ("checkpoint merge adapter file", "file is a file: choose another folder"),
    ("sample --model base --prompt a --chat", "argument --chat: not allowed with argument --prompt"),
    ("pipeline --stages 0", "must be a whole number, at least 1, got 0"),
    ("pipeline --schedule fifo", "invalid choice: 'fifo'"),
    ("bench memory --json file/m.json", "file is a file: choose another folder"),
])
def test_a_wrong_line_is_one_line_of_answer(line, message, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for name in ("run", "x", "cut", "list"):
        shutil.rmtree(place / name, ignore_errors=True)
    shutil.copytree(place / "base", place / "cut")
    (place / "cut" / "model.safetensors").write_bytes((place / "base" / "model.safetensors").read_bytes()[:100])
    (place / "list").mkdir()
    (place / "list" / "config.json").write_text("[]")
    script, *args = line.split()
    with pytest.raises(SystemExit) as end:
        command(lambda: MAINS[script](args))
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and len([row for row in error.splitlines() if row.startswith("error: ")]) == 1
    assert not (place / "run").exists() and not (place / "x").exists(), "nothing half written"

def test_a_run_goes_on_with_the_same_text_wherever_it_lies_and_with_no_other(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    args = ["--model", "tiny", "--rank", "8", "--max-iters", "2", "--seq-len", "32", "--data", "book.txt", "--out-dir", str(tmp_path / "run")]
    assert train.main([*args, "--stop-at", "1"]) == 0
    (tmp_path / "elsewhere").mkdir()
    shutil.copy("book.txt", tmp_path / "elsewhere")
    (tmp_path / "other.txt").write_text((place / "book.txt").read_text() + "and more")
    with pytest.raises(InputError, match="the data is not what the run that --resume continues began with"):
        train.main(["--resume", "--data", str(tmp_path / "other.txt"), "--out-dir", str(tmp_path / "run")])
    assert train.main(["--resume", "--data", str(tmp_path / "elsewhere" / "book.txt"), "--out-dir", str(tmp_path / "run")]) == 0

def test_a_chat_goes_on_after_a_message_that_is_too_long(place, monkeypatch, capsys, tmp_path):
    model, tokenizer = checkpoint.load_model(place / "base")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    save_model(tmp_path / "chat", model, tokenizer)
    lines = iter(["One?", "word " * 500, "Two?", ""])
    asked, real = [], sample.generate
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(sample, "generate", lambda model, prompts, *rest, **more: asked.append(prompts[0]) or real(model, prompts, *rest, **more))
    sample.main(["--model", str(tmp_path / "chat"), "--chat", "--max-new-tokens", "2", "--temperature", "0"])
    out = capsys.readouterr().out
    assert "tokens: the model reads 1 to 64" in out and "This message is dropped" in out
    assert len(asked) == 3 and "One?" in tokenizer.decode(asked[2]) and "Two?" in tokenizer.decode(asked[2]) and "word" not in tokenizer.decode(asked[2])
