"""Does a pointwise layer behind a pixel shuffle go into the convolution before it, where that is less work?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rgc import Conv, PixelShuffle
from rgc.passes.exchange_pixel_shuffle import _before

NAME = "exchange_pixel_shuffle"


@pytest.mark.parametrize(("factor", "groups"), [(2, 1), (3, 1), (2, 2), (2, 4)])
def test_the_law_holds_exactly(factor: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(factor)
    weight = torch.randint(-4, 5, (8, 4 // groups, 1, 1), generator=generator).double()
    bias = torch.randint(-4, 5, (8,), generator=generator).double()
    x = torch.randint(-4, 5, (2, 4 * factor**2, 3, 5), generator=generator).double()
    pointwise, shuffle = Conv(weight, bias, groups=groups), PixelShuffle(factor)
    expected = pointwise.evaluate(shuffle.evaluate(x))
    before = _before(pointwise, factor**2)
    assert isinstance(before, Conv) and before.groups == groups
    assert torch.equal(shuffle.evaluate(before.evaluate(x)), expected)


@pytest.mark.parametrize("behind", [nn.Conv2d(4, 3, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1, groups=2)])
def test_what_is_behind_goes_before(behind: nn.Module, compiled: Any) -> None:
    model = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.PixelShuffle(2), behind, nn.ReLU())
    assert compiled(model, 2, 4, 6, 5).ops_after == {"Conv2d": 1, "PixelShuffle": 1, "ReLU": 1}


def test_a_factor_behind_goes_before(calls: Any, compiled: Any) -> None:
    model = calls(lambda x, a, b: torch.relu(b(a(x)) * 3 - 1), a=nn.Conv2d(4, 8, 1), b=nn.PixelShuffle(2))
    assert compiled(model, 2, 4, 6, 5).ops_after == {"Conv2d": 1, "PixelShuffle": 1, "ReLU": 1}


@pytest.mark.parametrize("behind", [nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1, stride=2)])
def test_what_reads_more_than_its_own_position_stays(behind: nn.Module, compiled: Any) -> None:
    model = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.PixelShuffle(2), behind, nn.ReLU())
    report = compiled(model, 2, 4, 6, 5, passes=NAME)
    assert report.rewrites == [] and report.ops_after["Conv2d"] == 2


def test_it_is_weighed(compiled: Any, reasons: Any) -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(4, 64, 1))
    report = compiled(model, 2, 16, 28, 28, passes=NAME, objective="latency")
    assert report.rewrites == [] and "estimated slower" in reasons(report, NAME)
    report = compiled(model, 2, 16, 28, 28, passes=NAME, objective="macs")
    assert report.rewrites == [] and "costs more" in reasons(report, NAME)
