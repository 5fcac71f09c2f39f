"""The paper's seven tasks (Tables VI to VIII): a model at 16, 8 and 4 bit, and what adapters keep.

    python bench.py scores                       a seeded sample of 300 rows of each task
    python bench.py scores --limit 10000         all rows: hours on a CPU; goes on where it was stopped
    python bench.py scores --adapters            also adapters, each learned from some sets and scored on all

Adapters have rank 8 on the 8-bit base and as many steps each; `all but fpb` has never seen a row of FPB. A
score is accuracy, a sentiment's weighted F1 by the likeliest label (in parentheses without the test rows that
training rows share), or F1 of NER's entities, with half of its 95% interval.
"""
import json
from pathlib import Path

from benches.common import DATA_DIR, run_once, table
from common.cli import write_atomic
from common.device import find_device
from eval import MEASURE
from finetune import SENTIMENT
from tasks import sets
from tasks.rows import read_alpaca

DEFAULTS = dict(model="smollm2-135m", bits=[16, 8, 4], limit=300, adapters=False, max_iters=150,
                tasks=["boolq", "piqa", "winogrande", *sets.TEST_SHARE], out_dir="out/bench_scores")

def adapters(out_dir):
    """name -> the flags of finetune.py that say what it learns from."""
    found = {task: ["--task", task] for task in (*SENTIMENT, "ner")}
    for left_out in (None, *SENTIMENT):  # --task sentiment takes the sets that a folder has: one of links
        name = f"all but {left_out}" if left_out else "all three"
        folder = Path(out_dir) / f"data-of-{name.replace(' ', '-')}"
        folder.mkdir(parents=True, exist_ok=True)
        for task in SENTIMENT:
            if task != left_out and not (folder / task).exists():
                (folder / task).symlink_to(Path(DATA_DIR).resolve() / task)
        found[name] = ["--task", "sentiment", "--data-dir", folder]
    own = sum((sets.load(task, DATA_DIR, "train") for task in SENTIMENT), [])
    others = sets.draw(read_alpaca(Path(DATA_DIR) / "alpaca" / "alpaca_data.json"), len(own))
    rows = [dict(prompt=e.prompt, completion=e.answer) for e in own + others]
    write_atomic(Path(out_dir) / "with-alpaca.json", json.dumps(rows))
    return found | {"all three, Alpaca": ["--task", Path(out_dir) / "with-alpaca.json"]}

def bench(args):
    rows, learned = [], adapters(args.out_dir) if args.adapters else {}
    for bits, name in [*((bits, "") for bits in args.bits), *((8, name) for name in learned)]:
        words = Path(args.model).name, f"{bits}bit", name.replace(" ", "-")
        folder = Path(args.out_dir) / "-".join(filter(None, words))
        model = ["--model", args.model, "--bits", bits]
        if name:
            run_once("finetune.py", folder, "--base", args.model, "--bits", bits, *learned[name],
                     "--max-iters", args.max_iters, "--eval-limit", 0)
            model += ["--adapter", folder]
        summary = run_once("eval.py", f"{folder}-{args.limit}", *model, "--tasks", ",".join(args.tasks),
                           "--limit", args.limit)
        for task in args.tasks:
            r, key = summary[task], MEASURE.get(task, "f1")
            main, unseen = (part and part.get("likeliest", part) for part in (r, r.get("unseen")))
            rows.append(dict(model=args.model, bits=bits, adapter=name, task=task, value=main[key],
                             unseen=unseen and unseen[key], interval=main["interval"], rows=r["rows"],
                             majority=r["majority"], seconds=r["seconds"]))
    return find_device("float32"), rows

def report(rows):
    """A line for each model, a column for each task; bold where an adapter has learned from that set."""
    lines = {"rows": {r["task"]: f"{r['rows']:,}" for r in rows},
             "commonest answer": {r["task"]: f"{r['majority']:.3f}" for r in rows}}
    for r in rows:
        name, task, (low, high) = r.get("adapter"), r["task"], r["interval"]
        unseen = "" if r.get("unseen") is None else f" ({r['unseen']:.3f})"
        text = f"{r['value']:.3f}{unseen} ± {(high - low) / 2:.3f}"
        own = name and (name == task or name.startswith("all") and task in SENTIMENT)
        learned = own and not name.endswith(f"but {task}")
        line = lines.setdefault(name or f"{r['bits']} bit", {})
        line[task] = f"**{text}**" if learned else text
    return table([{"": name} | line for name, line in lines.items()])
