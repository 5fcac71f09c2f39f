"""The paper's accuracies (Tables VI, VII and VIII), each with the probability that chance alone makes so
large a difference to its base model.

    python bench.py chance

The paper prints no intervals; they follow from the sizes of the test sets. Two shares p and q of n rows
differ by chance with a deviation of sqrt((p (1 - p) + q (1 - q)) / n), if the rows are taken as two
independent samples: the paper does not say which rows each model got right, which would allow a sharper test
(eval.py --compare). F1 is treated as a share.
"""
import math
from statistics import NormalDist
from types import SimpleNamespace

from benches.common import table

ROWS = {"BoolQ": 3270, "PIQA": 1838, "WinoGrande": 1267, "FPB": 1212, "FiQA SA": 275, "TFNS": 2388}
PAPER = {  # base -> model -> percent, in the order of ROWS
    "GPT2-127M": {
        "GPT2-127M": (61.9, 56.9, 48.9), "r192, method 1": (48.1, 57.7, 50.7),
                  "r96, method 1": (38.0, 56.7, 51.3), "r48, method 1": (51.8, 55.8, 50.0),
        "r192, method 2": (39.2, 58.9, 50.2), "r96, method 2": (47.8, 55.7, 50.8),
                  "r48, method 2": (38.2, 55.1, 52.0)},
    "GPT2-1.5B": {
        "GPT2-1.5B": (59.9, 63.6, 50.4), "r384, method 1": (58.5, 58.7, 50.6),
                  "r192, method 1": (43.1, 57.4, 48.9), "r96, method 1": (43.7, 57.2, 49.5),
        "r384, method 2": (60.7, 65.9, 55.4), "r192, method 2": (46.7, 62.4, 51.5),
                  "r96, method 2": (40.3, 60.0, 51.9)},
    "Llama2-7B": {
        "Llama2-7B": (76.5, 79.8, 70.1, 51.8, 68.6, 80.9), "r8, 4 bit": (76.8, 77.0, 40.2, 73.8, 68.9, 70.2),
        "r8, 8 bit": (78.9, 81.8, 59.1, 85.0, 86.0, 89.4), "r8, 16 bit": (82.8, 79.1, 59.0, 85.6, 84.5, 89.4),
        "r4, 16 bit": (81.4, 79.8, 56.9, 51.8, 68.6, 53.6),
                  "r16, 16 bit": (82.5, 80.1, 58.4, 86.4, 86.8, 89.1)},
    "Llama2-13B": {
        "Llama2-13B": (74.2, 72.3, 67.7, 54.2, 73.0, 63.1), "r8, 4 bit": (84.6, 83.0, 63.0, 70.1, 69.2, 73.0),
        "r8, 8 bit": (84.7, 83.2, 62.8, 87.7, 88.6, 90.2), "r8, 16 bit": (85.0, 83.1, 62.8, 40.0, 56.1, 58.9),
        "r4, 16 bit": (84.2, 82.9, 62.7, 26.4, 54.2, 39.9),
                   "r16, 16 bit": (86.1, 83.9, 63.0, 87.6, 84.2, 90.4)},
}


def half_width(percent, rows):
    """Of the 95% interval of a share, in points."""
    return 1.96 * math.sqrt(percent * (100 - percent) / rows)


def by_chance(a, b, rows):
    """Two-sided probability of a difference as large as that of a and b (percent) where there is none."""
    deviation = math.sqrt((a * (100 - a) + b * (100 - b)) / rows)
    return 2 * NormalDist().cdf(-abs(a - b) / deviation)


def bench(args):
    rows = []
    for base, models in PAPER.items():
        for model, scores in models.items():
            for (task, n), score, of_base in zip(ROWS.items(), scores, models[base]):
                rows.append(dict(base=base, model=model, task=task, score=score,
                                 interval=half_width(score, n),
                                 p=None if model == base else by_chance(score, of_base, n)))
    return SimpleNamespace(name="computed from the paper's figures"), rows


def cell(r):
    if r["p"] is None:
        return f"{r['score']:.1f} ± {r['interval']:.1f}"
    return f"{r['score']:.1f} ({r['p']:.2f})" if r["p"] >= 0.01 else f"{r['score']:.1f} (<.01)"


def report(rows):
    """A table for GPT-2 and one for Llama 2."""
    tables = []
    for bases in (("GPT2-127M", "GPT2-1.5B"), ("Llama2-7B", "Llama2-13B")):
        own = {(r["base"], r["model"], r["task"]): r for r in rows if r["base"] in bases}
        tasks = list(dict.fromkeys(task for _, _, task in own))
        columns = {"paper": lambda key: key[1]} | {task: lambda key, task=task,
                                                   own=own: cell(own[*key, task]) for task in tasks}
        tables.append(table(list(dict.fromkeys(key[:2] for key in own)), columns))
    return "\n\n".join(
        tables) + "\n\nIn brackets: the probability of so large a difference to the base model by chance."


def arguments(p):
    pass
