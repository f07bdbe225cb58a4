"""Does what the README shows work as it stands there?"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rgc.cli import run

README = Path(__file__).parents[1] / "README.md"
PROOF = README.parent / "docs" / "proof.md"


def test_the_python_of_the_readme_runs() -> None:
    pytest.importorskip("torchvision")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)  # the README's own code
    report = names["compiled"].report  # type: ignore[attr-defined]  # a CompiledModule
    assert report.ops_after["BatchNorm2d"] == 0 and len(blocks) == 4


def test_the_python_of_the_page_on_proofs_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PROOF.read_text(), flags=re.DOTALL)
    exec(compile(block, str(PROOF), "exec"), {})  # it asserts what it says


@pytest.mark.parametrize(("page", "least"), [(README, 6), (PROOF, 1)])
def test_the_commands_of_a_page_exist_with_their_options(
    page: Path, least: int, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = re.findall(r"^    rgc (.+?)(?:  +#.*)?$", page.read_text(), flags=re.MULTILINE)
    assert len(commands) >= least
    for command in commands:
        name, *rest = shlex.split(command)
        assert run([name, "--help"]) == 0
        shown = capsys.readouterr().out
        assert all(option in shown for option in rest if option.startswith("--"))
