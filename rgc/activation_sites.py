"""Which activations does a model have, and where? Its activation layers, and the calls that its modules make.

A call (``F.relu(x)``, ``x.relu()``) is found by tracing the forward of the one module that makes it, with its children
as they are. So what cannot be traced elsewhere in the model does not matter.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.utils._pytree import tree_flatten

from rgc.decay import DecayedActivation, DecayedLeakyReLU

#: How an activation is called: the layer that is the same function, and its arguments behind the input, in order. As
#: PyTorch has it, ``inplace`` is behind them.
CALLS: Mapping[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "relu": (nn.ReLU, ()), "relu6": (nn.ReLU6, ()), "leaky_relu": (nn.LeakyReLU, ("negative_slope",)),
    "elu": (nn.ELU, ("alpha",)), "celu": (nn.CELU, ("alpha",)), "selu": (nn.SELU, ()),
    "gelu": (nn.GELU, ("approximate",)), "silu": (nn.SiLU, ()), "mish": (nn.Mish, ()),
    "hardswish": (nn.Hardswish, ()), "hardtanh": (nn.Hardtanh, ("min_val", "max_val")),
    "softplus": (nn.Softplus, ("beta", "threshold")), "softsign": (nn.Softsign, ()), "tanh": (nn.Tanh, ()),
    "tanhshrink": (nn.Tanhshrink, ()), "softshrink": (nn.Softshrink, ("lambd",)),
    "hardshrink": (nn.Hardshrink, ("lambd",)), "log_sigmoid": (nn.LogSigmoid, ()), "sigmoid": (nn.Sigmoid, ()),
    "hardsigmoid": (nn.Hardsigmoid, ()),
}  # fmt: skip

#: With a minimum of 0 and no maximum these are a ReLU.
CLAMPS = ("clamp", "clamp_min", "clip")

_LAYERS: tuple[type[nn.Module], ...] = (*(layer for layer, _ in CALLS.values()), nn.PReLU, nn.RReLU, nn.Threshold)
_TIMM = ("timm.layers.activations", "timm.layers.activations_me")
_FADING = (DecayedActivation, DecayedLeakyReLU)


@dataclass(frozen=True)
class Site:
    """One activation: a layer of the model, or a call ``node`` that the module at ``caller`` makes, as a layer."""

    path: str
    layer: nn.Module
    caller: str = ""
    node: fx.Node | None = None


@dataclass(frozen=True)
class Forward:
    """What one module does by itself, its children as they are: in training and in evaluation; or why none can tell."""

    module: nn.Module
    graphs: tuple[fx.Graph, ...]
    reason: str = ""

    @property
    def graph(self) -> fx.Graph | None:
        """What it does whether it trains or not; None where the one is not the other."""
        return None if self.reason else self.graphs[0]


def layer_sites(model: nn.Module) -> list[Site]:
    """The activation layers of ``model`` by their (first) path; what decays already is none."""
    inside = tuple(f"{path}." if path else "" for path, module in model.named_modules() if isinstance(module, _FADING))
    return [
        Site(path, module)
        for path, module in model.named_modules()
        if is_activation(module) and not (inside and path.startswith(inside))
    ]


def is_activation(module: nn.Module) -> bool:
    """Is this an activation of PyTorch's, also by a class that keeps its forward, or one of timm's own?"""
    kind = type(module)
    return kind.__module__ in _TIMM or any(issubclass(kind, each) and kind.forward is each.forward for each in _LAYERS)


def forwards(model: nn.Module) -> dict[str, Forward]:
    """What each module of ``model`` does by itself that is no layer of PyTorch's or activation of timm's, by path."""
    return {
        path: _forward(module)
        for path, module in model.named_modules()
        if not type(module).__module__.startswith("torch.nn.")
        and type(module).__module__ not in _TIMM
        and not isinstance(module, _FADING)
    }


def call_sites(traced: Mapping[str, Forward]) -> Iterator[Site]:
    """The calls that are activations: named after the function, and counted past what their module has of that name."""
    for caller, forward in traced.items():
        taken = set(dir(forward.module))
        for node in forward.graph.nodes if forward.graph else ():
            layer = _layer_of(node)
            if layer is None:
                continue
            name = free = called(node).rstrip("_") if called(node).rstrip("_") not in CLAMPS else "relu"
            count = 0
            while free in taken:
                count += 1
                free = f"{name}_{count}"
            taken.add(free)
            yield Site(f"{caller}.{free}" if caller else free, layer, caller, node)


def hidden_callers(traced: Mapping[str, Forward]) -> Iterator[tuple[str, Forward]]:
    """Modules whose calls cannot be told although their code names an activation that is none of their attributes."""
    names = {*CALLS, *CLAMPS, *(f"{name}_" for name in CALLS)}
    for path, forward in traced.items():
        kinds = [kind for kind in type(forward.module).__mro__ if not kind.__module__.startswith("torch.")]
        codes = [getattr(member, "__code__", None) for kind in kinds for member in vars(kind).values()]
        used = {name for code in codes if code is not None for name in code.co_names}
        if forward.graph is None and (used & names) - {name for name, _ in forward.module.named_children()}:
            yield path, forward


def called(node: fx.Node) -> str:
    """The name of PyTorch's function or method that ``node`` calls; empty for any other node."""
    if node.op == "call_method":
        return str(node.target)
    home = str(getattr(node.target, "__module__", None) or "torch.")  # functions of C have none
    if node.op == "call_function" and f"{home}.".startswith(("torch.", "_operator.")):
        return str(getattr(node.target, "__name__", ""))
    return ""


def is_in_place(node: fx.Node) -> bool:
    """Does this call of an activation overwrite its input?"""
    name = called(node)
    if name.endswith("_") or node.kwargs.get("inplace"):
        return True
    arguments = CALLS[name][1] if name in CALLS else ()
    return node.op == "call_function" and len(node.args) == len(arguments) + 2 and bool(node.args[-1])


def _layer_of(node: fx.Node) -> nn.Module | None:
    """The layer that is this call; None where it is no activation, or one whose arguments are computed."""
    name = called(node).rstrip("_")
    rest = (node.args[1:], {key: value for key, value in node.kwargs.items() if key != "input"})
    if len(node.all_input_nodes) != 1 or any(isinstance(leaf, fx.Node) for leaf in tree_flatten(rest)[0]):
        return None
    if name in CLAMPS:
        return nn.ReLU() if _is_rectifying(node, name) else None
    if name not in CALLS:
        return None
    layer, arguments = CALLS[name]
    given = {**dict(zip(arguments, node.args[1:], strict=False)), **node.kwargs}
    return layer(**{key: value for key, value in given.items() if key in arguments})


def _is_rectifying(node: fx.Node, name: str) -> bool:
    order = ("input", "min") if name == "clamp_min" else ("input", "min", "max")
    given = {**dict(zip(order, node.args, strict=False)), **node.kwargs}
    low = given.get("min")
    return isinstance(low, int | float) and low == 0 and given.get("max") is None


def _forward(module: nn.Module) -> Forward:
    hooks = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    shared = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    graphs: list[fx.Graph] = []
    for training in (True, False):
        running = copy.deepcopy(module, dict(shared))  # forward may write to its module
        running.training = training
        before = dict(vars(running))
        try:
            graphs.append(_ShallowTracer().trace(running))
        except Exception as error:  # forward is the user's own and was not written for symbols
            line = (str(error).strip().splitlines() or [""])[0]
            return Forward(module, (), f"{type(error).__name__}: {line[:160]}")
        written = [name for name, value in vars(running).items() if before.get(name, before) is not value]
        if written:
            return Forward(module, (), f"its forward sets the attribute {written[0]!r}")
    if any(hooks):
        return Forward(module, tuple(graphs), "it has hooks, which a trace would lose")
    if _printed(graphs[0]) != _printed(graphs[1]):
        return Forward(module, tuple(graphs), "its forward depends on whether it trains")
    return Forward(module, tuple(graphs))


def _printed(graph: fx.Graph) -> list[Any]:
    return [(node.op, node.target, str(node.args), str(node.kwargs)) for node in graph.nodes]


class _Value(fx.Proxy):
    """A value of a trace in which ``y += z`` writes to the tensor, as it does in Python."""

    def __iadd__(self, other: Any) -> Any:
        return self._overwritten(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._overwritten(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._overwritten(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._overwritten(operator.itruediv, other)

    def _overwritten(self, function: Callable[..., Any], other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})


class _ShallowTracer(fx.Tracer):
    """Traces the forward of one module: every child is a leaf, every parameter and buffer a symbol."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> _Value:
        return _Value(node, self)
