"""What is VanillaNet, the plain network whose pairs of 1x1 convolutions merge once the activation between has decayed?

Training form (arXiv 2305.12972, "VanillaNet: the Power of Minimalism in Deep Learning", sections 2 and 3; table 1 for
the layout). Parameter names are those of the published training checkpoints, to which this form adds the ``decay``
buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypedDict, Unpack, final

import torch
from torch import Tensor, nn

from rgc.errors import InputError
from rgc.models._example import example
from rgc.nn import DecayedLeakyReLU, SeriesActivation


class VanillaNetOptions(TypedDict, total=False):
    """The options of every VanillaNet factory; the meaning of each is at ``VanillaNet``."""

    num_classes: int
    in_channels: int
    dropout: float
    order: int
    decay: float
    image_size: int


def vanillanet5(**options: Unpack[VanillaNetOptions]) -> VanillaNet:
    """VanillaNet-5: 15.5 million parameters once merged."""
    return VanillaNet((512, 1024, 2048, 4096), (2, 2, 2), **options)


def vanillanet6(**options: Unpack[VanillaNetOptions]) -> VanillaNet:
    """VanillaNet-6: 32.5 million parameters once merged."""
    return VanillaNet((512, 1024, 2048, 4096, 4096), (2, 2, 2, 1), **options)


def vanillanet7(**options: Unpack[VanillaNetOptions]) -> VanillaNet:
    """VanillaNet-7: 32.8 million parameters once merged."""
    return VanillaNet((512, 512, 1024, 2048, 4096, 4096), (1, 2, 2, 2, 1), **options)


def vanillanet8(**options: Unpack[VanillaNetOptions]) -> VanillaNet:
    """VanillaNet-8: 37.1 million parameters once merged."""
    return _with_extra_stages(0, **options)


def vanillanet9(**options: Unpack[VanillaNetOptions]) -> VanillaNet:
    """VanillaNet-9: 41.4 million parameters once merged."""
    return _with_extra_stages(1, **options)


def vanillanet10(**options: Unpack[VanillaNetOptions]) -> VanillaNet:
    """VanillaNet-10: 45.7 million parameters once merged."""
    return _with_extra_stages(2, **options)


def vanillanet11(**options: Unpack[VanillaNetOptions]) -> VanillaNet:
    """VanillaNet-11: 50.0 million parameters once merged."""
    return _with_extra_stages(3, **options)


def vanillanet12(**options: Unpack[VanillaNetOptions]) -> VanillaNet:
    """VanillaNet-12: 54.3 million parameters once merged."""
    return _with_extra_stages(4, **options)


def vanillanet13(**options: Unpack[VanillaNetOptions]) -> VanillaNet:
    """VanillaNet-13: 58.6 million parameters once merged."""
    return _with_extra_stages(5, **options)


@final
class VanillaNet(nn.Module):
    """A network without shortcuts, of 1x1 convolutions, max pooling and series activations.

    A 4x4 stem with stride 4 at ``dims[0]`` channels, one ``VanillaBlock`` for each of ``strides``, from ``dims[i]`` to
    ``dims[i + 1]`` channels, and a head of two 1x1 convolutions after global average pooling. Input [batch,
    in_channels, height, width], output [batch, num_classes]. ``order`` is that of the series activations; ``decay``
    the negative slope of every activation that is to become the identity (0 at the start of training, 1 at its end);
    ``image_size`` only says what ``example_inputs`` gives.

    Raises ``InputError`` unless there is one more of ``dims`` than of ``strides``.

    >>> VanillaNet((8, 16), (2,), num_classes=5)(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        dims: Sequence[int],
        strides: Sequence[int],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.0,
        order: int = 3,
        decay: float = 0.0,
        image_size: int = 224,
    ) -> None:
        super().__init__()
        if not strides or len(dims) != len(strides) + 1:
            raise InputError(
                f"VanillaNet: dims must have one number more than strides (the stem's width, then one per block), "
                f"got {len(dims)} dims and {len(strides)} strides"
            )
        self.in_channels = in_channels
        self.image_size = image_size
        self.stem1 = _conv_bn(in_channels, dims[0], kernel_size=4)
        self.stem_activation = DecayedLeakyReLU(decay)
        self.stem2 = nn.Sequential(*_conv_bn(dims[0], dims[0]), SeriesActivation(dims[0], order))
        self.stages = nn.Sequential(
            *(
                VanillaBlock(width, next_width, stride=stride, order=order, decay=decay)
                for (width, next_width), stride in zip(pairwise(dims), strides, strict=True)
            )
        )
        self.cls1 = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Dropout(dropout), *_conv_bn(dims[-1], num_classes))
        self.head_activation = DecayedLeakyReLU(decay)
        self.cls2 = nn.Sequential(nn.Conv2d(num_classes, num_classes, 1))
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem2(self.stem_activation(self.stem1(x)))
        x = self.stages(x)
        x = self.cls2(self.head_activation(self.cls1(x)))
        return torch.flatten(x, 1)

    def example_inputs(self) -> tuple[Tensor, ...]:
        """One image, [1, in_channels, image_size, image_size]."""
        return example(self, 1, self.in_channels, self.image_size, self.image_size)


@final
class VanillaBlock(nn.Module):
    """Two 1x1 convolutions with batch norms around a decaying leaky ReLU, max pooling, and a series activation.

    At decay 1 both convolutions and both batch norms are one 1x1 convolution (arXiv 2305.12972, section 3.1). Input
    [batch, in_channels, height, width]; the output has ``out_channels`` and height and width divided by ``stride``,
    rounded down.

    >>> VanillaBlock(4, 8, stride=2)(torch.randn(1, 4, 9, 9)).shape
    torch.Size([1, 8, 4, 4])
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 2, order: int = 3, decay: float = 0.0
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.conv1 = _conv_bn(in_channels, in_channels)
        self.activation = DecayedLeakyReLU(decay)
        self.conv2 = _conv_bn(in_channels, out_channels)
        self.pool = nn.Identity() if stride == 1 else nn.MaxPool2d(stride)
        self.act = SeriesActivation(out_channels, order)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.activation(self.conv1(x)))
        activated: Tensor = self.act(self.pool(x))
        return activated

    def example_inputs(self) -> tuple[Tensor, ...]:
        """One feature map, [1, in_channels, 56, 56]."""
        return example(self, 1, self.in_channels, 56, 56)


def _with_extra_stages(extra: int, **options: Unpack[VanillaNetOptions]) -> VanillaNet:
    """VanillaNet-8 to VanillaNet-13 differ only in the number of 2048-channel blocks with stride 1."""
    dims = (512, 512, 1024, 2048, 2048, *[2048] * extra, 4096, 4096)
    return VanillaNet(dims, (1, 2, 2, 1, *[1] * extra, 2, 1), **options)


def _conv_bn(in_channels: int, out_channels: int, kernel_size: int = 1) -> nn.Sequential:
    """A convolution whose stride is its kernel size (a 4x4 patch embedding, or a 1x1), and its batch norm."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride=kernel_size),
        nn.BatchNorm2d(out_channels, eps=1e-6),
    )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d) and module.bias is not None:
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
