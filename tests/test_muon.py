"""Muon against torch's own and against the SVD."""
import pytest
import torch

from beyond.muon import Muon, batches_of_equals, orthogonalize
from common.optimizers import make_optimizers, moments_of, restore_moments, step_all
from lowrank import LowRankLinear
from model import Transformer, config_for

SHAPES = [(64, 256), (256, 64), (48, 48), (1, 300), (17, 5)]

def newton_schulz(G):
    """The rounds as they are written in the literature, on the whole matrix, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.double() / G.double().norm()
    for _ in range(5):
        S = X @ X.mT if X.shape[-2] <= X.shape[-1] else X.mT @ X
        P = b * S + c * S @ S
        X = a * X + (P @ X if X.shape[-2] <= X.shape[-1] else X @ P)
    return X

@pytest.mark.parametrize("shape", SHAPES)
def test_rounds_on_the_small_matrix_are_the_rounds_on_the_whole(shape):
    G = torch.randn(3, *shape)
    for one, result in zip(G, orthogonalize(G)):
        torch.testing.assert_close(result.double(), newton_schulz(one), rtol=0, atol=1e-4)

@pytest.mark.parametrize("shape", SHAPES)
def test_all_directions_of_the_gradient_become_about_equally_long(shape):
    U, S, Vt = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    S = torch.logspace(0, -1.5, len(S), dtype=torch.float64)
    moved = U.T @ orthogonalize((U * S @ Vt).float()).double() @ Vt.T  # diagonal if the directions stayed
    assert (moved - moved.diagonal().diag()).abs().max() < 1e-3
    assert moved.diagonal().min() > 0.6 and moved.diagonal().max() < 1.25

def test_a_gradient_of_zero_moves_nothing_and_a_missing_one_is_left_out():
    A, B = (torch.nn.Parameter(torch.ones(4, 8)) for _ in range(2))
    A.grad = torch.zeros_like(A)
    Muon([A, B], lr=0.1).step()
    assert torch.equal(A, torch.ones(4, 8)) and torch.equal(B, torch.ones(4, 8))

def test_steps_are_those_of_torch():
    """torch's Muon rounds to bfloat16 on the way: its steps agree to that."""
    torch.manual_seed(0)
    start = [torch.randn(16, 48), torch.randn(16, 48), torch.randn(40, 16)]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizers = Muon(ours, lr=0.02, weight_decay=0.1), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, p in zip(ours, theirs, start):
        assert (a - b).norm() < 0.03 * (a - p).norm()

def test_a_batch_is_of_one_shape_and_not_too_large(monkeypatch):
    monkeypatch.setattr("beyond.muon.MOST", 64)
    matrices = [torch.empty(4, 8) for _ in range(5)] + [torch.empty(8, 4), torch.empty(100, 100)]
    batches = [[tuple(P.shape) for P in batch] for batch in batches_of_equals(matrices)]
    assert batches == [[(4, 8)] * 2, [(4, 8)] * 2, [(4, 8)], [(8, 4)], [(100, 100)]]

def small_model(seed=0):
    torch.manual_seed(seed)
    from lowrank import replace_linears
    model = Transformer(config_for("tiny", vocab_size=64, blocks=1))
    replace_linears(model, 8)
    return model

def test_every_parameter_has_one_optimizer_and_the_right_one():
    model = small_model()
    adamw, muon = make_optimizers(model, 1e-3, 0.1, "muon")
    owned = {id(p): (o, g) for o in (adamw, muon) for g in o.param_groups for p in g["params"]}
    assert len(owned) == sum(len(g["params"]) for o in (adamw, muon) for g in o.param_groups) == len(list(model.parameters()))
    step_all([adamw, muon], 0.01)
    for name, p in model.named_parameters():
        optimizer, group = owned[id(p)]
        assert optimizer is (muon if name.startswith("blocks") and p.dim() == 2 else adamw), name
        assert group["lr"] == 0.01, name
        assert group["weight_decay"] == (0.1 if p.dim() == 2 else 0.0), name
    alone, = make_optimizers(model, 1e-3, 0.1)
    assert isinstance(alone, torch.optim.AdamW)

def test_the_state_comes_back():
    model, tokens = small_model(), torch.randint(64, (2, 16))

    def steps(optimizers, count):
        for _ in range(count):
            model(tokens).square().mean().backward()
            step_all(optimizers, 1e-3)
    optimizers = make_optimizers(model, 1e-3, 0.1, "muon")
    steps(optimizers, 2)
    weights, moments = {k: v.clone() for k, v in model.state_dict().items()}, {k: v.clone() for k, v in moments_of(model, optimizers).items()}
    steps(optimizers, 2)
    after = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(weights)
    again = make_optimizers(model, 1e-3, 0.1, "muon")
    restore_moments(model, again, moments)
    steps(again, 2)
    assert all(torch.equal(after[k], v) for k, v in model.state_dict().items())

def test_a_layer_that_starts_small_learns_more_with_orthogonal_steps():
    """What muon.py says of factors: where B begins small in most directions, AdamW's steps leave the product near a low rank, Muon's do not."""
    def product_rank(make):
        torch.manual_seed(0)
        layer, target = LowRankLinear(32, 32, 16, bias=False), torch.randn(32, 32)
        optimizer = make(list(layer.parameters()))
        for _ in range(60):
            (layer.dense_weight() - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        S = torch.linalg.svdvals(layer.dense_weight())[:16]
        return (S.sum() ** 2 / S.square().sum()).item()  # 16 if all are equal
    assert product_rank(lambda p: Muon(p, lr=0.05)) > product_rank(lambda p: torch.optim.SGD(p, lr=1.0)) + 1
