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


INACTIVE = {
    "relu after relu": (nn.ReLU(), nn.ReLU()),
    "relu after sigmoid": (nn.Sigmoid(), nn.ReLU()),
    "relu after max pooling": (nn.ReLU(), nn.MaxPool2d(2), nn.ReLU()),
    "relu after a positive convolution": (nn.Hardsigmoid(), nn.Conv2d(4, 4, 1), nn.ReLU()),
    "relu6 after sigmoid": (nn.Sigmoid(), nn.ReLU6()),
    "hardtanh after tanh": (nn.Tanh(), nn.Hardtanh()),
    "leaky relu after softplus": (nn.Softplus(), nn.LeakyReLU(0.3)),
    "prelu after relu": (nn.ReLU(), nn.PReLU(4)),
    "elu after relu": (nn.ReLU(), nn.ELU(0.5)),
    "celu after softmax": (nn.Softmax(1), nn.CELU(2.0)),
}


@pytest.mark.parametrize("layers", INACTIVE.values(), ids=INACTIVE.keys())
def test_an_activation_that_cannot_be_active_goes(layers: tuple[nn.Module, ...], compiled: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *layers)
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            layer.weight.data.abs_()
            nn.init.constant_(layer.bias, 0.1)
    report = compiled(model, 2, 3, 8, 8, passes=NAME, random=False)
    (firing,) = report.rewrites
    assert firing.evidence == "range-conditional" and " in [" in firing.condition
    assert report.ops_after.total() == len(layers)


def test_the_record_names_the_range(compiled: Any) -> None:
    report = compiled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.ReLU6()), 2, 3, 8, 8)
    assert [firing.condition for firing in report.rewrites] == ["1 in [0, 1]"]
    assert '"condition": "1 in [0, 1]"' in report.to_json()


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (nn.GELU(), nn.ReLU(), "relu takes part: its input may lie in [-0.169971, inf), not only in [0, inf)"),
        (nn.ReLU(), nn.ReLU6(), "relu6 takes part: its input may lie in [0, inf), not only in [0, 6]"),
        (nn.ReLU6(), nn.Hardtanh(0.0, 5.5), "its input may lie in [0, 6], not only in [0, 5.5]"),
        (nn.Tanh(), nn.LeakyReLU(0.1), "its negative slope is 0.1, not 1"),
        (nn.SiLU(), nn.ELU(), "elu takes part: its input may lie in [-0.278465, inf)"),
    ],
)
def test_one_that_can_be_active_stays_and_the_reason_names_the_range(
    first: nn.Module, second: nn.Module, reason: str, compiled: Any, reasons: Any
) -> None:
    report = compiled(nn.Sequential(nn.Conv2d(3, 4, 3), first, second), 2, 3, 8, 8)
    assert report.ops_after.total() == 3 and reason in reasons(report, NAME)


@pytest.mark.parametrize("layer", [nn.Hardsigmoid(), nn.SELU(), nn.Softplus(), nn.ReLU(), nn.Tanh()])
def test_nothing_is_said_where_nothing_is_known(layer: nn.Module, compiled: Any) -> None:
    report = compiled(nn.Sequential(nn.Conv2d(3, 4, 3), layer), 2, 3, 8, 8, passes=NAME)
    assert report.rewrites == [] and report.refusals == []


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: torch.abs(torch.relu(x)), 1),
        (lambda x: x.square().clamp(min=0), 1),
        (lambda x: torch.clamp(torch.tanh(x), -1, 2), 1),
        (lambda x: (x**2).relu(), 1),
        (lambda x: torch.relu(x * x), 1),
        (lambda x: torch.relu(x.exp()), 1),
        (lambda x: x.sigmoid().clamp_(max=1.0), 1),
        (lambda x: x.abs().sqrt().relu_(), 2),
        (lambda x: torch.clamp(torch.tanh(x), -0.9, 2), 2),
        (lambda x: torch.clamp(torch.relu(x), 1.0, -1.0), 2),
        (lambda x: (x**3).relu(), 2),
    ],
)
def test_functions_count_as_layers_do(function: Any, left: int, calls: Any, compiled: Any) -> None:
    report = compiled(calls(function), 2, 4, 5, 5)
    assert report.ops_after.total() == left, report.ops_after


def test_without_the_inactive_activation_the_layers_around_it_are_one(calls: Any, compiled: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    positive = model[2]
    assert isinstance(positive, nn.Conv2d) and positive.bias is not None
    positive.weight.data.abs_()
    nn.init.zeros_(positive.bias)
    assert compiled(model, 2, 3, 8, 8, random=False).ops_after == {"Conv2d": 2, "Sigmoid": 1}


def test_an_offset_on_the_activation_keeps_it(calls: Any, compiled: Any, reasons: Any) -> None:
    report = compiled(calls(lambda x: (0.0 * torch.relu(x) + 0.5) + x), 2, 3, 4, 4, passes=NAME)
    assert "ReLU" in report.ops_after
