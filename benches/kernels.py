"""Each CUDA kernel against the copy bandwidth, torch in 16 bit and bitsandbytes (needs a GPU and nvcc).

    python bench.py kernels --json results/kernels.json

Shapes are those of Llama2-7B and of its factors of rank 512. In decoding, each matrix is read once a token.
So every call of a measurement has other weights, together more than the L2 holds, and all calls are replayed
from one CUDA graph, so that launching costs what it costs in decoding. The copy bandwidth, bytes read and
written of a large copy, is of the same run. GB/s counts the weights (and what quantize and dequantize read
and write).
"""
import importlib.util
import statistics
from functools import partial

import torch

from benches.common import table
from common.cli import refuse
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

    def enough(self, make, out, width, bits):
        """So many different matrices that the L2 can't hold them."""
        return [make() for _ in range(max(2, -(-self.l2_bytes // (out * width * bits // 8))))]

    def matrices(self, out, width, bits):
        return self.enough(lambda: QuantMatrix.of(self.random(out, width), bits), out, width, bits)

    def add(self, kernel, engine, shape, bits, x, call, things, more=0):
        """Time call(x, thing) over things: matrices (out, in), or pairs of factors (out, rank, in). more:
        other bytes that are read or written."""
        s = self.seconds([partial(call, x, thing) for thing in things])
        size = sum(a * b for a, b in zip(shape, shape[1:])) * bits // 8 + more
        self.rows.append(dict(kernel=kernel, engine=engine, shape="x".join(map(str, shape)), rows=len(x),
                              bits=bits, us=s * 1e6, gb_s=size / s / 1e9, share_of_copy=size / s / self.copy))

    def products(self, out, width, bits):
        """x W^T, W x + s B (A x), quantize, dequantize, and what torch takes for the 16-bit matrix."""
        k, shape, Ws = self.kernels, (out, width), self.matrices(out, width, bits)
        dense = self.enough(lambda: self.random(out, width), out, width, 16)
        A, B, dense_bytes = self.random(8, width), self.random(out, 8), 2 * out * width

        def product(x, W, step=2):
            return k.product(x, *W.parts(), step)

        def dequantize(x, W):
            return k.dequantize(*W.parts(), width, torch.bfloat16)
        for M in ROWS:
            x, kernel = self.random(M, width), name_of(M)
            self.add(kernel, "ours", shape, bits, x, product, Ws)
            self.add(kernel, "torch", shape, 16, x, lambda x, W: x @ W.T, dense)
            self.add(kernel, "torch, dequantized first", shape, bits, x,
                     lambda x, W: x @ dequantize(x, W).T, Ws)
        one = self.random(1, width)
        self.add("matvec", "ours, a warp a row", shape, bits, one, partial(product, step=1), Ws)
        for x in (one, self.random(8, width)):
            self.add("lora", "ours", shape, bits, x, lambda x, W: k.lora(x, *W.parts(), A, B, 4.0), Ws)
            self.add("lora", "ours, launch by launch", shape, bits, x,
                     lambda x, W: product(x, W) + 4.0 * (x @ A.T @ B.T), Ws)
        all_rows, group = dense[0], Ws[0].group
        self.add("quantize", "ours", shape, bits, all_rows, lambda x, W: k.quantize(W, bits, group), dense,
                 more=dense_bytes)
        self.add("dequantize", "ours", shape, bits, all_rows, dequantize, Ws, more=dense_bytes)

    def factors(self, out, width, rank, bits):
        """B (A x) in one launch and in two."""
        k, shape = self.kernels, (out, rank, width)
        pairs = list(zip(self.matrices(rank, width, bits), self.matrices(out, rank, bits)))
        for M in (1, 8, 16):
            x = self.random(M, width)
            self.add("lowrank", "ours", shape, bits, x,
                     lambda x, AB: k.lowrank(x, *AB[0].parts(), *AB[1].parts()), pairs)
            self.add("lowrank", "ours, two launches", shape, bits, x,
                     lambda x, AB: k.product(k.product(x, *AB[0].parts()), *AB[1].parts()), pairs)

    def bitsandbytes(self, out, width, bits):
        """The peer's products with 4-bit (nf4, groups of 64) and 8-bit weights."""
        import bitsandbytes as bnb

        def make():
            if bits == 8:
                return bnb.nn.Linear8bitLt(width, out, bias=False, has_fp16_weights=False).to(self.device)
            how = dict(compute_dtype=torch.bfloat16, quant_type="nf4")
            return bnb.nn.Linear4bit(width, out, bias=False, **how).to(self.device)
        layers = self.enough(make, out, width, bits)
        for M in (1, 16, 64):
            x = self.random(M, width).to(torch.bfloat16 if bits == 4 else torch.float16)
            self.add(name_of(M), "bitsandbytes", (out, width), bits, x, lambda x, layer: layer(x), layers)


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
    refuse(not torch.cuda.is_available(), "bench.py kernels needs a GPU: here tests/test_kernels.py can only "
           "run the kernels, which says nothing of their speed")
    device, kernels = find_device("bfloat16"), load_kernels()
    refuse(kernels is None, "kernels.cu could not be built (the line above says why): install nvcc and "
           "ninja, and set CUDA_HOME")
    m = Measurement(kernels, graph_seconds, device.torch_device)
    with torch.inference_mode():
        rows = measure(m)
    print(f"{device.name}: a copy moves {m.copy / 1e9:.0f} GB/s")
    return device, rows


def report(rows):
    return table(rows, {
        "kernel": "kernel", "engine": "engine", "shape": "shape", "rows": "rows", "bits": "bits",
        "us": ("us", "{:.1f}"), "GB/s": ("gb_s", "{:.0f}"), "of copy": ("share_of_copy", "{:.0%}")})
