"""kernels.cu, run on a CPU by tests/cuda_on_cpu.h: every kernel against float64, for fresh random sizes.

    pytest tests/test_kernels.py             # here, without a GPU
    pytest tests/test_kernels.py -m slow     # compile it for sm_80 and sm_90, with nvcc; run it, with a GPU
"""
import ctypes
import itertools
import os
import random
import shutil
import subprocess

import pytest
import torch
from cuda_on_cpu import FLAGS, ROOT, Emulated

from beyond import gpu_kernels
from beyond.gpu_kernels import FAST, NAIVE, TYPES, WARP
from common.cli import InputError
from quant import QuantMatrix

ROUNDING = {torch.bfloat16: 2 ** -8, torch.float16: 2 ** -11}  # of one number, to its size
SIZES = [*range(1, 18), 31, 33, 63, 64, 65, 100, 127, 128, 130, 192, 257, 1000]

@pytest.fixture(scope="session")
def kernels():
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile kernels.cu with")
    return Emulated()

@pytest.fixture
def draw(request):
    """A random source of each case's own; SEED=n in the environment tries other numbers."""
    seed = int(os.environ.get("SEED", 0))
    torch.manual_seed(seed)
    return random.Random(f"{seed} {request.node.name}")

def random_matrix(rows, width, bits, group):
    """Weights as large models have them: small, not centred, some far out."""
    w = 0.02 * torch.randn(rows, width) + 0.005 * torch.randn(rows, 1)
    return QuantMatrix.of(torch.where(torch.rand(rows, width) < 0.01, 5 * w, w), bits, group)

def some_group(draw, width, multiple_of=1):
    """0 (whole rows), or a divisor of the width that is such a multiple."""
    return draw.choice([0] + [g for g in range(multiple_of, width, multiple_of) if width % g == 0][-4:])

def assert_product(y, x, w, inner=0.0):
    """y = x w^T up to the rounding of y itself, of float sums, and `inner` for what is rounded on the way."""
    exact = x.double() @ w.double().T
    size = x.double().abs() @ w.double().abs().T  # float sums are right to a part of that
    allowed = ROUNDING[y.dtype] * exact.abs() + (1e-5 + inner) * size + 1e-7  # of q + CENTRE, see part 4
    assert torch.isfinite(y).all(), "not every number of y was written"
    worst = ((y.double() - exact).abs() / allowed).max()
    assert worst <= 1, f"{worst:.1f} times the rounding that is allowed"

def cases(count):
    """(bits, dtype, i) of a test, with names that do not move: bench.py gpu calls some."""
    every = itertools.product((8, 4), (torch.bfloat16, torch.float16), range(count))
    return [pytest.param(*case, id=f"int{case[0]}-{str(case[1])[6:]}-{case[2]}") for case in every]

@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", list(TYPES))
def test_dequantize(kernels, draw, bits, dtype):
    for _ in range(6):
        rows, width = draw.choice(SIZES[:26]), draw.choice(SIZES)
        m = random_matrix(rows, width, bits, some_group(draw, width))
        assert torch.equal(kernels.dequantize(m, dtype), m.dense(dtype))

@pytest.mark.parametrize("step", [NAIVE, WARP])
@pytest.mark.parametrize("bits, dtype, i", cases(2))
def test_plain_product(kernels, draw, step, bits, dtype, i):
    M, rows, width = draw.randint(1, 35), draw.choice(SIZES[:26]), draw.choice(SIZES)
    m, x = random_matrix(rows, width, bits, some_group(draw, width)), torch.randn(M, width, dtype=dtype)
    assert_product(kernels.product(x, m, step), x, m.dense())

@pytest.mark.parametrize("bits, dtype, i", cases(10))
def test_matvec(kernels, draw, bits, dtype, i):
    """1 to 16 rows; every count of words a lane may load, by the group."""
    M, rows = draw.randint(1, 16), draw.choice(SIZES)
    words = [1, 2, 4][i % 3]
    group = words * 128 // bits
    width = draw.choice([*SIZES, 8, 24, 72, 136, 1600]) if i < 4 else group * draw.choice([1, 2, 3, 7, 9, 20])
    m, x = random_matrix(rows, width, bits, 0 if i < 4 else group), torch.randn(M, width, dtype=dtype)
    assert_product(kernels.product(x, m), x, m.dense())

@pytest.mark.parametrize("bits, dtype, i", cases(6))
def test_matmul(kernels, draw, bits, dtype, i):
    """17 rows and more, on tiles of 64 x 64 that the sizes do not fill."""
    M, rows = draw.choice([17, 63, 64, 65, 130]), draw.choice([1, 16, 63, 64, 65, 150])
    group = [0, 64, 128, 0, 192, 0][i]
    width = group * draw.choice([1, 2, 3]) if group else draw.choice(SIZES)
    m, x = random_matrix(rows, width, bits, group), torch.randn(M, width, dtype=dtype)
    assert_product(kernels.product(x, m), x, m.dense())

def test_x_that_begins_anywhere(kernels, draw):
    """A slice of a larger tensor need not begin at 16 bytes."""
    m, x = random_matrix(33, 128, 4, 64), torch.randn(20 * 128 + 1, dtype=torch.bfloat16)[1:].view(20, 128)
    for M in (3, 20):
        assert_product(kernels.product(x[:M], m), x[:M], m.dense())

@pytest.mark.parametrize("bits, dtype, i", cases(4))
def test_matmul_back(kernels, draw, bits, dtype, i):
    M, rows, width = draw.choice([1, 17, 64, 65]), draw.choice(SIZES[:26]), draw.choice(SIZES[:26])
    m, g = random_matrix(rows, width, bits, some_group(draw, width)), torch.randn(M, rows, dtype=dtype)
    assert_product(kernels.matmul_back(g, m), g, m.dense().T, inner=ROUNDING[dtype])  # it rounds W to T

@pytest.mark.parametrize("bits, dtype, i", cases(6))
def test_lowrank_in_one_launch(kernels, draw, bits, dtype, i):
    M, rows, group = draw.randint(1, 16), draw.choice(SIZES), 0
    width, rank = 8 * draw.choice(SIZES[:20]), draw.choice([8, 16, 24, 48, 104])
    if i % 2:
        group = 128 // bits
        rank, width = group * draw.choice([1, 2, 3]), group * draw.choice([1, 4, 9])
    A, B = random_matrix(rank, width, bits, group), random_matrix(rows, rank, bits, group)
    x = torch.randn(M, width, dtype=dtype)
    for _ in range(2):  # the counters must be ready for the next launch
        y, h = kernels.lowrank(x, A, B), kernels.made[0]
        assert_product(h, x, A.dense())
        assert_product(y, h, B.dense())

@pytest.mark.parametrize("bits, dtype, i", cases(4))
def test_lowrank_of_wide_inputs(kernels, draw, bits, dtype, i):
    """So wide that several blocks share the columns of each 16 rows of A; the same bits each time."""
    width, rank, group = [(4096, 16, 0), (6400, 40, 64), (2048, 24, 128), (1600, 8, 0)][i]
    M, rows = draw.choice([1, 3, 9, 16]), draw.choice(SIZES)
    A, B = random_matrix(rank, width, bits, group), random_matrix(rows, rank, bits, 0)
    x = torch.randn(M, width, dtype=dtype)
    y, h = kernels.lowrank(x, A, B), kernels.made[0]
    assert_product(h, x, A.dense())
    assert_product(y, h, B.dense())
    assert torch.equal(kernels.lowrank(x, A, B), y)

@pytest.mark.parametrize("bits, dtype, i", cases(4))
def test_lora_in_one_launch(kernels, draw, bits, dtype, i):
    M, rows = draw.randint(1, 16), draw.choice(SIZES)
    r, scale = draw.choice([1, 4, 8, 13, 35]), draw.choice([4.0, 0.5])
    width, group = [(192, 64), (2000, 0), (192, 64), (8 * draw.choice(SIZES[:20]), 0)][i]
    m, x = random_matrix(rows, width, bits, group), torch.randn(M, width, dtype=dtype)
    A, B = (0.1 * torch.randn(*shape) for shape in ((r, width), (rows, r)))
    A, B = A.to(dtype), B.to(dtype)
    for _ in range(2):
        y = kernels.lora(x, m, A, B, scale)
        assert_product(y, x, m.dense().double() + scale * (B.double() @ A.double()))

def test_the_boundary_checks_its_arguments(kernels):
    m, B, x = random_matrix(64, 128, 8, 64), random_matrix(8, 64, 8, 64), torch.randn(4, 128).bfloat16()
    a, b = torch.zeros(8, 128).bfloat16(), torch.zeros(64, 8).bfloat16()
    elsewhere = QuantMatrix.of(torch.zeros(64, 128, device="meta"), 8)
    for call, message in (
            (lambda: kernels.product(x.float(), m), "numbers in bfloat16 or float16, got .* in torch.float32"),
            (lambda: kernels.product(x[:, :64], m), r"takes rows of 128 .* got \(4, 64\)"),
            (lambda: kernels.product(x.repeat(1, 2)[:, ::2], m), "contiguous .* strides"),
            (lambda: kernels.product(x, elsewhere), "on one cpu, x is on cpu: .* on meta"),
            (lambda: kernels.matmul_back(x, m), "takes rows of 64"),
            (lambda: kernels.lora(x, m, a.t().contiguous().t(), b, 1), "contiguous"),
            (lambda: gpu_kernels.Kernels(kernels.library, "cuda").product(x, m), "on one cuda")):
        with pytest.raises(InputError, match=message):
            call()
    many = x.repeat(5, 1)
    for unfit in (kernels.lowrank(many, m, B), kernels.lowrank(x, m, m), kernels.lowrank(x[:0], m, B),
                  kernels.lora(x, m, a, b[:9], 1), kernels.lora(x, random_matrix(64, 128, 8, 8), a, b, 1)):
        assert unfit is None

# ----------------------------------------------------------------------------- on the real thing

CUT = 3e-5  # of the size: tensor cores cut float sums off instead of rounding them

@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_it_compiles_for_gpus(architecture, tmp_path):
    """For an A100 and an H100."""
    nvcc = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin/nvcc")
    if not os.path.exists(nvcc):
        pytest.skip("no nvcc in CUDA_HOME")
    flags = ["-std=c++17", f"-arch={architecture}", "-shared", "-Xcompiler", "-fPIC"]
    subprocess.run([nvcc, *flags, ROOT / "kernels.cu", "-o", tmp_path / "kernels.so"], check=True)
    assert ctypes.CDLL(str(tmp_path / "kernels.so")).run_product, "the library can be loaded"

def test_the_loader_finds_the_library_where_torch_builds_it(monkeypatch, tmp_path):
    """With the emulation in place of nvcc's work."""
    def build(name, sources, build_directory, is_python_module):
        command = ["g++", *FLAGS, "-I", ROOT / "tests", *sources, "-o", f"{build_directory}/{name}.so"]
        subprocess.run(command, check=True)
        assert not is_python_module
    monkeypatch.setattr("torch.utils.cpp_extension.load", build)
    monkeypatch.setattr(gpu_kernels, "cache_dir", lambda: tmp_path)
    assert gpu_kernels.load.__wrapped__().library.run_product

@pytest.fixture(scope="session")
def on_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    kernels = gpu_kernels.load()
    assert kernels is not None, "there is a GPU, but kernels.cu could not be built: see the message above"
    return kernels

@pytest.mark.slow
@pytest.mark.parametrize("bits, dtype, i", cases(12))
def test_products_on_a_gpu(on_gpu, draw, bits, dtype, i):
    M, rows, group = draw.choice([1, 3, 8, 16, 17, 64, 100]), draw.choice(SIZES), [0, 0, 64, 128][i % 4]
    width = group * draw.choice([1, 2, 5]) if group else draw.choice(SIZES)
    m, x = random_matrix(rows, width, bits, group), torch.randn(M, width, dtype=dtype, device="cuda")
    dense, m = m.dense(dtype), m.cuda()
    for step in (NAIVE, WARP, FAST):
        assert_product(on_gpu.product(x, m, step), x, m.dense(), inner=CUT)
    g = torch.randn(M, rows, dtype=dtype, device="cuda")
    assert_product(on_gpu.matmul_back(g, m), g, m.dense().T, inner=ROUNDING[dtype])
    assert torch.equal(on_gpu.dequantize(m, dtype).cpu(), dense)

@pytest.mark.slow
@pytest.mark.parametrize("bits, dtype, i", cases(6))
def test_one_launch_on_a_gpu(on_gpu, draw, bits, dtype, i):
    """Many launches in a row, also replayed by a CUDA graph: the counters must be ready each time."""
    M, rows = draw.randint(1, 16), draw.choice([100, 1000, 4096])
    width, rank = 64 * draw.choice([3, 16, 64]), 64 * draw.choice([1, 3, 8])
    A, B = random_matrix(rank, width, bits, 64).cuda(), random_matrix(rows, rank, bits, 64).cuda()
    x, a, b = (torch.randn(*s, dtype=dtype, device="cuda") for s in ((M, width), (8, width), (rows, 8)))
    W = random_matrix(rows, width, bits, 64).cuda()
    h = on_gpu.product(x, A)  # lowrank may add it up in pieces: another rounding
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(50):
            y, z = on_gpu.lowrank(x, A, B), on_gpu.lora(x, W, a, b, 0.5)
        assert_product(y, h, B.dense(), inner=CUT + ROUNDING[dtype])
        first = y.clone()
    graph = torch.cuda.CUDAGraph()
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        y, z = on_gpu.lowrank(x, A, B), on_gpu.lora(x, W, a, b, 0.5)
    for _ in range(50):
        y.fill_(float("nan")), z.fill_(float("nan"))
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, first)
    assert_product(z, x, W.dense().double() + 0.5 * (b.double() @ a.double()), inner=CUT)
