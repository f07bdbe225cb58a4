"""Are the activations of a model found, each as the layer that is the same function?"""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgc.activation_sites import CALLS, call_sites, forwards, hidden_callers, is_activation, is_in_place, layer_sites
from rgc.nn import DecayedActivation


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    "function",
    [
        *(getattr(F, name) for name in CALLS if name != "log_sigmoid"), F.logsigmoid,
        torch.relu, torch.tanh, torch.sigmoid, torch.selu, torch.relu_,
        lambda x: x.relu(), lambda x: x.tanh(), lambda x: x.sigmoid(), lambda x: x.relu_(), lambda x: x.tanh_(),
        lambda x: x.clamp(min=0), lambda x: x.clamp(0.0), lambda x: torch.clamp(x, min=0), lambda x: x.clamp_min(0),
        lambda x: x.clip(0, None), lambda x: F.leaky_relu(x, 0.3), lambda x: F.leaky_relu(x, negative_slope=0.3),
        lambda x: F.elu(input=x, alpha=0.5), lambda x: F.gelu(x, approximate="tanh"), lambda x: F.softplus(x, 2.0, 3.0),
        lambda x: F.hardtanh(x, -0.5, 0.5, True), lambda x: F.celu(x, 0.7, inplace=True),
        lambda x: F.softshrink(x, 0.1), lambda x: F.hardshrink(x, lambd=0.1),
    ],
)  # fmt: skip
def test_a_call_is_the_layer_that_is_found_for_it(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(50)
    model = nn.Sequential(Calls(function))
    [site] = call_sites(forwards(model))
    assert torch.equal(site.layer(x.clone()), function(x.clone()))
    assert site.path.startswith("0.")
    assert site.node is not None
    y = x.clone()
    result = function(y)
    assert is_in_place(site.node) == (result.data_ptr() == y.data_ptr())


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clamp(0, 6), lambda x: x.clamp(min=0.1), lambda x: x.clamp(max=0), lambda x: torch.abs(x),
        lambda x: F.leaky_relu(x, float(x.dim()) if isinstance(x, Tensor) else x.mean()), lambda x: x.softmax(-1),
        lambda x: operator.mul(x, 2), lambda x: x.clamp(min=x.mean()),
    ],
)  # fmt: skip
def test_what_is_no_activation_or_has_computed_arguments_is_none(function: Callable[[Tensor], Tensor]) -> None:
    assert list(call_sites(forwards(Calls(function)))) == []


def test_layers_are_pytorchs_and_timms_and_not_those_that_compute_something_else() -> None:
    class Own(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs()

    class Kept(nn.ReLU):
        pass

    assert is_activation(Kept()) and is_activation(timm.layers.activations.QuickGELU())
    assert not is_activation(Own()) and not is_activation(nn.Softmax(-1)) and not is_activation(nn.Linear(2, 2))
    model = nn.Sequential(Kept(), DecayedActivation(nn.Tanh()), nn.Sequential(timm.layers.activations.HardSwish()))
    assert [site.path for site in layer_sites(model)] == ["0", "2.0"]
    assert layer_sites(DecayedActivation(nn.Tanh())) == []


def test_a_forward_is_told_by_itself_whatever_stands_around_it() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Calls(F.relu)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if x.sum() > 0 else torch.tanh(x)

    traced = forwards(Around())
    assert [site.path for site in call_sites(traced)] == ["inner.relu"]
    [(path, hidden)] = hidden_callers(traced)
    assert path == "" and hidden.reason.startswith("TraceError")


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = timm.layers.BatchNormAct2d(3).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert forwards(model)[""].reason == "its forward depends on whether it trains"
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
