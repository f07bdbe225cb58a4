"""Is a diverse branch block one convolution, border included, and does its padding do what the paper's padding does?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace
from torch.nn.functional import conv2d, pad

from rgc.errors import InputError
from rgc.models import DiverseBranchBlock, dbb_resnet18
from rgc.models.dbb import IdentityConv1x1

Randomise = Callable[[Any], Any]
ConvolutionOf = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("out_channels", "kernel_size", "groups"), [(6, 3, 1), (6, 3, 2), (4, 3, 4), (8, 3, 4), (6, 5, 1), (6, 1, 1)]
)
def test_a_block_is_one_convolution(
    out_channels: int, kernel_size: int, groups: int, stride: int, randomise: Randomise, convolution_of: ConvolutionOf
) -> None:
    block = randomise(DiverseBranchBlock(4, out_channels, kernel_size=kernel_size, stride=stride, groups=groups))
    kernel, bias = convolution_of(block, 4, kernel_size, stride)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(block(x), conv2d(x, kernel, bias, stride=stride, padding=kernel_size // 2))


@pytest.mark.parametrize("branch", ["dbb_1x1_kxk", "dbb_avg"])
def test_padding_the_1x1_is_the_padding_of_the_paper_with_the_batch_norms_image_of_zero(
    branch: str, randomise: Randomise
) -> None:
    conv, bn, *_ = getattr(randomise(DiverseBranchBlock(3, 3)), branch)
    x = torch.randn(1, 3, 5, 6, dtype=torch.float64)
    padded = bn(conv(x))
    image_of_zero = bn.bias - bn.running_mean * bn.weight / torch.sqrt(bn.running_var + bn.eps)
    inside = padded[:, :, 1:-1, 1:-1]
    shifted = inside - image_of_zero.reshape(1, -1, 1, 1)
    torch.testing.assert_close(padded, pad(shifted, (1, 1, 1, 1)) + image_of_zero.reshape(1, -1, 1, 1))


@pytest.mark.parametrize(
    ("block", "found"),
    [
        (DiverseBranchBlock(4, 8), (True, 4)),
        (DiverseBranchBlock(4, 4, groups=4), (False, 2)),
        (DiverseBranchBlock(4, 8, kernel_size=1), (False, None)),
    ],
    ids=["dense", "depthwise", "1x1"],
)
def test_only_the_branches_that_add_something_are_there(
    block: DiverseBranchBlock, found: tuple[bool, int | None]
) -> None:
    layers_of_average = None if block.dbb_avg is None else len(block.dbb_avg)
    assert (block.dbb_1x1 is not None, layers_of_average) == found


@pytest.mark.parametrize(
    ("block", "internal"),
    [
        (DiverseBranchBlock(4, 8), 4),
        (DiverseBranchBlock(4, 4, groups=4), 8),
        (DiverseBranchBlock(4, 8, internal_channels=12), 12),
    ],
    ids=["dense", "depthwise", "given"],
)
def test_the_internal_channels_follow_the_input_unless_given(block: DiverseBranchBlock, internal: int) -> None:
    first, bn, *_ = block.dbb_1x1_kxk
    assert isinstance(bn, nn.BatchNorm2d) and bn.num_features == internal
    assert isinstance(first, IdentityConv1x1) == (internal == 4)


def test_training_reaches_every_branch() -> None:
    block = DiverseBranchBlock(4, 6)
    block(torch.randn(2, 4, 5, 5)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_the_identity_convolution_adds_its_weight_to_the_identity() -> None:
    conv = IdentityConv1x1(4, padding=1, groups=2)
    nn.init.normal_(conv.weight)
    x = torch.randn(1, 4, 3, 3)
    expected = pad(x + conv2d(x, conv.weight, groups=2), (1, 1, 1, 1))
    torch.testing.assert_close(conv(x), expected)


def test_the_identity_is_no_part_of_the_state_dict() -> None:
    assert list(IdentityConv1x1(4).state_dict()) == ["weight"]


def test_the_network_has_the_parameters_of_its_branches() -> None:
    with torch.device("meta"):
        model = dbb_resnet18()
        blocks = [module for module in model.modules() if isinstance(module, DiverseBranchBlock)]
    assert len(blocks) == 16
    expected = 11_689_512  # torchvision's resnet18, whose 3x3 and batch norm are the first branch
    for block in blocks:
        inputs, outputs = block.in_channels, block.dbb_origin[1].num_features
        assert isinstance(outputs, int)
        expected += inputs * outputs + 2 * outputs  # 1x1
        expected += inputs * outputs + 2 * 2 * outputs  # 1x1, average
        expected += inputs * inputs + 2 * inputs + 9 * inputs * outputs + 2 * outputs  # 1x1, 3x3
    assert parameters(model) == expected


def test_the_network_traces_under_torch_fx_and_has_one_score_per_class(randomise: Randomise) -> None:
    model = randomise(dbb_resnet18(num_classes=5, image_size=64))
    (x,) = model.example_inputs()
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(symbolic_trace(model)(x), expected)
    assert expected.shape == (1, 5)


def test_a_state_dict_goes_from_one_block_to_another() -> None:
    source, target = DiverseBranchBlock(3, 4).eval(), DiverseBranchBlock(3, 4).eval()
    target.load_state_dict(source.state_dict())
    (x,) = source.example_inputs()
    assert torch.equal(target(x), source(x))


def test_an_even_kernel_is_refused() -> None:
    with pytest.raises(InputError, match="kernel_size must be odd, got 2"):
        DiverseBranchBlock(3, 4, kernel_size=2)
