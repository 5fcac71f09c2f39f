"""int8 and int4 weights (section V.B): integers q for W, a scale s and an offset o for each vector of it.

    s = (max - min) / (2^bits - 1)         of each vector: a whole row of W, or a group of numbers in a row
    o = min + 2^(bits - 1) s               so that q is centred: -128..127, or -8..7
    q = round((w - o) / s),   w ~ s q + o

s and o are float16: with groups of 64 a weight takes 4.5 or 8.5 bits. The product can do without W itself:

    y = W x = s * (q x) + o * sum(x)       over each group, and added up over the groups of a row

Decoding takes the time of reading W, of which integers are fewer bytes. Without g++ or nvcc W is dequantized:

    rows of x          on a CPU                                               on a GPU
    few                beyond/cpu_kernels.py: W in integers, x in 16 bits     kernels.cu, W in integers
    many               the same                                               W is dequantized
    with a gradient    W is dequantized                                       kernels.cu for few

    python checkpoint.py quantize out/train out/int8 --bits 8
    python train.py --rank 192 --bits 4    # section IV: train with rounded weights
"""
import copy
import math
from types import MethodType

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.cli import InputError, refuse
from lowrank import BlendedLinear, LowRankLinear
from model import Layer, Packed, last_product

SMALLEST_HALF = 2.0 ** -24  # a vector of equal numbers has no range; its scale must not be 0
MATVEC_ROWS = 16            # kernels.cu reads a matrix once for up to 16 rows of x
MANY_ROWS = 128             # with more, a GPU is faster with a dequantized W

def check_format(bits, group, width):
    """The length of a vector. group: that length, 0 for a whole row, or None: at 8 bits a row, at 4 bits the
    largest power of two up to 64 that divides the row, or the row if that is less than 16."""
    refuse(bits not in (4, 8), f"bits must be 4 or 8, got {bits}")
    if group is None:
        group = math.gcd(64, width) if bits == 4 and width % 16 == 0 else width
    group = group or width
    refuse(group < 0 or width % group,
           f"groups of {group} do not divide a row of {width}: choose a divisor, or 0 (a row)")
    return group

def scale_and_offset(low, high, bits):
    """float16 s and o of vectors whose numbers lie in low..high."""
    scale = ((high - low) / (2 ** bits - 1)).clamp_min(SMALLEST_HALF).half()
    return scale, (low + 2 ** (bits - 1) * scale.float()).half()

def nearest(w, scale, offset, bits):
    """The integers nearest to (w - o) / s, still as floats. s and o in float32, broadcast to w's shape."""
    return (w - offset).div_(scale).round_().clamp_(-2 ** (bits - 1), 2 ** (bits - 1) - 1)

def encode(w, scale, offset, bits):
    """`nearest` with a scale for each group, as int8: w (..., in), s and o (..., in / group) -> (..., in)."""
    w = w.unflatten(-1, (scale.shape[-1], -1))
    return nearest(w, scale.float()[..., None], offset.float()[..., None], bits).to(torch.int8).flatten(-2)

def decode(q, scale, offset):
    """s q + o in float32: q (..., in), s and o (..., in / group) -> (..., in)."""
    w = q.unflatten(-1, (scale.shape[-1], -1)).to(torch.float32, copy=True)
    return w.mul_(scale.float()[..., None]).add_(offset.float()[..., None]).flatten(-2)

def quantize_rows(weight, bits, group):
    """Plain min-max: weight (out, in) -> q int8 (out, in), s and o float16 (out, in / group)."""
    w = weight.detach().float()
    vectors = w.unflatten(-1, (-1, group))
    scale, offset = scale_and_offset(vectors.amin(-1), vectors.amax(-1), bits)  # (out, groups)
    return encode(w, scale, offset, bits), scale, offset

def check_range(weight, bits, group, name):
    """Refuse what float16 s and o can't hold. They are multiples of 2^-24, which moves a weight by some
    2^(bits - 2) of these: at most twice the finest that counts in the matrix, half a step or 2^-10 of its
    largest number."""
    vectors = weight.detach().float().unflatten(-1, (-1, group))
    low, high = vectors.amin(-1), vectors.amax(-1)  # ten times as fast as aminmax
    s, o = scale_and_offset(low, high, bits)
    finest = max((high - low).max() / (2 ** bits - 1) / 2, torch.maximum(high, -low).max() / 1024)
    fits = (s + o).isfinite().all() and not 0 < finest < (2 ** (bits - 3) + 2) * SMALLEST_HALF
    refuse(not fits, f"{name} has weights from {low.min():.3g} to {high.max():.3g}: float16 scales can't "
           f"hold these at {bits} bits, keep the model at 16 (--bits 16)")

def pack(q, bits):
    """q int8 (out, in) -> rows of bytes, padded to a multiple of 16 so that a GPU can load 16 at a time.
    Eight int4, as q + 8, share a 32-bit word, in the order in which kernels.cu takes them out:

        bits    31..28  27..24  23..20  19..16  15..12  11..8   7..4    3..0
        weight    7       5       3       1       6       4       2       0

    (word & 0x000f000f) is weights 0 and 1, four bits further 2 and 3: pairs, as tensor cores want them."""
    if bits == 8:
        return F.pad(q, (0, -q.shape[1] % 16))
    pairs = F.pad(q, (0, -q.shape[1] % 32)).short().add_(8).view(torch.int32)  # (out, in / 2)
    first, second, third, fourth = pairs.unflatten(1, (-1, 4)).unbind(-1)  # (out, words)
    return (first | second << 4 | third << 8 | fourth << 12).view(torch.uint8)

def unpack(packed, bits, width):
    """The inverse of pack: -> int8 (out, width)."""
    if bits == 8:
        return packed[:, :width]
    shifts = torch.arange(0, 16, 4, dtype=torch.int32, device=packed.device)
    pairs = packed.view(torch.int32)[..., None] >> shifts & 0x000f000f  # (out, words, 4)
    return pairs.flatten(1).view(torch.int16)[:, :width].to(torch.int8).sub_(8)

class QuantMatrix(Packed):
    """W (out, in) as integers; layers may share one. times(x) is x W^T, rows(i) some rows, dense() all."""

    def __init__(self, out, width, bits, group=None):
        super().__init__()
        self.out_features, self.in_features, self.bits = out, width, bits
        self.packed_weights = out * width  # for model.count_parameters
        self.group = check_format(bits, group, width)
        row_bytes = -(-width * bits // 128) * 16  # a multiple of 16
        self.register_buffer("q", torch.zeros(out, row_bytes, dtype=torch.int8 if bits == 8 else torch.uint8))
        self.register_buffer("scale", torch.zeros(out, width // self.group, dtype=torch.float16))
        self.register_buffer("offset", torch.zeros(out, width // self.group, dtype=torch.float16))

    @classmethod
    def of(cls, weight, bits, group=None, rounding=quantize_rows, name="a matrix"):
        """Quantize weight (out, in); rounding(weight, bits, group) gives q, s, o. On meta: only shapes."""
        with torch.device(weight.device):
            matrix = cls(*weight.shape, bits, group)
        if weight.is_meta:
            return matrix
        check_range(weight, bits, matrix.group, name)
        q, scale, offset = (t.contiguous() for t in rounding(weight, bits, matrix.group))
        matrix.q, matrix.scale, matrix.offset = pack(q, bits), scale, offset
        return matrix

    def parts(self):
        return self.q, self.scale, self.offset

    def rows(self, index):
        """Rows of W in float32: index (...) -> (..., in)."""
        q, scale, offset = (part[index.flatten()] for part in self.parts())
        return decode(unpack(q, self.bits, self.in_features), scale, offset).view(*index.shape, -1)

    def dense(self, dtype=torch.float32):
        """W (out, in)."""
        if self.q.is_cuda and load_kernels():
            return load_kernels().dequantize(self, dtype)
        return decode(unpack(self.q, self.bits, self.in_features), self.scale, self.offset).to(dtype)

    def times(self, x):
        """x (..., in) -> x W^T (..., out), in x's dtype, or autocast's; the gradient goes to x."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = on_cpu(x, self)
        return _Product.apply(x, self) if y is None else y

    def _apply(self, fn, *args):
        saved = self.scale, self.offset
        super()._apply(fn, *args)
        if self.scale.dtype != torch.float16:  # model.bfloat16() converts all floats, but these stay float16
            self.scale, self.offset = (t.to(self.q.device) for t in saved)
        return self

class _Product(torch.autograd.Function):
    """x W^T and its gradient g W: by kernels.cu for few rows on a GPU, else with W dequantized for the
    moment. Nothing but the integers is kept between the two."""

    @staticmethod
    def forward(ctx, x, W):
        ctx.W = W
        few = MANY_ROWS if W.group in (W.in_features, 64, 128, 256) else MATVEC_ROWS  # the matmul kernel's
        y = on_gpu("product", x, W, rows=few)
        return F.linear(x, W.dense(x.dtype)) if y is None else y

    @staticmethod
    def backward(ctx, g):  # (..., out) -> (..., in)
        y = on_gpu("matmul_back", g, ctx.W, rows=MANY_ROWS)
        return g @ ctx.W.dense(g.dtype) if y is None else y, None

def on_cpu(x, A, B=None, bias=None):
    """x A^T, or x A^T B^T + bias, from integers. None outside torch.inference_mode or without a compiler."""
    if x.is_cuda or not torch.is_inference_mode_enabled():  # recompute.py computes the same bits twice
        return None
    from beyond.cpu_kernels import product
    return product(x, A, B, bias)

def on_gpu(name, x, *args, rows=MATVEC_ROWS, bias=None):
    """The function of kernels.cu for x (..., n), in 16 bit, + bias. None on a CPU, for more rows, where a
    backward pass may follow, and where there is no kernel or no compiler."""
    if not x.is_cuda or x.numel() > rows * x.shape[-1] or torch.is_grad_enabled() or load_kernels() is None:
        return None
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = getattr(load_kernels(), name)(flat.bfloat16() if x.dtype == torch.float32 else flat, *args)
    return None if y is None else add_bias(y.view(*x.shape[:-1], y.shape[1]).to(x.dtype), bias)

def load_kernels():
    """beyond.gpu_kernels.Kernels, or None."""
    from beyond.gpu_kernels import load
    return load()

# ------------------------------------------------------------------------- layers

def add_bias(y, bias):
    return y if bias is None else y + bias.to(y.dtype)

class QuantLinear(Layer):
    """y = W x + bias with W: (out, in) as integers."""

    def __init__(self, W, bias=None):
        super().__init__()
        self.in_features, self.out_features = W.in_features, W.out_features
        self.multiplications = W.packed_weights
        self.W, self.bias = W, bias
        self.requires_grad_(False)

    def forward(self, x):
        return add_bias(self.W.times(x), self.bias)  # (..., out)

    def with_lora(self, x, A, B, scale):
        if not x.is_cuda:
            return None
        dtype = torch.float16 if x.dtype == torch.float16 else torch.bfloat16
        A, B = A.to(dtype).contiguous(), B.to(dtype).contiguous()
        return on_gpu("lora", x, self.W, A, B, scale, bias=self.bias)

    def last_product(self, x, dtype):
        return x, self.W.dense(dtype)

    def with_weight(self, W):
        return QuantLinear(QuantMatrix.of(W, self.W.bits, self.W.group), self.bias)

    def dense_weight(self):
        return self.W.dense()

class QuantLowRank(Layer):
    """y = B (A x) + bias, A (r, in) and B (out, r) as integers: few rows take one launch, or one call."""

    def __init__(self, A, B, bias=None):
        super().__init__()
        self.in_features, self.out_features, self.rank = A.in_features, B.out_features, A.out_features
        self.multiplications = A.packed_weights + B.packed_weights
        self.A, self.B, self.bias = A, B, bias
        self.requires_grad_(False)

    def forward(self, x):
        y = on_gpu("lowrank", x, self.A, self.B, bias=self.bias)
        if y is None and not torch.is_autocast_enabled(x.device.type):
            y = on_cpu(x, self.A, self.B, self.bias)
        return add_bias(self.B.times(self.A.times(x)), self.bias) if y is None else y  # (..., out)

    def dense_weight(self):
        return self.B.dense() @ self.A.dense()

class QuantEmbedding(Layer):
    """tokens (...) -> rows of W: (vocabulary, n), in float32."""
    multiplications = 0  # looking up a row multiplies nothing

    def __init__(self, W):
        super().__init__()
        self.W = W

    def forward(self, tokens):
        return self.W.rows(tokens)

    def dense_weight(self):
        return self.W.dense()

KINDS = {"quant": QuantLinear, "quant lowrank": QuantLowRank, "quant embedding": QuantEmbedding}

def matrices(layer):
    return [m for m in layer.modules() if isinstance(m, QuantMatrix)]

def describe(layer):
    """What config.json says of a quantized layer."""
    kind = next(kind for kind, cls in KINDS.items() if type(layer) is cls)
    form = dict(kind=kind, bits=matrices(layer)[0].bits, group=[m.group for m in matrices(layer)])
    return form | dict(rank=layer.rank) if kind == "quant lowrank" else form

def from_description(form, dense):
    """An empty layer of the form that describe() gave, in the place of `dense`: nn.Linear or nn.Embedding."""
    out, width = dense.weight.shape
    shapes = [(form["rank"], width), (out, form["rank"])] if "rank" in form else [(out, width)]
    parts = [QuantMatrix(*shape, form["bits"], group) for shape, group in zip(shapes, form["group"])]
    if isinstance(dense, nn.Linear) and dense.bias is not None:
        parts.append(nn.Parameter(torch.empty(out)))
    return KINDS[form["kind"]](*parts)

def holding(layer, W):
    """The quantized layer with W in the place of a dense one."""
    return QuantEmbedding(W) if isinstance(layer, nn.Embedding) else QuantLinear(W, layer.bias)

def quantize_layer(layer, bits, group=None, rounding=quantize_rows, name="a layer"):
    """The quantized layer that takes the place of a dense or low-rank one."""
    def of(weight, part):
        rounds = quantize_rows if isinstance(layer, nn.Embedding) else rounding
        return QuantMatrix.of(weight, bits, group, rounds, f"{name}.{part}")
    if isinstance(layer, LowRankLinear):
        return QuantLowRank(of(layer.A, "A"), of(layer.B, "B"), layer.bias)
    if isinstance(layer, (nn.Linear, nn.Embedding)):
        return holding(layer, of(layer.weight, "weight"))
    why = "let alpha fall to 0 first" if isinstance(layer, BlendedLinear) else "take a model of 16 or 32 bit"
    raise InputError(f"a {type(layer).__name__} can't be quantized: {why}")

def tie_quantized(model):
    """Give a tied head the embedding's matrix."""
    tied = model.config.tied and isinstance(model.head, (nn.Linear, QuantLinear))
    if tied and isinstance(model.embed, QuantEmbedding):
        model.head = QuantLinear(model.embed.W)

def formats(model, bits, group=None):
    """name -> (bits, group) of what is quantized: linear layers and a dense W^E. The rest is left as it is.
    W^E and W^H in one matrix, used for input and for output, stay at 8 bits."""
    dense = isinstance(model.head, nn.Linear) and isinstance(model.embed, nn.Embedding)
    kinds = nn.Linear, LowRankLinear, BlendedLinear, nn.Embedding
    taken = [name for name, m in model.named_modules() if isinstance(m, kinds) and m is not model.positions]
    forms = dict.fromkeys(taken, (bits, group))
    if bits == 4 and dense and model.head.weight is model.embed.weight:
        forms["embed"] = forms["head"] = 8, None
    return forms

def quantize(model, bits, group=None, rounding=quantize_rows):
    """Quantize the layers of formats(), in place. rounding: quantize_rows, or one of beyond/rounding.py."""
    for name, form in formats(model, bits, group).items():
        layer = model.get_submodule(name)
        model.set_submodule(name, quantize_layer(layer, *form, rounding, name).train(layer.training))
    tie_quantized(model)

# ------------------------------------------------------------------------- training with rounded weights

def fake_quantize(w, bits, group):
    """Section IV: w as it will be after quantization; the gradient passes straight through to w."""
    rounded = decode(*quantize_rows(w, bits, check_format(bits, group, w.shape[-1]))).to(w.dtype)
    return (w - w.detach()).add_(rounded)  # 0, with the gradient of w

def rounded(layer):
    """The layer as it will be after quantization; gradients pass through to its own parameters."""
    twin = copy.copy(layer)
    del twin.forward, twin.last_product  # its class's own again
    twin._parameters = {name: fake_quantize(p, *layer.rounded_to) if p is not None and p.dim() == 2 else p
                        for name, p in layer._parameters.items()}
    return twin

def rounded_forward(layer, x):
    if isinstance(layer, nn.Embedding):  # the rows of these tokens alone
        return fake_quantize(F.embedding(x, layer.weight), *layer.rounded_to)
    return rounded(layer)(x)

def attach_fake_quantization(model, bits, group=None):
    """Every layer that quantize() would take computes with rounded matrices: training sees the loss of the
    model that quantize(model, bits, group) will make. Returns how many layers."""
    forms = formats(model, bits, group)
    for name, form in forms.items():
        layer = model.get_submodule(name)
        layer.rounded_to, layer.forward = form, MethodType(rounded_forward, layer)
        layer.last_product = MethodType(lambda own, x, dtype: last_product(rounded(own), x, dtype), layer)
    return len(forms)
