"""Do the slimmable ResNets have the layout of ResNet-20, and is each of their widths the network of that width?"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rgc
from rgc import models
from rgc.nn import SwitchableBatchNorm2d, choose
from rgc.testing import randomize


def test_at_full_width_it_has_the_parameters_of_resnet20() -> None:
    static = rgc.specialize(models.us_resnet20(), width=1.0)
    layers = [m for m in static.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 20 + 2  # table 6 counts no projections
    projections = 16 * 32 + 32 * 64 + 2 * (32 + 64)
    assert sum(p.numel() for p in static.parameters()) == 269_722 + projections


def test_the_image_and_the_classes_keep_their_channels() -> None:
    model = models.slimmable_resnet20(num_classes=7, in_channels=5)
    static = rgc.specialize(model, width=0.25)
    assert static.conv1.in_channels == 5 and static.conv1.out_channels == 4
    assert static.fc.in_features == 16 and static.fc.out_features == 7


def test_each_width_has_its_own_batch_norms_and_the_convolutions_are_shared() -> None:
    model = models.slimmable_resnet20()
    norms = [module for module in model.modules() if isinstance(module, SwitchableBatchNorm2d)]
    assert len(norms) == 21 and all(len(norm.bn) == 4 for norm in norms)
    plain = sum(p.numel() for p in rgc.specialize(model, width=1.0).parameters())
    more = sum(p.numel() for norm in norms for each in norm.bn[:3] for p in each.parameters())
    assert sum(p.numel() for p in model.parameters()) == plain + more


@pytest.mark.parametrize(("name", "width"), [("slimmable_resnet20", 0.75), ("us_resnet20", 0.61)])
def test_a_width_is_the_static_network_also_after_compiling(name: str, width: float) -> None:
    model = randomize(models.create(name))
    choose(model, width=width)
    x = torch.randn(2, 3, 32, 32)
    static = rgc.specialize(model, width=width)
    assert torch.equal(static(x), model(x))
    choose(model, width=1.0)
    assert not torch.allclose(static(x), model(x))


def test_it_compiles_as_it_is_at_the_width_it_runs_at() -> None:
    model = randomize(models.SlimmableResNet(1, (0.5, 1.0)))
    choose(model, width=0.5)
    x = torch.randn(1, 3, 32, 32)
    compiled = rgc.compile(model)
    assert not compiled.report.failures
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert compiled.report.ops_after == rgc.compile(rgc.specialize(model, width=0.5)).report.ops_after
