"""Does RepVGG have the published layout, and is each of its blocks one 3x3 convolution and a ReLU?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace
from torch.nn.functional import conv2d, relu

from rgc import models
from rgc.models import RepVGG, RepVGGBlock

Randomise = Callable[[Any], Any]
ConvolutionOf = Callable[..., tuple[torch.Tensor, torch.Tensor]]

# arXiv 2101.03697, ImageNet results: millions of parameters in training and once merged, rounded.
PUBLISHED = {
    "a0": (9.11, 8.31),
    "a1": (14.09, 12.79),
    "a2": (28.21, 25.50),
    "b0": (15.82, 14.34),
    "b1": (57.42, 51.83),
    "b1g2": (45.78, 41.36),
    "b1g4": (39.97, 36.13),
    "b2": (89.02, 80.32),
    "b2g4": (61.76, 55.78),
    "b3": (123.09, 110.96),
    "b3g4": (83.83, 75.63),
}
TIMM = ("a0", "a1", "a2", "b0", "b1", "b1g4", "b2", "b2g4", "b3", "b3g4")  # those that timm has too


def on_meta(variant: str) -> nn.Module:
    with torch.device("meta"):
        return models.create(f"repvgg_{variant}")


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def deployed_parameters(model: nn.Module) -> int:
    """Each block is its 3x3 kernel and a bias; the linear layer stays."""
    convolutions = [block.rbr_dense.conv for block in model.modules() if isinstance(block, RepVGGBlock)]
    linear = sum(parameters(module) for module in model.modules() if isinstance(module, nn.Linear))
    return linear + sum(conv.weight.numel() + conv.out_channels for conv in convolutions)


def small(**options: int) -> RepVGG:
    return RepVGG((2, 3, 2, 1), a=0.25, b=0.125, groups=2, num_classes=5, image_size=64, **options)


@pytest.mark.parametrize(("variant", "millions"), PUBLISHED.items())
def test_training_and_merged_form_have_the_published_number_of_parameters(
    variant: str, millions: tuple[float, float]
) -> None:
    model = on_meta(variant)
    assert (round(parameters(model) / 1e6, 2), round(deployed_parameters(model) / 1e6, 2)) == millions


@pytest.mark.parametrize("variant", ["b2g2", "b3g2"])
def test_two_groups_in_every_second_layer_lie_between_one_group_and_four(variant: str) -> None:
    one, two, four = (parameters(on_meta(variant[:2] + suffix)) for suffix in ("", "g2", "g4"))
    assert four < two < one


@pytest.mark.parametrize("variant", TIMM)
def test_timm_counts_the_same_parameters(variant: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs = timm.create_model(f"repvgg_{variant}")
    assert parameters(on_meta(variant)) == parameters(theirs)


def test_with_the_same_weights_timm_computes_the_same_scores(randomise: Randomise) -> None:
    timm = pytest.importorskip("timm")
    ours = randomise(models.repvgg_a0())
    theirs = timm.create_model("repvgg_a0").double().eval()
    renamed = {}
    for name, value in ours.state_dict().items():
        for old, new in (("rbr_dense", "conv_kxk"), ("rbr_1x1", "conv_1x1"), ("rbr_identity", "identity"),
                         ("linear", "head.fc"), ("stage0", "stem"), ("stage1", "stages.0"), ("stage2", "stages.1"),
                         ("stage3", "stages.2"), ("stage4", "stages.3")):  # fmt: skip
            name = name.replace(old, new)
        renamed[name] = value
    theirs.load_state_dict(renamed)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_only_a_block_that_keeps_the_shape_has_an_identity_branch() -> None:
    assert RepVGGBlock(4, 4).rbr_identity is not None
    assert RepVGGBlock(4, 4, stride=2).rbr_identity is None
    assert RepVGGBlock(4, 8).rbr_identity is None


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("out_channels", "stride"), [(4, 1), (6, 1), (4, 2)])
def test_a_block_is_one_3x3_convolution_and_a_relu(
    out_channels: int, stride: int, groups: int, randomise: Randomise, convolution_of: ConvolutionOf
) -> None:
    block = randomise(RepVGGBlock(4, out_channels, stride=stride, groups=groups))
    assert isinstance(block, RepVGGBlock)
    branches = [branch for branch in (block.rbr_dense, block.rbr_1x1, block.rbr_identity) if branch is not None]
    kernel, bias = convolution_of(lambda x: sum(branch(x) for branch in branches), 4, 3, stride)
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(block(x), relu(conv2d(x, kernel, bias, stride=stride, padding=1)))


@pytest.mark.parametrize("size", [64, 47])
def test_the_output_has_one_score_per_class(size: int) -> None:
    assert small()(torch.randn(2, 3, size, size)).shape == (2, 5)


def test_it_traces_under_torch_fx(randomise: Randomise) -> None:
    model = randomise(small())
    (x,) = model.example_inputs()
    assert torch.equal(symbolic_trace(model)(x), model(x))


def test_a_state_dict_goes_from_one_model_to_another() -> None:
    source, target = small().eval(), small().eval()
    target.load_state_dict(source.state_dict())
    (x,) = source.example_inputs()
    assert torch.equal(target(x), source(x))


def test_the_parameters_are_named_as_in_the_published_checkpoints() -> None:
    found = set(on_meta("a0").state_dict())
    for name in ("stage0.rbr_dense.conv.weight", "stage1.0.rbr_1x1.bn.running_var", "stage1.1.rbr_identity.weight",
                 "linear.bias"):  # fmt: skip
        assert name in found


def test_the_example_inputs_have_the_right_size() -> None:
    assert on_meta("a0").example_inputs()[0].shape == (1, 3, 224, 224)  # type: ignore[operator]  # nn.Module in general
    assert small(in_channels=1).example_inputs()[0].shape == (1, 1, 64, 64)
    assert RepVGGBlock(4, 8).example_inputs()[0].shape == (1, 4, 56, 56)
