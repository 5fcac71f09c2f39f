"""The paper's accuracies (Tables VI to VIII), and how probable their difference to the base is by chance.

    python bench.py chance

The paper prints no intervals; they follow from the sizes of the test sets, F1 taken as a share, and two
models' rows as independent samples (eval.py --compare has the sharper test of the same rows). Of so many
differences some look large by chance: Holm's correction says how many hold.
"""
import math
from statistics import NormalDist
from types import SimpleNamespace

from benches.common import PAPER, table

DEFAULTS = {}

def by_chance(a, b, rows):
    """Two-sided probability of a difference as large as that of two shares a and b (percent) of so many rows
    where there is none: it has a deviation of sqrt((a (1 - a) + b (1 - b)) / rows)."""
    return 2 * NormalDist().cdf(-abs(a - b) / math.sqrt((a * (100 - a) + b * (100 - b)) / rows))

def holm(probabilities, level=0.05):
    """How many of them hold at once, with a chance of `level` that any of these is wrong: the smallest of n
    must be at most level / n, the next at most level / (n - 1), and so on."""
    held = 0
    for p in sorted(probabilities):
        if p > level / (len(probabilities) - held):
            break
        held += 1
    return held

def bench(args):
    rows = []
    for base, models in PAPER["scores"].items():
        for model, scores in models.items():
            for (task, n), score, of_base in zip(PAPER["rows"].items(), scores, models[base]):
                p = None if model == base else by_chance(score, of_base, n)
                half = 1.96 * math.sqrt(score * (100 - score) / n)  # of the 95% interval
                rows.append(dict(base=base, model=model, task=task, score=score, interval=half, p=p))
    return SimpleNamespace(name="computed from the paper's figures"), rows

def report(rows):
    """A table for GPT-2 and one for Llama 2."""
    tables, p = {"GPT2": {}, "Llama2": {}}, [r["p"] for r in rows if r["p"] is not None]
    for r in rows:
        how = f"± {r['interval']:.1f}"
        if r["p"] is not None:
            how = f"({r['p']:.2f})" if r["p"] >= 0.01 else "(<.01)"
        lines = tables[r["base"].split("-")[0]]
        line = lines.setdefault((r["base"], r["model"]), dict(paper=r["model"]))
        line[r["task"]] = f"{r['score']:.1f} {how}"
    small = sum(x < 0.05 for x in p)
    note = ("In brackets: the probability of so large a difference to the base model by chance, each taken "
            f"alone. {small} of the {len(p)} are below 0.05; {holm(p)} hold together at that level by Holm's "
            "correction.")
    return "\n\n".join([*(table(lines.values()) for lines in tables.values()), note])
