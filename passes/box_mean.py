"""A linear tail before a global mean is a kernel on means: mean_p sum_u K[u] x[p + u] = sum_u K[u] mean_p x[p + u].

Each tap needs the mean of what it reads, a box that the border cuts, so at a fixed size a convolution of all positions
becomes one position of it, behind two small constant matrices, R x C^T, with a row for each tap. A whole region that
ends in one position per channel (several layers, skips, a linear head) is one kernel on sums of those rows and columns
that all of it reads alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor, nn

from rgc import (
    AvgPool,
    AxisSums,
    Conv,
    Flatten,
    Region,
    Structural,
    TensorType,
    Value,
    averaged,
    require,
    rewrite,
    tail_of,
)

AVERAGES = frozenset({
    "mean", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d",
})  # fmt: skip

#: Elements of the largest kernel that a whole region becomes (128 MiB in float64).
LARGEST_KERNEL = 2**24


def is_average(op: AvgPool | Structural) -> bool:
    """May it be a mean over all positions? Its arguments and its input decide."""
    return isinstance(op, AvgPool) or op.name in AVERAGES


def has_positions(conv: Conv) -> bool:
    """Is it no linear layer, and does it read what it is given once?"""
    return conv.spatial > 0 and not conv.transposed


def ends_in_one_position(region: Region) -> bool:
    """Is there a result with one position per channel, of several layers on a map, sums of positions left out?"""
    entering, leaving = region.source.tensor_type.shape, region.sink.tensor_type.shape
    layers = sum(not isinstance(value.op, AxisSums | Flatten | Structural) for value in region.values)
    return len(entering) > 2 and len(leaving) > 1 and set(leaving[2:]) <= {1} and layers > 1


Mean = Annotated[AvgPool | Structural, is_average]


@rewrite(lambda x, conv, mean: mean(conv(x)))
def box_mean(x: Value, conv: Annotated[Conv, has_positions], mean: Mean) -> Value:
    return _averaged(x, conv, [mean])


@box_mean.also(lambda x, conv, inner, outer: outer(inner(conv(x))))
def box_mean_of_two(
    x: Value, conv: Annotated[Conv, has_positions], inner: Annotated[Structural, is_average],
    outer: Annotated[Structural, is_average],
) -> Value:  # fmt: skip
    """A mean over the columns, then one over the rows."""
    return _averaged(x, conv, [inner, outer])


@box_mean.also(lambda x, region: region(x))
def merge_tail(x: Value, region: Annotated[Region, ends_in_one_position]) -> Value:
    require(x.tensor_type.fixed, "rows and columns are counted at a fixed size only (--passes all)")
    tail = tail_of(region)
    alike = math.prod(tail.counts) < math.prod(tail.size)
    require(alike, "no two rows or columns of the input are read alike")
    require(
        tail.entries <= LARGEST_KERNEL,
        f"the tail would be a kernel of {tail.entries / 1e6:,.0f} M elements (at most {LARGEST_KERNEL / 1e6:,.0f} M)",
    )
    offset = region.evaluate(torch.zeros(1, *x.tensor_type.shape[1:], dtype=torch.float64)).reshape(-1)
    y = tail.applied(x, offset)
    return y if region.sink.tensor_type.shape[1:] == y.tensor_type.shape[1:] else _in_shape(y, region.sink)


def _in_shape(y: Value, sink: Value) -> Value:
    """One position per channel on fewer axes, or on more."""
    shape = y.tensor_type.shape[1:]
    require(len(sink.tensor_type.shape) == 2, f"{sink.where} has other axes of one position than its source has axes")
    return Flatten(shape)(y)


def _averaged(x: Value, conv: Conv, means: Sequence[AvgPool | Structural]) -> Value:
    size = x.tensor_type.size(conv.spatial)
    require(size is not None, "the boxes of a mean are known at a fixed size only (--passes all)")
    assert size is not None
    mapped = conv.infer(x.type)
    assert mapped is not None
    result = _require_global([*means], mapped, conv)
    sums, kernel = averaged(conv, size)
    y = kernel(sums(x))
    if y.tensor_type.shape == result.shape:
        return y
    for mean in means:  # of one position, which leaves out its axes
        y = mean(y)
    return y


def _require_global(means: list[AvgPool | Structural], mapped: TensorType, conv: Conv) -> TensorType:
    """Refuse anything but a mean over all positions; what they leave."""
    size = mapped.shape[-conv.spatial :]
    require(math.prod(size) > 1, f"{conv.label} has one position, over which there is no mean to take")
    given, left = mapped, conv.spatial
    for mean in means:
        axes = mean.resampled(given)
        require(
            axes is not None and axes <= left, f"{mean.label} averages over more than the positions of {conv.label}"
        )
        made = mean.infer(given)
        assert made is not None and axes is not None
        lead = len(given.shape) - axes
        whole = made.shape[:lead] == given.shape[:lead] and set(made.shape[lead:]) <= {1}
        if isinstance(mean, AvgPool):
            plain = mean.keeps_constants and not any(mean.padding)
            whole = whole and plain and mean.window == given.shape[lead:]
        require(whole, f"{mean.label} does not average over all positions")
        left -= len(given.shape) - len(made.shape)
        given = made
    require(math.prod(given.shape[len(given.shape) - left :]) == 1, "the means leave several positions")
    return given


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.inner(x)
        return x + inner


class _Means(nn.Module):
    """A convolution, and a mean of one axis after the other."""

    def __init__(self, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.conv, self.axes = nn.Conv2d(16, 32, 3, padding=1), axes

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        for axis in self.axes:
            y = y.mean(axis)
        return y.relu()


@box_mean.fires_on(shape=(2, 32, 12, 11), fixed_size=True)
def mean_of_a_padded_convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.ReLU()).eval()


@box_mean.fires_on(shape=(2, 32, 13, 12), fixed_size=True)
def mean_of_a_convolution_with_stride() -> nn.Module:
    return nn.Sequential(nn.Conv2d(32, 64, 5, 2, 2, groups=2), nn.AdaptiveAvgPool2d(1), nn.ReLU()).eval()


@box_mean.fires_on(shape=(2, 16, 12, 11), fixed_size=True)
def mean_of_one_axis_after_the_other() -> nn.Module:
    return _Means((3, 2)).eval()


@box_mean.fires_on(shape=(2, 32, 16, 16), fixed_size=True)
def residual_of_two_padded_convolutions_before_a_mean_and_a_head() -> nn.Module:
    convs = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10), nn.ReLU()
    return nn.Sequential(_Residual(nn.Sequential(*convs)), *head).eval()


@box_mean.leaves_alone(shape=(2, 32, 12, 11), because="fixed size")
def mean_of_a_padded_convolution_at_any_size() -> nn.Module:
    return mean_of_a_padded_convolution()


@box_mean.leaves_alone(shape=(2, 32, 12, 12), because="does not average over all positions", fixed_size=True)
def mean_of_parts_of_a_padded_convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.AvgPool2d(6), nn.ReLU()).eval()


@box_mean.leaves_alone(shape=(2, 16, 12, 11), because="does not average over all positions", fixed_size=True)
def mean_of_the_rows_alone() -> nn.Module:
    return _Means((2,)).eval()


@box_mean.leaves_alone(shape=(1, 512, 2, 2), because="estimated slower", fixed_size=True)
def mean_of_fewer_positions_than_taps_of_a_depthwise_convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(512, 512, 3, padding=1, groups=512), nn.AdaptiveAvgPool2d(1), nn.ReLU()).eval()


@box_mean.leaves_alone(shape=(2, 4, 5, 5), because="read alike", fixed_size=True)
def four_convolutions_whose_border_is_as_wide_as_the_map() -> nn.Module:
    convs = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.ReLU()).eval()
