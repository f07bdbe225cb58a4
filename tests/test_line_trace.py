"""Are the lines of a file that run, and those that raise, seen, and a loop without an end stopped?"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FunctionType

import pytest

from rgc.line_trace import TooLongError, watched

SOURCE = """def half(x):
    if x % 2:
        raise ValueError(x)
    return x // 2


def loop():
    while True:
        pass
"""


@pytest.fixture
def functions(tmp_path: Path) -> dict[str, FunctionType]:
    path = tmp_path / "source.py"
    path.write_text(SOURCE)
    names: dict[str, FunctionType] = {}
    exec(compile(SOURCE, str(path), "exec"), names)
    return names


def test_lines_that_run_are_told_from_those_that_do_not(functions: dict[str, FunctionType]) -> None:
    path = functions["half"].__code__.co_filename
    with watched(path, 10) as lines:
        assert functions["half"](4) == 2
    assert lines.run == {2, 4} and not lines.raised
    functions["half"](4)
    with watched(path, 10) as lines, pytest.raises(ValueError, match="3"):
        functions["half"](3)
    assert 3 in lines.run and 3 in lines.raised and 4 not in lines.run


def test_a_loop_without_an_end_is_stopped_and_who_traced_before_goes_on(functions: dict[str, FunctionType]) -> None:
    before = sys.gettrace()
    with watched(functions["loop"].__code__.co_filename, 0.05), pytest.raises(TooLongError, match=r"line (8|9) still"):
        functions["loop"]()
    assert sys.gettrace() is before
