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

from common.cli import InputError
from model import Layer, count_parameters, dense_weight, is_linear, multiplications


def check_rank(rank, in_features, out_features):
    if not 1 <= rank <= min(in_features, out_features):
        raise InputError(f"rank must be in 1..{min(in_features, out_features)} for a {in_features}x{out_features} layer, got {rank}")


# ----------------------------------------------------------------------------- method 1: what factors start from

def start_normal(A, B, std):
    """Plain: random numbers of one deviation, such that B A has the deviation `std` of the dense layer's start: r (s s)^2 = std^2."""
    s = math.sqrt(std) / len(A) ** 0.25
    A.normal_(std=s)
    B.normal_(std=s)


def start_cola(A, B, std):
    """The deviations of CoLA (2502.10940), r^-1/4 (in + out)^-1/4, whatever the dense layer's."""
    s = (len(A) * (A.shape[1] + len(B))) ** -0.25
    A.normal_(std=s)
    B.normal_(std=s)


def start_svd(A, B, std):
    """The truncated SVD of a dense layer's start (Khodak et al. 2105.01029)."""
    W = A.new_empty(len(B), A.shape[1]).normal_(std=std)
    low, high = svd_factors(W, len(A))
    A.copy_(low)
    B.copy_(high)


def start_orthogonal(A, B, std):
    """Random orthonormal directions, equally long, with B A as large as the dense layer's start: |B A|_F = std sqrt(in out). Near to `svd`
    (a random W has random singular vectors) at the price of two QR decompositions."""
    size = math.sqrt(std) * (A.shape[1] * len(B) / len(A)) ** 0.25
    nn.init.orthogonal_(A, gain=size)
    nn.init.orthogonal_(B, gain=size)


STARTS = {"normal": start_normal, "cola": start_cola, "svd": start_svd, "orthogonal": start_orthogonal}


@torch.no_grad()
def decay_products(model, rate):
    """Decay of |B A|_F^2 in place of |A|^2 + |B|^2: A -= rate B^T (B A), B -= rate (B A) A^T, by way of r x r matrices, without B A."""
    for layer in model.modules():
        if isinstance(layer, LowRankLinear):
            BtB, AAt = layer.B.T @ layer.B, layer.A @ layer.A.T
            layer.A.addmm_(BtB, layer.A.clone(), alpha=-rate)
            layer.B.addmm_(layer.B.clone(), AAt, alpha=-rate)


# ----------------------------------------------------------------------------- the layers

class LowRankLinear(Layer):
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

    start = "normal"  # one of STARTS

    def init_weights(self, std=0.02):
        """Random factors, in place of a dense layer of deviation std."""
        with torch.no_grad():
            STARTS[self.start](self.A, self.B, std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x):
        h = F.linear(x, self.A)  # (..., r)
        return F.linear(h, self.B, self.bias)  # (..., out)

    def last_product(self, x, dtype):
        return F.linear(x, self.A), self.B

    @property
    def multiplications(self):
        return self.rank * (self.in_features + self.out_features)

    def dense_weight(self):
        """B A as one (out, in) matrix."""
        return self.B @ self.A

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, bias={self.bias is not None}"


class LowRankEmbedding(Layer):
    """W^E of low rank: the row of a token in A (vocabulary, r), then B (n, r). tokens (...) -> (..., n)."""

    def __init__(self, num_embeddings, embedding_dim, rank):
        super().__init__()
        check_rank(rank, num_embeddings, embedding_dim)
        self.num_embeddings, self.embedding_dim, self.rank = num_embeddings, embedding_dim, rank
        self.A = nn.Parameter(torch.empty(num_embeddings, rank))
        self.B = nn.Parameter(torch.empty(embedding_dim, rank))
        if not self.A.is_meta:
            self.init_weights()

    def init_weights(self, std=0.02):
        with torch.no_grad():
            start_normal(self.A.T, self.B, std)

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


class BlendedLinear(Layer):
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


class LoRALinear(Layer):
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
        if isinstance(self.base, Layer) and not self.training:  # a quantized base on a GPU: one launch for a few rows
            y = self.base.with_lora(x, self.A, self.B, self.scale)
            if y is not None:
                return y
        h = self.scale * F.linear(self.dropped(x).to(self.A.dtype), self.A)  # (..., r)
        return self.base(x) + F.linear(h, self.B)

    def dropped(self, x):
        """Dropout of x. Layers that are given the same tensor, as W^Q, W^K and W^V are, share one mask: a third of the work, and of what is kept."""
        if not self.training or self.dropout.p == 0:
            return x
        if getattr(x, "dropped", None) is None:
            x.dropped = self.dropout(x)  # lives as long as x
        return x.dropped

    @property
    def multiplications(self):
        base = multiplications(self.base)
        return base + (0 if self.merged else self.r * (self.in_features + self.out_features))

    def delta(self):
        """What the adapter adds to W: (alpha/r) B A, (out, in)."""
        return self.scale * (self.B @ self.A)

    def dense_weight(self):
        base = dense_weight(self.base)
        return base if self.merged else base + self.delta().to(base.dtype)

    @property
    def bias(self):
        return self.base.bias

    @torch.no_grad()
    def add(self, sign):
        """Add the adapter's product to the base (sign 1) or take it out again (-1). Returns two squared norms: of what rounding the sum to the base's
        format changed, and of the product. A quantized base is dequantized, added to and quantized again; its integers are kept for the way back."""
        base, sums = self.base, self.dense_weight().float() if sign > 0 else None
        if isinstance(base, nn.Linear):
            base.weight += (sign * self.delta()).to(base.weight.dtype)
        elif not hasattr(base, "W"):
            raise InputError(f"an adapter can't be merged into a {type(base).__name__}: merge into the 16-bit base, or keep it beside")
        elif sign > 0:
            base.W, self.unmerged = type(base.W).of(sums, base.W.bits, base.W.group), base.W
        else:
            base.W = self.unmerged
        self.merged = sign > 0
        return ((self.dense_weight().float() - sums).square().sum().item(), self.delta().square().sum().item()) if sign > 0 else None


# ----------------------------------------------------------------------------- the walker

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


def halves(block):
    """What a block adds to the residual stream x, one after the other: the module's name, and what it makes of x (B, T, C), rope and mask."""
    return (("attention", lambda x, rope, mask: block.attention(block.norm1(x), rope, None, mask)),
            ("mlp", lambda x, rope, mask: block.mlp(block.norm2(x))))


@torch.no_grad()
def change_layers(model, batches, change, progress=lambda blocks: blocks):
    """Replace the linear layers of all blocks, from the first block to the last, by change(name, layer, H), or leave them where that is None.

    H (in, in) are the second moments of the inputs that the layer has for `batches` of tokens (B, T) when the halves of blocks before it are
    already changed: so each makes good what it can of the errors so far. Returns the names of the replaced layers.
    """
    names, streams = [], [model.begin(tokens) for tokens in batches]
    for i, block in enumerate(progress(model.blocks)):
        for half, run in halves(block):
            part, prefix = getattr(block, half), f"blocks.{i}.{half}."
            moments = second_moments(part, streams, lambda stream, run=run: run(*stream))
            with torch.autocast(streams[0][0].device.type, enabled=False):
                swapped = swap_layers(part, lambda name, layer, prefix=prefix, moments=moments: change(prefix + name, layer, moments[name]))
            names += [prefix + name for name in swapped]
            streams = [(x + run(x, rope, mask), rope, mask) for x, rope, mask in streams]
    return names


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
    A, B = root[:, None] * Vt[:rank], U[:, :rank] * root
    return A.to(weight.dtype).contiguous(), B.to(weight.dtype).contiguous()  # as they lie when they are loaded: the same sums in the same order


def replace_linears(model, rank, method=1, embedding_rank=0, progress=lambda layers: layers, start="normal", head=True):
    """Replace every linear layer, and the head W^H with `head`, by one of `rank`; in place.

    method 1: random factors, of which STARTS[start] draws the values; 2: factors of the SVD of the layer's weight; 3: a BlendedLinear around
    the layer's weight. embedding_rank: also W^E. On the meta device only the shapes are made. Returns the line that says what was done.
    """
    if method not in (1, 2, 3):
        raise InputError(f"--method must be 1, 2 or 3, got {method}")
    before = count_parameters(model)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and (head or m is not model.head)]
    todo = iter(progress(linears) if method > 1 else linears)

    def make(name, dense):
        next(todo, None)
        layer = (BlendedLinear if method == 3 else LowRankLinear)
        with torch.device(dense.weight.device):
            layer = layer(dense.in_features, dense.out_features, rank, dense.bias is not None)
        low = layer.lowrank if method == 3 else layer
        low.start = start
        if dense.weight.is_meta:
            return layer
        if method == 1:
            if start != "normal":  # with which the layer was made
                low.init_weights()
            return layer
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

    names = swap_layers(model, make, wanted=linears.__contains__)
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


def blend_with(model, dense_weight):
    """Method 3 from a decomposed model: each LowRankLinear becomes a BlendedLinear with the W that dense_weight(name) gives. Returns the line
    that says what was done."""
    def make(name, low):
        with torch.device("meta"):
            layer = BlendedLinear(low.in_features, low.out_features, low.rank, bias=False)
        layer.weight = nn.Parameter(dense_weight(name).to(low.A), requires_grad=False)
        layer.lowrank, layer.alpha = low, torch.ones((), device=low.A.device)
        return layer
    low = count_parameters(model)
    names = swap_layers(model, make, wanted=lambda m: isinstance(m, LowRankLinear))
    return f"blended {len(names)} linears: {_millions(count_parameters(model))} parameters while W is there, {_millions(low)} when alpha is 0"


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
    """W <- W + (alpha/r) B A in every adapted layer; the adapters stay in place, asleep, so that unmerge_lora can undo it.

    Returns the error that rounding the sums to the base's bits makes, relative to what was added: |W + D - rounded| / |D| over all layers.
    """
    if model.config.tied and isinstance(model.head, LoRALinear):
        raise InputError("the head shares its weights with the embedding, which the adapter is not for: it can't be merged, keep it beside")
    errors = [layer.add(1) for layer in _adapters(model) if not layer.merged]
    return math.sqrt(sum(e for e, _ in errors) / max(1e-30, sum(d for _, d in errors)))


def unmerge_lora(model):
    """Undo merge_lora, to the rounding of W's dtype."""
    for layer in _adapters(model):
        if layer.merged:
            layer.add(-1)


@torch.no_grad()
def start_from_error(layer, weight):
    """LoftQ's start of a LoRALinear on a quantized base Q: (alpha/r) B A is the best approximation of W - Q of its rank, so that training begins
    nearer to the model as it was. Returns the squared norms of W - Q and of what is left of it.

    LoftQ goes on to round W - B A anew, and so on; that would give each adapter a base of its own, and here one base serves many.
    """
    error = weight.to(layer.A.device).float() - layer.base.dense_weight().float()
    A, B = svd_factors(error, layer.r)
    root = math.sqrt(layer.scale)
    layer.A.copy_(A / root)
    layer.B.copy_(B / root)
    return error.square().sum().item(), (error - layer.delta()).square().sum().item()


def drop_lora(model):
    """Take the adapters off; a merged one stays inside its base."""
    return len(swap_layers(model, lambda name, layer: layer.base, wanted=lambda m: isinstance(m, LoRALinear)))
