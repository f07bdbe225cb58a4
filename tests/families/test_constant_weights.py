"""Do weights that a model computes from its parameters become plain weights?

OREPA: Hu et al., "Online Convolutional Re-parameterization" (2022), section 3.2 and figure 4 (linear scaling layers,
a frequency prior, stacks of 1x1 and k x k, depthwise separable ones). CondConv: Yang et al., "CondConv: Conditionally
Parameterized Convolutions for Efficient Inference" (2019), equation 1, with routing weights that do not depend on the
input. LoRA: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2022), equation 3. VanillaNet: Chen et
al., "VanillaNet: the Power of Minimalism in Deep Learning" (2023), sections 3.1 and 3.2.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class OnlineConv(nn.Module):
    """One convolution whose kernel is built in every call from branches that are linear in the weights."""

    frequencies: Tensor
    average: Tensor
    identity: Tensor

    def __init__(self, channels: int, outputs: int, stride: int = 1, groups: int = 1, kernel: int = 3) -> None:
        super().__init__()
        self.stride, self.groups, self.kernel = stride, groups, kernel
        per, wide = channels // groups, 2 * channels
        self.origin = nn.Parameter(torch.randn(outputs, per, kernel, kernel) * 0.2)
        self.averaged = nn.Parameter(torch.randn(outputs, per, 1, 1) * 0.2)
        self.frequency = nn.Parameter(torch.randn(outputs, per, 1, 1) * 0.2)
        self.pointwise = nn.Parameter(torch.randn(outputs, per, 1, 1) * 0.2)
        self.inner = nn.Parameter(torch.randn(wide, per, 1, 1) * 0.2)
        self.outer = nn.Parameter(torch.randn(outputs, wide // groups, kernel, kernel) * 0.2)
        self.depth = nn.Parameter(torch.randn(per * 8, 1, kernel, kernel) * 0.2)
        self.point = nn.Parameter(torch.randn(outputs, per * 8, 1, 1) * 0.2)
        self.vector = nn.Parameter(torch.ones(6, outputs))
        self.register_buffer("average", torch.full((kernel, kernel), 1 / kernel**2))
        self.register_buffer("frequencies", self._cosines(per, kernel))
        self.bn = nn.BatchNorm2d(outputs)

    @staticmethod
    def _cosines(channels: int, kernel: int) -> Tensor:
        """A cosine per channel over the kernel: the frequency prior."""
        steps = torch.arange(kernel) + 0.5
        half = channels // 2
        rows = torch.stack([torch.cos(math.pi * steps * (i + 1) / kernel) for i in range(channels)])
        prior = torch.empty(channels, kernel, kernel)
        prior[:half] = rows[:half, :, None]
        prior[half:] = rows[half:, None, :]
        return prior

    def weight(self) -> Tensor:
        scaled = self.vector
        origin = torch.einsum("oihw,o->oihw", self.origin, scaled[0])
        averaged = torch.einsum("oi,hw,o->oihw", self.averaged.flatten(1), self.average, scaled[1])
        frequency = torch.einsum("oi,ihw,o->oihw", self.frequency.flatten(1), self.frequencies, scaled[2])
        pointwise = F.pad(self.pointwise, [self.kernel // 2] * 4) * scaled[3].view(-1, 1, 1, 1)
        outer = self.outer.view(self.groups, -1, *self.outer.shape[1:])
        inner = self.inner.view(self.groups, -1, self.inner.shape[1])
        stacked = torch.einsum("gti,gothw->goihw", inner, outer).flatten(0, 1)
        depth = self.depth.view(self.origin.shape[1], 8, self.kernel, self.kernel)
        point = self.point.view(self.origin.shape[0], self.origin.shape[1], 8)
        separable = torch.einsum("irhw,oir->oihw", depth, point)
        stacked = torch.einsum("oihw,o->oihw", stacked, scaled[4]) + separable * scaled[5].view(-1, 1, 1, 1)
        return origin + averaged + frequency + pointwise + stacked

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight(), None, self.stride, self.kernel // 2, 1, self.groups)
        return torch.relu(self.bn(y))


class TestOREPA:
    @pytest.mark.parametrize("size", [(9, 9), (8, 11)], ids=str)
    @pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 2), (2, 4)])
    def test_an_online_convolution_becomes_one_plain_convolution(
        self, becomes: Any, stride: int, groups: int, size: tuple[int, int]
    ) -> None:
        compiled = becomes(OnlineConv(8, 12, stride, groups), (2, 8, *size), {"Conv2d": 1, "ReLU": 1})
        assert compiled.report.params_after == 12 * (8 // groups) * 9 + 12


class RoutedConv(nn.Module):
    """W = sum of r_i W_i (equation 1), with routing weights r that are the same for every sample."""

    routing: Tensor

    def __init__(self, experts: int, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.shape = (outputs, inputs, kernel, kernel)
        self.weight = nn.Parameter(torch.randn(experts, math.prod(self.shape)) * 0.2)
        self.bias = nn.Parameter(torch.randn(experts, outputs))
        self.register_buffer("routing", torch.sigmoid(torch.randn(1, experts)))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.matmul(self.routing, self.weight).view(self.shape)
        return F.conv2d(x, weight, torch.matmul(self.routing, self.bias).view(-1), padding=self.shape[-1] // 2)


class TestCondConv:
    @pytest.mark.parametrize("kernel", [1, 3])
    def test_static_routing_becomes_one_convolution(self, becomes: Any, kernel: int) -> None:
        model = nn.Sequential(RoutedConv(4, 8, 12, kernel), nn.BatchNorm2d(12), nn.SiLU())
        becomes(model, (2, 8, 9, 8), {"Conv2d": 1, "SiLU": 1})

    def test_a_mixture_of_convolutions_with_static_gates_becomes_one_convolution(
        self, becomes: Any, written: Any
    ) -> None:
        gates = torch.softmax(torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64), 0)

        def mixture(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module) -> Tensor:
            y: Tensor = torch.relu(gates[0] * a(x) + gates[1] * b(x) + gates[2] * c(x))
            return y

        convs = {name: nn.Conv2d(8, 12, 3, padding=1) for name in "abc"}
        becomes(written(mixture, **convs), (2, 8, 9, 8), {"Conv2d": 1, "ReLU": 1})

    def test_a_stack_of_experts_summed_with_static_gates_becomes_one_convolution(
        self, becomes: Any, written: Any
    ) -> None:
        gates = torch.softmax(torch.tensor([0.3, -1.0], dtype=torch.float64), 0)

        def mixture(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
            return (torch.stack([a(x), b(x)]) * gates.view(2, 1, 1, 1, 1)).sum(0)

        convs = {name: nn.Conv2d(8, 12, 3, padding=1) for name in "ab"}
        becomes(written(mixture, **convs), (2, 8, 9, 8), {"Conv2d": 1})


class MergedLoRA(nn.Module):
    """W + (alpha / r) B A in one product."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.A = nn.Parameter(torch.randn(rank, inputs) * 0.3)
        self.B = nn.Parameter(torch.randn(outputs, rank) * 0.3)
        self.scaling = 2.0 / rank

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight + self.scaling * self.B @ self.A, self.linear.bias)


class ParallelLoRA(nn.Module):
    """W x + (alpha / r) B A dropout(x): the path beside the layer (figure 1)."""

    def __init__(self, layer: nn.Module, down: nn.Module, up: nn.Module, scaling: float) -> None:
        super().__init__()
        self.layer, self.lora_A, self.lora_B, self.scaling = layer, down, up, scaling
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result + self.lora_B(self.lora_A(self.dropout(x))) * self.scaling


def low_rank_linear() -> ParallelLoRA:
    return ParallelLoRA(nn.Linear(12, 16), nn.Linear(12, 2, bias=False), nn.Linear(2, 16, bias=False), 4.0)


class TestLoRA:
    @pytest.mark.parametrize("shape", [(4, 12), (2, 5, 12)], ids=str)
    def test_merged_weights_are_one_linear_layer(self, becomes: Any, shape: tuple[int, ...]) -> None:
        becomes(MergedLoRA(12, 16, 2), shape, {"Linear": 1})

    @pytest.mark.parametrize("shape", [(4, 12), (2, 5, 12)], ids=str)
    def test_the_parallel_path_goes_into_the_layer(self, becomes: Any, shape: tuple[int, ...]) -> None:
        compiled = becomes(low_rank_linear(), shape, {"Linear": 1})
        assert compiled.report.params_after == 12 * 16 + 16

    def test_two_adapters_on_one_layer_go_into_it(self, becomes: Any) -> None:
        inner = low_rank_linear()
        outer = ParallelLoRA(inner, nn.Linear(12, 3, bias=False), nn.Linear(3, 16, bias=False), 0.5)
        becomes(outer, (2, 5, 12), {"Linear": 1})

    @pytest.mark.parametrize("kernel", [1, 3])
    def test_the_path_beside_a_convolution_goes_into_it(self, becomes: Any, kernel: int) -> None:
        layer = nn.Conv2d(8, 12, kernel, padding=kernel // 2)
        down = nn.Conv2d(8, 2, kernel, padding=kernel // 2, bias=False)
        becomes(ParallelLoRA(layer, down, nn.Conv2d(2, 12, 1, bias=False), 2.0), (2, 8, 7, 9), {"Conv2d": 1})

    def test_adapters_in_attention_go_into_its_projections(self, becomes: Any, written: Any) -> None:
        def attention(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module) -> Tensor:
            return F.scaled_dot_product_attention(q(x), k(x), v(x))

        projections = {name: low_rank_linear() for name in "qkv"}
        becomes(written(attention, **projections), (2, 5, 12), {"Linear": 3, "scaled_dot_product_attention": 1})


def old(name: str) -> Callable[[nn.Module], nn.Module]:
    """The hook-based forms, which torch deprecates and models still use."""

    def apply(module: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            result: nn.Module = getattr(nn.utils, name)(module)
            for _ in range(10):  # spectral_norm estimates the largest singular value by and by
                for hook in result._forward_pre_hooks.values():
                    hook(result, ())
        return result

    return apply


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm (hook)": old("weight_norm"),
    "spectral_norm (hook)": old("spectral_norm"),
}


@pytest.mark.parametrize("name", list(PARAMETRIZATIONS))
class TestParametrizations:
    def test_a_parametrized_convolution_takes_the_batch_norm_behind_it(self, becomes: Any, name: str) -> None:
        conv = PARAMETRIZATIONS[name](nn.Conv2d(3, 8, 3, padding=1))
        becomes(nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU()), (2, 3, 8, 9), {"Conv2d": 1, "ReLU": 1})

    def test_parametrized_linear_layers_in_a_row_become_one(self, becomes: Any, name: str) -> None:
        first, second = (PARAMETRIZATIONS[name](nn.Linear(8, 8)) for _ in range(2))
        becomes(nn.Sequential(first, second), (4, 8), {"Linear": 1})


class SeriesActivation(nn.ReLU):
    """A sum of shifted activations (equation 6): a depthwise convolution of relu(x), and a batch norm."""

    def __init__(self, channels: int, reach: int) -> None:
        super().__init__()
        self.reach = reach
        size = 2 * reach + 1
        self.weight = nn.Parameter(torch.randn(channels, 1, size, size) * 0.2)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(F.conv2d(super().forward(x), self.weight, padding=self.reach, groups=self.weight.shape[0]))
        return y


class VanillaBlock(nn.Module):
    """conv + bn, the deep-training activation (1 - l) relu(x) + l x, conv + bn, pooling, series activation."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.act_learn = 1.0
        self.conv1 = nn.Sequential(nn.Conv2d(inputs, inputs, 1), nn.BatchNorm2d(inputs, eps=1e-6))
        self.conv2 = nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs, eps=1e-6))
        self.pool = nn.Identity() if stride == 1 else nn.MaxPool2d(stride)
        self.act = SeriesActivation(outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv1(x), self.act_learn)  # of slope act_learn: linear at the end of training
        y: Tensor = self.act(self.pool(self.conv2(x)))
        return y


class TestVanillaNet:
    @pytest.mark.parametrize("stride", [1, 2])
    def test_a_block_becomes_one_pointwise_and_one_depthwise_convolution(self, becomes: Any, stride: int) -> None:
        pool = {} if stride == 1 else {"MaxPool2d": 1}
        becomes(VanillaBlock(8, 12, stride), (2, 8, 9, 8), {"Conv2d": 2, "ReLU": 1, **pool})

    def test_the_linear_end_of_a_block_goes_into_the_next_one(self, becomes: Any) -> None:
        """The series activation ends in a padded depthwise convolution, so the next 1x1 joins it."""
        model = nn.Sequential(VanillaBlock(8, 8, 1), VanillaBlock(8, 8, 2))
        becomes(model, (2, 8, 9, 8), {"Conv2d": 3, "ReLU": 2, "MaxPool2d": 1})

    def test_the_stem_becomes_one_convolution(self, becomes: Any) -> None:
        stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.LeakyReLU(1.0), nn.Conv2d(8, 8, 1))
        becomes(
            nn.Sequential(stem, nn.BatchNorm2d(8), SeriesActivation(8, 2)), (2, 3, 17, 16), {"Conv2d": 2, "ReLU": 1}
        )
