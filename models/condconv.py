"""What is a ResNet with conditionally parameterised convolutions (CondConv, arXiv 1904.04971)?"""

from __future__ import annotations

from functools import partial
from typing import final

from torch import Tensor, nn

from rgc.models._blocks import BasicBlock, Head, initialise, stem
from rgc.models._example import example
from rgc.nn import CondConv2d


def condconv_resnet20(
    *, experts: int = 4, num_classes: int = 10, in_channels: int = 3, image_size: int = 32
) -> CondConvResNet:
    """ResNet-20 whose last stage mixes its kernels; its routing is by input until it is fixed."""
    return CondConvResNet(3, experts=experts, num_classes=num_classes, in_channels=in_channels, image_size=image_size)


@final
class CondConvResNet(nn.Module):
    """Three stages of ``blocks`` basic blocks with 16, 32 and 64 channels; the 3x3 of the last are `CondConv2d`.

    The choice ``routing`` is ``experts`` numbers, for all of them or by path. Input [batch, in_channels, height,
    width], output [batch, num_classes]; ``image_size`` only says what ``example_inputs`` gives.

    >>> import rgc
    >>> static = rgc.specialize(CondConvResNet(1), routing=[0.25, 0.25, 0.25, 0.25])
    >>> sum(isinstance(module, CondConv2d) for module in static.modules())
    0
    """

    def __init__(
        self, blocks: int, *, experts: int = 4, num_classes: int = 10, in_channels: int = 3, image_size: int = 32
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.image_size = image_size
        mixed = partial(_mixed_conv3x3, experts=experts)
        self.stem = stem(in_channels, 16)
        self.layer1 = nn.Sequential(*(BasicBlock(16, 16, 1) for _ in range(blocks)))
        rest = (BasicBlock(32, 32, 1) for _ in range(blocks - 1))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2), *rest)
        last = (BasicBlock(64, 64, 1, mixed) for _ in range(blocks - 1))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, 2, mixed), *last)
        self.head = Head(64, num_classes)
        self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        return scores

    def example_inputs(self) -> tuple[Tensor, ...]:
        """One image, [1, in_channels, image_size, image_size]."""
        return example(self, 1, self.in_channels, self.image_size, self.image_size)


def _mixed_conv3x3(in_channels: int, out_channels: int, stride: int, *, experts: int) -> nn.Module:
    return CondConv2d(in_channels, out_channels, 3, stride, 1, bias=False, experts=experts)
