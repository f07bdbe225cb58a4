"""Does a border of constants that is just the padding become the padding's value?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "fold_border"


def normalise_and_pad(x: Tensor, bn: Any, width: int) -> Tensor:
    """As the release of the diverse branch block writes it."""
    output = bn(x)
    value = bn.bias.detach() - bn.running_mean * bn.weight.detach() / torch.sqrt(bn.running_var + bn.eps)
    output = F.pad(output, [width] * 4)
    value = value.view(1, -1, 1, 1)
    output[:, :, 0:width, :] = value
    output[:, :, -width:, :] = value
    output[:, :, :, 0:width] = value
    output[:, :, :, -width:] = value
    return output


@pytest.mark.parametrize(("width", "kernel", "stride"), [(1, 3, 1), (1, 3, 2), (2, 5, 1)])
def test_the_branches_of_a_diverse_branch_block_are_one_convolution(
    width: int, kernel: int, stride: int, calls: Any, compiled: Any
) -> None:
    def block(x: Tensor, a: Any, bn1: Any, b: Any, bn2: Any, c: Any, bn3: Any, pool: Any, bn4: Any, o: Any) -> Tensor:
        total = o(x) + bn2(b(normalise_and_pad(a(x), bn1, width)))
        return torch.relu(total + bn4(pool(normalise_and_pad(c(x), bn3, width))))

    model = calls(
        block, o=nn.Conv2d(4, 6, kernel, stride, width),
        a=nn.Conv2d(4, 4, 1, bias=False), bn1=nn.BatchNorm2d(4), b=nn.Conv2d(4, 6, kernel, stride, bias=False),
        bn2=nn.BatchNorm2d(6), c=nn.Conv2d(4, 6, 1, bias=False), bn3=nn.BatchNorm2d(6),
        pool=nn.AvgPool2d(kernel, stride), bn4=nn.BatchNorm2d(6),
    )  # fmt: skip
    report = compiled(model, 2, 4, 9, 8)
    assert report.ops_after == {"Conv2d": 1, "ReLU": 1} and not report.fixed_size and report.tier == "torch.fx"


def padded_then(*assignments: tuple[Any, Any], widths: tuple[int, ...] = (1, 1, 1, 1)) -> Any:
    def forward(x: Tensor) -> Tensor:
        y = F.pad(torch.relu(x), widths)
        for index, value in assignments:
            y[index] = value
        return torch.tanh(y)

    return forward


EVERY = slice(None)
TOP, BOTTOM = (EVERY, EVERY, slice(0, 1)), (EVERY, EVERY, slice(-1, None))
LEFT, RIGHT = (EVERY, EVERY, EVERY, slice(None, 1)), (Ellipsis, slice(-1, None))
CHANNELS = torch.arange(1.0, 5.0).double().view(4, 1, 1)


@pytest.mark.parametrize("value", [0.5, 2, CHANNELS])
def test_a_border_of_one_value_around_is_a_constant_pad(value: Any, calls: Any, compiled: Any) -> None:
    sides = [(side, value) for side in (TOP, RIGHT, BOTTOM, LEFT)]
    report = compiled(calls(padded_then(*sides)), 2, 4, 6, 5)
    layers = {"ConstantPad2d": 1} if isinstance(value, int | float) else {"ZeroPad2d": 1, "setitem": 4}
    assert report.ops_after == {"ReLU": 1, "Tanh": 1, **layers}


@pytest.mark.parametrize(("sides", "setitems", "reason"), [
    ([(TOP, 1.0), (BOTTOM, 1.0), (LEFT, 1.0)], 3, "is not just the padding"),
    ([(TOP, 1.0), (BOTTOM, 1.0), (LEFT, 1.0), (RIGHT, 2.0)], 4, "different values"),
    ([((EVERY, EVERY, slice(0, 2)), 1.0), (BOTTOM, 1.0), (LEFT, 1.0), (RIGHT, 1.0)], 4, "is not just the padding"),
    ([((EVERY, EVERY, slice(1, 2)), 1.0)], 1, ""),
])  # fmt: skip
def test_any_other_border_stays_and_is_right(
    sides: Any, setitems: int, reason: str, calls: Any, compiled: Any, reasons: Any
) -> None:
    report = compiled(calls(padded_then(*sides)), 2, 4, 6, 5)
    assert report.ops_after == {"ReLU": 1, "Tanh": 1, "ZeroPad2d": 1, "setitem": setitems}
    assert reason in reasons(report, NAME)
