"""Two convolutions in a row are one: kernel extent d1 (k1 - 1) + s1 d2 (k2 - 1) + 1, padding p1 + s1 p2, stride s1 s2.

Exact iff no window of the first, at a position that the second reads outside its output, touches real input: always
where the second pads nothing, never for a padded 3x3 after a 3x3 that pads to the same size. A bias between a 1xk and
a kx1 takes an input channel of ones, of which the 1xk passes on its middle tap alone.
"""

from __future__ import annotations

from typing import Annotated

from torch import nn

from rgc import AvgPool, Conv, Value, compose, rewrite


def has_several_taps(op: Conv | AvgPool) -> bool:
    """Does the window span more than one position?"""
    return isinstance(op, AvgPool) or any(k > 1 for k in op.kernel)


Window = Annotated[Conv | AvgPool, has_several_taps]


@rewrite(lambda x, first, second: second(first(x)))
def merge_stage(x: Value, first: Window, second: Window) -> Value:
    channels = x.tensor_type.shape[-first.spatial - 1]  # of which two poolings in a row say nothing
    size = x.tensor_type.size(first.spatial)
    return compose(second, first.at(size).as_conv(channels, first.spatial), size)(x)


@merge_stage.fires_on(shape=(2, 3, 9, 8))
def padding_once_before_both() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=2), nn.Conv2d(64, 4, 3)).eval()


@merge_stage.fires_on(shape=(2, 3, 9, 9))
def vertical_then_horizontal_kernel() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, (3, 1), padding=(1, 0)), nn.Conv2d(16, 4, (1, 3))).eval()


@merge_stage.fires_on(shape=(2, 3, 9, 9))
def two_average_poolings() -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(2, 1), nn.AvgPool2d(2, 1)).eval()


@merge_stage.fires_on(shape=(2, 3, 9, 9))
def biased_horizontal_then_vertical_kernel_that_both_keep_the_size() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 64, (1, 3), padding=(0, 1)), nn.Conv2d(64, 4, (3, 1), padding=(1, 0))).eval()


@merge_stage.leaves_alone(shape=(2, 64, 16, 16), because="estimated slower")
def biased_bands_of_each_channel_which_a_channel_of_ones_would_make_dense() -> nn.Module:
    bands = nn.Conv2d(64, 64, (1, 5), padding=(0, 2), groups=64), nn.Conv2d(64, 64, (5, 1), padding=(2, 0), groups=64)
    return nn.Sequential(*bands).eval()


@merge_stage.leaves_alone(shape=(2, 3, 9, 9), because="border ring")
def padded_convolution_after_padded_convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)).eval()
