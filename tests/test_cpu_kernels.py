"""beyond/cpu_kernels.py: products of kernels_cpu.cpp against float64, and where it can't be had."""
import copy
import os
import platform
import random
import sys
from pathlib import Path

import pytest
import torch

from beyond import cpu_kernels
from beyond.cpu_kernels import product
from beyond.gpu_kernels import load as load_kernels
from lowrank import LowRankLinear
from quant import QuantMatrix, quantize_layer

@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()

def some_matrix(bits, rows, width, group):
    """In groups, or whole rows of any length (0); weights are not centred, as in large models."""
    width = group * -(-width // group) if group else width
    w = 0.02 * torch.randn(rows, width) + 0.005 * torch.randn(rows, 1)
    return QuantMatrix.of(w, bits, group)

def off_by(x, w, error):
    """How far x W^T may be off if x is, by `error`, and then rounded to 16 bits with a scale for each 128."""
    chunks = torch.nn.functional.pad(x.abs() + error, (0, -x.shape[1] % 128)).unflatten(1, (-1, 128))
    step = (chunks.amax(-1, keepdim=True) / 32767).expand_as(chunks).flatten(1)[:, :x.shape[1]]
    return (error + 0.501 * step + 1e-6 * x.abs()) @ w.abs().T

@pytest.fixture(params=["as it is", "-mno-avx512vnni", "-mno-avx512f", "-mno-avx2"])
def cpu(request, monkeypatch, compiler):
    """kernels_cpu.cpp as it is compiled on this machine, and on one that lacks some instructions."""
    if request.param != "as it is":
        if platform.machine() != "x86_64":
            pytest.skip("other CPUs take the plain loops in any case")
        monkeypatch.setattr(cpu_kernels, "FLAGS", [*cpu_kernels.FLAGS, *request.param.split()])
    cpu_kernels.load.cache_clear()
    assert cpu_kernels.load(), "g++ could not build kernels_cpu.cpp: the line above says why"
    yield
    cpu_kernels.load.cache_clear()

@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [0, 8, 24, 32, 64, 128])
@pytest.mark.parametrize("dtype, rounding", [
    (torch.float32, 1e-6), (torch.bfloat16, 2 ** -8), (torch.float16, 2 ** -11)])
def test_the_cpu_kernels_equal_float64(bits, group, dtype, rounding, cpu):
    """W x and B (A x) + bias of fresh random sizes, with outliers in x, to the rounding of x and y."""
    sizes = [1, 2, 3, 4, 5, 17, 63, 64, 65, 100, 129, 192, 300]
    for _ in range(8):
        rows, count = random.choice(sizes), random.choice(sizes)
        width, rank = random.choice(sizes[1:]), random.choice(sizes[1:])  # one small weight alone is refused
        B, bias = some_matrix(bits, rows, rank, group), torch.randn(rows)
        A = some_matrix(bits, B.in_features, width, group)
        x = (torch.randn(count, A.in_features) * torch.randn(A.in_features).mul(2).exp()).to(dtype)
        with torch.inference_mode():
            h, y = product(x, A), product(x, A, B, bias.to(dtype))
        x, a, b = x.double(), A.dense().double(), B.dense().double()
        exact, error = x @ a.T, off_by(x, a, torch.zeros_like(x))
        assert h.dtype == y.dtype == dtype
        assert ((h.double() - exact).abs() <= error + rounding * (exact.abs() + error) + 1e-7).all()
        whole, error = exact @ b.T + bias.to(dtype).double(), off_by(exact, b, error)
        assert ((y.double() - whole).abs() <= error + rounding * (whole.abs() + error) + 1e-6).all()

@pytest.mark.parametrize("bits, group", [(8, 0), (8, 32), (4, 0), (4, 64)])
def test_a_row_is_the_same_to_the_last_bit_whatever_the_others_are(bits, group, cpu):
    A, B = some_matrix(bits, 64, 576, group), some_matrix(bits, 50, 64, group)
    x, bias = torch.randn(71, 576), torch.randn(50)
    with torch.inference_mode():
        alone = torch.cat([product(row[None], A, B, bias) for row in x])
        for count in (2, 3, 4, 5, 8, 15, 71):
            assert torch.equal(product(x[:count], A, B, bias), alone[:count])

@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_numbers_that_are_not_finite_stay_so(bits, bad, cpu):
    x = torch.randn(5, 128)
    x[2, 70] = float(bad)
    with torch.inference_mode():
        y = QuantMatrix.of(torch.randn(40, 128), bits).times(x)
    assert not torch.isfinite(y[2]).any() and torch.isfinite(y[[0, 1, 3, 4]]).all()

def test_the_cpu_kernels_see_what_became_of_the_integers():
    """Addresses are kept between calls: a copy and other weights must not leave stale ones behind."""
    layer, x = quantize_layer(LowRankLinear(64, 48, 16), 8), torch.randn(1, 64)
    with torch.inference_mode():
        y = layer(x)
        other = copy.deepcopy(layer)
        other.load_state_dict(quantize_layer(LowRankLinear(64, 48, 16), 8).state_dict())
        assert torch.equal(layer(x), y) and not torch.equal(other(x), y)
        layer.A.q = layer.A.q.flip(0).contiguous()
        layer.A.scale = layer.A.scale.flip(0).contiguous()
        layer.A.offset = layer.A.offset.flip(0).contiguous()
        assert relative(layer(x), x @ layer.dense_weight().T + layer.bias) < 1e-4

@pytest.mark.parametrize("bits", [8, 4])
def test_without_a_compiler_torch_takes_over_and_it_is_said_once(bits, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FINGPT_CACHE", str(tmp_path / "cache"))
    cpu_kernels.load.cache_clear()
    layer, x = quantize_layer(LowRankLinear(65, 48, 17), bits, 0), torch.randn(3, 65)
    with torch.inference_mode():
        assert relative(layer(x), x @ layer.dense_weight().T + layer.bias) < 0.02
        layer(x)
    cpu_kernels.load.cache_clear()
    assert capsys.readouterr().out.count("kernels_cpu.cpp is not used") == 1

def test_without_nvcc_the_cuda_kernels_are_not_used_and_it_is_said_once(monkeypatch, capsys, tmp_path):
    import torch.utils.cpp_extension
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", None)
    monkeypatch.setenv("FINGPT_CACHE", str(tmp_path))
    load_kernels.cache_clear()
    assert load_kernels() is None and load_kernels() is None
    assert capsys.readouterr().out.count("kernels.cu is not used") == 1
    load_kernels.cache_clear()

def test_where_kernels_cu_does_not_compile_the_compilers_error_is_shown(monkeypatch, capsys, tmp_path):
    import torch.utils.cpp_extension

    def load(name, sources, **how):
        assert str(Path(sys.executable).parent) in os.environ["PATH"].split(os.pathsep), "ninja is beside the interpreter"
        raise RuntimeError("Error building extension 'x': [1/2] nvcc -c\nkernels.cu(7): error: no such name\n1 error detected")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("FINGPT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.utils.cpp_extension, "load", load)
    load_kernels.cache_clear()
    assert load_kernels() is None
    assert "kernels.cu(7): error: no such name" in capsys.readouterr().out
    load_kernels.cache_clear()
