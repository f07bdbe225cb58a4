"""What is DS-Net, the slimmable network that picks its width by its input (arXiv 2103.13258)?

A small one for CIFAR, of depthwise separable convolutions as its DS-MBNet: the layers before the gate have one width,
those behind it one of several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from rgc.models._example import example
from rgc.nn import GatedWidth, SlimmableConv2d, SlimmableLinear, SlimmingGate, SwitchableBatchNorm2d

# Channels and stride of the blocks behind the gate.
_BLOCKS = ((64, 2), (64, 1), (128, 2), (128, 1), (128, 1))


def dsnet_small(
    *,
    widths: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
) -> DSNet:
    """Seven depthwise separable blocks with up to 128 channels, five of them behind the gate; it starts at width 1."""
    return DSNet(widths, num_classes=num_classes, in_channels=in_channels, image_size=image_size)


@final
class DSNet(nn.Module):
    """A stem, and behind a gate a body at one of ``widths``; the choice ``width`` is one of them.

    ``rgc.nn.choose(model, width=None)`` lets the gate pick for each sample; ``model.gate_scores(x)`` is what it learns
    by (`rgc.nn.gate_targets`). A fixed width leaves out what picks, and keeps the gate's attention: so the model is one
    static network for each width, ``{width: rgc.specialize(model, width=width) for width in widths}``.

    Input [batch, in_channels, height, width], output [batch, num_classes]; ``image_size`` only says what
    ``example_inputs`` gives.

    >>> import rgc
    >>> static = rgc.specialize(DSNet((0.5, 1.0)), width=0.5)
    >>> static.gated.body[-1]
    Linear(in_features=64, out_features=10, bias=True)
    """

    def __init__(
        self, widths: Sequence[float], *, num_classes: int = 10, in_channels: int = 3, image_size: int = 32
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.image_size = image_size
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), _separable(16, 32),
        )  # fmt: skip
        channels = 32
        blocks: list[nn.Module] = []
        for features, stride in _BLOCKS:
            blocks.append(_slimmable_separable(channels, features, stride, widths, slim_in=bool(blocks)))
            channels = features
        head = SlimmableLinear(channels, num_classes, widths=widths, slim_out=False)
        body = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
        self.gated = GatedWidth(SlimmingGate(32, len(widths)), body, widths=widths)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.gated(self.stem(x))
        return scores

    def gate_scores(self, x: Tensor) -> Tensor:
        """The gate's score for each width: [batch, widths]. Only the gate gets a gradient."""
        with torch.no_grad():
            x = self.stem(x)
        return self.gated.gate.scores(x)

    def example_inputs(self) -> tuple[Tensor, ...]:
        """One image, [1, in_channels, image_size, image_size]."""
        return example(self, 1, self.in_channels, self.image_size, self.image_size)


def _separable(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False),
        nn.BatchNorm2d(in_channels),
        nn.ReLU(),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def _slimmable_separable(
    in_channels: int, out_channels: int, stride: int, widths: Sequence[float], *, slim_in: bool
) -> nn.Sequential:
    """Behind the gate; the first block takes all channels of the stem."""
    depthwise: tuple[nn.Module, nn.Module] = (
        nn.Conv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False),
        nn.BatchNorm2d(in_channels),
    )
    if slim_in:
        depthwise = (
            SlimmableConv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False, widths=widths),
            SwitchableBatchNorm2d(in_channels, widths=widths),
        )
    return nn.Sequential(
        *depthwise,
        nn.ReLU(),
        SlimmableConv2d(in_channels, out_channels, 1, bias=False, widths=widths, slim_in=slim_in),
        SwitchableBatchNorm2d(out_channels, widths=widths),
        nn.ReLU(),
    )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | SlimmableConv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
