"""A whole step of decoding on a CPU in one call: a token of each row through all blocks of a model.

At batch 1 a block of gpt2-xl with r = 384 reads 10 MB of weights, which takes 0.35 ms on two cores, and
calling its layers from Python takes almost as long. So the addresses of all weights and of the cache are
written down once, and kernels_cpu.cpp walks through them for each token. It computes model.Block, in float32.

    step = cpu_step(model, cache)      # beyond/decoding.py has the protocol
    logits = step(tokens, lengths)
"""
import ctypes
import weakref

import torch
import torch.nn as nn

from beyond.cpu_kernels import Matrix, load, struct_of, takes
from beyond.paged_cache import PagedCache
from common.cli import say
from lowrank import LowRankLinear
from model import Attention, Block, FeedForward, attend, is_linear
from quant import QuantLinear, QuantLowRank, matrices

POINTER, MATRIX, INT = ctypes.c_void_p, ctypes.POINTER(Matrix), ctypes.c_int
BITS = {torch.bfloat16: 16, torch.float32: 32}  # of weights that are no integers
TOLERANCE = 0.05  # a step in bfloat16 is some 0.01 off; with another kind of block, several times 0.05
LAYERS = (nn.Linear, LowRankLinear, QuantLinear, QuantLowRank)
walked = weakref.WeakKeyDictionary()  # model -> whether its blocks are what kernels_cpu.cpp computes


class NormStruct(ctypes.Structure):
    _fields_ = [("weight", POINTER), ("bias", POINTER)]


class LayerStruct(ctypes.Structure):
    _fields_ = [("A", MATRIX), ("B", MATRIX), ("bias", POINTER), ("bits", INT)]


class BlockStruct(ctypes.Structure):
    _fields_ = [("norm1", NormStruct), ("norm2", NormStruct), ("inputs", LayerStruct * 3), ("o", LayerStruct),
                *((name, LayerStruct) for name in ("gate", "up", "down")), ("K", POINTER), ("V", POINTER)]


class NetworkStruct(ctypes.Structure):
    sizes = ("count", "rows", "width", "heads", "kv_heads", "d", "ffn", "size", "in_table", "float_cache")
    _fields_ = [*((name, POINTER) for name in ("blocks", "lengths", "table", "cos", "sin")),
                *((name, INT) for name in sizes), ("eps", ctypes.c_float)]


def cpu_step(model, cache):
    """A CPUStep for a cache that has read the prompts. None where something is in the way: layers that are
    none of LAYERS, something attached to one, another kind of block, no compiler."""
    c, stored = model.config, keys_and_values(cache)[0][0].dtype in (torch.float32, torch.bfloat16)
    if c.window or c.no_rope or c.architecture.qk_norm:
        return None
    if not stored or load() is None or not all(map(is_plain, model.blocks)):
        return None
    step = CPUStep(model, cache)
    if model not in walked:
        walked[model] = step.is_right()
        if not walked[model]:
            say("kernels_cpu.cpp computes another kind of block than this model's: steps go layer by layer")
    return step if walked[model] else None


def keys_and_values(cache):
    """Of all layers, each (blocks of slots, kv_heads, slots, d): in a KVCache, a row is such a block."""
    return cache.pool.kv.unbind(1) if isinstance(cache, PagedCache) else (cache.k, cache.v)


def inputs(attention):
    """The layers that read x: W^QKV, or W^Q, W^K and W^V."""
    return [attention.get_submodule(name) for name in attention.config.architecture.inputs]


def is_plain(block):
    """Whether the block is model.py's, with layers on a CPU that can be read, and nothing attached to it."""
    if [type(m) for m in (block, block.attention, block.mlp)] != [Block, Attention, FeedForward]:
        return False
    layers = [m for m in block.modules() if is_linear(m)]
    readable = all(type(m) in LAYERS and all(map(is_readable, factors(m))) for m in layers)
    own = any("forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in block.modules())
    return readable and not own and block.attention.attend is attend


def factors(layer):
    """W of a layer, or A and B: each a QuantMatrix or a tensor."""
    if isinstance(layer, LowRankLinear):
        return [layer.A, layer.B]
    return [layer.weight] if isinstance(layer, nn.Linear) else matrices(layer)


def is_readable(W):
    """Rows of floats must be whole vectors."""
    if isinstance(W, torch.Tensor):
        return W.dtype in BITS and not W.is_cuda and W.is_contiguous() and W.shape[1] % 32 == 0
    return takes(W) and not W.q.is_cuda


class CPUStep:
    """model.head(model.hidden(tokens)) for one token of each row."""

    def __init__(self, model, cache):
        c, self.model, self.cache, self.kept = model.config, model, cache, []
        keys, values = keys_and_values(cache)
        self.blocks = (BlockStruct * c.blocks)(*map(self.block, model.blocks, keys, values))
        self.network = NetworkStruct(
            ctypes.addressof(self.blocks), None, None, None, None, c.blocks, 0, c.width, c.heads, c.kv_heads,
            c.head_size, c.ffn, keys[0].shape[2], 0, keys[0].dtype is torch.float32, c.norm_eps)

    def block(self, block, k, v):
        a, m = block.attention, block.mlp
        gate = LayerStruct() if m.gate is None else self.layer(m.gate)
        reading = (LayerStruct * 3)(*map(self.layer, inputs(a)))
        return BlockStruct(self.norm(block.norm1), self.norm(block.norm2), reading, self.layer(a.o), gate,
                           self.layer(m.up), self.layer(m.down), k.data_ptr(), v.data_ptr())

    def norm(self, norm):
        values = dict(norm.named_parameters())
        return NormStruct(self.address(values["weight"]), self.address(values.get("bias")))

    def layer(self, layer):
        Ws = factors(layer)
        pointers = [ctypes.pointer(self.matrix(W)) for W in Ws] + [None] * (2 - len(Ws))
        bits = BITS[Ws[0].dtype] if isinstance(Ws[0], torch.Tensor) else Ws[0].bits
        return LayerStruct(*pointers, self.address(layer.bias), bits)

    def matrix(self, W):
        if not isinstance(W, torch.Tensor):
            return struct_of(W)
        self.kept.append(W)
        return Matrix(W.data_ptr(), None, None, *W.shape, W.shape[1], W.stride(0) * W.itemsize)

    def address(self, tensor):
        """Of the tensor in float32, which is kept as long as the step is."""
        if tensor is None:
            return None
        self.kept.append(tensor.detach().float().contiguous())
        return self.kept[-1].data_ptr()

    def __call__(self, tokens, lengths):
        return self.model.head(self.hidden(tokens, lengths))

    def hidden(self, tokens, lengths):
        """tokens (B,) -> what the head reads, (B, C)."""
        x, rope, _ = self.model.begin(tokens[:, None], self.cache)  # (B, 1, C)
        dtype, x, slots = x.dtype, x.float().contiguous(), (INT * len(lengths))(*lengths)
        rows = torch.arange(len(lengths))[:, None]
        table = (self.cache.table if isinstance(self.cache, PagedCache) else rows).int().contiguous()
        self.network.rows, self.network.in_table = table.shape
        self.network.lengths, self.network.table = ctypes.addressof(slots), table.data_ptr()
        if rope is not None:
            cos, sin = (t.expand(len(lengths), 1, -1).contiguous() for t in rope)  # (B, 1, d / 2)
            self.network.cos, self.network.sin = cos.data_ptr(), sin.data_ptr()
        load().step(ctypes.addressof(self.network), x.data_ptr())
        return self.model.norm(x.to(dtype))[:, -1]

    def is_right(self):
        """Whether a step is what the layers make of it: model.py may have been changed. It is tried at the
        next slot of each row, which is written again afterwards."""
        lengths = self.cache.lengths
        tokens = torch.zeros(len(lengths), dtype=torch.long)
        exact = self.model.hidden(tokens[:, None], self.cache)[:, -1].float()
        self.cache.lengths = lengths
        return ((self.hidden(tokens, lengths).float() - exact).norm() < TOLERANCE * exact.norm()).item()
