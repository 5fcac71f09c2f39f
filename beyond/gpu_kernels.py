"""kernels.cu from Python: compiled at the first use by torch.utils.cpp_extension, arguments checked here.

    kernels = load()                    # None, said once, where it can't be compiled
    y = kernels.product(x, W)           # x (M, in) in 16 bit, W a quant.QuantMatrix (out, in) -> (M, out)
    y = kernels.lowrank(x, A, B)        # B (A x) in one launch, for up to 16 rows
"""
import ctypes
import functools
import os
import sys
import time
from pathlib import Path

import torch

from beyond.cpu_kernels import Matrix
from common.cli import InputError, cache_dir, refuse, say
from quant import MATVEC_ROWS, QuantMatrix

TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # these numbers are also in kernels.cu
NAIVE, WARP, FAST = range(3)
PIECE, COUNTERS = 1024, 256

@functools.cache
def load():
    """The Kernels for this GPU; None, said once, where they can't be compiled."""
    from torch.utils import cpp_extension
    say("kernels.cu: compiling, or loading what was compiled before (a minute the first time) ...")
    os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)  # ninja, in an environment not active
    source, folder = Path(__file__).parent.with_name("kernels.cu"), cache_dir() / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / "lock"  # torch leaves it behind when it is killed, and would wait for it for ever
        if lock.exists() and time.time() - lock.stat().st_mtime > 300:
            lock.unlink(missing_ok=True)
        cpp_extension.load("fingpt", [str(source)], build_directory=str(folder), is_python_module=False)
        return Kernels(ctypes.CDLL(str(folder / "fingpt.so")), "cuda")
    except (RuntimeError, OSError, ImportError) as e:
        why = [line for line in str(e).splitlines() if "error:" in line][:2] or str(e).splitlines()[:1]
        say(f"kernels.cu is not used, which is slower: it needs nvcc and ninja ({' | '.join(why)[:400]})")
        return None

def fits(x, *matrices):
    """Whether the fused kernels take x (M, in): 1 to 16 rows; rows and groups of 16 bytes each."""
    groups = all(W.group == W.in_features or W.group % (128 // W.bits) == 0 for W in matrices)
    rows = all(W.in_features % 8 == 0 for W in matrices) and x.data_ptr() % 16 == 0
    return groups and rows and 0 < len(x) <= MATVEC_ROWS

class Kernels:
    """The functions of the library, for tensors of one kind of device. W, A, B: QuantMatrix (out, in)."""

    def __init__(self, library, device):
        self.library, self.device, self.counters = library, device, {}
        library.problem.restype = ctypes.c_char_p

    def dequantize(self, W, dtype):
        """W (out, in) in this dtype."""
        no_x = self.empty(W.q, W.out_features, 0, dtype=dtype)
        return self.call("dequantize", no_x, 0, W, out=W.in_features)

    def product(self, x, W, step=FAST):
        """x W^T: x (M, in) -> (M, out). step: the naive kernel, a warp a row, or the fast ones."""
        return self.call("product", x, W.in_features, W, step, out=W.out_features)

    def matmul_back(self, g, W):
        """g W: g (M, out) -> (M, in)."""
        return self.call("matmul_back", g, W.out_features, W, out=W.in_features)

    def lowrank(self, x, A, B):
        """B (A x) in one launch: x (M, in) -> (M, out). None where there is no kernel for that."""
        if not fits(x, A, B) or (B.in_features, B.bits) != (A.out_features, A.bits):
            return None
        pieces = self.library.pieces_of(self.argument(A, x), A.bits, 1)
        shares = self.empty(x, pieces, len(x), A.out_features, dtype=torch.float32)
        h, counters = self.empty(x, len(x), A.out_features), self.counters_for(x)
        return self.call("lowrank", x, A.in_features, A, B, shares, h, counters, out=B.out_features)

    def lora(self, x, W, A, B, scale):
        """W x + scale B (A x) in one launch, with A (r, in) and B (out, r) in the dtype of x, or None."""
        r, match = len(A), (A.shape[1], *B.shape) == (W.in_features, W.out_features, len(A))
        if not match or not A.dtype == B.dtype == x.dtype or A.data_ptr() % 16 or not fits(x, W):
            return None
        h = self.empty(x, -(-W.in_features // PIECE), len(x), r, dtype=torch.float32)
        more = A, B, r, float(scale), h, self.counters_for(x)
        return self.call("lora", x, W.in_features, W, *more, out=W.out_features)

    def call(self, name, x, width, W, *more, out):
        """run_NAME(type, bits, x, M, W, *more, y, stream) for x (M, width). Returns y (M, out)."""
        takes = TYPES if name == "dequantize" else (torch.bfloat16, torch.float16)
        if x.dtype not in takes or x.shape[1:] != (width,):
            raise InputError(f"{name} takes rows of {width} numbers in bfloat16 or float16, got "
                             f"{tuple(x.shape)} in {x.dtype}")
        y = self.empty(x, len(x), out)
        arguments = [self.argument(value, x) for value in (x, len(x), W, *more, y)]
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
        with torch.cuda.device_of(x):
            run = getattr(self.library, f"run_{name}")
            run(TYPES[x.dtype], W.bits, *arguments, ctypes.c_void_p(stream))
        problem = self.library.problem()
        if problem:
            raise RuntimeError(f"kernels.cu, {name}: {problem.decode()}")
        return y

    def argument(self, value, x):
        """As ctypes takes it, checked: tensors must be contiguous and on the device of x."""
        if isinstance(value, QuantMatrix):
            parts = [self.argument(part, x) for part in value.parts()]
            return Matrix(*parts, value.out_features, value.in_features, value.group, value.q.shape[1])
        if not isinstance(value, torch.Tensor):
            return ctypes.c_float(value) if isinstance(value, float) else value
        if not value.is_contiguous() or value.device != x.device or x.device.type != self.device:
            raise InputError(f"tensors must be contiguous and on one {self.device}, x is on {x.device}: "
                             f"{tuple(value.shape)} with strides {value.stride()} on {value.device}")
        return ctypes.c_void_p(value.data_ptr())

    def empty(self, x, *shape, dtype=None):
        return torch.empty(shape, dtype=dtype or x.dtype, device=x.device)

    def counters_for(self, x):
        """Counters at 0, one set for each stream: launches on one stream follow each other."""
        stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
        if stream not in self.counters:  # a graph's memory would not outlive it
            refuse(x.is_cuda and torch.cuda.is_current_stream_capturing(),
                   "call this once on the stream before a graph records it")
            self.counters[stream] = torch.zeros(COUNTERS, dtype=torch.int32, device=x.device)
        return self.counters[stream]
