"""cpustep.py: a step in one call of kernels_cpu.cpp against the dense model of the same weights in float64, and where it must not be taken."""
from dataclasses import replace

import pytest
import torch

import model as model_file
from beyond import products
from beyond.cpu_step import Step, classes_walked, cpu_step
from beyond.paged_cache import PagedCache, Pool, Sequence
from common.generate import generate
from lowrank import attach_lora, replace_linears
from model import Config, KVCache, Transformer
from quant import quantize


@pytest.fixture(autouse=True)
def needs_a_compiler():
    if products.load_cpu_kernels() is None:
        pytest.skip("no g++ to compile kernels_cpu.cpp with")


def some_model(kind, rank=False, bits=8):
    """Quantized, with weights, norms and biases that all matter."""
    shape = dict(kv_heads=2, width=80, ffn=200) if kind == "llama" else dict(kv_heads=4, width=128, ffn=192)  # the ones in whole rows, the others in groups
    model = Transformer(Config(kind, vocab_size=211, context=90, blocks=2, heads=4, tied=kind == "gpt2", norm_eps=1e-3, **shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3) if p.dim() == 2 else p.add_(0.2 * torch.randn_like(p))
    if rank:
        replace_linears(model, 24 if kind == "llama" else 64, method=2)
    quantize(model, bits, 0 if kind == "llama" else 64, names=("qkv", "q", "k", "v", "o", "gate", "up", "down"))
    return model


def dense(model):
    """The same network with plain layers, in float64."""
    twin = Transformer(replace(model.config, tied=False))
    for name, layer in model.named_modules():
        if hasattr(layer, "dense_weight"):
            own = twin.get_submodule(name)
            own.weight.data = layer.dense_weight()
            if own.bias is not None:
                own.bias.data = layer.bias.data.clone()
        elif isinstance(layer, (torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.Embedding)) or name == "head":
            twin.get_submodule(name).load_state_dict(layer.state_dict())
    return twin.double().eval()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rank", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@torch.inference_mode()
def test_a_step_is_the_dense_model_in_float64(kind, rank, bits, dtype, tolerance):
    """Three rows of different lengths."""
    model = some_model(kind, rank, bits)
    oracle = dense(model)
    rows, cache = [[1, 2, 3], list(range(50)), [9]], KVCache(model.config, 3, 60)
    model = model.to(dtype)
    model.hidden(torch.tensor([r + [0] * (50 - len(r)) for r in rows]), cache)
    cache.lengths = [len(r) for r in rows]
    step = cpu_step(model, cache)
    for i in range(5):
        new = torch.tensor([i, 7 * i, 100 + i])
        logits = step(new, cache.lengths)
        cache.advance(1)
        rows = [r + [t] for r, t in zip(rows, new.tolist())]
        for row, y in zip(rows, logits):
            exact = oracle(torch.tensor([row]))[0, -1]
            assert (y.double() - exact).norm() < tolerance * exact.norm()


def test_generate_takes_it_and_writes_what_it_would_write_without(monkeypatch):
    model, taken = some_model("llama", True), []
    prompts = [[5, 6, 7], list(range(85))]  # the second one ends at the context
    without, call = list(generate(model, prompts, 12, temperature=0)), Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda self, *args: taken.append(1) or call(self, *args))
    assert list(generate(model, prompts, 12, temperature=0, make_step=cpu_step)) == without and len(taken) == 11


@torch.inference_mode()
def test_where_something_is_in_the_way_it_is_not_taken(monkeypatch):
    def step_of(model):
        cache = KVCache(model.config, 1, 20)
        model.hidden(torch.tensor([[1, 2, 3]]), cache)
        return cpu_step(model, cache)

    assert step_of(some_model("gpt2"))
    assert step_of(Transformer(Config("gpt2", vocab_size=20, context=64, blocks=1, heads=2, kv_heads=2, width=16, ffn=16))) is None, "not quantized"
    adapted, hooked, other = some_model("llama"), some_model("gpt2"), some_model("gpt2")
    attach_lora(adapted, r=4, alpha=8, targets=("q",))
    hooked.blocks[1].mlp.register_forward_hook(lambda *_: None)
    other.blocks[0].attention.attend = lambda q, k, v, mask, dropout: q
    assert step_of(adapted) is None and step_of(hooked) is None and step_of(other) is None
    model = some_model("gpt2")
    paged = PagedCache([Sequence(Pool(model.config, 8))])
    assert len(list(generate(model, [[1, 2]], 3, cache=paged, make_step=cpu_step))) == 3
    monkeypatch.setattr("beyond.load_cpu_kernels", lambda: None)
    assert step_of(some_model("gpt2")) is None


@pytest.mark.parametrize("change", ["another activation", "another block"])
def test_a_changed_architecture_is_not_taken_for_the_old_one(change, monkeypatch, capsys):
    class SquaredReLU(model_file.FeedForward):
        def forward(self, x):
            return self.down(torch.relu(self.up(x)).square())

    class Parallel(torch.nn.Module):
        def __init__(self, config, layer):
            super().__init__()
            self.norm, self.attention, self.mlp = model_file.make_norm(config), model_file.Attention(config, layer), model_file.FeedForward(config)

        def forward(self, x, rope=None, cache=None, mask=None):
            y = self.norm(x)
            return x + self.attention(y, rope, cache, mask) + self.mlp(y)

    monkeypatch.setattr(model_file, *(("FeedForward", SquaredReLU) if change == "another activation" else ("Block", Parallel)))
    classes_walked.cache_clear()
    model = some_model("gpt2")
    assert list(generate(model, [[1, 2, 3]], 8, temperature=0, make_step=cpu_step)) == list(generate(model, [[1, 2, 3]], 8, temperature=0))
    assert classes_walked("gpt2") is None and "layer by layer" in capsys.readouterr().out
    monkeypatch.undo()
    classes_walked.cache_clear()
