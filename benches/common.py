"""What the benches share: flags, the paper's figures, timing in turn, processes, runs of scripts, tables."""
import importlib.util
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from tqdm import tqdm

from common.cli import InputError, Parser, at_least_0, at_least_1, markdown, positive, refuse
from common.run import NOT_RESTORED
from common.tokenizer import read_json

DATA_DIR = os.environ.get("DATA_DIR", "data")
PAPER = json.loads(Path(__file__).with_name("paper_figures.json").read_text())  # its tables


def words(text):
    return text.split(",")


def numbers(text):
    return [at_least_0(word) for word in words(text)]


FLAGS = {  # name -> (type, help); each bench has defaults for those that it takes
    "base": (str, "the pretrained model"), "model": (str, "a known name, a folder or a file"),
    "batch": (at_least_1, "sequences of a step"), "batch_size": (at_least_1, "sequences or rows of a step"),
    "batches": (at_least_1, "batches of a round"), "bits": (numbers, "of weights, separated by commas"),
    "calibration": (str, "text of the activations: a file, a folder or builtin"),
    "clients": (numbers, "at once, separated by commas"),
    "compile": (bool, "compile the blocks of our models with torch.compile"),
    "data_dir": (str, "where the tasks' files are"),
    "dtype": (str, "float32, bfloat16, or auto: the faster here"), "dtypes": (words, "of matrix products"),
    "dry_run": (bool, "the smallest sizes, also without a GPU, to find slips"),
    "eager": (bool, "also launch by launch: without the CUDA graph, or without the one call on a CPU"),
    "gguf": (str, "a model as a GGUF file; smollm2-135m is fetched"),
    "eval_limit": (at_least_1, "with --quality: rows of each task that are scored"),
    "hours": (positive, "after so many no run begins"), "jobs": (at_least_1, "runs at a time"),
    "lengths": (numbers, "the shortest and the longest prompt"),
    "limit": (at_least_0, "rows of each task, or tokens of the text; 0: all"),
    "minutes": (positive, "of the whole run"),
    "max_iters": (at_least_1, "steps of each run"), "models": (words, "separated by commas"),
    "nanogpt": (str, "also time nanoGPT's 124M, from this checkout of its repository"),
    "new_tokens": (at_least_1, "written after each prompt"), "quality": (bool, "scores in place of times"),
    "out_dir": (str, "folders of the runs; a stopped run goes on, a finished one is not repeated"),
    "rank": (at_least_1, "of the adapters"), "ranks": (numbers, "separated by commas; 0: full rank"),
    "rounds": (at_least_1, "timed rounds"),
    "recompute": (str, "a mode of train.py --recompute, or all"), "seeds": (numbers, "separated by commas"),
    "seq": (at_least_1, "tokens of each sequence"), "seq_len": (at_least_1, "tokens of each sequence"),
    "sequences": (at_least_1, "prompts"), "sizes": (words, "of 64x4, 96x6, 128x6: width and blocks"),
    "stages": (at_least_1, "processes"),
    "task": (str, "where the rows are from; made-up headlines where it is not at hand"),
    "tables": (words, "of the paper"), "tasks": (str, "separated by commas"),
    "text": (str, "text to measure: a file, a folder or builtin"),
}


def parse(name, module, argv):
    """The arguments of one bench: its DEFAULTS say which flags it has."""
    p = Parser(module.__doc__, prog=f"bench.py {name}")
    for flag, default in module.DEFAULTS.items():
        kind, what = FLAGS[flag]
        how = dict(action="store_true") if kind is bool else dict(type=kind, default=default)
        p.add_argument("--" + flag.replace("_", "-"), help=f"{what} (default: %(default)s)", **how)
    p.add_argument("--json", help="write the rows to this file too")
    return p.parse_args(argv)


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

    def __init__(self, make, *job):
        super().__init__(1, multiprocessing.get_context("spawn"), Worker.begin, (make, job))

    @staticmethod
    def begin(make, job):
        Worker.function = make(*job)

    @staticmethod
    def answer(x):
        return Worker.function(x)

    def ask(self, x):
        try:
            return self.submit(Worker.answer, x).result()
        except BrokenProcessPool:
            raise InputError("a process of the benchmark ended (its own lines above say why; with too little "
                             "memory: fewer --bits or --models at once)") from None


def call(script, *flags, settings=None, env=None, quiet=False):
    """Run a script of the project. settings: what has no flag, for its main(argv, **settings)."""
    head = [script]
    if settings:
        head = ["-c", f"import sys, {script[:-3]} as m; from common.cli import command; "
                      f"command(lambda: m.main(sys.argv[1:], **{settings!r}))"]
    done = subprocess.run([sys.executable, *head, *map(str, flags)], env=env, capture_output=quiet, text=True)
    why = (done.stderr.strip() or "killed").splitlines()[-1] if quiet else "its own lines above say why"
    refuse(done.returncode, f"{script} ended with {done.returncode}: {why}")


def arguments_of(script, flags, settings):
    """name -> value: all arguments of a script that is called with these flags, its defaults included."""
    module, flags = importlib.import_module(script[:-3]), [str(flag) for flag in flags]
    if script in ("train.py", "finetune.py"):
        return vars(module.make_parser().parse_args(flags)) | module.SETTINGS | settings
    return vars(module.parse(flags))


def run_once(script, folder, *flags, settings=None, **how):
    """`python SCRIPT FLAGS --out-dir FOLDER`; a stopped run goes on, a finished one is not repeated. Either
    is refused if any argument is another than now; None and "auto" stand for the script's choice.

    Returns summary.json.
    """
    folder = Path(folder)
    summary, state = read_json(folder / "summary.json"), read_json(folder / "state/state.json")
    state = state or read_json(folder / "state.previous/state.json")
    there = summary.get("arguments") or state.get("args") or {}
    for name, value in arguments_of(script, flags, settings or {}).items():
        fixed = value not in (None, "auto") and name not in NOT_RESTORED
        refuse(there and fixed and there.get(name) != value, f"{folder} holds a run with {name} "
               f"{there.get(name)}, and {value} is asked for: remove it, or choose another --out-dir")
    if not summary or summary.get("stopped_by"):
        call(script, *(["--resume"] if state else flags), "--out-dir", folder, settings=settings, **how)
    return read_json(folder / "summary.json")


def table(rows, columns):
    """Rows as a Markdown table. columns: title -> a key of the rows, (key, format), or (key, format, unit to
    divide by). None leaves the cell empty."""
    def cell(row, key, form="{}", unit=1):
        if row[key] is None:
            return ""
        if isinstance(row[key], bool):
            return "yes" if row[key] else "no"
        return form.format(row[key] / unit if unit != 1 else row[key])
    lines = []
    for row in rows:
        lines.append([cell(row, c) if isinstance(c, str) else cell(row, *c) for c in columns.values()])
    return markdown(list(columns), lines, left=0)


def own_columns(rows):
    """Rows of text as a table: their keys are the titles."""
    return table(rows, {title: title for title in rows[0]})


def shown(rows, **more):
    """Copies of the rows for a table: rank 0 as "full", and each of `more` a function of a row."""
    copies = [dict(row, rank=row.get("rank") or "full") for row in rows]
    for row, copy in zip(rows, copies):
        copy |= {key: function(row) for key, function in more.items()}
    return copies
