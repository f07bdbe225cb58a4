"""Is the culprit the firing with which the difference appears, whatever the count, and told in full?"""

from __future__ import annotations

import pytest
from rich.console import Console

from rgc.attribution import Attribution, first_failing
from rgc.report import Failure, Firing


@pytest.mark.parametrize("count", [1, 2, 7, 64, 100])
def test_the_first_failing_number_is_found_in_few_steps(count: int) -> None:
    for first in range(1, count + 1):
        asked: list[int] = []

        def fails(number: int, first: int = first, asked: list[int] = asked) -> bool:
            asked.append(number)
            return number >= first

        assert first_failing(count, fails) == first
        assert len(asked) <= 2 + count.bit_length(), asked


def test_where_it_comes_and_goes_a_number_with_which_it_comes_is_found() -> None:
    failing = {3, 4, 8, 9, 10}
    found = first_failing(10, failing.__contains__)
    assert found in failing and found - 1 not in failing


def test_what_fails_without_any_firing_has_no_culprit_among_them() -> None:
    assert first_failing(5, lambda number: True) == 0
    assert first_failing(0, lambda number: pytest.fail("nothing to ask")) == 0


def text(found: Attribution) -> str:
    console = Console(width=120, color_system=None)
    with console.capture() as captured:
        console.print(found)
    return captured.get()


def test_equality_is_one_line_and_names_what_drawn_inputs_have_undone() -> None:
    assert str(Attribution(True, 3, "torch.fx", 2)) == "equal on all 3 samples"
    assert str(Attribution(True, 1, "torch.fx", 2)) == "equal on the one sample"
    undone = (Failure("lose", "layer1", "the model differs"),)
    assert text(Attribution(True, 3, "torch.fx", 2, undone=undone)).splitlines() == [
        "equal on all 3 samples",
        "bug: lose at layer1, undone: the model differs",
    ]


def test_a_culprit_is_told_with_its_layers_and_what_it_did_to_the_sample() -> None:
    firing = Firing("lose", "layer1.act", "exact", 0.0, ("lost",), ("layer1.conv", "layer1.act"))
    found = Attribution(
        False, 3, "torch.fx", 7, firing, 4, "sample 2 of the data", "float64", 1e-16, 0.5, 1e-10, "differs"
    )
    assert found.culprit == "lose at layer1.act"
    shown = text(found)
    for part in (
        "lose at layer1.act: the compiled model differs",
        "firing 4 of 7",
        "layer1.conv, layer1.act",
        "sample 2 of the data",
        "1.0e-16 of the output's scale",
        "5.0e-01; rounding explains 1.0e-10",
    ):
        assert part in shown


def test_without_a_guilty_firing_it_is_the_trace_and_there_is_no_before() -> None:
    found = Attribution(False, 3, "torch.export", 7, sample="sample 0 of the data", after=0.5, reason="differs")
    assert found.culprit == "the trace itself (torch.export)"
    assert "none is guilty: the model differs before the first of 7" in text(found) and "before  " not in text(found)
