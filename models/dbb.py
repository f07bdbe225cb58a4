"""What is the diverse branch block, whose four branches of different complexity merge into one convolution?

Training form (arXiv 2103.13425, "Diverse Branch Block: Building a Convolution as an Inception-like Unit", section 3).
The merges are its transforms I to VI (section 3.2).
"""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgc.errors import InputError
from rgc.models._example import example
from rgc.models._resnet18 import ResNet18


def dbb_resnet18(*, num_classes: int = 1000, in_channels: int = 3, image_size: int = 224) -> ResNet18:
    """ResNet-18 with a ``DiverseBranchBlock`` for each pair of 3x3 convolution and batch norm.

    Input [batch, in_channels, height, width], output [batch, num_classes].
    """
    return ResNet18(_conv3x3, num_classes=num_classes, in_channels=in_channels, image_size=image_size)


@final
class DiverseBranchBlock(nn.Module):
    """The sum of up to four branches that is as expressive, once merged, as one k x k convolution with padding k // 2.

    - ``dbb_origin``: k x k convolution, batch norm;
    - ``dbb_1x1_kxk``: 1x1 convolution, batch norm, k x k convolution, batch norm;
    - ``dbb_1x1``: 1x1 convolution, batch norm (left out when depthwise, and at k = 1, where it would repeat the first);
    - ``dbb_avg``: 1x1 convolution, batch norm, k x k average pooling, batch norm (when depthwise only the pooling and
      its batch norm; left out at k = 1, where there is nothing to average).

    In the branches of two layers the paper normalises first and then pads with the batch norm's image of zero, so that
    the padding of the merged kernel is zeros. Here the 1x1 convolution has the padding: without a bias it is zero on
    the ring, and the batch norm takes the ring to its image of zero. In eval mode that is the same function. In
    training mode the batch statistics include the ring.

    ``internal_channels`` is the width between the 1x1 and the k x k convolution: ``in_channels`` unless given, twice
    that when depthwise. When it equals ``in_channels`` the 1x1 convolution is an ``IdentityConv1x1``. Input [batch,
    in_channels, height, width]; the output is that of the k x k convolution, without an activation.

    Raises ``InputError`` for an even kernel, which padding ``k // 2`` does not centre.

    >>> DiverseBranchBlock(4, 8, stride=2)(torch.randn(1, 4, 9, 9)).shape
    torch.Size([1, 8, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        internal_channels: int | None = None,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise InputError(f"DiverseBranchBlock: kernel_size must be odd, got {kernel_size}")
        self.in_channels = in_channels
        padding = kernel_size // 2
        depthwise = groups == in_channels == out_channels
        if internal_channels is None:
            internal_channels = 2 * in_channels if depthwise else in_channels

        def convolution(inputs: int, outputs: int, kernel: int, step: int, pad: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, kernel, step, pad, groups=groups, bias=False)

        def normalised_convolution(outputs: int, kernel: int, step: int, pad: int) -> nn.Sequential:
            return nn.Sequential(convolution(in_channels, outputs, kernel, step, pad), nn.BatchNorm2d(outputs))

        self.dbb_origin = normalised_convolution(out_channels, kernel_size, stride, padding)
        self.dbb_1x1_kxk = nn.Sequential(
            IdentityConv1x1(in_channels, padding=padding, groups=groups)
            if internal_channels == in_channels
            else convolution(in_channels, internal_channels, 1, 1, padding),
            nn.BatchNorm2d(internal_channels),
            convolution(internal_channels, out_channels, kernel_size, stride, 0),
            nn.BatchNorm2d(out_channels),
        )
        self.dbb_1x1 = None if depthwise or kernel_size == 1 else normalised_convolution(out_channels, 1, stride, 0)
        self.dbb_avg = None
        if kernel_size > 1 and depthwise:
            self.dbb_avg = nn.Sequential(nn.AvgPool2d(kernel_size, stride, padding), nn.BatchNorm2d(out_channels))
        elif kernel_size > 1:
            self.dbb_avg = nn.Sequential(
                *normalised_convolution(out_channels, 1, 1, padding),
                nn.AvgPool2d(kernel_size, stride),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dbb_origin(x) + self.dbb_1x1_kxk(x)
        if self.dbb_1x1 is not None:
            y = y + self.dbb_1x1(x)
        if self.dbb_avg is not None:
            y = y + self.dbb_avg(x)
        return y

    def example_inputs(self) -> tuple[Tensor, ...]:
        """One feature map, [1, in_channels, 56, 56]."""
        return example(self, 1, self.in_channels, 56, 56)


@final
class IdentityConv1x1(nn.Module):
    """A 1x1 convolution that begins as the identity: its kernel is ``weight``, initially zero, plus the identity.

    Weight decay therefore pulls it towards the identity (arXiv 2103.13425, section 3.3). Input [batch, channels,
    height, width]; the output is ``padding`` larger on each side, with zeros on the ring.

    >>> x = torch.randn(1, 6, 4, 4)
    >>> torch.equal(IdentityConv1x1(6, groups=2)(x), x)
    True
    """

    identity: Tensor  # [channels, channels / groups, 1, 1]

    def __init__(self, channels: int, *, padding: int = 0, groups: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.groups = groups
        one_group = torch.eye(channels // groups).reshape(channels // groups, channels // groups, 1, 1)
        identity = one_group.repeat(groups, 1, 1, 1)
        self.register_buffer("identity", identity, persistent=False)
        self.weight = nn.Parameter(torch.zeros_like(identity))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight + self.identity, padding=self.padding, groups=self.groups)


def _conv3x3(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    return DiverseBranchBlock(in_channels, out_channels, stride=stride)
