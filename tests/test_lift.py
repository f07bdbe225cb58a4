"""What does lifting have to keep? Aliases and in-place writes, constants, hooks, modules that it only half knows."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import rgc
from rgc.example import output_difference


class Model(nn.Module):
    """Two convolutions and what stands between them, as ``forward`` says."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.identity, self.dropout = nn.Identity(), nn.Dropout()
        self.weights = nn.Parameter(torch.randn(4))
        self.register_buffer("mask", (torch.rand(4, 1, 1) > 0.5).float())
        self.register_buffer("one", torch.tensor(1.0))
        self.body = forward

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def randomised(model: nn.Module) -> nn.Module:
    """Eval mode, with statistics and scales of both signs that hide nothing."""
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.weight is not None:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


def compiled_equal(model: nn.Module, **options: Any) -> rgc.CompiledModule:
    """The compiled model, after a comparison at other batches and sizes."""
    torch.manual_seed(0)
    model = randomised(model)
    compiled = rgc.compile(model, torch.randn(2, 4, 9, 8), **options)
    for shape in ((2, 4, 9, 8), (1, 4, 9, 8), (5, 4, 9, 8), (3, 4, 7, 6), (0, 4, 9, 8)):
        x = torch.randn(shape)
        with torch.no_grad():
            assert output_difference(model(x.clone()), compiled(x.clone())) < 1e-5, shape
    return compiled


# --- in place ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [0.0, 0.3, 1.0])
def test_a_decayed_activation_that_overwrites_its_input_stays_a_relu(s: float) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        out = m.norm(m.first(x))
        return m.second(s * F.relu(out, inplace=True) + (1 - s) * out)

    compiled = compiled_equal(Model(forward))
    assert compiled.report.tier == "torch.fx" and compiled.report.ops_after["ReLU"] == 1


def _written_through_a_second_name(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    z = y
    z += x
    return m.second(y) + z


def _written_through_a_slice(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    part = y[:, :2]
    part += 1
    return m.second(y)


def _written_through_a_flattened_view(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    flat = y.flatten(1)
    flat += 1
    return m.second(y)


def _one_chunk_changed(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    a, b = y.chunk(2, 1)
    a.add_(1)
    return m.second(y) + torch.cat([a, b], 1)


def _transposed_changed(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    y.transpose(2, 3).add_(3)
    return m.second(y)


def _result_written_with_out(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    torch.mul(y, 2.0, out=y)
    return m.second(y)


def _copied_over(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    y.copy_(x)
    return m.second(y)


@pytest.mark.parametrize("forward", [
    _written_through_a_slice, _written_through_a_flattened_view,
    _one_chunk_changed, _transposed_changed, _result_written_with_out, _copied_over,
])  # fmt: skip
def test_what_symbolic_tracing_cannot_follow_is_exported(forward: Callable[[Any, Tensor], Tensor]) -> None:
    compiled = compiled_equal(Model(forward))
    assert compiled.report.tier == "torch.export" and len(compiled.report.notes) == 1


def _input_read_after_an_inplace_relu(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    return m.second(m.relu(y)) + y


def _relu_on_an_identity(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    F.relu_(m.identity(y))
    return m.second(y)


def _relu_on_a_dropout(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    m.relu(m.dropout(y))
    return m.second(y)


def _arithmetic_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    z = m.identity(y)
    y.add_(x).mul_(2.0).clamp_(-1, 1).masked_fill_(x > 0, 0.5)
    return m.second(y) + z


def _input_overwritten(m: Any, x: Tensor) -> Tensor:
    x.mul_(2)
    x += 1
    return m.second(x)


def _view_of_the_same_form(m: Any, x: Tensor) -> Tensor:
    y = m.norm(m.first(x))
    z = y.view(y.shape)
    z.relu_()
    z.mul_(2)
    return m.second(y)


def _other_chunk_read(m: Any, x: Tensor) -> Tensor:
    a, b = m.first(x).chunk(2, 1)
    a += 1
    b *= a
    return m.second(torch.cat([a, b], 1))


def _sizes_counted_up(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    height = kept = y.shape[2]
    height += 1
    return F.interpolate(m.second(y), (height, kept))


@pytest.mark.parametrize("forward", [
    _input_read_after_an_inplace_relu, _relu_on_an_identity, _relu_on_a_dropout, _arithmetic_in_place,
    _input_overwritten, _view_of_the_same_form, _written_through_a_second_name, _other_chunk_read, _sizes_counted_up,
])  # fmt: skip
def test_an_inplace_write_reaches_every_alias(forward: Callable[[Any, Tensor], Tensor]) -> None:
    assert compiled_equal(Model(forward)).report.tier == "torch.fx"


def test_the_tensor_of_the_caller_is_not_overwritten() -> None:
    x = torch.randn(2, 4, 9, 8)
    before = x.clone()
    compiled = rgc.compile(Model(_input_overwritten).eval(), x)
    compiled(x)
    assert torch.equal(x, before)


# --- constants ---------------------------------------------------------------------------------------------------


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.flip(-1)


def _scaled_at_one(m: Any, x: Tensor) -> Tensor:
    return m.second(m.first(x)) if m.one == 1.0 and m.weights[0] < 100 else x


def _weight_plus_identity(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, m.first.weight + torch.eye(4)[:, :, None, None], padding=1)


def _weight_by_einsum(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, torch.einsum("oihw,po->pihw", m.first.weight, torch.eye(4)), padding=1)


def _weighted_sum_of_branches(m: Any, x: Tensor) -> Tensor:
    return sum(w * conv(x) for w, conv in zip(F.softmax(m.weights, 0), (m.first, m.second), strict=False))  # type: ignore[return-value]


def _masked(m: Any, x: Tensor) -> Tensor:
    return m.second(m.norm(m.first(x * m.mask))) + torch.zeros(4, 1, 1)


@pytest.mark.parametrize("forward", [
    _scaled_at_one, _weight_plus_identity, _weight_by_einsum, _weighted_sum_of_branches, _masked
])  # fmt: skip
def test_what_depends_on_parameters_and_buffers_only_is_a_constant(forward: Callable[[Any, Tensor], Tensor]) -> None:
    compiled = compiled_equal(Model(forward))
    assert compiled.report.tier == "torch.fx" and not compiled.report.notes
    assert set(compiled.report.ops_after) <= {"Conv2d", "mul", "add"}


def _straight(m: Any, x: Tensor) -> Tensor:
    return m.second(m.norm(m.first(x)))


def test_parametrizations_fold_into_the_weight() -> None:
    model = Model(_straight)
    torch.nn.utils.parametrizations.weight_norm(model.first)
    torch.nn.utils.parametrize.register_parametrization(model.second, "weight", Symmetric())
    compiled = compiled_equal(model)
    assert compiled.report.ops_after == {"Conv2d": 2}
    assert "first.weight" in compiled.state_dict()


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_weights_computed_by_old_style_hooks_fold_into_the_weight() -> None:
    model = Model(_straight)
    torch.nn.utils.weight_norm(model.first)
    torch.nn.utils.spectral_norm(model.second)
    model = randomised(model)
    model.first.weight_g.data.mul_(3)  # the weight that the last call computed is out of date
    x = torch.randn(2, 4, 9, 8)
    compiled = rgc.compile(model, x)
    with torch.no_grad():
        assert output_difference(model(x), compiled(x)) < 1e-5
    assert compiled.report.ops_after == {"Conv2d": 2} and not compiled.report.notes
    assert "first.weight" in compiled.state_dict() and not compiled.first._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_hook_of_the_users_beside_one_that_computes_the_weight_is_kept() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4))
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert compiled_equal(model).report.ops_after == {"Conv2d": 1, "BatchNorm2d": 1}


class ManyRanks(nn.Module):
    """One batch norm and one linear layer, called on inputs of two and three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.linear(x)), self.norm(x[:, :, None].expand(-1, -1, 5)), self.linear(x[:, None])


def test_a_layer_called_on_inputs_of_different_ranks_is_right_for_each() -> None:
    model = randomised(ManyRanks())
    x = torch.randn(3, 6)
    compiled = rgc.compile(model, x)
    assert output_difference(model(x), compiled(x)) < 1e-5


def test_merging_a_layer_into_one_of_its_two_uses_leaves_the_other_use_alone() -> None:
    compiled_equal(Model(lambda m, x: m.norm(m.first(m.norm(m.first(x))))))


def test_layers_with_tied_weights_are_folded_each_for_itself() -> None:
    model = Model(_straight)
    model.second.weight = model.first.weight
    compiled_equal(model)


# --- modules -----------------------------------------------------------------------------------------------------


class Renamed(nn.Conv2d):
    """A subclass that changes nothing."""


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Centred(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Shifted(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight, bias) + 1


def test_subclasses_of_layers_are_read_by_what_they_compute() -> None:
    model = nn.Sequential(Renamed(4, 4, 1), nn.BatchNorm2d(4), Doubled(4, 4, 1), Centred(4, 4, 1), Shifted(4, 4, 1))
    assert compiled_equal(model, objective="depth").report.ops_after == {"Conv2d": 1}


def test_a_forward_that_was_replaced_on_the_instance_is_the_one_that_counts() -> None:
    model = Model(_straight)
    model.first.forward = types.MethodType(lambda self, x: F.conv2d(x, self.weight, padding=1) * 3, model.first)  # type: ignore[method-assign]
    assert compiled_equal(model).report.ops_after == {"Conv2d": 2}


def test_batch_norms_by_other_names_fold_too() -> None:
    torchvision_ops = pytest.importorskip("torchvision.ops")
    timm_layers = pytest.importorskip("timm.layers")
    frozen = torchvision_ops.FrozenBatchNorm2d(4)
    for tensor in (frozen.weight, frozen.bias, frozen.running_mean):
        nn.init.normal_(tensor)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(4))
    activated = timm_layers.BatchNormAct2d(4)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), frozen, synchronised, activated, nn.Conv2d(4, 4, 1))
    assert compiled_equal(model).report.ops_after == {"Conv2d": 2, "ReLU": 1}


def test_a_batch_norm_without_statistics_normalises_by_the_batch_as_before() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    x = torch.randn(3, 4, 9, 8)
    compiled = rgc.compile(model, x)
    torch.testing.assert_close(compiled(x), model(x))
    assert compiled.report.ops_after["BatchNorm2d"] == 1


class Calls(nn.Module):
    """Counts and doubles, as a forward hook."""

    count = 0

    def forward(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        Calls.count += 1
        return output * 2


@pytest.mark.parametrize("place", ["0.0", "0", ""])
def test_a_forward_hook_is_still_called(place: str) -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model.get_submodule(place).register_forward_hook(Calls())
    compiled = compiled_equal(model)
    before = Calls.count
    compiled(torch.randn(1, 4, 9, 8))
    assert Calls.count == before + 1


def test_a_hook_before_forward_is_still_called() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert compiled_equal(model).report.ops_after == {"Conv2d": 1, "BatchNorm2d": 1}


def test_layers_called_with_named_arguments_are_known_too() -> None:
    model = Model(lambda m, x: F.relu(input=m.norm(input=m.first(input=x))))
    assert compiled_equal(model).report.ops_after == {"Conv2d": 1, "ReLU": 1}


class Sequence(nn.Module):
    """Layers that the table does not know, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(50, 8), nn.Linear(8, 50)
        self.out.weight = self.embed.weight
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.lstm(self.lstm(self.embed(tokens))[0])[0]
        return self.out(self.encoder(self.attention(x, x, x)[0]))  # type: ignore[no-any-return]


def test_layers_that_rgc_does_not_know_are_kept_whole_and_shared_weights_stay_shared() -> None:
    model = Sequence().eval()
    compiled = rgc.compile(model, torch.randint(0, 50, (2, 7)))
    assert compiled.report.tier == "torch.fx"
    for shape in ((2, 7), (3, 4)):
        tokens = torch.randint(0, 50, shape)
        torch.testing.assert_close(compiled(tokens), model(tokens))
    assert compiled.embed.weight is compiled.out.weight
    twice = copy.deepcopy(compiled).double()
    assert twice.embed.weight is twice.out.weight
    expected = sum(p.numel() for p in model.parameters())
    assert compiled.report.params_before == compiled.report.params_after == expected
    assert set(compiled.state_dict()) == set(model.state_dict())


class Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)


@pytest.mark.parametrize("forward", [
    lambda m, x: m.second(Clamp.apply(m.first(x))),
    lambda m, x: torch.utils.checkpoint.checkpoint(m.first, x, use_reentrant=False) + 1,
    lambda m, x: F.avg_pool2d(m.first(x), 3, 2, 1, True, False) + x.mean((2, 3), keepdim=True),
    lambda m, x: m.second(m.first(x).reshape(x.shape[0], 2, 2, x.shape[2] * x.shape[3]).flatten(1, 2).view(x.shape)),
    lambda m, x: m.second(x.to(m.second.weight.dtype)),
    lambda m, x: m.norm(m.first(x)).to(torch.float32).float(),
    lambda m, x: m.first(x) * x.sum().item(),
    lambda m, x: torch.cat([m.first(x), torch.zeros(x.shape[0], 1, x.shape[2], x.shape[3], device=x.device)], 1),
], ids=[
    "an autograd function", "a checkpoint", "pooling with every option", "reshapes", "a cast to the dtype of a weight",
    "casts to single precision", "a number read from a tensor", "a tensor made inside",
])  # fmt: skip
def test_other_code_in_forward_is_kept(forward: Callable[[Any, Tensor], Tensor]) -> None:
    compiled_equal(Model(forward))


def test_a_cast_that_the_user_wrote_is_kept_in_a_half_precision_model() -> None:
    model = randomised(Model(lambda m, x: m.second(m.first(x).to(torch.float32).pow(2).to(x.dtype)))).half()
    compiled = rgc.compile(model, torch.randn(1, 4, 9, 8).half())
    assert torch.float32 in [arg for node in compiled.graph.nodes for arg in node.args]


def test_an_output_that_is_left_open_is_no_output() -> None:
    compiled = compiled_equal(Model(lambda m, x: m.second(torch.add(m.first(x), x, out=None))), objective="depth")
    assert "add" not in compiled.report.ops_after


# --- functions and their other names ---------------------------------------------------------------------------------


def _pooled_and_upsampled(m: Any, x: Tensor) -> Tensor:
    x = F.max_pool2d(m.first(x), 3, stride=1, padding=1)
    x = torch.max_pool2d(x, (2, 3), dilation=1, ceil_mode=True)
    x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)
    x = F.interpolate(x, size=(9, 7))
    return F.interpolate(m.second(x), scale_factor=(1.5, 2.5), mode="bicubic")


def _clamped(m: Any, x: Tensor) -> Tensor:
    x = torch.clamp(m.first(x), -1, 2).clamp_min(-0.5).clamp(max=1.5)
    x = torch.clamp_max(x, 1.0).clip(-0.4, None)
    x = (x**2).abs() + torch.pow(x, 2) + x.square().sqrt() + abs(x)
    return m.second(torch.exp(x.clamp_(0.1)))


@pytest.mark.parametrize("tier", ["torch.fx", "torch.export"])
@pytest.mark.parametrize(
    ("forward", "kinds"),
    [
        (_pooled_and_upsampled, {"MaxPool": 2, "Upsample": 3}),
        (_clamped, {"clamp": 6, "square": 3, "abs": 2, "sqrt": 1, "exp": 1}),
    ],
)
def test_functions_methods_and_overloads_are_one_operator(
    forward: Callable[[Any, Tensor], Tensor], kinds: dict[str, int], tier: str
) -> None:
    def on_the_tier(m: Any, x: Tensor) -> Tensor:
        if tier == "torch.export":
            x = x.clone()
            x[:, :1].neg_()  # through a view, which symbolic tracing does not follow
        return forward(m, x)

    report = compiled_equal(Model(on_the_tier)).report
    assert report.tier == tier
    for kind, count in kinds.items():
        assert sum(n for name, n in report.ops_before.items() if name.startswith(kind)) == count


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.second(F.max_pool2d(m.first(x), 2, return_indices=True)[0]),
        lambda m, x: m.second(F.interpolate(m.first(x), scale_factor=2.0, mode="bilinear", antialias=True)),
        lambda m, x: m.second(F.interpolate(m.first(x), size=x.shape[2:])),
        lambda m, x: m.second(torch.clamp(m.first(x), min=torch.linspace(-1, 1, 4).view(4, 1, 1))),
        lambda m, x: m.second(m.first(x) ** 3),
        lambda m, x: m.second(1.5 ** m.first(x)),
        lambda m, x: m.second(m.first(x).clamp(min=x.mean())),
        lambda m, x: m.second(m.first(x) * x.shape[2] ** 2),
        lambda m, x: m.second(m.first(x)) * (x > 0).int().abs(),
    ],
)
def test_other_forms_of_them_stay_as_they_are(forward: Callable[[Any, Tensor], Tensor]) -> None:
    compiled = compiled_equal(Model(forward))
    names = {"MaxPool2d", "Upsample", "square"}
    assert not names & set(compiled.report.ops_after)


@fx.wrap
def shifted(x: Tensor, by: list[int]) -> Tensor:
    """Changes its own copy of a list, as a function of torchvision does."""
    by = by.copy()
    by[0] += 1
    return x.roll(by, dims=[2, 3])


def test_a_wrapped_function_may_change_its_lists() -> None:
    compiled = compiled_equal(Model(lambda m, x: shifted(m.first(x), [1, 2])))
    assert compiled.report.tier == "torch.fx" and compiled.report.ops_after["roll"] == 1


def test_a_slice_may_end_at_a_size() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        rows, columns = x.shape[2:]
        return m.first(x)[:, :, : rows - 2] + m.weights.view(1, 4, 1, 1).expand(1, 4, 1, 40)[..., 1 : columns + 1]

    model = Model(forward).eval()
    compiled = rgc.compile(model, torch.randn(1, 4, 9, 8))
    assert compiled.report.tier == "torch.fx" and not compiled.report.fixed_size
    assert "slice" not in compiled.report.ops_after
    for shape in ((1, 4, 9, 8), (3, 4, 12, 11)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), model(x))


# --- functions of somebody else that have a name of PyTorch's --------------------------------------------------------


def relu(x: Tensor) -> Tensor:
    return x.clamp(-3.0, 100.0)


def flatten(x: Tensor) -> Tensor:
    return x.abs()


def add_(x: Tensor, y: Tensor, inplace: bool = False) -> Tensor:
    return x * y if inplace else x - y


for _ours in ("relu", "flatten", "add_"):
    fx.wrap(_ours)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.second(relu(m.first(x))),
        lambda m, x: m.second(flatten(m.first(x))),
        lambda m, x: m.second(add_(m.first(x), x)),
        lambda m, x: m.second(add_(m.first(x), x, inplace=True)),
    ],
)
def test_a_function_of_somebody_else_is_not_pytorchs_of_that_name(forward: Callable[[Any, Tensor], Tensor]) -> None:
    compiled = compiled_equal(Model(forward))
    assert not {"ReLU", "add"} & set(compiled.report.ops_after)
    model, x = Model(forward).eval(), 1e3 * torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(rgc.compile(model, x / 1e3)(x), model(x), rtol=1e-4, atol=1e-2)


def test_a_copy_that_only_a_stack_read_does_not_take_what_it_copied_along() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        copy = x.clone()
        mean = torch.stack([copy, copy], 1).mean(1)
        return mean * torch.sigmoid(x)

    assert compiled_equal(Model(forward)).report.tier == "torch.fx"
