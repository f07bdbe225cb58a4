"""Does the planner cut a chain as well as trying everything would, and better than merging greedily?"""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rgc
from rgc import Conv, Refusal, TensorType, Value, compose, engine
from rgc.cost import CPU, cost
from rgc.ir import Graph, Input, Operator
from rgc.planner import LONGEST_CHAIN, Planner, chain_around
from rgc.testing import randomize


def source(channels: int, size: int) -> Value:
    return Value(Input("x"), (), TensorType((1, channels, size, size), torch.float32), name="x")


def conv(reads: int, makes: int, kernel: int = 1, padding: int = 0, groups: int = 1) -> Conv:
    weight = torch.randn(makes, reads // groups, kernel, kernel, generator=torch.Generator().manual_seed(kernel))
    return Conv(weight, padding=padding, groups=groups)


def applied(x: Value, ops: list[Operator]) -> list[Value]:
    values = []
    for op in ops:
        x = op(x)
        values.append(x)
    return values


def composed(value: Value) -> Operator | None:
    first, second = value.inputs[0].op, value.op
    assert isinstance(first, Conv) and isinstance(second, Conv)
    try:
        return compose(second, first)
    except Refusal:
        return None


def priced(value: Value) -> float:
    return cost([value], "latency", CPU)


def total(chain: list[Value], numbers: list[int]) -> float:
    """What the plan costs: the price of each segment's operator, composed in whichever order is exact."""
    parts = [[v for v, n in zip(chain, numbers, strict=True) if n == number] for number in dict.fromkeys(numbers)]
    return math.fsum(price_of(part) for part in parts)


def price_of(part: list[Value]) -> float:
    merged = every_merge(tuple(value.op for value in part))
    return min((priced(op(part[0].inputs[0])) for op in merged), default=math.inf)


def every_merge(ops: tuple[Any, ...]) -> list[Operator]:
    """What a part becomes, over all bracketings."""
    if len(ops) == 1:
        return [ops[0]]
    found: list[Operator] = []
    for cut in range(1, len(ops)):
        for first, second in itertools.product(merges_of(ops[:cut]), merges_of(ops[cut:])):
            try:
                found.append(compose(second, first))  # type: ignore[arg-type]  # all are Conv
            except Refusal:
                continue
    return found[:1]


@functools.cache
def merges_of(ops: tuple[Any, ...]) -> list[Operator]:
    return every_merge(ops)


def brute_force(chain: list[Value]) -> float:
    """The least cost over all 2^(n - 1) ways to cut the chain."""
    best = math.inf
    for cuts in itertools.product((0, 1), repeat=len(chain) - 1):
        numbers = list(itertools.accumulate(cuts, initial=0))
        best = min(best, total(chain, numbers))
    return best


@st.composite
def chains(draw: st.DrawFn) -> list[Value]:
    length, size = draw(st.integers(2, LONGEST_CHAIN)), draw(st.sampled_from((7, 14, 28)))
    widths = [draw(st.sampled_from((4, 8, 32, 64))) for _ in range(length + 1)]
    ops: list[Operator] = []
    for reads, makes in itertools.pairwise(widths):
        kernel = draw(st.sampled_from((1, 1, 1, 3)))
        groups = reads if reads == makes and kernel == 3 and draw(st.booleans()) else 1
        ops.append(conv(reads, makes, kernel, draw(st.integers(0, kernel // 2)), groups))
    return applied(source(widths[0], size), ops)


@given(chain=chains())
def test_a_plan_costs_what_the_best_of_all_cuts_costs(chain: list[Value]) -> None:
    numbers = Planner(composed, priced).segments(chain)
    assert total(chain, numbers) == pytest.approx(brute_force(chain), rel=1e-12)


def test_of_plans_of_equal_cost_the_one_of_fewer_operators_is_taken() -> None:
    chain = applied(source(4, 7), [conv(4, 4), conv(4, 4), conv(4, 4)])
    assert Planner(composed, lambda value: 0.0).segments(chain) == [1, 1, 1]


BOTTLENECK = ((32, 8, 1), (8, 32, 1), (32, 64, 3))


def layers(spec: tuple[tuple[int, int, int], ...]) -> nn.Module:
    return randomize(nn.Sequential(*(nn.Conv2d(reads, makes, kernel) for reads, makes, kernel in spec)))


def test_a_merge_that_pays_is_not_made_where_another_pays_more() -> None:
    """Merged from the front, 32 -> 8 -> 32 becomes 32 -> 32, which pays, and then 32 -> 64: 2.9 times dearer."""
    compiled = rgc.compile(layers(BOTTLENECK), torch.randn(1, 32, 14, 14))
    weights = [tuple(p.shape) for p in compiled.parameters() if p.dim() == 4]
    assert weights == [(8, 32, 1, 1), (64, 8, 3, 3)]
    reasons = [refused.reason for refused in compiled.report.refusals if refused.rewrite == "merge_pointwise"]
    assert any("estimated slower" in reason or "planned otherwise" in reason for reason in reasons)


def test_the_better_partner_is_named_while_the_plan_is_carried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal of the first pair is replaced once its neighbour is merged; here is what it says until then."""
    seen: list[str] = []
    original = engine._Worklist._is_planned

    def listening(worker: Any, case: Any, match: Any) -> bool:
        try:
            return original(worker, case, match)
        except Refusal as refusal:
            seen.append(refusal.reason)
            raise

    monkeypatch.setattr(engine._Worklist, "_is_planned", listening)
    rgc.compile(layers(BOTTLENECK), torch.randn(1, 32, 14, 14))
    assert set(seen) == {"planned otherwise: it pays more to merge with 2"}


@given(chain=chains())
def test_merging_greedily_never_costs_less_than_the_plan(chain: list[Value]) -> None:
    numbers = Planner(composed, priced).segments(chain)
    assert total(chain, numbers) <= greedily(chain) * (1 + 1e-12)


def greedily(chain: list[Value]) -> float:
    """What is left when each pair that pays is merged as soon as it is seen, from the front."""
    ops: list[Operator] = [value.op for value in chain]
    x, index = chain[0].inputs[0], 0
    while index + 1 < len(ops):
        values = applied(x, ops)
        before = values[index].inputs[0]
        try:
            merged = compose(ops[index + 1], ops[index])  # type: ignore[arg-type]  # all are Conv
        except Refusal:
            merged = None
        pair = priced(values[index]) + priced(values[index + 1])
        if merged is not None and priced(merged(before)) <= pair:
            ops[index : index + 2] = [merged]
            index = max(0, index - 1)
        else:
            index += 1
    return math.fsum(priced(value) for value in applied(x, ops))


def test_two_neighbours_are_told_with_whom_the_plan_joins_them() -> None:
    first, second, third = chain = applied(source(32, 14), [conv(32, 8), conv(8, 32), conv(32, 64, 3)])
    graph, planner = Graph([first.inputs[0]], third), Planner(composed, priced)
    assert planner.segments_of(graph, first, second) == ((first,), (second, third))
    assert planner.segments_of(graph, second, third) == ((second, third), (second, third))
    assert planner.segments_of(Graph([first.inputs[0]], second), first, second) is None  # nothing to choose
    whole = planner.as_one(chain)
    assert whole is not None and whole.label == "conv 3x3 32->64"


def test_a_chain_ends_where_somebody_else_reads() -> None:
    x = source(4, 7)
    first, second, third, fourth = applied(x, [conv(4, 4), conv(4, 4), conv(4, 4), conv(4, 4)])
    graph = Graph([x], (fourth, second))
    assert chain_around(graph, fourth) == (third, fourth) == chain_around(graph, third)
    assert chain_around(graph, first) == (first, second)


def test_a_long_chain_is_looked_at_through_a_window() -> None:
    x = source(4, 7)
    values = applied(x, [conv(4, 4) for _ in range(30)])
    graph = Graph([x], values[-1])
    for index, value in enumerate(values):
        chain = chain_around(graph, value)
        assert value in chain and len(chain) <= LONGEST_CHAIN + 1
        assert values[max(0, index - 1)] in chain and values[min(29, index + 1)] in chain


def test_what_was_made_for_a_plan_goes_with_the_values_of_its_chain() -> None:
    made: list[weakref.ref[Operator]] = []

    def noted(value: Value) -> Operator | None:
        op = composed(value)
        if op is not None:
            made.append(weakref.ref(op))
        return op

    planner = Planner(noted, priced)
    shared, alone = conv(4, 4), conv(4, 4)
    chains = [applied(source(4, 6), [shared, shared, last]) for last in (shared, alone)]
    for chain in chains:
        planner.segments(chain)
    planner.forget(chains[0][:1])
    assert any(ref() is not None for ref in made)  # of the other chain, also what both had asked for
    asked = len(made)
    planner.segments(chains[1])
    assert len(made) == asked
    planner.forget(chains[1])
    assert all(ref() is None for ref in made) and made
