"""A 1x1 convolution behind a pixel shuffle goes into the convolution before it: W S(x) = S((W (x) I) x), I of r^2.

A pixel shuffle makes channel c r^2 + k at a position to channel c at the k-th place of its block, so the weight of
channels there is the Kronecker product with the identity. By itself that is more work; merged into the convolution
before the shuffle it is less.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from rgc import BatchNorm, Conv, Linear, PixelShuffle, Scale, Value, compose, require, rewrite


def is_pointwise(op: Conv | Scale | BatchNorm) -> bool:
    """Does each output position read just its own input position?"""
    return not isinstance(op, Conv) or (op.is_pointwise and not op.transposed)


@rewrite(lambda x, first, shuffle, second: second(shuffle(first(x))))
def exchange_pixel_shuffle(
    x: Value, first: Conv, shuffle: PixelShuffle, second: Annotated[Conv | Scale | BatchNorm, is_pointwise]
) -> Value:
    blocks = shuffle.factor**2
    require(second.spatial in (None, 2), f"{second.label} and {shuffle.label} act on different axes")
    pointwise = second.as_linear().as_conv(first.out_channels // blocks, 2)
    require(pointwise.bias is None or pointwise.bias.dim() == 1, f"{second.label} has a bias map")
    return shuffle(compose(_before(pointwise, blocks), first, x.tensor_type.size(2))(x))


def _before(pointwise: Conv, blocks: int) -> Linear:
    """The same for the channels in blocks before the shuffle."""
    w = pointwise.weight.double()
    out, columns = w.shape[:2]
    wide = torch.einsum("oi,kl->okil", w.reshape(out, columns), torch.eye(blocks, dtype=torch.float64))
    bias = None if pointwise.bias is None else pointwise.bias.double().repeat_interleave(blocks)
    return Conv(wide.reshape(out * blocks, columns * blocks, 1, 1), bias, groups=pointwise.groups)


@exchange_pixel_shuffle.fires_on(shape=(2, 4, 7, 6))
def upsampling_head() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(4, 4, 1), nn.ReLU()).eval()


@exchange_pixel_shuffle.fires_on(shape=(2, 4, 7, 6))
def batch_norm_behind_a_pixel_shuffle() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 18, 1), nn.PixelShuffle(3), nn.BatchNorm2d(2), nn.ReLU()).eval()


@exchange_pixel_shuffle.leaves_alone(shape=(2, 16, 28, 28), because="estimated slower")
def head_that_widens() -> nn.Module:
    return nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(4, 64, 1), nn.ReLU()).eval()


@exchange_pixel_shuffle.leaves_alone(shape=(2, 4, 7, 6), because="is also used elsewhere")
def convolution_that_is_read_elsewhere() -> nn.Module:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shuffle, self.second = nn.Conv2d(4, 16, 3), nn.PixelShuffle(2), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.first(x)
            return self.second(self.shuffle(y)), y

    return Both().eval()
