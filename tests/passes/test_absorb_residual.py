"""Is a skip connection one more tap of the linear operator that it goes around?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(
    ("conv", "size"),
    [
        (nn.Conv1d(4, 4, 3, padding=1), (7,)),
        (nn.Conv2d(4, 4, 3, padding=1), (7, 6)),
        (nn.Conv2d(4, 4, (1, 5), padding=(0, 2), groups=4), (7, 6)),
        (nn.Conv2d(4, 4, 3, padding=2, dilation=2, padding_mode="reflect"), (7, 6)),
        (nn.Conv3d(4, 4, 3, padding=1, groups=2), (3, 4, 5)),
    ],
)
def test_it_is_absorbed_in_either_order(
    conv: nn.Module, size: tuple[int, ...], flipped: bool, calls: Any, compiled: Any
) -> None:
    def residual(x: Any, conv: Any) -> Any:
        return torch.relu(conv(x) + x if flipped else x + conv(x))

    report = compiled(calls(residual, conv=conv), 2, 4, *size, passes="absorb_residual")
    assert [firing.rewrite for firing in report.rewrites] == ["absorb_residual"] and "add" not in report.ops_after


def test_it_is_absorbed_around_a_linear_layer_and_a_scale(calls: Any, compiled: Any) -> None:
    linear = calls(lambda x, linear: torch.relu(x + linear(x)), linear=nn.Linear(6, 6))
    assert compiled(linear, 2, 5, 6, passes="absorb_residual").ops_after == {"Linear": 1, "ReLU": 1}
    scale = calls(lambda x: torch.relu(x + 0.5 * x))
    assert compiled(scale, 2, 5, 6, passes="absorb_residual").ops_after == {"mul": 1, "ReLU": 1}


def test_a_stride_is_refused_because_the_sizes_differ(calls: Any, compiled: Any, reasons: Any) -> None:
    model = calls(lambda x, conv: torch.relu(x + conv(x)), conv=nn.Conv2d(4, 4, 1, stride=2))
    report = compiled(model, 2, 4, 1, 1, passes="absorb_residual")
    assert report.rewrites == [] and "strides differ" in reasons(report, "absorb_residual")


def test_a_sum_that_broadcasts_channels_is_refused(calls: Any, compiled: Any, reasons: Any) -> None:
    model = calls(lambda x, conv: torch.relu(x + conv(x)), conv=nn.Conv2d(4, 1, 1))
    report = compiled(model, 2, 4, 5, 5, passes="absorb_residual")
    assert report.rewrites == [] and "broadcasts" in reasons(report, "absorb_residual")


def test_a_convolution_that_others_read_is_left_to_them(calls: Any, compiled: Any, reasons: Any) -> None:
    def shared(x: Any, conv: Any) -> Any:
        y = conv(x)
        return torch.relu(x + y) * torch.sigmoid(y)

    report = compiled(calls(shared, conv=nn.Conv2d(4, 4, 3, padding=1)), 2, 4, 5, 5)
    assert "is also used elsewhere" in reasons(report, "absorb_residual") and report.ops_after["Conv2d"] == 1
