"""What only moves elements is part of the convolution beside it: W (P x) = (W P) x, P (W x + b) = (P W) x + P b.

P is a pad, a crop, a subsampling, a selection or permutation of channels, a space-to-depth. A selection behind a
convolution leaves out its other rows; one in front of it adds columns of zeros, so a slice there, which is a view and
costs nothing, stays.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from rgc import (
    AvgPool,
    BatchNorm,
    Conv,
    Gather,
    Linear,
    Pad,
    PixelShuffle,
    PixelUnshuffle,
    Rearrangement,
    Scale,
    Value,
    compose,
    require,
    rewrite,
)


@rewrite(lambda x, move, linear: linear(move(x)))
def merge_rearrangement(x: Value, move: Rearrangement, linear: Conv | AvgPool) -> Value:
    slices = isinstance(move, Gather) and move.is_view
    require(not slices, f"{move.label} is a view: to read it costs nothing, to read all channels does")
    merged = _before(linear, move, x)
    _require_gain(merged, linear, move)
    return merged(x)


@merge_rearrangement.also(lambda x, linear, move: move(linear(x)))
def merge_rearrangement_after(x: Value, linear: Conv, move: Rearrangement) -> Value:
    merged = compose(move, linear, _size(x, move))
    _require_gain(merged, linear, move)
    return merged(x)


@merge_rearrangement.also(lambda x, first, pad, second: second(pad(first(x))))
def merge_around_a_pad(x: Value, first: Conv | BatchNorm | Scale, pad: Pad, second: Conv) -> Value:
    require(second.spatial == pad.spatial, f"{second.label} and {pad.label} act on different axes")
    return compose(compose(second, pad.as_conv(second.in_channels, pad.spatial)), first, _size(x, pad))(x)


@merge_rearrangement.also(lambda x, pad, first, second: second(first(pad(x))))
def merge_behind_a_pad(x: Value, pad: Pad, first: Conv | BatchNorm | Scale, second: Conv | AvgPool) -> Value:
    """Two layers that are one only where the padding comes before both."""
    spatial, shape = pad.spatial, x.tensor_type.shape
    channels = shape[len(shape) - spatial - 1]
    inner = compose(first.as_conv(channels, spatial), pad.as_conv(channels, spatial), _size(x, pad))
    return compose(second, inner, _size(x, pad))(x)


@merge_rearrangement.also(lambda x, move: move(x))
def drop_rearrangement(x: Value, move: Gather) -> Value:
    require(move.is_identity, f"{move.label} moves channels")
    return x


@merge_rearrangement.also(lambda x, shuffle, back: back(shuffle(x)))
def drop_shuffle_that_is_undone(x: Value, shuffle: PixelShuffle, back: PixelUnshuffle) -> Value:
    undone = shuffle.factor == back.factor and back.places is None
    require(undone, f"{back.label} does not undo {shuffle.label}")
    return x


def _before(linear: Linear, move: Rearrangement, x: Value) -> Linear:
    """``move`` then ``linear``, by the number of channels of ``x``: not every rearrangement says it."""
    spatial, shape = move.spatial, x.tensor_type.shape
    assert spatial is not None  # a rearrangement names its axes
    channels = shape[len(shape) - spatial - 1]
    if not isinstance(move, PixelUnshuffle):
        return compose(linear, move.as_conv(channels, spatial), _size(x, move))
    merged = compose(linear, move.as_conv_before(channels, spatial), _size(x, move))
    return _without_unused_padding(merged, move.factor)


def _size(x: Value, move: Rearrangement) -> tuple[int, ...] | None:
    return None if move.spatial is None else x.tensor_type.size(move.spatial)


def _require_gain(merged: Linear, linear: Conv | AvgPool, move: Rearrangement) -> None:
    """What PyTorch's convolution cannot do runs as a layer of its own, which is no better than what is there."""
    own = linear.extras if isinstance(linear, Conv) else ()
    more = [extra for extra in merged.extras if extra not in own] if isinstance(merged, Conv) else []
    require(not more, f"{move.label} beside {linear.label} would take another layer ({', '.join(more)})")


def _without_unused_padding(linear: Linear, factor: int) -> Linear:
    """Padding behind that no window reaches at sizes which ``factor`` divides; at others there is no such model."""
    if not isinstance(linear, Conv) or linear.size is not None:
        return linear
    sides = zip(linear.padding, linear.dilation, linear.kernel, strict=True)
    padding = tuple((b, a - max((b + a - d * (k - 1) - 1) % factor, 0)) for (b, a), d, k in sides)
    return replace(linear, padding=padding)


class _Cropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)[:, :, 1:-1, 1:-1]
        return y.relu()


class _Shortcut(nn.Module):
    """The shortcut without parameters of a residual network: every second position, channels of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        return y.relu()


class _Half(nn.Module):
    def __init__(self, both: bool) -> None:
        super().__init__()
        self.conv, self.both = nn.Conv2d(4, 8, 3), both

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.conv(x).chunk(2, 1)
        return left * torch.sigmoid(right) if self.both else torch.sigmoid(right)


class _OfHalf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(torch.relu(x)[:, :2])
        return y


@merge_rearrangement.fires_on(shape=(2, 4, 9, 8))
def padding_layer_before_a_convolution() -> nn.Module:
    return nn.Sequential(nn.ZeroPad2d((1, 1, 2, 2)), nn.Conv2d(4, 4, 3), nn.ReLU()).eval()


@merge_rearrangement.fires_on(shape=(2, 4, 9, 8))
def convolution_whose_output_is_cropped() -> nn.Module:
    return _Cropped().eval()


@merge_rearrangement.fires_on(shape=(2, 4, 9, 8))
def convolution_of_a_shortcut_without_parameters() -> nn.Module:
    return _Shortcut().eval()


@merge_rearrangement.fires_on(shape=(2, 4, 9, 8))
def half_of_the_channels_of_a_convolution() -> nn.Module:
    return _Half(both=False).eval()


@merge_rearrangement.fires_on(shape=(2, 3, 8, 12))
def space_to_depth_stem() -> nn.Module:
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 8, 3, padding=1), nn.ReLU()).eval()


@merge_rearrangement.fires_on(shape=(2, 4, 9, 8))
def pad_of_one_side_between_convolutions() -> nn.Module:
    first = nn.Conv2d(4, 8, 1, bias=False)
    return nn.Sequential(first, nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(8, 4, 3, stride=2), nn.ReLU()).eval()


@merge_rearrangement.fires_on(shape=(2, 2, 9))
def batch_norm_before_a_pad_that_crops_the_other_side() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(2), nn.ZeroPad1d((-1, 3)), nn.Conv1d(2, 4, 1), nn.ReLU()).eval()


@merge_rearrangement.fires_on(shape=(2, 1, 20))
def pad_before_two_strided_convolutions_the_second_of_which_pads() -> nn.Module:
    convs = nn.Conv1d(1, 4, 5, stride=2, bias=False), nn.Conv1d(4, 4, 5, stride=2, padding=4)
    return nn.Sequential(nn.ZeroPad1d((4, 5)), *convs, nn.ReLU()).eval()


@merge_rearrangement.leaves_alone(shape=(2, 4, 9, 8), because="border ring")
def pad_before_two_convolutions_that_is_too_narrow_for_both() -> nn.Module:
    convs = nn.Conv2d(4, 4, 5, bias=False), nn.Conv2d(4, 4, 3, padding=1)
    return nn.Sequential(nn.ZeroPad2d((3, 2, 3, 2)), *convs, nn.ReLU()).eval()


@merge_rearrangement.fires_on(shape=(2, 8, 5, 6))
def pixel_shuffle_that_is_undone() -> nn.Module:
    return nn.Sequential(nn.PixelShuffle(2), nn.PixelUnshuffle(2), nn.Sigmoid()).eval()


@merge_rearrangement.leaves_alone(shape=(2, 16, 6, 6), because="does not undo")
def pixel_shuffles_of_two_factors() -> nn.Module:
    return nn.Sequential(nn.PixelShuffle(4), nn.PixelUnshuffle(2), nn.Sigmoid()).eval()


@merge_rearrangement.leaves_alone(shape=(2, 4, 9, 8), because="would take another layer (pad)")
def pad_of_one_side_before_a_convolution() -> nn.Module:
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 4, 3, stride=2), nn.ReLU()).eval()


@merge_rearrangement.leaves_alone(shape=(2, 4, 9, 8), because="is also used elsewhere")
def both_halves_of_the_channels_of_a_convolution() -> nn.Module:
    return _Half(both=True).eval()


@merge_rearrangement.leaves_alone(shape=(2, 4, 9, 8), because="would take another layer (ones)")
def padding_layer_behind_a_convolution_with_bias() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.ZeroPad2d(1), nn.ReLU()).eval()


@merge_rearrangement.leaves_alone(shape=(2, 4, 9, 8), because="is a view")
def convolution_of_half_the_channels() -> nn.Module:
    return _OfHalf().eval()


@merge_rearrangement.leaves_alone(shape=(2, 4, 9, 8), because="border ring")
def padded_convolution_of_a_cropped_input() -> nn.Module:
    return nn.Sequential(nn.ZeroPad2d(-1), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()).eval()
