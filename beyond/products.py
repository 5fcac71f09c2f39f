"""Products with a matrix of integers (quant.py): x W^T and its gradient, by the way that is fastest for the rows at hand.

    rows of x          on a CPU                                      on a GPU
    few                kernels_cpu.cpp: W never leaves its integers  kernels.cu, likewise
    many               W is dequantized, then torch's product        the same
    with a gradient    W is dequantized                              kernels.cu for few

In decoding a token meets every weight once, so what counts there is how few bytes are read: 4 or 8 bits a weight in place of 16 or 32. With many rows
arithmetic counts, which torch's products do best, and dequantizing is little beside them.

    y = product(x, matrix)        # matrix: a quant.QuantMatrix; x (..., in) -> (..., out)
    y = cpu_product(x, A, B)      # B (A x) in one call
"""
import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import shutil
import subprocess
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from common.cli import cache_dir, say
from common.device import cpu_name, give_back_memory, matmul_rate


def product(x, matrix):
    """x (..., in) -> x W^T (..., out), in x's dtype, or autocast's; the gradient goes to x."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if torch.is_grad_enabled() and x.requires_grad:
        return _Product.apply(x, matrix)
    if x.is_cuda:
        return cuda_product(x, matrix)
    return cpu_product(x, matrix) if few_rows_cpu(x, matrix) else dense_product(x, matrix)


class _Product(torch.autograd.Function):
    """x W^T and its gradient g W. Nothing but the integers is kept between the two."""

    @staticmethod
    def forward(ctx, x, matrix):
        ctx.matrix = matrix
        return cuda_product(x, matrix) if x.is_cuda else dense_product(x, matrix)

    @staticmethod
    def backward(ctx, g):
        return back(g, ctx.matrix), None


def back(g, matrix):
    """g (..., out) -> g W (..., in)."""
    if g.is_cuda and g.numel() <= MANY_ROWS_CUDA * matrix.out_features and (kernels := load_kernels()):
        return kernels.matmul_back(as_rows(g), *matrix.parts(), matrix.in_features).view(*g.shape[:-1], -1).to(g.dtype)
    return g @ matrix.dense(g.dtype)


@functools.cache
def bfloat16_is_slow():
    """Whether this CPU multiplies matrices of float32 faster."""
    return matmul_rate(torch.device("cpu"), torch.float32, 512) > matmul_rate(torch.device("cpu"), torch.bfloat16, 512)


def dense_product(x, matrix):
    """x W^T with W dequantized for the moment: the way for many rows."""
    if x.dtype is torch.bfloat16 and not x.is_cuda and bfloat16_is_slow():
        return F.linear(x.float(), matrix.dense()).to(x.dtype)
    return F.linear(x, matrix.dense(x.dtype))


# ----------------------------------------------------------------------------- on a CPU: kernels_cpu.cpp

FEW_ROWS_CPU = 32  # beyond, dequantizing and torch's own product win
SLAB = 1 << 25     # bytes that HugePages takes at a time
CPU_FLAGS = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"]


class HugePages:
    """Memory in pages of 2 MiB, of which a CPU knows enough by heart to read a whole model without looking up addresses: a tenth faster here.

    A matrix is smaller than such a page, so many share a slab, which is freed with the last of them.
    """

    def __init__(self):
        self.slab, self.used = b"", 0

    def copy(self, tensor):
        if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
            return tensor
        if self.used + tensor.nbytes > len(self.slab):
            self.slab, self.used = mmap.mmap(-1, max(SLAB, tensor.nbytes), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 0  # shared memory has small pages
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self.slab.madvise(mmap.MADV_HUGEPAGE)
            give_back_memory()  # the originals of the last slab are free by now: no model is there twice
        place = torch.frombuffer(self.slab, dtype=tensor.dtype, count=tensor.numel(), offset=self.used).view(tensor.shape)
        self.used += -(-tensor.nbytes // 64) * 64
        return place.copy_(tensor)


huge_pages = HugePages()


@functools.cache
def load_cpu_kernels():
    """kernels_cpu.cpp as a library, compiled at the first use and kept; None, said once, where that can't be."""
    source = Path(__file__).with_name("kernels_cpu.cpp")
    key = hashlib.sha256(" ".join([source.read_text(), cpu_name(), *CPU_FLAGS]).encode()).hexdigest()[:16]
    library = cache_dir() / f"kernels_cpu-{key}.so"
    try:
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            partial = library.with_suffix(f".{os.getpid()}")
            subprocess.run(["g++", *CPU_FLAGS, "-w", "-shared", "-fPIC", source, "-o", partial], check=True, capture_output=True, text=True)
            os.replace(partial, library)
        kernels = ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError) as e:
        why = (getattr(e, "stderr", None) or str(e)).strip().splitlines()[0][:200]
        say(f"kernels_cpu.cpp is not used: g++ could not build it ({why}); torch takes over, which is slower")
        return None
    pointer, number, struct_ = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    kernels.product.argtypes = [pointer, number, struct_, struct_, number, number, pointer, pointer]
    kernels.step.argtypes = [pointer, pointer]
    kernels.product.restype = kernels.step.restype = None
    return kernels


def few_rows_cpu(x, A, B=None):
    """Whether cpu_product, which has no backward pass, can take x."""
    if x.is_cuda or x.numel() > FEW_ROWS_CPU * x.shape[-1] or torch.is_grad_enabled():
        return False
    if load_cpu_kernels() is None:
        return B is None and A.bits == 8 and A.group == A.in_features
    return A.whole_chunks and (B is None or B.whole_chunks)


def cpu_product(x, A, B=None, bias=None):
    """x (..., in) -> x W^T + bias (..., out) for W = A, or W = B A in one call. In decoding, what Python does here counts."""
    dtype, kernels = x.dtype, load_cpu_kernels()
    if kernels is None:
        return torch_product(x, A)
    if dtype is not torch.bfloat16 and dtype is not torch.float32:
        return cpu_product(x.float(), A, B, bias).to(dtype)
    if bias is not None and bias.dtype is not dtype:
        bias = bias.to(dtype)
    x = x.contiguous()
    y = torch.empty(*x.shape[:-1], A.out_features if B is None else B.out_features, dtype=dtype)
    kernels.product(x.data_ptr(), x.numel() // A.in_features, A.form(), None if B is None else B.form(), A.bits, dtype is torch.float32,
                    None if bias is None else bias.data_ptr(), y.data_ptr())
    return y


def torch_product(x, matrix):
    """torch's product for int8 in whole rows: y = s * (x q^T) takes q as it is; o * sum(x) is added here. In float32 it is 25x slower."""
    rows = F.pad(x.reshape(-1, matrix.in_features).bfloat16(), (0, matrix.q.shape[1] - matrix.in_features))
    y = torch.ops.aten._weight_int8pack_mm(rows, matrix.q, matrix.scale[:, 0].bfloat16())
    y.addcmul_(rows.sum(-1, keepdim=True), matrix.offset[:, 0].bfloat16())
    return y.view(*x.shape[:-1], matrix.out_features).to(x.dtype)


# ----------------------------------------------------------------------------- on a GPU: kernels.cu

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
        kernels = load("fingpt_kernels", [str(Path(__file__).parent.parent / "kernels.cu")], extra_cuda_cflags=["-O3"], extra_cflags=["-O3"])
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
