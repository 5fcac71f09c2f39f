"""Utilization of GPipe and 1F1B (Fig. 3), beside M / (N + M - 1) and torch.distributed.pipelining's schedule of the same name.

    python bench.py pipeline
"""
from benches.common import table
from common.device import find_device
from pipeline import measure


def bench(args):
    """Measured utilization of each schedule, with timed waits as work, beside the formula and torch's schedule of the same name."""
    rows = measure(args.stages, args.microbatches, args.seconds, args.rounds)
    print(f"{args.stages} processes on this machine, a stage's work is a wait of {args.seconds * 1e3:.0f} ms")
    return find_device("float32"), rows


def report(rows):
    return table(rows, {
        "schedule": lambda r: r["schedule"], "stages": lambda r: r["stages"], "microbatches": lambda r: r["microbatches"],
        "utilization": lambda r: f"{r['utilization']:.3f}", "M/(N+M-1)": lambda r: f"{r['theory']:.3f}",
        "torch": lambda r: f"{r['torch_utilization']:.3f}" if r["torch_utilization"] else "refuses"})


def arguments(p):
    p.add_argument("--stages", type=int, default=4, help="processes (default: %(default)s)")
    p.add_argument("--microbatches", type=lambda s: [int(m) for m in s.split(",")], default=[1, 4, 8, 16], help="default: 1,4,8,16")
    p.add_argument("--seconds", type=float, default=0.05, help="of a wait (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="measured rounds (default: %(default)s)")
