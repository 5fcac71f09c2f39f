"""What low rank costs, and whether the cost falls with more text: full rank, low rank, narrower dense models.

    python bench.py scaling --sizes 64x4 --json results/scaling.json

All are trained on the same novels ($DATA_DIR/text/fiction) with the same optimizer. Each looks for its rate by
factors of 2, at SEARCH tokens a parameter, and for the longest runs again at lower ones, by the loss on one
novel that nobody trains on; what is reported is the loss on two others. Tokens a parameter are those of the
full-rank model: all variants of a size see the same text. A run that is done is not repeated, and after
--hours none begins. A model that only counts bigrams and trigrams of the same text is the floor of any claim.

The interval of a difference to full rank has two parts, added as squares: 1.96 standard errors over PARTS
pieces of the novels and, with several seeds, that of the mean over these (Student's t).
"""
import json
import math
import os
import shutil
import statistics
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benches.common import DATA_DIR, run_once, table
from checkpoint import load_model
from common.cli import refuse
from common.data import eval_batches, first_tokens, open_corpus, prepare
from common.device import find_device
from common.loss import head_loss
from lowrank import replace_linears
from model import Transformer, config_for, count_parameters, flops_per_token

VOCABULARY, LENGTH, BATCH, PARTS = 1024, 256, 8, 32
SIZES = {"64x4": (4, 4, 64), "96x6": (6, 6, 96), "128x6": (6, 8, 128)}  # blocks, heads, width
SHARES = {"r = n/16": 1 / 16, "r = n/8": 1 / 8, "r = n/4": 1 / 4, "r = 3n/8": 3 / 8, "r = n/2": 1 / 2}
# What may help, or does not: other settings of train.py, for the first size and seed.
CHANGES = {"r = n/4, dense head": dict(head="dense"), "r = n/4, full rank for 20%": dict(warm_start=0.2),
           "r = n/4, normal start": dict(start="normal"), "r = n/4, AdamW": {}, "full rank, AdamW": {}}
DENSE = {"full rank": None, "narrow, parameters of n/4": 1 / 4, "narrow, operations of n/4": 1 / 4,
         "narrow, parameters of n/16": 1 / 16}
SEARCH, RATIOS, FIRST_RATE = 4, (1, 4, 20), 16e-3
CHOOSE, REPORT = "Dickens_Hard.txt", ("Austen_Pride.txt", "EBronte_Wuthering.txt")
STUDENT = {2: 12.71, 3: 4.30}  # 97.5% quantiles for so many seeds
DEFAULTS = dict(sizes=list(SIZES), seeds=[1, 2, 3], hours=24.0, jobs=2, out_dir="out/scaling")


# ----------------------------------------------------------------------------- the models

def shapes(shape, rank):
    """A model without numbers. shape: blocks, heads, width."""
    blocks, heads, width = shape
    config = config_for("tiny", vocab_size=VOCABULARY, blocks=blocks, heads=heads, kv_heads=heads,
                        width=width, ffn=4 * width)
    with torch.device("meta"):
        model = Transformer(config)
        if rank:
            replace_linears(model, rank)
    return model


def operations(model):
    return flops_per_token(model, LENGTH, training=True)


def variant(size, name):
    """(shape, rank) of a variant. A narrow model has the width whose count comes nearest."""
    blocks, heads, width = SIZES[size]
    base = name.rsplit(", ", 1)[0] if name in CHANGES else name
    if base in SHARES or base == "full rank":
        return SIZES[size], int(SHARES.get(base, 0) * width)
    share = DENSE[name]
    count = count_parameters if "parameters" in name else operations
    wanted = count(shapes(SIZES[size], int(share * width)))
    narrower = [(blocks, heads, n) for n in range(heads, width, heads)]
    return min(narrower, key=lambda shape: abs(count(shapes(shape, 0)) - wanted)), 0


# ----------------------------------------------------------------------------- the queue

class Novels:
    """The text to learn from, in a folder of its own, and the novels that are kept out of it."""

    def __init__(self, args):
        source, self.folder = Path(DATA_DIR) / "text" / "fiction", Path(args.out_dir) / "novels"
        self.held_out = [source / name for name in (CHOOSE, *REPORT)]
        missing = [str(path) for path in self.held_out if not path.exists()]
        refuse(missing, f"no {', '.join(missing)}: set $DATA_DIR to the folder that has text/fiction")
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in source.glob("*.txt"):
            if path not in self.held_out:
                shutil.copyfile(path, self.folder / path.name)


@torch.no_grad()
def held_out_losses(model, tokenizer, path):
    """The loss of each window of a novel."""
    tokens = np.array(first_tokens(str(path), tokenizer))
    batches = eval_batches(tokens, LENGTH, 1, len(tokens))
    return [head_loss(model.head, model.hidden(x), y).item() for x, y in batches]


def train(args, novels, size, name, ratio, lr, seed):
    """The row of one run, made now or found where it was made before. None: it is late."""
    shape, rank = variant(size, name)
    word = "".join(c if c.isalnum() else "-" for c in f"{size} {name}")
    folder = Path(args.out_dir) / f"{word}-{ratio}-{lr:g}-{seed}"
    if (folder / "row.json").exists():
        return json.loads((folder / "row.json").read_text())
    if time.time() > args.deadline:
        return None
    steps = round(ratio * count_parameters(shapes(SIZES[size], 0)) / (LENGTH * BATCH))
    settings = dict(shape=list(shape), vocabulary=VOCABULARY, eval_interval=steps, eval_tokens=LENGTH)
    settings |= CHANGES.get(name, {})
    s = run_once("train.py", folder, "--model", "tiny", "--rank", rank, "--data", novels.folder, "--lr", lr,
                 "--optimizer", "adamw" if "AdamW" in name else "muon", "--batch-size", BATCH,
                 "--seq-len", LENGTH, "--max-iters", steps, "--seed", seed, "--save-interval", 1000,
                 "--log-interval", 100, "--dtype", "float32", **settings)
    model, tokenizer = load_model(folder)
    choose, *report = [held_out_losses(model, tokenizer, path) for path in novels.held_out]
    parts = [float(part.mean()) for part in np.array_split(sum(report, []), PARTS)]
    row = dict(size=size, variant=name, ratio=ratio, lr=lr, seed=seed, rank=rank, shape=list(shape),
               parameters=count_parameters(model), operations=operations(model), tokens=s["tokens"],
               seconds=s["seconds"], choose=statistics.fmean(choose), loss=statistics.fmean(parts),
               parts=parts)
    (folder / "row.json").write_text(json.dumps(row))
    print(f"{size}, {name}, {ratio} tokens a parameter, rate {lr:g}, seed {seed}: {row['loss']:.4f}")
    return row


def best_rate(loss, rate, up=True):
    """The rate of least loss, by factors of 2 from `rate` until the next is no better; nan: it is late.
    up: larger rates are tried too."""
    factor = 2.0 if up and loss(rate * 2) < loss(rate) else 0.5
    while loss(rate * factor) < loss(rate):
        rate *= factor
    return rate if math.isfinite(loss(rate * factor)) else math.nan


def finish(args, novels, size, name, seed):
    """The rows of a variant, one for each length, at the rates that suit the first seed."""
    def chosen(ratio, rate):
        row = train(args, novels, size, name, ratio, rate, args.seeds[0])
        return row["choose"] if row else math.nan
    rate, rows = best_rate(partial(chosen, SEARCH), FIRST_RATE / 4 if "AdamW" in name else FIRST_RATE), []
    for ratio in RATIOS:
        if ratio > SEARCH:
            rate = best_rate(partial(chosen, ratio), rate, up=False)
        rows.append(None if math.isnan(rate) else train(args, novels, size, name, ratio, rate, seed))
    return [row for row in rows if row]


def bench(args):
    unknown = [size for size in args.sizes if size not in SIZES]
    refuse(unknown, f"--sizes {', '.join(unknown)}: the sizes are {', '.join(SIZES)}")
    os.environ["OMP_NUM_THREADS"] = "1"  # of each run
    args.deadline, novels, rows = time.time() + 3600 * args.hours, Novels(args), []
    for size in args.sizes:
        for seed in args.seeds:
            first = (size, seed) == (args.sizes[0], args.seeds[0])
            pool, names = ThreadPoolExecutor(args.jobs), (*DENSE, *SHARES, *(CHANGES if first else ()))
            jobs = [pool.submit(finish, args, novels, size, name, seed) for name in names]
            try:
                rows += sum((job.result() for job in jobs), [])
            finally:  # after Ctrl-C, which also stops the runs, no other begins
                pool.shutdown(cancel_futures=True)
    files = prepare(open_corpus(str(novels.folder), str(novels.folder)), None, VOCABULARY, own=True)
    tokens = np.array(files.train, np.int64)
    texts = [np.array(first_tokens(str(path), files.tokenizer)) for path in novels.held_out[1:]]
    for order, name in ((2, "bigrams, counted"), (3, "trigrams, counted")):
        loss = statistics.fmean(counting_model(tokens, text, order) for text in texts)
        rows.append(dict(size=None, variant=name, tokens=len(tokens), loss=loss))
    return find_device("float32"), rows


# ----------------------------------------------------------------------------- a model that counts

def counting_model(train, text, order):
    """Nats a token of an interpolated model of `order` tokens with a discount of 0.75, counted on train:
    p_n(w | c) = max(count(c w) - 0.75, 0) / count(c) + 0.75 kinds(c) / count(c) p_(n-1)(w | shorter c)."""
    p = np.full(len(text) - order + 1, 1 / VOCABULARY)
    for n in range(1, order + 1):
        token = ngrams(train, n, 0)
        seen, counts = np.unique(token, return_counts=True)
        contexts, totals = np.unique(token // VOCABULARY, return_counts=True)
        kinds = np.bincount(np.searchsorted(contexts, seen // VOCABULARY), minlength=len(contexts))
        asked = ngrams(text, n, order - n)
        where = np.searchsorted(seen, asked).clip(max=len(seen) - 1)
        count = np.where(seen[where] == asked, counts[where], 0)
        where = np.searchsorted(contexts, asked // VOCABULARY).clip(max=len(contexts) - 1)
        better = (np.maximum(count - 0.75, 0) + 0.75 * kinds[where] * p) / totals[where]
        p = np.where(contexts[where] == asked // VOCABULARY, better, p)
    return float(-np.log(p).mean())


def ngrams(tokens, n, skip):
    """Each n tokens in a row as one number, from position `skip` on."""
    code = np.zeros(len(tokens) - skip - n + 1, np.int64)
    for i in range(n):
        code = code * VOCABULARY + tokens[skip + i:skip + i + len(code)]
    return code


# ----------------------------------------------------------------------------- the answer

def compared(rows):
    """A line for each size, variant and length: its mean loss, and the difference to full rank with half its
    interval, over the seeds that both have."""
    runs, lines = defaultdict(dict), []
    for r in rows:
        if r["size"]:
            runs[r["size"], r["variant"], r["ratio"]][r["seed"]] = r
    for (size, _, ratio), own in runs.items():
        full = runs[size, "full rank", ratio]
        seeds = sorted(own.keys() & full.keys())
        gaps = np.array([np.subtract(own[s]["parts"], full[s]["parts"]) for s in seeds])  # (seeds, PARTS)
        half = 1.96 * gaps.mean(0).std(ddof=1) / PARTS ** 0.5
        if len(seeds) in STUDENT:
            half = math.hypot(half, STUDENT[len(seeds)] * gaps.mean(1).std(ddof=1) / len(seeds) ** 0.5)
        loss = statistics.fmean(own[s]["loss"] for s in seeds)
        lines.append(own[seeds[0]] | dict(loss=loss, gap=gaps.mean(), half=half, seeds=len(seeds)))
    return lines


def dense_like(line, lines):
    """Parameters of the dense model that has a line's loss after the same tokens, as a share of full rank's:
    on straight lines of log N between the dense models of its size. None outside them."""
    dense = [d for d in lines if d["variant"] in DENSE and d["ratio"] == line["ratio"]]
    dense.sort(key=lambda d: d["loss"])
    losses, most = [d["loss"] for d in dense], max(d["parameters"] for d in dense)
    if not losses[0] <= line["loss"] <= losses[-1]:
        return None
    return math.exp(np.interp(line["loss"], losses, [math.log(d["parameters"] / most) for d in dense]))


def exponent(points):
    """gamma of N_eff / N = (r/n)^gamma by least squares in logarithms. points: pairs (r/n, N_eff / N)."""
    x, y = np.log(np.array(points)).T
    return float(x @ y / (x @ x))


def report(rows):
    """A table for each size, the fit of N_eff, and what counting gives."""
    lines, texts = compared(rows), []
    for size in dict.fromkeys(line["size"] for line in lines):
        mine, own, points = [line for line in lines if line["size"] == size], {}, []
        full = next(line for line in mine if line["variant"] == "full rank")
        for line in mine:
            cells = own.setdefault(line["variant"], {
                size: line["variant"], "width": line["shape"][2], "r": line["rank"] or "",
                "parameters": f"{line['parameters'] / full['parameters']:.2f}x",
                "operations": f"{line['operations'] / full['operations']:.2f}x"})
            gap = "" if line["variant"] == "full rank" else f" ({line['gap']:+.3f} ± {line['half']:.3f})"
            cells[f"{line['ratio']} tokens a parameter"] = f"{line['loss']:.3f}{gap}"
            like = dense_like(line, mine) if line["rank"] else None
            if line["ratio"] == RATIOS[-1]:
                cells |= {"as a dense model of": f"{like:.2f}x" if like else "", "seeds": line["seeds"]}
                if like and line["variant"] in SHARES:
                    points.append((SHARES[line["variant"]], like))
        texts.append(table(own.values()))
        if len(points) > 1:
            texts.append(f"N_eff = N (r/n)^{exponent(points):.2f} at {RATIOS[-1]} tokens a parameter")
    counted = "; ".join(f"{r['variant']}: {r['loss']:.3f}" for r in rows if not r["size"])
    return "\n\n".join([*texts, f"{counted} (all {rows[-1]['tokens']:,} tokens of the training text)"])


def plot(rows, path):
    """Above, the difference to full rank over tokens a parameter; below, the loss over operations."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = compared(rows)
    sizes = list(dict.fromkeys(line["size"] for line in lines))
    figure, axes = plt.subplots(2, len(sizes), figsize=(6 * len(sizes), 8), squeeze=False)
    for (above, below), size in zip(axes.T, sizes):
        for i, name in enumerate((*DENSE, *SHARES)):
            runs = [line for line in lines if (line["size"], line["variant"]) == (size, name)]
            if not runs:
                continue
            style = dict(marker="o", ms=4, color=f"C{i}", ls="-" if name in SHARES else "--", label=name)
            ratios, gaps, halves = zip(*((r["ratio"], r["gap"], r["half"]) for r in runs))
            above.errorbar(ratios, gaps, halves, **style)
            below.plot([r["operations"] * r["tokens"] for r in runs], [r["loss"] for r in runs], **style)
        above.set(title=size, xscale="log", xlabel="tokens a parameter", ylabel="nats above full rank")
        below.set(xscale="log", xlabel="operations of the training", ylabel="loss, nats a token")
        above.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
