"""Does low rank cost accuracy? Full rank, plain low rank, and what is meant to help, on the same tokens and
seeds.

    python bench.py quality              about two hours on two cores; a stopped run goes on where it was
    python bench.py quality --steps 40   a quick look

Every variant has its own learning rate: a factor of 2 up or down until the validation loss gets no better.
AdamW's search begins low, because beyond its best rate it falls to a plateau on which a still larger rate may
look better; Muon's begins four times higher. The table says the mean over the seeds and its range.
"""
import math
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benches.common import run_once, table
from common.device import find_device
from common.run import read_metrics

# name -> (share of the width that is the rank (0: full), method, optimizer, settings of train.py)
VARIANTS = {
    "full rank, AdamW": (0, 1, "adamw", {}),
    "full rank, Muon": (0, 1, "muon", {}),
    "plain": (1 / 4, 1, "adamw", dict(start="normal")),
    "Muon, orthogonal": (1 / 4, 1, "muon", {}),
    "Muon, orthogonal, wide": (3 / 8, 1, "muon", {}),  # the largest rank with at most 0.65 of the parameters
    "start: SVD": (1 / 4, 1, "adamw", dict(start="svd")),
    "start: CoLA": (1 / 4, 1, "adamw", dict(start="cola")),
    "Muon, dense head": (1 / 4, 1, "muon", dict(head="dense")),
    "Muon, full rank for 20%": (1 / 4, 1, "muon", dict(warm_start=0.2)),
    "Muon, blended (method 3)": (1 / 4, 3, "muon", {}),
}
MAIN = list(VARIANTS)[:5]  # of several seeds; the others have one
WIDTH = {"small": 256, "gpt2": 768}


def train(name, rate, seed, args):
    """One run, or what it left the last time. Returns its row."""
    share, method, optimizer, settings = VARIANTS[name]
    word = "".join(c if c.isalnum() else "-" for c in name)
    folder = Path(args.work) / f"{word}-{rate:g}-seed{seed}-{args.steps}steps"
    threads = str(max(1, torch.get_num_threads() // args.jobs))
    s = run_once(
        "train.py", folder, "--model", args.model, "--rank", int(share * WIDTH[args.model]), "--method",
                 method,
        "--optimizer", optimizer, "--data", args.data, "--batch-size", args.batch_size, "--seq-len",
                 args.seq_len,
        "--lr", rate, "--seed", seed, "--max-iters", args.steps, "--save-interval", 100, quiet=True,
        settings=dict(settings, eval_tokens=32768, vocabulary=args.vocabulary),
        env=dict(os.environ, OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads))
    rows = read_metrics(folder / "metrics.jsonl")
    print(f"{name}, rate {rate:g}, seed {seed}, {args.steps} steps: {s['val_loss']:.4f}", flush=True)
    return dict(model=s["model"], rank=s["rank"], variant=name, seed=seed, lr=rate, steps=args.steps,
                parameters=s["parameters"], share=s["parameters"] / s["parameters_full_rank"],
                tokens=s["tokens"],
                val_loss=s["val_loss"],
                curve=[(r["tokens"], r["val_loss"]) for r in rows if r.get("val_loss")])


def climb(name, args):
    """Runs of the first seed at rates a factor of 2 apart, until one is no better than the one before it."""
    first = args.rate * (4 if VARIANTS[name][2] == "muon" else 1)
    rows = [train(name, first * factor, args.seeds[0], args) for factor in (1, 2)]
    factor = 2
    if rows[1]["val_loss"] >= rows[0]["val_loss"]:
        factor = 1 / 2
        rows.reverse()
    while rows[-1]["val_loss"] < rows[-2]["val_loss"]:
        rows.append(train(name, rows[-1]["lr"] * factor, args.seeds[0], args))
    return rows


def bench(args):
    device = find_device()
    with ThreadPoolExecutor(args.jobs) as pool:
        searches = pool.map(lambda name: climb(name, args), VARIANTS)
        rows = [row for search in searches for row in search]
        best = {name: min((r for r in rows if r["variant"] == name), key=lambda r: r["val_loss"])["lr"]
                for name in MAIN}
        others = [(name, seed) for seed in args.seeds[1:] for name in MAIN]
        rows += pool.map(lambda job: train(job[0], best[job[0]], job[1], args), others)
    print(f"{device.name}: {args.model}, {args.steps} steps of {args.batch_size} sequences, "
          f"{Path(args.data).name}")
    return device, rows


def summary(rows):
    """A line for each variant: its best rate, the mean and the range over the seeds. Runs of another length
    are left out."""
    rows = [r for r in rows if not r.get("equal_seconds")]
    lines = []
    for variant in dict.fromkeys(r["variant"] for r in rows):
        runs = [r for r in rows if r["variant"] == variant]
        first = [r for r in runs if r["seed"] == runs[0]["seed"]]
        rate = min(first, key=lambda r: r["val_loss"])["lr"]
        losses = [r["val_loss"] for r in runs if r["lr"] == rate]
        lines.append(dict(runs[0], lr=rate, mean=statistics.fmean(losses), low=min(losses), high=max(losses),
                          runs=len(losses)))
    return lines


def report(rows):
    lines = summary(rows)
    base = {r["variant"]: r["mean"] for r in lines}

    def over(r, name):
        return f"{r['mean'] - base.get(name, math.nan):+.3f}"
    return table(lines, {
        "variant": lambda r: r["variant"], "r": lambda r: r["rank"] or "full",
        "parameters": lambda r: f"{r['share']:.2f}x", "rate": lambda r: f"{r['lr']:g}",
        "val loss": lambda r: f"{r['mean']:.3f}",
        "seeds": lambda r: f"{r['low']:.3f} to {r['high']:.3f}" if r["runs"] > 1 else "one",
        "over full rank, AdamW": lambda r: over(r, "full rank, AdamW"),
                         "Muon": lambda r: over(r, "full rank, Muon"),
        "M tokens": lambda r: f"{r['tokens'] / 1e6:.2f}"})


def arguments(p):
    gpu = torch.cuda.is_available()
    p.add_argument("--data", default="builtin", help="as for train.py (default: %(default)s)")
    p.add_argument("--model", default="gpt2" if gpu else "small", choices=tuple(WIDTH),
                   help="default: %(default)s")
    p.add_argument("--vocabulary", type=int, default=0 if gpu else 4096,
                   help="pieces of the tokenizer; 0: GPT-2's (default: %(default)s)")
    p.add_argument("--steps", type=int, default=2000 if gpu else 120, help="default: %(default)s")
    p.add_argument("--batch-size", type=int, default=16 if gpu else 8,
                   help="sequences a step (default: %(default)s)")
    p.add_argument("--seq-len", type=int, default=1024 if gpu else 256,
                   help="tokens of each (default: %(default)s)")
    p.add_argument("--rate", type=float, default=7.5e-4,
                   help="where the search begins (default: %(default)s)")
    p.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[1, 2, 3],
                   help="default: 1,2,3")
    p.add_argument("--jobs", type=int, default=1 if gpu else 2, help="runs at a time (default: %(default)s)")
    p.add_argument("--work", default="out/quality", help="folder of the runs (default: %(default)s)")
