"""Do RepVGG, RepVGGplus and their quantisation-friendly heirs become plain stacks of convolutions?

Ding et al., "RepVGG: Making VGG-style ConvNets Great Again" (2021), section 3.3 and figure 4. Chu et al., "Make
RepVGG Greater Again: A Quantization-aware Approach" (2022), section 4.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.byobnet import RepVggBlock
from torch import Tensor, nn


def conv_bn(*args: Any, **options: Any) -> nn.Sequential:
    conv = nn.Conv2d(*args, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))


class Block(nn.Module):
    """relu(bn(W3 x) + bn(W1 x) + bn(x)), the last only where sizes agree (figure 2b)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.dense = conv_bn(inputs, outputs, 3, stride=stride, padding=1, groups=groups)
        self.pointwise = conv_bn(inputs, outputs, 1, stride=stride, groups=groups)
        self.identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        identity: Any = 0 if self.identity is None else self.identity(x)
        return torch.relu(self.dense(x) + self.pointwise(x) + identity)


@pytest.mark.parametrize("size", [(9, 9), (8, 8), (7, 10), (1, 1)], ids=str)
@pytest.mark.parametrize(("outputs", "stride"), [(8, 1), (8, 2), (12, 1), (12, 2)])
def test_a_block_becomes_one_convolution(becomes: Any, outputs: int, stride: int, size: tuple[int, int]) -> None:
    becomes(Block(8, outputs, stride), (2, 8, *size), {"Conv2d": 1, "ReLU": 1})


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_a_grouped_block_becomes_one_convolution_of_the_same_groups(becomes: Any, groups: int) -> None:
    compiled = becomes(Block(8, 8, groups=groups), (2, 8, 9, 8), {"Conv2d": 1, "ReLU": 1})
    (conv,) = (module for module in compiled.modules() if isinstance(module, nn.Conv2d))
    assert conv.groups == groups and conv.kernel_size == (3, 3)


def test_a_network_with_grouped_layers_becomes_a_stack(becomes: Any) -> None:
    blocks = nn.Sequential(Block(3, 8, 2), Block(8, 8, groups=2), Block(8, 16, 2), Block(16, 16, groups=4))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    becomes(
        nn.Sequential(blocks, *head),
        (2, 3, 17, 16),
        {"Conv2d": 4, "ReLU": 4, "AdaptiveAvgPool2d": 1, "Linear": 1},
    )


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.up(torch.relu(self.down(pooled))))


def test_repvggplus_keeps_its_squeeze_and_excitation_only(becomes: Any) -> None:
    model = nn.Sequential(Block(8, 8), SqueezeExcite(8), Block(8, 8), SqueezeExcite(8))
    excite = {"adaptive_avg_pool2d": 2, "ReLU": 4, "Sigmoid": 2, "mul": 2}
    becomes(model, (2, 8, 9, 7), {"Conv2d": 6, **excite})


class Auxiliary(nn.Module):
    """RepVGGplus: classifiers at several stages, all of them returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(8, 8), Block(8, 16, 2)
        self.aux = nn.Sequential(conv_bn(8, 8, 3, padding=1, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.aux_head, self.head = nn.Linear(8, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        return self.head(self.second(x).mean((2, 3))), self.aux_head(self.aux(x))


def test_an_auxiliary_classifier_is_merged_beside_the_main_one(becomes: Any) -> None:
    pools = {"mean": 1, "AdaptiveAvgPool2d": 1}
    becomes(Auxiliary(), (2, 8, 9, 9), {"Conv2d": 3, "Linear": 2, "ReLU": 2, **pools})


class QuantizationAware(nn.Module):
    """QARepVGG: no norm on the 1x1 and identity branches, one behind the sum (figure 3, setting S4)."""

    def __init__(self, channels: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.dense = conv_bn(channels, channels, 3, stride=stride, padding=1, groups=groups)
        self.pointwise = nn.Conv2d(channels, channels, 1, stride=stride, bias=False, groups=groups)
        self.norm = nn.BatchNorm2d(channels)
        self.has_identity = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        identity: Any = x if self.has_identity else 0
        return torch.relu(self.norm(self.dense(x) + self.pointwise(x) + identity))


@pytest.mark.parametrize("size", [(9, 9), (8, 11)], ids=str)
@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_qarepvgg_becomes_one_convolution(becomes: Any, stride: int, groups: int, size: tuple[int, int]) -> None:
    becomes(QuantizationAware(8, stride, groups), (2, 8, *size), {"Conv2d": 1, "ReLU": 1})


@pytest.mark.parametrize(("outputs", "stride", "group_size"), [(8, 1, 0), (8, 2, 4), (16, 1, 2)])
def test_the_block_of_timm_becomes_one_convolution(becomes: Any, outputs: int, stride: int, group_size: int) -> None:
    block = RepVggBlock(8, outputs, 3, stride, group_size=group_size or None)
    becomes(block, (2, 8, 9, 8), {"Conv2d": 1, "ReLU": 1})
