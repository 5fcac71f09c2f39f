"""Tokens a second when generating at batch 1 (section IV.C): ranks, bits, with and without the cache.

    python bench.py decode
    python bench.py decode --models gpt2 --new-tokens 50
    python bench.py decode --models llama2-7b --ranks 0 --bits 4 --eager

A prompt of 100 tokens and 100 new ones; random weights (speed does not depend on them) in bfloat16 or
quantized; the peer is GPT-2 of transformers in bfloat16. Two things are told apart, as usual: the seconds
until the first token is there, which is reading the prompt, and the tokens a second from the second on (a
GPU records its CUDA graph before that one); `with prompt` is the rate of all together. Each model lives in a
process of its own, for its peak memory; the processes generate in turn, and medians of the rounds are shown.
Without the cache each token costs the whole text: a few are timed.
"""
import importlib.util
import statistics
import time
from types import SimpleNamespace

import torch
from tqdm import tqdm

from benches.common import Worker, shown, table
from beyond.decoding import decoding_step
from checkpoint import random_model
from common.cli import refuse
from common.device import find_device, peak_memory
from common.generate import generate
from model import config_for
from quant import stored_bytes

RANKS = {"gpt2": 192, "gpt2-xl": 384}  # the paper's, of Table VIII, beside full rank
PROMPT, UNCACHED = list(range(100)), 4  # new tokens without the cache
DEFAULTS = dict(models="gpt2,gpt2-xl", ranks=None, bits="16,8,4", eager=False, batch=1, new_tokens=100,
                rounds=3)


def transformers_run(name, batch, device):
    """The peer, GPT-2 of transformers with random weights in bfloat16: run and bytes, as of `our_run`."""
    from transformers import GPT2Config, GPT2LMHeadModel
    c = config_for(name)
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=c.width, n_layer=c.blocks, n_head=c.heads)).bfloat16()
    model.to_empty(device=device)
    for p in model.parameters():
        p.data.normal_(std=0.02)
    model.tie_weights()
    model.eval()
    prompt, times = torch.tensor([PROMPT] * batch, device=device), []

    def note(tokens=None):
        times.append(time.perf_counter())

    def run(count, cache):
        times.clear()  # then come the prompt's time, that of each token, and the end's
        model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, use_cache=cache,
                       pad_token_id=0, streamer=SimpleNamespace(put=note, end=note))
        return times[1:-1]
    return run, sum(p.nbytes for p in model.parameters())


def our_run(name, rank, bits, make_step, batch, device):
    """run(count, cache) generates so many tokens, always the likeliest, and returns when each came; and the
    model's bytes."""
    model = random_model(name, rank, bits, device=device)

    def run(count, cache):
        steps = generate(model, [PROMPT] * batch, count, temperature=0, use_cache=cache, make_step=make_step)
        return [time.perf_counter() for _ in steps]
    return run, stored_bytes(model)


@torch.inference_mode()
def measurer(name, batch, rank, bits, engine):
    """For a Worker: a function of (count, cache) that measures one generation."""
    device = find_device("bfloat16").torch_device
    if engine == "transformers":
        run, size = transformers_run(name, batch, device)
    else:
        make_step = decoding_step if engine == "ours" else None
        run, size = our_run(name, rank, bits, make_step, batch, device)

    @torch.inference_mode()
    def measure(asked):
        count, cache = asked
        start = time.perf_counter()
        times = [t - start for t in run(count, cache)]
        return dict(prompt_seconds=times[0], tokens_per_second=batch * (count - 2) / (times[-1] - times[1]),
                    with_prompt=batch * count / times[-1], model_bytes=size,
                    peak_memory_bytes=peak_memory(device))
    return measure


def measure_all(name, args, bar):
    """The rows of all models of one size."""
    engines, ranks = ["ours", "ours, eager"][:1 + args.eager], args.ranks or [0, RANKS[name]]
    jobs = [(rank, bits, engine) for rank in ranks for bits in args.bits for engine in engines]
    if importlib.util.find_spec("transformers") and config_for(name).kind == "gpt2":
        jobs.insert(0, (0, 16, "transformers"))
    workers, rows = {job: Worker(measurer, name, args.batch, *job) for job in jobs}, []
    for worker in workers.values():
        worker.ask((3, True))  # the process begins, makes its model and warms up, before the next one
    for cache, count, rounds in ((True, args.new_tokens, args.rounds), (False, UNCACHED, 1)):
        found = {job: [] for job in jobs}
        for _ in range(rounds):
            for job, worker in workers.items():
                found[job].append(worker.ask((count, cache)))
                bar.update()
        for (rank, bits, engine), results in found.items():
            row = {key: statistics.median(r[key] for r in results) for key in results[0]}
            rows.append(dict(model=name, batch=args.batch, rank=rank, bits=bits, engine=engine, cache=cache,
                             new_tokens=count, rounds=rounds, **row))
    for worker in workers.values():
        worker.shutdown()
    return sorted(rows, key=lambda r: (r["engine"] != "transformers", r["rank"], -r["bits"], not r["cache"]))


def bench(args):
    """A row for each model, with and without the cache."""
    most = config_for("gpt2").context - len(PROMPT)
    for name in args.models:
        refuse(args.ranks is None and name not in RANKS, f"--models {name!r} is not among "
               f"{', '.join(RANKS)}: give --ranks too")
    refuse(not 3 <= args.new_tokens <= most, f"--new-tokens {args.new_tokens} is not in 3..{most}")
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: its rows are left out (pip install transformers)")
    with tqdm(desc="generating", disable=None, leave=False) as bar:
        rows = [row for name in args.models for row in measure_all(name, args, bar)]
    device = find_device("bfloat16")
    print(f"{device.name}: batch {args.batch}, prompt of {len(PROMPT)} tokens")
    return device, rows


def report(rows):
    base = {(r["model"], r["cache"]): r["tokens_per_second"] for r in rows if r["engine"] == "transformers"}

    def over(r):
        peer = base.get((r["model"], r["cache"]))
        return f"{r['tokens_per_second'] / peer:.1f}x" if peer else ""
    return table(shown(rows, over=over), {
        "model": "model", "rank": "rank", "bits": "bits", "engine": "engine", "cache": "cache",
        "new": "new_tokens", "prompt s": ("prompt_seconds", "{:.2f}"),
        "tokens/s": ("tokens_per_second", "{:.1f}"), "over transformers": "over",
        "with prompt": ("with_prompt", "{:.1f}"),
        "model GB": ("model_bytes", "{:.2f}", 1e9), "peak GB": ("peak_memory_bytes", "{:.2f}", 1e9)})
