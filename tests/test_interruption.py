"""Is an interrupt raised until it gets through, and never amid what cleans up after it?"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator

import pytest

from rgc.interruption import AGAIN, Interruption

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no interval timers")


@pytest.fixture
def interruption() -> Iterator[Interruption]:
    """Started; afterwards all is as it was."""
    hook, handlers = sys.unraisablehook, {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGALRM)}
    started = Interruption()
    started.start()
    yield started
    started.stop()
    sys.unraisablehook = hook
    for each, handler in handlers.items():
        signal.signal(each, handler)


def test_nothing_happens_without_an_interrupt(interruption: Interruption) -> None:
    time.sleep(2 * AGAIN)
    assert not interruption.happened and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_has_been_swallowed_strikes_again_until_it_is_stopped(interruption: Interruption) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            time.sleep(20 * AGAIN)
    interruption.stop()
    time.sleep(2 * AGAIN)
    assert interruption.happened


def test_it_is_not_raised_while_one_is_handled_also_inside_of_other_errors(interruption: Interruption) -> None:
    finished: list[str] = []

    def interrupted() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            try:
                raise ValueError
            except ValueError:
                time.sleep(3 * AGAIN)
                finished.append("behind the timer")
            signal.raise_signal(signal.SIGINT)
            finished.append("behind another signal")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert finished == ["behind the timer", "behind another signal"]


def test_other_errors_do_not_hold_it_back(interruption: Interruption) -> None:
    try:
        raise ValueError
    except ValueError:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_behind_the_end_an_interrupt_changes_nothing(interruption: Interruption) -> None:
    interruption.stop()
    signal.raise_signal(signal.SIGINT)
    assert not interruption.happened
