"""Does SkipNet have a gate where a block keeps its shape, and is every choice of blocks a static network?"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rgc
from rgc import models
from rgc.errors import InputError
from rgc.nn import Skippable, choose
from rgc.testing import randomize


def test_seven_of_nine_blocks_can_be_left_out() -> None:
    model = models.skipnet20()
    gated = [isinstance(block, Skippable) for block in model.blocks]
    assert gated == [True, True, True, False, True, True, False, True, True]


@pytest.mark.parametrize("keep", [True, False, {"": True, "blocks.4": False}])
def test_a_choice_of_blocks_is_a_static_network(keep: bool | dict[str, bool]) -> None:
    model = randomize(models.skipnet20())
    x = torch.randn(2, 3, 16, 16)
    choose(model, keep=keep)
    static = rgc.specialize(model, keep=keep)
    assert torch.equal(static(x), model(x))
    left_out = {True: 0, False: 7}.get(keep, 1) if isinstance(keep, bool) else 1
    convolutions = sum(isinstance(m, nn.Conv2d) for m in static.modules())
    assert convolutions == 1 + 2 * (9 - left_out) + 2


def test_it_compiles_with_its_gates_and_without() -> None:
    model = randomize(models.SkipNet(1))
    x = torch.randn(5, 3, 32, 32)
    compiled = rgc.compile(model)
    assert not compiled.report.failures
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    static = rgc.specialize(model, keep=False)
    assert rgc.compile(static).report.ops_after["BatchNorm2d"] == 0
    with pytest.raises(InputError, match=r"blocks.0 \(Skippable\) leaves keep open"):
        rgc.specialize(model)
