"""How does a model become a graph? Three tiers, each checked against the eager model before it is trusted.

1. ``torch.fx`` symbolic tracing with a tracer of our own: parameters, buffers and Python numbers are constants, so
   ``if self.scale == 1.0`` traces and weights that are computed from parameters fold away.
2. ``torch.export``, which functionalises, for models whose control flow or in-place writes the first tier cannot
   follow.
3. Submodule by submodule: a model that neither can trace as a whole stays as it is, and each child that can be traced
   is compiled in place.

The model is captured in float64, so that constants fold exactly and the proof can compare to 1e-10.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rgc.child_tier import CompileChild, compile_parts, opaque_graph
from rgc.errors import InputError
from rgc.example import Example, copy_model, output_difference, precisely
from rgc.export_tier import trace_by_export
from rgc.ir import Graph
from rgc.lift import Source, lift
from rgc.proof import TOLERANCE
from rgc.symbolic_tier import trace_symbolically

TIERS = ("torch.fx", "torch.export", "submodules")


@dataclass(frozen=True)
class Capture:
    """A traced model: its graph, the tier that traced it, whether it holds at one size only, and what to tell the user.

    ``compiled`` names the parts that were compiled in place where the model could not be traced as a whole.
    """

    graph: Graph
    tier: str
    fixed_size: bool
    notes: tuple[str, ...] = ()
    error: float = 0.0
    compiled: tuple[str, ...] = ()


def capture(
    model: nn.Module,
    example: Example,
    expected: Any,
    dtype: torch.dtype,
    *,
    fixed: bool,
    compile_child: CompileChild,
    tolerance: float = TOLERANCE,
    tiers: Sequence[str] = TIERS,
) -> Capture:
    """The graph of ``model`` (already in the dtype of the proof), by the first of ``tiers`` that reproduces it.

    ``dtype`` is the deployed dtype, for the types; ``compile_child`` compiles what tier 3 finds traceable. Raises
    `InputError` for a model that gives another output each time it is called.
    """
    probes = [(example, expected), *_another_call(model, example)]
    notes: list[str] = []
    for tier, trace in _TRACES.items():
        if tier not in tiers:
            continue
        try:
            source, size_is_checked = trace(model, example)
            with precisely(example.tensors):
                graph = lift(source, dtype, fixed)
            error = max(_distance(graph, model, call, output) for call, output in probes)
        # Tracing runs the user's own forward on symbols, which may raise anything; the reason is kept and reported.
        except Exception as error_found:
            notes.append(f"{tier} cannot trace the model: {_first_line(error_found)}")
            continue
        if error <= tolerance:
            return Capture(graph, tier, size_is_checked, tuple(notes), error)
        notes.append(f"{tier} traces another function: it differs from the model by {error:.1e} of the output's scale")
    _require_repeatable(model, example, expected, tolerance)
    partial = compile_parts(model, example, expected, compile_child, tolerance)
    notes += [f"{path} is kept as it is: {reason}" for path, reason in partial.kept.items()]
    notes.append(f"the model is kept as it is; compiled in place: {', '.join(partial.compiled) or 'nothing'}")
    graph = opaque_graph(partial.model, example, dtype, fixed)
    return Capture(graph, "submodules", partial.fixed_size, tuple(notes), 0.0, tuple(partial.compiled))


_TRACES: dict[str, Callable[[nn.Module, Example], tuple[Source, bool]]] = {
    "torch.fx": trace_symbolically, "torch.export": trace_by_export,
}  # fmt: skip


def _another_call(model: nn.Module, example: Example) -> list[tuple[Example, Any]]:
    """A call with other values and another batch, and its output; none where the model does not take it.

    An example of zeros would hide what a trace loses, and so would a batch that the trace burned in.
    """
    batch = next((tensor.shape[0] for tensor in example.tensors if tensor.dim() > 1), 1)
    call = example.redrawn(2 if batch == 1 else 1)
    try:
        return [(call, call.run(copy_model(model, share_parameters=True)))]
    except Exception:  # the user's own forward may refuse such a call in any way it likes
        return []


def _distance(graph: Graph, model: nn.Module, example: Example, expected: Any) -> float:
    named = example.cloned().bind(model)
    with precisely(example.tensors):
        return output_difference(expected, graph.evaluate(named))


def _require_repeatable(model: nn.Module, example: Example, expected: Any, tolerance: float) -> None:
    copied = copy_model(model, share_parameters=True)
    if not all(output_difference(expected, example.run(copied)) <= tolerance for _ in range(2)):
        raise InputError(
            f"{type(model).__name__} gives another output each time it is called on the same input (it draws random "
            "numbers or depends on its own earlier calls), so no result can be proved equal; pass in what changes"
        )


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"


__all__ = ["TIERS", "Capture", "Example", "capture", "output_difference"]
