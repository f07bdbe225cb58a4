"""What must a network of a known family become? As few layers as an expert gets by hand, and equal to the original.

A family is written as its paper has it, before any re-parameterisation. The fixture `becomes` gives it weights that
hide nothing, compiles it, and holds the result against eager PyTorch in float64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor, nn

import rgc
from rgc import CompiledModule
from rgc.report import Report
from rgc.testing import randomize

#: How the names of what multiplies by a matrix or a kernel begin.
_KERNELS = ("conv", "linear", "matmul", "mm", "bmm", "addmm", "einsum", "bilinear")

#: Of the scale of the output, in float64: what the compiler itself promises.
TOLERANCE = 1e-10


class Becomes(Protocol):
    """Compile ``model`` for an input of ``shape`` and require at most the operators ``ops``.

    ops: the result by hand. Layers with a kernel, normalisations and operators altogether may each be fewer, not more.
    passes: as in `rgc.compile`. any_size: is the model itself free in its spatial size? Then so is the result of the
    default passes, and both are compared at a second, rectangular size.
    """

    def __call__(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        ops: Mapping[str, int],
        *,
        passes: str = "default",
        any_size: bool = True,
    ) -> CompiledModule: ...


@pytest.fixture
def becomes() -> Becomes:
    """The test of one network: equal, and as few operators as by hand."""
    return _becomes


@pytest.fixture
def written() -> Callable[..., nn.Module]:
    """A network from a function of the input and of modules by name: ``written(lambda x, conv: conv(x), conv=...)``."""
    return _Written


class _Written(nn.Module):
    def __init__(self, forward: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.call = forward

    def forward(self, x: Tensor) -> Any:
        return self.call(x, **self.parts)


def _becomes(
    model: nn.Module, shape: tuple[int, ...], ops: Mapping[str, int], *, passes: str = "default", any_size: bool = True
) -> CompiledModule:
    model = randomize(model).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    compiled = rgc.compile(model, x, passes=passes, objective="depth")
    report = compiled.report
    assert not report.failures, report.failures[0].reason
    assert report.max_error is not None and report.max_error <= TOLERANCE
    shapes = [shape, (1, *shape[1:]), (3, *shape[1:])]
    if any_size and passes == "default":
        assert not report.fixed_size, "the default passes hold at every size, the result does not"
        if len(shape) > 3:  # of [N, C, L] a test says itself which axis is free
            shapes.append((2, shape[1], *(n + 1 + axis for axis, n in enumerate(shape[2:]))))
    for each in shapes:
        _require_equal(model, compiled, torch.randn(each, generator=generator, dtype=torch.float64))
    _require_at_most(report, Counter(ops))
    return compiled


def _require_equal(model: nn.Module, compiled: CompiledModule, x: Tensor) -> None:
    with torch.no_grad():
        expected = _tensors(model(x.clone()))
        found = _tensors(compiled(x.clone()))
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        scale = float(theirs.abs().max())
        assert 1e-3 < scale < 1e3 and float(theirs.std()) > 1e-3 * scale, "the test's network makes nothing to compare"
        assert ours.shape == theirs.shape
        assert float((ours - theirs).abs().max()) <= TOLERANCE * scale


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [leaf for each in result for leaf in _tensors(each)]


def _require_at_most(report: Report, ops: Counter[str]) -> None:
    found = report.ops_after
    excess = [
        f"{what}: {count(found)} instead of {count(ops)}"
        for what, count in (("layers", _layers), ("norms", _norms), ("operators", Counter.total))
        if count(found) > count(ops)
    ]
    refusals = "\n".join(f"  {each.rewrite} at {each.where}: {each.reason}" for each in report.refusals)
    notes = "\n".join(f"  {note}" for note in report.notes)
    assert not excess, (
        f"{', '.join(excess)}\nfound {dict(found)}\nby hand {dict(ops)}\nrefusals:\n{refusals}\nnotes:\n{notes}"
    )


def _layers(ops: Counter[str]) -> int:
    return sum(count for name, count in ops.items() if name.lower().startswith(_KERNELS))


def _norms(ops: Counter[str]) -> int:
    return sum(count for name, count in ops.items() if "norm" in name.lower())
