"""Pipelines whose backward pass comes in two parts (Qi et al. 2401.10241; V-shaped: 2405.15362).

The stage before waits for the gradient of x alone, B; that of the weights, W, can fill a bubble later. For
y = x W^T with the gradient g of y, B is g W and W is g^T x: half of a backward pass each.

              zb-h1, N = 4, M = 4: bubble N - 1 clocks, of 1F1B's 3 (N - 1)

    clock   0  1  2  3  4  5  6  7  8  9  10 11 12 13 14
    stage 0 F0 F1 F2 F3 .  .  .  B0 W0 B1 W1 B2 W2 B3 W3
    stage 1 .  F0 F1 F2 .  .  B0 F3 B1 W0 B2 W1 B3 W2 W3
    stage 2 .  .  F0 F1 .  B0 F2 B1 F3 B2 W0 B3 W1 W2 W3
    stage 3 .  .  .  F0 B0 F1 B1 F2 B2 F3 B3 W0 W1 W2 W3

zb-h1 is 1F1B with W of microbatch m - s after B of microbatch m in stage s; N microbatches are held at most.
zb-v has two stages in each process, the first and the last of 2N in process 0: a microbatch comes back to
where it began. A process has work from both ends, and the bubble is half of zb-h1's. All this counts steps of
the same length; a process with a large head, whose loss makes its gradients in F already, gains less.

The price is memory: from B to W a layer keeps x and g, where autograd is done with both after B.

    python pipeline.py --schedule zb-v --stages 2 --microbatches 4
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from pipeline import balance, input_of, process_of

def v_shaped(processes, microbatches):
    """Each process's steps in zb-v. At each clock a process takes what is ready: B before F before W, and of
    these the later stage. It holds at most 2N microbatches of its half-size stages, as much as 1F1B's first
    process; F of its first stage must leave one of these places to its second."""
    N, stages = processes, 2 * processes
    lists, ended = [[] for _ in range(N)], {None}
    todo = {(kind, s): 0 for kind in "BFW" for s in reversed(range(stages))}  # the next microbatch of each
    while len(ended) <= 3 * stages * microbatches:
        taken = []
        for p, steps in enumerate(lists):
            held = sum(todo["F", s] - todo["W", s] for s in (p, stages - 1 - p))
            for (kind, s), m in todo.items():
                room = kind != "F" or held < stages - (s < N)
                mine = process_of(s, N) == p and m < microbatches
                if mine and room and input_of(kind, m, s, stages) in ended:
                    steps.append((kind, m, s))
                    taken.append((kind, m, s))
                    break
        for kind, m, s in taken:
            todo[kind, s] = m + 1
        ended.update(taken)
    return lists

def pieces_of_v(costs, processes):
    """The pieces of each stage, so that the costliest process costs least: a piece goes where the one as far
    from the other end goes, and pairs are cut as pipeline.balance cuts pieces."""
    n, half = len(costs), (len(costs) + 1) // 2
    pairs = [costs[i] + (costs[n - 1 - i] if i < n // 2 else 0) for i in range(half)]
    first = balance(pairs, processes)
    return first + [range(max(half, n - own.stop), n - own.start) for own in reversed(first)]

class WeightsLater(TorchFunctionMode):
    """Inside, the backward pass of F.linear gives the gradient of x; run() adds those of the weights."""

    def __init__(self):
        super().__init__()
        self.later = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and not kwargs and args[0].requires_grad and torch.is_grad_enabled():
            return GradientOfX.apply(args[0], args[1:], self.later)
        return function(*args, **(kwargs or {}))

    def run(self):
        for add in self.later:
            add()

class GradientOfX(torch.autograd.Function):
    """x W^T + bias, of which autograd sees x alone. weights: W (out, in), and bias (out) or None."""

    @staticmethod
    def forward(ctx, x, weights, later):
        y = F.linear(x, *weights)
        ctx.save_for_backward(x.to(y.dtype))  # autocast multiplied it in y's dtype
        ctx.weights, ctx.later, ctx.dtype = weights, later, x.dtype
        return y

    @staticmethod
    def backward(ctx, g):
        x, = ctx.saved_tensors
        if any(w is not None and w.requires_grad for w in ctx.weights):
            ctx.later.append(partial(add_gradients, g, x, *ctx.weights))
        return (g @ ctx.weights[0].to(g.dtype)).to(ctx.dtype), None, None

def add_gradients(g, x, W, bias=None):
    """Into W.grad and bias.grad, from g (..., out) and x (..., in). A W that was rounded for this forward
    pass (quantization-aware training) hands its gradient on."""
    g, x = g.flatten(0, -2), x.flatten(0, -2)
    if W.requires_grad:
        torch.autograd.backward(W, (g.T @ x).to(W.dtype))
    if bias is not None and bias.requires_grad:
        torch.autograd.backward(bias, g.sum(0).to(bias.dtype))
