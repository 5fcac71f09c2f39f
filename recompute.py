"""Backward passes by hand that recompute instead of store (section IV.B, "Recomputing technique", Table IV).

The backward pass needs intermediate variables of the forward pass. Autograd keeps them all, and for long
sequences they are most of a training step's memory. Each autograd.Function of this file keeps less, and
computes the rest a second time in its backward pass.

    --recompute  attention            kept of a block                   computed twice
    none         in plain operations  all, the T x T probabilities too  nothing
    sdpa         torch's fused one    all but the probabilities         q k^T and softmax, in torch's kernel
    attention    RecomputedAttention  all but the probabilities         q k^T and softmax
    block        torch's fused one    its input, nothing else           the block, except for W^D u

Every mode gives the gradients of the same function. The random state and autocast's state of the forward
pass are restored before anything is computed again, so that dropout drops the same elements both times.

torch.utils.checkpoint hooks into the tensors that autograd saves. Here a block's parameters are inputs of its
Function, which returns their gradients: for DistributedDataParallel and the pipeline it is an ordinary node.

    model = use_recompute(Transformer(config), "block")
    loss = head_loss(model.head, model.hidden(tokens), targets)  # in chunks: never all logits at once
    python train.py --recompute block;  python bench.py recompute
"""
import math
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from common.cli import refuse
from common.loss import compute_dtype
from lowrank import LowRankLinear
from model import Attention, Block, last_product

MODES = ("none", "sdpa", "attention", "block")

def use_recompute(model, mode):
    """Make every block of the model keep what `mode` says; in place, and any earlier mode is undone. RMSNorm
    keeps its input alone in every mode. Returns the model."""
    refuse(mode not in MODES, f"--recompute must be one of {', '.join(MODES)}, got {mode}")
    by_hand = {"none": materialized_attention, "attention": recomputed_attention}
    attend = by_hand.get(mode)  # sdpa and block: model.attend, which is torch's fused one
    for module in model.modules():
        if isinstance(module, Attention):
            _override(module, "attend", attend)
        elif isinstance(module, Block):
            _override(module, "forward", partial(recomputed_block, module) if mode == "block" else None)
        elif isinstance(module, nn.RMSNorm):
            _override(module, "forward", partial(norm_forward, module))
    return model

def _override(module, name, function):
    """Let this one module use `function` for its attribute `name`; None: that of its class again."""
    module.__dict__.pop(name, None)
    if function is not None:
        module.__dict__[name] = function

class State:
    """What a result depends on besides its inputs: the random states, and whether autocast is on."""

    def __init__(self, x):
        self.random, self.of_devices = torch.get_rng_state(), get_device_states(x)  # the CPU's, a GPU's
        self.kind = x.device.type
        self.autocast = dict(enabled=torch.is_autocast_enabled(self.kind),
                             dtype=torch.get_autocast_dtype(self.kind))

    @contextmanager
    def restored(self):
        with torch.random.fork_rng(self.of_devices[0]), self.uncached_autocast():
            torch.set_rng_state(self.random)
            set_device_states(*self.of_devices)
            yield

    def uncached_autocast(self):
        """Autocast, without its cache of 16-bit copies of weights: a copy made without a graph and used again
        in the backward pass would cut off the weight's gradient."""
        return torch.autocast(self.kind, **self.autocast, cache_enabled=False)

# ----------------------------------------------------------------------------- a whole block
#
#     forward    x --[ norm1, attention, norm2, feed-forward; without a graph ]--> y     kept: x
#
#     backward   x --[ the same again, now with a graph ]--> y   <-- dy               working set: one block
#                |______________ autograd, here ______________|
#                       dx, and the gradient of each weight
#
# The paper counts one more forward pass, a third of the time of forward and backward. The last product of a
# block can be left out of it: in y = x + W^D u, the gradient of u needs dy and W^D, but never y. In GPT-2
# that is a third of the block's products; of low rank, where only the one with B is left out, a sixteenth.

class RecomputedBlock(torch.autograd.Function):
    """y = run(x), keeping x alone. parameters: of run, that want a gradient. last: its last layer, W^D."""

    @staticmethod
    def forward(ctx, run, last, x, *parameters):
        ctx.run, ctx.last, ctx.state = run, last, State(x)
        ctx.save_for_backward(x, *parameters)
        with ctx.state.uncached_autocast():
            return run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, *parameters = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad(), ctx.state.restored(), without_product(ctx.last):
            y = ctx.run(x)
        return None, None, *torch.autograd.grad(y, (x, *parameters), dy, allow_unused=True)

def recomputed_block(block, x, rope=None, cache=None, mask=None):
    """Block.forward, through RecomputedBlock where a gradient will be asked for."""
    def run(x):
        return type(block).forward(block, x, rope, cache, mask)
    trainable = [p for p in block.parameters() if p.requires_grad]
    if cache is not None or not torch.is_grad_enabled() or not (x.requires_grad or trainable):
        return run(x)
    return RecomputedBlock.apply(run, block.mlp.down, x, *trainable)

@contextmanager
def without_product(layer):
    """Inside, a dense or low-rank layer(u) gives zeros, and the backward pass of layer(u) all the same."""
    if type(layer) not in (nn.Linear, LowRankLinear) or "forward" in layer.__dict__ or layer._forward_hooks:
        yield
        return

    def forward(u):
        h, W = last_product(layer, u, compute_dtype(u))
        return GradientOfLinear.apply(h, W, layer.bias)
    _override(layer, "forward", forward)
    try:
        yield
    finally:
        _override(layer, "forward", None)

class GradientOfLinear(torch.autograd.Function):
    """Zeros in the shape of y = u W^T + b, and the gradients of y. u (..., in), W (out, in), b (out)."""

    @staticmethod
    def forward(ctx, u, W, b):
        ctx.dtype = compute_dtype(u)
        ctx.save_for_backward(u.to(ctx.dtype), W)
        return u.new_zeros((), dtype=ctx.dtype).expand(*u.shape[:-1], len(W))  # one zero in memory

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        u, W = ctx.saved_tensors
        want_u, want_W, want_b = ctx.needs_input_grad
        d = dy.flatten(0, -2).to(ctx.dtype)  # (N, out)
        du = (d @ W.to(ctx.dtype)).view(u.shape) if want_u else None  # (N, out) (out, in)
        dW = (d.T @ u.flatten(0, -2)).to(W.dtype) if want_W else None  # (out, N) (N, in)
        db = d.sum(0).to(W.dtype) if want_b else None
        return du, dW, db

# ----------------------------------------------------------------------------- attention
#
#     none        q, k --> q k^T / sqrt(d) + mask --softmax--> p --dropout--> p' --> p' v = y
#                 kept: q, k, v and, T x T for each head, p and p'
#
#     attention   the same, but kept: q, k, v. Backward, 256 queries at a time, so that nothing is T x T:
#
#                     q, k --> p --> p' (again)       dv += p'^T dy      ds = p * (dp - sum(p * dp))
#                     dy, v --> dp' = dy v^T --> dp   dk += ds^T q / sqrt(d)     dq = ds k / sqrt(d)
#
#                 Queries i..j see no key beyond j: keys j.. are skipped, nearly half of the products.
#
# Up to 256 tokens both do the same operations in the same order, and so agree bit for bit; beyond, to
# rounding. Below, of one sequence with T queries and S keys: q is (h, T, d), k and v are (h_kv, S, d), mask
# (T, S) is True where a query may look (None: causal). `rows` and `keys` are slices: m queries, their keys.

QUERIES = 256  # large enough for efficient products, small enough for scores that stay in a CPU's cache

def query_blocks(q, k, mask):
    """The pairs (rows, keys)."""
    T, S = q.shape[1], k.shape[1]
    for i in range(0, T, QUERIES):
        j = min(i + QUERIES, T)
        yield slice(i, j), slice(0, S - T + j if mask is None else S)

def probabilities(q, k, rows, keys, mask):
    """softmax(q k^T / sqrt(d) + mask) of a block: (h_kv, g m, S) where g = h / h_kv heads share a key."""
    m, S = rows.stop - rows.start, keys.stop
    causal = torch.ones(m, S, dtype=torch.bool, device=q.device).tril(S - m)  # the last query sees all S keys
    visible = causal if mask is None else mask[rows, keys]
    bias = q.new_zeros(m, S).masked_fill_(~visible, -math.inf)  # (m, S)
    bias = bias.repeat(len(q) // len(k), 1).expand(len(k), -1, -1)
    q = q[:, rows].reshape(len(k), -1, q.shape[-1])  # (h_kv, g m, d)
    with torch.autocast(q.device.type, enabled=False):  # it would keep the probabilities in 32 bit
        return torch.softmax(torch.baddbmm(bias, q, k[:, keys].mT, alpha=1 / math.sqrt(q.shape[-1])), -1)

def draw_keep_mask(q, rows, keys, dropout):
    """(h, m, S), True with probability 1 - dropout: which probabilities stay."""
    mask = torch.empty(len(q), rows.stop - rows.start, keys.stop, dtype=torch.bool, device=q.device)
    return mask.bernoulli_(1 - dropout)

def by_sequence(attend):
    """model.attend from a function of one sequence: without a mask, the heads of all sequences are taken for
    those of one, in fewer and larger products; with masks, one sequence after the other."""
    def attend_all(q, k, v, mask=None, dropout=0.0):
        if mask is None:
            return attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), None, dropout).view(q.shape)
        masks = mask[:, 0].expand(len(q), -1, -1)
        return torch.stack([attend(*parts, dropout) for parts in zip(q, k, v, masks)])  # (B, h, T, d)
    return attend_all

@by_sequence
def materialized_attention(q, k, v, mask, dropout):
    """In plain operations: autograd keeps the probabilities."""
    T, S = q.shape[1], k.shape[1]
    p = probabilities(q, k, slice(0, T), slice(0, S), mask)  # (h_kv, g T, S)
    if dropout:
        keep = torch.zeros(len(q), T, S, dtype=torch.bool, device=q.device)
        for rows, keys in query_blocks(q, k, mask):  # drawn as below, so that both modes drop the same
            keep[:, rows, keys] = draw_keep_mask(q, rows, keys, dropout)
        p = p * keep.view(p.shape) * (1 / (1 - dropout))
    return (p @ v).view(q.shape)

class RecomputedAttention(torch.autograd.Function):
    """y = softmax(q k^T / sqrt(d) + mask) v, keeping q, k and v."""

    @staticmethod
    def forward(ctx, q, k, v, mask, dropout):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # once, not for every product
        ctx.save_for_backward(q, k, v)
        ctx.mask, ctx.dropout, ctx.state = mask, dropout, State(q) if dropout else None
        y = torch.empty_like(q)
        for rows, keys in query_blocks(q, k, mask):
            p = probabilities(q, k, rows, keys, mask)
            if dropout:
                keep = draw_keep_mask(q, rows, keys, dropout).view(p.shape)
                p.mul_(keep).mul_(1 / (1 - dropout))
            y[:, rows] = (p @ v[:, keys]).view_as(y[:, rows])  # (h_kv, g m, S) (h_kv, S, d)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        scale, rescale = 1 / math.sqrt(q.shape[-1]), 1 / (1 - ctx.dropout)
        with ctx.state.restored() if ctx.dropout else nullcontext():
            for rows, keys in query_blocks(q, k, ctx.mask):
                p = probabilities(q, k, rows, keys, ctx.mask)
                qb = q[:, rows].reshape(len(k), -1, q.shape[-1])    # (h_kv, g m, d)
                dyb = dy[:, rows].reshape(len(k), -1, q.shape[-1])
                dropped, dp = p, dyb @ v[:, keys].mT                # (h_kv, g m, S)
                if ctx.dropout:
                    keep = draw_keep_mask(q, rows, keys, ctx.dropout).view(p.shape)
                    dropped = (p * keep).mul_(rescale)
                    dp.mul_(rescale).mul_(keep)
                dv[:, keys] += dropped.mT @ dyb
                ds = torch._softmax_backward_data(dp, p, -1, p.dtype)  # p * (dp - sum(p * dp)) in one pass
                dq[:, rows] = (ds @ k[:, keys]).mul_(scale).view_as(dq[:, rows])
                dk[:, keys] += (qb.mT @ ds).mT.mul_(scale)
        return dq, dk, dv, None, None

recomputed_attention = by_sequence(RecomputedAttention.apply)

# ----------------------------------------------------------------------------- RMSNorm
#
#     y = n w,  n = x / sqrt(mean(x^2) + eps)        kept: x
#     dw = sum of dy n over all tokens
#     dx = (g - n mean(g n)) / sqrt(mean(x^2) + eps)  with g = dy w
#
# A GPU's fused kernel does the same. On a CPU torch computes it in plain operations, of which autograd keeps
# two 32-bit copies of x: a third of Llama's activations where these have 16 bits. So every mode uses it.

class RecomputedNorm(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) w, keeping x alone. x (..., C), w (C)."""

    @staticmethod
    def forward(ctx, x, w, eps):
        ctx.eps = eps
        ctx.save_for_backward(x, w)
        return F.rms_norm(x, w.shape, w, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        n = x.to(wide)
        scale = n.square().mean(-1, keepdim=True).add_(ctx.eps).rsqrt_()  # (..., 1)
        n = n * scale  # (..., C)
        dw = (dy * n).flatten(0, -2).sum(0).to(w.dtype) if ctx.needs_input_grad[1] else None
        g = dy * w.to(wide)
        return (g - n * (g * n).mean(-1, keepdim=True)).mul_(scale).to(x.dtype), dw, None

def norm_forward(norm, x):
    """RMSNorm.forward, through RecomputedNorm where autograd would see plain operations."""
    if x.is_cuda or not torch.is_grad_enabled():
        return type(norm).forward(norm, x)
    return RecomputedNorm.apply(x, norm.weight, norm.eps)
