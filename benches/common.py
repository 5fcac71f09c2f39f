"""What the benches share: flags, the paper's figures, timing in turn, processes, runs of scripts, tables."""
import importlib.util
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from common.cli import InputError, Parser, at_least_0, at_least_1, markdown, positive, refuse, write_atomic
from common.run import has_state
from common.tokenizer import read_json

DATA_DIR = os.environ.get("DATA_DIR", "data")
PAPER = json.loads(Path(__file__).with_name("paper_figures.json").read_text())  # its tables
HELP = {  # of the flags whose names do not say it all
    "calibration": "text of the activations: a file, a folder or builtin",
    "compile": "the blocks of our models, with torch.compile", "dry_run": "the smallest sizes, to find slips",
    "eager": "also without the CUDA graph, or without the one call on a CPU",
    "nanogpt": "also time nanoGPT's 124M, from this checkout of its repository",
    "out_dir": "a stopped run goes on there, a finished one is not repeated", "ranks": "0: full rank",
    "recompute": "a mode of train.py --recompute, or all", "hours": "after so many no run begins",
    "recovery": "the text to recover on", "text": "to measure: a file, a folder or builtin",
    "steps": "of recovery", "texts": "to measure", "limit": "rows of each task",
}

def parse(name, module, argv):
    """The arguments of one bench. Its DEFAULTS say which flags it has; a flag is of its default's type."""
    p = Parser(module.__doc__, prog=f"bench.py {name}", epilog="Lists are written with commas: 16,8,4.")
    for flag, default in module.DEFAULTS.items():
        how = dict(default=default, type={int: at_least_1, float: positive}.get(type(default), str))
        if isinstance(default, bool):
            how = dict(action="store_true")
        elif isinstance(default, list):  # an empty one is of numbers
            how["type"] = list_of(str if default and isinstance(default[0], str) else at_least_0)
        what = HELP.get(flag, "") + " (default: %(default)s)"
        p.add_argument("--" + flag.replace("_", "-"), help=what, **how)
    p.add_argument("--json", help="write the rows to this file too")
    return p.parse_args(argv)

def list_of(kind):
    """The argparse type of a list with commas."""
    return lambda text: [kind(word) for word in text.split(",")]

def interleaved(steps, rounds):
    """(median seconds, last result) of each named step, all run in turn `rounds` times after a warm-up."""
    times, results = {name: [] for name in steps}, {}
    for _ in tqdm(range(rounds + 1), desc="rounds", disable=None, leave=False):
        for name, step in steps.items():
            start = time.perf_counter()
            results[name] = step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: (statistics.median(t[1:]), results[name]) for name, t in times.items()}

def installed(package):
    there = importlib.util.find_spec(package) is not None
    if not there:
        print(f"{package} is not installed: its rows are left out (pip install {package})")
    return there

def llama_cpp(file, clients=1, tokens=1024):
    """llama.cpp's server in this process, for so many requests at once, each with so many tokens."""
    import xllamacpp
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.verbosity, settings.cache_prompt = file, -1, False
    settings.n_parallel, settings.n_ctx = clients, clients * tokens
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    return xllamacpp.Server(settings)

class Worker(ProcessPoolExecutor):
    """A process of its own, for its peak memory: make(*job) there gives a function, and ask(x) its result."""
    function = None

    def __init__(self, make, *job):
        super().__init__(1, multiprocessing.get_context("spawn"))
        self.job = make, job

    @staticmethod
    def answer(make, job, x):
        Worker.function = Worker.function or make(*job)
        return Worker.function(x)

    def ask(self, x):
        try:
            return self.submit(Worker.answer, *self.job, x).result()
        except BrokenProcessPool:
            raise InputError("a process of the benchmark was killed: with too little memory, fewer --bits or "
                             "--models at once") from None

def run_once(script, folder, *flags, **settings):
    """`python SCRIPT FLAGS --out-dir FOLDER`; a stopped run goes on, a finished one is not repeated. Beside
    the folder FOLDER.flags.json says what it was made with: other flags are refused.

    settings: what has no flag, for the script's main(argv, **settings). Returns summary.json."""
    folder, flags = Path(folder), [str(flag) for flag in flags]
    made_with, wanted = folder.with_name(f"{folder.name}.flags.json"), json.dumps([script, *flags, settings])
    made = made_with.read_text() if made_with.exists() else "unknown flags"
    refuse(folder.exists() and made != wanted, f"{folder} holds a run of {made}, and {wanted} is asked for: "
           "remove it, or choose another --out-dir")
    if not read_json(folder / "summary.json"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(made_with, wanted)
        if has_state(folder):
            flags = ["--resume"]
        main = (f"import sys, {script[:-3]} as m; from common.cli import command; "
                f"command(lambda: m.main(sys.argv[1:], **{settings!r}))")
        done = subprocess.run([sys.executable, "-c", main, *flags, "--out-dir", folder])
        refuse(done.returncode, f"{script} ended with {done.returncode}: its own lines above say why")
    return read_json(folder / "summary.json")

def table(rows, columns=None, first=""):
    """Rows as a Markdown table; None leaves a cell empty, and rank 0 is "full".

    columns: title -> a key or a function of a row, or (that, format), or (that, format, unit to divide by);
    before them stand those of `first`, whose titles are their keys. Without either each key is a title."""
    def cell(row, what, form="{}", unit=1):
        value = what(row) if callable(what) else row.get(what)
        if value is None:
            return ""
        if what == "rank":
            value = value or "full"
        if isinstance(value, bool):
            value = "yes" if value else "no"
        return form.format(value if unit == 1 else value / unit)
    keys = first.split() if columns else sum(map(list, rows), [])
    columns, lines = {key: key for key in keys} | (columns or {}), []
    for row in rows:
        lines.append([cell(row, *c) if isinstance(c, tuple) else cell(row, c) for c in columns.values()])
    return markdown(list(columns), lines, left=0)
