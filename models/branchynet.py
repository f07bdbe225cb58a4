"""What is a ResNet with early exits? One with a head behind each stage (BranchyNet, arXiv 1709.01686)."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from rgc.models._blocks import BasicBlock, Head, initialise, stem
from rgc.models._example import example
from rgc.nn import EarlyExit


def branchy_resnet20(
    *, num_classes: int = 10, in_channels: int = 3, image_size: int = 32, threshold: float = 0.5
) -> BranchyResNet:
    """ResNet-20 with three exits; it starts with the last."""
    return BranchyResNet(
        3, num_classes=num_classes, in_channels=in_channels, image_size=image_size, threshold=threshold
    )


@final
class BranchyResNet(nn.Module):
    """Three stages of ``blocks`` basic blocks with 16, 32 and 64 channels, and a head behind each.

    The choice ``exit`` is 1, 2 or 3; for training, ``model.all_exits(x)`` gives the scores of all heads, to be
    minimised with ``rgc.nn.joint_exit_loss``. Input [batch, in_channels, height, width], output [batch, num_classes];
    ``image_size`` only says what ``example_inputs`` gives; threshold: see `rgc.nn.EarlyExit`.

    >>> import rgc
    >>> first = rgc.specialize(BranchyResNet(1), exit=1)
    >>> sum(isinstance(module, nn.Conv2d) for module in first.modules())
    3
    """

    def __init__(
        self,
        blocks: int,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        threshold: float = 0.5,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.image_size = image_size
        self.stem = stem(in_channels, 16)
        channels, stages, heads = 16, [], []
        for features in (16, 32, 64):
            first = BasicBlock(channels, features, 1 if features == channels else 2)
            stages.append(nn.Sequential(first, *(BasicBlock(features, features, 1) for _ in range(blocks - 1))))
            heads.append(Head(features, num_classes))
            channels = features
        self.exits = EarlyExit(stages, heads, threshold=threshold)
        self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.exits(self.stem(x))
        return scores

    def all_exits(self, x: Tensor) -> list[Tensor]:
        """The scores of all heads, from the first to the last, each [batch, num_classes]."""
        return self.exits.all_exits(self.stem(x))

    def example_inputs(self) -> tuple[Tensor, ...]:
        """One image, [1, in_channels, image_size, image_size]."""
        return example(self, 1, self.in_channels, self.image_size, self.image_size)
