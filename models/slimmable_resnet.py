"""What is a ResNet that runs at several widths? One set of convolutions of which each width uses the first channels.

The CIFAR layout of arXiv 1512.03385 (section 4.2) with projection shortcuts. ``slimmable_resnet20`` has a batch norm
for each of a few widths (arXiv 1812.08928), ``us_resnet20`` one for all widths of an interval (arXiv 1903.05134).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn

from rgc.models._example import example
from rgc.nn import (
    Between,
    SlimmableBatchNorm2d,
    SlimmableConv2d,
    SlimmableLinear,
    SwitchableBatchNorm2d,
)

# Features -> a batch norm that is sliced with them.
Norm = Callable[[int], nn.Module]


def slimmable_resnet20(
    *,
    widths: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
) -> SlimmableResNet:
    """ResNet-20 at a few widths, each with batch norms of its own; it starts at the largest."""
    return SlimmableResNet(3, widths, num_classes=num_classes, in_channels=in_channels, image_size=image_size)


def us_resnet20(
    *,
    lowest: float = 0.25,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
) -> SlimmableResNet:
    """ResNet-20 at every width from ``lowest`` to 1; a specialised one wants ``rgc.recalibrate``."""
    widths = Between(lowest, 1.0)
    return SlimmableResNet(3, widths, num_classes=num_classes, in_channels=in_channels, image_size=image_size)


@final
class SlimmableResNet(nn.Module):
    """Three stages of ``blocks`` basic blocks with 16, 32 and 64 channels, at one of ``widths``.

    widths: a sequence for switchable batch norms, `rgc.nn.Between` for one that serves a whole interval. The image and
    the classes keep their channels at every width. Input [batch, in_channels, height, width], output [batch,
    num_classes]; ``image_size`` only says what ``example_inputs`` gives.

    >>> import rgc
    >>> model = SlimmableResNet(1, (0.5, 1.0)).eval()
    >>> rgc.nn.choose(model, width=0.5)
    >>> x = torch.randn(2, 3, 32, 32)
    >>> torch.equal(model(x), rgc.specialize(model, width=0.5)(x))
    True
    """

    def __init__(
        self,
        blocks: int,
        widths: Sequence[float] | Between,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.image_size = image_size

        def norm(features: int) -> nn.Module:
            if isinstance(widths, Between):
                return SlimmableBatchNorm2d(features, widths=widths)
            return SwitchableBatchNorm2d(features, widths=widths)

        self.conv1 = SlimmableConv2d(in_channels, 16, 3, 1, 1, bias=False, widths=widths, slim_in=False)
        self.bn1 = norm(16)
        self.relu = nn.ReLU()
        channels, stages = 16, []
        for features in (16, 32, 64):
            first = _BasicBlock(channels, features, 1 if features == channels else 2, widths, norm)
            rest = (_BasicBlock(features, features, 1, widths, norm) for _ in range(blocks - 1))
            stages.append(nn.Sequential(first, *rest))
            channels = features
        self.layer1, self.layer2, self.layer3 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = SlimmableLinear(channels, num_classes, widths=widths, slim_out=False)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        scores: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return scores

    def example_inputs(self) -> tuple[Tensor, ...]:
        """One image, [1, in_channels, image_size, image_size]."""
        return example(self, 1, self.in_channels, self.image_size, self.image_size)


@final
class _BasicBlock(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, stride: int, widths: Sequence[float] | Between, norm: Norm
    ) -> None:
        super().__init__()
        self.conv1 = SlimmableConv2d(in_channels, out_channels, 3, stride, 1, bias=False, widths=widths)
        self.bn1 = norm(out_channels)
        self.relu = nn.ReLU()
        self.conv2 = SlimmableConv2d(out_channels, out_channels, 3, 1, 1, bias=False, widths=widths)
        self.bn2 = norm(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            projection = SlimmableConv2d(in_channels, out_channels, 1, stride, bias=False, widths=widths)
            self.downsample = nn.Sequential(projection, norm(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        activated: Tensor = self.relu(y + self.downsample(x))
        return activated


def _initialise(module: nn.Module) -> None:
    if isinstance(module, SlimmableConv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
