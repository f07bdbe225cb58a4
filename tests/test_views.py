"""Does an affine map along the channels commute with every call that is said to carry them, and with no other?"""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rgc.algebra import Conv, Linear, Scale
from rgc.errors import Refusal
from rgc.ir import TensorType
from rgc.operators import AvgPool, BatchNorm, ChannelMean, Identity, Opaque, Slot, Structural
from rgc.views import (
    carried_axis,
    carrying_axis,
    inverts,
    is_permutation,
    is_reshape,
    relocated,
    takes_shape_of_another,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def call(target: Any, *args: Any, **kwargs: Any) -> Structural:
    return Structural(target, (Slot(0), *args), tuple(kwargs.items()))


def type_of(x: Tensor, fixed: bool = False) -> TensorType:
    return TensorType(tuple(x.shape), x.dtype, fixed)


CALLS = [
    call("permute", 0, 2, 3, 1), call("permute", (0, 3, 1, 2)), call(torch.permute, dims=(3, 2, 1, 0)),
    call(torch.ops.aten.permute.default, [0, 2, 1, 3]), call("transpose", 1, -1), call(torch.transpose, 2, 3),
    call("swapaxes", 0, 1), call(torch.movedim, 1, 3), call("moveaxis", -1, 1), call("flatten", 2),
    call("flatten", 0, 1),
    call(torch.flatten, start_dim=1, end_dim=2), call("flatten", 1, 1), call(torch.ops.aten.flatten.using_ints, 2, 3),
    call(nn.Flatten(2)), call(nn.Flatten(1, 2)), call("unflatten", 3, (2, 3)), call("unflatten", 1, (1, -1)),
    call(nn.Unflatten(1, (1, 4))), call("unsqueeze", 1), call(torch.unsqueeze, -1), call("contiguous"),
    call(torch.clone, memory_format=torch.contiguous_format), call("flip", 2, 3), call("flip", 1, 2),
    call(torch.flip, dims=(3,)), call("roll", 1, 2), call(torch.roll, (1, 2), dims=(2, 3)), call("select", 2, 0),
    call(torch.select, -1, 1), call("narrow", 2, 1, 2), call(torch.ops.aten.slice.Tensor, 2, 1, 3),
    call(torch.ops.aten.select.int, 1, 0), call(operator.getitem, (slice(None), 0)),
    call("mean", -1), call("mean", (2, 3), True), call(torch.mean, dim=[1, 2]),
    call(torch.ops.aten.mean.dim, [2], True), call(nn.AdaptiveAvgPool2d(2)),
    call(nn.functional.adaptive_avg_pool2d, (1, 2)), call("reshape", -1, 5, 6), call("view", (2, 20, 6)),
    call(torch.reshape, (-1, 6)), call("reshape", -1, 4, 30), call("reshape", 8, 5, 6),
]  # fmt: skip
X = random(2, 4, 5, 6)


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("view", CALLS, ids=lambda view: f"{view.label}{view.args[1:]}")
def test_a_map_along_an_axis_commutes_with_a_call_that_carries_it(view: Structural, axis: int, fixed: bool) -> None:
    try:
        place = carried_axis(view, type_of(X, fixed), axis)
    except Refusal:
        return  # the test below says where it must not refuse
    weight, bias = random(X.shape[axis], X.shape[axis], seed=1), random(X.shape[axis], seed=2)

    def along(tensor: Tensor, where: int) -> Tensor:
        return (tensor.movedim(where, -1) @ weight.T + bias).movedim(-1, where)

    torch.testing.assert_close(view.evaluate(along(X, axis)), along(view.evaluate(X), place), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("view", "axis", "expected"), [
    (call("permute", 0, 2, 3, 1), 1, 3), (call("transpose", 1, 2), 1, 2), (call("flatten", 2), 1, 1),
    (call("flatten", 0, 1), 3, 2), (call("flatten", 0, 2), 3, 1), (call("unsqueeze", 1), 1, 2),
    (call("select", 2, 0), 3, 2),
    (call("mean", (2, 3)), 1, 1), (call("mean", 1), 3, 2), (call(nn.AdaptiveAvgPool2d(1)), 1, 1),
    (call("reshape", (-1, 6)), 3, 1), (call("roll", 1, 2), 1, 1), (call("flip", 2), 3, 3),
])  # fmt: skip
def test_the_channels_are_found_again(view: Structural, axis: int, expected: int) -> None:
    assert carried_axis(view, type_of(X), axis) == expected


def test_a_mean_over_one_axis_leaves_the_others() -> None:
    assert [carried_axis(ChannelMean(5, 1), type_of(X), axis) for axis in (0, 1, 3)] == [0, 1, 3]
    with pytest.raises(Refusal, match="mean is not known to leave axis 2"):
        carried_axis(ChannelMean(5, 1), type_of(X), 2)


def test_pooling_of_one_axis_leaves_the_channels_before_it() -> None:
    pool, x = call(nn.AdaptiveAvgPool1d(2)), random(2, 4, 5)
    assert carried_axis(pool, type_of(x), 1) == 1
    with pytest.raises(Refusal):
        carried_axis(pool, type_of(x), 2)


@pytest.mark.parametrize(("index", "expected"), [
    ((slice(None), slice(None), 0), 1), ((slice(None), 0), None), ((Ellipsis, 0), 1), ((0,), 0),
    ((None, slice(None)), 2),
    ((slice(None), slice(1, 3)), None), ((slice(None), slice(None), slice(1, 3)), 1), ((Ellipsis, None), 1),
    ((slice(None), slice(None), [0, 2]), None), (slice(None), 1),
])  # fmt: skip
def test_an_index_carries_the_axes_that_it_takes_whole(index: Any, expected: int | None) -> None:
    view = call(operator.getitem, index)
    if expected is None:
        with pytest.raises(Refusal, match="is not known to leave axis 1"):
            carried_axis(view, type_of(X), 1)
        return
    assert carried_axis(view, type_of(X), 1) == expected
    weight = random(4, 4, seed=1)
    moved = (X.movedim(1, -1) @ weight.T).movedim(-1, 1)[index]
    torch.testing.assert_close(moved, (X[index].movedim(expected, -1) @ weight.T).movedim(-1, expected))


@pytest.mark.parametrize(("view", "axis"), [
    (call("flatten", 1), 1), (call("flatten"), 3), (call("roll", 3), 1), (call("flip", 1, 2), 1), (call("mean"), 1),
    (call("mean", 1), 1), (call("mean", (2, 3), dtype=torch.float64), 1), (call("squeeze"), 1), (call("sum", 2), 1),
    (call(nn.AdaptiveAvgPool2d(1)), 2), (call(nn.PixelShuffle(2)), 1), (call("reshape", -1, 30), 3),
    (call("movedim", (1, 2), (2, 3)), 1), (call("unflatten", 1, (2, 2)), 1), (call("chunk", 2, 1), 1),
])  # fmt: skip
def test_calls_that_change_the_axis_or_scale_a_constant_are_refused(view: Structural, axis: int) -> None:
    for fixed in (False, True):
        with pytest.raises(Refusal, match=f"{view.label} is not known to leave axis {axis} of float64"):
            carried_axis(view, type_of(X, fixed), axis)


def test_what_holds_at_one_size_only_is_refused_at_every_size() -> None:
    pooled = random(2, 4, 1, 1)
    for view, axis, expected in ((call("squeeze", -1), 1, 1), (call("reshape", (-1, 4, 1)), 1, 1)):
        assert carried_axis(view, type_of(pooled, fixed=True), axis) == expected
        with pytest.raises(Refusal, match="at every size"):
            carried_axis(view, type_of(pooled), axis)


@pytest.mark.parametrize("op", [
    Scale(random(4), random(4, seed=1), 2), BatchNorm(random(4), random(4).abs() + 0.1, random(4), None, 1e-3, 2),
    Conv(random(6, 2, 1, 1), random(6), groups=2), ChannelMean(4, 2), Conv(random(6, 4, 1, 1), dilation=2),
])  # fmt: skip
def test_a_relocated_operator_does_the_same_along_the_channels_at_their_new_place(op: Linear) -> None:
    expected = op.evaluate(X)
    for order in ((0, 2, 3, 1), (0, 1, 2, 3)):
        moved = relocated(op, 3 - order.index(1)).evaluate(X.permute(order))
        torch.testing.assert_close(moved, expected.permute(order), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("op", "reason"), [
    (Conv(random(4, 4, 3, 3)), "reads more than one position"), (Conv(random(4, 4, 1, 1), stride=2), "more than one"),
    (Conv(random(4, 4, 1, 1), padding=1), "more than one"), (AvgPool((2, 2), (1, 1), (0, 0)), "neither operator says"),
    (Conv(random(4, 4, 1, 1), transposed=True), "more than one"),
    (Conv(random(4, 4, 1, 1), random(4, 5, 6), size=(5, 6)), "holds at one size only"),
    (BatchNorm(random(4), random(4).abs(), None, None, 1e-3, 2, training=True), "batch statistics"),
])  # fmt: skip
def test_what_reads_other_positions_is_not_relocated(op: Linear, reason: str) -> None:
    with pytest.raises(Refusal, match=reason):
        relocated(op, 0)


def test_no_convolution_has_four_spatial_axes() -> None:
    with pytest.raises(Refusal, match="no convolution has 4 spatial axes"):
        relocated(Conv(random(4, 4)), 4)


@pytest.mark.parametrize(("first", "second", "undone"), [
    (call("permute", 0, 2, 3, 1), call(torch.permute, (0, 3, 1, 2)), True),
    (call("permute", 0, 2, 3, 1), call("permute", 0, 2, 3, 1), False),
    (call("transpose", 1, 2), call("transpose", -2, -3), True), (call("movedim", 1, 3), call("movedim", 3, 1), True),
    (call("permute", 0, 2, 3, 1), call("movedim", -1, 1), True), (call("transpose", 1, 2), call("flatten", 1), False),
    (call("permute", dims=(0, 1, 2, 3)), call("permute", 0, 1, 2, 3), False),
    (call("movedim", (1, 2), (2, 1)), call("transpose", 1, 2), False),
])  # fmt: skip
def test_two_permutations_undo_each_other(first: Structural, second: Structural, undone: bool) -> None:
    assert inverts(second, first, 4) is undone
    if undone:
        assert torch.equal(second.evaluate(first.evaluate(X)), X)


def test_a_transpose_of_a_matrix_undoes_itself_and_of_a_vector_is_nothing() -> None:
    assert inverts(call("t"), call("transpose", 0, 1), 2) and inverts(call("permute", 1, 0), call(torch.t), 2)
    assert not inverts(call("t"), call("permute", 0, 1), 2)
    assert inverts(call("t"), call("t"), 1) and not inverts(call("t"), call("t"), 3)  # PyTorch refuses three axes


def test_the_kinds_of_views_are_told_apart() -> None:
    assert is_reshape(call("flatten", 1)) and is_reshape(call(nn.Flatten())) and not is_reshape(call("permute", 0, 1))
    assert (
        is_permutation(call("transpose", 0, 1)) and is_permutation(call("t")) and not is_permutation(call("flatten", 1))
    )
    assert not is_reshape(Identity()) and not is_permutation(Identity())
    assert takes_shape_of_another(Opaque("reshape_as", (Slot(0), Slot(1))))
    assert not takes_shape_of_another(Opaque("reshape_as", (Slot(1), Slot(0))))
    assert not takes_shape_of_another(Opaque("reshape", (Slot(0), Slot(1))))


def test_an_axis_is_found_where_the_call_has_it_from() -> None:
    given = TensorType((2, 3, 4, 5), torch.float32)
    call = Structural("permute", (Slot(0), 0, 2, 3, 1))
    assert [carrying_axis(call, given, axis) for axis in range(4)] == [0, 2, 3, 1]
    assert carrying_axis(Structural("flatten", (Slot(0), 1)), given, 1) is None
