"""How is a compiled model turned into a torch.export program whose batch, and where possible sizes, stay free?

``torch.export`` traces at the example's sizes. A size that it then treats as a constant would make the program wrong,
not slow, at other sizes, so a program is only accepted when every size that is announced as free really is: no upper
bound on it, and no assumption of the form ``expression == constant``. Sizes that fail this are fixed instead, and the
result says so.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import logging
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_shape_config
from torch.utils import _pytree as pytree

from rgc.errors import InputError

Example = tuple[tuple[Any, ...], dict[str, Any]]

# What torch.export raises when it cannot trace: NotImplementedError and its own UserError are RuntimeErrors.
EXPORT_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, KeyError, AttributeError)


@dataclass(frozen=True)
class FreeProgram:
    """An exported program, the input dimensions that are free in it (``"x[0]"``), and remarks for the user."""

    program: ExportedProgram
    free_dimensions: tuple[str, ...]
    notes: tuple[str, ...]


def export_program(
    module: nn.Module, example_args: tuple[Any, ...], example_kwargs: Mapping[str, Any], *, free_sizes: bool
) -> FreeProgram:
    """Export with a free batch and, if ``free_sizes``, free trailing sizes; fix what the model does not allow.

    The program carries neither the example's values nor source paths.
    Raises InputError if torch.export cannot capture the model even at the example's exact shapes.
    """
    given = (example_args, dict(example_kwargs))
    examples = [given, *_with_a_batch_of_two(given)]
    freedoms = [*(["batch and sizes"] if free_sizes else []), "batch"]
    notes: dict[str, str] = {}
    for freedom, example in [(freedom, example) for freedom in freedoms for example in examples]:
        try:
            program = _export(module, *example, freedom)
        except EXPORT_ERRORS as error:
            notes.setdefault(freedom, f"could not be exported with {freedom} free: {_first_line(error)}")
            continue
        assumption = _first_assumption(module, program)
        if assumption is None:
            earlier = tuple(note for attempt, note in notes.items() if attempt != freedom)
            return _finished(program, earlier)
        notes.setdefault(freedom, f"with {freedom} free the model would hold only where {assumption}")
    try:
        return _finished(_export(module, *given, "nothing"), tuple(notes.values()))
    except EXPORT_ERRORS as error:
        raise InputError(f"torch.export cannot capture the model: {_first_line(error)}") from error


@contextmanager
def quiet_export() -> Iterator[None]:
    """Keep the exporters' remarks about themselves away from a user who did not ask for them."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export", "torch.onnx", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        # torch 2.11 deep-copies pytree specs through a class that it has itself deprecated.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        # torch 2.11 maps read-only archive bytes into tensors that nobody writes to.
        warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
        # Deprecated names used inside torch and onnxscript themselves; nothing that a caller could change.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(torch|onnxscript|onnx_ir|copyreg)\b")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|onnxscript|onnx_ir|copyreg)\b")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _export(
    module: nn.Module, example_args: tuple[Any, ...], example_kwargs: dict[str, Any], freedom: str
) -> ExportedProgram:
    inputs = inspect.signature(module.forward).bind(*example_args, **example_kwargs).arguments
    batch = _batch(inputs)

    def free_dimensions_of(leaf: object) -> dict[int, Any] | None:
        if not isinstance(leaf, Tensor) or freedom == "nothing":
            return None
        has_batch = leaf.dim() >= 2 and leaf.shape[0] == batch
        first_size = 2 if leaf.dim() >= 4 else 1  # [batch, channels, sizes...], or [batch, steps, channels]
        sizes = range(first_size, leaf.dim()) if freedom == "batch and sizes" and leaf.dim() >= 3 else range(0)
        return dict.fromkeys([*([0] if has_batch else []), *sizes], Dim.AUTO)

    shapes = {name: pytree.tree_map(free_dimensions_of, value) for name, value in inputs.items()}
    # Without this, torch.export treats a size of 1 in the example, or in any layer, as the constant 1;
    # torch.onnx.export sets it for the same reason (torch/onnx/_internal/exporter/_capture_strategies.py).
    configured = symbolic_shape_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]  # made at run time
    with quiet_export(), torch.no_grad(), configured:
        return torch.export.export(module, example_args, example_kwargs, dynamic_shapes=shapes)


def _batch(inputs: object) -> int | None:
    """The first dimension of the first input that may have a batch; inputs of another first dimension have none."""
    leaves = (leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
    return next((leaf.shape[0] for leaf in leaves if leaf.dim() >= 2), None)


def _with_a_batch_of_two(example: Example) -> Iterator[Example]:
    """The example twice over, if its batch is 1: some operators are traced differently for a single one."""
    if _batch(example) != 1:
        return

    def twice(leaf: object) -> object:
        return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() >= 2 and leaf.shape[0] == 1 else leaf

    args, kwargs = pytree.tree_map(twice, example)
    yield args, kwargs


def _finished(program: ExportedProgram, notes: tuple[str, ...]) -> FreeProgram:
    _forget_example(program)
    return FreeProgram(program, _free_dimensions(program), notes)


def _first_assumption(module: nn.Module, program: ExportedProgram) -> str | None:
    """The first condition under which only the program holds and which its inputs' shapes do not show."""
    for symbol, bounds in program.range_constraints.items():
        if bounds.upper < 1_000_000:  # 2**63 - 1 or infinity where it is free
            return f"{symbol} <= {bounds.upper}"
    conditions: list[str] = program._guards_code
    if not _is_made_of_torch_functions(module):
        return conditions[0] if conditions else None
    return next((condition for condition in conditions if not _is_harmless(condition)), None)


def _is_harmless(condition: str) -> bool:
    """Whether a condition only excludes degenerate sizes, or sizes at which an operator of the program itself raises.

    Every operator of the program looks at its real operands when it runs, so a condition matters only if it let
    torch.export replace a size by a constant, or choose a branch of Python code (see the caller).
    """
    comparison = ast.parse(condition, mode="eval").body
    if not isinstance(comparison, ast.Compare) or len(comparison.ops) != 1:
        return False
    left, relation, right = comparison.left, comparison.ops[0], comparison.comparators[0]
    if isinstance(relation, ast.NotEq):
        return True
    if isinstance(relation, ast.Eq):
        return not isinstance(left, ast.Constant) and not isinstance(right, ast.Constant)
    if isinstance(relation, (ast.Lt, ast.LtE)):
        return isinstance(left, ast.Constant)
    return isinstance(relation, (ast.Gt, ast.GtE)) and isinstance(right, ast.Constant)


def _is_made_of_torch_functions(module: nn.Module) -> bool:
    """Whether the graph holds no Python code of a model's own, which may branch on sizes."""
    if not isinstance(module, fx.GraphModule):
        return False
    for node in module.graph.nodes:
        if node.op == "call_module" and not type(module.get_submodule(node.target)).__module__.startswith("torch.nn."):
            return False
        if node.op == "call_function" and not _is_torch_function(node.target):
            return False
    return True


def _is_torch_function(function: Callable[..., Any]) -> bool:
    name = getattr(function, "__name__", "")
    if any(getattr(namespace, name, None) is function for namespace in (torch, operator, math, builtins)):
        return True
    return str(getattr(function, "__module__", "")).split(".")[0] in ("torch", "_operator")


def _forget_example(program: ExportedProgram) -> None:
    """Drop the user's example values and source paths; without an example torch.export does not run its guards."""
    program._example_inputs = None
    for part in program.graph_module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                node.meta.pop("stack_trace", None)


def _free_dimensions(program: ExportedProgram) -> tuple[str, ...]:
    inputs = set(program.graph_signature.user_inputs)
    return tuple(
        f"{node.name}[{dimension}]"
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in inputs and isinstance(node.meta.get("val"), Tensor)
        for dimension, size in enumerate(node.meta["val"].shape)
        if isinstance(size, torch.SymInt)
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
