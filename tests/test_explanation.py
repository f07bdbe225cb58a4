"""Does an explanation read well for people, and whole for machines?"""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console

from rgc.algebra import Conv
from rgc.cost import CPU
from rgc.explanation import Cost, Explanation, Gain, Gap, Place, Remedy
from rgc.ir import Input, TensorType, Value
from rgc.report import Firing

GAIN = Gain(Cost(3, 2_621_440, 2_592, 0.1434), Cost(1, 2_359_296, 2_320, 0.1021))
REASON = "border ring: conv 3x3 16->16 reads a ring 1 wide around the output of conv 3x3 16->16 as zeros"
REMEDY = Remedy(("decay act to 1 (now 0)", "fixed size: --passes all"), "conv 5x5 16->16", GAIN, False, True)


def explanation(*gaps: Gap, places: tuple[Place, ...] = (), notes: tuple[str, ...] = ()) -> Explanation:
    return Explanation("a[0]", "Model", "default", "latency", "cpu", places, gaps, notes)


def printed(shown: Explanation, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(shown)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def test_the_cost_of_operators_is_that_of_the_cost_model_and_shared_parameters_count_once() -> None:
    x = Value(Input("x"), (), TensorType((1, 4, 8, 8), torch.float32))
    conv = Conv(torch.zeros(4, 4, 1, 1))
    first = conv(x)
    second = conv(first)
    cost = Cost.of([x, first, second], CPU)
    assert (cost.operators, cost.macs, cost.parameters) == (2, 2 * 16 * 64, 16)
    assert cost.milliseconds == pytest.approx(1e3 * (CPU.seconds(first) + CPU.seconds(second)))


def test_a_gain_is_one_line_with_what_did_not_change_said_once() -> None:
    assert str(GAIN) == "0.143 -> 0.102 ms, 3 -> 1 operators, 2.62 M -> 2.36 M MACs, 2.59 k -> 2.32 k params"
    same = Gain(Cost(1, 12, 3_000_000_000, 2.0), Cost(1, 12, 3_000_000_000, 1.0))
    assert str(same) == "2 -> 1 ms, 1 operators, 12 MACs, 3 G params"


def test_a_merge_says_what_was_by_which_rewrites_and_what_it_gained() -> None:
    steps = (
        Firing("fold_batchnorm", "a.bn", "exact", 1e-15, (), ("a.bn",)),
        Firing("fold_batchnorm", "b.bn + b.conv", "exact", 3e-15, (), ("b.bn",)),
        Firing("drop_identity", "c", "bitwise", 0.0, (), ("c",)),
    )
    place = Place(("a[0]", "a.bn"), ("conv", "bn", "bn"), "merged", ("conv 3x3 1->1",), steps, GAIN)
    text = printed(explanation(places=(place,)))
    assert text.splitlines() == [
        "a[0] in Model",
        "passes default, objective latency, times estimated for cpu",
        "",
        "a[0] + a.bn: now conv 3x3 1->1",
        "      was  conv, 2 x bn",
        "       by  fold_batchnorm at a.bn, b.bn: exact, error 3.0e-15",
        "     then  drop_identity at c: bitwise",
        f"   gained  {GAIN}",
        "",
        "no other linear operator and no sum comes next to it",
    ]


def test_a_merge_of_many_layers_is_no_wall_of_text() -> None:
    names = tuple(f"layer{index}" for index in range(60))
    steps = tuple(Firing(f"pass{index % 2}", name, "exact", 0.0) for index, name in enumerate(names))
    place = Place(names, tuple(f"conv {index}" for index in range(20)), "merged", ("linear",), steps, GAIN)
    text = printed(explanation(places=(place,)))
    assert "layer5 + 54 more: now linear" in text and "conv 5, 14 more" in text
    assert "by  30 x pass0: exact\n     then  30 x pass1: exact\n" in text and len(text.splitlines()) == 10


def test_what_was_removed_or_left_says_so() -> None:
    dead = Place(("dead",), ("conv",), "removed")
    assert "dead: removed (conv)\n  because  nothing reads its result any more" in printed(explanation(places=(dead,)))
    left = Place(("conv",), ("conv 1x1",), "unchanged", ("conv 1x1",))
    assert "conv: unchanged (conv 1x1)" in printed(explanation(places=(left,)))


def test_a_gap_says_why_what_to_change_what_that_gives_and_what_it_gains() -> None:
    free = Remedy(("--objective depth",), "conv 1x1 1->1", GAIN, True, False)
    gap = Gap(("conv1", "conv2"), "chain", ("relu is not linear", "ring"), (REMEDY, free))
    assert printed(explanation(gap)).splitlines()[3:] == [
        "conv1 -> conv2: not one operator",
        "  because  relu is not linear",
        "      and  ring",
        "   change  decay act to 1 (now 0)",
        "      and  fixed size: --passes all",
        "    gives  conv 5x5 16->16; another function: train it further",
        f"    gains  {GAIN}",
        "       or  --objective depth",
        "    gives  conv 1x1 1->1",
        f"    costs  {GAIN}",
        "      but  does not pay by this estimate",
    ]


def test_a_merge_that_would_not_pay_even_after_the_change_names_the_objective_that_makes_it() -> None:
    dear = Remedy(("bias=False for conv1",), "conv", GAIN, False, False)
    text = printed(explanation(Gap(("a", "b"), "sum", ("why",), (dear,))))
    assert "a + b: not one operator" in text
    assert "but  does not pay by this estimate: only --objective depth merges it" in text
    planned = dataclasses.replace(dear, note="planned otherwise: it pays more to merge with c")
    assert "but  planned otherwise: it pays more to merge with c" in printed(
        explanation(Gap(("a", "b"), "chain", ("why",), (planned,)))
    )


def test_where_nothing_helps_it_says_so_but_not_of_layers_that_are_no_neighbours() -> None:
    nothing = "change  nothing was found that would make them one operator"
    assert nothing in printed(explanation(Gap(("a", "b"), "chain", ("why",))))
    apart = printed(explanation(Gap(("a", "b"), "apart", ("why",))))
    assert nothing not in apart and "a, b: not one operator" in apart


def test_long_reasons_are_said_once() -> None:
    text = printed(explanation(Gap(("a", "b"), "chain", (REASON,)), Gap(("b", "c"), "chain", (REASON,))))
    assert text.count("border ring") == 1 and "because  the same as above" in text
    assert printed(explanation(*[Gap(("a", "b"), "chain", ("why",))] * 2)).count("because  why") == 2


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    gap = Gap(("conv1", "conv2"), "chain", (REASON,), (REMEDY,))
    assert max(map(len, printed(explanation(gap, notes=("a note",)), width).splitlines())) <= width


def test_brackets_are_not_markup_and_notes_come_last() -> None:
    text = printed(explanation(Gap(("blocks[0]", "b"), "chain", ("pads [1, 1]",)), notes=("torch.fx cannot [x]",)))
    assert "blocks[0] -> b" in text and "pads [1, 1]" in text and text.endswith("note: torch.fx cannot [x]")


def test_json_holds_all_of_it() -> None:
    place = Place(("a",), ("conv",), "merged", ("conv",), (Firing("fold", "a", "exact", 1e-15, (), ("a",)),), GAIN)
    found = json.loads(explanation(Gap(("a", "b"), "chain", ("why",), (REMEDY,)), places=(place,)).to_json())
    assert found["where"] == "a[0]" and found["places"][0]["steps"][0]["sources"] == ["a"]
    assert found["gaps"][0]["remedies"][0]["gain"]["after"]["macs"] == 2_359_296
    assert found["gaps"][0]["remedies"][0]["keeps_function"] is False
