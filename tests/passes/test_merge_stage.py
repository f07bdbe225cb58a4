"""Are two convolutions in a row one, exactly where the border allows it?"""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn


@pytest.mark.parametrize(
    ("first", "second", "size"),
    [
        (nn.Conv1d(4, 4, 3, padding=2), nn.Conv1d(4, 4, 3), (9,)),
        (nn.Conv2d(4, 4, 3, stride=2, dilation=2, padding=3), nn.Conv2d(4, 4, 2, dilation=2), (13, 12)),
        (nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 3, groups=2), (9, 8)),
        (nn.Conv3d(4, 4, 2), nn.Conv3d(4, 4, 2, stride=2), (5, 4, 6)),
        (nn.Conv2d(4, 4, (3, 1), padding=(1, 0), bias=False), nn.Conv2d(4, 4, (1, 3), padding=(0, 1)), (7, 6)),
        (nn.Conv2d(4, 4, 3, padding=1), nn.AvgPool2d(2), (8, 9)),
        (nn.AvgPool2d(2), nn.Conv2d(4, 4, 3), (9, 9)),
    ],
)
def test_they_become_one(first: nn.Module, second: nn.Module, size: tuple[int, ...], compiled: Any) -> None:
    report = compiled(nn.Sequential(first, second, nn.ReLU()), 2, 4, *size, passes="merge_stage")
    assert [firing.rewrite for firing in report.rewrites] == ["merge_stage"] and report.ops_after.total() == 2


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), "border ring"),
        (nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, (1, 3), padding=(0, 1)), "border ring"),
        (nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "pads by reflect"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate"), nn.Conv2d(4, 4, 3, padding=1), "pads by replicate"),
        (nn.Conv2d(4, 4, 3), nn.AvgPool2d(3, 1, 1, count_include_pad=False), "count_include_pad=False"),
        (nn.Conv2d(4, 4, 3), nn.AvgPool2d(2, ceil_mode=True), "ceil_mode"),
        (nn.ConvTranspose2d(4, 4, 3), nn.Conv2d(4, 4, 3), "only a pointwise layer merges into"),
    ],
)
def test_what_stands_in_the_way_is_named(
    first: nn.Module, second: nn.Module, reason: str, compiled: Any, reasons: Any
) -> None:
    for passes in ("merge_stage", "all,-collapse"):
        report = compiled(nn.Sequential(first, second), 2, 4, 9, 9, passes=passes)
        assert report.rewrites == [] and reason in reasons(report, "merge_stage")
