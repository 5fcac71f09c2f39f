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
import os
import shutil
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

from lowrank import BlendedLinear, LoRALinear, LowRankEmbedding, LowRankLinear, swap_layers
from model import count_parameters
from runtime import InputError, say

DEFAULT_GROUP = {8: 0, 4: 64}  # 0: the whole row is one vector
SMALLEST_HALF = 2.0 ** -24     # a vector of equal numbers has no range; its scale must not be 0


def check_format(bits, group, width):
    """The length of a vector: `group`, or the whole row where that is 0 or None and the default for these bits says so."""
    if bits not in DEFAULT_GROUP:
        raise InputError(f"bits must be 4 or 8, got {bits}")
    group = DEFAULT_GROUP[bits] if group is None else group
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
    return q.float() * scale.float()[..., None] + offset.float()[..., None]


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
    u = F.pad(q, (0, -q.shape[1] % 32)).add(8).to(torch.uint8)
    u = u.view(len(u), -1, 2, 2, 2)  # weight 4a + 2b + c of a word is half b of byte 2c + a
    return (u[:, :, :, 0] | u[:, :, :, 1] << 4).transpose(2, 3).reshape(len(u), -1)


def unpack(packed, bits, width):
    """The inverse of pack: -> int8 (out, width)."""
    if bits == 8:
        return packed[:, :width]
    u = packed.view(len(packed), -1, 2, 2).transpose(2, 3)  # (out, words, a, c)
    u = torch.stack((u & 15, u >> 4), 3)  # (out, words, a, b, c)
    return u.reshape(len(u), -1)[:, :width].to(torch.int8) - 8


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

    @classmethod
    def of(cls, weight, bits, group=None, rounding=quantize_rows):
        """Quantize weight (out, in). rounding(weight, bits, group) chooses the integers; on the meta device only shapes are made."""
        with torch.device(weight.device):
            matrix = cls(*weight.shape, bits, group)
        if not weight.is_meta:
            if not torch.isfinite(weight).all():
                raise InputError(f"a weight of {weight.shape[0]}x{weight.shape[1]} has numbers that are not finite: it can't be quantized")
            q, matrix.scale, matrix.offset = rounding(weight, bits, matrix.group)
            matrix.q = pack(q, bits)
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
        if self.q.is_cuda and (kernels := load_kernels()) and dtype in (torch.float16, torch.bfloat16):
            return kernels.dequantize(self.q, self.scale, self.offset, self.bits, self.in_features, dtype)
        self.leave_cpu_form()
        q = unpack(self.q, self.bits, self.in_features).unflatten(-1, (-1, self.group))
        return decode(q, self.scale, self.offset).flatten(1).to(dtype)

    def times(self, x):
        """x (..., in) -> x W^T (..., out), in x's dtype, or autocast's; the gradient goes to x."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, self)
        return self.product(x)

    def product(self, x):
        return cuda_product(x, self) if x.is_cuda else cpu_product(x, self)

    def back(self, g):
        """g (..., out) -> g W (..., in)."""
        rows = g.numel() // self.out_features
        if g.is_cuda and rows <= MANY_ROWS_CUDA and (kernels := load_kernels()):
            return kernels.matmul_back(as_16_bit(g), self.q, self.scale, self.offset, self.bits, self.in_features).to(g.dtype)
        return g @ self.dense(g.dtype)

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
        scale, offset = self.scale, self.offset
        super()._apply(fn, *args)
        self.scale, self.offset = (t.to(self.q.device) if not self.q.is_meta else new for t, new in
                                   ((scale, self.scale), (offset, self.offset)))  # model.bfloat16() must not round them
        return self
