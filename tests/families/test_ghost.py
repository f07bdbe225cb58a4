"""Do the re-parameterised Ghost modules become their cheap deployed form?

Chen et al., "RepGhost: A Hardware-Efficient Ghost Module via Re-parameterization" (2022), section 3.2 and figure 3.
Liu et al., "GhostNetV3: Exploring the Training Strategies for Compact Models" (2024), section 3.1.
"""

from __future__ import annotations

from typing import Any

import pytest
from timm.models.ghostnet import GhostBottleneckV3, GhostModuleV3
from timm.models.repghost import RepGhostBottleneck, RepGhostModule
from torch import nn


@pytest.mark.parametrize("size", [(9, 9), (6, 8)], ids=str)
def test_a_repghost_module_becomes_two_convolutions(becomes: Any, size: tuple[int, int]) -> None:
    becomes(RepGhostModule(8, 12), (2, 8, *size), {"Conv2d": 2, "ReLU": 2})


def test_a_repghost_module_without_activations_becomes_two_convolutions_or_fewer(becomes: Any) -> None:
    head = nn.Sequential(RepGhostModule(8, 12, relu=False), nn.ReLU())
    becomes(head, (2, 8, 9, 8), {"Conv2d": 2, "ReLU": 1})


@pytest.mark.parametrize(("outputs", "stride"), [(8, 1), (12, 1), (12, 2)])
def test_a_repghost_bottleneck_keeps_no_norm(becomes: Any, outputs: int, stride: int) -> None:
    """By hand: ghost (1x1, depthwise), [strided depthwise + 1x1 as one], ghost (1x1, depthwise), shortcut as one."""
    shortcut = 0 if (outputs, stride) == (8, 1) else 1
    block = RepGhostBottleneck(8, 16, outputs, stride=stride)
    becomes(block, (2, 8, 9, 8), {"Conv2d": 4 + shortcut, "ReLU": 2, "add": 1})


def test_a_ghost_module_v3_becomes_two_convolutions(becomes: Any) -> None:
    becomes(GhostModuleV3(8, 12), (2, 8, 9, 8), {"Conv2d": 2, "ReLU": 2, "cat": 1})


def test_the_gate_of_a_ghost_module_v3_becomes_one_convolution(becomes: Any) -> None:
    """By hand: average pooling and 1x1 as one 2x2 of stride 2; then 1x5 and 5x1, which pad around their biases."""
    module = GhostModuleV3(8, 8, mode="shortcut")
    gate = {"Sigmoid": 1, "interpolate": 1, "mul": 1}
    becomes(module, (2, 8, 8, 10), {"Conv2d": 2 + 3, "ReLU": 2, "cat": 1, **gate})


@pytest.mark.parametrize(("outputs", "stride"), [(8, 1), (12, 2)])
def test_a_ghost_bottleneck_v3_keeps_no_norm(becomes: Any, outputs: int, stride: int) -> None:
    """By hand: two ghosts of two convolutions; strided: one more between them, and the shortcut as one 3x3."""
    block = GhostBottleneckV3(8, 16, outputs, stride=stride)
    extra = 0 if stride == 1 else 2
    becomes(block, (2, 8, 9, 9), {"Conv2d": 4 + extra, "ReLU": 2, "cat": 2, "add": 1})
