"""Training speed (Tables VI and VII): a whole optimizer step of GPT-2 at full rank and at r = 192, 96, 48.

    python bench.py train
    python bench.py train --model gpt2-xl --ranks 0,384,192,96
    python bench.py train --nanogpt DIR          DIR: a checkout of nanoGPT's repository, the peer

All in turn in one process, on random tokens. MFU is against the rate of matrix products of the same run.
"""
import importlib.util
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benches.common import Worker, interleaved, table
from checkpoint import random_model
from common.device import find_device, matmul_rate, peak_memory
from common.loss import head_loss
from common.optimizers import make_optimizers
from lowrank import replace_linears
from model import Transformer, config_for, count_parameters, flops_per_token
from recompute import use_recompute
from train import faster_attention

# Speedup over full rank, Tables VI and VII.
PAPER = {("gpt2", 192): "1.14x", ("gpt2", 96): "1.18x", ("gpt2", 48): "1.19x", ("gpt2-xl", 384): "1.31x"}
DEFAULTS = dict(model="gpt2", ranks=[0, 192, 96, 48], dtypes=["bfloat16", "float32"], batch_size=4,
                seq_len=256, rounds=5, nanogpt=None, compile=False)

def timed_step(device, loss_of, model, optimizer, batch, length):
    """step(dtype): forward, backward, clip and update on random tokens."""
    tokens = torch.randint(model.config.vocab_size, (batch, length + 1), device=device.torch_device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step(dtype):
        here = replace(device, dtype=dtype)
        with here.autocast():
            loss = loss_of(x, y, here)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step

def training_step(model, device, batch, length, as_it_is=False):
    """A step as `train.py --optimizer adamw` makes it; as_it_is: the model is compiled or recomputes."""
    def loss_of(x, y, here):
        if not as_it_is:
            use_recompute(model, faster_attention(here))
        return head_loss(model.head, model.hidden(x), y)
    optimizer, = make_optimizers(model, 1e-4, 0.1)
    return timed_step(device, loss_of, model, optimizer, batch, length)

def nanogpt_step(folder, device, batch, length):
    """A step of nanoGPT's GPT-2 124M, by its own model.py and optimizer."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    config = theirs.GPTConfig(block_size=1024, vocab_size=50257, dropout=0.0, bias=True)
    model = theirs.GPT(config).to(device.torch_device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.torch_device.type)
    return timed_step(device, lambda x, y, _: model(x, y)[1], model, optimizer, batch, length)

def shapes_of_rank(name, rank=0, embedding_rank=0, **changes):
    """A known model of a rank (0: full), some fields of its configuration changed, without numbers."""
    with torch.device("meta"):
        model = Transformer(config_for(name, **changes))
        if rank:
            replace_linears(model, rank, embedding_rank=embedding_rank)
    return model

def peak_of_two_steps(name, rank, batch, length, dtype):
    """Peak of the process's memory in bytes: resident on a CPU, allocated on a GPU."""
    device = find_device(dtype)
    model = random_model(name, rank, device=device.torch_device, dtype=torch.float32)
    step = training_step(model, device, batch, length)
    for _ in range(2):
        step(device.dtype)
    return peak_memory(device.torch_device)

def bench(args):
    """A row for each rank and dtype."""
    device, size, steps = find_device("float32"), (args.batch_size, args.seq_len), {}
    for rank in args.ranks:
        model = random_model(args.model, rank, device=device.torch_device, dtype=torch.float32)
        if args.compile:
            for block in model.blocks:
                block.compile()
        steps[args.model, rank] = training_step(model, device, *size, args.compile)
    if args.nanogpt:
        steps["nanoGPT", 0] = nanogpt_step(args.nanogpt, device, *size)
    timed = {(*key, d): partial(steps[key], getattr(torch, d)) for key in steps for d in args.dtypes}
    rows, found = [], interleaved(timed, args.rounds)
    del model, steps, timed  # the peaks need the memory
    torch.cuda.empty_cache()
    rates = {d: matmul_rate(device.torch_device, getattr(torch, d)) for d in args.dtypes}
    for (name, rank, d), (s, _) in found.items():
        speed, peak, model = args.batch_size * args.seq_len / s, None, shapes_of_rank("gpt2")
        if name == args.model:
            model = shapes_of_rank(name, rank)
            with Worker(partial, peak_of_two_steps, name, rank, *size) as worker:
                peak = worker.ask(d)
        mfu = flops_per_token(model, args.seq_len, training=True) * speed / rates[d]
        rows.append(dict(model=name, rank=rank, dtype=d, tokens_per_second=speed, step_ms=s * 1e3,
                         parameters=count_parameters(model), mfu=mfu, matmul_tflops=rates[d] / 1e12,
                         peak_memory_bytes=peak))
    return device, rows

def report(rows):
    speed = {(r["model"] == "nanoGPT", r["rank"], r["dtype"]): r["tokens_per_second"] for r in rows}

    def over(peer, r):
        base = speed.get((peer, 0, r["dtype"]))
        return f"{r['tokens_per_second'] / base:.2f}x" if base else None
    rows = sorted(rows, key=lambda r: (r["dtype"], r["model"] != "nanoGPT"))
    return table(rows, first="model rank dtype", columns={
        "parameters": ("parameters", "{:.1f}M", 1e6), "tokens/s": ("tokens_per_second", "{:.0f}"),
        "over full rank": partial(over, False), "over nanoGPT": partial(over, True),
        "mfu": ("mfu", "{:.0%}"), "peak GB": ("peak_memory_bytes", "{:.1f}", 1e9),
        "paper": lambda r: PAPER.get((r["model"], r["rank"]))})
