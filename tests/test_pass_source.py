"""Is it seen in the source that a guard has no reason, that a name is private, or that another pass has it?"""

from __future__ import annotations

from rgc import Conv, Graph, Refusal, Value, graph_pass, passes, require, rewrite
from rgc.pass_source import name_clash, remarks


def test_a_guard_without_a_reason_and_a_private_name_are_seen_with_their_lines() -> None:
    @rewrite(lambda x, conv: conv(x))
    def careless(x: Value, conv: Conv) -> Value:
        """Nothing."""
        require(conv.groups == 1, reason=" ")
        if conv.out_channels == 3:
            raise Refusal("")
        require(bool(x._inputs), "has no inputs")
        return x

    problems, notes = remarks(careless)
    line = careless.cases[0].build.__code__.co_firstlineno
    assert [problem for problem, _ in problems] == [
        f"the guard in line {line + 3} of careless gives no reason: `require(conv.groups == 1, reason=' ')`",
        f"the guard in line {line + 5} of careless gives no reason: `Refusal('')`",
    ]
    assert notes == [f"line {line + 6} reads `x._inputs`, which is private and may change without notice"]


def test_built_in_passes_are_clean() -> None:
    for each in (*passes.ALL, *passes.OPT_IN):
        assert remarks(each) == ([], []) and not name_clash(each)


def test_a_graph_pass_of_a_taken_name_clashes() -> None:
    @graph_pass
    def collapse(graph: Graph) -> Graph:
        """Nothing."""
        return graph

    assert "the name of a built-in pass" in name_clash(collapse)
    assert remarks(collapse)[0][0][1] == "give the function another name"
