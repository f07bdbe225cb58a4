"""Is a loaded artifact told from its original whatever shape its outputs, dtype or batch have?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rgc.artifact import load, save
from rgc.artifact_check import compare
from rgc.errors import InputError
from rgc.frontend import Example


class Named(nn.Module):
    """A nested result with a hole in it, which ONNX returns as a flat list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.layer(x)
        return {"scores": y, "rest": (y.sum(1), None)}


class OwnDtype(nn.Module):
    """A model that runs in float32 only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x.to(torch.float32))


class OneBatch(nn.Module):
    """An artifact for one batch size; at any other it refuses, or would be wrong."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        torch._assert(x.shape[0] == 2, "compiled for a batch of 2")
        return self.layer(x)


class Wrong(nn.Module):
    """Right up to a change of its result."""

    def __init__(self, layer: nn.Module, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self.layer = layer
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.layer(x))


EXAMPLE = Example((torch.linspace(-2, 2, 12).view(2, 6),))


def test_nested_outputs_of_onnx_are_compared_leaf_by_leaf(tmp_path: Path) -> None:
    model = Named().eval()
    save(model, tmp_path / "model.onnx", example_args=EXAMPLE.args)
    found = compare(model, load(tmp_path / "model.onnx"), EXAMPLE, level="full")
    assert found.equal and found.examples == 51
    other = Named().eval()
    assert not compare(other, load(tmp_path / "model.onnx"), EXAMPLE).equal


def test_a_half_precision_artifact_is_held_against_the_float64_original() -> None:
    model = nn.Linear(6, 4).eval()
    half = nn.Linear(6, 4).eval()
    half.load_state_dict(model.state_dict())
    found = compare(model, half.half(), EXAMPLE)
    assert found.equal
    assert 1e-5 < found.deployed_error < 1e-2


def test_a_model_that_refuses_float64_is_compared_in_its_own_dtype() -> None:
    model = OwnDtype().eval()
    assert compare(model, model, EXAMPLE).equal
    assert not compare(model, Wrong(model, lambda y: 1.001 * y), EXAMPLE).equal


def test_an_artifact_for_one_batch_is_compared_at_that_batch_only() -> None:
    model = nn.Linear(6, 4).eval()
    found = compare(model, OneBatch(model), EXAMPLE, level="full")
    assert found.equal
    assert 1 <= found.examples < 51
    assert not compare(model, OneBatch(Wrong(model, lambda y: y + 1e-3)), EXAMPLE).equal


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda y: y[:1], "returns 1x4 where the original returns 2x4"),
        (lambda y: (), "returns nothing where the original returns 2x4"),
        (lambda y: (y, y.sum()), "returns 2x4, a scalar where the original returns 2x4"),
        (lambda y: y * float("nan"), "differs by"),
        (lambda y: y.flip(0), "differs by"),
    ],
)
def test_a_difference_is_returned_with_its_reason(change: Callable[[Any], Any], reason: str) -> None:
    model = nn.Linear(6, 4).eval()
    found = compare(model, Wrong(model, change), EXAMPLE)
    assert not found.equal
    assert reason in found.reason


def test_inputs_that_one_of_the_two_does_not_take_are_refused() -> None:
    with pytest.raises(InputError, match="Linear does not run on an input of 2x6"):
        compare(nn.Linear(5, 4).eval(), nn.Linear(6, 4).eval(), EXAMPLE)
    with pytest.raises(InputError, match="the artifact does not take an input of 2x6"):
        compare(nn.Linear(6, 4).eval(), nn.Linear(5, 4).eval(), EXAMPLE)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")  # the deprecated form is what has the hook
def test_an_original_whose_weight_a_hook_computes_is_compared_too() -> None:
    layer = nn.Linear(6, 4)
    plain = nn.Linear(6, 4)
    plain.load_state_dict(layer.state_dict())
    hooked = nn.utils.weight_norm(layer).eval()
    hooked(*EXAMPLE.args)  # leaves a weight with a gradient history behind, which copy.deepcopy refuses
    assert compare(hooked, plain.eval(), EXAMPLE).equal
