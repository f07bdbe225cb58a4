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
from rgc.engine import Policy, build, joined_by_plan, planner_of, require_gain
from rgc.errors import Refusal
from rgc.ir import Graph, Input, Operator, Value, topological
from rgc.operators import BatchNorm, Constant
from rgc.passbook import resolve
from rgc.planner import LONGEST_CHAIN
from rgc.rearrange import Pad
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

    def operator(self, value: Value) -> Operator:
        """The operator at a value, after the changes so far."""
        return self.operators.get(value, value.op)

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
    """The part has become the values ``made``, by this rewrite, together with ``others`` of its chain."""

    rewrite: str
    made: tuple[Value, ...]
    others: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Declined:
    """No rewrite makes one operator of the part; ``by_cost`` says that one could, but it, or the plan, does not pay."""

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
    twins = _rebuilt(part, setting, _enlarged(part, setting))
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
            planned = _planned(graph, part, setting) if case.is_pair else None
            if planned is None:
                require_gain(setting.policy, going, made, next(iter(staying), None))
        except Refusal as refusal:
            declined = declined if declined and declined.by_cost else Declined(refusal.reason, by_cost=True)
            continue
        return Merged(rewrite.name, tuple(made)) if planned is None else replace(planned, rewrite=rewrite.name)
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

    def apply(setting: Setting) -> Setting:
        a, b = setting.operator(first), setting.operator(second)
        assert isinstance(a, Conv) and isinstance(b, Conv)
        sides = zip(a.padding, a.stride, b.padding, strict=True)
        padding = tuple((l1 + s1 * l2, r1 + s1 * r2) for (l1, r1), s1, (l2, r2) in sides)
        return setting.changing({first: replace(a, padding=padding), second: replace(b, padding=0)})

    return apply


def pad_ahead(second: Value, margin: tuple[int, ...]) -> Callable[[Setting], Setting]:
    """Zeros around the source of the part in place of the second convolution's padding."""

    def apply(setting: Setting) -> Setting:
        op = setting.operator(second)
        assert isinstance(op, Conv)
        return replace(setting.changing({second: replace(op, padding=0)}), margin=margin)

    return apply


def drop_bias(value: Value) -> Callable[[Setting], Setting]:
    """A convolution without its bias."""

    def apply(setting: Setting) -> Setting:
        op = setting.operator(value)
        assert isinstance(op, Conv)
        return setting.changing({value: replace(op, bias=None)})

    return apply


def give_statistics(value: Value) -> Callable[[Setting], Setting]:
    """A batch norm with statistics of its own: any mean, so that no border is right by luck."""

    def apply(setting: Setting) -> Setting:
        op = setting.operator(value)
        assert isinstance(op, BatchNorm)
        return setting.changing({value: replace(op, training=False, mean=torch.ones_like(op.mean))})

    return apply


def _freeze_size(setting: Setting) -> Setting:
    """As under ``--passes all``."""
    every, _ = resolve("all")
    named = {each.name: each for each in (*every, *setting.passes)}
    return replace(setting, passes=tuple(named.values()), fixed=True)


def _planned(graph: Graph, part: Part, setting: Setting) -> Merged | None:
    """What the plan of the chain around the part joins it into; None where the gain of the two alone decides.

    Raises a `Refusal` where it pays more to merge with others.
    """
    neighbours, twins = _in_its_chain(graph, part, setting)
    second, first = (twins[value] for value in reversed(part.values) if value not in setting.bypassed)
    planner = planner_of([each for each in setting.passes if isinstance(each, Rewrite)], setting.policy)
    segments = planner.segments_of(neighbours, first, second)
    if not joined_by_plan(segments, first, second):
        return None
    assert segments is not None
    (segment, _) = segments
    real = {twin: value for value, twin in twins.items()}
    others = tuple(real[twin] for twin in segment if twin in real and twin not in (first, second))
    op = planner.as_one(segment)
    assert op is not None  # a segment of a plan is one operator
    source = segment[0].inputs[0]
    zeros = (source,) if setting.margin and source is first.inputs[0] else ()  # what stays of them is made as well
    return Merged("", (*zeros, op(source)), others)


def _in_its_chain(graph: Graph, part: Part, setting: Setting) -> tuple[Graph, dict[Value, Value]]:
    """The part as it would be, among the linear operators in a row before and behind it, and the twin of each value."""
    ahead: list[Value] = []
    at = part.source
    while len(ahead) < LONGEST_CHAIN and _is_link(at) and graph.use_count(at) == 1:
        ahead.append(at)
        at = at.inputs[0]
    x = source = _input_like(at, setting)
    twins: dict[Value, Value] = {}
    for value in reversed(ahead):
        x = twins[value] = value.op(x)
    if setting.margin:
        x = Pad(tuple((amount, amount) for amount in setting.margin))(x)
    rebuilt = _rebuilt(part, setting, x)
    del rebuilt[part.source]  # which is ahead, or an input
    twins |= rebuilt
    at = part.sink
    for _ in range(LONGEST_CHAIN):
        if graph.use_count(at) != 1 or not graph.users(at) or not _is_link(graph.users(at)[0]):
            break
        (user,) = graph.users(at)
        twins[user] = user.op(twins[at])
        at = user
    for value, twin in twins.items():
        if value not in setting.bypassed:
            twin.origin, twin.name = value.origin, value.name
    needed = [twins[value] for value in kept(graph, part) if value not in setting.bypassed]
    return Graph([source], (twins[at], *needed)), twins


def _is_link(value: Value) -> bool:
    return isinstance(value.op, Linear) and len(value.inputs) == 1


def _enlarged(part: Part, setting: Setting) -> Value:
    """A source for the part: an input of the size that it would read."""
    source = _input_like(part.source, setting)
    if not setting.margin:
        return source
    lead = source.tensor_type.shape[: -len(setting.margin)]
    sizes = zip(source.tensor_type.shape[len(lead) :], setting.margin, strict=True)
    source.type = source.tensor_type.with_shape((*lead, *(size + 2 * amount for size, amount in sizes)))
    return source


def _input_like(value: Value, setting: Setting) -> Value:
    kind = replace(value.tensor_type, fixed=value.tensor_type.fixed or setting.fixed)
    return Value(Input("source"), (), kind, value.origin, value.name)


def _rebuilt(part: Part, setting: Setting, source: Value) -> dict[Value, Value]:
    twins = {part.source: source}
    for value in part.values:
        inputs = [twins.get(used, used) for used in value.inputs]
        if value in setting.bypassed:
            twins[value] = inputs[0]
            continue
        twins[value] = setting.operator(value)(*inputs)
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
