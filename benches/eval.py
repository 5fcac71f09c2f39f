"""Rows of PIQA, WinoGrande or BoolQ by tasks/score.py, and the same by EleutherAI's lm-evaluation-harness.

    python bench.py eval                               all 1,838 rows of PIQA
    python bench.py eval --tasks boolq --limit 200 --peer-dtypes float32

The harness (pip install lm-eval) reads its own task files (prompts, scoring) from a local copy of the rows,
and computes with transformers on the exported model. Both engines start from a loaded model; what is timed is
everything from the rows to the accuracy.
"""
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benches.common import table
from checkpoint import load_model
from common.device import find_device
from common.formats import export
from tasks import score, sets

FILES = dict(boolq="super_glue/boolq/default.yaml", piqa="piqa/piqa.yaml",
             winogrande="winogrande/default.yaml")
BATCH = 16  # of the harness


def harness_rows(task, data_dir, indices):
    """The rows as the harness's data sets have them, read from the source's files."""
    folder = Path(data_dir) / task
    lines = (folder / ("valid.jsonl" if task == "piqa" else "dev.jsonl")).read_text().splitlines()
    rows = [json.loads(lines[i]) for i in indices]
    if task == "piqa":
        labels = (folder / "valid-labels.lst").read_text().split()
        rows = [dict(r, label=int(labels[i])) for r, i in zip(rows, indices)]
    if task == "boolq":
        rows = [dict(r, label=int(r["answer"])) for r in rows]
    return rows


def harness_model(model, tokenizer, dtype="float32"):
    """A model of ours inside the harness."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from lm_eval.models.huggingface import HFLM
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory() as folder:
        export(model, tokenizer, Path(folder) / "hf")
        return HFLM(pretrained=f"{folder}/hf", dtype=dtype, batch_size=BATCH, device=str(device))


def harness(lm, task, rows):
    """(metrics, log-likelihoods of both endings of each row) by the harness's simple_evaluate."""
    import lm_eval
    from lm_eval.tasks import TaskManager
    theirs = Path(lm_eval.__file__).parent / "tasks" / FILES[task]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        settings = dict(include=str(theirs), task="local", dataset_path="json", dataset_name=None, tag=[],
                        training_split=None, test_split=None,
                        dataset_kwargs=dict(data_files=dict(validation=f"{folder}/rows.jsonl"),
                                            cache_dir=f"{folder}/cache"))
        (Path(folder) / "local.yaml").write_text(json.dumps(settings))  # JSON is YAML
        tasks = TaskManager(include_path=folder, include_defaults=False)
        found = lm_eval.simple_evaluate(lm, tasks=["local"], task_manager=tasks, bootstrap_iters=0)
    results = found["results"]["local"].items()
    metrics = {k.split(",")[0]: v for k, v in results if isinstance(v, float)}
    samples = sorted(found["samples"]["local"], key=lambda s: s["doc_id"])
    return metrics, [[response[0][0] for response in s["resps"]] for s in samples]


def ours(model, tokenizer, device, task, args):
    examples = sets.draw(sets.load(task, args.data_dir), args.limit)
    scores = score.label_scores(model, tokenizer, examples, device)
    hits = [np.argmax(s) == e.label for s, e in zip(scores, examples)]
    metrics = dict(acc=np.mean(hits))
    if task == "piqa":
        rates = [[x / (len(c) - 1) for x, c in zip(s, e.choices)] for s, e in zip(scores, examples)]
        metrics["acc_norm"] = np.mean([np.argmax(r) == e.label for r, e in zip(rates, examples)])
    return metrics, scores, [e.index for e in examples]


def bench(args):
    """Each task by both engines, one after the other in one run."""
    device, rows = find_device(args.dtype), []
    model, tokenizer = load_model(args.model, device.torch_device)
    peers = {}
    try:
        for dtype in args.peer_dtypes.split(","):
            peers[dtype] = harness_model(model, tokenizer, dtype)
    except ImportError as e:
        print(f"lm-evaluation-harness is not here ({e}): its rows are left out; pip install lm-eval")
    for task in args.tasks.split(","):
        start = time.perf_counter()
        metrics, scores, indices = ours(model, tokenizer, device, task, args)
        seconds = time.perf_counter() - start
        rows.append(row("ours", task, metrics, scores, seconds, str(device.dtype)[6:], 0.0))
        for dtype, lm in peers.items():
            start = time.perf_counter()
            metrics, theirs = harness(lm, task, harness_rows(task, args.data_dir, indices))
            seconds = time.perf_counter() - start
            difference = float(np.abs(np.array(theirs) - np.array(scores)).max())
            rows.append(row("lm-eval", task, metrics, theirs, seconds, dtype, difference))
    print(f"{args.model} on {device.name}; lm-eval with batches of {BATCH}")
    return device, rows


def row(engine, task, metrics, scores, seconds, dtype, difference):
    return dict(engine=engine, task=task, rows=len(scores), accuracy=float(metrics["acc"]),
                accuracy_norm=float(metrics.get("acc_norm", metrics["acc"])), seconds=seconds, dtype=dtype,
                largest_difference=difference, threads=torch.get_num_threads())


def report(rows):
    return table(rows, {
        "engine": lambda r: r["engine"], "dtype": lambda r: r["dtype"], "task": lambda r: r["task"],
        "rows": lambda r: f"{r['rows']:,}", "accuracy": lambda r: f"{r['accuracy']:.4f}",
        "by characters": lambda r: f"{r['accuracy_norm']:.4f}", "seconds": lambda r: f"{r['seconds']:.1f}",
        "largest difference of log p":
            lambda r: "" if r["engine"] == "ours" else f"{r['largest_difference']:.1e}"})


def arguments(p):
    p.add_argument("--model", default="smollm2-135m", help="folder, file or name (default: %(default)s)")
    p.add_argument("--tasks", default="piqa", help="of boolq, piqa and winogrande (default: %(default)s)")
    p.add_argument("--limit", type=int, help="a seeded sample of so many rows (default: all)")
    p.add_argument("--data-dir", default=os.environ.get("DATA_DIR", "data"),
                   help="where the tasks' files are (default: $DATA_DIR, then data/)")
    p.add_argument("--dtype", default="auto",
                   help="of ours: float32, bfloat16, or auto, the faster one here (default: %(default)s)")
    p.add_argument("--peer-dtypes", default="bfloat16",
                   help="of the harness, separated by commas (default: %(default)s)")
