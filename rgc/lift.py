"""How does a traced torch.fx graph become a graph of operators? One table from PyTorch's names to one vocabulary.

Every node is lifted, run on the example and typed. Calls on constants are folded. In-place calls become plain ones by
rebinding every alias of the tensor that they overwrite; what memory a result shares is read off the real tensors.
A name that the table does not know becomes `Opaque`, which nothing rewrites and nothing loses.
"""

from __future__ import annotations

import copy
import inspect
import operator
import os
from collections import ChainMap, Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map

from rgc.algebra import Scale
from rgc.casts import CASTS, with_known_form
from rgc.contractions import CONTRACTIONS
from rgc.errors import TraceError
from rgc.functions import ATEN, FUNCTIONS, STRUCTURAL, Handler, shape_source
from rgc.ir import Graph, Input, Operator, Origin, TensorType, Value
from rgc.modules import STRUCTURAL_MODULES, has_hooks, module_handler, refresh_weights
from rgc.normalizations import ATEN_NORMALIZATIONS, NORMALIZATIONS
from rgc.operators import Activation, Call, Constant, Opaque, Slot, Structural, pytorch_name
from rgc.precision import LOW, is_precise
from rgc.rearrange import Subsample
from rgc.rearrange_calls import LOOKED_THROUGH, REARRANGEMENTS


@dataclass(frozen=True)
class Source:
    """A traced program: its fx graph, where attributes live, and the example by placeholder name."""

    graph: fx.Graph
    root: nn.Module
    example: Mapping[str, Any]
    constants: Mapping[str, Any]  # placeholders that stand for parameters and buffers (torch.export)
    unflatten: Callable[[Any], Any]  # from what the graph returns to what the model returns


_FUNCTIONS: Mapping[str, Handler] = ChainMap(FUNCTIONS, CONTRACTIONS, NORMALIZATIONS, CASTS)
_ATEN: Mapping[str, Handler] = ChainMap(ATEN, ATEN_NORMALIZATIONS)


def lift(source: Source, dtype: torch.dtype, fixed: bool) -> Graph:
    """The graph of operators for ``source``; types are of ``dtype`` where the example is floating point."""
    return _Lifter(source, dtype, fixed).run()


class _Lifter:
    def __init__(self, source: Source, dtype: torch.dtype, fixed: bool) -> None:
        self.source, self.dtype, self.fixed = source, dtype, fixed
        self.env: dict[fx.Node, Any] = {}  # a Value, or a plain constant
        self.real: dict[Value, Any] = {}  # what a live value is on the example
        self.bound: Counter[Value] = Counter()  # how many live nodes are bound to it
        self.made: list[Value] = []  # by the node under way
        self.memory: dict[fx.Node, set[fx.Node]] = {}  # nodes that share a node's memory
        self.inputs: list[Value] = []
        self.effects: list[Value] = []
        self.outputs: Any = None
        self.operators: dict[int, Operator] = {}  # one operator per module, so that shared modules stay shared
        self.node: fx.Node | None = None
        self.is_precise = is_precise(source.example)
        self.last_use = {used: node for node in source.graph.nodes for used in node.all_input_nodes}

    def run(self) -> Graph:
        with torch.no_grad():
            for node in self.source.graph.nodes:
                self.node = node
                self._visit(node)
                self._forget(node)
        return Graph(self.inputs, self.outputs, self.effects)

    # --- what handlers use ---------------------------------------------------------------------------------------

    def emit(self, op: Operator, *inputs: Value) -> Value:
        """A new value, run on the example to learn its type."""
        result = op.evaluate(*(self.real[value] for value in inputs))
        value = Value(op, inputs, self._type(result), self._origin(), self.node.name if self.node else "")
        self.real[value] = result
        self.made.append(value)
        for used in self._looked_through(value):
            self.bound[used] += 1
        return value

    def shape(self, value: Value) -> tuple[int, ...]:
        """The shape of a tensor value at the example."""
        return tuple(self.real[value].shape)

    def shared(self, module: nn.Module, make: Callable[[], Operator]) -> Operator:
        """The operator of a module: one and the same however often the module is called."""
        return self.operators.setdefault(id(module), make())

    def recall(self, value: Value, result: Any) -> None:
        """What ``value`` is on the example, for the node under way, although nothing in the program is bound to it."""
        if value not in self.real:
            self.real[value] = result
            self.made.append(value)
            for used in self._looked_through(value):  # which it gives up again when it is dropped
                self.bound[used] += 1

    # --- nodes ---------------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._bind(node, self._placeholder(node))
        elif node.op == "get_attr":
            self._bind(node, _attribute(self.source.root, str(node.target)))
        elif node.op == "output":
            result = tree_map(self._returned, self._resolve(node.args[0]), is_leaf=_is_value)
            self.outputs = self.source.unflatten(result)
        else:
            self._call(node)

    def _placeholder(self, node: fx.Node) -> Any:
        name = str(node.target)
        if name in self.source.constants:
            return self.source.constants[name]
        default = node.args[0] if node.args else inspect.Parameter.empty
        given = self.source.example.get(name, default)
        if given is inspect.Parameter.empty:
            raise TraceError(f"the example gives no value for the input {name!r}")
        value = Value(Input(name, default), (), self._type(given), Origin((), f"input {name}"), name)
        self.real[value] = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, given)
        self.inputs.append(value)
        return value

    def _call(self, node: fx.Node) -> None:
        args, kwargs = tree_map(self._slice, (self._resolve(node.args), dict(self._resolve(dict(node.kwargs)))))
        target: Any = node.target
        if node.op == "call_module":
            target = self.source.root.get_submodule(str(node.target))
        name, inplace = _canonical(node.op, target, args, kwargs)
        values = _values_in((args, kwargs))
        if inplace and isinstance(args[0] if args else None, Value) and not isinstance(self.real[args[0]], Tensor):
            inplace = False  # `n += 1` of a number gives the name another one
        inplace = inplace and not _is_written_back(node)
        if _asks_for_rank(target, args) and isinstance(args[0], Value):
            self._bind(node, self.real[args[0]].dim())  # the same at every size, so it holds no tensor back
            return
        if target is operator.getitem and isinstance(args[0], tuple):  # of a handler that makes several results
            self._bind(node, args[0][args[1]])
            return
        if inplace and not (args and isinstance(args[0], Value)):
            raise TraceError(f"{node.name} overwrites a parameter or buffer in place")
        if not values and not isinstance(target, nn.Module):
            self._bind(node, _fold(node, target, args, kwargs))
            return
        if not inplace and not isinstance(target, nn.Module) and not _is_overwritten(node):
            known = with_known_form(self, name, args, kwargs)
            made = None if known is None else _fold(node, target, *known)
            if isinstance(made, Tensor):
                self._bind(node, made)
                return
        if isinstance(kwargs.get("out"), Value):
            raise TraceError(f"{node.name} writes its result into another tensor (out=)")
        if "." not in name:
            kwargs.pop("inplace", None)
        if kwargs.get("out", self) is None:
            del kwargs["out"]
        result = self._handle(target, name, args, kwargs)
        if result is None:
            result = self._opaque(node, target, name, inplace, args, kwargs)
        if isinstance(result, Value) and isinstance(result.op, Activation) and inplace:
            self.mark_inplace(result)
        if inplace:
            self._rebind(node, result)
        else:
            self._bind(node, result)
        if node.target in _EFFECTS and isinstance(result, Value):
            self.effects.append(result)

    def _slice(self, leaf: Any) -> Any:
        """A slice whose ends are values is a value itself: ``x[:, :n]`` with a size ``n``."""
        if not isinstance(leaf, slice):
            return leaf
        ends = (leaf.start, leaf.stop, leaf.step)
        values = [end for end in ends if isinstance(end, Value)]
        if not values:
            return leaf
        slots = iter(range(len(values)))
        return self.emit(Opaque(slice, tuple(Slot(next(slots)) if isinstance(e, Value) else e for e in ends)), *values)

    def _handle(self, target: Any, name: str, args: Any, kwargs: Any) -> Any:
        """What the table makes of a call; None for a name, a form or a signature that it does not know."""
        if isinstance(target, nn.Module):
            refresh_weights(target)
            handler, leading = (None if has_hooks(target) else module_handler(target)), [self, target]
        else:
            aten = isinstance(target, torch._ops.OpOverload)
            handler, leading = (_ATEN.get(name) if aten else None) or _FUNCTIONS.get(name), [self]
        if "input" in kwargs and not args:
            args, kwargs = (kwargs["input"],), {key: value for key, value in kwargs.items() if key != "input"}
        if name == "clone" and self._is_returned():
            return None  # the caller may rely on memory of its own
        for each in (None if isinstance(target, nn.Module) else REARRANGEMENTS.get(name), handler):
            if each is not None and _accepts(each, *leading, *args, **kwargs):
                result = each(*leading, *args, **kwargs)
                if result is not None:
                    return result
        return None

    def _is_returned(self) -> bool:
        return self.node is not None and any(user.op == "output" for user in self.node.users)

    def _opaque(self, node: fx.Node, target: Any, name: str, inplace: bool, args: Any, kwargs: Any) -> Value:
        if inplace:
            target = _out_of_place(node, target, name)
        if isinstance(target, nn.Module) and not has_hooks(target):
            _refuse_training_state(node, target)
        if _asks_for_size(target, name, args) and isinstance(args[0], Value):
            source = shape_source(args[0])
            self.recall(source, self.real[args[0]])
            args = (source, *args[1:])
        values: list[Value] = []

        def slot(leaf: Any) -> Any:
            if not isinstance(leaf, Value):
                return leaf
            values.append(leaf)
            return Slot(len(values) - 1)

        args, kwargs = tree_map(slot, (tuple(args), kwargs), is_leaf=_is_value)
        by_name = (
            name in STRUCTURAL and not isinstance(target, nn.Module) and args[:1] == (Slot(0),) and len(values) == 1
        )
        kind = Structural if by_name or type(target) in STRUCTURAL_MODULES else Opaque
        return self.emit(kind(target, args, tuple(kwargs.items())), *values)

    # --- bindings and memory -------------------------------------------------------------------------------------

    def _bind(self, node: fx.Node, result: Any) -> None:
        self._set(node, result)
        group = {node}
        if isinstance(result, Value):
            for used in node.all_input_nodes:
                if used in self.memory and self._shares_memory(node, used):
                    group |= self.memory[used]
        for member in group:
            self.memory[member] = group

    def _rebind(self, node: fx.Node, result: Value) -> None:
        """``node`` overwrote its first argument: every alias of that tensor now has the new value."""
        overwritten = node.all_input_nodes[0]
        old = self.real[self.env[overwritten]]
        group = self.memory[overwritten] | {node}
        for member in group - {node}:
            value = self.env.get(member)
            if value is None:
                continue
            if not isinstance(value, Value):
                raise TraceError(f"{node.name} overwrites a parameter or buffer in place")
            if not _overlap(self.real[value], old):
                continue
            if not _same_view(self.real[value], old):
                raise TraceError(f"{node.name} overwrites memory that {member.name} sees through another view")
            self._set(member, result)
        self._set(node, result)
        for member in group:
            self.memory[member] = group

    def _set(self, node: fx.Node, result: Any) -> None:
        for old in _values_in(self.env.get(node)):
            self._release(old)
        self.env[node] = result
        for value in _values_in(result):
            self.bound[value] += 1

    def _release(self, value: Value) -> None:
        self.bound[value] -= 1
        if not self.bound[value]:
            del self.bound[value]
            self._drop(value)

    def _drop(self, value: Value) -> None:
        if self.real.pop(value, None) is not None:
            for used in self._looked_through(value):
                self._release(used)

    def _looked_through(self, value: Value) -> tuple[Value, ...]:
        """What a value keeps alive: a handler that knows its form will read its input instead."""
        if isinstance(value.op, Call):
            return value.inputs if value.op.name in LOOKED_THROUGH else ()
        is_scaled_stack = isinstance(value.op, Scale) and _is_stack(value.inputs[0])
        return value.inputs if isinstance(value.op, Subsample) or is_scaled_stack else ()

    def _forget(self, node: fx.Node) -> None:
        for used in dict.fromkeys([*node.all_input_nodes, node]):
            last = self.last_use.get(used)
            if last is node or (used is node and last is None):
                for value in _values_in(self.env.pop(used, None)):
                    self._release(value)
                self.memory.pop(used, set()).discard(used)
        for value in self.made:  # intermediate values of handlers
            if value not in self.bound:
                self._drop(value)
        self.made = []

    def _shares_memory(self, node: fx.Node, used: fx.Node) -> bool:
        return bool(_storages(self.real.get(self.env[node])) & _storages(self._real_of(used)))

    def _real_of(self, node: fx.Node) -> Any:
        bound = self.env.get(node)
        return self.real.get(bound) if isinstance(bound, Value) else bound

    def mark_inplace(self, value: Value) -> None:
        assert isinstance(value.op, Activation)
        value.op = replace(value.op, inplace=True)

    # --- types and origins ---------------------------------------------------------------------------------------

    def _type(self, result: Any) -> TensorType | None:
        if not isinstance(result, Tensor):
            return None
        is_wide = result.dtype == torch.float64 or (self.is_precise and result.dtype in LOW)
        dtype = self.dtype if is_wide else result.dtype
        return TensorType(tuple(result.shape), dtype, self.fixed)

    def _origin(self) -> Origin:
        node = self.node
        assert node is not None
        if node.op == "call_module":
            return Origin((str(node.target),), _source_line(node))
        stack = node.meta.get("nn_module_stack") or {}
        scope = _module_path(list(stack.values())[-1]) if stack else ""
        name, _ = _canonical(node.op, node.target, (), {})
        return Origin((f"{scope}.{name}".lstrip("."),), _source_line(node))

    def _resolve(self, structure: Any) -> Any:
        return _mutable(fx.node.map_arg(structure, lambda node: self.env[node]))

    def _returned(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach()
        value = Value(Constant(leaf), (), self._type(leaf), Origin((), "a constant output"), "constant")
        self.real[value] = leaf
        return value


def _canonical(kind: str, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, bool]:
    """PyTorch's many names for one function as one name, and whether it overwrites its first argument."""
    if kind == "call_module":
        if not isinstance(target, nn.Module):
            return str(target), False
        pytorchs_own = type(target).__module__.startswith("torch.nn.modules") and not isinstance(target, nn.Dropout)
        return type(target).__name__, pytorchs_own and bool(getattr(target, "inplace", False))
    name = pytorch_name(target)
    if "." in name or name == "_native_batch_norm_legit_no_training":  # a dot: not a function of PyTorch's
        return name, False
    inplace = bool(kwargs.get("inplace", False)) or target is operator.setitem
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
    elif name.endswith("_") and not name.endswith("__"):
        name, inplace = name.rstrip("_"), True
    if (
        name.startswith("i")
        and name[1:] in {"add", "sub", "mul", "truediv", "floordiv", "pow"}
        and _is_operator(target, name)
    ):
        name, inplace = name[1:], True
    return name, inplace


def _is_operator(target: Any, name: str) -> bool:
    return isinstance(target, str) or target is getattr(operator, name, None)


def _out_of_place(node: fx.Node, target: Any, name: str) -> Any:
    if isinstance(target, nn.Module):
        if hasattr(target, "inplace"):
            target = copy.deepcopy(target)
            target.inplace = False
        return target
    if isinstance(target, str) and callable(getattr(Tensor, name, None)):
        return name
    if isinstance(target, torch._ops.OpOverload):
        packet = getattr(torch.ops.aten, name, None)
        if packet is not None and target._overloadname in packet.overloads():
            return getattr(packet, target._overloadname)
    for home in (torch.nn.functional, torch, operator):
        if callable(getattr(home, name, None)):
            return getattr(home, name)
    raise TraceError(f"{node.name} calls {target} in place, and rgc knows no form of it that leaves its input alone")


def _accepts(handler: Handler, *args: Any, **kwargs: Any) -> bool:
    try:
        inspect.signature(handler).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _refuse_training_state(node: fx.Node, module: nn.Module) -> None:
    if module.training:
        raise TraceError(f"{node.target} is in training mode")


def _is_stack(value: Value) -> bool:
    """A stack, or a multiple of one."""
    while isinstance(value.op, Scale) or (isinstance(value.op, Opaque) and value.op.name in ("mul", "multiply")):
        value = value.inputs[0]
    return isinstance(value.op, Opaque) and value.op.name == "stack"


def _is_overwritten(node: fx.Node) -> bool:
    """Does a later call overwrite what this one returns?"""
    return any(
        user.args[:1] == (node,) and user.op != "call_module" and _canonical(user.op, user.target, (), user.kwargs)[1]
        for user in node.users
    )


def _is_written_back(node: fx.Node) -> bool:
    """Is it the sum of ``y[i] += z``, which Python assigns to the items that it has overwritten?"""
    items, assignment = node.args[0] if node.args else None, node.next
    if not isinstance(items, fx.Node) or items.target is not operator.getitem or node.target not in _WITH_ITEMS:
        return False
    alone = set(items.users) == {node} and set(node.users) == {assignment}
    return alone and assignment.target is operator.setitem and assignment.args == (*items.args, node)


_WITH_ITEMS = frozenset({operator.iadd, operator.isub, operator.imul, operator.itruediv})


def _asks_for_rank(target: Any, args: Sequence[Any]) -> bool:
    return (target is getattr and args[1:] == ("ndim",)) or target in ("dim", "ndimension")


def _asks_for_size(target: Any, name: str, args: Sequence[Any]) -> bool:
    return (target is getattr and args[1:] == ("shape",)) or name in ("size", "sym_size")


def _fold(node: fx.Node, target: Any, args: Any, kwargs: Any) -> Any:
    """A call on constants only: its result is a constant."""
    if node.target in _EFFECTS and args[0]:
        return None  # a check that always succeeds
    if node.target in _EFFECTS or _is_random(target):
        raise TraceError(f"{node.name} has an effect or is random, but depends on no input")
    return getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)


#: Calls that are made for what they do, not for what they return.
_EFFECTS = frozenset({torch._assert, torch.ops.aten._assert_async.msg, torch.ops.aten._assert_scalar.default})


def _is_random(target: Any) -> bool:
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return name.startswith(("rand", "bernoulli", "normal", "multinomial"))


def _attribute(root: nn.Module, path: str) -> Any:
    found: Any = root
    for part in path.split("."):
        found = getattr(found, part)
    return found.detach() if isinstance(found, Tensor) else found


def _mutable(structure: Any) -> Any:
    """torch.fx keeps arguments in containers that cannot change; a function may well change its list."""
    if isinstance(structure, tuple) and not hasattr(structure, "_fields"):
        return tuple(map(_mutable, structure))
    if isinstance(structure, list):
        return list(map(_mutable, structure))
    if isinstance(structure, dict):
        return {key: _mutable(value) for key, value in structure.items()}
    return structure


def _values_in(structure: Any) -> list[Value]:
    return [leaf for leaf in tree_flatten(structure, is_leaf=_is_value)[0] if isinstance(leaf, Value)]


def _storages(result: Any) -> set[int]:
    tensors = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def _overlap(a: Any, b: Any) -> bool:
    """Do two results share an element? Pieces of one tensor lie in one memory and may not."""
    tensors = [leaf for leaf in tree_flatten((a, b))[0] if isinstance(leaf, Tensor) and leaf.numel()]
    if len(tensors) != 2 or any(each.layout != torch.strided for each in tensors):
        return True
    if len({each.untyped_storage().data_ptr() for each in tensors}) == 2:
        return (
            False  # one has been overwritten since, when each alias that it has an element in common with was rebound
        )
    ends = [each.storage_offset() + _extent(each) for each in tensors]
    if max(each.storage_offset() for each in tensors) >= min(ends):
        return False
    memory = torch.zeros(max(ends), dtype=torch.bool)
    one, other = (memory.as_strided(each.shape, each.stride(), each.storage_offset()) for each in tensors)
    one.fill_(True)
    return bool(other.any())


def _extent(tensor: Tensor) -> int:
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _same_view(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    first, second = ((each.shape, each.stride(), int(each.storage_offset())) for each in (a, b))
    return first == second


def _is_value(leaf: Any) -> bool:
    return isinstance(leaf, Value)


def _module_path(entry: Any) -> str:
    path = str(entry[0]) if isinstance(entry, tuple) else str(entry)
    return path.removeprefix("L['self']").lstrip(".")


def _source_line(node: fx.Node) -> str:
    """``file.py:42`` of the innermost frame that is neither PyTorch nor the tracer."""
    trace = node.meta.get("stack_trace") or node.stack_trace or ""
    for line in reversed(trace.splitlines()):
        if not line.strip().startswith('File "'):
            continue
        _, path, rest = line.split('"', 2)
        if not path.startswith(_TRACER_HOMES):
            return f"{path.rsplit('/', 1)[-1]}:{rest.split('line ')[1].split(',')[0].strip()}"
    return ""


_FRONT_END = (
    "casts", "contractions", "example", "export_tier", "frontend", "functions", "lift", "modules", "normalizations",
    "precision", "rearrange_calls", "symbolic_tier", "traced_value",
)  # fmt: skip
_TRACER_HOMES = (
    f"{Path(torch.__file__).parent}{os.sep}",
    *(str(Path(__file__).with_name(f"{n}.py")) for n in _FRONT_END),
)
