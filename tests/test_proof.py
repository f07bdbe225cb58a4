"""Does the check of one firing see every difference, at sizes that reach every border, and explain rounding only?"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from rgc import (
    Activation,
    Add,
    AvgPool,
    BatchNorm,
    Conv,
    Interval,
    Linear,
    MaxPool,
    Multiply,
    NotEquivalentError,
    Scale,
    Structural,
    Upsample,
    Value,
)
from rgc.ir import Input, Operator, TensorType
from rgc.operators import Slot
from rgc.proof import TOLERANCE, check_firing, relative_difference


def source(*shape: int, dtype: torch.dtype = torch.float32) -> Value:
    return Value(Input("x"), (), TensorType(shape or (1, 4, 32, 32), dtype), name="x")


def conv(kernel: int = 3, seed: int = 0, **options: Any) -> Conv:
    generator = torch.Generator().manual_seed(seed)
    weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 4, kernel, kernel), (4,))
    )
    return Conv(weight, bias, **options)


def refused(old: Operator, new: Operator, x: Value | None = None) -> bool:
    x = x or source()
    try:
        check_firing(old(x), new(x), [x])
    except NotEquivalentError:
        return True
    return False


def test_equal_operators_do_not_differ_at_all() -> None:
    x, op = source(), conv()
    assert check_firing(op(x), replace(op)(x), [x]) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"padding": ((1, 1), (2, 0))},
        {"padding_mode": "reflect"},
        {"padding_mode": "circular"},
        {"pad_value": torch.full((4,), 1e-6)},
        {"weight": conv().weight * (1 + 1e-8)},
        {"bias": None},
        {"groups": 1, "weight": conv(seed=1).weight},
    ],
)
def test_every_change_of_a_padded_convolution_is_seen(changes: dict[str, Any]) -> None:
    right = conv(padding=1)
    assert refused(right, replace(right, **changes)) and not refused(right, replace(right))


@pytest.mark.parametrize("stride", [2, 3, 4])
def test_what_is_wrong_at_some_sizes_only_is_seen_whatever_the_example_is(stride: int) -> None:
    pool = AvgPool((stride, stride), (stride, stride), (0, 0))
    assert refused(pool, replace(pool, ceil_mode=True), source(1, 4, 12, 12))


def test_elementwise_operators_are_checked_at_small_sizes_whatever_the_example_is() -> None:
    image = source(1, 4, 100_000, 100_000)  # which no memory holds
    scale = Scale(torch.full((1,), 2.0), torch.zeros(1))
    assert not refused(scale, replace(scale), image) and refused(scale, replace(scale, shift=torch.ones(1)), image)
    assert refused(Activation("relu"), Activation("gelu"), image)


def test_what_clamps_large_values_only_is_seen() -> None:
    wide = Activation("hardtanh", (("max_val", 50.0), ("min_val", -50.0)))
    assert refused(Scale(torch.ones(1), torch.zeros(1)), wide)
    assert refused(Activation("relu"), Activation("relu6"))
    assert not refused(Activation("relu6"), Activation("hardtanh", (("max_val", 6.0), ("min_val", 0.0))))


def test_the_slopes_of_a_prelu_lie_along_the_channels() -> None:
    slopes = torch.tensor([1.0, 1.0, 1.0, 0.5])
    identity = Scale(torch.ones(1), torch.zeros(1))
    assert refused(Activation("prelu", weight=slopes), identity)
    assert not refused(Activation("prelu", weight=torch.ones(4)), identity)


@pytest.mark.parametrize(
    "op",
    [
        Scale(torch.arange(4.0), torch.ones(4), 2),
        BatchNorm(torch.zeros(4), torch.ones(4), None, None, 1e-5, 2),
        Scale(torch.arange(32.0), torch.ones(1), 0),
        AvgPool((32, 32), (1, 1), (0, 0)),
        conv(kernel=1),
    ],
)
def test_any_operator_alone_is_itself(op: Linear) -> None:
    assert not refused(op, replace(op))


def test_operators_that_act_on_different_axes_are_checked_at_the_size_of_the_example() -> None:
    x = source(1, 5, 4)
    linear, bn = Conv(torch.randn(5, 4)), BatchNorm(torch.zeros(5), torch.ones(5), None, None, 1e-5, 1)
    assert check_firing(bn(linear(x)), bn(linear(x)), [x]) == 0


def test_several_sources_are_independent() -> None:
    x, y = source(), source()
    op = conv(kernel=1)
    assert check_firing(Add()(op(x), y), Add()(y, op(x)), [x, y]) <= TOLERANCE
    with pytest.raises(NotEquivalentError):
        check_firing(Add()(op(x), y), Add()(op(y), x), [x, y])
    with pytest.raises(NotEquivalentError):
        check_firing(Multiply()(x, y), Multiply()(x, x), [x, y])


def test_sums_that_fit_at_one_size_only_are_checked_at_that_size() -> None:
    x, y = source(1, 4, 1, 1), source(1, 4, 1, 1)
    op = conv(kernel=3, stride=2, padding=1)
    assert check_firing(Add()(op(x), y), Add()(y, op(x)), [x, y]) <= TOLERANCE


def test_sources_of_integers_get_integers() -> None:
    x = source(2, 3, dtype=torch.int64)
    flat = Structural(torch.flatten, (Slot(0), 0))
    assert check_firing(flat(x), flat(x), [x]) == 0


def test_a_result_that_does_not_run_everywhere_is_refused() -> None:
    x = source(1, 4, 8, 8)
    only_here = Structural(torch.reshape, (Slot(0), (1, 4, 8, 8)))
    same = Value(only_here, [conv(padding=1)(x)], x.type)
    assert check_firing(conv(padding=1)(x), same, [x]) <= TOLERANCE  # at the size of the example
    pinned = replace(conv(kernel=1), size=(9, 9))
    with pytest.raises(
        NotEquivalentError, match="the result fails on a random input of 1x4x8x8: GraphError: .*holds at"
    ):
        check_firing(conv(kernel=1)(x), pinned(x), [x])


def test_an_original_that_does_not_run_proves_nothing() -> None:
    x = source(1, 4, 8, 8)
    broken = Value(conv(kernel=1), [Value(Structural(torch.flatten, (Slot(0), 0)), [x], x.type)], x.type)
    with pytest.raises(NotEquivalentError, match="does not run in float64 on a random input, so nothing proves"):
        check_firing(broken, broken, [x])


def test_the_message_says_where_how_far_and_on_which_size() -> None:
    x = source()
    with pytest.raises(NotEquivalentError, match=r"differs by \d\.\de[-+]\d\d of its scale on a random input of 1x4x"):
        check_firing(conv()(x), conv(seed=1)(x), [x])


# --- sources of a known range ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "name", "equal"),
    [
        (Interval(0), "relu", True),
        (Interval(-1e-3), "relu", False),
        (Interval(0, 6), "relu6", True),
        (Interval(0, 6.001), "relu6", False),
        (Interval(-1e-3, 6), "relu6", False),
        (Interval(0), "relu6", False),
        (Interval(upper=6), "relu6", False),
        (Interval(upper=0), "relu", False),
        (Interval(2, 2), "relu", True),
        (Interval(), "relu", False),
    ],
)
def test_a_source_takes_the_values_of_its_range_and_reaches_its_bounds(
    interval: Interval, name: str, equal: bool
) -> None:
    x = source()
    try:
        check_firing(Activation(name)(x), x, [x], ranges={x: interval})
    except NotEquivalentError:
        assert not equal
    else:
        assert equal


def test_a_half_bounded_range_is_probed_at_large_magnitude_too() -> None:
    x = source()
    wide = Activation("hardtanh", (("max_val", 50.0), ("min_val", -50.0)))
    with pytest.raises(NotEquivalentError):
        check_firing(wide(x), x, [x], ranges={x: Interval(0)})


def test_a_range_of_one_source_leaves_the_others_free() -> None:
    x, y = source(), source()
    relu = Activation("relu")
    assert check_firing(Add()(relu(x), y), Add()(x, y), [x, y], ranges={x: Interval(0)}) == 0
    with pytest.raises(NotEquivalentError):
        check_firing(Add()(relu(x), relu(y)), Add()(x, y), [x, y], ranges={x: Interval(0)})


@pytest.mark.parametrize(
    ("op", "wrong"),
    [
        (MaxPool((2, 2), (2, 2), (0, 0), (1, 1)), {"ceil_mode": True}),
        (MaxPool((3, 3), (1, 1), (1, 1), (1, 1)), {"window": (3, 1), "padding": (1, 0)}),
        (MaxPool((2, 2), (1, 1), (0, 0), (2, 2)), {"dilation": (1, 2)}),
        (Upsample(2, scale_factor=(2.0, 2.0), mode="bilinear"), {"align_corners": True}),
    ],
)
def test_a_change_of_a_resampling_is_seen(op: Operator, wrong: dict[str, Any]) -> None:
    right = op
    assert refused(right, replace(right, **wrong), source(1, 4, 12, 12)) and not refused(right, replace(right))  # type: ignore[type-var]


@dataclass(frozen=True, eq=False)
class DelayedBy(Operator):
    """y[t] = x[t - n]: an operator of a user's own."""

    steps: int

    @property
    def reach(self) -> tuple[int, int]:
        return self.steps, 1

    def spatial_axes(self, given: TensorType) -> int | None:
        return 1

    def evaluate(self, *inputs: Any) -> Any:
        (x,) = inputs
        return torch.nn.functional.pad(x, (self.steps, 0))[..., : x.shape[-1]]

    def infer(self, *types: TensorType | None) -> TensorType | None:
        return types[0]


def test_an_operator_that_says_how_far_it_reaches_is_seen_to_do_something() -> None:
    x = source(1, 4, 100)
    assert refused(DelayedBy(40), DelayedBy(41), x)
    assert not refused(DelayedBy(40), DelayedBy(40), x)


@dataclass(frozen=True, eq=False)
class WrongWhere(Operator):
    """The identity, but where the shape is of some kind."""

    applies: Callable[[torch.Size], bool]

    def spatial_axes(self, given: TensorType) -> int | None:
        return 2

    def evaluate(self, *inputs: Any) -> Any:
        (x,) = inputs
        return x + 0.5 if self.applies(x.shape) else x

    def infer(self, *types: TensorType | None) -> TensorType | None:
        return types[0]


@pytest.mark.parametrize(
    "applies",
    [
        lambda shape: shape[2:] != (1, 1),
        lambda shape: shape[2:] == (1, 1),
        lambda shape: shape[2] == shape[3],
        lambda shape: shape[2] != shape[3],
        lambda shape: shape[3] > 10,
        lambda shape: shape[2] % 2 == 0,
        lambda shape: shape[3] % 2 == 1,
        lambda shape: shape[0] == 1,
        lambda shape: shape[0] > 1,
    ],
    ids=["size", "one position", "square", "not square", "long", "even", "odd", "one sample", "two samples"],
)
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_what_is_wrong_at_one_kind_of_shape_is_seen_whatever_the_example_is(
    applies: Callable[[torch.Size], bool], kernel: int
) -> None:
    for x in (source(1, 4, 1, 1), source(2, 4, 32, 32)):
        padded = conv(kernel, padding=kernel // 2)
        with pytest.raises(NotEquivalentError, match="of its scale on a random input of"):
            check_firing(padded(x), padded(WrongWhere(applies)(x)), [x])


def test_an_image_smaller_than_the_window_is_checked_where_it_is_as_large() -> None:
    x = source(1, 4, 32, 32)
    for op in (conv(5), AvgPool((5, 5), (1, 1), (0, 0))):
        with pytest.raises(NotEquivalentError, match="on a random input of 1x4x5x5"):
            check_firing(op(x), op(WrongWhere(lambda shape: shape[2:] == (5, 5))(x)), [x])


def test_a_result_that_does_not_run_on_one_position_where_the_original_does_is_a_fault() -> None:
    x = source(1, 4, 32, 32)
    first, wide = conv(3, padding=1, padding_mode="circular"), conv(5, padding=2, padding_mode="circular")
    same = replace(wide, weight=torch.nn.functional.pad(first.weight, (1, 1, 1, 1)), bias=first.bias)
    with pytest.raises(NotEquivalentError, match="the result fails on a random input of 1x4x1x1"):
        check_firing(first(x), same(x), [x])


def test_where_all_is_cut_off_there_is_nothing_to_compare() -> None:
    x = source(1, 4, 32, 32)
    padded, cropped = conv(3, padding=1), conv(3)
    middle = Structural(operator.getitem, (Slot(0), (..., slice(1, -1), slice(1, -1))))
    cut = Value(middle, [padded(x)], cropped(x).type)
    assert cut.op.evaluate(torch.zeros(1, 4, 1, 1)).numel() == 0
    assert check_firing(cut, cropped(x), [x]) <= TOLERANCE


# --- relative differences --------------------------------------------------------------------------------------------


def test_differences_are_relative_to_the_largest_magnitude() -> None:
    a = torch.tensor([0.0, -100.0])
    assert relative_difference(a, a + torch.tensor([1.0, 0.0])) == pytest.approx(0.01)
    assert relative_difference(a, a + torch.tensor([1.0, 0.0]), scale=1000) == pytest.approx(0.001)
    assert relative_difference(torch.zeros(2), torch.ones(2)) > 1e300


def test_what_cannot_be_compared_is_infinitely_far() -> None:
    inf, nan = float("inf"), float("nan")
    assert relative_difference(torch.ones(2), torch.ones(3)) == inf
    assert relative_difference(torch.tensor([1.0, nan]), torch.ones(2)) == inf
    assert relative_difference(torch.tensor([1.0, nan]), torch.tensor([1.0, inf])) == inf
    assert relative_difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == inf
    far = torch.tensor([1e308], dtype=torch.float64)
    assert relative_difference(far, -far) == inf


def test_infinities_in_the_same_places_leave_the_rest_to_compare() -> None:
    a = torch.tensor([float("inf"), -4.0, float("nan"), 1.0])
    assert relative_difference(a, a.clone()) == 0
    assert relative_difference(a, a + torch.tensor([0.0, 0.0, 0.0, 1.0])) == 0.25


def test_the_imaginary_part_counts() -> None:
    a = torch.tensor([3 + 4j], dtype=torch.complex64)
    assert relative_difference(a, a.conj().resolve_conj()) == pytest.approx(8 / 5)


def test_what_is_equal_is_not_far_at_all() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    for each in (torch.ones(0), torch.tensor([1, 2]), nan, torch.tensor([float("nan")])):
        assert relative_difference(each, each.clone()) == 0
