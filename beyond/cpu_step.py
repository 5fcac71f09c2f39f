"""Decoding on a CPU: one token of each row through all blocks of a quantized model in one call of kernels_cpu.cpp (sections IV.C and V.B).

At batch 1 a block of gpt2-xl with r = 384 reads 10 MB of weights, which takes 0.35 ms on two cores. Calling its twelve layers from Python takes
almost as long again. What cudagraph.py does for a GPU by recording, a struct does here: the addresses of all weights and of the cache are written down once,
and kernels_cpu.cpp walks through them for each token. What it computes is model.Block, in float32.

    generate(model, prompts, 100, make_step=cpu_step)
    step = cpu_step(model, cache)      # cache: a KVCache that has read the prompts; None where not all layers are plain quantized ones on a CPU with g++
    logits = step(tokens, lengths)     # (B,) -> (B, vocabulary); lengths: how many places of each row are taken
"""
import ctypes
import functools

import torch

from beyond.products import FEW_ROWS_CPU, load_cpu_kernels
from common.cli import say
from model import ARCHITECTURES, Config, KVCache, Transformer, attend
from quant import QuantLinear, QuantLowRank, matrices, quantize

POINTER, INT = ctypes.c_void_p, ctypes.c_int


class Norm(ctypes.Structure):
    _fields_ = [("weight", POINTER), ("bias", POINTER)]


class Layer(ctypes.Structure):
    _fields_ = [("A", POINTER), ("B", POINTER), ("bias", POINTER), ("bits", INT)]


class Block(ctypes.Structure):
    _fields_ = [("norm1", Norm), ("norm2", Norm), ("inputs", Layer * 3), ("o", Layer), ("gate", Layer), ("up", Layer), ("down", Layer),
                ("K", POINTER), ("V", POINTER)]


class Network(ctypes.Structure):
    _fields_ = [("blocks", POINTER), ("lengths", POINTER), ("cos", POINTER), ("sin", POINTER),
                *((name, INT) for name in ("count", "rows", "width", "heads", "kv_heads", "d", "ffn", "capacity", "float_cache")), ("eps", ctypes.c_float)]


def inputs(attention):
    return [getattr(attention, name) for name in attention.config.architecture.inputs]


def classes(block):
    return type(block), *(type(getattr(block, name, None)) for name in ("norm1", "attention", "norm2", "mlp"))


@functools.cache
@torch.inference_mode()
def classes_walked(kind):
    """The classes of a block that kernels_cpu.cpp walks through rightly: those of model.py, if a tiny model goes through both alike; else none.

    Who changes model.py, or puts another class in the place of one of its own, gets what they wrote.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny = Transformer(Config(kind, vocab_size=64, context=8, blocks=1, heads=2, kv_heads=1 if ARCHITECTURES[kind].rope else 2, width=64, ffn=128)).eval()
    for p in tiny.parameters():
        p.mul_(5)
    quantize(tiny, 8)
    cache, exact = KVCache(tiny.config, 1, 4), tiny(torch.tensor([[1, 2, 3, 4]]))[:, -1]
    tiny.hidden(torch.tensor([[1, 2, 3]]), cache)
    try:
        if (Step(tiny, cache)(torch.tensor([4]), [3]) - exact).norm() < 0.01 * exact.norm():
            return classes(tiny.blocks[0])
    except AttributeError:  # a block with other parts
        pass
    say("kernels_cpu.cpp walks through another kind of block than this model's: steps are made layer by layer, which is slower")
    return None


def can_be_walked(block):
    """Whether the block is what kernels_cpu.cpp takes it for."""
    layers = [*inputs(block.attention), block.attention.o, block.mlp.up, block.mlp.down, *filter(None, [block.mlp.gate])]
    plain = all(type(m) in (QuantLinear, QuantLowRank) and all(w.whole_chunks and not w.q.is_cuda for w in matrices(m)) for m in layers)
    touched = any("forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in block.modules())
    return plain and not touched and block.attention.attend is attend


def cpu_step(model, cache):
    """A Step, or None where something is in the way: another kind of cache or layer, something attached to a layer, no compiler."""
    stored = type(cache) is KVCache and cache.k[0] is not None and cache.k[0].dtype in (torch.float32, torch.bfloat16)
    if stored and len(cache.lengths) <= FEW_ROWS_CPU and load_cpu_kernels() is not None:
        known = classes_walked(model.config.kind)
        if all(classes(block) == known and can_be_walked(block) for block in model.blocks):
            return Step(model, cache)


class Step:
    """model.head(model.hidden(tokens)) for one token of each row."""

    def __init__(self, model, cache):
        c, self.model, self.cache, self.kept = model.config, model, cache, []
        self.blocks = (Block * c.blocks)(*map(self.block, model.blocks, cache.k, cache.v))
        eps = model.norm.eps
        self.network = Network(ctypes.addressof(self.blocks), None, None, None, c.blocks, len(cache.lengths), c.width, c.heads, c.kv_heads, c.head_size, c.ffn,
                               cache.capacity, cache.k[0].dtype is torch.float32, eps)

    def address(self, tensor):
        """Of the tensor in float32, which is kept as long as the step is."""
        if tensor is None:
            return None
        self.kept.append(tensor.detach().float().contiguous())
        return self.kept[-1].data_ptr()

    def block(self, block, k, v):
        a, m = block.attention, block.mlp
        return Block(self.norm(block.norm1), self.norm(block.norm2), (Layer * 3)(*map(self.layer, inputs(a))), self.layer(a.o),
                     self.layer(m.gate) if m.gate is not None else Layer(), self.layer(m.up), self.layer(m.down), k.data_ptr(), v.data_ptr())

    def norm(self, norm):
        return Norm(self.address(norm.weight), self.address(getattr(norm, "bias", None)))

    def layer(self, layer):
        forms = [ctypes.create_string_buffer(m.form()) for m in ((layer.A, layer.B) if hasattr(layer, "rank") else (layer.W,))]
        self.kept += forms
        addresses = [ctypes.addressof(form) for form in forms]
        return Layer(*addresses, *[None] * (2 - len(forms)), self.address(layer.bias), matrices(layer)[0].bits)

    def __call__(self, tokens, lengths):
        x, rope, _ = self.model.begin(tokens[:, None], self.cache)  # (B, 1, C)
        dtype, x, places = x.dtype, x.float().contiguous(), (INT * len(lengths))(*lengths)
        self.network.lengths = ctypes.addressof(places)
        if rope is not None:
            cos, sin = (t.expand(len(lengths), 1, -1).contiguous() for t in rope)  # (B, 1, d / 2)
            self.network.cos, self.network.sin = cos.data_ptr(), sin.data_ptr()
        load_cpu_kernels().step(ctypes.addressof(self.network), x.data_ptr())
        return self.model.head(self.model.norm(x.to(dtype))[:, -1])
