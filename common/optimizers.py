"""The optimizers of a run, their learning rate, and their state under the names of the parameters."""
import math

import torch

from common.processes import own_part

def make_optimizers(model, lr, weight_decay, kind="adamw"):
    """A list of optimizers: AdamW alone; or for kind "muon" beyond/muon.py's for the matrices of the blocks
    and AdamW for the rest (embedding, head, biases, norms), as is usual. Matrices decay, vectors do not."""
    own = [p for p in model.parameters() if p.requires_grad and not p.is_meta]  # meta: of another stage
    by_muon = {p for p in model.blocks.parameters() if p.dim() == 2} if kind == "muon" else set()
    orthogonal = [p for p in own if p in by_muon]  # none in a pipeline's stage without blocks
    matrices = [p for p in own if p.dim() > 1 and p not in by_muon]
    vectors = [p for p in own if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]
    # the fused kernel reads and writes each number once
    optimizers = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)]
    if orthogonal:
        from beyond.muon import Muon
        optimizers.append(Muon(orthogonal, lr, weight_decay))
    return optimizers

def learning_rate(step, args):
    """Linear warm-up in args.warmup steps, at most a tenth of all; half a cosine from args.lr to a tenth."""
    warmup = min(args.warmup, args.max_iters // 10)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, args.max_iters - warmup)
    return args.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1, progress))))

def step_all(optimizers, rate):
    """One step of each at this learning rate, and away with the gradients."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()

def moments_of(model, optimizers):
    """The optimizers' state: "name of the parameter#name of the value" -> tensor."""
    names = {p: name for name, p in model.named_parameters()}
    return {f"{names[p]}#{key}": value for optimizer in optimizers
            for p, values in optimizer.state.items() for key, value in values.items()}

def restore_moments(model, optimizers, moments):
    """Put back what moments_of gave, as whole tensors."""
    parameters = dict(model.named_parameters())
    for optimizer in optimizers:
        own = {p for group in optimizer.param_groups for p in group["params"]}
        for key, value in moments.items():
            name, part = key.rsplit("#", 1)
            p = parameters.get(name)
            if p in own:
                optimizer.state[p][part] = own_part(value, p)
