"""Do MobileOne's over-parameterised branches become one convolution each?

Vasu et al., "MobileOne: An Improved One millisecond Mobile Backbone" (2023), section 3.2 and figure 3.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm.models.fastvit as fastvit
import torch
from timm.models.byobnet import MobileOneBlock
from torch import Tensor, nn


class Branches(nn.Module):
    """k convolutions beside a 1x1 scale branch and a batch-norm skip, then the activation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, k: int = 3) -> None:
        super().__init__()

        def conv_bn(size: int) -> nn.Sequential:
            conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(outputs))

        self.convs = nn.ModuleList([conv_bn(kernel) for _ in range(k)])
        self.scale = conv_bn(1) if kernel > 1 else None
        self.skip = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out: Any = 0 if self.skip is None else self.skip(x)
        if self.scale is not None:
            out = out + self.scale(x)
        for conv in self.convs:
            out += conv(x)
        return torch.relu(out)


@pytest.mark.parametrize("size", [(9, 9), (6, 9)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", [1, 4])
def test_a_depthwise_block_becomes_one_depthwise_convolution(
    becomes: Any, stride: int, k: int, size: tuple[int, int]
) -> None:
    compiled = becomes(Branches(8, 8, 3, stride, groups=8, k=k), (2, 8, *size), {"Conv2d": 1, "ReLU": 1})
    (conv,) = (module for module in compiled.modules() if isinstance(module, nn.Conv2d))
    assert conv.groups == 8 and conv.kernel_size == (3, 3)


@pytest.mark.parametrize("outputs", [8, 12])
def test_a_pointwise_block_becomes_one_pointwise_convolution(becomes: Any, outputs: int) -> None:
    becomes(Branches(8, outputs, 1), (2, 8, 7, 9), {"Conv2d": 1, "ReLU": 1})


def test_a_separable_stage_becomes_two_convolutions(becomes: Any) -> None:
    stage = nn.Sequential(Branches(8, 8, 3, 2, groups=8), Branches(8, 12, 1))
    becomes(stage, (2, 8, 9, 9), {"Conv2d": 2, "ReLU": 2})


@pytest.mark.parametrize("use_scale_branch", [True, False])
@pytest.mark.parametrize(("stride", "group_size"), [(1, 1), (2, 1), (1, 0)])
def test_the_block_of_timms_fastvit_becomes_one_convolution(
    becomes: Any, use_scale_branch: bool, stride: int, group_size: int
) -> None:
    block = fastvit.MobileOneBlock(
        8, 8, 3, stride, group_size=group_size, use_scale_branch=use_scale_branch, num_conv_branches=2
    )
    becomes(block, (2, 8, 9, 8), {"Conv2d": 1, "GELU": 1})


@pytest.mark.parametrize(("kernel", "stride", "group_size"), [(3, 1, 1), (3, 2, 1), (1, 1, 0)])
def test_the_block_of_timms_byobnet_becomes_one_convolution(
    becomes: Any, kernel: int, stride: int, group_size: int
) -> None:
    block = MobileOneBlock(8, 8, kernel, stride, group_size=group_size, num_conv_branches=3)
    becomes(block, (2, 8, 8, 9), {"Conv2d": 1, "ReLU": 1})
