"""A map behind a meeting of branches goes into the layers that end them: A(Bx + Cy) = (AB)x + (AC)y.

Of a concatenation each branch takes its columns: W [Bx; Cy] = (W1 B)x + (W2 C)y, and a map that keeps the branches
apart, such as a scale, leaves the concatenation: s [Bx; Cy] = [(s1 B)x; (s2 C)y]. The constant part of A goes into one
branch, once. An upsampling at the end of a branch lets a map of the channels pass. Branches of one value are
`merge_branches`. A convolution goes only where there is one at the end of each branch: elsewhere it would be another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgc import (
    Add,
    BatchNorm,
    Concat,
    Conv,
    Deferred,
    Linear,
    Scale,
    Upsample,
    Value,
    compose,
    require,
    rewrite,
)

Layer = Conv | BatchNorm | Scale


@rewrite(lambda x, y, a, b, layer: layer(a(x) + b(y)))
def distribute_over_branches(x: Value, y: Value, a: Layer, b: Layer, layer: Layer) -> Value:
    return _sum_of([(x, a), (y, b)], layer, 1)


@distribute_over_branches.also(lambda x, y, a, b, layer: layer(a(x) - b(y)))
def distribute_over_difference(x: Value, y: Value, a: Layer, b: Layer, layer: Layer) -> Value:
    return _sum_of([(x, a), (y, b)], layer, -1)


@distribute_over_branches.also(lambda x, y, a, b, up, layer: layer(up(a(x)) + b(y)))
def distribute_over_lateral_sum(x: Value, y: Value, a: Layer, b: Layer, up: Upsample, layer: Layer) -> Value:
    passes = not isinstance(layer, Conv) or layer.maps_channels
    require(passes, f"{layer.label} reads several positions, so it does not pass {up.label}")
    _require_room([a, b], layer)
    small, large = up(a(x)).tensor_type, b(y).tensor_type
    require(small.shape == large.shape, "the sum broadcasts one branch to the size of the other")
    return Add()(up(_composed(_without_constants(layer), a, x)), _composed(layer, b, y))


@distribute_over_branches.also(lambda x, y, a, b, cat, layer: layer(cat(a(x), b(y))))
def distribute_over_two(x: Value, y: Value, a: Layer, b: Layer, cat: Concat, layer: Layer) -> Value:
    return _over_parts([(x, a), (y, b)], cat, layer)


@distribute_over_branches.also(lambda x, y, z, a, b, c, cat, layer: layer(cat(a(x), b(y), c(z))))
def distribute_over_three(
    x: Value, y: Value, z: Value, a: Layer, b: Layer, c: Layer, cat: Concat, layer: Layer
) -> Value:
    return _over_parts([(x, a), (y, b), (z, c)], cat, layer)


@distribute_over_branches.also(lambda w, x, y, z, a, b, c, d, cat, layer: layer(cat(a(w), b(x), c(y), d(z))))
def distribute_over_four(
    w: Value, x: Value, y: Value, z: Value, a: Layer, b: Layer, c: Layer, d: Layer, cat: Concat, layer: Layer
) -> Value:
    return _over_parts([(w, a), (x, b), (y, c), (z, d)], cat, layer)


def _sum_of(branches: Sequence[tuple[Value, Layer]], layer: Layer, sign: int) -> Value:
    (x, a), (y, b) = branches
    shapes = {op(value).tensor_type.shape for value, op in branches}
    require(len(shapes) == 1, "the sum broadcasts one branch to the size of the other")
    _require_room([a, b], layer)
    return Add(sign)(_composed(layer, a, x), _composed(_without_constants(layer), b, y))


def _over_parts(branches: Sequence[tuple[Value, Layer]], cat: Concat, layer: Layer) -> Value:
    channels = [op(value).tensor_type.shape[cat.axis] for value, op in branches]
    if layer.spatial is not None:
        require(cat.axis == -layer.spatial - 1, f"{layer.label} acts along another axis than the concatenation")
    _require_room([op for _, op in branches], layer)
    parts, apart = _parts(layer, channels)
    ends = [_composed(part, op, value) for part, (value, op) in zip(parts, branches, strict=True)]
    if apart:
        return cat(*ends)
    total = ends[0]
    for end in ends[1:]:
        total = Add()(total, end)
    return total


def _require_room(ends: Sequence[Layer], layer: Layer) -> None:
    """What is a factor per channel anyway has room for another one, not for a convolution."""
    without = next((end.label for end in ends if not isinstance(end, Conv)), None)
    require(
        without is None or not isinstance(layer, Conv),
        f"{without} would become a convolution of its own if it took up {layer.label}",
    )


def _parts(layer: Layer, channels: Sequence[int]) -> tuple[list[Linear], bool]:
    """What each part of ``channels`` takes of ``layer``, and whether the results lie beside each other, or add up."""
    bounds = [slice(*ends) for ends in itertools.pairwise(itertools.accumulate(channels, initial=0))]
    linear = layer.as_linear()
    if isinstance(linear, Scale):
        scale, shift = (_of_all(each, sum(channels)) for each in (linear.scale, linear.shift))
        if linear.channels is None:
            return [linear] * len(channels), True
        return [Scale(scale[part], shift[part], linear.axes) for part in bounds], True
    assert isinstance(linear, Conv)
    require(not linear.transposed, f"the channels of {linear.label} are not taken apart")
    if linear.groups == 1:
        first, *others = (_columns(linear, part) for part in bounds)
        return [first, *(each.changed(bias=None, ones=None) for each in others)], False
    width = linear.in_channels // linear.groups
    apart = all(count % width == 0 for count in channels)
    require(apart, f"the groups of {linear.label} do not end where the branches end")
    return [_groups(linear, slice(part.start // width, part.stop // width)) for part in bounds], True


def _columns(conv: Conv, part: slice) -> Conv:
    """What ``conv`` of one group makes of the input channels ``part``, with its constants."""
    shape = (conv.out_channels, part.stop - part.start, *conv.kernel)
    value = None if conv.pad_value is None else conv.pad_value[part]
    return conv.changed(weight=Deferred(shape, lambda: conv.weight[:, part]), pad_value=value)


def _groups(conv: Conv, part: slice) -> Conv:
    rows, width = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    made, read = (slice(part.start * each, part.stop * each) for each in (rows, width))
    shape = (made.stop - made.start, width, *conv.kernel)
    return conv.changed(
        weight=Deferred(shape, lambda: conv.weight[made]),
        bias=None if conv.bias is None else conv.bias[made],
        pad_value=None if conv.pad_value is None else conv.pad_value[read],
        groups=part.stop - part.start,
    )


def _of_all(tensor: Tensor, channels: int) -> Tensor:
    return tensor.expand(channels) if tensor.numel() == 1 else tensor


def _without_constants(layer: Linear) -> Linear:
    """``layer`` without what it makes of zeros."""
    linear = layer.as_linear()
    if isinstance(linear, Scale):
        return Scale(linear.scale, torch.zeros_like(linear.shift), linear.axes)
    assert isinstance(linear, Conv)
    return linear.changed(bias=None, pad_value=None, ones=None)


def _composed(second: Linear, first: Linear, x: Value) -> Value:
    spatial = first.spatial if first.spatial is not None else second.spatial
    return compose(second, first, None if spatial is None else x.tensor_type.size(spatial))(x)


class _TwoInputs(nn.Module):
    """Layers of x and of a sigmoid of it, combined, then a last layer."""

    def __init__(self, combine: Callable[..., Tensor], a: nn.Module, b: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.combine, self.a, self.b, self.last = combine, a, b, last

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.combine(self.a(x), self.b(torch.sigmoid(x))))
        return torch.relu(y)


def _cat(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, b], 1)


def _top_down(a: Tensor, b: Tensor) -> Tensor:
    return F.interpolate(a, scale_factor=2.0, mode="nearest") + b


@distribute_over_branches.fires_on(shape=(2, 4, 9, 8))
def batch_norm_behind_a_concatenation_of_different_inputs() -> nn.Module:
    return _TwoInputs(_cat, nn.Conv2d(4, 6, 3), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(8)).eval()


@distribute_over_branches.fires_on(shape=(2, 4, 9, 8))
def pointwise_layer_behind_a_concatenation_of_different_inputs() -> nn.Module:
    return _TwoInputs(_cat, nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3), nn.Conv2d(16, 8, 1)).eval()


@distribute_over_branches.fires_on(shape=(2, 4, 9, 8))
def pointwise_layer_behind_a_difference_of_different_inputs() -> nn.Module:
    return _TwoInputs(torch.sub, nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 1)).eval()


@distribute_over_branches.fires_on(shape=(2, 4, 9, 8))
def pointwise_layer_behind_a_sum_of_different_inputs() -> nn.Module:
    return _TwoInputs(torch.add, nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 1)).eval()


class _ManyInputs(nn.Module):
    """A layer of each of several functions of x, beside each other, then a last layer."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.functions = (torch.relu, torch.sigmoid, torch.tanh, torch.sin)[:count]
        self.layers = nn.ModuleList(nn.Conv2d(2, 3, 3) for _ in self.functions)
        self.norm = nn.BatchNorm2d(3 * count)

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.layers, self.functions, strict=True)
        y: Tensor = self.norm(torch.cat([layer(function(x)) for layer, function in pairs], 1))
        return torch.relu(y)


@distribute_over_branches.fires_on(shape=(2, 2, 6, 5))
def batch_norm_behind_a_concatenation_of_three() -> nn.Module:
    return _ManyInputs(3).eval()


@distribute_over_branches.fires_on(shape=(2, 2, 6, 5))
def batch_norm_behind_a_concatenation_of_four() -> nn.Module:
    return _ManyInputs(4).eval()


@distribute_over_branches.fires_on(shape=(2, 4, 8, 8))
def pointwise_layer_behind_a_lateral_sum() -> nn.Module:
    """As in a feature pyramid (arXiv:1612.03144)."""
    small = nn.Conv2d(4, 16, 2, stride=2)
    return _TwoInputs(_top_down, small, nn.Conv2d(4, 16, 1), nn.Conv2d(16, 8, 1)).eval()


@distribute_over_branches.leaves_alone(shape=(2, 4, 8, 8), because="reads several positions")
def padded_layer_behind_a_lateral_sum() -> nn.Module:
    small = nn.Conv2d(4, 16, 2, stride=2)
    return _TwoInputs(_top_down, small, nn.Conv2d(4, 16, 1), nn.Conv2d(16, 8, 3, padding=1)).eval()


@distribute_over_branches.leaves_alone(shape=(2, 4, 9, 8), because="do not end where the branches end")
def convolution_whose_groups_read_both_branches() -> nn.Module:
    return _TwoInputs(_cat, nn.Conv2d(4, 6, 3), nn.Conv2d(4, 2, 3), nn.Conv2d(8, 8, 1, groups=2)).eval()


@distribute_over_branches.leaves_alone(shape=(2, 4, 9, 8), because="broadcasts")
def pointwise_layer_behind_a_sum_that_repeats_a_channel() -> nn.Module:
    return _TwoInputs(torch.add, nn.Conv2d(4, 6, 3), nn.Conv2d(4, 1, 3), nn.Conv2d(6, 4, 1)).eval()


@distribute_over_branches.leaves_alone(shape=(2, 4, 9, 8), because="would become a convolution of its own")
def pointwise_layer_behind_a_sum_of_scales() -> nn.Module:
    return _TwoInputs(torch.add, nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)).eval()


@distribute_over_branches.leaves_alone(shape=(2, 32, 28, 28), because="estimated slower")
def pointwise_layer_behind_a_narrow_sum() -> nn.Module:
    return _TwoInputs(torch.add, nn.Conv2d(32, 2, 1), nn.Conv2d(32, 2, 1), nn.Conv2d(2, 64, 1)).eval()


@distribute_over_branches.leaves_alone(shape=(2, 4, 9, 8), because="is also used elsewhere")
def norm_behind_a_concatenation_that_others_read() -> nn.Module:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            parts = torch.cat([self.a(x), self.b(torch.sigmoid(x))], 1)
            return torch.relu(self.norm(parts)) + parts

    return Shared().eval()
