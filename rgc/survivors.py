"""Which faults in the source code of a pass would its examples not notice?

Small faults (`rgc.mutants`) are planted in the functions of the pass, one at a time, and its examples are tried again:
an example notices where the proof of a firing fails, or where the pass does not do what the example says. For a fault
that none notices, the models like the examples are asked: one that notices is the example that is missing.
"""

from __future__ import annotations

import ast
import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

from rgc.line_trace import Lines, watched
from rgc.mutants import Mutant, mutants_of, planted
from rgc.rewrite import Example, GraphPass, Pass
from rgc.trial import Trial

#: Seconds until a function of the pass that does not come to an end is stopped, when it has a fault.
PATIENCE = 10.0

#: So many models like the examples are asked of a fault that no example notices.
MOST_LIKENESSES = 30

#: What is asked of an example: what is wrong, or "".
Asked = Callable[[Example], str]

#: Models like the examples: how to try one, what came out of it without a fault, and what it is called.
Likeness = tuple[Callable[[], Trial], Trial, str]


@dataclass(frozen=True)
class Survivor:
    """A fault that no example notices.

    is_reached: does any example run the line? is_raising: is any of them refused there? noticed: the name of a model
    that notices it, and what the pass makes of that model without the fault.
    """

    mutant: Mutant
    is_reached: bool
    is_raising: bool
    noticed: tuple[str, Trial] | None = None


@dataclass(frozen=True)
class Mutation:
    """How many faults were planted, how many of them an example noticed, and those that none did."""

    planted: int
    noticed: int
    possible: int
    survivors: tuple[Survivor, ...]


def file_of(pass_: Pass) -> str | None:
    """The source file of a pass; None where it was made in no file, such as at a prompt."""
    path = _codes(pass_)[0].co_filename
    return path if Path(path).is_file() else None


def mutate(
    pass_: Pass, ask: Asked, likenesses: Sequence[Likeness], *, most: int, progress: Callable[[int, int], None]
) -> Mutation:
    """Plant up to ``most`` faults in the pass, whose file must exist; without faults its examples must all hold."""
    path = file_of(pass_)
    assert path is not None
    lines = [(example, _lines_run(path, ask, example)) for example in pass_.examples]
    spans = _Spans.of(path, pass_)
    reached = {line for _, each in lines for line in each.run}
    raising = {line for _, each in lines for line in each.raised}
    pool = [
        mutant for mutant in mutants_of(path, spans.is_rule)
        if spans.is_own(mutant.line) or not reached.isdisjoint(spans.statement(mutant.line))
    ]  # fmt: skip
    chosen = sorted(random.Random(0).sample(pool, min(most, len(pool))), key=lambda mutant: (mutant.line, mutant.way))
    survivors, noticed = [], 0
    for number, mutant in enumerate(chosen, start=1):
        progress(number, len(chosen))
        statement = spans.statement(mutant.line)
        examples = [example for example, each in lines if not each.run.isdisjoint(statement)]
        try:
            with planted(mutant):
                is_noticed = any(_noticed(path, ask, example) for example in examples)
                killer = None if is_noticed or not examples else _killer(path, mutant, likenesses)
        except LookupError:
            continue  # it is in code that has run already, when the file was loaded
        noticed += is_noticed
        if not is_noticed:
            survivors.append(Survivor(mutant, bool(examples), not raising.isdisjoint(statement), killer))
    return Mutation(noticed + len(survivors), noticed, len(pool), tuple(survivors))


def _lines_run(path: str, ask: Asked, example: Example) -> Lines:
    with watched(path, PATIENCE) as lines:
        ask(example)
    return lines


def _noticed(path: str, ask: Asked, example: Example) -> bool:
    with _patiently(path):
        return bool(ask(example))


def _patiently(path: str) -> AbstractContextManager[Any]:
    """What stops code of the file that does not come to an end; nothing where no loop of it could: it costs time."""
    tree = ast.parse(Path(path).read_text(), path)
    return watched(path, PATIENCE) if any(isinstance(node, ast.While) for node in ast.walk(tree)) else nullcontext()


def _killer(path: str, mutant: Mutant, likenesses: Sequence[Likeness]) -> tuple[str, Trial] | None:
    """For a guard first the models that are refused, for anything else those on which the pass fires."""
    is_guard = mutant.kind == "guard"
    likely = sorted(likenesses, key=lambda each: bool(each[1].reasons) != is_guard)
    for attempt, before, name in likely[:MOST_LIKENESSES]:
        with _patiently(path):
            after = attempt()
        if after.outcome != before.outcome:
            return name, before
    return None


def _codes(pass_: Pass) -> list[CodeType]:
    functions: list[Any] = [pass_.run] if isinstance(pass_, GraphPass) else [case.build for case in pass_.cases]
    return [inspect.unwrap(function).__code__ for function in functions]


@dataclass(frozen=True)
class _Spans:
    """Which lines of a file are the pass's own functions, and which belong to one statement."""

    own: frozenset[int]
    statements: dict[int, range]
    factories: frozenset[tuple[str, int]]

    @staticmethod
    def of(path: str, pass_: Pass) -> _Spans:
        tree = ast.parse(Path(path).read_text(), path)
        starts = {code.co_firstlineno for code in _codes(pass_)}
        own: set[int] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _first_line(node) in starts:
                own.update(range(node.lineno, _last_line(node) + 1))
        factories = frozenset((each.build.__name__, _line_of(each.build)) for each in pass_.examples)
        return _Spans(frozenset(own), dict(_statements(tree)), factories)

    def is_own(self, line: int) -> bool:
        return line in self.own

    def statement(self, line: int) -> range:
        """The lines of the statement that the line belongs to: Python says of a long one only where it starts."""
        return self.statements.get(line, range(line, line + 1))

    def is_rule(self, definition: ast.AST) -> bool:
        """Is the definition a part of a pass? What makes the models of the examples is none."""
        if isinstance(definition, ast.ClassDef):
            return not any("Module" in ast.unparse(base) for base in definition.bases)
        assert isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef)
        made = "" if definition.returns is None else ast.unparse(definition.returns)
        return not made.endswith("Module") and (definition.name, _first_line(definition)) not in self.factories


def _statements(tree: ast.AST) -> Iterator[tuple[int, range]]:
    """Innermost last, so that it is the one that counts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and not hasattr(node, "body"):
            for line in range(node.lineno, _last_line(node) + 1):
                yield line, range(node.lineno, _last_line(node) + 1)


def _first_line(definition: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Where Python says that it starts: at its decorators."""
    return min([definition.lineno, *(each.lineno for each in definition.decorator_list)])


def _last_line(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


def _line_of(build: Callable[..., Any]) -> int:
    code = getattr(inspect.unwrap(build), "__code__", None)
    return 0 if code is None else code.co_firstlineno


__all__ = ["Likeness", "Mutation", "Survivor", "file_of", "mutate"]
