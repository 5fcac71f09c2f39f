"""Many requests at once (sections III.C.2 and V.C): one after another, in one contiguous batch, and in a paged batch; one adapter and sixteen.

    python bench.py serve

All engines write the same number of greedy tokens for the same prompts of mixed lengths. Bytes of keys and values are those at the moment
when most were reserved: for contiguous rows from the start room for the longest, for pages the blocks handed out.
Also the paper's count of what a cache saves: 100 new tokens after a prompt of 100.
"""
import random
import statistics
import tempfile
import time
from types import SimpleNamespace

import torch
from tqdm import tqdm

from benches.common import table
from beyond.batching import Adapters, Engine, Request
from beyond.paged_cache import Pool, bytes_per_token
from checkpoint import load_model
from common.cli import InputError
from common.device import find_device
from common.formats import export
from common.generate import generate
from lowrank import replace_linears
from model import Transformer, config_for, count_parameters

TARGETS, RANK = ("q", "k", "v", "qkv"), 8


# ----------------------------------------------------------------------------- what a cache saves, counted

def generation_cost(model, prompt, new, use_cache):
    """(tokens that the model reads, operations by its weights, operations of attention) to write `new` tokens after `prompt` tokens.

    The paper counts 2 operations for each weight of the model, W^E's included. Attention: q k^T and s v, 2 each for every key that a query sees.
    """
    passes = [(0, prompt)] + [(prompt + i - 1 if use_cache else 0, prompt + i) for i in range(1, new)]  # each reads positions start..end-1
    tokens = sum(end - start for start, end in passes)
    keys = sum(position + 1 for start, end in passes for position in range(start, end))
    config = model.config
    return tokens, 2 * count_parameters(model) * tokens, 4 * keys * config.heads * config.head_size * config.blocks


def paper_counts():
    """Section III.C.2's example: rows of (model, cache, tokens, TFLOP by weights, TFLOP of attention, the paper's figure)."""
    rows = []
    for rank in (0, 512):
        with torch.device("meta"):
            model = Transformer(config_for("llama2-7b"))
            if rank:
                replace_linears(model, rank, embedding_rank=rank)
        for use_cache in (False, True):
            tokens, weights, attention = generation_cost(model, 100, 100, use_cache)
            paper = {(0, False): "210", (512, False): "40"}.get((rank, use_cache), "")
            rows.append(dict(model=f"Llama2-7B{f', r = {rank}' if rank else ''}", cache=use_cache, tokens=tokens, weights=weights / 1e12,
                             attention=attention / 1e12, paper=paper))
    return rows


# ----------------------------------------------------------------------------- the engines

def mixed_prompts(tokenizer, count, shortest, longest):
    """Pieces of real text (the documentation that comes with Python), of lengths drawn evenly from a range."""
    from pydoc_data.topics import topics
    ids, draw = tokenizer.encode("\n".join(topics[k] for k in sorted(topics))[:400_000]), random.Random(0)
    lengths = [draw.randint(shortest, longest) for _ in range(count)]
    starts = [draw.randrange(len(ids) - n) for n in lengths]
    return [ids[start:start + n] for start, n in zip(starts, lengths)]


def random_adapter(model, seed):
    """Factors as training leaves them in size: an adapter changes a layer's output by a few percent."""
    generator, factors = torch.Generator().manual_seed(seed), {}
    for name, layer in model.named_modules():
        if name.rsplit(".", 1)[-1] in TARGETS:
            factors[name] = [torch.randn(*shape, generator=generator) * 0.02 for shape in ((RANK, layer.in_features), (layer.out_features, RANK))]
    return SimpleNamespace(factors=factors, scale=2.0)


def sequential(model, adapters, prompts, names, new):
    tokens = []
    for prompt, name in zip(prompts, names):
        adapters.select([name])
        tokens.append([s[0] for s in generate(model, [prompt], new, temperature=0)])
    longest = max(map(len, prompts)) + new
    return tokens, longest, longest - 1


def contiguous(model, adapters, prompts, names, new):
    adapters.select(names)
    steps = list(generate(model, prompts, new, temperature=0))
    return list(zip(*steps)), len(prompts) * (max(map(len, prompts)) + new), sum(len(p) + new - 1 for p in prompts)


def paged(model, adapters, prompts, names, new):
    pool = Pool(model.config, 1)
    blocks = sum(pool.blocks_for(len(p) + new - 1) for p in prompts)  # the whole pool is what these requests need at their ends
    engine = Engine(model, Pool(model.config, blocks, device=model.norm.weight.device), adapters=adapters, batch_size=len(prompts))
    requests = [Request(p, new, adapter=name) for p, name in zip(prompts, names)]
    list(engine.run(requests))
    token = bytes_per_token(model.config)
    return [r.tokens for r in requests], *(b / token for b in engine.peak)


def transformers_engine(model, device):
    """transformers' generate with the same weights, in one batch padded at the left."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        export(model, None, folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()

    @torch.inference_mode()
    def run(prompts, new):
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        out = theirs.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        return out[:, longest:].tolist(), len(prompts) * (longest + new), sum(len(p) + new - 1 for p in prompts)
    return run


def uncached(model, prompt, new, use_cache):
    return [[s[0] for s in generate(model, [prompt], new, temperature=0, use_cache=use_cache)]], 0, 0


# ----------------------------------------------------------------------------- the run

def check(args, config, tokenizer):
    for flag, least in (("sequences", 1), ("new_tokens", 2), ("rounds", 1)):
        if getattr(args, flag) < least:
            raise InputError(f"--{flag.replace('_', '-')} must be at least {least}, got {getattr(args, flag)}")
    if len(args.lengths) != 2 or not 1 <= args.lengths[0] <= args.lengths[1]:
        raise InputError(f"--lengths must be the shortest and the longest prompt, as 16,200, got {args.lengths}")
    if args.lengths[1] + args.new_tokens > config.context:
        raise InputError(f"{args.lengths[1]} + {args.new_tokens} tokens do not fit the context of {config.context}: lower --lengths or --new-tokens")
    if tokenizer is None:
        raise InputError(f"{args.model} has no tokenizer beside its weights: put a tokenizer.json or tokenizer.model there")


def bench(args):
    device = find_device("float32")
    model, tokenizer = load_model(args.model, device.torch_device)
    check(args, model.config, tokenizer)
    prompts = mixed_prompts(tokenizer, args.sequences, *args.lengths)
    steps, new = {}, args.new_tokens
    try:
        theirs = transformers_engine(model, device.torch_device)
        steps["transformers", 0] = lambda prompts: theirs(prompts, new)
    except ImportError:
        print("transformers is not installed: its row is left out (pip install transformers)")
    adapters = Adapters(model)
    for i in range(16):
        adapters.add(f"adapter {i}", random_adapter(model, i))
        adapters.select([None])
    for engine, counts in ((sequential, (1,)), (contiguous, (0, 1, 16)), (paged, (0, 1, 16))):
        for n in counts:
            names = [f"adapter {i % n}" if n else None for i in range(len(prompts))]
            steps[engine.__name__, n] = lambda prompts, engine=engine, names=names: engine(model, adapters, prompts, names[:len(prompts)], new)
    rows, outputs = measure(steps, prompts, new, args.rounds, bytes_per_token(model.config))
    adapters.select([None])
    rows += cache_rows(model, prompts)
    for n in (1, 16):
        agree = [outputs[e, n] for e in ("sequential", "contiguous", "paged") if (e, n) in outputs]
        same = sum(all(list(o[i]) == list(agree[0][i]) for o in agree) for i in range(len(prompts)))
        print(f"{n} adapters: {len(agree)} engines wrote the same tokens for {same} of {len(prompts)} prompts")
    print(f"{args.model}, {len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, {new} new tokens each, float32, {device.name}")
    return device, rows


def measure(steps, prompts, new, rounds, token_bytes):
    """Rows of the median tokens a second of each engine, all run in turn; and what each wrote."""
    for step in steps.values():  # warm up
        step(prompts[:1])
    seconds, outputs, rows = {key: [] for key in steps}, {}, []
    with tqdm(total=rounds * len(steps), disable=None, leave=False) as bar:
        for _ in range(rounds):
            for key, step in steps.items():
                start = time.perf_counter()
                outputs[key], reserved, used = step(prompts)
                seconds[key].append(time.perf_counter() - start)
                if len(seconds[key]) == rounds:
                    rows.append(dict(engine=key[0], adapters=key[1], sequences=len(prompts),
                                     tokens_per_second=len(prompts) * new / statistics.median(seconds[key]),
                                     kv_bytes_reserved=int(reserved * token_bytes), kv_bytes_used=int(used * token_bytes)))
                bar.update()
    return rows, outputs


def cache_rows(model, prompts):
    """The paper's 100 + 100 tokens in time: without the cache and with it."""
    prompt, rows = (max(prompts, key=len) * 100)[:100], []
    for use_cache in (False, True):
        start = time.perf_counter()
        uncached(model, prompt, 100, use_cache)
        rows.append(dict(engine="with cache" if use_cache else "without cache", adapters=0, sequences=1, tokens_per_second=100 / (time.perf_counter() - start),
                         tokens_read=generation_cost(model, 100, 100, use_cache)[0], kv_bytes_reserved=200 * use_cache * bytes_per_token(model.config),
                         kv_bytes_used=199 * use_cache * bytes_per_token(model.config)))
    return rows


def report(rows):
    rate = {(r["engine"], r["adapters"]): r["tokens_per_second"] for r in rows}
    mb = lambda key: lambda r: f"{r[key] / 1e6:.1f}"  # noqa: E731
    engines = table([r for r in rows if "tokens_read" not in r], {
        "engine": lambda r: r["engine"], "adapters": lambda r: r["adapters"], "sequences": lambda r: r["sequences"],
        "tokens/s": lambda r: f"{r['tokens_per_second']:.0f}", "over sequential": lambda r: f"{r['tokens_per_second'] / rate['sequential', 1]:.2f}x",
        "KV reserved MB": mb("kv_bytes_reserved"), "used MB": mb("kv_bytes_used"),
        "reserved / used": lambda r: f"{r['kv_bytes_reserved'] / r['kv_bytes_used']:.2f}"})
    timed = table([r for r in rows if "tokens_read" in r], {
        "100 + 100 tokens": lambda r: r["engine"], "tokens read": lambda r: f"{r['tokens_read']:,}", "new tokens/s": lambda r: f"{r['tokens_per_second']:.1f}"})
    counted = table(paper_counts(), {
        "100 + 100 tokens": lambda r: r["model"], "cache": lambda r: "yes" if r["cache"] else "no", "tokens read": lambda r: f"{r['tokens']:,}",
        "TFLOP by weights": lambda r: f"{r['weights']:.1f}", "attention": lambda r: f"{r['attention']:.2f}", "paper": lambda r: r["paper"]})
    return f"{engines}\n\n{timed}\n\n{counted}"


def arguments(p):
    p.add_argument("--model", default="smollm2-135m",
                   help="a folder, a file, or a known name (default: %(default)s)")
    p.add_argument("--sequences", type=int, default=32, help="prompts (default: %(default)s)")
    p.add_argument("--lengths", type=lambda s: [int(n) for n in s.split(",")], default=[16, 200],
                   help="shortest and longest prompt (default: 16,200)")
    p.add_argument("--new-tokens", type=int, default=24, help="for each prompt (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=2, help="timed rounds (default: %(default)s)")
