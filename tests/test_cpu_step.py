"""beyond/cpu_step.py: a step in one call against the dense model in float64, and where it is not taken."""
from dataclasses import replace

import pytest
import torch

import model as model_file
from beyond import cpu_kernels
from beyond.cpu_step import CPUStep, cpu_step
from beyond.decoding import decoding_step
from beyond.paged_cache import PagedCache, Pool, Sequence
from common.generate import generate
from lowrank import attach_lora, replace_linears, swap_layers
from model import Config, KVCache, Layer, Transformer, dense_weight
from quant import quantize_layer

@pytest.fixture(autouse=True)
def built(compiler):
    assert cpu_kernels.load(), "g++ could not build kernels_cpu.cpp: the line above says why"

def some_model(kind, rank=False, bits=8):
    """Quantized, with weights, norms and biases that all matter."""
    gpt2 = kind == "gpt2"  # in groups of 64, the others in whole rows
    narrow = dict(kv_heads=2, width=80, ffn=200) if bits < 16 else dict(kv_heads=2, width=160, ffn=224)
    shape = dict(kv_heads=4, width=128, ffn=192) if gpt2 else narrow
    model = Transformer(Config(kind, 211, 90, blocks=2, heads=4, tied=gpt2, norm_eps=1e-3, **shape))
    with torch.inference_mode():
        for p in model.parameters():
            p.mul_(3) if p.dim() == 2 else p.add_(0.2 * torch.randn_like(p))
    if rank:
        replace_linears(model, 64 if gpt2 or bits == 16 else 24, method=2)
    if bits < 16:
        swap_layers(model, lambda name, layer: quantize_layer(layer, bits, 64 if gpt2 else 0))
    return model.eval()

def dense(model):
    """The same network with plain layers, in float64."""
    twin = Transformer(replace(model.config, tied=False))
    for name, layer in model.named_modules():
        if isinstance(layer, (Layer, torch.nn.Linear)):
            own = twin.get_submodule(name)
            own.weight.data = dense_weight(layer).data.clone()
            if own.bias is not None:
                own.bias.data = layer.bias.data.clone()
        elif isinstance(layer, (torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.Embedding)) or name == "head":
            twin.get_submodule(name).load_state_dict(layer.state_dict())
    return twin.double().eval()

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("rank", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("count", [3, 6])
@torch.inference_mode()
def test_a_step_is_the_dense_model_in_float64(kind, rank, bits, dtype, tolerance, count):
    """Rows of different lengths: three, or more than each thread reads for itself."""
    model = some_model(kind, rank, bits)
    oracle = dense(model)
    rows, cache = [[1, 2, 3], list(range(50)), *[[9]] * (count - 2)], KVCache(model.config, count, 60)
    model = model.to(dtype)
    model.hidden(torch.tensor([r + [0] * (50 - len(r)) for r in rows]), cache)
    cache.lengths = [len(r) for r in rows]
    step = cpu_step(model, cache)
    for i in range(5):
        new = torch.tensor([i, 7 * i, *range(100 + i, 98 + i + count)])
        logits = step(new, cache)
        rows = [r + [t] for r, t in zip(rows, new.tolist())]
        for row, y in zip(rows, logits):
            exact = oracle(torch.tensor([row]))[0, -1]
            assert (y.double() - exact).norm() < tolerance * exact.norm()

def test_generate_takes_it_and_writes_what_it_would_write_without(monkeypatch):
    model, taken = some_model("llama", True), []
    prompts = [[5, 6, 7], list(range(85))]  # the second one ends at the context
    without, call = list(generate(model, prompts, 12, temperature=0)), CPUStep.__call__
    monkeypatch.setattr(CPUStep, "__call__", lambda self, *args: taken.append(1) or call(self, *args))
    assert list(generate(model, prompts, 12, temperature=0, make_step=decoding_step)) == without
    assert len(taken) == 11

def step_of(model):
    cache = KVCache(model.config, 1, 20)
    model.hidden(torch.tensor([[1, 2, 3]]), cache)
    return cpu_step(model, cache)

@torch.inference_mode()
def test_where_something_is_in_the_way_it_is_not_taken(monkeypatch):
    assert step_of(some_model("gpt2"))
    plain = Transformer(Config("gpt2", 20, 64, blocks=1, heads=2, kv_heads=2, width=16, ffn=16))
    assert step_of(plain) is None, "rows of floats that are no whole vectors"
    assert step_of(some_model("gpt2", bits=16).half()) is None, "float16"
    adapted, other = some_model("llama"), some_model("gpt2")
    attach_lora(adapted, r=4, alpha=8, targets=("q",))
    other.blocks[0].attention.attend = lambda q, k, v, mask, dropout: q
    assert step_of(adapted) is None and step_of(other) is None
    model = some_model("gpt2")
    paged = PagedCache([Sequence(Pool(model.config, 8))])
    assert len(list(generate(model, [[1, 2]], 3, cache=paged, make_step=decoding_step))) == 3
    monkeypatch.setattr("beyond.cpu_step.load", lambda: None)
    assert step_of(some_model("gpt2")) is None

class SquaredReLU(model_file.FeedForward):
    def forward(self, x):
        return self.down(torch.relu(self.up(x)).square())

class Parallel(torch.nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.norm, self.attention = config.make_norm(), model_file.Attention(config, layer)
        self.mlp = model_file.FeedForward(config)

    def forward(self, x, rope=None, cache=None, mask=None):
        y = self.norm(x)
        return x + self.attention(y, rope, cache, mask) + self.mlp(y)

@pytest.mark.parametrize("name, changed", [("FeedForward", SquaredReLU), ("Block", Parallel)])
def test_a_class_in_the_place_of_another_is_not_taken_for_it(name, changed, monkeypatch):
    monkeypatch.setattr(model_file, name, changed)
    with torch.inference_mode():
        assert step_of(some_model("gpt2")) is None

def test_a_changed_class_is_not_taken_for_the_old_one(monkeypatch, capsys):
    """Somebody edits model.py."""
    monkeypatch.setattr(model_file.FeedForward, "forward", SquaredReLU.forward)
    model = some_model("gpt2")
    plain = list(generate(model, [[1, 2, 3]], 8, temperature=0))
    for _ in range(2):
        assert list(generate(model, [[1, 2, 3]], 8, temperature=0, make_step=decoding_step)) == plain
    assert capsys.readouterr().out.count("layer by layer") == 1
