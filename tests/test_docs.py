"""Does what docs/ shows work as it stands there? The commands exist, and the tutorial's code does what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from rgc.cli import run
from rgc.examination import Examination, examine
from rgc.passbook import load_passes

DOCS = Path(__file__).parents[1] / "docs"
TUTORIAL = (DOCS / "writing_a_pass.md").read_text()

#: Each block of code in order: what follows its fence, and the code.
BLOCKS = [(info.strip(), code) for info, code in re.findall(r"^```(.*)\n((?:.*\n)*?)```$", TUTORIAL, re.MULTILINE)]


def version(number: int) -> str:
    """What my_passes.py holds after so many of the blocks that write it, or with a plus add to it."""
    text = ""
    written = [(info, code) for info, code in BLOCKS if info.startswith("python my_passes.py")]
    for info, code in written[:number]:
        text = f"{text}\n{code}" if info.endswith("+") else code
    return text


def examined(folder: Path, number: int, **how: Any) -> dict[str, Examination]:
    (folder / "my_passes.py").write_text(version(number))
    return {each.name: examine(each, **how) for each in load_passes(str(folder / "my_passes.py"))}


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_commands_exist_with_their_options(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in re.findall(r"^    rgc (.+?)(?:  +#.*)?$", path.read_text(), flags=re.MULTILINE):
        name, *rest = shlex.split(command)
        assert run([name, "--help"]) == 0
        shown = capsys.readouterr().out
        assert all(option in shown for option in rest if option.startswith("--"))


def test_the_tutorial_has_the_blocks_that_are_tested_here() -> None:
    assert [info for info, _ in BLOCKS] == [
        "python my_passes.py", "text problem", "text problem", "python my_passes.py", "python",
        "python my_passes.py +", "python my_passes.py +",
    ]  # fmt: skip
    assert re.findall(r"^    rgc test .*$", TUTORIAL, re.MULTILINE)


def test_the_first_version_is_wrong_in_the_words_that_the_tutorial_quotes(tmp_path: Path) -> None:
    found = examined(tmp_path, 1, models=40, mutation=False)["pool_first"]
    problems = [finding.problem for finding in found.findings]
    quoted = [code.strip() for info, code in BLOCKS if info == "text problem"]
    assert len(quoted) == 2 and all(any(problem.startswith(words) for problem in problems) for words in quoted)
    assert len(problems) == 2 and [finding.check for finding in found.findings] == ["examples", "fuzzing"]


def test_nothing_is_wrong_with_the_second_version_and_its_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = examined(tmp_path, 2, models=4)["pool_first"]
    assert found.ok, found.findings
    assert [line.status for line in found.lines] == ["ok"] * 4
    (code,) = (code for info, code in BLOCKS if info == "python")
    monkeypatch.syspath_prepend(tmp_path)
    exec(compile(code, "<tutorial>", "exec"), {})
    assert capsys.readouterr().out.strip() == code.partition("#")[2].partition("\n")[0].strip()


def test_nothing_is_wrong_with_the_last_version(tmp_path: Path) -> None:
    found = examined(tmp_path, 4, thorough=False)
    assert set(found) == {"pool_first", "activate_once"}
    assert all(each.ok for each in found.values()), found


def test_a_range_that_is_not_declared_is_told(tmp_path: Path) -> None:
    (tmp_path / "my_passes.py").write_text(version(3).replace(", relies_on_range=True", ""))
    (found,) = (examine(each, thorough=False) for each in load_passes(str(tmp_path / "my_passes.py")))
    assert "declare that with @rewrite(..., relies_on_range=True)" in found.findings[0].advice
