"""Measure a model on the paper's seven tasks (section VI, Tables VI to VIII), and its perplexity on a text.

    python eval.py --model smollm2-135m --tasks boolq,piqa,winogrande,fpb,fiqa,tfns,ner --out-dir out/eval-16
    python eval.py --model smollm2-135m --tasks piqa --bits 4 --out-dir out/eval-4
    python eval.py --compare out/eval-16 out/eval-4             is the difference more than chance?
    python eval.py --model smollm2-135m --tasks perplexity --data wikitext2-valid.txt --limit 16384

Every score has a 95% interval (bootstrap), and beside it what always giving the commonest answer would score.
tasks/sets.py says what a model is asked, tasks/score.py how. The column `cut` counts rows that are longer
than the model's context; `unseen` are the scores without the rows whose prompts training rows have, too.

    OUT/run.json                  the model that the rows below belong to
    OUT/predictions/piqa.jsonl    a line a row, from which a run that was killed goes on
    OUT/summary.json              a key for each task

Perplexity is exp of the mean loss over windows of 1,024 tokens without overlap (of the context, if that is
shorter): the first token of a window is given, the others are predicted.
"""
import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import cli
from common.adapters import FILES, base_id, load_adapter
from common.cli import Parser, at_least_1, command, refuse, say, write_atomic
from common.data import first_tokens
from common.device import peak_memory
from common.loss import head_loss
from common.processes import is_first, world_size
from common.run import read_metrics
from model import count_parameters
from sample import open_model
from tasks import score, sets

WINDOW = 1024  # tokens, of perplexity
CHOICES = ("boolq", "piqa", "winogrande")
TASKS = (*CHOICES, "fpb", "fiqa", "tfns", "ner", "perplexity")
NEW_TOKENS = dict.fromkeys(CHOICES, 0) | {"ner": 128}  # that are written; FinGPT: 512 less the prompt's
MEASURE = dict.fromkeys(CHOICES, "accuracy") | {"perplexity": "perplexity"}  # of the rest: f1

def read_answer(task, example, scores, text):
    """What the model answered, by the likeliest choice or by the text that it wrote, and what is right."""
    if task in CHOICES:
        return dict(label=example.label, prediction=int(np.argmax(scores)), scores=scores)
    if task == "ner":
        tags, parsed = sets.read_entities(example.words, text)
        right, named = set(sets.entities(example.tags)), set(sets.entities(tags))
        return dict(label=example.tags, tags=tags, counts=[len(right & named), len(right), len(named)],
                    parsed=parsed, answer=text)
    label, parsed = sets.read_sentiment(text)  # as FinGPT reads it
    return dict(label=example.label, prediction=sets.SENTIMENTS.index(label), parsed=parsed, answer=text,
                likeliest=int(np.argmax(scores)), scores=scores)

def text_windows(path, tokenizer, limit, length):
    """The windows of a text's first `limit` tokens (None: of all), as examples whose words are tokens."""
    ids = first_tokens(path, tokenizer, limit)
    refuse(len(ids) < 2, f"{path} has {len(ids)} tokens: perplexity needs at least 2")
    starts = range(0, len(ids) - 1, length)  # a last token alone has nothing to be predicted from
    return [sets.Example("perplexity", i, "", "", words=ids[i:i + length]) for i in starts]

def measured_rows(model, tokenizer, device, task, examples):
    """Yields batches of (example, what there is to know of its answer)."""
    if task != "perplexity":
        for batch in score.score_in_batches(model, tokenizer, examples, device, NEW_TOKENS.get(task, 10)):
            yield [(e, dict(cut=cut, **read_answer(task, e, *answer))) for e, *answer, cut in batch]
        return
    for window in examples:
        tokens = torch.tensor([window.words], device=device.torch_device)
        with torch.inference_mode(), device.autocast():
            loss = head_loss(model.head, model.hidden(tokens[:, :-1]), tokens[:, 1:]).item()
        yield [(window, dict(cut=0, loss=loss, predicted=tokens.shape[1] - 1))]

def counted(task, rows):
    """{key: (name, counts of each row (n, ...), metric of their sum)} of each score, the main one first."""
    if task == "perplexity":
        counts = [[r["loss"] * r["predicted"], r["predicted"]] for r in rows]
        return {"main": ("perplexity", np.array(counts), lambda both: np.exp(both[..., 0] / both[..., 1]))}
    if task == "ner":
        return {"main": ("entity F1", np.array([r["counts"] for r in rows]), score.entity_f1)}
    classes, metric = 3, score.weighted_f1
    names = {"prediction": "weighted F1, as written", "likeliest": "weighted F1, likeliest label"}
    if task in CHOICES:
        classes, metric, names = 2, score.accuracy, {"prediction": "accuracy"}
    labels, found = [r["label"] for r in rows], {}
    for key, name in names.items():
        found[key] = name, score.confusion(labels, [r[key] for r in rows], classes), metric
    return found

def summed_up(task, rows):
    """A task's part of summary.json: the main score, and under "likeliest" what stands beside it."""
    r = dict(rows=len(rows), seconds=sum(r["seconds"] for r in rows), cut=sum(r["cut"] > 0 for r in rows))
    for key, (name, counts, metric) in counted(task, rows).items():
        total = counts.sum(0)
        found = {"score": name, MEASURE.get(task, "f1"): float(metric(total)),
                 "interval": score.bootstrap(counts, metric)}
        if counts.ndim == 3:  # tables of right and given labels
            found |= dict(accuracy=float(score.accuracy(total)), majority=score.majority(counts, metric))
        r |= {key: found} if key == "likeliest" else found
    if task == "ner":
        r["majority"] = 0.0  # the commonest tag is O: no entity is named
    if "parsed" in rows[0]:
        r["parsed"] = float(np.mean([r["parsed"] for r in rows]))
    return r

def score_task(model, tokenizer, device, task, examples, file=None):
    """The scores of a task (of sentiment, if its name is none of TASKS) over these examples: a dict.

    With `file` every row is written there as soon as it is known, and what is there is not measured again."""
    done = read_rows(file) if file else {}
    todo = [e for e in examples if name_of(e) not in done]
    if file:  # anew, without a line that a kill cut short
        write_atomic(file, "".join(json.dumps(row) + "\n" for row in done.values()))
    with tqdm(total=len(todo), desc=task, leave=False, disable=None if is_first() else True) as bar:
        start = time.perf_counter()
        for batch in measured_rows(model, tokenizer, device, task, todo):
            seconds = round((time.perf_counter() - start) / len(batch), 6)
            rows = [dict(answer, row=name_of(e), index=e.index, seconds=seconds) for e, answer in batch]
            done |= {row["row"]: row for row in rows}
            if file:
                with open(file, "a") as f:
                    f.writelines(json.dumps(row) + "\n" for row in rows)
            bar.update(len(batch))
            start = time.perf_counter()
    result = summed_up(task, [done[name_of(e)] for e in examples])
    unseen = [done[name_of(e)] for e in examples if not e.seen]
    if 0 < len(unseen) < len(examples):
        result |= dict(seen=len(examples) - len(unseen), unseen=summed_up(task, unseen))
    return result

def name_of(example):
    """Of a row with this very text."""
    return hashlib.sha256(repr(example).encode()).hexdigest()[:12]

def read_rows(file):
    return {row["row"]: row for row in read_metrics(file)}

def claim(folder, settings):
    """Make the folder this model's; rows of another model are moved aside, not overwritten."""
    path, text = folder / "run.json", json.dumps(settings, indent=2) + "\n"
    if (folder / "predictions").exists() and (not path.exists() or path.read_text() != text):
        aside = cli.move_aside(folder)
        say(f"{folder} held the rows of another model or of other settings: moved to {aside}")
    (folder / "predictions").mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)

def print_results(results):
    lines = []
    for task, result in results.items():
        for name, part in {task: result, f"{task} unseen": result.get("unseen", {})}.items():
            for found in filter(None, (part, part.get("likeliest"))):
                low, high = found["interval"]
                majority = f"{found['majority']:.3f}" if "majority" in found else ""
                lines.append([name, found["score"], f"{found[MEASURE.get(task, 'f1')]:.3f}",
                              f"{low:.3f} to {high:.3f}", majority, f"{part['rows']:,}",
                              f"{part['seconds']:.1f}", part["cut"]])
    print(cli.markdown(["task", "score", "value", "95% interval", "majority", "rows", "s", "cut"], lines))

def compare(one, other):
    """A table of two runs over the rows that both have. p, the probability of such a difference by chance, is
    McNemar's exact test where rows are right or wrong, else from the bootstrap."""
    lines = []
    for task in TASKS:
        first, second = (read_rows(f"{folder}/predictions/{task}.jsonl") for folder in (one, other))
        shared = [name for name in first if name in second]
        if not shared:
            continue
        theirs = counted(task, [second[name] for name in shared])
        for key, (title, a, metric) in counted(task, [first[name] for name in shared]).items():
            b, tables = theirs[key][1], a.ndim == 3  # of right and given labels
            if tables:
                title, metric = title.replace("weighted F1", "accuracy"), score.accuracy
            low, high, p = score.paired_bootstrap(a, b, metric)
            if tables:
                p = score.mcnemar(metric(a), metric(b))
            A, B = metric(a.sum(0)), metric(b.sum(0))
            lines.append([task, title, len(shared), f"{A:.3f}", f"{B:.3f}", f"{B - A:+.3f}",
                          f"{low:+.3f} to {high:+.3f}", f"{p:.3f}" if p >= 0.001 else "< 0.001"])
    refuse(not lines, f"{one} and {other}: they have no predictions of the same rows: run the same tasks")
    print(f"A = {one}\nB = {other}")
    print(cli.markdown(["task", "score", "rows", "A", "B", "B - A", "95% interval", "p"], lines))

def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("--model", default="out/train", help="folder, file or known name")
    p.add_argument("--adapter", metavar="DIR", help="an adapter of finetune.py or PEFT")
    p.add_argument("--bits", type=int, default=16, help="8 or 4: quantize the weights while loading")
    p.add_argument("--tasks", default="perplexity", help=f"separated by commas: {', '.join(TASKS)}")
    p.add_argument("--data", default="builtin", help="text for perplexity: a file, a folder, or builtin")
    p.add_argument("--data-dir", default=os.environ.get("DATA_DIR", "data"), help="where the sets are")
    p.add_argument("--limit", type=at_least_1, help="rows of each task, a seeded sample; tokens of the text")
    p.add_argument("--out-dir", default="out/eval", help="where predictions and summary.json go")
    p.add_argument("--compare", nargs=2, metavar=("A", "B"), help="put two such folders side by side")
    args = p.parse_args(argv)
    if args.compare:
        return compare(*args.compare)
    refuse(world_size() > 1, f"eval.py is one process, got {world_size()}: leave torchrun out")
    with cli.alone_in(args.out_dir):
        return evaluate(args)

def evaluate(args):
    names, items = list(dict.fromkeys(args.tasks.split(","))), {}
    for name in names:  # missing or malformed data is told before the model is loaded
        refuse(name not in TASKS, f"no task is called {name!r}: the tasks are {', '.join(TASKS)}")
        refuse(name == "perplexity" and args.limit == 1, "--limit must be at least 2 tokens, got 1")
        if name != "perplexity":
            items[name] = sets.draw(sets.load(name, args.data_dir), args.limit)
    model, tokenizer, device = open_model(args.model, args.bits)
    settings = dict(model=str(args.model), base_id=base_id(args.model), adapter=args.adapter, factors=None,
                    bits=args.bits)
    if args.adapter:
        adapter = load_adapter(model, args.adapter, settings["base_id"])
        say(adapter)
        files = b"".join((adapter.folder / file).read_bytes() for file in FILES)
        settings["factors"] = hashlib.sha256(files).hexdigest()[:16]
    if "perplexity" in names:
        length = min(WINDOW, model.config.context)
        items["perplexity"] = text_windows(args.data, tokenizer, args.limit, length)
    folder, results = Path(args.out_dir), {}
    claim(folder, settings)
    for name in names:
        file = folder / "predictions" / f"{name}.jsonl"
        results[name] = score_task(model, tokenizer, device, name, items[name], file)
    print_results(results)
    summary = dict(**results, **settings, parameters=count_parameters(model), device=device.name,
                   peak_memory_bytes=peak_memory(device.torch_device), arguments=vars(args))
    write_atomic(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return 0

if __name__ == "__main__":
    command(main)
