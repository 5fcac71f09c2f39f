"""Measure a model on the paper's seven tasks (section VI, Tables VI to VIII), and its perplexity on a text.

    python eval.py --model smollm2-135m --tasks boolq,piqa,winogrande,fpb,fiqa,tfns,ner --out-dir out/eval-16
    python eval.py --model smollm2-135m --tasks piqa --bits 4 --out-dir out/eval-4
    python eval.py --compare out/eval-16 out/eval-4             is the difference more than chance?
    python eval.py --model smollm2-135m --tasks perplexity --data wikitext2-valid.txt --limit 16384

Every score comes with a 95% interval (bootstrap) and with what always giving the commonest answer would score. tasks.py says what a model is
asked, score.py how. A row that is longer than the model's context loses its beginning; the count of such rows is in the table.

    OUT/run.json                  the model that the rows below belong to
    OUT/predictions/piqa.jsonl    a line for each row: log-likelihoods or the answer, the prediction, the right label, seconds
    OUT/summary.json              a key for each task

The lines are also what a run that was killed goes on from: the same command measures only rows that have no line yet. Under torchrun the rows
are shared out. Perplexity is exp of the mean loss over windows of 1,024 tokens without overlap (or the model's context, if that is shorter):
the first token of a window is given, the others are predicted. Bits per byte divide the same loss by the bytes of the predicted text, so that
models with different tokenizers can be compared.
"""
import argparse
import hashlib
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoint import load_model, own_tensors
from common.adapters import base_id, load_adapter
from common.cli import InputError, check_folder, command, markdown, move_aside, say, write_atomic
from common.data import first_tokens
from common.device import find_device, peak_memory
from common.generate import generate
from common.loss import head_loss
from common.processes import rank, world_size
from common.run import read_metrics
from model import count_parameters
from tasks import score, sets

WINDOW = 1024
SENTIMENT_TOKENS, ENTITY_TOKENS = 10, 128  # of an answer, at most; FinGPT lets both run until prompt and answer have 512


@dataclass
class Run:
    """What is measured, and where."""
    model: object
    tokenizer: object
    device: object
    folder: Path


# ----------------------------------------------------------------------------- endings: BoolQ, PIQA, WinoGrande

def choice_rows(run, examples):
    """Batch by batch, a row for each example: which ending is likeliest, and which is so by character (its leading space is none)."""
    for batch in score.score_in_batches(run.model, run.tokenizer, examples, run.device):
        yield [dict(index=e.index, label=e.label, prediction=int(np.argmax(scores)), scores=scores, cut=cut,
                    by_character=int(np.argmax([s / max(len(c) - 1, 1) for s, c in zip(scores, e.choices)]))) for e, scores, cut in batch]


def choice_result(task, rows, examples):
    tables = {"": counted(rows, "prediction", len(examples[0].choices))}
    if task == "piqa":
        tables["_norm"] = counted(rows, "by_character", len(examples[0].choices))
    scores = {}
    for name, table in tables.items():
        scores |= {f"accuracy{name}": float(score.accuracy(table)), f"interval{name}": score.bootstrap(table, score.accuracy)}
    return dict(**scores, majority=score.majority(tables[""], score.accuracy))


def counted(rows, key, classes):
    return score.confusion([r["label"] for r in rows], [r[key] for r in rows], classes)


# ----------------------------------------------------------------------------- sentiment: FPB, FiQA, TFNS

def sentiment_rows(run, examples):
    """Both ways: what the model writes, read as FinGPT reads it, and the likeliest of the three labels."""
    for batch in score.answer_in_batches(run.model, run.tokenizer, examples, run.device, SENTIMENT_TOKENS):
        rows = []
        for e, (text, likelihoods), cut in batch:
            label, parsed = sets.read_sentiment(text)
            rows.append(dict(index=e.index, label=e.label, prediction=sets.SENTIMENTS.index(label), parsed=parsed, answer=text,
                             likeliest=int(np.argmax(likelihoods)), scores=likelihoods, cut=cut))
        yield rows


def sentiment_result(task, rows, examples):
    def measured(key):
        table = counted(rows, key, 3)
        return dict(f1=float(score.weighted_f1(table)), interval=score.bootstrap(table, score.weighted_f1), accuracy=float(score.accuracy(table)),
                    accuracy_interval=score.bootstrap(table, score.accuracy), confusion=table.tolist())
    table = counted(rows, "prediction", 3)
    return dict(**measured("prediction"), parsed=float(np.mean([r["parsed"] for r in rows])), likeliest=measured("likeliest"),
                majority=score.majority(table, score.weighted_f1), majority_accuracy=score.majority(table, score.accuracy), labels=sets.SENTIMENTS)


# ----------------------------------------------------------------------------- entities: NER

def entity_rows(run, examples):
    for batch in score.answer_in_batches(run.model, run.tokenizer, examples, run.device, ENTITY_TOKENS):
        rows = []
        for e, (text, _), cut in batch:
            tags, parsed = sets.read_entities(e.words, text)
            right, named = set(sets.entities(e.tags)), set(sets.entities(tags))
            rows.append(dict(index=e.index, tags=tags, label=e.tags, counts=[len(right & named), len(right), len(named)], parsed=parsed, answer=text, cut=cut))
        yield rows


def entity_result(task, rows, examples):
    counts = np.array([r["counts"] for r in rows])
    hits, right, named = counts.sum(0).tolist()
    return dict(f1=float(score.entity_f1(counts.sum(0))), interval=score.bootstrap_rows(counts, score.entity_f1), precision=hits / max(named, 1),
                recall=hits / max(right, 1), parsed=float(np.mean([r["parsed"] for r in rows])), entities=right,
                majority=0.0)  # the commonest tag is O: no entity is named


# ----------------------------------------------------------------------------- perplexity

@dataclass
class Window:
    index: int
    ids: list


def windows(path, tokenizer, limit, length):
    """The windows of a text, at most `limit` tokens of it; only as much of the text is tokenized as that needs."""
    ids = first_tokens(path, tokenizer, limit)
    if len(ids) < 2:
        raise InputError(f"{path} has {len(ids)} tokens: perplexity needs at least 2")
    return [Window(i, ids[start:start + length]) for i, start in enumerate(range(0, len(ids), length))]


def window_rows(run, items):
    for w in items:
        tokens = torch.tensor([w.ids], device=run.device.torch_device)
        loss = 0.0
        if len(w.ids) > 1:  # a last token alone has nothing to be predicted from
            with torch.inference_mode(), run.device.autocast():
                loss = head_loss(run.model.head, run.model.hidden(tokens[:, :-1]), tokens[:, 1:]).item()
        yield [dict(index=w.index, loss=loss, predicted=len(w.ids) - 1, cut=0,
                    bytes=len(run.tokenizer.decode(w.ids).encode()) - len(run.tokenizer.decode(w.ids[:1]).encode()))]  # the first is given


def perplexity_of(sums):
    return np.exp(sums[..., 0] / sums[..., 1])


def loss_counts(rows):
    return np.array([[r["loss"] * r["predicted"], r["predicted"]] for r in rows if r["predicted"]])


def window_result(task, rows, items):
    counts = loss_counts(rows)
    total, predicted = counts.sum(0)
    return dict(perplexity=float(perplexity_of(counts.sum(0))), loss=float(total / predicted),
                bits_per_byte=float(total / math.log(2) / sum(r["bytes"] for r in rows)), interval=score.bootstrap_rows(counts, perplexity_of),
                tokens=sum(len(w.ids) for w in items), window=len(items[0].ids), rows=len(counts))


# ----------------------------------------------------------------------------- rows on disk

CHOICES, SENTIMENT = (choice_rows, choice_result), (sentiment_rows, sentiment_result)
KINDS = dict(boolq=CHOICES, piqa=CHOICES, winogrande=CHOICES, fpb=SENTIMENT, fiqa=SENTIMENT, tfns=SENTIMENT,
             ner=(entity_rows, entity_result), perplexity=(window_rows, window_result))


def fingerprint(item):
    """Tells whether a line on disk is about this very row."""
    return hashlib.sha256(repr(item).encode()).hexdigest()[:12]


def rows_file(folder, task, process=0):
    return Path(folder) / "predictions" / (f"{task}.{process}.jsonl" if process else f"{task}.jsonl")


def gather(folder, task):
    """Rows of a task from the files of all processes, brought together in one file in their order; a line cut short by a kill is dropped."""
    parts = [rows_file(folder, task)] + sorted((Path(folder) / "predictions").glob(f"{task}.*.jsonl"))
    rows = {r["index"]: r for part in parts for r in read_metrics(part) if "index" in r}
    parts[0].parent.mkdir(parents=True, exist_ok=True)
    write_atomic(parts[0], "".join(json.dumps(rows[i]) + "\n" for i in sorted(rows)))
    for part in parts[1:]:
        part.unlink()


def valid_rows(folder, task, items):
    """index -> row, of the rows on disk that are about one of these items."""
    wanted = {w.index: fingerprint(w) for w in items}
    return {r["index"]: r for r in read_metrics(rows_file(folder, task)) if wanted.get(r["index"]) == r.get("row", "")}


def in_turn(action, *args):
    """The first process does it; nobody goes on before it is done."""
    if rank() == 0:
        action(*args)
    if world_size() > 1:
        dist.barrier()


def measure(run, task, items):
    """Rows that have no line yet are computed, this process its share of them. Returns the task's result."""
    produce, summarize = KINDS[task]
    in_turn(gather, run.folder, task)
    done, prints = valid_rows(run.folder, task, items), {w.index: fingerprint(w) for w in items}
    if done:
        say(f"{task}: {len(done):,} of {len(items):,} rows are in {rows_file(run.folder, task)} already")
    todo = [w for w in items[rank()::world_size()] if w.index not in done]
    with open(rows_file(run.folder, task, rank()), "a") as file, \
            tqdm(total=len(todo), desc=task, unit=" rows", disable=None if rank() == 0 else True, leave=False) as bar:
        start = time.perf_counter()
        for batch in produce(run, todo) if todo else ():
            each = (time.perf_counter() - start) / len(batch) / world_size()
            file.write("".join(json.dumps(dict(r, row=prints[r["index"]], seconds=round(each, 6))) + "\n" for r in batch))
            file.flush()
            bar.update(len(batch))
            start = time.perf_counter()
    if world_size() > 1:
        dist.barrier()
    in_turn(gather, run.folder, task)
    done = valid_rows(run.folder, task, items)
    rows = [done[w.index] for w in items]
    return dict(rows=len(rows), seconds=sum(r["seconds"] for r in rows), cut=sum(r["cut"] > 0 for r in rows)) | summarize(task, rows, items)


def score_task(model, tokenizer, device, task, examples):
    """The result of one task, without files."""
    produce, summarize = KINDS[task if task == "ner" else "fpb"]
    rows = [row for batch in produce(Run(model, tokenizer, device, None), examples) for row in batch]
    return summarize(task, rows, examples)


def claim(folder, settings):
    """Make the folder this model's; rows of another model are moved aside, not overwritten."""
    path = folder / "run.json"
    if (folder / "predictions").exists() and (not path.exists() or path.read_text() != json.dumps(settings, indent=2) + "\n"):
        say(f"{folder} held the rows of another model or of other settings: moved to {move_aside(folder)}")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(settings, indent=2) + "\n")


# ----------------------------------------------------------------------------- what the paper's tables have beside the scores

def size_on_disk(model):
    """Bytes: quantized integers as they are, everything else in 16 bit."""
    return sum(t.numel() * (2 if t.is_floating_point() else t.element_size()) for t in own_tensors(model).values())


def seconds_for_100_tokens(model, device):
    """Reading 100 tokens and writing 100 more, one text at a time; None where the context is too short for that."""
    if model.config.context < 200:
        return None
    prompt = [i % model.config.vocab_size for i in range(100)]
    times = []
    for new in (2, 100):  # the first time warms up
        start = time.perf_counter()
        with device.autocast():
            tokens = list(generate(model, [prompt], new, temperature=0))
        times.append(time.perf_counter() - start)
    return times[-1] if len(tokens) == 100 else None


# ----------------------------------------------------------------------------- tables

def score_lines(task, r):
    """(name, value, interval, majority) of each score of a task."""
    if task == "perplexity":
        return [("perplexity", r["perplexity"], r["interval"], None)]
    if task == "ner":
        return [("entity F1", r["f1"], r["interval"], r["majority"])]
    if "f1" in r:
        return [("weighted F1, as written", r["f1"], r["interval"], r["majority"]),
                ("weighted F1, likeliest label", r["likeliest"]["f1"], r["likeliest"]["interval"], r["majority"]),
                ("accuracy, as written", r["accuracy"], r["accuracy_interval"], r["majority_accuracy"])]
    names = [("accuracy", ""), ("accuracy by characters", "_norm")]
    return [(name, r["accuracy" + key], r["interval" + key], r["majority"]) for name, key in names if "accuracy" + key in r]


def print_results(results):
    lines = []
    for task, r in results.items():
        for i, (name, value, interval, majority) in enumerate(score_lines(task, r)):
            digits = 2 if task == "perplexity" else 3
            counts = [f"{r['rows']:,}", f"{r['seconds']:.1f}", f"{r['cut']}"] if i == 0 else [""] * 3
            lines.append([task if i == 0 else "", name, f"{value:.3f}", " to ".join(f"{v:.{digits}f}" for v in interval),
                          "" if majority is None else f"{majority:.3f}", *counts])
    print(markdown(["task", "score", "value", "95% interval", "majority", "rows", "s", "cut"], lines))
    if sentiments := {task: r for task, r in results.items() if "confusion" in r}:
        names = ["wrote: neg.", "neu.", "pos.", "likeliest: neg.", "neu.", "pos."]
        print("\n" + markdown(["task", "right label", *names], [[task if i == 0 else "", label, *r["confusion"][i], *r["likeliest"]["confusion"][i]]
                                                              for task, r in sentiments.items() for i, label in enumerate(sets.SENTIMENTS)]))
    if parsed := [f"{task} {r['parsed']:.1%}" for task, r in results.items() if "parsed" in r]:
        print(f"\nanswers that could be parsed (the others count as neutral, or as naming nobody): {', '.join(parsed)}")
    if r := results.get("perplexity"):
        print(f"\nperplexity: {r['perplexity']:.3f} (95% {r['interval'][0]:.2f} to {r['interval'][1]:.2f}), {r['bits_per_byte']:.3f} bits a byte, "
              f"{r['rows']} windows of {r['window']} tokens, {r['seconds']:.1f} s")


# ----------------------------------------------------------------------------- two runs side by side

def pairs_of_scores(task, first, second):
    """(name, metric of summed rows, rows of each run, which rows each has right or None) of each score two runs of a task share."""
    if task == "perplexity":
        yield "perplexity", perplexity_of, loss_counts(first), loss_counts(second), None
    elif task == "ner":
        yield "entity F1", score.entity_f1, *(np.array([r["counts"] for r in rows]) for rows in (first, second)), None
    else:
        keys = {"prediction": "accuracy"} | ({"by_character": "accuracy by characters"} if task == "piqa" else {}) | \
            ({"prediction": "accuracy, as written", "likeliest": "accuracy, likeliest label"} if "likeliest" in first[0] else {})
        for key, name in keys.items():
            right = [np.array([r[key] == r["label"] for r in rows]) for rows in (first, second)]
            yield name, lambda sums: sums[..., 0] / sums[..., 1], *(np.stack((x, np.ones(len(x))), 1) for x in right), right


def compare(one, other):
    """A table of two runs over the rows that both have. p is McNemar's exact test where rows are right or wrong, else from the bootstrap."""
    folders, lines = [Path(one), Path(other)], []
    for folder in folders:
        if not (folder / "predictions").is_dir():
            raise InputError(f"--compare {folder}: there are no predictions in it: give two --out-dir folders of eval.py")
    for task in KINDS:
        first, second = ({(r["index"], r["row"]): r for r in read_metrics(rows_file(f, task))} for f in folders)
        shared = sorted(first.keys() & second.keys())
        if shared:
            for i, (name, metric, a, b, right) in enumerate(pairs_of_scores(task, [first[k] for k in shared], [second[k] for k in shared])):
                low, high, p = score.paired_bootstrap(a, b, metric)
                p = score.mcnemar(*right) if right else p
                values = [float(metric(x.sum(0))) for x in (a, b)]
                lines.append([task if i == 0 else "", name, len(shared), *(f"{v:.3f}" for v in values), f"{values[1] - values[0]:+.3f}",
                              f"{low:+.3f} to {high:+.3f}", f"{p:.3f}" if p >= 0.001 else "< 0.001", "yes" if p >= 0.05 else "no"])
    if not lines:
        raise InputError(f"{one} and {other} have no row in common: run the same tasks on the same data with both models")
    print(f"A = {one}\nB = {other}\n" + markdown(["task", "score", "rows", "A", "B", "B - A", "95% interval", "p", "chance?"], lines))


# ----------------------------------------------------------------------------- python eval.py

def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("model")
    g.add_argument("--model", default="out/train", help="a model folder, a file, or a known name (default: %(default)s)")
    g.add_argument("--adapter", metavar="DIR", help="an adapter of finetune.py or PEFT, put around the model (default: none)")
    g.add_argument("--bits", type=int, default=16, help="8 or 4: quantize the weights while loading (default: %(default)s)")
    g.add_argument("--dtype", default="float32", help="of matrix products: float32, bfloat16, or auto, the faster one here (default: %(default)s)")
    g = p.add_argument_group("what to measure")
    g.add_argument("--tasks", default="perplexity", help=f"separated by commas: {', '.join(KINDS)} (default: %(default)s)")
    g.add_argument("--limit", type=int, metavar="N", help="rows of each task, a seeded sample; tokens of the text, from its start (default: all)")
    g.add_argument("--data-dir", default=os.environ.get("DATA_DIR", "data"), help="where the tasks' files are (default: $DATA_DIR, then data/)")
    g.add_argument("--data", default="builtin", help="text for perplexity: a file, a folder, or builtin (default: %(default)s)")
    g = p.add_argument_group("output")
    g.add_argument("--out-dir", default="out/eval", help="where predictions and summary.json go (default: %(default)s)")
    g.add_argument("--compare", nargs=2, metavar=("A", "B"), help="instead: put two such folders side by side")
    return p.parse_args(argv)


def check(args, names):
    if unknown := [t for t in names if t not in KINDS]:
        raise InputError(f"no task is called {unknown[0]!r}: the tasks are {', '.join(KINDS)}")
    if args.limit is not None and args.limit < 2 and "perplexity" in names:
        raise InputError(f"--limit must be at least 2 tokens, got {args.limit}")
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit must be at least 1 row, got {args.limit}")
    check_folder(args.out_dir)


def open_model(args):
    """(model, tokenizer, device, what the rows of this run depend on)."""
    device = find_device(args.dtype)
    model, tokenizer = load_model(args.model, device.torch_device, bits=args.bits)
    if tokenizer is None:
        raise InputError("the model has no tokenizer beside its weights: put a tokenizer.json or tokenizer.model there")
    base = base_id(args.model)
    adapter = load_adapter(model, args.adapter, base) if args.adapter else None
    if adapter:
        say(adapter)
    factors = adapter and hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for pair in adapter.factors.values() for t in pair)).hexdigest()[:16]
    settings = dict(model=str(args.model), base_id=base, adapter=args.adapter, factors=factors, bits=args.bits, dtype=str(device.dtype)[6:])
    return model.eval(), tokenizer, device, settings


def main(argv=None):
    args = parse(argv)
    if args.compare:
        return compare(*args.compare)
    names = list(dict.fromkeys(args.tasks.split(",")))
    check(args, names)
    if world_size() > 1:
        dist.init_process_group("gloo")
    items = {}
    for t in names:  # missing or malformed data is told before the model is loaded
        if t != "perplexity":
            in_turn(sets.find_files, t, args.data_dir)  # the first process downloads
            items[t] = sets.draw(sets.load(t, args.data_dir), args.limit)
    model, tokenizer, device, settings = open_model(args)
    if "perplexity" in names:
        items["perplexity"] = windows(args.data, tokenizer, args.limit, min(WINDOW, model.config.context))
    size = size_on_disk(model)
    in_turn(claim, Path(args.out_dir), settings)
    run = Run(model, tokenizer, device, Path(args.out_dir))
    results = {t: measure(run, t, items[t]) for t in names}
    if rank() == 0:
        seconds = None if names == ["perplexity"] else seconds_for_100_tokens(model, device)  # perplexity alone is asked for often, and is to be quick
        cost = dict(parameters=count_parameters(model), size_bytes=size, peak_memory_bytes=peak_memory(device.torch_device), seconds_100_tokens=seconds)
        print_results(results)
        print(f"\n{args.model}: {cost['parameters'] / 1e6:,.1f}M parameters, {size / 1e6:,.1f} MB, peak memory {cost['peak_memory_bytes'] / 1e9:.2f} GB, "
              + (f"{seconds:.2f} s for 100 + 100 tokens, " if seconds else "") + device.name)
        write_atomic(run.folder / "summary.json", json.dumps(dict(**results, **settings, **cost, device=device.name, arguments=vars(args)), indent=2) + "\n")
    if world_size() > 1:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    command(main)
