"""int8 and int4 weights (section V.B): each vector of W is stored as small integers q with a scale s and an offset o.

    s = (max - min) / (2^bits - 1)         of each vector: a whole row of W, or a group of its numbers along the input
    o = min + 2^(bits - 1) s               so that q is centred: -128..127, or -8..7
    q = round((w - o) / s),   w ~ s q + o

s and o are float16, so with a group of 64 a weight takes 4.5 or 8.5 bits. The product never needs W itself:

    y = W x = s * (q x) + o * sum(x)       over each group, and added up over the groups of a row

    layer                          kept as
    nn.Linear, LowRankLinear  ->   QuantLinear (W), QuantLowRank (A and B)
    nn.Embedding, LowRankEmbedding -> QuantEmbedding (W), QuantLowRankEmbedding (A and B); a head tied to it shares W

The layers are frozen, and gradients flow through them to x, so LoRA trains on top; the backward pass dequantizes a matrix for as
long as it multiplies with it. How x meets the integers on a CPU and on a GPU is products.py.

    quantize(model, 8)                                  # whole rows, embedding and head too, in place
    quantize(model, 4)                                  # groups of 64; rounding.py does it better, with some text
    attach_fake_quantization(model, 8)                  # section IV: train as if the weights were 8 bit
"""
import copy
import functools
import math
import struct
from types import MethodType

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

from beyond.products import as_rows, cpu_product, few_rows_cpu, huge_pages, load_kernels, one_launch, product
from common.cli import InputError
from lowrank import BlendedLinear, LowRankEmbedding, LowRankLinear, swap_layers
from model import Layer

DEFAULT_GROUP = {8: 0, 4: 64}  # 0: the whole row is one vector
SMALLEST_HALF = 2.0 ** -24     # a vector of equal numbers has no range; its scale must not be 0


def check_format(bits, group, width):
    """The length of a vector: `group`, or the whole row where that is 0 or None and the default for these bits says so."""
    if bits not in DEFAULT_GROUP:
        raise InputError(f"bits must be 4 or 8, got {bits}")
    if group is None:  # the default adapts: the largest power of two up to 64 that divides the row, if that is worth a scale
        group = math.gcd(DEFAULT_GROUP[bits], width)
        group = group if group >= 16 else 0
    if group < 0 or width % (group or width):
        raise InputError(f"groups of {group} do not divide a row of {width}: choose a divisor of {width}, or 0 for whole rows")
    return group or width


# ----------------------------------------------------------------------------- numbers to integers and back

def scale_and_offset(low, high, bits):
    """float16 s and o of vectors whose numbers lie in low..high."""
    scale = ((high - low) / (2 ** bits - 1)).clamp_min(SMALLEST_HALF).half()
    return scale, (low + 2 ** (bits - 1) * scale.float()).half()


def encode(w, scale, offset, bits):
    """The nearest integers: w (..., group), s and o (...) -> int8 (..., group)."""
    q = ((w - offset.float()[..., None]) / scale.float()[..., None]).round_()
    return q.clamp_(-2 ** (bits - 1), 2 ** (bits - 1) - 1).to(torch.int8)


def decode(q, scale, offset):
    """s q + o in float32: q (..., group), s and o (...)."""
    return q.to(torch.float32, copy=True).mul_(scale.float()[..., None]).add_(offset.float()[..., None])


def quantize_rows(weight, bits, group):
    """Plain min-max: weight (out, in) -> q int8 (out, in), s and o float16 (out, in / group)."""
    w = weight.detach().float().unflatten(-1, (-1, group))  # (out, groups, group)
    scale, offset = scale_and_offset(w.amin(-1), w.amax(-1), bits)
    return encode(w, scale, offset, bits).flatten(1), scale, offset


def pack(q, bits):
    """q int8 (out, in) -> rows of bytes, each padded to a multiple of 16 so that a GPU can load 16 at a time.

    Two int4 share a byte, as q + 8, eight in a 32-bit word, in the order in which kernels.cu takes them out:

        bits    31..28  27..24  23..20  19..16  15..12  11..8   7..4    3..0
        weight    7       5       3       1       6       4       2       0

    (word & 0x000f000f) is then weights 0 and 1, four bits further are 2 and 3: pairs, as the tensor cores want them.
    """
    if bits == 8:
        return F.pad(q, (0, -q.shape[1] % 16))
    pairs = F.pad(q, (0, -q.shape[1] % 32)).short().add_(8).view(torch.int32)  # (out, in / 2): weights 2i and 2i + 1, 16 bits apart
    first, second, third, fourth = pairs.unflatten(1, (-1, 4)).unbind(-1)  # (out, words)
    return (first | second << 4 | third << 8 | fourth << 12).view(torch.uint8)


def unpack(packed, bits, width):
    """The inverse of pack: -> int8 (out, width)."""
    if bits == 8:
        return packed[:, :width]
    words = packed.view(torch.int32)
    pairs = torch.stack([words >> 4 * i & 0x000f000f for i in range(4)], -1)  # (out, words, 4)
    return pairs.flatten(1).view(torch.int16)[:, :width].to(torch.int8).sub_(8)


# ----------------------------------------------------------------------------- a matrix of integers

class QuantMatrix(nn.Module):
    """W (out, in) as integers. Not a layer: `times(x)` is x W^T, `rows(i)` some rows, `dense()` all of them."""

    def __init__(self, out_features, in_features, bits, group=None):
        super().__init__()
        self.out_features, self.in_features, self.bits = out_features, in_features, bits
        self.group = check_format(bits, group, in_features)
        bytes_in_row = -(-in_features * bits // 128) * 16
        self.register_buffer("q", torch.zeros(out_features, bytes_in_row, dtype=torch.int8 if bits == 8 else torch.uint8))
        self.register_buffer("scale", torch.zeros(out_features, in_features // self.group, dtype=torch.float16))
        self.register_buffer("offset", torch.zeros(out_features, in_features // self.group, dtype=torch.float16))
        self.whole_chunks = self.group == in_features or self.group % 64 == 0  # what kernels_cpu.cpp takes
        self.made_form = None, b""

    @classmethod
    def of(cls, weight, bits, group=None, rounding=quantize_rows):
        """Quantize weight (out, in). rounding(weight, bits, group) chooses the integers; on the meta device only shapes are made."""
        with torch.device(weight.device):
            matrix = cls(*weight.shape, bits, group)
        if not weight.is_meta:
            if not torch.isfinite(weight).all():
                raise InputError(f"a weight of {weight.shape[0]}x{weight.shape[1]} has numbers that are not finite: it can't be quantized")
            q, scale, offset = rounding(weight, bits, matrix.group)
            matrix.q, matrix.scale, matrix.offset = pack(q.contiguous(), bits), scale.contiguous(), offset.contiguous()
        return matrix

    @property
    def packed_weights(self):
        return self.out_features * self.in_features

    def rows(self, index):
        """Rows of W in float32: index (...) -> (..., in)."""
        q = unpack(self.q[index.flatten()], self.bits, self.in_features).unflatten(-1, (-1, self.group))
        return decode(q, self.scale[index.flatten()], self.offset[index.flatten()]).view(*index.shape, self.in_features)

    def dense(self, dtype=torch.float32):
        """W (out, in)."""
        if self.q.is_cuda and (kernels := load_kernels()):
            return kernels.dequantize(*self.parts(), self.in_features, dtype)
        q = unpack(self.q, self.bits, self.in_features).unflatten(-1, (-1, self.group))
        return decode(q, self.scale, self.offset).flatten(1).to(dtype)

    def times(self, x):
        """x (..., in) -> x W^T (..., out), in x's dtype, or autocast's; the gradient goes to x."""
        return product(x, self)

    def parts(self):
        return self.q, self.scale, self.offset

    def form(self):
        """The struct Matrix of kernels_cpu.cpp, as bytes. It holds addresses, so it is made anew when a tensor was replaced."""
        own = self._buffers  # self.q would look through three dictionaries
        key = own["q"].data_ptr(), own["scale"].data_ptr(), own["offset"].data_ptr()
        if self.made_form[0] != key:
            own.update({name: huge_pages.copy(own[name]) for name in ("q", "scale", "offset")})
            key = own["q"].data_ptr(), own["scale"].data_ptr(), own["offset"].data_ptr()
            self.made_form = key, struct.pack("@PPPiiii", *key, self.out_features, self.in_features, self.group, self.q.shape[1])
        return self.made_form[1]

    def _apply(self, fn, *args):
        before = {"scale": self.scale, "offset": self.offset}
        super()._apply(fn, *args)
        for name, exact in before.items():  # model.bfloat16() converts every buffer of floats: not these
            if getattr(self, name).dtype != torch.float16:
                setattr(self, name, exact.to(self.q.device))
        return self

    def extra_repr(self):
        return f"{self.out_features}x{self.in_features}, bits={self.bits}, group={self.group}"


# ----------------------------------------------------------------------------- layers

def _add_bias(y, bias):
    if bias is None:
        return y
    return y + bias.to(y.dtype) if torch.is_grad_enabled() else y.add_(bias)  # y is nobody else's


class QuantLinear(Layer):
    """y = W x + bias with W: (out, in) as integers."""

    def __init__(self, W, bias=None):
        super().__init__()
        self.in_features, self.out_features, self.W = W.in_features, W.out_features, W
        self.bias = bias

    def forward(self, x):
        return _add_bias(self.W.times(x), self.bias)  # (..., out)

    def with_lora(self, x, A, B, scale):
        """W x + scale B (A x) in one launch on a GPU, for up to 16 rows; None where there is no such kernel."""
        if not one_launch(x, self.W):
            return None
        rows = as_rows(x)
        y = load_kernels().lora(rows, *self.W.parts(), A.to(rows.dtype).contiguous(), B.to(rows.dtype).contiguous(), scale)
        return _add_bias(y.view(*x.shape[:-1], -1).to(x.dtype), self.bias)

    def last_product(self, x, dtype):
        return x, self.W.dense(dtype)

    def with_weight(self, W):
        return QuantLinear(QuantMatrix.of(W, self.W.bits, self.W.group), self.bias)

    @property
    def multiplications(self):
        return self.W.packed_weights

    def dense_weight(self):
        return self.W.dense()


class QuantLowRank(Layer):
    """y = B (A x) + bias with A: (r, in) and B: (out, r) as integers; for a few rows one launch on a GPU, one call on a CPU."""

    def __init__(self, A, B, bias=None):
        super().__init__()
        self.in_features, self.out_features, self.rank, self.A, self.B = A.in_features, B.out_features, A.out_features, A, B
        self.bias = bias

    def forward(self, x):
        A, B, bias = self.A, self.B, self.bias
        if few_rows_cpu(x, A, B) and not torch.is_autocast_enabled("cpu"):
            return cpu_product(x, A, B, bias)
        if one_launch(x, A, B):
            y = load_kernels().lowrank(as_rows(x), *A.parts(), *B.parts())
            return _add_bias(y.view(*x.shape[:-1], -1).to(x.dtype), bias)
        return _add_bias(B.times(A.times(x)), bias)  # (..., in) -> (..., r) -> (..., out)

    @property
    def multiplications(self):
        return self.A.packed_weights + self.B.packed_weights

    def dense_weight(self):
        return self.B.dense() @ self.A.dense()


class _Lookup(Layer):
    """An embedding answers in the dtype that the rest of the model computes in, which integers do not tell."""

    def __init__(self, table, dtype):
        super().__init__()
        self.num_embeddings, self.dtype = table.out_features, dtype

    def _apply(self, fn, *args):
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # what model.bfloat16() does to other embeddings
        return super()._apply(fn, *args)


class QuantEmbedding(_Lookup):
    """tokens (...) -> rows of W: (vocabulary, n)."""

    def __init__(self, W, dtype=torch.float32):
        super().__init__(W, dtype)
        self.embedding_dim, self.W = W.in_features, W

    def forward(self, tokens):
        return self.W.rows(tokens).to(self.dtype)

    multiplications = 0  # looking up a row multiplies nothing

    def dense_weight(self):
        return self.W.dense()


class QuantLowRankEmbedding(_Lookup):
    """tokens (...) -> the token's row of A: (vocabulary, r), then B: (n, r)."""

    def __init__(self, A, B, dtype=torch.float32):
        super().__init__(A, dtype)
        self.embedding_dim, self.rank, self.A, self.B = B.out_features, A.in_features, A, B

    def forward(self, tokens):
        return self.B.times(self.A.rows(tokens).to(self.dtype))  # (..., r) -> (..., n)

    @property
    def multiplications(self):
        return self.B.packed_weights

    def dense_weight(self):
        return self.A.dense() @ self.B.dense().T


KINDS = {"quant": QuantLinear, "quant lowrank": QuantLowRank, "quant embedding": QuantEmbedding, "quant lowrank embedding": QuantLowRankEmbedding}


def matrices(layer):
    return [m for m in layer.modules() if isinstance(m, QuantMatrix)]


def describe(layer):
    """What config.json says of a quantized layer: enough for from_description, with the dense layer it stands for, to rebuild its shapes."""
    kind = next(kind for kind, cls in KINDS.items() if type(layer) is cls)
    form = dict(kind=kind, bits=matrices(layer)[0].bits, group=[m.group for m in matrices(layer)])
    return form | (dict(rank=layer.rank) if hasattr(layer, "rank") else {})


def from_description(form, dense):
    """An empty layer of the form that describe() gave, in the place of `dense`: nn.Linear or nn.Embedding."""
    out, width = dense.weight.shape
    shapes = [(out, width)]
    if "rank" in form:
        shapes = [(form["rank"], width), (out, form["rank"])] if isinstance(dense, nn.Linear) else [(out, form["rank"]), (width, form["rank"])]
    parts = [QuantMatrix(*shape, form["bits"], group) for shape, group in zip(shapes, form["group"], strict=True)]
    if getattr(dense, "bias", None) is not None:
        parts.append(nn.Parameter(torch.empty(out), requires_grad=False))
    return KINDS[form["kind"]](*parts)


# ----------------------------------------------------------------------------- one layer

def frozen_bias(layer):
    return None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)


def quantize_layer(layer, bits, group=None, rounding=quantize_rows):
    """The quantized layer that takes the place of a dense or low-rank one; on the meta device only its shapes."""
    def of(weight, **more):
        return QuantMatrix.of(weight, bits, group, **more)

    if isinstance(layer, nn.Linear):
        return QuantLinear(of(layer.weight, rounding=rounding), frozen_bias(layer))
    if isinstance(layer, nn.Embedding):
        return QuantEmbedding(of(layer.weight), layer.weight.dtype)
    if isinstance(layer, LowRankEmbedding):
        return QuantLowRankEmbedding(of(layer.A), of(layer.B), layer.A.dtype)
    if isinstance(layer, LowRankLinear):
        return QuantLowRank(of(layer.A, rounding=rounding), of(layer.B, rounding=rounding), frozen_bias(layer))
    if isinstance(layer, BlendedLinear):
        raise InputError("a blend of W and B A can't be quantized: let alpha fall to 0 first, which leaves the low-rank layer")
    again = " again" if isinstance(layer, tuple(KINDS.values())) else ""
    raise InputError(f"a {type(layer).__name__} can't be quantized{again}")


def tie(model):
    """One matrix for a quantized head and embedding that are tied, as Transformer.tie does for the dense ones. And an embedding that was
    read from a file learns what dtype the rest of the model was read in."""
    if isinstance(model.embed, _Lookup):
        model.embed.dtype = model.norm.weight.dtype
    if model.config.tied and isinstance(model.head, QuantLinear) and isinstance(model.embed, QuantEmbedding):
        model.head.W = model.embed.W


# ----------------------------------------------------------------------------- quantizing a model

def takes(model, module):
    """What quantize() quantizes: linear layers and W^E, dense or low-rank. The position table and the norms stay in 16 bit."""
    return isinstance(module, (nn.Linear, LowRankLinear, LowRankEmbedding, BlendedLinear)) or module is model.embed


def bits_and_group(model, layer, bits, group, embedding_bits=None):
    """Of one layer. Where W^E and W^H are one matrix, which every token meets twice, it stays at 8 bits unless embedding_bits says otherwise."""
    if layer not in (model.embed, model.head):
        return bits, group
    tied = isinstance(model.head, nn.Linear) and model.head.weight is getattr(model.embed, "weight", None)
    own = embedding_bits or (8 if tied else bits)
    return own, group if own == bits else None


def quantize(model, bits, group=None, names=None, embedding_bits=None, rounding=quantize_rows):
    """Quantize the layers that takes() accepts, in place, freeing each original as its integers are made. Returns the line that says what was done.

    names: only layers whose last name is among these. embedding_bits: see bits_and_group. rounding(W, bits, group) chooses the integers
    of linear layers: quantize_rows, or one of rounding.py.
    """
    before = stored_bytes(model)
    forms = {name: bits_and_group(model, m, bits, group, embedding_bits) for name, m in model.named_modules() if takes(model, m)}

    def make(name, layer):
        if names is None or name.rsplit(".", 1)[-1] in names:
            return quantize_layer(layer, *forms[name], rounding)

    count = len(swap_layers(model, make, wanted=functools.partial(takes, model)))
    tie(model)
    return f"quantized {count} layers to {bits} bit: {before / 1e6:,.1f} -> {stored_bytes(model) / 1e6:,.1f} MB"


def stored_bytes(model):
    """Bytes of all parameters and buffers, a shared one once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())


# ----------------------------------------------------------------------------- training with rounded weights (section IV)

class _FakeQuantize(torch.autograd.Function):
    """Forward: w as it will be after quantization. Backward: as if nothing had been done (straight-through)."""

    @staticmethod
    def forward(ctx, w, bits, group):
        q, scale, offset = quantize_rows(w, bits, check_format(bits, group, w.shape[-1]))
        return decode(q.unflatten(-1, (scale.shape[-1], -1)), scale, offset).flatten(1).to(w.dtype)

    @staticmethod
    def backward(ctx, g):
        return g, None, None


def fake_quantize(w, bits, group=None):
    return _FakeQuantize.apply(w, bits, group)


def rounded_forward(layer, x):
    """layer(x) as if its matrices were quantized to layer.rounded_to."""
    plain = copy.copy(layer)  # shares the parameters, and has the forward of its class
    del plain.forward
    return functional_call(plain, {name: fake_quantize(p, *layer.rounded_to) for name, p in layer.named_parameters() if p.dim() == 2}, (x,))


def attach_fake_quantization(model, bits, group=None):
    """Every layer that quantize() would take computes with rounded matrices from now on; parameters and their names stay. Returns how many.

    quantize(model, bits, group) then gives a model of exactly the loss that the training saw.
    """
    def attach(name, layer):
        layer.rounded_to = bits_and_group(model, layer, bits, group)
        layer.forward = MethodType(rounded_forward, layer)
        return layer
    return len(swap_layers(model, attach, wanted=functools.partial(takes, model)))


def detach_fake_quantization(model):
    """Undo attach_fake_quantization. What recompute.py put in the place of a module's forward stays."""
    for module in model.modules():
        if module.__dict__.pop("rounded_to", None):
            del module.forward
