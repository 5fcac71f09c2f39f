"""What every script needs before it can start: errors for people, the device, and the folder of a run.

Nothing of the paper is in this file. A script wraps its `main` in `command`, asks `find_device` where to compute, and
writes what it measures through `RunFolder`:

    OUT/metrics.jsonl    a line for each logged step: {"step": 10, "loss": 7.1, ...}
    OUT/summary.json     one object at the end: parameters, losses, tokens/s, memory, seconds, device, arguments
    OUT/loss.png         the plot
"""
import ctypes
import errno
import json
import math
import os
import platform
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path


class InputError(ValueError):
    """The user's input is wrong. The message says what, with the values, and what to do; `command` prints it alone."""


def cache_dir():
    """Where what was downloaded or tokenized once is kept: $FINGPT_CACHE, or ~/.cache/fingpt-hpc."""
    return Path(os.environ.get("FINGPT_CACHE") or Path.home() / ".cache" / "fingpt-hpc")


def say(*words):
    """Print a line, from the first process only."""
    if rank() == 0:
        print(*words, flush=True)


UNUSABLE = [getattr(errno, name) for name in ("EACCES", "EROFS", "EPERM", "ENOTDIR", "EEXIST", "EISDIR", "ENOENT", "ENAMETOOLONG")]


def command(main):
    """Run main() as a command: bad input and a full disk are one line on stderr and exit code 2, not a traceback."""
    try:
        sys.exit(main())
    except InputError as e:
        line = str(e)
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as e:
        full, place = e.errno in (errno.ENOSPC, errno.EDQUOT), e.filename and e.errno in UNUSABLE
        if not full and not place:
            raise
        other = "set FINGPT_CACHE to another folder" if e.filename and str(cache_dir()) in str(e.filename) else "choose another --out-dir"
        line = f"{e.strerror}: {e.filename or 'while writing'}: {'free some space or ' if full else ''}{other}"
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    print(f"error: {line}" if world_size() == 1 else f"error (process {rank()}): {line}", file=sys.stderr)
    sys.exit(2)


def check_folder(path, new=False):
    """Refuse what can't become a folder to write to, before anything slow; new: or what is one already with something in it."""
    whole = Path(path).absolute()
    there = next(p for p in (whole, *whole.parents) if p.exists())
    if not there.is_dir():
        raise InputError(f"{path}: {there} is a file: choose another folder")
    if new and whole == Path.cwd():
        raise InputError(f"{path} is the current folder: choose a new one")
    if new and there == whole and any(whole.iterdir()):
        raise InputError(f"{path} is not empty: choose a new folder")


def move_aside(folder):
    """Rename a folder to the first FOLDER-N that is free, and return that."""
    folder = Path(folder)
    if folder.absolute() == Path.cwd():
        raise InputError(f"{folder.absolute()} holds earlier results and is the current folder, which can't be moved aside: choose another --out-dir")
    aside = next(p for n in range(1, 10 ** 6) if not (p := folder.with_name(f"{folder.name}-{n}")).exists())
    os.replace(folder, aside)
    return aside


def check_positive(args, *names):
    """Refuse what is not above 0 and finite."""
    for name in names:
        if not 0 < getattr(args, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} must be above 0, got {getattr(args, name):g}")


# ----------------------------------------------------------------------------- processes (torchrun sets these)

def rank():
    return int(os.environ.get("RANK", 0))


def local_rank():
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a flag that a loop reads between two steps; a second Ctrl-C ends at once."""

    def __init__(self):
        self.name = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._caught)

    def _caught(self, number, frame):
        if self.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


# ----------------------------------------------------------------------------- the device

@dataclass
class Device:
    torch_device: object   # torch.device
    dtype: object          # torch.float32 or torch.bfloat16: what matrix products are computed in
    rate: float            # operations a second of a matrix product in that dtype, measured just now
    name: str
    why: str               # how the dtype was chosen

    def autocast(self):
        import torch
        return torch.autocast(self.torch_device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)


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
    """The device this process computes on. dtype: auto, float32 or bfloat16; auto takes the one whose products are faster here."""
    import torch
    if dtype not in ("auto", "float32", "bfloat16"):
        raise InputError(f"--dtype must be auto, float32 or bfloat16, got {dtype}")
    keep_freed_memory()
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        name, candidates = torch.cuda.get_device_name(device), ["bfloat16"] if torch.cuda.is_bf16_supported() else ["float32"]
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
    names = [line.split(":")[1].strip() for line in (info.read_text().splitlines() if info.exists() else ()) if line.startswith("model name")]
    return names[0] if names else f"{platform.processor() or platform.machine()} CPU"


def keep_freed_memory():
    """Tell glibc to keep the memory that tensors free instead of giving it back after every step.

    A training step allocates and frees hundreds of megabytes. By default each large block is a fresh mapping, and the
    kernel zeroes its pages again every step: on a virtual machine that took a third of the time of a GPT-2 step.
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
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ----------------------------------------------------------------------------- the folder of a run

class RunFolder:
    """metrics.jsonl, summary.json and the plot. Only the first process writes."""

    def __init__(self, path, resume_step=None):
        self.path = Path(path)
        self.file = None
        if rank() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            metrics = self.path / "metrics.jsonl"
            kept = [] if resume_step is None else [r for r in read_metrics(metrics) if r["step"] <= resume_step]
            write_atomic(metrics, "".join(json.dumps(r) + "\n" for r in kept))
            self.file = open(metrics, "a")

    def log(self, **row):
        if self.file:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def rows(self):
        return read_metrics(self.path / "metrics.jsonl")

    def last(self, key):
        """The last value that was logged under this name, by an earlier process of the run too; None if there is none."""
        return next((r[key] for r in reversed(self.rows()) if key in r), None)

    def finish(self, **summary):
        if self.file:
            self.file.close()
            write_atomic(self.path / "summary.json", json.dumps(summary, indent=2, default=str) + "\n")


def read_metrics(path):
    """Rows of a metrics.jsonl; a last line cut short by a kill is dropped."""
    rows = []
    for line in (Path(path).read_text().splitlines() if Path(path).exists() else ()):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def write_atomic(path, text):
    """A reader finds the old text or the new one, never a part: written beside, synced, renamed."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


def markdown(header, rows, left=2):
    """A table in Markdown that can be read as it stands, too; the first `left` columns begin at the left, numbers end at the right."""
    cells = [header] + [[str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 1) + ("-" if i < left else ":") for i, w in enumerate(widths)) + "|"] + lines[1:])


def plot_losses(folder, title):
    """OUT/loss.png: training loss of every logged step and validation loss where it was taken."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = read_metrics(Path(folder) / "metrics.jsonl")
    fig, ax = plt.subplots(figsize=(7, 4), dpi=120, layout="constrained")
    for key, style in (("loss", dict(lw=1.2)), ("val_loss", dict(marker="o", ms=4, lw=1.5))):
        points = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
        if points:
            ax.plot(*zip(*points), label={"loss": "training", "val_loss": "validation"}[key], **style)
    ax.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    ax.grid(alpha=0.3)
    if ax.get_lines():
        ax.legend()
    partial = Path(folder) / "loss.partial.png"
    fig.savefig(partial)
    plt.close(fig)
    os.replace(partial, Path(folder) / "loss.png")
