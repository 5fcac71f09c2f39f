"""W x and B (A x) with int8 or int4 weights on a CPU (section V.B), by kernels_cpu.cpp.

In decoding, the time of a product is that of reading W: 8 or 4 bits a weight in place of 16 or 32, if W never
leaves its integers. For many rows integers of 16 bits are as fast as floats, and W need not be dequantized.
So every product without a backward pass comes here. x is rounded to 16 bits with a scale for each 128 numbers
or fewer: y is off by some 1e-5 of its size. g++ compiles the kernels at the first use.

    y = product(x, A, B, bias)      # quant.QuantMatrix A (r, in), B (out, r): B (A x) + bias in one call
"""
import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import subprocess
import weakref
from pathlib import Path

import torch

from common.cli import cache_dir, say
from common.device import cpu_name, give_back_memory

POINTER, INT = ctypes.c_void_p, ctypes.c_int
SLAB = 1 << 25  # bytes that HugePages takes at a time
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-w", "-shared", "-fPIC",
         "-fno-trapping-math", "-fno-math-errno"]

def struct(name, **fields):
    """A struct of C, with these fields in their order."""
    return type(name, (ctypes.Structure,), dict(_fields_=list(fields.items())))

# As in kernels_cpu.cpp and kernels.cu.
Matrix = struct("Matrix", q=POINTER, scale=POINTER, offset=POINTER, rows=INT, width=INT, group=INT,
                row_bytes=INT)

@functools.cache
def load():
    """The compiled library; None, said once, where it can't be compiled."""
    source, included = (Path(__file__).with_name(name) for name in ("step_cpu.cpp", "kernels_cpu.cpp"))
    text = " ".join([source.read_text(), included.read_text(), cpu_name(), *FLAGS])
    library = cache_dir() / f"kernels_cpu-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    try:
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            partial = library.with_suffix(f".{os.getpid()}")
            subprocess.run(["g++", *FLAGS, source, "-o", partial], check=True, capture_output=True, text=True)
            os.replace(partial, library)
        kernels = ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError) as e:
        lines = (e.stderr if isinstance(e, subprocess.CalledProcessError) else str(e)).strip().splitlines()
        say(f"kernels_cpu.cpp is not used, which is slower: g++ could not build it ({lines[0][:200]})")
        return None
    matrix = ctypes.POINTER(Matrix)
    kernels.product.argtypes = [POINTER, INT, matrix, matrix, INT, POINTER, POINTER]
    kernels.step.argtypes = [POINTER, POINTER, POINTER]
    return kernels

class HugePages:
    """Memory in pages of 2 MiB: with small ones the CPU spends a tenth of the time looking addresses up. A
    matrix is smaller than such a page, so many share a slab, which is freed with the last of them."""
    slab, used = b"", 0

    def copy(self, tensor):
        size = -(-tensor.nbytes // 64) * 64 + 128  # the kernels read up to 112 bytes beyond a matrix
        if self.used + size > len(self.slab):
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory has small pages
            self.slab, self.used = mmap.mmap(-1, max(SLAB, size), private), 0
            with contextlib.suppress(OSError, AttributeError):  # a kernel without huge pages
                self.slab.madvise(mmap.MADV_HUGEPAGE)
            give_back_memory()  # the originals of the last slab are free by now: no model is there twice
        moved = torch.frombuffer(self.slab, dtype=tensor.dtype, count=tensor.numel(), offset=self.used)
        self.used += size
        return moved.view(tensor.shape).copy_(tensor)

huge_pages = HugePages()
structs = weakref.WeakKeyDictionary()  # QuantMatrix -> the addresses of its tensors, and its Matrix

def struct_of(W):
    """The Matrix of a QuantMatrix, whose tensors move to huge pages; made anew when one was replaced."""
    def addresses():
        return own["q"].data_ptr(), own["scale"].data_ptr(), own["offset"].data_ptr()
    own = W._buffers  # W.q would look through three dictionaries
    known, struct = structs.get(W, (None, None))
    if known != addresses():
        own.update({name: huge_pages.copy(own[name]) for name in ("q", "scale", "offset")})
        struct = Matrix(*addresses(), W.out_features, W.in_features, W.group, own["q"].shape[1])
        structs[W] = addresses(), struct
    return struct

def takes(W):
    """Groups must be whole lanes of a vector, 8 int4 or 4 int8, or rows."""
    return W.group == W.in_features or W.group * W.bits % 32 == 0

def product(x, A, B=None, bias=None):
    """x (..., in) -> x W^T + bias (..., out), W = A or B A. None for small groups or without a compiler."""
    last = B or A
    if load() is None or not takes(A) or not takes(last):
        return None
    rows, bias = x.float().contiguous(), None if bias is None else bias.float()
    y = torch.empty(*x.shape[:-1], last.out_features)
    load().product(rows.data_ptr(), rows.numel() // A.in_features, struct_of(A), B and struct_of(B), A.bits,
                   None if bias is None else bias.data_ptr(), y.data_ptr())
    return y.to(x.dtype)
