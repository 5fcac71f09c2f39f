"""Rows of PIQA, WinoGrande or BoolQ through score.py, and the same rows through EleutherAI's lm-evaluation-harness (`pip install lm-eval`).

    python bench.py eval                               all 1,838 rows of PIQA
    python bench.py eval --tasks boolq --limit 200 --peer-dtypes float32

The harness reads its own task files (prompts, scoring) from a local copy of the rows, and computes with transformers on the exported model.
Both engines start from a loaded model; what is timed is everything from the rows to the accuracy.
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

FILES = {"boolq": "super_glue/boolq/default.yaml", "piqa": "piqa/piqa.yaml", "winogrande": "winogrande/default.yaml"}  # of the harness


def harness_rows(task, data_dir, indices):
    """The rows as the harness's data sets have them, read from the source's files."""
    lines = (Path(data_dir) / task / ("valid.jsonl" if task == "piqa" else "dev.jsonl")).read_text().splitlines()
    rows = [json.loads(lines[i]) for i in indices]
    if task == "piqa":
        labels = (Path(data_dir) / task / "valid-labels.lst").read_text().split()
        rows = [dict(r, label=int(labels[i])) for r, i in zip(rows, indices)]
    return [dict(r, label=int(r["answer"])) for r in rows] if task == "boolq" else rows


def harness_model(model, tokenizer, dtype="float32", batch_size=16):
    """A model of ours inside the harness."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from lm_eval.models.huggingface import HFLM
    with tempfile.TemporaryDirectory() as folder:
        export(model, tokenizer, Path(folder) / "hf")
        return HFLM(pretrained=f"{folder}/hf", dtype=dtype, batch_size=batch_size, device=str(next(model.parameters()).device))


def harness(lm, task, rows):
    """(metrics, log-likelihoods of both endings of each row) by the harness's simple_evaluate."""
    import lm_eval
    from lm_eval.tasks import TaskManager
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (Path(folder) / "local.yaml").write_text(f"include: {Path(lm_eval.__file__).parent / 'tasks' / FILES[task]}\ntask: local\n"
                                                 "dataset_path: json\ndataset_name: null\ntag: []\n"
                                                 f"dataset_kwargs:\n  data_files:\n    validation: {folder}/rows.jsonl\n  cache_dir: {folder}/cache\n"
                                                 "training_split: null\ntest_split: null\n")
        found = lm_eval.simple_evaluate(lm, tasks=["local"], task_manager=TaskManager(include_path=folder, include_defaults=False), bootstrap_iters=0)
    metrics = {k.split(",")[0]: v for k, v in found["results"]["local"].items() if isinstance(v, float)}
    samples = sorted(found["samples"]["local"], key=lambda s: s["doc_id"])
    return metrics, [[response[0][0] for response in s["resps"]] for s in samples]


def ours(model, tokenizer, device, task, args):
    examples = sets.draw(sets.load(task, args.data_dir), args.limit)
    scores = score.label_scores(model, tokenizer, examples, device)
    metrics = dict(acc=np.mean([np.argmax(s) == e.label for s, e in zip(scores, examples)]))
    if task == "piqa":
        metrics["acc_norm"] = np.mean([np.argmax([x / (len(c) - 1) for x, c in zip(s, e.choices)]) == e.label for s, e in zip(scores, examples)])
    return metrics, scores, [e.index for e in examples]


def bench(args):
    """Each task by both engines, one after the other in one run."""
    device, rows = find_device(args.dtype), []
    model, tokenizer = load_model(args.model, device.torch_device)
    peers = {}
    try:
        peers = {dtype: harness_model(model, tokenizer, dtype, args.batch_size) for dtype in filter(None, args.peer_dtypes.split(","))}
    except ImportError as e:
        print(f"lm-evaluation-harness is not here ({e}): its rows are left out; pip install lm-eval")
    for task in args.tasks.split(","):
        start = time.perf_counter()
        metrics, scores, indices = ours(model, tokenizer, device, task, args)
        rows.append(row("ours", task, metrics, scores, time.perf_counter() - start, str(device.dtype)[6:], 0.0))
        for dtype, lm in peers.items():
            start = time.perf_counter()
            metrics, theirs = harness(lm, task, harness_rows(task, args.data_dir, indices))
            difference = float(np.abs(np.array(theirs) - np.array(scores)).max())
            rows.append(row("lm-eval", task, metrics, theirs, time.perf_counter() - start, dtype, difference))
    print(f"{args.model} on {device.name}; lm-eval with batches of {args.batch_size}")
    return device, rows


def row(engine, task, metrics, scores, seconds, dtype, difference):
    return dict(engine=engine, task=task, rows=len(scores), accuracy=float(metrics["acc"]), accuracy_norm=float(metrics.get("acc_norm", metrics["acc"])),
                seconds=seconds, dtype=dtype, largest_difference=difference, threads=torch.get_num_threads())


def report(rows):
    return table(rows, {"engine": lambda r: r["engine"], "dtype": lambda r: r["dtype"], "task": lambda r: r["task"], "rows": lambda r: f"{r['rows']:,}",
                        "accuracy": lambda r: f"{r['accuracy']:.4f}", "by characters": lambda r: f"{r['accuracy_norm']:.4f}",
                        "seconds": lambda r: f"{r['seconds']:.1f}",
                        "largest difference of log p": lambda r: "" if r["engine"] == "ours" else f"{r['largest_difference']:.1e}"})


def arguments(p):
    p.add_argument("--model", default="smollm2-135m",
                   help="a model folder, a file, or a known name (default: %(default)s)")
    p.add_argument("--tasks", default="piqa",
                   help="of boolq, piqa and winogrande, separated by commas (default: %(default)s)")
    p.add_argument("--limit", type=int, help="a seeded sample of so many rows (default: all)")
    p.add_argument("--data-dir", default=os.environ.get("DATA_DIR", "data"),
                   help="where the tasks' files are (default: $DATA_DIR, then data/)")
    p.add_argument("--dtype", default="auto",
                   help="of ours: float32, bfloat16, or auto, the faster one here (default: %(default)s)")
    p.add_argument("--peer-dtypes", default="bfloat16",
                   help="of the harness, separated by commas (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=16, help="of the harness (default: %(default)s)")
