"""Does rgc do the job it is made for? The layer counts of the published deploy forms, on the networks themselves."""

from __future__ import annotations

import copy
import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rgc
from rgc import CompiledModule, models
from rgc.models.acnet import ACBlock
from rgc.models.dbb import DiverseBranchBlock
from rgc.models.repvgg import RepVGGBlock
from rgc.nn import set_decay
from rgc.testing import randomize


def layers(compiled: CompiledModule) -> Counter[str]:
    """What the module itself holds and calls: its leaf modules and its functions, by name."""
    found = Counter(type(module).__name__ for module in compiled.modules() if not list(module.children()))
    functions = (node.target for node in compiled.graph.nodes if node.op == "call_function")
    return found + Counter(getattr(function, "__name__", "") for function in functions)


def relative_error(compiled: nn.Module, model: nn.Module, x: Tensor) -> float:
    """The largest difference in float64, relative to the largest output."""
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        found = copy.deepcopy(compiled).double()(x.double())
    return float((expected - found).abs().max() / expected.abs().max())


def reasons(compiled: CompiledModule, name: str) -> list[str]:
    return [refused.reason for refused in compiled.report.refusals if refused.rewrite == name]


# --- ReduceNet -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def linear_reducenet() -> nn.Module:
    return randomize(models.create("reducenet20", decay=1.0)).double()


def test_a_linear_reducenet_20_is_ten_convolutions_and_a_pooling(linear_reducenet: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    compiled = rgc.compile(linear_reducenet, x)
    assert layers(compiled) == {"Conv2d": 10, "AdaptiveAvgPool2d": 1, "flatten": 1}
    assert not compiled.report.fixed_size
    assert relative_error(compiled, linear_reducenet, x) <= 1e-12
    assert relative_error(compiled, linear_reducenet, torch.randn(1, 3, 37, 45, dtype=torch.float64)) <= 1e-12


def test_a_linear_reducenet_20_at_one_size_is_one_linear_layer(linear_reducenet: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    compiled = rgc.compile(linear_reducenet, x, passes="all")
    (linear,) = (module for module in compiled.modules() if not list(module.children()))
    assert isinstance(linear, nn.Linear) and (linear.in_features, linear.out_features) == (3072, 10)
    assert compiled.report.fixed_size
    assert relative_error(compiled, linear_reducenet, torch.randn(5, 3, 32, 32, dtype=torch.float64)) <= 1e-12
    with pytest.raises(AssertionError, match="holds for inputs of size 3x32x32"):
        compiled(torch.randn(1, 3, 31, 32, dtype=torch.float64))


def test_a_reducenet_whose_decay_is_999_thousandths_keeps_every_activation_and_says_why() -> None:
    model = randomize(models.create("reducenet20", decay=0.999))
    compiled = rgc.compile(model, torch.randn(2, 3, 32, 32), passes="all")
    assert compiled.report.ops_after["ReLU"] == 10
    refusals = reasons(compiled, "remove_linear_activation")
    assert len(refusals) == 10 and all("decay lambda = 0.999, not 1" in reason for reason in refusals)
    assert not any(firing.rewrite == "remove_linear_activation" for firing in compiled.report.rewrites)


# --- the other families ----------------------------------------------------------------------------------------------


def test_repvgg_a0_is_22_convolutions_and_a_linear_layer() -> None:
    model = randomize(models.create("repvgg_a0"))
    x = torch.randn(1, 3, 64, 64)
    compiled = rgc.compile(model, x)
    found = layers(compiled)
    assert found["Conv2d"] == 22 and found["Linear"] == 1
    assert not found["BatchNorm2d"] and not found["add"]
    assert relative_error(compiled, model, x) <= 1e-5  # the compiled weights were rounded to float32 once


@pytest.mark.parametrize(("narrower", "image"), [(16, 64), (1, 32)])
def test_a_linear_vanillanet_5_is_nine_convolutions(narrower: int, image: int) -> None:
    widths = [width // narrower for width in (512, 1024, 2048, 4096)]
    model = randomize(models.VanillaNet(widths, (2, 2, 2), image_size=image))
    set_decay(model, 1.0)
    x = torch.randn(1, 3, image, image)
    compiled = rgc.compile(model, x)
    assert layers(compiled)["Conv2d"] == 9
    assert not layers(compiled)["BatchNorm2d"] and not layers(compiled)["LeakyReLU"]
    assert relative_error(compiled, model, x) <= 1e-5


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("block", [DiverseBranchBlock, ACBlock])
def test_a_block_of_parallel_branches_is_one_convolution(block: Any, groups: int, stride: int) -> None:
    model = randomize(block(8, 8, stride=stride, groups=groups)).double()
    x = torch.randn(2, 8, 9, 12, dtype=torch.float64)
    compiled = rgc.compile(model, x, objective="depth")
    assert layers(compiled) == {"Conv2d": 1}
    assert relative_error(compiled, model, x) <= 1e-12


@pytest.mark.parametrize("stride", [1, 2])
def test_a_repvgg_block_is_one_convolution_and_its_activation(stride: int) -> None:
    model = randomize(RepVGGBlock(8, 8, stride=stride)).double()
    compiled = rgc.compile(model, torch.randn(2, 8, 9, 12, dtype=torch.float64))
    assert {name.lower() for name in layers(compiled)} == {"conv2d", "relu"}


def test_resnet_18_of_torchvision_has_no_batch_norm_left() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = randomize(torchvision.models.resnet18())
    x = torch.randn(1, 3, 64, 64)
    compiled = rgc.compile(model, x)
    assert compiled.report.ops_after == Counter(
        {"Conv2d": 20, "ReLU": 17, "add": 8, "MaxPool2d": 1, "AdaptiveAvgPool2d": 1, "Linear": 1}
    )
    assert relative_error(compiled, model, x) <= 1e-5


# --- refusals by name ------------------------------------------------------------------------------------------------


def test_a_padded_convolution_after_a_padded_one_is_refused_for_its_border_ring() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)))
    for passes in ("default", "all,-collapse"):
        compiled = rgc.compile(model, torch.randn(2, 4, 9, 9), passes=passes, objective="depth")
        assert compiled.report.ops_after["Conv2d"] == 2
        assert any("border ring" in reason for reason in reasons(compiled, "merge_stage"))


def test_a_biased_pointwise_convolution_before_a_padded_one_takes_ones_or_at_a_fixed_size_a_bias_map() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 16, 1), nn.Conv2d(16, 4, 3, padding=1))).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    free = rgc.compile(model, x, objective="depth")
    assert layers(free)["Conv2d"] == 1 and free.report.ops_after == {"pad": 1, "Conv2d": 1}
    assert not free.report.fixed_size and relative_error(free, model, x) <= 1e-12
    fixed = rgc.compile(model, x, passes="all,-collapse", objective="depth")
    assert layers(fixed)["Conv2d"] == 1 and fixed.report.ops_after == {"Conv2d": 1, "add": 1}
    assert [firing.evidence for firing in fixed.report.rewrites] == ["exact+corrected"]
    assert relative_error(fixed, model, x) <= 1e-12


# --- trained networks ------------------------------------------------------------------------------------------------


def benchmark() -> Any:
    """The module that builds the networks and reads the images."""
    path = Path(__file__).parents[1] / "benchmarks" / "cifar_predictions.py"
    spec = importlib.util.spec_from_file_location("cifar_predictions", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def images() -> Tensor:
    pytest.importorskip("PIL.Image")
    folder = benchmark().data_folder()
    if not (folder / "resnet56_cifar10.th").is_file():
        pytest.skip(f"{folder} does not hold the trained networks; set RGC_DATA to the folder that does")
    found: Tensor = benchmark().images_of_test(folder, 256)[0]
    return found


@pytest.mark.parametrize("depth", [20, 56])
def test_a_trained_resnet_predicts_the_same_class_for_every_image(depth: int, images: Tensor) -> None:
    model = benchmark().trained(depth, benchmark().data_folder())
    compiled = rgc.compile(model, images[:2])
    assert not compiled.report.ops_after["BatchNorm2d"] and compiled.report.ops_after["Conv2d"] == depth - 1
    with torch.no_grad():
        expected, found = model(images), compiled(images)
    assert torch.equal(expected.argmax(1), found.argmax(1))
    assert relative_error(compiled, model, images[:8]) <= 1e-5
