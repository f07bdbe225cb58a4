"""Does what only moves elements go into the convolution beside it, where that saves a layer?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "merge_rearrangement"


@pytest.mark.parametrize("layers", [
    (nn.ZeroPad2d(1), nn.Conv2d(4, 4, 3, padding=1)),
    (nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3)),
    (nn.ReplicationPad2d(2), nn.Conv2d(4, 4, 3, dilation=2)),
    (nn.CircularPad2d((1, 1, 2, 2)), nn.Conv2d(4, 4, (5, 3))),
    (nn.ZeroPad2d(1), nn.Conv2d(4, 4, 3, groups=4)),
    (nn.ChannelShuffle(2), nn.Conv2d(4, 4, 3, padding=1)),
    (nn.Conv2d(4, 4, 3, padding=1), nn.ChannelShuffle(2)),
    (nn.Conv2d(4, 4, 1, bias=False), nn.ZeroPad2d(1)),
    (nn.PixelUnshuffle(2), nn.Conv2d(16, 4, 1)),
    (nn.Conv2d(4, 4, 3, padding=1), nn.PixelUnshuffle(2)),
], ids=lambda layers: "-".join(type(layer).__name__ for layer in layers))  # fmt: skip
def test_two_layers_become_one(layers: tuple[nn.Module, ...], compiled: Any) -> None:
    report = compiled(nn.Sequential(*layers, nn.ReLU()), 2, 4, 8, 6, passes=NAME)
    assert report.ops_after == {"Conv2d": 1, "ReLU": 1} and not report.fixed_size


@pytest.mark.parametrize(("factor", "kernel"), [(2, 3), (2, 1), (3, 3), (4, 1)])
def test_a_space_to_depth_stem_is_one_convolution_with_even_padding(factor: int, kernel: int, compiled: Any) -> None:
    conv = nn.Conv2d(3 * factor**2, 8, kernel, padding=kernel // 2)
    stem = nn.Sequential(nn.PixelUnshuffle(factor), conv, nn.BatchNorm2d(8), nn.ReLU())
    assert compiled(stem, 2, 3, 4 * factor, 3 * factor).ops_after == {"Conv2d": 1, "ReLU": 1}


@pytest.mark.parametrize("places", [((0, 0), (1, 0), (0, 1), (1, 1)), ((0, 0), (0, 1), (1, 0), (1, 1))])
def test_a_space_to_depth_stem_of_slices_is_one_convolution(places: Any, calls: Any, compiled: Any) -> None:
    def focus(x: Tensor, conv: nn.Module) -> Tensor:
        return F.silu(conv(torch.cat([x[..., row::2, column::2] for row, column in places], 1)))

    report = compiled(calls(focus, conv=nn.Conv2d(12, 8, 3, padding=1)), 2, 3, 8, 6)
    assert report.ops_after == {"Conv2d": 1, "SiLU": 1} and not report.fixed_size


def test_a_written_out_channel_shuffle_between_convolutions_vanishes(calls: Any, compiled: Any) -> None:
    def shuffled(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
        y = first(x)
        n, c, h, w = y.size()
        y = torch.transpose(y.view(n, 2, c // 2, h, w), 1, 2).contiguous().view(n, -1, h, w)
        return torch.relu(second(torch.relu(y)))

    model = calls(shuffled, first=nn.Conv2d(4, 8, 1), second=nn.Conv2d(8, 8, 3, padding=1))
    assert compiled(model, 2, 4, 6, 5).ops_after == {"Conv2d": 2, "ReLU": 2}


def test_a_convolution_of_which_two_halves_are_used_is_not_computed_twice(
    calls: Any, compiled: Any, reasons: Any
) -> None:
    def gated(x: Tensor, conv: nn.Module) -> Tensor:
        value, gate = conv(x).chunk(2, dim=1)
        return value * torch.sigmoid(gate)

    for objective in ("depth", "latency", "macs", "params"):
        report = compiled(calls(gated, conv=nn.Conv2d(4, 8, 3)), 2, 4, 6, 5, objective=objective)
        assert report.ops_after == {"Conv2d": 1, "Sigmoid": 1, "mul": 1}
        assert "is also used elsewhere" in reasons(report, NAME)


def test_a_convolution_reads_a_slice_rather_than_all_channels(calls: Any, compiled: Any, reasons: Any) -> None:
    model = calls(lambda x, conv: conv(torch.relu(x)[:, 1:3]), conv=nn.Conv2d(2, 4, 3))
    report = compiled(model, 2, 4, 6, 5)
    assert report.rewrites == [] and "is a view" in reasons(report, NAME)


def test_a_permutation_that_undoes_itself_is_dropped(calls: Any, compiled: Any) -> None:
    report = compiled(calls(lambda x: torch.relu(x[:, [0, 1, 2, 3]])), 2, 4, 6, 5)
    assert report.ops_after == {"ReLU": 1}


@pytest.mark.parametrize(("layers", "reason"), [
    ((nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 4, 3)), "would take another layer (pad)"),
    ((nn.ConstantPad2d(1, 0.5), nn.Conv2d(4, 4, 3)), "would take another layer (pad)"),
    ((nn.Conv2d(4, 4, 1), nn.ZeroPad2d(1)), "would take another layer (ones)"),
    ((nn.Conv2d(4, 4, 3, padding=1), nn.ZeroPad2d(1)), "border ring"),
    ((nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3, padding=1)), "pads by reflect"),
    ((nn.ConstantPad2d(1, float("inf")), nn.Conv2d(4, 4, 3)), "not finite"),
])  # fmt: skip
def test_what_stands_in_the_way_is_named(layers: Any, reason: str, compiled: Any, reasons: Any) -> None:
    if "finite" in reason:
        layers = (*layers[:1], nn.Hardtanh(), *layers[1:])  # else there is nothing to compare
        layers = (layers[0], nn.AvgPool2d(1), *layers[1:])
    report = compiled(nn.Sequential(*layers, nn.Hardtanh()), 2, 4, 8, 6, passes=NAME)
    assert report.rewrites == [] and reason in reasons(report, NAME)


def test_a_model_compiled_twice_is_compiled_once(calls: Any) -> None:
    import rgc

    def forward(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
        return torch.relu(a(F.pad(x, (0, 1, 0, 1))) + b(x[:, :, 1:, 1:]))

    model = calls(forward, a=nn.Conv2d(4, 4, 3, stride=2), b=nn.Conv2d(4, 4, 1, stride=2)).eval()
    x = torch.randn(2, 4, 8, 8)
    once = rgc.compile(model, x, objective="depth")
    twice = rgc.compile(once, x, objective="depth")
    assert twice.report.rewrites == [] and twice.report.ops_after.total() == once.report.ops_after.total()


@pytest.mark.parametrize("bias", [False, True])
def test_a_pad_before_two_convolutions_makes_room_for_both(bias: bool, compiled: Any) -> None:
    """Without the pad the ring that the second reads would touch real input."""
    convs = nn.Conv1d(1, 4, 5, stride=2, bias=bias), nn.Conv1d(4, 4, 5, stride=2, padding=4)
    report = compiled(nn.Sequential(nn.ZeroPad1d((4, 5)), *convs), 2, 1, 21, passes="all,-collapse")
    assert report.ops_after["Conv1d"] == 1
    report = compiled(nn.Sequential(nn.ZeroPad1d((4, 5)), *convs), 2, 1, 21)
    assert report.ops_after["Conv1d"] == (2 if bias else 1) and not report.fixed_size


@pytest.mark.parametrize("first", [nn.BatchNorm1d(2), nn.Conv1d(2, 2, 1), nn.Conv1d(2, 2, 1, groups=2)])
@pytest.mark.parametrize("sides", [(-1, 3), (2, 0), (1, 1)])
def test_a_layer_of_one_position_joins_the_next_across_a_pad(
    first: nn.Module, sides: tuple[int, int], compiled: Any
) -> None:
    report = compiled(nn.Sequential(first, nn.ZeroPad1d(sides), nn.Conv1d(2, 4, 1)), 2, 2, 9)
    assert report.ops_after["Conv1d"] == 1 and report.ops_after["BatchNorm1d"] == 0


def test_a_border_of_one_value_per_channel_before_a_layer_on_the_last_axis_stays(calls: Any, compiled: Any) -> None:
    def bordered(x: Any, linear: nn.Module) -> Any:
        y = torch.nn.functional.pad(-x, (1, 1, 1, 1))
        y[:, :, :1] = y[:, :, -1:] = torch.linspace(-1, 2, 4).double().view(1, 4, 1, 1)
        y[..., :1] = y[..., -1:] = torch.linspace(-1, 2, 4).double().view(1, 4, 1, 1)
        return linear(y)

    report = compiled(calls(bordered, linear=nn.Linear(8, 3)), 2, 4, 5, 6, objective="params")
    assert not report.failures and report.ops_after["Linear"] == 1
