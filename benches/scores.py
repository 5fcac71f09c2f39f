"""The paper's seven tasks at 16, 8 and 4 bit (Tables VI to VIII): eval.py, once for each, and the scores in
one table.

    python bench.py scores                       a seeded sample of 300 rows of each task
    python bench.py scores --limit 0             all rows: hours on a CPU; goes on where it was stopped
"""
import json
import os
from pathlib import Path

from benches.common import call, table
from common.device import find_device

TASKS = ("boolq", "piqa", "winogrande", "fpb", "fiqa", "tfns", "ner")


def measured(bits, args):
    """The summary.json of eval.py at so many bits."""
    out = Path(args.out_dir) / f"{Path(args.model).name}-{bits}"
    limit = ["--limit", args.limit] if args.limit else []
    call("eval.py", "--model", args.model, "--bits", bits, "--tasks", args.tasks, "--data-dir", args.data_dir,
         *limit, "--out-dir", out)
    return json.loads((out / "summary.json").read_text())


def bench(args):
    rows = []
    for bits in args.bits:
        summary = measured(bits, args)
        for task in args.tasks.split(","):
            r = summary[task]
            best = r.get("likeliest", r)  # of a sentiment, the likeliest label; what is written beside it
            name = "f1" if "f1" in best else "accuracy"
            rows.append(dict(model=args.model, bits=bits, task=task, score=name, value=best[name],
                             interval=best["interval"], majority=r["majority"],
                             written=r["f1"] if "likeliest" in r else None, rows=r["rows"],
                             seconds=r["seconds"]))
    print(f"{args.model}: accuracy, or weighted F1 of the likeliest label (of what is written); of NER the "
          "F1 of entities as written")
    return find_device("float32"), rows


def report(rows):
    def cell(r):
        value = f"{r['value']:.3f}" + (f" ({r['written']:.3f})" if r["written"] is not None else "")
        return value + " [{:.3f}, {:.3f}]".format(*r["interval"])
    bits = list(dict.fromkeys(r["bits"] for r in rows))
    of = {(r["task"], r["bits"]): r for r in rows}
    first = [r for r in rows if r["bits"] == bits[0]]
    return table(first,
                 {"task": lambda r: r["task"], "score": lambda r: {"f1": "F1"}.get(r["score"], r["score"]),
                  "rows": lambda r: r["rows"],
        "commonest answer": lambda r: f"{r['majority']:.3f}",
                  **{f"{b} bit [95%]": lambda r, b=b: cell(of[r["task"], b]) for b in bits},
        "seconds": lambda r: f"{r['seconds']:.0f}"})


def arguments(p):
    p.add_argument("--model", default="smollm2-135m",
                   help="a model folder, a file, or a known name (default: %(default)s)")
    p.add_argument("--bits", type=lambda s: [int(b) for b in s.split(",")], default=[16, 8, 4],
                   help="default: 16,8,4")
    p.add_argument("--tasks", default=",".join(TASKS), help="default: %(default)s")
    p.add_argument("--limit", type=int, default=300,
                   help="rows of each task, a seeded sample; 0: all (default: %(default)s)")
    p.add_argument("--data-dir", default=os.environ.get("DATA_DIR", "data"),
                   help="where the tasks' files are (default: $DATA_DIR, then data/)")
    p.add_argument("--out-dir", default="out/bench_scores",
                   help="where eval.py leaves its rows; a stopped run goes on there (default: %(default)s)")
