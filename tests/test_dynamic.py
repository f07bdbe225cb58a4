"""Does choosing change all modules that have the choice, or, where something is wrong, none?"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rgc.errors import InputError
from rgc.nn import SlimmableLinear, choose

WIDTHS = (0.5, 1.0)


def network() -> nn.Sequential:
    last = SlimmableLinear(8, 3, widths=WIDTHS, slim_out=False)
    return nn.Sequential(SlimmableLinear(4, 8, widths=WIDTHS, slim_in=False), nn.ReLU(), last)


def widths(model: nn.Sequential) -> list[float]:
    return [layer.width for layer in model if isinstance(layer, SlimmableLinear)]


def test_a_choice_reaches_every_module_that_has_it() -> None:
    model = network()
    choose(model, width=0.5)
    assert widths(model) == [0.5, 0.5]
    assert model(torch.randn(2, 4)).shape == (2, 3)
    choose(model, width={"": 1.0, "2": 0.5})
    assert widths(model) == [1.0, 0.5]
    choose(model, width={"0": 0.5})
    assert widths(model) == [0.5, 0.5]


def test_a_wrong_choice_changes_nothing() -> None:
    model = network()
    model[2] = SlimmableLinear(8, 3, widths=(0.75, 1.0), slim_out=False)
    with pytest.raises(InputError, match=r"choose: width of 2 \(SlimmableLinear\): 0.5 is not one of 0.75, 1.0"):
        choose(model, width=0.5)
    assert widths(model) == [1.0, 1.0]
    with pytest.raises(InputError, match="nothing in Sequential decides width by its input"):
        choose(model, width=None)
    with pytest.raises(InputError, match="no choice 'depth'; did you mean width"):
        choose(model, depth=2)
