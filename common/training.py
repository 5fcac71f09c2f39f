"""What the scripts that train share: the optimizers and their state, the learning rate, sums over processes, and how a run is continued.

    optimizers = make_optimizers(model, lr, weight_decay)  # AdamW on whatever wants a gradient; or muon.py's for the matrices of the blocks
    set_rate(optimizers, learning_rate(step, args))        # warm-up, then half a cosine
    tensors = optimizer_tensors(model, optimizers)         # by the names of the parameters; restore_optimizers puts them back
"""
import math
import os
from pathlib import Path

import torch
import torch.distributed as dist

from beyond.muon import Muon
from common.cli import InputError, move_aside, say
from common.processes import rank, world_size
from lowrank import LowRankLinear


def make_optimizers(model, lr, weight_decay, kind="adamw", b_rate=1.0, decay="factors", **place):
    """A list: AdamW alone, or for kind "muon" Muon for the matrices inside the blocks and AdamW for the rest (W^E, W^H, biases, norms), as is usual.

    Matrices decay, vectors do not; with decay "product" neither do the factors of layers (lowrank.decay_products is for them). b_rate: the
    learning rate of every B over that of the rest. AdamW's fused kernel reads and writes each number once.
    """
    groups, muons = {}, muon_matrices(model, kind)
    others = {p for layer in model.modules() if isinstance(layer, LowRankLinear) for p in (layer.A, layer.B)} if decay == "product" else set()
    for name, p in model.named_parameters():
        if p.requires_grad and not p.is_meta:  # what is on the meta device is another stage's
            decays = p.dim() >= 2 and p not in others
            key = p in muons, weight_decay * decays, b_rate if name.endswith(".B") else 1.0
            groups.setdefault(key, []).append(p)

    def of(muon):
        return [dict(params=params, weight_decay=wd, scale=scale) for (is_muon, wd, scale), params in groups.items() if is_muon == muon]
    optimizers = [torch.optim.AdamW(of(False), lr=lr, betas=(0.9, 0.95), fused=True)] if of(False) else []
    return optimizers + ([Muon(of(True), lr, **place)] if of(True) else [])


def set_rate(optimizers, rate):
    for group in (g for o in optimizers for g in o.param_groups):
        group["lr"] = rate * group["scale"]


def step_all(optimizers):
    """One step of each, and their gradients are zero again: the next pass adds into the same memory."""
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def muon_matrices(model, kind):
    return {p for p in model.blocks.parameters() if p.dim() == 2 and p.requires_grad} if kind == "muon" else set()


def moment_bytes(model, kind):
    """Bytes of the optimizers' state for each number that learns, on average: AdamW keeps two moments in 32 bit, Muon one."""
    learn, muons = sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in muon_matrices(model, kind))
    return 8 - 4 * muons / max(1, learn)


def learning_rate(step, args):
    """Linear warm-up, then half a cosine down to a tenth."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.max_iters - args.warmup)
    return args.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1, progress))))


def optimizer_tensors(model, optimizers):
    """The optimizers' state by the names of the parameters, which outlive their order."""
    names = {p: name for name, p in model.named_parameters()}
    return {f"{names[p]}#{key}": value for o in optimizers for p, state in o.state.items() for key, value in state.items()}


def restore_optimizers(model, optimizers, tensors, place=lambda value, p: value.to(p.device)):
    """place(value, p): what of a saved tensor belongs beside the parameter p; of a sharded model, this process's part."""
    parameters = dict(model.named_parameters())
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for key, value in tensors.items():
        name, part = key.rsplit("#", 1)
        p = parameters[name]
        if not p.is_meta:
            owner[p].state[p][part] = place(value, p)


def not_finite(what, args, step, saved_at):
    return InputError(f"{what} at step {step}: the run stops, {args.out_dir}/state keeps step {saved_at}. "
                      f"A smaller --lr than {args.lr:g}, or a longer --warmup, usually helps")


def refuse_to_save(parameters, device, args, step, saved_at):
    """Raise, in all processes, where a parameter is not finite: such a state must not take the place of a good one."""
    bad = any(not torch.isfinite(p.to_local() if hasattr(p, "to_local") else p).all() for p in parameters if not p.is_meta)
    if all_reduce(torch.tensor(float(bad)), device, dist.ReduceOp.MAX):
        raise not_finite("some weights are not finite", args, step, saved_at)


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
        aside = move_aside(out)
        say(f"{out} held an earlier run: moved to {aside} (to go on with it: --resume --out-dir {aside})")


def restarted(out_dir):
    """Whether torchrun --max-restarts started this run again after a process was lost, and there is a state to go on from.

    On several machines, some count the restart and others just follow: it is one for all if it is one for any.
    """
    count = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
    if world_size() > 1:
        dist.all_reduce(count, dist.ReduceOp.MAX)
    return bool(count) and any((Path(out_dir) / name).exists() for name in ("state", "state.previous"))


def check_numbers(args, *names):
    """Of both scripts: what must be finite and not negative, and the seed, which torch wants in 64 bits."""
    for name in names:
        value = getattr(args, name)
        if not 0 <= value < math.inf:
            raise InputError(f"--{name.replace('_', '-')} must {'not be negative' if value < 0 else 'be a finite number'}, got {value}")
    if args.seed >= 1 << 62:
        raise InputError(f"--seed must be below 2^62, got {args.seed}")


def check_rows(state, rows, args):
    """A step of a run that goes on has as many rows as before, however they are divided among batches and processes."""
    if state and state.get("rows", rows) != rows:
        raise InputError(f"a step of the run that --resume continues has {state['rows']} rows, and {rows} with --batch-size {args.batch_size}, "
                         f"--grad-accum {args.grad_accum} and {world_size()} process{'es' * (world_size() > 1)}: change one of the three")


def already_done(step, last, out_dir):
    """Whether a resumed run has nothing left to do, and its summary is there: it is left as it is."""
    done = step >= last and (Path(out_dir) / "summary.json").exists()
    if done:
        say(f"{out_dir} has its {step} steps already (--max-iters or --stop-at beyond {step} go on)")
    return done


def restored_arguments(args, given, saved, fixed):
    """The saved run's arguments, with those that were given now where they may change: not those named in `fixed`."""
    for name in fixed:
        if name in given and getattr(args, name) != saved.get(name):  # None: an option that the run did not have yet
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} differs from the {saved.get(name)} of the run that --resume continues: "
                             f"leave it out, or start another run with another --out-dir")
    for name, value in saved.items():
        if name not in given and name not in ("resume", "stop_at", "out_dir", "trace", "shard"):
            setattr(args, name, value)
    return args
