"""The loss, in chunks of tokens.

logits = h W^T is the largest tensor of a training step: 4,096 tokens x 50,257 entries in float32 are 823 MB,
and autograd keeps as much again for the softmax. But the gradient of the mean cross entropy needs nothing
from later layers,

    d loss / d logits = (softmax(logits) - onehot(target)) / N,

so it is at hand as soon as the logits are. One chunk at a time, all three products are done in the forward
pass:

    h --W--> logits --> p - onehot --W--> dh          kept for the backward pass: dh, as large as h, and
                            |                         dW, which becomes W's gradient; the backward pass
                            +------h----> dW += ...   only scales them.  One buffer of a chunk's logits

    loss = head_loss(model.head, model.hidden(tokens), targets)
"""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from model import last_product

IGNORED = -100  # the target of a token that does not count, as in torch
ROWS = 16       # of logits whose softmax a CPU takes at once, so that they stay in its cache

def compute_dtype(x):
    """What autocast would compute a matrix product with x in."""
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if autocast else x.dtype

class MatrixLoss(torch.autograd.Function):
    """Mean cross entropy of logits = h W^T. h (N, C), W (V, C), targets (N)."""

    @staticmethod
    def forward(ctx, h, W, targets, chunk, differentiate):
        want_h, want_W = (differentiate and needed for needed in ctx.needs_input_grad[:2])
        N, V = len(h), len(W)
        dtype, h_dtype, W_dtype = compute_dtype(h), h.dtype, W.dtype
        wide = torch.promote_types(dtype, torch.float32)
        h, W = h.detach().to(dtype), W.detach().to(dtype)
        logits = torch.empty(min(chunk, N), V, dtype=dtype, device=h.device)
        likelihood, minus_one = [], torch.full((), -1.0, dtype=wide, device=h.device)
        dh = torch.empty_like(h) if want_h else None
        dW = torch.zeros_like(W, dtype=wide) if want_W else None
        for i in range(0, N, chunk):
            hc, target = h[i:i + chunk], targets[i:i + chunk, None]
            z = torch.mm(hc, W.T, out=logits[:len(hc)])  # (n, V)
            size = ROWS if z.device.type == "cpu" else chunk
            for rows, own in zip(z.split(size), target.split(size)):
                p = torch.softmax(rows, -1, dtype=wide)
                likelihood.append(p.gather(1, own)[:, 0])
                if want_h or want_W:  # z becomes N times the gradient of the logits
                    rows.copy_(p.scatter_add_(1, own, minus_one.expand_as(own)))
            if want_h:
                torch.mm(z, W, out=dh[i:i + chunk])  # (n, V) (V, C)
            if want_W and dtype == wide:
                dW.addmm_(z.T, hc, alpha=1 / N)  # (V, n) (n, C)
            elif want_W:
                dW.add_(z.T @ hc, alpha=1 / N)  # a chunk's product is rounded to 16 bit, their sum is not
        ctx.save_for_backward((dh / N).to(h_dtype) if want_h else None, dW.to(W_dtype) if want_W else None)
        likelihood = torch.cat(likelihood)
        losses, precise = -likelihood.log(), likelihood > 1e-30
        if not precise.all():  # near the smallest float the likelihood says little, the logits do
            logits = (h[~precise] @ W.T).to(wide)
            losses[~precise] = F.cross_entropy(logits, targets[~precise], reduction="none")
        return losses.mean()

    @staticmethod
    def backward(ctx, grad):
        dh, dW = ctx.saved_tensors
        if grad.device.type != "cpu" or grad != 1:  # on a GPU, to look would mean to wait
            dh, dW = (None if g is None else g * grad for g in (dh, dW))
        return dh, dW, None, None, None

def loss_sum(head, h, targets):
    """Of any layer, by autograd."""
    logits = head(h)  # (n, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="sum")

def head_loss(head, x, targets, chunk=512):
    """Mean cross entropy of head(x) against targets, never holding more than `chunk` tokens' logits.
    x (B, T, C), targets (B, T). Tokens whose target is IGNORED are left out; the loss of none is 0. Where y
    is no plain product h W^T, the backward pass makes the logits again."""
    h, targets = x.flatten(0, -2), targets.flatten()  # (N, C), (N)
    counts = targets != IGNORED
    if not counts.all():
        h, targets = h[counts], targets[counts]
    if not len(h):
        return (x * 0.0).sum().float()
    product = last_product(head, h, compute_dtype(h)) if head.bias is None else None
    if product is not None:
        return MatrixLoss.apply(*product, targets, chunk, torch.is_grad_enabled())
    parts = zip(h.split(chunk), targets.split(chunk))
    return sum(checkpoint(loss_sum, head, *part, use_reentrant=False) for part in parts) / len(h)
