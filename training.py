"""What the scripts that train share: the optimizer and its state, the learning rate, sums over processes, and how a run is continued.

    optimizer = make_optimizer(model, args)                # AdamW on whatever wants a gradient
    rate = learning_rate(step, args)                       # warm-up, then half a cosine
    tensors = optimizer_tensors(model, optimizer)          # by the names of the parameters; restore_optimizer puts them back
"""
import math
import os
from pathlib import Path

import torch
import torch.distributed as dist

from runtime import InputError, rank, say, world_size


def make_optimizer(model, args):
    """AdamW; matrices decay, vectors (biases, norms) do not. The fused kernel reads and writes each number once."""
    learn = [p for p in model.parameters() if p.requires_grad and not p.is_meta]  # what is on the meta device is another stage's
    groups = [dict(params=[p for p in learn if p.dim() >= 2], weight_decay=args.weight_decay),
              dict(params=[p for p in learn if p.dim() < 2], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step, args):
    """Linear warm-up, then half a cosine down to a tenth."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.max_iters - args.warmup)
    return args.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1, progress))))


def optimizer_tensors(model, optimizer):
    """The optimizer's state by the names of the parameters, which outlive their order."""
    return {f"{name}#{key}": value for name, p in model.named_parameters() for key, value in optimizer.state.get(p, {}).items()}


def restore_optimizer(model, optimizer, tensors, place=lambda value, p: value.to(p.device)):
    """place(value, p): what of a saved tensor belongs beside the parameter p; of a sharded model, this process's part."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        name, part = key.rsplit("#", 1)
        p = parameters[name]
        if not p.is_meta:
            optimizer.state[p][part] = place(value, p)


def all_reduce(tensor, device, op=dist.ReduceOp.SUM):
    """Sum (or max) over the processes, returned on the CPU."""
    if world_size() == 1:
        return tensor
    tensor = tensor.to(device.torch_device)
    dist.all_reduce(tensor, op)
    return tensor.cpu()


# ----------------------------------------------------------------------------- a run that goes on

def set_aside(out_dir):
    """An earlier run in the same folder is moved, not overwritten."""
    out = Path(out_dir)
    if rank() == 0 and ((out / "state").exists() or (out / "state.previous").exists() or (out / "summary.json").exists()):
        n = next(n for n in range(1, 10 ** 6) if not out.with_name(f"{out.name}-{n}").exists())
        os.replace(out, out.with_name(f"{out.name}-{n}"))
        say(f"{out} held an earlier run: moved to {out}-{n} (to go on with it: --resume --out-dir {out}-{n})")


def restarted(out_dir):
    """Whether torchrun --max-restarts started this run again after a process was lost, and there is a state to go on from.

    On several machines, some count the restart and others just follow: it is one for all if it is one for any.
    """
    count = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
    if world_size() > 1:
        dist.all_reduce(count, dist.ReduceOp.MAX)
    return bool(count) and any((Path(out_dir) / name).exists() for name in ("state", "state.previous"))


def restored_arguments(args, given, saved, fixed):
    """The saved run's arguments, with those that were given now where they may change: not those named in `fixed`."""
    for name in fixed:
        if name in given and getattr(args, name) != saved[name]:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} differs from the {saved[name]} of the run that --resume continues: "
                             f"leave it out, or start another run with another --out-dir")
    for name, value in saved.items():
        if name not in given and name not in ("resume", "stop_at", "out_dir", "trace", "shard"):
            setattr(args, name, value)
    return args
