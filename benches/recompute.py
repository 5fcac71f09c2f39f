"""What recomputation costs in time and saves in bytes (section IV.B; the paper: +33% a block, +6% attention).

    python bench.py recompute
"""
from functools import partial

import torch

from benches.account import Watch
from benches.common import interleaved, table
from common.cli import at_least_1
from common.device import find_device
from common.loss import head_loss
from model import Transformer, config_for
from recompute import use_recompute

PEER = "torch.utils.checkpoint"
AGAINST = {"none": "none", "sdpa": "none", "attention": "none", "block": "sdpa", PEER: "sdpa"}


def checkpointed(model):
    """The blocks through torch.utils.checkpoint, to compare with."""
    from torch.utils.checkpoint import checkpoint
    use_recompute(model, "sdpa")
    for block in model.blocks:
        block.forward = partial(checkpoint, type(block).forward, block, use_reentrant=False)


def bench(args):
    device = find_device(args.dtype)
    torch.manual_seed(0)
    config = config_for("gpt2", blocks=args.blocks, vocab_size=4096)
    models = {mode: Transformer(config).to(device.torch_device) for mode in AGAINST}
    for mode, model in models.items():
        checkpointed(model) if mode == PEER else use_recompute(model, mode)
    shape = args.batch_size, args.seq_len + 1
    tokens = torch.randint(config.vocab_size, shape, device=device.torch_device)

    def step(model, watch=None):
        with device.autocast():
            loss = head_loss(model.head, model.hidden(tokens[:, :-1]), tokens[:, 1:])
        kept = watch.alive if watch else 0
        loss.backward()
        model.zero_grad(set_to_none=False)
        return kept
    seconds = interleaved({mode: partial(step, model) for mode, model in models.items()}, args.rounds)
    rows = []
    for mode, model in models.items():
        with Watch() as watch:
            kept = step(model, watch)
        overhead = seconds[mode] / seconds[AGAINST[mode]] - 1
        rows.append(dict(mode=mode, step_ms=seconds[mode] * 1e3, against=AGAINST[mode], overhead=overhead,
                         saved_bytes=kept, peak_bytes=watch.peak))
    print(f"{args.blocks} blocks of GPT-2, batch {args.batch_size} x {args.seq_len} tokens, {device.name}. "
          "Overhead: over the same attention without recomputation")
    return device, rows


def report(rows):
    return table(rows, {
        "mode": lambda r: r["mode"],
        "step ms": lambda r: f"{r['step_ms']:.0f}",
        "over": lambda r: r["against"],
        "overhead": lambda r: f"{r['overhead']:+.1%}",
        "kept MB": lambda r: f"{r['saved_bytes'] / 1e6:.0f}",
        "peak MB": lambda r: f"{r['peak_bytes'] / 1e6:.0f}"})


def arguments(p):
    p.add_argument("--blocks", type=at_least_1, default=2, help="blocks of GPT-2 (default: %(default)s)")
    p.add_argument("--batch-size", type=at_least_1, default=1, help="sequences (default: %(default)s)")
    p.add_argument("--seq-len", type=at_least_1, default=1024,
                   help="tokens of each; below 512 attention costs up to 8%% (default: %(default)s)")
    p.add_argument("--dtype", default="float32", help="float32, bfloat16 or auto (default: %(default)s)")
    p.add_argument("--rounds", type=at_least_1, default=9, help="timed rounds (default: %(default)s)")
