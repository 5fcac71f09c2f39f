"""kernels.cu, run on a CPU by tests/cuda_on_cpu.h: every kernel against the float64 product of the dequantized weights, for fresh random sizes.

    pytest tests/test_kernels.py             # here, without a GPU
    pytest tests/test_kernels.py -m slow     # compile it for sm_80 and sm_90, where nvcc is found; run it on a GPU, where there is one
"""
import ctypes
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from quant import QuantMatrix, decode, quantize_rows, unpack

ROOT = Path(__file__).resolve().parent.parent
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
NAIVE, WARP, FAST = range(3)
ROUNDING = {torch.bfloat16: 2 ** -8, torch.float16: 2 ** -11}  # of one number, to its size
SIZES = [*range(1, 18), 31, 33, 63, 64, 65, 100, 127, 128, 130, 192, 257, 1000]


class Matrix(ctypes.Structure):
    _fields_ = [("q", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("offset", ctypes.c_void_p), ("rows", ctypes.c_int), ("width", ctypes.c_int),
                ("group", ctypes.c_int), ("row_bytes", ctypes.c_int)]


class Form(ctypes.Structure):
    _fields_ = [("W", Matrix), ("bits", ctypes.c_int)]


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def form(m):
    return Form(Matrix(m.q.data_ptr(), m.scale.data_ptr(), m.offset.data_ptr(), m.out_features, m.in_features, m.group, m.q.shape[1]), m.bits)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile kernels.cu with")
    library = tmp_path_factory.mktemp("kernels") / "kernels.so"
    subprocess.run([compiler, "-std=c++17", "-O1", "-Wno-unknown-pragmas", "-DCUDA_ON_CPU", "-I", ROOT / "tests", "-shared", "-fPIC",
                    "-x", "c++", ROOT / "kernels.cu", "-o", library], check=True)
    return ctypes.CDLL(library)


@pytest.fixture
def draw():
    """A random source with a fresh seed, printed where a test fails."""
    seed = int(os.environ.get("SEED", random.randrange(10 ** 6)))
    print(f"SEED={seed}")
    torch.manual_seed(seed)
    return random.Random(seed)


def random_matrix(rows, width, bits, group):
    """Weights as large models have them: small, not centred, some far out."""
    w = 0.02 * torch.randn(rows, width) + 0.005 * torch.randn(rows, 1)
    return QuantMatrix.of(torch.where(torch.rand(rows, width) < 0.01, 5 * w, w), bits, group)


def poisoned(*shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype)


def some_group(draw, width, multiple_of=1):
    """0 (whole rows), or a divisor of the width that is such a multiple."""
    return draw.choice([0] + [g for g in range(multiple_of, width, multiple_of) if width % g == 0][-4:])


def assert_product(y, x, w, inner=0.0):
    """y = x w^T up to the rounding of y itself, of float sums, and of `inner` for what is rounded on the way."""
    exact = x.double() @ w.double().T
    size = x.double().abs() @ w.double().abs().T  # what the terms add up to: float sums are right to a part of that
    allowed = ROUNDING[y.dtype] * exact.abs() + (2e-6 + inner) * size + 1e-7
    assert torch.isfinite(y).all(), "not every number of y was written"
    worst = ((y.double() - exact).abs() / allowed).max()
    assert worst <= 1, f"{worst:.1f} times the rounding that is allowed"


def cases(count):
    return [(bits, dtype, i) for bits in (8, 4) for dtype in (torch.bfloat16, torch.float16) for i in range(count)]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("step", [NAIVE, FAST])
def test_quantize_and_dequantize(kernels, draw, bits, dtype, step):
    for _ in range(6):
        rows, width = draw.choice(SIZES[:26]), draw.choice(SIZES)
        group = some_group(draw, width)
        w = (0.02 * torch.randn(rows, width)).to(dtype)
        w[0] = 0.25  # a vector without a range
        m = QuantMatrix(rows, width, bits, group)
        m.q.fill_(77), m.scale.fill_(float("nan")), m.offset.fill_(float("nan"))
        kernels.run_quantize(TYPES[dtype], pointer(w), form(m), step, None)
        q, scale, offset = quantize_rows(w, bits, m.group)
        assert torch.equal(m.scale, scale) and torch.equal(m.offset, offset)
        assert torch.equal(unpack(m.q, bits, width), q)
        out = poisoned(rows, width, dtype=dtype)
        kernels.run_dequantize(TYPES[dtype], form(m), pointer(out), step, None)
        assert torch.equal(out, decode(q.unflatten(-1, (-1, m.group)), scale, offset).flatten(1).to(dtype))


@pytest.mark.parametrize("step", [NAIVE, WARP])
@pytest.mark.parametrize("bits, dtype, i", cases(2))
def test_plain_product(kernels, draw, step, bits, dtype, i):
    M, rows, width = draw.randint(1, 35), draw.choice(SIZES[:26]), draw.choice(SIZES)
    m, x = random_matrix(rows, width, bits, some_group(draw, width)), torch.randn(M, width, dtype=dtype)
    y = poisoned(M, rows, dtype=dtype)
    kernels.run_product(TYPES[dtype], pointer(x), M, form(m), pointer(y), step, None)
    assert_product(y, x, m.dense())


@pytest.mark.parametrize("bits, dtype, i", cases(10))
def test_matvec(kernels, draw, bits, dtype, i):
    """1 to 16 rows; every count of words a lane may load, by the group."""
    M, rows = draw.randint(1, 16), draw.choice(SIZES)
    words = [1, 2, 4][i % 3]
    group = words * 128 // bits
    width = draw.choice(SIZES) if i < 4 else group * draw.choice([1, 2, 3, 7])
    m, x = random_matrix(rows, width, bits, 0 if i < 4 else group), torch.randn(M, width, dtype=dtype)
    y = poisoned(M, rows, dtype=dtype)
    kernels.run_product(TYPES[dtype], pointer(x), M, form(m), pointer(y), FAST, None)
    assert_product(y, x, m.dense())


@pytest.mark.parametrize("bits, dtype, i", cases(6))
def test_matmul(kernels, draw, bits, dtype, i):
    """17 rows and more, on tiles of 64 x 64 that the sizes do not fill."""
    M, rows = draw.choice([17, 63, 64, 65, 130]), draw.choice([1, 16, 63, 64, 65, 150])
    group = [0, 64, 128, 0, 192, 0][i]
    width = group * draw.choice([1, 2, 3]) if group else draw.choice(SIZES)
    m, x = random_matrix(rows, width, bits, group), torch.randn(M, width, dtype=dtype)
    y = poisoned(M, rows, dtype=dtype)
    kernels.run_product(TYPES[dtype], pointer(x), M, form(m), pointer(y), FAST, None)
    assert_product(y, x, m.dense())


def test_x_that_begins_anywhere(kernels, draw):
    """A slice of a larger tensor need not begin at 16 bytes."""
    m, x = random_matrix(33, 128, 4, 64), torch.randn(20 * 128 + 1, dtype=torch.bfloat16)[1:].view(20, 128)
    for M in (3, 20):
        y = poisoned(M, 33, dtype=torch.bfloat16)
        kernels.run_product(0, pointer(x), M, form(m), pointer(y), FAST, None)
        assert_product(y, x[:M], m.dense())


@pytest.mark.parametrize("bits, dtype, i", cases(4))
@pytest.mark.parametrize("step", [NAIVE, FAST])
def test_matmul_back(kernels, draw, bits, dtype, i, step):
    M, rows, width = draw.choice([1, 17, 64, 65]), draw.choice(SIZES[:26]), draw.choice(SIZES[:26])
    m, g = random_matrix(rows, width, bits, some_group(draw, width)), torch.randn(M, rows, dtype=dtype)
    out = poisoned(M, width, dtype=dtype)
    kernels.run_matmul_back(TYPES[dtype], pointer(g), M, form(m), pointer(out), step, None)
    assert_product(out, g, m.dense().T, inner=ROUNDING[dtype] if step == FAST else 0)  # the fast one rounds W to T


@pytest.mark.parametrize("bits, dtype, i", cases(6))
def test_lowrank_in_one_launch(kernels, draw, bits, dtype, i):
    M, rows, width, rank = draw.randint(1, 16), draw.choice(SIZES), draw.choice(SIZES), draw.choice([1, 8, 16, 17, 48, 100])
    group = 0
    if i % 2:
        group, rank, width = 128 // bits, 128 // bits * draw.choice([1, 2, 3]), 128 // bits * draw.choice([1, 4, 9])
    A, B, x = random_matrix(rank, width, bits, group), random_matrix(rows, rank, bits, group), torch.randn(M, width, dtype=dtype)
    counters = torch.zeros(4, dtype=torch.int32)
    for _ in range(2):  # the counters must be ready for the next launch
        h, y = poisoned(M, rank, dtype=dtype), poisoned(M, rows, dtype=dtype)
        kernels.run_lowrank(TYPES[dtype], pointer(x), M, form(A), form(B), pointer(h), pointer(y), pointer(counters), None)
        assert_product(h, x, A.dense())
        assert_product(y, h, B.dense())
        assert not counters.any()


@pytest.mark.parametrize("bits, dtype, i", cases(4))
def test_lora_in_one_launch(kernels, draw, bits, dtype, i):
    M, rows, r, scale = draw.randint(1, 16), draw.choice(SIZES), draw.choice([1, 4, 8, 13]), draw.choice([4.0, 0.5])
    width, group = (draw.choice(SIZES), 0) if i % 2 else (192, 64)
    m, x = random_matrix(rows, width, bits, group), torch.randn(M, width, dtype=dtype)
    A, B = (0.1 * torch.randn(*shape) for shape in ((r, width), (rows, r)))
    A, B, counters = A.to(dtype), B.to(dtype), torch.zeros(4, dtype=torch.int32)
    for _ in range(2):
        h, y = poisoned(M, r, dtype=torch.float32), poisoned(M, rows, dtype=dtype)
        kernels.run_lora(TYPES[dtype], pointer(x), M, form(m), pointer(A), pointer(B), r, ctypes.c_float(scale), pointer(h), pointer(y), pointer(counters), None)
        assert_product(y, x, m.dense().double() + scale * (B.double() @ A.double()))
        assert not counters.any()


# ----------------------------------------------------------------------------- on the real thing

def cuda_compiler():
    from torch.utils.cpp_extension import CUDA_HOME
    return CUDA_HOME and shutil.which("nvcc", path=str(Path(CUDA_HOME) / "bin"))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_it_compiles_for_gpus(tmp_path, architecture):
    if not cuda_compiler():
        pytest.skip("no nvcc (CUDA_HOME is not set)")
    from sysconfig import get_paths

    from torch.utils.cpp_extension import include_paths
    includes = [f"-I{path}" for path in [*include_paths("cuda"), get_paths()["include"]]]
    flags = ["-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__", "-D__CUDA_NO_BFLOAT16_CONVERSIONS__", "-D__CUDA_NO_HALF2_OPERATORS__"]
    done = subprocess.run([cuda_compiler(), "-c", ROOT / "kernels.cu", "-o", tmp_path / "kernels.o", "-O3", "-std=c++20", "--expt-relaxed-constexpr", "-gencode",
                           f"arch=compute_{architecture},code=sm_{architecture}", "-DTORCH_EXTENSION_NAME=kernels", *flags, *includes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
