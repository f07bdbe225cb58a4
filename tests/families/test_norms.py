"""Do normalisations with fixed statistics disappear, and the affine parts of the others with their neighbours?"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d, DropPath, FrozenBatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d


def frozen(channels: int) -> nn.Module:
    norm = FrozenBatchNorm2d(channels)
    generator = torch.Generator().manual_seed(0)
    for name, low in (("weight", -1.0), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.2)):
        getattr(norm, name).copy_(low + torch.rand(channels, generator=generator))
    return norm


def instance_norm(channels: int, rank: int = 2) -> nn.Module:
    kind = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[rank]
    return kind(channels, affine=True, track_running_stats=True)


#: A norm of fixed statistics over 8 channels, and what it leaves behind the convolution before it.
FIXED: dict[str, tuple[Any, dict[str, int]]] = {
    "affine": (lambda: nn.BatchNorm2d(8), {}),
    "not affine": (lambda: nn.BatchNorm2d(8, affine=False), {}),
    "frozen": (lambda: frozen(8), {}),
    "sync": (lambda: nn.SyncBatchNorm(8), {}),
    "with an activation": (lambda: BatchNormAct2d(8), {"ReLU": 1}),
    "with an activation left out": (lambda: BatchNormAct2d(8, apply_act=False), {}),
    "frozen, with an activation": (lambda: FrozenBatchNormAct2d(8), {"ReLU": 1}),
    "instance norm": (lambda: instance_norm(8), {}),
    "lazily made": (lambda: _lazy(), {}),
}


def _lazy() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "Lazy modules are a new feature"
        norm = nn.LazyBatchNorm2d()
    norm(torch.zeros(2, 8, 2, 2))
    return norm


class TestFixedStatistics:
    @pytest.mark.parametrize("kind", list(FIXED))
    def test_a_norm_goes_into_the_convolution_before_it(self, becomes: Any, kind: str) -> None:
        make, left = FIXED[kind]
        becomes(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), make()), (2, 4, 7, 9), {"Conv2d": 1, **left})

    @pytest.mark.parametrize("kind", [kind for kind, (_, left) in FIXED.items() if not left])
    def test_a_norm_goes_into_the_pointwise_convolution_behind_it(self, becomes: Any, kind: str) -> None:
        make, _ = FIXED[kind]
        becomes(nn.Sequential(make(), nn.Conv2d(8, 4, 1), nn.ReLU()), (2, 8, 7, 9), {"Conv2d": 1, "ReLU": 1})

    @pytest.mark.parametrize("rank", [1, 3])
    def test_an_instance_norm_with_running_statistics_of_other_ranks_goes_in(self, becomes: Any, rank: int) -> None:
        conv = {1: nn.Conv1d, 3: nn.Conv3d}[rank](4, 8, 3, padding=1)
        becomes(nn.Sequential(conv, instance_norm(8, rank)), (2, 4, *(5, 6, 7)[:rank]), {f"Conv{rank}d": 1})

    def test_norms_on_both_sides_and_between_go_in(self, becomes: Any) -> None:
        first, second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        model = nn.Sequential(first, nn.BatchNorm2d(8), nn.BatchNorm2d(8), second, nn.BatchNorm2d(6))
        becomes(model, (2, 4, 7, 9), {"Conv2d": 1})

    def test_a_functional_batch_norm_goes_in(self, becomes: Any, written: Any) -> None:
        mean, var = torch.randn(8, dtype=torch.float64), torch.rand(8, dtype=torch.float64) + 0.5

        def forward(x: Tensor, conv: nn.Module) -> Tensor:
            return torch.relu(nn.functional.batch_norm(conv(x), mean, var))

        becomes(written(forward, conv=nn.Conv2d(4, 8, 3)), (2, 4, 7, 9), {"Conv2d": 1, "ReLU": 1})

    def test_a_batch_norm_by_hand_goes_in(self, becomes: Any, written: Any) -> None:
        mean, var = torch.randn(8, dtype=torch.float64), torch.rand(8, dtype=torch.float64) + 0.5

        def forward(x: Tensor, conv: nn.Module) -> Tensor:
            centred = conv(x) - mean.view(1, -1, 1, 1)
            return torch.relu(centred / torch.sqrt(var + 1e-5).view(1, -1, 1, 1))

        becomes(written(forward, conv=nn.Conv2d(4, 8, 3)), (2, 4, 7, 9), {"Conv2d": 1, "ReLU": 1})


#: Norms of statistics that depend on the input, over 8 channels.
LIVE: dict[str, Any] = {
    "instance norm": lambda: nn.InstanceNorm2d(8, affine=True),
    "group norm": lambda: nn.GroupNorm(2, 8),
    "group norm of one group": lambda: nn.GroupNorm(1, 8),
}


class TestAffineParts:
    @pytest.mark.parametrize("kind", list(LIVE))
    def test_the_affine_part_goes_into_the_pointwise_convolution_behind_it(self, becomes: Any, kind: str) -> None:
        model = nn.Sequential(LIVE[kind](), nn.Conv2d(8, 12, 1), nn.ReLU())
        compiled = becomes(model, (2, 8, 7, 9), {"norm": 1, "Conv2d": 1, "ReLU": 1})
        assert compiled.report.params_after == 12 * 8 + 12

    @pytest.mark.parametrize("kind", list(LIVE))
    def test_the_affine_part_goes_into_the_unpadded_convolution_behind_it(self, becomes: Any, kind: str) -> None:
        model = nn.Sequential(LIVE[kind](), nn.Conv2d(8, 4, 3, bias=False), nn.ReLU())
        compiled = becomes(model, (2, 8, 7, 9), {"norm": 1, "Conv2d": 1, "ReLU": 1})
        assert compiled.report.params_after == 4 * 8 * 9 + 4

    @pytest.mark.parametrize("bias", [True, False])
    def test_the_affine_part_of_a_layer_norm_goes_into_the_linear_layer_behind_it(
        self, becomes: Any, bias: bool
    ) -> None:
        model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12, bias=bias), nn.GELU())
        compiled = becomes(model, (2, 5, 8), {"LayerNorm": 1, "Linear": 1, "GELU": 1})
        assert compiled.report.params_after == 12 * 8 + 12

    def test_the_affine_part_of_a_layer_norm_goes_into_all_linear_layers_behind_it(
        self, becomes: Any, written: Any
    ) -> None:
        def heads(x: Tensor, norm: nn.Module, a: nn.Module, b: nn.Module) -> Tensor:
            y = norm(x)
            return torch.relu(a(y)) + torch.sigmoid(b(y))

        model = written(heads, norm=nn.LayerNorm(8), a=nn.Linear(8, 12), b=nn.Linear(8, 12))
        ops = {"LayerNorm": 1, "Linear": 2, "ReLU": 1, "Sigmoid": 1, "add": 1}
        assert becomes(model, (2, 5, 8), ops).report.params_after == 2 * (12 * 8 + 12)

    def test_a_scale_behind_a_layer_norm_is_its_affine_part(self, becomes: Any, written: Any) -> None:
        gamma = torch.linspace(-1, 2, 8, dtype=torch.float64)
        model = written(lambda x, norm: torch.relu(norm(x) * gamma + 0.5), norm=nn.LayerNorm(8))
        becomes(model, (2, 5, 8), {"LayerNorm": 1, "ReLU": 1})

    def test_a_scale_behind_a_group_norm_is_its_affine_part(self, becomes: Any, written: Any) -> None:
        gamma = torch.linspace(-1, 2, 8, dtype=torch.float64).view(8, 1, 1)
        model = written(lambda x, norm: torch.relu(norm(x) * gamma - 0.5), norm=nn.GroupNorm(2, 8))
        becomes(model, (2, 8, 5, 6), {"GroupNorm": 1, "ReLU": 1})


class TestDropPath:
    def test_a_path_that_is_never_dropped_is_not_there(self, becomes: Any, written: Any) -> None:
        def forward(x: Tensor, conv: nn.Module, drop: nn.Module) -> Tensor:
            return torch.relu(x + drop(conv(x)))

        model = written(forward, conv=nn.Conv2d(8, 8, 3, padding=1), drop=DropPath(0.3))
        becomes(model, (2, 8, 7, 9), {"Conv2d": 1, "ReLU": 1})

    def test_stochastic_depth_of_torchvision_is_not_there(self, becomes: Any, written: Any) -> None:
        from torchvision.ops import StochasticDepth

        def forward(x: Tensor, conv: nn.Module, drop: nn.Module) -> Tensor:
            return torch.relu(x + drop(conv(x)))

        model = written(forward, conv=nn.Conv2d(8, 8, 3, padding=1), drop=StochasticDepth(0.3, "row"))
        becomes(model, (2, 8, 7, 9), {"Conv2d": 1, "ReLU": 1})
