"""What does the user of the command line see? Results on stdout; progress, and errors in one line, on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
import threading
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rgc.artifact import Artifact
    from rgc.calibration import Calibration
    from rgc.certified import Evidence
    from rgc.compiler import Trace
    from rgc.examination import Examination
    from rgc.laws import Law
    from rgc.report import Verification
    from rgc.rewrite import Example, Pass, Term

#: What `law_row` tells of a law.
LAW_COLUMNS = ("pass", "forms", "patterns", "firings", "tries", "degree", "set", "chance")

#: What stands in the source of no pass.
_OTHER_REASONS = "for the reasons of the algebra (the border ring, strides, groups) and of the cost model"

#: Work that is over sooner shows no progress: a flicker tells nobody anything.
_PATIENCE = 1.0


def console() -> Console:
    """Where results go: styled on a terminal, plain elsewhere and under NO_COLOR (where rich keeps bold)."""
    return Console(highlight=False, color_system=None if os.environ.get("NO_COLOR") else "auto")


def one_line(message: object) -> str:
    """``message`` on one line, with whatever could steer a terminal made visible.

    >>> one_line("cannot\\nread \\x1b[31mmodel.pt")
    'cannot read \\\\x1b[31mmodel.pt'
    """
    text = " ".join(str(message).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_error(message: object) -> None:
    """One line on stderr."""
    print(f"rgc: {one_line(message)}", file=sys.stderr)


@contextlib.contextmanager
def progress(doing: str) -> Iterator[Callable[[str], None]]:
    """Say what is being done, and for how long, on a terminal, once it has taken a second; yields a way to say more."""
    errors = Console(stderr=True)
    if not errors.is_terminal:
        yield lambda _: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    bar = Progress(*columns, console=errors, transient=True)
    task = bar.add_task(one_line(doing), total=None)
    timer = threading.Timer(_PATIENCE, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda detail: bar.update(task, description=one_line(f"{doing}: {detail}"))
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal; yields a way to say how much is done, of how much, and what is being done."""
    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, doing: bar.update(task, completed=done, total=total, description=one_line(doing))


def print_calibration(out: Console, made: Calibration, path: Path) -> None:
    """What was measured, how well, and where it is kept."""
    key = made.key
    threads = f", {key.threads} thread{'s' * (key.threads > 1)}" if key.threads else ""
    _print_heading(out, f"{key.device}: {key.target}, {key.dtype}{threads}, torch {key.torch_version}")
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_row("highest rate", f"{made.peak / 1e9:,.0f} GFLOP/s")
    speeds = [rate / 1e9 for _, rate in made.bandwidth]
    table.add_row("bandwidth", f"{max(speeds):,.0f} GB/s in a cache, {speeds[-1]:,.0f} GB/s beyond")
    calls = ", ".join(f"{kind} {1e6 * seconds:.1f} us" for kind, seconds in made.overhead.items())
    table.add_row("smallest calls", calls)
    table.add_row("measured", f"{made.count} calls, {len(made.efficiency)} kinds of kernels; noise {made.noise:.1%}")
    out.print(table)
    if made.unsettled:
        out.print(Text(f"note: {made.unsettled} of them stayed noisy (over 5 %); let nothing else run and repeat it"))
    out.print(Text(f"wrote {one_line(path)}"), soft_wrap=True)


def print_written(out: Console, artifact: Artifact) -> None:
    """What there is to say about a new artifact, its path and size last."""
    from rgc.certificate import certificate_of

    for note in artifact.notes:
        out.print(Text(f"note: {note}"))
    out.print(Text(f"certificate: {one_line(certificate_of(artifact.path, artifact.format))}"), soft_wrap=True)
    free = artifact.free_dimensions
    freedom = "" if free is None else f"; free dimensions: {', '.join(free) or 'none'}"
    slash = "/" if artifact.format == "python" else ""
    size = human_size(size_of(artifact.path))
    out.print(Text(f"wrote {one_line(artifact.path)}{slash} ({size}{freedom})"), soft_wrap=True)


def size_of(path: Path) -> int:
    """Bytes of a file, of the weights that an ONNX file keeps beside it, or of everything in a folder."""
    from rgc.artifact import data_files  # the exporters take seconds to import

    parts = path.rglob("*") if path.is_dir() else (path, *data_files(path))
    return sum(part.stat().st_size for part in parts if part.is_file())


def human_size(count: int) -> str:
    """A number of bytes for people.

    >>> human_size(532), human_size(43_210), human_size(8_700_000)
    ('532 B', '43.2 kB', '8.7 MB')
    """
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def print_trace(out: Console, name: str, trace: Trace) -> None:
    """A graph as text, its operators counted, and what was done to it."""
    from rgc.emit import operator_counts

    counts = operator_counts(trace.graph)
    _print_heading(out, f"{name}: {counts.total()} operators, traced by {trace.tier}")
    out.print(Text(str(trace.graph)), soft_wrap=True)
    _print_heading(out, "\noperators")
    _print_table(out, ("operator", "count"), ([name, str(count)] for name, count in sorted(counts.items())), right=(1,))
    if trace.rewrites:
        _print_heading(out, "\nrewrites")
        rows = ([firing.rewrite, firing.where, firing.evidence] for firing in trace.rewrites)
        _print_table(out, ("rewrite", "where", "evidence"), rows)
    if trace.refusals:
        _print_heading(out, "\nrefusals")
        refused = ([each.rewrite, each.where, each.reason] for each in trace.refusals)
        _print_table(out, ("rewrite", "where", "reason"), refused)
    for note in trace.notes:
        out.print(Text(f"note: {note}"))


def print_verification(out: Console, found: Verification) -> None:
    """The errors that were measured, and the verdict."""
    if not found.equal:
        out.print(Text(f"not equal: the artifact {one_line(found.reason)}"), soft_wrap=True)
        return
    _print_heading(out, "largest distance from the original in float64, relative to the scale of its output")
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_row("artifact", f"{found.deployed_error:.1e}")
    table.add_row("original", f"{found.original_error:.1e}")
    table.add_row("allowed", f"{found.allowed_error:.1e}")
    table.add_row("inputs", f"{found.examples} ({found.level})")
    out.print(table)
    out.print(Text("equal"), style="bold")


def print_evidence(out: Console, evidence: Evidence) -> None:
    """What of a certificate was checked again."""
    count = len(evidence.certificate.artifact.files)
    seeds = ", ".join(str(check.seed) for check in evidence.checks)
    inputs = f"; equal on the inputs of seed{'s' * (len(evidence.checks) > 1)} {seeds}" if seeds else ""
    files = f"{count} file{'s' * (count > 1)}"
    out.print(Text(f"certificate: the original and {files} are those that it describes{inputs}"), soft_wrap=True)
    for remark in evidence.remarks:
        print_note(out, remark)


def print_note(out: Console, remark: str) -> None:
    """Something that the user should know, on a line."""
    out.print(Text(f"note: {one_line(remark)}"), soft_wrap=True)


def print_passes(out: Console, passes: Sequence[Pass], sets: dict[str, Iterable[Pass]]) -> None:
    """All passes, one a row, each with the smallest set of ``sets`` that it belongs to."""
    member = {each.name: name for name, members in reversed(sets.items()) for each in members}
    rows = ([each.name, member.get(each.name, "by name"), first_sentence(each.statement)] for each in passes)
    _print_table(out, ("pass", "in", "statement"), rows)


def print_examination(out: Console, found: Examination) -> None:
    """A line for each kind of check, then what is wrong, each with what to do and a program that shows it."""
    _print_heading(out, found.name)
    _print_table(out, ("check", "result", "tried"), ([line.check, line.status, line.tried] for line in found.lines))
    for finding in found.findings:
        out.print(Text(f"\nwrong: {_visible(finding.problem)}"), soft_wrap=True)
        if finding.advice:
            out.print(Text(f"  do: {_visible(finding.advice)}"), soft_wrap=True)
        if finding.program:
            out.print(Text("  this program shows it:\n"))
            out.print(Text(textwrap.indent(finding.program, "    ")), soft_wrap=True)
    for note in found.notes:
        out.print(Text(f"note: {_visible(note)}"), soft_wrap=True)
    out.print()


def _visible(text: str) -> str:
    """The lines of a text, each as `one_line` shows it."""
    return "\n".join(map(one_line, text.splitlines()))


def first_sentence(statement: str) -> str:
    """The first sentence of a docstring, on one line.

    >>> first_sentence("Two scales are one: s(tx) = (st)x, e.g. 2.\\nMore.\\n")
    'Two scales are one: s(tx) = (st)x, e.g. 2.'
    """
    text = " ".join(statement.split("\n\n")[0].split())
    end = next((at for at, c in enumerate(text) if c == "." and text[at + 1 : at + 3].strip()[:1].isupper()), len(text))
    return text[: end + 1]


def print_pass(out: Console, shown: Pass) -> None:
    """One pass: what it states, which patterns it matches, its examples, and what it may refuse."""
    from rgc.reasons import reasons_of
    from rgc.rewrite import GraphPass

    _print_heading(out, shown.name)
    out.print(Text(reflowed(shown.statement)))
    _print_heading(out, "\nmatches")
    if isinstance(shown, GraphPass):
        _print_indented(out, Text("the graph as a whole: it has no pattern"))
    for case in [] if isinstance(shown, GraphPass) else shown.cases:
        holes = ", ".join(f"{name}: {_names_of(kind)}" for name, (kind, _) in case.holes.items())
        _print_indented(out, Text(f"{pattern_text(case.pattern)}   with {holes}"))
    fires, leaves = ([e for e in shown.examples if e.fires is wanted] for wanted in (True, False))
    for heading, examples in (("fires on", fires), ("leaves alone", leaves)):
        if examples:
            _print_heading(out, f"\n{heading}")
            columns = ("example", "input", *([] if heading == "fires on" else ["because"]))
            _print_table(out, columns, (_example_row(example) for example in examples))
    _print_heading(out, "\nmay refuse because")
    own = reasons_of(shown)
    for reason in [*own, f"{'and ' if own else ''}{_OTHER_REASONS}"]:
        _print_indented(out, Text(reason))


def print_law(out: Console, law: Law | None = None) -> None:
    """How much a pass is proved to be a law, or how to have it proved."""
    _print_heading(out, "\nproof")
    table = Table.grid(padding=(0, 2, 0, 0))
    if law is None:
        table.add_row("law", Text("not tried here: --prove tries it on random integers, without rounding"))
    else:
        table.add_row("evidence", Text(", ".join(law.evidence)))
        table.add_row("law", Text(str(law)))
        table.add_row("assuming", Text(law.assumption))
    formulas = "sizes, strides, padding, dilation and borders are proved for all numbers (tests/test_axis.py, by sympy)"
    table.add_row("formulas", Text(formulas))
    table.add_row("firings", Text("each one is compared in float64 with what it replaces, and so is the whole model"))
    _print_indented(out, table)


def print_laws(out: Console, laws: Iterable[Law]) -> None:
    """The laws of several passes, one a row."""
    _print_table(out, LAW_COLUMNS, map(law_row, laws), right=range(1, len(LAW_COLUMNS)))
    out.print(Text("chance: at most, that a wrong pass agrees on all tries; -: not polynomial, so none is stated"))


def law_row(law: Law) -> list[str]:
    """The numbers of a law."""
    fired, known = law.patterns
    counts = [law.forms, f"{fired} of {known}" if known else "-", law.firings, law.instances, law.degree, law.draws]
    return [law.rewrite, *map(str, counts), "-" if law.chance is None else f"{law.chance:.0e}"]


def _names_of(kind: Any) -> str:
    """A class, or the classes of a union, without their modules."""
    members = typing.get_args(kind) or (kind,)
    return " | ".join(getattr(each, "__name__", str(each)) for each in members)


def reflowed(text: str) -> str:
    """The paragraphs of a docstring without their line breaks; indented ones as they are.

    >>> reflowed("One\\nsentence.\\n\\n    a = b\\n    c = d\\n")
    'One sentence.\\n\\n    a = b\\n    c = d'
    """
    paragraphs = text.strip("\n").split("\n\n")
    return "\n\n".join(p.rstrip() if p.startswith(" ") else " ".join(p.split()) for p in paragraphs)


def pattern_text(term: Term) -> str:
    """A pattern as the expression that stated it: ``conv(x) + x``."""
    from rgc.rewrite import Applied, Hole, Sum

    match term:
        case Hole(name):
            return name
        case Applied(operator, arguments):
            return f"{operator}({', '.join(map(pattern_text, arguments))})"
        case Sum(left, right, sign):
            second = f"({pattern_text(right)})" if sign < 0 and isinstance(right, Sum) else pattern_text(right)
            return f"{pattern_text(left)} {'+' if sign > 0 else '-'} {second}"
    factors = (f"({pattern_text(f)})" if isinstance(f, Sum) else pattern_text(f) for f in (term.left, term.right))
    return " * ".join(factors)


def _example_row(example: Example) -> list[str]:
    size = "x".join(map(str, example.shape)) + (" (fixed)" if example.fixed_size else "")
    return [example.name, size, *([] if example.fires else [example.because])]


def _print_heading(out: Console, text: str) -> None:
    out.print(Text(text, style="bold"))


def _print_indented(out: Console, content: RenderableType) -> None:
    out.print(Padding(content, (0, 0, 0, 2), expand=False))


def _print_table(
    out: Console, columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()
) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    out.print(table)
