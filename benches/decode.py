"""Tokens a second when generating at batch 1 (section IV.C): ranks, bits, with and without the cache.

    python bench.py decode
    python bench.py decode --models llama2-7b --ranks 0 --bits 4 --eager
    python bench.py decode --gguf smollm2-135m          a real model, beside llama.cpp on the same file

A prompt of 100 tokens and 100 new ones; random weights in bfloat16 or quantized; the peer is GPT-2 of
transformers in bfloat16. Each model lives in a process of its own, for its peak memory; all write 1, 2 and
100 tokens in turn. The first token is the prompt's time; `tokens/s` counts from the second on (a GPU records
its CUDA graph before that one), `with prompt` all together. Without the cache a few tokens are timed. `of
read` is the share of the bandwidth of reading memory, in the same rounds, that a token's weights take.
"""
import itertools
from functools import partial
from pathlib import Path

import torch

from benches.common import Worker, installed, interleaved, llama_cpp, table
from beyond.decoding import decoding_step
from checkpoint import load_model, locate, random_model
from common.cli import refuse
from common.device import find_device, peak_memory, stored_bytes
from common.generate import generate, plain_step
from model import CONFIGS, config_for

RANKS = {"gpt2": [0, 192], "gpt2-xl": [0, 384]}  # full, and the paper's of Table VIII
PROMPT, UNCACHED = list(range(100)), 4  # new tokens without the cache
READ, TIMES = 1 << 29, 10  # bytes, more than any CPU's cache holds; read so often in a round
DEFAULTS = dict(models=["gpt2", "gpt2-xl"], gguf=None, ranks=[], bits=[16, 8, 4], eager=False, batch=1,
                new_tokens=100, rounds=3)

def writer(name, batch, engine, rank, bits):
    """For a Worker: a function of (count, cache) that generates so many tokens, always the likeliest, and
    returns sizes in bytes."""
    device = find_device("bfloat16").torch_device
    if engine == "llama.cpp":
        server, size = llama_cpp(name), Path(name).stat().st_size
        read = size

        def write(count, cache):
            server.handle_completions(dict(prompt=PROMPT, n_predict=count, temperature=0, ignore_eos=True))
    elif engine == "transformers":
        from transformers import GPT2Config, GPT2LMHeadModel
        c, prompt = config_for(name), torch.tensor([PROMPT] * batch, device=device)
        config = GPT2Config(n_embd=c.width, n_layer=c.blocks, n_head=c.heads)
        model = GPT2LMHeadModel._from_config(config, dtype=torch.bfloat16).to(device).eval()
        size = read = stored_bytes(model)

        def write(count, cache):
            model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False,
                           use_cache=cache, pad_token_id=0)
    else:
        if name in CONFIGS:
            model = random_model(name, rank, bits, device=device)
        else:
            model, _ = load_model(name, device, torch.bfloat16, bits)
        size, read = stored_bytes(model), sum(map(stored_bytes, (model.blocks, model.norm, model.head)))
        step = decoding_step if engine == "ours" else plain_step

        def write(count, cache):
            list(generate(model, [PROMPT] * batch, count, temperature=0, use_cache=cache, make_step=step))

    @torch.inference_mode()
    def answer(asked):
        write(*asked)
        return dict(model_bytes=size, read_bytes=read, peak_memory_bytes=peak_memory(device))
    return answer

def measure(name, jobs, batch, runs):
    """Rows for all jobs (engine, rank, bits) of one model. runs: (cache or not, new tokens, rounds)."""
    workers, rows = {job: Worker(writer, name, batch, *job) for job in jobs}, []
    memory = torch.ones(READ, dtype=torch.int8, device=find_device("bfloat16").torch_device)

    def read():
        for _ in range(TIMES):
            memory.amax().item()
    for cache, new, rounds in runs:
        steps = {(job, n): partial(workers[job].ask, (n, cache)) for job in jobs for n in (1, 2, new)}
        found = interleaved(steps | dict(read=read), rounds)
        for job in jobs:
            (prompt, _), (two, _), (whole, sizes) = (found[job, n] for n in (1, 2, new))
            rate, bandwidth = (new - 2) / (whole - two), TIMES * READ / found["read"][0]
            share = sizes["read_bytes"] * rate / bandwidth if cache else None
            rows.append(dict(model=Path(name).name, batch=batch, engine=job[0], rank=job[1], bits=job[2],
                             cache=cache, new_tokens=new, rounds=rounds, prompt_seconds=prompt,
                             tokens_per_second=batch * rate, with_prompt=batch * new / whole,
                             share_of_read=share, read_bandwidth=bandwidth, **sizes))
    for worker in workers.values():
        worker.shutdown()
    return rows

def bench(args):
    most = config_for("gpt2").context - len(PROMPT)
    refuse(not 3 <= args.new_tokens <= most, f"--new-tokens {args.new_tokens} is not in 3..{most}")
    rows, runs, device = [], [(True, args.new_tokens, args.rounds)], find_device("bfloat16")
    engines = ["ours", "ours, eager"] if args.eager else ["ours"]
    if args.gguf:
        jobs = [("llama.cpp", 0, "its own")] if args.batch == 1 and installed("xllamacpp") else []
        jobs += itertools.product(engines, [0], args.bits)
        rows = measure(str(locate(args.gguf)), jobs, args.batch, runs)
    else:
        there = installed("transformers")
        for name in args.models:
            jobs = [("transformers", 0, 16)] if there and config_for(name).kind == "gpt2" else []
            jobs += itertools.product(engines, args.ranks or RANKS.get(name, [0]), args.bits)
            rows += measure(name, jobs, args.batch, [*runs, (False, UNCACHED, 1)])
    return device, rows

def report(rows):
    peer = "llama.cpp" if rows[0]["engine"] == "llama.cpp" else "transformers"
    base = {(r["model"], r["cache"]): r["tokens_per_second"] for r in rows if r["engine"] == peer}

    def over(r):
        rate = base.get((r["model"], r["cache"]))
        return f"{r['tokens_per_second'] / rate:.1f}x" if rate else ""
    return table(rows, {
        "new": "new_tokens", "prompt s": ("prompt_seconds", "{:.2f}"),
        "tokens/s": ("tokens_per_second", "{:.1f}"), f"over {peer}": over,
        "with prompt": ("with_prompt", "{:.1f}"), "model GB": ("model_bytes", "{:.2f}", 1e9),
        "peak GB": ("peak_memory_bytes", "{:.2f}", 1e9), "of read": ("share_of_read", "{:.0%}")},
        first="model rank bits engine cache")
