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
long as it multiplies with it. Products are computed by kernels.cu on a GPU, and on a CPU by torch's packed integer products.

    quantize(model, 8)                                  # whole rows, embedding and head too, in place
    quantize(model, 4, calibration=batches)             # groups of 64, rounded with error feedback (GPTQ, the paper's [31])
    attach_fake_quantization(model, 8)                  # section IV: train as if the weights were 8 bit
"""
import copy
import functools
import math
import shutil
import time
from pathlib import Path
from types import MethodType

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

from lowrank import BlendedLinear, LowRankEmbedding, LowRankLinear, second_moments, swap_layers
from runtime import InputError, say

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
        self.cpu_form = None  # what torch's packed products take, made at the first use
        self.looked_up = False  # an embedding reads rows of q
        self.few_numbers = FEW_ROWS_CPU * in_features

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
        self.leave_cpu_form()
        q = unpack(self.q[index.flatten()], self.bits, self.in_features).unflatten(-1, (-1, self.group))
        return decode(q, self.scale[index.flatten()], self.offset[index.flatten()]).view(*index.shape, self.in_features)

    def dense(self, dtype=torch.float32):
        """W (out, in)."""
        if self.q.is_cuda and (kernels := load_kernels()):
            return kernels.dequantize(*self.parts(), self.in_features, dtype)
        self.leave_cpu_form()
        q = unpack(self.q, self.bits, self.in_features).unflatten(-1, (-1, self.group))
        return decode(q, self.scale, self.offset).flatten(1).to(dtype)

    def times(self, x):
        """x (..., in) -> x W^T (..., out), in x's dtype, or autocast's; the gradient goes to x.

        The fast case is a few rows in eval mode without gradients, as in decoding.
        """
        if self.cpu_form is not None and x.dtype == torch.bfloat16 and x.numel() <= self.few_numbers and not torch.is_grad_enabled():
            return self.cpu_form.product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)  # decoding: the shortest way
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, self)
        return cuda_product(x, self) if x.is_cuda else cpu_product(x, self)

    def back(self, g):
        """g (..., out) -> g W (..., in)."""
        if g.is_cuda and g.numel() <= MANY_ROWS_CUDA * self.out_features and (kernels := load_kernels()):
            return kernels.matmul_back(as_rows(g), *self.parts(), self.in_features).view(*g.shape[:-1], -1).to(g.dtype)
        return g @ self.dense(g.dtype)

    def parts(self):
        return self.q, self.scale, self.offset

    # ---- torch's packed products want int4 in an order of their own; q is given up for it, and comes back when it is needed

    def enter_cpu_form(self):
        if self.cpu_form is None:
            self.cpu_form = make_cpu_form(self)
            if self.cpu_form.replaces_q:
                self.q = self.q.new_empty(0)
        return self.cpu_form

    def leave_cpu_form(self):
        if self.cpu_form is not None and self.cpu_form.replaces_q:
            self.q = pack(self.cpu_form.integers(), self.bits)
            self.cpu_form = None

    def _save_to_state_dict(self, *args):
        self.leave_cpu_form()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args):
        self.leave_cpu_form()
        self.cpu_form = None
        super()._load_from_state_dict(*args)

    def _apply(self, fn, *args):
        self.leave_cpu_form()
        self.cpu_form = None
        before = {"scale": self.scale, "offset": self.offset}
        super()._apply(fn, *args)
        for name, exact in before.items():  # model.bfloat16() converts every buffer of floats: not these
            if getattr(self, name).dtype != torch.float16:
                setattr(self, name, exact.to(self.q.device))
        return self

    def extra_repr(self):
        return f"{self.out_features}x{self.in_features}, bits={self.bits}, group={self.group}"


class _Product(torch.autograd.Function):
    """x W^T and its gradient g W. Nothing but the integers is kept between the two."""

    @staticmethod
    def forward(ctx, x, matrix):
        ctx.matrix = matrix
        return cuda_product(x, matrix) if x.is_cuda else F.linear(x, matrix.dense(x.dtype))

    @staticmethod
    def backward(ctx, g):
        return ctx.matrix.back(g), None


# ----------------------------------------------------------------------------- products on a CPU

# Up to here torch's packed products win over dequantizing first: 2.9 ms to 4.3 at 64 rows, 11.8 to 12.8 at 256, for int8 of 1600 x 1600 on
# two cores with AVX512-BF16.
FEW_ROWS_CPU = 128


class Int8Rows:
    """int8 in whole rows, for torch's _weight_int8pack_mm: y = s * (x q^T) takes q as it is; o * sum(x) is added here."""
    replaces_q = False

    def __init__(self, matrix):
        self.q, self.padding = matrix.q, matrix.q.shape[1] - matrix.in_features  # it reads 16 numbers at a time
        self.scale, self.offset = matrix.scale[:, 0].bfloat16(), matrix.offset[:, 0].bfloat16()

    def product(self, x):
        if self.padding:
            x = F.pad(x, (0, self.padding))
        return torch.ops.aten._weight_int8pack_mm(x, self.q, self.scale).addcmul_(x.sum(-1, keepdim=True), self.offset)


class Int4Digits:
    """Groups of int4, for torch's _weight_int4pack_mm_for_cpu, which computes s (u - 8) + z with u in 0..15.

    An int8 is two such digits: q + 128 = 16 h + l, so s q + o = 16 s (h - 8) + (s (l - 8) + 8 s + o).
    """

    def __init__(self, matrix, group):
        self.shape, self.replaces_q = (matrix.out_features, matrix.in_features), not matrix.looked_up
        self.group = group
        q = unpack(matrix.q, matrix.bits, matrix.in_features)
        scale, offset = (t.float().repeat_interleave(matrix.group // group, 1) for t in (matrix.scale, matrix.offset))  # (out, in / group)
        if matrix.bits == 4:
            self.digits = [self.pack(q.int() + 8, scale, offset)]
        else:
            u = q.int() + 128
            self.digits = [self.pack(u >> 4, 16 * scale, 0 * offset), self.pack(u & 15, scale, 8 * scale + offset)]

    def pack(self, u, scale, zero):
        more = -len(u) % 16  # it wants a multiple of 16 rows
        scale_zero = F.pad(torch.stack((scale, zero), -1).bfloat16(), (0, 0, 0, 0, 0, more))  # (out, groups, 2)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(F.pad(u, (0, 0, 0, more)), 1)
        return packed, scale_zero.transpose(0, 1).contiguous()

    def product(self, x):
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.digits[0][0], self.group, self.digits[0][1])
        for packed, scale_zero in self.digits[1:]:
            y += torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, self.group, scale_zero)
        return y if y.shape[1] == self.shape[0] else y[:, :self.shape[0]].contiguous()

    def integers(self):
        """q int8 (out, in) again: the digits times the identity, 256 columns at a time, at scale 1."""
        q, places = torch.zeros(self.shape, dtype=torch.int8), (1,) if len(self.digits) == 1 else (16, 1)
        for start in range(0, self.shape[1], 256):
            columns = torch.arange(start, min(start + 256, self.shape[1]))
            x = F.one_hot(columns, self.shape[1]).bfloat16()  # (256, in)
            for place, (packed, scale_zero) in zip(places, self.digits):
                one = torch.stack((torch.ones_like(scale_zero[..., 0]), torch.zeros_like(scale_zero[..., 0])), -1)
                u = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, self.group, one)[:, :self.shape[0]]  # (256, out), -8..7
                q[:, columns] += place * (u.T + (8 if place == 1 and len(places) == 2 else 0)).to(torch.int8)
        return q


class Dequantized:
    """For formats that torch has no packed product for."""
    replaces_q = False

    def __init__(self, matrix):
        self.matrix = matrix

    def product(self, x):
        return F.linear(x, self.matrix.dense(x.dtype))


def make_cpu_form(matrix):
    group = next((g for g in (256, 128, 64, 32) if matrix.group % g == 0), None)
    if matrix.bits == 8 and matrix.group == matrix.in_features:
        return Int8Rows(matrix)
    return Dequantized(matrix) if group is None else Int4Digits(matrix, group)


def cpu_product(x, matrix):
    rows = x.numel() // matrix.in_features
    if matrix.training or torch.is_grad_enabled() or rows > FEW_ROWS_CPU and matrix.q.numel():
        return F.linear(x, matrix.dense(x.dtype))
    y = matrix.enter_cpu_form().product(x.reshape(rows, matrix.in_features).bfloat16())  # in float32 these products are 25x slower
    return y.view(*x.shape[:-1], matrix.out_features).to(x.dtype)


# ----------------------------------------------------------------------------- layers

def _add_bias(y, bias):
    if bias is None:
        return y
    return y + bias.to(y.dtype) if torch.is_grad_enabled() else y.add_(bias)  # y is nobody else's


class QuantLinear(nn.Module):
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

    @property
    def multiplications(self):
        return self.W.packed_weights

    def dense_weight(self):
        return self.W.dense()


class QuantLowRank(nn.Module):
    """y = B (A x) + bias with A: (r, in) and B: (out, r) as integers; one launch on a GPU for up to 16 rows."""

    def __init__(self, A, B, bias=None):
        super().__init__()
        self.in_features, self.out_features, self.rank, self.A, self.B = A.in_features, B.out_features, A.out_features, A, B
        self.bias = bias

    def forward(self, x):
        if one_launch(x, self.A, self.B):
            y = load_kernels().lowrank(as_rows(x), *self.A.parts(), *self.B.parts()).view(*x.shape[:-1], -1).to(x.dtype)
        else:
            y = self.B.times(self.A.times(x))  # (..., in) -> (..., r) -> (..., out)
        return _add_bias(y, self.bias)

    @property
    def multiplications(self):
        return self.A.packed_weights + self.B.packed_weights

    def dense_weight(self):
        return self.B.dense() @ self.A.dense()


class _Lookup(nn.Module):
    """An embedding answers in the dtype that the rest of the model computes in, which integers do not tell."""

    def __init__(self, table, dtype):
        super().__init__()
        self.num_embeddings, self.dtype, table.looked_up = table.out_features, dtype, True

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


# ----------------------------------------------------------------------------- products on a GPU: kernels.cu

MATVEC_ROWS = 16      # kernels.cu reads a matrix once for up to 16 rows of x
MANY_ROWS_CUDA = 128  # beyond, dequantizing and torch's own product win


@functools.cache
def load_kernels():
    """kernels.cu as a module, compiled at the first use and cached by torch; None, said once, where that can't be."""
    from torch.utils.cpp_extension import CUDA_HOME
    if CUDA_HOME is None or shutil.which("ninja") is None:
        say("kernels.cu is not used: it needs nvcc (set CUDA_HOME) and ninja; quantized products dequantize first, which is slower")
        return None
    from torch.utils.cpp_extension import load
    say("kernels.cu: compiling, or loading what was compiled before (the first time takes about a minute) ...")
    start = time.perf_counter()
    try:
        kernels = load("fingpt_kernels", [str(Path(__file__).with_name("kernels.cu"))], extra_cuda_cflags=["-O3"], extra_cflags=["-O3"])
    except (RuntimeError, OSError, ImportError) as e:
        why = str(e).strip().splitlines()[0][:200]
        say(f"kernels.cu is not used: it could not be built ({why}); quantized products dequantize first, which is slower")
        return None
    say(f"kernels.cu: ready after {time.perf_counter() - start:.1f} s")
    return kernels


def as_rows(x):
    """x (..., n) -> (rows, n), contiguous, in a dtype that the kernels compute in."""
    x = x.reshape(-1, x.shape[-1]).contiguous()
    return x if x.dtype in (torch.float16, torch.bfloat16) else x.bfloat16()


def one_launch(x, *matrices):
    """Whether the fused kernels for a few rows, which have no backward pass and want groups of at least 16 bytes, can take x."""
    return (x.is_cuda and x.numel() <= MATVEC_ROWS * x.shape[-1] and not torch.is_grad_enabled()
            and all(m.group == m.in_features or m.group % (128 // m.bits) == 0 for m in matrices) and load_kernels() is not None)


def cuda_product(x, matrix):
    few = x.numel() <= (MANY_ROWS_CUDA if matrix.group in (matrix.in_features, 64, 128, 256) else MATVEC_ROWS) * matrix.in_features
    if few and (kernels := load_kernels()):
        return kernels.product(as_rows(x), *matrix.parts()).view(*x.shape[:-1], matrix.out_features).to(x.dtype)
    return F.linear(x, matrix.dense(x.dtype))


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
    """One matrix for a quantized head and embedding that are tied, as Transformer.tie does for the dense ones."""
    if model.config.tied and isinstance(model.head, QuantLinear) and isinstance(model.embed, QuantEmbedding):
        model.head.W = model.embed.W


# ----------------------------------------------------------------------------- better rounding
#
# With few bits, what counts is not the error of W but that of y = W x. Over the inputs X of some calibration text, an error E = W - (s q + o)
# changes y by E X, of size sum(E H E^T) with the second moments H = X X^T: one matrix for all rows of W, and all that rounding needs to know.
#
#   clipping        a smaller range has smaller steps: shrink it as long as the squared error of the vector falls
#   error feedback  (GPTQ) round one column of W after the other; what was lost is made good, as far as H allows, by the columns still to come
#   sweeps          then go over the columns again, each time to the integer that is best now that all others are known, and over s and o

def choose_range(w, bits):
    """s and o of vectors w (..., group), whose range is shrunk as far as that lowers the squared error."""
    low, high = w.amin(-1), w.amax(-1)
    best_error = torch.full_like(low, math.inf)
    best_scale, best_offset = scale_and_offset(low, high, bits)
    for shrink in torch.linspace(1, 0.5, 26).tolist():
        scale, offset = scale_and_offset(low * shrink, high * shrink, bits)
        error = (decode(encode(w, scale, offset, bits), scale, offset) - w).square_().sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_offset = torch.where(better, scale, best_scale), torch.where(better, offset, best_offset)
    return best_scale, best_offset


def clip_rows(weight, bits, group):
    """quantize_rows with clipped ranges."""
    w = weight.detach().float().unflatten(-1, (-1, group))  # (out, groups, group)
    scale, offset = choose_range(w, bits)
    return encode(w, scale, offset, bits).flatten(1), scale, offset


def feedback_rows(weight, bits, group, moments, damping=0.03, sweeps=3):
    """quantize_rows with error feedback and sweeps, for inputs of the second moments H (in, in)."""
    W = weight.detach().float()
    H = moments.float() / moments.diagonal().mean().clamp_min(1e-30)
    H = H + damping * torch.eye(len(H), device=H.device)  # inputs that the calibration text never showed count a little, too
    scale, offset = choose_range(W.unflatten(-1, (-1, group)), bits)
    q = round_with_feedback(W, scale, offset, bits, group, H)
    for _ in range(sweeps):
        sweep(W, q, scale, offset, bits, group, H)
    return q.to(torch.int8), scale, offset


def round_with_feedback(W, scale, offset, bits, group, H, block=128):
    """Integers (out, in), as float, of W with given s and o. The columns whose inputs are largest come first, when most others can still help."""
    order = H.diagonal().argsort(descending=True)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H[order][:, order].double())), upper=True).float()
    W, q = W[:, order].clone(), torch.empty_like(W)
    s, o = (t.float().repeat_interleave(group, 1)[:, order] for t in (scale, offset))  # (out, in)
    for start in range(0, W.shape[1], block):  # columns of a block feed each other at once, those to the right when the block is done
        end = min(start + block, W.shape[1])
        lost = torch.empty(len(W), end - start, device=W.device)
        for j in range(start, end):
            integer = ((W[:, j] - o[:, j]) / s[:, j]).round_().clamp_(-2 ** (bits - 1), 2 ** (bits - 1) - 1)
            lost[:, j - start] = (W[:, j] - (integer * s[:, j] + o[:, j])) / U[j, j]
            W[:, j + 1:end] -= lost[:, j - start, None] * U[j, j + 1:end]
            q[:, order[j]] = integer
        W[:, end:] -= lost @ U[start:end, end:]
    return q


def sweep(W, q, scale, offset, bits, group, H):
    """Lower sum(E H E^T), in place: for each group first s and o, by least squares, then its integers one column after the other."""
    rounded = decode(q.unflatten(-1, (-1, group)), scale, offset).flatten(1)
    G = (W - rounded) @ H  # (out, in): half the downhill direction
    for i in range(scale.shape[1]):
        columns = slice(i * group, (i + 1) * group)
        h, qg, before = H[columns, columns], q[:, columns], rounded[:, columns].clone()
        scale[:, i], offset[:, i] = fit_scale(qg, G[:, columns] + before @ h, h, scale[:, i], offset[:, i])
        s, o = scale[:, i].float(), offset[:, i].float()
        now = qg * s[:, None] + o[:, None]
        g = G[:, columns] - (now - before) @ h
        for j in range(group):
            best = now[:, j] + g[:, j] / h[j, j]
            qg[:, j] = ((best - o) / s).round_().clamp_(-2 ** (bits - 1), 2 ** (bits - 1) - 1)
            change = qg[:, j] * s + o - now[:, j]
            now[:, j] += change
            g -= change[:, None] * h[j]
        G -= (now - before) @ H[columns]


def fit_scale(q, target, h, scale, offset):
    """s and o that minimize sum((t - s q - o) h (t - s q - o)^T) of each row, where target = t h; the old ones where q is constant."""
    qh = q @ h
    a, b, c = (qh * q).sum(1), qh.sum(1), h.sum()  # q h q, q h 1, 1 h 1
    u, v = (target * q).sum(1), target.sum(1)
    determinant = a * c - b * b
    s, o = (u * c - v * b) / determinant, (a * v - b * u) / determinant
    good = (determinant > 1e-6 * a * c) & (s >= SMALLEST_HALF) & (o.abs() < 6e4)
    return torch.where(good, s, scale.float()).half(), torch.where(good, o, offset.float()).half()


ROUNDINGS = {"minmax": quantize_rows, "clip": clip_rows}


@torch.no_grad()
def calibrate(model, bits, group, batches, names=None, progress=lambda blocks: blocks):
    """Quantize the linear layers of all blocks with error feedback, from the first block to the last: each is given what the ones before it,
    already quantized, make of the calibration text. batches: tokens (B, T). Returns how many layers were quantized."""
    count, streams = 0, [model.begin(tokens) for tokens in batches]  # x (B, T, C), rope, mask
    for block in progress(model.blocks):
        for part, run in halves(block):
            make = functools.partial(quantize_calibrated, bits, group, second_moments(part, streams, run), names)
            with torch.autocast(streams[0][0].device.type, enabled=False):
                count += len(swap_layers(part, make, wanted=functools.partial(takes, model)))
            streams = [(stream[0] + run(stream), *stream[1:]) for stream in streams]
    return count


def halves(block):
    """What a block adds to the residual stream, one after the other: the module, and what it makes of (x, rope, mask)."""
    return ((block.attention, lambda stream: block.attention(block.norm1(stream[0]), stream[1], None, stream[2])),
            (block.mlp, lambda stream: block.mlp(block.norm2(stream[0]))))


def quantize_calibrated(bits, group, moments, names, name, layer):
    """quantize_layer with error feedback. The inputs of B are h = A x, with A as it is after rounding: their moments are A H A^T."""
    if names is not None and name not in names:
        return None
    H = moments[name]
    if not isinstance(layer, LowRankLinear):
        return quantize_layer(layer, bits, group, functools.partial(feedback_rows, moments=H))
    A = QuantMatrix.of(layer.A, bits, group, functools.partial(feedback_rows, moments=H))
    dense = A.dense()
    B = QuantMatrix.of(layer.B, bits, group, functools.partial(feedback_rows, moments=dense @ H @ dense.T))
    return QuantLowRank(A, B, frozen_bias(layer))


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


def quantize(model, bits, group=None, names=None, embedding_bits=None, calibration=None, rounding="minmax", progress=lambda blocks: blocks):
    """Quantize the layers that takes() accepts, in place, freeing each original as its integers are made. Returns the line that says what was done.

    names: only layers whose last name is among these. embedding_bits: see bits_and_group. rounding: minmax or clip.
    calibration: batches of tokens (B, T) of text like the use; rounds with error feedback, block by block.
    """
    if rounding not in ROUNDINGS:
        raise InputError(f"--rounding must be {' or '.join(ROUNDINGS)}, got {rounding}")
    before, count = stored_bytes(model), 0
    if calibration is not None:
        count = calibrate(model, bits, group, calibration, names, progress)
    forms = {name: bits_and_group(model, m, bits, group, embedding_bits) for name, m in model.named_modules() if takes(model, m)}

    def make(name, layer):
        if names is None or name.rsplit(".", 1)[-1] in names:
            return quantize_layer(layer, *forms[name], ROUNDINGS[rounding])

    count += len(swap_layers(model, make, wanted=functools.partial(takes, model)))
    tie(model)
    return f"quantized {count} layers to {bits} bit: {before / 1e6:,.1f} -> {stored_bytes(model) / 1e6:,.1f} MB"


def stored_bytes(model):
    """Bytes of all parameters and buffers, a shared one once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())


def leave_cpu_forms(model):
    """Bring every matrix back into the form in which it is saved."""
    for matrix in matrices(model):
        matrix.leave_cpu_form()


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
    for module in model.modules():
        if module.__dict__.pop("forward", None):
            del module.rounded_to
