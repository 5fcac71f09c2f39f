"""What recomputation costs in time and saves in bytes (section IV.B; the paper: +33% for a block, +6% for attention).

    python bench.py recompute
"""
from functools import partial

import torch

from benches.account import Watch
from benches.common import interleaved, table
from common.device import find_device
from common.loss import head_loss
from model import Transformer, config_for
from recompute import use_recompute


def checkpointed(model):
    """The blocks through torch.utils.checkpoint, to compare with."""
    from torch.utils.checkpoint import checkpoint
    use_recompute(model, "sdpa")
    for block in model.blocks:
        block.__dict__["forward"] = lambda *args, block=block: checkpoint(type(block).forward, block, *args, use_reentrant=False)


def bench(args):
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
    return device, rows


def report(rows):
    return table(rows, {"mode": lambda r: r["mode"], "step ms": lambda r: f"{r['step_ms']:.0f}", "over": lambda r: r["against"],
                       "overhead": lambda r: f"{r['overhead']:+.1%}", "kept MB": lambda r: f"{r['saved_bytes'] / 1e6:.0f}",
                       "peak MB": lambda r: f"{r['peak_bytes'] / 1e6:.0f}"})


def arguments(p):
    p.add_argument("--blocks", type=int, default=2, help="blocks of GPT-2 (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=1, help="sequences (default: %(default)s)")
    p.add_argument("--seq-len", type=int, default=1024,
                   help="tokens of each; below 512 attention costs up to 8%% (default: %(default)s)")
    p.add_argument("--dtype", default="float32", help="float32, bfloat16 or auto (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=9, help="timed rounds (default: %(default)s)")
