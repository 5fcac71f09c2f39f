"""The optimizers of a run, their learning rate, and their state under the names of the parameters.

    optimizers = make_optimizers(model, lr, weight_decay, "adamw")
    set_rate(optimizers, learning_rate(step, args))      # warm-up, then half a cosine
    step_all(optimizers)
    moments = moments_of(model, optimizers)              # for a checkpoint; restore_moments puts them back
"""
import math

import torch


def make_optimizers(model, lr, weight_decay, kind="adamw", own_part=None):
    """A list of optimizers: AdamW alone; or for kind "muon" beyond/muon.py's for the matrices of the blocks
    and AdamW for the rest (embedding, head, biases, norms), as is usual. Matrices decay, vectors do not.

    own_part(update, parameter): of a sharded model (processes.py), the part of a whole update that this
    process keeps.
    """
    muon_matrices = set()
    if kind == "muon":
        muon_matrices = {p for p in model.blocks.parameters() if p.dim() == 2 and p.requires_grad}
    groups = {}
    for p in model.parameters():
        if p.requires_grad and not p.is_meta:  # what is on the meta device belongs to another pipeline stage
            key = p in muon_matrices, weight_decay if p.dim() >= 2 else 0.0
            groups.setdefault(key, []).append(p)
    adamw = [dict(params=params, weight_decay=decay)
             for (by_muon, decay), params in groups.items() if not by_muon]
    muon = [dict(params=params, weight_decay=decay) for (by_muon, decay), params in groups.items() if by_muon]
    optimizers = []
    if adamw:  # the fused kernel reads and writes each number once
        optimizers.append(torch.optim.AdamW(adamw, lr=lr, betas=(0.9, 0.95), fused=True))
    if muon:
        from beyond.muon import Muon
        optimizers.append(Muon(muon, lr, own_part=own_part))
    return optimizers


def learning_rate(step, args):
    """Linear warm-up to args.lr over args.warmup steps, then half a cosine down to a tenth of it at
    args.max_iters."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.max_iters - args.warmup)
    return args.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1, progress))))


def set_rate(optimizers, rate):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def step_all(optimizers):
    """One step of each; then their gradients are zero, and the next backward pass adds into the same memory.
    """
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def moments_of(model, optimizers):
    """The optimizers' state: "name of the parameter#name of the value" -> tensor."""
    names = {p: name for name, p in model.named_parameters()}
    moments = {}
    for optimizer in optimizers:
        for p, values in optimizer.state.items():
            for key, value in values.items():
                moments[f"{names[p]}#{key}"] = value
    return moments


def restore_moments(model, optimizers, moments, own_part):
    """Put back what moments_of gave. own_part(value, parameter): what of a whole tensor belongs beside a
    parameter."""
    parameters = dict(model.named_parameters())
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups
             for p in group["params"]}
    for key, value in moments.items():
        name, part = key.rsplit("#", 1)
        p = parameters.get(name)
        if p in owner:
            owner[p].state[p][part] = own_part(value, p)
