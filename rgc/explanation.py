"""What does an explanation say? For a layer or a pair: what became of it, what stands in its way, what that costs."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rgc.cost import Target, macs, parameters
from rgc.ir import Input, Value
from rgc.operators import Constant
from rgc.report import Firing

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table
    from rich.text import Text

Fate = Literal["merged", "unchanged", "removed"]

#: What fits in a line is said again rather than referred to.
_SHORT = 60

#: More names or rewrites than this in a row are a wall of text.
_MANY = 7


@dataclass(frozen=True)
class Cost:
    """What some operators cost at the example's shapes; the time is the cost model's estimate, not a measurement."""

    operators: int
    macs: int
    parameters: int
    milliseconds: float

    @staticmethod
    def of(values: Iterable[Value], target: Target) -> Cost:
        """The cost of ``values`` together; parameters that several of them share count once."""
        counted = [value for value in values if not isinstance(value.op, Input | Constant)]
        owners = {id(value.op): value for value in counted}.values()
        seconds = sum(target.seconds(value) for value in counted)
        return Cost(len(counted), sum(map(macs, counted)), sum(map(parameters, owners)), seconds * 1e3)


@dataclass(frozen=True)
class Gain:
    """What some operators cost before and after they become one."""

    before: Cost
    after: Cost

    def __str__(self) -> str:
        """``0.41 -> 0.39 ms, 2 -> 1 operators, 3.7 M MACs, 8.1 k -> 8 k params``."""
        b, a = self.before, self.after
        times = _change(*(f"{cost.milliseconds:.3g}" for cost in (b, a)))
        macs, parameters = (_change(*map(_number, pair)) for pair in ((b.macs, a.macs), (b.parameters, a.parameters)))
        return f"{times} ms, {_change(f'{b.operators}', f'{a.operators}')} operators, {macs} MACs, {parameters} params"


@dataclass(frozen=True)
class Place:
    """What became of some layers: ``layers`` are now ``result``, by the rewrites ``steps``, in order."""

    layers: tuple[str, ...]
    operators: tuple[str, ...]  # what they were
    fate: Fate
    result: tuple[str, ...] = ()
    steps: tuple[Firing, ...] = ()
    gain: Gain | None = None


@dataclass(frozen=True)
class Remedy:
    """What makes one operator of what is now several: all of ``changes`` together.

    ``keeps_function``: does the model still compute the same, so that it needs no further training? ``pays``: is the
    result no slower by the cost model? ``note`` says what is against it, where that is not the two alone.
    """

    changes: tuple[str, ...]
    result: str
    gain: Gain
    keeps_function: bool
    pays: bool
    note: str = ""


@dataclass(frozen=True)
class Gap:
    """What stands between layers that are not one operator: every reason, and every smallest set of changes."""

    layers: tuple[str, ...]
    kind: Literal["chain", "sum", "apart"]
    reasons: tuple[str, ...]
    remedies: tuple[Remedy, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """Why one layer, one pair, or each layer of a part was merged or not; ``rich.print(explanation)`` for people."""

    where: str
    model: str
    passes: str
    objective: str
    target: str
    places: tuple[Place, ...]
    gaps: tuple[Gap, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The whole explanation as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        yield Text(f"{self.where} in {self.model}", style="bold")
        yield Text(f"passes {self.passes}, objective {self.objective}, times estimated for {self.target}", style="dim")
        for place in self.places:
            yield from ("", *_printed_place(place))
        said: set[tuple[str, ...]] = set()
        for gap in self.gaps:
            yield from ("", *_printed_gap(gap, said))
        if not self.gaps and all(place.fate != "removed" for place in self.places):
            yield "\nno other linear operator and no sum comes next to it"
        for note in self.notes:
            yield Text(f"\nnote: {note}")


def _printed_place(place: Place) -> Iterator[Text | Table]:
    from rich.text import Text

    was = ", ".join(_at_most(list(_counted(place.operators))))
    title = Text(" + ".join(_at_most(place.layers)), style="bold")
    rows: list[tuple[str, str]] = []
    if place.fate == "merged":
        title.append(f": now {' and '.join(place.result)}", style="green")
        rows.append(("was", was))
    elif place.fate == "removed":
        title.append(f": removed ({was})", style="green")
    else:
        title.append(f": unchanged ({was})", style="yellow")
    if place.fate == "removed" and not place.steps:
        rows.append(("because", "nothing reads its result any more"))
    rows += zip(_first_then("by", "then"), _told(place.steps), strict=False)
    if place.gain is not None:
        rows.append(("gained", str(place.gain)))
    yield title
    if rows:
        yield _grid(rows)


def _told(steps: Sequence[Firing]) -> list[str]:
    """The rewrites in order, one that fired several times in a row told once; only their numbers where it is many."""
    runs = [list(run) for _, run in itertools.groupby(steps, key=lambda step: (step.rewrite, step.evidence))]
    if len(runs) > _MANY:
        kinds: dict[tuple[str, str], list[Firing]] = {}
        for step in steps:
            kinds.setdefault((step.rewrite, step.evidence), []).append(step)
        return [f"{len(fired)} x {fired[0].rewrite}: {_evidence(fired)}" for fired in kinds.values()]
    places = [_at_most(list(dict.fromkeys(step.where.split(" + ")[0] for step in run))) for run in runs]
    return [
        f"{run[0].rewrite} at {', '.join(where)}: {_evidence(run)}" for run, where in zip(runs, places, strict=True)
    ]


def _evidence(fired: Sequence[Firing]) -> str:
    worst = max(step.max_error for step in fired)
    return fired[0].evidence + (f", error {worst:.1e}" if worst else "")


def _at_most(names: Sequence[str]) -> list[str]:
    """The first few of many names."""
    return list(names) if len(names) <= _MANY else [*names[: _MANY - 1], f"{len(names) - _MANY + 1} more"]


def _printed_gap(gap: Gap, said: set[tuple[str, ...]]) -> Iterator[Text | Table]:
    """``said`` remembers the reasons and changes of the gaps above, which are not repeated."""
    from rich.text import Text

    title = Text({"chain": " -> ", "sum": " + ", "apart": ", "}[gap.kind].join(gap.layers), style="bold")
    title.append(": not one operator", style="yellow")
    rows = list(zip(_first_then("because", "and"), _unless_said(gap.reasons, said), strict=False))
    for number, remedy in enumerate(gap.remedies):
        first = "change" if number == 0 else "or"
        rows += zip(_first_then(first, "and"), _unless_said(remedy.changes, said), strict=False)
        rows.append(
            ("gives", remedy.result + ("" if remedy.keeps_function else "; another function: train it further"))
        )
        rows.append(("gains" if remedy.pays else "costs", str(remedy.gain)))
        if not remedy.pays:
            only = "" if remedy.changes == ("--objective depth",) else ": only --objective depth merges it"
            rows.append(("but", remedy.note or f"does not pay by this estimate{only}"))
    if not gap.remedies and gap.kind != "apart":
        rows.append(("change", "nothing was found that would make them one operator"))
    yield title
    yield _grid(rows)


def _unless_said(lines: tuple[str, ...], said: set[tuple[str, ...]]) -> tuple[str, ...]:
    if len("".join(lines)) > _SHORT and lines in said:
        return ("the same as above",)
    said.add(lines)
    return lines


def _first_then(first: str, others: str) -> Iterator[str]:
    return itertools.chain([first], itertools.repeat(others))


def _grid(rows: Iterable[tuple[str, str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(min_width=9, no_wrap=True, justify="right", style="dim")
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, Text(text))
    return table


def _counted(labels: Iterable[str]) -> Iterator[str]:
    listed = list(labels)
    for label in dict.fromkeys(listed):
        times = listed.count(label)
        yield label if times == 1 else f"{times} x {label}"


def _change(before: str, after: str) -> str:
    return before if before == after else f"{before} -> {after}"


def _number(count: float) -> str:
    """Three digits and a unit: ``36.9 k``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"


__all__ = ["Cost", "Explanation", "Gain", "Gap", "Place", "Remedy"]
