"""What do tests of several models need? Batch norms that are all at work, and the convolution that a block is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

Randomise = Callable[[nn.Module], nn.Module]
ConvolutionOf = Callable[[Callable[[Tensor], Tensor], int, int, int], tuple[Tensor, Tensor]]


@pytest.fixture
def randomise() -> Randomise:
    """Give every batch norm a random mean, variance, gamma of both signs and beta; float64 and eval mode."""

    def with_random_batchnorms(model: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(1)

        def fill(values: Tensor | None, low: float, high: float) -> None:
            assert values is not None
            values.uniform_(low, high, generator=generator)

        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    fill(module.running_mean, -1, 1)
                    fill(module.running_var, 0.5, 2)
                    fill(module.weight, -1.5, 1.5)
                    fill(module.bias, -1, 1)
        return model.double().eval()

    return with_random_batchnorms


@pytest.fixture
def convolution_of() -> ConvolutionOf:
    """Read kernel [out, in, k, k] and bias [out] of a map off its responses to unit impulses far from the border.

    A map that equals the convolution with these, zero padded, also at the border, is that convolution.
    """

    def kernel_and_bias(
        block: Callable[[Tensor], Tensor], channels: int, kernel_size: int, stride: int
    ) -> tuple[Tensor, Tensor]:
        here = kernel_size  # the output position that is read; its window is centred on input here * stride
        start = here * stride - kernel_size // 2
        side = 2 * here * stride + 1
        impulses = torch.zeros(channels, kernel_size, kernel_size, channels, side, side, dtype=torch.float64)
        for channel in range(channels):
            for row in range(kernel_size):
                for column in range(kernel_size):
                    impulses[channel, row, column, channel, start + row, start + column] = 1
        with torch.no_grad():
            bias = block(torch.zeros_like(impulses[0, 0, 0, None]))[0, :, here, here]
            responses = block(impulses.flatten(0, 2))[:, :, here, here] - bias  # [in * k * k, out]
        return responses.T.reshape(-1, channels, kernel_size, kernel_size), bias

    return kernel_and_bias
