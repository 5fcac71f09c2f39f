"""beyond/activations.py: factors against an SVD in float64 by another route, the walk, gradients of a whole pass."""
import pytest
import torch
from torch import nn

from beyond.activations import RIDGE, Moments, second_moments, sensitivities, walk
from common.cli import InputError
from lowrank import LowRankLinear, eigenvalues
from model import Config, Transformer

SHAPES = [(40, 40), (24, 64), (96, 40)]
LLAMA = dict(vocab_size=400, context=64, blocks=3, heads=4, kv_heads=2, width=32, ffn=48, tied=False)

def small(kind):
    torch.manual_seed(0)
    config = Config("llama", **LLAMA) if kind == "llama" else Config("gpt2", **LLAMA | dict(kv_heads=4, tied=True))
    model = Transformer(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.requires_grad_(False)

@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spread", [0, 2, 4], ids="inputs over {} decades".format)
def test_factors_for_inputs_reach_the_optimum(shape, spread):
    """The optimum by another route: S = Cholesky of X X^T, SVD of W S, in float64."""
    torch.manual_seed(0)
    X = torch.randn(shape[1], 500, dtype=torch.float64) * torch.logspace(0, -spread, shape[1], dtype=torch.float64)[:, None]
    X = torch.linalg.qr(torch.randn(shape[1], shape[1], dtype=torch.float64))[0] @ X
    W, H = torch.randn(shape), X @ X.T
    S = torch.linalg.cholesky(H)
    for rank in (3, 13):
        best = torch.linalg.svdvals(W.double() @ S)[rank:].square().sum().sqrt()
        (B, A), _ = Moments(H).factors(W, rank)
        with_ridge = torch.linalg.svdvals(W.double() @ Moments(H).C)[rank:].square().sum().sqrt()
        error = W.double() - B.double() @ A.double()
        assert (error @ X).norm() <= with_ridge * 1.001
        assert (error @ Moments(H).C).norm() <= with_ridge * 1.001
        assert spread or (error @ X).norm() <= best * 1.001

@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fewer_tokens_than_inputs(shape):
    """X X^T has rank 5; the factors must fit these inputs exactly and still spend the other ranks on the rest of W."""
    torch.manual_seed(0)
    W, X = torch.randn(shape), torch.randn(shape[1], 5, dtype=torch.float64)
    (B, A), _ = Moments(X @ X.T).factors(W, 15)
    error = W.double() - B.double() @ A.double()
    assert (error @ X).norm() < 0.01 * (W.double() @ X).norm()
    left = W.double() - (W.double() @ X) @ torch.linalg.pinv(X)  # what W does outside the span of X
    assert error.norm() < 1.05 * torch.linalg.svdvals(left)[10:].square().sum().sqrt()
    assert 0 < RIDGE < 0.01

@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_matrix_of_low_rank_is_kept_exactly(shape):
    torch.manual_seed(0)
    W = torch.randn(shape[0], 4) @ torch.randn(4, shape[1])
    for w, r in ((W, 4), (W, 10), (0 * W, 3)):
        (B, A), _ = Moments(torch.eye(shape[1])).factors(w, r)
        assert B.isfinite().all() and A.isfinite().all()
        assert torch.dist(B @ A, w) <= 1e-4 * w.norm()

def test_moments_are_those_of_all_inputs():
    torch.manual_seed(0)
    inputs = [torch.randn(1, 50, 12) * 10 ** (i % 5) for i in range(20)]
    H = second_moments(inputs, 12, "cpu")
    X = torch.cat([x[0] for x in inputs]).double()
    torch.testing.assert_close(H, X.T @ X, rtol=1e-5, atol=1e-6 * H.max().item())

def test_eigenvalues_are_those_of_the_outputs():
    for shape in ((9, 14), (14, 9)):
        W, X = torch.randn(shape), torch.randn(shape[1], 100).double()
        values = eigenvalues(Moments(X @ X.T).gram(W.double()))
        torch.testing.assert_close(values.sum(), (W.double() @ X).square().sum(), rtol=1e-3, atol=0)

def test_inputs_that_say_nothing_are_refused():
    for x in (torch.zeros(1, 5, 3), torch.full((1, 5, 3), torch.nan)):
        with pytest.raises(InputError, match="the inputs of a layer add up to (0.0|nan) on the calibration text"):
            second_moments([torch.zeros(1, 5, 3), x], 3, "cpu")

@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_walk_gives_every_layer_its_inputs_and_goes_on_through_the_changed_ones(kind):
    """The inputs are those that hooks see in the model as it is at the end; layers that share an input come together."""
    model, tokens, found, groups = small(kind), torch.randint(0, 400, (4, 20)), {}, []

    def change(layers, H):
        groups.append([name.rsplit(".", 1)[1] for name in layers])
        found.update(dict.fromkeys(layers, H))
        return {name: low(layer) for name, layer in layers.items() if name.endswith(("o", "up"))}

    def low(layer):
        bias = layer.bias is not None
        return LowRankLinear(layer.in_features, layer.out_features, 5, bias).requires_grad_(False)

    walk(model, tokens.split(2), change, "")
    first = [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]
    assert groups == (first if kind == "llama" else [["qkv"], ["o"], ["up"], ["down"]]) * 3
    assert isinstance(model.blocks[2].mlp.up, LowRankLinear) and isinstance(model.blocks[2].mlp.down, nn.Linear)
    seen = {}
    for name, m in model.named_modules():
        if name in found:
            m.register_forward_hook(lambda m, x, y, name=name: seen.update({name: x[0]}))
    model(tokens)
    assert found.keys() == seen.keys()
    for name, x in seen.items():
        X = x.flatten(0, 1).double()  # (tokens, in)
        torch.testing.assert_close(found[name], X.T @ X, rtol=1e-4, atol=1e-4 * X.square().sum().item())

@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_sensitivities_are_those_of_a_whole_backward_pass(kind):
    model, windows, gradients = small(kind).requires_grad_(True), torch.randint(400, (3, 1, 20)), {}
    for tokens in windows:
        outputs = {}
        hooks = [m.register_forward_hook(lambda m, x, y, name=name, outputs=outputs: outputs.update({name: y}))
                 for name, m in model.blocks.named_modules(prefix="blocks") if isinstance(m, torch.nn.Linear)]
        logits = model(tokens)
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum")
        for name, g in zip(outputs, torch.autograd.grad(loss, list(outputs.values()))):
            gradients[name] = gradients.get(name, 0) + g[:, :-1].square().mean().item()
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        found = sensitivities(model.requires_grad_(False), windows)
    assert found.keys() == gradients.keys()
    for name, g in gradients.items():
        assert found[name] == pytest.approx(g, rel=1e-4)
