"""Each kernel of kernels.cu at the shapes of Llama2-7B and of its factors of rank 512: time, GB/s, share of
the copy bandwidth; beside torch's products in 16 bit and bitsandbytes, where it is installed.

    python bench.py kernels --json results/kernels.json    # needs a GPU and nvcc, else exit code 2

In decoding, each matrix is read once a token. So every call of a measurement has other weights, together more
than the L2 can hold, and all calls are replayed from one CUDA graph, so that launching costs what it costs in
decoding. The copy bandwidth, bytes read and written of a large copy, is measured in the same run. GB/s counts
the weights alone (and what quantize and dequantize read and write).
"""
import importlib.util
import statistics
from functools import partial

import torch

from benches.common import table
from common.cli import InputError
from common.device import find_device
from quant import QuantMatrix, load_kernels

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (512, 4096), (4096, 512)]  # (out, in)
RANK, ROWS = 512, (1, 4, 8, 16, 32, 64)
L2_BYTES = 256 << 20  # more than the L2 of any GPU
DEFAULTS = {}


def graph_seconds(calls, rounds=20):
    """Median seconds of one call, the calls being recorded one after the other in a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times[2:])


class Measurement:
    """Collects rows; `seconds(calls)` times a list of calls, `kernels` is kernels.cu. Tests give it others,
    on a CPU."""

    def __init__(self, kernels, seconds, device, l2_bytes=L2_BYTES):
        self.kernels, self.seconds, self.device = kernels, seconds, device
        self.l2_bytes, self.rows = l2_bytes, []
        a = self.random(l2_bytes * 2)
        b = torch.empty_like(a)
        self.copy = 2 * a.nbytes / seconds([lambda: b.copy_(a)] * 3)  # bytes a second

    def random(self, *shape):
        return 0.02 * torch.randn(*shape, device=self.device, dtype=torch.bfloat16)

    def enough(self, make, size):
        """So many different ones that the L2 can't hold them."""
        return [make() for _ in range(max(2, -(-self.l2_bytes // size)))]

    def matrices(self, out, width, bits):
        return self.enough(lambda: QuantMatrix.of(self.random(out, width), bits), out * width * bits // 8)

    def add(self, kernel, engine, shape, rows, bits, size, call, things):
        """Time call(thing) over things, which take `size` bytes each."""
        s = self.seconds([partial(call, thing) for thing in things])
        self.rows.append(dict(kernel=kernel, engine=engine, shape="x".join(map(str, shape)), rows=rows,
                              bits=bits, us=s * 1e6, gb_s=size / s / 1e9, share_of_copy=size / s / self.copy))

    def products(self, out, width, bits):
        """x W^T, W x + s B (A x), quantize, dequantize, and what torch takes for the 16-bit matrix."""
        k, size, dense_size, shape = self.kernels, out * width * bits // 8, 2 * out * width, (out, width)
        Ws = self.matrices(out, width, bits)
        dense = self.enough(lambda: self.random(out, width), dense_size)
        A, B = self.random(8, width), self.random(out, 8)

        def dequantize(W):
            return k.dequantize(*W.parts(), width, torch.bfloat16)
        for M in ROWS:
            x, kernel = self.random(M, width), name_of(M)
            self.add(kernel, "ours", shape, M, bits, size, lambda W, x=x: k.product(x, *W.parts()), Ws)
            self.add(kernel, "torch", shape, M, 16, dense_size, lambda W, x=x: x @ W.T, dense)
            self.add(kernel, "torch, dequantized first", shape, M, bits, size,
                     lambda W, x=x: x @ dequantize(W).T, Ws)
            if M == 1:
                self.add(kernel, "ours, a warp a row", shape, M, bits, size,
                         lambda W, x=x: k.product(x, *W.parts(), 1), Ws)
            if M in (1, 8):
                self.add("lora", "ours", shape, M, bits, size,
                         lambda W, x=x: k.lora(x, *W.parts(), A, B, 4.0), Ws)
                self.add("lora", "ours, launch by launch", shape, M, bits, size,
                         lambda W, x=x: k.product(x, *W.parts()) + 4.0 * (x @ A.T @ B.T), Ws)
        self.add("quantize", "ours", shape, out, bits, dense_size + size,
                 lambda W: k.quantize(W, bits, Ws[0].group), dense)
        self.add("dequantize", "ours", shape, out, bits, dense_size + size, dequantize, Ws)

    def factors(self, out, width, rank, bits):
        """B (A x) in one launch and in two."""
        k, size, shape = self.kernels, rank * (out + width) * bits // 8, (out, rank, width)
        pairs = list(zip(self.matrices(rank, width, bits), self.matrices(out, rank, bits)))
        for M in (1, 8, 16):
            x = self.random(M, width)
            self.add("lowrank", "ours", shape, M, bits, size,
                     lambda AB, x=x: k.lowrank(x, *AB[0].parts(), *AB[1].parts()), pairs)
            self.add("lowrank", "ours, two launches", shape, M, bits, size,
                     lambda AB, x=x: k.product(k.product(x, *AB[0].parts()), *AB[1].parts()), pairs)

    def bitsandbytes(self, out, width, bits):
        """The peer's products with 4-bit (nf4, groups of 64) and 8-bit weights."""
        import bitsandbytes as bnb

        def make():
            if bits == 8:
                return bnb.nn.Linear8bitLt(width, out, bias=False, has_fp16_weights=False).to(self.device)
            how = dict(compute_dtype=torch.bfloat16, quant_type="nf4")
            return bnb.nn.Linear4bit(width, out, bias=False, **how).to(self.device)
        size = out * width * bits // 8
        layers = self.enough(make, size)
        for M in (1, 16, 64):
            x = self.random(M, width).to(torch.bfloat16 if bits == 4 else torch.float16)
            self.add(name_of(M), "bitsandbytes", (out, width), M, bits, size, lambda f, x=x: f(x), layers)


def name_of(rows):
    return "matvec" if rows <= 16 else "matmul"


def measure(m, shapes=SHAPES, rank=RANK):
    """All rows."""
    peer = importlib.util.find_spec("bitsandbytes") is not None
    if not peer:
        print("bitsandbytes is not installed: its rows are left out (pip install bitsandbytes)")
    for out, width in shapes:
        for bits in (8, 4):
            m.products(out, width, bits)
            if min(out, width) > rank:
                m.factors(out, width, rank, bits)
            if peer:
                m.bitsandbytes(out, width, bits)
    return m.rows


def bench(args):
    if not torch.cuda.is_available():
        raise InputError("bench.py kernels needs a GPU: here tests/test_kernels.py can only run the kernels, "
                         "which says nothing of their speed")
    device, kernels = find_device("bfloat16"), load_kernels()
    if kernels is None:
        raise InputError("kernels.cu could not be built (the line above says why): install nvcc and ninja, "
                         "and set CUDA_HOME")
    m = Measurement(kernels, graph_seconds, device.torch_device)
    with torch.inference_mode():
        rows = measure(m)
    print(f"{device.name}: a copy moves {m.copy / 1e9:.0f} GB/s")
    return device, rows


def report(rows):
    return table(rows, {
        "kernel": "kernel", "engine": "engine", "shape": "shape", "rows": "rows", "bits": "bits",
        "us": ("us", "{:.1f}"), "GB/s": ("gb_s", "{:.0f}"), "of copy": ("share_of_copy", "{:.0%}")})
