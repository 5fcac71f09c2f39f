"""Backward passes by hand that recompute instead of store (section IV.B of the paper, "Recomputing technique", and Table IV).

The backward pass needs intermediate variables of the forward pass. Autograd keeps them all, and for long sequences they are most
of a training step's memory. Each autograd.Function of this file keeps less, and computes the rest a second time in its backward pass.

    --recompute   attention            kept of a block                          computed twice
    none          materialized         all, the T x T probabilities too         nothing
    sdpa          torch's fused one    all but the probabilities                q k^T and the softmax, inside torch's kernel
    lowrank       the same             the same, less A x of each y = B A x     A x: in / (in + out) of a low-rank layer's forward products
    attention     RecomputedAttention  all but the probabilities                q k^T and the softmax
    block         torch's fused one    its input, nothing else                  the block, but for its last product

Every mode gives the gradients of the same function: the random state and autocast's state of the forward pass are restored, so
that dropout drops the same. `recomputed` counts what was computed twice.

Unlike torch.utils.checkpoint, a block's parameters are inputs of its Function and their gradients are returned from it, so whatever
watches the graph (DistributedDataParallel, the pipeline) sees an ordinary node; and nothing hooks into autograd's saved tensors.

    model = use_recompute(Transformer(config), "block")
    loss = head_loss(model.head, model.hidden(tokens), targets)  # in chunks: the logits are never all there
    python train.py --recompute block;  python bench.py recompute
"""
import math
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import partial, wraps

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from common.cli import InputError
from common.loss import compute_dtype
from lowrank import LowRankLinear
from model import Attention, Block

MODES = ("none", "sdpa", "lowrank", "attention", "block")
recomputed = Counter()  # what was computed a second time, and how often


def use_recompute(model, mode):
    """Make every block of the model keep what `mode` says; in place, and any earlier mode is undone. Returns the model."""
    if mode not in MODES:
        raise InputError(f"--recompute must be one of {', '.join(MODES)}, got {mode}")
    attend = {"none": materialized_attention, "attention": recomputed_attention}.get(mode)
    for module in model.modules():
        if isinstance(module, Attention):
            _override(module, "attend", attend)
        elif isinstance(module, Block):
            _override(module, "forward", partial(recomputed_block, module) if mode == "block" else None)
        elif isinstance(module, LowRankLinear) and module is not getattr(model, "head", None):
            _override(module, "forward", partial(lowrank_forward, module) if mode == "lowrank" else None)
        elif isinstance(module, nn.RMSNorm):
            _override(module, "forward", partial(norm_forward, module))
    return model


def _override(module, name, function):
    """Let this one module use `function` for its attribute `name`, or its class's own again (None). What another file put there stays."""
    there = module.__dict__.get(name)
    if there is None or getattr(there, "func", there).__module__ == __name__:
        module.__dict__.pop(name, None)
        if function is not None:
            module.__dict__[name] = function


class State:
    """What the result of a computation depends on besides its inputs: the random states, and whether autocast is on."""

    def __init__(self, x):
        self.device, self.kind = x.device, x.device.type
        self.random = torch.get_rng_state()
        self.cuda_random = torch.cuda.get_rng_state(x.device) if self.kind == "cuda" else None
        self.autocast = {"enabled": torch.is_autocast_enabled(self.kind), "dtype": torch.get_autocast_dtype(self.kind)}

    @contextmanager
    def restored(self):
        with torch.random.fork_rng([self.device] if self.kind == "cuda" else []), self.uncached_autocast():
            torch.set_rng_state(self.random)
            if self.kind == "cuda":
                torch.cuda.set_rng_state(self.cuda_random, self.device)
            yield

    def uncached_autocast(self):
        """Autocast remembers the 16-bit copy of a weight. One that was made without a graph must not turn up where gradients are wanted."""
        return torch.autocast(self.kind, **self.autocast, cache_enabled=False)


# ----------------------------------------------------------------------------- a whole block
#
#     forward    x --[ norm1, attention, norm2, feed-forward; without a graph ]--> y        kept: x
#
#     backward   x --[ the same again, now with a graph ]--> y     <-- dy                   working set: one block
#                |______________ autograd, here ______________|
#                       dx, and the gradient of each weight
#
# The paper counts one more forward pass, a third of the step. The last product of a block, W^D u, can be left out of it: a sum's
# gradient does not depend on its terms, so nobody asks for y again. In GPT-2 that is a third of the block's products.


class RecomputedBlock(torch.autograd.Function):
    """y = run(x), keeping x alone. `parameters` are those that run uses and that want a gradient; the product of layer `last` ends run."""

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
        x = x.detach().requires_grad_(ctx.needs_input_grad[2])
        with torch.enable_grad(), ctx.state.restored(), without_product(ctx.last):
            y = ctx.run(x)
        recomputed["block"] += 1
        wanted = ([x] if x.requires_grad else []) + parameters
        gradients = torch.autograd.grad(y, wanted, dy, allow_unused=True)
        return None, None, *(() if x.requires_grad else (None,)), *gradients


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
    """Inside, layer(u) gives zeros in place of its product, with the product's gradient. Layers that this file does not know stay as they are."""
    if type(layer) not in (nn.Linear, LowRankLinear) or "forward" in layer.__dict__ or layer._forward_hooks:
        yield
        return

    def forward(u):
        u, W = (u, layer.weight) if type(layer) is nn.Linear else (F.linear(u, layer.A), layer.B)
        return GradientOfLinear.apply(u, W, layer.bias)
    _override(layer, "forward", forward)
    try:
        yield
    finally:
        _override(layer, "forward", None)


class GradientOfLinear(torch.autograd.Function):
    """Zeros in the shape of y = u W^T + b, and the gradients of y."""

    @staticmethod
    def forward(ctx, u, W, b):
        ctx.dtype = compute_dtype(u)
        ctx.save_for_backward(u.to(ctx.dtype), W)
        return u.new_zeros((), dtype=ctx.dtype).expand(*u.shape[:-1], len(W))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        u, W = ctx.saved_tensors
        return linear_gradients(dy, u, W, ctx.needs_input_grad, ctx.dtype)


def linear_gradients(dy, u, W, wanted, dtype):
    """Gradients of y = u W^T + b for u (..., in), W (out, in), b (out), those that are wanted; products in dtype."""
    d = dy.flatten(0, -2).to(dtype)  # (N, out)
    du = (d @ W.to(dtype)).view(u.shape) if wanted[0] else None  # (N, out) (out, in)
    dW = (d.T @ u.flatten(0, -2)).to(W.dtype) if wanted[1] else None  # (out, N) (N, in)
    return du, dW, d.sum(0).to(W.dtype) if wanted[2] else None


# ----------------------------------------------------------------------------- attention
#
#     none        q, k --> q k^T / sqrt(d) + bias --softmax--> p --dropout--> p' --> p' v = y          kept: q, k, v, p, p'
#                                                              (T x T for each head)
#
#     attention   the same, but kept: q, k, v. Backward, for 256 queries at a time, so that the working set is no T x T:
#
#                     q, k --> p --> p' (again)         dv += p'^T dy        ds = p * (dp - sum(p * dp))    [the softmax]
#                     dy, v --> dp' = dy v^T --> dp                          dq = ds k / sqrt(d);  dk += ds^T q / sqrt(d)
#
#                 Queries i..j see no key beyond j: keys j.. are skipped, which saves nearly half of the products for long sequences.
#
# Up to 256 tokens both do the same operations in the same order, and so agree bit for bit; beyond, to rounding.

QUERIES = 256  # large enough for efficient products, small enough for scores that stay in a cache


def bias_of(q, i, j, end, mask=None):
    """What is added to the scores of queries i..j and keys 0..end: 0 where they may look, else minus infinity; (1 or B, j - i, end)."""
    if mask is None and q.shape[2] > 1:
        return torch.full((1, j - i, end), -math.inf, dtype=q.dtype, device=q.device).triu(i + 1)
    bias = torch.zeros(1 if mask is None else len(mask), j - i, end, dtype=q.dtype, device=q.device)
    return bias if mask is None else bias.masked_fill_(~mask[:, 0, i:j, :end], -math.inf)


def probabilities(q, k, bias):
    """softmax(q k^T / sqrt(d) + bias). q (h, m, d), k (h_kv, S, d), bias (m, S) -> (h_kv, h / h_kv * m, S): query heads share a key head."""
    group = len(q) // len(k)
    q = q.reshape(len(k), -1, q.shape[-1])  # (h_kv, group m, d)
    bias = bias.repeat(group, 1).expand(len(k), -1, -1)  # (h_kv, group m, S)
    with torch.autocast(q.device.type, enabled=False):  # which would keep the probabilities in 32 bit; the softmax itself sums in 32 bit anyway
        return torch.softmax(torch.baddbmm(bias, q, k.mT, alpha=1 / math.sqrt(q.shape[-1])), -1)


def stays(p, rows, keys, dropout):
    """Which of p's (h, queries, keys) stay, drawn anew: True with probability 1 - dropout."""
    return torch.empty(len(p), rows, keys, dtype=torch.bool, device=p.device).bernoulli_(1 - dropout)


def one_by_one(attend):
    """On a CPU a sequence at a time: q, k, v are multiplied where they lie, without a copy. On a GPU, where many small kernels would wait
    for each other, all heads of all sequences at once."""
    @wraps(attend)
    def attend_all(q, k, v, mask=None, dropout=0.0):
        if mask is None and q.is_cuda:
            return attend(*(t.flatten(0, 1)[None] for t in (q, k, v)), None, dropout).view(q.shape)
        return attend(q, k, v, mask, dropout)
    return attend_all


@one_by_one
def materialized_attention(q, k, v, mask=None, dropout=0.0):
    """model.attend in plain operations: autograd keeps the probabilities."""
    T, S, ys = q.shape[2], k.shape[2], []
    bias = bias_of(q, 0, T, S, mask)
    for b in range(len(q)):
        p = probabilities(q[b], k[b], bias[b if len(bias) > 1 else 0])  # (h_kv, h / h_kv * T, S)
        if dropout:
            kept = torch.zeros(q.shape[1], T, S, dtype=torch.bool, device=q.device)
            for rows, keys in _blocks(T, S, mask):  # drawn as below, so that both modes drop the same
                kept[:, rows, keys] = stays(q[b], rows.stop - rows.start, keys.stop, dropout)
            p = p * kept.view(p.shape) * (1 / (1 - dropout))
        ys.append((p @ v[b]).view(q.shape[1:]))
    return torch.stack(ys)  # (B, h, T, d)


class RecomputedAttention(torch.autograd.Function):
    """y = softmax(q k^T / sqrt(d) + bias) v, keeping q, k and v. q (B, h, T, d); k, v (B, h_kv, S, d)."""

    @staticmethod
    def forward(ctx, q, k, v, mask, dropout):
        ctx.save_for_backward(q, k, v)
        ctx.mask, ctx.dropout, ctx.state = mask, dropout, State(q) if dropout else None
        y = _heads_inside(q)
        for b in range(len(q)):
            for rows, keys in _blocks(q.shape[2], k.shape[2], mask):
                p, kept = RecomputedAttention.scores(ctx, q, k, b, rows, keys)
                y[b, :, rows] = ((p if kept is None else p.mul_(kept).mul_(1 / (1 - dropout))) @ v[b, :, keys]).view(y[b, :, rows].shape)
        return y

    @staticmethod
    def scores(ctx, q, k, b, rows, keys):
        """The probabilities of one block, (h_kv, h / h_kv * m, S), and which of them dropout lets stay."""
        bias = bias_of(q, rows.start, rows.stop, keys.stop, ctx.mask)
        p = probabilities(q[b, :, rows], k[b, :, keys], bias[b if len(bias) > 1 else 0])
        return p, stays(q[b], rows.stop - rows.start, keys.stop, ctx.dropout).view(p.shape) if ctx.dropout else None

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v = ctx.saved_tensors
        scale, dq, dk, dv = 1 / math.sqrt(q.shape[-1]), _heads_inside(q), _heads_inside(k), _heads_inside(v)
        recomputed["attention"] += 1
        with ctx.state.restored() if ctx.dropout else nullcontext():
            for b in range(len(q)):
                for rows, keys in _blocks(q.shape[2], k.shape[2], ctx.mask):
                    p, kept = RecomputedAttention.scores(ctx, q, k, b, rows, keys)
                    kb, vb = k[b, :, keys], v[b, :, keys]  # (h_kv, S, d)
                    qb, g = (t[b, :, rows].reshape(len(kb), -1, t.shape[-1]) for t in (q, dy))  # (h_kv, h / h_kv * m, d)
                    dp = g @ vb.mT
                    if kept is None:
                        dv[b, :, keys] += p.mT @ g
                    else:
                        dv[b, :, keys] += (p * kept).mul_(1 / (1 - ctx.dropout)).mT @ g
                        dp.mul_(1 / (1 - ctx.dropout)).mul_(kept)
                    ds = torch._softmax_backward_data(dp, p, -1, p.dtype)  # p * (dp - sum(p * dp)) in one pass
                    dq[b, :, rows] = (ds @ kb).mul_(scale).view(dq[b, :, rows].shape)
                    dk[b, :, keys] += (qb.mT @ ds).mT.mul_(scale)
        return dq, dk, dv, None, None


def _blocks(T, S, mask):
    """Slices: the blocks of queries, and for each the keys that they may see."""
    for i in range(0, T, QUERIES):
        j = min(i + QUERIES, T)
        yield slice(i, j), slice(0, j if mask is None and T > 1 else S)


def _heads_inside(x):
    """Zeros (B, h, T, d) that lie in memory as (B, T, h, d): so the projections before and after attention read and write them."""
    B, h, T, d = x.shape
    return x.new_zeros(B, T, h, d).transpose(1, 2)


@one_by_one
def recomputed_attention(q, k, v, mask=None, dropout=0.0):
    """model.attend, through RecomputedAttention."""
    return RecomputedAttention.apply(q, k, v, mask, dropout)


# ----------------------------------------------------------------------------- RMSNorm
#
#     y = n w,  n = x / sqrt(mean(x^2) + eps)        kept: x
#     dw = sum of dy n over all tokens,  dx = (g - n mean(g n)) / sqrt(mean(x^2) + eps)  with g = dy w
#
# A GPU's fused kernel does the same. In plain operations, as on a CPU, autograd keeps two 32-bit copies of x, a third of Llama's
# activations where these have 16 bits. Every mode uses it.


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
        recomputed["norm"] += 1
        dw = (dy * n).flatten(0, -2).sum(0).to(w.dtype) if ctx.needs_input_grad[1] else None
        g = dy * w.to(wide)
        return (g - n * (g * n).mean(-1, keepdim=True)).mul_(scale).to(x.dtype), dw, None


def norm_forward(norm, x):
    """RMSNorm.forward, through RecomputedNorm where autograd would see plain operations."""
    if x.is_cuda or not torch.is_grad_enabled() or norm.weight is None:
        return type(norm).forward(norm, x)
    return RecomputedNorm.apply(x, norm.weight, norm.eps)


# ----------------------------------------------------------------------------- a low-rank layer
#
#     forward    x --A--> h --B--> y        kept: x (often kept anyway, by the norm before it or by its neighbours)
#     backward   x --A--> h again;  dB = dy^T h,  dh = dy B,  dA = dh^T x,  dx = dh A
#
# It saves r / in of x and costs the products with A once more: r in beside the 3 r (in + out) of the layer's step, a sixth if it is
# square. At r = 192 and width 768 that is 6% of what a block keeps for 15% of its products; the other modes leave it alone.


class RecomputedLowRank(torch.autograd.Function):
    """y = B (A x) + bias, keeping x alone. x (..., in), A (r, in), B (out, r)."""

    @staticmethod
    def forward(ctx, x, A, B, bias):
        ctx.dtype = compute_dtype(x)
        x = x.to(ctx.dtype)
        ctx.save_for_backward(x, A, B)
        return F.linear(F.linear(x, A), B, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, A, B = ctx.saved_tensors
        want_x, want_A, want_B, want_bias = ctx.needs_input_grad
        h = F.linear(x, A.to(ctx.dtype))  # (..., r)
        recomputed["lowrank"] += 1
        dh, dB, dbias = linear_gradients(dy, h, B, (want_x or want_A, want_B, want_bias), ctx.dtype)
        dx, dA, _ = linear_gradients(dh, x, A, (want_x, want_A, False), ctx.dtype) if want_x or want_A else (None, None, None)
        return dx, dA, dB, dbias


def lowrank_forward(layer, x):
    """LowRankLinear.forward, through RecomputedLowRank."""
    return RecomputedLowRank.apply(x, layer.A, layer.B, layer.bias)
