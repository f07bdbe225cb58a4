"""What happened to the model? Every merge with its evidence, every refusal with its reason, counts before and after."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class Firing:
    """One rewrite that was applied.

    ``evidence`` is "bitwise", "exact" (equal in the reals), "exact+corrected" (with a bias map, a pad value or a
    channel of ones) or "range-conditional" (equal for values in a range that always holds them: ``condition``);
    ``max_error`` is the largest float64 difference seen at its proof, relative to the largest intermediate value;
    ``result`` the new operators; ``sources`` the paths of the layers and calls that went in; ``macs`` how many
    multiply-accumulates it adds for the example (negative: saves).
    """

    rewrite: str
    where: str
    evidence: str
    max_error: float
    result: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    condition: str = ""
    macs: int = 0


@dataclass(frozen=True)
class Refused:
    """One place where a rewrite matched and declined: ``reason`` says what would have to change."""

    rewrite: str
    where: str
    reason: str


@dataclass(frozen=True)
class Failure:
    """A rewrite whose result was not equal: a bug of the rewrite. It was undone; ``reason`` shows how to see it."""

    rewrite: str
    where: str
    reason: str


@dataclass(frozen=True)
class Verification:
    """How far the compiled model is from the original.

    max_error: largest float64 difference over the examples, relative to the scale of the output; None where the
    original does not run in float64. deployed_error and original_error: distance from the float64 original of the
    compiled and of the original model in the deployed dtype, on the same scale; the first may not exceed a small
    multiple of the second. examples: how many inputs were drawn.
    """

    equal: bool
    max_error: float | None
    deployed_error: float
    original_error: float
    allowed_error: float
    examples: int
    level: str
    reason: str = ""


@dataclass(frozen=True)
class OutputBound:
    """How far rounding can take one output from the original in float64, on the example, relative to its scale.

    output: its place among the tensors that are returned. bound: holds for any order of summation (`rgc.rounding`);
    None where there is none, for the ``reason`` given. measured: the distance that was found, on the same scale.
    """

    output: int
    bound: float | None
    measured: float
    reason: str = ""

    def __str__(self) -> str:
        if self.bound is None:
            return f"output {self.output}: {self.reason}; measured {self.measured:.1e} of scale"
        return f"output {self.output}: error at most {self.bound:.1e} of scale, measured {self.measured:.1e}"


@dataclass(frozen=True)
class ErrorBound:
    """Rounding on the example, for any order of summation (`rgc.rounding`): of outputs, and of layers by themselves.

    layers: how many layers were held against a bound of their own, on the inputs that they really got. share: the
    largest part of its bound that any of them takes, by ``layer``.
    """

    outputs: tuple[OutputBound, ...]
    layers: int
    share: float
    layer: str

    def __str__(self) -> str:
        most = f"at most {self.share:.1%} of their own bounds ({self.layer})" if self.layer else "nothing"
        lines = [f"rounding, for any order of summation: {self.layers} layers take {most}", *map(str, self.outputs)]
        return "\n  ".join(lines)


@dataclass(frozen=True)
class Report:
    """The record of one compilation; ``to_json()`` for machines, ``rich.print(report)`` for people.

    ops_*: layers and functions by name, as a `collections.Counter`. opaque: those of ops_after that rgc does not know
    and passed through untouched. params_*: elements of parameters and constants.
    macs_*: multiply-accumulates for the example. fixed_size: does the result hold at the example's size only?
    max_error: as in `Verification`. bound: what rounding can do, computed at ``verify="full"``.
    """

    model: str
    passes: tuple[str, ...]
    objective: str
    target: str
    tier: str
    input_shapes: tuple[tuple[int, ...], ...]
    rewrites: list[Firing]
    refusals: list[Refused]
    failures: list[Failure]
    ops_before: Counter[str]
    ops_after: Counter[str]
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    fixed_size: bool
    opaque: Counter[str] = field(default_factory=Counter)
    verification: Verification | None = None
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    bound: ErrorBound | None = None

    @property
    def max_error(self) -> float | None:
        """The largest float64 difference between the original and the compiled model, relative to its scale."""
        return None if self.verification is None else self.verification.max_error

    def to_json(self) -> str:
        """The whole report as JSON."""
        counts = {name: dict(getattr(self, name)) for name in ("ops_before", "ops_after", "opaque")}
        plain = dataclasses.replace(self, ops_before=Counter(), ops_after=Counter(), opaque=Counter())
        rest = dataclasses.asdict(plain)
        return json.dumps({**rest, **counts, "max_error": self.max_error}, indent=2)

    def _refusals_by_reason(self) -> dict[tuple[str, str], list[str]]:
        places: dict[tuple[str, str], list[str]] = {}
        for refused in self.refusals:
            places.setdefault((refused.rewrite, refused.reason), []).append(refused.where)
        return places

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.markup import escape
        from rich.table import Table
        from rich.text import Text

        yield Text(f"{self.model}: {len(self.rewrites)} rewrites, {len(self.refusals)} refusals", style="bold")
        counts = Table("", "before", "after", box=None, pad_edge=False)
        for name in sorted(self.ops_before | self.ops_after):
            counts.add_row(name, str(self.ops_before[name]), str(self.ops_after[name]))
        counts.add_row("operators", str(self.ops_before.total()), str(self.ops_after.total()), style="bold")
        counts.add_row("parameters", f"{self.params_before:,}", f"{self.params_after:,}", style="bold")
        counts.add_row("MACs", f"{self.macs_before:,}", f"{self.macs_after:,}", style="bold")
        for column in counts.columns[1:]:
            column.justify = "right"
        yield counts
        if self.opaque:
            untouched = ", ".join(f"{name} {count}" for name, count in sorted(self.opaque.items()))
            yield Text(f"passed through untouched: {untouched}")
        fired = Counter((firing.rewrite, firing.evidence) for firing in self.rewrites)
        if fired:
            yield Text("\nrewrites", style="bold")
            table = Table("rewrite", "times", "evidence", "largest error", "MACs", box=None, pad_edge=False)
            table.columns[-1].justify = "right"
            for (name, evidence), times in fired.items():
                those = [f for f in self.rewrites if (f.rewrite, f.evidence) == (name, evidence)]
                worst, added = max(f.max_error for f in those), sum(f.macs for f in those)
                table.add_row(name, str(times), evidence, f"{worst:.1e}", f"{added:+,}" if added else "")
            yield table
        if self.refusals:
            yield Text("\nrefusals", style="bold")
            table = Table("rewrite", "where", "reason", box=None, pad_edge=False)
            for (name, reason), places in self._refusals_by_reason().items():
                more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
                table.add_row(name, escape(places[0]) + more, escape(reason))
            yield table
        for failure in self.failures:
            yield Text(f"bug: {failure.rewrite} at {failure.where}, undone: {failure.reason}", style="red")
        for note in self.notes:
            yield Text(f"note: {note}")
        if self.bound is not None:
            yield Text(f"\n{self.bound}")
        yield Text(f"\n{summary(self)}", style="bold")


def summary(report: Report) -> str:
    """The proof in a sentence."""
    size = ", holds at this input size only" if report.fixed_size else ""
    proof = report.verification
    if proof is None:
        return f"not verified{size}"
    exact = "" if proof.max_error is None else f"float64 difference {proof.max_error:.1e} of scale, "
    return (
        f"proved equal on {proof.examples} inputs: {exact}deployed error {proof.deployed_error:.1e} "
        f"(the original's own: {proof.original_error:.1e}){size}"
    )
