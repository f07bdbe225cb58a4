"""Tier 3: what becomes of a model that cannot be traced? It stays as it is, with the parts that can be compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rgc.errors import RgcError
from rgc.example import Example, copy_model, output_difference
from rgc.ir import Graph, Input, Origin, TensorType, Value
from rgc.operators import Opaque, Slot

#: Compiles a part (its path, itself, a call of it): the module that takes its place, and whether its size is fixed.
CompileChild = Callable[[str, nn.Module, Example], tuple[nn.Module, bool]]


@dataclass
class Partial:
    """A model with some of its parts compiled: which, and whether one of them holds at the example's size only.

    ``kept`` says of each part in which nothing was compiled why it is as it was.
    """

    model: nn.Module
    compiled: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    fixed_size: bool = False


def compile_parts(
    model: nn.Module, example: Example, expected: Any, compile_child: CompileChild, tolerance: float
) -> Partial:
    """A copy of ``model`` in which each part is compiled whose replacement leaves the output as it is."""
    partial = Partial(copy_model(model))
    calls = _record_calls(model, example)

    def visit(parent: nn.Module, path: str) -> bool:
        """Compile what can be; True if there was something."""
        found = False
        for name, child in list(parent.named_children()):
            here = f"{path}.{name}".lstrip(".")
            reason = _replace(parent, name, here) if list(child.children()) else ""  # a single layer has no parts
            inside = reason is not None and visit(child, here)
            if reason and not inside:
                partial.kept = {other: why for other, why in partial.kept.items() if not other.startswith(f"{here}.")}
                partial.kept[here] = reason
            found = found or inside or reason is None
        return found

    def _replace(parent: nn.Module, name: str, here: str) -> str | None:
        """Put a compiled part in the place of a child; why not, where it cannot be."""
        child, call = getattr(parent, name), calls.get(here)
        if call is None:
            return "it is not called on the example, or in several ways"
        try:
            replacement, fixed = compile_child(here, child, call)
        except RgcError as error:
            return str(error)
        setattr(parent, name, replacement)
        if not _difference(partial.model, example, expected) <= tolerance:
            setattr(parent, name, child)
            return "the model reads more of it than its output"
        partial.compiled.append(here)
        partial.fixed_size = partial.fixed_size or fixed
        return None

    visit(partial.model, "")
    return partial


def opaque_graph(model: nn.Module, example: Example, dtype: torch.dtype, fixed: bool) -> Graph:
    """A graph of one call: the model itself."""
    binding = example.binding(model).completed()
    slots: dict[str, Any] = {}
    inputs: list[Value] = []
    for name, value in binding.values.items():
        kind = None
        if isinstance(value, Tensor):
            kind = TensorType(tuple(value.shape), dtype if value.is_floating_point() else value.dtype, fixed)
        slots[name] = Slot(len(inputs))
        default = {"default": binding.defaults[name]} if name in binding.defaults else {}
        inputs.append(Value(Input(name, **default), (), kind, Origin((), f"input {name}"), name))
    args, kwargs = binding.call(slots)
    whole = Value(Opaque(model, args, tuple(kwargs.items())), inputs, None, Origin(("model",)), "model")
    return Graph(inputs, whole)


def _difference(model: nn.Module, example: Example, expected: Any) -> float:
    try:
        return output_difference(expected, example.run(copy_model(model, share_parameters=True)))
    except Exception:  # the rest of the model may need more of the part than its output; then the part stays
        return float("inf")


def _record_calls(model: nn.Module, example: Example) -> dict[str, Example]:
    """The call of each submodule by its path; those that are called in several ways are left out."""
    watched = copy_model(model, share_parameters=True)
    calls: dict[nn.Module, Example] = {}
    several: set[nn.Module] = set()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Example(args, kwargs)
        if module not in calls:
            calls[module] = call.cloned()
        elif _form(call) != _form(calls[module]):
            several.add(module)

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in watched.modules()]
    try:
        example.run(watched)
    finally:
        for handle in handles:
            handle.remove()
    paths = watched.named_modules(remove_duplicate=False)
    return {path: calls[module] for path, module in paths if module in calls and module not in several}


def _form(call: Example) -> Any:
    return tree_map(
        lambda leaf: (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf, (call.args, call.kwargs)
    )
