"""Are the reasons of a pass all found in its source, those of its helpers included?"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from rgc import Conv, Graph, GraphPass, Refusal, Rewrite, Value, graph_pass, passes, require, rewrite
from rgc.passbook import load_passes
from rgc.reasons import reasons_of


def _helper(conv: Conv) -> None:
    narrow = f"{conv.label} is narrow"
    require(conv.out_channels > 1, narrow)
    require(conv.groups == 1, f"{', '.join(map(str, conv.kernel))} in {conv.groups} groups of {conv.shape[0]:,}")


@rewrite(lambda x, conv: conv(x))
def refuses(x: Value, conv: Conv) -> Value:
    _helper(conv)
    if conv.transposed:
        raise Refusal("it is transposed")
    require(conv.bias is None, f"about {3 + 4}")
    return x


@graph_pass
def refuses_graphs(graph: Graph) -> Graph:
    """Never."""
    require(len(graph) < 3, "more than three values")
    return graph


def test_every_reason_is_found_with_the_names_of_what_it_tells() -> None:
    assert set(reasons_of(refuses)) == {
        "{conv} is narrow", "{str} in {groups} groups of {shape}", "it is transposed", "about {...}",
    }  # fmt: skip
    assert reasons_of(refuses_graphs) == ["more than three values"]


@pytest.mark.parametrize("each", [*passes.ALL, *passes.OPT_IN], ids=lambda each: each.name)
def test_nothing_that_a_built_in_pass_may_say_is_out_of_reach(each: Rewrite | GraphPass) -> None:
    """The longest literal part of every reason in the file is part of one that is reached from the patterns."""
    start = each.run if isinstance(each, GraphPass) else each.cases[0].build
    found = reasons_of(each)
    for node in ast.walk(ast.parse(Path(inspect.getfile(start)).read_text())):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ("require", "Refusal"):
            continue
        if isinstance(node.args[-1], ast.Constant | ast.JoinedStr):
            constants = [part.value for part in ast.walk(node.args[-1]) if isinstance(part, ast.Constant)]
            longest = max(map(str, constants), key=len)
            assert any(longest in reason for reason in found), longest


def test_a_pass_of_a_file_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from rgc import Conv, Value, require, rewrite\n\n\n"
        "@rewrite(lambda x, conv: conv(x))\n"
        "def mine(x: Value, conv: Conv) -> Value:\n"
        "    require(False, f'{conv.label} stays')\n"
        "    return x\n"
    )
    assert reasons_of(load_passes(str(tmp_path / "mine.py"))[0]) == ["{conv} stays"]


def test_a_pass_without_source_has_none() -> None:
    scope: dict[str, object] = {"__name__": "nowhere"}
    exec("from rgc import Conv, Value, require, rewrite\n", scope)
    exec("@rewrite(lambda x, conv: conv(x))\ndef typed(x: Value, conv: Conv) -> Value:\n    return x\n", scope)
    typed = scope["typed"]
    assert isinstance(typed, Rewrite) and reasons_of(typed) == []
