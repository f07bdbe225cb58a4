"""Does the engine apply rewrites as promised: linear work, no wrong firing, every refusal and failure reported?"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import pytest
import torch
from torch import Tensor, nn

import rgc
from rgc import (
    Activation,
    Add,
    BatchNorm,
    Conv,
    Deferred,
    Graph,
    Identity,
    Scale,
    Value,
    engine,
    graph_pass,
    models,
    rewrite,
)
from rgc.compiler import trace
from rgc.cost import CPU, Efficiency
from rgc.engine import Policy, apply, copy_graph
from rgc.ir import Input, Origin, TensorType, topological
from rgc.passes import ALL, DEFAULT, absorb_residual, collapse, drop_identity, fold_batchnorm, merge_pointwise
from rgc.testing import randomize


def source(*shape: int) -> Value:
    return Value(Input("x"), (), TensorType(shape or (2, 4, 8, 8), torch.float32), name="x")


def pointwise(seed: int, channels: int = 4) -> Conv:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(channels, channels, 1, 1, generator=generator, dtype=torch.float64)
    return Conv(weight / channels**0.5, torch.randn(channels, generator=generator, dtype=torch.float64))


def named(value: Value, name: str) -> Value:
    value.origin = Origin((name,))
    return value


def conv_bn(**options: Any) -> nn.Module:
    return randomize(nn.Sequential(nn.Conv2d(3, 4, 3, **options), nn.BatchNorm2d(4), nn.ReLU()))


def compiled_with(model: nn.Module, passes: Any, *shape: int, **options: Any) -> rgc.CompiledModule:
    """The result is right whatever the passes are."""
    x = torch.randn(shape or (2, 3, 9, 8), generator=torch.Generator().manual_seed(0))
    compiled = rgc.compile(model, x, passes=passes, **{"objective": "depth", **options})
    with torch.no_grad():
        expected, found = copy.deepcopy(model)(x.clone()), compiled(x.clone())
    assert float((expected - found).abs().max()) <= 1e-5 * float(expected.abs().max())
    return compiled


class _BranchesBehindASum(nn.Module):
    """Depthwise branches of a sum of different inputs: one of them alone could move into the ends of the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.wide = nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.Conv2d(64, 64, 1)
        self.small, self.large = nn.Conv2d(64, 64, 1, groups=64), nn.Conv2d(64, 64, 3, padding=1, groups=64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x) + self.wide(torch.sigmoid(x))
        return torch.relu(self.small(y) + self.large(y) + y)


def test_what_copies_a_layer_waits_for_what_makes_the_copy_needless() -> None:
    """On a machine that is slow at depthwise 1x1, to copy the wide layer pays, but to merge the branches pays more."""
    slow = replace(CPU, efficiency={**CPU.efficiency, "1x1 depthwise": Efficiency(((1.0, 1.0, 64.0, 196.0, 1e-5),))})
    seen = trace(randomize(_BranchesBehindASum()), torch.randn(1, 64, 14, 14))
    graph, record = apply(copy_graph(seen.original), list(DEFAULT), Policy("latency", slow))
    assert "distribute_over_branches" not in {firing.rewrite for firing in record.firings}
    assert sum(isinstance(value.op, Conv) for value in graph.nodes()) == 3


# --- the worklist ----------------------------------------------------------------------------------------------------


def visits(graph: Graph, passes: Any, monkeypatch: pytest.MonkeyPatch, objective: Any = "depth") -> int:
    count = 0
    visit = engine._Worklist._visit

    def counted(worker: Any, value: Value, may_copy: bool) -> None:
        nonlocal count
        count += 1
        visit(worker, value, may_copy)

    monkeypatch.setattr(engine._Worklist, "_visit", counted)
    apply(graph, passes, Policy(objective))
    return count


def chain_that_merges(length: int) -> Graph:
    x = value = source()
    for seed in range(length):
        value = pointwise(seed)(value)
    return Graph([x], value)


def chain_of_residuals(length: int) -> Graph:
    x = value = source()
    relu = Activation("relu")
    for seed in range(length // 3):
        value = relu(Add()(value, pointwise(seed)(value)))
    return Graph([x], value)


@pytest.mark.parametrize("chain", [chain_that_merges, chain_of_residuals])
def test_the_number_of_visits_is_linear_in_the_number_of_values(
    chain: Callable[[int], Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "check_firing", lambda *args, **options: 0.0)
    few, many = (visits(chain(length), DEFAULT, monkeypatch) for length in (200, 2000))
    assert few <= 8 * 200
    assert many <= 10.5 * few


def test_a_chain_of_layers_becomes_one_layer_and_the_proof_of_each_step_is_kept() -> None:
    graph, record = apply(chain_that_merges(30), [merge_pointwise], Policy("depth"))
    assert len(graph) == 2 and len(record.firings) == 29
    assert max(firing.max_error for firing in record.firings) < 1e-12


def test_a_refusal_is_dropped_when_what_stood_in_the_way_has_gone() -> None:
    x = source()
    shared = named(pointwise(0)(x), "shared")
    first, second = (named(pointwise(seed)(shared), name) for seed, name in ((1, "first"), (2, "second")))
    graph, record = apply(Graph([x], Add()(first, second)), DEFAULT, Policy("depth"))
    assert len(graph) == 2 and record.refused(graph) == []


def test_a_refusal_at_a_value_that_is_gone_is_not_reported() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Flatten(), nn.Linear(192, 2))
    report = rgc.compile(randomize(model), torch.randn(2, 3, 8, 8), passes="all").report
    assert [firing.rewrite for firing in report.rewrites] == ["collapse"] and report.refusals == []


def test_what_has_been_replaced_is_gone_with_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    x = source()
    y, made = x, []
    for index in range(5):
        y = pointwise(index)(y)
        made.append(weakref.ref(y))
    alive: list[int] = []
    replaced = engine._Worklist._replace

    def counting(self: Any, *args: Any) -> None:
        replaced(self, *args)
        made.extend(weakref.ref(value) for value in self.graph.nodes() if value is not x)
        alive.append(len({id(ref()) for ref in made if ref() is not None}) - len(self.graph) + 1)

    monkeypatch.setattr(engine._Worklist, "_replace", counting)
    graph = Graph([x], y)
    del y
    graph, record = apply(graph, [merge_pointwise], Policy("depth"))
    assert len(record.firings) == 4 and len(graph) == 2
    assert max(alive) <= 3  # the match of the firing under way still holds its own two values and their result


def test_a_limit_stops_after_so_many_firings() -> None:
    for limit in range(4):
        graph, record = apply(chain_that_merges(6), DEFAULT, Policy("depth", limit=limit))
        assert len(record.firings) == limit and len(graph) == 7 - limit


def test_a_limit_and_a_ban_hold_among_the_regions_of_a_graph() -> None:
    def graph() -> Graph:
        x = value = source()
        for index in range(3):
            for name in ("a", "b"):
                value = named(pointwise(index)(value), f"{name}{index}")
            value = Activation("relu")(value)
        for each in topological([value]):
            each.type = replace(each.tensor_type, fixed=True)
        return Graph([x], value)

    for limit in range(4):
        _, record = apply(graph(), [collapse], Policy("depth", limit=limit))
        assert len(record.firings) == limit
    _, record = apply(graph(), [collapse], Policy("depth", banned=frozenset({("collapse", "b1")})))
    assert sorted(firing.where for firing in record.firings) == ["b0", "b2"]


def test_a_banned_rewrite_leaves_that_place_alone() -> None:
    x = source()
    first, second = named(pointwise(0)(x), "first"), Value(pointwise(1), (), None)
    second = named(pointwise(1)(first), "second")
    banned = Policy("depth", banned=frozenset({("merge_pointwise", "second")}))
    graph, record = apply(Graph([x], second), [merge_pointwise], banned)
    assert len(graph) == 3 and record.firings == []


def test_a_copy_of_a_graph_shares_operators_and_no_values() -> None:
    x = source()
    y = pointwise(0)(x)
    graph = Graph([x], {"y": [y], "x": x, "n": 3})
    twin = copy_graph(graph)
    assert [value.op for value in twin.nodes()] == [value.op for value in graph.nodes()]
    assert not set(twin.nodes()) & set(graph.nodes())
    assert twin.outputs["n"] == 3 and twin.outputs["x"] is twin.inputs[0]


# --- who else uses a value -------------------------------------------------------------------------------------------


class Taps(nn.Module):
    """Returns an inner value beside the result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.conv(x)
        return self.bn(y), {"inner": y}


def test_an_inner_value_that_is_an_output_is_preserved() -> None:
    model, x = randomize(Taps()), torch.randn(2, 3, 8, 8)
    compiled = rgc.compile(model, x)
    expected, found = model(x), compiled(x)
    assert torch.allclose(expected[0], found[0], atol=1e-5) and torch.allclose(expected[1]["inner"], found[1]["inner"])
    (reason,) = [refused.reason for refused in compiled.report.refusals if refused.rewrite == "fold_batchnorm"]
    assert reason == "saves nothing: conv is also used elsewhere"


@pytest.mark.parametrize("objective", ["latency", "depth", "macs", "params"])
def test_no_objective_duplicates_a_layer_that_others_read(objective: Any) -> None:
    x = source()
    inner = named(pointwise(0)(x), "inner")
    outer = named(pointwise(1)(inner), "outer")
    graph, record = apply(Graph([x], (outer, Activation("relu")(inner))), DEFAULT, Policy(objective))
    assert len(graph) == 4 and record.firings == []
    assert "inner is also used elsewhere" in record.refused(graph)[0].reason


def test_parameters_that_two_layers_share_are_not_saved_by_merging_one() -> None:
    x, shared = source(), pointwise(0)
    relu = Activation("relu")
    first = named(pointwise(1)(shared(x)), "first")
    graph, record = apply(Graph([x], shared(relu(first))), [merge_pointwise], Policy("params"))
    assert len(record.firings) == 1, "the two kernels in a row are one of the same size"
    bn = BatchNorm(torch.zeros(4), torch.ones(4), torch.full((4,), 2.0), None, 1e-5, 2)
    graph, record = apply(Graph([x], shared(relu(bn(shared(x))))), [fold_batchnorm], Policy("params"))
    assert record.firings == [] and "costs more: 20 instead of 4 parameters" in record.refused(graph)[0].reason


def test_macs_and_latency_say_what_a_refused_merge_would_cost() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(64, 4, 1), nn.Conv2d(4, 64, 1)))
    for objective, words in (
        ("macs", "multiply-accumulates"),
        ("params", "parameters"),
        ("latency", "estimated slower"),
    ):
        report = compiled_with(model, [merge_pointwise], 2, 64, 28, 28, objective=objective).report
        assert words in report.refusals[0].reason and report.rewrites == []


# --- wrong rewrites of a user ----------------------------------------------------------------------------------------


@rewrite(lambda x, conv, bn: bn(conv(x)))
def wrong_sign(x: Value, conv: Conv, bn: BatchNorm) -> Value:
    folded = bn.as_linear()
    assert isinstance(folded, Scale)
    return (Scale(folded.scale, -folded.shift, folded.axes) @ conv)(x)


@rewrite(lambda x, conv, bn: bn(conv(x)))
def weight_and_bias_only(x: Value, conv: Conv, bn: BatchNorm) -> Value:
    folded = bn.as_linear()
    assert isinstance(folded, Scale) and conv.bias is not None
    return Conv(conv.weight * folded.scale.view(-1, 1, 1, 1), conv.bias * folded.scale + folded.shift)(x)


@rewrite(lambda x, conv, bn: bn(conv(x)))
def forgets_the_border(x: Value, conv: Conv, bn: BatchNorm) -> Value:
    return replace(bn.as_linear() @ conv, padding_mode="replicate")(x) if conv.is_padded else (bn.as_linear() @ conv)(x)


@rewrite(lambda x, conv, relu: relu(conv(x)))
def changes_the_shape(x: Value, conv: Conv, relu: Activation) -> Value:
    return relu(replace(conv, stride=2)(x))


@rewrite(lambda x, conv: conv(x))
def returns_no_value(x: Value, conv: Conv) -> Any:
    return conv


@rewrite(lambda x, conv: conv(x))
def raises_in_the_middle(x: Value, conv: Conv) -> Value:
    raise ValueError(f"cannot handle {conv.groups} groups")


@rewrite(lambda x, conv: conv(x))
def builds_a_malformed_operator(x: Value, conv: Conv) -> Value:
    return replace(conv, bias=torch.zeros(99))(x)


@rewrite(lambda x, conv, relu: relu(conv(x)))
def returns_a_value_from_elsewhere(x: Value, conv: Conv, relu: Activation) -> Value:
    return Identity()(x.inputs[0]) if x.inputs else Activation("tanh")(conv(x))


@rewrite(lambda x, conv, relu: relu(conv(x)))
def puts_off_what_raises(x: Value, conv: Conv, relu: Activation) -> Value:
    return relu(replace(conv, weight=Deferred(conv.shape, lambda: conv.kernels))(x))  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class LooksUp(rgc.Operator):
    """An operator of somebody's own that does not run."""

    def evaluate(self, *inputs: Any) -> Any:
        return {}["missing"]

    def infer(self, *types: TensorType | None) -> TensorType | None:
        return types[0]


@rewrite(lambda x, conv, relu: relu(conv(x)))
def builds_what_does_not_run(x: Value, conv: Conv, relu: Activation) -> Value:
    return Value(LooksUp(), [conv(x)], conv(x).type)


@rewrite(lambda x, relu: relu(x))
def right_below_six(x: Value, relu: Annotated[Activation, lambda op: op.name == "relu"]) -> Value:
    return Activation("relu6")(x)


WRONG = {
    wrong_sign: "differs by",
    forgets_the_border: "differs by",
    changes_the_shape: "turns float32[2, 4, 9, 8] into float32[2, 4, 5, 4]",
    returns_no_value: "it must return a Value, returned Conv",
    raises_in_the_middle: "it raised ValueError: cannot handle 1 groups (test_engine.py:",
    builds_a_malformed_operator: "bias [99] does not fit 4 output channels",
    returns_a_value_from_elsewhere: "differs by",
    puts_off_what_raises: "AttributeError: ",
    builds_what_does_not_run: "KeyError: 'missing'",
    right_below_six: "differs by",
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_a_wrong_rewrite_is_undone_and_reported(wrong: rgc.Rewrite) -> None:
    model = (
        conv_bn(padding=1)
        if "relu" not in wrong.cases[0].holes
        else randomize(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()))
    )
    report = compiled_with(model, ["default", wrong] if wrong is right_below_six else [wrong]).report
    (failure,) = report.failures
    assert failure.rewrite == wrong.name and WRONG[wrong] in failure.reason
    assert not any(firing.rewrite == wrong.name for firing in report.rewrites)
    with pytest.raises(rgc.NotEquivalentError, match=f"{wrong.name} at"):
        compiled_with(model, [wrong], strict=True)


@pytest.mark.parametrize(
    ("options", "unread"),
    [
        ({"stride": 2}, "stride=(2, 2)"),
        ({"padding": 1}, "padding=((1, 1), (1, 1))"),
        ({"dilation": 2}, "dilation=(2, 2)"),
        ({"padding": 1, "padding_mode": "circular"}, "padding_mode=circular"),
    ],
)
def test_a_rewrite_that_reads_weight_and_bias_only_is_refused_where_there_is_more(
    options: dict[str, Any], unread: str
) -> None:
    report = compiled_with(conv_bn(**options), [weight_and_bias_only]).report
    (refused,) = report.refusals
    assert refused.reason.startswith("the rule does not read") and unread in refused.reason
    assert compiled_with(conv_bn(), [weight_and_bias_only]).report.rewrites, "where there is no more it is right"


@rewrite(lambda x, pool, relu: relu(pool(x)))
def right_for_even_sizes(x: Value, pool: rgc.AvgPool, relu: Activation) -> Value:
    return relu(replace(pool, ceil_mode=not pool.ceil_mode)(x))


def test_a_rewrite_that_is_wrong_for_odd_sizes_only_is_found_at_an_even_size() -> None:
    report = compiled_with(nn.Sequential(nn.AvgPool2d(2), nn.ReLU()).eval(), [right_for_even_sizes], 2, 3, 8, 8).report
    assert report.rewrites == [] and report.failures[0].rewrite == "right_for_even_sizes"


def test_a_failed_rewrite_is_not_tried_again_at_the_same_place() -> None:
    model = randomize(nn.Sequential(*(layer for _ in range(3) for layer in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))))
    report = compiled_with(model, [wrong_sign, merge_pointwise]).report
    places = [failure.where for failure in report.failures]
    assert len(places) == len(set(places)) >= 1


# --- wrong only for the whole model ----------------------------------------------------------------------------------


def test_a_rewrite_that_only_the_whole_model_shows_to_be_wrong_is_found_and_banned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "check_firing", lambda *args, **options: 0.0)
    report = compiled_with(conv_bn(), ["default", wrong_sign, "-fold_batchnorm"]).report
    (failure,) = report.failures
    assert failure.rewrite == "wrong_sign" and failure.reason.startswith("the model differs by")
    assert not any(firing.rewrite == "wrong_sign" for firing in report.rewrites)


# --- loops -----------------------------------------------------------------------------------------------------------


@rewrite(lambda x, conv: conv(x))
def again_and_again(x: Value, conv: Conv) -> Value:
    return replace(conv, weight=conv.weight.clone())(x)


@graph_pass
def never_done(graph: Graph) -> Graph:
    """Replaces every activation by an equal one."""
    for value in graph.nodes():
        if isinstance(value.op, Activation):
            graph.replace(value, replace(value.op)(*value.inputs))
    return graph


@pytest.mark.parametrize("endless", [again_and_again, never_done], ids=lambda each: each.name)
def test_passes_that_never_end_are_stopped_with_a_clear_error(endless: Any) -> None:
    with pytest.raises(
        rgc.GraphError, match=rf"{endless.name} still fires at .* after \d+ firings: does a result match"
    ):
        rgc.compile(conv_bn(), torch.randn(2, 3, 8, 8), passes=[endless])


# --- graph passes ----------------------------------------------------------------------------------------------------


@graph_pass
def drop_every_activation(graph: Graph) -> Graph:
    """Wrong."""
    for value in graph.nodes():
        if isinstance(value.op, Activation):
            graph.replace(value, value.inputs[0])
    return graph


@graph_pass
def break_the_shapes(graph: Graph) -> Graph:
    """Leaves a graph that does not run."""
    for value in graph.nodes():
        if isinstance(value.op, Activation):
            graph.replace(value, Value(Conv(torch.ones(7, 5, 1, 1)), value.inputs, value.type))
    return graph


@graph_pass
def raise_in_the_middle(graph: Graph) -> Graph:
    """Damages the graph, then raises."""
    drop_every_activation.run(graph)
    raise KeyError("oops")


@graph_pass
def return_nothing(graph: Graph) -> Any:
    """Returns no graph."""


@graph_pass
def swap_the_outputs(graph: Graph) -> Graph:
    """Every value stays; only what is returned changes."""
    first, second = graph.output_values
    return Graph(graph.inputs, (second, first))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (drop_every_activation, "the model differs by"),
        (break_the_shapes, "its graph does not run: "),
        (raise_in_the_middle, "it raised KeyError: 'oops' (test_engine.py:"),
        (return_nothing, "it must return a Graph, returned NoneType"),
    ],
    ids=lambda each: getattr(each, "name", ""),
)
def test_a_wrong_graph_pass_is_undone_and_reported(wrong: Any, reason: str) -> None:
    report = compiled_with(conv_bn(), ["default", wrong]).report
    (failure,) = report.failures
    assert (failure.rewrite, failure.where) == (wrong.name, "model") and reason in failure.reason
    assert [firing.rewrite for firing in report.rewrites] == ["fold_batchnorm"]
    with pytest.raises(rgc.NotEquivalentError, match=f"{wrong.name} at model"):
        compiled_with(conv_bn(), [wrong], strict=True)


def test_a_graph_pass_that_only_changes_what_is_returned_is_checked_too() -> None:
    model, x = randomize(Taps()), torch.randn(2, 3, 8, 8)
    report = rgc.compile(model, x, passes=[swap_the_outputs]).report
    assert report.failures[0].rewrite == "swap_the_outputs"


@graph_pass
def refuse(graph: Graph) -> Graph:
    """Declines."""
    rgc.require(False, "there is nothing to do")
    return graph


def test_a_graph_pass_may_refuse_with_a_reason() -> None:
    (refused,) = compiled_with(conv_bn(), [refuse]).report.refusals
    assert (refused.rewrite, refused.where, refused.reason) == ("refuse", "model", "there is nothing to do")


# --- evidence, determinism, fixed point ------------------------------------------------------------------------------


def test_only_what_is_equal_to_the_last_bit_is_called_bitwise() -> None:
    @rewrite(lambda x, first, second: second(first(x)))
    def drop_second(x: Value, first: Activation, second: Scale) -> Value:
        return first(x)

    almost = Scale(torch.tensor([1 + 1e-13], dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    relu = Activation("relu")
    for scale, evidence in ((almost, "exact"), (Scale(torch.ones(1), torch.zeros(1)), "bitwise")):
        x = source()
        _, record = apply(Graph([x], scale(relu(x))), [drop_second], Policy())
        assert [firing.evidence for firing in record.firings] == [evidence]


@pytest.mark.parametrize("declared", [True, False])
def test_a_rewrite_that_relies_on_ranges_has_to_say_so(declared: bool) -> None:
    @rewrite(lambda x, relu: relu(x), relies_on_range=declared)
    def drop_inactive(x: Value, relu: Activation) -> Value:
        rgc.require(rgc.range_of(x).lower >= 0, "active")
        return x

    x = source()
    twice = Activation("relu")(Activation("sigmoid")(x))
    graph, record = apply(Graph([x], twice), [drop_inactive], Policy())
    if declared:
        (firing,) = record.firings
        assert (firing.evidence, firing.condition) == ("range-conditional", "? in [0, 1]")
        assert len(graph) == 2
    else:
        assert record.firings == [] and "differs by" in record.failures[0].reason


class Varied(nn.Module):
    """Something for every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU(1.0), nn.Dropout(0.1))
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.right = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = 0.5 * self.stem(x)
        y: Tensor = self.head(torch.relu(self.left(x) + self.right(x) + x))
        return y


MODELS: dict[str, Callable[[], nn.Module]] = {
    "varied": Varied,
    "chain": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)),
    "repvgg block": lambda: models.repvgg.RepVGGBlock(3, 3),
    "reducenet": lambda: models.reducenet(8, decay=1.0, widths=(4, 8, 8), num_classes=3),
    "dbb": lambda: models.dbb.DiverseBranchBlock(3, 6),
    "vanillanet": lambda: models.VanillaNet((4, 8, 8), (2, 1), num_classes=3, decay=0.5),
    "mobilenet": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6()),
}


@pytest.mark.parametrize("passes", ["default", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_compiling_twice_gives_the_same_and_compiling_the_result_changes_nothing(name: str, passes: str) -> None:
    import rgc.models

    torch.manual_seed(0)
    model, x = randomize(MODELS[name]()), torch.randn(2, 3, 16, 16)
    first, second = (rgc.compile(model, x, passes=passes) for _ in range(2))
    assert replace(first.report, seconds=0) == replace(second.report, seconds=0)
    assert str(first.graph) == str(second.graph)
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    again = rgc.compile(first, x, passes=passes)
    assert again.report.rewrites == [], again.report.rewrites
    assert again.report.ops_after == first.report.ops_after


def test_the_report_says_where_in_the_names_of_the_user() -> None:
    report = rgc.compile(randomize(Varied()), torch.randn(2, 3, 16, 16)).report
    folded = {firing.where for firing in report.rewrites if firing.rewrite == "fold_batchnorm"}
    assert folded >= {"stem.1", "left.1", "right.1"}


def test_a_merged_layer_carries_the_names_of_all_that_went_in() -> None:
    graph = trace(conv_bn(), torch.randn(2, 3, 8, 8), passes="default").graph
    assert "0 + 1" in {value.where for value in graph.nodes()}


def test_each_firing_names_the_layers_that_went_in_or_were_dropped() -> None:
    twice = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 2, 1))
    report = compiled_with(randomize(twice), "default").report
    assert {firing.rewrite: firing.sources for firing in report.rewrites} == {
        "fold_batchnorm": ("0", "1"), "drop_identity": ("2",), "merge_pointwise": ("0", "1", "3"),
    }  # fmt: skip

    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x) * torch.relu(torch.tanh(x).neg())

    firings = compiled_with(Same().eval(), "hygiene").report.rewrites
    assert [(firing.rewrite, firing.where, firing.sources) for firing in firings] == [("hygiene", "model", ())]


def test_the_order_in_which_passes_are_named_does_not_matter() -> None:
    model, x = randomize(Varied()), torch.randn(2, 3, 16, 16)
    forward, backward = (rgc.compile(model, x, passes=list(order)).report for order in (ALL, ALL[::-1]))
    assert replace(forward, seconds=0) == replace(backward, seconds=0)


def test_a_value_that_fills_a_hole_may_be_an_inner_value_too() -> None:
    @rewrite(lambda x, y, conv, first: (y + conv(x)) + first(x))
    def both(x: Value, y: Value, conv: Conv, first: Conv) -> Value:
        return Add()(y, (conv + first)(x))

    x = source()
    twice = pointwise(0)(x)
    total = Add()(Add()(twice, pointwise(1)(x)), twice)
    _, record = apply(Graph([x], total), [both], Policy("depth"))
    assert record.failures == []


def test_absorbing_and_dropping_leave_no_layer_that_does_nothing() -> None:
    x = source()
    graph, _ = apply(Graph([x], Identity()(Add()(x, Identity()(x)))), [drop_identity, absorb_residual], Policy())
    assert not any(isinstance(value.op, Identity) for value in graph.nodes())


def is_easy(op: Conv) -> bool:
    raise KeyError("easy")


def test_a_predicate_that_raises_is_reported_and_the_model_is_kept() -> None:
    @rewrite(lambda x, conv: conv(x))
    def nosy(x: Value, conv: Annotated[Conv, is_easy]) -> Value:
        return x

    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    report = rgc.compile(model, torch.randn(1, 3, 8, 8), passes=["default", nosy], objective="depth").report
    assert "its predicate is_easy raised KeyError: 'easy'" in [each.reason for each in report.failures]
    assert [each.rewrite for each in report.rewrites] == ["fold_batchnorm"]


def test_a_long_chain_merges_in_pairs_so_that_few_merges_are_large() -> None:
    torch.manual_seed(0)
    model = randomize(nn.Sequential(*(nn.Conv2d(2, 2, 3) for _ in range(8))).eval())
    found = rgc.compile(model, torch.randn(1, 2, 20, 20), passes=["merge_stage"], objective="depth").report
    assert found.ops_after.total() == 1
    assert sorted(label for firing in found.rewrites for label in firing.result) == sorted(
        f"conv {k}x{k} 2->2" for k in (5, 5, 5, 5, 9, 9, 17)
    )
