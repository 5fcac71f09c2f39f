"""Tokens a second when generating at batch 1 (section IV.C): ranks, bits, with and without the cache.

    python bench.py decode
    python bench.py decode --models gpt2 --new-tokens 50
    python bench.py decode --models llama2-7b --ranks 0 --bits 4 --eager
    python bench.py decode --gguf smollm2-135m          a real model, beside llama.cpp on the same file

A prompt of 100 tokens and 100 new ones; random weights (speed does not depend on them) in bfloat16 or
quantized; the peer is GPT-2 of transformers in bfloat16. Each model lives in a process of its own, for its
peak memory; all write 1, 2 and 100 tokens in turn, and medians of the rounds are shown. The first token is
the prompt's time; `tokens/s` counts from the second on (a GPU records its CUDA graph before that one), `with
prompt` all together. Without the cache each token costs the whole text: a few are timed. `of read` is the
share of the bandwidth of reading memory, the best of the same rounds, that a token's weights take.
"""
import time
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

RANKS = {"gpt2": 192, "gpt2-xl": 384}  # the paper's, of Table VIII, beside full rank
PROMPT, UNCACHED = list(range(100)), 4  # new tokens without the cache
READ, TIMES = 1 << 29, 10  # bytes, more than any CPU's cache holds; read so often, and the fastest counts
DEFAULTS = dict(models=["gpt2", "gpt2-xl"], gguf=None, ranks=[], bits=[16, 8, 4], eager=False, batch=1,
                new_tokens=100, rounds=3)


# Each gives write(count, cache), which generates so many tokens, always the likeliest, the model's bytes, and
# those of them that a token reads.

def transformers_engine(name, batch, device):
    from transformers import GPT2Config, GPT2LMHeadModel
    c = config_for(name)
    config = GPT2Config(n_embd=c.width, n_layer=c.blocks, n_head=c.heads)
    model = GPT2LMHeadModel._from_config(config, dtype=torch.bfloat16).to(device).eval()
    prompt = torch.tensor([PROMPT] * batch, device=device)

    def write(count, cache):
        model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, use_cache=cache,
                       pad_token_id=0)
    return write, stored_bytes(model), stored_bytes(model)


def llama_cpp_engine(file, batch, device):
    server, size = llama_cpp(file), Path(file).stat().st_size

    def write(count, cache):
        server.handle_completions(dict(prompt=PROMPT, n_predict=count, temperature=0, ignore_eos=True))
    return write, size, size


def our_engine(name, batch, device, rank, bits, make_step):
    if name in CONFIGS:
        model = random_model(name, rank, bits, device=device)
    else:
        model, _ = load_model(name, device, torch.bfloat16, bits)

    def write(count, cache):
        list(generate(model, [PROMPT] * batch, count, temperature=0, use_cache=cache, make_step=make_step))
    return write, stored_bytes(model), sum(map(stored_bytes, (model.blocks, model.norm, model.head)))


def writer(name, batch, engine, rank, bits):
    """For a Worker: a function of (count, cache) that generates, and returns sizes in bytes."""
    device = find_device("bfloat16").torch_device
    peers = {"transformers": transformers_engine, "llama.cpp": llama_cpp_engine}
    make_step = decoding_step if engine == "ours" else plain_step
    ours = partial(our_engine, rank=rank, bits=bits, make_step=make_step)
    write, size, read = peers.get(engine, ours)(name, batch, device)

    @torch.inference_mode()
    def answer(asked):
        write(*asked)
        return dict(model_bytes=size, read_bytes=read, peak_memory_bytes=peak_memory(device))
    return answer


def measure(name, jobs, batch, runs):
    """Rows for all jobs (engine, rank, bits) of one model. runs: (cache or not, new tokens, rounds)."""
    workers, sizes, rows, reads = {job: Worker(writer, name, batch, *job) for job in jobs}, {}, [], []
    memory = torch.ones(READ, dtype=torch.int8, device=find_device("bfloat16").torch_device)

    def write(job, count, cache):
        sizes[job] = workers[job].ask((count, cache))

    def read():
        for _ in range(TIMES):
            start = time.perf_counter()
            memory.amax().item()
            reads.append(time.perf_counter() - start)
    for cache, new, rounds in runs:
        steps = {(job, count): partial(write, job, count, cache) for job in jobs for count in (1, 2, new)}
        seconds = interleaved(steps | dict(read=read), rounds)
        for job in jobs:
            prompt, two, whole = (seconds[job, count] for count in (1, 2, new))
            rate, bandwidth = (new - 2) / (whole - two), READ / min(reads)
            share = sizes[job]["read_bytes"] * rate / bandwidth if cache else None
            rows.append(dict(model=Path(name).name, batch=batch, engine=job[0], rank=job[1], bits=job[2],
                             cache=cache, new_tokens=new, rounds=rounds, prompt_seconds=prompt,
                             tokens_per_second=batch * rate, with_prompt=batch * new / whole,
                             share_of_read=share, read_bandwidth=bandwidth, **sizes[job]))
    for worker in workers.values():
        worker.shutdown()
    return rows


def bench(args):
    """A row for each model, with and without the cache."""
    most = config_for("gpt2").context - len(PROMPT)
    for name in args.models:
        refuse(not args.ranks and name not in RANKS, f"--models {name!r} is not among "
               f"{', '.join(RANKS)}: give --ranks too")
    refuse(not 3 <= args.new_tokens <= most, f"--new-tokens {args.new_tokens} is not in 3..{most}")
    rows, runs, device = [], [(True, args.new_tokens, args.rounds)], find_device("bfloat16")
    ours = [(engine, bits) for bits in args.bits for engine in ("ours", "ours, eager")[:1 + args.eager]]
    if args.gguf:
        jobs = [("llama.cpp", 0, "its own")] if args.batch == 1 and installed("xllamacpp") else []
        jobs += [(engine, 0, bits) for engine, bits in ours]
        rows = measure(str(locate(args.gguf)), jobs, args.batch, runs)
    else:
        there = installed("transformers")
        for name in args.models:
            jobs = [("transformers", 0, 16)] if there and config_for(name).kind == "gpt2" else []
            for rank in args.ranks or (0, RANKS[name]):
                jobs += [(engine, rank, bits) for engine, bits in ours]
            rows += measure(name, jobs, args.batch, [*runs, (False, UNCACHED, 1)])
    print(f"{device.name}: batch {args.batch}, prompt of {len(PROMPT)} tokens")
    return device, rows


def report(rows):
    peer = "llama.cpp" if rows[0]["engine"] == "llama.cpp" else "transformers"
    base = {(r["model"], r["cache"]): r["tokens_per_second"] for r in rows if r["engine"] == peer}

    def over(r):
        rate = base.get((r["model"], r["cache"]))
        return f"{r['tokens_per_second'] / rate:.1f}x" if rate else ""
    columns = {
        "model": "model", "rank": "rank", "bits": "bits", "engine": "engine", "cache": "cache",
        "new": "new_tokens", "prompt s": ("prompt_seconds", "{:.2f}"),
        "tokens/s": ("tokens_per_second", "{:.1f}"), f"over {peer}": over,
        "with prompt": ("with_prompt", "{:.1f}"),
        "model GB": ("model_bytes", "{:.2f}", 1e9), "peak GB": ("peak_memory_bytes", "{:.2f}", 1e9)}
    if "share_of_read" in rows[0]:
        columns["of read"] = ("share_of_read", "{:.0%}")
    return table(rows, columns)
