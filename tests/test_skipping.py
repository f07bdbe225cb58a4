"""Does a gate leave out blocks sample by sample, learn, and go when the choice is made?"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rgc
from rgc.nn import SkipGate, Skippable, choose
from rgc.testing import randomize


def network() -> Skippable:
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    return randomize(Skippable(block, SkipGate(4, hidden=3)))


@pytest.mark.parametrize("keep", [True, False])
def test_a_fixed_choice_is_the_block_or_nothing(keep: bool) -> None:
    model = network()
    x = torch.randn(3, 4, 7, 5)
    choose(model, keep=keep)
    static = rgc.specialize(model, keep=keep)
    assert torch.equal(static(x), model(x))
    assert torch.equal(static(x), model.block(x) if keep else x)
    assert bool(list(static.parameters())) is keep


@pytest.mark.parametrize("training", [True, False])
def test_the_gate_selects_for_each_sample(training: bool) -> None:
    model = network()
    model.training = training
    x = torch.randn(32, 4, 7, 5)
    score = model.gate(x)[:, 0]
    with torch.no_grad():
        model.gate.fc.bias.sub_(score.median())
    kept = model.gate(x)[:, 0] > 0
    assert 0 < int(kept.sum()) < 32
    expected = torch.where(kept[:, None, None, None], model.block(x), x)
    torch.testing.assert_close(model(x), expected)


def test_the_gradient_is_that_of_the_soft_gate() -> None:
    model = network().double()
    model.training = True
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    model(x).sum().backward()
    found = model.gate.fc.bias.grad.clone()
    score = model.gate(x).detach().requires_grad_()
    slope = torch.autograd.grad(torch.sigmoid(score).sum(), score)[0]
    torch.testing.assert_close(found, ((model.block(x) - x).sum((1, 2, 3))[:, None] * slope).sum(0))
