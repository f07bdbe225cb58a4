"""Does every value of a graph lie in the range that is claimed for it, at random and at the worst inputs?"""

from __future__ import annotations

import gc
import math
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rgc import (
    Activation,
    AdaptiveMaxPool,
    Add,
    AvgPool,
    BatchNorm,
    Clamp,
    Concat,
    Constant,
    Conv,
    Deferred,
    Flatten,
    GraphError,
    Identity,
    Interval,
    MaxPool,
    Multiply,
    Opaque,
    Operator,
    Scale,
    Structural,
    TensorType,
    Unflatten,
    Upsample,
    Value,
    range_of,
    ranges,
)
from rgc.ir import Graph, Input
from rgc.operators import Slot
from rgc.ranges import _KNOWN, _TURN_OF_GELU_BY_TANH, _TURNS
from rgc.rearrange import (
    Assign,
    BorderFill,
    Gather,
    Pad,
    PixelShuffle,
    PixelUnshuffle,
    Slice,
    Subsample,
    ZeroChannels,
)

ANY = Interval()
CHANNELS, SIZE = 4, 6


def source(*shape: int, dtype: torch.dtype = torch.float64) -> Value:
    return Value(Input("x"), (), TensorType(shape or (2, CHANNELS, SIZE, SIZE), dtype), name="x")


def between(low: float, high: float, x: Value | None = None) -> Value:
    """A value that takes every number from ``low`` to ``high`` and no other."""
    return Activation("hardtanh", (("max_val", high), ("min_val", low)))(x or source())


def rectified() -> Value:
    return Activation("relu")(source())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- soundness: random graphs, random and extreme inputs -------------------------------------------------------------

ELEMENTWISE: tuple[Operator, ...] = (
    *(Activation(name) for name in ("relu", "relu6", "sigmoid", "hardsigmoid", "tanh", "selu", "gelu", "silu", "mish")),
    *(Activation(name) for name in ("hardswish", "softplus", "logsigmoid", "softsign", "tanhshrink", "abs", "square")),
    Activation("gelu", (("approximate", "tanh"),)),
    Activation("exp"),
    Activation("elu", (("alpha", -0.7),)),
    Activation("elu", (("alpha", 1.3),)),
    Activation("celu", (("alpha", 0.5),)),
    Activation("leaky_relu", (("negative_slope", -0.4),)),
    Activation("leaky_relu", (("negative_slope", 0.1),)),
    Activation("prelu", weight=torch.tensor([0.3, -0.2, 1.0, 2.0], dtype=torch.float64)),
    Activation("softplus", (("beta", 2.0), ("threshold", 0.3))),
    Activation("softplus", (("beta", -1.5), ("threshold", 0.3))),
    Activation("hardtanh", (("max_val", 0.7), ("min_val", -0.2))),
    Activation("clamp", (("max", 1.5),)),
    Activation("clamp", (("min", 0.25),)),
    Activation("clamp", (("max", -1.0), ("min", 1.0))),
    Identity("dropout"),
)


def convolution(draw: Any, **options: Any) -> Conv:
    seed, groups = draw(st.integers(0, 99)), draw(st.sampled_from([1, 2, 4]))
    weight = random(CHANNELS, CHANNELS // groups, 3, 3, seed=seed)
    weight = {"any": weight, "positive": weight.abs(), "negative": -weight.abs(), "none": 0 * weight}[
        draw(st.sampled_from(["any", "any", "positive", "negative", "none"]))
    ]
    bias = draw(st.sampled_from([None, random(CHANNELS, seed=seed + 1)]))
    return Conv(weight, bias, padding=1, groups=groups, **options)


def linear_operator(draw: Any) -> Operator:
    seed = draw(st.integers(0, 99))
    vector = random(CHANNELS, seed=seed)
    made: Operator = draw(
        st.sampled_from([
            Scale(vector, random(CHANNELS, seed=seed + 1), 2),
            Scale(vector[:1], vector[1:2]),
            Scale(0 * vector, vector, 2),
            BatchNorm(vector, vector.abs() + 0.1, vector, random(CHANNELS, seed=seed + 2), 1e-3, 2),
            convolution(draw),
            convolution(draw, pad_value=vector),
            convolution(draw, padding_mode="reflect"),
            convolution(draw, transposed=True),
        ])
    )  # fmt: skip
    return made


RESAMPLINGS: tuple[Operator, ...] = (
    AdaptiveMaxPool((SIZE, SIZE)),
    AvgPool((3, 3), (1, 1), (1, 1)),
    AvgPool((3, 3), (1, 1), (1, 1), count_include_pad=False),
    AvgPool((3, 3), (1, 1), (1, 1), divisor_override=2),
    AvgPool((3, 3), (1, 1), (1, 1), divisor_override=-20),
    MaxPool((3, 3), (1, 1), (1, 1), (1, 1)),
    MaxPool((3, 3), (1, 1), (0, 0), (1, 1)),
    Upsample(2, (SIZE, SIZE), mode="bilinear", align_corners=True),
    Upsample(2, (SIZE, SIZE), mode="nearest"),
    Upsample(2, (SIZE, SIZE), mode="area"),
    Upsample(2, scale_factor=(1.5, 0.5), mode="bicubic"),
    Structural(nn.AdaptiveAvgPool2d(SIZE), (Slot(0),)),
    Structural("mean", (Slot(0), (2, 3)), (("keepdim", True),)),
    Structural("sum", (Slot(0), (1,)), (("keepdim", True),)),
    Structural(nn.ZeroPad2d(1), (Slot(0),)),
    Structural(nn.ReplicationPad2d((1, 0, 0, 1)), (Slot(0),)),
    Structural(torch.flip, (Slot(0), [2])),
    Structural("permute", (Slot(0), (0, 1, 3, 2))),
    Opaque(torch.softmax, (Slot(0), 1)),
    Opaque("cumsum", (Slot(0), 1)),
)


@st.composite
def graphs(draw: Any) -> list[Value]:
    """The values of a random graph of a few operators; all tensors are images that broadcast against each other."""
    values = [source(), Constant(random(CHANNELS, 1, 1, seed=draw(st.integers(0, 9))))()]
    values[1].type = TensorType((CHANNELS, 1, 1), torch.float64)
    for _ in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from(["elementwise", "elementwise", "linear", "resampling", "two"]))
        images = [v for v in values if v.tensor_type.shape == (2, CHANNELS, SIZE, SIZE)]
        x = draw(st.sampled_from(images))
        if kind == "two":
            y = draw(st.sampled_from(images))
            values.append(draw(st.sampled_from([Add(), Add(-1), Multiply(), Concat(-3)]))(x, y))
        else:
            table = {"elementwise": ELEMENTWISE, "resampling": RESAMPLINGS}
            op = linear_operator(draw) if kind == "linear" else draw(st.sampled_from(table[kind]))
            values.append(op(x))
    return values


@given(graphs(), st.sampled_from([0.0, 0.1, 1.0, 30.0]), st.integers(0, 2**20))
def test_every_value_lies_in_its_range(values: list[Value], magnitude: float, seed: int) -> None:
    results: dict[Value, Any] = {values[0]: magnitude * random(2, CHANNELS, SIZE, SIZE, seed=seed)}
    for value in values[1:]:
        results[value] = value.op.evaluate(*(results[used] for used in value.inputs))
    for value, result in results.items():
        assert_inside(result, range_of(value), value)


def assert_inside(result: Tensor, found: Interval, value: Value) -> None:
    """Inside, but for rounding relative to the largest number that took part; what overflowed says nothing."""
    finite = result[result.isfinite()]
    if finite.numel():
        slack = 1e-9 * max(1.0, float(finite.abs().max()))
        low, high = float(finite.min()), float(finite.max())
        assert Interval(low, high) in Interval(found.lower - slack, found.upper + slack), (value, found, low, high)


@pytest.mark.parametrize("op", ELEMENTWISE, ids=lambda op: f"{op.label}-{getattr(op, 'options', '')}")
@pytest.mark.parametrize(
    ("low", "high"), [(-20.0, 20.0), (-3.0, 0.5), (-2.0, -1.0), (-0.5, 0.1), (0.0, 0.0), (0.1, 9.0), (-1.3, -1.2)]
)
def test_the_range_of_an_elementwise_function_is_just_its_image(op: Operator, low: float, high: float) -> None:
    grid = torch.linspace(low, high, 20001, dtype=torch.float64)
    image = op.evaluate(grid.expand(2, CHANNELS, -1) if getattr(op, "weight", None) is not None else grid)
    found = range_of(op(between(low, high)))
    assert image.min() >= found.lower - 1e-12 and image.max() <= found.upper + 1e-12
    assert image.min() <= found.lower + 2e-3 * max(1, abs(found.lower))
    assert image.max() >= found.upper - 2e-3 * max(1, abs(found.upper)) or op.label == "softplus"


@pytest.mark.parametrize("op", ELEMENTWISE, ids=lambda op: f"{op.label}-{getattr(op, 'options', '')}")
def test_an_elementwise_function_of_anything_has_the_range_of_its_limits(op: Operator) -> None:
    grid = torch.cat([torch.linspace(-700, 700, 200_001), torch.linspace(-3, 3, 200_001)]).double()
    image = op.evaluate(grid.expand(2, CHANNELS, -1) if getattr(op, "weight", None) is not None else grid)
    found = range_of(op(source()))
    low, high = float(image.min()), float(image.max())
    assert Interval(low, high) in Interval(found.lower - 1e-9, found.upper + 1e-9)
    assert (found.lower == -math.inf and low < -50) or low == pytest.approx(found.lower, abs=2e-3)
    assert (found.upper == math.inf and high > 100) or high == pytest.approx(found.upper, abs=2e-3)


def test_functions_turn_where_it_is_said() -> None:
    x = sympy.Symbol("x", real=True)
    k, c = 2 * sympy.sqrt(2 / sympy.pi), sympy.Rational(44715, 10**6)
    functions = {
        "gelu": x * (1 + sympy.erf(x / sympy.sqrt(2))) / 2,
        "silu": x / (1 + sympy.exp(-x)),
        "mish": x * sympy.tanh(sympy.log(1 + sympy.exp(x))),
        "hardswish": x * (x + 3) / 6,
        "gelu by tanh": x / (1 + sympy.exp(-k * (x + c * x**3))),
    }
    for name, function in functions.items():
        stated = _TURN_OF_GELU_BY_TANH if name == "gelu by tanh" else _TURNS[name][0]
        found = sympy.nsolve(sympy.diff(function, x), x, stated, prec=30)
        assert abs(found - sympy.Float(stated, 30)) < 1e-15, name


# --- each rule -------------------------------------------------------------------------------------------------------


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (lambda: source(), ANY),
        (lambda: Activation("relu")(source()), Interval(0)),
        (lambda: Activation("relu")(between(-3, -1)), Interval(0, 0)),
        (lambda: Activation("relu6")(Scale(ones(1), -2 * ones(1))(rectified())), Interval(0, 6)),
        (lambda: Activation("sqrt")(between(-4, 9)), Interval(0, 3)),
        (lambda: Activation("sqrt")(between(-4, -1)), ANY),
        (lambda: Activation("erf")(source()), ANY),
        (lambda: Add()(rectified(), between(-1, 2)), Interval(-1)),
        (lambda: Add(-1)(between(0, 1), between(-1, 2)), Interval(-2, 2)),
        (lambda: Multiply()(between(-2, 1), between(-3, 5)), Interval(-10, 6)),
        (lambda: Multiply()(rectified(), between(0, 0)), Interval(0, 0)),
        (lambda: Multiply()(source(), source()), ANY),
        (lambda: (lambda x: Multiply()(x, x))(between(-2, 1)), Interval(0, 4)),
        (lambda: (lambda x: Multiply()(x, x))(source()), Interval(0)),
        (lambda: Scale(torch.tensor([2.0, -1.0]), torch.tensor([0.0, 1.0]), 0)(between(0, 3, source(1, 2))),
         Interval(-2, 6)),
        (lambda: Scale(torch.tensor([0.0]), torch.tensor([5.0]))(source()), Interval(5, 5)),
        (lambda: BatchNorm(ones(4), ones(4), None, None, 0.0, 2, training=True)(between(0, 1)), ANY),
        (lambda: BatchNorm(ones(4), ones(4), None, None, 0.0, 2)(between(0, 3)), Interval(-1, 2)),
        (lambda: BatchNorm(ones(4), -ones(4), None, None, 0.0, 2)(between(0, 3)), ANY),
        (lambda: Conv(ones(1, 4, 1, 1), ones(1))(between(0, 1)), Interval(1, 5)),
        (lambda: Conv(ones(1, 4, 1, 1))(between(1, 2)), Interval(4, 8)),
        (lambda: Conv(ones(1, 4, 1, 1), padding=1)(between(1, 2)), Interval(0, 8)),
        (lambda: Conv(ones(1, 4, 1, 1), padding=1, pad_value=-ones(4))(between(1, 2)), Interval(-4, 8)),
        (lambda: Conv(ones(1, 4, 1, 1), padding=1, padding_mode="reflect")(between(1, 2)), Interval(4, 8)),
        (lambda: Conv(ones(4, 1, 2, 2), transposed=True)(between(1, 2)), Interval(0, 32)),
        (lambda: Conv(-ones(1, 4, 1, 1))(rectified()), Interval(upper=0)),
        (lambda: Conv(random(1, 4, 1, 1))(rectified()), ANY),
        (lambda: Conv(ones(2, 1), ones(2))(between(0, 1, source(3, 1))), Interval(1, 2)),
        (lambda: Conv(ones(1, 4, 1, 1), torch.arange(36.0).reshape(1, 6, 6), size=(6, 6))(between(0, 1)),
         Interval(0, 39)),
        (lambda: Conv(math.nan * ones(1, 4, 1, 1))(between(0, 1)), ANY),
        (lambda: AdaptiveMaxPool((2, 2))(between(1, 2)), Interval(1, 2)),
        (lambda: AvgPool((2, 2), (2, 2), (1, 1))(between(1, 2)), Interval(0, 2)),
        (lambda: AvgPool((2, 2), (2, 2), (1, 1), count_include_pad=False)(between(1, 2)), Interval(1, 2)),
        (lambda: AvgPool((2, 2), (2, 2), (0, 0))(between(1, 2)), Interval(1, 2)),
        (lambda: AvgPool((2, 2), (2, 2), (0, 0), divisor_override=1)(between(1, 2)), Interval(0, 8)),
        (lambda: MaxPool((2, 2), (2, 2), (1, 1), (1, 1))(between(1, 2)), Interval(1, 2)),
        (lambda: MaxPool((2, 2), (1, 1), (1, 1), (2, 2))(between(1, 2)), Interval(upper=2)),
        (lambda: Upsample(2, scale_factor=(2, 2), mode="bilinear")(between(1, 2)), Interval(1, 2)),
        (lambda: Upsample(2, scale_factor=(2, 2), mode="bicubic")(between(1, 2)), ANY),
        (lambda: Concat(-3)(between(1, 2), between(-1, 0)), Interval(-1, 2)),
        (lambda: Unflatten((36, 4))(Flatten((4, 6, 6))(between(1, 2))), Interval(1, 2)),
        (lambda: Constant(torch.tensor([-1.0, 2.0]))(), Interval(-1, 2)),
        (lambda: Constant(torch.tensor([-1, 2]))(), ANY),
        (lambda: Constant(torch.ones(0))(), ANY),
        (lambda: Structural(nn.PixelShuffle(2), (Slot(0),))(rectified()), Interval(0)),
        (lambda: Structural(nn.ZeroPad2d(1), (Slot(0),))(between(1, 2)), Interval(0, 2)),
        (lambda: Structural("sum", (Slot(0), 1))(between(1, 2)), Interval(0)),
        (lambda: Structural("sum", (Slot(0), 1))(between(-2, 2)), ANY),
        (lambda: Structural(torch.ops.aten.mean.dim, (Slot(0), [2]))(between(1, 2)), Interval(1, 2)),
        (lambda: Structural(torch.cumsum, (Slot(0), 1))(rectified()), ANY),
        (lambda: Structural(nn.Tanhshrink(), (Slot(0),))(rectified()), ANY),
        (lambda: Opaque(nn.Softmax(1), (Slot(0),))(source()), Interval(0, 1)),
        (lambda: Opaque(torch.ops.aten.softmax.int, (Slot(0), 1))(source()), Interval(0, 1)),
        (lambda: Opaque("softmax", (Slot(0), 1))(source()), Interval(0, 1)),
        (lambda: Opaque(lambda x: x - 1, (Slot(0),))(rectified()), ANY),
        (lambda: Value(Identity(), [source(dtype=torch.int64)], TensorType((1,), torch.int64)), ANY),
    ],
)  # fmt: skip
def test_a_rule_is_as_narrow_as_it_can_be(value: Callable[[], Value], expected: Interval) -> None:
    found = range_of(value())
    assert (found.lower, found.upper) == pytest.approx((expected.lower, expected.upper))


def test_a_window_of_a_dilated_max_pooling_may_read_nothing_but_padding() -> None:
    op = MaxPool((2,), (1,), (1,), (2,))
    x = torch.ones(1, 1, 1, dtype=torch.float64)
    assert op.evaluate(x).min() == -math.inf == range_of(op(between(1, 2, source(1, 1, 1)))).lower


def test_a_clamp_has_the_range_of_its_loosest_channel() -> None:
    inf = math.inf
    op = Clamp(torch.tensor([0.0, -1.0]), torch.tensor([6.0, 2.0]), 2)
    x = Value(Input("x"), (), TensorType((1, 2, 4, 4), torch.float64))
    assert range_of(op(x)) == Interval(-1.0, 6.0)
    assert range_of(op(Activation("sigmoid")(x))) == Interval(0.0, 1.0)
    assert range_of(Clamp(torch.tensor([0.0, -inf]), torch.tensor([6.0, 2.0]), 2)(x)) == Interval(-inf, 6.0)
    assert range_of(Clamp(torch.tensor([0.0, 1.0]), torch.tensor([inf, inf]), 2)(x)) == Interval(0.0)
    assert range_of(Clamp(torch.tensor([3.0, 3.0]), torch.tensor([2.0, 4.0]), 2)(x)) == Interval(2.0, 4.0)


def test_a_softmax_of_the_user_is_not_pytorchs() -> None:
    def softmax(x: Tensor) -> Tensor:
        return 2 * F.softmax(x, 1)

    assert range_of(Opaque(softmax, (Slot(0),))(source())) == ANY


def test_a_weight_that_is_not_computed_yet_is_not_computed_for_its_range() -> None:
    def never() -> Tensor:
        raise AssertionError("computed")

    deferred = Conv(Deferred((1, 4, 1, 1), never))
    assert range_of(deferred(between(0, 1))) == ANY


def test_the_parts_of_a_split_have_the_range_of_the_whole() -> None:
    parts = Structural("chunk", (Slot(0), 2))(between(1, 2))
    assert range_of(Value(Structural(operator.getitem, (Slot(0), 0)), [parts], source().type)) == Interval(1, 2)


def test_a_bound_that_overflows_is_still_a_bound() -> None:
    huge = between(1e200, 1e300)
    assert range_of(Activation("square")(huge)).lower > 1e307
    assert range_of(Activation("square")(huge)).upper == math.inf
    assert range_of(Multiply()(huge, Scale(torch.tensor([-1.0]), torch.tensor([0.0]))(huge))).upper < -1e307


# --- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high"), [(1, 0), (math.nan, 0), (0, math.nan), (math.inf, math.inf), (-math.inf, -math.inf)]
)
def test_an_interval_of_no_numbers_cannot_be_built(low: float, high: float) -> None:
    with pytest.raises(GraphError, match=r"Interval: no number lies between"):
        Interval(low, high)


def test_an_interval_prints_as_in_mathematics() -> None:
    assert [str(each) for each in (ANY, Interval(0), Interval(upper=-0.25), Interval(1, 2))] == [
        "(-inf, inf)", "[0, inf)", "(-inf, -0.25]", "[1, 2]",
    ]  # fmt: skip


# --- cost ------------------------------------------------------------------------------------------------------------


def test_each_value_of_a_deep_graph_is_looked_at_once_and_without_recursion(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: Counter[Value] = Counter()
    look = ranges._range

    def counting(value: Value, given: list[Interval]) -> Interval:
        looked_at[value] += 1
        return look(value, given)

    monkeypatch.setattr(ranges, "_range", counting)
    value = source()
    values = [value := Activation("tanh")(value) for _ in range(5000)]
    assert range_of(values[-1]) in Interval(-1, 1)
    assert all(range_of(each) in Interval(-1, 1) for each in values)
    assert len(looked_at) == 5001 and set(looked_at.values()) == {1}


def test_what_is_known_is_forgotten_with_the_value() -> None:
    before = len(_KNOWN)
    value = rectified()
    range_of(value)
    assert len(_KNOWN) == before + 2
    del value
    gc.collect()
    assert len(_KNOWN) <= before


def test_a_value_keeps_its_range_when_what_it_reads_is_replaced() -> None:
    x = source()
    first = Activation("relu")(x)
    second = Activation("relu")(first)
    graph = Graph([x], Activation("tanh")(second))
    assert range_of(graph.output_values[0]) == Interval(0, 1)
    graph.replace(second, first)
    assert range_of(graph.output_values[0]) == Interval(0, 1)


def test_what_only_moves_elements_keeps_their_range_and_pads_add_to_it() -> None:
    x = Value(Input("x"), (), TensorType((2, 4, 6, 6), torch.float64), name="x")
    y = Scale(torch.ones(1), torch.full((1,), 2.0))(Activation("sigmoid")(x))  # [2, 3]
    constant = torch.tensor([5.0, -1.0, 2.5, 2.5])
    for op, low, high in (
        (Pad(((-1, 0), (0, -2))), 2, 3), (Pad(((1, 1), (1, 1)), "reflect"), 2, 3), (Pad(((1, 0), (0, 0))), 0, 3),
        (Pad(((1, 1), (1, 1)), value=constant), -1, 5), (Subsample((2, 2), ((1, 0), (0, 0))), 2, 3),
        (Gather(Slice(0, 2), 4, 2), 2, 3), (Gather(ZeroChannels(1, 0), 4, 2), 0, 3), (PixelUnshuffle(2), 2, 3),
        (PixelShuffle(2), 2, 3), (BorderFill(((1, 0), (0, 0)), constant), -1, 5),
    ):  # fmt: skip
        assert range_of(op(y)) == Interval(low, high), op.label
    assert range_of(Assign(Ellipsis, 7.0)(y)).is_unbounded
