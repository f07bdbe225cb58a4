"""Do the multi-branch blocks that were invented for one convolution become one convolution?

ACNet: Ding et al., "ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks"
(2019), section 3 and figure 3. DBB: Ding et al., "Diverse Branch Block: Building a Convolution as an Inception-like
Unit" (2021), section 3.2, transforms I-VI. ResRep: Ding et al., "ResRep: Lossless CNN Pruning via Decoupling
Remembering and Forgetting" (2021), section 3.2.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def only_conv(compiled: Any) -> nn.Conv2d:
    (conv,) = (module for module in compiled.modules() if isinstance(module, nn.Conv2d))
    return conv


class Asymmetric(nn.Module):
    """Square, vertical and horizontal kernels. Where padding < kernel // 2, the thin branches read a cropped input."""

    def __init__(self, channels: int, kernel: int, padding: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()

        def branch(size: tuple[int, int], pad: tuple[int, int]) -> nn.Sequential:
            conv = nn.Conv2d(channels, channels, size, stride, pad, groups=groups, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(channels))

        self.crop = max(0, kernel // 2 - padding)
        inner = max(0, padding - kernel // 2)
        self.square = branch((kernel, kernel), (padding, padding))
        self.vertical = branch((kernel, 1), (padding, inner))
        self.horizontal = branch((1, kernel), (inner, padding))

    def forward(self, x: Tensor) -> Tensor:
        columns, rows = x, x
        if self.crop:
            columns = x[:, :, :, self.crop : -self.crop]
            rows = x[:, :, self.crop : -self.crop, :]
        return torch.relu(self.square(x) + self.vertical(columns) + self.horizontal(rows))


class TestACNet:
    @pytest.mark.parametrize("size", [(9, 9), (8, 11)], ids=str)
    @pytest.mark.parametrize(("kernel", "stride", "groups"), [(3, 1, 1), (3, 2, 1), (5, 1, 2), (3, 1, 8)])
    def test_a_block_becomes_one_square_convolution(
        self, becomes: Any, kernel: int, stride: int, groups: int, size: tuple[int, int]
    ) -> None:
        block = Asymmetric(8, kernel, kernel // 2, stride, groups)
        compiled = becomes(block, (2, 8, *size), {"Conv2d": 1, "ReLU": 1})
        assert only_conv(compiled).kernel_size == (kernel, kernel)

    @pytest.mark.parametrize("size", [(9, 9), (8, 11)], ids=str)
    @pytest.mark.parametrize(("kernel", "padding", "stride"), [(3, 0, 1), (5, 1, 1), (5, 0, 1), (3, 0, 2)])
    def test_a_block_whose_thin_branches_read_a_cropped_input_becomes_one_convolution(
        self, becomes: Any, kernel: int, padding: int, stride: int, size: tuple[int, int]
    ) -> None:
        compiled = becomes(Asymmetric(4, kernel, padding, stride), (2, 4, *size), {"Conv2d": 1, "ReLU": 1})
        assert only_conv(compiled).kernel_size == (kernel, kernel)

    def test_a_block_that_pads_more_than_half_its_kernel_becomes_one_convolution(self, becomes: Any) -> None:
        becomes(Asymmetric(4, 3, 2), (2, 4, 7, 8), {"Conv2d": 1, "ReLU": 1})


class PaddedNorm(nn.Module):
    """DBB's batch norm that pads with what it makes of zero, written into the border by slices."""

    def __init__(self, channels: int, pixels: int) -> None:
        super().__init__()
        self.bn, self.pixels = nn.BatchNorm2d(channels), pixels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(x)
        p = self.pixels
        if p > 0:
            assert self.bn.running_mean is not None and self.bn.running_var is not None
            deviation = torch.sqrt(self.bn.running_var + self.bn.eps)
            values = (self.bn.bias - self.bn.running_mean * self.bn.weight / deviation).view(1, -1, 1, 1)
            out = F.pad(out, [p] * 4)
            out[:, :, 0:p, :] = values
            out[:, :, -p:, :] = values
            out[:, :, :, 0:p] = values
            out[:, :, :, -p:] = values
        return out


class IdentityConv(nn.Module):
    """A 1x1 convolution that starts as the identity: the identity is added to its weight in every call."""

    identity: Tensor

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.randn(channels, channels // groups, 1, 1) * 0.3)
        eye = torch.eye(channels // groups).repeat(groups, 1)
        self.register_buffer("identity", eye.reshape(self.weight.shape))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight + self.identity.to(self.weight), groups=self.groups)


class DiverseBranch(nn.Module):
    """k x k; 1x1; 1x1 then k x k; 1x1 then average pooling. Padding is done behind the first 1x1 (figure 3)."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, same: bool = False
    ) -> None:
        super().__init__()
        p = kernel // 2

        def conv(a: int, b: int, k: int, s: int, pad: int) -> nn.Conv2d:
            return nn.Conv2d(a, b, k, s, pad, groups=groups, bias=False)

        def bn() -> nn.BatchNorm2d:
            return nn.BatchNorm2d(outputs)

        self.origin = nn.Sequential(conv(inputs, outputs, kernel, stride, p), bn())
        self.pointwise = nn.Sequential(conv(inputs, outputs, 1, stride, 0), bn())
        self.average = nn.Sequential(
            conv(inputs, outputs, 1, 1, 0), PaddedNorm(outputs, p), nn.AvgPool2d(kernel, stride), bn()
        )
        first = IdentityConv(inputs, groups) if same else conv(inputs, inputs, 1, 1, 0)
        self.serial = nn.Sequential(first, PaddedNorm(inputs, p), conv(inputs, outputs, kernel, stride, 0), bn())

    def forward(self, x: Tensor) -> Tensor:
        out = self.origin(x)
        out += self.pointwise(x)
        out += self.average(x)
        out += self.serial(x)
        return F.relu(out)


class TestDiverseBranchBlock:
    @pytest.mark.parametrize("pixels", [0, 1, 2])
    def test_a_norm_that_pads_with_its_own_zero_joins_its_neighbours(self, becomes: Any, pixels: int) -> None:
        model = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), PaddedNorm(8, pixels), nn.Conv2d(8, 4, 3), nn.ReLU())
        becomes(model, (2, 4, 7, 8), {"Conv2d": 1, "ReLU": 1})

    @pytest.mark.parametrize(
        ("stride", "groups", "size"), [(1, 1, (9, 9)), (2, 1, (8, 11)), (1, 2, (8, 11)), (2, 4, (9, 9))], ids=str
    )
    def test_a_block_becomes_one_convolution(
        self, becomes: Any, stride: int, groups: int, size: tuple[int, int]
    ) -> None:
        block = DiverseBranch(8, 12, stride=stride, groups=groups)
        compiled = becomes(block, (2, 8, *size), {"Conv2d": 1, "ReLU": 1})
        assert only_conv(compiled).kernel_size == (3, 3)

    def test_a_block_with_an_identity_based_pointwise_becomes_one_convolution(self, becomes: Any) -> None:
        becomes(DiverseBranch(8, 8, same=True), (2, 8, 7, 8), {"Conv2d": 1, "ReLU": 1})

    def test_a_block_with_five_taps_becomes_one_convolution(self, becomes: Any) -> None:
        becomes(DiverseBranch(4, 6, kernel=5), (2, 4, 9, 8), {"Conv2d": 1, "ReLU": 1})

    def test_a_block_of_pointwise_branches_becomes_one_pointwise_convolution(self, becomes: Any) -> None:
        becomes(DiverseBranch(8, 8, kernel=1), (2, 8, 5, 6), {"Conv2d": 1, "ReLU": 1})


class TestResRep:
    @pytest.mark.parametrize("stride", [1, 2])
    def test_a_compactor_goes_into_the_convolution_before_it(self, becomes: Any, stride: int) -> None:
        conv = nn.Conv2d(8, 16, 3, stride, 1, bias=False)
        model = nn.Sequential(conv, nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1, bias=False), nn.ReLU())
        becomes(model, (2, 8, 9, 8), {"Conv2d": 1, "ReLU": 1})

    def test_pruned_compactors_leave_narrow_convolutions(self, becomes: Any) -> None:
        """A compactor with 5 of 16 rows left: the convolution becomes 5 wide, the next one reads 5 channels."""

        def layer(inputs: int) -> list[nn.Module]:
            conv = nn.Conv2d(inputs, 16, 3, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(16), nn.Conv2d(16, 5, 1, bias=False), nn.ReLU()]

        compiled = becomes(nn.Sequential(*layer(3), *layer(5)), (2, 3, 8, 9), {"Conv2d": 2, "ReLU": 2})
        assert compiled.report.params_after == (5 * 3 * 9 + 5) + (5 * 5 * 9 + 5)
