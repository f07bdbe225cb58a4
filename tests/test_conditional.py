"""Is CondConv the convolution with the mixed kernel, for each sample and for a fixed routing?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rgc
from rgc.errors import InputError
from rgc.nn import CondConv2d, choose

GEOMETRIES: list[dict[str, Any]] = [
    {},
    {"bias": False, "stride": 2, "padding": 1},
    {"groups": 2, "dilation": 2, "padding": (2, 0)},
    {"groups": 4, "experts": 1},
]


def arguments(conv: CondConv2d) -> tuple[Any, ...]:
    return conv.stride, conv.padding, conv.dilation, conv.groups


@pytest.mark.parametrize("options", GEOMETRIES)
def test_each_sample_is_convolved_with_a_kernel_of_its_own(options: dict[str, Any]) -> None:
    conv = CondConv2d(4, 8, 3, **options).double().eval()
    x = 3 * torch.randn(3, 4, 9, 8, dtype=torch.float64)
    routing = conv.route(x)
    assert conv.experts == 1 or not torch.allclose(routing[0], routing[1])
    for index in range(3):
        weight = (routing[index, :, None, None, None, None] * conv.weight).sum(0)
        bias = None if conv.bias is None else (routing[index, :, None] * conv.bias).sum(0)
        expected = F.conv2d(x[index : index + 1], weight, bias, *arguments(conv))
        torch.testing.assert_close(conv(x)[index : index + 1], expected)


@pytest.mark.parametrize("options", GEOMETRIES)
def test_a_fixed_routing_is_one_convolution(options: dict[str, Any]) -> None:
    conv = CondConv2d(4, 8, 3, **options).eval()
    routing = [0.5, -0.25, 1.5, 0.0][: conv.experts]
    x = torch.randn(2, 4, 9, 8)
    choose(conv, routing=routing)
    static = rgc.specialize(conv, routing=torch.tensor(routing))
    assert type(static) is nn.Conv2d and torch.equal(static(x), conv(x))
    parts = [F.conv2d(x, conv.weight[n], None if conv.bias is None else conv.bias[n], *arguments(conv))
             for n in range(conv.experts)]  # fmt: skip
    torch.testing.assert_close(static(x), sum(r * y for r, y in zip(routing, parts, strict=True)))
    choose(conv, routing=None)
    assert not torch.allclose(conv(x), static(x))


def test_the_routing_learns_and_a_fixed_one_is_compiled_with_its_neighbours() -> None:
    conv = CondConv2d(4, 8, 3, experts=2)
    conv(torch.randn(2, 4, 5, 5)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in conv.parameters())
    static = rgc.specialize(nn.Sequential(conv, nn.Conv2d(8, 3, 1)).eval(), routing=(0.4, 0.6))
    assert dict(rgc.compile(static, torch.randn(1, 4, 9, 9)).report.ops_after) == {"Conv2d": 1}


def test_impossible_routings_are_refused() -> None:
    conv = CondConv2d(4, 8, 3, experts=3)
    with pytest.raises(InputError, match=r"routing of CondConv2d: \[1.0\] is not 3 finite numbers"):
        rgc.specialize(conv, routing=[1.0])
    with pytest.raises(InputError, match="leaves routing open; pass routing=, 3 finite numbers"):
        rgc.specialize(conv)
    with pytest.raises(InputError, match="at least one expert, got 0"):
        CondConv2d(4, 8, 3, experts=0)
