"""Which tier captures which model, what is said about the others, and do whole published networks come through?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rgc
from rgc.errors import InputError, NotEquivalentError
from rgc.example import Example
from rgc.frontend import Capture, capture


class Model(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.register_buffer("calls", torch.zeros(()))
        self.body = forward

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def captured(model: nn.Module, x: Tensor, **options: Any) -> Capture:
    def compile_child(path: str, child: nn.Module, call: Example) -> tuple[nn.Module, bool]:
        raise NotEquivalentError("not here")

    model, example = model.double().eval(), Example((x.double(),))
    expected = example.run(model)
    return capture(model, example, expected, torch.float32, fixed=False, compile_child=compile_child, **options)


def _one_alias_changed(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    z = y
    z %= 0.5  # which symbolic tracing takes for z = z % 0.5
    return y


def test_each_tier_takes_over_where_the_one_before_fails() -> None:
    x = torch.randn(1, 3, 6, 6)
    first = captured(Model(lambda m, x: m.second(m.first(x))), x)
    assert (first.tier, first.notes, first.fixed_size) == ("torch.fx", (), False)
    second = captured(Model(_one_alias_changed), x)
    assert second.tier == "torch.export"
    assert second.notes[0].startswith("torch.fx traces another function: it differs from the model by ")
    third = captured(Model(lambda m, x: m.first(x) if x.sum() > 0 else m.first(-x)), x)
    assert third.tier == "submodules"
    assert third.notes[0].startswith("torch.fx cannot trace the model: TraceError: symbolically traced variables")
    assert third.notes[1].startswith("torch.export cannot trace the model: ")
    assert third.notes[2] == "the model is kept as it is; compiled in place: nothing"
    assert all("\n" not in note for note in third.notes)


def test_a_tier_can_be_left_out() -> None:
    found = captured(Model(lambda m, x: m.first(x)), torch.randn(1, 3, 6, 6), tiers=("torch.export",))
    assert (found.tier, found.notes) == ("torch.export", ())


def test_an_example_of_zeros_does_not_hide_what_a_trace_loses() -> None:
    model = Model(_one_alias_changed)
    for layer in (model.first, model.second):
        nn.init.zeros_(layer.bias)
    assert captured(model, torch.zeros(1, 3, 6, 6)).tier == "torch.export"


def test_a_batch_that_the_example_burns_in_is_noticed() -> None:
    model = Model(lambda m, x: m.first(x).reshape(2, -1))
    found = captured(model, torch.randn(2, 3, 6, 6))
    y = torch.randn(3, 3, 7, 6)
    assert found.tier == "torch.fx"  # the model itself always makes two rows, whatever the batch
    torch.testing.assert_close(found.graph.evaluate({"x": y.double()}), model(y.double()))


@pytest.mark.parametrize("forward", [
    lambda m, x: m.first(x) + torch.rand(4, 1, 1),
    lambda m, x: m.first(x) + torch.randn_like(x[:, :1, 2:, 2:]),
    lambda m, x: nn.functional.dropout(m.first(x), 0.5, training=True),
    lambda m, x: m.first(x) * m.calls.add_(1),
], ids=["a random constant", "noise", "hard-coded dropout", "a state"])  # fmt: skip
def test_a_model_that_changes_from_call_to_call_is_refused(forward: Callable[[Any, Tensor], Tensor]) -> None:
    with pytest.raises(InputError, match="Model gives another output each time it is called on the same input"):
        rgc.compile(Model(forward).eval(), torch.randn(1, 3, 6, 6))


# --- whole networks ----------------------------------------------------------------------------------------------


def with_statistics(model: nn.Module) -> nn.Module:
    """Eval mode and batch norms that do something, mildly enough for fifty of them in a row."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_networks_of_torchvision_lose_their_batch_norms(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    model = with_statistics(getattr(models, name)(weights=None))
    compiled = rgc.compile(model, torch.randn(1, 3, 64, 64))
    assert compiled.report.tier == "torch.fx" and not compiled.report.fixed_size
    assert compiled.report.ops_after["BatchNorm2d"] == 0 and not compiled.report.failures
    for shape in ((1, 3, 64, 64), (2, 3, 80, 72)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["lcnet_035", "resnet10t", "levit_128s"])
def test_networks_of_timm_come_through(name: str) -> None:
    timm = pytest.importorskip("timm")
    size = 224 if name.startswith("levit") else 32
    model = with_statistics(timm.create_model(name, pretrained=False))
    compiled = rgc.compile(model, torch.randn(1, 3, size, size))
    assert compiled.report.tier == "torch.fx" and not compiled.report.failures
    assert compiled.report.ops_after["BatchNorm2d"] < compiled.report.ops_before["BatchNorm2d"]
    x = torch.randn(2, 3, size, size)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
