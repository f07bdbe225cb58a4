"""Why was this layer, or this pair, merged or not? In the user's names, with what would have to change, and the gain.

What became of a layer is read off the engine's record; what stands between layers is found by `rgc.gaps`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from torch import nn

from rgc.compiler import trace
from rgc.cost import Objective, target_named
from rgc.engine import Policy
from rgc.errors import InputError
from rgc.explanation import Cost, Explanation, Gain, Gap, Place
from rgc.gaps import Story, described, gaps_at, short_name
from rgc.ir import Graph, Value
from rgc.neighbours import between, blend_at, branches, is_linear
from rgc.passbook import resolve
from rgc.subject import example_of, floating_dtype


def explain(
    model: nn.Module,
    example_inputs: Any,
    where: str,
    *,
    passes: str | Sequence[Any] = "default",
    objective: Objective = "latency",
    target: str | None = None,
) -> Explanation:
    """Why the layer, part or pair ``where`` of ``model`` is merged or not, and what would change that.

    where: a module path (``layer1.0.conv1``), a prefix of several (``layer1.0``), or a pair (``conv1,conv2``, or
    ``conv1 + bn1`` as reports print it). The other arguments are those of `rgc.compile`; nothing is emitted.

    Raises `InputError` where ``where`` names nothing in the traced model, with close matches.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1)).eval()
    >>> (gap,) = explain(model, torch.randn(1, 3, 8, 8), "0,2").gaps
    >>> gap.reasons
    ('relu at 1 is not linear',)
    >>> gap.remedies[0].changes
    ('replace ReLU 1 by rgc.nn.DecayedActivation and decay it to 1',)
    """
    traced = trace(model, example_inputs, passes=passes, objective=objective, target=target)

    def trace_at_fixed_size() -> Graph:
        added = [] if isinstance(passes, str) else [each for each in passes if not isinstance(each, str)]
        return trace(model, example_inputs, passes=["all", *added], objective=objective, target=target).graph

    dtype = floating_dtype(model, example_of(model, example_inputs))
    policy = Policy(objective, target_named(target, dtype))
    story = Story(model, traced, resolve(passes)[0], policy, trace_at_fixed_size)
    places, gaps = _answer(story, where)
    named = passes if isinstance(passes, str) else ", ".join(str(getattr(each, "name", each)) for each in passes)
    return Explanation(
        where, type(model).__name__, named, objective, story.target.name, tuple(places), tuple(gaps), traced.notes
    )


def _answer(story: Story, where: str) -> tuple[list[Place], list[Gap]]:
    names = [name.strip() for name in where.replace(" + ", ",").split(",")]
    chosen = [_paths(story, name, where) for name in names]
    if len(names) == 1:
        return _of_layers(story, chosen[0])
    values = [{value for path in paths for value in story.results.get(path, [])} for paths in chosen]
    if shared := set.intersection(*values):
        return _of_layers(story, [path for value in shared for path in value.origin.paths])
    if len(names) > 2:
        raise InputError(f"explain {where!r}: a pair is two layers; these {len(names)} layers are not one operator")
    removed = [place for paths in chosen for place in _places(story, paths) if place.fate == "removed"]
    if removed:
        return removed, []
    return [], _of_pair(story, (names[0], names[1]), values[0], values[1])


def _paths(story: Story, name: str, where: str) -> list[str]:
    """The paths of operators that ``name`` stands for."""
    if name in story.originals:
        return [name]
    inside = [path for path in story.originals if name and path.startswith(f"{name}.")]
    if inside:
        return inside
    if story.traced.tier == "submodules":
        raise InputError(
            f"explain {where!r}: {type(story.model).__name__} cannot be traced as a whole, so its layers cannot be "
            "explained; explain the part that holds them, as a model of its own"
        )
    if name and name in story.modules:
        kind = type(story.modules[name]).__name__
        raise InputError(f"explain {where!r}: {name} ({kind}) makes no operator of the traced model")
    if not name:
        raise InputError(f"explain {where!r}: name a layer (layer1.0.conv1), a part (layer1.0) or a pair (conv1,conv2)")
    known = [path.rsplit(".", count)[0] for path in story.originals for count in range(path.count(".") + 1)]
    close = get_close_matches(name, list(dict.fromkeys(known)), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "`rgc inspect MODEL` lists every layer"
    raise InputError(f"explain {where!r}: the model has no layer {name!r}; {hint}")


# --- layers ------------------------------------------------------------------------------------------------------


def _of_layers(story: Story, paths: list[str]) -> tuple[list[Place], list[Gap]]:
    places = _places(story, paths)
    values = dict.fromkeys(value for path in paths for value in story.results.get(path, []))
    gaps: dict[tuple[Value, ...], Gap] = {}
    for value in values:
        for ends, gap in gaps_at(story, value):
            gaps.setdefault(ends, gap)
    if len(places) > 1:  # in a part, what is not linear is told where it stands between what is
        places = [place for place in places if place.fate != "unchanged" or _can_merge(story, place.layers)]
    return places, sorted(gaps.values(), key=_urgency)


def _can_merge(story: Story, paths: Iterable[str]) -> bool:
    values = [value for path in paths for value in story.results[path]]
    return any(is_linear(value) and not any(map(blend_at, story.graph.users(value))) for value in values)


def _urgency(gap: Gap) -> int:
    """What pays and needs no training comes first, then what pays, then what could be done, then the rest."""
    if not gap.remedies:
        return 3
    return min(0 if r.pays and r.keeps_function else 1 if r.pays else 2 for r in gap.remedies)


def _places(story: Story, paths: Iterable[str]) -> list[Place]:
    """What became of the layers, those with one fate together, in the order of the model."""
    together: dict[tuple[Value, ...], list[str]] = {}
    for path in paths:
        together.setdefault(tuple(story.results.get(path, ())), []).append(path)
    places = [_place(story, group, values) for values, group in together.items()]
    told = {path for place in places if place.fate == "merged" for path in place.layers}
    return [place for place in places if place.fate != "removed" or not set(place.layers) <= told]


def _place(story: Story, paths: list[str], values: tuple[Value, ...]) -> Place:
    found = dict.fromkeys([*paths, *(path for value in values for path in value.origin.paths)])
    involved = _with_removed(story, found) if values else found
    layers = tuple(path for path in story.originals if path in involved)
    originals = [value for path in layers for value in story.originals[path]]
    labels, result = tuple(v.op.label for v in originals), tuple(v.op.label for v in values)
    steps = tuple(each for each in story.traced.rewrites if set(each.sources) & involved.keys())
    if not values:
        return Place(layers, labels, "removed", (), steps)
    steps = tuple(each for each in steps if set(each.sources) <= involved.keys())  # not what only brushed them
    if not steps:
        return Place(layers, labels, "unchanged", result)
    gain = Gain(Cost.of(originals, story.target), Cost.of(values, story.target))
    return Place(layers, labels, "merged", result, steps, gain)


def _with_removed(story: Story, paths: dict[str, None]) -> dict[str, None]:
    """Also what was removed on the way from one of these layers to another: decayed activations, dropout."""
    original = story.traced.original
    ends = [value for path in paths for value in story.originals[path]]

    def reached(step: Callable[[Value], Iterable[Value]]) -> set[Value]:
        found: set[Value] = set()
        pending = list(ends)
        while pending:
            more = [v for v in step(pending.pop()) if v not in found and not set(v.origin.paths) & story.results.keys()]
            found.update(more)
            pending += more
        return found

    inside = reached(original.users) & reached(lambda value: value.inputs)
    return paths | {path: None for path, values in story.originals.items() if set(values) <= inside}


# --- pairs -------------------------------------------------------------------------------------------------------


def _of_pair(story: Story, names: tuple[str, str], first: set[Value], second: set[Value]) -> list[Gap]:
    for left, right in ((first, second), (second, first)):
        gaps = [each for value in (*left, *right) for each in gaps_at(story, value)]
        found = {ends: gap for ends, gap in gaps if _joins(story, ends, left, right)}
        if found:
            return list(found.values())
    for ends, left, right in ((names, first, second), (names[::-1], second, first)):
        inner = between(story.graph, left, right)
        if inner is not None:
            return [Gap(ends, "apart", tuple(_distance(story, inner, (*left, *right))))]
    return [Gap(names, "apart", ("neither reads what the other computes, and they do not meet in a sum",))]


def _joins(story: Story, ends: tuple[Value, ...], left: set[Value], right: set[Value]) -> bool:
    if len(ends) == 2:
        return ends[0] in left and ends[1] in right
    found, _ = branches(ends[0], story.order)
    inside = {ends[0], *ends[0].inputs, *(found[1] if found is not None else ())}
    return bool(inside & left) and bool(inside & right)


def _distance(story: Story, inner: set[Value], ends: Iterable[Value]) -> Iterator[str]:
    """Why two layers, one of which leads to the other through ``inner``, are no neighbours."""
    ordered = sorted(inner, key=story.order.__getitem__)
    linear = list(dict.fromkeys(short_name(value) for value in ordered if is_linear(value)))
    more = f" and {len(linear) - 3} more" if len(linear) > 3 else ""
    if linear:
        yield f"they are not neighbours: {', '.join(linear[:3])}{more} lie between; ask about two that are"
    yield from (
        f"{described(value)} is no linear operator, so it merges with nothing"
        for value in sorted(ends, key=story.order.__getitem__) if not is_linear(value)
    )  # fmt: skip
    if not linear:
        yield from (f"{described(value)} lies between" for value in ordered[:3])


__all__ = ["explain"]
