"""What low rank costs in loss, and which way of training it costs least: full rank, plain B A x, and what is meant to help, on the same tokens.

    python bench.py quality --data FOLDER                      within an hour on a laptop: width 256, 8 blocks, r = 64
    python bench.py quality --data openwebtext                 on a GPU: gpt2, r = 192
    python bench.py quality --seeds 1 --steps 40               a quick look

Every line is a run of `train.py` with the flags shown in VARIANTS, in a folder of its own under --work, and what was finished is not repeated. Each
variant looks for its own learning rate by steps of a factor of 2; those of MAIN are then repeated with every seed. The time of a step is measured
afterwards, all variants in turn; then full rank gets a schedule as long as the best low-rank model took: same seconds, fewer tokens.
"""
import json
import math
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benches.common import interleaved, run_once, table
from common.cli import write_atomic
from common.device import find_device
from common.run import read_metrics

ADAMW, MUON = ["--optimizer", "adamw"], ["--optimizer", "muon"]
FULL = {"full rank, AdamW": ADAMW, "full rank, Muon": MUON}
LOW = {
    "plain": [*ADAMW, "--start", "normal"],
    "start: SVD": [*ADAMW, "--start", "svd"],
    "start: CoLA": [*ADAMW, "--start", "cola"],
    "SVD, decay of BA": [*ADAMW, "--start", "svd", "--decay", "product"],
    "rate of B x 4": [*ADAMW, "--start", "normal", "--b-rate", "4"],
    "Muon": [*MUON, "--start", "normal"],
    "Muon, SVD": [*MUON, "--start", "svd"],
    "Muon, orthogonal": [*MUON, "--start", "orthogonal"],
    "Muon, dense head": [*MUON, "--start", "orthogonal", "--head", "dense"],
    "Muon, decay of BA": [*MUON, "--start", "orthogonal", "--decay", "product"],
    "Muon, full rank for 20%": [*MUON, "--start", "orthogonal", "--warm-start", "0.2"],
    "Muon, blended (method 3)": [*MUON, "--method", "3"],
}
BEST = "Muon, orthogonal, wide"  # the largest rank with at most 0.65 of the parameters
VARIANTS = {**{name: ["--rank", "0", *flags] for name, flags in FULL.items()}, **{name: ["--rank", "RANK", *flags] for name, flags in LOW.items()},
            BEST: ["--rank", "WIDE", *LOW["Muon, orthogonal"]]}
MAIN = (*FULL, "plain", "Muon, orthogonal", BEST)
OTHERS = [name for name in VARIANTS if name not in MAIN]


def flags_of(name, args):
    values = {"RANK": str(args.rank), "WIDE": str(args.wide_rank)}
    return ["--model", args.model, "--data", args.data, "--vocabulary", str(args.vocabulary), "--batch-size", str(args.batch_size),
            "--seq-len", str(args.seq_len), "--dtype", args.dtype,
            "--eval-tokens", str(args.eval_tokens), "--log-interval", "5", *(values.get(flag, flag) for flag in VARIANTS[name])]


def train(name, rate, seed, steps, args):
    """One run, or what it left the last time. Returns its row."""
    folder = Path(args.work) / f"{''.join(c if c.isalnum() else '-' for c in name)}-{rate:g}-seed{seed}-{steps}steps"
    threads = str(max(1, torch.get_num_threads() // args.jobs))
    s = run_once("train.py", folder, *flags_of(name, args), "--lr", rate, "--seed", seed, "--max-iters", steps, "--eval-interval", -(-steps // 4),
                 "--save-interval", 100, env=dict(os.environ, OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads), quiet=True)
    curve = [(r["tokens"], r["val_loss"]) for r in read_metrics(folder / "metrics.jsonl") if r.get("val_loss") is not None]
    row = dict(model=s["model"], rank=s["rank"], variant=name, seed=seed, lr=rate, steps=steps, parameters=s["parameters"],
               share=s["parameters"] / s["parameters_full_rank"], tokens=s["tokens"], val_loss=s["val_loss"], curve=curve)
    print(f"{name}, rate {rate:g}, seed {seed}, {steps} steps: {row['val_loss']:.4f}", flush=True)
    return row


def in_parallel(function, jobs, args):
    with ThreadPoolExecutor(args.jobs) as pool:
        return list(pool.map(lambda job: function(*job, args), jobs))


def climb(name, args):
    """Runs at rates a factor of 2 apart, up or down from --rate (Muon's: four times that), until one is no better than the one before it.

    It begins low: beyond its best rate AdamW falls to a plateau on which a still larger rate may look better.
    """
    first = args.rate * (4 if "muon" in VARIANTS[name] else 1)
    rows = [train(name, first * factor, args.seeds[0], args.steps, args) for factor in (1, 2)]
    factor = 2 if rows[1]["val_loss"] < rows[0]["val_loss"] else 1 / 2
    if factor < 1:
        rows.reverse()
    while rows[-1]["val_loss"] < rows[-2]["val_loss"]:
        rows.append(train(name, rows[-1]["lr"] * factor, args.seeds[0], args.steps, args))
    return rows


def step_times(args):
    """variant -> seconds of an optimizer step, measured in turn in this process; of those whose steps are all alike."""
    file = Path(args.work) / "step_times.json"
    if file.exists():
        return json.loads(file.read_text())
    from train import Run, set_up
    names = [name for name in (*MAIN, *(args.variant or OTHERS)) if not {"--warm-start", "--method"} & set(VARIANTS[name])]
    runs = {name: Run(*set_up([*flags_of(name, args), "--out-dir", str(Path(args.work) / "timed" / str(i))])) for i, name in enumerate(names)}
    seconds = interleaved({name: run.one_step for name, run in runs.items()}, args.rounds)
    write_atomic(file, json.dumps(seconds, indent=1))
    return seconds


def bench(args):
    """All runs, then the times, then full rank for as many seconds as the best took."""
    device = find_device(args.dtype)
    Path(args.work).mkdir(parents=True, exist_ok=True)
    train("plain", args.rate, args.seeds[0], 1, args)  # prepares the data once
    rows = sum(in_parallel(climb, [(name,) for name in MAIN], args), [])
    best = {name: min((r for r in rows if r["variant"] == name), key=lambda r: r["val_loss"])["lr"] for name in MAIN}
    rows += in_parallel(train, [(name, best[name], seed, args.steps) for seed in args.seeds[1:] for name in MAIN], args)
    rows += sum(in_parallel(climb, [(name,) for name in args.variant or OTHERS], args), [])
    times = step_times(args)
    short = {name: max(10, round(args.steps * times[BEST] / times[name])) for name in FULL}
    rows += in_parallel(train, [(name, best[name], seed, short[name]) for name in FULL for seed in args.seeds], args)
    for r in rows:
        step = times.get(r["variant"])
        r |= dict(tokens_per_second=step and r["tokens"] / r["steps"] / step, seconds=step and step * r["steps"], equal_seconds=r["steps"] != args.steps)
    plot(summary(rows), rows, Path(args.work) / "quality.png")
    print(f"{device.name}: {args.model}, {args.steps} steps of {args.batch_size} sequences, {Path(args.data).name}; {args.work}/quality.png")
    return device, rows


def summary(rows):
    """A line for each variant and schedule: its best rate, the mean and the range over the seeds."""
    lines = []
    for key in dict.fromkeys((r["variant"], r["equal_seconds"]) for r in rows):
        runs = [r for r in rows if (r["variant"], r["equal_seconds"]) == key]
        rate = min(runs, key=lambda r: r["val_loss"] if r["seed"] == runs[0]["seed"] else math.inf)["lr"]
        runs = [r for r in runs if r["lr"] == rate]
        losses = [r["val_loss"] for r in runs]
        lines.append(dict(runs[0], mean=statistics.fmean(losses), low=min(losses), high=max(losses), runs=len(runs)))
    return lines


def report(rows):
    lines = summary(rows)
    base = {r["variant"]: r["mean"] for r in lines if not r["equal_seconds"]}
    return table(lines, {
        "variant": lambda r: r["variant"] + (", as many seconds" if r["equal_seconds"] else ""), "r": lambda r: r["rank"] or "full",
        "parameters": lambda r: f"{r['share']:.2f}x", "rate": lambda r: f"{r['lr']:g}", "val loss": lambda r: f"{r['mean']:.3f}",
        "seeds": lambda r: f"{r['low']:.3f} to {r['high']:.3f}" if r["runs"] > 1 else "one",
        "over full rank, AdamW": lambda r: f"{r['mean'] - base['full rank, AdamW']:+.3f}", "Muon": lambda r: f"{r['mean'] - base['full rank, Muon']:+.3f}",
        "M tokens": lambda r: f"{r['tokens'] / 1e6:.2f}", "tokens/s": lambda r: f"{r['tokens_per_second']:.0f}" if r["tokens_per_second"] else "-",
        "s": lambda r: f"{r['seconds']:.0f}" if r["seconds"] else "-"})


def plot(lines, rows, file):
    """Validation loss over tokens and over seconds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.2), dpi=120, layout="constrained", sharey=True)
    for line in (r for r in lines if r["variant"] in MAIN):
        runs = [dict(r["curve"]) for r in rows if all(r[k] == line[k] for k in ("variant", "lr", "steps"))]
        tokens = sorted(set.intersection(*map(set, runs)))
        losses = [statistics.fmean(run[t] for run in runs) for t in tokens]
        style = dict(color=f"C{MAIN.index(line['variant'])}", marker="o", ms=3, ls=":" if line["equal_seconds"] else "-")
        label = None if line["equal_seconds"] else f"{line['variant']}{', r = %d' % line['rank'] if line['rank'] else ''} ({line['share']:.2f}x the parameters)"
        axes[0].plot([t / 1e6 for t in tokens], losses, label=label, **style)
        axes[1].plot([t / line["tokens_per_second"] for t in tokens], losses, **style)
    axes[0].set(xlabel="million tokens", ylabel="validation loss (nats per token)")
    axes[1].set(xlabel="seconds (dotted: a schedule that ends with the best low rank's)")
    for ax in axes:
        ax.grid(alpha=0.3)
    axes[1].legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="upper right")
    fig.savefig(file)
    plt.close(fig)


def arguments(p):
    gpu = torch.cuda.is_available()
    p.add_argument("--data", default="openwebtext" if gpu else "builtin", help="as for train.py (default: openwebtext on a GPU, else builtin)")
    p.add_argument("--model", default="gpt2" if gpu else "small", help="architecture (default: gpt2 on a GPU, else small: width 256, 8 blocks)")
    p.add_argument("--vocabulary", type=int, default=0 if gpu else 4096, help="pieces of the tokenizer (default: GPT-2's on a GPU, else 4096)")
    p.add_argument("--rank", type=int, default=192 if gpu else 64, help="default: 192 on a GPU, else 64")
    p.add_argument("--wide-rank", type=int, default=208 if gpu else 96, help="of the variant with 0.65x the parameters (default: 208 on a GPU, else 96)")
    p.add_argument("--steps", type=int, default=2000 if gpu else 120, help="default: 2000 on a GPU, else 120")
    p.add_argument("--batch-size", type=int, default=16 if gpu else 8, help="sequences a step (default: 16 on a GPU, else 8)")
    p.add_argument("--seq-len", type=int, default=1024 if gpu else 256, help="tokens of each (default: 1024 on a GPU, else 256)")
    p.add_argument("--rate", type=float, default=7.5e-4, help="learning rate to begin the search at, of Muon 4 times that (default: %(default)s)")
    p.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[1, 2, 3], help="default: 1,2,3")
    p.add_argument("--variant", action="append", choices=OTHERS, metavar="NAME",
                   help=f"one of the others, may be repeated: {', '.join(map(repr, OTHERS))} (default: all)".replace("%", "%%"))
    p.add_argument("--dtype", default="auto", help="as for train.py (default: %(default)s)")
    p.add_argument("--eval-tokens", type=int, default=32768, help="of the validation text (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=5, help="timed steps of each variant (default: %(default)s)")
    p.add_argument("--jobs", type=int, default=1 if gpu else 2, help="runs at a time (default: 1 on a GPU, else 2)")
    p.add_argument("--work", default="out/quality", help="folder of the runs (default: %(default)s)")
