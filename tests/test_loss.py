"""The loss in chunks: its value and gradients are cross entropy's, for every kind of head."""
import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.loss import head_loss
from lowrank import BlendedLinear, LoRALinear, LowRankLinear
from quant import QuantLinear, QuantMatrix

def heads(C=12, V=50):
    torch.manual_seed(0)
    yield "dense", nn.Linear(C, V, bias=False)
    yield "bias", nn.Linear(C, V)
    yield "lowrank", LowRankLinear(C, V, 5, bias=False)
    yield "lowrank with bias", LowRankLinear(C, V, 5)
    blended = BlendedLinear(C, V, 5)
    blended.init_weights()
    yield "blended", blended
    lora = LoRALinear(nn.Linear(C, V), 4, 8)
    nn.init.normal_(lora.B)
    yield "lora", lora
    yield "int8", QuantLinear(QuantMatrix.of(torch.randn(V, C), 8))

def plain_loss(head, x, targets):
    return F.cross_entropy(head(x).flatten(0, 1), targets.flatten())

@pytest.mark.parametrize("ignored", (False, True))
@pytest.mark.parametrize("chunk", (1, 7, 1000))
@pytest.mark.parametrize("name, head", list(heads()))
def test_loss_equals_cross_entropy(name, head, chunk, ignored):
    torch.manual_seed(1)
    head = copy.deepcopy(head).double()
    x, targets = torch.randn(3, 10, 12, dtype=torch.float64, requires_grad=True), torch.randint(50, (3, 10))
    if ignored:
        targets[0], targets[1, ::2] = -100, -100
    wanted = [x, *(p for p in head.parameters() if p.requires_grad)]
    loss, expected = head_loss(head, x, targets, chunk), plain_loss(head, x, targets)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(torch.autograd.grad(3 * loss, wanted), torch.autograd.grad(3 * expected, wanted)):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(head, x, targets, chunk), expected)

@pytest.mark.parametrize("name, head", list(heads()))
def test_gradcheck_of_the_loss(name, head):
    head, targets = copy.deepcopy(head).double(), torch.randint(50, (1, 3))
    x = torch.randn(1, 3, 12, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, *_: head_loss(head, x, targets, 2), (x, *head.parameters()))

def test_loss_in_16_bit_is_as_near_to_the_truth_as_cross_entropys():
    torch.manual_seed(0)
    head, x = nn.Linear(64, 999, bias=False), torch.randn(2, 300, 64, requires_grad=True)
    targets = torch.randint(999, (2, 300))
    exact = copy.deepcopy(head).double()
    truth = torch.autograd.grad(plain_loss(exact, x.double(), targets), (x, exact.weight))
    errors = []
    for loss_of in (partial(head_loss, chunk=64), plain_loss):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(head, x, targets)
        assert loss.dtype == torch.float32
        gradients = torch.autograd.grad(loss, (x, head.weight))
        errors.append([((g - t).norm() / t.norm()).item() for g, t in zip(gradients, truth)])
    for ours, theirs in zip(*errors):
        assert ours < 1.2 * theirs < 0.02

def test_loss_of_tokens_that_the_model_thinks_impossible():
    head = nn.Linear(2, 3, bias=False)
    head.weight.data = torch.tensor([[200.0, 0], [0, 0], [0, 90.0]])
    x, targets = torch.eye(2)[None].requires_grad_(), torch.tensor([[1, 0]])
    torch.testing.assert_close(head_loss(head, x, targets), plain_loss(head, x, targets))

def test_loss_keeps_no_logits_and_only_wanted_gradients():
    head, x = nn.Linear(8, 1000, bias=False).requires_grad_(False), torch.randn(1, 64, 8, requires_grad=True)
    targets, kept = torch.randint(1000, (1, 64)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        head_loss(head, x, targets, 16).backward()
    assert sum(kept) == x.numel() and head.weight.grad is None

def test_loss_where_no_token_counts_is_zero_with_zero_gradients():
    head, x = nn.Linear(8, 10, bias=False), torch.randn(1, 4, 8, requires_grad=True)
    loss = head_loss(head, x, torch.full((1, 4), -100))
    loss.backward()
    assert loss == 0 and x.grad.abs().max() == 0

def test_backward_twice_gives_twice_the_gradient():
    head, x = nn.Linear(8, 10, bias=False), torch.randn(1, 4, 8, requires_grad=True)
    targets = torch.randint(10, (1, 4))
    loss = head_loss(head, x, targets)
    loss.backward(retain_graph=True)
    once = head.weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(head.weight.grad, 2 * once)
