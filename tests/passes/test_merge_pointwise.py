"""Are a 1x1 convolution and its neighbour one convolution, where that is exact and pays?"""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn


@pytest.mark.parametrize(
    ("first", "second", "size"),
    [
        (nn.Conv1d(4, 8, 1), nn.Conv1d(8, 4, 3), (9,)),
        (nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Conv2d(8, 4, 1, groups=4), (9, 8)),
        (nn.Conv2d(4, 8, 1, bias=False), nn.Conv2d(8, 4, 3, padding=1, stride=2), (9, 8)),
        (nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"), (9, 8)),
        (nn.Conv3d(4, 4, 1), nn.Conv3d(4, 4, 2), (3, 4, 5)),
        (nn.ConvTranspose2d(4, 8, 3, stride=2), nn.Conv2d(8, 4, 1), (4, 5)),
        (nn.Conv2d(4, 8, 1, bias=False), nn.ConvTranspose2d(8, 4, 3, stride=2), (4, 5)),
        (nn.Conv2d(4, 8, 3, stride=2), nn.Conv2d(8, 4, 1, stride=2), (9, 8)),
    ],
)
def test_they_become_one(first: nn.Module, second: nn.Module, size: tuple[int, ...], compiled: Any) -> None:
    report = compiled(nn.Sequential(first, second), 2, 4, *size, passes="merge_pointwise")
    assert report.ops_after.total() == 1


def test_linear_layers_become_one(compiled: Any) -> None:
    model = nn.Sequential(nn.Linear(5, 9), nn.Linear(9, 3, bias=False), nn.Linear(3, 4))
    assert compiled(model, 2, 6, 5, passes="merge_pointwise").ops_after == {"Linear": 1}


def test_a_bias_in_front_of_padding_takes_a_channel_of_ones_or_at_a_fixed_size_a_bias_map(compiled: Any) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 3, padding=1))
    free = compiled(model, 2, 4, 7, 6, passes="merge_pointwise")
    assert free.rewrites[0].evidence == "exact+corrected" and not free.fixed_size
    assert free.ops_after == {"pad": 1, "Conv2d": 1}
    fixed = compiled(model, 2, 4, 7, 6, passes="all,-collapse")
    assert fixed.rewrites[0].evidence == "exact+corrected" and fixed.fixed_size


def test_a_convolution_of_equal_width_is_not_worth_it_where_the_first_is_read_elsewhere(
    calls: Any, compiled: Any
) -> None:
    def shared(x: Any, first: Any, second: Any) -> Any:
        y = first(x)
        return second(y), y

    report = compiled(calls(shared, first=nn.Conv2d(4, 4, 1), second=nn.Conv2d(4, 4, 1)), 2, 4, 5, 5)
    assert report.ops_after == {"Conv2d": 2}


def test_it_is_weighed(compiled: Any, reasons: Any) -> None:
    depthwise = nn.Conv2d(64, 64, 3, groups=64)
    report = compiled(nn.Sequential(depthwise, nn.Conv2d(64, 64, 1)), 1, 64, 28, 28, objective="latency")
    assert report.rewrites == [] and "estimated slower on cpu" in reasons(report, "merge_pointwise")
