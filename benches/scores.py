"""The paper's seven tasks at 16, 8 and 4 bit (Tables VI to VIII): eval.py, once for each, in one table.

    python bench.py scores                       a seeded sample of 300 rows of each task
    python bench.py scores --limit 10000         all rows: hours on a CPU; goes on where it was stopped

Accuracy, weighted F1 of the likeliest label (in parentheses of what is written) or F1 of NER's entities; the
95% interval of each, and what always giving the commonest answer scores.
"""
from pathlib import Path

from benches.common import run_once, table
from common.device import find_device

DEFAULTS = dict(model="smollm2-135m", bits=[16, 8, 4], limit=300, out_dir="out/bench_scores",
                tasks=["boolq", "piqa", "winogrande", "fpb", "fiqa", "tfns", "ner"])

def bench(args):
    rows = []
    for bits in args.bits:
        summary = run_once("eval.py", f"{args.out_dir}/{Path(args.model).name}-{bits}bit-{args.limit}",
                           "--model", args.model, "--bits", bits, "--tasks", ",".join(args.tasks),
                           "--limit", args.limit)
        for task in args.tasks:
            r = summary[task]
            best = r.get("likeliest", r)  # of a sentiment, the likeliest label; what is written beside it
            name = "f1" if "f1" in best else "accuracy"
            rows.append(dict(model=args.model, bits=bits, task=task, score=name, value=best[name],
                             interval=best["interval"], majority=r["majority"], rows=r["rows"],
                             written=r["f1"] if "likeliest" in r else None, seconds=r["seconds"]))
    return find_device("float32"), rows

def report(rows):
    """A line for each task, a column for each number of bits."""
    lines = {}
    for r in rows:
        line = lines.setdefault(r["task"], {
            "task": r["task"], "score": r["score"].replace("f1", "F1"), "rows": r["rows"],
            "commonest answer": f"{r['majority']:.3f}"})
        written = "" if r["written"] is None else f" ({r['written']:.3f})"
        low, high = r["interval"]
        line[f"{r['bits']} bit [95%]"] = f"{r['value']:.3f}{written} [{low:.3f}, {high:.3f}]"
    for r in rows[:len(lines)]:  # of the first bits
        lines[r["task"]]["seconds"] = f"{r['seconds']:.0f}"
    return table(lines.values())
