"""decompose.py: ranks against every other choice, and what kills and processes change."""
import itertools
import json
import math
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import train
from beyond.activations import Moments
from checkpoint import decomposed_from, load_model, open_dense, save_model
from common.cli import InputError
from common.data import calibration_batches
from common.storage import read_tensors
from common.tokenizer import train_tokenizer
from decompose import choose_ranks, dense_from, main, same_ranks, size
from lowrank import LowRankLinear, blend_with, replace_linears, set_alpha
from model import Config, Transformer

GPT2 = Config("gpt2", vocab_size=400, context=64, blocks=3, heads=4, kv_heads=4, width=32, ffn=128)
LLAMA = Config("llama", vocab_size=400, context=64, blocks=3, heads=4, kv_heads=2, width=32, ffn=48, tied=False)

def dense_model(folder, config, text_file=None):
    torch.manual_seed(0)
    model = Transformer(config).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)  # biases and norms too: they must come along
    tokenizer = train_tokenizer([text_file.read_text(encoding="utf-8")], 400) if text_file else None
    save_model(folder, model, tokenizer)
    return model

@pytest.fixture
def text(tmp_path, text_file):
    """Some 1,500 tokens to calibrate with."""
    path = tmp_path / "text.txt"
    path.write_text(text_file.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    return path

@pytest.fixture(params=[GPT2, LLAMA], ids=["gpt2", "llama"])
def dense(request, tmp_path, text_file):
    return dense_model(tmp_path / "dense", request.param, text_file), tmp_path / "dense"

def tensors(folder):
    config = json.loads((folder / "config.json").read_text())
    return {name: t for file in config["files"] for name, t in read_tensors(folder / file)}

def same(a, b, **tolerance):
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], **tolerance or dict(rtol=0, atol=0)) for n in a)

# ----------------------------------------------------------------------------- ranks

def lost(spectra, ranks):
    return sum(v[r:].sum().item() if r else 0.0 for v, r in ((spectra[n], ranks[n]) for n in ranks))

def test_chosen_ranks_lose_least_of_all():
    """Against every other choice within the budget. Single ranks bought with the rest of it may not be the very best: 2% are allowed for that."""
    shapes = {"a": (6, 6), "b": (8, 5), "c": (5, 12)}
    for seed, ratio in itertools.product(range(6), (0.5, 0.7, 0.9)):
        generator = torch.Generator().manual_seed(seed)
        spectra = {n: torch.rand(min(s), generator=generator, dtype=torch.float64).pow(4).sort(descending=True).values for n, s in shapes.items()}
        budget = ratio * sum(a * b for a, b in shapes.values())
        chosen = choose_ranks(spectra, shapes, ratio)
        assert sum(size(shapes[n], r) for n, r in chosen.items()) <= budget
        options = [[0, *range(1, dense_from(s))] for s in shapes.values()]
        every = [dict(zip(shapes, choice)) for choice in itertools.product(*options)]
        best = min(lost(spectra, c) for c in every if sum(size(shapes[n], r) for n, r in c.items()) <= budget)
        assert best <= lost(spectra, chosen) + 1e-12
        full = [c for c in every if sum(size(shapes[n], r) for n, r in c.items()) <= budget - max(a * b for a, b in shapes.values())]
        assert not full or lost(spectra, chosen) <= min(lost(spectra, c) for c in full) + 1e-12  # never worse than the best of a budget one matrix smaller

def test_no_factorization_is_larger_than_its_matrix():
    shapes = {"square": (576, 576), "k": (192, 576), "gate": (1536, 576)}
    assert same_ranks(shapes, 200) == {"square": 200, "k": 0, "gate": 200}
    for ratio in (0.3, 0.6, 0.95):
        spectra = {n: torch.rand(min(s)).sort(descending=True).values for n, s in shapes.items()}
        for ranks in [choose_ranks(spectra, shapes, ratio)]:
            assert all(size(shapes[n], r) <= s[0] * s[1] for (n, s), r in zip(shapes.items(), ranks.values()))
            spent = sum(size(shapes[n], r) for n, r in ranks.items())
            total = sum(a * b for a, b in shapes.values())
            assert spent <= ratio * total and spent > ratio * total - 3 * 2112

# ----------------------------------------------------------------------------- the command

PLAIN = ("--ratio", 0.6)

def arguments(kind, text):
    return PLAIN if kind == "plain" else (*PLAIN, "--calibration", text)

def decompose(*arguments):
    return main([str(a) for a in arguments])

def test_one_process_and_two_give_the_same_factors(dense, text, tmp_path, run):
    kind = "plain" if dense[0].config.kind == "gpt2" else "activations"
    assert decompose("--model", dense[1], *arguments(kind, text), "--out-dir", tmp_path / "1") == 0
    result = run("decompose.py", "--model", dense[1], *arguments(kind, text), "--out-dir", tmp_path / "2", processes=2)
    assert result.returncode == 0, result.stderr
    assert same(tmp_path / "1", tmp_path / "2", rtol=1e-4, atol=1e-5)
    one, two = (json.loads((tmp_path / n / "summary.json").read_text()) for n in "12")
    assert one["ranks"] == two["ranks"] and one["block_share"] == two["block_share"]
    names = sorted(p.name for p in (tmp_path / "1").iterdir() if not p.name.startswith("tokenizer"))
    assert names == ["config.json", "model.safetensors", "summary.json"]

def test_decomposed_layers_are_fed_to_the_next(dense, text, tmp_path):
    """The last layer's factors are the best for the inputs that the decomposed model gives it, not for those of the dense one."""
    model, folder = dense
    decompose("--model", folder, "--rank", 6, "--calibration", text, "--out-dir", tmp_path / "o")
    low, tokenizer = load_model(tmp_path / "o")
    name, inputs = "blocks.2.mlp.down", []
    assert isinstance(low.get_submodule(name), LowRankLinear) and low.get_submodule(name).rank == 6
    low.get_submodule(name).register_forward_pre_hook(lambda m, x: inputs.append(x[0].flatten(0, 1).double()))
    with torch.no_grad():
        for tokens in calibration_batches(str(text), tokenizer, 64):
            low(tokens)
    X, W = torch.cat(inputs).T, model.get_submodule(name).weight.detach().double()
    best = torch.linalg.svdvals(W @ Moments(X @ X.T).C)[6:].square().sum().sqrt()
    assert ((W - low.get_submodule(name).dense_weight().detach().double()) @ X).norm() <= 1.001 * best

def test_what_is_not_decomposed_stays(dense, tmp_path):
    model, folder = dense
    decompose("--model", folder, *PLAIN, "--out-dir", tmp_path / "o")
    low, tokenizer = load_model(tmp_path / "o")
    assert tokenizer is not None
    ours, theirs = dict(low.named_parameters()), dict(model.named_parameters())
    kept = [n for n in theirs if n in ours]
    assert all(torch.equal(ours[n], theirs[n]) for n in kept)
    assert {"embed.weight", "norm.weight", "blocks.0.norm1.weight"} <= set(kept)
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    matrices = {n[:-7]: p for n, p in theirs.items() if n.startswith("blocks.") and p.dim() == 2}
    left = sum(p.numel() for n, p in ours.items() if n.startswith("blocks.") and p.dim() == 2)
    assert left <= 0.6 * sum(p.numel() for p in matrices.values()) and left == pytest.approx(0.6 * sum(p.numel() for p in matrices.values()), rel=0.05)
    assert summary["parameters"] == sum(p.numel() for p in low.parameters())
    if model.config.kind == "gpt2":
        assert "blocks.1.mlp.up.bias" in kept

@pytest.mark.parametrize("kind", ["plain", "activations"])
def test_a_killed_run_leaves_no_model_and_the_next_one_begins_anew(tmp_path, text, kind):
    dense_model(tmp_path / "dense", LLAMA, text)
    command = ["--model", tmp_path / "dense", *arguments(kind, text), "--out-dir"]
    decompose(*command, tmp_path / "whole")
    cut = tmp_path / "cut"
    process = subprocess.Popen([sys.executable, "decompose.py", *map(str, command), str(cut)], cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None and not cut.exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (cut / "config.json").exists()
    (tmp_path / "cut.partial").mkdir(exist_ok=True)
    (tmp_path / "cut.partial/model.safetensors").write_text("half of a file")
    decompose(*command, cut)
    assert same(tmp_path / "whole", cut) and not (tmp_path / "cut.partial").exists()
    with pytest.raises(InputError, match="is not empty: choose a new folder"):
        decompose(*command, cut)

def test_the_command(tmp_path, text_file, run):
    dense_model(tmp_path / "dense", LLAMA, text_file)
    result = run("decompose.py", "--model", tmp_path / "dense", "--rank", 6, "--out-dir", tmp_path / "o")
    assert result.returncode == 0 and "21 of 21 matrices low-rank" in result.stdout
    result = run("decompose.py", "--model", tmp_path / "o", "--rank", 6, "--out-dir", tmp_path / "o2")
    assert result.returncode == 2 and result.stderr.strip().count("\n") == 0 and "is not dense" in result.stderr

@pytest.mark.parametrize("arguments, message", [
    (("--rank", 4, "--ratio", 0.5), "argument --ratio: not allowed with argument --rank"),
    ((), "one of the arguments --rank --ratio is required"),
    (("--rank", 0), "--rank: must be a whole number, at least 1, got 0"),
    (("--rank", 20), "--rank 20 would make no matrix smaller: the largest rank that does is 19"),
    (("--ratio", 1.5), "--ratio: must be between 0 and 1, got 1.5"),
    (("--ratio", 0.001), "less than rank 1 everywhere"),
    (("--ratio", 0.5, "--calibration", "nowhere"), "there is no such file or folder"),
    (("--ratio", 0.5, "--calibration", "{text}"), "at least 64 are needed"),
    (("--ratio", 0.5, "--out-dir", "{dense}"), "is not empty: choose a new folder"),
    (("--ratio", 0.5, "--model", "{low}"), "of its layers are low-rank or quantized"),
    (("--ratio", 0.5, "--model", "nothing"), "no such folder or file"),
])
def test_bad_input_is_one_line(tmp_path, text_file, arguments, message):
    dense_model(tmp_path / "dense", LLAMA, text_file)
    low = Transformer(LLAMA)
    replace_linears(low, 4)
    save_model(tmp_path / "low", low)
    (tmp_path / "short.txt").write_text("Too short.")
    places = dict(text=tmp_path / "short.txt", dense=tmp_path / "dense", low=tmp_path / "low")
    with pytest.raises(InputError, match=re.escape(message)):
        decompose("--model", tmp_path / "dense", "--out-dir", tmp_path / "o", *(str(a).format(**places) for a in arguments))
    assert not (tmp_path / "o").exists()

def test_numbers_that_are_not_finite(tmp_path, text_file):
    model = dense_model(tmp_path / "good", LLAMA, text_file)
    model.blocks[1].mlp.up.weight.data[3, 3] = math.nan
    save_model(tmp_path / "dense", model, load_model(tmp_path / "good")[1])
    for out, extra in (("a", ()), ("b", ("--calibration", text_file))):
        with pytest.raises(InputError, match="blocks.1.mlp.up.weight has numbers that are not finite"):
            decompose("--model", tmp_path / "dense", "--ratio", 0.5, "--out-dir", tmp_path / out, *extra)

# ----------------------------------------------------------------------------- training from a decomposed folder

def test_method_3_blends_from_the_dense_model_to_the_decomposed_one(dense, tmp_path):
    model, folder = dense
    decompose("--model", folder, *PLAIN, "--out-dir", tmp_path / "o")
    low, blend = (load_model(tmp_path / "o")[0] for _ in range(2))
    source = open_dense(decomposed_from(tmp_path / "o"))
    assert blend_with(blend, lambda name: source.get(f"{name}.weight")).startswith("blended ")
    tokens = torch.arange(60).reshape(2, 30)
    blend.eval()
    for alpha, target in ((1.0, model), (1e-30, low)):
        set_alpha(blend, alpha)
        torch.testing.assert_close(blend(tokens), target(tokens), atol=1e-4, rtol=1e-4)
    assert set_alpha(blend, 0) == sum(isinstance(m, LowRankLinear) for m in low.modules())
    assert all(torch.equal(a, b) for a, b in zip(blend.state_dict().values(), low.state_dict().values()))

@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_first_steps_from_pretrained_factors_do_not_raise_the_loss(optimizer, tmp_path):
    """At the default rate, without a warm-up; 1e-3 takes this real model's loss from 11 to 16 and more."""
    try:
        open_dense("smollm2-135m")
    except InputError as e:
        pytest.skip(str(e))
    command = ("--method", 2, "--init-from", "smollm2-135m", "--rank", 128, "--max-iters", 3, "--batch-size", 2,
               "--seq-len", 64, "--dtype", "float32", "--log-interval", 1, "--out-dir", tmp_path,
               "--optimizer", optimizer)
    assert train.main([str(a) for a in command], eval_tokens=1024, eval_interval=1) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    after = [row["val_loss"] for row in rows]  # on the same text; each step's own batch is another
    assert len(rows) == 3 and max(after) < 1.25 * rows[0]["loss"] and after[2] < after[0]

@pytest.mark.parametrize("method", [2, 3])
def test_training_goes_on_from_a_decomposed_folder(tmp_path, text_file, run, method):
    dense_model(tmp_path / "dense", LLAMA, text_file)
    decompose("--model", tmp_path / "dense", *PLAIN, "--out-dir", tmp_path / "o")
    command = ("train.py", "--method", method, "--init-from", tmp_path / "o", "--data", text_file, "--max-iters", 4, "--batch-size", 2, "--seq-len", 32,
               "--dtype", "float32", "--out-dir", tmp_path / "t")
    result = run(*command)
    assert result.returncode == 0, result.stderr
    before, after = (json.loads((tmp_path / f / "summary.json").read_text()) for f in ("o", "t"))
    assert after["parameters"] == before["parameters"] and after["parameters_full_rank"] == before["parameters_full_rank"]
    assert after["rank"] == max(layer["rank"] for layer in json.loads((tmp_path / "o/config.json").read_text())["layers"].values())
    with pytest.raises(InputError, match="has ranks already: leave --rank 3 out"):
        train.main([str(a) for a in (*command[1:], "--rank", 3)])
