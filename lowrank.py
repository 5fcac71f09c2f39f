"""Low-rank linear layers (sections III.B, IV.A and V.A of the paper): y = B A x in place of y = W x.

A weight W of n_out x n_in numbers is replaced by B (n_out x r) times A (r x n_in): r (n_in + n_out) numbers,
and as many multiplications for each token. That is less than W's where r < n_in n_out / (n_in + n_out).

       x (n_in)           x (n_in)               x (n_in)                   x (n_in)
          |                  |                  /        \\                /        \\
          |                  A (r x n_in)   W (frozen)   A            W (frozen)   A
          W                  |                 |         B               |         B
          |                  B (n_out x r)    * a    * (1 - a)           |    * alpha/r
          |                  |                  \\        /                \\        /
       y (n_out)          y (n_out)              y (n_out)                  y (n_out)
       dense, eq. 4       methods 1, 2, eq. 5    method 3, eq. 6            LoRA, eq. 7

    Method 1    LowRankLinear with random factors, trained from scratch.
    Method 2    LowRankLinear whose factors are the truncated SVD of a pretrained W.
    Method 3    BlendedLinear: begins mostly as W (a = 0.9), ends as B A (a = 0), then is a LowRankLinear.
    Finetuning  LoRALinear: W stays, B A is learned beside it.

    replace_linears(model, 192)                             # method 1: every linear layer, in place
    attach_lora(model, r=8, alpha=32, targets=["q", "v"])
    python train.py --model gpt2 --rank 192
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common.cli import refuse
from model import Layer, count_parameters, dense_weight, is_linear, multiplications

FLOAT32_IS_ENOUGH = 1e-3  # if the eigenvalues that are cut off add up to more than this times the largest

def check_rank(rank, in_features, out_features):
    most = min(in_features, out_features)
    refuse(not 1 <= rank <= most,
           f"rank must be in 1..{most} for a {in_features}x{out_features} layer, got {rank}")

# ----------------------------------------------------------------------------- the layers

class LowRankLinear(Layer):
    """y = B (A x) + bias, equation 5. A: (r, in), B: (out, r), bias: (out) or None."""

    def __init__(self, in_features, out_features, rank, bias=True, start="normal"):
        super().__init__()
        check_rank(rank, in_features, out_features)
        self.in_features, self.out_features, self.rank, self.start = in_features, out_features, rank, start
        self.multiplications = rank * (in_features + out_features)
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.empty(out_features, rank))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.init_weights()

    def init_weights(self, std=0.02):
        init_factors(self.A, self.B, std, self.start)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x):
        h = F.linear(x, self.A)                # (..., r)
        return F.linear(h, self.B, self.bias)  # (..., out)

    def last_product(self, x, dtype):
        return F.linear(x, self.A), self.B

    def dense_weight(self):
        return self.B @ self.A

class LowRankEmbedding(Layer):
    """W^E of low rank: a token's row of A (vocabulary, r), then B (n, r). tokens (...) -> (..., n)."""

    def __init__(self, num_embeddings, embedding_dim, rank):
        super().__init__()
        check_rank(rank, num_embeddings, embedding_dim)
        self.rank, self.multiplications = rank, rank * embedding_dim  # looking up a row of A takes none
        self.A = nn.Parameter(torch.empty(num_embeddings, rank))
        self.B = nn.Parameter(torch.empty(embedding_dim, rank))
        self.init_weights()

    def init_weights(self, std=0.02):
        init_factors(self.A.T, self.B, std)

    def forward(self, tokens):
        return F.linear(F.embedding(tokens, self.A), self.B)

    def dense_weight(self):
        return self.A @ self.B.T  # (vocabulary, n)

class BlendedLinear(Layer):
    """Method 3, equation 6: y = a W x + (1 - a) B A x + bias. W is frozen; A, B and the bias learn."""

    def __init__(self, in_features, out_features, rank, bias=True):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.lowrank = LowRankLinear(in_features, out_features, rank, bias)
        self.multiplications = in_features * out_features + self.lowrank.multiplications
        self.register_buffer("alpha", torch.ones(()))  # in the checkpoint: a resumed run goes on with it

    def init_weights(self, std=0.02):
        nn.init.normal_(self.weight, std=std)
        self.alpha.fill_(1)

    def forward(self, x):
        h = F.linear(x, self.lowrank.A)  # (..., r)
        y = self.alpha * F.linear(x, self.weight) + (1 - self.alpha) * F.linear(h, self.lowrank.B)
        return y if self.bias is None else y + self.bias

    @property
    def bias(self):
        return self.lowrank.bias

    def dense_weight(self):
        return self.alpha * self.weight + (1 - self.alpha) * self.lowrank.dense_weight()

class LoRALinear(Layer):
    """Equation 7: y = base(x) + (alpha/r) B A x. The base, any linear layer, is frozen; B starts at 0."""

    def __init__(self, base, r, alpha, dropout=0.0):
        super().__init__()
        check_rank(r, base.in_features, base.out_features)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.r, self.scale = r, alpha / r
        self.multiplications = multiplications(base) + r * (self.in_features + self.out_features)
        self.base = base.requires_grad_(False)
        device = [*base.parameters(), *base.buffers()][0].device  # a quantized base has buffers alone
        self.A = nn.Parameter(torch.empty(r, self.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(self.out_features, r, device=device))
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as loralib and PEFT

    def forward(self, x):
        if isinstance(self.base, Layer) and not self.training:
            y = self.base.with_lora(x, self.A, self.B, self.scale)  # one fused kernel, for few rows on a GPU
            if y is not None:
                return y
        h = self.scale * F.linear(self.dropped(x).to(self.A.dtype), self.A)  # (..., r)
        return self.base(x) + F.linear(h, self.B)

    def dropped(self, x):
        """Dropout of x. Layers that share an input, as W^Q, W^K and W^V do, share one mask."""
        if not self.training or self.dropout.p == 0:
            return x
        if getattr(x, "dropped", None) is None:
            x.dropped = self.dropout(x)  # kept on the tensor: one mask and one result for the three
        return x.dropped

    @property
    def bias(self):
        return self.base.bias

    def delta(self):
        """What the adapter adds to W: (alpha/r) B A, (out, in)."""
        return self.scale * (self.B @ self.A)

    def dense_weight(self):
        W = dense_weight(self.base)
        return W + self.delta().to(W.dtype)

# ----------------------------------------------------------------------------- the values of factors

@torch.no_grad()
def init_factors(A, B, std, start="normal"):
    """Random A (r, in) and B (out, r), in place of a dense W (out, in) of deviation std.
    start: normal      normal numbers of deviation s; r s^4 = std^2 gives B A the variance of W
           orthogonal  orthonormal rows of A and columns of B, scaled so that |B A|_F = std sqrt(in out)"""
    refuse(start not in ("normal", "orthogonal"), f"start must be normal or orthogonal, got {start}")
    out, r, width = *B.shape, A.shape[1]
    for factor in (A, B):
        if start == "orthogonal":
            nn.init.orthogonal_(factor, gain=math.sqrt(std) * (width * out / r) ** 0.25)
        else:
            factor.normal_(std=math.sqrt(std) / r ** 0.25)

def svd_factors(W, r):
    """B = U S^1/2 (out, r) and A = S^1/2 V^T (r, in), the truncated SVD of W = U S V^T (out, in). From the
    eigenproblem of the smaller side, W W^T = U S^2 U^T (then A ~ U^T W) or W^T W = V S^2 V^T (then B ~ W V):
    several times as fast as the SVD of W itself."""
    W = W.detach().float()
    _, vectors = eigen(W, r, gram)
    return balanced(vectors, vectors.T @ W) if W.shape[0] <= W.shape[1] else balanced(W @ vectors, vectors.T)

def gram(W):
    """W W^T or W^T W, whichever is smaller: W (out, in) -> (m, m)."""
    return W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W

def eigen(W, r, gram_of):
    """All eigenvalues (m,) of gram_of(W) in float64, largest first, and r eigenvectors, columns of (m, r).
    Float32 loses eigenvalues below 1e-7 of the largest; if those that are cut off add up to less than 1e-3 of
    it, all is done again in float64, which takes twice the time."""
    values, vectors = torch.linalg.eigh(gram_of(W))
    if values[:-r].clamp_min(0).sum() < FLOAT32_IS_ENOUGH * values[-1]:
        values, vectors = torch.linalg.eigh(gram_of(W.double()))
    return values.flip(-1).clamp_min(0).double(), vectors.flip(-1)[:, :r].float()

def eigenvalues(G):
    """Of a symmetric G (m, m) without negative ones: (m,) on the CPU, largest first."""
    return torch.linalg.eigvalsh(G).flip(-1).clamp_min(0).cpu()

def balanced(B, A):
    """The same product; B's columns are as long as A's rows, so that one learning rate suits both."""
    b, a = B.norm(dim=0), A.norm(dim=1)
    scale = (a / b).sqrt().nan_to_num(1).clamp(1e-10, 1e10)  # either may be 0 where W has a lower rank
    return (B * scale).contiguous(), (A / scale[:, None]).contiguous()

# ----------------------------------------------------------------------------- swapping layers

def swap_layers(model, make, wanted=is_linear):
    """Replace in place each module that `wanted` accepts by make(name, module); where make returns None it
    stays. It does not look inside a wanted layer. Returns the names of what was replaced."""
    swapped = []

    def visit(parent, prefix):
        for name, child in list(parent.named_children()):
            if not wanted(child):
                visit(child, f"{prefix}{name}.")
                continue
            layer = make(prefix + name, child)
            if layer is not None:
                setattr(parent, name, layer.train(child.training))
                swapped.append(prefix + name)
    visit(model, "")
    return swapped

def replace_linears(model, rank, method=1, embedding_rank=0, start="normal", head=True):
    """Replace every linear layer, and with `head` also W^H, by one of `rank`; with embedding_rank W^E, by
    random factors. method 1: random factors (`init_factors`); 2: the truncated SVD of the weight; 3: the
    same, blended with that weight. Returns the line that says what was done."""
    before = count_parameters(model)
    linears = {name: m for name, m in model.named_modules()
               if isinstance(m, nn.Linear) and (head or name != "head")}
    for name, dense in tqdm(linears.items(), "decomposing", unit=" layers", disable=None, leave=False):
        check_rank(rank, dense.in_features, dense.out_features)
        if method > 1 and not dense.weight.is_meta:
            layer = from_factors(dense, *svd_factors(dense.weight, rank))
        else:
            with torch.device(dense.weight.device):
                bias = dense.bias is not None
                layer = LowRankLinear(dense.in_features, dense.out_features, rank, bias, start)
        model.set_submodule(name, layer)
    what = f"{len(linears)} linears"
    if embedding_rank:
        with torch.device(model.embed.weight.device):
            model.embed = LowRankEmbedding(*model.embed.weight.shape, embedding_rank)
        what += " and the embedding"
    after = count_parameters(model)
    line = f"replaced {what}: {millions(before)} -> {millions(after)} parameters ({before / after:.2f}x)"
    return line if method != 3 else f"{line}; {blend_with(model, lambda name: linears[name].weight)}"

def millions(count):
    return f"{count / 1e6:,.1f}M"

def from_factors(dense, B, A):
    """The LowRankLinear of B (out, r) and A (r, in) in the place of another layer, whose bias it takes."""
    with torch.device("meta"):
        layer = LowRankLinear(dense.in_features, dense.out_features, len(A), bias=False)
    layer.A, layer.B = (nn.Parameter(factor.to(next(dense.parameters()))) for factor in (A, B))
    layer.bias = dense.bias
    return layer

# ----------------------------------------------------------------------------- method 3

def blend_alpha(step, steps, start=0.9, until=0.5):
    """The schedule of a: from `start` (at 1, A and B would get no gradient) along a half cosine to 0 at
    `until` of all steps."""
    progress = step / max(1, until * steps)
    return 0.0 if progress >= 1 else start * 0.5 * (1 + math.cos(math.pi * progress))

def set_alpha(model, alpha):
    """Set a of equation 6 in every BlendedLinear; at 0 its LowRankLinear takes its place. Returns how many
    were replaced."""
    def make(name, layer):
        layer.alpha.fill_(alpha)
        return layer.lowrank if alpha == 0 else None
    return len(swap_layers(model, make, wanted=lambda m: isinstance(m, BlendedLinear)))

def blend_with(model, dense_weight):
    """Blend each LowRankLinear with the W of dense_weight(name). Returns the line that says what was done."""
    low = count_parameters(model)

    def make(name, layer):
        with torch.device("meta"):
            blend = BlendedLinear(layer.in_features, layer.out_features, layer.rank, bias=False)
        W = dense_weight(name).detach().to(layer.A, copy=True)
        blend.lowrank, blend.weight = layer, nn.Parameter(W, requires_grad=False)
        blend.alpha = torch.ones((), device=W.device)
        return blend

    names = swap_layers(model, make, wanted=lambda m: isinstance(m, LowRankLinear))
    now = millions(count_parameters(model))
    return f"blended {len(names)} linears: {now} parameters while W is there, {millions(low)} when alpha is 0"

def attach_lora(model, r=8, alpha=32, targets=("q", "k", "v", "qkv"), dropout=0.0):
    """Freeze the model and put a LoRALinear around each layer whose last name is in `targets`."""
    base = count_parameters(model)
    model.requires_grad_(False)

    def make(name, layer):
        return LoRALinear(layer, r, alpha, dropout) if name.rsplit(".", 1)[-1] in targets else None
    wrapped = swap_layers(model, make)
    refuse(not wrapped, f"no layer is called {', '.join(targets)}")
    trainable = count_parameters(model) - base
    return (f"attached {len(wrapped)} adapters: {trainable:,} trainable parameters "
            f"({trainable / base:.2%} of the base's {millions(base)})")

@torch.no_grad()
def merge_lora(model):
    """Every adapted layer becomes its base with W + (alpha/r) B A in place of W, in its own format. Returns
    |rounding error| / |what was added|, Frobenius norms over all layers."""
    refuse(model.config.tied and isinstance(model.head, LoRALinear), "the head shares its weights with the "
           "embedding, and merging would change both: keep the adapter beside the model")
    lost = added = 0.0

    def make(name, layer):
        nonlocal lost, added
        base, delta = layer.base, layer.delta()
        W = dense_weight(base).float() + delta
        if isinstance(base, Layer):
            base = base.with_weight(W)
        else:
            base.weight.copy_(W)
        lost += (dense_weight(base) - W).square().sum().item()
        added += delta.square().sum().item()
        return base

    swap_layers(model, make, wanted=lambda m: isinstance(m, LoRALinear))
    return math.sqrt(lost / max(1e-30, added))
