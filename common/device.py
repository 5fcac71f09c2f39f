"""Where a script computes: the device, the dtype that is fastest there, and its memory."""
import ctypes
import platform
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common.cli import InputError
from common.processes import local_rank


@dataclass
class Device:
    torch_device: object   # torch.device
    dtype: object          # torch.float32 or torch.bfloat16: what matrix products are computed in
    rate: float            # operations a second of a matrix product in that dtype, measured just now
    name: str
    why: str               # how the dtype was chosen

    def autocast(self):
        import torch
        return torch.autocast(self.torch_device.type, dtype=torch.bfloat16,
                              enabled=self.dtype == torch.bfloat16)


def matmul_rate(device, dtype, n=None):
    """Operations a second of an n x n x n matrix product (2 n^3 operations), the best of five."""
    import torch
    n = n or (1024 if device.type == "cpu" else 8192)
    a, b = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(6):  # the first one warms up and is as good as any if it is the best
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best


def find_device(dtype="auto"):
    """The device this process computes on. dtype: auto, float32 or bfloat16; auto takes the one whose
    products are faster here."""
    import torch
    if dtype not in ("auto", "float32", "bfloat16"):
        raise InputError(f"--dtype must be auto, float32 or bfloat16, got {dtype}")
    keep_freed_memory()
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        name, candidates = torch.cuda.get_device_name(device), ["bfloat16"] if torch.cuda.is_bf16_supported(
            ) else ["float32"]
    else:
        device = torch.device("cpu")
        name = f"{cpu_name()}, {torch.get_num_threads()} threads"
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        candidates = ["float32", "bfloat16"] if has_bf16 else ["float32"]
    rates = {d: matmul_rate(device, getattr(torch, d)) for d in (candidates if dtype == "auto" else [dtype])}
    best = max(rates, key=rates.get)
    why = "as asked" if dtype != "auto" else "the only one here" if len(rates) == 1 else \
        f"{rates[best] / min(rates.values()):.1f}x as fast as {min(rates, key=rates.get)} here"
    return Device(device, getattr(torch, best), rates[best], name, why)


def cpu_name():
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip()
             for line in (info.read_text().splitlines() if info.exists() else ())
             if line.startswith("model name")]
    return names[0] if names else f"{platform.processor() or platform.machine()} CPU"


def keep_freed_memory():
    """Tell glibc to keep the memory that tensors free instead of giving it back after every step.

    A training step allocates and frees hundreds of megabytes. By default each large block is a fresh mapping,
    and the kernel zeroes its pages again every step: on a virtual machine that took a third of the time of a
    GPT-2 step.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # M_MMAP_THRESHOLD = -3, M_TRIM_THRESHOLD = -1 (malloc.h)
            libc.mallopt(-3, 1 << 30)
            libc.mallopt(-1, (1 << 31) - 1)


def give_back_memory():
    """Return to the system the memory that is free, and that keep_freed_memory keeps."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def peak_memory(device):
    """Peak bytes: what torch allocated on a GPU, the whole process's resident memory on a CPU."""
    import torch
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # a child process inherits its parent's ru_maxrss, but not its VmHWM
        return next(int(line.split()[1]) * 1024
                    for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
