"""bench.py kernels without a GPU: every call that it would time is made, on small matrices, with torch."""
import pytest
import torch

from benches.kernels import Measurement, measure, report
from quant import decode, quantize_rows, unpack


class Kernels:
    """What kernels.cu offers Python, on a CPU. Each call checks that the parts fit the input."""

    def dequantize(self, q, scale, offset, width, dtype):
        bits = 8 if q.dtype == torch.int8 else 4
        return decode(unpack(q, bits, width), scale, offset).to(dtype)

    def product(self, x, q, scale, offset, step=2):
        return x @ self.dequantize(q, scale, offset, x.shape[1], x.dtype).T

    def lowrank(self, x, *parts):
        return self.product(self.product(x, *parts[:3]), *parts[3:])

    def lora(self, x, q, scale, offset, A, B, factor):
        return self.product(x, q, scale, offset) + factor * (x @ A.T @ B.T)

    def quantize(self, w, bits, group):
        return quantize_rows(w, bits, group)


def test_rows_of_every_kernel():
    sizes = []

    def seconds(calls):
        sizes.append([call() for call in calls])
        return 1e-6
    m = Measurement(Kernels(), seconds, torch.device("cpu"), l2_bytes=20_000)
    rows = measure(m, shapes=[(128, 192), (64, 128)], rank=64)
    assert {r["kernel"] for r in rows} == {"matvec", "matmul", "lowrank", "lora", "quantize", "dequantize"}
    assert {r["engine"] for r in rows} >= {"ours", "torch"}
    for r in rows:
        assert set(r) == {"kernel", "engine", "shape", "rows", "bits", "us", "gb_s", "share_of_copy"}
        assert r["us"] == pytest.approx(1) and r["share_of_copy"] == pytest.approx(r["gb_s"] * 1e9 / m.copy)
    which = ("kernel", "engine", "shape", "rows", "bits")
    by_name = {tuple(r[key] for key in which): r for r in rows}
    one = by_name["matvec", "ours", "128x192", 1, 4]
    assert one["gb_s"] == pytest.approx(128 * 192 / 2 / 1e-6 / 1e9)
    assert len(report(rows).splitlines()) == 2 + len(rows)
    assert all(len(calls) >= 2 for calls in sizes), "one matrix alone would stay in the L2"
    assert any(len(calls) * 128 * 192 >= 20_000 for calls in sizes[1:])


def test_without_a_gpu_it_says_so_in_one_line(run):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("bench.py", "kernels")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "needs a GPU" in done.stderr
    assert not done.stdout
