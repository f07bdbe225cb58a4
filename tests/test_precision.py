"""Does a model run in float64 without a copy of its weights, and are the weights safe while it runs?"""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rgc
from rgc.example import SAME, Example, copy_model, output_difference, precise_form, same_memory
from rgc.precision import Jittered, ReadOnly, ReadOnlyModel, WriteError, in_float64, jittered, precisely
from rgc.testing import randomize

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Own(nn.Module):
    """A forward of one's own beside a weight and a buffer."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.own = nn.Parameter(torch.randn(8, 8)), forward
        self.register_buffer("scale", torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self, x)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 3),
    "convolution and batch norm": lambda: nn.Sequential(nn.Conv1d(5, 4, 3), nn.BatchNorm1d(4), nn.PReLU(4)),
    "transformer": lambda: nn.TransformerEncoderLayer(8, 2, batch_first=True),
    "layer norm": lambda: nn.LayerNorm(8),
    "embedding of constants": lambda: Own(lambda m, x: x + F.embedding(torch.tensor([1, 2, 3, 4, 0]), m.weight)),
    "lists of weights": lambda: Own(lambda m, x: x @ torch.cat([m.weight, m.weight.T]).T),
    "a view of a weight": lambda: Own(lambda m, x: x * m.weight[0].view(1, 8).expand(5, 8) + m.weight.detach()[1]),
    "the dtype of a weight": lambda: Own(lambda m, x: x.to(m.weight.dtype) @ m.weight.to(torch.float32)),
    "a form of a weight": lambda: Own(lambda m, x: x @ torch.zeros_like(m.weight) + m.scale.new_ones(8) / 3),
    "a copy that is overwritten": lambda: Own(lambda m, x: m.weight.clone().mul_(3).sum() * x),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_model_with_weights_in_single_precision_computes_what_a_copy_in_float64_does(name: str) -> None:
    model = randomize(LAYERS[name]())
    before = copy.deepcopy(model.state_dict())
    found = precise_form(model, Example((X,)))
    expected = Example((X,)).run(copy_model(model, dtype=torch.float64))
    assert output_difference(found.expected, expected) <= SAME and found.expected.dtype == torch.float64
    assert output_difference(Example((X,)).run(found.model), expected) <= SAME
    assert found.shares or name == "a copy that is overwritten"
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_recurrent_layers_widen_their_list_of_weights() -> None:
    model = nn.LSTM(8, 4).eval()
    found = precise_form(model, Example((X,)))
    assert found.shares and torch.equal(found.expected[0], copy.deepcopy(model).double()(X)[0])


def test_sharing_needs_no_memory_and_no_flag_of_the_models_own_parameters() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(5))
    model.append(model[0])  # tied
    shared = same_memory(model)
    assert shared[0].weight.data_ptr() == model[0].weight.data_ptr() and shared[0].weight is shared[2].weight
    assert shared[1].running_mean.data_ptr() == model[1].running_mean.data_ptr()
    assert shared[1].num_batches_tracked.data_ptr() != model[1].num_batches_tracked.data_ptr()
    assert model[0].weight.requires_grad and not shared[0].weight.requires_grad


WRITES: dict[str, Callable[[Any, Tensor], Any]] = {
    "in place": lambda m, x: m.weight.mul_(2),
    "by an option": lambda m, x: F.relu(m.weight, inplace=True),
    "by items": lambda m, x: m.weight.__setitem__(0, 1.0),
    "through a view": lambda m, x: m.weight.view(-1)[:3].zero_(),
    "through a form": lambda m, x: m.weight.reshape(-1).flatten().zero_(),
    "through its transpose": lambda m, x: m.weight.T.add_(1),
    "as an output": lambda m, x: torch.add(m.weight[0], 1.0, out=m.scale),
    "to a buffer": lambda m, x: m.scale.copy_(m.weight[0]),
    "by data": lambda m, x: m.weight.data.add_(1),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_weight_is_never_overwritten(name: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        WRITES[name](m, x)
        return x * 2

    model = Own(forward).requires_grad_(False).eval()
    before = copy.deepcopy(model.state_dict())
    assert not precise_form(model, Example((X,))).shares
    with torch.no_grad(), precisely([X]), pytest.raises(WriteError, match="overwrites a weight"):
        same_memory(model)(X)
    with pytest.raises(WriteError, match="overwrites a weight"), ReadOnly([*model.parameters(), *model.buffers()]):
        model(X.float())
    guarded = ReadOnlyModel(same_memory(model), lambda: copy.deepcopy(model))
    assert torch.equal(guarded(X.float()), X.float() * 2) and torch.equal(guarded(X.float()), X.float() * 2)
    with contextlib.suppress(rgc.RgcError):  # whether such a model can be compiled is another question
        rgc.compile(model, X.float())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_what_is_asked_about_a_weight_is_answered_as_by_a_copy_in_float64() -> None:
    weight = nn.Parameter(torch.randn(2, 3))
    with in_float64():
        assert weight.dtype == torch.float64 and weight.shape == (2, 3) and weight.dim() == 2
        assert weight.data_ptr() == weight.detach().data_ptr() and {weight: 1}[weight] == 1
        assert (weight + weight).dtype == torch.stack([weight, weight]).dtype == torch.float64
        assert torch.empty(2, dtype=torch.float32, device="meta").dtype == torch.float32  # for types, not for numbers
    assert weight.dtype == torch.float32


def test_jittered_numbers_are_apart_by_the_last_place_and_always_in_the_same_way() -> None:
    model = nn.Linear(8, 8)
    with Jittered(model, seed=1):
        first, second = model(X.float()), model(X.float())
    with Jittered(model, seed=2):
        other = model(X.float())
    distance = (first - model(X.float())).abs().max() / first.abs().max()
    assert torch.equal(first, second) and not torch.equal(first, other) and 0 < distance < 1e-6
    moved = jittered(X, 0)
    assert not torch.equal(moved, X) and torch.allclose(moved, X, rtol=3e-16, atol=0)


def test_a_rule_computes_in_float64_with_what_the_model_has_in_single_precision() -> None:
    @rgc.rewrite(lambda x, first, second: second(first(x)))
    def multiply_out(x: rgc.Value, first: rgc.Conv, second: rgc.Conv) -> rgc.Value:
        return rgc.Conv(second.weight @ first.weight, second.weight @ first.bias + second.bias)(x)

    model = randomize(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)))
    report = rgc.compile(model, X.float(), passes=[multiply_out], objective="depth").report
    assert [firing.rewrite for firing in report.rewrites] == ["multiply_out"] and not report.failures


MEASURE = """
import resource, torch, rgc
from pathlib import Path
from rgc.testing import randomize
from torch import nn

def resident(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])

torch.manual_seed(0)
def chain(width, depth):
    return nn.Sequential(*(layer for _ in range(depth) for layer in (
        nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())))
rgc.compile(randomize(chain(4, 2)), torch.randn(1, 4, 9, 9))
model, x = randomize(chain(160, 24)).requires_grad_(False), torch.randn(1, 160, 7, 7)
weights = sum(4 * p.numel() for p in model.parameters())
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
rgc.compile(model, x)
print(resident("VmHWM") - before, weights)
"""

#: Of the peak, in bytes: the allocator, activations, and the widest layer a few times over.
CONSTANT = 30e6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_compiling_takes_no_more_than_three_times_the_weights_beside_the_model() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True)
    peak, weights = map(float, done.stdout.split())
    assert weights > 20e6 and peak <= 3 * weights + CONSTANT
