"""Which rewrite is to blame where a result differs from its original? The firing with which the difference appears.

Firings are made one after the other, and each prefix of them is a whole model. So bisection over their number finds one
that turns an equal model into another; where the model differs before the first, none of them is guilty, but the trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rgc.report import Failure, Firing

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


def first_failing(count: int, fails: Callable[[int], bool]) -> int:
    """A number n of firings after which something ``fails``, but not after n - 1; 0 where it does without any.

    It is known to fail after ``count``.

    >>> first_failing(100, lambda n: n >= 37), first_failing(5, lambda n: True)
    (37, 0)
    """
    if count == 0 or fails(0):
        return 0
    good, bad = 0, count
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if fails(middle) else (middle, bad)
    return bad


@dataclass(frozen=True)
class Attribution:
    """What `rgc.bisect` found on a user's data.

    equal: no difference on any of the ``samples``. firing: the one with which the difference appears, the
    ``number``-th of ``firings``; None where the model differs without any, so that the trace by ``tier`` is to blame.
    sample: where it shows, in the dtype ``precision``. before, after: the difference there without and with that
    firing, relative to the output's scale (infinite: nothing to compare); ``allowed`` would be rounding.
    undone: rewrites that drawn inputs have shown to be wrong, and that are not in the result.
    """

    equal: bool
    samples: int
    tier: str
    firings: int
    firing: Firing | None = None
    number: int = 0
    sample: str = ""
    precision: str = ""
    before: float = 0.0
    after: float = 0.0
    allowed: float = 0.0
    reason: str = ""
    undone: tuple[Failure, ...] = field(default=())

    @property
    def culprit(self) -> str:
        """The rewrite and where it fired, or the trace; empty where all is equal."""
        if self.equal:
            return ""
        return (
            f"the trace itself ({self.tier})"
            if self.firing is None
            else f"{self.firing.rewrite} at {self.firing.where}"
        )

    def __str__(self) -> str:
        if self.equal:
            return f"equal on all {self.samples:,} samples" if self.samples > 1 else "equal on the one sample"
        return f"{self.culprit}: the compiled model {self.reason}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        yield Text(str(self), style="bold")
        if not self.equal:
            table = Table.grid(padding=(0, 2, 0, 0))
            for name, value in self._rows():
                table.add_row(Text(name), Text(value))
            yield table
        for failure in self.undone:
            yield Text(f"bug: {failure.rewrite} at {failure.where}, undone: {failure.reason}", style="red")

    def _rows(self) -> list[tuple[str, str]]:
        if self.firing is None:
            where = [("rewrites", f"none is guilty: the model differs before the first of {self.firings}")]
        else:
            where = [
                ("rewrite", f"{self.firing.rewrite}, firing {self.number} of {self.firings}"),
                ("where", self.firing.where),
                ("layers", ", ".join(self.firing.sources)),
                ("made", ", ".join(self.firing.result)),
            ]
        measured = [
            ("sample", self.sample),
            ("precision", self.precision or "none: it does not run"),
            ("before", f"{self.before:.1e} of the output's scale"),
            ("after", f"{self.after:.1e}; rounding explains {self.allowed:.1e}"),
        ]
        if self.firing is None:
            del measured[2]
        return where + measured


__all__ = ["Attribution", "first_failing"]
