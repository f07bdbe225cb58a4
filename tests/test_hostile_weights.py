"""Are weights, inputs and code at the edge of what computes handled, and is the model in memory left as it was?"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rgc
from rgc.cli import run
from rgc.errors import InputError, RgcError
from rgc.testing import randomize

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def small_model() -> nn.Module:
    layers = (nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    return randomize(nn.Sequential(*layers).eval())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("0.weight", float("nan"), "the parameter '0.weight' holds nan (1 of 108 elements)"),
        ("3.bias", float("inf"), "the parameter '3.bias' holds inf (1 of 2 elements)"),
        ("1.weight", -float("inf"), "the parameter '1.weight' holds -inf (1 of 4 elements)"),
        ("1.running_var", float("nan"), "the buffer '1.running_var' holds nan (1 of 4 elements)"),
    ],
)
def test_a_weight_that_is_no_number_is_refused_by_name(
    name: str, value: float, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_model()
    model.state_dict()[name].flatten()[0] = value
    with pytest.raises(InputError) as caught:
        rgc.compile(model, X)
    assert message in str(caught.value) and "repair the weights first" in str(caught.value)
    torch.save(model, tmp_path / "model.pt")
    for command in ("compile", "inspect"):
        assert run([command, str(tmp_path / "model.pt"), "--input", "1x3x8x8"]) == 2
        seen = capsys.readouterr()
        assert seen.out == "" and message in seen.err and seen.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


class Masked(nn.Module):
    """Adds a mask of infinities before a softmax, as attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("mask", torch.triu(torch.full((4, 4), -float("inf")), 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.second(self.first(x)) + self.mask, -1)


def test_a_mask_of_infinities_may_stay() -> None:
    model, x = randomize(Masked().eval()), torch.randn(2, 4, 4)
    compiled = rgc.compile(model, x)
    assert compiled.report.ops_after["Linear"] == 1 and not compiled.report.failures
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tiny", [1e-3, 1e-40, 1e-44, 1e-310, 0.0])
def test_denormal_weights_are_merged_like_others(dtype: torch.dtype, tiny: float) -> None:
    model, x = small_model().to(dtype), X.to(dtype)
    for name in ("0.weight", "1.running_mean", "1.bias"):
        model.state_dict()[name].mul_(tiny)
    compiled = rgc.compile(model, x)
    assert compiled.report.ops_after["BatchNorm2d"] == 0 and not compiled.report.failures
    assert compiled.report.verification is not None and compiled.report.verification.equal
    assert compiled(x).isfinite().all()


def test_an_example_without_elements_proves_nothing() -> None:
    for shape in ((0, 3, 8, 8), (2, 3, 0, 8)):
        with pytest.raises(InputError, match=f"an input without elements \\({'x'.join(map(str, shape))}\\)"):
            rgc.compile(small_model(), torch.zeros(shape))


@pytest.mark.parametrize("passes", ["default", "all"])
def test_a_batch_of_none_runs_as_it_does_in_the_original(passes: str) -> None:
    model = small_model()
    compiled = rgc.compile(model, X, passes=passes, objective="depth")
    empty = torch.zeros(0, 3, 8, 8)
    assert compiled(empty).shape == model(empty).shape == (0, 2, 8, 8)


def test_a_kernel_larger_than_the_input_is_one_line() -> None:
    with pytest.raises(InputError, match="does not run on an input of 1x3x4x4: .*[Kk]ernel size can't be greater"):
        rgc.compile(nn.Sequential(nn.Conv2d(3, 4, 7)).eval(), torch.randn(1, 3, 4, 4))


# The model in memory


class Vandal(nn.Module):
    """Writes to its own weights and statistics, and then raises."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.inner, self.error = small_model(), error

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for tensor in self.inner.state_dict().values():
                tensor.zero_()
        raise self.error("in the middle")


@rgc.graph_pass
def spoil_and_raise(graph: rgc.Graph) -> rgc.Graph:
    """Writes to every weight that it can reach, and raises."""
    for value in graph.nodes():
        for tensor in value.op.tensors():
            tensor.zero_()
    raise ZeroDivisionError("a pass's own fault")


@rgc.graph_pass
def interrupt(graph: rgc.Graph) -> rgc.Graph:
    """Ctrl-C while a pass runs."""
    raise KeyboardInterrupt


@rgc.graph_pass
def run_out_of_memory(graph: rgc.Graph) -> rgc.Graph:
    """A pass that needs too much."""
    raise MemoryError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("make", "passes"),
    [
        (small_model, [spoil_and_raise]), (small_model, ["default", interrupt]), (small_model, [run_out_of_memory]),
        (lambda: Vandal(RuntimeError).eval(), "default"), (lambda: Vandal(KeyboardInterrupt).eval(), "default"),
        (lambda: Vandal(MemoryError).eval(), "default"), (lambda: Vandal(RecursionError).eval(), "default"),
    ],
    ids=["pass", "interrupted pass", "greedy pass", "forward", "interrupted forward", "greedy forward", "deep forward"],
)  # fmt: skip
def test_the_model_is_the_same_bit_for_bit_after_any_error(make: Any, passes: Any, dtype: torch.dtype) -> None:
    model = make().to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    identities = [id(tensor) for tensor in model.state_dict(keep_vars=True).values()]
    with contextlib.suppress(RgcError, KeyboardInterrupt, MemoryError):
        rgc.compile(model, X.to(dtype), passes=passes)
    after = model.state_dict(keep_vars=True)
    assert [id(tensor) for tensor in after.values()] == identities
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
