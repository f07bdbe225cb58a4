"""Is a rewrite a law? Its firings on random integers, where nothing rounds, compared element by element.

A firing replaces one function of its sources by another. Both are polynomials in the numbers that they are made of: the
elements of the sources and of every parameter. So a rewrite that is wrong in one element of the result, on the border
or inside, is wrong there by a polynomial that is not zero, and such a one vanishes for few integers only. Of degree d
in numbers that are drawn from r, and of degree s in powers of two that are drawn from q (the standard deviations of
batch norms), it vanishes with a probability of at most d/r + s/q (J. T. Schwartz, "Fast probabilistic algorithms for
verification of polynomial identities", J. ACM 27(4), 1980, lemma 1, for the powers first). n draws that are all equal
leave (d/r + s/q)^n for each form of graph that was tried: the examples of the rewrite, and variations of their
geometry.

- Exact: equality is `torch.equal`, in float64, and the processor says that nothing has rounded (`rgc.inexact`). Where
  something has, all instances are drawn again from smaller numbers, and the chances of both attempts add up.
- d and s are bounds for everything that multiplies no parameter with itself: each value of the pattern brings one
  factor for each of its parameters. The pattern is of that kind by what its operators are. That the replacement is so
  too is assumed, for it is made by code; `degree_on_a_line` measures it.
- What is not affine is read as a function of which nothing is known: a table that holds other integers for every other
  input. Where that is not enough, for a rewrite that relies on what an activation does, it is evaluated, the firing is
  no polynomial, and no chance is stated. GELU, SiLU and Hardswish, whose values would round, stand for every f with
  f(t) - f(-t) = t then: t / 2 + e(|t|) with a table e.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rgc.compiler import trace
from rgc.cost import Objective
from rgc.engine import Policy, apply, copy_graph
from rgc.errors import RgcError
from rgc.inexact import on_one_thread, watch_rounding
from rgc.instances import Draw, Range, exact_form, varied
from rgc.ir import Graph, Value
from rgc.proof import small_shapes
from rgc.ranges import Interval
from rgc.rewrite import Case, Example, GraphPass, Pass, Rewrite
from rgc.sides import ROUNDED, Difference, Reading, RoundedError, Sides, degrees, in_words, smallest

#: What numbers are drawn from: the first range in which nothing rounds.
RANGES = (Range(512, 16), Range(128, 16), Range(128, 8), Range(32, 16), Range(32, 8), Range(16, 8), Range(8, 4))

#: What the points of a line through all numbers are made of.
_LINE = Range(2, 3)

#: As many instances are added as it takes to leave no more chance than this to a wrong rewrite, ...
SMALL = 1e-6

#: ... as long as they are no more than this.
MOST_INSTANCES = 40

#: So many variations of the geometry of each example are tried, and as many of them as fire are used.
ATTEMPTS = 16
VARIATIONS = 3

#: What a merge has to improve: where the first does not let a rewrite fire, the second may.
OBJECTIVES: tuple[Objective, ...] = ("latency", "depth")

#: What compares the two sides of a firing, whose sources have these ranges.
Meeting = Callable[[Sides, Mapping[Value, Interval]], None]

ASSUMPTION = (
    "the replacement's numbers are polynomials in those of the pattern, none of which it multiplies with itself"
)


class LawError(RgcError):
    """A rewrite is no law, with the instance on which both sides differ; or nothing could be concluded, and why."""


@dataclass(frozen=True)
class Law:
    """What was tried, and how probably a wrong rewrite would have passed.

    instances: draws for each form of graph, at least. forms: the examples and their variations. firings: how many were
    compared. patterns: how many of the rewrite's patterns have fired, and how many it has; (0, 0) for a graph pass.
    evidence: the classes of evidence that firings were recorded with. degree: the largest bound, all numbers together.
    draws: the size of the smallest set that numbers are drawn from. chance: at most so probably a rewrite that is wrong
    on one of the forms agrees on all its instances; None where the law is not polynomial.
    """

    rewrite: str
    instances: int
    forms: int
    firings: int
    patterns: tuple[int, int]
    evidence: tuple[str, ...]
    degree: int
    draws: int
    chance: float | None
    assumption: str

    def __str__(self) -> str:
        fired, known = self.patterns
        patterns = f", {fired} of {known} patterns" if known else ""
        tried = f"{self.forms} forms of graph{patterns}, {self.instances} integer instances of each: equal, no rounding"
        if self.chance is None:
            return f"{tried}\nnot polynomial: checked on numbers of both signs, no chance is stated"
        return (
            f"{tried}\na wrong rewrite passes with a chance of at most {self.chance:.0e} "
            f"(degree {self.degree}, numbers from sets of {self.draws} or more)"
        )


def prove(each: Pass, *, instances: int = 8, seed: int = 0) -> Law:
    """The law of a pass, if it is one, by so many ``instances`` of each form of graph or more.

    Raises `LawError` with a small instance where the two sides of a firing differ, or with what stands in the way.

    >>> from rgc.passes import fold_border
    >>> prove(fold_border).chance < 1e-6
    True
    """
    if instances < 1:
        raise LawError(f"{each.name}: {instances} instances prove nothing; ask for at least 1")
    found = []
    with on_one_thread():
        for example in each.examples:
            if example.fires:
                found += list(_proofs(each, example, instances, seed))
    if not found:
        raise LawError(f"{each.name}: no instances can be made: it has no example with @{each.name}.fires_on")
    fired = set().union(*(proof.cases for proof in found))
    return Law(
        each.name,
        min(proof.instances for proof in found),
        len(found),
        sum(proof.firings for proof in found),
        (0, 0) if isinstance(each, GraphPass) else (len(fired), len(each.cases)),
        tuple(sorted(set[str]().union(*(proof.evidence for proof in found)))),
        max(proof.degree + proof.scale_degree for proof in found),
        min(proof.smallest_set for proof in found),
        max(proof.chance for proof in found) if all(proof.is_polynomial for proof in found) else None,
        ASSUMPTION,
    )


def degree_on_a_line(each: Pass, example: Example, *, seed: int = 0) -> tuple[int, int] | None:
    """The degree of the replacement along a random line through all integers, measured, and the bound for it.

    Along a line a polynomial of degree d is one of degree d in one number, so its differences of order d + 1 vanish,
    exactly. Standard deviations stay as they are. None where the pattern is not polynomial throughout.
    """
    form = exact_form(_traced(example))
    if form is None:
        return None
    bounds: list[int | None] = []

    def at(point: int) -> Tensor:
        values: list[Tensor] = []
        draw = Draw(_LINE, seed, point)

        def meet(sides: Sides, ranges: Mapping[Value, Interval]) -> None:
            bounds.append(degrees(sides.before, sides.sources)[0] if sides.is_polynomial else None)
            inputs = [_drawn(each, each.tensor_type.shape, ranges, draw) for each in sides.sources]
            values.extend(y.flatten() for y in sides.replaced(inputs, Reading(seed, draw.numbers)).values)

        _fire(each, form, example, draw, meet)
        return torch.cat(values)

    with on_one_thread():
        points = [at(0)]
        known = [bound for bound in bounds if bound is not None]
        if len(known) < len(bounds):
            return None
        points += map(at, range(1, max(known) + 2))
        differences, order = torch.stack(points), 0
        with watch_rounding() as rounding:
            while len(differences) and bool(differences.any()):
                differences, order = differences.diff(dim=0), order + 1
    if rounding.happened:
        raise RoundedError(f"{each.name} on {example.name!r}: differences along a line round")
    return order - 1, max(known)


class _InconclusiveError(RgcError):
    """A form of graph on which nothing can be concluded, and why."""


@dataclass
class _Proof:
    """What the instances of one form of graph have shown; ``numbers`` is where nothing rounded, after ``given_up``."""

    numbers: Range
    given_up: tuple[Range, ...]
    instances: int = 0
    firings: int = 0
    degree: int = 0
    scale_degree: int = 0
    is_polynomial: bool = True
    cases: set[int] = field(default_factory=set)
    evidence: set[str] = field(default_factory=set)

    @property
    def smallest_set(self) -> int:
        return min(self.numbers.count, self.numbers.scales if self.scale_degree else self.numbers.count)

    @property
    def chance(self) -> float:
        """At most so probably all instances agree if the sides differ: in any of the ranges that were tried."""
        tried = (*self.given_up, self.numbers)
        each = (self.degree / numbers.count + self.scale_degree / numbers.scales for numbers in tried)
        return min(1.0, sum(min(1.0, chance) ** self.instances for chance in each))

    @property
    def is_enough(self) -> bool:
        """Would more instances add nothing that is needed?"""
        return not self.is_polynomial or self.chance <= SMALL or self.instances >= MOST_INSTANCES


def _proofs(each: Pass, example: Example, instances: int, seed: int) -> Iterator[_Proof]:
    where = f"{each.name} on the example {example.name!r}"
    form = exact_form(_traced(example))
    if form is None:
        raise LawError(f"{where}: its averages are over no power of two at any size that was tried")
    try:
        yield _proof(each, form, example, instances, seed)
    except _InconclusiveError as error:
        raise LawError(f"{where}: {error}, so nothing can be concluded") from error
    except LawError as error:
        raise LawError(f"{where}: {error}") from error
    draw, count = Draw(RANGES[0], seed), 0
    for _ in range(ATTEMPTS):
        other = varied(form, draw)
        if other is None:
            continue
        try:
            yield _proof(each, other, example, instances, seed)
        except _InconclusiveError:  # another geometry need not be one that the pass takes
            continue
        except LawError as error:
            raise LawError(f"{where}, in another geometry: {error}") from error
        count += 1
        if count == VARIATIONS:
            return


def _traced(example: Example) -> Graph:
    model = example.build()
    model.eval()  # an example need not be, and what eval() returns is None in models of other people
    return trace(model, torch.zeros(example.shape)).graph


def _proof(each: Pass, form: Graph, example: Example, instances: int, seed: int) -> _Proof:
    """What so many instances show, or more if that is not enough."""
    for index, numbers in enumerate(RANGES):
        proof = _Proof(numbers, RANGES[:index])
        try:
            while proof.instances < instances or not proof.is_enough:
                draw = Draw(numbers, (seed * len(RANGES) + index) * MOST_INSTANCES + proof.instances)
                fired = _fire(each, form, example, draw, partial(_compare, draw=draw, proof=proof))
                proof.cases |= fired.cases
                proof.evidence |= fired.evidence
                proof.instances += 1
        except RoundedError:
            continue
        return proof
    raise _InconclusiveError("some number rounds in float64, however small the integers")


@dataclass(frozen=True)
class _Fired:
    """Which cases have fired, and the evidence that was recorded."""

    cases: set[int]
    evidence: set[str]


def _fire(each: Pass, form: Graph, example: Example, draw: Draw, meet: Meeting) -> _Fired:
    """Apply the pass to one instance, and let ``meet`` compare what it replaces."""
    graph = draw.graph(form, fixed=example.fixed_size)
    before, origin = copy_graph(graph), dict[Value, int]()
    cases: set[int] = set()

    def check(
        old: Value, new: Value, sources: Sequence[Value], ranges: Mapping[Value, Interval] | None = None
    ) -> float:
        meet(Sides([old], [new], list(sources), {source: source for source in sources}), ranges or {})
        cases.add(origin[new])
        return 0.0

    def same(after: Graph) -> float:
        twins = dict(zip(before.inputs, after.inputs, strict=True))
        meet(Sides(before.output_values, after.output_values, before.inputs, twins), {})
        cases.add(0)
        return 0.0

    watched = each if isinstance(each, GraphPass) else _numbered(each, origin)
    for objective in OBJECTIVES:
        graph, record = apply(graph, [watched], Policy(objective), same, check)
        if record.failures:
            raise LawError(record.failures[0].reason)
        if cases:
            return _Fired(cases, {firing.evidence for firing in record.firings})
    reasons = "; ".join(dict.fromkeys(record.refusals.values()))
    raise _InconclusiveError(f"it does not fire on integers ({reasons or 'its pattern does not occur'})")


def _numbered(each: Rewrite, origin: dict[Value, int]) -> Rewrite:
    """The same rewrite, which notes the number of the case that makes each replacement."""

    def noting(index: int, case: Case) -> Callable[..., Value]:
        def build(**holes: Any) -> Value:
            made = case.build(**holes)
            if isinstance(made, Value):
                origin[made] = index
            return made

        return build

    return replace(each, cases=[replace(case, build=noting(i, case)) for i, case in enumerate(each.cases)])


def _compare(sides: Sides, ranges: Mapping[Value, Interval], draw: Draw, proof: _Proof) -> None:
    """Raise `LawError` unless both sides are equal at every size; note the degree and the kind of the law."""
    reading, taken = Reading(draw.below(2**31), draw.numbers), 0
    for shapes in _shapes(sides):
        inputs = [_drawn(*each, ranges, draw) for each in zip(sides.sources, shapes, strict=True)]
        differing = sides.difference(inputs, reading)
        if isinstance(differing, Difference) and not reading.evaluates and not sides.is_polynomial:
            reading = replace(reading, evaluates=True)
            differing = sides.difference(inputs, reading)
        if isinstance(differing, Difference):
            if differing.distance < ROUNDED and draw.numbers != RANGES[-1]:
                raise RoundedError("a number of the replacement has rounded")
            if reading.evaluates and sides.stand_ins:
                raise _InconclusiveError(
                    f"{sides.stand_ins[0]} would round, and no other function with its odd part does"
                )
            raise LawError(in_words(sides, smallest(sides, inputs, reading), reading))
        taken += differing is not None
    if not taken:
        raise _InconclusiveError("the pattern itself does not run on integers")
    degree, scales = degrees(sides.before, sides.sources)
    proof.degree, proof.scale_degree = max(proof.degree, degree), max(proof.scale_degree, scales)
    proof.is_polynomial = proof.is_polynomial and not reading.evaluates and not ranges
    proof.firings += 1


def _shapes(sides: Sides) -> list[list[tuple[int, ...]]]:
    """Small sizes that reach every border, where they are free, and those of the form itself."""
    own = [source.tensor_type.shape for source in sides.sources]
    return [*small_shapes([*sides.before, *sides.after], sides.sources), own]


def _drawn(source: Value, shape: tuple[int, ...], ranges: Mapping[Value, Interval], draw: Draw) -> Tensor:
    """Integers, or, in an interval, numbers on a grid all over it, and its bounds."""
    interval = ranges.get(source, Interval())
    if not source.tensor_type.dtype.is_floating_point:
        return (draw.integers(shape) > 0).to(source.tensor_type.dtype)
    x = draw.integers(shape)
    if interval.is_unbounded:
        return x
    if math.isfinite(interval.lower) and math.isfinite(interval.upper):
        step = 2.0 ** math.floor(math.log2(max(interval.upper - interval.lower, 2.0**-20)) - 6)
        x = math.floor(interval.lower / step) * step + step * (x.abs() % 130)
    return x.clamp(interval.lower, interval.upper)


__all__ = ["ASSUMPTION", "Law", "LawError", "degree_on_a_line", "prove"]
