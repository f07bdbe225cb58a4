"""What is ACNet, whose square convolutions are strengthened by a vertical and a horizontal one while training?

Training form (arXiv 1908.03930, "ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution
Blocks", section 3). Addition of the three kernels at their common centre gives the deploy form (section 3.3).
"""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from rgc.errors import InputError
from rgc.models._example import example
from rgc.models._resnet18 import ResNet18


def acnet_resnet18(*, num_classes: int = 1000, in_channels: int = 3, image_size: int = 224) -> ResNet18:
    """ResNet-18 with an ``ACBlock`` for each pair of 3x3 convolution and batch norm.

    Input [batch, in_channels, height, width], output [batch, num_classes].
    """
    return ResNet18(_conv3x3, num_classes=num_classes, in_channels=in_channels, image_size=image_size)


@final
class ACBlock(nn.Module):
    """The sum of a k x k, a k x 1 and a 1 x k convolution, each with its own batch norm.

    ``padding`` is that of the square kernel, ``k // 2`` unless given; the others are padded so that all three centres
    meet. Input [batch, in_channels, height, width]; the output is that of the square convolution.

    Raises ``InputError`` for an even kernel (it has no centre) and for ``padding`` below ``k // 2`` (the asymmetric
    branches would have to read a cropped input).

    >>> import torch
    >>> ACBlock(4, 8, stride=2)(torch.randn(1, 4, 9, 9)).shape
    torch.Size([1, 8, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
    ) -> None:
        super().__init__()
        half = kernel_size // 2
        padding = half if padding is None else padding
        if kernel_size % 2 == 0:
            raise InputError(
                f"ACBlock: kernel_size must be odd, so that the three kernels share a centre; got {kernel_size}"
            )
        if padding < half:
            raise InputError(f"ACBlock: padding must be at least kernel_size // 2 = {half}, got {padding}")
        self.in_channels = in_channels

        def convolution(kernel: tuple[int, int], pads: tuple[int, int]) -> nn.Conv2d:
            return nn.Conv2d(in_channels, out_channels, kernel, stride, pads, groups=groups, bias=False)

        self.square_conv = convolution((kernel_size, kernel_size), (padding, padding))
        self.square_bn = nn.BatchNorm2d(out_channels)
        self.ver_conv = convolution((kernel_size, 1), (padding, padding - half))
        self.ver_bn = nn.BatchNorm2d(out_channels)
        self.hor_conv = convolution((1, kernel_size), (padding - half, padding))
        self.hor_bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        square: Tensor = self.square_bn(self.square_conv(x))
        vertical: Tensor = self.ver_bn(self.ver_conv(x))
        horizontal: Tensor = self.hor_bn(self.hor_conv(x))
        return square + vertical + horizontal

    def example_inputs(self) -> tuple[Tensor, ...]:
        """One feature map, [1, in_channels, 56, 56]."""
        return example(self, 1, self.in_channels, 56, 56)


def _conv3x3(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    return ACBlock(in_channels, out_channels, stride=stride)
