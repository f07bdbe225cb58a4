"""Do two sides that differ anywhere differ in what is compared, and is what is not affine read as it should be?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rgc import Activation, BatchNorm, Conv, Multiply, Operator, Scale, TensorType, Value
from rgc.instances import Draw, Range
from rgc.ir import Input
from rgc.operators import Add
from rgc.sides import Difference, Reading, RoundedError, Sides, degrees, in_words, smallest

NUMBERS = Range(50, 4)


def source(*shape: int) -> Value:
    return Value(Input("x"), (), TensorType(shape, torch.float32), name="x")


def conv(seed: int = 0, channels: int = 2) -> Conv:
    draw = Draw(NUMBERS, seed)
    return Conv(draw.integers((channels, channels, 3, 3)), draw.integers((channels,)), padding=1)


def sides(x: Value, old: Value, new: Value) -> Sides:
    return Sides([old], [new], [x], {x: x})


def drawn(*shape: int) -> list[Tensor]:
    return [Draw(NUMBERS, 9).integers(shape)]


def test_equal_sides_are_equal_and_one_changed_weight_is_a_difference() -> None:
    x = source(2, 2, 5, 4)
    one, other = conv(), conv()
    assert sides(x, one(x), other(x)).difference(drawn(2, 2, 5, 4), Reading(0, NUMBERS)) is True
    other.weight[1, 0, 2, 0] += 1
    found = sides(x, one(x), other(x)).difference(drawn(2, 2, 5, 4), Reading(0, NUMBERS))
    assert isinstance(found, Difference) and found.place[1] == 1 and found.distance > 0


def test_what_does_not_run_is_told_from_what_the_pattern_does_not_take() -> None:
    x = source(2, 2, 5, 4)
    wide = conv(channels=4)
    narrow = Value(wide, (x,), x.type)
    found = sides(x, conv()(x), narrow).difference(drawn(2, 2, 5, 4), Reading(0, NUMBERS))
    assert isinstance(found, Difference) and str(found.found).startswith("fails with RuntimeError")
    assert sides(x, narrow, conv()(x)).difference(drawn(2, 2, 5, 4), Reading(0, NUMBERS)) is None


def test_rounding_on_a_side_is_no_equality_and_no_small_difference() -> None:
    x = source(2, 2, 5, 4)
    one, third = conv(), Scale(torch.tensor([1 / 3], dtype=torch.float64), torch.zeros(1).double())
    with pytest.raises(RoundedError):
        sides(x, third(x), third(x)).difference(drawn(2, 2, 5, 4), Reading(0, NUMBERS))
    thrice = Scale(torch.tensor([3.0], dtype=torch.float64), torch.zeros(1).double())
    with pytest.raises(RoundedError):
        sides(x, one(x), one(thrice(third(x)))).difference(drawn(2, 2, 5, 4), Reading(0, NUMBERS))
    found = sides(x, one(x), one(third(x))).difference(drawn(2, 2, 5, 4), Reading(0, NUMBERS))
    assert isinstance(found, Difference)  # that is more than rounding


# --- what is not affine --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["relu", "sigmoid", "gelu"])
def test_an_unknown_function_tells_inputs_apart_that_the_function_itself_does_not(name: str) -> None:
    op, reading = Activation(name), Reading(3, NUMBERS)
    low = -100 - Draw(NUMBERS, 0).integers((2, 3)).abs()
    assert torch.equal(reading.of(op, [low]), reading.of(Activation(name), [low.clone()]))
    assert not torch.equal(reading.of(op, [low]), reading.of(op, [low - 1]))
    assert not torch.equal(reading.of(op, [low]), reading.of(Activation("tanh"), [low]))
    assert not torch.equal(reading.of(op, [low]), Reading(4, NUMBERS).of(op, [low]))


def test_negative_zero_is_zero_to_an_unknown_function() -> None:
    reading = Reading(0, NUMBERS)
    zero = torch.zeros(3).double()
    assert torch.equal(reading.of(Activation("relu"), [zero]), reading.of(Activation("relu"), [-zero]))


@pytest.mark.parametrize("name", ["gelu", "silu", "hardswish"])
def test_a_smooth_activation_stands_for_every_function_of_its_kind(name: str) -> None:
    op, reading = Activation(name), Reading(1, NUMBERS, evaluates=True)
    t = torch.arange(-40.0, 41.0).double()
    assert torch.equal(reading.of(op, [t]) - reading.of(op, [-t]), t)
    even = reading.of(op, [t]) - t / 2
    assert torch.equal(even, even.flip(0)) and len(even.unique()) > 20
    assert torch.equal(reading.of(op, [t[30:50]]), reading.of(op, [t])[30:50])  # element by element
    real = op.evaluate(t) - op.evaluate(-t)
    assert torch.allclose(real, t, rtol=1e-12, atol=1e-12)  # the premise


def test_what_is_not_smooth_is_evaluated() -> None:
    t = torch.arange(-4.0, 5.0).double()
    assert torch.equal(Reading(0, NUMBERS, evaluates=True).of(Activation("relu"), [t]), t.relu())


# --- degrees -------------------------------------------------------------------------------------------------------


def _norm() -> BatchNorm:
    one = torch.ones(2, dtype=torch.float64)
    return BatchNorm(one, one, one, one, 1.0, 2)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda x: conv()(x), (3, 0)),
        (lambda x: conv()(conv(1)(x)), (5, 0)),
        (lambda x: _norm()(conv()(x)), (6, 1)),
        (lambda x: Add()(conv()(x), conv(1)(x)), (5, 0)),  # a bound for a replacement that would multiply the two
        (lambda x: Multiply()(x, Multiply()(x, x)), (3, 0)),
        (lambda x: Activation("relu")(x), (1, 0)),
    ],
)
def test_the_bound_of_the_degree_counts_every_parameter_once(
    build: Callable[[Value], Value], expected: tuple[int, int]
) -> None:
    x = source(2, 2, 5, 4)
    assert degrees(sides(x, build(x), build(x)).before, [x]) == expected


# --- the small instance --------------------------------------------------------------------------------------------


def test_as_many_elements_as_possible_are_zero_in_the_instance_that_is_shown() -> None:
    x = source(2, 2, 5, 4)
    one, other = conv(), conv()
    other.weight[1, 0, 1, 1] += 1
    both = sides(x, one(x), other(x))
    found = smallest(both, drawn(2, 2, 5, 4), Reading(0, NUMBERS))
    (given,) = found.inputs
    assert int((given != 0).sum()) == 1 and float(given.max()) == 1
    assert isinstance(found.found, float) and found.found - found.expected == 1
    words = in_words(both, found, Reading(0, NUMBERS))
    assert words.startswith("no law: [conv 3x3 2->2] became [conv 3x3 2->2], and at [")
    assert "input of 2x2x5x4: zeros but for 1 at [" in words


def test_a_result_of_another_shape_is_told() -> None:
    x = source(2, 2, 5, 4)
    other: Operator = conv().changed(padding=0)
    found = sides(x, conv()(x), other(x)).difference(drawn(2, 2, 5, 4), Reading(0, NUMBERS))
    assert isinstance(found, Difference) and found.found == "is of shape [2, 2, 3, 2], not [2, 2, 5, 4]"
