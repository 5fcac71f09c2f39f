"""What the benchmarks share: timing in turn, runs of the scripts that are not repeated, and tables."""
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common.cli import InputError, markdown


def interleaved(steps, rounds):
    """Median seconds of each named step, all of them run in turn `rounds` times after a warm-up."""
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


def finished(folder):
    """summary.json of a run that went to its end, else None."""
    file = Path(folder) / "summary.json"
    summary = json.loads(file.read_text()) if file.exists() else dict(stopped_by="nothing yet")
    return None if summary.get("stopped_by") else summary


def call(script, *flags, settings=None, env=None, quiet=False):
    """Run a script of the project. settings: what has no flag, for its main(argv, **settings)."""
    head = [script]
    if settings:
        code = (f"import sys, {script[:-3]} as m; from common.cli import command; "
                f"command(lambda: m.main(sys.argv[1:], **{settings!r}))")
        head = ["-c", code]
    done = subprocess.run([sys.executable, *head, *map(str, flags)], env=env, capture_output=quiet, text=True)
    if done.returncode:
        why = (done.stderr.strip() or "killed").splitlines()[-1] if quiet else "its own lines above say why"
        raise InputError(f"{script} ended with {done.returncode}: {why}")


def run_once(script, folder, *flags, **how):
    """`python SCRIPT FLAGS --out-dir FOLDER`, resumed where it was stopped, unless it is done. Returns its
    summary."""
    if finished(folder) is None:
        resume = (Path(folder) / "state").exists()
        call(script, *(["--resume"] if resume else flags), "--out-dir", folder, **how)
    return finished(folder)


def table(rows, columns):
    """Rows as a Markdown table; columns: title -> function of a row."""
    return markdown(list(columns), [[f(r) for f in columns.values()] for r in rows], left=0)
