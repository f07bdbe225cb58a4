"""Do parallel, dilated, banded and serial depthwise branches become one large depthwise kernel?

InceptionNeXt: Yu et al., "InceptionNeXt: When Inception Meets ConvNeXt" (2024), section 3.2, equations 1-3. RepLKNet:
Ding et al., "Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs" (2022), guideline 3.
UniRepLKNet: Ding et al., "UniRepLKNet: A Universal Perception Large-Kernel ConvNet" (2024), section 3.1, "Dilated
Reparam Block". RepNeXt: Zhao et al., "RepNeXt: A Fast Multi-Scale CNN using Structural Reparameterization" (2024),
section 3.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.inception_next import InceptionDWConv2d, MetaNeXtBlock
from torch import Tensor, nn


def depthwise(channels: int, kernel: Any, *, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (dilation * (height - 1) // 2, dilation * (width - 1) // 2)
    return nn.Conv2d(channels, channels, (height, width), stride, padding, dilation, channels, bias=False)


def depthwise_bn(channels: int, kernel: Any, **options: Any) -> nn.Sequential:
    return nn.Sequential(depthwise(channels, kernel, **options), nn.BatchNorm2d(channels))


def only_conv(compiled: Any) -> nn.Conv2d:
    (conv,) = (module for module in compiled.modules() if isinstance(module, nn.Conv2d))
    return conv


class TestInceptionNeXt:
    @pytest.mark.parametrize("size", [(13, 13), (8, 15)], ids=str)
    def test_split_bands_and_identity_become_one_depthwise_convolution(
        self, becomes: Any, size: tuple[int, int]
    ) -> None:
        compiled = becomes(InceptionDWConv2d(16, band_kernel_size=7), (2, 16, *size), {"Conv2d": 1})
        assert only_conv(compiled).groups == 16 and only_conv(compiled).kernel_size == (7, 7)

    def test_the_batch_norm_behind_the_mixer_goes_into_it(self, becomes: Any) -> None:
        model = nn.Sequential(InceptionDWConv2d(16, band_kernel_size=5), nn.BatchNorm2d(16), nn.GELU())
        becomes(model, (2, 16, 9, 8), {"Conv2d": 1, "GELU": 1})

    def test_a_block_becomes_two_convolutions(self, becomes: Any) -> None:
        """By hand: mixer, norm and the first 1x1 as one; the second 1x1 with the layer scale."""
        becomes(MetaNeXtBlock(16, mlp_ratio=1), (2, 16, 12, 13), {"Conv2d": 2, "GELU": 1, "add": 1})


class LargeKernel(nn.Module):
    """A large depthwise kernel beside a small one, each with its batch norm."""

    def __init__(self, channels: int, large: int, small: int, stride: int) -> None:
        super().__init__()
        self.large = depthwise_bn(channels, large, stride=stride)
        self.small = depthwise_bn(channels, small, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.large(x) + self.small(x))


class RepLKBlock(nn.Module):
    """x + pw2(relu(lk(relu(pw1(bn(x)))))), with a batch norm behind every convolution (figure 2)."""

    def __init__(self, channels: int, large: int, small: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.pw1 = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.large = LargeKernel(channels, large, small, 1)
        self.pw2 = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pw2(self.large(self.pw1(self.norm(x))))


class TestRepLKNet:
    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("size", [(13, 13), (6, 10)], ids=str)
    def test_the_small_kernel_goes_into_the_large_one(self, becomes: Any, stride: int, size: tuple[int, int]) -> None:
        compiled = becomes(LargeKernel(8, 13, 5, stride), (2, 8, *size), {"Conv2d": 1, "ReLU": 1})
        assert only_conv(compiled).kernel_size == (13, 13) and only_conv(compiled).groups == 8

    def test_a_block_becomes_three_convolutions(self, becomes: Any) -> None:
        becomes(RepLKBlock(8, 9, 3), (2, 8, 9, 12), {"Conv2d": 3, "ReLU": 2, "add": 1})


#: Kernels and dilations of the parallel branches for a large kernel (UniRepLKNet, table 1 and appendix).
DILATED = {
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 2), (3, 3)),
}


class DilatedReparam(nn.Module):
    """A large depthwise kernel and dilated small ones, each with its batch norm, added."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.large = depthwise_bn(channels, kernel)
        self.dilated = nn.ModuleList([depthwise_bn(channels, k, dilation=r) for k, r in DILATED[kernel]])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.large(x)
        for branch in self.dilated:
            out = out + branch(x)
        return out


class ToChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class ToChannelsFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2).contiguous()


class UniRepLKBlock(nn.Module):
    """x + gamma pw2(gelu(pw1(norm(dilated(x))))), with linear layers on channels-last tokens."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.dwconv, self.norm = DilatedReparam(channels, kernel), nn.BatchNorm2d(channels)
        self.pw1 = nn.Sequential(ToChannelsLast(), nn.Linear(channels, 2 * channels))
        self.pw2 = nn.Sequential(nn.Linear(2 * channels, channels, bias=False), ToChannelsFirst())
        self.norm2 = nn.BatchNorm2d(channels)
        self.gamma = nn.Parameter(1e-6 * torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.pw2(nn.functional.gelu(self.pw1(self.norm(self.dwconv(x))))))
        return x + self.gamma.view(1, -1, 1, 1) * y


class TestUniRepLKNet:
    @pytest.mark.parametrize("kernel", list(DILATED))
    def test_dilated_branches_go_into_the_large_kernel(self, becomes: Any, kernel: int) -> None:
        compiled = becomes(DilatedReparam(8, kernel), (2, 8, 9, 14), {"Conv2d": 1})
        assert only_conv(compiled).kernel_size == (kernel, kernel) and only_conv(compiled).dilation == (1, 1)

    def test_a_block_has_its_norms_and_layer_scale_in_its_layers(self, becomes: Any) -> None:
        """By hand: depthwise with the first linear as one dense convolution (or two layers and a permutation)."""
        kept = {"GELU": 1, "permute": 2, "add": 1}
        becomes(UniRepLKBlock(4, 7), (2, 4, 9, 8), {"Conv2d": 1, "Linear": 2, **kept})


class Serial(nn.Module):
    """1xk, then kx1."""

    def __init__(self, channels: int, kernel: int, norm_between: bool) -> None:
        super().__init__()
        self.horizontal = (depthwise_bn if norm_between else depthwise)(channels, (1, kernel))
        self.vertical = depthwise_bn(channels, (kernel, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.vertical(self.horizontal(x))
        return y


class RepNeXtMixer(nn.Module):
    """Large, serial and small depthwise branches and the identity, each with its norm (figure 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                depthwise_bn(channels, 7),
                Serial(channels, 7, norm_between=False),
                depthwise_bn(channels, (3, 5)),
                depthwise_bn(channels, (5, 3)),
                depthwise_bn(channels, 3),
                nn.BatchNorm2d(channels),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(sum(branch(x) for branch in self.branches))  # type: ignore[arg-type]  # a tensor, not 0


class RepNeXtChunks(nn.Module):
    """Chunks of channels: copied, small, serial and large kernels, joined again."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        part = channels // 4
        self.small, self.serial = depthwise_bn(part, 3), Serial(part, 11, norm_between=False)
        self.large = depthwise_bn(part, 7)

    def forward(self, x: Tensor) -> Tensor:
        copied, small, serial, large = torch.chunk(x, 4, dim=1)
        return torch.cat((copied, self.small(small), self.serial(serial), self.large(large)), dim=1)


class TestRepNeXt:
    @pytest.mark.parametrize("size", [(9, 9), (5, 12)], ids=str)
    def test_serial_bands_become_one_square_kernel(self, becomes: Any, size: tuple[int, int]) -> None:
        compiled = becomes(Serial(8, 7, norm_between=False), (2, 8, *size), {"Conv2d": 1})
        assert only_conv(compiled).kernel_size == (7, 7) and only_conv(compiled).groups == 8

    def test_serial_bands_with_a_norm_between_take_one_extra_operator(self, becomes: Any) -> None:
        becomes(Serial(8, 5, norm_between=True), (2, 8, 9, 8), {"Conv2d": 1, "pad": 1})

    def test_serial_bands_with_a_norm_between_take_a_bias_map_at_a_fixed_size(self, becomes: Any) -> None:
        becomes(Serial(8, 5, norm_between=True), (2, 8, 9, 8), {"Conv2d": 1, "add": 1}, passes="all")

    @pytest.mark.parametrize("size", [(9, 9), (6, 11)], ids=str)
    def test_parallel_and_serial_branches_become_one_convolution(self, becomes: Any, size: tuple[int, int]) -> None:
        becomes(RepNeXtMixer(8), (2, 8, *size), {"Conv2d": 1, "ReLU": 1})

    def test_chunks_with_kernels_of_their_own_become_one_convolution(self, becomes: Any) -> None:
        compiled = becomes(RepNeXtChunks(16), (2, 16, 9, 12), {"Conv2d": 1})
        assert only_conv(compiled).groups == 16
