"""Are the rewrites themselves asked, with their guards, the cost and the other readers of what would merge?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rgc.algebra import Conv
from rgc.compiler import trace
from rgc.engine import Policy
from rgc.ir import Graph, Value
from rgc.passbook import resolve
from rgc.testing import randomize
from rgc.what_if import (
    DEPTH,
    FIXED_SIZE,
    Declined,
    Edit,
    Merged,
    Part,
    Setting,
    ask,
    drop_bias,
    give_statistics,
    kept,
    move_padding,
    pad_ahead,
    readers,
    solutions,
)

WIDER = ((64, 4), (4, 64), (64, 1))

BASE = Setting(resolve("default")[0], Policy())


def part_of(*layers: nn.Module, channels: int = 2) -> tuple[Graph, Part]:
    """The graph of a chain, and the whole of it as a part."""
    torch.manual_seed(0)
    graph = trace(randomize(nn.Sequential(*layers)), torch.randn(1, channels, 9, 8)).graph
    source, *values = graph.nodes()
    return graph, Part(source, tuple(values))


def padded() -> nn.Module:
    return nn.Conv2d(2, 2, 3, padding=1, bias=False)


def merged(outcome: Merged | Declined) -> Value:
    assert isinstance(outcome, Merged), outcome
    (value,) = outcome.made
    return value


def declined(outcome: Merged | Declined) -> Declined:
    assert isinstance(outcome, Declined), outcome
    return outcome


def test_a_part_that_merges_is_built_without_computing_its_kernel() -> None:
    graph, part = part_of(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 3))
    outcome = ask(graph, part, BASE)
    value = merged(outcome)
    assert isinstance(outcome, Merged) and outcome.rewrite == "merge_pointwise"
    assert value.op.label == "conv 3x3 2->2" and value.tensor_type.shape == (1, 2, 7, 6)
    assert not isinstance(value.op.__dict__["weight"], Tensor)


def test_the_graph_is_left_as_it_is() -> None:
    graph, part = part_of(nn.Conv2d(2, 2, 1), nn.ReLU(), padded())
    before = str(graph)
    list(solutions(graph, part, replace(BASE, bypassed=frozenset(part.values[1:2])), [FIXED_SIZE]))
    assert str(graph) == before


def test_the_reason_is_that_of_the_rewrite() -> None:
    graph, part = part_of(padded(), padded())
    found = declined(ask(graph, part, BASE))
    assert found.reason.startswith("border ring") and not found.by_cost
    moved = move_padding(*part.values)(BASE)
    assert merged(ask(graph, part, moved)).op.label == "conv 5x5 2->2"


def test_moved_padding_counts_the_stride_of_the_first() -> None:
    graph, part = part_of(nn.Conv2d(2, 2, 3, stride=2, padding=1, bias=False), padded())
    value = merged(ask(graph, part, move_padding(*part.values)(BASE)))
    assert isinstance(value.op, Conv) and value.op.padding == ((3, 3), (3, 3)) and value.op.stride == (2, 2)
    assert value.tensor_type.shape == part.sink.tensor_type.shape


def test_changes_of_one_operator_add_up() -> None:
    graph, part = part_of(nn.Conv2d(2, 2, 3, padding=1), padded())
    first = part.values[0]
    moved, unbiased = move_padding(*part.values), drop_bias(first)
    for setting in (unbiased(moved(BASE)), moved(unbiased(BASE))):
        op = setting.operator(first)
        assert isinstance(op, Conv) and op.bias is None and op.padding == ((2, 2), (2, 2))
        assert merged(ask(graph, part, setting)).tensor_type.shape == part.sink.tensor_type.shape


def test_zeros_ahead_enlarge_the_source() -> None:
    graph, part = part_of(nn.AvgPool2d(2, 1), padded())
    assert "border ring" in declined(ask(graph, part, BASE)).reason
    value = merged(ask(graph, part, pad_ahead(part.sink, (1, 1))(BASE)))
    assert isinstance(value.op, Conv) and value.op.padding == ((1, 1), (1, 1))  # the zeros merge as well
    assert value.inputs[0].tensor_type == part.source.tensor_type
    assert value.tensor_type.shape == part.sink.tensor_type.shape


def test_zeros_that_stay_are_counted() -> None:
    graph, part = part_of(nn.AvgPool2d(2, 1), padded())
    enlarged = pad_ahead(part.sink, (1, 1))(replace(BASE, passes=resolve("merge_stage")[0]))
    outcome = ask(graph, part, enlarged)
    assert isinstance(outcome, Merged), outcome
    assert [value.op.label for value in outcome.made] == ["pad 1x1", "conv 4x4 2->2"]


def test_what_only_pays_with_a_third_is_told_with_it() -> None:
    graph, whole = part_of(*(nn.Conv2d(reads, makes, 1) for reads, makes in WIDER), channels=64)
    pair = Part(whole.source, whole.values[:2])
    outcome = ask(graph, pair, BASE)
    assert isinstance(outcome, Merged) and outcome.others == whole.values[2:]
    assert merged(outcome).op.label == "conv 1x1 64->1"
    alone = part_of(*(nn.Conv2d(reads, makes, 1) for reads, makes in WIDER[:2]), channels=64)
    assert declined(ask(*alone, BASE)).by_cost


def test_what_pays_more_with_another_is_declined() -> None:
    graph, whole = part_of(nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1), nn.Conv2d(32, 64, 3), channels=32)
    found = declined(ask(graph, Part(whole.source, whole.values[:2]), BASE))
    assert found == Declined("planned otherwise: it pays more to merge with 2", by_cost=True)
    assert isinstance(ask(graph, Part(whole.values[0], whole.values[1:]), BASE), Merged)


def test_a_fixed_size_or_no_bias_is_enough_for_a_pointwise_layer() -> None:
    graph, part = part_of(nn.Conv2d(2, 4, 1, padding=1), nn.Conv2d(4, 2, 3, padding=1))
    assert "its bias" in declined(ask(graph, part, BASE)).reason
    assert "bias map" in merged(ask(graph, part, FIXED_SIZE.apply(BASE))).op.label
    assert merged(ask(graph, part, drop_bias(part.values[0])(BASE))).op.label == "conv 3x3 2->2"


def test_statistics_that_are_given_have_a_mean_so_that_no_border_is_right_by_luck() -> None:
    norm = nn.BatchNorm2d(2, affine=False, track_running_stats=False)
    graph, part = part_of(norm, padded())
    assert "batch statistics" in declined(ask(graph, part, BASE)).reason
    given = give_statistics(part.values[0])(BASE)
    value = merged(ask(graph, part, replace(given, policy=Policy(objective="depth"))))
    assert isinstance(value.op, Conv) and value.op.pad_value is not None and bool(value.op.pad_value.all())


def test_what_does_not_pay_is_told_from_what_cannot_be() -> None:
    graph, part = part_of(nn.Conv2d(64, 2, 1), nn.Conv2d(2, 64, 1), channels=64)
    for objective, unit in (("macs", "multiply-accumulates"), ("params", "parameters")):
        dear = replace(BASE, policy=Policy(objective=objective))  # type: ignore[arg-type]  # a str from a tuple
        found = declined(ask(graph, part, dear))
        assert found.by_cost and unit in found.reason
        assert merged(ask(graph, part, DEPTH.apply(dear))).op.label == "conv 1x1 64->64"


def test_parameters_that_another_use_keeps_are_not_saved() -> None:
    shared = nn.Conv2d(2, 2, 1)
    graph, part = part_of(shared, nn.Conv2d(2, 2, 1, bias=False), nn.ReLU(), shared, nn.ReLU())
    pair = Part(part.source, part.values[:2])
    frugal = replace(BASE, policy=Policy(objective="params"))
    assert declined(ask(graph, pair, frugal)).by_cost
    assert merged(ask(graph, pair, BASE)).op.label == "conv 1x1 2->2"


def test_what_something_else_reads_stays() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.first(x)
            return torch.relu(y), self.second(y)

    graph = trace(Read().eval(), torch.randn(1, 2, 4, 4)).graph
    found = {value.where: value for value in graph.nodes()}
    part = Part(graph.inputs[0], (found["first"], found["second"]))
    assert kept(graph, part) == [found["first"]]
    assert readers(graph, part) == {found["first"]: [found["relu"]]}
    outcome = declined(ask(graph, part, BASE))
    assert outcome.by_cost and outcome.reason == "saves nothing: first is also used elsewhere"


def test_no_rewrite_no_reason() -> None:
    graph, part = part_of(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    assert ask(graph, part, replace(BASE, passes=())) == Declined("")


def test_only_the_smallest_sets_of_changes_are_found() -> None:
    graph, part = part_of(nn.Conv2d(2, 16, 1, padding=1), nn.Conv2d(16, 2, 3, padding=1))
    first = part.values[0]
    useless = Edit("useless", True, lambda setting: setting)
    unbiased = Edit("no bias", False, drop_bias(first))
    found = list(solutions(graph, part, BASE, [useless, unbiased, FIXED_SIZE]))
    assert [solution.edits for solution in found] == [(unbiased,), (FIXED_SIZE,)]
    assert all(solution.against == "" for solution in found)


def test_depth_stands_in_where_only_the_cost_is_against_it() -> None:
    graph, part = part_of(nn.Conv2d(64, 2, 1), nn.Conv2d(2, 64, 1), channels=64)
    (solution,) = solutions(graph, part, replace(BASE, policy=Policy(objective="macs")), [])
    assert solution.edits == (DEPTH,) and solution.against.startswith("costs more")


@pytest.mark.parametrize("passes", ["default", "fold_batchnorm"])
def test_a_fixed_size_brings_every_pass(passes: str) -> None:
    setting = FIXED_SIZE.apply(replace(BASE, passes=resolve(passes)[0]))
    assert setting.fixed and {each.name for each in setting.passes} == {each.name for each in resolve("all")[0]}
