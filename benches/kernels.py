"""Each CUDA kernel beside cuBLAS in 16 bit and torch's int4, checked, then timed (needs a GPU and nvcc).

    python bench.py kernels --json results/kernels.json     also prints each row as it comes
    python bench.py kernels --dry-run                       small matrices on a CPU, kernels.cu emulated

As in decoding, every call has other weights, together more than the L2 holds, and all are replayed from one
CUDA graph. What a call computes is first compared with float64. GB/s counts weights, scales and offsets (and
what dequantize writes). The first rows are floors: a copy, reading, an empty launch.
"""
import json
import statistics
import time
import timeit
from functools import partial

import torch

from benches.common import table
from beyond.gpu_kernels import WARP, load
from common.cli import refuse
from common.device import find_device
from quant import MATVEC_ROWS, QuantMatrix, unpack

SHAPES = [(4096, 4096, 512), (11008, 4096, 512), (4096, 11008, 512),  # Llama2-7B: out, in, rank of factors
          (1600, 1600, 384), (4800, 1600, 384), (6400, 1600, 384), (1600, 6400, 384)]  # GPT-2 XL
FORMS = [(8, 0), (8, 64), (4, 0), (4, 64)]  # bits, group (0: a row)
ROWS = 1, 4, 8, 16, 32, 64, 128
L2_BYTES = 256 << 20  # more than the L2 of any GPU
WRONG = 0.02  # of the norm of what float64 gives
WARM_UP = 0.03  # seconds of replays before the timed ones, until the clocks have risen
DEFAULTS = dict(dry_run=False)

def graph_seconds(calls, rounds=20):
    """Median seconds of one call, the calls being recorded one after the other in a CUDA graph."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times, start = [], time.perf_counter()
    while len(times) < rounds:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if time.perf_counter() - start > WARM_UP:
            times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)

def cpu_seconds(calls):
    """The same without a graph, once."""
    return timeit.timeit(lambda: [call() for call in calls], number=1) / len(calls)

def bytes_of(thing):
    """Bytes of a tensor, of a QuantMatrix with its scales and offsets, or of several of these."""
    if isinstance(thing, torch.Tensor):
        return thing.nbytes
    return sum(map(bytes_of, thing.parts() if isinstance(thing, QuantMatrix) else thing))

def exact(W):
    """W in float64, not by kernels.cu."""
    return (W if isinstance(W, torch.Tensor) else W.rows(torch.arange(W.out_features))).double()

class Measurement:
    """Collects rows; seconds(calls) times a list of calls."""

    def __init__(self, kernels, seconds, device, l2_bytes):
        self.kernels, self.seconds, self.device, self.l2_bytes = kernels, seconds, device, l2_bytes
        self.rows, self.copy = [], None
        a, b, one = (self.random(1, n) for n in (2 * l2_bytes, 2 * l2_bytes, 1))
        add = partial(self.add, engine="torch", shape=(), form=(16, 0))
        add("copy", x=a, call=lambda x, to: to.copy_(x), things=[b] * 3, wanted=a, more=a.nbytes)
        integers = a.view(torch.int64)
        add("read", x=a, call=lambda x, W: W.sum(), things=[integers] * 3, wanted=integers.sum())
        add("empty launch", x=one, call=lambda x, W: W.mul_(1), things=[one] * 100, wanted=one)

    def random(self, *shape):
        return 0.02 * torch.randn(*shape, device=self.device, dtype=torch.bfloat16)

    def enough(self, make):
        """So many different things that the L2 can't hold them."""
        return [make() for _ in range(2 + self.l2_bytes // bytes_of(make()))]

    def matrices(self, out, width, form):
        return self.enough(lambda: QuantMatrix.of(self.random(out, width), *form))

    def add(self, kernel, engine, shape, form, x, call, things, wanted, more=0):
        """Compare call(x, things[0]) with what is wanted, then time call over all things. more: other bytes
        that are read or written."""
        row = dict(kernel=kernel, engine=engine, shape="x".join(map(str, shape)), bits=form[0], group=form[1],
                   rows=len(x))
        error = ((call(x, things[0]).double() - wanted).norm() / wanted.double().norm()).item()
        refuse(not error < WRONG, f"{row}: off by {error:.3g} of the result: not timed")
        s = self.seconds([partial(call, x, thing) for thing in things])
        speed = (bytes_of(things[0]) + more) / s
        self.copy = self.copy or speed  # bytes a second; the first row is that of the copy
        row |= dict(us=s * 1e6, gb_s=speed / 1e9, share_of_copy=speed / self.copy, error=error)
        self.rows.append(row)
        print(json.dumps(row), flush=True)

    def products(self, dense, form):
        """x W^T, g W, W x + s B (A x) and dequantize, of matrices as large as the dense ones; and
        what cuBLAS takes for these, with the first form."""
        k, (out, width) = self.kernels, dense[0].shape
        Ws = self.matrices(out, width, form)
        add = partial(self.add, shape=(out, width), form=form, things=Ws)
        A, B, W = self.random(8, width), self.random(out, 8), exact(Ws[0])
        peer = form == (4, 64) and width % 128 == 0 and dense[0].is_cuda
        packed = [int4pack(W) for W in Ws if peer]
        for M in ROWS:
            x, g = self.random(M, width), self.random(M, out)
            back = partial(add, "back", x=g, wanted=g.double() @ W)
            product = partial(add, "matvec" if M <= MATVEC_ROWS else "matmul", x=x, wanted=x.double() @ W.T)
            product("ours", call=k.product)
            back("ours", call=k.matmul_back)
            if form == FORMS[0]:
                cublas = dict(engine="torch", form=(16, 0), things=dense)
                product(**cublas, call=lambda x, W: x @ W.T, wanted=x.double() @ exact(dense[0]).T)
                back(**cublas, call=lambda g, W: g @ W, wanted=g.double() @ exact(dense[0]))
            if M >= MATVEC_ROWS:
                product("torch, dequantized first", call=lambda x, W: x @ k.dequantize(W, x.dtype).T)
                back("torch, dequantized first", call=lambda g, W: g @ k.dequantize(W, g.dtype))
            if M == 1:
                product("ours, a warp a row", call=partial(k.product, step=WARP))
            if peer:
                product("torch int4pack", things=packed,
                        call=lambda x, W: torch._weight_int4pack_mm(x, W[0], 64, W[1]))
            if M <= 8:
                lora = partial(add, "lora", x=x, wanted=x.double() @ (W + 4 * B.double() @ A.double()).T)
                lora("ours", call=lambda x, W: k.lora(x, W, A, B, 4.0))
                lora("ours, 4 launches", call=lambda x, W: k.product(x, W) + 4 * (x @ A.T @ B.T))
        add("dequantize", "ours", x=dense[0], call=lambda x, W: k.dequantize(W, x.dtype), wanted=W,
            more=bytes_of(dense[0]))

    def factors(self, out, width, rank, form):
        """B (A x) in one launch and in two."""
        k, pairs = self.kernels, list(zip(self.matrices(rank, width, form), self.matrices(out, rank, form)))
        A, B = map(exact, pairs[0])
        for M in (1, 8, MATVEC_ROWS):
            x = self.random(M, width)
            add = partial(self.add, "lowrank", shape=(out, rank, width), form=form, x=x, things=pairs,
                          wanted=x.double() @ A.T @ B.T)
            add("ours", call=lambda x, pair: k.lowrank(x, *pair))
            add("ours, two launches", call=lambda x, pair: k.product(k.product(x, pair[0]), pair[1]))

def int4pack(W):
    """The same integers, scales and offsets as torch's product of int4 takes them."""
    q = (unpack(W.q, 4, W.in_features) + 8).to(torch.uint8)
    packed = torch._convert_weight_to_int4pack(q[:, ::2] << 4 | q[:, 1::2], 8)
    return packed, torch.stack([W.scale.T, W.offset.T], -1).bfloat16().contiguous()

@torch.inference_mode()
def bench(args):
    refuse(not torch.cuda.is_available() and not args.dry_run, "bench.py kernels needs a GPU: here --dry-run "
           "can only run the kernels through their emulation, which says nothing of their speed")
    device, shapes = find_device("bfloat16"), SHAPES
    if args.dry_run:
        from tests.cuda_on_cpu import Emulated
        m, shapes = Measurement(Emulated(), cpu_seconds, torch.device("cpu"), 1 << 10), [(48, 128, 64)]
    else:
        refuse(load() is None, "kernels.cu could not be built: the line above says why")
        m = Measurement(load(), graph_seconds, device.torch_device, L2_BYTES)
    for out, width, rank in shapes:
        dense = m.enough(lambda shape=(out, width): m.random(*shape))
        for form in FORMS:
            m.products(dense, form)
            m.factors(out, width, rank, form)
    return device, m.rows

def report(rows):
    return table(rows, first="kernel engine shape bits group rows", columns={
        "us": ("us", "{:.1f}"), "GB/s": ("gb_s", "{:.0f}"), "of copy": ("share_of_copy", "{:.0%}")})
