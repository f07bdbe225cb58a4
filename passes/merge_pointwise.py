"""A 1x1 convolution and its neighbour are one convolution: W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2).

Linear layers in a row are the same law with no spatial axis, and a mean over channels is the matrix of 1/C. A 1x1 with
bias before a zero-padded kernel takes a bias map at a fixed size or an input channel of ones at any size, because the
ring around its output is 0 and not b1.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor, nn

from rgc import (
    AvgPool,
    ChannelMean,
    Conv,
    Structural,
    Value,
    average_pool_at,
    compose,
    is_adaptive_average,
    rewrite,
)


def has_one_tap(op: Conv | ChannelMean) -> bool:
    """Is the kernel 1 wide on every axis (or without axes, as in a linear layer)?"""
    return isinstance(op, ChannelMean) or set(op.kernel) <= {1}


Pointwise = Annotated[Conv | ChannelMean, has_one_tap]


@rewrite(lambda x, first, second: second(first(x)))
def merge_pointwise(x: Value, first: Conv | AvgPool, second: Pointwise) -> Value:
    return compose(second, first, x.tensor_type.size(first.spatial))(x)


@merge_pointwise.also(lambda x, pool, second: second(pool(x)))
def merge_pointwise_behind_adaptive_pooling(
    x: Value, pool: Annotated[Structural, is_adaptive_average], second: Pointwise
) -> Value:
    """At a fixed size that is a multiple of the output's, adaptive pooling is a pooling with one window."""
    plain = average_pool_at(pool, x.tensor_type)
    return compose(second, plain, x.tensor_type.size(plain.spatial))(x)


@merge_pointwise.also(lambda x, first, second: second(first(x)))
def merge_pointwise_before(x: Value, first: Pointwise, second: Conv | AvgPool) -> Value:
    return compose(second, first, x.tensor_type.size(first.spatial))(x)


@merge_pointwise.fires_on(shape=(2, 3, 8, 8))
def pointwise_after_a_padded_convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)).eval()


@merge_pointwise.fires_on(shape=(2, 3, 8, 8))
def pointwise_without_bias_before_a_padded_convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 3, padding=1)).eval()


@merge_pointwise.fires_on(shape=(2, 8, 6, 7), fixed_size=True)
def pointwise_with_bias_before_a_padded_convolution_at_a_fixed_size() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 32, 1), nn.Conv2d(32, 8, 3, padding=1)).eval()


@merge_pointwise.fires_on(shape=(2, 5, 7))
def two_linear_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 16), nn.Linear(16, 4)).eval()


class _ChannelMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True)


@merge_pointwise.fires_on(shape=(2, 3, 8, 8))
def mean_over_the_channels_of_a_convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), _ChannelMean(), nn.Sigmoid()).eval()


@merge_pointwise.fires_on(shape=(2, 4, 8, 8))
def average_pooling_before_a_pointwise_layer() -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(4, 8, 1)).eval()


@merge_pointwise.fires_on(shape=(2, 8, 16, 16))
def pointwise_with_bias_before_a_padded_convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 32, 1), nn.Conv2d(32, 8, 3, padding=1)).eval()


@merge_pointwise.fires_on(shape=(2, 4, 8, 8), fixed_size=True)
def pooling_of_rounded_up_size_that_is_even() -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(4, 8, 1)).eval()


@merge_pointwise.fires_on(shape=(2, 4, 8, 8), fixed_size=True)
def adaptive_pooling_to_a_divisor_of_the_size() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Conv2d(4, 8, 1)).eval()


@merge_pointwise.leaves_alone(shape=(2, 4, 9, 8), because="several sizes", fixed_size=True)
def adaptive_pooling_to_no_divisor_of_the_size() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Conv2d(4, 8, 1)).eval()


@merge_pointwise.leaves_alone(shape=(2, 4, 9, 8), because="ceil_mode", fixed_size=True)
def pooling_of_rounded_up_size_that_is_odd() -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(4, 8, 1)).eval()


@merge_pointwise.fires_on(shape=(2, 8, 8, 8))
def pointwise_with_bias_before_a_padded_convolution_of_groups() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 96, 1, groups=2), nn.Conv2d(96, 8, 3, padding=1, groups=8)).eval()


@merge_pointwise.leaves_alone(shape=(2, 8, 8, 8), because="bias map")
def pointwise_with_bias_that_pads_before_a_padded_convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 32, 1, padding=1), nn.Conv2d(32, 8, 3, padding=1)).eval()


@merge_pointwise.leaves_alone(shape=(2, 64, 28, 28), because="estimated slower")
def bottleneck_of_low_rank() -> nn.Module:
    return nn.Sequential(nn.Conv2d(64, 4, 1), nn.Conv2d(4, 64, 1)).eval()
