"""Does low rank cost accuracy? Full rank, plain low rank, and what is meant to help, on the same tokens.

    python bench.py quality                  about two hours on two cores; a stopped run goes on
    python bench.py quality --max-iters 40   a quick look

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

from benches.common import run_once, shown, table
from common.device import find_device
from common.run import read_metrics
from model import config_for

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
GPU = torch.cuda.is_available()
DEFAULTS = dict(
    data="builtin", model="gpt2" if GPU else "small", max_iters=2000 if GPU else 120, seeds="1,2,3",
    batch_size=16 if GPU else 8, seq_len=1024 if GPU else 256, rate=7.5e-4, jobs=1 if GPU else 2,
    out_dir="out/quality")


def train(name, rate, seed, args):
    """One run, or what it left the last time. Returns its row."""
    share, method, optimizer, settings = VARIANTS[name]
    word = "".join(c if c.isalnum() else "-" for c in name)
    folder = Path(args.out_dir) / f"{word}-{rate:g}-seed{seed}-{args.max_iters}steps"
    threads = str(max(1, torch.get_num_threads() // args.jobs))
    s = run_once(
        "train.py", folder, "--model", args.model, "--rank", int(share * config_for(args.model).width),
        "--method", method, "--optimizer", optimizer, "--data", args.data, "--batch-size", args.batch_size,
        "--seq-len", args.seq_len, "--lr", rate, "--seed", seed, "--max-iters", args.max_iters,
        "--save-interval", 100, quiet=True, env=dict(os.environ, OMP_NUM_THREADS=threads),
        settings=dict(settings, eval_tokens=32768, vocabulary=0 if args.model == "gpt2" else 4096))
    rows = read_metrics(folder / "metrics.jsonl")
    print(f"{name}, rate {rate:g}, seed {seed}, {args.max_iters} steps: {s['val_loss']:.4f}", flush=True)
    return dict(model=s["model"], rank=s["rank"], variant=name, seed=seed, lr=rate, steps=args.max_iters,
                parameters=s["parameters"], share=s["parameters"] / s["parameters_full_rank"],
                tokens=s["tokens"], val_loss=s["val_loss"],
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
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = sum(pool.map(lambda name: climb(name, args), VARIANTS), [])
        best = {line["variant"]: line["lr"] for line in summary(rows)}
        others = [(name, best[name], seed, args) for seed in args.seeds[1:] for name in MAIN]
        rows += pool.map(lambda job: train(*job), others)
    return find_device(), rows


def summary(rows):
    """A line for each variant: its best rate, the mean and the range over the seeds. Runs of another length
    are left out."""
    rows, lines = [r for r in rows if not r.get("equal_seconds")], []
    for variant in dict.fromkeys(r["variant"] for r in rows):
        runs = [r for r in rows if r["variant"] == variant]
        best = min((r for r in runs if r["seed"] == runs[0]["seed"]), key=lambda r: r["val_loss"])
        losses = [r["val_loss"] for r in runs if r["lr"] == best["lr"]]
        lines.append(dict(best, mean=statistics.fmean(losses), low=min(losses), high=max(losses),
                          runs=len(losses)))
    return lines


def report(rows):
    lines = summary(rows)
    base = {r["variant"]: r["mean"] for r in lines}
    lines = shown(lines, adamw=lambda r: r["mean"] - base.get("full rank, AdamW", math.nan),
                  muon=lambda r: r["mean"] - base.get("full rank, Muon", math.nan),
                  seeds=lambda r: f"{r['low']:.3f} to {r['high']:.3f}" if r["runs"] > 1 else "one")
    return table(lines, {
        "variant": "variant", "r": "rank", "parameters": ("share", "{:.2f}x"), "rate": ("lr", "{:g}"),
        "val loss": ("mean", "{:.3f}"), "seeds": "seeds", "over full rank, AdamW": ("adamw", "{:+.3f}"),
        "Muon": ("muon", "{:+.3f}"), "M tokens": ("tokens", "{:.2f}", 1e6)})
