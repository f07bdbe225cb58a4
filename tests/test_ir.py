"""Does a graph keep its users, order, outputs and effects right while values are replaced?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import networkx
import pytest
import torch
from torch import Tensor

from rgc.algebra import Conv, Scale
from rgc.errors import GraphError
from rgc.ir import Graph, Input, Operator, Origin, TensorType, Value, topological
from rgc.operators import Activation, Add, Call, Concat, Opaque, Slot

TYPE = TensorType((2, 3), torch.float32)


@dataclass(frozen=True, eq=False)
class Plus(Operator):
    """Adds a number."""

    number: float

    def evaluate(self, *inputs: Any) -> Any:
        return inputs[0] + self.number

    def infer(self, *types: TensorType | None) -> TensorType | None:
        return types[0]


def source(name: str = "x", **default: Any) -> Value:
    return Value(Input(name, **default), (), TYPE, name=name)


def chain(start: Value, length: int) -> list[Value]:
    values = [start]
    for _ in range(length):
        values.append(Plus(1.0)(values[-1]))
    return values


def assert_consistent(graph: Graph) -> None:
    """Users are just the readers among the nodes."""
    nodes = graph.nodes()
    assert set(nodes) == {value for value in nodes if value in graph}
    assert len(graph) == len(nodes)
    for value in nodes:
        assert set(graph.users(value)) == {user for user in nodes if value in user.inputs}


def relu() -> Operator:
    return Activation("relu")


# --- users and replacement -----------------------------------------------------------------------------------------


def test_users_are_the_values_that_read_a_value_in_order() -> None:
    x = source()
    a, b = Plus(1.0)(x), Plus(2.0)(x)
    total = Add()(a, b)
    graph = Graph([x], total)
    assert graph.users(x) == [a, b]
    assert graph.users(a) == [total] and graph.users(total) == []
    assert_consistent(graph)


def test_reads_are_counted_with_repetition_and_outputs() -> None:
    x = source()
    a = Plus(1.0)(x)
    graph = Graph([x], [Add()(a, a), a])
    assert graph.use_count(a) == 3
    assert graph.users(a) == [graph.outputs[0]]


def test_replacing_a_value_rewires_its_users_and_drops_what_nobody_needs() -> None:
    x = source()
    a = Plus(1.0)(x)
    b = Plus(2.0)(a)
    c = relu()(b)
    graph = Graph([x], c)
    new = Plus(3.0)(x)
    assert graph.replace(b, new) == [new]
    assert c.inputs == (new,)
    assert a not in graph and b not in graph and new in graph
    assert graph.users(x) == [new]
    assert_consistent(graph)


def test_replacing_keeps_what_others_still_read() -> None:
    x = source()
    a = Plus(1.0)(x)
    b = Plus(2.0)(a)
    graph = Graph([x], (b, relu()(a)))
    graph.replace(b, Plus(3.0)(x))
    assert a in graph and b not in graph
    assert_consistent(graph)


def test_replacing_an_output_replaces_it_wherever_it_stands() -> None:
    x = source()
    a = Plus(1.0)(x)
    graph = Graph([x], {"one": a, "two": [a, 7]})
    new = Plus(2.0)(x)
    graph.replace(a, new)
    assert graph.outputs == {"one": new, "two": [new, 7]}
    assert graph.output_values == [new, new]
    assert a not in graph


def test_a_value_may_be_replaced_by_one_of_its_inputs() -> None:
    x = source()
    a = Plus(0.0)(x)
    b = relu()(a)
    graph = Graph([x], b)
    assert graph.replace(a, x) == []
    assert b.inputs == (x,) and graph.users(x) == [b] and a not in graph
    assert_consistent(graph)


def test_a_value_read_twice_by_one_user_is_replaced_in_both_places() -> None:
    x = source()
    a = Plus(1.0)(x)
    total = Add()(a, a)
    graph = Graph([x], total)
    new = Plus(2.0)(x)
    graph.replace(a, new)
    assert total.inputs == (new, new)
    assert_consistent(graph)


def test_a_replacement_may_read_the_value_that_it_replaces() -> None:
    x = source()
    a = Plus(1.0)(x)
    b = relu()(a)
    graph = Graph([x], b)
    new = Plus(2.0)(a)
    graph.replace(a, new)
    assert new.inputs == (a,) and b.inputs == (new,)
    assert_consistent(graph)


def test_a_replacement_may_read_the_value_that_it_replaces_through_other_new_values() -> None:
    x = source()
    a = Plus(1.0)(x)
    b = relu()(a)
    graph = Graph([x], b)
    inner = Plus(2.0)(a)
    graph.replace(a, Plus(3.0)(inner))
    assert inner.inputs == (a,)
    assert_consistent(graph)


def test_a_value_replaced_by_itself_stays() -> None:
    x = source()
    a = Plus(1.0)(x)
    b = relu()(a)
    graph = Graph([x], b)
    assert graph.replace(a, a) == []
    assert graph.users(a) == [b]
    assert_consistent(graph)


def test_dead_values_of_a_long_chain_go_together() -> None:
    x = source()
    values = chain(x, 500)
    graph = Graph([x], relu()(values[-1]))
    graph.replace(values[-1], Plus(500.0)(x))
    assert len(graph) == 3
    assert_consistent(graph)


def test_an_input_stays_when_nobody_reads_it() -> None:
    x, y = source("x"), source("y")
    a = Add()(x, y)
    graph = Graph([x, y], a)
    graph.replace(a, relu()(x))
    assert y in graph and graph.nodes()[:2] == [x, y]


def test_an_effect_stays_although_nobody_reads_it_and_is_replaced_like_an_output() -> None:
    x = source()
    effect = Plus(1.0)(x)
    graph = Graph([x], relu()(x), effects=[effect])
    assert effect in graph and effect in graph.nodes()
    graph.replace(graph.outputs, Plus(5.0)(x))
    assert effect in graph
    new = Plus(2.0)(x)
    graph.replace(effect, new)
    assert graph.effects == [new] and effect not in graph
    assert_consistent(graph)


# --- order ---------------------------------------------------------------------------------------------------------


def test_twenty_thousand_values_in_a_row_need_no_recursion() -> None:
    x = source()
    values = chain(x, 20_000)
    graph = Graph([x], values[-1])
    assert graph.nodes() == values
    assert float(graph.evaluate({"x": torch.zeros(())})) == 20_000
    graph.replace(values[-1], x)
    assert graph.nodes() == [x]


def test_every_value_comes_after_its_inputs() -> None:
    x = source()
    a, b = Plus(1.0)(x), Plus(2.0)(x)
    c = Add()(b, a)
    order = topological([Add()(c, a)])
    position = {value: index for index, value in enumerate(order)}
    assert all(position[used] < position[value] for value in order for used in value.inputs)
    assert topological([c], known={a, x}.__contains__) == [b, c]


def test_a_cycle_is_an_error_that_names_a_value() -> None:
    x = source()
    a = Plus(1.0)(x)
    b = Value(Plus(2.0), (a,), TYPE, Origin(("body.second",)))
    graph = Graph([x], b)
    graph.replace(x, b)  # now a reads b, and b reads a
    with pytest.raises(GraphError, match=r"depends on itself; a graph must not have cycles"):
        graph.nodes()


# --- evaluation ----------------------------------------------------------------------------------------------------


def test_evaluation_returns_the_nested_structure_of_the_outputs() -> None:
    x, y = source("x"), source("y")
    total = Add()(x, y)
    graph = Graph([x, y], {"sum": total, "all": (x, [total, None, 3, "text"])})
    one, two = torch.ones(2, 3), 2 * torch.ones(2, 3)
    result = graph.evaluate({"x": one, "y": two})
    assert torch.equal(result["sum"], one + two)
    first, (second, *rest) = result["all"]
    assert torch.equal(first, one) and torch.equal(second, one + two) and rest == [None, 3, "text"]


def test_evaluation_casts_parameters_to_the_dtype_asked_for() -> None:
    x = source()
    graph = Graph([x], Scale(torch.ones(1), torch.ones(1))(x))
    assert graph.evaluate({"x": torch.ones(2, 3).double()}, torch.float64).dtype == torch.float64
    assert graph.evaluate({"x": torch.ones(2, 3)}).dtype == torch.float32


def test_evaluation_tracks_no_gradients() -> None:
    x = source()
    assert not Graph([x], relu()(x)).evaluate({"x": torch.ones(2, 3, requires_grad=True)}).requires_grad


def test_effects_are_evaluated_once_each() -> None:
    calls: list[Tensor] = []
    x = source()
    effect = Value(Opaque(calls.append, (Slot(0),)), (x,), None)
    Graph([x], relu()(x), effects=[effect]).evaluate({"x": torch.ones(2, 3)})
    assert len(calls) == 1


def test_an_input_that_is_left_out_takes_its_default() -> None:
    x, y = source("x"), source("y", default=5)
    graph = Graph([x, y], Add()(x, y))
    assert torch.equal(graph.evaluate({"x": torch.ones(2, 3)}), 6 * torch.ones(2, 3))
    assert Graph([y], y).evaluate({"y": None}) is None


def test_an_input_without_a_value_is_an_error() -> None:
    x = source()
    with pytest.raises(GraphError, match=r"input 'x' has no value; pass one to evaluate\(\)"):
        Graph([x], relu()(x)).evaluate({})


def test_an_input_cannot_be_applied() -> None:
    with pytest.raises(GraphError, match="input 'x' cannot be applied to values"):
        Input("x")(source())


# --- views ---------------------------------------------------------------------------------------------------------


def test_the_networkx_view_has_the_same_edges() -> None:
    x = source()
    a = Plus(1.0)(x)
    total = Add()(a, x)
    view = Graph([x], total).networkx()
    assert set(view.edges) == {(x, a), (a, total), (x, total)}
    assert view.nodes[total] == {"label": "add", "where": "?"}
    assert networkx.immediate_dominators(view, x)[total] is x


def test_the_printed_graph_shows_types_and_where_each_value_comes_from() -> None:
    x = source()
    conv = Conv(torch.ones(4, 3))
    y = Value(conv, (x,), conv.infer(TYPE), Origin(("stem.conv",), "model.py:12"))
    z = Value(Add(), (y, y), y.type, Origin((), "model.py:13"))
    assert str(Graph([x], {"out": z, "n": 1})).splitlines() == [
        "%0 = input() : float32[2, 3]  # x",
        "%1 = linear 3->4(%0) : float32[2, 4]  # stem.conv (model.py:12)",
        "%2 = add(%1, %1) : float32[2, 4]  # model.py:13 (model.py:13)",
        "return {'out': '%2', 'n': 1}",
    ]


def test_origins_join_in_order_without_repetition() -> None:
    both = Origin(("a", "b")) | Origin(("b", "c"), "model.py:3")
    assert both == Origin(("a", "b", "c"), "model.py:3")
    assert str(both) == "a + b + c" and str(Origin()) == "?" and str(Origin(source="s.py:1")) == "s.py:1"


def test_a_value_that_is_no_tensor_says_so() -> None:
    value = Value(Opaque("split", (Slot(0), 2)), (source(),), None, Origin(("neck",)))
    with pytest.raises(GraphError, match="neck: expected a tensor, found split; use its elements instead"):
        _ = value.tensor_type
    assert repr(value) == "<neck: split -> None>"
    assert source().tensor_type == TYPE


def test_only_a_fixed_type_has_a_size_to_rely_on() -> None:
    free, fixed = (TensorType((1, 2, 5, 7), torch.float32, fixed) for fixed in (False, True))
    assert free.size(2) is None
    assert fixed.size(2) == (5, 7) and fixed.size(0) == ()
    assert fixed.with_shape([3, 4]) == TensorType((3, 4), torch.float32, fixed=True)


def test_an_operator_casts_floating_parameters_only() -> None:
    conv = Conv(torch.ones(2, 1, 3), torch.ones(2), pad_value=torch.ones(1))
    assert {t.dtype for t in conv.cast(torch.float16).tensors()} == {torch.float16}
    assert conv.cast(torch.float32) is conv
    assert Concat(-1).cast(torch.float64).tensors() == []
    call = Call.cast(Opaque(torch.index_select, (Slot(0), 0, torch.tensor([1]))), torch.float64)
    assert call.tensors()[0].dtype == torch.int64
