"""Does the CondConv ResNet mix kernels by its input, and become a plain ResNet for a fixed routing?"""

from __future__ import annotations

import torch
from torch import nn

import rgc
from rgc import models
from rgc.nn import CondConv2d, choose
from rgc.testing import randomize


def test_a_fixed_routing_leaves_a_plain_resnet() -> None:
    model = randomize(models.condconv_resnet20(experts=3))
    assert sum(isinstance(module, CondConv2d) for module in model.modules()) == 6
    routing = {"": [0.2, 0.3, 0.5], "layer3.1": [1.0, 0.0, 0.0]}
    x = torch.randn(2, 3, 16, 16)
    choose(model, routing=routing)
    static = rgc.specialize(model, routing=routing)
    assert torch.equal(static(x), model(x))
    assert torch.equal(static.layer3[1].conv1.weight, model.layer3[1].conv1.weight[0])
    plain = rgc.specialize(models.condconv_resnet20(experts=1), routing=[1.0])
    assert sum(p.numel() for p in static.parameters()) == sum(p.numel() for p in plain.parameters())
    assert sum(isinstance(module, nn.Conv2d) for module in static.modules()) == 21


def test_it_compiles_by_input_and_with_a_fixed_routing() -> None:
    model = randomize(models.CondConvResNet(1, experts=2))
    x = torch.randn(3, 3, 32, 32)
    compiled = rgc.compile(model)
    assert not compiled.report.failures
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    static = rgc.specialize(model, routing=[0.5, 0.25])
    after = rgc.compile(static)
    assert after.report.ops_after["BatchNorm2d"] == 0
    torch.testing.assert_close(after(x), static(x), rtol=1e-4, atol=1e-4)
