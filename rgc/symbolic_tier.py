"""Tier 1: how does torch.fx trace a model? With a tracer for which everything but the inputs is a constant."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from rgc.errors import TraceError
from rgc.example import Binding, Example, copy_model, declare, is_same_tensor, precisely
from rgc.lift import Source
from rgc.modules import has_hooks, is_leaf
from rgc.traced_value import AnsweringTracer, Constant

#: The batch of a second call, by which a trace tells the batch from other sizes: not a size that turns up by chance.
OTHER_BATCH = 19


def trace_symbolically(model: nn.Module, example: Example) -> tuple[Source, bool]:
    """The program of ``model`` with its module names, and whether it checks that sizes are those of the example.

    Sizes stay free where ``forward`` asks nothing about them. Raises `TraceError`, or whatever the model's own code
    raises when it computes with symbols.
    """
    if has_hooks(model):
        raise TraceError("the model itself has forward hooks, which tracing would lose")
    # What fails on parameters that are constants may trace with symbols for them (`token.expand(batch, -1, -1)`), and
    # what asks about sizes (`if height % 7`) with the sizes of the example.
    first: Exception | None = None
    constants: tuple[Constant, ...] = ("nothing", "channels", "sizes")
    for constant in constants:
        for symbolic_parameters in (False, True):
            try:
                return _trace(model, example, symbolic_parameters, constant)
            except TraceError:
                raise
            except Exception as error:  # the model's own code may raise anything
                first = first or error
    assert first is not None
    raise first from None


def _trace(model: nn.Module, example: Example, symbolic_parameters: bool, constant: Constant) -> tuple[Source, bool]:
    binding = example.binding(model)
    traced = copy_model(model)  # tracing runs forward, which may write to the model
    calls = [example, *_other_calls(example, constant == "sizes")]
    may_refuse = None if constant == "sizes" else len(calls)
    if may_refuse is not None:
        calls.append(_with_other_channels(example))
    probes = [call.binding(model).values for call in calls]
    tracer = _Tracer(binding, probes, symbolic_parameters, constant, may_refuse)
    with torch.no_grad(), precisely(example.tensors):
        graph = tracer.trace(traced)
    _require_unchanged(model, traced)
    _share_weights(model, traced)
    if tracer.assumed_sizes or tracer.assumed_channels:
        leaves = tree_flatten(binding.call(binding.values))[0]
        _check_sizes(graph, tracer.inputs, leaves, example, only_channels=not tracer.assumed_sizes)
    spec = tracer.output_spec
    assert spec is not None  # set by the trace
    source = Source(graph, traced, binding.values, {}, lambda leaves: tree_unflatten(list(leaves), spec))
    return source, tracer.assumed_sizes


def _other_calls(example: Example, same_sizes: bool) -> list[Example]:
    """Calls by which a trace tells what depends on the batch and, unless ``same_sizes``, on other sizes."""
    if same_sizes:
        return [_resized(example, 1, 0)]
    return [_resized(example, 2, 3), _resized(example, 1, -1)]


def _resized(example: Example, factor: int, shift: int) -> Example:
    """The example with another batch, and each axis behind the channels of another size in its own way."""
    batch = next((tensor.shape[0] for tensor in example.tensors if tensor.dim() > 1), None)

    def resized(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() < 2:
            return leaf
        first = OTHER_BATCH if leaf.shape[0] == batch else leaf.shape[0]
        rest = [max(1, factor * size + shift * axis) for axis, size in enumerate(leaf.shape[2:], 1)]
        return leaf.new_empty((first, leaf.shape[1], *rest))

    return Example(tree_map(resized, example.args), tree_map(resized, example.kwargs))


def _with_other_channels(example: Example) -> Example:
    """The example with more channels: a model without a layer that counts them may take any number."""

    def resized(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() < 2:
            return leaf
        return leaf.new_empty((leaf.shape[0], leaf.shape[1] + OTHER_BATCH, *leaf.shape[2:]))

    return Example(tree_map(resized, example.args), tree_map(resized, example.kwargs))


def _check_sizes(
    graph: fx.Graph, inputs: Sequence[Any], leaves: Sequence[Any], example: Example, only_channels: bool
) -> None:
    """Refuse other sizes, or other channels, than those of the example at run time; the batch stays free."""
    tracer = fx.proxy.GraphAppendingTracer(graph)
    batch = next((tensor.shape[0] for tensor in example.tensors if tensor.dim() > 1), None)
    pairs = [(proxy.node, leaf) for proxy, leaf in zip(inputs, leaves, strict=True) if isinstance(leaf, Tensor)]
    nodes = list(graph.nodes)
    last = max((nodes.index(node) for node, _ in pairs), default=-1)
    with graph.inserting_before(nodes[last + 1]):
        for node, leaf in pairs:
            start = 1 if only_channels or (leaf.dim() > 1 and leaf.shape[0] == batch) else 0
            stop = 2 if only_channels else None
            size = tuple(leaf.shape[start:stop])
            shape = tracer.create_proxy("call_function", getattr, (fx.Proxy(node, tracer), "shape"), {})
            rest = tracer.create_proxy("call_function", operator.getitem, (shape, slice(start, stop)), {})
            same = tracer.create_proxy("call_function", operator.eq, (rest, size), {})
            wanted = "x".join(map(str, size))
            wanted = f"has {wanted} channels" if only_channels else f"is of size {wanted}"
            message = f"this compiled model holds where {node.name} {wanted}"
            message += " (any batch); compile it again for another" if start else "; compile it again for another"
            tracer.create_proxy("call_function", torch._assert, (same, message), {})


class RefuseAutocast(TorchFunctionMode):
    """A context in which a model may not turn autocast on or off: a trace in float64 would not show it."""

    def __init__(self) -> None:
        super().__init__()
        self._before = autocast_state()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.check()
        return func(*args, **(kwargs or {}))

    def check(self) -> None:
        """Raise `TraceError` where autocast is not as it was."""
        if autocast_state() != self._before:
            raise TraceError("forward turns autocast on or off, which a graph cannot hold")


class _Tracer(AnsweringTracer):
    """Symbolic tracing in which all but the tensors of the example (and of the model, if asked) is a constant."""

    record_stack_traces = True

    def __init__(
        self,
        binding: Binding,
        probes: Sequence[Mapping[str, Any]],
        symbolic_parameters: bool,
        constant: Constant,
        may_refuse: int | None,
    ) -> None:
        super().__init__(probes, constant, may_refuse)
        self._binding = binding
        self.inputs: list[Any] = []
        self.proxy_buffer_attributes = self._symbolic_parameters = symbolic_parameters
        self._autocast = RefuseAutocast()
        self.output_spec: TreeSpec | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_leaf(m):
            return True
        pytorchs_own = type(m).__module__.startswith("torch.nn.modules") and not isinstance(m, nn.Sequential)
        return pytorchs_own and "forward" not in m.__dict__

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.is_running:
            return attr_val
        if self._symbolic_parameters and isinstance(attr_val, Tensor) and attr_val.dim():
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        return attr_val

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self._autocast.check()
        return super().create_node(*args, **kwargs)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        args, kwargs = self._binding.call(declare(self, self._binding))
        self.inputs = tree_flatten((args, kwargs))[0]
        self.is_answering = True

        def run(*_: Any) -> list[Any]:
            leaves, self.output_spec = tree_flatten(root_fn(self.root, *args, **kwargs))
            return leaves

        return run, []


def autocast_state() -> tuple[Any, ...]:
    """What autocast does at present."""
    return tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda"))


def _require_unchanged(model: nn.Module, traced: nn.Module) -> None:
    before, after = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (model, traced))
    for name, tensor in after.items():
        if name not in before:
            raise TraceError(f"forward adds {name} to the model")
        if not is_same_tensor(before[name], tensor):
            raise TraceError(f"forward overwrites {name} of the model")


def _share_weights(model: nn.Module, traced: nn.Module) -> None:
    """Let ``traced``, a copy of ``model`` with the same weights, give its own up for those of ``model``."""
    modules = dict(traced.named_modules(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        if path not in modules:
            continue
        for own, given in ((modules[path]._parameters, module._parameters), (modules[path]._buffers, module._buffers)):
            own.update({name: tensor for name, tensor in given.items() if own.get(name) is not None})
