"""Is Ctrl-C one line and status 130, wherever it strikes: amid imports, in a finalizer, or where nothing catches it?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

AMID_IMPORTS = """
import signal, sys, rgc_command
class Finder:
    def find_spec(self, name, path=None, target=None):
        signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
rgc_command.main()
"""
IN_A_FINALIZER = """
import signal, time, rgc_command
from rgc import cli
class Finalized:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
def run(arguments):
    Finalized()
    time.sleep(60)
    return 0, None
cli.outcome = run
rgc_command.main()
"""
SWALLOWED = """
import signal, time, rgc_command
from rgc import cli
def run(arguments):
    for _ in range(3):
        try:
            signal.raise_signal(signal.SIGINT)
            time.sleep(60)
        except BaseException:
            pass
    time.sleep(60)
    return 0, None
cli.outcome = run
rgc_command.main()
"""
BECOME_ANOTHER = """
import signal, rgc_command
from rgc import cli
def run(arguments):
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException as error:
        raise SystemError("returned a result with an exception set")
cli.outcome = run
rgc_command.main()
"""
SWALLOWED_BEFORE_AN_ERROR = """
import signal, rgc_command
from rgc import cli
def run(arguments):
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException as error:
        return 2, "no such file"
cli.outcome = run
rgc_command.main()
"""
WHILE_CLEANING_UP = """
import os, pathlib, signal, sys, time, rgc_command
from rgc import cli
def run(arguments):
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        for _ in range(20):
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.02)
        print("cleaned up", flush=True)
cli.outcome = run
rgc_command.main()
"""
AT_THE_END = """
import signal, sys, rgc_command
from rgc import cli
class Finalized:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
cli.outcome = lambda arguments: (0, None)
kept = Finalized()
rgc_command.main()
"""


def outcome(script: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "script",
    [AMID_IMPORTS, IN_A_FINALIZER, SWALLOWED, BECOME_ANOTHER, SWALLOWED_BEFORE_AN_ERROR],
    ids=["imports", "finalizer", "swallowed", "another error", "before an error"],
)
def test_an_interrupt_is_one_line(script: str) -> None:
    assert outcome(script) == (130, "rgc: interrupted\n")


def test_what_cleans_up_is_not_interrupted_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WHILE_CLEANING_UP], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "cleaned up\n", "rgc: interrupted\n")


def test_an_interrupt_behind_the_end_changes_nothing() -> None:
    assert outcome(AT_THE_END) == (0, "")


def test_the_command_runs_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "rgc_command.py", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("rgc ")


def test_an_error_of_our_own_is_raised_as_ever() -> None:
    script = "import rgc_command\nfrom rgc import cli\ncli.outcome = lambda arguments: 1 / 0\nrgc_command.main()"
    status, said = outcome(script)
    assert status == 1 and said.rstrip().endswith("ZeroDivisionError: division by zero")


def test_other_errors_in_finalizers_are_shown_as_ever() -> None:
    script = IN_A_FINALIZER.replace("signal.raise_signal(signal.SIGINT)", "1 / 0").replace("time.sleep(60)", "pass")
    status, said = outcome(script)
    assert status == 0 and "ZeroDivisionError" in said
