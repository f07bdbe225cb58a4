"""Does a proof of range remove activations that do nothing, and let norms of positive scale pass a maximum?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

#: Activations in a row of which only the first acts.
IDLE: dict[str, list[nn.Module]] = {
    "ReLU after ReLU": [nn.ReLU(), nn.ReLU()],
    "ReLU after sigmoid": [nn.Sigmoid(), nn.ReLU()],
    "ReLU after softplus": [nn.Softplus(), nn.ReLU()],
    "ReLU after hardsigmoid": [nn.Hardsigmoid(), nn.ReLU()],
    "ReLU after ReLU6": [nn.ReLU6(), nn.ReLU()],
    "leaky ReLU after ReLU": [nn.ReLU(), nn.LeakyReLU(0.1)],
    "PReLU after ReLU": [nn.ReLU(), nn.PReLU()],
    "ELU after sigmoid": [nn.Sigmoid(), nn.ELU()],
    "ReLU6 after hardsigmoid": [nn.Hardsigmoid(), nn.ReLU6()],
    "ReLU6 of ReLU6": [nn.ReLU6(), nn.ReLU6()],
    "ReLU6 after sigmoid": [nn.Sigmoid(), nn.ReLU6()],
    "Hardtanh(0, 1) after sigmoid": [nn.Sigmoid(), nn.Hardtanh(0.0, 1.0)],
    "Hardtanh after tanh": [nn.Tanh(), nn.Hardtanh()],
    "Hardtanh after a narrower one": [nn.Hardtanh(-0.5, 0.5), nn.Hardtanh()],
}

#: What may stand between a ReLU and an idle ReLU, on [2, 4, 8, 8].
BETWEEN: dict[str, nn.Module] = {
    "average pool": nn.AvgPool2d(2),
    "padded average pool": nn.AvgPool2d(3, 1, 1),
    "max pool": nn.MaxPool2d(2),
    "global average": nn.AdaptiveAvgPool2d(1),
    "adaptive max pool": nn.AdaptiveMaxPool2d(2),
    "dropout": nn.Dropout(0.3),
    "flatten": nn.Flatten(2),
    "pixel shuffle": nn.PixelShuffle(2),
    "nearest upsampling": nn.Upsample(scale_factor=2),
    "bilinear upsampling": nn.Upsample(scale_factor=2, mode="bilinear"),
    "zero pad": nn.ZeroPad2d(1),
}


class TestIdleActivations:
    @pytest.mark.parametrize("name", list(IDLE))
    def test_an_activation_inside_the_range_before_it_is_removed(self, becomes: Any, name: str) -> None:
        first = nn.Conv2d(4, 8, 3, padding=1)
        model = nn.Sequential(first, nn.BatchNorm2d(8), *IDLE[name], nn.Conv2d(8, 4, 1))
        becomes(model, (2, 4, 7, 9), {"Conv2d": 2, "activation": 1})

    @pytest.mark.parametrize("name", list(BETWEEN))
    def test_a_relu_behind_what_keeps_the_sign_is_removed(self, becomes: Any, name: str) -> None:
        model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), BETWEEN[name], nn.ReLU())
        kept = 0 if name in {"dropout", "flatten"} else 1
        becomes(model, (2, 4, 8, 8), {"Conv2d": 1, "ReLU": 1, name: kept}, any_size=False)

    def test_a_relu_after_an_average_pool_of_a_relu_lets_the_layers_meet(self, becomes: Any) -> None:
        model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.AvgPool2d(2), nn.ReLU(), nn.Conv2d(8, 4, 1))
        becomes(model, (2, 4, 9, 8), {"Conv2d": 2, "ReLU": 1})

    def test_a_relu_of_a_sum_of_non_negative_branches_is_removed(self, becomes: Any, written: Any) -> None:
        def forward(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
            return torch.relu(torch.relu(a(x)) + torch.sigmoid(b(x)))

        model = written(forward, a=nn.Conv2d(4, 8, 3), b=nn.Conv2d(4, 8, 3))
        becomes(model, (2, 4, 7, 9), {"Conv2d": 2, "ReLU": 1, "Sigmoid": 1, "add": 1})

    def test_a_relu_of_a_gated_non_negative_tensor_is_removed(self, becomes: Any, written: Any) -> None:
        def forward(x: Tensor, a: nn.Module) -> Tensor:
            y = torch.relu(a(x))
            return torch.relu(y * torch.sigmoid(y.mean((2, 3), keepdim=True)))

        model = written(forward, a=nn.Conv2d(4, 8, 3))
        becomes(model, (2, 4, 7, 9), {"Conv2d": 1, "ReLU": 1, "mean": 1, "Sigmoid": 1, "mul": 1})

    def test_a_relu_of_concatenated_non_negative_branches_is_removed(self, becomes: Any, written: Any) -> None:
        def forward(x: Tensor, a: nn.Module) -> Tensor:
            return torch.relu(torch.cat([torch.relu(a(x)), torch.sigmoid(x)], 1))

        model = written(forward, a=nn.Conv2d(4, 8, 1))
        becomes(model, (2, 4, 7, 9), {"Conv2d": 1, "ReLU": 1, "Sigmoid": 1, "cat": 1})

    def test_a_relu_behind_a_positive_scale_of_a_relu_is_removed(self, becomes: Any, written: Any) -> None:
        def forward(x: Tensor, conv: nn.Module) -> Tensor:
            return torch.relu(torch.relu(conv(x)) * 3 + 0.5)

        becomes(written(forward, conv=nn.Conv2d(4, 8, 1)), (2, 4, 7, 9), {"Conv2d": 1, "ReLU": 1, "mul": 1, "add": 1})

    def test_a_clamp_at_zero_of_a_relu_is_removed(self, becomes: Any, written: Any) -> None:
        model = written(lambda x, conv: torch.relu(conv(x)).clamp(min=0), conv=nn.Conv2d(4, 8, 1))
        becomes(model, (2, 4, 7, 9), {"Conv2d": 1, "ReLU": 1})

    def test_an_absolute_value_of_a_relu_is_removed(self, becomes: Any, written: Any) -> None:
        model = written(lambda x, conv: torch.relu(conv(x)).abs(), conv=nn.Conv2d(4, 8, 1))
        becomes(model, (2, 4, 7, 9), {"Conv2d": 1, "ReLU": 1})

    def test_a_relu_after_a_convolution_of_weights_without_sign_is_removed(self, becomes: Any, written: Any) -> None:
        """Non-negative weights and bias keep a non-negative input non-negative."""
        weight = torch.rand(8, 4, 3, 3, dtype=torch.float64)
        bias = torch.rand(8, dtype=torch.float64)

        def forward(x: Tensor, last: nn.Module) -> Tensor:
            y: Tensor = last(torch.relu(torch.nn.functional.conv2d(torch.sigmoid(x), weight, bias)))
            return y

        becomes(written(forward, last=nn.Conv2d(8, 4, 1)), (2, 4, 7, 9), {"Sigmoid": 1, "Conv2d": 1})


#: Activations in a row that both act.
ACTIVE: dict[str, list[nn.Module]] = {
    "ReLU after tanh": [nn.Tanh(), nn.ReLU()],
    "ReLU6 after ReLU": [nn.ReLU(), nn.ReLU6()],
    "ReLU after SiLU": [nn.SiLU(), nn.ReLU()],
    "ReLU after GELU": [nn.GELU(), nn.ReLU()],
    "ReLU after leaky ReLU": [nn.LeakyReLU(0.1), nn.ReLU()],
    "GELU after ReLU": [nn.ReLU(), nn.GELU()],
    "sigmoid after ReLU": [nn.ReLU(), nn.Sigmoid()],
    "Hardtanh(0, 0.9) after sigmoid": [nn.Sigmoid(), nn.Hardtanh(0.0, 0.9)],
    "Hardtanh(0.1, 1) after sigmoid": [nn.Sigmoid(), nn.Hardtanh(0.1, 1.0)],
}


@pytest.mark.parametrize("name", list(ACTIVE))
def test_an_activation_that_acts_stays(becomes: Any, name: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), *ACTIVE[name], nn.Conv2d(8, 4, 1))
    compiled = becomes(model, (2, 4, 7, 9), {"Conv2d": 2, "activations": 2})
    assert compiled.report.ops_after.total() == 4 or name == "ReLU after leaky ReLU"  # which is a ReLU as well


class Norm(nn.Module):
    """A batch norm whose gamma has the signs that a test wants, whatever `randomize` draws."""

    def __init__(self, channels: int, sign: float) -> None:
        super().__init__()
        self.norm, self.sign = nn.BatchNorm2d(channels, affine=False), sign
        self.gamma = nn.Parameter(torch.linspace(0.5, 2, channels).view(-1, 1, 1))
        self.beta = nn.Parameter(torch.linspace(-1, 1, channels).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = self.norm(x) * (self.sign * self.gamma) + self.beta
        return scaled


class TestMaxPooling:
    @pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AdaptiveMaxPool2d(3)], ids=str)
    def test_a_norm_of_positive_gamma_between_pooling_and_padded_convolution_goes_before_the_pooling(
        self, becomes: Any, pool: nn.Module
    ) -> None:
        """max(s x + t) = s max(x) + t for s > 0: the norm goes into the convolution before the pooling."""
        first, last = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        model = nn.Sequential(first, pool, Norm(8, 1.0), last)
        becomes(model, (2, 4, 9, 8), {"Conv2d": 2, "MaxPool2d": 1})

    def test_a_norm_of_positive_gamma_before_the_pooling_goes_into_the_layer_behind_it(self, becomes: Any) -> None:
        model = nn.Sequential(nn.Sigmoid(), Norm(8, 1.0), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1))
        becomes(model, (2, 8, 9, 8), {"Sigmoid": 1, "MaxPool2d": 1, "Conv2d": 1})

    def test_a_norm_of_negative_gamma_does_not_pass_a_pooling(self, becomes: Any) -> None:
        model = nn.Sequential(nn.Sigmoid(), Norm(8, -1.0), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1))
        compiled = becomes(model, (2, 8, 9, 8), {"Sigmoid": 1, "addcmul": 1, "MaxPool2d": 1, "Conv2d": 1})
        assert compiled.report.ops_after.total() >= 4

    def test_a_relu_passes_a_pooling_once_only(self, becomes: Any) -> None:
        model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(8, 4, 1))
        becomes(model, (2, 4, 9, 8), {"Conv2d": 2, "ReLU": 1, "MaxPool2d": 1})
