"""What the benchmarks share: timing in turn, and tables."""
import statistics
import time

import torch
from tqdm import tqdm

from runtime import markdown


def interleaved(steps, rounds):
    """Median seconds of each named step, all of them run in turn `rounds` times after a warm-up. steps: name -> function."""
    times = {name: [] for name in steps}
    for i in tqdm(range(rounds + 1), desc="rounds", disable=None, leave=False):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def table(rows, columns):
    """Rows as a Markdown table; columns: title -> function of a row."""
    return markdown(list(columns), [[f(r) for f in columns.values()] for r in rows], left=0)
