"""Is a specialised model an ordinary one that computes the same, shares nothing with its source, and is compiled?"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import rgc
from rgc import models
from rgc.errors import InputError
from rgc.loading import load_model
from rgc.nn import Dynamic, OneOf, SlimmableConv2d, SlimmableLinear, choose
from rgc.testing import randomize


class Power(Dynamic):
    """A user's own: x times itself, with a child that may be dynamic and a weight that is handed over or left out."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child, self.power = child, 2
        self.scale = nn.Parameter(torch.full((3,), 1.5))

    def choices(self) -> dict[str, OneOf]:
        return {"power": OneOf((1, 2))}

    def choose(self, **choices: Any) -> None:
        self.power = choices.get("power", self.power)

    def specialized(self, **choices: Any) -> nn.Module:
        return self.child if choices["power"] == 1 else nn.Sequential(self.child, Squared(self.scale))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.child(x)
        return y if self.power == 1 else (y * self.scale) ** 2


class Endless(Dynamic):
    """A user's mistake: it stays dynamic."""

    def choices(self) -> dict[str, OneOf]:
        return {"power": OneOf((1, 2))}

    def choose(self, **choices: Any) -> None:
        raise NotImplementedError

    def specialized(self, **choices: Any) -> nn.Module:
        return Endless()


class Squared(nn.Module):
    def __init__(self, scale: nn.Parameter) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale) ** 2


def slimmable() -> nn.Module:
    return models.SlimmableResNet(1, (0.25, 0.5, 1.0), num_classes=5)


def storages(model: nn.Module) -> dict[int, int]:
    """The bytes behind each storage of a model."""
    tensors = [*model.parameters(), *model.buffers()]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@pytest.mark.parametrize("width", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_width_is_the_dynamic_model_at_that_width(width: float, dtype: torch.dtype) -> None:
    model = randomize(slimmable()).to(dtype)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 19, 16, dtype=dtype)
    static = rgc.specialize(model, width=width)
    choose(model, width=width)
    assert torch.equal(static(x), model(x))
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(module, Dynamic) for module in static.modules())


def test_the_result_has_the_chosen_parameters_and_no_storage_beyond_them() -> None:
    model = randomize(slimmable())
    static = rgc.specialize(model, width=0.25)
    tensors = [*static.parameters(), *static.buffers()]
    assert sum(storages(static).values()) == sum(t.nbytes for t in tensors)
    assert not set(storages(static)) & set(storages(model))
    conv = static.layer3[0].conv2
    assert isinstance(conv, nn.Conv2d) and tuple(conv.weight.shape) == (16, 16, 3, 3)
    assert conv.weight.is_contiguous()
    expected = sum(module.weight.numel() // 16 for module in model.modules() if isinstance(module, SlimmableConv2d))
    expected += 3 * 4 * 9 - 3 * 16 * 9 // 16  # the image keeps its channels
    assert sum(m.weight.numel() for m in static.modules() if isinstance(m, nn.Conv2d)) == expected


def test_the_result_is_saved_and_loaded_like_any_module() -> None:
    static = rgc.specialize(randomize(slimmable()), width=0.5)
    other = rgc.specialize(randomize(slimmable(), seed=1), width=0.5)
    x = torch.randn(1, 3, 16, 16)
    assert not torch.equal(other(x), static(x))
    other.load_state_dict(static.state_dict())
    assert torch.equal(other(x), static(x))
    assert torch.equal(pickle.loads(pickle.dumps(static))(x), static(x))


@pytest.mark.parametrize("width", [0.25, 1.0])
def test_the_result_is_compiled_to_one_layer_per_convolution(width: float) -> None:
    model = randomize(slimmable())
    static = rgc.specialize(model, width=width)
    compiled = rgc.compile(static)
    assert not compiled.report.failures
    convolutions = sum(isinstance(module, nn.Conv2d) for module in static.modules())
    assert compiled.report.ops_after["Conv2d"] <= convolutions
    assert compiled.report.ops_after["BatchNorm2d"] == 0
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(compiled(x), static(x), rtol=1e-4, atol=1e-4)


def test_training_mode_frozen_parameters_and_memory_format_are_kept() -> None:
    model = slimmable().to(memory_format=torch.channels_last)
    model.layer1.eval()
    model.conv1.weight.requires_grad_(False)
    static = rgc.specialize(model, width=0.5)
    assert static.training and not static.layer1[0].bn1.training and static.layer2[0].bn1.training
    assert not static.conv1.weight.requires_grad and static.layer1[0].conv1.weight.requires_grad
    conv = static.layer3[0].conv1
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    random = torch.get_rng_state()
    rgc.specialize(model, width=0.5)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("power", [1, 2])
def test_a_module_of_the_user_takes_part_and_its_dynamic_children_are_decided_too(power: int) -> None:
    model = nn.Sequential(Power(SlimmableLinear(4, 3, widths=(0.5, 1.0), slim_out=False)), nn.Dropout()).eval()
    static = rgc.specialize(model, width=0.5, power=power)
    choose(model, width=0.5, power=power)
    x = torch.randn(5, 2)
    assert torch.equal(static(x), model(x))
    assert not set(storages(static)) & set(storages(model))
    assert "scale" not in {name.rpartition(".")[2] for name, _ in static.named_parameters()} or power == 2


def test_a_dict_decides_by_path_and_the_longest_wins() -> None:
    model = nn.Sequential(Power(nn.Identity()), nn.Sequential(Power(nn.Identity()), Power(nn.Identity()))).eval()
    power = {"": 1, "1": 2, "1.1": 1}
    static = rgc.specialize(model, power=power)
    assert [isinstance(m, nn.Sequential) for m in (static[0], static[1][0], static[1][1])] == [False, True, False]
    choose(model, power=power)
    x = torch.randn(2, 3)
    assert torch.equal(static(x), model(x))


def test_a_path_is_one_of_the_source_also_below_a_module_that_becomes_another() -> None:
    inner = Power(nn.Identity())
    model = nn.Sequential(Power(inner)).eval()
    static = rgc.specialize(model, power={"0": 2, "0.child": 1})
    x = torch.randn(2, 3)
    assert isinstance(rgc.specialize(model, power=1)[0], nn.Identity)
    torch.testing.assert_close(static(x), (1.5 * x) ** 2)


def test_what_is_shared_stays_shared() -> None:
    shared = Power(nn.Linear(3, 3))
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}).eval()
    static = rgc.specialize(model, power=2)
    assert static["a"] is static["b"][0]
    with pytest.raises(InputError, match=r"a \(Power\) is also b\.0: power has to be the same for all"):
        rgc.specialize(model, power={"a": 1, "b": 2})


BAD: list[tuple[Callable[[], nn.Module], dict[str, Any], str]] = [
    (slimmable, {"widht": 0.5}, r"SlimmableResNet has no choice 'widht'; did you mean width\? it has width \(one of"),
    (slimmable, {}, r"conv1 \(SlimmableConv2d\) leaves width open; pass width=, one of 0.25, 0.5, 1.0"),
    (slimmable, {"width": None}, r"leaves width open"),
    (slimmable, {"width": 0.3}, r"width of conv1 \(SlimmableConv2d\): 0.3 is not one of .*; the nearest is 0.25"),
    (slimmable, {"width": {"layer1": 0.5}}, r"conv1 \(SlimmableConv2d\) leaves width open"),
    (
        slimmable,
        {"width": {"": 0.5, "layer4": 0.5}},
        r"no module at 'layer4' has a choice 'width'; it is at conv1, bn1, layer1",
    ),
    (slimmable, {"width": 0.5, "exit": 1}, r"no choice 'exit'; it has width"),
    (lambda: nn.Linear(2, 2), {"width": 0.5}, r"Linear has nothing to choose, so width=0.5 says nothing"),
]


@pytest.mark.parametrize(("build", "choices", "message"), BAD)
def test_what_cannot_be_chosen_is_refused_with_what_can(
    build: Callable[[], nn.Module], choices: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        rgc.specialize(build(), **choices)


def test_hooks_and_half_decided_results_are_refused() -> None:
    hooked = nn.Sequential(Power(nn.Identity()))
    hooked[0].register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(InputError, match=r"0 \(Power\) has forward hooks, which would be lost"):
        rgc.specialize(hooked, power=1)
    with pytest.raises(InputError, match=r"must return a static module or one of its children, not a Endless"):
        rgc.specialize(Endless(), power=1)
    with pytest.raises(InputError, match=r"specialize takes a torch.nn.Module, not str"):
        rgc.specialize("slimmable_resnet20", width=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("drop", [torchvision.ops.StochasticDepth(0.3, "row"), timm.layers.DropPath(0.3)])
def test_stochastic_depth_is_static_in_evaluation_and_compiled_away(drop: nn.Module) -> None:
    model = nn.Sequential(SlimmableConv2d(4, 8, 3, widths=(0.5, 1.0), slim_in=False), drop, nn.Conv2d(4, 2, 1)).eval()
    static = rgc.specialize(model, width=0.5)
    compiled = rgc.compile(static, torch.randn(1, 4, 9, 9))
    assert dict(compiled.report.ops_after) == {"Conv2d": 1}


ZOO: list[tuple[str, dict[str, Any]]] = [
    ("slimmable_resnet20", {"width": 0.5}),
    ("us_resnet20", {"width": 0.45}),
    ("dsnet_small", {"width": 0.5}),
    ("branchy_resnet20", {"exit": 1}),
    ("skipnet20", {"keep": False}),
    ("condconv_resnet20", {"routing": [0.5, 0.0, 0.25, 1.0]}),
]


@pytest.mark.parametrize(("name", "choices"), ZOO)
def test_models_of_the_zoo_are_loaded_without_trust_before_and_after(
    name: str, choices: dict[str, Any], tmp_path: Path
) -> None:
    model = randomize(models.create(name))
    static = rgc.specialize(model, **choices)
    x = torch.randn(2, 3, 16, 16)
    for file, each in (("dynamic.pt", model), ("static.pt", static)):
        torch.save(each, tmp_path / file)
        assert torch.equal(load_model(str(tmp_path / file))(x), each(x))
    choose(model, **choices)
    assert torch.equal(static(x), model(x))
    assert static.example_inputs()[0].shape == (1, 3, 32, 32)  # type: ignore[operator]  # every model of the zoo has it


def test_tied_weights_become_a_copy_for_each() -> None:
    first = SlimmableLinear(4, 4, widths=(0.5, 1.0))
    second = SlimmableLinear(4, 4, widths=(0.5, 1.0))
    second.weight = first.weight
    model = nn.Sequential(first, second)
    static = rgc.specialize(model, width=0.5)
    choose(model, width=0.5)
    assert torch.equal(static[0].weight, static[1].weight) and static[0].weight is not static[1].weight
    x = torch.randn(3, 2)
    assert torch.equal(static(x), model(x))
