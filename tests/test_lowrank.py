"""lowrank.py against dense products, torch.linalg.svd and PEFT."""
import copy

import peft
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from common.cli import InputError
from lowrank import (
    BlendedLinear,
    LoRALinear,
    LowRankEmbedding,
    LowRankLinear,
    attach_lora,
    balanced,
    blend_alpha,
    eigen,
    gram,
    merge_lora,
    replace_linears,
    set_alpha,
    svd_factors,
    swap_layers,
)
from model import CONFIGS, Config, Transformer, config_for, count_parameters, flops_per_token, matmul_weights

LLAMA = Config("llama", vocab_size=67, context=32, blocks=2, heads=4, kv_heads=2, width=32, ffn=48, tied=True)
GPT2 = Config("gpt2", vocab_size=67, context=32, blocks=2, heads=4, kv_heads=4, width=32, ffn=128)
SHAPES = [(40, 40), (24, 64), (96, 40)]
TOKENS = torch.arange(60).reshape(3, 20) % 67

def model_of(config):
    torch.manual_seed(0)
    return Transformer(config).eval()

def test_low_rank_layer_is_the_product_of_its_factors_forward_and_backward():
    torch.manual_seed(0)
    layer, x = LowRankLinear(24, 40, 5).double(), torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    nn.init.normal_(layer.bias)
    W = (layer.B @ layer.A).detach().requires_grad_()
    y, reference = layer(x), F.linear(x, W, layer.bias)
    assert torch.allclose(y, reference, atol=1e-14)
    g = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, layer.A, layer.B, layer.bias), g)
    dx, dW, db = torch.autograd.grad(reference, (x, W, layer.bias), g)
    for ours, wanted in zip(got, (dx, layer.B.T @ dW, dW @ layer.A.T, db)):
        assert torch.allclose(ours, wanted, atol=1e-12)

def test_a_new_layer_has_the_deviation_of_a_dense_one():
    layer = LowRankLinear(512, 512, 64)
    layer.init_weights(std=0.02)
    assert abs(layer.dense_weight().std().item() - 0.02) < 0.001

@pytest.mark.parametrize("start", ["normal", "orthogonal"])
def test_every_start_is_as_large_as_it_says(start):
    torch.manual_seed(0)
    layer = LowRankLinear(96, 160, 24, start=start)
    layer.init_weights(std=0.03)
    A, B, product = layer.A.detach(), layer.B.detach(), layer.dense_weight().detach()
    if start == "normal":
        assert product.std().item() == pytest.approx(0.03, rel=0.1) and A.std().item() == pytest.approx(B.std().item(), rel=0.05)
    else:
        assert product.norm().item() == pytest.approx(0.03 * (96 * 160) ** 0.5, rel=1e-5)
        S = torch.linalg.svdvals(product)[:24]
        assert S.max() / S.min() < 1.0001 and A.norm(dim=1).max().item() == pytest.approx(B.norm(dim=0).min().item(), rel=1e-4)
    assert not layer.bias.any()

def test_a_head_may_stay_dense_and_shared():
    with torch.device("meta"):
        model = Transformer(GPT2)
        line = replace_linears(model, 4, start="orthogonal", head=False)
    model.to_empty(device="cpu").init_weights()
    assert isinstance(model.head, nn.Linear) and model.head.weight is model.embed.weight and line.startswith("replaced 8 linears")
    assert model.blocks[0].mlp.up.start == "orthogonal"
    S = torch.linalg.svdvals(model.blocks[0].mlp.up.dense_weight())[:4]
    assert S.max() / S.min() < 1.0001

def test_paper_counts_on_the_meta_device():
    wanted = {("gpt2", 192): 77.61, ("gpt2", 96): 58.56, ("gpt2", 48): 49.03, ("gpt2-xl", 384): 574.8, ("gpt2-xl", 192): 328.9, ("gpt2-xl", 96): 206.0}
    for (name, rank), millions in wanted.items():
        with torch.device("meta"):
            model = Transformer(CONFIGS[name])
        replace_linears(model, rank)
        assert abs(count_parameters(model) / 1e6 - millions) < 0.06, (name, rank)
    with torch.device("meta"):
        model = Transformer(CONFIGS["llama2-7b"])
    replace_linears(model, 512, embedding_rank=512)
    assert count_parameters(model) == 1_316_491_264

def test_the_walker_says_what_it_did():
    with torch.device("meta"):
        model = Transformer(CONFIGS["gpt2"])
    assert replace_linears(model, 192) == "replaced 49 linears: 124.4M -> 77.6M parameters (1.60x)"
    assert all(isinstance(b.attention.qkv, LowRankLinear) and b.attention.qkv.bias is not None for b in model.blocks)
    assert not isinstance(model.head, nn.Linear) and isinstance(model.embed, nn.Embedding)
    r = 192
    assert matmul_weights(model) == 12 * r * (768 * 4 + 768 * 2 + 2 * 768 * 5) + r * (768 + 50257)
    assert flops_per_token(model, 256) < flops_per_token(Transformer(config_for("tiny", vocab_size=10)), 256) * 100

@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 7, 20])
def test_plain_factors_are_as_good_as_the_svd(shape, rank):
    torch.manual_seed(rank)
    W = torch.randn(*shape)
    (B, A), values = svd_factors(W, rank), eigen(W, rank, gram)[0]
    product, W = B.double() @ A.double(), W.double()
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    assert torch.dist(product, (U[:, :rank] * S[:rank]) @ Vt[:rank]) < 1e-4 * S[0]
    assert torch.dist(W, product) <= 1.0001 * S[rank:].square().sum().sqrt()
    torch.testing.assert_close(values, S.square(), rtol=1e-4, atol=1e-4 * S[0].item() ** 2)
    torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1), rtol=1e-4, atol=0)

def test_squared_condition_numbers_are_met_in_float64():
    """What is cut off is 1e-9 of the largest eigenvalue: nothing that float32 could see after squaring."""
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0] for _ in range(2))
    S = torch.logspace(0, -5.5, 64, dtype=torch.float64)
    for W in ((U * S) @ V.T, (V * S) @ U.T):
        B, A = svd_factors(W.float(), 40)
        assert torch.dist(W, B.double() @ A.double()) <= 1.01 * S[40:].square().sum().sqrt() + 2e-7

@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_matrix_of_low_rank_is_kept_exactly(shape):
    torch.manual_seed(0)
    W = torch.randn(shape[0], 4) @ torch.randn(4, shape[1])
    for w, r in ((W, 4), (W, 10), (0 * W, 3)):
        B, A = svd_factors(w, r)
        assert B.isfinite().all() and A.isfinite().all()
        assert torch.dist(B @ A, w) <= 1e-4 * w.norm()

def test_balanced_factors_have_the_same_product():
    B, A = torch.randn(6, 3) * 100, torch.randn(3, 5)
    b, a = balanced(B, A)
    torch.testing.assert_close(b @ a, B @ A)
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))

@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_method_2_at_full_rank_is_the_dense_model(config):
    dense = model_of(config)
    with torch.no_grad():
        for p in dense.parameters():
            p.add_(0.1 * torch.randn_like(p))
    low = copy.deepcopy(dense)
    replace_linears(low, 8, method=2)
    assert (low(TOKENS) - dense(TOKENS)).abs().max() > 1e-2
    low = copy.deepcopy(dense)
    swap_layers(low, lambda name, m: _full(m), wanted=lambda m: isinstance(m, nn.Linear))
    assert torch.allclose(low(TOKENS), dense(TOKENS), atol=1e-4)

def _full(dense):
    layer = LowRankLinear(dense.in_features, dense.out_features, min(dense.weight.shape), dense.bias is not None)
    layer.B.data, layer.A.data = svd_factors(dense.weight, layer.rank)
    if dense.bias is not None:
        layer.bias.data = dense.bias.data
    return layer

def test_low_rank_embedding_looks_up_rows_of_the_product():
    table = LowRankEmbedding(50, 16, 4)
    assert torch.allclose(table(TOKENS % 50), F.embedding(TOKENS % 50, table.dense_weight()), atol=1e-7)

def test_method_3_goes_from_the_dense_model_to_a_low_rank_one():
    dense = model_of(GPT2)
    blended = copy.deepcopy(dense)
    line = replace_linears(blended, 8, method=3)
    assert line.startswith("replaced 9 linears") and "; blended 9 linears" in line
    set_alpha(blended, 1.0)
    assert torch.allclose(blended(TOKENS), dense(TOKENS), atol=1e-5)
    frozen = [n for n, p in blended.named_parameters() if not p.requires_grad]
    assert len(frozen) == 9 and all(n.endswith(".weight") for n in frozen)
    set_alpha(blended, 0.25)
    layer, x = blended.blocks[0].mlp.up, torch.randn(5, 32)
    assert torch.allclose(layer(x), F.linear(x, 0.25 * layer.weight + 0.75 * layer.lowrank.B @ layer.lowrank.A, layer.bias), atol=1e-6)
    assert set_alpha(blended, 1e-30) == 0
    near_zero = blended(TOKENS)
    assert set_alpha(blended, 0.0) == 9 and set_alpha(blended, 0.0) == 0
    assert not any(isinstance(m, BlendedLinear) for m in blended.modules())
    assert torch.allclose(blended(TOKENS), near_zero, atol=1e-6)

def test_alpha_falls_from_near_one_to_zero():
    alphas = [blend_alpha(s, 100) for s in range(101)]
    assert 0.85 < alphas[0] < 1 and alphas[50:] == [0.0] * 51
    assert all(a > b for a, b in zip(alphas[:50], alphas[1:51]))

@pytest.mark.parametrize("rank", [0, -1, 33, 100000])
def test_ranks_out_of_range_are_refused(rank):
    with pytest.raises(InputError, match=f"rank must be in 1..32 for a 32x96 layer, got {rank}"):
        LowRankLinear(32, 96, rank)
    with pytest.raises(InputError, match=f"got {rank}"):
        replace_linears(model_of(GPT2), rank)

# ----------------------------------------------------------------------------- LoRA

def test_lora_starts_as_its_base_merges_and_comes_off():
    base = model_of(LLAMA)
    before = base(TOKENS)
    adapted = copy.deepcopy(base)
    line = attach_lora(adapted, r=4, alpha=8, targets=["q", "v"])
    assert line.startswith("attached 4 adapters: 896 trainable parameters")
    assert torch.equal(adapted(TOKENS), before)
    for m in adapted.modules():
        if isinstance(m, LoRALinear):
            nn.init.normal_(m.B, std=0.3)
    apart = adapted(TOKENS)
    assert (apart - before).abs().max() > 1e-3
    assert merge_lora(adapted) == 0  # what float32 rounds is no error
    assert torch.allclose(adapted(TOKENS), apart, atol=1e-5) and count_parameters(adapted) == count_parameters(base)
    assert not any(isinstance(m, LoRALinear) for m in adapted.modules())

def test_lora_has_the_outputs_and_gradients_of_peft():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 40))
    reference = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(r=4, lora_alpha=32, target_modules=["0"]))
    theirs = reference.base_model.model[0]
    ours = LoRALinear(net[0], 4, 32)
    nn.init.normal_(ours.B)
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(ours.A)
        theirs.lora_B["default"].weight.copy_(ours.B)
    x = torch.randn(6, 24)
    a, b = ours(x), reference(x)
    assert torch.allclose(a, b, atol=1e-5)
    a.square().sum().backward()
    b.square().sum().backward()
    assert torch.allclose(ours.A.grad, theirs.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-3)
    assert torch.allclose(ours.B.grad, theirs.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-3)
    assert ours.base.weight.grad is None

def test_targets_that_no_layer_has_are_refused():
    with pytest.raises(InputError, match="no layer is called nope"):
        attach_lora(model_of(LLAMA), targets=["nope"])

def test_lora_counts_of_the_paper():
    for name, targets, wanted in (("llama2-7b", ["q", "v"], 4_194_304), ("llama2-13b", ["q", "k", "v"], 9_830_400)):
        with torch.device("meta"):
            model = Transformer(CONFIGS[name])
            attach_lora(model, r=8, targets=targets)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == wanted

def test_merging_into_a_layer_without_a_dense_weight_is_refused():
    model = model_of(GPT2)
    replace_linears(model, 4)
    attach_lora(model)
    with pytest.raises(InputError, match="can't be merged into a LowRankLinear"):
        merge_lora(model)
