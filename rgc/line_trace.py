"""Which lines of a source file run, in which is an error raised, and do they come to an end?"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any


class TooLongError(RuntimeError):
    """Code of the watched file ran for longer than it may."""


@dataclass
class Lines:
    """Numbers of lines: those that have run, and those in which, or in what they called, an error was raised."""

    run: set[int] = field(default_factory=set)
    raised: set[int] = field(default_factory=set)


@contextmanager
def watched(path: str, seconds: float) -> Iterator[Lines]:
    """Yields the lines of the file at ``path`` that have run; more are added while the context lasts.

    `TooLongError` is raised inside the file's own code once it runs ``seconds`` after the start. A debugger or a
    measurement of coverage that is at work is set aside meanwhile.
    """
    lines = Lines()
    where = os.path.realpath(path)
    known: dict[str, bool] = {}
    deadline = time.perf_counter() + seconds

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            lines.run.add(frame.f_lineno)
            if time.perf_counter() > deadline:
                raise TooLongError(f"line {frame.f_lineno} still runs after {seconds:.0f} s")
        elif event == "exception":
            lines.raised.add(frame.f_lineno)
        return local

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if name not in known:
            known[name] = os.path.realpath(name) == where
        return local if known[name] else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield lines
    finally:
        sys.settrace(before)


__all__ = ["Lines", "TooLongError", "watched"]
