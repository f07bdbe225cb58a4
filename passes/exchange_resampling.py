"""A map of the channels commutes with a resampling R of the positions that keeps constants: A(R x) + b = R(A x + b).

R is average pooling, interpolation, a global mean, a flip: linear, the same for each channel, R 1 = 1. So the layers on
both sides of it are one, and a 1x1 convolution moves to the side that has fewer positions. Where R does not keep
constants (zero padding that is counted), only a map without b passes. To flatten one position is to average over it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import torch
from torch import Tensor, nn

from rgc import (
    AvgPool,
    BatchNorm,
    Conv,
    Deferred,
    Linear,
    Scale,
    Structural,
    TensorType,
    Upsample,
    Value,
    compose,
    require,
    rewrite,
)

AVERAGES = frozenset({
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "mean", "flip",
    "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d",
})  # fmt: skip
FLATTENINGS = frozenset({"flatten", "Flatten"})


def is_resampling(op: AvgPool | Upsample | Structural) -> bool:
    """May it be a linear resampling? Its arguments and its input decide."""
    return not isinstance(op, Structural) or op.name in AVERAGES


def is_resampling_or_flattening(op: AvgPool | Upsample | Structural) -> bool:
    """The same, or a flattening, which on one position is a mean."""
    return is_resampling(op) or (isinstance(op, Structural) and op.name in FLATTENINGS)


def maps_channels(layer: Conv | BatchNorm | Scale) -> bool:
    """Does each position of the result depend on just that position of the input, in the same way everywhere?"""
    return not isinstance(layer, Conv) or layer.maps_channels


Resampling = AvgPool | Upsample | Structural
Layer = Conv | BatchNorm | Scale
Averaging = Annotated[Resampling, is_resampling]
Tail = Annotated[Resampling, is_resampling_or_flattening]
ChannelMap = Annotated[Layer, maps_channels]
Pointwise = Annotated[Conv, maps_channels]


@rewrite(lambda x, first, resampling, second: second(resampling(first(x))))
def exchange_resampling(x: Value, first: ChannelMap, resampling: Tail, second: Layer) -> Value:
    return _joined_behind(x, first, [resampling], second)


@exchange_resampling.also(lambda x, first, resampling, second: second(resampling(first(x))))
def exchange_backwards(x: Value, first: Layer, resampling: Tail, second: ChannelMap) -> Value:
    return _joined_before(x, first, [resampling], second)


@exchange_resampling.also(lambda x, first, inner, outer, second: second(outer(inner(first(x)))))
def exchange_two(x: Value, first: ChannelMap, inner: Averaging, outer: Tail, second: Layer) -> Value:
    return _joined_behind(x, first, [inner, outer], second)


@exchange_resampling.also(lambda x, first, inner, outer, second: second(outer(inner(first(x)))))
def exchange_two_backwards(x: Value, first: Layer, inner: Averaging, outer: Tail, second: ChannelMap) -> Value:
    return _joined_before(x, first, [inner, outer], second)


@exchange_resampling.also(lambda x, upsample, layer: layer(upsample(x)))
def move_before_upsampling(x: Value, upsample: Upsample, layer: Pointwise) -> Value:
    before, after = x.tensor_type, upsample(x).tensor_type
    require(math.prod(after.shape) > math.prod(before.shape), f"{upsample.label} makes no more positions than it reads")
    _require_passage([upsample], before, layer.spatial, layer, layer)
    return upsample(layer(x))


@exchange_resampling.also(lambda x, layer, resampling: resampling(layer(x)))
def move_behind_pooling(x: Value, layer: Pointwise, resampling: Averaging) -> Value:
    positions = resampling.resampled(x.tensor_type) or 0
    own = layer.spatial is None or positions <= layer.spatial
    require(own, f"{resampling.label} acts on more than the positions of the layer")
    pooled = resampling(x)
    before, after = x.tensor_type, pooled.tensor_type
    fewer = math.prod(after.shape) < math.prod(before.shape)
    require(fewer, f"{resampling.label} leaves no fewer positions than it reads")
    axes = _require_passage([resampling], before, layer.spatial, layer, layer)
    return _on(layer, axes)(pooled)


def _joined_behind(x: Value, first: Layer, path: Sequence[Resampling], second: Layer) -> Value:
    """second first R*(x)."""
    axes = _axes_of(first, path[0], x.tensor_type)
    left = _require_passage(path, x.tensor_type, axes, first, second)
    require(second.spatial in (None, left), f"{first.label} and {second.label} act on different axes")
    value = x
    for op in path:
        value = op(value)
    return compose(second, _on(first, left), value.tensor_type.size(left))(value)


def _joined_before(x: Value, first: Layer, path: Sequence[Resampling], second: Layer) -> Value:
    """R*(second first x)."""
    given = first.infer(x.type)
    assert given is not None
    axes = _axes_of(first, path[0], given)
    left = _require_passage(path, given, axes, second, second)
    require(second.spatial in (None, left), f"{first.label} and {second.label} act on different axes")
    size = None if first.spatial is None else x.tensor_type.size(first.spatial)
    value = compose(_on(second, axes), first, size)(x)
    for op in path:
        value = op(value)
    return value


def _axes_of(first: Layer, resampling: Resampling, given: TensorType) -> int:
    """The spatial axes of ``first``; one scale for all channels does not mind, so those that are resampled."""
    return first.spatial if first.spatial is not None else resampling.resampled(given) or 0


def _require_passage(path: Sequence[Resampling], given: TensorType, axes: int, moving: Layer, second: Layer) -> int:
    """Refuse where ``moving`` does not commute with the resamplings; how many spatial axes they leave of ``axes``."""
    for op in path:
        if isinstance(op, Structural) and op.name in FLATTENINGS:
            _require_one_position(op, given, axes, second)
        else:
            resampled = op.resampled(given)
            require(
                resampled is not None and resampled <= axes, f"{op.label} acts on more than the positions of the layer"
            )
            require(
                op.keeps_constants or not _has_offset(moving),
                f"{op.label} does not keep constants (it counts padding, or divides by another number), "
                f"so the bias of {moving.label} does not pass it",
            )
        after = op.infer(given)
        assert after is not None  # the operator is in the graph
        axes, given = axes - (len(given.shape) - len(after.shape)), after
    return axes


def _require_one_position(flatten: Structural, given: TensorType, axes: int, second: Layer) -> None:
    """Behind the channel axis everything is 1 wide: at every size that ``second`` takes, if it is at the example's."""
    other_axes = f"{flatten.label} flattens other axes than those behind the channels"
    require(axes > 0 and len(given.shape) == axes + 2, other_axes)
    channels = given.shape[1]
    probe = flatten.infer(given.with_shape((2, channels, *[3] * axes)))
    require(probe is not None and probe.shape == (2, channels * 3**axes), other_axes)
    require(set(given.shape[2:]) <= {1}, f"{flatten.label} flattens several positions")
    require(second.channels is not None, f"{second.label} takes any number of positions")


def _has_offset(layer: Layer) -> bool:
    linear = layer.as_linear()
    offset = linear.bias if isinstance(linear, Conv) else linear.shift if isinstance(linear, Scale) else None
    return offset is not None and bool((offset != 0).any())


def _on(layer: Layer, axes: int) -> Linear:
    """A map of the channels as one over so many spatial axes."""
    linear = layer.as_linear()
    if linear.spatial in (None, axes):
        return linear
    if isinstance(linear, Scale):
        return replace(linear, axes=axes)
    assert isinstance(linear, Conv)
    shape = (*linear.shape[:2], *[1] * axes)
    return Conv(Deferred(shape, lambda: linear.weight.reshape(shape)), linear.bias, groups=linear.groups)


@exchange_resampling.fires_on(shape=(2, 3, 8, 8))
def pointwise_layers_around_bilinear_upsampling() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(8, 4, 1), nn.ReLU()
    ).eval()


@exchange_resampling.fires_on(shape=(2, 3, 8, 8))
def batch_norm_behind_nearest_upsampling() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Upsample(scale_factor=2), nn.BatchNorm2d(4)).eval()


@exchange_resampling.fires_on(shape=(2, 8, 9, 8))
def linear_layer_behind_a_global_mean() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 32, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)).eval()


@exchange_resampling.fires_on(shape=(2, 8, 9, 8))
def pointwise_layer_before_average_pooling() -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 1), nn.AvgPool2d(2), nn.ReLU()).eval()


class _HeadWithMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(8, 32, 3), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.conv(x).mean((2, 3)))
        return y


@exchange_resampling.fires_on(shape=(2, 8, 9, 8))
def linear_layer_behind_the_mean_of_a_convolution() -> nn.Module:
    return _HeadWithMean().eval()


@exchange_resampling.leaves_alone(shape=(2, 4, 8, 8), because="does not keep constants")
def bias_before_an_average_that_counts_its_padding() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.AvgPool2d(3, 2, 1), nn.ReLU()).eval()


@exchange_resampling.leaves_alone(shape=(2, 4, 8, 8), because="several positions")
def linear_layer_that_tells_positions_apart() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(256, 5)).eval()


class _MeanOfChannelsAndRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(1, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).mean((1, 2), keepdim=True))
        return torch.relu(y)


@exchange_resampling.leaves_alone(shape=(2, 4, 8, 8), because="more than the positions")
def mean_of_the_channels_and_rows() -> nn.Module:
    return _MeanOfChannelsAndRows().eval()
