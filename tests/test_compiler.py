"""Does compiling leave everything else as it was, say what it did, and refuse in plain words?"""

from __future__ import annotations

import contextlib
import copy
import pickle
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rgc
from rgc.errors import InputError, NotEquivalentError, RgcError
from rgc.testing import randomize

X = torch.randn(2, 4, 9, 8)


class Model(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 1)
        self.first.bias.requires_grad_(False)
        nn.init.normal_(self.norm.running_mean)
        nn.init.normal_(self.norm.weight)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.body = forward or (lambda m, x: m.second(m.norm(m.first(x))))

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def _keeps_a_feature(m: Any, x: Tensor) -> Tensor:
    m.feature = m.first(x)
    m.calls += 1
    return m.second(m.norm(m.feature))


def _is_random(m: Any, x: Tensor) -> Tensor:
    m.feature = m.first(x)
    return m.feature + torch.rand_like(x)


def _raises(m: Any, x: Tensor) -> Tensor:
    raise ZeroDivisionError("the model's own fault")


def _state_of(model: nn.Module) -> Any:
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "identities": [id(tensor) for tensor in [*model.parameters(), *model.buffers()]],
        "gradients": [parameter.requires_grad for parameter in model.parameters()],
        "training": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [dict(module._forward_hooks) for module in model.modules()],
    }


CASES: dict[str, tuple[nn.Module, Any, dict[str, Any]]] = {
    "success": (Model(), X, {}),
    "success in another dtype": (Model(), X, {"dtype": torch.float64}),
    "a model that writes to itself": (Model(_keeps_a_feature), X, {}),
    "export": (Model(lambda m, x: m.first(x) if x.dim() == 4 else x), X, {}),
    "control flow on values": (Model(lambda m, x: m.first(x) if x.sum() > -1e9 else x), X, {}),
    "an input that does not fit": (Model(), torch.randn(1, 5, 9, 8), {}),
    "an error of the model": (Model(_raises), X, {}),
    "random outputs": (Model(_is_random), X, {}),
    "an unknown pass": (Model(), X, {"passes": "no_such_pass"}),
    "an unknown target": (Model(), X, {"target": "abacus"}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_model_and_the_generators_are_left_as_they_were_after(name: str) -> None:
    model, example, options = CASES[name]
    model = model.eval()
    model.second.register_forward_hook(lambda *_: None)
    before, generator, input_before = _state_of(model), torch.random.get_rng_state(), example.clone()
    python_state, numpy_state = random.getstate(), np.random.get_state()[1].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with contextlib.suppress(RgcError):
            rgc.compile(model, example, **options)
    after = _state_of(model)
    tensors = before.pop("tensors")
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in after.pop("tensors").items())
    assert after == before
    assert torch.equal(generator, torch.random.get_rng_state()) and torch.equal(example, input_before)
    assert python_state == random.getstate() and np.array_equal(numpy_state, np.random.get_state()[1])


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("table", torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize(("model", "example", "options", "message"), [
    (lambda: "model.pt", X, {}, "rgc compiles a torch.nn.Module, not str"),
    (lambda: Model().train(), X, {}, "the model (Model) is in training mode; call model.eval() first"),
    (lambda: Model().eval(), None, {}, "Model suggests no example_inputs(); pass an example (--input 1x3x224x224)"),
    (lambda: Model().eval(), X, {"objective": "beauty"},
     "unknown objective 'beauty'; choose one of latency, depth, macs, params"),
    (lambda: Model().eval(), X, {"verify": "no"}, "unknown verification level 'no'; choose one of quick, full"),
    (lambda: Model(_raises).eval(), X, {}, "Model does not run on an input of 2x4x9x8: the model's own fault"),
    (lambda: Half().eval(), X, {},
     "the model mixes the dtypes float32, float64; convert it to one first, e.g. model.float()"),
])  # fmt: skip
def test_what_cannot_be_compiled_is_refused_in_one_line(
    model: Callable[[], Any], example: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        rgc.compile(model(), example, **options)
    assert str(caught.value) == message


def test_a_submodule_in_training_mode_is_refused_by_name() -> None:
    model = Model().eval()
    model.norm.train()
    with pytest.raises(InputError, match=r"the submodule 'norm' \(BatchNorm2d\) is in training mode"):
        rgc.compile(model, X)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is (deprecated|not supported)")
def test_torchscript_is_refused() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2)).eval())
    with pytest.raises(InputError, match="a TorchScript module cannot be traced; compile the eager model"):
        rgc.compile(scripted, torch.randn(1, 2))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_parameters_without_values_are_refused() -> None:
    with pytest.raises(InputError, match="uninitialized parameter"):
        rgc.compile(nn.Sequential(nn.LazyConv2d(4, 3)).eval(), X)


def test_the_report_counts_the_parameters_of_the_model_and_of_the_result() -> None:
    model = Model().eval()
    report = rgc.compile(model, X, passes=["fold_batchnorm"]).report
    assert report.params_before == sum(parameter.numel() for parameter in model.parameters()) == 148 + 8 + 20
    assert report.params_after == 148 + 20
    assert (report.tier, report.notes, report.fixed_size) == ("torch.fx", [], False)


def test_a_model_that_runs_in_its_own_dtype_only_is_proved_in_that_and_says_so() -> None:
    single = torch.eye(4)[:, :, None, None]
    model = Model(lambda m, x: nn.functional.conv2d(m.second(m.norm(m.first(x))), single)).eval()
    compiled = rgc.compile(model, X)
    assert compiled.report.max_error is None and compiled.report.ops_after["BatchNorm2d"] == 0
    (note,) = compiled.report.notes
    assert note.startswith("the model does not run in float64 (") and note.endswith("); proved in float32 instead")
    torch.testing.assert_close(compiled(X), model(X), rtol=1e-4, atol=1e-4)


SINGLE = torch.eye(8)


class InSingle(nn.Module):
    """Runs in float32 only; and is untraceable as a whole, if it ``branches``."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.part(x) + self.part(x)
        if self.branches and x.numpy().dtype == "float32" and float(y.detach().sum()) > 1e9:
            return -y
        return nn.functional.linear(y, SINGLE)


@pytest.mark.parametrize("branches", [False, True])
def test_a_model_that_runs_in_single_precision_only_keeps_no_weight_in_float64(branches: bool) -> None:
    model = randomize(InSingle(branches))
    x = torch.randn(2, 3, 8, 8)
    compiled = rgc.compile(model, x, objective="depth")
    assert compiled.report.tier == ("submodules" if branches else "torch.fx")
    assert "does not run in float64" in compiled.report.notes[0] and compiled.report.max_error is None
    assert any(firing.rewrite == "fold_batchnorm" for firing in compiled.report.rewrites)
    assert {tensor.dtype for tensor in compiled.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


class Spectral(nn.Module):
    """A filter of complex weights in the frequencies of the last axis, as in a Fourier layer."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(3, 1, 5, dtype=torch.complex64))
        self.rest = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.rest(torch.fft.irfft(torch.fft.rfft(x) * (self.filter * 2), n=x.shape[-1])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_complex_weights_stay_complex_in_the_precision_of_the_result(dtype: torch.dtype) -> None:
    model = randomize(Spectral())
    x = torch.randn(2, 3, 8, 8)
    compiled = rgc.compile(model, x, dtype=dtype)
    assert compiled.report.max_error is not None and not compiled.report.failures
    assert [each.rewrite for each in compiled.report.rewrites] == ["fold_batchnorm"]
    assert compiled(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(compiled(x.to(dtype)).float(), model(x), rtol=1e-4, atol=1e-4)


def test_a_dtype_that_the_model_does_not_run_in_is_refused() -> None:
    with pytest.raises(InputError, match="the model does not run in bfloat16 on an input of 2x3x8x8: .*"):
        rgc.compile(randomize(Spectral()), torch.randn(2, 3, 8, 8), dtype=torch.bfloat16)


def test_an_empty_model_compiles_to_nothing() -> None:
    compiled = rgc.compile(nn.Sequential().eval(), X)
    assert torch.equal(compiled(X), X) and compiled.report.ops_after.total() == 0


@rgc.rewrite(lambda x, relu: relu(x))
def lose_relu(x: rgc.Value, relu: rgc.Activation) -> rgc.Value:
    """Wrong on purpose."""
    return rgc.Identity("lost")(x)


def test_a_wrong_rewrite_is_undone_and_reported_or_stops_a_strict_compilation() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()).eval()
    report = rgc.compile(model, X, passes=[lose_relu]).report
    assert [failure.rewrite for failure in report.failures] == ["lose_relu"] and report.ops_after["ReLU"] == 1
    with pytest.raises(NotEquivalentError, match="lose_relu at 1"):
        rgc.compile(model, X, passes=[lose_relu], strict=True)


class Narrow(nn.Module):
    """Casts to the dtype of the proof by name: only the model as a whole keeps its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.dtype != torch.float16 else self.conv(x) * 2  # type: ignore[no-any-return]


def test_a_trace_that_holds_in_float64_only_gives_way_to_the_model_itself() -> None:
    model = Narrow().eval().half()
    x = X.half()
    compiled = rgc.compile(model, x)
    assert compiled.report.tier == "submodules"
    assert any(
        note.startswith("torch.export: the compiled model differs from the original by")
        for note in compiled.report.notes
    )
    assert torch.equal(compiled(x), model(x))


def test_a_plan_compiles_another_checkpoint_with_the_same_rewrites() -> None:
    model, other = Model().eval(), Model().eval()
    compiled = rgc.compile(model, X).plan.apply(other.state_dict())
    torch.testing.assert_close(compiled(X), other(X), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="the checkpoint does not fit the model"):
        compiled.plan.apply({})


# --- what a call of the result costs -----------------------------------------------------------------------------


def test_a_call_of_the_result_goes_straight_to_pytorch() -> None:
    layers = {"first": nn.Conv2d(4, 4, 3), "between": nn.ReLU(), "second": nn.Conv2d(4, 4, 3)}
    compiled = rgc.compile(nn.Sequential(OrderedDict(layers)).eval(), X)
    again = pickle.loads(pickle.dumps(compiled))
    for module in (compiled, copy.deepcopy(compiled), again):
        assert type(module).__call__ is nn.Module.__call__, "torch.fx puts a wrapper around it"
        module.recompile()
        assert type(module).__call__ is nn.Module.__call__
        assert type(module).first.__get__(module) is module._modules["first"] is module.first
        torch.testing.assert_close(module(X), compiled(X))


def test_layers_of_the_result_can_be_exchanged_and_deleted_as_in_any_module() -> None:
    compiled = rgc.compile(Model().eval(), X)
    twin = copy.deepcopy(compiled)
    compiled.first = nn.Identity()
    assert torch.equal(compiled(X), X) and isinstance(compiled.first, nn.Identity)
    assert not torch.equal(twin(X), X), "a copy has layers of its own"
    del compiled.first
    assert not hasattr(compiled, "first")
    with pytest.raises(AttributeError, match="object has no attribute 'first'"):
        compiled(X)


def test_hooks_on_the_result_are_called() -> None:
    compiled = rgc.compile(Model().eval(), X)
    seen: list[str] = []
    compiled.register_forward_pre_hook(lambda module, args: seen.append("before"))
    compiled.first.register_forward_hook(lambda module, args, result: seen.append("layer"))
    compiled.register_forward_hook(lambda module, args, result: seen.append("after"))
    compiled(X)
    assert seen == ["before", "layer", "after"]


# --- a difference on a user's own data -----------------------------------------------------------------------------


@rgc.rewrite(lambda x, clamp: clamp(x), weighed=False)
def lose_wide_clamp(x: rgc.Value, clamp: rgc.Activation) -> rgc.Value:
    """Wrong on purpose, where values lie beyond the clamp."""
    rgc.require(clamp.name == "hardtanh", "not a clamp")
    return rgc.Identity("lost")(x)


def clamped() -> nn.Module:
    layers = {"first": nn.Conv2d(4, 4, 3), "norm": nn.BatchNorm2d(4), "clamp": nn.Hardtanh(-1e6, 1e6)}
    return randomize(nn.Sequential(OrderedDict({**layers, "last": nn.Conv2d(4, 4, 1)})))


def data_that_reach_it() -> Tensor:
    data = torch.randn(7, 4, 9, 8, generator=torch.Generator().manual_seed(1))
    data[4] *= 1e9
    return data


def test_bisect_names_the_firing_its_place_and_the_sample_on_which_it_shows() -> None:
    model, data = clamped(), data_that_reach_it()
    before = copy.deepcopy(model.state_dict())
    found = rgc.bisect(model, X, data, passes=["default", lose_wide_clamp])
    assert not found.equal and found.culprit == "lose_wide_clamp at clamp" and found.firing is not None
    assert found.firing.sources == ("clamp",) and 1 <= found.number <= found.firings
    assert found.sample == "sample 4 of the data" and found.precision == "float64"
    assert found.before < 1e-10 == found.allowed and found.after > 1
    assert (
        rgc.bisect(model, X, data).equal and rgc.bisect(model, X, data[:4], passes=["default", lose_wide_clamp]).equal
    )
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_data_join_the_proof_and_what_they_undo_stays_undone_in_the_plan() -> None:
    model, data = clamped(), data_that_reach_it()
    compiled = rgc.compile(model, X, passes=["default", lose_wide_clamp], data=data)
    (failure,) = compiled.report.failures
    assert (failure.rewrite, failure.where) == ("lose_wide_clamp", "clamp")
    assert "of the data)" in failure.reason and compiled.report.ops_after["Hardtanh"] == 1
    applied = compiled.plan.apply(model.state_dict())
    assert applied.report.ops_after["Hardtanh"] == 1 and applied.code == compiled.code
    wrong = rgc.compile(model, X, passes=["default", lose_wide_clamp])
    assert rgc.verify(model, wrong, X).equal
    assert "of the data)" in rgc.verify(model, wrong, X, data=data).reason
    assert rgc.verify(model, compiled, X, data=data).equal


@rgc.rewrite(lambda x, conv, relu: relu(conv(x)), weighed=False)
def shift_there_and_back(x: rgc.Value, conv: rgc.Conv, relu: rgc.Activation) -> rgc.Value:
    """Equal in the reals, and ruinous in float32."""
    assert conv.bias is not None
    rgc.require(float(conv.bias.abs().max()) < 1e3, "shifted already")
    rgc.require(all(getattr(conv, name) is not None for name in ("stride", "padding", "dilation")), "has a geometry")
    one = torch.ones(conv.out_channels, dtype=torch.float64)
    return relu(rgc.Scale(one, -1e5 * one, 2)(replace(conv, bias=conv.bias.double() + 1e5)(x)))


def test_a_rewrite_that_only_the_deployed_dtype_shows_to_be_wrong_is_found_and_the_rest_kept() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)))
    report = rgc.compile(model, X, passes=["fold_batchnorm", shift_there_and_back]).report
    (failure,) = report.failures
    assert failure.rewrite == "shift_there_and_back" and "in float32" in failure.reason
    assert report.tier == "torch.fx" and [firing.rewrite for firing in report.rewrites] == ["fold_batchnorm"]


class BurnedIn(nn.Module):
    """Its forward looks at values only where they are real, so a trace knows one of its ways."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return y * 2 if type(x) is Tensor and float(x.max()) > 1e6 else y


def test_a_way_that_the_trace_does_not_know_is_the_fault_of_no_firing() -> None:
    model, data = randomize(BurnedIn()), data_that_reach_it()
    found = rgc.bisect(model, X, data)
    assert not found.equal and found.firing is None and found.culprit == "the trace itself (torch.fx)"
    assert found.sample == "sample 4 of the data" and found.firings > 0
    compiled = rgc.compile(model, X, data=data)
    assert compiled.report.tier == "submodules", "the next tier is tried, and the last is the model itself"
    assert torch.equal(compiled(data), model(data))


def test_data_of_a_size_that_the_result_does_not_take_are_refused() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 42, 2)))
    with pytest.raises(InputError, match="does not run on sample"):
        rgc.bisect(model, X, torch.randn(3, 4, 9, 9))
    model = randomize(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)))
    with pytest.raises(InputError, match=r"the data are of 4x9x9, .* holds at the example's size only, which is 4x9x8"):
        rgc.bisect(model, X, torch.randn(3, 4, 9, 9), passes="all", objective="depth")


def test_a_culprit_inside_a_part_that_is_compiled_in_place_is_named_by_its_whole_path() -> None:
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = clamped()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.part(x)
            return y * 2 if float(y.detach().sum()) > 0 else y

    model = Untraceable().eval()
    found = rgc.bisect(model, X, data_that_reach_it(), passes=["default", lose_wide_clamp])
    assert found.tier == "submodules" and found.culprit == "lose_wide_clamp at part.clamp"
    report = rgc.compile(model, X, passes=["default", lose_wide_clamp], data=data_that_reach_it()).report
    assert [(each.rewrite, each.where) for each in report.failures] == [("lose_wide_clamp", "part.clamp")]
    assert any(firing.where == "part.norm" for firing in report.rewrites), "the rest of the part stays compiled"


def _folds_beyond_float16() -> nn.Module:
    """A convolution and a batch norm that float16 holds, and whose product it does not."""
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    with torch.no_grad():
        model[0].weight.fill_(400.0)
        model[0].weight[:, 1:].fill_(-200.0)
        model[0].bias.zero_()
        model[1].running_mean.zero_()
        model[1].running_var.fill_(0.0)
        model[1].weight.fill_(1.0)
    return model.half()


def test_a_merge_whose_weights_leave_the_range_of_float16_is_refused_by_name() -> None:
    x = torch.randn(2, 3, 6, 6).half() / 1000
    report = rgc.compile(_folds_beyond_float16(), x).report
    assert not [firing for firing in report.rewrites if firing.rewrite == "fold_batchnorm"] and not report.failures
    (refused,) = [each for each in report.refusals if each.rewrite == "fold_batchnorm"]
    assert refused.reason == "of the result, 1.26e+05 is beyond the range of float16 (at most 65504)"
    assert report.ops_after["BatchNorm2d"] == 1
    kept = rgc.compile(_folds_beyond_float16(), x, dtype=torch.bfloat16).report
    assert kept.ops_after["BatchNorm2d"] == 0  # whose range is that of float32


def test_a_model_whose_own_weights_leave_the_range_is_refused_by_name() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(4, 4)).eval()
    with torch.no_grad():
        model[1].weight.fill_(1e5)
    with pytest.raises(NotEquivalentError, match=r"1: 1e\+05 is beyond the range of float16 .*; choose bfloat16 or"):
        rgc.compile(model, torch.randn(1, 4), dtype=torch.float16)


def test_a_merge_whose_weights_fade_in_float16_is_refused_by_name_where_it_matters() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False)
    ).eval()
    with torch.no_grad():
        for layer, factor in zip((model[0], model[1], model[3]), (1e-3, 3e-4, 1e4), strict=True):
            layer.weight.mul_(factor)
    x = torch.randn(1, 3, 8, 8) * 100
    assert rgc.compile(model, x, objective="depth").report.ops_after["Conv2d"] == 2
    report = rgc.compile(model, x, objective="depth", dtype=torch.float16).report
    reasons = [each.reason for each in report.refusals if each.rewrite == "merge_pointwise"]
    assert report.ops_after["Conv2d"] == 3 and not report.failures
    assert "of the result, float16 keeps fewer than 8 bits of the weights of a channel" in reasons[0]
