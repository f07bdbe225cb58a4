"""Is each exit of the early-exit ResNet a network of its own, with the layers up to it?"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rgc
from rgc import models
from rgc.nn import choose, joint_exit_loss
from rgc.testing import randomize


@pytest.mark.parametrize(("exit_", "layers"), [(1, 8), (2, 15), (3, 22)])
def test_an_exit_has_the_layers_up_to_it(exit_: int, layers: int) -> None:
    model = randomize(models.branchy_resnet20())
    x = torch.randn(2, 3, 32, 32)
    choose(model, exit=exit_)
    static = rgc.specialize(model, exit=exit_)
    assert torch.equal(static(x), model(x))
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in static.modules()) == layers


def test_an_exit_compiles_and_so_does_the_model_as_it_starts() -> None:
    model = randomize(models.BranchyResNet(1))
    x = torch.randn(2, 3, 32, 32)
    compiled = rgc.compile(model)
    assert not compiled.report.failures and compiled.report.ops_after["BatchNorm2d"] == 0
    torch.testing.assert_close(compiled(x), model.all_exits(x)[2], rtol=1e-4, atol=1e-4)
    first = rgc.specialize(model, exit=1)
    torch.testing.assert_close(rgc.compile(first)(x), model.all_exits(x)[0], rtol=1e-4, atol=1e-4)


def test_a_step_of_training_reaches_every_exit() -> None:
    model = models.BranchyResNet(1, num_classes=4)
    loss = joint_exit_loss(model.all_exits(torch.randn(4, 3, 16, 16)), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
