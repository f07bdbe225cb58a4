"""Does what a user writes after ``passes=`` mean what it says?"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import rgc
from rgc import InputError, passes
from rgc.passbook import load_passes, passes_in, resolve

PLUGIN = '''
"""Two ReLUs in a row are one."""
import rgc
from rgc import Activation, Value

@rgc.rewrite(lambda x, first, second: second(first(x)))
def merge_relus(x: Value, first: Activation, second: Activation) -> Value:
    rgc.require(first.name == second.name == "relu", "not two ReLUs")
    return first(x)

@rgc.graph_pass
def look(graph):
    """Changes nothing."""
    return graph
'''


def names(given: Any) -> list[str]:
    return [each.name for each in resolve(given)[0]]


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "my_passes.py"
    path.write_text(PLUGIN)
    return path


def test_sets_have_names() -> None:
    assert names("default") == [each.name for each in passes.DEFAULT]
    assert names("all") == [each.name for each in passes.ALL]
    assert names([]) == []


@pytest.mark.parametrize(
    "given", ["default,-merge_branches", "-merge_branches", ["default", "-merge_branches"], "default, -merge_branches "]
)
def test_a_minus_takes_a_pass_away(given: Any) -> None:
    assert names(given) == [each.name for each in passes.DEFAULT if each.name != "merge_branches"]


def test_the_order_is_the_one_of_the_passes() -> None:
    assert names("fold_scale,hygiene,fold_batchnorm") == ["hygiene", "fold_batchnorm", "fold_scale"]
    assert names([passes.fold_scale, "fold_scale", passes.hygiene]) == ["hygiene", "fold_scale"]


@pytest.mark.parametrize(
    ("given", "fixed"),
    [("default", False), ("all", True), ("all,-collapse", True), ("collapse", True), ([passes.collapse], True),
     ("hygiene", False), ("hygiene,collapse,-collapse", False)],
)  # fmt: skip
def test_only_all_and_collapse_rely_on_the_size_of_the_example(given: Any, fixed: bool) -> None:
    assert resolve(given)[1] is fixed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("fold_batchnrom", "unknown pass 'fold_batchnrom'; did you mean 'fold_batchnorm'?"),
        ("-fold_bachnorm", "unknown pass 'fold_bachnorm'; did you mean 'fold_batchnorm'?"),
        ("defualt", "unknown pass 'defualt'; did you mean 'default'?"),
        ("xyzzy", "unknown pass 'xyzzy'; choose from default, all, hygiene, "),
        ([7], "7 is no pass: expected a name, a file, a module or what @rgc.rewrite returns"),
        ("no_such_file.py", "no_such_file.py: no such file of passes"),
        ("no.such.module", "no module 'no.such.module' for passes: "),
    ],
)
def test_what_is_no_pass_is_refused_with_a_hint(given: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve(given)
    assert str(caught.value).startswith(message)


def test_a_file_brings_its_passes_and_they_come_last(plugin: Path) -> None:
    assert names(["fold_scale", str(plugin), "hygiene"]) == ["hygiene", "fold_scale", "merge_relus", "look"]
    model = nn.Sequential(nn.ReLU(), nn.ReLU()).eval()
    report = rgc.compile(model, torch.randn(2, 3), passes=f"default,-remove_linear_activation,{plugin}").report
    assert [(firing.rewrite, firing.where) for firing in report.rewrites] == [("merge_relus", "1")]


def test_a_module_brings_its_passes(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(plugin.parent))
    package = plugin.parent / "a_package_of_passes"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "mine.py").write_text(PLUGIN)
    assert names("a_package_of_passes.mine") == ["merge_relus", "look"]
    assert names([sys.modules["a_package_of_passes.mine"]]) == ["merge_relus", "look"]


def test_a_module_without_passes_says_how_to_make_one() -> None:
    with pytest.raises(InputError, match="empty defines no pass; decorate a function with @rgc.rewrite"):
        passes_in(ModuleType("empty"))


def test_an_error_in_a_file_of_passes_is_raised_with_the_name_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError) as caught:
        load_passes(str(path))
    assert caught.value.__notes__ == [f"raised while loading the passes in {path}"]


def test_a_pass_of_the_same_name_takes_the_place_of_a_built_in_one() -> None:
    @rgc.graph_pass
    def hygiene(graph: rgc.Graph) -> rgc.Graph:
        return graph

    assert resolve(["default", hygiene])[0][0] is hygiene
