"""Are PyTorch's modules read by what they compute: subclasses, computed weights, parametrizations, batch norms?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rgc
from rgc.example import output_difference
from rgc.modules import has_hooks, refresh_weights
from rgc.testing import randomize


def compiled_equal(model: nn.Module, shape: tuple[int, ...], **options: Any) -> rgc.CompiledModule:
    torch.manual_seed(0)
    model = randomize(model)
    before = copy.deepcopy(model.state_dict())
    compiled = rgc.compile(model, torch.randn(shape), **{"objective": "depth", **options})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for batch in (1, shape[0], 5):
        x = torch.randn(batch, *shape[1:])
        with torch.no_grad():
            assert output_difference(model(x), compiled(x)) < 1e-5
    assert compiled.report.tier == "torch.fx" and not compiled.report.notes and not compiled.report.failures
    return compiled


# --- batch norms ---------------------------------------------------------------------------------------------------


class Renamed(nn.BatchNorm2d):
    """A subclass that changes nothing."""


class Activated(nn.BatchNorm2d):
    """A subclass with a forward of its own, as in timm."""

    def forward(self, x: Tensor) -> Tensor:
        use_statistics = self.training or (self.running_mean is None and self.running_var is None)
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, use_statistics, 0.1, self.eps)
        return F.relu(y)


class Frozen(nn.Module):
    """Statistics and weights as buffers, computed with by hand, as in torchvision."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, tensor in (("weight", torch.randn(channels)), ("shift", torch.randn(channels)),
                             ("mean", torch.randn(channels)), ("var", torch.rand(channels) + 0.1)):  # fmt: skip
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        w, b, m, v = (getattr(self, name).reshape(1, -1, 1, 1) for name in ("weight", "shift", "mean", "var"))
        scale = w * (v + 1e-5).rsqrt()
        y: Tensor = x * scale + (b - m * scale)
        return y


@pytest.mark.parametrize("make", [
    lambda: nn.BatchNorm2d(4), lambda: nn.BatchNorm2d(4, affine=False), lambda: nn.BatchNorm2d(4, eps=0.3),
    lambda: nn.SyncBatchNorm(4), lambda: Renamed(4), lambda: Activated(4), lambda: Frozen(4),
    lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
], ids=["plain", "without weights", "another eps", "synchronised", "renamed", "with an activation", "frozen",
        "instance norm with statistics", "instance norm with statistics and weights"])  # fmt: skip
def test_no_batch_norm_survives_beside_convolutions(make: Callable[[], nn.Module]) -> None:
    after = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), make(), nn.Sigmoid())
    assert set(compiled_equal(after, (2, 4, 9, 8)).report.ops_after) <= {"Conv2d", "ReLU", "Sigmoid"}
    before = nn.Sequential(nn.Sigmoid(), make(), nn.Conv2d(4, 4, 3), nn.Sigmoid())
    if not isinstance(make(), Activated):
        assert compiled_equal(before, (2, 4, 9, 8)).report.ops_after == {"Conv2d": 1, "Sigmoid": 2}


@pytest.mark.parametrize(("conv", "norm", "shape"), [
    (nn.Linear(4, 5), nn.BatchNorm1d(5), (3, 4)), (nn.Conv1d(4, 5, 3), nn.BatchNorm1d(5), (2, 4, 9)),
    (nn.Conv3d(4, 5, 3), nn.BatchNorm3d(5), (2, 4, 5, 6, 7)),
    (nn.ConvTranspose2d(4, 5, 3), nn.BatchNorm2d(5), (2, 4, 5, 6)),
])  # fmt: skip
def test_batch_norms_of_every_rank_fold(conv: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    assert compiled_equal(nn.Sequential(conv, norm), shape).report.ops_after == {type(conv).__name__: 1}


def test_lazy_layers_fold_once_they_know_their_sizes() -> None:
    model = nn.Sequential(nn.LazyConv2d(5, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    model(torch.randn(2, 4, 7, 6))
    assert compiled_equal(model, (2, 4, 7, 6)).report.ops_after == {"Conv2d": 1, "ReLU": 1, "Linear": 1}


# --- computed weights ----------------------------------------------------------------------------------------------


def _old_weight_norm(layer: nn.Module) -> nn.Module:
    return nn.utils.weight_norm(layer)


def _old_weight_norm_of_all(layer: nn.Module) -> nn.Module:
    return nn.utils.weight_norm(layer, dim=None)  # type: ignore[arg-type]  # documented, and not in the annotation


def _without_orthogonal_names(layer: nn.Module) -> nn.Module:
    return nn.utils.parametrizations.orthogonal(layer)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("wrap", [
    nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, _without_orthogonal_names,
    _old_weight_norm, _old_weight_norm_of_all, nn.utils.spectral_norm,
])  # fmt: skip
def test_a_layer_whose_weight_is_computed_is_a_plain_layer(wrap: Callable[[nn.Module], nn.Module]) -> None:
    layers = [
        (wrap(nn.Conv2d(4, 5, 3)), nn.BatchNorm2d(5), (2, 4, 7, 6)), (wrap(nn.Linear(4, 5)), nn.BatchNorm1d(5), (3, 4)),
        (wrap(nn.ConvTranspose1d(4, 5, 3)), nn.BatchNorm1d(5), (2, 4, 7)),
    ]  # fmt: skip
    for layer, norm, shape in layers:
        compiled = compiled_equal(nn.Sequential(layer, norm), shape)
        (name,) = compiled.report.ops_after
        assert set(compiled.state_dict()) == {"0.weight", "0.bias"}
        assert type(compiled.get_submodule("0")) is getattr(nn, name)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_hook_that_computes_a_weight_is_no_hook_of_the_users_and_others_are() -> None:
    layer = nn.utils.weight_norm(nn.Linear(3, 3))
    assert not has_hooks(layer)
    layer.weight_g.data.mul_(2)
    stale = layer.weight.detach().clone()
    refresh_weights(layer)
    torch.testing.assert_close(layer.weight.detach(), 2 * stale)
    layer.register_forward_hook(lambda module, args, output: output)
    assert has_hooks(layer)
    plain = nn.Linear(3, 3)
    plain.register_forward_pre_hook(lambda module, args: None)
    assert has_hooks(plain)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_weight_that_a_hook_computes_in_a_layer_with_its_own_forward_folds_too() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    model = nn.Sequential(nn.utils.weight_norm(Doubled(4, 4, 3)), nn.BatchNorm2d(4))
    assert compiled_equal(model, (2, 4, 7, 6)).report.ops_after == {"Conv2d": 1}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_layer_that_the_table_does_not_know_keeps_the_hook_that_computes_its_weight() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.utils.weight_norm(nn.GRU(4, 5, batch_first=True), "weight_hh_l0")

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.gru(x)[0]
            return y

    model = Recurrent().eval()
    x = torch.randn(2, 3, 4)
    compiled = rgc.compile(model, x)
    torch.testing.assert_close(compiled(x), model(x))


class LowRank(nn.Module):
    """W x + (alpha / r) B (A x), the pair that LoRA trains beside a frozen layer."""

    def __init__(self, base: nn.Module, down: nn.Module, up: nn.Module, alpha: float = 16) -> None:
        super().__init__()
        self.base, self.down, self.up, self.dropout = base, down, up, nn.Dropout(0.1)
        self.scaling = alpha / 2

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.down(self.dropout(x))) * self.scaling
        return y


@pytest.mark.parametrize(("model", "shape", "kind"), [
    (LowRank(nn.Linear(6, 5), nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)), (2, 7, 6), "Linear"),
    (LowRank(nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(6, 2, 3, padding=1), nn.Conv2d(2, 5, 1)), (2, 6, 7, 8), "Conv2d"),
    (LowRank(nn.Conv2d(6, 5, 1), nn.Conv2d(6, 2, 1), nn.Conv2d(2, 5, 1)), (2, 6, 7, 8), "Conv2d"),
])  # fmt: skip
def test_a_low_rank_pair_beside_its_layer_is_one_layer(model: nn.Module, shape: tuple[int, ...], kind: str) -> None:
    for objective in ("depth", "latency"):
        model_again = copy.deepcopy(model)
        assert compiled_equal(model_again, shape, objective=objective).report.ops_after == {kind: 1}


class LowRankParameters(nn.Module):
    """The same pair as bare matrices: x @ A @ B, as many fine-tuning libraries write it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 5)
        self.a, self.b = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + 0.5 * (x @ self.a @ self.b)
        return y


class Merged(nn.Module):
    """The pair added to the weight inside of forward."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 5)
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight + 0.5 * self.b @ self.a, self.base.bias)


@pytest.mark.parametrize("make", [LowRankParameters, Merged])
def test_a_low_rank_pair_of_parameters_is_one_layer(make: Callable[[], nn.Module]) -> None:
    assert compiled_equal(make(), (2, 7, 6)).report.ops_after == {"Linear": 1}


class StaticRouting(nn.Module):
    """CondConv (arXiv:1904.04971) whose routing weights are parameters instead of a function of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 5, 4, 3, 3))
        self.routing, self.norm = nn.Parameter(torch.randn(3)), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.einsum("e,eoihw->oihw", torch.sigmoid(self.routing), self.experts)
        y: Tensor = self.norm(F.conv2d(x, weight, padding=1))
        return y


class OnlineWeights(nn.Module):
    """A kernel built from branches in weight space in every forward, as OREPA (arXiv:2204.00826) does."""

    def __init__(self) -> None:
        super().__init__()
        self.origin = nn.Parameter(torch.randn(5, 4, 3, 3))
        self.first, self.second = nn.Parameter(torch.randn(6, 4, 1, 1)), nn.Parameter(torch.randn(5, 6, 3, 3))
        self.depth, self.point = nn.Parameter(torch.randn(4, 1, 3, 3)), nn.Parameter(torch.randn(5, 4, 1, 1))
        self.vector = nn.Parameter(torch.randn(3, 5))
        self.register_buffer("average", torch.full((3, 3), 1 / 9))
        self.norm = nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        origin = torch.einsum("oihw,o->oihw", self.origin, self.vector[0])
        series = torch.einsum("ti,othw->oihw", self.first.squeeze(3).squeeze(2), self.second)
        separable = torch.einsum("ihw,oi->oihw", self.depth.squeeze(1), self.point.flatten(1))
        pooled = torch.einsum("oi,hw->oihw", self.point.flatten(1), self.average)  # type: ignore[arg-type]  # a buffer
        weight = (
            origin + series * self.vector[1].view(-1, 1, 1, 1) + separable + pooled * self.vector[2].view(-1, 1, 1, 1)
        )
        y: Tensor = torch.relu(self.norm(F.conv2d(x, weight, stride=2, padding=1)))
        return y


@pytest.mark.parametrize("make", [StaticRouting, OnlineWeights])
def test_kernels_that_are_computed_in_forward_are_plain_kernels(make: Callable[[], nn.Module]) -> None:
    counts = compiled_equal(make(), (2, 4, 9, 8)).report.ops_after
    assert counts["Conv2d"] == 1 and set(counts) <= {"Conv2d", "ReLU"}
