"""Llama2-70B on 512 GPUs, simulated from stated rates: stages, memory, bubble, time of messages. Nothing is run.

    python bench.py plan --model llama2-70b --gpus 512
"""
from benches.account import account, by_kind, meta_model
from benches.common import table
from common.cli import InputError, check_positive
from common.device import find_device
from pipeline import SCHEDULES, balance, costs, piece_of, schedule, simulate, stored


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


def bench(args):
    """Stages, replicas, memory, bubble and messages for a model and GPUs that are not here: a simulation from the stated rates."""
    check_positive(args, "gpus", "seq_len", "sequences", "tflops", "gigabytes", "link")
    rows = plan(meta_model(args.model), args.gpus, args.seq_len, args.sequences, args.schedule, args.tflops, args.gigabytes, args.link)
    print(f"SIMULATED, nothing was run: {args.model} on {args.gpus} GPUs of {args.gigabytes:g} GB, {args.tflops:g} TFLOPS each in products, "
          f"{args.link:g} GB/s between them; {args.sequences} sequences of {args.seq_len} tokens a step, {args.schedule}, blocks recomputed")
    return find_device("float32"), rows


def report(rows):
    return table(rows, {
        "stages": lambda r: r["stages"], "replicas": lambda r: r["replicas"], "microbatches": lambda r: r["microbatches"],
        "GB a GPU": lambda r: f"{r['memory_bytes'] / 1e9:.1f}", "bubble": lambda r: f"{r['bubble']:.1%}",
        "activations s": lambda r: f"{r['activation_seconds']:.2f}", "gradients s": lambda r: f"{r['gradient_seconds']:.2f}",
        "step s": lambda r: f"{r['step_seconds']:.2f}", "tokens/s": lambda r: f"{r['tokens_per_second']:,.0f}",
        "": lambda r: "<- fastest that fits" if r["best"] else "" if r["fits"] else "too large"})


def arguments(p):
    p.add_argument("--model", default="llama2-70b", help="a known name (default: %(default)s)")
    p.add_argument("--gpus", type=int, default=512, help="default: %(default)s")
    p.add_argument("--seq-len", type=int, default=4096, help="tokens of a sequence, which is a microbatch (default: %(default)s)")
    p.add_argument("--sequences", type=int, default=1024, help="of a step, over all replicas (default: %(default)s)")
    p.add_argument("--schedule", default="1f1b", choices=SCHEDULES, help="default: %(default)s")
    p.add_argument("--tflops", type=float, default=400, help="a GPU reaches in matrix products; 400 is 40%% of an H100's peak (default: %(default)s)")
    p.add_argument("--gigabytes", type=float, default=80, help="memory of a GPU (default: %(default)s)")
    p.add_argument("--link", type=float, default=50, help="gigabytes a second from a GPU to another (default: %(default)s)")
