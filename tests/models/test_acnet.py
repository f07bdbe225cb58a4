"""Is an asymmetric convolution block one square convolution, border included, and is ACNet a ResNet-18 of them?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace
from torch.nn.functional import conv2d

from rgc.errors import InputError
from rgc.models import ACBlock, acnet_resnet18

Randomise = Callable[[Any], Any]
ConvolutionOf = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kernel_size", "groups"), [(1, 1), (3, 1), (3, 2), (5, 1)])
def test_a_block_is_one_square_convolution(
    kernel_size: int, groups: int, stride: int, randomise: Randomise, convolution_of: ConvolutionOf
) -> None:
    block = randomise(ACBlock(4, 6, kernel_size=kernel_size, stride=stride, groups=groups))
    kernel, bias = convolution_of(block, 4, kernel_size, stride)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(block(x), conv2d(x, kernel, bias, stride=stride, padding=kernel_size // 2))


def test_more_padding_than_half_the_kernel_keeps_the_three_centres_together(randomise: Randomise) -> None:
    narrow, wide = ACBlock(3, 3), ACBlock(3, 3, padding=2)
    wide.load_state_dict(randomise(narrow).state_dict())
    wide.double().eval()
    x = torch.randn(1, 3, 6, 7, dtype=torch.float64)
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    torch.testing.assert_close(wide(x), narrow(padded))


def test_the_branches_have_a_square_a_vertical_and_a_horizontal_kernel() -> None:
    block = ACBlock(4, 8, kernel_size=5)
    kernels = [conv.kernel_size for conv in (block.square_conv, block.ver_conv, block.hor_conv)]
    assert kernels == [(5, 5), (5, 1), (1, 5)]


def test_the_network_adds_two_thin_kernels_and_two_batch_norms_to_each_3x3_of_resnet18() -> None:
    with torch.device("meta"):
        added = parameters(acnet_resnet18()) - 11_689_512  # torchvision's resnet18
        blocks = [module for module in acnet_resnet18().modules() if isinstance(module, ACBlock)]
    widths = [(block.square_conv.in_channels, block.square_conv.out_channels) for block in blocks]
    assert len(blocks) == 16
    assert added == sum(2 * 3 * inputs * outputs + 2 * 2 * outputs for inputs, outputs in widths)


def test_the_network_traces_under_torch_fx_and_has_one_score_per_class(randomise: Randomise) -> None:
    model = randomise(acnet_resnet18(num_classes=5, image_size=64))
    (x,) = model.example_inputs()
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(symbolic_trace(model)(x), expected)
    assert expected.shape == (1, 5)


def test_a_state_dict_goes_from_one_block_to_another() -> None:
    source, target = ACBlock(3, 4).eval(), ACBlock(3, 4).eval()
    target.load_state_dict(source.state_dict())
    (x,) = source.example_inputs()
    assert torch.equal(target(x), source(x))


def test_an_even_kernel_is_refused() -> None:
    with pytest.raises(InputError, match="kernel_size must be odd, .* got 4"):
        ACBlock(3, 4, kernel_size=4)


def test_padding_that_would_crop_a_branch_is_refused() -> None:
    with pytest.raises(InputError, match="padding must be at least kernel_size // 2 = 1, got 0"):
        ACBlock(3, 4, padding=0)
