"""kernels.cu as Python sees it on a GPU, run by cuda_on_cpu.h: tensors of a CPU in and out."""
import ctypes
import subprocess
import tempfile
from pathlib import Path

import torch

from beyond.cpu_kernels import Matrix

ROOT = Path(__file__).resolve().parent.parent
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
NAIVE, WARP, FAST = range(3)


class Form(ctypes.Structure):
    _fields_ = [("W", Matrix), ("bits", ctypes.c_int)]


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def form(q, scale, offset, width):
    addresses = (part.data_ptr() for part in (q, scale, offset))
    W = Matrix(*addresses, len(q), width, width // scale.shape[1], q.shape[1])
    return Form(W, 8 if q.dtype == torch.int8 else 4)


def poisoned(*shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype)


class Kernels:
    """Each function of the module that load_kernels() gives, with the same arguments."""

    def __init__(self):
        flags = ["-std=c++17", "-O1", "-Wno-unknown-pragmas", "-shared", "-fPIC", "-DCUDA_ON_CPU", "-x", "c++"]
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "kernels.so"
            command = ["g++", *flags, "-I", ROOT / "tests", ROOT / "kernels.cu", "-o", library]
            subprocess.run(command, check=True)
            self.run = ctypes.CDLL(str(library))
        self.run.size_of_shares.restype = ctypes.c_int64
        self.counters = torch.zeros(256, dtype=torch.int32)

    def dequantize(self, q, scale, offset, width, dtype, step=FAST):
        out = poisoned(len(q), width, dtype=dtype)
        self.run.run_dequantize(TYPES[dtype], form(q, scale, offset, width), pointer(out), step, None)
        return out

    def product(self, x, q, scale, offset, step=FAST):
        y, W = poisoned(len(x), len(q), dtype=x.dtype), form(q, scale, offset, x.shape[1])
        self.run.run_product(TYPES[x.dtype], pointer(x), len(x), W, pointer(y), step, None)
        return y

    def matmul_back(self, g, q, scale, offset, width, step=FAST):
        out, W = poisoned(len(g), width, dtype=g.dtype), form(q, scale, offset, width)
        self.run.run_matmul_back(TYPES[g.dtype], pointer(g), len(g), W, pointer(out), step, None)
        return out

    def lowrank(self, x, qA, sA, oA, qB, sB, oB):
        return self.lowrank_and_h(x, (qA, sA, oA), (qB, sB, oB))[0]

    def lowrank_and_h(self, x, partsA, partsB):
        rank, rows = len(partsA[0]), len(partsB[0])
        h, y = poisoned(len(x), rank, dtype=x.dtype), poisoned(len(x), rows, dtype=x.dtype)
        A, B = form(*partsA, x.shape[1]), form(*partsB, rank)
        shares = poisoned(self.run.size_of_shares(len(x), A), dtype=torch.float32)
        self.run.run_lowrank(TYPES[x.dtype], pointer(x), len(x), A, B, pointer(shares), pointer(h),
                             pointer(y), pointer(self.counters), None)
        assert not self.counters.any(), "the counters must be ready for the next launch"
        return y, h

    def lora(self, x, q, scale, offset, A, B, factor):
        M, r = len(x), len(A)
        pieces = -(-x.shape[1] // 1024)
        h, y = poisoned(pieces * M, r, dtype=torch.float32), poisoned(M, len(q), dtype=x.dtype)
        W = form(q, scale, offset, x.shape[1])
        self.run.run_lora(TYPES[x.dtype], pointer(x), M, W, pointer(A), pointer(B), r, ctypes.c_float(factor),
                          pointer(h), pointer(y), pointer(self.counters), None)
        assert not self.counters.any(), "the counters must be ready for the next launch"
        return y
