"""quant.py: the format, the quantized layers against float64 and autograd, rounding, and models on disk."""
import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import quant
from beyond.rounding import clip_rows, feedback_rows, quantize_calibrated
from checkpoint import load_model, save_model
from common.cli import InputError
from common.device import stored_bytes
from common.generate import generate
from common.loss import head_loss
from lowrank import LoRALinear, LowRankLinear, attach_lora, replace_linears
from model import Config, Transformer, config_for, count_parameters, dense_weight, matmul_weights
from quant import (
    QuantMatrix,
    attach_fake_quantization,
    decode,
    fake_quantize,
    pack,
    quantize,
    quantize_layer,
    quantize_rows,
    unpack,
)

@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

def small(kind="gpt2", rank=0, tied=True):
    kv_heads = 2 if kind == "llama" else 4
    sizes = dict(vocab_size=211, context=128, blocks=2, heads=4, kv_heads=kv_heads, width=64, ffn=128)
    model = Transformer(Config(kind, tied=tied, **sizes))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.dim() == 2 else 1)  # so that the layers matter beside the residual stream
    if rank:
        replace_linears(model, rank, method=2)
    return model.eval()

def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()

# ----------------------------------------------------------------------------- the format

FORMS = [(33, 65, 0), (48, 256, 64), (50, 96, 32), (17, 128, 128), (5, 40, 8), (64, 1600, 0), (100, 192, 48),
         (1, 1, 0), (7, 512, 256)]

@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows, width, group", FORMS)
def test_rounding_is_the_nearest_step(bits, rows, width, group):
    w = 0.02 * torch.randn(rows, width)
    m = QuantMatrix.of(w, bits, group)
    vectors = w.view(rows, -1, group or width)
    step = (vectors.amax(-1) - vectors.amin(-1)) / (2 ** bits - 1)
    error = (m.dense() - w).view_as(vectors).abs()
    assert (error <= 0.51 * step[..., None] + 3e-5).all()  # half a step, and s and o in float16
    assert m.q.nbytes == rows * -(-width * bits // 128) * 16
    assert torch.equal(unpack(m.q, bits, width), quantize_rows(w, bits, m.group)[0])
    assert torch.equal(m.rows(torch.tensor([[0, rows - 1]])), m.dense()[torch.tensor([[0, rows - 1]])])

def test_the_order_of_int4_in_a_word():
    """The drawing in pack(): weight 0 in the lowest bits, then 2, 4, 6, 1, 3, 5, 7."""
    q = torch.arange(8, dtype=torch.int8)[None] - 8
    word = int(pack(q, 4).view(torch.int32)[0, 0]) & 0xffffffff
    assert word == 0x75316420

def test_vectors_without_a_range_and_extremes():
    w = torch.stack([torch.zeros(64), torch.full((64,), 0.1), torch.linspace(-3e4, 3e4, 64),
                     torch.linspace(-1e-7, 1e-7, 64)])
    for bits in (8, 4):
        d = QuantMatrix.of(w, bits, 0).dense()
        assert torch.isfinite(d).all() and (d[0].abs() <= 1e-6).all() and (d[1] - 0.1).abs().max() < 1e-4

@pytest.mark.parametrize("rounding", [quantize_rows, clip_rows, lambda w, b, g: feedback_rows(w, b, g, torch.eye(128))])
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_any_size_are_rounded_right_or_refused(bits, rounding):
    """Right: within three times half a step and the precision of float16, as min-max has it; none is inf or NaN."""
    W, refused = torch.randn(64, 128), []
    row = torch.arange(64)[:, None] == 3
    kinds = dict(normal=W, zero=0 * W, constant=0 * W + 0.3, row=torch.where(row, 0.0, W), far=0.01 * W + 100,
                 outlier=torch.where(row, 1e4, W), small=1e-3 * W, tiny=1e-5 * W, tinier=1e-7 * W, dust=0 * W + 1e-9,
                 large=torch.where(row, 3e4 * W, W), huge=torch.where(row, 1e8 * W, W), offset=W + 1e5, nan=W / 0 * 0, inf=W / 0)
    for name, w in kinds.items():
        try:
            m = QuantMatrix.of(w, bits, None, rounding, name)
        except InputError as error:
            assert str(error).startswith(f"{name} has weights from ") and "--bits 16" in str(error)
            refused.append(name)
            continue
        vectors, error = w.unflatten(-1, (-1, m.group)), (m.dense() - w).abs()
        step = (vectors.amax(-1) - vectors.amin(-1)) / (2 ** bits - 1)
        assert error.isfinite().all() and (w.any() or not error.max() > 1e-6)
        if rounding is quantize_rows:
            bound = step / 2 + vectors.abs().amax(-1) / 1024 + 1e-7
            assert (error.unflatten(-1, (-1, m.group)).amax(-1) <= 3 * bound).all(), name
    always = ["tinier", "dust", "huge", "offset", "nan", "inf"]
    assert refused == always if bits == 4 else ["tiny", *always]

def test_the_matrix_that_is_refused_is_named(tmp_path):
    model = small("gpt2", rank=32)
    model.blocks[1].mlp.up.B.data[3] *= 1e7
    save_model(tmp_path / "m", model, None)
    other = copy.deepcopy(model)
    for make in (lambda: quantize(model, 8), lambda: load_model(tmp_path / "m", bits=8),
                 lambda: quantize_calibrated(other, 8, [torch.randint(0, 211, (1, 64))])):
        with pytest.raises(InputError, match=r"blocks\.1\.mlp\.up\.B has weights from .*: float16 scales can't hold these at 8 bits"):
            make()
    model = small("gpt2")
    model.embed.weight.data *= 1e-8
    with pytest.raises(InputError, match=r"(embed|head)\.weight has weights from"):
        quantize(model, 8)

@pytest.mark.parametrize("H", [torch.full((64, 64), torch.nan), torch.eye(64) * torch.inf, torch.eye(64) * 1e38])
def test_moments_that_are_not_finite_are_refused(H):
    with pytest.raises(InputError, match="the second moments of a layer's inputs are not finite"):
        feedback_rows(torch.randn(8, 64), 4, 64, H)

@pytest.mark.parametrize("bits, group, message", [
    (3, None, "bits must be 4 or 8, got 3"), (16, None, "got 16"), (8, -1, "groups of -1"),
    (4, 60, "groups of 60 do not divide a row of 64")])
def test_bad_forms(bits, group, message):
    with pytest.raises(InputError, match=message):
        quantize(small(), bits, group)

def test_the_default_group_adapts():
    assert [QuantMatrix(2, width, 4).group for width in (64, 128, 96, 48, 65, 24)] == [64, 64, 32, 16, 65, 24]
    assert QuantMatrix(2, 96, 8).group == 96

# ----------------------------------------------------------------------------- products

@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows, width, group", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_and_gradients(bits, rows, width, group, dtype):
    m = QuantMatrix.of(0.02 * torch.randn(rows, width) + 0.003, bits, group).eval()
    w = m.dense().double()
    for count in (1, 2, 17, 200):
        x = torch.randn(count, width, dtype=dtype)
        size = x.double().abs() @ w.abs().T
        with torch.no_grad():
            y = m.times(x)
        assert y.dtype == dtype and y.shape == (count, rows)
        assert ((y.double() - x.double() @ w.T).abs() <= 0.01 * size + 1e-6).all()
        assert relative(y, x.double() @ w.T) < (0.02 if rows * width > 100 else 0.1)
    x, g = torch.randn(2, 5, width, requires_grad=True), torch.randn(2, 5, rows)
    y = m.times(x)
    y.backward(g)
    assert torch.allclose(y, x @ m.dense().T, rtol=1e-4, atol=1e-4)
    assert torch.allclose(x.grad, g @ m.dense(), rtol=1e-4, atol=1e-4)

def test_many_rows_in_float32_are_exact():
    m = QuantMatrix.of(torch.randn(40, 128), 8, 0)
    x = torch.randn(200, 128)
    assert torch.allclose(m.times(x), x @ m.dense().T, rtol=1e-5, atol=1e-4)

def test_autocast_computes_in_its_dtype():
    m, x = QuantMatrix.of(torch.randn(40, 128), 4), torch.randn(3, 128, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.times(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and relative(x.grad, m.dense().sum(0).expand(3, -1)) < 0.02

LAYERS = {"linear": lambda: nn.Linear(64, 48), "no bias": lambda: nn.Linear(64, 48, bias=False),
          "low rank": lambda: LowRankLinear(64, 48, 16), "embedding": lambda: nn.Embedding(50, 64)}

@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_behave_like_the_ones_they_replace(bits, name):
    dense = LAYERS[name]()
    layer = quantize_layer(copy.deepcopy(dense), bits)
    x = torch.randint(0, 50, (2, 7)) if name == "embedding" else torch.randn(2, 7, 64)
    y = layer(x)
    assert y.dtype == torch.float32 and y.shape == dense(x).shape
    assert relative(y, dense(x)) < (0.03 if bits == 8 else 0.25)
    assert relative(layer.dense_weight(), dense_weight(dense)) < (0.02 if bits == 8 else 0.2)
    holder, before = nn.ModuleList([layer]), nn.ModuleList([dense])
    assert count_parameters(holder) == count_parameters(before)
    assert name == "embedding" or matmul_weights(holder) == matmul_weights(before)
    assert not any(p.requires_grad for p in layer.parameters())
    bf = copy.deepcopy(layer).bfloat16()
    for m, n in zip(quant.matrices(bf), quant.matrices(layer)):
        assert m.scale.dtype == torch.float16 and torch.equal(m.scale, n.scale)
    assert name == "embedding" or bf(x.bfloat16()).dtype == torch.bfloat16

@pytest.mark.parametrize("bits", [8, 4])
def test_lora_trains_on_a_quantized_base(bits):
    """The adapter's gradients are those of a dense base of the same weights; nothing of W's size is saved."""
    base = quantize_layer(nn.Linear(128, 96), bits)
    dense = nn.Linear(128, 96)
    dense.weight.data, dense.bias.data = base.dense_weight(), base.bias.data.clone()
    ours, theirs = LoRALinear(base, 4, 8), LoRALinear(dense, 4, 8)
    nn.init.normal_(ours.B)
    theirs.A.data, theirs.B.data = ours.A.data.clone(), ours.B.data.clone()
    x = torch.randn(100, 128)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        a = x.clone().requires_grad_()
        y = ours(a)
    assert torch.Size([96, 128]) not in saved and torch.Size([128, 96]) not in saved
    b = x.clone().requires_grad_()
    z = theirs(b)
    y.square().sum().backward()
    z.square().sum().backward()
    for p, q in ((y, z), (a.grad, b.grad), (ours.A.grad, theirs.A.grad), (ours.B.grad, theirs.B.grad)):
        assert relative(p, q) < 1e-4

# ----------------------------------------------------------------------------- models

@pytest.mark.parametrize("kind, rank, tied", [
    ("gpt2", 0, True), ("gpt2", 32, True), ("llama", 0, False), ("llama", 32, False)])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_model(kind, rank, tied, bits, tmp_path):
    """Near the original, smaller, with the same counts; from meta and a file it comes back as it was."""
    model, tokens = small(kind, rank, tied), torch.randint(0, 211, (2, 100))
    with torch.no_grad():
        before, parameters, multiplied = model(tokens), count_parameters(model), matmul_weights(model)
        dense = copy.deepcopy(model)
        quantize(model, bits)
        after = model(tokens)
    assert relative(after, before) < (0.05 if bits == 8 else 0.5)
    assert count_parameters(model) == parameters and matmul_weights(model) == multiplied
    assert stored_bytes(model) < (0.45 if bits == 8 else 0.4) * stored_bytes(dense)
    list(generate(model, [[1, 2, 3]], 3))  # takes the forms for few rows
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "m.safetensors")

    forms = {name: quant.describe(m) for name, m in model.named_modules() if type(m) in quant.KINDS.values()}
    with torch.device("meta"):
        again = Transformer(model.config)
        for name, form in forms.items():
            again.set_submodule(name, quant.from_description(form, again.get_submodule(name)))
        quant.tie_quantized(again)
    again.to_empty(device="cpu")
    own = dict(again.named_parameters()) | dict(again.named_buffers())
    read = load_file(tmp_path / "m.safetensors")
    assert own.keys() == read.keys()
    for name, t in own.items():
        assert t.dtype == read[name].dtype
        t.data.copy_(read[name])
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens), after)

@pytest.mark.parametrize("rank", [0, 32])
def test_a_saved_model_computes_in_the_dtype_it_is_read_in(rank, tmp_path):
    """The integers of an embedding say nothing of the dtype of the norms after it."""
    model = small("gpt2", rank)
    quantize(model, 8)
    save_model(tmp_path / "m", model, None)
    for dtype in (torch.float32, torch.bfloat16):
        again, _ = load_model(tmp_path / "m", dtype=dtype)
        with torch.no_grad():
            assert again(torch.tensor([[1, 2, 3]])).dtype == dtype

def test_a_tied_matrix_is_stored_once_at_8_bits():
    model = small("gpt2")
    quantize(model, 4)
    assert model.head.W is model.embed.W and model.head.W.bits == 8
    x = torch.randint(0, 211, (1, 4))
    with torch.no_grad():
        assert torch.equal(model(x), model(x))  # lookups and products share one matrix, in whatever form

def test_what_cant_be_quantized():
    model = small("gpt2")
    replace_linears(model, 8, method=3)
    with pytest.raises(InputError, match="alpha"):
        quantize(model, 8)
    with pytest.raises(InputError, match="a QuantLinear can't be quantized"):
        quantize_layer(quantize_layer(nn.Linear(64, 64), 8), 4)

def test_on_meta_only_shapes_are_made():
    with torch.device("meta"):
        model = Transformer(config_for("llama2-7b", blocks=1))
    quantize(model, 4)
    assert model.blocks[0].mlp.up.W.q.shape == (11008, 2048) and model.blocks[0].mlp.up.W.q.is_meta

def test_adapters_on_a_quantized_model():
    model, tokens = small("llama"), torch.randint(0, 211, (2, 40))
    quantize(model, 4)
    attach_lora(model, r=4, alpha=8, targets=("q", "v"))
    loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for n, p in learning.items() if n.endswith(".B"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(5):
        optimizer.zero_grad()
        now = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        now.backward()
        optimizer.step()
    assert now < loss

# ----------------------------------------------------------------------------- rounding

@pytest.mark.parametrize("group", [64, 0])
def test_each_step_of_rounding_lowers_the_error(group):
    """min-max, clipping, error feedback, sweeps: on the output of correlated inputs as a network has them."""
    x = torch.randn(2000, 32) @ torch.randn(32, 128) + 0.3 * torch.randn(2000, 128)
    w = torch.randn(96, 128) * torch.rand(96, 1)
    H, length = x.T @ x, group or 128

    def error(rows):
        q, scale, offset = rows
        assert q.dtype == torch.int8 and q.min() >= -8 and q.max() <= 7 and scale.dtype == offset.dtype == torch.float16
        return relative(x @ decode(q, scale, offset).T, x @ w.T)

    plain, clipped = error(quant.quantize_rows(w, 4, length)), error(clip_rows(w, 4, length))
    feedback, swept = error(feedback_rows(w, 4, length, H, sweeps=0)), error(feedback_rows(w, 4, length, H, sweeps=3))
    assert clipped < plain and feedback < 0.7 * clipped and swept < feedback

def test_feedback_at_independent_inputs_is_plain_rounding():
    """Where no input says anything of another one (H is the identity), nothing can be made good."""
    w = torch.randn(20, 64)
    q, scale, offset = feedback_rows(w, 4, 64, torch.eye(64), sweeps=0)
    expected, s, o = clip_rows(w, 4, 64)
    assert torch.equal(q, expected) and torch.equal(scale, s) and torch.equal(offset, o)

def test_feedback_survives_inputs_that_are_always_zero():
    x = torch.randn(300, 64)
    x[:, ::3] = 0
    q, scale, offset = feedback_rows(torch.randn(16, 64), 4, 32, x.T @ x)
    assert torch.isfinite(scale).all() and torch.isfinite(offset).all()
    feedback_rows(torch.randn(16, 64), 4, 32, torch.zeros(64, 64))

@pytest.mark.parametrize("kind, rank", [("gpt2", 0), ("llama", 0), ("llama", 32)])
def test_calibration_beats_minmax(kind, rank):
    torch.manual_seed(0)
    model = small(kind, rank, tied=False)
    calibration, tokens = list(torch.randint(0, 211, (8, 4, 128))), torch.randint(0, 211, (4, 128))
    with torch.no_grad():
        exact, error = model(tokens), {}
        for name, batches in (("minmax", None), ("feedback", calibration)):
            rounded = copy.deepcopy(model)
            with torch.autocast("cpu", dtype=torch.bfloat16):  # must not reach the moments
                quantize(rounded, 4) if batches is None else quantize_calibrated(rounded, 4, batches)
            error[name] = relative(rounded(tokens), exact)
    assert error["feedback"] < 0.95 * error["minmax"], error

# ----------------------------------------------------------------------------- training with rounded weights

@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rank", [0, 32])
def test_quantization_aware_training(bits, rank):
    """The gradient passes straight through; names stay; the quantized model has the loss that was trained."""
    model, tokens = small("gpt2", rank, tied=not rank), torch.randint(0, 211, (2, 120))

    def loss(m):
        return nn.functional.cross_entropy(m(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    plain, names = loss(model), list(model.state_dict())
    assert attach_fake_quantization(model, bits) > 0
    assert list(model.state_dict()) == names
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = loss(model)
    assert first != plain
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.dim() == 2)
        optimizer.step()
    trained = loss(model)
    assert trained < first
    again = copy.deepcopy(model)
    with torch.no_grad():
        again.blocks[0].norm1.weight.zero_()
        next(p for p in again.blocks[1].mlp.parameters() if p.dim() == 2).zero_()
    assert loss(model) == trained and loss(again) != trained, "a copy has weights of its own"
    rounded = small("gpt2", rank, tied=not rank)
    rounded.load_state_dict(model.state_dict())
    assert loss(rounded) != trained
    quantize(rounded, bits)
    with torch.no_grad():
        assert abs(loss(rounded) - trained) < 1e-5

@pytest.mark.parametrize("rank", [0, 32])
def test_head_loss_of_a_rounded_head(rank):
    """common/loss.py takes the loss of rounded W^H, and its gradient, as autograd does from rounded logits."""
    model, tokens = small("gpt2", rank, tied=not rank), torch.randint(0, 211, (2, 30))
    attach_fake_quantization(model, 4)

    def gradients(loss):
        return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    h = model.hidden(tokens[:, :-1])
    logits = model.head(h)
    assert not torch.allclose(logits, nn.functional.linear(h, dense_weight(model.head)), atol=1e-3)
    slow = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    fast = head_loss(model.head, model.hidden(tokens[:, :-1]), tokens[:, 1:], chunk=7)
    assert abs(slow - fast) < 1e-6
    for one, other in zip(gradients(slow), gradients(fast)):
        torch.testing.assert_close(one, other)

def test_straight_through_gradient():
    w = torch.randn(8, 64, requires_grad=True)
    g = torch.randn(8, 64)
    y = fake_quantize(w, 4, None)
    y.backward(g)
    assert torch.equal(w.grad, g) and torch.equal(y, QuantMatrix.of(w.detach(), 4).dense())
