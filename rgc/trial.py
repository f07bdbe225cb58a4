"""What does a pass make of one model? The model is compiled with it, and the result held against eager PyTorch.

More is asked than `rgc.compile` proves by itself: that the source model stays as it was bit for bit, that the pass does
the same each time, and that the result is equal at sizes far from the example's.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from rgc.attempt import Options
from rgc.compiler import CompiledModule, compile_with
from rgc.cost import Objective
from rgc.errors import InputError, RgcError
from rgc.example import is_same_tensor, output_difference, unchanged_generators
from rgc.report import Report
from rgc.rewrite import Pass, Rewrite
from rgc.subject import example_of

#: The largest difference in float64 at any size, relative to the largest output.
TOLERANCE = 1e-9

#: Sizes that are tried for every spatial axis, where they are free: the smallest, odd and even ones, a large one.
SIZES = (1, 2, 3, 6, 17, 40)

#: No input at those sizes has more elements.
MOST_ELEMENTS = 2**17


@dataclass(frozen=True)
class Trial:
    """What a pass made of a model. ``fault`` says what is wrong, in plain words, and is empty where nothing is.

    ``unusable``: the model cannot be compiled, for a reason of its own. ``report``: None where nothing was compiled.
    """

    name: str
    report: Report | None = None
    fault: str = ""
    unusable: str = ""

    @property
    def fired(self) -> bool:
        """Did the pass change the model?"""
        return self.report is not None and any(firing.rewrite == self.name for firing in self.report.rewrites)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it refused, each reason once."""
        refusals = [] if self.report is None else self.report.refusals
        return tuple(dict.fromkeys(refused.reason for refused in refusals if refused.rewrite == self.name))

    @property
    def outcome(self) -> tuple[bool, tuple[str, ...], bool, bool]:
        """What two trials are compared by."""
        return self.fired, self.reasons, bool(self.fault), bool(self.unusable)


def made(build: Callable[[], nn.Module], seed: int, dtype: torch.dtype) -> nn.Module:
    """The model that ``build`` makes, with random weights: the same ones every time."""
    from rgc.testing import randomize

    with unchanged_generators():
        torch.manual_seed(seed)
        return randomize(build(), seed).to(dtype)


def drawn(shape: Sequence[int], seed: int, dtype: torch.dtype) -> Tensor:
    """Normal values, the same ones every time."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def attempt(
    pass_: Pass,
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    objective: Objective = "latency",
    fixed_size: bool = False,
    beside: Sequence[Any] = (),
) -> Trial:
    """Compile what ``build`` makes with the pass, and with those ``beside`` it; ``shape`` is that of the input.

    In float64 the result is held against the model at other sizes as well.
    """
    options = Options((*beside, pass_), objective=objective, fixed_size=fixed_size)
    x = drawn(shape, seed, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PyTorch says of a model that nobody would write
        model = made(build, seed, dtype)
        before = _state(model)
        try:
            compiled = compile_with(model, example_of(model, x), options)
        except InputError as error:
            trial = Trial(pass_.name, unusable=str(error))
        except RgcError as error:
            trial = Trial(pass_.name, fault=f"compiling fails: {error}")
        else:
            trial = Trial(pass_.name, compiled.report, _fault(pass_, compiled, model, shape, dtype))
        changed = [name for name, tensor in _state(model).items() if not is_same_tensor(before[name], tensor)]
    if changed:
        return replace(trial, fault=f"it writes to the weights of the model, in place: {', '.join(changed)} changed")
    return trial


def relies_on_range(pass_: Pass) -> Pass:
    """The same rewrite, had it declared that it relies on the ranges of values; a graph pass as it is."""
    if not isinstance(pass_, Rewrite):
        return pass_
    return replace(pass_, cases=[replace(case, relies_on_range=True) for case in pass_.cases])


def _state(model: nn.Module) -> dict[str, Tensor]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def _fault(pass_: Pass, compiled: CompiledModule, model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    report = compiled.report
    failures = [failure for failure in report.failures if failure.rewrite == pass_.name]
    if failures:
        reason = failures[0].reason
        return f"the result is not equal: {reason}" if "differs by" in reason or " turns " in reason else reason
    if any(not reason.strip() for reason in Trial(pass_.name, report).reasons):
        return "it refuses without a reason: the text behind the condition of a `require` is empty"
    return "" if dtype != torch.float64 else next(_differences(compiled, model, shape), "")


def _differences(compiled: CompiledModule, model: nn.Module, shape: tuple[int, ...]) -> Iterator[str]:
    """What is wrong with a result at sizes that the proof may not have drawn."""
    for other in _other_shapes(shape, free=not compiled.report.fixed_size):
        x = drawn(other, 1, torch.float64)
        size = "x".join(map(str, other))
        with torch.no_grad():
            expected: Any = None
            with contextlib.suppress(RuntimeError, ValueError, TypeError, IndexError, AssertionError):
                expected = model(x.clone())
            if expected is None or not _holds_something(expected):
                continue  # eager PyTorch does not take this size either, or nothing is left to compare
            try:
                found = compiled(x)
            except Exception as error:  # whatever it is, the model itself runs
                reason = f"{type(error).__name__}: {error}"
                yield f"the result fails on an input of {size}, on which the model runs: {reason}"
                return
        distance = output_difference(expected, found)
        if not distance <= TOLERANCE:
            yield f"the result is not equal: it differs by {distance:.1e} of its scale on an input of {size}"


def _holds_something(output: Any) -> bool:
    return all(leaf.numel() > 0 for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor))


def _other_shapes(shape: tuple[int, ...], free: bool) -> Iterator[tuple[int, ...]]:
    for batch in (1, 3):
        yield (batch, *shape[1:])
    if free and len(shape) > 2:
        for size in SIZES:
            other = (2, shape[1], *(size + axis for axis in range(len(shape) - 2)))
            if torch.Size(other).numel() <= MOST_ELEMENTS:
                yield other


__all__ = ["Trial", "attempt", "drawn", "made", "relies_on_range"]
