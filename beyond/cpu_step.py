"""A whole step of decoding on a CPU in one call: a token of each row through all blocks of a model.

A block of gpt2-xl with r = 384 reads 10 MB of weights in 0.35 ms on two cores, and calling its layers from
Python takes almost as long. So the addresses of all weights and of the cache are written down once, and
step_cpu.cpp walks through them for each token. It computes blocks, norm and head of model.py, in float32.

    step = cpu_step(model, cache)      # as common.generate.plain_step
    logits = step(tokens, cache)
"""
import ctypes
import weakref

import torch
import torch.nn as nn

from beyond.cpu_kernels import INT, POINTER, Matrix, load, struct, struct_of, takes
from beyond.paged_cache import PagedCache
from common.cli import say
from lowrank import LowRankLinear
from model import Attention, Block, FeedForward, is_linear
from quant import QuantLinear, QuantLowRank

BITS = {torch.bfloat16: 16, torch.float32: 32}  # of weights that are no integers
TOLERANCE = 0.05  # a block in bfloat16 is less than 0.01 off; of another kind, several times 0.05
LAYERS = {nn.Linear: ["weight"], LowRankLinear: ["A", "B"], QuantLinear: ["W"], QuantLowRank: ["A", "B"]}
walked = weakref.WeakKeyDictionary()  # model -> whether its blocks are what step_cpu.cpp computes

# As in step_cpu.cpp.
MATRIX = ctypes.POINTER(Matrix)
NormStruct = struct("Norm", weight=POINTER, bias=POINTER)
LayerStruct = struct("Layer", A=MATRIX, B=MATRIX, bias=POINTER, bits=INT)
BlockStruct = struct("Block", norm1=NormStruct, norm2=NormStruct, inputs=LayerStruct * 3, o=LayerStruct,
                     gate=LayerStruct, up=LayerStruct, down=LayerStruct, K=POINTER, V=POINTER)
NetworkStruct = struct("Network", blocks=POINTER, lengths=POINTER, table=POINTER, cos=POINTER, sin=POINTER,
                       count=INT, rows=INT, width=INT, heads=INT, kv_heads=INT, d=INT, ffn=INT, rank=INT,
                       size=INT, in_table=INT, float_cache=INT, eps=ctypes.c_float, norm=NormStruct,
                       head=LayerStruct)

def cpu_step(model, cache):
    """A CPUStep for a cache that has read the prompts. None where something is in the way: a layer or a head
    that is none of LAYERS, another kind of block, no compiler."""
    c, stored = model.config, keys_and_values(cache)[0][0].dtype
    other = c.window or c.no_rope or c.architecture.qk_norm or not all(map(is_plain, model.blocks))
    if other or not is_taken(model.head) or stored not in BITS or load() is None:
        return None
    step = CPUStep(model, cache)
    if model not in walked:
        walked[model] = step.is_right(cache)
        if not walked[model]:
            say("step_cpu.cpp computes another kind of block than this model's: steps go layer by layer")
    return step if walked[model] else None

def keys_and_values(cache):
    """Of all layers, each (blocks of slots, kv_heads, slots, d): in a KVCache, a row is such a block."""
    return cache.pool.kv.unbind(1) if isinstance(cache, PagedCache) else (cache.k, cache.v)

def is_plain(block):
    """Whether the block has model.py's parts, with layers that can be read."""
    if [type(m) for m in (block, block.attention, block.mlp)] != [Block, Attention, FeedForward]:
        return False
    return all(is_taken(m) for m in block.modules() if is_linear(m))

def is_taken(layer):
    """Whether it is one of LAYERS, computes as they do, and can be read."""
    own = "forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks
    return not own and type(layer) in LAYERS and all(map(is_readable, factors(layer)))

def factors(layer):
    """W of a layer, or A and B: each a QuantMatrix or a tensor."""
    return [getattr(layer, name) for name in LAYERS[type(layer)]]

def is_readable(W):
    """Rows of floats must be whole vectors."""
    if isinstance(W, torch.Tensor):
        return W.dtype in BITS and W.is_contiguous() and W.shape[1] % 32 == 0
    return takes(W)

class CPUStep:
    """Logits (B, vocabulary) of what follows tokens (B,), which go to the cache."""

    def __init__(self, model, cache):
        c, self.model, self.kept, self.rank = model.config, model, [], 0
        keys, values = keys_and_values(cache)
        self.blocks = (BlockStruct * c.blocks)(*map(self.block, model.blocks, keys, values))
        self.network = NetworkStruct(
            blocks=ctypes.addressof(self.blocks), count=c.blocks, width=c.width, heads=c.heads,
            kv_heads=c.kv_heads, d=c.head_size, ffn=c.ffn, size=keys[0].shape[2],
            float_cache=keys[0].dtype is torch.float32, eps=c.norm_eps, norm=self.norm(model.norm),
            head=self.layer(model.head), rank=self.rank)

    def block(self, block, k, v):
        a, m = block.attention, block.mlp
        gate = LayerStruct() if m.gate is None else self.layer(m.gate)
        inputs = [self.layer(a.get_submodule(name)) for name in a.config.architecture.inputs]
        return BlockStruct(self.norm(block.norm1), self.norm(block.norm2), (LayerStruct * 3)(*inputs),
                           self.layer(a.o), gate, self.layer(m.up), self.layer(m.down), k.data_ptr(),
                           v.data_ptr())

    def norm(self, norm):
        return NormStruct(*map(self.address, norm.parameters()))  # the weight, and a bias if there is one

    def layer(self, layer):
        Ws = factors(layer)
        pointers = [ctypes.pointer(self.matrix(W)) for W in Ws] + [None] * (2 - len(Ws))
        self.rank = max(self.rank, pointers[0].contents.rows if pointers[1] else 0)  # the largest
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

    def __call__(self, tokens, cache):
        logits = self.logits(tokens, cache)
        cache.advance(1)
        return logits

    def logits(self, tokens, cache):
        x, rope, _ = self.model.begin(tokens[:, None], cache)  # (B, 1, C)
        x, slots = x.float().contiguous(), (INT * len(tokens))(*cache.lengths)
        table = (cache.table if isinstance(cache, PagedCache) else cache.rows).int().contiguous()
        self.network.rows, self.network.in_table = table.shape
        self.network.lengths, self.network.table = ctypes.addressof(slots), table.data_ptr()
        if rope is not None:
            cos, sin = (t.expand(len(tokens), 1, -1).contiguous() for t in rope)  # (B, 1, d / 2)
            self.network.cos, self.network.sin = cos.data_ptr(), sin.data_ptr()
        logits = torch.empty(len(tokens), self.model.head.out_features)
        load().step(ctypes.addressof(self.network), x.data_ptr(), logits.data_ptr())
        return logits

    def is_right(self, cache):
        """Whether the first block, the norm and the head give what their layers make of it: model.py may have
        been changed. It is tried at the next slot of each row, which is written again afterwards."""
        self.network.count, tokens = 1, torch.zeros(len(cache.lengths), dtype=torch.long)
        found = self.logits(tokens, cache)
        self.network.count, (x, rope, mask) = len(self.blocks), self.model.begin(tokens[:, None], cache)
        x = self.model.norm(self.model.blocks[0](x, rope, cache, mask))
        exact = self.model.head(x)[:, -1].float()
        return ((found - exact).norm() < TOLERANCE * exact.norm()).item()
