"""What is RepVGG, the VGG-like network whose blocks are three parallel branches in training and one 3x3 when deployed?

Training form (arXiv 2101.03697, "RepVGG: Making VGG-style ConvNets Great Again", section 3; tables 2 and 3 for the
layout). Parameter names are those of the published training checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypedDict, Unpack, final

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from rgc.models._example import example

_A_BLOCKS = (2, 4, 14, 1)
_B_BLOCKS = (4, 6, 16, 1)


class RepVGGOptions(TypedDict, total=False):
    """The options of every RepVGG factory; the meaning of each is at ``RepVGG``."""

    num_classes: int
    in_channels: int
    image_size: int


def repvgg_a0(**options: Unpack[RepVGGOptions]) -> RepVGG:
    """RepVGG-A0: 9.11 million parameters, 8.31 million once merged."""
    return RepVGG(_A_BLOCKS, a=0.75, b=2.5, **options)


def repvgg_a1(**options: Unpack[RepVGGOptions]) -> RepVGG:
    """RepVGG-A1: 14.09 million parameters, 12.79 million once merged."""
    return RepVGG(_A_BLOCKS, a=1.0, b=2.5, **options)


def repvgg_a2(**options: Unpack[RepVGGOptions]) -> RepVGG:
    """RepVGG-A2: 28.21 million parameters, 25.50 million once merged."""
    return RepVGG(_A_BLOCKS, a=1.5, b=2.75, **options)


def repvgg_b0(**options: Unpack[RepVGGOptions]) -> RepVGG:
    """RepVGG-B0: 15.82 million parameters, 14.34 million once merged."""
    return RepVGG(_B_BLOCKS, a=1.0, b=2.5, **options)


def repvgg_b1(**options: Unpack[RepVGGOptions]) -> RepVGG:
    """RepVGG-B1: 57.42 million parameters, 51.83 million once merged."""
    return RepVGG(_B_BLOCKS, a=2.0, b=4.0, **options)


def repvgg_b1g2(**options: Unpack[RepVGGOptions]) -> RepVGG:
    """RepVGG-B1g2: 45.78 million parameters, 41.36 million once merged."""
    return RepVGG(_B_BLOCKS, a=2.0, b=4.0, groups=2, **options)


def repvgg_b1g4(**options: Unpack[RepVGGOptions]) -> RepVGG:
    """RepVGG-B1g4: 39.97 million parameters, 36.13 million once merged."""
    return RepVGG(_B_BLOCKS, a=2.0, b=4.0, groups=4, **options)


def repvgg_b2(**options: Unpack[RepVGGOptions]) -> RepVGG:
    """RepVGG-B2: 89.02 million parameters, 80.32 million once merged."""
    return RepVGG(_B_BLOCKS, a=2.5, b=5.0, **options)


def repvgg_b2g2(**options: Unpack[RepVGGOptions]) -> RepVGG:
    """RepVGG-B2g2: B2 with two groups in every second layer."""
    return RepVGG(_B_BLOCKS, a=2.5, b=5.0, groups=2, **options)


def repvgg_b2g4(**options: Unpack[RepVGGOptions]) -> RepVGG:
    """RepVGG-B2g4: 61.76 million parameters, 55.78 million once merged."""
    return RepVGG(_B_BLOCKS, a=2.5, b=5.0, groups=4, **options)


def repvgg_b3(**options: Unpack[RepVGGOptions]) -> RepVGG:
    """RepVGG-B3: 123.09 million parameters, 110.96 million once merged."""
    return RepVGG(_B_BLOCKS, a=3.0, b=5.0, **options)


def repvgg_b3g2(**options: Unpack[RepVGGOptions]) -> RepVGG:
    """RepVGG-B3g2: B3 with two groups in every second layer."""
    return RepVGG(_B_BLOCKS, a=3.0, b=5.0, groups=2, **options)


def repvgg_b3g4(**options: Unpack[RepVGGOptions]) -> RepVGG:
    """RepVGG-B3g4: 83.83 million parameters, 75.63 million once merged."""
    return RepVGG(_B_BLOCKS, a=3.0, b=5.0, groups=4, **options)


@final
class RepVGG(nn.Module):
    """Five stages of ``RepVGGBlock``, each beginning with stride 2, global average pooling and one linear layer.

    The first stage is one block of ``min(64, 64a)`` channels; then come ``blocks`` blocks at ``64a``, ``128a``,
    ``256a`` and ``512b`` channels (arXiv 2101.03697, section 3.4). Every second layer (2, 4, ..., 26, the stem being
    layer 0) has ``groups`` groups. Input [batch, in_channels, height, width], output [batch, num_classes];
    ``image_size`` only says what ``example_inputs`` gives.

    >>> RepVGG((1, 1, 1, 1), a=0.125, b=0.125, num_classes=5)(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        *,
        a: float,
        b: float,
        groups: int = 1,
        num_classes: int = 1000,
        in_channels: int = 3,
        image_size: int = 224,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.image_size = image_size
        widths = (min(64, int(64 * a)), int(64 * a), int(128 * a), int(256 * a), int(512 * b))
        grouping = (groups if layer in range(2, 27, 2) else 1 for layer in range(1, 1 + sum(blocks)))
        self.stage0 = RepVGGBlock(in_channels, widths[0], stride=2)
        self.stage1 = _stage(widths[0], widths[1], blocks[0], grouping)
        self.stage2 = _stage(widths[1], widths[2], blocks[1], grouping)
        self.stage3 = _stage(widths[2], widths[3], blocks[2], grouping)
        self.stage4 = _stage(widths[3], widths[4], blocks[3], grouping)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[4], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage4(self.stage3(self.stage2(self.stage1(self.stage0(x)))))
        scores: Tensor = self.linear(torch.flatten(self.gap(x), 1))
        return scores

    def example_inputs(self) -> tuple[Tensor, ...]:
        """One image, [1, in_channels, image_size, image_size]."""
        return example(self, 1, self.in_channels, self.image_size, self.image_size)


@final
class RepVGGBlock(nn.Module):
    """A 3x3 and a 1x1 convolution, each with its batch norm, plus a batch norm of the input; their sum through a ReLU.

    The identity branch is there only when ``stride`` is 1 and the channels stay (arXiv 2101.03697, section 3.2). Input
    [batch, in_channels, height, width]; the output has ``out_channels`` and height and width divided by ``stride``,
    rounded up.

    >>> RepVGGBlock(4, 8, stride=2)(torch.randn(1, 4, 9, 9)).shape
    torch.Size([1, 8, 5, 5])
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.rbr_dense = _ConvBN(in_channels, out_channels, 3, stride, groups)
        self.rbr_1x1 = _ConvBN(in_channels, out_channels, 1, stride, groups)
        keeps_shape = stride == 1 and in_channels == out_channels
        self.rbr_identity = nn.BatchNorm2d(in_channels) if keeps_shape else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        return relu(y) if self.rbr_identity is None else relu(y + self.rbr_identity(x))

    def example_inputs(self) -> tuple[Tensor, ...]:
        """One feature map, [1, in_channels, 56, 56]."""
        return example(self, 1, self.in_channels, 56, 56)


@final
class _ConvBN(nn.Module):
    """A convolution that keeps height and width at stride 1, then its batch norm."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, groups: int) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        normalised: Tensor = self.bn(self.conv(x))
        return normalised


def _stage(in_channels: int, out_channels: int, blocks: int, grouping: Iterator[int]) -> nn.Sequential:
    first = RepVGGBlock(in_channels, out_channels, stride=2, groups=next(grouping))
    rest = (RepVGGBlock(out_channels, out_channels, groups=next(grouping)) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)
