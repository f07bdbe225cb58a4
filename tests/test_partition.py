"""Is a region cut as well as trying every cut would, and only at values through which everything passes?"""

from __future__ import annotations

import itertools
import math
from typing import Any

import networkx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rgc.algebra import Conv
from rgc.ir import Graph, Input, TensorType, Value
from rgc.operators import Activation, Add, Constant
from rgc.partition import MOST_WAISTS, parts_that_pay
from rgc.region import Region, affine_regions


def source() -> Value:
    return Value(Input("x"), (), TensorType((2, 2), torch.float64), name="x")


def layer() -> Conv:
    return Conv(torch.ones(2, 2, dtype=torch.float64))


def region_of(x: Value, sink: Value) -> Region:
    (region,) = affine_regions(Graph([x], sink))
    return region


def chain(length: int) -> Region:
    x = value = source()
    for _ in range(length):
        value = layer()(value)
    return region_of(x, value)


@st.composite
def regions(draw: st.DrawFn) -> Region:
    """Layers, and sums with any earlier value: skips that nest, overlap, and leave waists between."""
    x = source()
    values = [x]
    for _ in range(draw(st.integers(1, 9))):
        made = layer()(values[-1])
        kind = draw(st.sampled_from(("layer", "layer", "sum", "constant")))
        if kind == "sum":
            made = Add()(made, values[draw(st.integers(0, len(values) - 1))])
        if kind == "constant":
            made = Add()(made, Constant(torch.ones(2, 2, dtype=torch.float64))())
        values.append(made)
    return region_of(x, values[-1])


def without_constants(region: Region) -> list[Value]:
    return [value for value in region.values if not isinstance(value.op, Constant)]


@given(region=regions())
def test_waists_are_what_dominates_the_sink(region: Region) -> None:
    graph: Any = networkx.DiGraph()
    graph.add_edges_from((used, value) for value in without_constants(region) for used in value.inputs)
    above = networkx.immediate_dominators(graph, region.source)
    path = [region.sink]
    while above.get(path[-1], region.source) is not region.source:
        path.append(above[path[-1]])
    assert [region.values[index] for index in region.waists] == path[::-1]


@given(region=regions())
def test_the_parts_between_waists_compute_what_the_region_computes(region: Region) -> None:
    x = whole = torch.tensor([[1.0, -2.0], [3.0, 5.0]], dtype=torch.float64)
    ends = [-1, *region.waists]
    parts = [region.between(first, last) for first, last in itertools.pairwise(ends)]
    for part in parts:
        x = part.evaluate(x)
    assert torch.equal(x, region.evaluate(whole))
    inside = [value for part in parts for value in without_constants(part)]
    assert sorted(map(id, inside)) == sorted(map(id, without_constants(region))), "each value is in one part"


def brute_force(region: Region, made: Any, price: Any, needed: set[Value]) -> float:
    """The least cost over all ways to cut at waists and to replace some of the parts."""
    waists, best = region.waists, math.inf
    for chosen in itertools.product((False, True), repeat=len(waists) - 1):
        ends = [-1, *(waist for waist, cut in zip(waists, chosen, strict=False) if cut), waists[-1]]
        parts = [region.between(first, last) for first, last in itertools.pairwise(ends)]
        best = min(best, math.fsum(min(as_it_is(part, price), replaced(part, made, price, needed)) for part in parts))
    return best


def as_it_is(part: Region, price: Any) -> float:
    return math.fsum(map(price, part.values))


def replaced(part: Region, made: Any, price: Any, needed: set[Value]) -> float:
    """What is made of the part, and what of it others read directly or through other values of the part."""
    cost = made(part)
    inside = set(part.values) - {part.sink}
    kept = inside & needed
    for _ in part.values:
        kept |= inside & {used for value in kept for used in value.inputs}
    return math.inf if cost is None else cost + math.fsum(map(price, kept))


@given(region=regions(), seed=st.integers(0, 999), data=st.data())
def test_a_plan_costs_what_the_best_of_all_cuts_costs(region: Region, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    prices = {value: float(torch.rand((), generator=generator)) for value in region.values}
    own = without_constants(region)
    needed = set(data.draw(st.lists(st.sampled_from(own), max_size=2)))
    costs: dict[tuple[int, int], float | None] = {}

    def made(part: Region) -> float | None:
        key = id(part.source), id(part.sink)
        if key not in costs:
            drawn = float(torch.rand((), generator=generator))
            costs[key] = None if drawn < 0.3 else drawn * len(part.values)
        return costs[key]

    price = prices.__getitem__
    parts = parts_that_pay(region, made, price, needed)
    gone = {value for part in parts for value in part.values}
    total = math.fsum(replaced(part, made, price, needed) for part in parts)
    total += math.fsum(price(value) for value in region.values if value not in gone)
    assert total == pytest.approx(brute_force(region, made, price, needed), abs=1e-12)


def test_of_plans_of_equal_cost_the_one_of_fewer_operators_is_taken() -> None:
    region = chain(4)
    (part,) = parts_that_pay(region, lambda part: float(len(part.values)), lambda value: 1.0)
    assert part.source is region.source and part.sink is region.sink


def test_what_nothing_is_made_of_stays() -> None:
    assert parts_that_pay(chain(4), lambda part: None, lambda value: 1.0) == []
    assert parts_that_pay(chain(4), lambda part: 5.0, lambda value: 1.0) == []


def test_so_many_parts_are_weighed_for_each_waist_and_the_whole_among_them() -> None:
    for length in (5 * MOST_WAISTS, 10 * MOST_WAISTS):
        weighed: list[Region] = []

        def made(part: Region, weighed: list[Region] = weighed) -> float:
            weighed.append(part)
            return 1.5

        region = chain(length)
        (part,) = parts_that_pay(region, made, lambda value: 1.0)
        assert part.source is region.source and part.sink is region.sink
        assert len(weighed) <= MOST_WAISTS * length + 1


def test_a_value_that_others_read_stays_inside_a_part_and_counts() -> None:
    x = source()
    first = layer()(x)
    second = layer()(first)
    region = next(
        r for r in affine_regions(Graph([x], (second, Activation("relu")(layer()(first))))) if r.sink is second
    )
    assert region.values == (first, second)
    assert len(parts_that_pay(region, lambda part: 1.5, lambda value: 1.0)) == 1
    assert parts_that_pay(region, lambda part: 1.5, lambda value: 1.0, {first}) == []
