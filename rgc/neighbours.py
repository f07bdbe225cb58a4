"""Which operators of a graph would be the next to merge? Linear ones past views and activations, and branches of a sum.

An activation that is blended with its input, (1 - l) act(x) + l x, is taken as one step: faded, it is the identity.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rgc.algebra import Linear, Scale
from rgc.ir import Graph, Value
from rgc.operators import Activation, Add, Concat, Constant, Identity

#: A walk to the next linear operator gives up after so many others.
LONGEST_WALK = 8


def is_linear(value: Value) -> bool:
    """Is it a linear operator that does something?"""
    return isinstance(value.op, Linear) and not isinstance(value.op, Identity)


def after(graph: Graph, value: Value) -> list[tuple[tuple[Value, ...], Value]]:
    """The next linear operators and sums that read ``value``, each with what lies between."""
    found: dict[Value, tuple[Value, ...]] = {}
    pending: list[tuple[tuple[Value, ...], Value]] = [((), value)]
    while pending:
        between, at = pending.pop(0)
        for blend in _blends_of(graph, at):
            pending.append(((*between, *blend), blend[-1]))
        inside = {member for blend in _blends_of(graph, at) for member in blend}
        for user in graph.users(at):
            if user in inside:
                continue
            if is_linear(user) or isinstance(user.op, Add | Concat):
                found.setdefault(user, between)
            elif len(between) < LONGEST_WALK:
                pending.append(((*between, user), user))
    return [(between, end) for end, between in found.items()]


def before(value: Value) -> tuple[tuple[Value, ...], Value] | None:
    """The linear operator or sum before ``value``, with what lies between; None where the input comes first."""
    between: tuple[Value, ...] = ()
    ahead = value
    while len(between) < LONGEST_WALK:
        read = [used for used in ahead.inputs if not isinstance(used.op, Constant)]
        if len(read) != 1:
            return None
        (at,) = read
        blend = blend_at(at)
        if blend is not None:
            between, at = (*blend[1], *between), blend[0]
        if is_linear(at) or isinstance(at.op, Add | Concat):
            return between, at
        between, ahead = (at, *between), at
    return None


def blend_at(end: Value) -> tuple[Value, tuple[Value, ...]] | None:
    """If ``end`` is (1 - l) act(x) + l x: x, and the values that compute it from x, ``end`` last. Otherwise None."""
    if not isinstance(end.op, Add) or end.op.sign != 1:
        return None
    scales = [branch for branch in end.inputs if isinstance(branch.op, Scale)]
    if len(scales) != 2 or scales[0] is scales[1]:
        return None
    inner = [scale.inputs[0] for scale in scales]
    active = [value for value in inner if isinstance(value.op, Activation)]
    sources = [value.inputs[0] if value in active else value for value in inner]
    if len(active) != 1 or sources[0] is not sources[1]:
        return None
    weights = [(scale.op.scale, scale.op.shift) for scale in scales if isinstance(scale.op, Scale)]
    (w1, b1), (w2, b2) = weights
    whole = torch.allclose(w1.double() + w2.double(), torch.ones((), dtype=torch.float64)) and not (b1 + b2).any()
    return (sources[0], (active[0], *scales, end)) if whole else None


def branches(
    sink: Value, order: Mapping[Value, int]
) -> tuple[tuple[Value, tuple[Value, ...]] | None, Value | None]:  # fmt: skip
    """The value from which all branches that meet in ``sink`` start, and the values from there to ``sink``, in order.

    Activations are looked through. None where no such value is found, with the value that ended the search.
    """
    inside: set[Value] = set()
    frontier = {sink}
    while len(frontier) > 1 or not inside:
        latest = max(frontier, key=order.__getitem__, default=sink)
        frontier.discard(latest)
        affine = latest.op.affine or isinstance(latest.op, Activation)
        if (
            latest in inside
            or not affine
            or latest.type is None
            or not (latest.inputs or isinstance(latest.op, Constant))
        ):
            return None, latest
        inside.add(latest)
        frontier.update(latest.inputs)
    source = next(iter(frontier), None)
    if source is None or isinstance(source.op, Constant):
        return None, sink
    return (source, tuple(sorted(inside, key=order.__getitem__))), None


def between(graph: Graph, first: set[Value], second: set[Value]) -> set[Value] | None:
    """The values on the ways from ``first`` to ``second``; None where there is no way."""
    reached: set[Value] = set()
    pending = list(first)
    while pending:
        found = [user for user in graph.users(pending.pop()) if user not in reached]
        reached.update(found)
        pending += found
    if not reached & second:
        return None
    needed: set[Value] = set()
    pending = list(second & reached)
    while pending:
        used = [value for value in pending.pop().inputs if value in reached and value not in needed]
        needed.update(used)
        pending += used
    return needed - first - second


def _blends_of(graph: Graph, value: Value) -> list[tuple[Value, ...]]:
    """The blends of activations of ``value`` with itself."""
    active = [user for user in graph.users(value) if isinstance(user.op, Activation)]
    ends = [end for user in active for scale in graph.users(user) for end in graph.users(scale)]
    found = [blend for end in dict.fromkeys(ends) if (blend := blend_at(end)) is not None]
    return [members for source, members in found if source is value]


__all__ = ["after", "before", "between", "blend_at", "branches", "is_linear"]
