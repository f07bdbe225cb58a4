"""What is ``torch.compile(model, backend="rgc")``? Each graph that dynamo finds is merged, and then given to Inductor.

Dynamo hands over graphs in which weights are inputs, since they may change. Here they are constants while they are
what they were: before each call they are compared with what was merged, and merged anew when they have changed. What
trains, wants gradients, writes to its inputs or cannot be proved equal goes to Inductor as it is, and a warning says
why.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from rgc.attempt import Options
from rgc.compiler import CompiledModule, compile_with
from rgc.cost import OBJECTIVES
from rgc.errors import InputError, RgcError
from rgc.example import Example, unchanged_generators
from rgc.passbook import resolve
from rgc.report import Report
from rgc.verify import require_level

Runner = Callable[..., Any]

#: How it is told whether a weight has changed.
Watch = Literal["contents", "versions"]

#: A graph whose weights have changed so often is left to the inner backend for good.
MOST_CHANGES = 3


@dataclass(frozen=True)
class Settings:
    """What ``torch.compile(model, backend="rgc", options={...})`` takes; the rest is what `rgc.compile` takes.

    passes, objective, target, verify: as for `rgc.compile`.
    inner: the backend of ``torch.compile`` that gets the merged graphs, "inductor" or another; "eager" runs them.
    weights: "contents" compares every weight with what was merged before each call, which costs one reading of both;
    "versions" trusts PyTorch's version counters, which see every in-place operation, but not one through
    ``weight.data``.
    report: a function that is given the `Report` of each graph that was merged.
    """

    passes: Any = "default"
    objective: Any = "latency"
    target: str | None = None
    verify: Any = "quick"
    inner: str = "inductor"
    weights: Watch = "contents"
    report: Callable[[Report], object] = lambda _: None

    @staticmethod
    def of(options: Mapping[str, Any] | None) -> Settings:
        """The settings of ``options``; `InputError` where one is unknown or has no such value."""
        known = list(Settings.__dataclass_fields__)
        for name in options or {}:
            if name not in known:
                raise InputError(f"backend rgc has no option {name!r}; it takes {', '.join(known)}")
        settings = Settings(**dict(options or {}))
        if settings.objective not in OBJECTIVES:
            raise InputError(f"unknown objective {settings.objective!r}; choose one of {', '.join(OBJECTIVES)}")
        if settings.weights not in get_args(Watch):
            raise InputError(f"option weights is one of {', '.join(get_args(Watch))}, got {settings.weights!r}")
        if settings.inner not in ("eager", *torch._dynamo.list_backends(())):
            raise InputError(f"torch.compile has no backend {settings.inner!r} to give the merged graphs to")
        if settings.inner == "rgc":
            raise InputError("the inner backend cannot be rgc itself; leave it out for Inductor")
        resolve(settings.passes)
        require_level(settings.verify)
        return settings

    @property
    def compiling(self) -> Options:
        """The same for the compiler."""
        return Options(self.passes, self.objective, self.target, verify=self.verify)


def compile_graph(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Runner:
    """The backend: what ``torch.compile`` calls for each graph, with its real inputs, weights among them.

    Raises `InputError` for options that there are not, and for a ``mode``, which is Inductor's.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    >>> layers = []
    >>> options = {"inner": "eager", "report": lambda report: layers.append(report.ops_after)}
    >>> with torch.no_grad():
    ...     y = torch.compile(model, backend=compile_graph, options=options)(torch.randn(1, 3, 8, 8))
    >>> layers
    [Counter({'Conv2d': 1})]
    """
    if mode is not None:
        raise InputError(f"backend rgc takes no mode ({mode!r}), which is Inductor's; it takes options")
    settings = Settings.of(options)
    reason = _why_not(graph, example_inputs)
    if reason:
        _tell(reason, settings)
        inner: Runner = torch._dynamo.lookup_backend(settings.inner)(graph, list(example_inputs))
        return inner
    return _LiveGraph(graph, settings)


def _tell(reason: str, settings: Settings) -> None:
    warnings.warn(f"rgc merges nothing in a graph and gives it to {settings.inner} as it is: {reason}", stacklevel=2)


def _why_not(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> str:
    """Why weights cannot be constants in this graph; empty where they can."""
    tensors = [each for each in [*example_inputs, *graph.parameters()] if isinstance(each, Tensor)]
    if torch.is_grad_enabled() and any(each.requires_grad for each in tensors):
        return "gradients are wanted; call it under torch.no_grad(), or freeze the parameters"
    if any(torch.is_autocast_enabled(kind) for kind in {each.device.type for each in tensors}):
        return "autocast is on, under which no result could be proved; convert the model instead, e.g. model.half()"
    for node in graph.graph.nodes:
        if node.op == "call_function" and _trains(node):
            return f"{node.name} is in training mode; call model.eval() first"
    odd = next((each for each in example_inputs if not isinstance(each, Tensor | int | float | torch.SymInt)), None)
    odd = odd if odd is not None else next((each for each in tensors if type(each) not in _PLAIN), None)
    return f"it has an input of type {type(odd).__name__}" if odd is not None else ""


_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def _trains(node: fx.Node) -> bool:
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a function of C; what it writes or draws is seen when the graph runs
        return False
    bound.apply_defaults()
    return bound.arguments.get("training") is True


class _LiveGraph:
    """A graph with live weights: merged for those that it is called with, and anew when they have changed."""

    def __init__(self, graph: fx.GraphModule, settings: Settings) -> None:
        self._graph, self._settings = graph, settings
        self._inputs = _Inputs.of(graph)
        self._merged: dict[tuple[Any, ...], _Merged] = {}
        self._unchanged: Runner | None = None
        self._changes = 0
        self.__name__ = "rgc"  # which dynamo prints

    def __call__(self, *inputs: Any) -> Any:
        if self._unchanged is not None:
            return self._unchanged(*inputs)
        weights = [inputs[index] for index in self._inputs.weights]
        numbers = {index: _number(inputs[index]) for index in self._inputs.numbers}
        key = (*map(id, weights), *numbers.values())
        merged = self._merged.get(key)
        if merged is None or not merged.holds_for(weights):
            self._merged = {other: each for other, each in self._merged.items() if each.are_alive}
            self._changes += any(other[: len(weights)] == key[: len(weights)] for other in self._merged)
            made = self._merge(weights, numbers, inputs)
            if isinstance(made, str):
                return self._leave(made)(*inputs)
            merged = self._merged[key] = made
        return merged.run(*(inputs[index] for index in self._inputs.tensors))

    def _leave(self, reason: str) -> Runner:
        """From now on the graph as it is, in the inner backend."""
        if reason:
            _tell(reason, self._settings)
        self._merged.clear()
        self._unchanged = self._in_inner_backend(self._graph)
        return self._unchanged

    def _merge(self, weights: list[Tensor], numbers: Mapping[int, Any], inputs: Sequence[Any]) -> _Merged | str:
        """The graph with these weights, merged; or why it is not: empty where there is nothing to merge."""
        if self._changes >= MOST_CHANGES:
            return f"its weights, or numbers in it, have changed {self._changes} times since it was first merged"
        with torch.inference_mode(False), torch.no_grad(), unchanged_generators():
            copies = [weight.detach().clone() for weight in weights]
            closed = self._inputs.closed(self._graph, copies, numbers)
            tensors = [inputs[index].detach().clone() for index in self._inputs.tensors]
            try:
                reason, kept = _effects(closed, tensors, copies)
                if reason:
                    return reason
                dynamic = self._inputs.is_dynamic
                options = replace(self._settings.compiling, fixed_size=False if dynamic else None)
                compiled = compile_with(closed, Example(tuple(tensors)), options)
            except RgcError as error:
                return str(error)
        if dynamic and _checks_sizes(compiled):
            return "it is called with inputs of several sizes, and can be traced for one size only"
        if not compiled.report.rewrites:
            return "; ".join(compiled.report.notes)
        with torch.inference_mode(False), torch.no_grad(), unchanged_generators():
            if _effects(compiled, tensors, copies)[1] != kept:
                return "an output is the memory of an input in the one and not in the other form"
        self._settings.report(compiled.report)
        return _Merged.of(weights, copies, self._settings.weights, self._in_inner_backend(compiled))

    def _in_inner_backend(self, module: nn.Module) -> Runner:
        if self._settings.inner == "eager":
            return module
        inner: Runner = torch.compile(module, backend=self._settings.inner, dynamic=self._inputs.is_dynamic)
        return inner


@dataclass(frozen=True)
class _Merged:
    """A merged graph, and the weights that it holds for: the very tensors, and what was in them."""

    weights: tuple[weakref.ref[Tensor], ...]
    versions: tuple[tuple[int, int], ...]
    contents: tuple[Tensor, ...] | None
    run: Runner

    @staticmethod
    def of(weights: Sequence[Tensor], copies: Sequence[Tensor], watch: Watch, run: Runner) -> _Merged:
        has_versions = not any(weight.is_inference() for weight in weights)
        by_version = watch == "versions" and has_versions
        versions = tuple(map(_version, weights)) if by_version else ()
        return _Merged(tuple(map(weakref.ref, weights)), versions, None if by_version else tuple(copies), run)

    @property
    def are_alive(self) -> bool:
        return all(weight() is not None for weight in self.weights)

    def holds_for(self, weights: Sequence[Tensor]) -> bool:
        """Are these the very weights, and have they not changed?"""
        if any(ref() is not weight for ref, weight in zip(self.weights, weights, strict=True)):
            return False
        if self.contents is None:
            return self.versions == tuple(map(_version, weights))
        return all(map(torch.equal, self.contents, weights))


def _version(weight: Tensor) -> tuple[int, int]:
    """What changes with every write that PyTorch counts, and with new memory."""
    return weight._version, weight.data_ptr()


def _effects(module: Runner, tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[str, list[int]]:
    """What a call does beside computing: why it cannot stand as a function, and whose memory each output is."""
    given = [tensor.clone() for tensor in tensors]
    before = [each._version for each in (*given, *weights)]
    try:
        outputs = [each for each in tree_flatten(module(*given))[0] if isinstance(each, Tensor)]
    except Exception as error:  # the user's own operators may raise anything; then the inner backend shall show it
        return f"it does not run by itself ({type(error).__name__})", []
    if before != [each._version for each in (*given, *weights)]:
        return "it writes to its inputs or weights", []
    memory = [_memory(each) for each in (*given, *outputs)]
    if {_memory(each) for each in weights} & set(memory[len(given) :]):
        return "it returns the memory of a weight", []
    return "", [memory.index(each) for each in memory]


def _memory(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), id(tensor) if storage.nbytes() == 0 else 0  # the empty share nothing


def _checks_sizes(compiled: CompiledModule) -> bool:
    calls = [node.target for node in compiled.graph.nodes if node.op == "call_function"]
    return compiled.report.fixed_size or torch._assert in calls


@dataclass(frozen=True)
class _Inputs:
    """What the placeholders of a graph are, by position: weights, other tensors, sizes of those, and numbers.

    ``sizes`` has, for each placeholder that is a size and used, the placeholder and axis of which it is one. Numbers
    that are none (dynamo passes an ``eps`` as a tensor that is only asked for its item) are constants while they last.
    """

    weights: tuple[int, ...]
    tensors: tuple[int, ...]
    sizes: Mapping[int, tuple[int, int]]
    numbers: tuple[int, ...]
    is_dynamic: bool

    @staticmethod
    def of(graph: fx.GraphModule) -> _Inputs:
        nodes = graph.graph.find_nodes(op="placeholder")
        values = [node.meta.get("example_value") for node in nodes]
        numeric = [_is_number(node) for node in nodes]
        weights = tuple(index for index, node in enumerate(nodes) if not numeric[index] and _is_weight(node))
        tensors = tuple(index for index in range(len(nodes)) if not numeric[index] and index not in weights)
        sizes: dict[int, tuple[int, int]] = {}
        for index, value in enumerate(values):
            places = [(t, axis) for t in tensors for axis, size in enumerate(values[t].shape) if _same(size, value)]
            if numeric[index] and nodes[index].users and places:
                sizes[index] = places[0]
        used = [index for index, node in enumerate(nodes) if numeric[index] and node.users]
        numbers = tuple(index for index in used if index not in sizes)
        symbols = [size for t in tensors for size in values[t].shape if isinstance(size, torch.SymInt)]
        return _Inputs(weights, tensors, sizes, numbers, bool(symbols or sizes))

    def closed(self, graph: fx.GraphModule, weights: Sequence[Tensor], numbers: Mapping[int, Any]) -> fx.GraphModule:
        """The graph as a module of its own, with ``weights`` and ``numbers`` inside: a function of other tensors."""
        nodes = graph.graph.find_nodes(op="placeholder")
        made = fx.Graph()
        attributes: dict[str, Any] = {}
        copied: dict[fx.Node, Any] = {nodes[index]: made.node_copy(nodes[index]) for index in self.tensors}
        for index, weight in zip(self.weights, weights, strict=True):
            attributes[nodes[index].name] = weight
            copied[nodes[index]] = made.get_attr(nodes[index].name)
        for index, (tensor, axis) in self.sizes.items():
            copied[nodes[index]] = made.call_method("size", (copied[nodes[tensor]], axis))
        for index, number in numbers.items():
            items = [user for user in nodes[index].users if _asks_for_item(user)]
            copied.update(dict.fromkeys([nodes[index], *items], number))
        for node in graph.graph.nodes:
            if node in copied:
                continue
            if node.op in ("get_attr", "call_module"):
                attributes[str(node.target)] = _attribute(graph, str(node.target))
            if node.op != "placeholder":
                copied[node] = made.node_copy(node, lambda used: copied[used])
        return fx.GraphModule(attributes, made).eval()


def _is_number(node: fx.Node) -> bool:
    if not isinstance(node.meta.get("example_value"), Tensor):
        return True
    return node.meta["example_value"].dim() == 0 and bool(node.users) and all(map(_asks_for_item, node.users))


def _asks_for_item(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "item"


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _is_weight(node: fx.Node) -> bool:
    """Dynamo marks parameters and buffers of modules as tensors that stay where they are."""
    mark = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
    return mark is not None or isinstance(node.meta.get("example_value"), nn.Parameter)


def _same(size: Any, number: Any) -> bool:
    if isinstance(size, torch.SymInt) and isinstance(number, torch.SymInt):
        return bool(size.node.expr == number.node.expr)
    return False


def _attribute(graph: fx.GraphModule, target: str) -> Any:
    found: Any = graph
    for name in target.split("."):
        found = getattr(found, name)
    return found
