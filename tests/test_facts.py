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


def compiled_equally(model: nn.Module, *shape: int, signs: str = "both signs", **options: Any) -> CompiledModule:
    """Compile with random weights, and hold the result against eager PyTorch in float64, also at another batch.

    A rewrite that was tried, found wrong by the proof and undone is a failure here too.
    """
    model = randomize(model).double()
    with torch.no_grad():
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            if signs != "both signs" and norm.weight is not None:
                norm.weight.copy_(norm.weight.abs() * (1 if signs == "positive" else -1))
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


Size = tuple[int, ...]


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


def test_the_batch_norms_of_timm_and_torchvision_are_seen_for_what_they_do() -> None:
    layers, ops = pytest.importorskip("timm.layers"), pytest.importorskip("torchvision.ops")
    for norm, left in ((layers.BatchNormAct2d(4), {"relu"}), (ops.FrozenBatchNorm2d(4), set())):
        if left == set():  # its statistics are buffers, so nothing randomises them
            for name, drawn in (("weight", -1.5), ("bias", 0.3), ("running_mean", 0.7), ("running_var", 2.0)):
                setattr(norm, name, drawn * torch.linspace(0.5, 2.0, 4))
        compiled = compiled_equally(nn.Sequential(nn.Conv2d(3, 4, 3), norm), 2, 3, 8, 8)
        assert {kind.lower() for kind in kinds(compiled)} == {"conv2d"} | left


@pytest.mark.parametrize("gamma", ["both signs", "positive", "negative"])
def test_a_batch_norm_meets_a_max_pooling_with_gamma_of_any_sign(gamma: str) -> None:
    """max(g x) = g max(x) for g > 0 only. Whether rgc makes use of that or not, the result is the same function."""
    for order in ((nn.MaxPool2d(2), nn.BatchNorm2d(4)), (nn.BatchNorm2d(4), nn.MaxPool2d(2))):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *order, nn.ReLU(), nn.Conv2d(4, 4, 3))
        for passes in ("default", "all"):
            compiled_equally(model, 2, 3, 13, 12, signs=gamma, objective="depth", passes=passes)


def test_a_batch_norm_between_a_max_pooling_and_a_pointwise_layer_goes_into_the_layer() -> None:
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
    for objective in ("latency", "depth"):
        anywhere = compiled_equally(nn.Sequential(before, padded), 2, 3, 8, 8, objective=objective)
        assert kinds(anywhere) != {"Conv2d"}, "one plain convolution cannot hold the offset and its ring"
        assert not anywhere.report.fixed_size
    assert kinds(compiled_equally(nn.Sequential(before, plain), 2, 3, 8, 8)) == {"Conv2d"}
    there = compiled_equally(nn.Sequential(before, padded), 2, 3, 8, 8, passes="all,-collapse", objective="depth")
    assert there.report.ops_after["Conv2d"] == 1 and there.report.ops_after.total() <= 2


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
    ("options", "reason"),
    [
        ({"stride": 1, "padding": 1, "count_include_pad": False}, "count_include_pad"),
        ({"stride": 2, "padding": 0, "ceil_mode": True}, "ceil_mode"),
    ],
)
def test_an_average_pooling_of_unequal_windows_is_no_convolution(options: dict[str, Any], reason: str) -> None:
    """On 8 elements the fourth window of 3 with stride 2 has two of them, and averages two."""

    def branches(x: Tensor, conv: nn.Module, pool: nn.Module) -> Tensor:
        return torch.relu(conv(x) + pool(x))

    conv = nn.Conv2d(4, 4, 3, stride=options["stride"], padding=1)
    compiled = compiled_equally(
        Calls(branches, conv=conv, pool=nn.AvgPool2d(3, **options)), 2, 4, 8, 8, objective="depth"
    )
    assert {"Conv2d", "AvgPool2d"} < kinds(compiled) and reason in reasons(compiled)


def test_an_average_pooling_of_equal_windows_is_one() -> None:
    def branches(x: Tensor, conv: nn.Module, pool: nn.Module) -> Tensor:
        return torch.relu(conv(x) + pool(x))

    model = Calls(branches, conv=nn.Conv2d(4, 4, 3, padding=1), pool=nn.AvgPool2d(3, stride=1, padding=1))
    assert compiled_equally(model, 2, 4, 8, 8).report.ops_after["Conv2d"] == 1


@pytest.mark.parametrize("case", ["convolution after convolution", "parallel branches", "batch norm before"])
def test_what_no_tool_for_onnx_merges_is_one_convolution(case: str) -> None:
    def parallel(x: Tensor, wide: nn.Module, narrow: nn.Module) -> Tensor:
        return torch.relu(wide(x) + narrow(x))

    model = {
        "convolution after convolution": nn.Sequential(nn.Conv2d(4, 8, 3, padding=2), nn.Conv2d(8, 4, 3)),
        "parallel branches": Calls(parallel, wide=nn.Conv2d(4, 4, 3, padding=1), narrow=nn.Conv2d(4, 4, 1)),
        "batch norm before": nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)),
    }[case]
    compiled = compiled_equally(model, 2, 4, 9, 8, objective="depth")
    assert compiled.report.ops_after["Conv2d"] == 1 and kinds(compiled) <= {"Conv2d", "ReLU"}


# --- hooks, dropout, training mode -----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["0", "0.0", "0.1", "1"])
@pytest.mark.parametrize("kind", ["forward", "pre-forward"])
def test_a_hook_is_kept_and_so_is_what_it_sees(where: str, kind: str) -> None:
    seen: list[Tensor] = []

    def double(module: nn.Module, args: Any, *output: Tensor) -> Tensor:
        seen.append((output or args)[0])
        return 2 * seen[-1]

    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 1))
    module = model.get_submodule(where)
    hook: Any = module.register_forward_hook if kind == "forward" else module.register_forward_pre_hook
    hook(double)
    compiled = compiled_equally(model, 2, 3, 8, 8, objective="depth")
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    seen.clear()
    with torch.no_grad():
        model(x), compiled(x)
    expected, found = seen
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


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


# --- the same mistakes, made: the examples above would show them -----------------------------------------------------


def conv_bn(conv: nn.Module, bn: nn.Module, transpose: bool = False, eps: float | None = None) -> nn.Module:
    """``conv`` with ``bn`` folded in by the formula of torch.nn.utils.fusion."""
    fused = copy.deepcopy(conv)
    own = bn.eps if eps is None else eps
    fused.weight, fused.bias = torch.nn.utils.fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, own, bn.weight, bn.bias, transpose
    )
    return fused


def wrong_axis() -> tuple[nn.Module, nn.Module, Size]:
    model = randomize(nn.Sequential(nn.ConvTranspose2d(4, 4, 3, stride=2), nn.BatchNorm2d(4))).double()
    return model, conv_bn(*model), (4, 5, 5)


def conv_called_twice_folded_twice() -> tuple[nn.Module, nn.Module, Size]:
    conv, bn = randomize(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))).double()
    once = conv_bn(conv, bn)
    return nn.Sequential(conv, bn, nn.ReLU(), conv, bn), nn.Sequential(once, nn.ReLU(), conv_bn(once, bn)), (4, 8, 8)


def tokens_taken_for_features() -> tuple[nn.Module, nn.Module, Size]:
    linear, bn = randomize(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))).double()
    wrong = copy.deepcopy(linear)
    wrong.weight, wrong.bias = torch.nn.utils.fuse_linear_bn_weights(
        linear.weight, linear.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )
    return nn.Sequential(linear, bn), wrong, (5, 6)


def assumed_eps() -> tuple[nn.Module, nn.Module, Size]:
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3))).double()
    return model, conv_bn(*model, eps=1e-5), (3, 8, 8)


def full_centre_for_a_grouped_identity() -> tuple[nn.Module, nn.Module, Size]:
    conv = randomize(nn.Conv2d(4, 4, 3, padding=1, groups=2)).double()
    wrong = copy.deepcopy(conv)
    with torch.no_grad():
        wrong.weight[:, :, 1, 1] += 1
    return Calls(lambda x, conv: x + conv(x), conv=conv), wrong, (4, 8, 8)


def offset_pushed_through_the_ring() -> tuple[nn.Module, nn.Module, Size]:
    before, conv = Normalise().double(), randomize(nn.Conv2d(3, 4, 3, padding=1)).double()
    wrong = copy.deepcopy(conv)
    with torch.no_grad():
        wrong.weight.div_(before.deviation)
        wrong.bias.sub_((wrong.weight * before.mean).sum((1, 2, 3)))
    return nn.Sequential(before, conv), wrong, (3, 8, 8)


def batch_norm_moved_through_a_max_pooling() -> tuple[nn.Module, nn.Module, Size]:
    bn, pool = randomize(nn.BatchNorm2d(4)).double(), nn.MaxPool2d(2)
    return nn.Sequential(pool, bn), nn.Sequential(bn, pool), (4, 8, 8)


def full_windows_for_averages_without_padding() -> tuple[nn.Module, nn.Module, Size]:
    return nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.AvgPool2d(3, 1, 1), (4, 8, 8)


def full_windows_for_a_pooling_in_ceil_mode() -> tuple[nn.Module, nn.Module, Size]:
    def full(x: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 3, 2)

    return nn.AvgPool2d(3, 2, ceil_mode=True), Calls(full), (4, 8, 8)


def multiplication_along_the_width_as_a_channel_scale() -> tuple[nn.Module, nn.Module, Size]:
    conv, factor = randomize(nn.Conv2d(3, 4, 3, padding=1)).double(), torch.linspace(-1, 2, 4, dtype=torch.float64)
    wrong = Calls(lambda x, conv: conv(x) * factor.view(4, 1, 1), conv=conv)
    return Calls(lambda x, conv: conv(x) * factor, conv=conv), wrong, (3, 4, 4)


def activation_taken_for_decayed() -> tuple[nn.Module, nn.Module, Size]:
    return DecayedActivation(nn.ReLU(), 0.999).double().eval(), nn.Identity(), (3, 8, 8)


def overwritten_blend_taken_for_the_identity() -> tuple[nn.Module, nn.Module, Size]:
    def blend(x: Tensor) -> Tensor:
        out = x + 0
        return 0.0 * F.relu(out, inplace=True) + 1.0 * out

    return Calls(blend), nn.Identity(), (3, 8, 8)


def base_class_of_a_batch_norm_that_activates() -> tuple[nn.Module, nn.Module, Size]:
    norm = randomize(Activated(4)).double()
    plain = nn.BatchNorm2d(4).double().eval()
    plain.load_state_dict(norm.state_dict())
    return norm, plain, (4, 8, 8)


MISTAKES = [
    wrong_axis, conv_called_twice_folded_twice, tokens_taken_for_features, assumed_eps,
    full_centre_for_a_grouped_identity, offset_pushed_through_the_ring, batch_norm_moved_through_a_max_pooling,
    full_windows_for_averages_without_padding, full_windows_for_a_pooling_in_ceil_mode,
    multiplication_along_the_width_as_a_channel_scale, activation_taken_for_decayed,
    overwritten_blend_taken_for_the_identity, base_class_of_a_batch_norm_that_activates,
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_of_others_shows_on_the_example_and_rgc_does_not_make_it(mistake: Callable[..., Any]) -> None:
    model, mistaken, size = mistake()
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        expected = model(x.clone())
        for passes in ("default", "all"):
            compiled = rgc.compile(model.eval(), x, passes=passes, objective="depth")
            assert not compiled.report.failures
            assert (compiled(x.clone()) - expected).abs().max() <= 1e-12 * expected.abs().max()
        assert (mistaken(x.clone()) - expected).abs().max() > 1e-4 * expected.abs().max()


# --- what released tools answer --------------------------------------------------------------------------------------


def twice(x: Tensor, conv: nn.Module, bn: nn.Module) -> Tensor:
    y: Tensor = bn(conv(torch.relu(bn(conv(x)))))
    return y


@pytest.mark.parametrize("case", ["called twice", "tokens", "hook"])
def test_where_fuse_of_torch_fx_is_wrong_rgc_is_right(case: str) -> None:
    optimization = pytest.importorskip("torch.fx.experimental.optimization")
    hooked = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    hooked[1].register_forward_hook(lambda module, args, output: 2 * output)
    model, shape = {
        "called twice": (Calls(twice, conv=nn.Conv2d(4, 4, 3, padding=1), bn=nn.BatchNorm2d(4)), (2, 4, 8, 8)),
        "tokens": (nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), (2, 5, 6)),
        "hook": (hooked, (2, 4, 8, 8)),
    }[case]
    compiled = compiled_equally(model, *shape)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        theirs = float((optimization.fuse(model)(x) - expected).abs().max())
        ours = float((compiled(x) - expected).abs().max())
    if theirs <= 1e-6:
        pytest.skip(f"torch {torch.__version__} does not make this mistake any more")
    assert ours <= 1e-12 * float(expected.abs().max())
