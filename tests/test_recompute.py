"""Recomputation changes what is kept, never a bit of the result; backward passes by hand equal autograd's."""
import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import recompute
from common.cli import InputError
from common.loss import head_loss
from lowrank import LoRALinear, attach_lora, replace_linears
from model import Config, KVCache, Transformer, attend, config_for
from quant import attach_fake_quantization, quantize
from recompute import MODES, materialized_attention, recomputed_attention, recomputed_block, use_recompute

KINDS = ("gpt2", "llama", "shared")  # shared: two query heads read one key head
LAYERS = ("dense", "lowrank", "lora", "lora on int8")

def make_model(kind, layers="dense", dropout=0.1, **changes):
    torch.manual_seed(0)
    shape = dict(vocab_size=128, context=1024, blocks=2, heads=4, kv_heads=2 if kind == "shared" else 4,
                 width=64, ffn=160, dropout=dropout)
    model = Transformer(Config("gpt2" if kind == "gpt2" else "llama", tied=kind == "gpt2", **shape | changes))
    if layers == "lowrank":
        replace_linears(model, 24)
    if layers == "lora on int8":
        quantize(model, 8)
    if layers.startswith("lora"):
        attach_lora(model, 4, dropout=0.1)
        for m in model.modules():
            if isinstance(m, LoRALinear):
                nn.init.normal_(m.B, std=0.1)
    return model

def recomputed(y):
    """What the backward pass of y will recompute: the names of this file's functions in its graph, counted."""
    names, seen, nodes = Counter(), set(), [y.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names[type(node).__name__] += 1
            nodes += [parent for parent, _ in node.next_functions]
    return {name: count for name, count in names.items() if name.startswith("Recomputed")}

def step(model, mode, tokens, autocast=False):
    """Loss, the gradient of every parameter that has one, and what was recomputed."""
    use_recompute(model, mode).train()
    model.zero_grad()
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = head_loss(model.head, model.hidden(tokens[:, :-1]), tokens[:, 1:], chunk=100)
    twice = recomputed(loss)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, twice

def assert_same_bits(a, b):
    assert torch.equal(a[0], b[0])
    assert a[1].keys() == b[1].keys() and a[1]
    for name in a[1]:
        assert torch.equal(a[1][name], b[1][name]), name
    assert any(g.abs().max() > 0 for g in a[1].values())

@pytest.mark.parametrize("autocast", (False, True), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_mode_gives_the_same_bits_with_dropout_on(kind, layers, autocast):
    model, tokens = make_model(kind, layers), torch.randint(128, (2, 161))
    runs = {mode: step(model, mode, tokens, autocast) for mode in MODES}
    for with_it, without in (("attention", "none"), ("block", "sdpa")):
        assert_same_bits(runs[with_it], runs[without])
    norms = set() if kind == "gpt2" else {"RecomputedNormBackward"}
    assert runs["none"][2].keys() == runs["sdpa"][2].keys() == norms
    assert runs["block"][2]["RecomputedBlockBackward"] == 2  # each block once: it did take place
    assert runs["attention"][2]["RecomputedAttentionBackward"] == 2  # and each block's attention
    torch.testing.assert_close(runs["none"][0], step(model.eval(), "none", tokens)[0], rtol=0.05, atol=0)

def test_dropout_is_on_in_these_tests():
    model, tokens = make_model("gpt2"), torch.randint(128, (2, 33))
    losses = {mode: step(model, mode, tokens)[0] for mode in ("none", "block")}
    model.apply(lambda m: setattr(m, "p", 0.0) if isinstance(m, nn.Dropout) else None)
    assert step(model, "block", tokens)[0] != losses["block"]

@pytest.mark.parametrize("kind", KINDS)
def test_without_dropout_all_modes_agree_to_rounding(kind):
    model, tokens = make_model(kind, dropout=0.0).double(), torch.randint(128, (2, 301))
    loss, gradients, _ = step(model, "sdpa", tokens)
    for mode in ("none", "attention", "block"):
        other = step(model, mode, tokens)
        torch.testing.assert_close(other[0], loss, rtol=1e-10, atol=0)
        for name, g in gradients.items():
            torch.testing.assert_close(other[1][name], g, rtol=1e-8, atol=1e-12)

# ----------------------------------------------------------------------------- attention

def make_qkv(T, heads=4, kv_heads=2, d=8, dtype=torch.float64, S=None, B=2):
    torch.manual_seed(1)
    shapes = (heads, T), (kv_heads, S or T), (kv_heads, S or T)
    return [torch.randn(B, n, t, d, dtype=dtype, requires_grad=True) for n, t in shapes]

def assert_same_gradients(y, expected, inputs, **tolerance):
    g = torch.randn_like(y)
    ours, theirs = torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, inputs, g)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, **tolerance)

@pytest.mark.parametrize("function", (materialized_attention, recomputed_attention))
@pytest.mark.parametrize("T, S", ((1, 1), (1, 40), (33, 33), (256, 256), (700, 700)))
def test_attention_equals_torchs(function, T, S):
    q, k, v = make_qkv(T, S=S)
    y, expected = function(q, k, v), attend(q, k, v)
    torch.testing.assert_close(y, expected)
    assert_same_gradients(y, expected, (q, k, v))

@pytest.mark.parametrize("function", (materialized_attention, recomputed_attention))
def test_attention_under_a_mask(function):
    q, k, v = make_qkv(300, S=320)
    mask = torch.rand(2, 1, 300, 320) < 0.5
    mask[..., 0] = True  # a query that sees nothing has no softmax
    y, expected = function(q, k, v, mask), attend(q, k, v, mask)
    torch.testing.assert_close(y, expected)
    assert_same_gradients(y, expected, (q, k, v))

@pytest.mark.parametrize("T", (100, 600))
def test_attention_and_its_materialized_form_drop_the_same(T):
    q, k, v = make_qkv(T)
    results = []
    for function in (materialized_attention, recomputed_attention):
        torch.manual_seed(2)
        y = function(q, k, v, None, 0.3)
        results.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(results[0][0], attend(q, k, v))

def test_dropout_leaves_the_expectation():
    q, k, v = make_qkv(16, B=1)
    mean = torch.stack([recomputed_attention(q, k, v, None, 0.2) for _ in range(3000)]).mean(0)
    torch.testing.assert_close(mean, attend(q, k, v), atol=0.1, rtol=0)

@pytest.mark.parametrize("dropout", (0.0, 0.4))
def test_gradcheck_of_attention(dropout, monkeypatch):
    monkeypatch.setattr(recompute, "QUERIES", 3)  # several blocks, the last one short

    def function(q, k, v):
        torch.manual_seed(3)
        return recomputed_attention(q, k, v, None, dropout)
    torch.autograd.gradcheck(function, make_qkv(7, d=3, B=1))

def test_random_numbers_after_the_backward_pass_are_those_without_recomputation():
    q, k, v = make_qkv(20)
    after = []
    for function in (materialized_attention, recomputed_attention):
        torch.manual_seed(2)
        function(q, k, v, None, 0.3).sum().backward()
        after.append(torch.rand(1))
    assert after[0] == after[1]

# ----------------------------------------------------------------------------- the block

def test_gradcheck_of_a_block():
    block = make_model("llama").blocks[0].double()
    tables = [t.double() for t in (torch.rand(5, 8), torch.rand(5, 8))]

    def function(x, W):
        torch.manual_seed(4)
        block.mlp.up.weight.data = W.detach()
        return recomputed_block(block, x, tables)
    x = torch.randn(1, 5, 64, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(function, (x, block.mlp.up.weight.detach()), fast_mode=True)

def test_a_block_keeps_its_input_alone():
    model, kept = use_recompute(make_model("gpt2"), "block"), []
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    x = torch.randn(2, 10, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.blocks[0](x)
    assert [t.data_ptr() for t in kept if t.untyped_storage().data_ptr() not in own] == [x.data_ptr()]

@pytest.mark.parametrize("mode", ("attention", "block"))
def test_an_input_that_wants_no_gradient(mode):
    model, tokens = make_model("llama", "lora"), torch.randint(128, (2, 21))
    model.blocks[0].attention.q = model.blocks[0].attention.q.base  # the first block has nothing to learn
    for name in ("k", "v"):
        setattr(model.blocks[0].attention, name, getattr(model.blocks[0].attention, name).base)
    without = "none" if mode == "attention" else "sdpa"
    assert_same_bits(step(model, mode, tokens), step(model, without, tokens))

@pytest.mark.parametrize("mode", MODES)
def test_evaluation_and_the_cache_are_left_alone(mode):
    model = make_model("llama").eval()
    tokens = torch.randint(128, (1, 12))
    with torch.no_grad():
        expected = model(tokens)
        use_recompute(model, mode)
        assert not recomputed(model(tokens))
        torch.testing.assert_close(model(tokens), expected)
        cache = KVCache(model.config, 1, 12)
        parts = [model(part, cache) for part in (tokens[:, :5], tokens[:, 5:11], tokens[:, 11:])]
        torch.testing.assert_close(torch.cat(parts, 1), expected)

def test_autocast_around_the_backward_pass_too():
    model, tokens, gradients = make_model("gpt2"), torch.randint(128, (2, 33)), {}
    for mode in ("sdpa", "block"):
        use_recompute(model, mode).zero_grad()
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            head_loss(model.head, model.hidden(tokens[:, :-1]), tokens[:, 1:], chunk=100).backward()
        gradients[mode] = {name: p.grad.clone() for name, p in model.named_parameters()}
    for name, g in gradients["sdpa"].items():
        assert torch.equal(g, gradients["block"][name]), name

def test_a_copy_of_the_model_recomputes_its_own_blocks():
    model, tokens = use_recompute(make_model("gpt2"), "block"), torch.randint(128, (2, 33))
    twin = copy.deepcopy(model)
    twin.blocks[0].mlp.up.weight.data.zero_()
    twin.hidden(tokens).sum().backward()
    assert twin.blocks[0].mlp.up.weight.grad is not None and model.blocks[0].mlp.up.weight.grad is None

def test_layers_that_another_file_changed_stay_changed():
    model, tokens = make_model("gpt2", dropout=0.0), torch.randint(128, (2, 33))
    plain = step(model, "sdpa", tokens)
    attach_fake_quantization(model, 4)
    runs = {mode: step(model, mode, tokens) for mode in ("sdpa", "block", "attention", "none")}
    assert runs["sdpa"][0] != plain[0]
    assert_same_bits(runs["block"], runs["sdpa"])
    assert_same_bits(runs["attention"], runs["none"])

@pytest.mark.parametrize("mode", MODES)
def test_distributed_data_parallel_sees_every_gradient(mode, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, tokens = make_model("llama"), torch.randint(128, (2, 33))
        expected = step(model, mode, tokens)
        model.zero_grad()
        parallel = torch.nn.parallel.DistributedDataParallel(HiddenAndLoss(model))
        torch.manual_seed(5)
        parallel(tokens).backward()  # a gradient that DDP did not see would end the next forward pass
        assert all(torch.equal(p.grad, expected[1][n]) for n, p in model.named_parameters())
        parallel(tokens)
    finally:
        torch.distributed.destroy_process_group()

class HiddenAndLoss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return head_loss(self.model.head, self.model.hidden(tokens[:, :-1]), tokens[:, 1:], chunk=100)

def test_modes_can_be_changed_and_unknown_ones_are_refused():
    model = use_recompute(make_model("llama"), "sdpa")
    before = {n: set(m.__dict__) for n, m in model.named_modules()}
    for mode in (*MODES, "sdpa"):
        use_recompute(model, mode)
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == before
    with pytest.raises(InputError, match="none, sdpa, attention, block, got all"):
        use_recompute(model, "all")

# ----------------------------------------------------------------------------- the norm

@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_norm_equals_torchs(dtype):
    torch.manual_seed(0)
    norm, x = nn.RMSNorm(32, eps=1e-5).to(dtype), torch.randn(3, 5, 32, dtype=dtype, requires_grad=True)
    nn.init.normal_(norm.weight)
    y, expected = recompute.norm_forward(norm, x), norm(x)
    assert torch.equal(y, expected)
    tolerance = dict(rtol=0.02, atol=0.03) if dtype == torch.bfloat16 else {}
    assert_same_gradients(y, expected, (x, norm.weight), **tolerance)

def test_gradcheck_of_the_norm():
    x, w = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 6), (6,)))
    torch.autograd.gradcheck(lambda x, w: recompute.RecomputedNorm.apply(x, w, 1e-5), (x, w))

def test_recomputation_with_the_loss_of_tied_weights():
    model, tokens = make_model("gpt2", dropout=0.0), torch.randint(128, (2, 40))
    loss, gradients, _ = step(model, "block", tokens)
    logits = use_recompute(model, "sdpa")(tokens[:, :-1])
    plain = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    model.zero_grad()
    plain.backward()
    torch.testing.assert_close(loss, plain.detach())
    torch.testing.assert_close(gradients["embed.weight"], model.embed.weight.grad)

def test_known_configurations_take_every_mode():
    with torch.device("meta"):
        model = Transformer(config_for("tiny"))
    for mode in MODES:
        assert use_recompute(model, mode) is model
