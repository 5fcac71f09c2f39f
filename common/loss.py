"""The loss, in chunks of tokens.

logits = h W^T is the largest tensor of a training step: 4,096 tokens x 50,257 entries in float32 are 823 MB, and autograd keeps
as much again for the softmax. But the gradient of the mean cross entropy needs nothing from later layers,

    d loss / d logits = (softmax(logits) - onehot(target)) / N,

so it is at hand as soon as the logits are. One chunk of tokens at a time, all three products are done in the forward pass:

    h --W--> logits --> p - onehot --W--> dh          kept for the backward pass: dh, as large as h, and dW, which is to
                            |                         become W's gradient; the backward pass only scales them
                            +------h----> dW += ...   logits: two buffers of one chunk, used again and again

    loss = head_loss(model.head, model.hidden(tokens), targets)
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from lowrank import LowRankLinear


def compute_dtype(x):
    """What autocast would compute a matrix product with x in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x.dtype


def scaled(gradient, factor):
    """factor * gradient, without a pass over it in the usual case of factor 1 (on a GPU, looking would mean waiting)."""
    return gradient if gradient is None or factor.device.type == "cpu" and factor == 1 else gradient * factor


class MatrixLoss(torch.autograd.Function):
    """Mean cross entropy of logits = h W^T. h (N, C), W (V, C), targets (N)."""

    @staticmethod
    def forward(ctx, h, W, targets, chunk, differentiate):
        want_h, want_W = (needed and differentiate for needed in ctx.needs_input_grad[:2])
        N, V, dtype, W_dtype, h_dtype = len(h), len(W), compute_dtype(h), W.dtype, h.dtype
        h, W = h.detach().to(dtype), W.detach().to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        logits = torch.empty(min(chunk, N), V, dtype=dtype, device=h.device)
        probabilities = torch.empty(min(chunk, N), V, dtype=wide, device=h.device)
        dh = torch.empty_like(h) if want_h else None
        dW = torch.zeros(W.shape, dtype=wide, device=W.device) if want_W else None
        likelihood = torch.empty(N, dtype=wide, device=h.device)
        for i in range(0, N, chunk):
            hc, target = h[i:i + chunk], targets[i:i + chunk, None]
            z, p = logits[:len(hc)], probabilities[:len(hc)]
            torch.mm(hc, W.T, out=z)  # (n, V)
            torch.softmax(z, -1, dtype=wide, out=p)
            likelihood[i:i + chunk] = p.gather(1, target)[:, 0]
            if not (want_h or want_W):
                continue
            p.scatter_add_(1, target, p.new_full((), -1.0).expand_as(target))
            g = p if dtype == wide else z.copy_(p)  # N times the gradient of the logits, in the dtype of the products
            if want_h:
                torch.mm(g, W, out=dh[i:i + chunk])  # (n, V) (V, C)
            if want_W and dtype == wide:
                dW.addmm_(g.T, hc, alpha=1 / N)  # (V, n) (n, C)
            elif want_W:
                dW.add_(g.T @ hc, alpha=1 / N)  # each chunk's product is rounded to 16 bit, their sum is not
        ctx.save_for_backward(None if dh is None else (dh / N).to(h_dtype), None if dW is None else dW.to(W_dtype))
        return MatrixLoss.losses(likelihood, h, W, targets).mean()

    @staticmethod
    def losses(likelihood, h, W, targets):
        """-log p of each token, (N). Near the smallest float, p says little: such a token's loss is taken from its logits themselves."""
        losses, precise = -likelihood.log(), likelihood > 1e-30
        if not precise.all():
            losses[~precise] = F.cross_entropy((h[~precise] @ W.T).to(losses.dtype), targets[~precise], reduction="none")
        return losses

    @staticmethod
    def backward(ctx, grad):
        dh, dW = ctx.saved_tensors
        return scaled(dh, grad), scaled(dW, grad), None, None, None


class LayerLoss(torch.autograd.Function):
    """The same for any layer: autograd differentiates the layer and the loss of one chunk before it comes to the next."""

    @staticmethod
    def forward(ctx, head, h, targets, chunk, differentiate, *parameters):
        wanted = [differentiate and needed for needed in (ctx.needs_input_grad[1], *ctx.needs_input_grad[5:])]
        dh = torch.empty_like(h) if wanted[0] else None
        sums = [torch.zeros_like(p) if w else None for p, w in zip(parameters, wanted[1:])]
        total = 0
        for i in range(0, len(h), chunk):
            hc = h[i:i + chunk].detach().requires_grad_(wanted[0])
            with torch.set_grad_enabled(any(wanted)):
                logits = head(hc)  # (n, V)
                loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets[i:i + chunk], reduction="sum") / len(h)
            total = total + loss.detach()
            leaves = [t for t, w in zip((hc, *parameters), wanted) if w]
            gradients = iter(torch.autograd.grad(loss, leaves, allow_unused=True) if leaves else ())
            if wanted[0]:
                dh[i:i + chunk] = next(gradients)
            for s in sums:
                if s is not None and (g := next(gradients)) is not None:
                    s += g
        ctx.save_for_backward(dh, *sums)
        return total

    @staticmethod
    def backward(ctx, grad):
        dh, *sums = ctx.saved_tensors
        return None, scaled(dh, grad), None, None, None, *(scaled(s, grad) for s in sums)


def head_loss(head, x, targets, chunk=512, ignore_index=-100):
    """Mean cross entropy of head(x) against targets, never holding more than `chunk` tokens' logits. x (B, T, C), targets (B, T).

    Tokens whose target is `ignore_index` are left out before anything is computed. 0 where none is left.
    """
    h, targets = x.flatten(0, -2), targets.flatten()  # (N, C), (N)
    counts = targets != ignore_index
    if not counts.all():
        h, targets = h[counts], targets[counts]
    if not len(h):
        return (x * 0.0).sum().float()
    own_forward = "forward" in head.__dict__  # fake quantization: the head must be asked itself
    if isinstance(head, LowRankLinear) and head.bias is None and not own_forward:
        h, W = F.linear(h, head.A), head.B  # the head's rank is small: A x, (N, r), may be kept
    elif type(head) is nn.Linear and head.bias is None and not own_forward:
        W = head.weight
    elif hasattr(getattr(head, "W", None), "dense") and head.bias is None and not own_forward:
        W = head.W.dense(compute_dtype(h))  # a quantized head is frozen: dequantized once for both of its products
    else:
        return LayerLoss.apply(head, h, targets, chunk, torch.is_grad_enabled(), *head.parameters())
    return MatrixLoss.apply(h, W, targets, chunk, torch.is_grad_enabled())
