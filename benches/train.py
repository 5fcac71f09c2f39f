"""Training speed (Tables VI and VII): a whole optimizer step of GPT-2 at full rank and at r = 192, 96, 48, nanoGPT's beside it.

    python bench.py train
    python bench.py train --model gpt2-xl --ranks 0,384,192,96
    python bench.py train --nanogpt DIR          DIR: a checkout of nanoGPT's repository, the peer
"""
import importlib.util
import subprocess
import sys
from pathlib import Path

import torch

from benches.common import interleaved, table
from common.device import Device, find_device, matmul_rate
from common.optimizers import make_optimizers
from lowrank import replace_linears
from model import Transformer, config_for, count_parameters, flops_per_token

PAPER = {("gpt2", 192): 1.14, ("gpt2", 96): 1.18, ("gpt2", 48): 1.19, ("gpt2-xl", 384): 1.31}  # speedup over full rank, Tables VI and VII


def training_step(model, device, batch, length):
    """One whole optimizer step as `train.py --optimizer adamw` does it, on random tokens."""
    from train import Loss
    optimizer, = make_optimizers(model, 1e-4, 0.1)  # AdamW, as the peer's
    loss_of = Loss(model)
    tokens = torch.randint(model.config.vocab_size, (batch, length + 1), device=device.torch_device)

    def step(dtype):
        with Device(device.torch_device, dtype, 0, "", "").autocast():
            loss = loss_of(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return step


def nanogpt_step(folder, device, batch, length):
    """A step of nanoGPT's GPT-2 124M, by its own model.py and optimizer: the peer, from a checkout of its repository."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    model = theirs.GPT(theirs.GPTConfig(block_size=1024, vocab_size=50257, dropout=0.0, bias=True)).to(device.torch_device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.torch_device.type)
    tokens = torch.randint(50257, (batch, length + 1), device=device.torch_device)

    def step(dtype):
        with Device(device.torch_device, dtype, 0, "", "").autocast():
            _, loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step, model


def gpt2_of_rank(name, rank, device):
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Transformer(config_for(name))
        if rank:
            replace_linears(model, rank)
    model.materialize(device.torch_device).init_weights()
    return model


def gpt2_on_meta():
    with torch.device("meta"):
        return Transformer(config_for("gpt2"))


def peak_of_one(name, rank, dtype, batch, length):
    """Peak bytes of two steps in a process of their own: resident memory on a CPU, allocated memory on a GPU."""
    code = (f"import benches.train as bench, runtime; d = runtime.find_device({dtype!r}); m = bench.gpt2_of_rank({name!r}, {rank}, d); "
            f"s = bench.training_step(m, d, {batch}, {length}); s(d.dtype); s(d.dtype); print(runtime.peak_memory(d.torch_device))")
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()[-1])


def bench(args):
    """Tokens a second of a training step at each rank and dtype, MFU against the rate of matrix products of the same run."""
    device = find_device("float32")
    batch, length = args.batch_size, args.seq_len
    dtypes = [d for d in (args.dtypes or "bfloat16,float32").split(",")]
    rates = {d: matmul_rate(device.torch_device, getattr(torch, d)) for d in dtypes}
    models = {rank: gpt2_of_rank(args.model, rank, device) for rank in args.ranks}
    steps = {}
    for rank, model in models.items():
        step = training_step(model, device, batch, length)
        steps |= {(rank, d): lambda step=step, d=d: step(getattr(torch, d)) for d in dtypes}
    if args.nanogpt:
        peer, peer_model = nanogpt_step(args.nanogpt, device, batch, length)
        steps |= {("nanoGPT", d): lambda d=d: peer(getattr(torch, d)) for d in dtypes}
    seconds = interleaved(steps, args.rounds)
    rates = {d: max(rates[d], matmul_rate(device.torch_device, getattr(torch, d))) for d in dtypes}
    rows = []
    for d in dtypes if args.nanogpt else ():
        s = seconds.pop(("nanoGPT", d))
        flops = flops_per_token(gpt2_on_meta(), length, training=True) * batch * length
        rows.append(dict(model="nanoGPT", rank=0, dtype=d, parameters=sum(p.numel() for p in peer_model.parameters()), step_ms=s * 1e3,
                         tokens_per_second=batch * length / s, mfu=flops / s / rates[d], matmul_tflops=rates[d] / 1e12, peak_memory_bytes=None))
    for (rank, d), s in seconds.items():
        flops = flops_per_token(models[rank], length, training=True) * batch * length
        rows.append(dict(model=args.model, rank=rank, dtype=d, parameters=count_parameters(models[rank]), tokens_per_second=batch * length / s,
                         step_ms=s * 1e3, mfu=flops / s / rates[d], matmul_tflops=rates[d] / 1e12,
                         peak_memory_bytes=peak_of_one(args.model, rank, d, batch, length)))
    print(f"{args.model}, batch {batch} x {length} tokens, {device.name}, matrix products "
          + ", ".join(f"{r / 1e12:.2f} TFLOPS in {d}" for d, r in rates.items()))
    return device, rows


def report(rows):
    def over(r, peer):
        base = next((q["tokens_per_second"] for q in rows if q["dtype"] == r["dtype"] and peer(q)), None)
        return f"{r['tokens_per_second'] / base:.2f}x" if base else "-"
    rows = sorted(rows, key=lambda r: (r["dtype"], r["model"] != "nanoGPT"))
    return table(rows, {
        "model": lambda r: r["model"], "rank": lambda r: r["rank"] or "full", "dtype": lambda r: r["dtype"],
        "parameters": lambda r: f"{r['parameters'] / 1e6:.1f}M", "tokens/s": lambda r: f"{r['tokens_per_second']:.0f}",
        "over full rank": lambda r: over(r, lambda q: q["rank"] == 0 and q["model"] != "nanoGPT"),
        "over nanoGPT": lambda r: over(r, lambda q: q["model"] == "nanoGPT"),
        "mfu": lambda r: f"{r['mfu']:.0%}", "peak GB": lambda r: f"{r['peak_memory_bytes'] / 1e9:.1f}" if r["peak_memory_bytes"] else "-",
        "paper": lambda r: f"{PAPER[r['model'], r['rank']]:.2f}x" if (r["model"], r["rank"]) in PAPER else ""})


def arguments(p):
    p.add_argument("--model", default="gpt2", help="architecture (default: %(default)s)")
    p.add_argument("--ranks", type=lambda s: [int(r) for r in s.split(",")], default=[0, 192, 96, 48], help="0 is full rank (default: 0,192,96,48)")
    p.add_argument("--dtypes", help="default: bfloat16,float32")
    p.add_argument("--batch-size", type=int, default=4, help="sequences (default: %(default)s)")
    p.add_argument("--seq-len", type=int, default=256, help="tokens of each (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    p.add_argument("--nanogpt", metavar="DIR", help="also time nanoGPT's 124M from a checkout of its repository")
