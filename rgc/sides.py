"""Where do two functions of the same values differ? A pattern and its replacement on integers, where nothing rounds.

What is affine is evaluated. What is not is read as a function of which nothing is known: a table that holds other
integers for every other input. Where that is not enough, for a rewrite that relies on what an activation does, it is
evaluated too. GELU, SiLU and Hardswish, whose values would round, then stand for every f with f(t) - f(-t) = t, which
is t / 2 + e(|t|) with a table e.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from rgc.errors import RgcError
from rgc.inexact import watch_rounding
from rgc.instances import Draw, Range
from rgc.ir import Operator, Value, topological
from rgc.operators import Activation, BatchNorm, Multiply
from rgc.views import takes_shape_of_another

#: Activations f with f(t) - f(-t) = t.
_ODD_PART_IS_HALF = frozenset({"gelu", "silu", "hardswish"})

#: Differences that are smaller, relative to the result, may be a number that was rounded.
ROUNDED = 1e-9

#: How an operator says that it does not take an input.
_DECLINES = (RuntimeError, ValueError, TypeError, IndexError, RgcError)


class RoundedError(RgcError):
    """Something has rounded, so that equality would say nothing."""


@dataclass(frozen=True)
class Difference:
    """The first element in which two sides differ."""

    inputs: list[Tensor]
    place: tuple[int, ...]
    expected: float
    found: float | str
    distance: float


@dataclass(frozen=True)
class Sides:
    """A pattern and its replacement, as functions of ``sources``; ``twins`` are these in the replacement."""

    old: Sequence[Value]
    new: Sequence[Value]
    sources: list[Value]
    twins: Mapping[Value, Value]

    @property
    def before(self) -> list[Value]:
        return topological(self.old, known=set(self.sources).__contains__)

    @property
    def after(self) -> list[Value]:
        return topological(self.new, known=set(self.twins.values()).__contains__)

    @property
    def is_polynomial(self) -> bool:
        """Are both sides polynomials throughout?"""
        return all(is_polynomial(value.op) for value in [*self.before, *self.after])

    @property
    def stand_ins(self) -> list[str]:
        """The activations that are not evaluated as what they are: another of the same odd part stands for each."""
        activations = [value.op for value in self.before if isinstance(value.op, Activation)]
        return [op.name for op in activations if op.name in _ODD_PART_IS_HALF]

    def replaced(self, inputs: list[Tensor], reading: Reading) -> Outputs:
        """What the replacement makes of the inputs."""
        given = {self.twins[source]: x for source, x in zip(self.sources, inputs, strict=True)}
        return _evaluated(self.after, self.new, given, reading)

    def difference(self, inputs: list[Tensor], reading: Reading) -> Difference | bool | None:
        """Where they differ; True where they are equal; None where the pattern does not take the inputs.

        Raises `RoundedError` where rounding could explain a difference, or hide one.
        """
        try:
            expected = _evaluated(self.before, self.old, dict(zip(self.sources, inputs, strict=True)), reading)
        except _DECLINES:
            return None
        try:
            found = self.replaced(inputs, reading)
        except _DECLINES as error:
            return Difference(inputs, (), 0.0, f"fails with {type(error).__name__}: {error}", math.inf)
        differing = next(
            (d for a, b in zip(expected.values, found.values, strict=True) if (d := _first(inputs, a, b)) is not None),
            None,
        )
        explains = differing is None or differing.distance < ROUNDED
        if expected.rounded or (found.rounded and explains):
            raise RoundedError("something rounds")
        return True if differing is None else differing


def _first(inputs: list[Tensor], a: Tensor, b: Tensor) -> Difference | None:
    if a.shape != b.shape:
        return Difference(inputs, (), 0.0, f"is of shape {list(b.shape)}, not {list(a.shape)}", math.inf)
    if torch.equal(a, b):
        return None
    place = tuple(int(index) for index in (a != b).nonzero()[0])
    distance = float((a.double() - b.double()).abs().max()) / max(float(a.double().abs().max()), 1e-300)
    return Difference(inputs, place, float(a[place]), float(b[place]), distance)


@dataclass(frozen=True)
class Outputs:
    """The values of one side, in float64, and whether anything on the way to them has rounded."""

    values: list[Tensor]
    rounded: bool


@dataclass(frozen=True)
class Reading:
    """How what is not affine is read: as an unknown function, or, where ``evaluates``, as what it is."""

    seed: int
    numbers: Range
    evaluates: bool = False

    def of(self, op: Operator, arguments: Sequence[Any]) -> Any:
        """The value of an operator that is no polynomial of its arguments."""
        precise = op.cast(torch.float64)
        if self.evaluates:
            smooth = isinstance(op, Activation) and op.name in _ODD_PART_IS_HALF
            return arguments[0] / 2 + self._even(op, arguments[0]) if smooth else precise.evaluate(*arguments)
        result = precise.evaluate(*arguments)
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        return Draw(self.numbers, self._key(op, arguments)).integers(result.shape)

    def _even(self, op: Operator, x: Tensor) -> Tensor:
        """e(|t|): integers that are the same for t and -t, and that tell nothing of each other."""
        bits = (x.abs() + 0.0).view(torch.int64) ^ self._key(op, ())
        for factor in (-7046029254386353131, -4417276706812531889):  # as in SplitMix64
            bits = (bits ^ (bits >> 29)) * factor
        return ((bits >> 33) % self.numbers.count - self.numbers.largest).double()

    def _key(self, op: Operator, arguments: Sequence[Any]) -> int:
        known = [type(op).__name__, str(self.seed)]
        for each in dataclasses.fields(op):  # type: ignore[arg-type]  # every operator is a dataclass
            stored = getattr(op, each.name)
            known += map(_text, tree_flatten(stored)[0]) if each.compare else []
        known += map(_text, arguments)
        return int.from_bytes(hashlib.blake2b("\n".join(known).encode(), digest_size=7).digest())


def degrees(values: Sequence[Value], sources: Sequence[Value]) -> tuple[int, int]:
    """Bounds of the degree in the integers, and in the powers of two, of whatever multiplies no parameter with itself.

    One for the sources, and one for each parameter of each value. Where the pattern multiplies values, its own degree.
    """
    factors, scales = 1, 0
    own = dict.fromkeys(sources, 1)
    for value in values:
        read = [own.get(used, 1) for used in value.inputs] or [1]
        tensors = len(value.op.tensors()) - isinstance(value.op, BatchNorm)
        factors += tensors
        scales += isinstance(value.op, BatchNorm)
        together = sum(read) if isinstance(value.op, Multiply) else max(read)
        own[value] = together + tensors if is_polynomial(value.op) else 1
    return max(factors, *own.values()), scales


def is_polynomial(op: Operator) -> bool:
    """Affine, a product, or a call that takes no more of its second argument than its shape."""
    return op.affine or isinstance(op, Multiply) or takes_shape_of_another(op)


def smallest(sides: Sides, inputs: list[Tensor], reading: Reading) -> Difference:
    """The sides still differ where as many elements of the inputs as possible are 0, and others 1."""
    found = sides.difference(inputs, reading)
    assert isinstance(found, Difference)
    step = max(x.numel() for x in inputs)
    while step:
        for index, start in ((i, at) for i, x in enumerate(inputs) for at in range(0, x.numel(), step)):
            for number in (0.0, 1.0) if step == 1 else (0.0,):
                tried = [x.clone() for x in found.inputs]
                part = tried[index].view(-1)[start : start + step]
                if bool((part == number).all()) or (number == 1 and bool((part == 0).all())):
                    continue
                part.fill_(number)
                smaller = sides.difference(tried, reading)
                if isinstance(smaller, Difference):
                    found = smaller
                    break
        step //= 2
    return found


def in_words(sides: Sides, found: Difference, reading: Reading) -> str:
    pattern = ", ".join(value.op.label for value in sides.before)
    made = ", ".join(value.op.label for value in sides.after) or "nothing"
    given = "; ".join(map(_described, found.inputs))
    if isinstance(found.found, str):
        return f"no law: [{pattern}] became [{made}], which {found.found} ({given})"
    place = ", ".join(map(str, found.place))
    how = "" if sides.is_polynomial or reading.evaluates else ", with an unknown function for what is not affine"
    return (
        f"no law: [{pattern}] became [{made}], and at [{place}] gives {found.found:.17g} instead of "
        f"{found.expected:.17g} ({given}{how})"
    )


def _described(x: Tensor) -> str:
    size = "x".join(map(str, x.shape))
    places = x.nonzero().tolist()
    if not places:
        return f"input of {size}: zeros"
    shown = ", ".join(f"{float(x[tuple(at)]):g} at {at}" for at in places[:3])
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return f"input of {size}: zeros but for {shown}{more}"


def _evaluated(values: list[Value], roots: Sequence[Value], given: dict[Value, Tensor], reading: Reading) -> Outputs:
    results: dict[Value, Any] = dict(given)
    rounded = False
    with torch.no_grad():
        for value in values:
            arguments = [results[used] for used in value.inputs]
            if is_polynomial(value.op):
                with watch_rounding() as rounding:
                    results[value] = value.op.cast(torch.float64).evaluate(*arguments)
                rounded |= rounding.happened
            else:
                results[value] = reading.of(value.op, arguments)
    return Outputs([results[root] for root in roots], rounded)


def _text(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{list(leaf.shape)} {(leaf + 0.0).tolist()}"  # + 0.0: no negative zero
    return str(id(leaf)) if isinstance(leaf, nn.Module) else repr(leaf)


__all__ = [
    "ROUNDED", "Difference", "Outputs", "Reading", "RoundedError", "Sides", "degrees", "in_words", "is_polynomial",
    "smallest",
]  # fmt: skip
