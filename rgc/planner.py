"""Which neighbours of a linear chain should become one operator? Dynamic programming over exact merges.

Merging is not always faster, and choices along a chain interact: a 1x1 that merges into the 3x3 before it is gone for
the 3x3 behind it. A chain of n operators is cut into segments, each of which is one operator, such that the sum of
their costs is least: best[j] = min over i of best[i - 1] + cost(i .. j). What a segment becomes is asked of the
rewrites themselves, two parts at a time and in every bracketing, so the plan holds nothing that no rewrite can do.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from rgc.algebra import Linear
from rgc.decisions import form_of_chain
from rgc.ir import Graph, Operator, Value

#: So many operators of a chain are looked at together; longer ones in windows around the pair in question.
LONGEST_CHAIN = 8

#: What two operators in a row become as one, applied to the value before them; None where no rewrite makes it.
Merge = Callable[[Value], Operator | None]


def chain_around(graph: Graph, value: Value) -> tuple[Value, ...]:
    """The linear operators in a row before and behind ``value``, each read by the next and by nobody else."""
    before, behind = [value], [value]
    while len(before) < LONGEST_CHAIN and _continues(graph, before[-1].inputs[0], before[-1]):
        before.append(before[-1].inputs[0])
    while len(behind) < LONGEST_CHAIN:
        users = graph.users(behind[-1])
        if len(users) != 1 or not _continues(graph, behind[-1], users[0]):
            break
        behind.append(users[0])
    excess = len(before) + len(behind) - 1 - LONGEST_CHAIN
    if excess > 0:
        kept = max(2, min(len(before) - excess, LONGEST_CHAIN // 2 + 1))
        before = before[:kept]
        behind = behind[: LONGEST_CHAIN - kept + 1]
    return (*before[:0:-1], *behind)


def _continues(graph: Graph, first: Value, second: Value) -> bool:
    linear = all(isinstance(each.op, Linear) and len(each.inputs) == 1 for each in (first, second))
    return linear and graph.use_count(first) == 1


#: Two operators, by their ids, on an input of this shape; the values of a chain by their ids.
_Pair = tuple[int, int, tuple[int, ...]]
_Chain = tuple[int, ...]
#: The one operator of each part of a chain, by its first and last index; None where no rewrite makes it.
_Made = dict[tuple[int, int], Operator | None]


@dataclass
class _Plan:
    """A chain, what its parts would become, the pairs that were asked for, and the segment of each of its values."""

    chain: tuple[Value, ...]  # keeps the values and their ids
    made: _Made
    pairs: set[_Pair]
    numbers: list[int] = field(default_factory=list)  # when somebody asks for them
    form: str = ""  # as well


@dataclass
class Planner:
    """Plans of the chains that were asked for, and what pairs of operators become, so that nothing is asked twice.

    bound: what no merge may cost more of than all that it replaces.
    """

    merge: Merge
    cost: Callable[[Value], float]
    bound: Callable[[Value], float] = lambda _: 0.0
    _pairs: dict[_Pair, tuple[Operator, Operator, Operator | None]] = field(default_factory=dict)
    _plans: dict[_Chain, _Plan] = field(default_factory=dict)
    _plans_of: dict[Value, set[_Chain]] = field(default_factory=dict)
    _asked: Counter[_Pair] = field(default_factory=Counter)  # by how many plans

    def segments(self, chain: Sequence[Value]) -> list[int]:
        """For each value of the chain, the number of its segment in the plan of least cost."""
        plan = self._plan(chain)
        plan.numbers = plan.numbers or self._cut(chain, plan.made)
        return plan.numbers

    def form_around(self, graph: Graph, first: Value, second: Value) -> str:
        """What the plan of two neighbours depends on, beside costs; empty where there is nothing to choose."""
        chain = chain_around(graph, first)
        if len(chain) < 3 or second not in chain:
            return ""
        plan = self._plan(chain)
        plan.form = plan.form or form_of_chain(chain, plan.made.items())
        return plan.form

    def _plan(self, chain: Sequence[Value]) -> _Plan:
        key = tuple(map(id, chain))
        if key not in self._plans:
            pairs: set[_Pair] = set()
            self._plans[key] = _Plan(tuple(chain), self._operators(chain, pairs), pairs)
            self._asked.update(pairs)
            for value in chain:
                self._plans_of.setdefault(value, set()).add(key)
        return self._plans[key]

    def forget(self, values: Iterable[Value]) -> None:
        """Drop the plans of chains that hold one of ``values``, and the operators that were made for them."""
        for key in {key for value in values for key in self._plans_of.get(value, ())}:
            plan = self._plans.pop(key)
            for value in plan.chain:
                self._plans_of[value].discard(key)
                if not self._plans_of[value]:
                    del self._plans_of[value]
            for pair in plan.pairs:
                self._asked[pair] -= 1
                if not self._asked[pair]:
                    del self._asked[pair], self._pairs[pair]

    def segments_of(
        self, graph: Graph, first: Value, second: Value
    ) -> tuple[tuple[Value, ...], tuple[Value, ...]] | None:
        """The segments that hold two neighbours in the plan of their chain; None where there is nothing to choose."""
        chain = chain_around(graph, first)
        if len(chain) < 3 or second not in chain:
            return None
        numbers = self.segments(chain)
        mine, its = (numbers[chain.index(value)] for value in (first, second))
        members = list(zip(chain, numbers, strict=True))
        return tuple(v for v, n in members if n == mine), tuple(v for v, n in members if n == its)

    def as_one(self, chain: Sequence[Value]) -> Operator | None:
        """The whole chain as one operator; None where no rewrite makes it."""
        return self._operators(chain, set())[0, len(chain) - 1]

    def _cut(self, chain: Sequence[Value], made: _Made) -> list[int]:
        bounds = [0.0, *itertools.accumulate(map(self.bound, chain))]
        best: list[tuple[float, int, int]] = [(0.0, 0, 0)]  # cost, segments, start of the last segment
        for end, value in enumerate(chain):
            options = [(best[end][0] + self.cost(value), best[end][1] + 1, end)]
            for start in range(end):
                op = made[start, end]
                merged = None if op is None else op(chain[start].inputs[0])
                if merged is not None and self.bound(merged) <= (bounds[end + 1] - bounds[start]) * (1 + 1e-9):
                    options.append((best[start][0] + self.cost(merged), best[start][1] + 1, start))
            best.append(min(options))  # of equal cost, the one of fewer segments
        numbers, end = [0] * len(chain), len(chain)
        while end:
            _, segment, start = best[end]
            numbers[start:end] = [segment] * (end - start)
            end = start
        return numbers

    def _operators(self, chain: Sequence[Value], pairs: set[_Pair]) -> _Made:
        """What each part of the chain would become; notes in ``pairs`` which pairs were asked for."""
        made: _Made = {(i, i): value.op for i, value in enumerate(chain)}
        for length in range(1, len(chain)):
            for start in range(len(chain) - length):
                end = start + length
                splits = ((made[start, cut], made[cut + 1, end]) for cut in range(start, end))
                results = (
                    self._pair(a, b, chain[start].inputs[0], pairs)
                    for a, b in splits
                    if a is not None and b is not None
                )
                made[start, end] = next((op for op in results if op is not None), None)
        return made

    def _pair(self, first: Operator, second: Operator, source: Value, pairs: set[_Pair]) -> Operator | None:
        key = (id(first), id(second), source.tensor_type.shape)
        pairs.add(key)
        if key not in self._pairs:
            self._pairs[key] = (first, second, self.merge(second(first(source))))
        return self._pairs[key][2]
