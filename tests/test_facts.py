"""Do the failures that cost others dearly happen to rgc? Each is a test: the result equals eager PyTorch in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rgc
from rgc import CompiledModule, models
from rgc.nn import DecayedActivation
from rgc.testing import randomize


def compiled_equally(model: nn.Module, *shape: int, **options: Any) -> CompiledModule:
    """Compile with random weights, and hold the result against eager PyTorch in float64, also at another batch."""
    model = randomize(model).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    compiled = rgc.compile(model, x, **options)
    assert not compiled.report.failures
    for batch in (1, 3):
        drawn = torch.randn(batch, *shape[1:], generator=generator, dtype=torch.float64)
        with torch.no_grad():
            expected = copy.deepcopy(model)(drawn.clone())
            found = compiled(drawn.clone())
        assert float((found - expected).abs().max()) <= 1e-11 * float(expected.abs().max())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return compiled


def kinds(compiled: CompiledModule) -> set[str]:
    return set(compiled.report.ops_after)


def reasons(compiled: CompiledModule) -> str:
    return "; ".join(refused.reason for refused in compiled.report.refusals)


class Calls(nn.Module):
    """Modules, and a function that calls them."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.call = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, **self.parts)


# --- the trap that a decayed network may set -------------------------------------------------------------------------


@pytest.mark.parametrize("s", [0.0, 0.25, 1.0])
def test_a_blend_whose_in_place_relu_overwrites_its_other_half_stays_a_relu(s: float) -> None:
    def blend(x: Tensor, conv: nn.Module, last: nn.Module) -> Tensor:
        out = conv(x)
        y: Tensor = last(s * F.relu(out, inplace=True) + (1 - s) * out)
        return y

    compiled = compiled_equally(Calls(blend, conv=nn.Conv2d(3, 4, 3), last=nn.Conv2d(4, 4, 1)), 2, 3, 8, 8)
    assert "ReLU" in kinds(compiled)


def test_an_in_place_addition_to_an_alias_is_seen_by_both_names() -> None:
    def aliased(x: Tensor, conv: nn.Module) -> Tensor:
        y = conv(x)
        z = y
        z += x
        return torch.relu(y) + z

    compiled_equally(Calls(aliased, conv=nn.Conv2d(3, 3, 3, padding=1)), 2, 3, 8, 8)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999, 1 - 2**-20])
def test_a_decay_that_has_not_reached_one_removes_nothing_and_says_so(decay: float) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), DecayedActivation(nn.ReLU(), decay), nn.Conv2d(4, 4, 1))
    compiled = compiled_equally(model, 2, 3, 8, 8, objective="depth")
    assert "ReLU" in kinds(compiled) and compiled.report.ops_after["Conv2d"] == 2
    assert decay == 0 or "still takes part" in reasons(compiled)


# --- batch norm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_batch_norm_folds_into_a_square_transposed_convolution_on_the_right_axis(rank: int, groups: int) -> None:
    conv = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1](4, 4, 3, stride=2, groups=groups)
    bn = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1](4)
    compiled = compiled_equally(nn.Sequential(conv, bn), 2, 4, *[4, 5, 3][:rank])
    assert kinds(compiled) == {type(conv).__name__}


def test_a_convolution_called_twice_folds_the_batch_norm_of_each_call() -> None:
    def twice(x: Tensor, conv: nn.Module, bn: nn.Module) -> Tensor:
        y: Tensor = bn(conv(torch.relu(bn(conv(x)))))
        return y

    compiled = compiled_equally(Calls(twice, conv=nn.Conv2d(4, 4, 3, padding=1), bn=nn.BatchNorm2d(4)), 2, 4, 8, 8)
    assert compiled.report.ops_after == {"Conv2d": 2, "ReLU": 1}


def test_a_shared_convolution_is_not_merged_into_one_of_its_uses() -> None:
    def both(x: Tensor, conv: nn.Module, bn: nn.Module) -> Tensor:
        y = conv(x)
        return torch.relu(bn(y)) + torch.sigmoid(y)

    model = Calls(both, conv=nn.Conv2d(4, 4, 3, padding=1), bn=nn.BatchNorm2d(4))
    for objective in ("latency", "depth", "macs", "params"):
        compiled = compiled_equally(copy.deepcopy(model), 2, 4, 8, 8, objective=objective)
        assert compiled.report.ops_after["Conv2d"] == 1
        assert "is also used elsewhere" in reasons(compiled)


def test_tied_weights_are_scaled_once_for_each_layer() -> None:
    first, second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    second.weight, second.bias = first.weight, first.bias
    model = nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), second, nn.BatchNorm2d(4))
    assert kinds(compiled_equally(model, 2, 4, 8, 8)) == {"Conv2d", "ReLU"}


def test_a_batch_norm_over_tokens_is_no_scale_of_the_linear_layer_before_it() -> None:
    compiled = compiled_equally(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), 2, 5, 6)
    assert kinds(compiled) == {"Linear", "BatchNorm1d"}
    assert "different axes" in reasons(compiled)


def test_a_batch_norm_over_features_folds_into_the_linear_layer_before_it() -> None:
    assert kinds(compiled_equally(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), 3, 6)) == {"Linear"}


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 0.5])
def test_the_eps_of_a_batch_norm_is_its_own(eps: float) -> None:
    bn = nn.BatchNorm2d(4, eps=eps)
    assert kinds(compiled_equally(nn.Sequential(nn.Conv2d(3, 4, 3), bn), 2, 3, 8, 8)) == {"Conv2d"}


class Activated(nn.BatchNorm2d):
    """A subclass that does more than its base, as BatchNormAct2d does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps))


class Renamed(nn.BatchNorm2d):
    """A subclass that only adds a name."""


@pytest.mark.parametrize(("norm", "left"), [(nn.SyncBatchNorm, set()), (Renamed, set()), (Activated, {"relu"})])
def test_subclasses_of_batch_norm_are_seen_for_what_they_do(norm: type[nn.Module], left: set[str]) -> None:
    compiled = compiled_equally(nn.Sequential(nn.Conv2d(3, 4, 3), norm(4)), 2, 3, 8, 8)
    assert {kind.lower() for kind in kinds(compiled)} == {"conv2d"} | left


def test_a_batch_norm_does_not_move_through_a_max_pooling() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    compiled = compiled_equally(model, 2, 3, 9, 8, objective="depth")
    assert compiled.report.ops_after == {"Conv2d": 2, "MaxPool2d": 1}


# --- what stands before a padded convolution -------------------------------------------------------------------------


class ImplicitA(nn.Module):
    """Adds a learned value per channel (YOLOR)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.implicit = nn.Parameter(torch.linspace(-1, 1, channels).reshape(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.implicit + x


class Normalise(nn.Module):
    """As of ImageNet."""

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.deviation


@pytest.mark.parametrize("before", [ImplicitA(3), Normalise()], ids=["ImplicitA", "normalisation"])
def test_an_offset_before_a_padded_convolution_is_not_pushed_through_the_ring(before: nn.Module) -> None:
    padded, plain = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3)
    shifted = compiled_equally(nn.Sequential(before, padded), 2, 3, 8, 8, objective="depth")
    assert shifted.report.ops_after == {"sub": 1, "Conv2d": 1} and not shifted.report.fixed_size
    assert kinds(compiled_equally(nn.Sequential(before, plain), 2, 3, 8, 8)) == {"Conv2d"}


# --- multiplications, identities, pooling ----------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "folds"), [((4, 1, 1), True), ((1, 4, 1, 1), True), ((4,), False), ((4, 1), False)])
def test_only_a_multiplication_along_the_channels_is_a_channel_scale(shape: tuple[int, ...], folds: bool) -> None:
    factor = torch.linspace(-1, 2, 4, dtype=torch.float64).reshape(shape)

    def scaled(x: Tensor, conv: nn.Module) -> Tensor:
        y: Tensor = conv(x) * factor
        return y

    compiled = compiled_equally(Calls(scaled, conv=nn.Conv2d(3, 4, 3, padding=1)), 2, 3, 4, 4)
    assert (kinds(compiled) == {"Conv2d"}) == folds


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kernel", [1, 3])
def test_the_identity_of_a_grouped_convolution_is_one_per_channel(groups: int, kernel: int) -> None:
    def residual(x: Tensor, conv: nn.Module) -> Tensor:
        return torch.relu(x + conv(x))

    conv = nn.Conv2d(4, 4, kernel, padding=kernel // 2, groups=groups)
    compiled = compiled_equally(Calls(residual, conv=conv), 2, 4, 8, 8)
    assert compiled.report.ops_after["Conv2d"] == 1 and "add" not in kinds(compiled)


@pytest.mark.parametrize(
    ("options", "reason"), [({"count_include_pad": False}, "count_include_pad"), ({"ceil_mode": True}, "ceil_mode")]
)
def test_an_average_pooling_of_unequal_windows_is_no_convolution(options: dict[str, bool], reason: str) -> None:
    def branches(x: Tensor, conv: nn.Module, pool: nn.Module) -> Tensor:
        return torch.relu(conv(x) + pool(x))

    pool = nn.AvgPool2d(3, stride=1, padding=1, **options)  # type: ignore[arg-type]
    model = Calls(branches, conv=nn.Conv2d(4, 4, 3, padding=1), pool=pool)
    compiled = compiled_equally(model, 2, 4, 8, 8, objective="depth")
    assert {"Conv2d", "AvgPool2d"} < kinds(compiled) and reason in reasons(compiled)


def test_an_average_pooling_of_equal_windows_is_one() -> None:
    def branches(x: Tensor, conv: nn.Module, pool: nn.Module) -> Tensor:
        return torch.relu(conv(x) + pool(x))

    model = Calls(branches, conv=nn.Conv2d(4, 4, 3, padding=1), pool=nn.AvgPool2d(3, stride=1, padding=1))
    assert compiled_equally(model, 2, 4, 8, 8).report.ops_after["Conv2d"] == 1


# --- hooks, dropout, training mode -----------------------------------------------------------------------------------


def test_a_hook_is_kept_and_so_is_what_it_sees() -> None:
    calls: list[tuple[int, ...]] = []

    def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        calls.append(tuple(output.shape))
        return 2 * output

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[0].register_forward_hook(double)
    compiled = compiled_equally(model, 2, 3, 8, 8)
    calls.clear()
    compiled(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert calls == [(2, 4, 6, 6)]


def test_a_dropout_that_ignores_eval_is_not_removed() -> None:
    def dropped(x: Tensor, conv: nn.Module) -> Tensor:
        return F.dropout(conv(x), 0.5)

    model = randomize(Calls(dropped, conv=nn.Conv2d(3, 4, 3)))
    with pytest.raises(rgc.InputError, match="draws random numbers"):
        rgc.compile(model, torch.randn(2, 3, 8, 8))


def test_a_dropout_that_heeds_eval_is_removed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout2d(0.5), nn.BatchNorm2d(4))
    assert kinds(compiled_equally(model, 2, 3, 8, 8)) == {"Conv2d"}


def test_a_submodule_in_training_mode_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4))).eval()
    model[1][0].train()
    with pytest.raises(rgc.InputError, match=r"submodule '1\.0' \(BatchNorm2d\) is in training mode"):
        rgc.compile(model, torch.randn(2, 3, 8, 8))


def test_a_linear_network_is_an_affine_function_and_nothing_more() -> None:
    model = randomize(models.reducenet(8, decay=1.0, image_size=8)).double()
    a, b = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(model(a) + model(b), model(a + b) + model(0 * a), rtol=1e-9, atol=1e-9)
