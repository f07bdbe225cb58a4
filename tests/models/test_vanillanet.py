"""Does VanillaNet have the published layout, and do its pairs of layers become mergeable at decay 1?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

from rgc import models
from rgc.errors import InputError
from rgc.models import VanillaBlock, VanillaNet
from rgc.nn import DecayedLeakyReLU, SeriesActivation, set_decay

Randomise = Callable[[Any], Any]

# arXiv 2305.12972, ImageNet results: millions of parameters of the merged network.
DEPLOYED = {5: 15.5, 6: 32.5, 7: 32.8, 8: 37.1, 9: 41.4, 10: 45.7, 11: 50.0, 12: 54.3, 13: 58.6}


def small(**options: float) -> VanillaNet:
    return VanillaNet((8, 8, 16, 24), (1, 2, 2), num_classes=5, order=1, image_size=64, **options)  # type: ignore[arg-type]


def merged_convolution(first: nn.Sequential, second: nn.Sequential) -> int:
    """Parameters of the one convolution that two are when the second is 1x1: the first's kernel, the second's width."""
    inner, outer = (next(m for m in part if isinstance(m, nn.Conv2d)) for part in (first, second))
    assert outer.kernel_size == (1, 1)
    return outer.out_channels * inner.weight[0].numel() + outer.out_channels


def deployed_parameters(model: VanillaNet) -> int:
    convolutions = merged_convolution(model.stem1, model.stem2) + merged_convolution(model.cls1, model.cls2)
    for block in model.stages:
        assert isinstance(block, VanillaBlock)
        convolutions += merged_convolution(block.conv1, block.conv2)
    series = [module for module in model.modules() if isinstance(module, SeriesActivation)]
    return convolutions + sum(module.weight.numel() + module.channels for module in series)


@pytest.mark.parametrize(("depth", "millions"), DEPLOYED.items())
def test_the_merged_network_has_the_published_number_of_parameters(depth: int, millions: float) -> None:
    with torch.device("meta"):
        model = models.create(f"vanillanet{depth}")
    assert isinstance(model, VanillaNet)
    assert f"{deployed_parameters(model) / 1e6:.1f}" == f"{millions:.1f}"


@pytest.mark.parametrize("depth", DEPLOYED)
def test_the_depth_counts_the_stem_the_blocks_and_the_head(depth: int) -> None:
    with torch.device("meta"):
        model = models.create(f"vanillanet{depth}")
    assert isinstance(model, VanillaNet)
    assert len(model.stages) + 2 == depth


def test_vanillanet5_maps_an_image_to_a_thousand_scores() -> None:
    model = models.vanillanet5().eval()
    with torch.no_grad():
        assert model(*model.example_inputs()).shape == (1, 1000)


@pytest.mark.parametrize("size", [64, 47])
def test_the_output_has_one_score_per_class(size: int) -> None:
    assert small()(torch.randn(2, 3, size, size)).shape == (2, 5)


def test_every_activation_that_must_go_decays_together(randomise: Randomise) -> None:
    model = randomise(small())
    assert sum(isinstance(module, DecayedLeakyReLU) for module in model.modules()) == len(model.stages) + 2
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    block = model.stages[0]
    set_decay(model, 1.0)
    torch.testing.assert_close(block.conv2(block.activation(block.conv1(x))), block.conv2(block.conv1(x)))


def test_at_decay_one_a_stem_is_one_convolution(randomise: Randomise) -> None:
    model = randomise(small(decay=1.0))
    stem = nn.Sequential(model.stem1, model.stem_activation, model.stem2[:2])
    x, y = torch.randn(2, 1, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(stem((x + y) / 2), (stem(x) + stem(y)) / 2)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_it_traces_under_torch_fx(decay: float, randomise: Randomise) -> None:
    model = randomise(small(decay=decay))
    (x,) = model.example_inputs()
    assert torch.equal(symbolic_trace(model)(x), model(x))


def test_a_state_dict_carries_weights_and_decays() -> None:
    source, target = small(decay=0.5).eval(), small().eval()
    target.load_state_dict(source.state_dict())
    (x,) = source.example_inputs()
    assert torch.equal(target(x), source(x))


def test_convolutions_begin_without_a_bias_and_batch_norms_with_the_published_epsilon() -> None:
    for module in small().modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is not None and not module.bias.any()
        if isinstance(module, nn.BatchNorm2d):
            assert module.eps == 1e-6


def test_the_parameters_are_named_as_in_the_published_checkpoints() -> None:
    found = set(small().state_dict())
    names = (
        "stem1.0.weight stem1.1.running_mean stem2.1.bias stem2.2.weight stem2.2.bn.weight stages.0.conv1.0.bias "
        "stages.1.conv2.1.bias stages.2.act.weight stages.2.act.bn.bias cls1.2.weight cls1.3.weight cls2.0.bias"
    )
    assert set(names.split()) < found


def test_the_example_inputs_have_the_right_size() -> None:
    assert small().example_inputs()[0].shape == (1, 3, 64, 64)
    assert VanillaBlock(4, 8).example_inputs()[0].shape == (1, 4, 56, 56)


@pytest.mark.parametrize(("dims", "strides"), [((8, 16), (2, 2)), ((8,), ())])
def test_dims_that_do_not_fit_the_strides_are_refused(dims: tuple[int, ...], strides: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=f"got {len(dims)} dims and {len(strides)} strides"):
        VanillaNet(dims, strides)
