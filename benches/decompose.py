"""Decomposition (section IV.B): time and error against a loop of torch.linalg.svd, and what it does to a model.

    python bench.py decompose                 every matrix of smollm2-135m and of GPT-2's shapes, rank = a third of the smaller side
    python bench.py decompose --quality --text wikitext2-valid.txt --calibration fiction/    perplexity after 80, 60, 40%, and after recovery

The loop takes W, or W C where inputs count (H = C C^T their second moments), and is given C; ours has to compute C. Gathering H is not timed.
error_over_optimum is the largest over all matrices, of the Frobenius norm of (W - B A) C over that of the best possible, in float64.
"""
import time
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

from benches.common import call, run_once, table
from beyond.factorize import factorize, prepare
from checkpoint import load_model
from common.cli import InputError
from common.data import calibration_batches
from common.device import find_device
from common.run import read_metrics
from lowrank import halves, second_moments
from model import config_for

STEPS = (("q", "k", "v"), ("qkv",), ("o",), ("gate", "up"), ("up",), ("down",))  # layers that share an input


# ----------------------------------------------------------------------------- matrices

def smollm2(device, tokens):
    """(W, H) of every linear layer of the blocks, H from the dense model on the text that comes with Python."""
    model, tokenizer = load_model("smollm2-135m", device)
    streams = [model.begin(row.to(device)) for row in calibration_batches("builtin", tokenizer, model.config.context, tokens)]
    W, H = {}, {}
    with torch.no_grad():
        for i, block in enumerate(tqdm(model.blocks, desc="moments of smollm2-135m", disable=None, leave=False)):
            for half, run in halves(block):
                for name, moments in second_moments(getattr(block, half), streams, lambda s, run=run: run(*s)).items():
                    W[i, name], H[i, name] = getattr(getattr(block, half), name).weight.detach(), moments
                streams = [(x + run(x, rope, mask), rope, mask) for x, rope, mask in streams]
    return W, H


def gpt2(device, tokens):
    """Random matrices of GPT-2's shapes, whose spectra are flat, and inputs whose deviations fall as 1/sqrt(i)."""
    config = config_for("gpt2")
    n, m = config.width, config.ffn
    torch.manual_seed(0)
    W, H = {}, {}
    for i in range(config.blocks):
        for name, shape in dict(qkv=(3 * n, n), o=(n, n), up=(m, n), down=(n, m)).items():
            X = torch.randn(tokens, shape[1], device=device) * torch.arange(1, shape[1] + 1, device=device) ** -0.5  # (tokens, in)
            W[i, name], H[i, name] = 0.02 * torch.randn(shape, device=device), X.T @ X
    return W, H


# ----------------------------------------------------------------------------- time and error

def timed(function):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def loop_of_svd(matrices):
    return [torch.linalg.svd(M, full_matrices=False)[1] for M in matrices]


def error_over_optimum(W, C, factors, S):
    """||(W - B A) C|| over the singular values of W C that a rank cuts off."""
    B, A = (t.double() for t in factors)
    error = W.double() - B @ A
    return ((error if C is None else error @ C).norm() / S[B.shape[1]:].double().norm()).item()


def plain_groups(W):
    """A kind of matrix at a time, in thirds, so that the two ways take turns every few seconds."""
    kinds = defaultdict(list)
    for i, name in W:
        kinds[name].append((i, name))
    return [keys[n::3] for keys in kinds.values() for n in range(3) if keys[n::3]]


def activation_groups(W):
    """The layers that share an input, as decompose.py takes them."""
    return [keys for i in sorted({i for i, _ in W}) for step in STEPS if (keys := [(i, n) for n in step if (i, n) in W]) and len(keys) == len(step)
            and not (step == ("up",) and (i, "gate") in W)]


def compare(W, H, method, describe):
    """(seconds of ours, seconds of the loop, largest error over the optimum), the two in turn, group by group."""
    seconds = dict(ours=0.0, loop=0.0)
    worst = 0.0
    groups = plain_groups(W) if method == "plain" else activation_groups(W)
    for n, group in enumerate(tqdm([groups[0], *groups], desc=describe, disable=None, leave=False)):  # the first one twice: it warms up
        matrices, C = [W[key] for key in group], None
        ranks = [min(M.shape) // 3 for M in matrices]
        if method == "activations":
            H64, C = prepare(H[group[0]], (2, 1))

        def ours(matrices=matrices, ranks=ranks, group=group):
            if method == "plain":
                return factorize(torch.stack(matrices), ranks)[0]
            moments = prepare(H[group[0]], *(M.shape for M in matrices))
            return [factorize(M[None], [r], moments)[0][0] for M, r in zip(matrices, ranks)]
        factors, mine = timed(ours)
        targets = matrices if C is None else [(M.double() @ C).float() for M in matrices]
        values, loop = timed(lambda targets=targets: loop_of_svd(targets))
        if n:
            seconds = dict(ours=seconds["ours"] + mine, loop=seconds["loop"] + loop)
        worst = max(worst, *(error_over_optimum(M, C, f, S) for M, f, S in zip(matrices, factors, values)))
    return seconds["ours"], seconds["loop"], worst


def speed(args, device):
    rows = []
    for model, matrices in (("smollm2-135m", smollm2), ("gpt2", gpt2)):
        W, H = matrices(device.torch_device, args.tokens)
        for method in ("plain", "activations"):
            seconds, loop, worst = compare(W, H, method, f"{model}, {method}")
            rows.append(dict(model=model, method=method, matrices=len(W), seconds=seconds, seconds_loop=loop, speedup=loop / seconds, error_over_optimum=worst))
    print(f"All matrices of the blocks, rank a third of the smaller side, {device.name}")
    return rows


# ----------------------------------------------------------------------------- what is left of a model

VARIANTS = {"plain uniform": ("--ranks", "uniform"), "plain chosen": (), "activations uniform": ("--ranks", "uniform", "--calibration"),
            "activations chosen": ("--calibration",)}


def perplexity(folder, args):
    """Of a model folder or name, kept beside the others so that a stopped run goes on."""
    out = Path(args.work) / f"perplexity-{Path(folder).name}"
    summary = run_once("eval.py", out, "--model", folder, "--tasks", "perplexity", "--data", args.text, "--limit", args.limit, quiet=True)
    return summary["perplexity"]["perplexity"]


def decomposed(ratio, variant, args):
    folder, flags = Path(args.work) / f"{variant.replace(' ', '-')}-{round(100 * ratio)}", VARIANTS[variant]
    text = [args.calibration] if flags[-1:] == ("--calibration",) else []
    call("decompose.py", "--model", "smollm2-135m", "--ratio", ratio, *flags, *text, "--out-dir", folder, quiet=True)  # one that is done is left as it is
    return folder


def recovered(folder, method, args):
    """Train a decomposed folder for args.steps steps; (perplexity, rows of metrics.jsonl)."""
    out = Path(args.work) / f"method-{method}-from-{folder.name}"
    run_once("train.py", out, "--method", method, "--init-from", folder, "--data", args.calibration, "--max-iters", args.steps, "--batch-size", 2,
             "--seq-len", 256, "--lr", args.lr, "--dtype", "float32", "--eval-tokens", 2048, quiet=True)
    return perplexity(out, args), read_metrics(out / "metrics.jsonl")


def quality(args):
    if not args.text or not args.calibration:
        raise InputError("--quality needs --text (perplexity is measured on it) and --calibration (for the activations and for recovery)")
    rows, curves = [dict(method="dense", ratio=1.0, steps=0, perplexity=perplexity("smollm2-135m", args))], {}
    for ratio in args.ratios:
        for variant in VARIANTS:
            rows.append(dict(method=variant, ratio=ratio, steps=0, perplexity=perplexity(decomposed(ratio, variant, args), args)))
            print(rows[-1], flush=True)
    for method in (2, 3) if args.steps else ():
        value, metrics = recovered(decomposed(args.recover, "activations chosen", args), method, args)
        rows.append(dict(method=f"activations chosen, method {method}", ratio=args.recover, steps=args.steps, perplexity=value))
        curves[f"method {method}"] = [(m["step"], m["loss"]) for m in metrics if m.get("loss") is not None]
    if curves:
        plot_recovery(curves, args)
    return rows


def plot_recovery(curves, args):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 4), dpi=120, layout="constrained")
    for name, points in curves.items():
        ax.plot(*zip(*points), label=name)
    ax.set(title=f"smollm2-135m with {args.recover:.0%} of its block matrices, recovering", xlabel="step of 2 x 256 tokens", ylabel="training loss")
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(Path(args.work) / "recovery.png")
    plt.close(fig)


# ----------------------------------------------------------------------------- python bench.py decompose

def report(rows):
    if "perplexity" in rows[0]:
        return table(rows, {"method": lambda r: r["method"], "kept": lambda r: f"{r['ratio']:.0%}", "steps of recovery": lambda r: r["steps"],
                            "perplexity": lambda r: f"{r['perplexity']:,.1f}"})
    return table(rows, {"model": lambda r: r["model"], "method": lambda r: r["method"], "seconds": lambda r: f"{r['seconds']:.1f}",
                        "loop of svd": lambda r: f"{r['seconds_loop']:.1f}", "speedup": lambda r: f"{r['speedup']:.1f}x",
                        "error over optimum": lambda r: f"{r['error_over_optimum']:.5f}"})


def arguments(p):
    p.add_argument("--tokens", type=int, default=4096,
                   help="whose inputs X X^T is gathered from (default: %(default)s)")
    p.add_argument("--quality", action="store_true", help="instead of the time, perplexity of smollm2-135m decomposed in several ways (an hour on two cores)")
    p.add_argument("--text", help="with --quality: the text perplexity is measured on")
    p.add_argument("--limit", type=int, default=16384, help="tokens of it (default: %(default)s)")
    p.add_argument("--calibration", help="with --quality: the text whose activations count, and on which a decomposed model recovers")
    p.add_argument("--ratios", type=lambda text: [float(r) for r in text.split(",")], default=[0.8, 0.6, 0.4],
                   help="shares to keep (default: 0.8,0.6,0.4)")
    p.add_argument("--recover", type=float, default=0.6,
                   help="the share from which recovery is measured (default: %(default)s)")
    p.add_argument("--steps", type=int, default=200,
                   help="of recovery, 2 x 256 tokens each; 0: none (default: %(default)s)")
    p.add_argument("--lr", type=float, default=3e-4, help="learning rate of recovery (default: %(default)s)")
    p.add_argument("--work", default="out/bench_decompose",
                   help="where the models are made; a stopped run goes on there (default: %(default)s)")


def bench(args):
    device = find_device("float32")
    torch.set_float32_matmul_precision("highest")
    rows = quality(args) if args.quality else speed(args, device)
    return device, rows
