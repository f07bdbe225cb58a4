"""Which parts of an affine region should become one operator each? Dynamic programming over its waists.

A region is cut at values through which everything passes, and each part between two cuts stays as it is or becomes
what a rewrite makes of it: best[j] = min over i < j of best[i] + min(cost as it is, cost of what is made of i .. j).
So a part may pay where the whole is too large or slower, and where the whole pays it is one part. What a part becomes
is asked of the rewrites, on an outline: its sizes and costs are known before any number of it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from rgc.ir import Value
from rgc.operators import Constant
from rgc.region import Region

#: A part spans at most so many waists, or the whole region: the number of parts that are weighed grows linearly.
MOST_WAISTS = 16


@dataclass(frozen=True)
class _Plan:
    """The cheapest way up to a waist: its cost, its operators, and its last part, which begins at the waist ``start``.

    part: None where the last part stays as it is.
    """

    cost: float = 0.0
    operators: int = 0
    start: int = 0
    part: Region | None = None


def parts_that_pay(
    region: Region,
    made: Callable[[Region], float | None],
    price: Callable[[Value], float],
    needed: Collection[Value] = (),
) -> list[Region]:
    """The parts to be replaced in the cheapest plan, first to last; the rest of the region stays as it is.

    made: what the best rewrite of a part costs, None where there is none. price: the cost of a value as it is.
    needed: values that are read outside the region as well, and stay whatever becomes of the part around them.
    """
    ends = [-1, *region.waists]
    plans = [_Plan()]
    for last in range(1, len(ends)):
        before = plans[-1]
        left = region.values[ends[last - 1] + 1 : ends[last] + 1]
        own = sum(not isinstance(value.op, Constant) for value in left)
        options = [_Plan(before.cost + sum(map(price, left)), before.operators + own, last - 1)]
        starts = range(max(0, last - MOST_WAISTS), last)
        whole = [0] if last == len(ends) - 1 and starts[0] > 0 else []
        for start in (*whole, *starts):
            part = region.between(ends[start], ends[last])
            cost = made(part)
            if cost is not None:
                kept = _kept(part, needed)
                total = plans[start].cost + cost + sum(map(price, kept))
                options.append(_Plan(total, plans[start].operators + 1 + len(kept), start, part))
        plans.append(min(options, key=lambda plan: (plan.cost, plan.operators)))
    chosen, place = [], len(plans) - 1
    while place:
        plan = plans[place]
        chosen += [] if plan.part is None else [plan.part]
        place = plan.start
    return chosen[::-1]


def _kept(part: Region, needed: Collection[Value]) -> set[Value]:
    """The values inside the part that stay when its sink is replaced."""
    inside = set(part.values)
    stack = [value for value in part.values[:-1] if value in needed]
    kept: set[Value] = set()
    while stack:
        value = stack.pop()
        if value in inside and value not in kept:
            kept.add(value)
            stack += value.inputs
    return kept
