"""How does a model become a graph? Three tiers, each checked against the eager model before it is trusted.

1. ``torch.fx`` symbolic tracing with a tracer of our own: parameters, buffers and Python numbers are constants, so
   ``if self.scale == 1.0`` traces and weights that are computed from parameters fold away.
2. ``torch.export``, which functionalises, for models whose control flow or in-place writes the first tier cannot follow.
3. Submodule by submodule: a model that neither can trace as a whole stays as it is, and each child that can be traced
   is compiled in place.

The model is captured in float64, so that constants fold exactly and the proof can compare to 1e-10.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from rgc.errors import InputError, RgcError, TraceError
from rgc.ir import Graph, Input, Origin, TensorType, Value
from rgc.lift import Source, has_hooks, is_leaf, lift
from rgc.operators import Opaque, Slot
from rgc.proof import TOLERANCE, relative_difference

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Example:
    """One call of a model: positional and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def cast(self, dtype: torch.dtype) -> Example:
        """The same call with floating-point tensors in ``dtype``; every tensor a copy."""

        def convert(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.detach().to(dtype, copy=True) if leaf.is_floating_point() else leaf.detach().clone()

        return Example(tree_map(convert, self.args), tree_map(convert, self.kwargs))

    def to(self, device: torch.device) -> Example:
        """The same call with its tensors on ``device``."""

        def move(leaf: Any) -> Any:
            return leaf.to(device) if isinstance(leaf, Tensor) else leaf

        return Example(tree_map(move, self.args), tree_map(move, self.kwargs))

    def run(self, model: Callable[..., Any]) -> Any:
        """The model's output on copies of the arguments (a model may overwrite its input)."""
        fresh = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs))
        with torch.no_grad():
            return model(*fresh[0], **fresh[1])

    def bind(self, model: nn.Module) -> dict[str, Any]:
        """Argument values by the names in the signature of ``forward``."""
        try:
            bound = inspect.signature(model.forward).bind(*self.args, **self.kwargs)
        except TypeError as error:
            raise InputError(f"the example does not fit {type(model).__name__}.forward: {error}") from error
        return dict(bound.arguments)

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments."""
        return [leaf for leaf in tree_flatten((self.args, self.kwargs))[0] if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Capture:
    """A traced model: its graph, the tier that traced it, whether sizes were burned in, and what to tell the user."""

    graph: Graph
    tier: str
    fixed_size: bool
    notes: tuple[str, ...] = ()
    error: float = 0.0


def capture(
    model: nn.Module,
    example: Example,
    expected: Any,
    dtype: torch.dtype,
    *,
    fixed: bool,
    compile_child: Callable[[nn.Module, Example], nn.Module],
    tolerance: float = TOLERANCE,
) -> Capture:
    """The graph of ``model`` (already in the dtype of the proof), by the first tier that reproduces ``expected``.

    ``dtype`` is the deployed dtype, for the types; ``compile_child`` compiles what tier 3 finds traceable.
    """
    notes: list[str] = []
    for tier, trace in (("torch.fx", _symbolic), ("torch.export", _exported)):
        try:
            source, burned = trace(model, example)
            graph = lift(source, dtype, fixed)
            error = _distance(graph, model, example, expected)
        # Tracing runs the user's own forward on proxies, which may raise anything; the reason is kept and reported.
        except Exception as error_found:
            notes.append(f"{tier} cannot trace the model: {_first_line(error_found)}")
            continue
        if error <= tolerance:
            return Capture(graph, tier, burned, tuple(notes), error)
        notes.append(f"{tier} traces another function: it differs from the model by {error:.1e} of the output's scale")
    graph, compiled = _by_children(model, example, expected, dtype, fixed, compile_child)
    notes.append(f"the model is kept as it is; compiled in place: {', '.join(compiled) or 'nothing'}")
    return Capture(graph, "submodules", bool(compiled), tuple(notes))


def output_difference(expected: Any, found: Any) -> float:
    """The largest difference over all tensors of two outputs, each relative to its own scale."""
    left, right = (tree_flatten(_plain(output))[0] for output in (expected, found))
    if len(left) != len(right):
        return float("inf")
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            worst = max(worst, relative_difference(a, b))
        elif isinstance(a, Tensor) or isinstance(b, Tensor) or a != b:
            return float("inf")
    return worst


def _plain(output: Any) -> Any:
    """Mappings as plain dicts, so that an OrderedDict equals the dict that a traced model returns."""
    if isinstance(output, Mapping):
        return {key: _plain(value) for key, value in output.items()}
    return output


def _distance(graph: Graph, model: nn.Module, example: Example, expected: Any) -> float:
    named = example.bind(model)
    found = graph.evaluate({name: _copied(value) for name, value in named.items()})
    return output_difference(expected, found)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"


# --- tier 1 ------------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Symbolic tracing in which everything but the tensors of the example is a constant."""

    record_stack_traces = True

    def __init__(self, named: Mapping[str, Any]) -> None:
        super().__init__()
        self._named = named

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_leaf(m):
            return True
        plain = type(m).__module__.startswith("torch.nn.modules") and not list(m.children())
        return plain and "forward" not in m.__dict__

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val  # a Parameter itself, not a proxy for it

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        arguments = {
            name: self.create_proxy("placeholder", name, (), {}) if _holds_tensors(value) else value
            for name, value in self._named.items()
        }
        return lambda *_: root_fn(self.root, **arguments), []


def _symbolic(model: nn.Module, example: Example) -> tuple[Source, bool]:
    if has_hooks(model):
        raise TraceError("the model itself has forward hooks, which tracing would lose")
    named = example.bind(model)
    parameters = inspect.signature(model.forward).parameters
    if any(parameters[name].kind in _STARRED for name in named):
        raise TraceError("forward takes *args or **kwargs")
    traced = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # tracing may set attributes
    with torch.no_grad():
        graph = _Tracer(named).trace(traced)
    for (name, before), after in zip(model.named_buffers(), traced.buffers(), strict=True):
        if not torch.equal(before, after):
            raise TraceError(f"the model overwrites its buffer {name}")
    return Source(graph, traced, named, {}, lambda output: output), False


_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_flatten(value)[0])


# --- tier 2 ------------------------------------------------------------------------------------------------------


def _exported(model: nn.Module, example: Example) -> tuple[Source, bool]:
    if any(has_hooks(module) for module in model.modules()):
        raise TraceError("forward hooks would be lost")
    doubled = _with_two_samples(example)
    shapes = tree_map(_automatic_dims, (doubled.args, doubled.kwargs))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # export warns about its own internals; the result is checked below
        program = torch.export.export(
            model, doubled.args, doubled.kwargs or None,
            dynamic_shapes=_by_name(model, example, shapes), strict=False,
        ).run_decompositions({})  # fmt: skip
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise TraceError("the model overwrites its buffers or its inputs")
    constants: dict[str, Any] = {}
    for names, home in ((signature.inputs_to_parameters, program.state_dict), (signature.inputs_to_buffers, None)):
        for placeholder, path in names.items():
            table = program.state_dict if home is not None or path in program.state_dict else program.constants
            constants[placeholder] = table[path].detach()
    for placeholder, path in signature.inputs_to_lifted_tensor_constants.items():
        constants[placeholder] = program.constants[path]
    named = example.bind(model)
    if any(not isinstance(value, Tensor) and isinstance(value, list | tuple | dict) for value in named.values()):
        raise TraceError("an input is a nested structure of tensors")
    users = [name for name in signature.user_inputs if isinstance(name, str)]
    flat = [leaf for leaf in tree_flatten((example.args, example.kwargs))[0] if isinstance(leaf, Tensor)]
    order = [name for name, value in named.items() if isinstance(value, Tensor)]
    tensors = dict(zip(users, flat, strict=True))
    renamed = dict(zip(users, _in_call_order(order, named, flat), strict=True))
    spec = program.call_spec.out_spec
    burned = _burned_axes(program.graph, users)
    if 0 in burned:
        raise TraceError("the traced program holds for one batch size only")
    graph = _renamed_inputs(program.graph, renamed)
    values = {renamed[name]: tensor for name, tensor in tensors.items()}
    return Source(
        graph, program.graph_module, values, constants, lambda output: tree_unflatten(list(output), spec)
    ), bool(burned)


def _in_call_order(order: list[str], named: dict[str, Any], flat: list[Tensor]) -> list[str]:
    by_tensor = {id(named[name]): name for name in order}
    return [by_tensor[id(tensor)] for tensor in flat]


def _automatic_dims(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return None
    return {axis: torch.export.Dim.AUTO for axis in range(leaf.dim())}


def _by_name(model: nn.Module, example: Example, shapes: Any) -> dict[str, Any]:
    args, kwargs = shapes
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def _burned_axes(graph: fx.Graph, users: list[str]) -> set[int]:
    """The axes of inputs whose size export specialised; channels (axis 1) are expected to be."""
    burned: set[int] = set()
    for node in graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" and node.name in users else None
        if isinstance(value, Tensor):
            burned |= {axis for axis, n in enumerate(value.shape) if isinstance(n, int) and axis != 1}
    return burned


def _with_two_samples(example: Example) -> Example:
    """export treats a batch of one as a constant; two samples keep the axis free."""

    def double(leaf: Any) -> Any:
        single = isinstance(leaf, Tensor) and leaf.dim() > 1 and leaf.shape[0] == 1
        return torch.cat([leaf, leaf]) if single else leaf

    return Example(tree_map(double, example.args), tree_map(double, example.kwargs))


def _renamed_inputs(graph: fx.Graph, names: Mapping[str, str]) -> fx.Graph:
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in names:
            node.target = names[node.name]
    return graph


# --- tier 3 ------------------------------------------------------------------------------------------------------


def _by_children(
    model: nn.Module, example: Example, expected: Any, dtype: torch.dtype, fixed: bool,
    compile_child: Callable[[nn.Module, Example], nn.Module],
) -> tuple[Graph, list[str]]:  # fmt: skip
    """One opaque call of the model in which every child that compiles was replaced by its compiled form."""
    kept = copy.deepcopy(model)
    calls = _record_calls(kept, example)
    compiled: list[str] = []
    _compile_children(kept, "", calls, compile_child, compiled)
    error = output_difference(expected, example.run(kept))
    if not error <= TOLERANCE:
        kept, compiled = copy.deepcopy(model), []
    named = example.bind(model)
    inputs: list[Value] = []
    slots: dict[str, Any] = {}
    for name, value in named.items():
        if isinstance(value, Tensor):
            given = TensorType(tuple(value.shape), dtype if value.is_floating_point() else value.dtype, fixed)
            slots[name] = Slot(len(inputs))
            inputs.append(Value(Input(name), (), given, Origin((), f"input {name}"), name))
        else:
            slots[name] = value
    whole = Value(Opaque(kept, (), tuple(slots.items())), inputs, None, Origin(("model",)), "model")
    return Graph(inputs, whole), compiled


def _record_calls(model: nn.Module, example: Example) -> dict[nn.Module, list[Example]]:
    calls: dict[nn.Module, list[Example]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, []).append(Example(args, kwargs).cast(torch.float64))

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in model.modules()]
    try:
        example.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _compile_children(
    parent: nn.Module, path: str, calls: Mapping[nn.Module, list[Example]],
    compile_child: Callable[[nn.Module, Example], nn.Module], compiled: list[str],
) -> None:  # fmt: skip
    for name, child in parent.named_children():
        here = f"{path}.{name}".lstrip(".")
        seen = calls.get(child, [])
        if not seen:  # a container like ModuleList, or never called
            _compile_children(child, here, calls, compile_child, compiled)
            continue
        if not list(child.children()):
            continue
        try:
            if len({tuple(t.shape for t in call.tensors) for call in seen}) > 1:
                raise TraceError(f"{here} is called with several sizes")
            replacement = compile_child(child, seen[0])
        except RgcError:
            _compile_children(child, here, calls, compile_child, compiled)
            continue
        setattr(parent, name, replacement)
        compiled.append(here)
