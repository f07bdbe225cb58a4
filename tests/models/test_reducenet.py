"""Is ReduceNet the network it claims to be, and is it one affine map once its activations have decayed?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

from rgc.errors import InputError
from rgc.models import ReduceBlock, ReduceNet, reducenet, reducenet20, reducenet56
from rgc.nn import DecayedActivation, set_decay

Randomise = Callable[[Any], Any]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_reducenet20_has_exactly_140698_parameters() -> None:
    assert parameters(reducenet20()) == 140_698


@pytest.mark.parametrize("expansion", [1, 2, 4])
def test_the_expansion_widens_only_the_middle_of_each_block(expansion: int) -> None:
    block = ReduceBlock(16, 32, expansion=expansion, stride=2)
    middle = 32 * expansion
    assert parameters(block) == 16 * middle * 9 + 2 * middle + middle * 32 + 2 * 32


@pytest.mark.parametrize(("model", "activations"), [(reducenet20(), 10), (reducenet56(), 28)])
def test_there_is_one_decaying_activation_in_the_stem_and_one_in_each_block(model: ReduceNet, activations: int) -> None:
    assert sum(isinstance(module, DecayedActivation) for module in model.modules()) == activations


@pytest.mark.parametrize("size", [32, 17])
def test_the_output_has_one_score_per_class(size: int) -> None:
    assert reducenet(8, num_classes=7)(torch.randn(2, 3, size, size)).shape == (2, 7)


def test_a_block_with_stride_two_has_no_shortcut() -> None:
    for block, shortcut in (
        (ReduceBlock(4, 4), True),
        (ReduceBlock(4, 4, stride=2), False),
        (ReduceBlock(4, 8), False),
    ):
        block.eval()
        nn.init.zeros_(block.bn2.weight)
        x = torch.randn(1, 4, 6, 6)
        y = block(x)
        assert torch.equal(y, x) if shortcut else not y.any()


def test_it_is_affine_exactly_when_every_decay_is_one(randomise: Randomise) -> None:
    model = randomise(reducenet(8, expansion=2))
    x, y = torch.randn(2, 2, 3, 16, 16, dtype=torch.float64)
    midpoint = (model(x) + model(y)) / 2
    assert not torch.allclose(model((x + y) / 2), midpoint)
    set_decay(model, 1.0)
    torch.testing.assert_close(model((x + y) / 2), (model(x) + model(y)) / 2, rtol=1e-10, atol=1e-10)


def test_the_decays_go_to_the_stem_and_then_to_the_blocks_in_order() -> None:
    decays = [0.0, 0.125, 0.25, 0.5, 0.625, 0.75, 1.0]
    model = reducenet(14, decay=decays)
    found = [module.decay.item() for module in model.modules() if isinstance(module, DecayedActivation)]
    assert found == decays


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_it_traces_under_torch_fx(decay: float, randomise: Randomise) -> None:
    model = randomise(reducenet20(decay=decay))
    (x,) = model.example_inputs()
    assert torch.equal(symbolic_trace(model)(x), model(x))


def test_a_state_dict_carries_weights_and_decays() -> None:
    source, target = reducenet(8, decay=0.5).eval(), reducenet(8).eval()
    target.load_state_dict(source.state_dict())
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(target(x), source(x))


def test_the_example_input_is_what_the_model_was_built_for() -> None:
    (x,) = reducenet(8, in_channels=1, image_size=28).example_inputs()
    assert x.shape == (1, 1, 28, 28)
    assert ReduceBlock(4, 8).double().example_inputs()[0].dtype == torch.float64


@pytest.mark.parametrize("depth", [2, 7, 18, 21])
def test_a_depth_that_is_not_six_n_plus_two_is_refused(depth: int) -> None:
    with pytest.raises(InputError, match=rf"depth must be 6n \+ 2 \(8, 14, 20, ...\), got {depth}"):
        reducenet(depth)


def test_an_expansion_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="expansion must be at least 1, got 0"):
        reducenet20(expansion=0)


def test_the_wrong_number_of_decays_is_refused() -> None:
    with pytest.raises(InputError, match=r"one number or 4 \(the stem's, then one per block\), got 2"):
        reducenet(8, decay=[0.0, 1.0])
