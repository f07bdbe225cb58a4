"""Does a map behind a sum or a concatenation of different inputs go into the branches, its constants just once?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "distribute_over_branches"


def of_two(combine: Any) -> Any:
    """``last`` behind two layers of different inputs."""

    def forward(x: Tensor, a: nn.Module, b: nn.Module, last: nn.Module) -> Tensor:
        y: Tensor = last(combine(a(x), b(torch.sigmoid(x))))
        return torch.relu(y)

    return forward


def concatenate(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, b], 1)


SUMS = {"sum": torch.add, "difference": torch.sub, "reversed": lambda a, b: b - a}

LAYERS = {
    "pointwise": (nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 5, 1)),
    "unpadded": (nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 5, 3)),
    "padded behind no bias": (nn.Conv2d(4, 6, 1, bias=False), nn.Conv2d(4, 6, 1, bias=False),
                              nn.Conv2d(6, 5, 3, padding=1)),
    "strided": (nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 5, 1, stride=2)),
    "batch norm": (nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)),
}  # fmt: skip


@pytest.mark.parametrize("layers", list(LAYERS))
@pytest.mark.parametrize("kind", list(SUMS))
def test_a_layer_behind_a_sum_goes_into_both_branches(kind: str, layers: str, calls: Any, compiled: Any) -> None:
    a, b, last = LAYERS[layers]
    model = calls(of_two(SUMS[kind]), a=a, b=b, last=last)
    report = compiled(model, 2, 4, 9, 8, passes=NAME, objective="depth")
    assert report.ops_after["Conv2d"] == 2 and report.ops_after.total() == 5
    assert not any("Norm" in name for name in report.ops_after)


@pytest.mark.parametrize(
    ("last", "apart"),
    [
        (nn.BatchNorm2d(8), True),
        (nn.Conv2d(8, 8, 1, groups=4), True),
        (nn.Conv2d(8, 8, 3, groups=8), True),
        (nn.Conv2d(8, 5, 1), False),
        (nn.Conv2d(8, 5, 3, stride=2), False),
    ],
)
def test_a_layer_behind_a_concatenation_is_taken_apart(last: nn.Module, apart: bool, calls: Any, compiled: Any) -> None:
    model = calls(of_two(concatenate), a=nn.Conv2d(4, 6, 3), b=nn.Conv2d(4, 2, 3), last=last)
    report = compiled(model, 2, 4, 9, 8, passes=NAME, objective="depth")
    meeting = {"cat": 1} if apart else {"add": 1}
    assert report.ops_after == {"Conv2d": 2, "Sigmoid": 1, "ReLU": 1, **meeting}


@pytest.mark.parametrize("count", [3, 4])
def test_more_branches_are_taken_apart_as_well(count: int, calls: Any, compiled: Any) -> None:
    def forward(x: Tensor, last: nn.Module, **branches: nn.Module) -> Tensor:
        parts = [branch(torch.tanh(x * index)) for index, branch in enumerate(branches.values(), start=1)]
        return torch.relu(last(torch.cat(parts, 1)))

    branches = {f"b{index}": nn.Conv2d(4, index + 1, 3) for index in range(count)}
    model = calls(forward, last=nn.BatchNorm2d(sum(range(count + 1))), **branches)
    report = compiled(model, 2, 4, 9, 8, passes=f"fold_scale,{NAME}", objective="depth")
    assert report.ops_after["Conv2d"] == count and "BatchNorm2d" not in report.ops_after


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("last", [nn.Conv2d(6, 5, 1), nn.BatchNorm2d(6)])
def test_a_map_of_channels_passes_an_upsampling_into_the_smaller_branch(
    last: nn.Module, mode: str, calls: Any, compiled: Any
) -> None:
    def forward(x: Tensor, small: nn.Module, large: nn.Module, last: nn.Module) -> Tensor:
        top_down = F.interpolate(small(F.max_pool2d(x, 2)), scale_factor=2.0, mode=mode)
        y: Tensor = last(large(x) + top_down)
        return torch.relu(y)

    model = calls(forward, small=nn.Conv2d(4, 6, 1), large=nn.Conv2d(4, 6, 3, padding=1), last=last)
    report = compiled(model, 2, 4, 8, 6, passes=NAME, objective="depth")
    assert report.ops_after["Conv2d"] == 2 and "BatchNorm2d" not in report.ops_after


def test_a_bias_that_meets_padding_takes_ones_in_each_branch(calls: Any, compiled: Any) -> None:
    layers = {"a": nn.Conv2d(4, 6, 1), "b": nn.Conv2d(4, 6, 1), "last": nn.Conv2d(6, 5, 3, padding=1)}
    report = compiled(calls(of_two(torch.add), **layers), 2, 4, 9, 8, passes=NAME, objective="depth")
    assert report.ops_after["Conv2d"] == 2 and report.ops_after["pad"] == 2


def test_a_concatenation_of_other_axes_is_left_alone(calls: Any, compiled: Any, reasons: Any) -> None:
    def beside(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], 2)

    model = calls(of_two(beside), a=nn.Conv2d(4, 6, 3), b=nn.Conv2d(4, 6, 3), last=nn.BatchNorm2d(6))
    report = compiled(model, 2, 4, 9, 8, passes=NAME, objective="depth")
    assert report.rewrites == [] and "acts along another axis than the concatenation" in reasons(report, NAME)


def test_a_transposed_layer_behind_a_concatenation_is_left_alone(calls: Any, compiled: Any, reasons: Any) -> None:
    last = nn.ConvTranspose2d(8, 5, 2, stride=2)
    model = calls(of_two(concatenate), a=nn.Conv2d(4, 6, 1), b=nn.Conv2d(4, 2, 1), last=last)
    report = compiled(model, 2, 4, 9, 8, passes=NAME, objective="depth")
    assert report.rewrites == [] and "are not taken apart" in reasons(report, NAME)


def test_linear_layers_on_tokens_are_taken_apart_too(calls: Any, compiled: Any) -> None:
    def forward(x: Tensor, a: nn.Module, b: nn.Module, last: nn.Module) -> Tensor:
        y: Tensor = last(torch.cat([a(x), b(torch.sigmoid(x))], -1))
        return y

    model = calls(forward, a=nn.Linear(6, 4), b=nn.Linear(6, 2), last=nn.Linear(6, 3))
    assert compiled(model, 2, 5, 6, passes=NAME, objective="depth").ops_after == {"Linear": 2, "Sigmoid": 1, "add": 1}


def test_it_fires_once_among_all_passes(calls: Any, compiled: Any) -> None:
    layers = {"a": nn.Conv2d(4, 6, 3), "b": nn.Conv2d(4, 2, 3), "last": nn.BatchNorm2d(8)}
    report = compiled(calls(of_two(concatenate), **layers), 2, 4, 9, 8, objective="depth")
    assert [firing.rewrite for firing in report.rewrites].count(NAME) == 1


@pytest.mark.parametrize("combine", [torch.add, torch.sub, concatenate])
def test_a_convolution_does_not_go_where_there_is_none(combine: Any, calls: Any, compiled: Any, reasons: Any) -> None:
    width = 8 if combine is concatenate else 4
    layers = {"a": nn.Conv2d(4, 4, 1), "b": nn.BatchNorm2d(4), "last": nn.Conv2d(width, 5, 1)}
    report = compiled(calls(of_two(combine), **layers), 2, 4, 9, 8, passes=NAME, objective="depth")
    assert report.rewrites == [] and "would become a convolution of its own" in reasons(report, NAME)


def test_a_norm_goes_into_a_norm(calls: Any, compiled: Any) -> None:
    layers = {"a": nn.Conv2d(4, 4, 1), "b": nn.BatchNorm2d(4), "last": nn.BatchNorm2d(8)}
    report = compiled(calls(of_two(concatenate), **layers), 2, 4, 9, 8, passes=NAME, objective="depth")
    assert [firing.rewrite for firing in report.rewrites] == [NAME]
