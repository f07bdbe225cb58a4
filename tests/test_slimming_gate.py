"""Does the gate attend and score as written, and do its targets tell easy samples from hard ones?"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rgc.errors import InputError
from rgc.nn import GatedWidth, SlimmingGate, gate_targets


def test_both_heads_see_the_same_code() -> None:
    gate = SlimmingGate(6, 3, hidden=5)
    x = torch.randn(4, 6, 5, 3)
    reduce, expand = gate.attention.reduce, gate.attention.expand
    code = torch.relu(x.mean((2, 3)) @ reduce.weight.T + reduce.bias)
    weights = torch.tanh(code @ expand.weight.T + expand.bias)
    torch.testing.assert_close(gate(x), x * (1 + weights[:, :, None, None]))
    torch.testing.assert_close(gate.scores(x), code @ gate.slimming.weight.T + gate.slimming.bias)


def test_targets_are_the_smallest_width_that_is_worth_it() -> None:
    labels = torch.tensor([1, 1, 1, 1])
    right, wrong = torch.tensor([0.0, 2.0, 1.0]), torch.tensor([2.0, 0.0, 1.0])
    smallest = torch.stack([right, right, wrong, wrong])
    largest = torch.stack([right, wrong, right, wrong])
    assert gate_targets(smallest, largest, labels, 4).tolist() == [0, 0, 3, 0]
    assert gate_targets(smallest, largest, labels, 4, hard="try best").tolist() == [0, 0, 3, 3]
    with pytest.raises(InputError, match="'give up' or 'try best', got 'skip'"):
        gate_targets(smallest, largest, labels, 4, hard="skip")  # type: ignore[arg-type]


def test_a_gate_has_a_score_for_each_width() -> None:
    with pytest.raises(InputError, match="a gate of 3 scores picks one of as many widths, not one of 0.5, 1.0"):
        GatedWidth(SlimmingGate(4, 3), nn.Identity(), widths=(0.5, 1.0))
