"""Is each rearrangement the convolution that it says it is, and does it compute what PyTorch computes?"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from rgc.algebra import Conv, Linear, add, compose
from rgc.errors import GraphError, Refusal
from rgc.ir import Input, TensorType, Value
from rgc.operators import Slot
from rgc.rearrange import (
    Assign,
    BorderFill,
    Flip,
    Gather,
    Listed,
    Pad,
    Piece,
    PixelShuffle,
    PixelUnshuffle,
    Roll,
    Selection,
    Shuffle,
    Slice,
    Subsample,
    ZeroChannels,
    selecting,
)


def integers(seed: int, *shape: int) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).double()


def typed(op: Any, x: Tensor) -> tuple[int, ...]:
    """The shape that the operator says its result has."""
    value = Value(Input("x"), (), TensorType(tuple(x.shape), x.dtype), name="x")
    result = op(value).type
    assert result is not None and result.dtype == x.dtype
    return tuple(result.shape)


def assert_is_its_convolution(op: Linear, x: Tensor, expected: Tensor) -> None:
    """The operator, its type and its convolution all say ``expected``."""
    assert torch.equal(op.evaluate(x), expected)
    assert typed(op, x) == tuple(expected.shape)
    assert op.spatial is not None
    conv = op.as_conv(x.shape[x.dim() - op.spatial - 1], op.spatial)
    assert torch.equal(conv.evaluate(x), expected)


# --- pads and crops ----------------------------------------------------------------------------------------------


@given(data=st.data(), rank=st.integers(1, 3), value=st.sampled_from((None, 3.0, "per channel")))
def test_a_pad_is_a_convolution_that_pads_or_crops(data: st.DataObject, rank: int, value: Any) -> None:
    size = tuple(data.draw(st.integers(4, 6)) for _ in range(rank))
    sides = tuple((data.draw(st.integers(-2, 3)), data.draw(st.integers(-2, 3))) for _ in range(rank))
    assume(all(n + b + a > 0 for n, (b, a) in zip(size, sides, strict=True)))
    x = integers(1, 2, 3, *size)
    amounts = [amount for pair in reversed(sides) for amount in pair]
    if value == "per channel":
        v = integers(2, 3)
        shifted = x - v.reshape(3, *[1] * rank)
        assert_is_its_convolution(Pad(sides, value=v), x, F.pad(shifted, amounts) + v.reshape(3, *[1] * rank))
        return
    constant = None if value is None else torch.tensor([value]).double()
    assert_is_its_convolution(Pad(sides, value=constant), x, F.pad(x, amounts, value=value))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("sides", [((1, 2),), ((2, 0), (1, 3)), ((1, 1), (0, 2), (2, 1))])
def test_a_pad_by_copies_is_a_convolution_that_pads_by_copies(mode: Any, sides: Any) -> None:
    x = integers(1, 2, 3, *range(4, 4 + len(sides)))
    amounts = [amount for pair in reversed(sides) for amount in pair]
    assert_is_its_convolution(Pad(sides, mode), x, F.pad(x, amounts, mode=mode))


def test_a_crop_is_a_view_and_a_pad_is_none() -> None:
    x = integers(1, 1, 2, 5, 6)
    crop, both = Pad(((-1, 0), (-2, -1))), Pad(((-1, 1), (0, 0)))
    assert crop.is_view and crop.evaluate(x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert not both.is_view and crop.label == "crop -1,0x-2,-1" and both.label == "pad -1,1x0"


def test_a_pad_with_infinity_keeps_the_inside_finite_and_is_no_convolution() -> None:
    x, op = integers(1, 1, 2, 3, 3), Pad(((1, 1), (1, 1)), value=torch.tensor([-math.inf]).double())
    assert torch.equal(op.evaluate(x), F.pad(x, (1, 1, 1, 1), value=-math.inf))
    with pytest.raises(Refusal, match="pads with a value that is not finite"):
        op.as_conv(2, 2)


@pytest.mark.parametrize("build", [
    lambda: Pad(((1, 1),), "reflect", torch.zeros(1)), lambda: Pad(((1, 1),), value=torch.zeros(1, 2)),
    lambda: Subsample((0,), ((0, 0),)), lambda: Subsample((2,), ((-1, 0),)), lambda: Subsample((2, 2), ((0, 0),)),
    lambda: BorderFill(((0, 0),), torch.zeros(1)), lambda: BorderFill(((1, -1),), torch.zeros(1)),
    lambda: BorderFill(((1, 1),), torch.zeros(2, 1)), lambda: Gather(Slice(3, 2), 4, 1),
    lambda: PixelUnshuffle(2, ((0, 0), (0, 1), (1, 0), (1, 0))),
])  # fmt: skip
def test_what_makes_no_sense_cannot_be_built(build: Any) -> None:
    with pytest.raises(GraphError):
        build()


def test_a_pad_by_copies_that_crops_the_other_side_is_refused() -> None:
    with pytest.raises(Refusal, match="crops one side and pads the other by reflect"):
        Pad(((-1, 1),), "reflect").as_conv(2, 1)


@given(data=st.data(), rank=st.integers(1, 3))
def test_a_subsampling_is_a_strided_convolution(data: st.DataObject, rank: int) -> None:
    size = tuple(data.draw(st.integers(4, 8)) for _ in range(rank))
    step = tuple(data.draw(st.integers(1, 3)) for _ in range(rank))
    crop = tuple((data.draw(st.integers(0, 2)), data.draw(st.integers(0, 1))) for _ in range(rank))
    x = integers(1, 2, 3, *size)
    chosen = tuple(slice(b, -a if a else None, s) for (b, a), s in zip(crop, step, strict=True))
    assert_is_its_convolution(Subsample(step, crop), x, x[:, :, *chosen])


# --- channels ----------------------------------------------------------------------------------------------------

SELECTIONS: list[tuple[Selection, Any]] = [
    (Slice(1, 5), lambda x: x[:, 1:5]),
    (Slice(None, -2, 2), lambda x: x[:, :-2:2]),
    (Piece("chunk", 4, 1), lambda x: x.chunk(4, 1)[1]),
    (Piece("split", 5, 2), lambda x: x.split(5, 1)[2]),
    (Piece("split", (3, 4, 5), 1), lambda x: x.split([3, 4, 5], 1)[1]),
    (Piece("tensor_split", (2, 7), 1), lambda x: x.tensor_split((2, 7), 1)[1]),
    (Piece("tensor_split", 5, 0), lambda x: x.tensor_split(5, 1)[0]),
    (Listed((3, 0, 3, 11)), lambda x: x[:, [3, 0, 3, 11]]),
    (Flip(), lambda x: x.flip(1)),
    (Roll(2), lambda x: torch.roll(x, 2, 1)),
    (Roll(-7), lambda x: torch.roll(x, -7, 1)),
    (Shuffle(3), lambda x: nn.ChannelShuffle(3)(x)),
    (ZeroChannels(2, 3), lambda x: torch.cat([torch.zeros_like(x[:, :2]), x, torch.zeros_like(x[:, :3])], 1)),
]  # fmt: skip


@pytest.mark.parametrize(("selection", "expected"), SELECTIONS, ids=lambda each: getattr(each, "label", ""))
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_selection_of_channels_is_a_1x1_convolution(selection: Selection, expected: Any, axes: int) -> None:
    x = integers(1, 2, 12, *range(2, 2 + axes))
    op = Gather(selection, 12, axes)
    assert_is_its_convolution(op, x, expected(x))
    assert op.channels == (12, expected(x).shape[1])
    assert op.is_view == (expected(x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr())


def test_features_are_selected_from_the_last_axis() -> None:
    x = integers(1, 2, 5, 8)
    assert_is_its_convolution(Gather(Slice(2, None), 8, 0), x, x[..., 2:])
    assert_is_its_convolution(Gather(ZeroChannels(0, 1), 8, 0), x, F.pad(x, (0, 1)))


@pytest.mark.parametrize(("index", "groups"), [
    ((1, 0, 3, 2, 5, 4), 3), ((0, 1, 2, 3, 4, 5), 6), ((5, 4, 3, 2, 1, 0), 1), ((2, 0, 1, 5, 3, 4), 2), ((0, 3), 2),
    ((0, -1, 3, -1, -1, 5), 3), ((0, 0, -1, -1, 2, 2, 3, -1, -1, -1, 5, 5), 6), ((0, 1, 2), 1),
])  # fmt: skip
def test_a_selection_has_the_groups_that_it_keeps(index: tuple[int, ...], groups: int) -> None:
    conv = selecting(index, 6, 1)
    assert conv.groups == groups
    x = integers(1, 1, 6, 4)
    padded = torch.cat([x, torch.zeros(1, 1, 4)], 1)  # index -1 is the last
    assert torch.equal(conv.evaluate(x), padded[:, list(index)])


def test_a_selection_of_many_channels_composes_with_a_convolution_fast() -> None:
    conv = Conv(torch.ones(2048, 2048, 1, 1, dtype=torch.float64))
    merged = compose(Gather(Flip(), 2048, 2), conv)
    assert isinstance(merged, Conv) and merged.weight.shape == (2048, 2048, 1, 1)


def test_other_channels_than_its_own_are_an_error() -> None:
    op = Gather(Slice(0, 2), 4, 2)
    with pytest.raises(GraphError, match="expects 4 channels, got 8"):
        op.as_conv(8, 2)
    with pytest.raises(GraphError, match="expects 4 channels, got 8"):
        typed(op, integers(1, 2, 8, 3, 3))


@pytest.mark.parametrize("op", [
    Gather(Flip(), 4, 1), Pad(((1, 1),)), Subsample((2,), ((0, 0),)),
])  # fmt: skip
def test_other_axes_than_its_own_are_refused(op: Linear) -> None:
    with pytest.raises(Refusal, match="act on different axes"):
        op.as_conv(4, 2)
    with pytest.raises(Refusal, match="act on different axes"):
        PixelUnshuffle(2).as_conv(4, 1)


# --- between channels and space ----------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_a_pixel_unshuffle_is_a_strided_convolution(factor: int) -> None:
    x = integers(1, 2, 3, 2 * factor, 3 * factor)
    assert_is_its_convolution(PixelUnshuffle(factor), x, nn.PixelUnshuffle(factor)(x))


@pytest.mark.parametrize("places", [((0, 0), (1, 0), (0, 1), (1, 1)), ((1, 1), (0, 1), (1, 0), (0, 0))])
def test_a_space_to_depth_of_slices_is_a_strided_convolution(places: Any) -> None:
    x = integers(1, 2, 3, 6, 4)
    expected = torch.cat([x[..., row::2, column::2] for row, column in places], 1)
    assert_is_its_convolution(PixelUnshuffle(2, places), x, expected)


def test_a_pixel_unshuffle_before_a_padded_convolution_is_one_at_every_size() -> None:
    conv = Conv(integers(3, 4, 12, 3, 3), integers(4, 4), padding=1)
    merged = compose(conv, PixelUnshuffle(2).as_conv_before(3, 2))
    for size in ((2, 2), (4, 6), (8, 10)):
        x = integers(5, 2, 3, *size)
        assert torch.equal(merged.evaluate(x), conv.evaluate(F.pixel_unshuffle(x, 2)))


def test_a_pixel_shuffle_is_pytorchs() -> None:
    x = integers(1, 2, 8, 3, 4)
    assert torch.equal(PixelShuffle(2).evaluate(x), nn.PixelShuffle(2)(x))
    assert typed(PixelShuffle(2), x) == (2, 2, 6, 8)


def test_sizes_that_are_no_blocks_are_an_error() -> None:
    with pytest.raises(GraphError, match="8 channels are no blocks of 3x3"):
        typed(PixelShuffle(3), integers(1, 2, 8, 3, 4))
    with pytest.raises(GraphError, match="does not divide 3x4"):
        typed(PixelUnshuffle(2), integers(1, 2, 8, 3, 4))


# --- assignments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.tensor([3.0]).double(), integers(9, 4)], ids=["number", "per channel"])
@pytest.mark.parametrize("widths", [((1, 1), (1, 1)), ((0, 2), (0, 0)), ((2, 0), (1, 3))])
def test_a_border_fill_assigns_slabs_of_a_copy(widths: Any, value: Tensor) -> None:
    x = integers(1, 2, 4, 6, 7)
    before, y = x.clone(), x.clone()
    (top, bottom), (left, right) = widths
    filling = value.view(1, -1, 1, 1)
    y[:, :, :top], y[:, :, :, :left] = filling, filling
    y[:, :, 6 - bottom :], y[:, :, :, 7 - right :] = filling, filling
    op = BorderFill(widths, value)
    assert torch.equal(op.evaluate(x), y) and torch.equal(x, before) and typed(op, x) == (2, 4, 6, 7)


def test_an_assignment_fills_its_inputs_in_and_leaves_its_first_alone() -> None:
    x, mask, v = integers(1, 2, 4, 5), integers(2, 2, 4, 5) > 0, integers(3, 4, 1)
    before, y = x.clone(), x.clone()
    y[mask] = 2.0
    assert torch.equal(Assign(Slot(1), 2.0).evaluate(x, mask), y)
    y = x.clone()
    y[:, :, 1:3] = v
    assert torch.equal(Assign((slice(None), slice(None), slice(1, 3)), Slot(1)).evaluate(x, v), y)
    y = x.clone()
    y[:, 2] = 1.5
    assert torch.equal(Assign((slice(None), Slot(1)), 1.5).evaluate(x, 2), y)
    assert torch.equal(x, before) and typed(Assign(Ellipsis, 1.0), x) == (2, 4, 5)


# --- with the laws of the algebra --------------------------------------------------------------------------------


def test_a_shortcut_without_parameters_joins_the_convolution_beside_it() -> None:
    x = integers(1, 2, 4, 7, 8)
    conv = Conv(integers(2, 8, 4, 3, 3), integers(3, 8), stride=2, padding=1)
    shortcut = compose(Gather(ZeroChannels(2, 2), 4, 2), Subsample((2, 2), ((0, 0), (0, 0))).as_conv(4, 2))
    merged = add(conv, shortcut)
    expected = conv.evaluate(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
    assert isinstance(merged, Conv) and merged.kernel == (3, 3) and torch.equal(merged.evaluate(x), expected)


def test_branches_of_cropped_inputs_join_the_square_kernel() -> None:
    x = integers(1, 2, 4, 7, 8)
    square, vertical = Conv(integers(2, 4, 4, 3, 3)), Conv(integers(3, 4, 4, 3, 1))
    merged = add(square, compose(vertical, Pad(((0, 0), (-1, -1))).as_conv(4, 2)))
    expected = square.evaluate(x) + vertical.evaluate(x[..., 1:-1])
    assert isinstance(merged, Conv) and merged.kernel == (3, 3) and torch.equal(merged.evaluate(x), expected)
    assert not merged.is_padded
