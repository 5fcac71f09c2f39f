"""What the layers of a model see of a text, and the best W -> B A for it (beyond section IV.A, method 2).

A layer is to give the right y = W x for the x that occur. All that counts of the inputs X (in, tokens) of a
text are their second moments H = X X^T (in, in). ||W X - B A X||^2 is smallest for the top eigenvectors of

    out <= in   W H W^T                        B = U_r,      A = U_r^T W
    out > in    C^T W^T W C,  H = C C^T        B = W C V_r,  A = V_r^T C^-1

and what is lost is the sum of the other eigenvalues. Plain SVD (H = 1) destroys a pretrained model when it
takes a fifth of its parameters away; with H the model stays usable (`python bench.py decompose --quality`).

X must be what the layers before give now that they have changed: so each makes good what it can of their
errors. Hence one walk through the model (`walk`), which decompose.py and rounding.py share. In each block,

    norm1 -> [q k v] -> attention -> [o] -> + -> norm2 -> [gate up] -> silu * -> [down] -> +

the layers in brackets share an input: they are changed, then the text goes on through them. One block has to
fit in memory, not the model. Processes share the windows of the text.

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

from checkpoint import build, place
from common.cli import refuse
from common.loss import head_loss
from common.processes import all_reduce, barrier, rank, world_size
from lowrank import LowRankLinear, balanced, eigen
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

    def eigenvalues(self, W):
        """Of gram(W), W (out, in), in float64: (m,), largest first."""
        return torch.linalg.eigvalsh(self.gram(W.double())).flip(-1).clamp_min(0)

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
    with torch.autocast(H.device.type, enabled=False):
        for x in inputs:
            flat = x.reshape(-1, width).float()  # (tokens, in)
            H += flat.T @ flat
    if dist.is_initialized():
        dist.all_reduce(H)
    total = H.trace().item()
    refuse(not 0 < total < math.inf, f"the inputs of a layer add up to {total} on the calibration text: is "
           "the model whole, and the text of its language?")
    return H


def walk(blocks, streams, change):
    """Run a text through the blocks while their linear layers change.

    blocks: pairs (i, block). streams: [(x (B, T, C), rope, mask)], as of model.begin. change(layers, H), with
    {name: layer} of layers that share inputs of the second moments H, returns {name: layer} of those that it
    replaces, and the text goes on through these."""
    def changed(part, names, inputs):
        layers = {prefix + name: getattr(part, name) for name in names}
        width = next(iter(layers.values())).in_features
        new = change(layers, second_moments(inputs, width, block.norm1.weight.device))
        for name, layer in new.items():
            setattr(part, name.removeprefix(prefix), layer)

    for i, block in blocks:
        for half, norm in (("attention", block.norm1), ("mlp", block.norm2)):
            part, prefix = getattr(block, half), f"blocks.{i}.{half}."
            *first, last = [name for name, m in part.named_children() if is_linear(m)]
            inputs = [norm(x) for x, _, _ in streams]
            changed(part, first, inputs)
            last_layer = getattr(part, last)
            setattr(part, last, nn.Identity())  # without its last layer, the half returns that layer's input
            for n, (_, rope, mask) in enumerate(streams):
                inputs[n] = part(inputs[n], rope, None, mask) if half == "attention" else part(inputs[n])
            setattr(part, last, last_layer)
            changed(part, [last], inputs)
            for n, (x, rope, mask) in enumerate(streams):
                streams[n] = x + getattr(part, last)(inputs[n]), rope, mask


class LazyModel:
    """A model on the meta device. What is needed of it is read from its files, and forgotten after use."""

    def __init__(self, work, device):
        self.work, self.device, self.config = work, device, work.source.config
        self.model = build(self.config, {}).eval().requires_grad_(False)

    def load(self, *prefixes):
        for name in self.work.source.shapes:
            if name.startswith(prefixes):
                place(self.model, name, self.work.read_tensor(name), self.device, torch.float32)
        self.model.tie()
        return self.model

    def begin(self, windows):
        """(x, rope, mask) of each window (1, T), as they enter the first block."""
        model = self.load("embed.", "positions.")
        streams = [model.begin(tokens.to(self.device)) for tokens in windows]
        self.model.embed.to("meta")
        return streams

    def blocks(self, doing, order=1):
        """(i, block), one in memory at a time; from the last to the first with order -1."""
        for i in self.work.bar(range(self.config.blocks)[::order], doing):
            yield i, self.load(f"blocks.{i}.").blocks[i]
            self.model.blocks[i].to("meta")


# ----------------------------------------------------------------------------- decompose.py --calibration

class Calibrated:
    """Decompose a model for the inputs that the windows [(1, T)] of a text give. work: a decompose.Work."""

    def __init__(self, work, windows):
        self.work, self.windows = work, windows

    def walk(self, doing, change, device):
        lazy = LazyModel(self.work, device)
        walk(lazy.blocks(doing), lazy.begin(self.windows[rank()::world_size()]), change)

    def losses(self, device):
        """What it costs to cut off each eigenvalue of each layer: name -> (m,), largest first."""
        def look(layers, H):
            moments = Moments(H)
            for name in self.work.mine(layers):
                self.work.save_eigenvalues(name, moments.eigenvalues(layers[name].weight))
            return {}

        self.walk("eigenvalues", look, device)
        windows = self.windows[:SENSITIVITY_WINDOWS][rank()::world_size()]
        found = sensitivities(LazyModel(self.work, device), windows)
        eigenvalues = self.work.eigenvalues().items()
        return {name: all_reduce(sum(found[name])) * values for name, values in eigenvalues}

    def decompose(self, ranks, device):
        """Each layer is decomposed for the inputs it now has; then the text goes on through its factors, in
        the dtype of the model's files."""
        def change(layers, H):
            moments, layers = Moments(H), {name: dense for name, dense in layers.items() if ranks[name]}
            for name in self.work.mine(layers):
                self.work.save_factors(name, *moments.factors(layers[name].weight, ranks[name])[0])
            barrier()
            return {name: low_rank(name, dense) for name, dense in layers.items()}

        def low_rank(name, dense):
            layer = LowRankLinear(dense.in_features, dense.out_features, ranks[name], bias=False)
            layer.load_state_dict(self.work.factors(name))
            layer.bias = dense.bias
            return layer.to(dense.weight.device)

        self.walk("decomposing", change, device)


def sensitivities(lazy, windows):
    """What an error in a layer's output costs: name -> for each window the mean square of d loss / d y over
    tokens and channels. A backward pass that keeps the inputs of blocks alone and computes the rest again, a
    block at a time, as recompute.py does."""
    inputs, found = [], defaultdict(list)
    streams = lazy.begin(windows)
    for _, block in lazy.blocks("sensitivities, forward"):
        inputs.append([x for x, _, _ in streams])
        streams = [(block(x, rope, None, mask), rope, mask) for x, rope, mask in streams]
    model, gradients = lazy.load("norm.", "head.", *(["embed."] if lazy.config.tied else [])), []
    with torch.enable_grad():
        for (x, _, _), tokens in zip(streams, windows):
            x = x[:, :-1].requires_grad_()  # the last token predicts nothing
            targets = tokens[:, 1:].to(x.device)
            loss = head_loss(model.head, model.norm(x), targets) * targets.numel()
            gradients.append(nn.functional.pad(torch.autograd.grad(loss, x)[0], (0, 0, 0, 1)))

    def remember(name, layer, of_inputs, of_outputs):
        found[name].append(of_outputs[0].square().mean().item())

    for i, block in lazy.blocks("sensitivities, backward", order=-1):
        layers = [(f"blocks.{i}.{name}", m) for name, m in block.named_modules() if is_linear(m)]
        hooks = [m.register_full_backward_hook(functools.partial(remember, name)) for name, m in layers]
        with torch.enable_grad():
            for n, (_, rope, mask) in enumerate(streams):
                x = inputs[i][n].requires_grad_()
                gradients[n], = torch.autograd.grad(block(x, rope, None, mask), x, gradients[n])
        for hook in hooks:
            hook.remove()
        inputs.pop()
    return found
