"""What is ReduceNet, the CIFAR residual network whose activations decay until it is one linear map?

Per block there is one activation, between a 3x3 and a 1x1 convolution, and none after the addition. With every decay at
1 a block is a 3x3 convolution plus the identity, and the whole network is affine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict, Unpack, final, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgc.errors import InputError
from rgc.models._example import example
from rgc.nn import DecayedActivation

#: Where a network pads: each 3x3 convolution its own input, each stage once, or the image once.
Padding = Literal["layer", "stage", "network"]


class ReduceNetOptions(TypedDict, total=False):
    """The options of every ReduceNet factory; the meaning of each is at ``ReduceNet``."""

    expansion: int
    num_classes: int
    in_channels: int
    widths: tuple[int, int, int]
    decay: float | Sequence[float]
    image_size: int
    padding: Padding


def reducenet20(**options: Unpack[ReduceNetOptions]) -> ReduceNet:
    """ReduceNet-20, three blocks a stage: 140,698 parameters for 10 classes at expansion 1."""
    return ReduceNet(20, **options)


def reducenet56(**options: Unpack[ReduceNetOptions]) -> ReduceNet:
    """ReduceNet-56, nine blocks a stage."""
    return ReduceNet(56, **options)


def reducenet(depth: int = 20, **options: Unpack[ReduceNetOptions]) -> ReduceNet:
    """ReduceNet of any depth ``6n + 2``.

    >>> sum(parameter.numel() for parameter in reducenet(8).parameters())
    32282
    """
    return ReduceNet(depth, **options)


@final
class ReduceNet(nn.Module):
    """A CIFAR residual network with one decaying activation per block.

    A 3x3 stem, three stages of ``(depth - 2) / 6`` blocks at ``widths`` channels (the layout of the CIFAR networks of
    arXiv 1512.03385, section 4.2; stages 2 and 3 begin with stride 2), global average pooling and one linear layer.
    Input [batch, in_channels, height, width] of any size, output [batch, num_classes]. ``image_size`` only says what
    ``example_inputs`` gives. ``decay`` is one value for all activations, or one for each: the stem's, then the
    blocks' in order.

    ``padding`` says where zeros are put. With "layer" every 3x3 convolution pads its input by 1. What comes out of a
    layer, padded anew for the next, is not what one larger convolution would give. So with "stage" the stem pads the
    image, each stage pads its input once, by what all of its convolutions need (n, and 2n - 1 with stride 2), and the
    convolutions pad nothing; with "network" the image is padded once, by 7n - 2. Shortcuts are cropped to match. Every
    stage, or with "network" the whole backbone, is then one convolution when its activations have decayed. The modes
    differ in the values at the border; parameters have the same names in all of them. So do the outputs of the stem
    and of each stage have the same size ("network": the output of the last stage), at every size of the image.

    Raises ``InputError`` for a depth that is not ``6n + 2``, an expansion below 1, the wrong number of decays, or
    another padding.

    >>> ReduceNet(8)(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int = 20,
        *,
        expansion: int = 1,
        num_classes: int = 10,
        in_channels: int = 3,
        widths: tuple[int, int, int] = (16, 32, 64),
        decay: float | Sequence[float] = 0.0,
        image_size: int = 32,
        padding: Padding = "layer",
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6 != 0:
            raise InputError(f"ReduceNet: depth must be 6n + 2 (8, 14, 20, ...), got {depth}")
        if expansion < 1:
            raise InputError(f"ReduceNet: expansion must be at least 1, got {expansion}")
        if padding not in get_args(Padding):
            raise InputError(f"ReduceNet: padding must be 'layer', 'stage' or 'network', got {padding!r}")
        blocks = (depth - 2) // 6
        stem_decay, *block_decays = _one_per_activation(decay, count=1 + 3 * blocks)
        self.in_channels = in_channels
        self.image_size = image_size
        self.margins = _margins(padding, blocks)
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 3, padding=0 if padding == "network" else 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            DecayedActivation(nn.ReLU(), stem_decay),
        )
        first, second, third = (block_decays[stage * blocks : (stage + 1) * blocks] for stage in range(3))
        pads = padding == "layer"
        self.stage1 = _stage(widths[0], widths[0], expansion, 1, first, pads)
        self.stage2 = _stage(widths[0], widths[1], expansion, 2, second, pads)
        self.stage3 = _stage(widths[1], widths[2], expansion, 2, third, pads)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[2], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(torch.flatten(self.pool(self.features(x)), 1))
        return scores

    def features(self, x: Tensor) -> Tensor:
        """What the last stage makes of images, [batch, widths[2], height / 4, width / 4], rounded up."""
        for part, margin in zip((self.stem, self.stage1, self.stage2, self.stage3), self.margins, strict=True):
            x = part(F.pad(x, [margin] * 4) if margin else x)
        return x

    def example_inputs(self) -> tuple[Tensor, ...]:
        """One image, [1, in_channels, image_size, image_size]."""
        return example(self, 1, self.in_channels, self.image_size, self.image_size)


@final
class ReduceBlock(nn.Module):
    """3x3 convolution, batch norm, decaying activation, 1x1 convolution, batch norm; plus the input at stride 1.

    A block that changes the resolution or the width has no shortcut at all. ``expansion`` widens the middle:
    ``expansion * out_channels``. Input [batch, in_channels, height, width]; the output has ``out_channels`` and, at
    stride 2, half the height and width, rounded up. With ``pads=False`` the convolution takes its border from the
    input, of which the shortcut leaves it out: the output is that of an input smaller by 2.

    >>> ReduceBlock(4, 8, stride=2)(torch.randn(1, 4, 9, 9)).shape
    torch.Size([1, 8, 5, 5])
    >>> ReduceBlock(4, 4, pads=False)(torch.randn(1, 4, 9, 9)).shape
    torch.Size([1, 4, 7, 7])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expansion: int = 1,
        stride: int = 1,
        decay: float = 0.0,
        pads: bool = True,
    ) -> None:
        super().__init__()
        middle = expansion * out_channels
        self.in_channels = in_channels
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.pads = pads
        self.conv1 = nn.Conv2d(in_channels, middle, 3, stride=stride, padding=int(pads), bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.activation = DecayedActivation(nn.ReLU(), decay)
        self.conv2 = nn.Conv2d(middle, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(self.activation(self.bn1(self.conv1(x)))))
        if not self.has_shortcut:
            return y
        return y + (x if self.pads else x[..., 1:-1, 1:-1])

    def example_inputs(self) -> tuple[Tensor, ...]:
        """One feature map, [1, in_channels, 32, 32]."""
        return example(self, 1, self.in_channels, 32, 32)


def _one_per_activation(decay: float | Sequence[float], count: int) -> list[float]:
    if not isinstance(decay, Sequence):
        return [decay] * count
    if len(decay) != count:
        raise InputError(
            f"ReduceNet: decay must be one number or {count} (the stem's, then one per block), got {len(decay)}"
        )
    return list(decay)


def _margins(padding: Padding, blocks: int) -> tuple[int, int, int, int]:
    """The zeros put around the input of the stem and of each stage, beyond what their convolutions pad.

    A position of padding behind a stride of s takes s before it: p1 + s1 p2.
    """
    if padding == "layer":
        return 0, 0, 0, 0
    first, later = blocks, 1 + 2 * (blocks - 1)
    if padding == "stage":
        return 0, first, later, later
    return 1 + first + later + 2 * later, 0, 0, 0


def _stage(
    in_channels: int, out_channels: int, expansion: int, stride: int, decays: list[float], pads: bool
) -> nn.Sequential:
    first, *rest = decays
    return nn.Sequential(
        ReduceBlock(in_channels, out_channels, expansion=expansion, stride=stride, decay=first, pads=pads),
        *(ReduceBlock(out_channels, out_channels, expansion=expansion, decay=decay, pads=pads) for decay in rest),
    )
