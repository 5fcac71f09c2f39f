"""train.py as a user runs it: losses that fall, runs that are stopped, killed and resumed, processes that share a batch, bad input."""
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from checkpoint import load_model, save_model
from common.cli import InputError, command
from common.device import Device, find_device
from common.processes import Single
from common.storage import read_state
from lowrank import LowRankLinear

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--model", "tiny", "--rank", 8, "--batch-size", 2, "--seq-len", 32, "--log-interval", 1, "--dtype", "float32")

def losses(folder):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in rows]
    assert steps == sorted(set(steps)), "a step stands twice"
    return {r["step"]: r["loss"] for r in rows}

def weights(folder):
    return {n: p for n, p in load_model(folder)[0].named_parameters()}

def assert_same_run(a, b):
    assert losses(a) == losses(b)
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    (_, _, m1), (_, _, m2) = read_state(a), read_state(b)
    assert m1.keys() == m2.keys() and all(torch.equal(m1[k], m2[k]) for k in m1)

def call(*args, **settings):
    return train.main([str(a) for a in args], **dict(eval_tokens=64, **settings))

def test_the_loss_falls_and_the_run_leaves_its_files(tmp_path, text_file, run):
    out, book = tmp_path / "run", tmp_path / "book.txt"
    book.write_text(f"{text_file.read_text()}\n{tmp_path}")  # which no test before has tokenized
    done = run("train.py", "--model", "tiny", "--rank", 16, "--data", book, "--max-iters", 120, "--seq-len", 64, "--lr", "3e-3", "--out-dir", out)
    assert done.returncode == 0, done.stderr
    found = losses(out)
    assert found[120] < found[1] - 1.5
    for line in ("device ", "training a SentencePiece model on the corpus", "tokenizer ", "replaced 17 linears: ", "step 120 loss ", "step 120 val_loss "):
        assert line in done.stdout + done.stderr
    summary = json.loads((out / "summary.json").read_text())
    for key in ("parameters", "parameters_full_rank", "compression", "loss", "val_loss", "tokens_per_second", "peak_memory_bytes", "seconds", "device",
                "devices", "device_hours", "arguments", "peak_memory_bytes_total"):
        assert summary[key] is not None, key
    assert summary["parameters"] == sum(p.numel() for p in weights(out).values())
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    text = run("sample.py", "--model", out, "--prompt", "The statement", "--max-new-tokens", 20)
    assert text.returncode == 0 and text.stdout.startswith("The statement") and len(text.stdout) > 30

def test_stopped_and_resumed_equals_undisturbed_bit_for_bit(tmp_path, text_file):
    common = (*TINY, "--data", text_file, "--max-iters", 20)
    assert call(*common, "--out-dir", tmp_path / "a", dropout=0.1) == 0
    assert call(*common, "--out-dir", tmp_path / "b", "--stop-at", 10, dropout=0.1) == 0
    assert max(losses(tmp_path / "b")) == 10
    assert call("--resume", "--out-dir", tmp_path / "b") == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")

def _steps(out):
    return (out / "metrics.jsonl").read_text().count("\n") if (out / "metrics.jsonl").exists() else 0

@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_cleanly_and_saves_first(tmp_path, text_file, number, code):
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "train.py", *map(str, TINY), "--data", str(text_file), "--max-iters", "100000", "--out-dir", str(out)],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while _steps(out) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in stderr, stderr
    step = max(losses(out))
    assert read_state(out)[1]["step"] == step and f"after step {step}, saved; go on with\n    python train.py --resume --out-dir" in stdout
    assert f"stopped by {signal.Signals(number).name} after" in stdout and not (out / "summary.json").exists()

def test_two_processes_equal_one_with_twice_the_accumulation(tmp_path, text_file, run):
    common = ("--model", "tiny", "--rank", 8, "--batch-size", 2, "--seq-len", 32, "--log-interval", 1, "--dtype", "float32", "--data", text_file,
              "--max-iters", 6)
    one = run("train.py", *common, "--grad-accum", 2, "--out-dir", tmp_path / "one")
    two = run("train.py", *common, "--recompute", "block", "--out-dir", tmp_path / "two", processes=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    a, b = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert a.keys() == b.keys() and max(abs(a[k] - b[k]) for k in a) < 1e-5
    summaries = [json.loads((tmp_path / d / "summary.json").read_text()) for d in ("one", "two")]
    assert [s["devices"] for s in summaries] == [1, 2] and abs(summaries[0]["val_loss"] - summaries[1]["val_loss"]) < 1e-5
    assert two.stdout.count("device ") == 1, "only the first process speaks"

def test_methods_2_and_3_start_from_a_trained_model(tmp_path, text_file):
    dense = tmp_path / "dense"
    assert call("--model", "tiny", "--data", text_file, "--max-iters", 60, "--seq-len", 64, "--lr", "3e-3", "--out-dir", dense) == 0
    common = ("--init-from", dense, "--rank", 32, "--data", text_file, "--seq-len", 64, "--log-interval", 1, "--lr", "1e-3")
    assert call(*common, "--method", 2, "--max-iters", 10, "--out-dir", tmp_path / "two") == 0
    assert call(*common, "--method", 3, "--max-iters", 20, "--out-dir", tmp_path / "three") == 0
    two, three = losses(tmp_path / "two"), losses(tmp_path / "three")
    trained = losses(dense)[60]
    assert two[1] < trained + 1.5, "the SVD keeps most of what was learned"
    assert three[1] < trained + 0.5, "with alpha near 1 it is nearly the dense model"
    assert three[20] < three[1] + 0.5
    for folder in ("two", "three"):
        model, _ = load_model(tmp_path / folder)
        assert isinstance(model.head, LowRankLinear) and model.head.rank == 32 and all(p.requires_grad for p in model.parameters())
    summary = json.loads((tmp_path / "three" / "summary.json").read_text())
    assert summary["parameters"] == json.loads((tmp_path / "two" / "summary.json").read_text())["parameters"] < summary["parameters_full_rank"]

def test_method_3_from_random_weights_resumes_within_the_blend(tmp_path, text_file):
    common = (*TINY, "--method", 3, "--data", text_file, "--max-iters", 12)
    assert call(*common, "--out-dir", tmp_path / "a") == 0
    assert call(*common, "--out-dir", tmp_path / "b", "--stop-at", 4) == 0
    assert call("--resume", "--out-dir", tmp_path / "b", "--stop-at", 9) == 0
    assert call("--resume", "--out-dir", tmp_path / "b") == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")

def test_an_earlier_run_is_moved_aside_not_overwritten(tmp_path, text_file, capsys):
    common = (*TINY, "--data", text_file, "--max-iters", 2, "--out-dir", tmp_path / "run")
    assert call(*common) == 0 and call(*common, "--seed", 5) == 0
    assert losses(tmp_path / "run") != losses(tmp_path / "run-1")
    assert "held an earlier run: moved to" in capsys.readouterr().out
    with pytest.raises(InputError):
        call(*common, "--data", "/nowhere.txt")
    assert (tmp_path / "run").exists(), "a command that is refused moves nothing"
    assert call(*common, "--rank", 4, "--method", 2, "--init-from", tmp_path / "run") == 0, "a run may start from the one that it replaces"
    assert (tmp_path / "run-2").exists() and not (tmp_path / "run-3").exists()

def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(tmp_path, text_file, run):
    done = run("train.py", *TINY, "--data", text_file, "--max-iters", 50, "--lr", "1e30", "--save-interval", 1,
               "--out-dir", tmp_path / "run", settings=dict(warmup=0))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the loss is nan at step" in done.stderr or "the loss is inf at step" in done.stderr
    model, _ = load_model(read_state(tmp_path / "run")[0])
    assert model is not None

@pytest.mark.parametrize("args, message", [
    (("--rank", 100000), "rank must be in 1..128 for a 128x384 layer, got 100000"),
    (("--rank", -1), "argument --rank: must be a whole number, at least 0, got -1"),
    (("--model", "gpt5"), "argument --model: invalid choice: 'gpt5' (choose from "),
    (("--data", "/nowhere/at/all.txt"), "--data /nowhere/at/all.txt: there is no such file or folder"),
    (("--method", 1, "--init-from", "gpt2", "--rank", 8), "--method 1 starts from random factors, not from gpt2"),
    (("--method", 2, "--rank", 8), "--method 2 starts from the SVD of pretrained weights"),
    (("--method", 3), "--method 3 blends into layers of a rank: give --rank"),
    (("--method", 7), "argument --method: invalid choice: 7 (choose from 1, 2, 3)"),
    (("--batch-size", 0), "argument --batch-size: must be a whole number, at least 1, got 0"),
    (("--lr", "nan"), "argument --lr: must be a finite number above 0, got nan"),
    (("--nonsense",), "unrecognized arguments: --nonsense"),
    (("--seq-len", 1000), "--seq-len 1000 is longer than the model's 256"),
    (("--dtype", "float8"), "argument --dtype: invalid choice: 'float8'"),
    (("--microbatches", 2), "--microbatches and --schedule are of a pipeline: give --pipeline N"),
    (("--schedule", "gpipe"), "--microbatches and --schedule are of a pipeline: give --pipeline N"),
    (("--init-from", ""), "--init-from is empty: a folder, a file or a known name"),
    (("--model", "llama2-70b"), "--model llama2-70b needs 276 GB, and there are "),
    (("--out-dir", ""), "the name of the folder to write to is empty"),
    (("--resume",), "holds no training state: start without --resume"),
    (("--init-from", "/nowhere"), "no such folder or file")])
def test_bad_input_is_one_line_and_exit_code_2(args, message, tmp_path, text_file, capsys):
    argv = ["--model", "tiny", "--data", str(text_file), "--max-iters", "1", "--out-dir", str(tmp_path / "run"), *map(str, args)]
    with pytest.raises(SystemExit) as e:
        command(lambda: train.main(argv))
    stderr = capsys.readouterr().err
    assert e.value.code == 2 and message in stderr and stderr.count("\n") == 1
    assert not (tmp_path / "run").exists(), "nothing half written"

def test_weights_that_are_not_finite_do_not_take_the_place_of_good_ones(tmp_path, text_file, monkeypatch):
    """A step whose loss is finite, and that nobody looks at, may still ruin the weights."""
    backward, steps = Single.backward, []

    def ruinous(self, *args):
        loss = backward(self, *args)
        steps.append(1)
        if len(steps) == 5:
            next(self.model.parameters()).data[0, 0] = float("inf")
        return loss
    monkeypatch.setattr(Single, "backward", ruinous)
    with pytest.raises(InputError, match="some weights are not finite at step 5: the run stops, .*/state keeps step 4"):
        call(*TINY, "--data", text_file, "--max-iters", 20, "--save-interval", 1, "--log-interval", 20, "--out-dir", tmp_path / "run")
    folder, state, _ = read_state(tmp_path / "run")
    assert state["step"] == 4 and all(torch.isfinite(p).all() for p in load_model(folder)[0].parameters())

def test_a_run_that_is_done_keeps_its_summary(tmp_path, text_file):
    assert call(*TINY, "--data", text_file, "--max-iters", 3, "--out-dir", tmp_path / "run") == 0
    before = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert call("--resume", "--out-dir", tmp_path / "run") == 0
    again = json.loads((tmp_path / "run" / "summary.json").read_text())
    for key in ("loss", "val_loss", "tokens_per_second", "step", "parameters"):
        assert again[key] == before[key] and before[key] > 0

def test_a_step_keeps_its_rows_however_they_are_divided(tmp_path, text_file, run):
    common = (*TINY, "--data", text_file, "--max-iters", 6)
    assert call(*common, "--grad-accum", 2, "--out-dir", tmp_path / "a") == 0
    assert call(*common, "--grad-accum", 2, "--stop-at", 3, "--out-dir", tmp_path / "b") == 0
    with pytest.raises(InputError, match="continues has 4 rows, and 2 with --batch-size 2, --grad-accum 1 and world size 1: change one"):
        call("--resume", "--grad-accum", 1, "--out-dir", tmp_path / "b")
    done = run("train.py", "--resume", "--grad-accum", 1, "--out-dir", tmp_path / "b", processes=2)
    assert done.returncode == 0, done.stderr
    a, b = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert len(b) == 6 and max(abs(a[s] - b[s]) for s in a) < 1e-4
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["tokens"] == 6 * 4 * 32

def test_the_weights_come_with_their_network_and_their_tokenizer(tmp_path, text_file):
    assert call(*TINY, "--data", text_file, "--max-iters", 1, "--out-dir", tmp_path / "run") == 0
    with pytest.raises(InputError, match="is another network than --model gpt2: leave --model out"):
        call("--model", "gpt2", "--init-from", tmp_path / "run", "--data", text_file, "--out-dir", tmp_path / "other")
    save_model(tmp_path / "mute", load_model(tmp_path / "run")[0])
    with pytest.raises(InputError, match="mute has no tokenizer beside it: put"):
        call("--init-from", tmp_path / "mute", "--data", text_file, "--out-dir", tmp_path / "other")
    assert not (tmp_path / "other").exists()

def test_resume_refuses_to_become_another_run(tmp_path, text_file, run):
    assert call(*TINY, "--data", text_file, "--max-iters", 2, "--out-dir", tmp_path / "run") == 0
    done = run("train.py", "--resume", "--rank", 16, "--out-dir", tmp_path / "run")
    assert done.returncode == 2 and "--rank 16 differs from the 8 of the run that --resume continues" in done.stderr

@pytest.mark.parametrize("settings", [dict(warm_start=0.5), dict(head="dense", start="normal")])
def test_ways_of_low_rank_from_scratch_go_on_bit_for_bit(tmp_path, text_file, settings):
    """Stopped right before the warm start ends, and after it."""
    common = (*TINY, "--data", text_file, "--max-iters", 8)
    assert call(*common, "--out-dir", tmp_path / "a", **settings) == 0
    assert call(*common, "--stop-at", 4, "--out-dir", tmp_path / "b", **settings) == 0
    assert isinstance(load_model(tmp_path / "b")[0].blocks[0].mlp.up, LowRankLinear) == ("warm_start" not in settings)
    assert call("--resume", "--stop-at", 6, "--out-dir", tmp_path / "b") == 0
    assert call("--resume", "--out-dir", tmp_path / "b") == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")
    model = load_model(tmp_path / "a")[0]
    assert isinstance(model.blocks[0].mlp.up, LowRankLinear)
    assert model.head.weight is model.embed.weight if "head" in settings else model.head.rank == 8

def test_a_warm_start_of_two_processes_is_that_of_one(tmp_path, text_file, run):
    common = (*TINY, "--data", text_file, "--max-iters", 6)
    one = run("train.py", *common, "--grad-accum", 2, "--out-dir", tmp_path / "one", settings=dict(warm_start=0.5))
    two = run("train.py", *common, "--out-dir", tmp_path / "two", processes=2, settings=dict(warm_start=0.5))
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    a, b = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert a.keys() == b.keys() and max(abs(a[k] - b[k]) for k in a) < 1e-5

@pytest.mark.parametrize("steps", [8, 20])
def test_a_warm_start_ends_though_the_schedule_was_changed(tmp_path, text_file, steps):
    assert call(*TINY, "--data", text_file, "--max-iters", 12, "--stop-at", 5, "--out-dir", tmp_path / "run", warm_start=0.5) == 0
    assert call("--resume", "--max-iters", steps, "--stop-at", 11, "--out-dir", tmp_path / "run") == 0
    assert isinstance(load_model(tmp_path / "run")[0].blocks[0].mlp.up, LowRankLinear)

def test_a_setting_that_is_none_is_refused():
    with pytest.raises(TypeError, match="no setting is called dropuot: there are weight_decay"):
        call("--max-iters", 1, dropuot=0.1)

def test_a_vocabulary_of_the_size_that_was_asked_for(tmp_path, text_file):
    assert call("--model", "tiny", "--rank", 4, "--data", text_file, "--max-iters", 1, "--seq-len", 16, "--out-dir", tmp_path / "run",
                vocabulary=400) == 0
    model, tokenizer = load_model(tmp_path / "run")
    assert tokenizer.vocab_size == model.config.vocab_size == 400

@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(tmp_path, text_file, run):
    common = ("--model", "tiny", "--rank", 8, "--batch-size", 2, "--seq-len", 32, "--log-interval", 1, "--data", text_file, "--max-iters", 3,
              "--dtype", "float32")
    for extra, out in (((), "eager"), (("--compile",), "compiled")):
        done = run("train.py", *common, *extra, "--out-dir", tmp_path / out, timeout=600)
        assert done.returncode == 0, done.stderr
    a, b = losses(tmp_path / "eager"), losses(tmp_path / "compiled")
    assert max(abs(a[k] - b[k]) for k in a) < 1e-4

@pytest.mark.parametrize("dtype, mode", [(torch.float32, "sdpa"), (torch.bfloat16, "attention")])
def test_attention_that_is_faster_on_a_cpu(dtype, mode):
    assert train.faster_attention(Device(torch.device("cpu"), dtype, 0, "", "")) == mode
    assert train.faster_attention(Device(torch.device("cuda"), dtype, 0, "", "")) == "sdpa"

@pytest.mark.parametrize("mode", ["none", "attention", "block"])
def test_recomputation_does_not_change_the_losses(mode, tmp_path, text_file):
    common = (*TINY, "--data", text_file, "--max-iters", 3)
    assert call(*common, "--out-dir", tmp_path / "sdpa") == 0 and call(*common, "--recompute", mode, "--out-dir", tmp_path / mode) == 0
    a, b = losses(tmp_path / "sdpa"), losses(tmp_path / mode)
    assert max(abs(a[k] - b[k]) for k in a) < 1e-5

@pytest.mark.parametrize("bits, rank, more", [(8, 8, ()), (4, 8, ("--recompute", "block")), (4, 0, ())])
def test_rounded_training_saves_the_model_whose_loss_it_saw(bits, rank, more, tmp_path, text_file):
    """The saved integers have the training's own validation loss; a stopped and resumed run is the same, bit for bit."""
    common = (*TINY, "--data", text_file, "--rank", rank, "--bits", bits, "--lr", "3e-3", "--max-iters", 4, *more,
              "--batch-size", 8)  # 256 tokens at once: fewer would go through the packed products, which are rounded to bfloat16
    assert call(*common, "--out-dir", tmp_path / "a") == 0
    assert call(*common, "--out-dir", tmp_path / "b", "--stop-at", 2) == 0
    assert call("--resume", "--out-dir", tmp_path / "b") == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")
    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    args = SimpleNamespace(**summary["arguments"])
    val = train.prepare(train.open_corpus(args.data, "data"), load_model(tmp_path / "b")[1]).val

    def val_loss(folder):
        model = load_model(folder)[0]
        strategy = Single(model, lambda x, y: train.head_loss(model.head, model.hidden(x), y), find_device("float32"))
        windows = train.eval_batches(val, args.seq_len, args.batch_size, args.eval_tokens)
        return strategy.evaluate(((x, y), len(x)) for x, y in windows)
    rounded = val_loss(tmp_path / "b" / f"int{bits}")
    assert abs(rounded - summary["val_loss"]) < 1e-5, "not the loss that training saw"
    assert val_loss(tmp_path / "b") != rounded
    assert summary["bits"] == bits

@pytest.mark.parametrize("args, message", [(("--bits", 5), "argument --bits: invalid choice: 5"),
                                           (("--bits", 8, "--method", 3), "--bits 8 and --method 3 both change how a low-rank layer computes")])
def test_what_rounded_training_refuses(args, message, tmp_path, text_file):
    with pytest.raises(InputError, match=message):
        call(*TINY, "--data", text_file, *args, "--out-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()

def test_a_schedule_of_beyond_is_refused_where_that_is_deleted(tmp_path, text_file, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--schedule zb-h1 splits .* it needs beyond/, and"):
        call(*TINY, "--data", text_file, "--pipeline", 1, "--schedule", "zb-h1", "--out-dir", tmp_path / "run")

def test_out_of_memory_names_the_flag_that_helps(tmp_path, text_file, monkeypatch, capsys):
    def too_large(self, *args):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    monkeypatch.setattr(Single, "backward", too_large)
    with pytest.raises(SystemExit) as end:
        command(lambda: call(*TINY, "--data", text_file, "--out-dir", tmp_path / "run"))
    line = "error: out of memory: half the --batch-size, or --recompute block, needs less\n"
    assert end.value.code == 2 and capsys.readouterr().err.endswith(line)

def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    args = SimpleNamespace(lr=1.0, warmup=10, max_iters=110)
    rates = [train.learning_rate(s, args) for s in range(111)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and abs(rates[60] - 0.55) < 1e-9 and abs(rates[110] - 0.1) < 1e-9

def test_without_a_largest_norm_nothing_is_clipped(tmp_path, text_file):
    for name, largest in (("any", 0), ("huge", 1e9)):
        call(*TINY, "--data", text_file, "--max-iters", 4, "--out-dir", tmp_path / name, grad_clip=largest)
    assert losses(tmp_path / "any") == losses(tmp_path / "huge")
