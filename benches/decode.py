"""Tokens a second when generating (section IV.C): batch 1, a prompt of 100 tokens, 100 new ones; full rank
and low rank, 16, 8 and 4 bit.

    python bench.py decode
    python bench.py decode --models gpt2 --new-tokens 50

Random weights (speed does not depend on them) in bfloat16 or quantized. Two things are told apart, as usual:
the seconds until the first token is there, which is reading the prompt, and the tokens a second from then on.
`with prompt` is the rate of both together. Each model lives in a process of its own, for its peak memory; the
processes are told to generate in turn, and medians of the rounds are shown. Without the cache each token
costs the whole text, so only a few are timed, once.
"""
import argparse
import contextlib
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from tqdm import tqdm

from benches.common import table
from beyond.decoding import decoding_step
from checkpoint import random_model
from common.cli import InputError
from common.device import find_device, peak_memory
from common.generate import generate
from model import CONFIGS, config_for
from quant import stored_bytes

RANKS = {"gpt2": 192, "gpt2-xl": 384}  # the paper's, of Table VIII
PROMPT = list(range(100))


def transformers_model(name, device):
    """The peer: GPT-2 of transformers with random weights in bfloat16."""
    from transformers import GPT2Config, GPT2LMHeadModel
    c = config_for(name)
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=c.width, n_layer=c.blocks, n_head=c.heads)).bfloat16()
    model.to_empty(device=device)
    for p in model.parameters():
        p.data.normal_(std=0.02)
    model.tie_weights()
    return model.eval()


class Clock:
    """What transformers calls with the prompt and then with each token: notes when the tokens came."""

    def __init__(self):
        self.times = []

    def put(self, tokens):
        self.times.append(time.perf_counter())

    def end(self):
        del self.times[0]  # the prompt


def runner(name, rank, bits, engine, device):
    """(run, bytes): run(count, cache) generates so many tokens, always the likeliest, and returns when each
    came."""
    if engine == "transformers":
        model = transformers_model(name, device)
        tokens = torch.tensor([PROMPT], device=device)

        def run(count, cache):
            clock = Clock()
            model.generate(tokens, max_new_tokens=count, min_new_tokens=count, do_sample=False,
                           use_cache=cache, pad_token_id=0, streamer=clock)
            return clock.times
        return run, sum(p.nbytes for p in model.parameters())
    model = random_model(name, rank, bits, device=device)

    def run(count, cache):
        steps = generate(model, [PROMPT], count, temperature=0, use_cache=cache, make_step=decoding_step)
        return [time.perf_counter() for _ in steps]
    return run, stored_bytes(model)


@torch.inference_mode()
def work(name, rank, bits, engine):
    """One model's process: for each line `count cache` of the input, generates and prints a line of what it
    measured."""
    device = find_device("bfloat16").torch_device
    run, size = runner(name, rank, bits, engine, device)
    for line in sys.stdin:
        count, cache = map(int, line.split())
        start = time.perf_counter()
        times = [t - start for t in run(count, bool(cache))]
        print(json.dumps(dict(prompt_seconds=times[0], tokens_per_second=(count - 1) / (times[-1] - times[0]),
                              with_prompt=count / times[-1],
                              model_bytes=size, peak_memory_bytes=peak_memory(device))), flush=True)


class Worker:
    """A process with a model, which waits in between."""

    def __init__(self, *job):
        self.job, self.errors = job, tempfile.TemporaryFile("w+")
        code = f"from benches.decode import work; work(*{job!r})"
        self.process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.errors, text=True)

    def measure(self, count, cache):
        with contextlib.suppress(BrokenPipeError):
            print(count, int(cache), file=self.process.stdin, flush=True)
        lines = iter(self.process.stdout.readline, "")
        answer = next((line for line in lines if line.startswith("{")), None)  # a library may print too
        if answer is None:
            name, rank, bits, engine = self.job
            self.errors.seek(0)
            why = (self.errors.read().strip() or "killed").splitlines()[-1]
            raise InputError(f"{engine}'s {name} at rank {rank}, {bits} bit could not be run: {why}")
        return json.loads(answer)

    def close(self):
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def measure(name, jobs, args, bar):
    """The rows of all models of one size."""
    with contextlib.ExitStack() as stack:
        workers = []
        for job in jobs:
            workers.append(stack.enter_context(contextlib.closing(Worker(name, *job))))
            workers[-1].measure(3, True)  # a model is made and warmed up before the next one
            bar.update()
        rows = []
        for cache, count, rounds in ((True, args.new_tokens, args.rounds), (False, args.uncached_tokens, 1)):
            found = [[] for _ in workers]
            for _ in range(rounds):
                for worker, results in zip(workers, found):
                    results.append(worker.measure(count, cache))
                    bar.update()
            rows += [dict(model=name, rank=rank, bits=bits, engine=engine, cache=cache, new_tokens=count,
                          rounds=rounds, **medians(results))
                     for (rank, bits, engine), results in zip(jobs, found)]
    return sorted(rows, key=lambda r: (r["engine"] == "ours", r["rank"], -r["bits"], not r["cache"]))


def medians(results):
    return {key: statistics.median(r[key] for r in results)
            for key in results[0]} | dict(peak_memory_bytes=results[-1]["peak_memory_bytes"])


def bench(args):
    """A row for each model, with and without the cache."""
    device, rows = find_device("bfloat16"), []
    peer = [(0, 16, "transformers")]
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: its rows are left out (pip install transformers)")
        peer = []
    each = len(peer) + 6
    with tqdm(total=len(args.models) * each * (2 + args.rounds), desc="generating", disable=None,
              leave=False) as bar:
        for name in args.models:
            rows += measure(name,
                            peer + [(rank, bits, "ours") for rank in (0, RANKS[name]) for bits in (16, 8, 4)],
                            args, bar)
    print(f"{device.name}: batch 1, prompt of {len(PROMPT)} tokens")
    return device, rows


def report(rows):
    base = {(r["model"], r["cache"]): r["tokens_per_second"] for r in rows if r["engine"] == "transformers"}

    def over(r):
        return f"{r['tokens_per_second'] / base[r['model'], r['cache']]:.1f}x" if base else ""
    return table(rows,
                 {"model": lambda r: r["model"], "rank": lambda r: r["rank"] or "full",
                  "bits": lambda r: r["bits"], "engine": lambda r: r["engine"],
                        "cache": lambda r: "yes" if r["cache"] else "no", "new": lambda r: r["new_tokens"],
                        "prompt s": lambda r: f"{r['prompt_seconds']:.2f}",
                  "tokens/s": lambda r: f"{r['tokens_per_second']:.1f}",
                        "over transformers": over,
                        "with prompt": lambda r: f"{r['with_prompt']:.1f}",
                        "model GB": lambda r: f"{r['model_bytes'] / 1e9:.2f}",
                  "peak GB": lambda r: f"{r['peak_memory_bytes'] / 1e9:.2f}"})


def names(text):
    if unknown := [n for n in text.split(",") if n not in RANKS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not among {', '.join(RANKS)}")
    return text.split(",")


def tokens(text):
    if not text.isdigit() or not 2 <= int(text) <= CONFIGS["gpt2"].context - len(PROMPT):
        raise argparse.ArgumentTypeError(f"{text} is not in 2..{CONFIGS['gpt2'].context - len(PROMPT)}")
    return int(text)


def arguments(p):
    p.add_argument("--models", type=names, default=list(RANKS),
                   help="separated by commas (default: gpt2,gpt2-xl)")
    p.add_argument("--new-tokens", type=tokens, default=100, help="with the cache (default: %(default)s)")
    p.add_argument("--uncached-tokens", type=tokens, default=3, help="without it (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=3, choices=range(1, 100), metavar="N",
                   help="repetitions with the cache (default: %(default)s)")
