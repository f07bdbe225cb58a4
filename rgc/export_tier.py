"""Tier 2: how does torch.export trace a model? Functionalised, with its assumptions about sizes made explicit."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from rgc.errors import TraceError
from rgc.example import Binding, Example, copy_model, declare, precisely
from rgc.lift import Source
from rgc.modules import has_hooks
from rgc.precision import is_precise
from rgc.symbolic_tier import RefuseAutocast

#: A size inside the model may be so many arithmetic operations away from the sizes of the input ...
MOST_OPERATIONS = 24

#: ... and so many conditions on sizes may be met; with more of either, symbolic algebra takes minutes to hours.
MOST_CONDITIONS = 100

#: Sizes up to this are tried against what torch.export assumes about an axis, beside multiples of the example's.
LARGEST_TRIED = 64


def trace_by_export(model: nn.Module, example: Example) -> tuple[Source, bool]:
    """The program of ``model``, and whether it checks at run time that sizes are those of the example.

    Raises `TraceError` for what the program would lose: hooks, writes to buffers or inputs, the freedom of the batch.
    """
    if any(has_hooks(module) for module in model.modules()):
        raise TraceError("forward hooks would be lost")
    binding = example.binding(model)
    args, kwargs = binding.call(binding.values)
    try:
        program = _export(model, Example(args, kwargs), _every_axis)
    except TraceError:
        raise
    except Exception:  # also export itself trips over sizes that are symbols; where it does not, it fails again
        program = _export(model, Example(args, kwargs), _batch_axis)
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise TraceError("forward overwrites its buffers or its inputs")
    graph = program.graph
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    users = [placeholders[spec.arg.name] for spec in signature.input_specs if spec.kind.name == "USER_INPUT"]
    bounds = _bounds(users, tree_flatten((args, kwargs))[0])
    _declare_inputs(graph, users, binding, bounds)
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    constants = {
        spec.arg.name: _stored(program, spec, weights)
        for spec in signature.input_specs
        if spec.kind.name != "USER_INPUT"
    }
    out = program.call_spec.out_spec
    source = Source(graph, program.graph_module, binding.values, constants, lambda o: tree_unflatten(list(o), out))
    return source, bool(bounds)


def _export(model: nn.Module, example: Example, free: Callable[[Any], Any]) -> torch.export.ExportedProgram:
    doubled = _with_two_samples(example)
    args, kwargs = tree_map(free, doubled.args), tree_map(free, doubled.kwargs)
    shapes = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    with _quietly(), torch.no_grad(), precisely(example.tensors), _Watch():
        dtype = torch.float64 if is_precise(example.tensors) else None  # export sees dtypes where calls do not
        copied = copy_model(model, dtype=dtype)
        program = torch.export.export(copied, doubled.args, doubled.kwargs, dynamic_shapes=shapes, strict=False)
        decomposed: torch.export.ExportedProgram = program.run_decompositions({})
    return decomposed


def _every_axis(leaf: Any) -> Any:
    return dict.fromkeys(range(leaf.dim()), torch.export.Dim.AUTO) if isinstance(leaf, Tensor) else None


def _batch_axis(leaf: Any) -> Any:
    return {0: torch.export.Dim.AUTO} if isinstance(leaf, Tensor) and leaf.dim() > 1 else None


class _TooComplexError(Exception):
    """The sizes inside the model are involved functions of those of the input."""


class _Watch(RefuseAutocast):
    """A context in which autocast is refused, and so are sizes that are too complex to compute with."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in args:
            if isinstance(tensor, Tensor) and any(map(_is_too_complex, tensor.shape)):
                raise _TooComplexError("sizes inside the model are too involved functions of the input's")
        return super().__torch_function__(func, types, args, kwargs)


def _is_too_complex(size: int | torch.SymInt) -> bool:
    if not isinstance(size, torch.SymInt):
        return False
    environment = size.node.shape_env
    met = 0 if environment is None else len(environment.guards)
    return met > MOST_CONDITIONS or size.node.expr.count_ops() > MOST_OPERATIONS


def _stored(program: torch.export.ExportedProgram, spec: Any, weights: Mapping[str, Tensor]) -> Any:
    """What a placeholder stands for that is no input: a parameter, a buffer (the model's own ones), or a constant."""
    if spec.target in program.state_dict:
        stored = program.state_dict[spec.target].detach()
        own = weights.get(spec.target, stored).detach()
        return own if torch.equal(own.to(stored.dtype), stored) else stored
    if spec.target in program.constants:
        return program.constants[spec.target]
    raise TraceError(f"the exported program needs {spec.target}, which is no tensor")


def _with_two_samples(example: Example) -> Example:
    """export treats a batch of one as a constant; two samples keep the axis free."""

    def double(leaf: Any) -> Any:
        single = isinstance(leaf, Tensor) and leaf.dim() > 1 and leaf.shape[0] == 1
        return torch.cat([leaf, leaf]) if single else leaf

    return Example(tree_map(double, example.args), tree_map(double, example.kwargs))


@contextmanager
def _quietly() -> Iterator[None]:
    """export reports on its own internals, and prints the graph where it fails; what matters is in the error."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


# --- inputs ------------------------------------------------------------------------------------------------------


def _declare_inputs(graph: fx.Graph, users: Sequence[fx.Node], binding: Binding, bounds: _Bounds) -> None:
    """The call's own arguments in place of the flat list of export's placeholders, with checks of what was assumed."""
    first = next(iter(graph.nodes))
    tracer = fx.proxy.GraphAppendingTracer(graph)
    with graph.inserting_before(first):
        leaves = tree_flatten(binding.call(declare(tracer, binding)))[0]
        for index, axis, low, high in bounds:
            size = leaves[index].shape[axis]
            only = f"is {low}" if low == high else f"is {low} or more"
            message = f"this compiled model holds where axis {axis} of {users[index].name} {only}; compile it again"
            holds = size == low if low == high else size >= low
            tracer.create_proxy("call_function", torch._assert, (holds, message), {})
    for node, leaf in zip(users, leaves, strict=True):
        if isinstance(leaf, fx.Proxy):
            node.replace_all_uses_with(leaf.node)
        graph.erase_node(node)


# --- sizes -------------------------------------------------------------------------------------------------------

#: Which input, which of its axes, the least and the largest size allowed (equal, or the second is infinite).
_Bounds = list[tuple[int, int, int, float]]


def _bounds(users: Sequence[fx.Node], leaves: Sequence[Any]) -> _Bounds:
    """What the trace took for granted about the sizes of inputs; channels (axis 1) are checked by the layers.

    Each condition that export met is tried on many sizes: one that fails below some size only is a least size, any
    other fixes the axis. The batch has to be free.
    """
    sources: dict[sympy.Symbol, tuple[int, int]] = {}
    bounds: _Bounds = []
    conditions: list[Any] = []
    for index, (node, leaf) in enumerate(zip(users, leaves, strict=True)):
        for axis, size in enumerate(node.meta["val"].shape if isinstance(leaf, Tensor) else ()):
            known = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
            if isinstance(known, sympy.Symbol):
                environment = size.node.shape_env
                conditions = [environment.replace(guard.expr) for guard in environment.guards]
                sources.setdefault(known, (index, axis))
            elif axis == 0 and leaf.dim() > 1:
                raise TraceError("the traced program holds for one batch size only")
            elif axis != 1:
                bounds.append((index, axis, leaf.shape[axis], leaf.shape[axis]))
    own = {symbol: leaves[index].shape[axis] for symbol, (index, axis) in sources.items()}
    if any(not each.free_symbols <= sources.keys() for each in conditions):
        raise TraceError("what forward does depends on values or sizes that are no size of an input")
    batches = {symbol for symbol, (index, axis) in sources.items() if axis == 0 and leaves[index].dim() > 1}
    sizes = {symbol: max(2, own[symbol]) if symbol in batches else own[symbol] for symbol in own}
    least: dict[sympy.Symbol, int] = {}
    for symbol in sizes:
        low = _least(symbol, sizes, conditions)
        if symbol in batches and low != 2:
            raise TraceError("what forward does depends on the batch size")
        least[symbol] = low or sizes[symbol]
        if symbol not in batches and low != 2:
            bounds.append((*sources[symbol], least[symbol], float("inf") if low else sizes[symbol]))
    if not _hold(conditions, least):  # each axis alone may be smaller, not all of them
        bounds = [(index, axis, leaves[index].shape[axis], leaves[index].shape[axis]) for index, axis, _, _ in bounds]
    return bounds


def _least(symbol: sympy.Symbol, sizes: dict[sympy.Symbol, int], conditions: Sequence[Any]) -> int | None:
    """The size from which on every condition holds; None where there are gaps."""
    others = {other: sympy.Integer(size) for other, size in sizes.items() if other != symbol}
    try:
        concerned = {each.xreplace(others) for each in conditions if symbol in each.free_symbols} - {sympy.true}
    except ZeroDivisionError:
        return None
    if not concerned:
        return 2
    own = sizes[symbol]
    multiples = (own * factor + shift for factor in range(1, 5) for shift in (-1, 0, 1))
    tried = sorted({*range(2, LARGEST_TRIED), *(size for size in multiples if size > 1)})
    good = [size for size in tried if _hold(concerned, {symbol: size})]
    return min(good) if good and good == tried[-len(good) :] and min(good) <= own else None


def _hold(conditions: Iterable[Any], sizes: dict[sympy.Symbol, int]) -> bool:
    numbers = {symbol: sympy.Integer(size) for symbol, size in sizes.items()}
    try:
        return all(bool(each.xreplace(numbers)) for each in conditions)
    except ZeroDivisionError:  # a condition on x % n where n comes out as 0
        return False
