"""Does a pattern match what it says, in every order, and is a malformed one refused when it is written?"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Annotated, Any, Union

import pytest
import torch

from rgc import Activation, Add, AvgPool, Conv, Graph, GraphError, Join, Multiply, Region, Scale, Value, rewrite
from rgc.ir import Input, TensorType
from rgc.passes import hygiene, merge_pointwise
from rgc.region import affine_regions
from rgc.rewrite import Rewrite, graph_pass, observed, unread_geometry


def source(name: str = "x") -> Value:
    return Value(Input(name), (), TensorType((2, 4, 8, 8), torch.float32), name=name)


def conv(**options: Any) -> Conv:
    return Conv(torch.ones(4, 4, 1, 1), torch.zeros(4), **options)


def matches(each: Rewrite, value: Value) -> list[dict[str, Value]]:
    return [match.values for match in each.cases[0].match(value)]


RELU = Activation("relu")


# --- matching --------------------------------------------------------------------------------------------------------


def test_a_sum_matches_in_both_orders_and_a_difference_in_one() -> None:
    @rewrite(lambda x, y, op: x + op(y))
    def plus(x: Value, y: Value, op: Conv) -> Value:
        return x

    @rewrite(lambda x, y, op: x - op(y))
    def minus(x: Value, y: Value, op: Conv) -> Value:
        return x

    a, b = source("a"), conv()(source("b"))
    assert len(matches(plus, Add()(a, b))) == len(matches(plus, Add()(b, a))) == 1
    assert len(matches(plus, Add()(b, b))) == 2 and matches(plus, Add(-1)(a, b)) == []
    assert len(matches(minus, Add(-1)(a, b))) == 1
    assert matches(minus, Add(-1)(b, a)) == matches(minus, Add()(a, b)) == []


def test_a_product_matches_in_both_orders() -> None:
    @rewrite(lambda x, y, op: x * op(y))
    def times(x: Value, y: Value, op: Activation) -> Value:
        return x

    a, b = source("a"), RELU(source("b"))
    assert len(matches(times, Multiply()(a, b))) == len(matches(times, Multiply()(b, a))) == 1
    assert matches(times, Add()(a, b)) == []


def test_sums_and_products_nest() -> None:
    @rewrite(lambda x, y, op: (op(x) + y) * x - y)
    def nested(x: Value, y: Value, op: Conv) -> Value:
        return x

    x, y = source("x"), source("y")
    assert matches(nested, Add(-1)(Multiply()(x, Add()(y, conv()(x))), y)) == [{"x": x, "y": y}]


def test_a_hole_that_occurs_twice_is_one_value_and_one_operator() -> None:
    @rewrite(lambda x, op: op(x) + op(x))
    def twice(x: Value, op: Conv) -> Value:
        return x

    x, y, op = source("x"), source("y"), conv()
    assert matches(twice, Add()(op(x), op(x))) and not matches(twice, Add()(op(x), op(y)))
    assert not matches(twice, Add()(op(x), conv()(x)))


def test_a_match_names_the_values_between_its_holes_root_first() -> None:
    @rewrite(lambda x, first, second: second(first(x)))
    def pair(x: Value, first: Conv, second: Activation) -> Value:
        return x

    x = source()
    inner = conv()(x)
    (match,) = pair.cases[0].match(RELU(inner))
    assert match.interior[1] is inner and match.root.op is RELU and match.values == {"x": x}


def test_holes_may_be_unions_and_have_predicates() -> None:
    @rewrite(lambda x, op: op(x))
    def either(x: Value, op: Conv | AvgPool) -> Value:
        return x

    @rewrite(lambda x, op: op(x))
    def spelled_out(x: Value, op: Annotated[Union[Conv, Scale], lambda op: op.channels == (4, 4)]) -> Value:  # noqa: UP007
        return x

    x = source()
    scale, pool = Scale(torch.ones(4), torch.zeros(4), 2), AvgPool((2, 2), (2, 2), (0, 0))
    assert matches(either, conv()(x)) and matches(either, pool(x)) and not matches(either, scale(x))
    assert matches(spelled_out, conv()(x)) and matches(spelled_out, scale(x)) and not matches(spelled_out, pool(x))
    assert not matches(spelled_out, Scale(torch.ones(1), torch.zeros(1))(x))


def is_wide(value: Value) -> bool:
    return value.tensor_type.shape[1] > 4


def test_a_value_may_have_predicates_too() -> None:
    @rewrite(lambda x, op: op(x))
    def on_wide_values(x: Annotated[Value, is_wide], op: Activation) -> Value: ...

    narrow, relu = source(), Activation("relu")
    wide = Value(Input("y"), (), TensorType((1, 8, 5, 5), torch.float32))
    assert matches(on_wide_values, relu(wide)) == [{"x": wide}] and matches(on_wide_values, relu(narrow)) == []


def test_a_case_says_whether_it_relies_on_ranges() -> None:
    @rewrite(lambda x, op: op(x), relies_on_range=True)
    def first(x: Value, op: Activation) -> Value: ...

    @first.also(lambda x, op: op(op(x)))
    def second(x: Value, op: Activation) -> Value: ...

    assert [case.relies_on_range for case in first.cases] == [True, False]


def test_a_region_matches_its_own_class_only() -> None:
    @rewrite(lambda x, region: region(x))
    def whole(x: Value, region: Annotated[Region, lambda region: len(region.values) > 1]) -> Value:
        return x

    @rewrite(lambda x, join: join(x))
    def joined(x: Value, join: Join) -> Value:
        return x

    x = source()
    (region,) = affine_regions(Graph([x], conv()(conv()(x))))
    match = whole.cases[0].match_region(region)
    assert match is not None and match.values == {"x": x} and match.root is region.sink
    assert joined.cases[0].match_region(region) is None
    (short,) = affine_regions(Graph([x], conv()(x)))
    assert whole.cases[0].match_region(short) is None


# --- what a rule has read --------------------------------------------------------------------------------------------


def test_geometry_that_nobody_read_is_known() -> None:
    op = observed(conv(stride=2, padding=1))
    assert isinstance(op, Conv) and type(op).__name__ == "Conv"
    _ = op.weight, op.bias, op.kernel, op.label, op.in_channels
    assert unread_geometry(op) == ["stride", "padding"]
    _ = op.stride
    assert unread_geometry(op) == ["padding"]
    _ = op.is_padded
    assert unread_geometry(op) == [] == unread_geometry(conv(stride=2))


def test_operators_without_geometry_are_not_observed() -> None:
    assert observed(RELU) is RELU


# --- how a rewrite is written ----------------------------------------------------------------------------------------


def test_the_statement_is_the_docstring_of_the_function_or_of_its_file() -> None:
    @graph_pass
    def stated(graph: Graph) -> Graph:
        """What it does."""
        return graph

    @rewrite(lambda x, op: op(x))
    def silent(x: Value, op: Conv) -> Value:
        return x

    assert stated.statement == "What it does." and silent.statement.startswith("Does a pattern match what it says")


def test_examples_are_kept_with_their_names_in_words() -> None:
    @rewrite(lambda x, op: op(x))
    def silent(x: Value, op: Conv) -> Value:
        return x

    @silent.fires_on(shape=(1, 2), fixed_size=True)
    def a_small_model() -> Any: ...

    @silent.leaves_alone(shape=(1, 2), because="no")
    def another_model() -> Any: ...

    first, second = silent.examples
    assert (first.name, first.fires, first.fixed_size) == ("a small model", True, True)
    assert (second.name, second.fires, second.because) == ("another model", False, "no")


def _names_differ() -> Any:
    @rewrite(lambda x, conv: conv(x))
    def bad(x: Value, convolution: Conv) -> Value: ...


def _no_type() -> Any:
    @rewrite(lambda x, op: op(x))
    def bad(x: Value, op) -> Value: ...  # type: ignore[no-untyped-def]


def _nothing_applied() -> Any:
    @rewrite(lambda x: x)
    def bad(x: Value) -> Value: ...


def _unused() -> Any:
    @rewrite(lambda x, y, op: op(x))
    def bad(x: Value, y: Value, op: Conv) -> Value: ...


def _value_applied() -> Any:
    @rewrite(lambda x, op: op(x))
    def bad(x: Value, op: Value) -> Value: ...


def _any_operator() -> Any:
    @rewrite(lambda x, op: op(x))
    def bad(x: Value, op: Any) -> Value: ...


def _half_a_union() -> Any:
    @rewrite(lambda x, op: op(x))
    def bad(x: Value, op: Conv | None) -> Value: ...


def _operator_not_applied() -> Any:
    @rewrite(lambda x, op: op(x))
    def bad(x: Conv, op: Conv) -> Value: ...


def _both_roles() -> Any:
    @rewrite(lambda x: x(x))
    def bad(x: Conv) -> Value: ...


def _region_inside() -> Any:
    @rewrite(lambda x, region, op: op(region(x)))
    def bad(x: Value, region: Region, op: Conv) -> Value: ...


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (_names_differ, r"the pattern has the holes \['x', 'conv'\], the function takes \['x', 'convolution'\]"),
        (_no_type, "the hole 'op' has no type"),
        (_nothing_applied, "the pattern must apply at least one operator"),
        (_unused, "the hole 'y' does not occur in the pattern"),
        (_value_applied, "the hole 'op' is applied to values, so its type must be an operator class, got .*Value"),
        (_any_operator, "the hole 'op' is applied to values, so its type must be an operator class"),
        (_half_a_union, "the hole 'op' is applied to values, so its type must be an operator class"),
        (_operator_not_applied, "the hole 'x' stands for a value, so its type must be Value, got .*Conv"),
        (_both_roles, "the hole 'x' stands for an operator and for a value"),
        (_region_inside, "the hole 'region' stands for a region, which must be the whole pattern"),
    ],
)
def test_a_malformed_rewrite_is_refused_when_it_is_written(write: Callable[[], Any], problem: str) -> None:
    with pytest.raises(GraphError, match=f"rewrite bad: {problem}"):
        write()


def test_a_pass_is_pickled_as_where_it_is_found_and_copied_as_itself() -> None:
    for each in (merge_pointwise, hygiene):
        assert pickle.loads(pickle.dumps(each)) is each and copy.deepcopy(each) is each

    @rewrite(lambda x, conv: conv(x))
    def local(x: Value, conv: Conv) -> Value:
        return conv(x)

    with pytest.raises(pickle.PicklingError, match="the pass local is not .*local, where unpickling would look"):
        pickle.dumps(local)
    assert copy.deepcopy(local) is local
