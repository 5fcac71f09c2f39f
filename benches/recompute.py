"""What recomputation costs in time and saves in bytes (section IV.B; the paper: +33% block, +6% attention).

    python bench.py recompute

Steps of a few blocks of GPT-2 in each mode, in turn. Overhead is over the same attention without
recomputation; the peer is torch.utils.checkpoint. Below 512 tokens attention costs up to 8%.
"""
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from benches.common import interleaved, table
from benches.memory import Watch
from common.device import find_device
from common.loss import head_loss
from model import Transformer, config_for
from recompute import use_recompute

PEER = "torch.utils.checkpoint"
AGAINST = {"none": "none", "sdpa": "none", "attention": "none", "block": "sdpa", PEER: "sdpa"}
BLOCKS = 2
DEFAULTS = dict(batch_size=1, seq_len=1024, dtype="float32", rounds=9)

def bench(args):
    device = find_device(args.dtype)
    torch.manual_seed(0)
    config = config_for("gpt2", blocks=BLOCKS, vocab_size=4096)
    shape = args.batch_size, args.seq_len + 1
    tokens = torch.randint(config.vocab_size, shape, device=device.torch_device)
    models = {}
    for mode in AGAINST:
        model = Transformer(config).to(device.torch_device)
        models[mode] = use_recompute(model, "sdpa" if mode == PEER else mode)
    for block in models[PEER].blocks:
        block.forward = partial(checkpoint, type(block).forward, block, use_reentrant=False)

    def step(model, watch=None):
        with device.autocast():
            loss = head_loss(model.head, model.hidden(tokens[:, :-1]), tokens[:, 1:])
        kept = watch.alive if watch else 0
        loss.backward()
        model.zero_grad()
        return kept
    rows, steps = [], {mode: partial(step, model) for mode, model in models.items()}
    seconds = {mode: s for mode, (s, _) in interleaved(steps, args.rounds).items()}
    for mode, model in models.items():
        with Watch() as watch:
            kept = step(model, watch)
        rows.append(dict(mode=mode, step_ms=seconds[mode] * 1e3, against=AGAINST[mode], saved_bytes=kept,
                         overhead=seconds[mode] / seconds[AGAINST[mode]] - 1, peak_bytes=watch.peak))
    return device, rows

def report(rows):
    return table(rows, first="mode", columns={
        "step ms": ("step_ms", "{:.0f}"), "over": "against", "overhead": ("overhead", "{:+.1%}"),
        "kept MB": ("saved_bytes", "{:.0f}", 1e6), "peak MB": ("peak_bytes", "{:.0f}", 1e6)})
