"""Measure a model on the paper's seven tasks (section VI, Tables VI to VIII), and its perplexity on a text.

    python eval.py --model smollm2-135m --tasks boolq,piqa,winogrande,fpb,fiqa,tfns,ner --out-dir out/eval-16
    python eval.py --model smollm2-135m --tasks piqa --bits 4 --out-dir out/eval-4
    python eval.py --compare out/eval-16 out/eval-4             is the difference more than chance?
    python eval.py --model smollm2-135m --tasks perplexity --data wikitext2-valid.txt --limit 16384

Every score has a 95% interval (bootstrap), and beside it what always giving the commonest answer would score.
tasks/sets.py says what a model is asked, tasks/score.py how. A row that is longer than the model's context
loses its first tokens; the count of such rows is in the table.

    OUT/run.json                  the model that the rows below belong to
    OUT/predictions/piqa.jsonl    a line a row: log-likelihoods or the answer, the prediction, the right label
    OUT/summary.json              a key for each task

A run that was killed goes on from those lines: the same command measures only rows that have no line yet.
Perplexity is exp of the mean loss over windows of 1,024 tokens without overlap (of the context, if that is
shorter): the first token of a window is given, the others are predicted. Bits per byte divide the same loss
by the bytes of the predicted text, so that models with different tokenizers can be compared.
"""
import hashlib
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import own_tensors
from common.adapters import base_id, load_adapter
from common.cli import (
    InputError,
    Parser,
    at_least_1,
    check_folder,
    command,
    markdown,
    move_aside,
    say,
    write_atomic,
)
from common.data import first_tokens
from common.device import peak_memory
from common.loss import head_loss
from common.processes import rank, world_size
from common.run import read_metrics
from model import count_parameters
from sample import open_model
from tasks import score, sets

WINDOW = 1024  # tokens, of perplexity


# ------------------------------------------------------------------------- endings: BoolQ, PIQA, WinoGrande

def choice_row(example, scores, text):
    """Which ending is likeliest, and which is so by character (its leading space is none)."""
    by_character = [s / max(len(c) - 1, 1) for s, c in zip(scores, example.choices)]
    return dict(label=example.label, prediction=int(np.argmax(scores)), scores=scores,
                by_character=int(np.argmax(by_character)))


def choice_result(task, rows):
    table = counted(rows, "prediction", 2)
    result = dict(accuracy=float(score.accuracy(table)), interval=score.bootstrap(table, score.accuracy),
                  majority=score.majority(table, score.accuracy))
    if task == "piqa":
        table = counted(rows, "by_character", 2)
        result |= dict(accuracy_norm=float(score.accuracy(table)),
                       interval_norm=score.bootstrap(table, score.accuracy))
    return result


def counted(rows, key, classes):
    return score.confusion([r["label"] for r in rows], [r[key] for r in rows], classes)


# ----------------------------------------------------------------------------- sentiment: FPB, FiQA, TFNS

def sentiment_row(example, scores, text):
    """Both ways: what the model writes, read as FinGPT reads it, and the likeliest of the three labels."""
    label, parsed = sets.read_sentiment(text)
    return dict(label=example.label, prediction=sets.SENTIMENTS.index(label), parsed=parsed, answer=text,
                likeliest=int(np.argmax(scores)), scores=scores)


def sentiment_result(task, rows):
    def scores_of(key):
        table = counted(rows, key, 3)
        return dict(f1=float(score.weighted_f1(table)), interval=score.bootstrap(table, score.weighted_f1),
                    accuracy=float(score.accuracy(table)))
    return dict(**scores_of("prediction"), likeliest=scores_of("likeliest"),
                parsed=float(np.mean([r["parsed"] for r in rows])),
                majority=score.majority(counted(rows, "prediction", 3), score.weighted_f1))


# ----------------------------------------------------------------------------- entities: NER

def entity_row(example, scores, text):
    tags, parsed = sets.read_entities(example.words, text)
    right, named = set(sets.entities(example.tags)), set(sets.entities(tags))
    return dict(label=example.tags, tags=tags, counts=[len(right & named), len(right), len(named)],
                parsed=parsed, answer=text)


def entity_result(task, rows):
    counts = np.array([r["counts"] for r in rows])
    return dict(f1=float(score.entity_f1(counts.sum(0))),
                interval=score.bootstrap_rows(counts, score.entity_f1),
                parsed=float(np.mean([r["parsed"] for r in rows])),
                majority=0.0)  # the commonest tag is O: no entity is named


# ----------------------------------------------------------------------------- perplexity

@dataclass
class Window:
    index: int
    ids: list


def text_windows(path, tokenizer, limit, length):
    """The windows of a text's first `limit` tokens (None: of all)."""
    ids = first_tokens(path, tokenizer, limit)
    if len(ids) < 2:
        raise InputError(f"{path} has {len(ids)} tokens: perplexity needs at least 2")
    return [Window(i, ids[start:start + length]) for i, start in enumerate(range(0, len(ids), length))]


def window_rows(model, tokenizer, device, windows):
    for w in windows:
        tokens = torch.tensor([w.ids], device=device.torch_device)
        loss = 0.0
        if len(w.ids) > 1:  # a last token alone has nothing to be predicted from
            with torch.inference_mode(), device.autocast():
                loss = head_loss(model.head, model.hidden(tokens[:, :-1]), tokens[:, 1:]).item()
        size = len(tokenizer.decode(w.ids).encode()) - len(tokenizer.decode(w.ids[:1]).encode())
        yield [dict(index=w.index, loss=loss, predicted=len(w.ids) - 1, bytes=size, length=len(w.ids), cut=0)]


def perplexity_of(sums):
    return np.exp(sums[..., 0] / sums[..., 1])


def loss_counts(rows):
    return np.array([[r["loss"] * r["predicted"], r["predicted"]] for r in rows if r["predicted"]])


def window_result(task, rows):
    counts = loss_counts(rows)
    total, predicted = counts.sum(0)
    return dict(perplexity=float(perplexity_of(counts.sum(0))), loss=float(total / predicted),
                bits_per_byte=float(total / math.log(2) / sum(r["bytes"] for r in rows)),
                interval=score.bootstrap_rows(counts, perplexity_of), rows=len(counts),
                tokens=sum(r["length"] for r in rows), window=rows[0]["length"])


# ----------------------------------------------------------------------------- a task

# how an answer is read, how all are summed up, how many tokens are written (FinGPT: 512 less the prompt's)
CHOICE = (choice_row, choice_result, 0)
SENTIMENT = (sentiment_row, sentiment_result, 10)
ENTITIES = (entity_row, entity_result, 128)
SCORERS = dict(boolq=CHOICE, piqa=CHOICE, winogrande=CHOICE, fpb=SENTIMENT, fiqa=SENTIMENT, tfns=SENTIMENT,
               ner=ENTITIES, perplexity=(None, window_result, 0))


def task_rows(model, tokenizer, device, task, examples):
    """Yields the rows of each batch."""
    if task == "perplexity":
        yield from window_rows(model, tokenizer, device, examples)
        return
    read_row, _, new_tokens = SCORERS.get(task, SENTIMENT)
    for batch in score.score_in_batches(model, tokenizer, examples, device, new_tokens):
        yield [dict(index=e.index, cut=cut, **read_row(e, scores, text)) for e, scores, text, cut in batch]


def score_task(model, tokenizer, device, task, examples, file=None):
    """The scores of a task (sentiment, if its name is none of SCORERS) over these examples: a dict.

    With `file` every row is written there as soon as it is known, and what is there is not measured again.
    """
    prints = {e.index: hashlib.sha256(repr(e).encode()).hexdigest()[:12] for e in examples}
    known = {}
    if file is not None:
        known = {r["index"]: r for r in read_metrics(file)}
        write_rows(file, known)  # without a line that a kill cut short
    done = {i: r for i, r in known.items() if r["row"] == prints.get(i)}
    if done:
        say(f"{task}: {len(done):,} of {len(examples):,} rows are in {file} already")
    todo = [e for e in examples if e.index not in done]
    quiet = None if rank() == 0 else True
    with tqdm(total=len(todo), desc=task, unit=" rows", disable=quiet, leave=False) as bar:
        start = time.perf_counter()
        for batch in task_rows(model, tokenizer, device, task, todo):
            seconds = round((time.perf_counter() - start) / len(batch), 6)
            new = {r["index"]: dict(r, row=prints[r["index"]], seconds=seconds) for r in batch}
            done |= new
            if file is not None:
                with open(file, "a") as f:
                    f.writelines(json.dumps(r) + "\n" for r in new.values())
            bar.update(len(batch))
            start = time.perf_counter()
    if file is not None:
        write_rows(file, known | done)
    rows = [done[e.index] for e in examples]
    seconds, cut = sum(r["seconds"] for r in rows), sum(r["cut"] > 0 for r in rows)
    return dict(rows=len(rows), seconds=seconds, cut=cut) | SCORERS.get(task, SENTIMENT)[1](task, rows)


def write_rows(file, rows):
    write_atomic(file, "".join(json.dumps(rows[i]) + "\n" for i in sorted(rows)))


def rows_file(folder, task):
    return Path(folder) / "predictions" / f"{task}.jsonl"


def claim(folder, settings):
    """Make the folder this model's; rows of another model are moved aside, not overwritten."""
    path, text = folder / "run.json", json.dumps(settings, indent=2) + "\n"
    if (folder / "predictions").exists() and (not path.exists() or path.read_text() != text):
        say(f"{folder} held the rows of another model or of other settings: moved to {move_aside(folder)}")
    (folder / "predictions").mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)


# ----------------------------------------------------------------------------- tables

def score_lines(task, r):
    """(name, value, interval, majority) of each score of a task."""
    if task == "perplexity":
        return [("perplexity", r["perplexity"], r["interval"], None)]
    if task == "ner":
        return [("entity F1", r["f1"], r["interval"], r["majority"])]
    if "likeliest" in r:
        best = r["likeliest"]
        return [("weighted F1, as written", r["f1"], r["interval"], r["majority"]),
                ("weighted F1, likeliest label", best["f1"], best["interval"], r["majority"])]
    lines = [("accuracy", r["accuracy"], r["interval"], r["majority"])]
    if "accuracy_norm" in r:
        lines.append(("accuracy by characters", r["accuracy_norm"], r["interval_norm"], r["majority"]))
    return lines


def print_results(results):
    lines = []
    for task, r in results.items():
        counts = [f"{r['rows']:,}", f"{r['seconds']:.1f}", f"{r['cut']}"]
        for name, value, (low, high), majority in score_lines(task, r):
            lines.append([task, name, f"{value:.3f}", f"{low:.3f} to {high:.3f}",
                          "" if majority is None else f"{majority:.3f}", *counts])
            task, counts = "", [""] * 3  # only in a task's first line
    print(markdown(["task", "score", "value", "95% interval", "majority", "rows", "s", "cut"], lines))
    parsed = [f"{task} {r['parsed']:.1%}" for task, r in results.items() if "parsed" in r]
    if parsed:
        print(f"\nanswers that could be parsed (others are neutral, or name nobody): {', '.join(parsed)}")
    if "perplexity" in results:
        r = results["perplexity"]
        print(f"\nperplexity: {r['perplexity']:.3f}, {r['bits_per_byte']:.3f} bits a byte, "
              f"{r['rows']} windows of {r['window']} tokens")


# ----------------------------------------------------------------------------- two runs side by side

def shared_scores(task, first, second):
    """(name, metric of summed rows, rows of each run, which rows each has right or None) of each score."""
    if task == "perplexity":
        yield "perplexity", perplexity_of, loss_counts(first), loss_counts(second), None
    elif task == "ner":
        counts = [np.array([r["counts"] for r in rows]) for rows in (first, second)]
        yield "entity F1", score.entity_f1, *counts, None
    else:
        names = dict(prediction="accuracy", by_character="accuracy by characters")
        if "likeliest" in first[0]:
            names = dict(prediction="accuracy, as written", likeliest="accuracy, likeliest label")
        elif task != "piqa":
            del names["by_character"]
        for key, name in names.items():
            right = [np.array([r[key] == r["label"] for r in rows]) for rows in (first, second)]
            yield name, mean_of, *(np.stack((x, np.ones(len(x))), 1) for x in right), right


def mean_of(sums):
    return sums[..., 0] / sums[..., 1]


def compare(one, other):
    """A table of two runs over the rows that both have. p is McNemar's exact test where rows are right or
    wrong, else from the bootstrap."""
    for folder in (one, other):
        if not (Path(folder) / "predictions").is_dir():
            raise InputError(f"--compare {folder}: no predictions are there: give two --out-dir folders")
    lines = []
    for task in SCORERS:
        first, second = ({(r["index"], r["row"]): r for r in read_metrics(rows_file(folder, task))}
                         for folder in (one, other))
        shared = sorted(first.keys() & second.keys())
        if not shared:
            continue
        pairs = shared_scores(task, [first[k] for k in shared], [second[k] for k in shared])
        for name, metric, a, b, right in pairs:
            low, high, p = score.paired_bootstrap(a, b, metric)
            if right:
                p = score.mcnemar(*right)
            A, B = float(metric(a.sum(0))), float(metric(b.sum(0)))
            lines.append([task, name, len(shared), f"{A:.3f}", f"{B:.3f}", f"{B - A:+.3f}",
                          f"{low:+.3f} to {high:+.3f}", f"{p:.3f}" if p >= 0.001 else "< 0.001",
                          "yes" if p >= 0.05 else "no"])
            task = ""
    if not lines:
        raise InputError(f"{one} and {other} have no row in common: run the same tasks on the same data")
    header = ["task", "score", "rows", "A", "B", "B - A", "95% interval", "p", "chance?"]
    print(f"A = {one}\nB = {other}\n" + markdown(header, lines))


# ----------------------------------------------------------------------------- python eval.py

def parse(argv):
    p = Parser(__doc__)
    p.add_argument("--model", default="out/train", help="folder, file or known name (default: %(default)s)")
    p.add_argument("--adapter", metavar="DIR", help="an adapter of finetune.py or PEFT (default: none)")
    p.add_argument("--bits", type=int, default=16,
                   help="8 or 4: quantize the weights while loading (default: %(default)s)")
    p.add_argument("--tasks", default="perplexity",
                   help=f"separated by commas: {', '.join(SCORERS)} (default: %(default)s)")
    p.add_argument("--data", default="builtin",
                   help="text for perplexity: a file, a folder, or builtin (default: %(default)s)")
    p.add_argument("--data-dir", default=os.environ.get("DATA_DIR", "data"),
                   help="where the tasks' files are (default: $DATA_DIR, then data/)")
    p.add_argument("--limit", type=at_least_1, metavar="N",
                   help="rows of each task, a seeded sample; tokens of the text (default: all)")
    p.add_argument("--out-dir", default="out/eval",
                   help="where predictions and summary.json go (default: %(default)s)")
    p.add_argument("--compare", nargs=2, metavar=("A", "B"), help="put two such folders side by side")
    return p.parse_args(argv)


def check(args, names):
    unknown = [t for t in names if t not in SCORERS]
    if unknown:
        raise InputError(f"no task is called {unknown[0]!r}: the tasks are {', '.join(SCORERS)}")
    if args.limit == 1 and "perplexity" in names:
        raise InputError("--limit must be at least 2 tokens, got 1")
    if world_size() > 1:
        raise InputError(f"eval.py is one process, got {world_size()}: leave torchrun out")
    check_folder(args.out_dir)


def add_adapter(model, args):
    """Attach --adapter, if there is one. Returns what the rows of this run depend on."""
    settings = dict(model=str(args.model), base_id=base_id(args.model), adapter=args.adapter, factors=None,
                    bits=args.bits)
    if args.adapter:
        adapter = load_adapter(model, args.adapter, settings["base_id"])
        say(adapter)
        factors = b"".join(t.cpu().numpy().tobytes() for pair in adapter.factors.values() for t in pair)
        settings["factors"] = hashlib.sha256(factors).hexdigest()[:16]
    return settings


def main(argv=None):
    args = parse(argv)
    if args.compare:
        return compare(*args.compare)
    names = list(dict.fromkeys(args.tasks.split(",")))
    check(args, names)
    items = {}
    for t in names:  # missing or malformed data is told before the model is loaded
        if t != "perplexity":
            items[t] = sets.draw(sets.load(t, args.data_dir), args.limit)
    model, tokenizer, device = open_model(args.model, args.bits)
    settings = add_adapter(model, args)
    if "perplexity" in names:
        length = min(WINDOW, model.config.context)
        items["perplexity"] = text_windows(args.data, tokenizer, args.limit, length)
    folder = Path(args.out_dir)
    claim(folder, settings)
    results = {t: score_task(model, tokenizer, device, t, items[t], rows_file(folder, t)) for t in names}
    print_results(results)
    cost = dict(parameters=count_parameters(model), size_bytes=size_on_disk(model),
                peak_memory_bytes=peak_memory(device.torch_device))
    print(f"\n{args.model}: {cost['parameters'] / 1e6:,.1f}M parameters, {cost['size_bytes'] / 1e6:,.1f} MB, "
          f"peak memory {cost['peak_memory_bytes'] / 1e9:.2f} GB, {device.name}")
    summary = dict(**results, **settings, **cost, device=device.name, arguments=vars(args))
    write_atomic(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return 0


def size_on_disk(model):
    """Bytes: quantized integers as they are, everything else in 16 bit."""
    tensors = own_tensors(model).values()
    return sum(t.numel() * (2 if t.is_floating_point() else t.element_size()) for t in tensors)


if __name__ == "__main__":
    command(main)
