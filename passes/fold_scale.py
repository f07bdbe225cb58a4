"""A constant factor or offset beside a linear operator is part of it: c(Wx + b) + d = (cW)x + cb + d, W(cx) = (Wc)x.

A sum of multiples of one value is a multiple of it: x + x = 2x, c x - d x = (c - d) x.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rgc import AvgPool, BatchNorm, Conv, Scale, Value, compose, rewrite, unit


@rewrite(lambda x, linear, scale: scale(linear(x)))
def fold_scale(x: Value, linear: Conv | Scale | BatchNorm, scale: Scale) -> Value:
    return (scale @ linear)(x)


@fold_scale.also(lambda x, scale, linear: linear(scale(x)))
def fold_scale_before(x: Value, scale: Scale, linear: Conv | BatchNorm) -> Value:
    spatial = linear.spatial
    return compose(linear, scale, x.tensor_type.size(spatial))(x)


@fold_scale.also(lambda x, pool, scale: scale(pool(x)))
def fold_scale_after_pooling(x: Value, pool: AvgPool, scale: Scale) -> Value:
    return (scale @ _per_channel(pool, x))(x)


@fold_scale.also(lambda x, scale, pool: pool(scale(x)))
def fold_scale_before_pooling(x: Value, scale: Scale, pool: AvgPool) -> Value:
    return compose(_per_channel(pool, x), scale, x.tensor_type.size(pool.spatial))(x)


def _per_channel(pool: AvgPool, x: Value) -> Conv:
    """A pooling does not say of how many channels, and neither does a scale of one number."""
    return pool.at(x.tensor_type.size(pool.spatial)).as_conv(x.tensor_type.shape[-pool.spatial - 1], pool.spatial)


@fold_scale.also(lambda x, first, second: first(x) + second(x))
def fold_scale_sum(x: Value, first: Scale, second: Scale) -> Value:
    return (first + second)(x)


@fold_scale.also(lambda x, first, second: first(x) - second(x))
def fold_scale_difference(x: Value, first: Scale, second: Scale) -> Value:
    return (first + _minus() @ second)(x)


@fold_scale.also(lambda x, scale: x - scale(x))
def fold_scale_remainder(x: Value, scale: Scale) -> Value:
    return (unit() + _minus() @ scale)(x)


@fold_scale.also(lambda x, scale: scale(x) - x)
def fold_scale_excess(x: Value, scale: Scale) -> Value:
    return (scale + _minus())(x)


@fold_scale.also(lambda x: x + x)
def fold_scale_double(x: Value) -> Value:
    return (unit() + unit())(x)


def _minus() -> Scale:
    one = unit()
    return Scale(-one.scale, one.shift)


class _LayerScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(-1, 1, channels).reshape(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Normalise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x / 255 - 0.5) / 0.25


class _Centre(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5


@fold_scale.fires_on(shape=(2, 3, 8, 8))
def layer_scale() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), _LayerScale(4)).eval()


@fold_scale.fires_on(shape=(2, 3, 8, 8))
def input_normalisation_before_an_unpadded_stem() -> nn.Module:
    return nn.Sequential(_Normalise(), nn.Conv2d(3, 4, 3)).eval()


class _Multiples(nn.Module):
    """Two activations are computed once, so their sum is found to be a double only by the engine."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        twice = torch.relu(x) + torch.relu(x)
        less = twice - 0.25 * twice
        more = 3 * less - less
        y: Tensor = self.conv(0.5 * more - 2 * more)
        return y


@fold_scale.fires_on(shape=(2, 3, 8, 8))
def multiples_of_one_value() -> nn.Module:
    return _Multiples().eval()


class _Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


@fold_scale.fires_on(shape=(2, 3, 8, 8))
def factor_around_an_average_pooling() -> nn.Module:
    return nn.Sequential(_Halved(), nn.AvgPool2d(2), _Halved()).eval()


@fold_scale.fires_on(shape=(2, 3, 6, 6))
def factor_behind_an_average_pooling() -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.AvgPool2d(2), _Halved(), nn.ReLU()).eval()


@fold_scale.fires_on(shape=(2, 3, 6, 6))
def sum_of_two_multiples() -> nn.Module:
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(x)
            return torch.tanh(0.5 * y + 3 * y)

    return Sum().eval()


@fold_scale.fires_on(shape=(2, 3, 8, 8))
def input_normalisation_before_a_padded_stem() -> nn.Module:
    return nn.Sequential(_Centre(), nn.Conv2d(3, 4, 3, padding=1)).eval()


@fold_scale.leaves_alone(shape=(2, 4, 8, 8), because="unevenly")
def an_offset_before_a_transposed_convolution_of_groups() -> nn.Module:
    return nn.Sequential(_Centre(), nn.ConvTranspose2d(4, 4, 3, stride=2, groups=4)).eval()
