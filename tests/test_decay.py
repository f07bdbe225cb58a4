"""Do the decaying activations fade exactly from the activation to the identity, and do their errors help?"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import symbolic_trace

import rgc
from rgc.errors import InputError
from rgc.nn import DecayedActivation, DecayedLeakyReLU, SeriesActivation, set_decay

ACTIVATIONS = [nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.Sequential(nn.Tanh(), nn.ELU())]


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: type(activation).__name__)
def test_at_zero_it_is_the_activation_bit_for_bit(activation: nn.Module, x: torch.Tensor) -> None:
    assert torch.equal(DecayedActivation(activation, 0.0)(x), activation(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: type(activation).__name__)
def test_at_one_it_is_the_identity_bit_for_bit(activation: nn.Module, dtype: torch.dtype, x: torch.Tensor) -> None:
    x = x.to(dtype)
    y = DecayedActivation(activation, 1.0).to(dtype)(x)
    assert y.dtype == dtype
    assert torch.equal(y, x)


def test_in_between_it_is_the_blend(x: torch.Tensor) -> None:
    y = DecayedActivation(nn.GELU(), 0.25)(x)
    torch.testing.assert_close(y, 0.75 * F.gelu(x) + 0.25 * x)


@pytest.mark.parametrize("decay", [0.0, 0.25, 1.0])
def test_the_leaky_relu_form_is_the_same_function_as_the_blend(decay: float, x: torch.Tensor) -> None:
    torch.testing.assert_close(DecayedLeakyReLU(decay)(x), DecayedActivation(nn.ReLU(), decay)(x))


def test_the_leaky_relu_form_is_a_relu_at_zero_and_the_identity_at_one(x: torch.Tensor) -> None:
    assert torch.equal(DecayedLeakyReLU(0.0)(x), F.relu(x))
    assert torch.equal(DecayedLeakyReLU(1.0)(x), x)


@pytest.mark.parametrize("module", [DecayedActivation(nn.ReLU(), 0.5), DecayedLeakyReLU(0.5), SeriesActivation(3)])
def test_the_input_is_not_overwritten(module: nn.Module, x: torch.Tensor) -> None:
    before = x.clone()
    module(x)
    assert torch.equal(x, before)


def test_the_same_value_passes_through_twice_in_a_residual(x: torch.Tensor) -> None:
    y = x + DecayedActivation(nn.ReLU(), 0.5)(x)
    torch.testing.assert_close(y, x + 0.5 * F.relu(x) + 0.5 * x)


@pytest.mark.parametrize("module", [DecayedActivation(nn.ReLU(), 0.25), DecayedLeakyReLU(0.25), SeriesActivation(3)])
def test_it_traces_under_torch_fx(module: nn.Module, x: torch.Tensor) -> None:
    module.eval()
    assert torch.equal(symbolic_trace(module)(x), module(x))


@pytest.mark.parametrize("module", [DecayedActivation(nn.ReLU(), 0.25), DecayedLeakyReLU(0.25)])
def test_the_gradient_reaches_the_input_but_not_the_decay(module: nn.Module, x: torch.Tensor) -> None:
    x.requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(x > 0, 1.0, 0.25))
    assert list(module.parameters()) == []


@pytest.mark.parametrize("kind", [lambda value: DecayedActivation(nn.ReLU(), value), DecayedLeakyReLU])
def test_the_decay_is_saved_and_restored_with_the_state_dict(kind: type[DecayedLeakyReLU]) -> None:
    saved = kind(0.75).state_dict()
    assert list(saved) == ["decay"]
    restored = kind(0.0)
    restored.load_state_dict(saved)
    assert restored.decay.item() == 0.75
    assert restored.decay.shape == ()


def test_the_decay_moves_with_the_module() -> None:
    assert DecayedActivation(nn.ReLU()).double().decay.dtype == torch.float64
    assert DecayedActivation(nn.ReLU()).to("meta").decay.is_meta


@pytest.mark.parametrize(
    ("activation", "where"),
    [
        (nn.ReLU(inplace=True), r"activation is ReLU\(inplace=True\)"),
        (nn.Sequential(nn.Tanh(), nn.SiLU(inplace=True)), r"activation\.1 is SiLU\(inplace=True\)"),
    ],
)
def test_an_activation_that_works_in_place_is_refused_by_name(activation: nn.Module, where: str) -> None:
    with pytest.raises(InputError, match=where + r", which overwrites the input .* build it with inplace=False"):
        DecayedActivation(activation)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_a_decay_outside_zero_to_one_is_refused(value: float) -> None:
    message = "decay must be between 0 .* and 1 .*, got"
    fading, leaky = DecayedActivation(nn.ReLU(), 0.5), DecayedLeakyReLU(0.5)
    for set_it in (fading.set_decay, leaky.set_decay, DecayedLeakyReLU, lambda v: DecayedActivation(nn.ReLU(), v)):
        with pytest.raises(InputError, match=message):
            set_it(value)
    assert fading.decay == leaky.decay == 0.5


def test_set_decay_sets_every_decaying_activation_of_a_model(x: torch.Tensor) -> None:
    model = nn.Sequential(DecayedActivation(nn.ReLU()), nn.Sequential(DecayedLeakyReLU()), nn.Identity())
    set_decay(model, 1.0)
    assert torch.equal(model(x), x)


def test_set_decay_refuses_a_model_without_decaying_activations() -> None:
    with pytest.raises(InputError, match="set_decay: Sequential has no decaying activation; build it with rgc.nn"):
        set_decay(nn.Sequential(nn.ReLU()), 1.0)


def test_a_series_activation_is_a_depthwise_convolution_of_the_relu(x: torch.Tensor) -> None:
    series = SeriesActivation(3, order=2).eval()
    shifted = nn.Conv2d(3, 3, 5, padding=2, groups=3, bias=False)
    shifted.weight = series.weight
    normalised = nn.BatchNorm2d(3, eps=1e-6).eval()
    torch.testing.assert_close(series(x), normalised(shifted(F.relu(x))))


@pytest.mark.parametrize(("channels", "order"), [(0, 3), (3, -1)])
def test_a_series_activation_without_channels_or_of_negative_order_is_refused(channels: int, order: int) -> None:
    with pytest.raises(InputError, match=f"channels must be at least 1 .* got {channels} and {order}"):
        SeriesActivation(channels, order)


def test_the_printed_form_shows_the_decay() -> None:
    assert "decay=0.25" in repr(DecayedActivation(nn.ReLU(), 0.25))
    assert repr(DecayedLeakyReLU(0.5)) == "DecayedLeakyReLU(decay=0.5)"
    assert repr(DecayedLeakyReLU(0.5).to("meta")) == "DecayedLeakyReLU(decay=meta)"
    assert repr(SeriesActivation(4, order=1)).startswith("SeriesActivation(\n  4, order=1")


def test_the_leaky_relu_form_can_be_exported_and_compiles_to_a_leaky_relu() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), DecayedLeakyReLU(0.25), nn.Conv2d(4, 4, 3)).eval()
    x = torch.randn(1, 3, 8, 8)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
    slopes = [m.negative_slope for m in rgc.compile(model, x).modules() if isinstance(m, nn.LeakyReLU)]
    assert slopes == [0.25]


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", [lambda value: DecayedActivation(nn.SiLU(), value), DecayedLeakyReLU])
def test_first_and_second_derivatives_are_right(kind: type[DecayedLeakyReLU], value: float) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    module = kind(value).double()
    assert torch.autograd.gradcheck(module, x)
    assert torch.autograd.gradgradcheck(module, x)


def test_torch_compile_makes_one_graph_that_stays_while_the_decay_changes(x: torch.Tensor) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    model = nn.Sequential(nn.Conv2d(3, 3, 1), DecayedActivation(nn.GELU()), DecayedLeakyReLU())
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for value in (0.0, 0.5, 1.0):
        set_decay(compiled, value)
        torch.testing.assert_close(compiled(x), model(x))
    assert len(graphs) == 1
    assert torch.equal(compiled(x), model[0](x))


def test_a_blend_can_be_exported_and_stays_in_the_dtype_of_autocast(x: torch.Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), DecayedActivation(nn.GELU(), 0.5), DecayedLeakyReLU(0.5))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


def test_one_that_stands_in_place_of_an_activation_loads_the_state_of_that() -> None:
    plain = nn.Sequential(nn.PReLU(3, init=0.7))
    model = nn.Sequential(DecayedActivation(nn.PReLU(3), 0.5, takes_plain_state=True))
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model[0].activation.weight, plain[0].weight)
    assert model[0].decay == 0.5
    again = nn.Sequential(DecayedActivation(nn.PReLU(3), takes_plain_state=True))
    again.load_state_dict(model.state_dict())
    assert again[0].decay == 0.5
    with pytest.raises(RuntimeError, match=r"Missing key.* \"0\.decay\""):
        nn.Sequential(DecayedActivation(nn.PReLU(3))).load_state_dict(plain.state_dict())
