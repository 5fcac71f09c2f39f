"""decompose.py: factors against an SVD in float64 by another route, ranks against every other choice, and what kills and processes change."""
import itertools
import json
import math
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch
from conftest import ROOT

import train
from beyond.factorize import (
    RIDGE,
    balanced,
    check_ratio,
    choose_ranks,
    dense_from,
    eigenvalues,
    factorize,
    prepare,
    same_ranks,
    size,
    uniform_ranks,
)
from checkpoint import load_model, open_dense, save_model
from common.cli import InputError
from common.data import calibration_batches
from common.storage import read_tensors
from common.tokenizer import train_tokenizer
from decompose import main, second_moments_of, sensitivities
from lowrank import LowRankLinear, finish_blend, replace_linears, set_alpha
from model import Config, Transformer

GPT2 = Config("gpt2", vocab_size=400, context=64, blocks=3, heads=4, kv_heads=4, width=32, ffn=128)
LLAMA = Config("llama", vocab_size=400, context=64, blocks=3, heads=4, kv_heads=2, width=32, ffn=48, tied=False)
SHAPES = [(40, 40), (24, 64), (96, 40)]


def dense_model(folder, config, text_file=None):
    torch.manual_seed(0)
    model = Transformer(config).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)  # biases and norms too: they must come along
    tokenizer = train_tokenizer([text_file.read_text(encoding="utf-8")], 400) if text_file else None
    save_model(folder, model, tokenizer)
    return model


@pytest.fixture(params=[GPT2, LLAMA], ids=["gpt2", "llama"])
def dense(request, tmp_path, text_file):
    return dense_model(tmp_path / "dense", request.param, text_file), tmp_path / "dense"


def tensors(folder):
    config = json.loads((folder / "config.json").read_text())
    return {name: t for file in config["files"] for name, t in read_tensors(folder / file)}


def same(a, b):
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ----------------------------------------------------------------------------- factors

@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 7, 20])
def test_plain_factors_are_as_good_as_the_svd(shape, rank):
    torch.manual_seed(rank)
    W = torch.randn(3, *shape)
    factors, values = factorize(W, [rank] * 3)
    for w, (B, A), v in zip(W.double(), factors, values):
        U, S, Vt = torch.linalg.svd(w, full_matrices=False)
        assert torch.dist(B.double() @ A.double(), (U[:, :rank] * S[:rank]) @ Vt[:rank]) < 1e-4 * S[0]
        best = S[rank:].square().sum().sqrt()
        assert torch.dist(w, B.double() @ A.double()) <= 1.0001 * best
        torch.testing.assert_close(v, S.square(), rtol=1e-4, atol=1e-4 * S[0].item() ** 2)
        torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spread", [0, 2, 4], ids="inputs over {} decades".format)
def test_factors_for_inputs_reach_the_optimum(shape, spread):
    """The optimum by another route: S = Cholesky of X X^T, SVD of W S, in float64."""
    torch.manual_seed(0)
    X = torch.randn(shape[1], 500, dtype=torch.float64) * torch.logspace(0, -spread, shape[1], dtype=torch.float64)[:, None]
    X = torch.linalg.qr(torch.randn(shape[1], shape[1], dtype=torch.float64))[0] @ X
    W, H = torch.randn(shape), X @ X.T
    S = torch.linalg.cholesky(H)
    for rank in (3, 13):
        best = torch.linalg.svdvals(W.double() @ S)[rank:].square().sum().sqrt()
        [(B, A)], _ = factorize(W[None], [rank], prepare(H, shape))
        with_ridge = torch.linalg.svdvals(W.double() @ prepare(H, (2, 1))[1])[rank:].square().sum().sqrt()
        error = W.double() - B.double() @ A.double()
        assert (error @ X).norm() <= with_ridge * 1.001
        assert (error @ prepare(H, (2, 1))[1]).norm() <= with_ridge * 1.001
        assert spread or (error @ X).norm() <= best * 1.001


def test_squared_condition_numbers_are_met_in_float64():
    """What is cut off is 1e-9 of the largest eigenvalue: nothing that float32 could see after squaring."""
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0] for _ in range(2))
    S = torch.logspace(0, -5.5, 64, dtype=torch.float64)
    for W in ((U * S) @ V.T, (V * S) @ U.T):
        [(B, A)], _ = factorize(W[None].float(), [40])
        assert torch.dist(W, B.double() @ A.double()) <= 1.01 * S[40:].square().sum().sqrt() + 2e-7


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fewer_tokens_than_inputs(shape):
    """X X^T has rank 5; the factors must fit these inputs exactly and still spend the other ranks on the rest of W."""
    torch.manual_seed(0)
    W, X = torch.randn(shape), torch.randn(shape[1], 5, dtype=torch.float64)
    [(B, A)], _ = factorize(W[None], [15], prepare(X @ X.T, shape))
    error = W.double() - B.double() @ A.double()
    assert (error @ X).norm() < 0.01 * (W.double() @ X).norm()
    left = W.double() - (W.double() @ X) @ torch.linalg.pinv(X)  # what W does outside the span of X
    assert error.norm() < 1.05 * torch.linalg.svdvals(left)[10:].square().sum().sqrt()
    assert 0 < RIDGE < 0.01


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_matrix_of_low_rank_is_kept_exactly(shape):
    torch.manual_seed(0)
    W = torch.randn(shape[0], 4) @ torch.randn(4, shape[1])
    for moments in (None, prepare(torch.eye(shape[1]), shape)):
        for w, r in ((W, 4), (W, 10), (0 * W, 3)):
            [(B, A)], _ = factorize(w[None], [r], moments)
            assert B.isfinite().all() and A.isfinite().all()
            assert torch.dist(B @ A, w) <= 1e-4 * w.norm()


def test_ranks_of_a_batch_may_differ():
    W = torch.randn(3, 20, 30)
    for (B, A), r in zip(factorize(W, [2, 9, 15])[0], (2, 9, 15)):
        assert B.shape == (20, r) and A.shape == (r, 30)


def test_moments_do_not_depend_on_the_order():
    torch.manual_seed(0)
    inputs = [torch.randn(1, 50, 12) * 10 ** (i % 5) for i in range(20)]
    H = second_moments_of(inputs, 12, "cpu")
    assert torch.equal(H, second_moments_of(inputs[::-1], 12, "cpu"))
    X = torch.cat([x[0] for x in inputs]).double()
    torch.testing.assert_close(H, X.T @ X, rtol=1e-5, atol=1e-6 * H.max().item())


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
        for ranks in (uniform_ranks(shapes, ratio), choose_ranks(spectra, shapes, ratio)):
            assert all(size(shapes[n], r) <= s[0] * s[1] for (n, s), r in zip(shapes.items(), ranks.values()))
            spent = sum(size(shapes[n], r) for n, r in ranks.items())
            total = sum(a * b for a, b in shapes.values())
            assert spent <= ratio * total and spent > ratio * total - 3 * 2112


def test_an_impossible_ratio():
    with pytest.raises(InputError, match="less than rank 1 everywhere: at least 0.2"):
        check_ratio({"a": (8, 8)}, 0.01)


def test_sensitivities_are_those_of_a_whole_backward_pass(dense):
    model, folder = dense
    windows, gradients = list(torch.randint(400, (3, 1, 20))), {}
    for tokens in windows:
        outputs = {}
        hooks = [m.register_forward_hook(lambda m, x, y, name=name, outputs=outputs: outputs.update({name: y}))
                 for name, m in model.blocks.named_modules(prefix="blocks") if isinstance(m, torch.nn.Linear)]
        logits = model(tokens)
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum")
        for name, g in zip(outputs, torch.autograd.grad(loss, list(outputs.values()))):
            gradients.setdefault(name, []).append(g.square().mean().item())
        for hook in hooks:
            hook.remove()
    with open_dense(folder) as source, torch.no_grad():
        found = sensitivities(source, windows, "cpu")
    assert found.keys() == gradients.keys()
    for name, g in gradients.items():
        assert found[name] == pytest.approx(g, rel=1e-4)


def test_balanced_factors_have_the_same_product():
    B, A = torch.randn(6, 3) * 100, torch.randn(3, 5)
    b, a = balanced(B, A)
    torch.testing.assert_close(b @ a, B @ A)
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))


def test_eigenvalues_are_those_of_the_outputs():
    W, X = torch.randn(2, 9, 14), torch.randn(14, 100).double()
    values = eigenvalues(W, *prepare(X @ X.T))
    torch.testing.assert_close(values.sum(1), (W.double() @ X).square().sum((1, 2)), rtol=1e-3, atol=0)


# ----------------------------------------------------------------------------- the command

PLAIN, TEXT = ("--ratio", 0.6), ("--ratio", 0.6, "--calibration-tokens", 1024, "--calibration")


def arguments(kind, text_file):
    return PLAIN if kind == "plain" else (*TEXT, text_file)


def decompose(*arguments):
    return main([str(a) for a in arguments])


def test_one_process_and_two_give_the_same_factors(dense, text_file, tmp_path, run):
    kind = "plain" if dense[0].config.kind == "gpt2" else "activations"
    assert decompose("--model", dense[1], *arguments(kind, text_file), "--out-dir", tmp_path / "1") == 0
    result = run("decompose.py", "--model", dense[1], *arguments(kind, text_file), "--out-dir", tmp_path / "2", processes=2)
    assert result.returncode == 0, result.stderr
    assert same(tmp_path / "1", tmp_path / "2")
    one, two = (json.loads((tmp_path / n / "summary.json").read_text()) for n in "12")
    assert one["ranks"] == two["ranks"] and one["kept"] == two["kept"]
    assert sorted(p.name for p in (tmp_path / "1").iterdir() if not p.name.startswith(("model-", "tokenizer"))) == \
        ["config.json", "spectra.png", "summary.json"]


def test_decomposed_layers_are_fed_to_the_next(dense, text_file, tmp_path):
    """The last layer's factors are the best for the inputs that the decomposed model gives it, not for those of the dense one."""
    model, folder = dense
    decompose("--model", folder, "--rank", 6, "--calibration", text_file, "--calibration-tokens", 1024, "--out-dir", tmp_path / "o")
    low, tokenizer = load_model(tmp_path / "o")
    name, inputs = "blocks.2.mlp.down", []
    assert isinstance(low.get_submodule(name), LowRankLinear) and low.get_submodule(name).rank == 6
    low.get_submodule(name).register_forward_pre_hook(lambda m, x: inputs.append(x[0].flatten(0, 1).double()))
    with torch.no_grad():
        for tokens in calibration_batches(str(text_file), tokenizer, 64, 1024):
            low(tokens)
    X, W = torch.cat(inputs).T, model.get_submodule(name).weight.detach().double()
    best = torch.linalg.svdvals(W @ prepare(X @ X.T, (2, 1))[1])[6:].square().sum().sqrt()
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
def test_a_killed_run_goes_on_and_ends_the_same(tmp_path, text_file, capsys, kind):
    dense_model(tmp_path / "dense", LLAMA, text_file)
    command = ["--model", tmp_path / "dense", *arguments(kind, text_file), "--out-dir"]
    decompose(*command, tmp_path / "whole")
    killed = 0
    for stage in ("spectra-*.json", "model-*.safetensors"):  # kill it when the first file of each stage appears
        process = subprocess.Popen([sys.executable, "decompose.py", *map(str, command), str(tmp_path / "cut")], cwd=ROOT, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        while process.poll() is None and not list((tmp_path / "cut").glob("**/" + stage)):
            time.sleep(0.002)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert killed
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "cut" / "work").glob("*.json")}
    shards = {p: p.stat().st_mtime_ns for p in (tmp_path / "cut").glob("model-*.safetensors") if (tmp_path / "cut" / "work" / f"{p.stem[6:]}.json") in done}
    capsys.readouterr()
    decompose(*command, tmp_path / "cut")
    assert "going on with it" in capsys.readouterr().out
    assert done and all(p.stat().st_mtime_ns == when for p, when in shards.items())
    assert same(tmp_path / "whole", tmp_path / "cut")
    assert not (tmp_path / "cut" / "work").exists()
    decompose(*command, tmp_path / "cut")
    assert "already decomposed" in capsys.readouterr().out


def test_a_run_with_other_arguments_is_not_continued(tmp_path, text_file):
    dense_model(tmp_path / "dense", LLAMA, text_file)
    (tmp_path / "o" / "work").mkdir(parents=True)
    (tmp_path / "o" / "work" / "plan").write_text(json.dumps(dict(model=str(tmp_path / "dense"), rank="5")))
    with pytest.raises(InputError, match="unfinished run with rank 5, not 4"):
        decompose("--model", tmp_path / "dense", "--rank", 4, "--out-dir", tmp_path / "o")


def test_the_command(tmp_path, text_file, run):
    dense_model(tmp_path / "dense", LLAMA, text_file)
    result = run("decompose.py", "--model", tmp_path / "dense", "--rank", 6, "--out-dir", tmp_path / "o")
    assert result.returncode == 0 and "21 of 21 matrices low-rank" in result.stdout and re.search(r"gate +3 +0 +48x32 +6 +6 +6", result.stdout)
    result = run("decompose.py", "--model", tmp_path / "o", "--rank", 6, "--out-dir", tmp_path / "o2")
    assert result.returncode == 2 and result.stderr.strip().count("\n") == 0 and "is not dense" in result.stderr


@pytest.mark.parametrize("arguments, message", [
    (("--rank", 4, "--ratio", 0.5), "give either --rank R or --ratio S"),
    ((), "give either --rank R or --ratio S"),
    (("--rank", 0), "--rank must be at least 1, got 0"),
    (("--rank", 20), "--rank 20 would make no matrix smaller: the largest rank that does is 19"),
    (("--ratio", 1.5), "--ratio must lie between 0 and 1, got 1.5"),
    (("--ratio", 0.001), "less than rank 1 everywhere"),
    (("--ratio", 0.5, "--calibration", "nowhere"), "there is no such file or folder"),
    (("--ratio", 0.5, "--calibration", "{text}", "--calibration-tokens", 3), "at least 64 are needed"),
    (("--ratio", 0.5, "--out-dir", "{dense}"), "is not empty: choose a new folder"),
    (("--ratio", 0.5, "--model", "{low}"), "is not dense: blocks.0.attention.q is lowrank"),
    (("--ratio", 0.5, "--model", "nothing"), "no such folder or file"),
])
def test_bad_input_is_one_line(tmp_path, text_file, arguments, message):
    dense_model(tmp_path / "dense", LLAMA, text_file)
    low = Transformer(LLAMA)
    replace_linears(low, 4)
    save_model(tmp_path / "low", low)
    places = dict(text=text_file, dense=tmp_path / "dense", low=tmp_path / "low")
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
    low, _ = load_model(tmp_path / "o")
    args = Namespace(init_from=str(tmp_path / "o"), method=3, rank=0, embedding_rank=0, dropout=0.0)
    blend, _, full_rank = train.new_model(args, "cpu")
    tokens = torch.arange(60).reshape(2, 30)
    assert full_rank == sum(p.numel() for p in model.parameters())
    blend.eval()
    for alpha, target in ((1.0, model), (0.0, low)):
        assert set_alpha(blend, alpha) == sum(isinstance(m, LowRankLinear) for m in low.modules())
        torch.testing.assert_close(blend(tokens), target(tokens), atol=1e-4, rtol=1e-4)
    finish_blend(blend)
    assert all(torch.equal(a, b) for a, b in zip(blend.state_dict().values(), low.state_dict().values()))


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
    with pytest.raises(InputError, match="is decomposed and has its ranks: leave --rank 3 out"):
        train.main([str(a) for a in (*command[1:], "--rank", 3)])
