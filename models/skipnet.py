"""What is SkipNet, the residual network whose blocks have gates that may leave them out (arXiv 1711.09485)?"""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from rgc.models._blocks import BasicBlock, Head, initialise, stem
from rgc.models._example import example
from rgc.nn import SkipGate, Skippable


def skipnet20(*, num_classes: int = 10, in_channels: int = 3, image_size: int = 32) -> SkipNet:
    """ResNet-20 with a gate for each of the seven blocks that keep their shape."""
    return SkipNet(3, num_classes=num_classes, in_channels=in_channels, image_size=image_size)


@final
class SkipNet(nn.Module):
    """Three stages of ``blocks`` basic blocks with 16, 32 and 64 channels, those that keep their shape with a gate.

    The choice ``keep`` of each is open (the gate decides), or says so by path: ``keep={"": True, "blocks.4": False}``.
    Input [batch, in_channels, height, width], output [batch, num_classes]; ``image_size`` only says what
    ``example_inputs`` gives.

    >>> import rgc
    >>> static = rgc.specialize(SkipNet(3), keep={"": True, "blocks.4": False})
    >>> static.blocks[4]
    Identity()
    """

    def __init__(self, blocks: int, *, num_classes: int = 10, in_channels: int = 3, image_size: int = 32) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.image_size = image_size
        self.stem = stem(in_channels, 16)
        self.blocks = nn.Sequential()
        channels = 16
        for features in (16, 32, 64):
            for _ in range(blocks):
                keeps_shape = features == channels
                block = BasicBlock(channels, features, 1 if keeps_shape else 2)
                self.blocks.append(Skippable(block, SkipGate(features)) if keeps_shape else block)
                channels = features
        self.head = Head(channels, num_classes)
        self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.blocks(self.stem(x)))
        return scores

    def example_inputs(self) -> tuple[Tensor, ...]:
        """One image, [1, in_channels, image_size, image_size]."""
        return example(self, 1, self.in_channels, self.image_size, self.image_size)
