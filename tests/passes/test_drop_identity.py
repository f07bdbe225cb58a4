"""Is what returns its input, or adds nothing to it, gone, and only that?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rgc import Identity
from rgc.passes.drop_identity import is_one, is_zero


@pytest.mark.parametrize("layer", [nn.Identity(), nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout(), nn.Dropout(0.0)])
def test_layers_that_return_their_input_are_dropped(layer: nn.Module, compiled: Any) -> None:
    report = compiled(nn.Sequential(nn.ReLU(), layer, nn.Tanh()), 2, 3, 4, 4, passes="drop_identity")
    assert [firing.where for firing in report.rewrites] == ["1"] and report.rewrites[0].evidence == "bitwise"


def test_factors_of_one_and_sums_with_nothing_are_dropped(calls: Any, compiled: Any) -> None:
    model = calls(lambda x: torch.relu(1 * x + 0) + 0 * torch.tanh(x))
    assert compiled(model, 2, 3, 4, 4, passes="drop_identity").ops_after == {"ReLU": 1}


def test_a_closed_gate_is_dropped_on_either_side_and_not_an_open_one(calls: Any, compiled: Any) -> None:
    for gate, left in ((0.0, {"ReLU"}), (1e-9, {"ReLU", "Tanh", "mul", "add"})):
        first = calls(lambda x, gate=gate: gate * torch.tanh(x) + torch.relu(x))
        assert set(compiled(first, 2, 3, 4, 4, passes="drop_identity").ops_after) == left


def test_a_branch_that_gives_the_sum_its_size_is_kept(calls: Any, compiled: Any, reasons: Any) -> None:
    model = calls(lambda x: x.mean((2, 3), keepdim=True).relu() + 0.0 * x)
    report = compiled(model, 2, 3, 4, 4, passes="drop_identity")
    assert "the sum broadcasts the branch that is kept" in reasons(report, "drop_identity")
    report = compiled(model, 2, 3, 1, 1, passes="drop_identity")
    assert "at another size the sum may broadcast" in reasons(report, "drop_identity")


def test_the_input_itself_may_be_what_is_returned(compiled: Any) -> None:
    assert compiled(nn.Sequential(nn.Identity()), 2, 3).ops_after == {}


def test_one_and_zero_are_exact() -> None:
    from rgc import Scale

    one, zero = torch.ones(1), torch.zeros(1)
    assert is_one(Identity()) and is_one(Scale(one, zero)) and is_zero(Scale(zero, zero))
    assert not is_one(Scale(one, one)) and not is_one(Scale(one * (1 + 2**-23), zero)) and not is_zero(Scale(zero, one))
