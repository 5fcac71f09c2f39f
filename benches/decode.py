"""Tokens a second when generating (section IV.C): batch 1, a prompt of 100 tokens, 100 new ones; full rank and low rank, 16, 8 and 4 bit.

    python bench.py decode
    python bench.py decode --models gpt2 --new-tokens 50

Random weights (speed does not depend on them) in bfloat16 or quantized. Each model runs in a process of its own, for its peak memory. The
time is that of the whole generation, prompt included. Without the cache each token costs the whole text, so only a few are timed, and the table says how many.
"""
import argparse
import importlib.util
import json
import subprocess
import sys
import time

import torch
from tqdm import tqdm

from benches.common import table
from checkpoint import random_model
from cudagraph import Step
from model import CONFIGS, config_for, generate
from quant import stored_bytes
from runtime import InputError, find_device, peak_memory

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


def runner(name, rank, bits, engine, device):
    """(run, bytes): run(count, cache) generates so many tokens, always the likeliest."""
    if engine == "transformers":
        model = transformers_model(name, device)
        tokens = torch.tensor([PROMPT], device=device)
        return lambda count, cache: model.generate(tokens, max_new_tokens=count, min_new_tokens=count, do_sample=False, use_cache=cache,
                                                   pad_token_id=0), sum(p.nbytes for p in model.parameters())
    model = random_model(name, rank, bits, device=device)
    step = Step if device.type == "cuda" else None
    return lambda count, cache: list(generate(model, [PROMPT], count, temperature=0, use_cache=cache, make_step=step if cache else None)), stored_bytes(model)


@torch.inference_mode()
def measure(name, rank, bits, engine, new_tokens, uncached_tokens):
    """The rows of one model: with and without the cache."""
    device = find_device("bfloat16").torch_device
    run, size = runner(name, rank, bits, engine, device)
    rows = []
    for cache, count in ((True, new_tokens), (False, uncached_tokens)):
        run(2, cache)
        start = time.perf_counter()
        run(count, cache)
        seconds = time.perf_counter() - start
        rows.append(dict(model=name, rank=rank, bits=bits, engine=engine, cache=cache, tokens_per_second=count / seconds, new_tokens=count,
                         model_bytes=size, peak_memory_bytes=peak_memory(device)))
    return rows


def in_a_process(*job):
    code = f"import json; from benches.decode import measure; print(json.dumps(measure(*{job!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{job[3]}'s {job[0]} at rank {job[1]}, {job[2]} bit could not be run: {(done.stderr.strip() or 'killed').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def bench(args):
    """Every model in turn; the table and the rows."""
    device, rows = find_device("bfloat16"), []
    jobs = [(name, 0, 16, "transformers") for name in args.models]
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: its rows are left out (pip install transformers)")
        jobs = []
    jobs += [(name, rank, bits, "ours") for name in args.models for rank in (0, RANKS[name]) for bits in (16, 8, 4)]
    for job in tqdm(jobs, desc="models", disable=None, leave=False):
        rows += in_a_process(*job, args.new_tokens, args.uncached_tokens)
    base = {r["model"]: r["tokens_per_second"] for r in rows if r["engine"] == "transformers" and r["cache"]}
    print(f"{device.name}: batch 1, prompt of {len(PROMPT)} tokens")
    print(table(rows, {"model": lambda r: r["model"], "rank": lambda r: r["rank"] or "full", "bits": lambda r: r["bits"], "engine": lambda r: r["engine"],
                       "cache": lambda r: "yes" if r["cache"] else "no", "new": lambda r: r["new_tokens"],
                       "tokens/s": lambda r: f"{r['tokens_per_second']:.1f}",
                       "over transformers": lambda r: f"{r['tokens_per_second'] / base[r['model']]:.1f}x" if r["cache"] and base else "",
                       "model GB": lambda r: f"{r['model_bytes'] / 1e9:.2f}", "peak GB": lambda r: f"{r['peak_memory_bytes'] / 1e9:.2f}"}))
    return device, rows


def names(text):
    if unknown := [n for n in text.split(",") if n not in RANKS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not among {', '.join(RANKS)}")
    return text.split(",")


def positive(text):
    if not text.isdigit() or not 1 <= int(text) <= CONFIGS["gpt2"].context - len(PROMPT):
        raise argparse.ArgumentTypeError(f"{text} is not in 1..{CONFIGS['gpt2'].context - len(PROMPT)}")
    return int(text)


def arguments(p):
    p.add_argument("--models", type=names, default=list(RANKS), help="separated by commas (default: gpt2,gpt2-xl)")
    p.add_argument("--new-tokens", type=positive, default=100, help="with the cache (default: %(default)s)")
    p.add_argument("--uncached-tokens", type=positive, default=4, help="without it (default: %(default)s)")
