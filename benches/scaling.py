"""What low rank costs, and whether the cost falls with more text: full rank, low rank, narrower dense models.

    python bench.py scaling --sizes 64x4 --json results/scaling.json

All train on the same novels ($DATA_DIR/text/fiction), as many tokens a parameter of full rank, with the same
optimizer. Each looks for its rate at the first size, by factors of 2, at SEARCH tokens a parameter, and for
the longest runs again at lower ones, by the loss on one novel that nobody trains on; the loss on two others
is reported. A model that only counts bigrams and trigrams of the same text is the floor of any claim.

The interval of a difference to full rank has two parts, added as squares: 1.96 standard errors over PARTS
pieces of the novels and, with several seeds, that of the mean over these (Student's t).
"""
import json
import math
import os
import shutil
import statistics
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benches.common import DATA_DIR, run_once, table
from benches.train import shapes_of_rank
from checkpoint import load_model
from common.cli import refuse
from common.data import eval_batches, first_tokens, open_corpus, prepare
from common.device import find_device
from common.loss import head_loss
from model import count_parameters, flops_per_token

VOCABULARY, LENGTH, BATCH, PARTS = 1024, 256, 8, 32
SIZES = {"64x4": (4, 4, 64), "96x6": (6, 6, 96), "128x6": (6, 8, 128)}  # blocks, heads, width
SHARES = {"r = n/16": 1 / 16, "r = n/8": 1 / 8, "r = n/4": 1 / 4, "r = 3n/8": 3 / 8, "r = n/2": 1 / 2}
DENSE = {"full rank": 0, "narrow, parameters of n/4": 1 / 4, "narrow, operations of n/4": 1 / 4,
         "narrow, parameters of n/16": 1 / 16}
# What may help, or does not: other settings of train.py, for the first size and seed.
CHANGES = {"r = n/4, dense head": dict(head="dense"), "r = n/4, full rank for 20%": dict(warm_start=0.2),
           "r = n/4, normal start": dict(start="normal")}
operations = partial(flops_per_token, length=LENGTH, training=True)  # of a model, for a token
SEARCH, RATIOS, FIRST_RATE = 4, (1, 4, 20), 16e-3
FICTION = Path(DATA_DIR) / "text" / "fiction"
CHOOSE, REPORT = "Dickens_Hard.txt", ("Austen_Pride.txt", "EBronte_Wuthering.txt")
STUDENT = {2: 12.71, 3: 4.30}  # 97.5% quantiles for so many seeds
DEFAULTS = dict(sizes=list(SIZES), seeds=[1, 2, 3], hours=24.0, jobs=2, out_dir="out/scaling")

def shapes(shape, rank):
    """A model without numbers. shape: blocks, heads, width."""
    blocks, heads, width = shape
    return shapes_of_rank("tiny", rank, vocab_size=VOCABULARY, blocks=blocks, heads=heads, kv_heads=heads,
                          width=width, ffn=4 * width)

def variant(size, name):
    """(shape, rank) of a variant. A dense model has the width whose count comes nearest."""
    blocks, heads, width = SIZES[size]
    if name not in DENSE:
        return SIZES[size], int(SHARES[name.split(",")[0]] * width)
    count = count_parameters if "parameters" in name else operations
    wanted = count(shapes(SIZES[size], int(DENSE[name] * width)))
    narrower = [(blocks, heads, n) for n in range(heads, width + 1, heads)]
    return min(narrower, key=lambda shape: abs(count(shapes(shape, 0)) - wanted)), 0

@torch.no_grad()
def window_losses(model, tokenizer, novel):
    """The loss of each window of a novel."""
    tokens = np.array(first_tokens(FICTION / novel, tokenizer))
    batches = eval_batches(tokens, LENGTH, 1, len(tokens))
    return [head_loss(model.head, model.hidden(x), y).item() for x, y in batches]

def train(args, size, name, ratio, lr, seed):
    """The row of one run, made now or found where it was made before; a TimeoutError where it is late."""
    shape, rank = variant(size, name)
    word = "".join(c if c.isalnum() else "-" for c in f"{size} {name}")
    folder = Path(args.out_dir) / f"{word}-{ratio}-{lr:g}-{seed}"
    if (folder / "row.json").exists():
        return json.loads((folder / "row.json").read_text())
    if time.time() > args.deadline:
        raise TimeoutError
    steps = round(ratio * count_parameters(shapes(SIZES[size], 0)) / (LENGTH * BATCH))
    s = run_once("train.py", folder, "--model", "tiny", "--rank", rank, "--data", args.novels, "--lr", lr,
                 "--optimizer", "muon", "--batch-size", BATCH, "--seq-len", LENGTH, "--max-iters", steps,
                 "--seed", seed, "--save-interval", 1000, "--log-interval", 100, "--dtype", "float32",
                 shape=list(shape), vocabulary=VOCABULARY, eval_interval=steps, eval_tokens=LENGTH,
                 **CHANGES.get(name, {}))
    model, tokenizer = load_model(folder)
    choose, *report = [window_losses(model, tokenizer, name) for name in (CHOOSE, *REPORT)]
    parts = [float(part.mean()) for part in np.array_split(sum(report, []), PARTS)]
    row = dict(size=size, variant=name, ratio=ratio, lr=lr, seed=seed, rank=rank, shape=list(shape),
               parameters=count_parameters(model), operations=operations(model), tokens=s["tokens"],
               seconds=s["seconds"], choose=statistics.fmean(choose), loss=statistics.fmean(parts),
               parts=parts)
    (folder / "row.json").write_text(json.dumps(row))
    print(f"{size}, {name}, {ratio} tokens a parameter, rate {lr:g}, seed {seed}: {row['loss']:.4f}")
    return row

def best_rate(loss, rate, up=True):
    """The rate of least loss, by factors of 2 from `rate` until the next is no better. up: also to larger."""
    factor = 2.0 if up and loss(rate * 2) < loss(rate) else 0.5
    while loss(rate * factor) < loss(rate):
        rate *= factor
    return rate

def finish(args, size, seed, name):
    """The rows of a variant, one for each length that is in time. Its rates suit the first size and seed."""
    def chosen(ratio, rate):
        return train(args, args.sizes[0], name, ratio, rate, args.seeds[0])["choose"]
    rows, rate = [], None
    for ratio in RATIOS:
        with suppress(TimeoutError):
            rate = rate or best_rate(partial(chosen, SEARCH), FIRST_RATE)
            if ratio > SEARCH:
                rate = best_rate(partial(chosen, ratio), rate, up=False)
            rows.append(train(args, size, name, ratio, rate, seed))
    return rows

def bench(args):
    for size in args.sizes:
        refuse(size not in SIZES, f"--sizes {size!r} is not among {', '.join(SIZES)}")
    refuse(not FICTION.is_dir(), f"no {FICTION}: set $DATA_DIR to the folder that has text/fiction")
    os.environ["OMP_NUM_THREADS"] = "1"  # of each run
    args.deadline, args.novels, rows = time.time() + 3600 * args.hours, Path(args.out_dir) / "novels", []
    args.novels.mkdir(parents=True, exist_ok=True)
    for path in FICTION.glob("*.txt"):
        if path.name not in (CHOOSE, *REPORT):
            shutil.copyfile(path, args.novels / path.name)
    for size in args.sizes:
        for seed in args.seeds:
            first = (size, seed) == (args.sizes[0], args.seeds[0])
            names = (*DENSE, *SHARES, *(CHANGES if first else ()))
            with ThreadPoolExecutor(args.jobs) as pool:  # after Ctrl-C, which stops the runs, no other begins
                rows += sum(pool.map(partial(finish, args, size, seed), names), [])
    if rows:
        plot(rows, Path(args.out_dir) / "scaling.png")
    files = prepare(open_corpus(args.novels, DATA_DIR), None, VOCABULARY, own=True)
    texts = [first_tokens(FICTION / name, files.tokenizer) for name in REPORT]
    for order, name in ((2, "bigrams, counted"), (3, "trigrams, counted")):
        loss = counting_model(files.train.tolist(), texts, order)
        rows.append(dict(size=None, variant=name, tokens=len(files.train), loss=loss))
    return find_device("float32"), rows

def counting_model(train, texts, order):
    """Nats a token of texts by an interpolated model of `order` tokens with a discount of 0.75, from train:
    p_n(w | c) = max(count(c w) - 0.75, 0) / count(c) + 0.75 kinds(c) / count(c) p_(n-1)(w | shorter c)."""
    counts, totals, kinds = Counter(), Counter(), Counter()
    for n in range(1, order + 1):
        counts.update(zip(*(train[i:] for i in range(n))))
    for gram, count in counts.items():
        totals[gram[:-1]] += count
        kinds[gram[:-1]] += 1

    def p(gram):
        if not gram:
            return 1 / VOCABULARY
        lower, context = p(gram[1:]), gram[:-1]
        if context not in totals:
            return lower
        return (max(counts[gram] - 0.75, 0) + 0.75 * kinds[context] * lower) / totals[context]
    losses = []
    for text in texts:
        losses.append(statistics.fmean(-math.log(p(gram)) for gram in zip(*(text[i:] for i in range(order)))))
    return statistics.fmean(losses)

def compared(rows):
    """A line for each size, variant and length: its mean loss, and the difference to full rank with half its
    interval, over the seeds that both have."""
    runs, lines = defaultdict(dict), []
    for r in rows:
        if r["size"]:
            runs[r["size"], r["variant"], r["ratio"]][r["seed"]] = r
    for (size, _, ratio), own in runs.items():
        full = runs.get((size, "full rank", ratio), {})
        seeds = sorted(own.keys() & full.keys())
        if not seeds:  # full rank was late
            continue
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
    losses, sizes = zip(*sorted((d["loss"], math.log(d["parameters"])) for d in dense))
    if not losses[0] <= line["loss"] <= losses[-1]:
        return None
    return math.exp(np.interp(line["loss"], losses, sizes) - max(sizes))

def report(rows):
    """A table for each size, the fit of N_eff, and what counting gives."""
    lines, texts = compared(rows), []
    for size in dict.fromkeys(line["size"] for line in lines):
        mine, own, points = [line for line in lines if line["size"] == size], {}, {}
        full = next(line for line in mine if line["variant"] == "full rank")
        for line in mine:
            cells = own.setdefault(line["variant"], {
                size: line["variant"], "width": line["shape"][2], "r": line["rank"] or None,
                "parameters": f"{line['parameters'] / full['parameters']:.2f}x",
                "operations": f"{line['operations'] / full['operations']:.2f}x"})
            gap = "" if line["variant"] == "full rank" else f" ({line['gap']:+.3f} ± {line['half']:.3f})"
            cells[f"{line['ratio']} tokens a parameter"] = f"{line['loss']:.3f}{gap}"
            like = dense_like(line, mine) if line["rank"] else None
            if line["ratio"] == RATIOS[-1]:
                cells |= {"as a dense model of": f"{like:.2f}x" if like else "", "seeds": line["seeds"]}
                if like and line["variant"] in SHARES:
                    points[line["variant"]] = SHARES[line["variant"]], like
        texts.append(table(own.values()))
        if len(points) > 1:
            x, y = np.log(np.array([*points.values()])).T  # least squares of y = gamma x
            texts.append(f"N_eff = N (r/n)^{x @ y / (x @ x):.2f} at {RATIOS[-1]} tokens a parameter, from "
                         f"{' and '.join(points)}")
    counted = "; ".join(f"{r['variant']}: {r['loss']:.3f}" for r in rows if not r["size"])
    return "\n\n".join([*texts, f"{counted} (all {rows[-1]['tokens']:,} tokens of the training text)"])

def plot(rows, path):
    """Above, the difference to full rank over tokens a parameter; below, the loss over operations."""
    from matplotlib.figure import Figure
    runs = defaultdict(list)
    for line in compared(rows):
        runs[line["size"], line["variant"]].append(line)
    sizes, names = (list(dict.fromkeys(keys)) for keys in zip(*runs))
    figure = Figure(figsize=(6 * len(sizes), 8), layout="constrained")
    axes = dict(zip(sizes, figure.subplots(2, len(sizes), squeeze=False).T))
    for (size, name), own in runs.items():
        above, below = axes[size]
        look = dict(marker="o", ls="-") if own[0]["rank"] else dict(marker="s", ls="--")
        style = dict(look, ms=5, label=name, color=f"C{names.index(name)}")  # a color at all sizes
        above.errorbar(*([line[key] for line in own] for key in ("ratio", "gap", "half")), **style)
        below.plot([r["operations"] * r["tokens"] for r in own], [r["loss"] for r in own], **style)
        above.set(title=size, xscale="log", xlabel="tokens a parameter", ylabel="nats above full rank")
        below.set(xscale="log", xlabel="operations of the training", ylabel="loss, nats a token")
        above.legend(fontsize=7)
    figure.savefig(path, dpi=110)
