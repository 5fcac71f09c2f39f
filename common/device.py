"""Where a script computes: the device, the dtype that is fastest there, and its memory."""
import ctypes
import platform
import re
import resource
import timeit
from dataclasses import dataclass
from pathlib import Path

import torch

from common.cli import refuse
from common.processes import from_torchrun

@dataclass
class Device:
    torch_device: torch.device
    dtype: torch.dtype     # torch.float32 or torch.bfloat16: what matrix products are computed in
    rate: float            # operations a second of a matrix product in that dtype, measured just now
    name: str
    why: str               # how the dtype was chosen

    def autocast(self):
        return torch.autocast(self.torch_device.type, torch.bfloat16, self.dtype == torch.bfloat16)

def matmul_rate(device, dtype):
    """Operations a second of an n x n x n matrix product (2 n^3 operations), the best of six."""
    n = 1024 if device.type == "cpu" else 8192
    a, b = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))

    def multiply():
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return 2 * n ** 3 / min(timeit.repeat(multiply, number=1, repeat=6))

def find_device(dtype="auto"):
    """The device of this process. dtype: float32, bfloat16, or auto: the one whose products are faster."""
    refuse(dtype not in ("auto", "float32", "bfloat16"),
           f"the dtype must be float32, bfloat16 or auto, got {dtype}")
    keep_freed_memory()
    if torch.cuda.is_available():
        device = torch.device("cuda", from_torchrun("LOCAL_RANK", 0) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        name = torch.cuda.get_device_name(device)
        candidates = ["bfloat16"] if torch.cuda.is_bf16_supported() else ["float32"]
    else:
        device = torch.device("cpu")
        name = f"{cpu_name()}, {torch.get_num_threads()} threads"
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        candidates = ["float32", "bfloat16"] if has_bf16 else ["float32"]
    why = "as asked" if dtype != "auto" else "the only one here"
    rates = {d: matmul_rate(device, getattr(torch, d)) for d in (candidates if dtype == "auto" else [dtype])}
    best, worst = max(rates, key=rates.get), min(rates, key=rates.get)
    if best != worst:
        why = f"{rates[best] / rates[worst]:.1f}x as fast as {worst} here"
    return Device(device, getattr(torch, best), rates[best], name, why)

def cpu_name():
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)$", info.read_text(), re.M) if info.exists() else None
    return model[1].strip() if model else f"{platform.machine()} CPU"

def keep_freed_memory():
    """Tell glibc to keep the memory that tensors free. By default each large block is a fresh mapping, whose
    pages the kernel zeroes again every step: on a virtual machine a third of a GPT-2 step's time."""
    if platform.libc_ver()[0] == "glibc":  # M_MMAP_THRESHOLD = -3, M_TRIM_THRESHOLD = -1 (malloc.h)
        ctypes.CDLL(None).mallopt(-3, 1 << 30)
        ctypes.CDLL(None).mallopt(-1, (1 << 31) - 1)

def give_back_memory():
    """Return to the system the memory that is free, and that keep_freed_memory keeps."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)

def peak_memory(device):
    """Peak bytes: what torch allocated on a GPU, the whole process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # a child process inherits its parent's ru_maxrss, but not its VmHWM
        return int(re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.M)[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on a Mac, in bytes

def stored_bytes(model):
    """Bytes of all parameters and buffers, a shared one once."""
    return sum(t.nbytes for t in {*model.parameters(), *model.buffers()})
