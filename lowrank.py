"""Low-rank linear layers (sections III.B, IV.A and V.A): y = B A x in place of y = W x.

A weight W of n_out x n_in numbers is replaced by B (n_out x r) times A (r x n_in): r (n_in + n_out) numbers, and as many
multiplications for each token. With r far below n_in n_out / (n_in + n_out) the layer is smaller and faster.

           x (n_in)                x (n_in)                    x (n_in)                      x (n_in)
              |                       |                       /        \\                   /        \\
              |                       A  (r x n_in)          W (frozen)  A                W (frozen)  A
              W                       |                      |           B                |           B
              |                       B  (n_out x r)         * a         * (1 - a)        |           * alpha/r
              |                       |                       \\        /                   \\        /
           y (n_out)               y (n_out)                   y (n_out)                     y (n_out)
           dense, eq. 4            method 1 and 2, eq. 5       method 3, eq. 6               LoRA, eq. 7

    Method 1  LowRankLinear with random factors, trained from scratch.
    Method 2  LowRankLinear whose factors are the truncated SVD of a pretrained W.
    Method 3  BlendedLinear: begins as W (a near 1), ends as B A (a = 0), and is then a LowRankLinear.
    Finetuning  LoRALinear: W stays, B A is learned beside it.

Every layer here behaves like nn.Linear: in_features, out_features, forward(x: (..., n_in)) -> (..., n_out).

    replace_linears(model, 192)                         # method 1: every linear layer, in place
    attach_lora(model, r=8, alpha=32, targets=["q", "v"])
"""
import math
from itertools import chain

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import count_parameters
from runtime import InputError


def check_rank(rank, in_features, out_features):
    if not 1 <= rank <= min(in_features, out_features):
        raise InputError(f"rank must be in 1..{min(in_features, out_features)} for a {in_features}x{out_features} layer, got {rank}")


class LowRankLinear(nn.Module):
    """y = B (A x) + bias, equation 5. A: (r, in), B: (out, r), bias: (out) or None."""

    def __init__(self, in_features, out_features, rank, bias=True):
        super().__init__()
        check_rank(rank, in_features, out_features)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.empty(out_features, rank))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        if not self.A.is_meta:
            self.init_weights()

    def init_weights(self, std=0.02):
        """Factors of equal size whose product has the deviation that a dense layer starts with: r (s s)^2 = std^2."""
        s = math.sqrt(std) / self.rank ** 0.25
        nn.init.normal_(self.A, std=s)
        nn.init.normal_(self.B, std=s)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x):
        h = F.linear(x, self.A)  # (..., r)
        return F.linear(h, self.B, self.bias)  # (..., out)

    @property
    def multiplications(self):
        return self.rank * (self.in_features + self.out_features)

    def dense_weight(self):
        """B A as one (out, in) matrix."""
        return self.B @ self.A

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, bias={self.bias is not None}"


class LowRankEmbedding(nn.Module):
    """W^E of low rank: the row of a token in A (vocabulary, r), then B (n, r). tokens (...) -> (..., n)."""

    def __init__(self, num_embeddings, embedding_dim, rank):
        super().__init__()
        check_rank(rank, num_embeddings, embedding_dim)
        self.num_embeddings, self.embedding_dim, self.rank = num_embeddings, embedding_dim, rank
        self.A = nn.Parameter(torch.empty(num_embeddings, rank))
        self.B = nn.Parameter(torch.empty(embedding_dim, rank))
        if not self.A.is_meta:
            self.init_weights()

    init_weights = LowRankLinear.init_weights
    bias = None

    def forward(self, tokens):
        return F.linear(F.embedding(tokens, self.A), self.B)

    @property
    def multiplications(self):
        return self.rank * self.embedding_dim  # looking up a row of A multiplies nothing

    def dense_weight(self):
        """The (vocabulary, n) matrix."""
        return self.A @ self.B.T

    def extra_repr(self):
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"


class BlendedLinear(nn.Module):
    """Method 3, equation 6: y = a W x + (1 - a) B A x + bias. W is frozen; A, B and the bias learn; a falls from near 1 to 0."""

    def __init__(self, in_features, out_features, rank, bias=True):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.lowrank = LowRankLinear(in_features, out_features, rank, bias)
        self.register_buffer("alpha", torch.ones(()))  # in the checkpoint: a stopped run goes on from where it was

    def init_weights(self, std=0.02):
        nn.init.normal_(self.weight, std=std)
        self.lowrank.init_weights(std)
        self.alpha.fill_(1)

    def forward(self, x):
        y = self.alpha * F.linear(x, self.weight)  # (..., out)
        h = F.linear(x, self.lowrank.A)  # (..., r)
        y = y + (1 - self.alpha) * F.linear(h, self.lowrank.B)
        return y if self.lowrank.bias is None else y + self.lowrank.bias

    @property
    def multiplications(self):
        return self.in_features * self.out_features + self.lowrank.multiplications

    def dense_weight(self):
        return self.alpha * self.weight + (1 - self.alpha) * self.lowrank.dense_weight()

    @property
    def bias(self):
        return self.lowrank.bias


def blend_alpha(step, steps, start=0.9, until=0.5):
    """The schedule of a: `start` at step 0, falling along a half cosine to 0 at `until` of all steps, then 0.

    It begins below 1 because A and B get (1 - a) of the gradient, and would learn nothing at a = 1.
    """
    progress = step / max(1, until * steps)
    return 0.0 if progress >= 1 else start * 0.5 * (1 + math.cos(math.pi * progress))


def set_alpha(model, alpha):
    """Set a in every BlendedLinear of the model; returns how many there are."""
    layers = [m for m in model.modules() if isinstance(m, BlendedLinear)]
    for layer in layers:
        layer.alpha.fill_(alpha)
    return len(layers)


class LoRALinear(nn.Module):
    """Equation 7: y = base(x) + (alpha/r) B A x. The base, any layer that maps x to y, is frozen; B starts at 0, so y starts as base(x)."""

    def __init__(self, base, r, alpha, dropout=0.0):
        super().__init__()
        check_rank(r, base.in_features, base.out_features)
        self.in_features, self.out_features, self.r, self.scale = base.in_features, base.out_features, r, alpha / r
        self.base = base.requires_grad_(False)
        reference = next(chain(base.parameters(), base.buffers()), torch.empty(0))  # a quantized base has buffers alone
        self.A = nn.Parameter(torch.empty(r, self.in_features, device=reference.device))
        self.B = nn.Parameter(torch.zeros(self.out_features, r, device=reference.device))
        self.dropout = nn.Dropout(dropout)
        self.merged = False
        if not self.A.is_meta:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as loralib and PEFT

    def forward(self, x):
        if self.merged:
            return self.base(x)
        fused = getattr(self.base, "with_lora", None)  # a quantized base on a GPU: one launch for a few rows
        if fused is not None and not self.training and (y := fused(x, self.A, self.B, self.scale)) is not None:
            return y
        h = F.linear(self.dropout(x).to(self.A.dtype), self.A)  # (..., r)
        return self.base(x) + self.scale * F.linear(h, self.B)

    @property
    def multiplications(self):
        base = getattr(self.base, "multiplications", self.in_features * self.out_features)
        return base + (0 if self.merged else self.r * (self.in_features + self.out_features))

    def delta(self):
        """What the adapter adds to W: (alpha/r) B A, (out, in)."""
        return self.scale * (self.B @ self.A)

    def dense_weight(self):
        base = self.base.weight if isinstance(self.base, nn.Linear) else self.base.dense_weight()
        return base if self.merged else base + self.delta().to(base.dtype)

    @property
    def bias(self):
        return self.base.bias

    @torch.no_grad()
    def add(self, sign):
        """Add the adapter's product to the base (sign 1) or take it out again (-1)."""
        if not isinstance(self.base, nn.Linear):
            raise InputError(f"an adapter can't be merged into a {type(self.base).__name__}: merge into the 16-bit base, or keep it beside")
        self.base.weight += (sign * self.delta()).to(self.base.weight.dtype)
        self.merged = sign > 0


# ----------------------------------------------------------------------------- the walker

def is_linear(module):
    return isinstance(module, nn.Linear) or hasattr(module, "multiplications") and hasattr(module, "in_features")


def swap_layers(model, make, wanted=is_linear):
    """The one walker that changes layers: each module that `wanted` accepts is replaced by make(name, module), or stays if that is None.

    It does not look inside a layer that is wanted. Returns the names of the replaced layers.
    """
    swapped = []

    def visit(parent, prefix):
        for name, child in list(parent.named_children()):
            full = prefix + name
            if not wanted(child):
                visit(child, full + ".")
            elif (layer := make(full, child)) is not None:
                setattr(parent, name, layer.train(child.training))
                swapped.append(full)
    visit(model, "")
    return swapped


def second_moments(model, batches, forward=None):
    """X X^T (in, in), in float32, of the inputs X of every linear layer, over all tokens of the batches: name -> matrix.

    forward(batch) runs the model; layers with one input, as W^Q, W^K and W^V, share the product.
    """
    moments, last = {}, [None, None]

    def gather(name, x):
        if x is not last[0]:
            flat = x.reshape(-1, x.shape[-1]).float()  # (tokens, in)
            with torch.autocast(x.device.type, enabled=False):
                last[:] = x, flat.T @ flat
        moments[name] = moments[name] + last[1] if name in moments else last[1]

    hooks = [m.register_forward_pre_hook(lambda m, inputs, name=name: gather(name, inputs[0])) for name, m in model.named_modules() if is_linear(m)]
    try:
        with torch.no_grad():
            for batch in batches:
                (forward or model)(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return moments


def _millions(count):
    return f"{count / 1e6:,.1f}M"


def svd_factors(weight, rank):
    """Factors of the truncated SVD W = U S V^T (section IV.A, method 2): A = S^1/2 V^T (r, in), B = U S^1/2 (out, r), in W's dtype.

    B A is the matrix of that rank nearest to W in the Frobenius norm. Splitting S evenly gives both the same norm, so that one
    learning rate suits both.
    """
    check_rank(rank, weight.shape[1], weight.shape[0])
    U, S, Vt = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    root = S[:rank].sqrt()
    return (root[:, None] * Vt[:rank]).to(weight.dtype), (U[:, :rank] * root).to(weight.dtype)


def replace_linears(model, rank, method=1, embedding_rank=0, progress=lambda layers: layers):
    """Replace every linear layer, the head included, by one of `rank`; in place.

    method 1: random factors; 2: factors of the SVD of the layer's weight; 3: a BlendedLinear around the layer's weight.
    embedding_rank: also W^E. On the meta device only the shapes are made. Returns the line that says what was done.
    """
    if method not in (1, 2, 3):
        raise InputError(f"--method must be 1, 2 or 3, got {method}")
    before = count_parameters(model)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    todo = iter(progress(linears) if method > 1 else linears)

    def make(name, dense):
        next(todo, None)
        layer = (BlendedLinear if method == 3 else LowRankLinear)
        with torch.device(dense.weight.device):
            layer = layer(dense.in_features, dense.out_features, rank, dense.bias is not None)
        if method == 1 or dense.weight.is_meta:
            return layer
        low = layer.lowrank if method == 3 else layer
        low.A.data, low.B.data = svd_factors(dense.weight, rank)
        if dense.bias is not None:
            low.bias.data.copy_(dense.bias.data)
        if method == 3:
            layer.weight.data = dense.weight.data.clone()
        return layer

    def make_embedding(name, dense):
        with torch.device(dense.weight.device):
            layer = LowRankEmbedding(dense.num_embeddings, dense.embedding_dim, embedding_rank)
        if method > 1 and not dense.weight.is_meta:
            Bt, A = svd_factors(dense.weight, embedding_rank)
            layer.A.data, layer.B.data = A, Bt.T.contiguous()
        return layer

    names = swap_layers(model, make, wanted=lambda m: isinstance(m, nn.Linear))
    if embedding_rank:
        names += swap_layers(model, make_embedding, wanted=lambda m: m is model.embed)
    for _ in todo:
        pass  # lets a progress bar end
    after = count_parameters(model)
    what = f"{len(names)} linears" if not embedding_rank else f"{len(names) - 1} linears and the embedding"
    line = f"replaced {what}: {_millions(before)} -> {_millions(after)} parameters ({before / after:.2f}x)"
    if method == 3:
        low = after - sum(m.weight.numel() for m in model.modules() if isinstance(m, BlendedLinear))
        line = (f"blended {what}: {_millions(before)} -> {_millions(after)} parameters while W is there, "
                f"{_millions(low)} when alpha is 0 ({before / low:.2f}x)")
    return line


def finish_blend(model):
    """Turn every BlendedLinear, whose a must be 0, into the LowRankLinear that it then is. Returns how many."""
    def make(name, layer):
        if layer.alpha != 0:
            raise InputError(f"{name} still has alpha = {float(layer.alpha):.3f}: only a blend that ended (alpha 0) is a low-rank layer")
        return layer.lowrank
    return len(swap_layers(model, make, wanted=lambda m: isinstance(m, BlendedLinear)))


# ----------------------------------------------------------------------------- adapters

def attach_lora(model, r=8, alpha=32, targets=("q", "k", "v", "qkv"), dropout=0.0):
    """Freeze the model and put a LoRALinear around each layer whose last name is in `targets`. Returns the line that says what was done."""
    model.requires_grad_(False)
    wrapped = swap_layers(model, lambda name, layer: LoRALinear(layer, r, alpha, dropout) if name.rsplit(".", 1)[-1] in targets else None)
    if not wrapped:
        names = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if is_linear(m)})
        raise InputError(f"no layer is called {', '.join(targets)}: this model has {', '.join(names)}")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = count_parameters(model) - trainable
    return f"attached {len(wrapped)} adapters: {trainable:,} trainable parameters ({trainable / base:.2%} of the base's {_millions(base)})"


def _adapters(model):
    return [m for m in model.modules() if isinstance(m, LoRALinear)]


def merge_lora(model):
    """W <- W + (alpha/r) B A in every adapted layer; the adapters stay in place, asleep, so that unmerge_lora can undo it."""
    for layer in _adapters(model):
        if not layer.merged:
            layer.add(1)


def unmerge_lora(model):
    """Undo merge_lora, to the rounding of W's dtype."""
    for layer in _adapters(model):
        if layer.merged:
            layer.add(-1)


def drop_lora(model):
    """Take the adapters off; a merged one stays inside its base."""
    return len(swap_layers(model, lambda name, layer: layer.base, wanted=lambda m: isinstance(m, LoRALinear)))
