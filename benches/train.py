"""Training speed (Tables VI and VII): a whole optimizer step of GPT-2 at full rank and at r = 192, 96, 48.

    python bench.py train
    python bench.py train --model gpt2-xl --ranks 0,384,192,96
    python bench.py train --nanogpt DIR          DIR: a checkout of nanoGPT's repository, the peer
"""
import importlib.util
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benches.common import interleaved, table
from common.device import find_device, matmul_rate
from common.loss import head_loss
from common.optimizers import make_optimizers
from lowrank import replace_linears
from model import Transformer, config_for, count_parameters, flops_per_token

# Speedup over full rank, Tables VI and VII.
PAPER = {("gpt2", 192): 1.14, ("gpt2", 96): 1.18, ("gpt2", 48): 1.19, ("gpt2-xl", 384): 1.31}


def timed_step(device, loss_of, model, optimizer, vocabulary, batch, length):
    """step(dtype): forward, backward, clip and update on random tokens."""
    tokens = torch.randint(vocabulary, (batch, length + 1), device=device.torch_device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step(dtype):
        with replace(device, dtype=dtype).autocast():
            loss = loss_of(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return step


def training_step(model, device, batch, length):
    """A step as `train.py --optimizer adamw` makes it."""
    optimizer, = make_optimizers(model, 1e-4, 0.1)

    def loss_of(x, y):
        return head_loss(model.head, model.hidden(x), y)
    return timed_step(device, loss_of, model, optimizer, model.config.vocab_size, batch, length)


def nanogpt_step(folder, device, batch, length):
    """A step of nanoGPT's GPT-2 124M, by its own model.py and optimizer."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    config = theirs.GPTConfig(block_size=1024, vocab_size=50257, dropout=0.0, bias=True)
    model = theirs.GPT(config).to(device.torch_device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.torch_device.type)

    def loss_of(x, y):
        return model(x, y)[1]
    return timed_step(device, loss_of, model, optimizer, 50257, batch, length), model


def gpt2_of_rank(name, rank, device):
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Transformer(config_for(name))
        if rank:
            replace_linears(model, rank)
    model.materialize(device.torch_device).init_weights()
    return model


def peak_of_one(name, rank, dtype, batch, length):
    """Peak bytes of two steps in a process of their own: resident memory on a CPU, allocated memory on a GPU.
    """
    code = (f"import benches.train as bench; from common.device import find_device, peak_memory; "
            f"d = find_device({dtype!r}); m = bench.gpt2_of_rank({name!r}, {rank}, d); "
            f"s = bench.training_step(m, d, {batch}, {length}); s(d.dtype); s(d.dtype); "
            "print(peak_memory(d.torch_device))")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def bench(args):
    """Tokens a second at each rank and dtype, and MFU against the rate of matrix products of the same run."""
    device = find_device("float32")
    batch, length, dtypes = args.batch_size, args.seq_len, args.dtypes.split(",")
    rates = {d: matmul_rate(device.torch_device, getattr(torch, d)) for d in dtypes}
    models, steps = {}, {}
    for rank in args.ranks:
        models[args.model, rank] = gpt2_of_rank(args.model, rank, device)
        steps[args.model, rank] = training_step(models[args.model, rank], device, batch, length)
    flops = {key: flops_per_token(model, length, training=True) for key, model in models.items()}
    if args.nanogpt:
        steps["nanoGPT", 0], models["nanoGPT", 0] = nanogpt_step(args.nanogpt, device, batch, length)
        with torch.device("meta"):
            flops["nanoGPT", 0] = flops_per_token(Transformer(config_for("gpt2")), length, training=True)
    timed = {(*key, d): partial(step, getattr(torch, d)) for key, step in steps.items() for d in dtypes}
    seconds = interleaved(timed, args.rounds)
    rows = []
    for (name, rank, d), s in seconds.items():
        # the first time may have been a busy one
        rate = max(rates[d], matmul_rate(device.torch_device, getattr(torch, d)))
        ours = name == args.model
        rows.append(dict(
            model=name, rank=rank, dtype=d, tokens_per_second=batch * length / s, step_ms=s * 1e3,
            parameters=count_parameters(models[name, rank]),
                         mfu=flops[name, rank] * batch * length / s / rate,
            matmul_tflops=rate / 1e12, peak_memory_bytes=peak_of_one(name, rank, d, batch, length) if ours
                         else None))
    print(f"{args.model}, batch {batch} x {length} tokens, {device.name}")
    return device, rows


def report(rows):
    def over(r, peer):
        for q in rows:
            if q["dtype"] == r["dtype"] and peer(q):
                return f"{r['tokens_per_second'] / q['tokens_per_second']:.2f}x"
        return "-"
    rows = sorted(rows, key=lambda r: (r["dtype"], r["model"] != "nanoGPT"))
    return table(rows, {
        "model": lambda r: r["model"], "rank": lambda r: r["rank"] or "full", "dtype": lambda r: r["dtype"],
        "parameters": lambda r: f"{r['parameters'] / 1e6:.1f}M",
                        "tokens/s": lambda r: f"{r['tokens_per_second']:.0f}",
        "over full rank": lambda r: over(r, lambda q: q["rank"] == 0 and q["model"] != "nanoGPT"),
        "over nanoGPT": lambda r: over(r, lambda q: q["model"] == "nanoGPT"),
        "mfu": lambda r: f"{r['mfu']:.0%}",
        "peak GB": lambda r: f"{r['peak_memory_bytes'] / 1e9:.1f}" if r["peak_memory_bytes"] else "-",
        "paper": lambda r: f"{PAPER[r['model'], r['rank']]:.2f}x" if (r["model"], r["rank"]) in PAPER
                        else ""})


def arguments(p):
    p.add_argument("--model", default="gpt2", help="architecture (default: %(default)s)")
    p.add_argument("--ranks", type=lambda s: [int(r) for r in s.split(",")], default=[0, 192, 96, 48],
                   help="0 is full rank (default: 0,192,96,48)")
    p.add_argument("--dtypes", default="bfloat16,float32", help="default: %(default)s")
    p.add_argument("--batch-size", type=int, default=4, help="sequences (default: %(default)s)")
    p.add_argument("--seq-len", type=int, default=256, help="tokens of each (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    p.add_argument("--nanogpt", metavar="DIR",
                   help="also time nanoGPT's 124M from a checkout of its repository")
