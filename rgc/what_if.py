"""What would have to change for a part of a graph to become one operator? Asked of the rewrites, on changed operators.

Nothing here knows when a merge is exact. A change is made to the operators, the part is built anew, and the rewrites
themselves are asked, with their guards, the algebra and the gate of the cost model. Kernels are not computed.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch

from rgc.algebra import Conv, Linear
from rgc.engine import Policy, build, require_gain
from rgc.errors import Refusal
from rgc.ir import Graph, Input, Operator, TensorType, Value, topological
from rgc.operators import BatchNorm, Constant
from rgc.passbook import resolve
from rgc.region import Join, join_at
from rgc.rewrite import Case, Match, Pass, Rewrite

#: More changes together than this are no advice.
MOST_CHANGES = 3


@dataclass(frozen=True)
class Part:
    """Values of a graph that might be one operator: from ``source`` (not included) to the last, in order."""

    source: Value
    values: tuple[Value, ...]

    @property
    def sink(self) -> Value:
        """The value that the part computes."""
        return self.values[-1]


@dataclass(frozen=True)
class Setting:
    """How a part would be: operators changed, values bypassed, the source enlarged, its size fixed; passes, policy."""

    passes: tuple[Pass, ...]
    policy: Policy
    operators: Mapping[Value, Operator] = field(default_factory=lambda: MappingProxyType({}))
    bypassed: frozenset[Value] = frozenset()
    margin: tuple[int, ...] = ()
    fixed: bool = False

    def changing(self, operators: Mapping[Value, Operator]) -> Setting:
        """The same with other operators at some values."""
        return replace(self, operators=MappingProxyType({**self.operators, **operators}))


@dataclass(frozen=True)
class Edit:
    """One change in the words of PyTorch's or rgc's options."""

    words: str
    keeps_function: bool
    apply: Callable[[Setting], Setting]


#: Merges whatever is exactly mergeable, also what does not pay.
DEPTH = Edit(
    "--objective depth", True, lambda setting: replace(setting, policy=replace(setting.policy, objective="depth"))
)


#: Allows also what holds at the example's size only.
FIXED_SIZE = Edit("fixed size: --passes all", True, lambda setting: _freeze_size(setting))


@dataclass(frozen=True)
class Merged:
    """The part has become the values ``made``, by this rewrite."""

    rewrite: str
    made: tuple[Value, ...]


@dataclass(frozen=True)
class Declined:
    """No rewrite makes one operator of the part; ``by_cost`` says that one could, but it does not pay."""

    reason: str
    by_cost: bool = False


@dataclass(frozen=True)
class Solution:
    """A smallest set of edits that makes one operator of a part."""

    edits: tuple[Edit, ...]
    merged: Merged
    against: str  # what the gate says where the merge does not pay, or ""


def ask(graph: Graph, part: Part, setting: Setting) -> Merged | Declined:
    """What the rewrites of ``setting`` make of ``part``: one operator, or the reason of the first that declined."""
    twins = _rebuilt(part, setting)
    staying = kept(graph, part)
    dying = [value for value in part.values if value not in staying and not isinstance(value.op, Constant)]
    going = _freed(graph, dying, [twins[value] for value in dying if value not in setting.bypassed], setting)
    wanted = {twins[value] for value in part.values if value not in setting.bypassed}
    declined: Declined | None = None
    for rewrite, case, match in _matches(twins[part.sink], setting.passes):
        if not wanted <= set(match.interior):
            continue
        try:
            new = build(rewrite, case, match)
        except Refusal as refusal:
            declined = declined or Declined(refusal.reason)
            continue
        made = topological([new], known={twins[part.source], *match.interior}.__contains__)
        try:
            require_gain(setting.policy, going, made, next(iter(staying), None))
        except Refusal as refusal:
            declined = declined if declined and declined.by_cost else Declined(refusal.reason, by_cost=True)
            continue
        return Merged(rewrite.name, tuple(made))
    return declined or Declined("")


def solutions(graph: Graph, part: Part, setting: Setting, edits: Sequence[Edit]) -> Iterator[Solution]:
    """The smallest sets of ``edits`` after which the part merges, with `DEPTH` where only the cost is against it.

    No set is yielded that contains another one.
    """
    found: list[frozenset[int]] = []
    for size in range(MOST_CHANGES + 1):
        for chosen in itertools.combinations(range(len(edits)), size):
            if any(known <= set(chosen) for known in found):
                continue
            changed = setting
            for index in chosen:
                changed = edits[index].apply(changed)
            outcome, against = ask(graph, part, changed), ""
            picked = tuple(edits[index] for index in chosen)
            if isinstance(outcome, Declined) and outcome.by_cost:
                against = outcome.reason
                outcome, picked = ask(graph, part, DEPTH.apply(changed)), (*picked, DEPTH)
            if isinstance(outcome, Merged):
                found.append(frozenset(chosen))
                yield Solution(picked, outcome, against)


def readers(graph: Graph, part: Part) -> dict[Value, list[Value]]:
    """What else reads values inside the part; an empty list stands for the caller of the model."""
    outputs = set(graph.output_values)
    found = {value: [user for user in graph.users(value) if user not in part.values] for value in part.values[:-1]}
    return {value: users for value, users in found.items() if users or value in outputs}


def kept(graph: Graph, part: Part) -> list[Value]:
    """The linear operators of the part that would stay, because something else needs what they compute."""
    gone, staying = {part.sink}, []
    outputs = set(graph.output_values)
    for value in part.values[-2::-1]:
        if value in outputs or any(user not in gone for user in graph.users(value)):
            staying.append(value)
        else:
            gone.add(value)
    return [value for value in staying if isinstance(value.op, Linear)]


def move_padding(first: Value, second: Value) -> Callable[[Setting], Setting]:
    """The second convolution's padding given to the first."""
    a, b = first.op, second.op
    assert isinstance(a, Conv) and isinstance(b, Conv)
    sides = zip(a.padding, a.stride, b.padding, strict=True)
    padding = tuple((l1 + s1 * l2, r1 + s1 * r2) for (l1, r1), s1, (l2, r2) in sides)
    changed = {first: replace(a, padding=padding), second: replace(b, padding=0)}
    return lambda setting: setting.changing(changed)


def pad_ahead(second: Value, margin: tuple[int, ...]) -> Callable[[Setting], Setting]:
    """Zeros around the source of the part in place of the second convolution's padding."""
    b = second.op
    assert isinstance(b, Conv)
    changed = {second: replace(b, padding=0)}
    return lambda setting: replace(setting.changing(changed), margin=margin)


def drop_bias(value: Value) -> Callable[[Setting], Setting]:
    """A convolution without its bias."""
    op = value.op
    assert isinstance(op, Conv)
    changed = {value: replace(op, bias=None)}
    return lambda setting: setting.changing(changed)


def give_statistics(value: Value) -> Callable[[Setting], Setting]:
    """A batch norm with statistics of its own: any mean, so that no border is right by luck."""
    op = value.op
    assert isinstance(op, BatchNorm)
    changed = {value: replace(op, training=False, mean=torch.ones_like(op.mean))}
    return lambda setting: setting.changing(changed)


def _freeze_size(setting: Setting) -> Setting:
    """As under ``--passes all``."""
    every, _ = resolve("all")
    named = {each.name: each for each in (*every, *setting.passes)}
    return replace(setting, passes=tuple(named.values()), fixed=True)


def _rebuilt(part: Part, setting: Setting) -> dict[Value, Value]:
    given = part.source.tensor_type
    shape = list(given.shape)
    for axis, amount in enumerate(setting.margin):
        shape[len(shape) - len(setting.margin) + axis] += 2 * amount
    kind = TensorType(tuple(shape), given.dtype, given.fixed or setting.fixed)
    source = Value(Input("source"), (), kind, part.source.origin, part.source.name)
    twins = {part.source: source}
    for value in part.values:
        inputs = [twins.get(used, used) for used in value.inputs]
        if value in setting.bypassed:
            twins[value] = inputs[0]
            continue
        twins[value] = setting.operators.get(value, value.op)(*inputs)
        twins[value].origin, twins[value].name = value.origin, value.name
    return twins


def _matches(root: Value, passes: Sequence[Pass]) -> Iterator[tuple[Rewrite, Case, Match]]:
    order = {value: float(index) for index, value in enumerate(topological([root]))}
    join = join_at(root, order)
    for rewrite in passes:
        if not isinstance(rewrite, Rewrite):
            continue
        for case in rewrite.cases:
            if not case.matches_regions:
                yield from ((rewrite, case, match) for match in case.match(root))
            elif isinstance(join, Join) and (match := case.match_region(join)) is not None:
                yield rewrite, case, match


def _freed(graph: Graph, dying: list[Value], twins: list[Value], setting: Setting) -> list[Value]:
    """Under ``params`` the operators that other values share stay, as in the engine."""
    if setting.policy.objective != "params":
        return twins
    uses = Counter(id(value.op) for value in graph.nodes())
    gone = Counter(id(value.op) for value in dying)
    shared = {id(value.op) for value in dying if uses[id(value.op)] > gone[id(value.op)]}
    return [twin for twin in twins if id(twin.op) not in shared]


__all__ = [
    "DEPTH", "FIXED_SIZE", "Declined", "Edit", "Merged", "Part", "Setting", "Solution", "ask", "drop_bias",
    "give_statistics", "kept", "move_padding", "pad_ahead", "readers", "solutions",
]  # fmt: skip
