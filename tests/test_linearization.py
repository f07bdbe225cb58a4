"""Is a linearised copy the same function at decay 0, to the bit, and do its layers merge at decay 1?"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn

import rgc
from rgc.errors import InputError, NotEquivalentError
from rgc.loading import load_model
from rgc.nn import DecayedActivation, linearize, set_decay
from rgc.testing import randomize


class Functional(nn.Module):
    """Activations in every spelling, one in place, one that is no activation; and tensors that forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.back = nn.Conv2d(4, 3, 1)
        self.relu = nn.ReLU(inplace=True)
        self.unused = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.full((1, 3, 1, 1), 1.5))
        self.register_buffer("shift", torch.full((1, 3, 1, 1), 0.25))
        self.register_buffer("hidden", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)), inplace=True)
        y = self.back(y)
        y += x
        y = self.relu(y) * self.scale + self.shift
        y = torch.relu(y - 1) + F.leaky_relu(y, 0.3) + F.gelu(y, approximate="tanh")
        return F.hardtanh(y.clamp(min=0) - y.clamp(0, 6), -0.5, 2.0) * torch.sigmoid(y)


PATHS = ["relu", "relu_1", "relu_2", "leaky_relu", "gelu", "relu_3", "hardtanh"]


def decaying(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, DecayedActivation)]


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=7), 9),
    "mobilenet_v2": (lambda: torchvision.models.MobileNetV2(7, 0.5, [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2]]), 9),
    "squeezenet1_1": (lambda: torchvision.models.squeezenet1_1(num_classes=7), 26),
    "timm mobilenetv3_small_050": (lambda: timm.create_model("mobilenetv3_small_050", num_classes=7), 33),
    "timm resnet18d": (lambda: timm.create_model("resnet18d", num_classes=7), 19),
    "functional": (lambda: nn.Sequential(Functional(), Functional()), 14),
}


@pytest.mark.parametrize("name", MODELS)
def test_at_decay_zero_the_copy_is_the_model_to_the_bit_and_takes_its_state(name: str) -> None:
    build, count = MODELS[name]
    model, x = randomize(build()), torch.randn(2, 3, 48, 40)
    before = copy.deepcopy(model.state_dict())
    expected = model(x)
    copied = linearize(model)
    assert len(decaying(copied)) == count
    assert torch.equal(copied(x), expected)
    names = [name for name in copied.state_dict() if not name.endswith(".decay")]
    assert sorted(names) == sorted(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    fresh = linearize(build()).eval()
    set_decay(fresh, 0.5)
    fresh.load_state_dict(before)  # which says nothing of the decay
    assert all(module.decay == 0.5 for module in fresh.modules() if isinstance(module, DecayedActivation))
    set_decay(fresh, 0.0)
    assert torch.equal(fresh(x), expected)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "timm resnet18d"])
def test_at_decay_one_layers_merge(name: str) -> None:
    model, x = randomize(MODELS[name][0]()), torch.randn(1, 3, 48, 40)
    copied = linearize(model, lambda path, _: "layer" not in path or path.startswith(("layer1", "layer3.0")))
    set_decay(copied, 1.0)
    before, after = (rgc.compile(each, x).report.ops_after for each in (model, copied))
    lost = {"resnet18": 1 + 4 + 2, "mobilenet_v2": 9, "timm resnet18d": 3 + 4 + 2}[name]
    kinds = ("ReLU", "ReLU6")
    assert sum(before[kind] - after[kind] for kind in kinds) == lost
    assert after.total() < before.total()
    assert name != "mobilenet_v2" or after["Conv2d"] <= before["Conv2d"] / 2


def test_calls_are_named_by_their_caller_and_function_and_chosen_by_name() -> None:
    model = randomize(nn.Sequential(Functional(), Functional()))
    assert sorted(decaying(linearize(model))) == sorted(f"{block}.{path}" for block in (0, 1) for path in PATHS)
    some = linearize(model, ["1.relu_1", "0.gelu"])
    assert sorted(decaying(some)) == ["0.gelu", "1.relu_1"]
    assert isinstance(some[0], fx.GraphModule)
    below = linearize(model, ["1"])
    assert type(below[0]) is Functional
    gated = linearize(model, lambda path, layer: isinstance(layer, nn.Sigmoid))
    assert decaying(gated) == ["0.sigmoid", "1.sigmoid"]
    x = torch.randn(2, 3, 6, 5)
    assert torch.equal(gated(x), model(x))


def test_every_spelling_fades_to_the_identity() -> None:
    model, x = Functional().eval(), torch.randn(2, 3, 6, 5)
    copied = linearize(model)
    assert isinstance(copied, fx.GraphModule)
    set_decay(copied, 1.0)
    y = model.back(model.bn(model.conv(x))) + x
    y = y * model.scale + model.shift
    y = (y - 1) + y + y
    torch.testing.assert_close(copied(x), (y - y.clamp(0, 6)) * torch.sigmoid(y))


def test_the_copy_of_a_caller_trains_moves_and_is_copied_like_the_model() -> None:
    copied = copy.deepcopy(linearize(nn.Sequential(Functional()).train())).double()
    copied(torch.randn(2, 3, 6, 5, dtype=torch.float64)).sum().backward()
    block = copied[0]
    assert block.training and block.relu_1.training and block.bn.num_batches_tracked == 1
    assert block.scale.grad is not None and block.relu_1.decay.dtype == torch.float64
    assert not copied.eval()[0].bn.training
    assert "0.hidden" not in copied.state_dict() and block.hidden.dtype == torch.float64


def test_a_module_called_twice_is_one_activation_and_so_is_one_with_two_paths() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 3, 1), relu, nn.Conv2d(3, 3, 1), relu)
    copied = linearize(model, ["1"])
    assert copied[1] is copied[3] and isinstance(copied[1], DecayedActivation)
    assert model[1] is relu


class OverwritesItsShortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 3, 1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x)
        return self.conv(self.act(x)) + x


def test_what_is_read_after_it_was_overwritten_is_refused_with_its_reader() -> None:
    model, x = randomize(nn.Sequential(OverwritesItsShortcut())), torch.randn(2, 3, 4, 4)
    with pytest.raises(InputError, match=r"0\.act works in place, and bn, which it overwrites, is read again by add"):
        linearize(model)
    with pytest.raises(NotEquivalentError, match=r"the copy at decay 0 computes something else: 0\.act works in place"):
        linearize(model, example_inputs=x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)), "0 overwrites a value that came in from outside"),
        (nn.ModuleDict({"a": nn.ReLU(inplace=True)}), "a works in place, and what the model does with its input"),
    ],
)
def test_where_readers_cannot_be_seen_an_example_is_asked_for(model: nn.Module, message: str) -> None:
    with pytest.raises(InputError, match=message + ".*; give example_inputs"):
        linearize(model)


def test_with_an_example_the_comparison_decides() -> None:
    model, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)), torch.randn(2, 3)
    kept = x.clone()
    copied = linearize(model, example_inputs=x)
    assert torch.equal(x, kept)
    assert torch.equal(copied(x.clone()), model(x.clone()))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return F.relu(self.conv(x))
        return self.act(self.conv(x))


def test_a_caller_that_cannot_be_traced_keeps_its_calls_with_a_warning_and_its_modules_fade() -> None:
    model = nn.Sequential(Branching()).eval()
    with pytest.warns(UserWarning, match=r"what 0 \(Branching\) calls is left as it is.*TraceError: symbolically"):
        copied = linearize(model)
    assert decaying(copied) == ["0.act"]
    assert decaying(linearize(model, ["0.act"])) == ["0.act"]  # a choice by name hides nothing
    with pytest.raises(InputError, match=r"'0\.relu' is no module, and what 0 calls cannot be told .*make that"):
        linearize(model, ["0.relu"])


class DependsOnTraining(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(x), 0.5, self.training)


def test_a_caller_whose_forward_depends_on_training_is_not_frozen_into_one_of_both() -> None:
    with pytest.raises(InputError, match=r"its forward depends on whether it trains"):
        linearize(nn.Sequential(DependsOnTraining()), ["0.relu"])


class Remembers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.last = F.relu(x)
        return self.last


def test_a_forward_that_writes_to_its_module_and_one_with_hooks_are_not_traced() -> None:
    model = nn.Sequential(Remembers())
    with pytest.raises(InputError, match="its forward sets the attribute 'last'"):
        linearize(model, ["0.relu"])
    assert not hasattr(model[0], "last")
    hooked = nn.Sequential(Functional())
    hooked[0].register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(InputError, match="it has hooks, which a trace would lose"):
        linearize(hooked, ["0.gelu"])


def test_a_transformer_layer_does_not_take_a_kernel_with_a_relu_of_its_own() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2).eval()
    copied, x = linearize(model), torch.randn(2, 5, 8)
    assert decaying(copied) == ["layers.0.activation", "layers.1.activation"]
    assert torch.equal(copied(x), model(x))
    set_decay(copied, 1.0)
    with torch.no_grad():
        fast = copied(x)
    torch.testing.assert_close(fast, copied(x))
    assert not torch.allclose(fast, model(x), atol=1e-3)


def test_what_decays_already_is_left_alone_and_a_model_may_be_one_activation() -> None:
    model = nn.Sequential(nn.Linear(2, 2), DecayedActivation(nn.ReLU(), 0.5), nn.Linear(2, 2), nn.Tanh())
    copied = linearize(model)
    assert [copied[1].decay.item(), copied[3].decay.item()] == [0.5, 0.0]
    assert decaying(linearize(nn.ReLU())) == [""]
    assert linearize(nn.Sequential(nn.ReLU())).training


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (["layer1.0.rellu"], r"no activation is named 'layer1\.0\.rellu'; did you mean layer1\.0\.relu"),
        ("layer1", r"write \['layer1'\]"),
        (lambda path, layer: False, "none of the 9 activations of ResNet is chosen"),
        ([], "none of the 9 activations of ResNet is chosen"),
    ],
)
def test_a_choice_of_nothing_is_refused(which: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        linearize(torchvision.models.resnet18(num_classes=3), which)  # type: ignore[arg-type]


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(InputError, match=r"linearize takes a torch\.nn\.Module, not function"):
        linearize(lambda x: x)  # type: ignore[arg-type]


def test_a_copy_of_modules_alone_is_loaded_without_running_code(tmp_path: object) -> None:
    path = f"{tmp_path}/model.pt"
    torch.save(linearize(nn.Sequential(nn.Linear(2, 2), nn.ReLU())), path)
    loaded = load_model(path)
    assert [type(layer) for layer in loaded.children()] == [nn.Linear, DecayedActivation]
