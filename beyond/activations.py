"""What the layers of a model see of a text, and the best W -> B A for it (beyond section IV.A, method 2).

A layer is to give the right y = W x for the x that occur. All that counts of the inputs X (in, tokens) of a
text are their second moments H = X X^T (in, in). ||W X - B A X||^2 is smallest for the top eigenvectors of

    out <= in   W H W^T                        B = U_r,      A = U_r^T W
    out > in    C^T W^T W C,  H = C C^T        B = W C V_r,  A = V_r^T C^-1

and what is lost is the sum of the other eigenvalues. Plain SVD (H = 1) destroys a pretrained model when it
takes a fifth of its parameters away; with H the model stays usable (`python bench.py compress`).

X must be what the layers before give now that they have changed: so each makes good what it can of their
errors. Hence one walk through the model (`walk`), shared with rounding.py. In each block,

    norm1 -> [q k v] -> attention -> [o] -> + -> norm2 -> [gate up] -> silu * -> [down] -> +

the layers in brackets share an input: they are changed, then the text goes on through them.

What an error in y costs differs from layer to layer: an error d changes the loss of the text by about
(g d)^2 / 2, g = d loss / d y. So, before ranks are chosen from them, eigenvalues are weighted with the mean
square of g from a backward pass over a few windows (`sensitivities`).

    python decompose.py --model smollm2-135m --ratio 0.8 --calibration TEXT
"""
import functools
import math
from collections import defaultdict

import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

from common.cli import refuse
from common.loss import head_loss
from common.processes import all_reduce, is_first, merged, my_share
from lowrank import balanced, eigen, eigenvalues, from_factors
from model import is_linear

RIDGE = 1e-4             # of the mean of H's diagonal: directions that the text never showed count a little
SENSITIVITY_WINDOWS = 8  # of the text

class Moments:
    """H = X X^T (in, in) = C C^T, with a ridge, without which fewer tokens than inputs give no inverse."""

    def __init__(self, H):
        self.H = H.to(torch.float64, copy=True)
        self.H.diagonal().add_(RIDGE * H.diagonal().mean().clamp_min(1e-30))

    @functools.cached_property
    def C(self):
        return torch.linalg.cholesky(self.H)

    def gram(self, W):
        """The matrix (m, m) whose eigenvectors are wanted, m the smaller side of W (out, in)."""
        if W.shape[0] <= W.shape[1]:
            return W @ self.H.to(W.dtype) @ W.T
        C = self.C.to(W.dtype)
        return C.T @ (W.T @ W) @ C

    def factors(self, W, r):
        """B (out, r) and A (r, in) whose B A X is nearest to W X, in float32; and the eigenvalues (m,)."""
        W = W.detach().float()
        values, V = eigen(W, r, self.gram)
        if W.shape[0] <= W.shape[1]:
            return balanced(V, V.T @ W), values
        B = W @ (self.C.float() @ V)
        A = torch.linalg.solve_triangular(self.C.T, V.double(), upper=True).T.float()  # V^T C^-1
        return balanced(B, A), values

def second_moments(inputs, width, device):
    """X X^T (in, in) in float64 over the inputs [(B, T, in)] of all processes."""
    H = torch.zeros(width, width, dtype=torch.float64, device=device)
    for x in inputs:
        flat = x.reshape(-1, width).float()  # (tokens, in)
        H += flat.T @ flat
    if dist.is_initialized():
        dist.all_reduce(H)
    total = H.trace().item()
    refuse(not 0 < total < math.inf, f"the inputs of a layer add up to {total} on the calibration text: is "
           "the model whole, and the text of its language?")
    return H

def walk(model, windows, change, doing):
    """Run a text through the blocks while their linear layers change.

    windows: tokens (B, T), of which each process takes a share. change(layers, H), with {name: layer} of
    layers that share inputs of the second moments H, returns {name: layer} of those that it replaces, and the
    text goes on through these. doing: beside the bar. Returns what the last block gives: [x (B, T, C)]."""
    device = model.norm.weight.device
    streams = [model.begin(tokens.to(device)) for tokens in my_share(windows)]

    def changed(part, prefix, names, inputs):
        layers = {prefix + name: getattr(part, name) for name in names}
        width = next(iter(layers.values())).in_features
        for name, layer in change(layers, second_moments(inputs, width, device)).items():
            setattr(part, name.removeprefix(prefix), layer)

    for i, block in enumerate(tqdm(model.blocks, doing, disable=None if is_first() else True, leave=False)):
        for half, norm in (("attention", block.norm1), ("mlp", block.norm2)):
            part, prefix = getattr(block, half), f"blocks.{i}.{half}."
            *first, last = [name for name, m in part.named_children() if is_linear(m)]
            inputs = [norm(x) for x, _, _ in streams]
            changed(part, prefix, first, inputs)
            last_layer = getattr(part, last)
            setattr(part, last, nn.Identity())  # without its last layer, the half returns that layer's input
            for n, (_, rope, mask) in enumerate(streams):
                inputs[n] = part(inputs[n], rope, None, mask) if half == "attention" else part(inputs[n])
            setattr(part, last, last_layer)
            changed(part, prefix, [last], inputs)
            for n, (x, rope, mask) in enumerate(streams):
                streams[n] = x + getattr(part, last)(inputs[n]), rope, mask
    return [x for x, _, _ in streams]

class Calibrated:
    """Decompose a model, its files of these dtypes, for the inputs that a text's windows [(1, T)] give."""

    def __init__(self, model, windows, dtypes):
        self.model, self.windows, self.dtypes = model, windows, dtypes

    def losses(self):
        """What it costs to cut off each eigenvalue of each layer: name -> (m,), largest first."""
        found = {}

        def look(layers, H):
            moments = Moments(H)
            for name in my_share(layers):
                found[name] = eigenvalues(moments.gram(layers[name].weight.double()))
            return {}

        walk(self.model, self.windows, look, "eigenvalues")
        costs = sensitivities(self.model, my_share(self.windows[:SENSITIVITY_WINDOWS]))
        return {name: all_reduce(costs[name]) * values for name, values in merged(found).items()}

    def decompose(self, ranks):
        """Each layer is decomposed for the inputs it now has, in the dtype of the model's files."""
        def change(layers, H):
            moments, found = Moments(H), {}
            for name in my_share(name for name in layers if ranks[name]):
                factors, _ = moments.factors(layers[name].weight, ranks[name])
                found[name] = [factor.to("cpu", self.dtypes[f"{name}.weight"]) for factor in factors]
            return {name: from_factors(layers[name], *factors) for name, factors in merged(found).items()}

        walk(self.model, self.windows, change, "decomposing")

def sensitivities(model, windows):
    """What an error in a layer's output costs: name -> the mean square of d loss / d y over the tokens and
    channels of a window (1, T), the loss summed over its tokens; all windows added up."""
    found = defaultdict(float)

    def remember(name, layer, of_inputs, of_outputs):
        found[name] += of_outputs[0].square().mean().item()

    layers = [(name, m) for name, m in model.blocks.named_modules(prefix="blocks") if is_linear(m)]
    hooks = [m.register_full_backward_hook(functools.partial(remember, name)) for name, m in layers]
    for tokens in windows:
        tokens = tokens.to(model.norm.weight.device)
        x, rope, mask = model.begin(tokens[:, :-1])  # the last token predicts nothing
        with torch.enable_grad():
            x = y = x.requires_grad_()
            for block in model.blocks:
                y = block(y, rope, None, mask)
            loss = head_loss(model.head, model.norm(y), tokens[:, 1:]) * (tokens.shape[1] - 1)
        torch.autograd.grad(loss, x)
    for hook in hooks:
        hook.remove()
    return found
