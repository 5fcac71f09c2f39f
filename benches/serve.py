"""Many requests (sections III.C.2 and V.C): one after another, in a contiguous batch, in a paged batch.

    python bench.py serve

All engines write as many greedy tokens for the same prompts of mixed lengths, with no adapter, one or
sixteen. Bytes of keys and values are those when most were reserved: for contiguous rows room for the longest
from the start, for pages the blocks handed out. Also the paper's count of what a cache saves.
"""
import random
from functools import partial
from types import SimpleNamespace

import torch

from benches.common import interleaved, table
from benches.train import shapes_of_rank
from beyond.batching import Adapters, Engine, Request
from beyond.paged_cache import bytes_per_token
from common.cli import refuse
from common.data import first_tokens
from common.generate import generate
from model import count_parameters
from sample import make_pool, open_model

TARGETS, RANK = ("q", "k", "v", "qkv"), 8  # of the random adapters
SHORTEST, LONGEST = 16, 200  # prompts, in tokens
DEFAULTS = dict(model="smollm2-135m", sequences=32, new_tokens=24, rounds=2)

def paper_counts():
    """Section III.C.2's example, 100 new tokens after 100: tokens read, TFLOP by weights and of attention.

    The paper counts 2 operations for each weight of the model, W^E's included. Attention: q k^T and s v, 2
    each for every key that a query sees."""
    rows = []
    for rank, name, paper in ((0, "Llama2-7B", "210"), (512, "Llama2-7B, r = 512", "40")):
        model = shapes_of_rank("llama2-7b", rank, rank)
        a_key = 4 * model.config.heads * model.config.head_size * model.config.blocks
        for cache in (False, True):
            texts = [199] if cache else range(100, 200)  # lengths of what is read whole
            tokens, keys = sum(texts), sum(n * (n + 1) // 2 for n in texts)
            rows.append(dict(model=name, cache=cache, paper="" if cache else paper, tokens=tokens,
                             weights=2 * count_parameters(model) * tokens / 1e12,
                             attention=a_key * keys / 1e12))
    return rows

def mixed_prompts(model, tokenizer, count, new):
    """Stretches of the built-in text, of lengths drawn evenly from SHORTEST to LONGEST."""
    most = model.config.context - LONGEST
    refuse(new > most, f"--new-tokens {new} after a prompt of {LONGEST}: at most {most} fit the context")
    ids, draw = first_tokens("builtin", tokenizer, 100_000), random.Random(0)
    lengths = [draw.randint(SHORTEST, LONGEST) for _ in range(count)]
    starts = [draw.randrange(len(ids) - n) for n in lengths]
    return [list(ids[start:start + n]) for start, n in zip(starts, lengths)]

def random_adapter(model, seed):
    """Factors as training leaves them in size: an adapter changes a layer's output by a few percent."""
    generator, factors = torch.Generator().manual_seed(seed), {}
    for name, layer in model.named_modules():
        if name.rsplit(".", 1)[-1] in TARGETS:
            shapes = (RANK, layer.in_features), (layer.out_features, RANK)
            factors[name] = [torch.randn(*shape, generator=generator) * 0.02 for shape in shapes]
    return SimpleNamespace(factors=factors, scale=2.0)

# Each engine returns the slots of keys and values reserved at most, and those used then.

def sequential(model, adapters, prompts, names, new):
    found = [contiguous(model, adapters, [p], [name], new) for p, name in zip(prompts, names)]
    return map(max, zip(*found))

def contiguous(model, adapters, prompts, names, new):
    adapters.select(names)
    list(generate(model, prompts, new, temperature=0))
    return len(prompts) * (max(map(len, prompts)) + new), sum(len(p) + new - 1 for p in prompts)

def paged(model, adapters, prompts, names, new):
    engine = Engine(model, make_pool(model), adapters=adapters, batch_size=len(prompts))
    list(engine.run([Request(p, new, adapter=name) for p, name in zip(prompts, names)]))
    return engine.peak

def bench(args):
    model, tokenizer, device = open_model(args.model, 16)
    prompts = mixed_prompts(model, tokenizer, args.sequences, args.new_tokens)
    cases = [(sequential, 1), *((engine, count) for engine in (contiguous, paged) for count in (0, 1, 16))]
    adapters = Adapters(model)
    for i in range(16):
        adapters.select([None])
        adapters.add(f"adapter {i}", random_adapter(model, i))

    def run(engine, count):
        names = [f"adapter {i % count}" if count else None for i in range(len(prompts))]
        return engine(model, adapters, prompts, names, args.new_tokens)
    rows, size = [], bytes_per_token(model.config)
    found = interleaved({case: partial(run, *case) for case in cases}, args.rounds)
    for (engine, count), (s, (reserved, used)) in found.items():
        rows.append(dict(engine=engine.__name__, adapters=count, sequences=len(prompts),
                         tokens_per_second=len(prompts) * args.new_tokens / s,
                         kv_bytes_reserved=reserved * size, kv_bytes_used=used * size))
    return device, rows

def report(rows):
    base = next(r["tokens_per_second"] for r in rows if r["engine"] == "sequential")
    engines = table(rows, first="engine adapters sequences", columns={
        "tokens/s": ("tokens_per_second", "{:.0f}"),
        "over sequential": ("tokens_per_second", "{:.2f}x", base),
        "KV reserved MB": ("kv_bytes_reserved", "{:.1f}", 1e6), "used MB": ("kv_bytes_used", "{:.1f}", 1e6),
        "reserved / used": (lambda r: r["kv_bytes_reserved"] / r["kv_bytes_used"], "{:.2f}")})
    return engines + "\n\n" + table(paper_counts(), {
        "100 + 100 tokens": "model", "cache": "cache", "tokens read": ("tokens", "{:,}"),
        "TFLOP by weights": ("weights", "{:.1f}"), "attention": ("attention", "{:.2f}"), "paper": "paper"})
