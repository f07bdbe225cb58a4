"""Tier 1: how does torch.fx trace a model? With a tracer for which everything but the inputs is a constant."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from rgc.errors import TraceError
from rgc.example import Binding, Example, copy_model, declare, precisely
from rgc.lift import Source
from rgc.modules import has_hooks, is_leaf


def trace_symbolically(model: nn.Module, example: Example) -> Source:
    """The program of ``model`` with its module names; sizes stay free.

    Raises `TraceError`, or whatever the model's own code raises when it computes with symbols.
    """
    if has_hooks(model):
        raise TraceError("the model itself has forward hooks, which tracing would lose")
    try:
        return _trace(model, example, symbolic_parameters=False)
    except TraceError:
        raise
    except Exception as error:
        # What fails on parameters that are constants may trace with symbols for them: `token.expand(batch, -1, -1)`.
        try:
            return _trace(model, example, symbolic_parameters=True)
        except Exception:
            raise error from None


def _trace(model: nn.Module, example: Example, *, symbolic_parameters: bool) -> Source:
    binding = example.binding(model)
    traced = copy_model(model)  # tracing runs forward, which may write to the model
    tracer = _Tracer(binding, symbolic_parameters)
    with torch.no_grad(), precisely(example.tensors):
        graph = tracer.trace(traced)
    _require_unchanged(model, traced)
    spec = tracer.output_spec
    assert spec is not None  # set by the trace
    return Source(graph, traced, binding.values, {}, lambda leaves: tree_unflatten(list(leaves), spec))


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


class _Proxy(fx.Proxy):
    """A proxy to whose items one may assign, as the lifting knows assignments."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class _Tracer(fx.Tracer):
    """Symbolic tracing in which all but the tensors of the example (and of the model, if asked) is a constant."""

    record_stack_traces = True

    def __init__(self, binding: Binding, symbolic_parameters: bool) -> None:
        super().__init__()
        self._binding = binding
        self.proxy_buffer_attributes = self._symbolic_parameters = symbolic_parameters
        self._autocast = RefuseAutocast()
        self.output_spec: TreeSpec | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_leaf(m):
            return True
        pytorchs_own = type(m).__module__.startswith("torch.nn.modules") and not isinstance(m, nn.Sequential)
        return pytorchs_own and "forward" not in m.__dict__

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self._symbolic_parameters and isinstance(attr_val, Tensor) and attr_val.dim():
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        return attr_val

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self._autocast.check()
        return super().create_node(*args, **kwargs)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        args, kwargs = self._binding.call(declare(self, self._binding))

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
        if not _is_same(before[name], tensor):
            raise TraceError(f"forward overwrites {name} of the model")


def _is_same(before: Tensor, after: Tensor) -> bool:
    return before.shape == after.shape and torch.equal(before.nan_to_num(), after.nan_to_num())
