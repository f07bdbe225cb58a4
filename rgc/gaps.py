"""What stands between two operators, and which options of PyTorch or rgc would take it away?

Neighbours are found in the graph that the passes left: the next linear operator, past views and activations, and the
sums in which branches meet. A change is put to the rewrites (`rgc.what_if`) before it is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from torch import nn

from rgc.algebra import Conv, Scale
from rgc.compiler import Trace
from rgc.cost import Target, cost
from rgc.decay import DecayedActivation, DecayedLeakyReLU
from rgc.engine import Policy, build
from rgc.errors import Refusal
from rgc.explanation import Cost, Gain, Gap, Remedy
from rgc.ir import Graph, Input, Value, topological
from rgc.neighbours import after, before, blend_at, branches, is_linear
from rgc.neighbours import between as ways_between
from rgc.operators import Activation, Add, AvgPool, BatchNorm, Concat, Constant, Identity
from rgc.passbook import resolve
from rgc.rewrite import Pass, Rewrite
from rgc.what_if import (
    DEPTH,
    FIXED_SIZE,
    Declined,
    Edit,
    Part,
    Setting,
    Solution,
    ask,
    drop_bias,
    give_statistics,
    kept,
    move_padding,
    pad_ahead,
    readers,
    solutions,
)

#: Fading more activations than this at once is no advice.
MOST_ACTIVATIONS = 3

#: The pass that takes a residual through the activations beside it, which is made only if asked for by name.
BY_NAME = "single_path"

#: More ways out than this are no help.
MOST_REMEDIES = 3


@dataclass(frozen=True)
class Story:
    """A compilation as far as explaining needs it: the model, its graph before and after, and what may be done."""

    model: nn.Module
    traced: Trace
    passes: tuple[Pass, ...]
    policy: Policy
    trace_at_fixed_size: Callable[[], Graph]

    @cached_property
    def at_fixed_size(self) -> Graph:
        """What the passes leave where they may rely on the example's size."""
        return self.trace_at_fixed_size()

    @property
    def graph(self) -> Graph:
        """The graph that the passes left."""
        return self.traced.graph

    @property
    def target(self) -> Target:
        """The machine whose times are estimated."""
        return self.policy.target

    @cached_property
    def originals(self) -> dict[str, list[Value]]:
        """The values of the traced model by path."""
        return _by_path(self.traced.original)

    @cached_property
    def results(self) -> dict[str, list[Value]]:
        """The values that are left, by each path that went into them."""
        return _by_path(self.graph)

    @cached_property
    def order(self) -> dict[Value, int]:
        """The values that are left, numbered."""
        return {value: index for index, value in enumerate(self.graph.nodes())}

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The modules of the model by path, those with several paths under each."""
        return dict(self.model.named_modules(remove_duplicate=False))

    @cached_property
    def refusals(self) -> dict[Value, str]:
        """What the first rewrite that declined at a value said."""
        found: dict[Value, str] = {}
        for (_, value), reason in self.traced.record.refusals.items():
            if value is not None:
                found.setdefault(value, reason)
        return found

    def sources(self, value: Value) -> list[tuple[str, Value]]:
        """The values of the traced model that went into ``value``, each with its path."""
        return [(path, each) for path in value.origin.paths for each in self.originals.get(path, [])]

    def entrance(self, value: Value) -> str | None:
        """The path of the one layer through which all that ``value`` reads enters; None where branches do."""
        found = self.sources(value)
        if any(isinstance(each.op, Add | Concat) for _, each in found):
            return None
        members = {each for _, each in found}
        first = {path for path, each in found if ways_between(self.traced.original, members - {each}, {each}) is None}
        return first.pop() if len(first) == 1 else None

    def convolution(self, value: Value) -> tuple[str, Conv] | None:
        """The path and operator of the user's one convolution that went into ``value``; None if it is not one."""
        found = [(path, each.op) for path, each in self.sources(value) if isinstance(each.op, Conv)]
        return found[0] if len(found) == 1 else None


def _by_path(graph: Graph) -> dict[str, list[Value]]:
    found: dict[str, list[Value]] = {}
    for value in graph.nodes():
        for path in value.origin.paths:
            found.setdefault(path, []).append(value)
    return found


def gaps_at(story: Story, value: Value) -> Iterator[tuple[tuple[Value, ...], Gap]]:
    """Everything that stands between a value and its neighbours, each with its two ends, or with the sum it is at."""
    blended = any(blend_at(end) for end in (value, *story.graph.users(value)))
    if isinstance(value.op, Add | Concat) and not blended:
        yield (value,), _gap_of_sum(story, value)
    elif is_linear(value) and not blended:
        for between, end in after(story.graph, value):
            yield from _gap_after(story, value, between, end)
        if (found := before(value)) is not None:
            yield (found[1], value), _gap_of_chain(story, found[1], found[0], value)
    elif (first := _linear_before(value)) is not None:
        for between, end in after(story.graph, first):
            if value in between:
                yield from _gap_after(story, first, between, end)


def _linear_before(value: Value) -> Value | None:
    blend = blend_at(value)
    if blend is not None and is_linear(blend[0]):
        return blend[0]
    found = before(value if blend is None else blend[0])
    return None if found is None else found[1]


def _gap_after(
    story: Story, first: Value, between: tuple[Value, ...], end: Value
) -> Iterator[tuple[tuple[Value, ...], Gap]]:
    if is_linear(end):
        yield (first, end), _gap_of_chain(story, first, between, end)
        return
    found, _ = branches(end, story.order)
    if found is None or first in found[1]:
        yield (end,), _gap_of_sum(story, end)


def short_name(value: Value) -> str:
    """The leading layer of a value."""
    if isinstance(value.op, Input):
        return f"input {value.op.name}"
    return value.origin.paths[0] if value.origin.paths else value.where


def described(value: Value) -> str:
    """The operator of a value and its place: ``relu at layer1.0.relu``."""
    return value.op.label if value.where == value.op.label else f"{value.op.label} at {value.where}"


# --- chains and sums ---------------------------------------------------------------------------------------------


def _gap_of_chain(story: Story, first: Value, between: tuple[Value, ...], second: Value) -> Gap:
    ends = (short_name(first), short_name(second))
    obstacles = _obstacles(between)
    reasons = [*_other_plans(story, first, second), *_nonlinear(story, between)]
    if not is_linear(first):
        obstacles.append(f"{described(first)} is not one operator with its branches; explain it first")
    if obstacles or len(reasons) > MOST_ACTIVATIONS:
        remedies = () if reasons else _at_fixed_size(story, (first, second))
        return Gap(ends, "chain", (*obstacles, *reasons), remedies)
    part = Part(first.inputs[0], (first, *between, second))
    return _gap(story, part, "chain", ends, reasons, bypassed=between)


def _other_plans(story: Story, first: Value, second: Value) -> Iterator[str]:
    """With what else the plan of a chain joined two that could have been one."""
    told: set[tuple[str, str]] = set()
    for (inner, outer), (mine, its) in story.traced.record.planned.items():
        apart = set(inner.origin.paths) <= set(first.origin.paths) and set(outer.origin.paths) <= set(
            second.origin.paths
        )
        ends = short_name(inner), short_name(outer)
        if not apart or ends in told:
            continue
        told.add(ends)
        for end, other, segment in ((inner, outer, mine), (outer, inner, its)):
            if partners := [value for value in segment if value is not end]:
                joined = f"it pays more to make {short_name(end)} one operator with {_listed(partners)}"
                yield f"planned otherwise: {joined} than with {short_name(other)}"


def _gap_of_sum(story: Story, value: Value) -> Gap:
    found, blocker = branches(value, story.order)
    ends = tuple(dict.fromkeys(map(short_name, value.inputs)))
    if found is None:
        assert blocker is not None
        what = "the input of the model" if isinstance(blocker.op, Input) else described(blocker)
        reason = f"the branches that meet in {value.where} are not affine in one common value: {what} comes between"
        return Gap(ends, "sum", (reason,))
    part = Part(*found)
    reasons = _nonlinear(story, part.values)
    if len(reasons) > MOST_ACTIVATIONS:
        return Gap(ends, "sum", tuple(reasons))
    return _gap(story, part, "sum", ends, reasons, bypassed=_activations(part.values))


def _gap(
    story: Story, part: Part, kind: Literal["chain", "sum"], ends: tuple[str, ...], reasons: list[str],
    bypassed: Sequence[Value],
) -> Gap:  # fmt: skip
    base = Setting(story.passes, story.policy, bypassed=frozenset(bypassed))
    outcome = ask(story.graph, part, base)
    staying, others = kept(story.graph, part), readers(story.graph, part)
    if isinstance(outcome, Declined) and not (staying and outcome.by_cost):
        reasons.append(outcome.reason or f"none of the passes in use takes {' and '.join(ends)} together")
    if staying:
        stays = ", ".join(map(short_name, staying))
        also = (f"{short_name(value)} is also read by {_listed(users)}" for value, users in others.items())
        reasons.append(f"{'; '.join(also)}: {stays} must stay, so nothing is saved")
    if not reasons:
        reasons.append(_undone(story, part))
        return Gap(ends, kind, tuple(reasons))
    faded = tuple(_fade(story, value) for value in _activations(part.values))
    found = solutions(story.graph, part, base, _edits(story, part, free=not staying))
    remedies = [_remedy(story, part, faded, solution) for solution in found]
    if not bypassed and not any(remedy.keeps_function and remedy.pays for remedy in remedies):
        remedies += _at_fixed_size(story, (part.values[0], part.sink))
    if faded and kind == "sum":
        remedies += _around_activations(story, part)
    if not remedies:
        reasons += _shared(story, part)
    remedies.sort(key=lambda remedy: (not remedy.pays, not remedy.keeps_function, len(remedy.changes)))
    return Gap(ends, kind, tuple(reasons), tuple(remedies[:MOST_REMEDIES]))


def _remedy(story: Story, part: Part, faded: tuple[str, ...], solution: Solution) -> Remedy:
    made = [value for value in solution.merged.made if not isinstance(value.op, Constant)]
    staying = kept(story.graph, part)
    dying = [*(value for value in part.values if value not in staying), *solution.merged.others]
    gain = Gain(Cost.of(dying, story.target), Cost.of(made, story.target))
    changes = (*faded, *(edit.words for edit in solution.edits if edit is not DEPTH))
    keeps = not faded and all(edit.keeps_function for edit in solution.edits)
    result = " and ".join(value.op.label for value in made) or "nothing"
    if others := solution.merged.others:
        result += f" in place of {len(others) + 2} operators, with {_listed(others)}"
    pays, note = not solution.against, ""
    if solution.against.startswith("planned"):
        note = f"{solution.against}: only --objective depth merges it"
    elif pays and _is_dearer(story, made, dying):
        pays, note = False, "with the zeros it costs more than now, by this estimate"
    return Remedy(changes or (DEPTH.words,), result, gain, keeps, pays, note)


def _around_activations(story: Story, part: Part) -> Iterator[Remedy]:
    """What the pass that carries a residual through activations makes of a sum; they stay."""
    (default, _), ((opt_in,), _) = resolve("default"), resolve(BY_NAME)
    names = {each.name for each in story.passes}
    if not {each.name for each in default} <= names - {BY_NAME} or readers(story.graph, part):
        return
    assert isinstance(opt_in, Rewrite)
    for case in opt_in.cases:
        for match in case.match(part.sink):
            if set(match.interior) != set(part.values):
                continue
            try:
                new = build(opt_in, case, match)
            except Refusal:
                continue
            yield _single_path(story, part, topological([new], known=lambda value: value is part.source))
            return


def _single_path(story: Story, part: Part, made: list[Value]) -> Remedy:
    gain = Gain(Cost.of(part.values, story.target), Cost.of(made, story.target))
    labels = [value.op.label for value in made if not isinstance(value.op, Constant)]
    passes = "all" if part.source.tensor_type.fixed else "default"
    pays = not _is_dearer(story, made, part.values)
    note = "" if pays else "costs more by this estimate; asked for by name, it is made anyway"
    result = f"{', '.join(labels[:-1])} and {labels[-1]} in one path"
    return Remedy((f"--passes {passes},{BY_NAME}",), result, gain, True, pays, note)


def _is_dearer(story: Story, made: Sequence[Value], dying: Sequence[Value]) -> bool:
    objective, target = story.policy.objective, story.policy.target
    return cost(made, objective, target) > cost(dying, objective, target) * (1 + 1e-9)


def _at_fixed_size(story: Story, ends: tuple[Value, Value]) -> tuple[Remedy, ...]:
    """What ``--passes all`` makes of both and of more than the two, such as one matrix: seen in a second run."""
    if ends[0].tensor_type.fixed:
        return ()
    results = story.at_fixed_size.nodes()
    found = [value for value in results if all(set(end.origin.paths) <= set(value.origin.paths) for end in ends)]
    if not found:
        return ()
    paths = {path for value in found for path in value.origin.paths}
    dying = [value for value in story.graph.nodes() if value.origin.paths and set(value.origin.paths) <= paths]
    result = " and ".join(value.op.label for value in found)
    gain = Gain(Cost.of(dying, story.target), Cost.of(found, story.target))
    return (Remedy((FIXED_SIZE.words,), f"{result} in place of {len(dying)} operators", gain, True, True),)


def _shared(story: Story, part: Part) -> Iterator[str]:
    """Layers whose options cannot be changed for this place alone."""
    paths = dict.fromkeys(p for value in part.values if is_linear(value) for p, _ in story.sources(value))
    calls = {path: len(story.originals[path]) for path in paths}
    for path, count in calls.items():
        if count > 1 and path in story.modules:
            yield f"{path} is called {count} times, so its options cannot be changed for this place alone"
    for value in dict.fromkeys(value for pair in _padded_pairs(part) for value in pair):
        several = len({path for path, each in story.sources(value) if isinstance(each.op, Conv)})
        if several > 1:
            yield f"{short_name(value)} was made of {several} convolutions, so no option of one layer moves its padding"


def _undone(story: Story, part: Part) -> str:
    """Nothing stands in the way, and yet they were not merged."""
    for failure in story.traced.record.failures:
        if failure.where == part.sink.where:
            return f"{failure.rewrite} was undone, because its result was not equal: {failure.reason}"
    return "a rewrite says that it merges them, and the engine did not: please report this"


# --- reasons -----------------------------------------------------------------------------------------------------


def _activations(values: Iterable[Value]) -> list[Value]:
    return [value for value in values if isinstance(value.op, Activation)]


def _nonlinear(story: Story, values: Iterable[Value]) -> list[str]:
    """One reason for each activation, with what a rewrite has said about it."""
    reasons = []
    for value in _activations(values):
        line = f" ({value.origin.source})" if value.origin.source and value.where not in story.modules else ""
        near = [value, *(end for user in story.graph.users(value) for end in (user, *story.graph.users(user)))]
        said = [story.refusals[end] for end in near if end in story.refusals and (end is value or blend_at(end))]
        own = f"{described(value)}{line} is not linear"
        reasons.append(f"{said[0]} (at {value.where})" if said else own)
    return reasons


def _obstacles(between: tuple[Value, ...]) -> list[str]:
    """What lies between the ends of a chain and is neither linear nor an activation."""
    blends = {member for value in between if (blend := blend_at(value)) is not None for member in blend[1]}
    others = [v for v in between if v not in blends and not isinstance(v.op, Activation | Identity)]
    reasons = [
        f"{described(v)} is between them and is not affine: rgc leaves it as it is" for v in others if not v.op.affine
    ]
    if views := [described(value) for value in others if value.op.affine]:
        be = "is" if len(views) == 1 else "are"
        reasons.append(f"{' and '.join(views)} {be} between them: affine, but no rewrite of a pair looks through that")
    return reasons


def _listed(values: Sequence[Value]) -> str:
    names = list(dict.fromkeys(map(short_name, values))) or ["the caller of the model"]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# --- changes -----------------------------------------------------------------------------------------------------


def _edits(story: Story, part: Part, free: bool) -> list[Edit]:
    """The changes worth asking about; ``free`` says that nothing outside reads what the part computes inside."""
    default, _ = resolve("default")
    edits: list[Edit] = []
    if not {each.name for each in default} <= {each.name for each in story.passes}:
        edits.append(Edit("--passes default", True, lambda setting: replace(setting, passes=default)))
    if not part.source.tensor_type.fixed:
        edits.append(FIXED_SIZE)
    for value in part.values:
        if isinstance(value.op, BatchNorm) and value.op.training:
            edits.append(Edit(f"track_running_stats=True for {short_name(value)}", False, give_statistics(value)))
    for first, second in _padded_pairs(part):
        if free and (moved := _moved_padding(story, part, first, second)) is not None:
            edits.append(moved)
        if (biased := _biased_convolution(story, first)) is not None:
            edits.append(Edit(f"bias=False for {biased}", False, drop_bias(first)))
    return edits


def _padded_pairs(part: Part) -> Iterator[tuple[Value, Value]]:
    """The linear operators of a part that follow each other, where the second is padded with zeros."""
    for second in part.values:
        if not isinstance(second.op, Conv) or not second.op.is_padded or not _has_plain_padding(second.op):
            continue
        first = second.inputs[0]
        while first in part.values and not is_linear(first):
            blend = blend_at(first)
            first = blend[0] if blend is not None else first.inputs[0]
        if first in part.values:
            yield first, second


def _has_plain_padding(conv: Conv) -> bool:
    """Is it padded by an option of ``nn.Conv2d``: zeros, as many on either side?"""
    zeros = conv.padding_mode == "zeros" and conv.pad_value is None and not conv.transposed and conv.size is None
    return zeros and all(left == right for left, right in conv.padding)


def _moved_padding(story: Story, part: Part, first: Value, second: Value) -> Edit | None:
    """Pad once, before the first of the two; None where PyTorch has no option for that."""
    a, b = first.op, second.op
    ours, theirs = story.convolution(first), story.convolution(second)
    assert isinstance(b, Conv)
    entrance = story.entrance(first)
    if theirs is None or theirs[1].padding != b.padding or entrance is None or story.entrance(second) != theirs[0]:
        return None
    given = _option(left for left, _ in b.padding)
    if (
        isinstance(a, Conv)
        and _has_plain_padding(a)
        and ours is not None
        and ours[1].padding == a.padding
        and entrance == ours[0]
    ):
        wider = _option(p + s * q for (p, _), s, (q, _) in zip(a.padding, a.stride, b.padding, strict=True))
        words = f"padding={given} of {theirs[0]} moved to {ours[0]} (padding={wider}, then padding=0)"
        return Edit(words, False, move_padding(first, second))
    if first is not part.values[0] or not isinstance(a, Conv | Scale | BatchNorm | AvgPool):
        return None
    if isinstance(a, Conv) and not _has_plain_padding(a):
        return None
    stride = a.stride if isinstance(a, Conv | AvgPool) else (1,) * b.spatial
    margin = tuple(s * q for s, (q, _) in zip(stride, b.padding, strict=True))
    sides = margin[:1] if len(set(margin)) == 1 else tuple(amount for m in reversed(margin) for amount in (m, m))
    zeros = f"nn.ZeroPad{b.spatial}d({', '.join(map(str, sides)) if len(sides) == 1 else sides})"
    return Edit(f"{zeros} before {entrance}, then padding=0 of {theirs[0]}", False, pad_ahead(second, margin))


def _biased_convolution(story: Story, value: Value) -> str | None:
    """The path of a convolution whose ``bias`` is the only offset in ``value``."""
    found, ours = story.sources(value), story.convolution(value)
    offsets = any(isinstance(each.op, BatchNorm | Scale) for _, each in found)
    if ours is None or offsets or ours[1].bias is None or not isinstance(value.op, Conv) or value.op.size is not None:
        return None
    return ours[0]


def _option(amounts: Iterable[int]) -> str:
    """Amounts per axis as the option of a convolution: one number where all are the same."""
    given = tuple(amounts)
    return str(given[0]) if len(set(given)) == 1 else str(given)


def _fade(story: Story, value: Value) -> str:
    """How an activation becomes the identity, in the options of the module that makes it."""
    assert isinstance(value.op, Activation)
    path = value.origin.paths[0] if value.origin.paths else value.name
    owner = path.rpartition(".")[0]
    holder, module = story.modules.get(owner), story.modules.get(path)
    if owner and isinstance(holder, DecayedActivation | DecayedLeakyReLU):
        return f"decay {owner} to 1 (now {float(holder.decay):g})"
    name = f"{type(module).__name__} {path}" if module is not None else f"the call of {value.op.label} at {path}"
    if value.op.weight is not None:
        return f"slopes of 1 for {name}"
    if value.op.name == "leaky_relu":
        return f"negative_slope=1 for {name} (now {value.op.option('negative_slope', 0.01):g})"
    calls = len(story.originals.get(path, []))
    often = f" (called {calls} times)" if module is not None and calls > 1 else ""
    return f"replace {name}{often} by rgc.nn.DecayedActivation and decay it to 1"


__all__ = ["Story", "gaps_at", "short_name"]
