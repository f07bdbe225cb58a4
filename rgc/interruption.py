"""How does Ctrl-C end a command, also where something swallows it? It strikes again until the command has unwound.

A ``KeyboardInterrupt`` is raised wherever Python happens to be. In a finalizer, in a callback of C++ code, or in C code
that clears errors, nobody passes it on, and the command would run on as if nothing had been said.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

#: Seconds until an interrupt that has been swallowed strikes again.
AGAIN = 0.1


class Interruption:
    """From the first SIGINT on, ``KeyboardInterrupt`` in the main thread, again and again until `stop`.

    It is not raised again while one is under way, so that what cleans up is not interrupted.
    """

    def __init__(self) -> None:
        self.happened = False

    def start(self) -> None:
        """Take over SIGINT. To be called in the main thread."""
        sys.unraisablehook = _show_unless_interrupt
        signal.signal(signal.SIGINT, self._strike)

    def stop(self) -> None:
        """The work is done, or undone: nothing is left to interrupt."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_IGN)

    def _strike(self, signal_number: int, frame: FrameType | None) -> None:
        if not self.happened and sys.platform != "win32":  # Windows has no such timer: there it strikes once
            signal.signal(signal.SIGALRM, self._strike)
            signal.setitimer(signal.ITIMER_REAL, AGAIN, AGAIN)
        self.happened = True
        if not _is_under_way():
            raise KeyboardInterrupt


def _is_under_way() -> bool:
    """Does the code that was interrupted handle an interrupt already, in an ``except``, ``finally`` or ``with``?"""
    error = sys.exception()
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _show_unless_interrupt(ignored: sys.UnraisableHookArgs) -> None:
    if not isinstance(ignored.exc_value, KeyboardInterrupt):  # which strikes again
        sys.__unraisablehook__(ignored)
