"""Is an activation that has become the identity removed, and one that almost has not?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rgc.nn import DecayedActivation, DecayedLeakyReLU

NAME = "remove_linear_activation"
ACTIVATIONS = [nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.LeakyReLU(0.2), nn.Mish(), nn.PReLU(4)]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999, 1.0])
def test_a_faded_activation_goes_at_one_and_not_before(
    decay: float, activation: nn.Module, compiled: Any, reasons: Any
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), DecayedActivation(activation, decay), nn.Conv2d(4, 4, 1))
    report = compiled(model, 2, 3, 8, 8)
    assert (report.ops_after == {"Conv2d": 1}) == (decay == 1)
    if decay in (0.5, 0.999):
        assert "still takes part: its weight in the blend is 0." in reasons(report, NAME)
        assert f"(decay lambda = {decay:.6g}, not 1)" in reasons(report, NAME)


@pytest.mark.parametrize("slope", [1.0, 0.999, 0.01, -1.0])
def test_a_leaky_relu_goes_at_slope_one(slope: float, compiled: Any, reasons: Any) -> None:
    report = compiled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(slope)), 2, 3, 8, 8)
    assert (report.ops_after == {"Conv2d": 1}) == (slope == 1)
    assert slope == 1 or f"its negative slope is {slope:.6g}, not 1" in reasons(report, NAME)


def test_the_slope_of_a_decayed_leaky_relu_is_read_from_its_buffer(compiled: Any) -> None:
    for decay, layers in ((1.0, 1), (0.9, 2)):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), DecayedLeakyReLU(decay))
        assert compiled(model, 2, 3, 8, 8).ops_after.total() == layers


@pytest.mark.parametrize("channel", [0, 2, 3, None])
def test_a_prelu_goes_where_every_slope_is_one(channel: int | None, compiled: Any, reasons: Any) -> None:
    layer = nn.PReLU(4, init=1.0)
    if channel is not None:
        with torch.no_grad():
            layer.weight[channel] = 0.75
    report = compiled(nn.Sequential(nn.Conv2d(3, 4, 3), layer), 2, 3, 8, 8)
    assert (report.ops_after == {"Conv2d": 1}) == (channel is None)
    assert channel is None or "its negative slope is 0.75, not 1" in reasons(report, NAME)


def test_a_prelu_alone_goes_too(compiled: Any) -> None:
    assert compiled(nn.Sequential(nn.PReLU(4, init=1.0), nn.Tanh()), 2, 4, 5, 5).ops_after == {"Tanh": 1}
    assert compiled(nn.Sequential(nn.PReLU(init=1.0), nn.Tanh()), 2, 4, 5, 5).ops_after == {"Tanh": 1}


@pytest.mark.parametrize(
    "blend",
    [
        lambda x: 0.0 * torch.relu(x) + 1.0 * x,
        lambda x: 1.0 * x + 0.0 * torch.relu(x),
        lambda x: 0.0 * torch.relu(x) + x,
        lambda x: torch.lerp(torch.relu(x), x, 1.0),
    ],
)
def test_a_blend_may_be_written_in_many_ways(blend: Any, calls: Any, compiled: Any) -> None:
    model = calls(lambda x, a, b: b(blend(a(x))), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 4, 1))
    assert compiled(model, 2, 3, 8, 8).ops_after == {"Conv2d": 1}


def test_an_offset_on_the_activation_keeps_it(calls: Any, compiled: Any, reasons: Any) -> None:
    report = compiled(calls(lambda x: (0.0 * torch.relu(x) + 0.5) + x), 2, 3, 4, 4, passes=NAME)
    assert "ReLU" in report.ops_after
