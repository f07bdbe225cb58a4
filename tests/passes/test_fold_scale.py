"""Does a constant factor or offset go into the linear operator beside it?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

FACTOR = torch.linspace(-2, 1.5, 4).view(4, 1, 1).double()


@pytest.mark.parametrize(
    "scaled",
    [
        lambda x, conv: conv(x) * FACTOR + 1,
        lambda x, conv: FACTOR - conv(x) / 3,
        lambda x, conv: conv(-x),
        lambda x, conv: conv((x - 0.5) / 0.25),
        lambda x, conv: conv(x * FACTOR),
        lambda x, conv: torch.lerp(conv(x), conv(x), 0.25),
    ],
)
def test_on_either_side_of_an_unpadded_convolution(scaled: Any, calls: Any, compiled: Any) -> None:
    assert compiled(calls(scaled, conv=nn.Conv2d(4, 4, 3)), 2, 4, 8, 8).ops_after == {"Conv2d": 1}


def test_a_factor_goes_through_zero_padding_and_an_offset_is_what_is_padded(calls: Any, compiled: Any) -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    assert compiled(calls(lambda x, conv: conv(2 * x), conv=conv), 2, 4, 8, 8).ops_after == {"Conv2d": 1}
    report = compiled(calls(lambda x, conv: conv(x + 2), conv=conv), 2, 4, 8, 8)
    assert report.ops_after == {"pad": 1, "Conv2d": 1}


def test_beside_a_batch_norm_and_in_a_sum_of_scales(calls: Any, compiled: Any) -> None:
    normed = calls(lambda x, bn: torch.relu(bn(2 * x)), bn=nn.BatchNorm2d(4))
    assert compiled(normed, 2, 4, 5, 5, passes="fold_scale").ops_after == {"addcmul": 1, "ReLU": 1}
    total = calls(lambda x: torch.relu((2 * x + 1) + x * FACTOR))
    assert compiled(total, 2, 4, 5, 5, passes="fold_scale").ops_after == {"addcmul": 1, "ReLU": 1}


def test_factors_along_other_axes_are_refused(calls: Any, compiled: Any, reasons: Any) -> None:
    columns = torch.linspace(1, 2, 6).double()
    report = compiled(
        calls(lambda x, conv: conv(x) * columns, conv=nn.Conv2d(4, 4, 3)), 2, 4, 8, 8, passes="fold_scale"
    )
    assert report.rewrites == [] and "different axes" in reasons(report, "fold_scale")
    both = calls(lambda x: torch.relu((x * FACTOR) * columns))
    report = compiled(both, 2, 4, 6, 6, passes="fold_scale")
    assert report.rewrites == [] and "different axes" in reasons(report, "fold_scale")


def test_an_offset_along_another_axis_than_the_layer_behind_it_stays(calls: Any, compiled: Any) -> None:
    model = calls(lambda x, linear: linear(x + FACTOR[:, 0]), linear=nn.Linear(5, 3))
    report = compiled(model, 2, 4, 5, passes="all,-collapse")
    assert not report.failures and report.ops_after == {"add": 1, "Linear": 1}
