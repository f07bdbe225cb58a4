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
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map

from rgc.algebra import Conv, Scale
from rgc.errors import TraceError
from rgc.ir import Graph, Input, Operator, Origin, TensorType, Value
from rgc.operators import (
    Activation,
    Add,
    AvgPool,
    BatchNorm,
    Concat,
    Constant,
    Identity,
    Multiply,
    Opaque,
    Slot,
    Structural,
)


@dataclass(frozen=True)
class Source:
    """A traced program: its fx graph, where attributes live, and the example by placeholder name."""

    graph: fx.Graph
    root: nn.Module
    example: Mapping[str, Any]
    constants: Mapping[str, Any]  # placeholders that stand for parameters and buffers (torch.export)
    unflatten: Callable[[Any], Any]  # from what the graph returns to what the model returns


def lift(source: Source, dtype: torch.dtype, fixed: bool) -> Graph:
    """The graph of operators for ``source``; types are of ``dtype`` where the example is floating point."""
    return _Lifter(source, dtype, fixed).run()


def is_leaf(module: nn.Module) -> bool:
    """Does the table know this very module, hooks and overridden methods excluded? Others are traced into."""
    return has_hooks(module) or module_handler(module) is not None


def has_hooks(module: nn.Module) -> bool:
    """Would looking into the module lose a hook that the user put there?"""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


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
        return value

    def shape(self, value: Value) -> tuple[int, ...]:
        """The shape of a tensor value at the example."""
        return tuple(self.real[value].shape)

    def shared(self, module: nn.Module, make: Callable[[], Operator]) -> Operator:
        """The operator of a module: one and the same however often the module is called."""
        return self.operators.setdefault(id(module), make())

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
        args, kwargs = self._resolve(node.args), dict(self._resolve(dict(node.kwargs)))
        target: Any = node.target
        if node.op == "call_module":
            target = self.source.root.get_submodule(str(node.target))
        name, inplace = _canonical(node.op, target, args, kwargs)
        values = _values_in((args, kwargs))
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
        if isinstance(kwargs.get("out"), Value):
            raise TraceError(f"{node.name} writes its result into another tensor (out=)")
        kwargs.pop("inplace", None)
        result = self._handle(target, name, args, kwargs)
        if result is None:
            result = self._opaque(node, target, name, inplace, args, kwargs)
        if isinstance(result, Value) and isinstance(result.op, Activation) and inplace:
            self._mark_inplace(result)
        if inplace:
            self._rebind(node, result)
        else:
            self._bind(node, result)
        if node.target in _EFFECTS and isinstance(result, Value):
            self.effects.append(result)

    def _handle(self, target: Any, name: str, args: Any, kwargs: Any) -> Value | None:
        """What the table makes of a call; None for a name, a form or a signature that it does not know."""
        if isinstance(target, nn.Module):
            handler, leading = (None if has_hooks(target) else module_handler(target)), [self, target]
        else:
            aten = isinstance(target, torch._ops.OpOverload)
            handler, leading = (_ATEN.get(name) if aten else None) or FUNCTIONS.get(name), [self]
        if "input" in kwargs and not args:
            args, kwargs = (kwargs["input"],), {key: value for key, value in kwargs.items() if key != "input"}
        if handler is None or not _accepts(handler, *leading, *args, **kwargs):
            return None
        return handler(*leading, *args, **kwargs)

    def _opaque(self, node: fx.Node, target: Any, name: str, inplace: bool, args: Any, kwargs: Any) -> Value:
        if inplace:
            target = _out_of_place(node, target, name)
        if isinstance(target, nn.Module) and not has_hooks(target):
            _refuse_training_state(node, target)
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
        kind = Structural if by_name or type(target) in _STRUCTURAL_MODULES else Opaque
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
            self.real.pop(value, None)

    def _forget(self, node: fx.Node) -> None:
        for used in dict.fromkeys([*node.all_input_nodes, node]):
            last = self.last_use.get(used)
            if last is node or (used is node and last is None):
                for value in _values_in(self.env.pop(used, None)):
                    self._release(value)
                self.memory.pop(used, set()).discard(used)
        for value in self.made:  # intermediate values of handlers
            if value not in self.bound:
                self.real.pop(value, None)
        self.made = []

    def _shares_memory(self, node: fx.Node, used: fx.Node) -> bool:
        return bool(_storages(self.real.get(self.env[node])) & _storages(self._real_of(used)))

    def _real_of(self, node: fx.Node) -> Any:
        bound = self.env.get(node)
        return self.real.get(bound) if isinstance(bound, Value) else bound

    def _mark_inplace(self, value: Value) -> None:
        assert isinstance(value.op, Activation)
        value.op = replace(value.op, inplace=True)

    # --- types and origins ---------------------------------------------------------------------------------------

    def _type(self, result: Any) -> TensorType | None:
        if not isinstance(result, Tensor):
            return None
        dtype = self.dtype if result.dtype == torch.float64 else result.dtype
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
        return fx.node.map_arg(structure, lambda node: self.env[node])

    def _returned(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach()
        value = Value(Constant(leaf), (), self._type(leaf), Origin((), "a constant output"), "constant")
        self.real[value] = leaf
        return value


# --- the table: functions ----------------------------------------------------------------------------------------


def _conv(lifter: _Lifter, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
          dilation: Any = 1, groups: int = 1, padding_mode: str = "zeros") -> Value | None:  # fmt: skip
    if not isinstance(x, Value) or not _are_tensors(weight, bias):
        return None
    rank = weight.dim() - 2
    kernel, steps = weight.shape[2:], _tuple(dilation, rank)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(steps, kernel, strict=True)]
        padding = tuple((total // 2, total - total // 2) for total in totals)
    elif padding == "valid":
        padding = 0
    else:
        padding = _tuple(padding, rank)
    op = Conv(weight, bias, _tuple(stride, rank), padding, steps, groups, padding_mode)  # type: ignore[arg-type]
    return lifter.emit(op, x)


def _conv_transpose(lifter: _Lifter, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
                    output_padding: Any = 0, groups: int = 1, dilation: Any = 1) -> Value | None:  # fmt: skip
    if not isinstance(x, Value) or not _are_tensors(weight, bias):
        return None
    rank = weight.dim() - 2
    op = Conv(
        weight, bias, _tuple(stride, rank), _tuple(padding, rank), _tuple(dilation, rank), groups,
        transposed=True, output_padding=_tuple(output_padding, rank),
    )  # fmt: skip
    return lifter.emit(op, x)


def _linear(lifter: _Lifter, x: Any, weight: Any, bias: Any = None) -> Value | None:
    if not isinstance(x, Value) or not _are_tensors(weight, bias) or weight.dim() != 2:
        return None
    return lifter.emit(Conv(weight, bias), x)


def _batch_norm(lifter: _Lifter, x: Any, mean: Any, var: Any, weight: Any = None, bias: Any = None,
                training: bool = False, momentum: float = 0.1, eps: float = 1e-5) -> Value | None:  # fmt: skip
    if not isinstance(x, Value) or training or not _are_tensors(mean, var, weight, bias) or mean is None:
        return None
    return lifter.emit(BatchNorm(mean, var, weight, bias, eps, len(lifter.shape(x)) - 2), x)


def _aten_batch_norm(lifter: _Lifter, x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool,
                     momentum: float, eps: float, cudnn: bool = True) -> Value | None:  # fmt: skip
    return _batch_norm(lifter, x, mean, var, weight, bias, training, momentum, eps)


def _aten_batch_norm_no_training(lifter: _Lifter, x: Any, weight: Any, bias: Any, mean: Any, var: Any,
                                 momentum: float, eps: float) -> Any:  # fmt: skip
    result = _batch_norm(lifter, x, mean, var, weight, bias, False, momentum, eps)
    return None if result is None else (result, None, None)


def _aten_convolution(lifter: _Lifter, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any,
                      transposed: bool, output_padding: Any, groups: int) -> Value | None:  # fmt: skip
    if transposed:
        return _conv_transpose(lifter, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return _conv(lifter, x, weight, bias, stride, padding, dilation, groups)


def _avg_pool(rank: int) -> Callable[..., Value | None]:
    def handle(lifter: _Lifter, x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
               count_include_pad: bool = True, divisor_override: int | None = None) -> Value | None:  # fmt: skip
        window = _tuple(kernel_size, rank)
        step = window if stride is None or stride == () or stride == [] else _tuple(stride, rank)
        op = AvgPool(window, step, _tuple(padding, rank), ceil_mode, count_include_pad, divisor_override)
        return lifter.emit(op, x)

    return handle


def _activation(name: str) -> Callable[..., Value | None]:
    def handle(lifter: _Lifter, x: Any, *args: Any, **options: Any) -> Value | None:
        if args and name in _POSITIONAL:
            options.update(zip(_POSITIONAL[name], args, strict=False))
        elif args:
            return None
        if not isinstance(x, Value) or any(isinstance(option, Value) for option in options.values()):
            return None
        numbers = {key: _number(value) for key, value in options.items()}
        return lifter.emit(Activation(name, tuple(sorted(numbers.items()))), x)

    return handle


def _prelu(lifter: _Lifter, x: Any, weight: Any) -> Value | None:
    if not isinstance(x, Value) or not _are_tensors(weight):
        return None
    return lifter.emit(Activation("prelu", weight=weight), x)


def _dropout(lifter: _Lifter, x: Any, p: float = 0.5, training: Any = True, train: Any = None) -> Value | None:
    if (training if train is None else train) and p > 0:
        return None
    return lifter.emit(Identity("dropout"), x)


def _add(lifter: _Lifter, x: Any, y: Any, alpha: Any = 1) -> Value | None:
    if alpha in (1, -1):
        return _sum(lifter, x, y, int(alpha))
    scaled = _multiply(lifter, y, alpha) if isinstance(y, Value) else y * alpha
    return None if scaled is None else _sum(lifter, x, scaled, 1)


def _subtract(lifter: _Lifter, x: Any, y: Any, alpha: Any = 1) -> Value | None:
    return _add(lifter, x, y, -alpha)


def _subtract_from(lifter: _Lifter, x: Any, y: Any, alpha: Any = 1) -> Value | None:
    return _add(lifter, y, x, -alpha)


def _sum(lifter: _Lifter, x: Any, y: Any, sign: int) -> Value | None:
    if isinstance(x, Value) and isinstance(y, Value):
        if not _are_floating(lifter, x, y):
            return None
        return lifter.emit(Add(sign), x, y)
    value, constant = (x, y) if isinstance(x, Value) else (y, x)
    if not _are_floating(lifter, value):
        return None
    per_channel = _per_channel(lifter, value, constant)
    if per_channel is None:
        return None
    tensor, axes = per_channel
    one = tensor.new_ones(1)
    if value is x:
        return lifter.emit(Scale(one, sign * tensor, axes), value)
    return lifter.emit(Scale(sign * one, tensor, axes), value)


def _multiply(lifter: _Lifter, x: Any, y: Any) -> Value | None:
    if isinstance(x, Value) and isinstance(y, Value):
        return lifter.emit(Multiply(), x, y) if _are_floating(lifter, x, y) else None
    value, constant = (x, y) if isinstance(x, Value) else (y, x)
    per_channel = _per_channel(lifter, value, constant) if _are_floating(lifter, value) else None
    if per_channel is None:
        return None
    tensor, axes = per_channel
    return lifter.emit(Scale(tensor, tensor.new_zeros(1), axes), value)


def _divide(lifter: _Lifter, x: Any, y: Any, rounding_mode: str | None = None) -> Value | None:
    if isinstance(y, Value) or rounding_mode is not None or isinstance(y, bool):
        return None
    return _multiply(lifter, x, 1.0 / y)


def _negate(lifter: _Lifter, x: Any) -> Value | None:
    return _multiply(lifter, x, -1.0)


def _lerp(lifter: _Lifter, start: Any, end: Any, weight: Any) -> Value | None:
    if isinstance(weight, Value):
        return None
    kept = _multiply(lifter, start, 1 - weight)
    added = _multiply(lifter, end, weight)
    return None if kept is None or added is None else _sum(lifter, kept, added, 1)


def _concat(lifter: _Lifter, tensors: Any, dim: int = 0, axis: int | None = None) -> Value | None:
    where = dim if axis is None else axis
    if not isinstance(tensors, list | tuple) or not all(isinstance(each, Value) for each in tensors):
        return None
    if not _are_floating(lifter, *tensors):
        return None
    rank = len(lifter.shape(tensors[0]))
    return lifter.emit(Concat(where if where < 0 else where - rank), *tensors)


def _reshape(lifter: _Lifter, x: Any, *shape: Any, **options: Any) -> Value | None:
    """``x.view(x.size(0), ...)`` keeps the batch axis whatever its size: a flatten, or a reshape of the rest."""
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], list | tuple) else shape
    if options or not isinstance(x, Value) or not sizes or not isinstance(sizes[0], Value):
        return None
    if any(isinstance(n, Value) for n in sizes[1:]) or not _is_batch_size(lifter, sizes[0], x):
        return None
    if sizes[1:] == (-1,):
        return lifter.emit(Structural(torch.flatten, (Slot(0), 1)), x)
    if -1 in sizes:
        return None
    return lifter.emit(Structural(torch.reshape, (Slot(0), (-1, *sizes[1:]))), x)


def _is_batch_size(lifter: _Lifter, size: Value, x: Value) -> bool:
    """Is ``size`` the length of the first axis of ``x``, or of an input of that length?"""
    measured = size.inputs[0] if size.inputs else size
    args = size.op.args if isinstance(size.op, Opaque | Structural) else ()
    if size.op.label == "getitem" and args[1:] == (0,):  # x.shape[0], x.size()[0]
        if measured.op.label not in {"getattr", "size"}:
            return False
        measured = measured.inputs[0]
    elif args[1:] != (0,) or size.op.label not in {"size", "sym_size.int"}:
        return False
    same = measured is x or isinstance(measured.op, Input)
    return same and lifter.real.get(size) == lifter.shape(x)[0]


FUNCTIONS: dict[str, Callable[..., Value | None]] = {
    "view": _reshape, "reshape": _reshape,
    "conv1d": _conv, "conv2d": _conv, "conv3d": _conv,
    "conv_transpose1d": _conv_transpose, "conv_transpose2d": _conv_transpose, "conv_transpose3d": _conv_transpose,
    "linear": _linear, "batch_norm": _batch_norm,
    "avg_pool1d": _avg_pool(1), "avg_pool2d": _avg_pool(2), "avg_pool3d": _avg_pool(3),
    "add": _add, "radd": _add, "sub": _subtract, "subtract": _subtract, "rsub": _subtract_from,
    "mul": _multiply, "rmul": _multiply, "multiply": _multiply, "div": _divide, "truediv": _divide,
    "true_divide": _divide, "divide": _divide, "neg": _negate, "negative": _negate, "lerp": _lerp,
    "cat": _concat, "concat": _concat, "concatenate": _concat,
    "dropout": _dropout, "dropout1d": _dropout, "dropout2d": _dropout, "dropout3d": _dropout, "alpha_dropout": _dropout,
    "feature_dropout": _dropout, "feature_alpha_dropout": _dropout, "prelu": _prelu,
}  # fmt: skip

#: Elementwise functions, with the names of the options that may come by position.
_POSITIONAL: dict[str, tuple[str, ...]] = {
    "relu": (), "relu6": (), "leaky_relu": ("negative_slope",), "elu": ("alpha",), "celu": ("alpha",), "selu": (),
    "gelu": (), "silu": (), "mish": (), "sigmoid": (), "tanh": (), "hardswish": (), "hardsigmoid": (),
    "hardtanh": ("min_val", "max_val"), "softplus": ("beta", "threshold"), "logsigmoid": (), "softsign": (),
    "tanhshrink": (),
}  # fmt: skip
FUNCTIONS.update({name: _activation(name) for name in _POSITIONAL})

_ATEN: dict[str, Callable[..., Value | None]] = {
    "batch_norm": _aten_batch_norm,
    "_native_batch_norm_legit_no_training": _aten_batch_norm_no_training,
    "convolution": _aten_convolution,
}

#: Calls that are affine in their one tensor input, whatever their other arguments are.
STRUCTURAL = frozenset({
    "flatten", "reshape", "view", "permute", "transpose", "t", "swapaxes", "movedim", "contiguous", "clone", "squeeze",
    "unsqueeze", "unflatten", "flip", "roll", "narrow", "select", "slice", "getitem", "chunk", "split", "unbind",
    "mean", "sum", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "expand", "expand_as", "repeat",
})  # fmt: skip


# --- the table: modules ------------------------------------------------------------------------------------------


def _conv_module(lifter: _Lifter, module: Any, x: Any) -> Value | None:
    return _shared(lifter, module, _conv, x, module.weight, module.bias, module.stride, module.padding,
                   module.dilation, module.groups, module.padding_mode)  # fmt: skip


def _conv_transpose_module(lifter: _Lifter, module: Any, x: Any, output_size: Any = None) -> Value | None:
    if output_size is not None or module.padding_mode != "zeros":
        return None
    return _shared(lifter, module, _conv_transpose, x, module.weight, module.bias, module.stride, module.padding,
                   module.output_padding, module.groups, module.dilation)  # fmt: skip


def _linear_module(lifter: _Lifter, module: Any, x: Any) -> Value | None:
    return _shared(lifter, module, _linear, x, module.weight, module.bias)


def _batch_norm_module(lifter: _Lifter, module: Any, x: Any) -> Value | None:
    if module.running_mean is None:
        count = module.num_features
        zero, one = torch.zeros(count, dtype=torch.float64), torch.ones(count, dtype=torch.float64)
        op = BatchNorm(zero, one, module.weight, module.bias, module.eps, len(lifter.shape(x)) - 2, training=True)
        return lifter.emit(lifter.shared(module, lambda: op), x)
    return _shared(lifter, module, _batch_norm, x, module.running_mean, module.running_var, module.weight, module.bias,
                   False, 0.1, module.eps)  # fmt: skip


def _avg_pool_module(rank: int) -> Callable[..., Value | None]:
    def handle(lifter: _Lifter, module: Any, x: Any) -> Value | None:
        override = getattr(module, "divisor_override", None)  # AvgPool1d has none
        return _avg_pool(rank)(
            lifter, x, module.kernel_size, module.stride, module.padding, module.ceil_mode, module.count_include_pad,
            override,
        )  # fmt: skip

    return handle


def _activation_module(name: str, *options: str) -> Callable[..., Value | None]:
    def handle(lifter: _Lifter, module: Any, x: Any) -> Value | None:
        result = _activation(name)(lifter, x, **{option: getattr(module, option) for option in options})
        if result is not None and getattr(module, "inplace", False):  # not every activation has the option
            lifter._mark_inplace(result)
        return result

    return handle


def _prelu_module(lifter: _Lifter, module: Any, x: Any) -> Value | None:
    return _prelu(lifter, x, module.weight)


def _identity_module(lifter: _Lifter, module: Any, x: Any) -> Value | None:
    return lifter.emit(Identity("identity"), x)


def _dropout_module(lifter: _Lifter, module: Any, x: Any) -> Value | None:
    return _dropout(lifter, x, module.p, module.training)


def _shared(
    lifter: _Lifter, module: nn.Module, handler: Callable[..., Value | None], x: Any, *args: Any
) -> Value | None:
    """Lift by ``handler``; a module that is called again reuses its first operator where that fits."""
    known = lifter.operators.get(id(module))
    if known is not None and (not isinstance(known, BatchNorm) or known.axes == len(lifter.shape(x)) - 2):
        return lifter.emit(known, x)
    result = handler(lifter, x, *args)
    if result is not None:
        lifter.operators[id(module)] = result.op
    return result


MODULES: dict[type[nn.Module], Callable[..., Value | None]] = {
    nn.Conv1d: _conv_module, nn.Conv2d: _conv_module, nn.Conv3d: _conv_module,
    nn.ConvTranspose1d: _conv_transpose_module, nn.ConvTranspose2d: _conv_transpose_module,
    nn.ConvTranspose3d: _conv_transpose_module, nn.Linear: _linear_module,
    nn.BatchNorm1d: _batch_norm_module, nn.BatchNorm2d: _batch_norm_module, nn.BatchNorm3d: _batch_norm_module,
    nn.SyncBatchNorm: _batch_norm_module,
    nn.AvgPool1d: _avg_pool_module(1), nn.AvgPool2d: _avg_pool_module(2), nn.AvgPool3d: _avg_pool_module(3),
    nn.ReLU: _activation_module("relu"), nn.ReLU6: _activation_module("relu6"),
    nn.LeakyReLU: _activation_module("leaky_relu", "negative_slope"), nn.ELU: _activation_module("elu", "alpha"),
    nn.CELU: _activation_module("celu", "alpha"), nn.SELU: _activation_module("selu"),
    nn.GELU: _activation_module("gelu", "approximate"), nn.SiLU: _activation_module("silu"),
    nn.Mish: _activation_module("mish"), nn.Sigmoid: _activation_module("sigmoid"), nn.Tanh: _activation_module("tanh"),
    nn.Hardswish: _activation_module("hardswish"), nn.Hardsigmoid: _activation_module("hardsigmoid"),
    nn.Hardtanh: _activation_module("hardtanh", "min_val", "max_val"),
    nn.Softplus: _activation_module("softplus", "beta", "threshold"), nn.LogSigmoid: _activation_module("logsigmoid"),
    nn.Softsign: _activation_module("softsign"), nn.Tanhshrink: _activation_module("tanhshrink"),
    nn.PReLU: _prelu_module, nn.Identity: _identity_module,
    nn.Dropout: _dropout_module, nn.Dropout1d: _dropout_module, nn.Dropout2d: _dropout_module,
    nn.Dropout3d: _dropout_module, nn.AlphaDropout: _dropout_module, nn.FeatureAlphaDropout: _dropout_module,
}  # fmt: skip

_STRUCTURAL_MODULES = frozenset({
    nn.Flatten, nn.Unflatten, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.PixelShuffle,
    nn.PixelUnshuffle, nn.ChannelShuffle, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d,
    nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
    nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d,
})  # fmt: skip


def module_handler(module: nn.Module) -> Callable[..., Value | None] | None:
    """The handler of a module whose ``forward`` is the one that PyTorch wrote, also in a subclass that keeps it."""
    if "forward" in module.__dict__:
        return None
    for kind in type(module).__mro__:
        handler = MODULES.get(kind)
        if handler is not None:
            methods = ("forward", "_conv_forward")
            same = all(getattr(type(module), name, None) is getattr(kind, name, None) for name in methods)
            return handler if same else None
    return None


# --- helpers -----------------------------------------------------------------------------------------------------


def _canonical(kind: str, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, bool]:
    """PyTorch's many names for one function as one name, and whether it overwrites its first argument."""
    if kind == "call_module":
        if not isinstance(target, nn.Module):
            return str(target), False
        pytorchs_own = type(target).__module__.startswith("torch.nn.modules") and not isinstance(target, nn.Dropout)
        return type(target).__name__, pytorchs_own and bool(getattr(target, "inplace", False))
    if isinstance(target, torch._ops.OpOverload):
        name = target._opname
        if name == "_native_batch_norm_legit_no_training":
            return name, False
    else:
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    inplace = bool(kwargs.get("inplace", False))
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


def _accepts(handler: Callable[..., Value | None], *args: Any, **kwargs: Any) -> bool:
    try:
        inspect.signature(handler).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _refuse_training_state(node: fx.Node, module: nn.Module) -> None:
    if module.training:
        raise TraceError(f"{node.target} is in training mode")


def _asks_for_rank(target: Any, args: Sequence[Any]) -> bool:
    return (target is getattr and args[1:] == ("ndim",)) or target in ("dim", "ndimension")


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


def _per_channel(lifter: _Lifter, value: Value, constant: Any) -> tuple[Tensor, int | None] | None:
    """A constant as one number per channel, with the number of axes behind the channels; None if it is not that."""
    if isinstance(constant, bool | complex) or not isinstance(constant, int | float | Tensor):
        return None
    tensor = constant if isinstance(constant, Tensor) else torch.tensor(float(constant), dtype=torch.float64)
    if not tensor.is_floating_point():
        tensor = tensor.double()
    shape = lifter.shape(value)
    if tensor.numel() == 1 and tensor.dim() <= len(shape):
        return tensor.reshape(1), None
    behind = shape[len(shape) - tensor.dim() :]
    if tensor.dim() > len(shape) or any(n not in (1, m) for n, m in zip(tensor.shape, behind, strict=True)):
        return None
    wide = [axis for axis, n in enumerate(tensor.shape) if n != 1]
    axes = tensor.dim() - 1 - wide[0]
    if len(wide) != 1 or axes >= len(shape) - 1:  # the batch axis is no channel axis
        return None
    return tensor.reshape(-1), axes


def _are_tensors(*given: Any) -> bool:
    return all(each is None or isinstance(each, Tensor) for each in given)


def _are_floating(lifter: _Lifter, *values: Any) -> bool:
    reals = [lifter.real.get(value) if isinstance(value, Value) else None for value in values]
    return all(isinstance(real, Tensor) and real.is_floating_point() for real in reals)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * rank
    values = tuple(int(each) for each in value)
    return values * rank if len(values) == 1 else values


def _attribute(root: nn.Module, path: str) -> Any:
    found: Any = root
    for part in path.split("."):
        found = getattr(found, part)
    return found.detach() if isinstance(found, Tensor) else found


def _values_in(structure: Any) -> list[Value]:
    return [leaf for leaf in tree_flatten(structure, is_leaf=_is_value)[0] if isinstance(leaf, Value)]


def _storages(result: Any) -> set[int]:
    tensors = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


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


_FRONT_END = ("example", "export_tier", "frontend", "lift", "symbolic_tier")
_TRACER_HOMES = (
    f"{Path(torch.__file__).parent}{os.sep}",
    *(str(Path(__file__).with_name(f"{n}.py")) for n in _FRONT_END),
)
