"""Every figure that the README quotes, measured again on the machine at hand.

    python bench.py train             training GPT-2: full rank against r = 192, 96, 48
    python bench.py memory            Tables III and IV: bytes of a training step of Llama2-7B, counted without running it
    python bench.py recompute         what recomputation costs in time and saves in bytes
    python bench.py pipeline          utilization of GPipe and 1F1B, beside M / (N + M - 1) and torch.distributed.pipelining
    python bench.py plan              Llama2-70B on 512 GPUs, simulated: stages, memory, bubble, time of messages
    python bench.py NAME --json FILE  also write {"device": ..., "rows": [...]} to a file

What is compared is timed in turn (a, b, c, a, b, c, ...) in one process, and medians are quoted: these machines are shared, and their
speed drifts by more than most differences. Ratios carry over to other machines, absolute times do not.
"""
import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from lowrank import attach_lora, replace_linears
from memory import Watch, account, by_kind, memory_rows, meta_model, print_memory_tables
from model import Transformer, config_for, count_parameters, flops_per_token
from pipeline import SCHEDULES, balance, costs, measure, piece_of, schedule, simulate, stored
from quant import quantize
from recompute import MODES, head_loss, use_recompute
from runtime import Device, InputError, command, find_device, matmul_rate, write_atomic


def interleaved(steps, rounds):
    """Median seconds of each named step, all of them run in turn `rounds` times after a warm-up. steps: name -> function."""
    times = {name: [] for name in steps}
    for i in tqdm(range(rounds + 1), desc="rounds", disable=None, leave=False):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def table(rows, columns):
    """Rows as a Markdown table; columns: title -> function of a row."""
    cells = [list(columns)] + [[str(f(r)) for f in columns.values()] for r in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(c.rjust(w) for c, w in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|")
    return "\n".join(lines)


# ----------------------------------------------------------------------------- train

def training_step(model, device, batch, length):
    """One whole optimizer step as train.py does it, on random tokens."""
    from train import Loss, make_optimizer
    optimizer = make_optimizer(model, Namespace(weight_decay=0.1, lr=1e-4))
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
    code = (f"import bench, runtime; d = runtime.find_device({dtype!r}); m = bench.gpt2_of_rank({name!r}, {rank}, d); "
            f"s = bench.training_step(m, d, {batch}, {length}); s(d.dtype); s(d.dtype); print(runtime.peak_memory(d.torch_device))")
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()[-1])


def bench_train(args):
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
    full = {r["dtype"]: r["tokens_per_second"] for r in rows if r["model"] == args.model and r["rank"] == args.ranks[0]}
    print(f"{args.model}, batch {batch} x {length} tokens, {device.name}, matrix products "
          + ", ".join(f"{r / 1e12:.2f} TFLOPS in {d}" for d, r in rates.items()))
    print(table(rows, {
        "model": lambda r: r["model"], "rank": lambda r: r["rank"] or "full", "dtype": lambda r: r["dtype"],
        "parameters": lambda r: f"{r['parameters'] / 1e6:.1f}M", "tokens/s": lambda r: f"{r['tokens_per_second']:.0f}",
        "step ms": lambda r: f"{r['step_ms']:.0f}", "mfu": lambda r: f"{r['mfu']:.0%}",
        "peak GB": lambda r: f"{r['peak_memory_bytes'] / 1e9:.1f}" if r["peak_memory_bytes"] else "-",
        "speedup": lambda r: f"{r['tokens_per_second'] / full[r['dtype']]:.2f}x"}))
    return device, rows


# ----------------------------------------------------------------------------- memory

def bench_memory(args):
    """Bytes of a training step by kind, counted without running it, and the paper's Tables III and IV beside ours."""
    model = meta_model(args.model)
    if args.rank:
        print(replace_linears(model, args.rank))
    if args.bits < 16:
        print(quantize(model.to(getattr(torch, args.dtype)), args.bits))
    if args.lora:
        print(attach_lora(model, args.lora, targets=args.targets.split(",")))
    rows = memory_rows(args.model, model, args.batch, args.seq, getattr(torch, args.dtype), args.recompute)
    print_memory_tables(args.model, rows, args.batch, args.seq, args.limit_gb)
    return find_device("float32"), rows


# ----------------------------------------------------------------------------- recompute

def checkpointed(model):
    """The blocks through torch.utils.checkpoint, to compare with."""
    from torch.utils.checkpoint import checkpoint
    use_recompute(model, "sdpa")
    for block in model.blocks:
        block.__dict__["forward"] = lambda *args, block=block: checkpoint(type(block).forward, block, *args, use_reentrant=False)


def bench_recompute(args):
    """A training step with each mode of --recompute and with torch.utils.checkpoint, in turn: time, bytes kept, peak."""
    device = find_device(args.dtype)
    torch.manual_seed(0)
    config = config_for("gpt2", blocks=args.blocks, vocab_size=4096)
    models = {mode: Transformer(config).to(device.torch_device) for mode in ("none", "sdpa", "attention", "block", "torch.utils.checkpoint")}
    for mode, model in models.items():
        checkpointed(model) if mode == "torch.utils.checkpoint" else use_recompute(model, mode)
    tokens = torch.randint(config.vocab_size, (args.batch_size, args.seq_len + 1), device=device.torch_device)

    def step(model, watch=None):
        with device.autocast():
            loss = head_loss(model.head, model.hidden(tokens[:, :-1]), tokens[:, 1:])
        kept = watch.alive if watch else 0
        loss.backward()
        model.zero_grad(set_to_none=False)
        return kept
    seconds, rows = interleaved({mode: partial(step, model) for mode, model in models.items()}, args.rounds), []
    against = {"none": "none", "sdpa": "none", "attention": "none", "block": "sdpa", "torch.utils.checkpoint": "sdpa"}
    for mode, model in models.items():
        with Watch() as watch:
            kept = step(model, watch)
        rows.append(dict(mode=mode, step_ms=seconds[mode] * 1e3, against=against[mode], overhead=seconds[mode] / seconds[against[mode]] - 1,
                         saved_bytes=kept, peak_bytes=watch.peak))
    print(f"GPT-2's blocks ({args.blocks}), batch {args.batch_size} x {args.seq_len} tokens, {device.name}. Overhead: attention over the same "
          "attention without recomputation (none), a block over the same block without (sdpa)")
    print(table(rows, {"mode": lambda r: r["mode"], "step ms": lambda r: f"{r['step_ms']:.0f}", "over": lambda r: r["against"],
                       "overhead": lambda r: f"{r['overhead']:+.1%}", "kept MB": lambda r: f"{r['saved_bytes'] / 1e6:.0f}",
                       "peak MB": lambda r: f"{r['peak_bytes'] / 1e6:.0f}"}))
    return device, rows


# ----------------------------------------------------------------------------- pipeline

def bench_pipeline(args):
    """Measured utilization of each schedule, with timed waits as work, beside the formula and torch's schedule of the same name."""
    rows = measure(args.stages, args.microbatches, args.seconds, args.rounds)
    print(f"{args.stages} processes on this machine, a stage's work is a wait of {args.seconds * 1e3:.0f} ms")
    print(table(rows, {
        "schedule": lambda r: r["schedule"], "stages": lambda r: r["stages"], "microbatches": lambda r: r["microbatches"],
        "utilization": lambda r: f"{r['utilization']:.3f}", "M/(N+M-1)": lambda r: f"{r['theory']:.3f}",
        "torch": lambda r: f"{r['torch_utilization']:.3f}" if r["torch_utilization"] else "refuses"}))
    return find_device("float32"), rows


def plan(model, gpus, length=4096, sequences=1024, kind="1f1b", tflops=400.0, gigabytes=80.0, link=50.0):
    """A row for each way to share `gpus` out as stages x replicas. Simulated, nothing is run; of those that fit, the fastest has best=True.

    A step takes `sequences` of `length` tokens; a microbatch is one of them; blocks are recomputed; weights, gradients and AdamW's moments
    have 32 bits, as in train.py. tflops: what a GPU reaches in matrix products (400 is 40% of an H100's peak in bf16). link: gigabytes a
    second from one GPU to another; activations arrive that much later, and gradients are summed when the last backward pass is over.
    """
    blocks, cost, numbers = model.config.blocks, [length * c / (tflops * 1e12) for c in costs(model, length)], [0] * (model.config.blocks + 2)
    for name, p in model.named_parameters(remove_duplicate=False):
        numbers[piece_of(name, blocks)] += p.numel()
    bytes_of = by_kind(account(model, 1, length, autocast=True, recompute="block"))
    message = 4 * length * model.config.width / (link * 1e9)
    rows = []
    for stages in (n for n in range(1, blocks + 1) if gpus % n == 0 and sequences % (gpus // n) == 0):
        replicas, runs = gpus // stages, balance(cost, stages)
        lists = schedule(kind, stages, sequences // replicas)
        forward, held = ([sum(of[i] for i in run) for run in runs] for of in (cost, numbers))
        span = max(row[4] for row in simulate(lists, forward, [3 * f for f in forward], message))  # forward again, and twice that backward
        gradients = 2 * (replicas - 1) / replicas * 4 * max(held) / (link * 1e9)  # a ring sends every number twice
        memory = max(16 * n + stored(steps) * bytes_of["activation"] * len(run) / (blocks + 2) for n, steps, run in zip(held, lists, runs))
        rows.append(dict(stages=stages, replicas=replicas, microbatches=sequences // replicas, memory_bytes=memory + bytes_of["transient"],
                         bubble=1 - 4 * sum(forward) * (sequences // replicas) / stages / span, step_seconds=span + gradients,
                         activation_seconds=2 * (sequences // replicas) * message * (stages > 1), gradient_seconds=gradients,
                         tokens_per_second=sequences * length / (span + gradients), simulated=True))
    fitting = [row for row in rows if row["memory_bytes"] <= gigabytes * 1e9]
    if not fitting:
        smallest = min((row["memory_bytes"] for row in rows), default=0)
        raise InputError(f"no share-out of {gpus} GPUs fits {gigabytes:g} GB (the smallest takes {smallest / 1e9:.0f} GB): take more GPUs")
    best = min(fitting, key=lambda row: row["step_seconds"])
    return [row | dict(fits=row["memory_bytes"] <= gigabytes * 1e9, best=row is best) for row in rows]


def bench_plan(args):
    """Stages, replicas, memory, bubble and messages for a model and GPUs that are not here: a simulation from the stated rates."""
    rows = plan(meta_model(args.model), args.gpus, args.seq_len, args.sequences, args.schedule, args.tflops, args.gigabytes, args.link)
    print(f"SIMULATED, nothing was run: {args.model} on {args.gpus} GPUs of {args.gigabytes:g} GB, {args.tflops:g} TFLOPS each in products, "
          f"{args.link:g} GB/s between them; {args.sequences} sequences of {args.seq_len} tokens a step, {args.schedule}, blocks recomputed")
    print(table(rows, {
        "stages": lambda r: r["stages"], "replicas": lambda r: r["replicas"], "microbatches": lambda r: r["microbatches"],
        "GB a GPU": lambda r: f"{r['memory_bytes'] / 1e9:.1f}", "bubble": lambda r: f"{r['bubble']:.1%}",
        "activations s": lambda r: f"{r['activation_seconds']:.2f}", "gradients s": lambda r: f"{r['gradient_seconds']:.2f}",
        "step s": lambda r: f"{r['step_seconds']:.2f}", "tokens/s": lambda r: f"{r['tokens_per_second']:,.0f}",
        "": lambda r: "<- fastest that fits" if r["best"] else "" if r["fits"] else "too large"}))
    return find_device("float32"), rows


BENCHES = {"train": bench_train, "memory": bench_memory, "recompute": bench_recompute, "pipeline": bench_pipeline, "plan": bench_plan}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    p = sub.add_parser("train", help=bench_train.__doc__)
    p.add_argument("--model", default="gpt2", help="architecture (default: %(default)s)")
    p.add_argument("--ranks", type=lambda s: [int(r) for r in s.split(",")], default=[0, 192, 96, 48], help="0 is full rank (default: 0,192,96,48)")
    p.add_argument("--dtypes", help="default: bfloat16,float32")
    p.add_argument("--batch-size", type=int, default=4, help="sequences (default: %(default)s)")
    p.add_argument("--seq-len", type=int, default=256, help="tokens of each (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    p.add_argument("--nanogpt", metavar="DIR", help="also time nanoGPT's 124M from a checkout of its repository")
    p = sub.add_parser("memory", help=bench_memory.__doc__)
    p.add_argument("--model", default="llama2-7b", help="a known name (default: %(default)s)")
    p.add_argument("--batch", type=int, default=1, help="sequences (default: %(default)s)")
    p.add_argument("--seq", type=int, default=4096, help="tokens of each (default: %(default)s)")
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of parameters and gradients (default: %(default)s)")
    p.add_argument("--rank", type=int, default=0, help="of every linear layer; 0 is full rank (default: %(default)s)")
    p.add_argument("--bits", type=int, default=16, choices=[4, 8, 16], help="of the weights; quantized ones do not learn (default: %(default)s)")
    p.add_argument("--lora", type=int, default=0, metavar="R", help="freeze the model and put adapters of this rank beside it; 0: none (default: 0)")
    p.add_argument("--targets", default="q,v", help="the layers that get adapters (default: %(default)s, the paper's for Llama2-7B)")
    p.add_argument("--recompute", default="sdpa", choices=MODES, help="as in train.py (default: %(default)s)")
    p.add_argument("--limit-gb", type=float, default=24, help="does it fit in this much? (default: %(default)s)")
    p = sub.add_parser("recompute", help=bench_recompute.__doc__)
    p.add_argument("--blocks", type=int, default=2, help="blocks of GPT-2 (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=1, help="sequences (default: %(default)s)")
    p.add_argument("--seq-len", type=int, default=1024, help="tokens of each; below 512 attention costs up to 8%% (default: %(default)s)")
    p.add_argument("--dtype", default="float32", help="float32, bfloat16 or auto (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=9, help="timed rounds (default: %(default)s)")
    p = sub.add_parser("pipeline", help=bench_pipeline.__doc__)
    p.add_argument("--stages", type=int, default=4, help="processes (default: %(default)s)")
    p.add_argument("--microbatches", type=lambda s: [int(m) for m in s.split(",")], default=[1, 4, 8, 16], help="default: 1,4,8,16")
    p.add_argument("--seconds", type=float, default=0.05, help="of a wait (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="measured rounds (default: %(default)s)")
    p = sub.add_parser("plan", help=bench_plan.__doc__)
    p.add_argument("--model", default="llama2-70b", help="a known name (default: %(default)s)")
    p.add_argument("--gpus", type=int, default=512, help="default: %(default)s")
    p.add_argument("--seq-len", type=int, default=4096, help="tokens of a sequence, which is a microbatch (default: %(default)s)")
    p.add_argument("--sequences", type=int, default=1024, help="of a step, over all replicas (default: %(default)s)")
    p.add_argument("--schedule", default="1f1b", choices=SCHEDULES, help="default: %(default)s")
    p.add_argument("--tflops", type=float, default=400, help="a GPU reaches in matrix products; 400 is 40%% of an H100's peak (default: %(default)s)")
    p.add_argument("--gigabytes", type=float, default=80, help="memory of a GPU (default: %(default)s)")
    p.add_argument("--link", type=float, default=50, help="gigabytes a second from a GPU to another (default: %(default)s)")
    for p in sub.choices.values():
        p.add_argument("--json", help="write the rows to this file too")
    args = parser.parse_args(argv)
    device, rows = BENCHES[args.name](args)
    if args.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        record = dict(command=" ".join(["python bench.py", *(argv or sys.argv[1:])]), device=device.name, torch=torch.__version__, commit=commit,
                      date=time.strftime("%Y-%m-%d"), rows=rows)
        write_atomic(args.json, json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    command(main)
