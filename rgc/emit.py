"""How does a graph become a torch.fx.GraphModule of ordinary torch.nn layers, with the user's module names?"""

from __future__ import annotations

import inspect
import keyword
import operator
from collections import Counter, OrderedDict
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from rgc.algebra import Conv, Scale, ungrouped
from rgc.errors import GraphError
from rgc.example import copy_model
from rgc.ir import Graph, Input, Operator, Value
from rgc.operators import (
    Activation,
    AdaptiveMaxPool,
    Add,
    AvgPool,
    BatchNorm,
    Call,
    ChannelMean,
    Clamp,
    Concat,
    Constant,
    Flatten,
    Identity,
    MaxPool,
    Multiply,
    Normalize,
    Opaque,
    Slot,
    Unflatten,
    Upsample,
    completes,
)
from rgc.precision import dtype_in
from rgc.rearrange import Assign, BorderFill, Gather, Pad, PixelShuffle, PixelUnshuffle, Subsample, slices
from rgc.tail import AxisSums

#: So many bits of a channel's largest weight are enough for its share in what the next layer adds up.
KEPT_BITS = 8


def emit(graph: Graph, dtype: torch.dtype | None, *, copies: bool = True) -> fx.GraphModule:
    """The graph as a module in eval mode; floating-point parameters are cast once, to ``dtype`` (None: kept).

    Without ``copies`` parameters that are not cast are those of the graph: for a module that only runs in a proof.
    """
    return _Emitter(graph, dtype, copies).run()


def narrow(graph: Graph, dtype: torch.dtype) -> None:
    """Keep the kernels of ``graph`` in ``dtype`` from now on, in which they are emitted anyway.

    What the emission computes with (biases, factors, kernels that pad with a value) stays as precise as it is, and what
    is tied to another weight stays tied.
    """
    shared: dict[int, list[Value]] = {}
    others: set[int] = set()  # the memory of what the kernels may be tied to
    for value in graph.nodes():
        if isinstance(value.op, Conv):
            shared.setdefault(id(value.op), []).append(value)
        else:
            others.update(tensor.data_ptr() for tensor in value.op.tensors())
    kernels = Counter(values[0].op.weight.data_ptr() for values in shared.values() if isinstance(values[0].op, Conv))
    for values in shared.values():
        op = values[0].op
        assert isinstance(op, Conv)
        address = op.weight.data_ptr()
        if (
            op.pad_value is None
            and op.weight.dtype == torch.float64
            and kernels[address] == 1
            and address not in others
        ):
            op = op.changed(weight=op.weight.to(dtype))
            for value in values:
                value.op = op


def losses(graph: Graph, dtype: torch.dtype) -> list[tuple[Value, str, bool]]:
    """Layers whose parameters do not survive in ``dtype``: which, how, and whether they overflow (or else fade).

    A number beyond the range of ``dtype`` becomes infinite. Where all that one output channel of a kernel multiplies by
    is so small that ``dtype`` keeps fewer than about `KEPT_BITS` bits of it, that channel is another one.
    """
    info = torch.finfo(dtype)
    name = str(dtype).removeprefix("torch.")
    smallest = info.smallest_normal * info.eps * 2 ** (KEPT_BITS - 1)
    found: list[tuple[Value, str, bool]] = []
    for value in graph.nodes():
        for tensor in value.op.tensors():
            if not tensor.is_floating_point() or torch.finfo(tensor.dtype).max <= info.max or not tensor.numel():
                continue
            finite = tensor.detach().abs().nan_to_num(posinf=0.0)
            largest = float(finite.max())
            if largest > info.max:
                found.append((value, f"{largest:.3g} is beyond the range of {name} (at most {info.max:.5g})", True))
            elif isinstance(value.op, Conv) and tensor.dim() > 1 and not value.op.transposed:
                rows = finite.flatten(1).amax(1)
                faint = rows[(rows > 0) & (rows < smallest)]
                if faint.numel():
                    fewer = (
                        f"{name} keeps fewer than {KEPT_BITS} bits of the weights of a channel ({float(faint[0]):.1e})"
                    )
                    found.append((value, fewer, False))
    return found


def operator_counts(graph: Graph) -> Counter[str]:
    """Layers and functions that the graph runs, by PyTorch's names; views and checks do not count."""
    counts: Counter[str] = Counter()
    for value in graph.nodes():
        if not _is_joined(graph, value) and not _is_arithmetic_on_sizes(value):
            counts.update(_layer_names(value))
    return counts


def opaque_counts(graph: Graph) -> Counter[str]:
    """Those of the counted layers and functions that rgc passes through untouched, because it does not know them."""
    counts: Counter[str] = Counter()
    for value in graph.nodes():
        if isinstance(value.op, Opaque) and not _is_arithmetic_on_sizes(value):
            counts.update(_layer_names(value))
    return counts


def _is_joined(graph: Graph, value: Value) -> bool:
    """Is ``value`` the affine part of a normalisation that nobody else reads, so that one layer does both?"""
    return completes(value) and graph.use_count(value.inputs[0]) == 1


def _is_arithmetic_on_sizes(value: Value) -> bool:
    """Is it a number that is computed from numbers? Only tensors have a type."""
    if not value.inputs or (isinstance(value.op, Call) and isinstance(value.op.target, nn.Module)):
        return False
    return value.type is None and all(used.type is None for used in value.inputs)


def _layer_names(value: Value) -> list[str]:
    op = value.op
    match op:
        case Conv() if op.spatial == 0 or op.reads_whole_map:
            return ["Linear"]
        case Conv():
            kinds = _TRANSPOSED if op.transposed else _PLAIN
            return [kinds[op.spatial].__name__, *({"ones": "pad"}.get(extra, extra) for extra in op.extras)]
        case Scale():
            has_factor, has_offset = not bool((op.scale == 1).all()), not bool((op.shift == 0).all())
            return ["addcmul"] if has_factor and has_offset else ["mul"] * has_factor + ["add"] * has_offset
        case BatchNorm():
            return [f"BatchNorm{max(op.axes, 1)}d"]
        case Normalize():
            return [_normalization_kind(op, len(value.tensor_type.shape)).__name__]
        case AvgPool():
            return [f"AvgPool{op.spatial}d"]
        case MaxPool():
            return [f"MaxPool{op.spatial}d"]
        case AdaptiveMaxPool():
            return [f"AdaptiveMaxPool{op.spatial}d"]
        case Upsample():
            return ["Upsample"]
        case Activation():
            return ["PReLU" if op.weight is not None else getattr(_ACTIVATIONS.get(op.name), "__name__", op.name)]
        case Clamp():
            return [name for name, bound in zip(("maximum", "minimum"), op.bounds, strict=True) if bound is not None]
        case Concat():
            return ["cat"]
        case Gather():
            return [] if op.is_view else [getattr(op.steps[0][0], "__name__", "")]
        case Pad():
            return [] if op.is_view else [type(_pad_layer(op)).__name__, *_setitems(op)]
        case Subsample():
            return []
        case PixelUnshuffle(places=tuple()):
            return ["cat"]
        case PixelShuffle() | PixelUnshuffle():
            return [type(op).__name__]
        case BorderFill():
            return ["setitem"] * len(op.assignments)
        case Identity(copies=True):
            return ["clone"]
        case AxisSums():
            return ["linear"] * op.spatial
        case Input() | Constant() | Identity() | Flatten() | Unflatten():
            return []
        case Call():
            return [] if op.name in _BOOKKEEPING else [op.name]
    return [{"multiply": "mul"}.get(op.label, op.label)]


class _Emitter:
    def __init__(self, graph: Graph, dtype: torch.dtype | None, copies: bool) -> None:
        self.source, self.dtype, self.copies = graph, dtype, copies
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.nodes: dict[Value, fx.Node] = {}
        self.modules: dict[Any, str] = {}  # id of an operator or module -> path, so that what is shared stays shared
        self.parameters: dict[Any, tuple[Tensor, nn.Parameter]] = {}  # by the memory they came from, kept alive
        self.calls: dict[tuple[fx.Node, Any, str], fx.Node] = {}  # of selections, by what is called
        self.names: set[str] = set()
        self.containers: set[str] = set()

    def run(self) -> fx.GraphModule:
        order = self.source.nodes()
        self._inputs(order)
        for value in order:
            if not isinstance(value.op, Input):
                self.nodes[value] = self._emit(value)
        self.graph.output(self._structure(tree_map(self._node_of, self.source.outputs, is_leaf=_is_value)))
        self.graph.lint()
        module = fx.GraphModule(self.root, self.graph)
        return module.eval().requires_grad_(False)

    # --- inputs --------------------------------------------------------------------------------------------------

    def _inputs(self, order: list[Value]) -> None:
        default: tuple[Any, ...] = ()
        for value in self.source.inputs:
            assert isinstance(value.op, Input)
            if value.op.default is not inspect.Parameter.empty:
                default = (value.op.default,)
            elif default:
                default = (None,)  # keyword-only in the model, where Python allows it behind one that has a default
            self.nodes[value] = self.graph.create_node("placeholder", value.op.name, default, name=value.op.name)
        if all(value.op.any_size for value in order):
            return
        for value in self.source.inputs:
            if value.type is not None and len(value.type.shape) > 1:
                self._check_size(self.nodes[value], value.type.shape[1:])

    def _check_size(self, node: fx.Node, size: tuple[int, ...]) -> None:
        """A wrong size at run time gets a clear error; the batch stays free."""
        shape = self.graph.call_function(getattr, (node, "shape"))
        rest = self.graph.call_function(operator.getitem, (shape, slice(1, None)))
        same = self.graph.call_function(operator.eq, (rest, size))
        wanted = "x".join(map(str, size))
        message = f"this compiled model holds for inputs of size {wanted} (any batch); compile again for another size"
        self.graph.call_function(torch._assert, (same, message))

    def _structure(self, output: Any) -> Any:
        """The output as torch.fx can write it down, which knows neither OrderedDict nor, everywhere, named tuples."""
        if isinstance(output, OrderedDict):
            items = [(key, self._structure(value)) for key, value in output.items()]
            return self.graph.call_function(OrderedDict, (items,))
        if isinstance(output, dict):
            return {key: self._structure(value) for key, value in output.items()}
        if isinstance(output, tuple) and hasattr(output, "_fields"):
            return self.graph.call_function(type(output), tuple(self._structure(value) for value in output))
        if type(output) in (list, tuple):
            return type(output)(self._structure(value) for value in output)
        return output

    # --- values --------------------------------------------------------------------------------------------------

    def _emit(self, value: Value) -> fx.Node:
        op = value.op
        if self.dtype is not None and isinstance(op, Call) and not isinstance(op.target, nn.Module):
            op = op.cast(self.dtype)
        inputs = [self.nodes[used] for used in value.inputs]
        match op:
            case Conv():
                return self._conv(value, op, inputs[0])
            case Scale() if _is_joined(self.source, value):
                normalize = value.inputs[0].op
                assert isinstance(normalize, Normalize)
                return self._normalization(value, normalize, op, inputs[0])
            case Scale():
                return self._scale(value, op, inputs[0])
            case Normalize():
                joined = any(_is_joined(self.source, user) for user in self.source.users(value))
                return inputs[0] if joined else self._normalization(value, op, None, inputs[0])
            case ChannelMean():
                return self._function(value, torch.mean, inputs[0], -1 - op.axes, keepdim=True)
            case BatchNorm():
                return self._module(value, lambda: _batch_norm(op, self._cast, self._parameter), inputs[0])
            case AvgPool():
                return self._module(value, lambda: _avg_pool(op), inputs[0])
            case MaxPool():
                return self._module(value, lambda: _max_pool(op), inputs[0])
            case AdaptiveMaxPool():
                return self._module(value, lambda: _adaptive_max_pool(op), inputs[0])
            case Upsample():
                return self._module(value, lambda: _upsample(op), inputs[0])
            case Activation():
                return self._activation(value, op, inputs[0])
            case Clamp():
                return self._clamp(value, op, inputs[0])
            case Identity():
                return self.graph.call_method("clone", (inputs[0],)) if op.copies else inputs[0]
            case Flatten():
                return self.graph.call_method("flatten", (inputs[0], 1))  # a call less than torch.flatten
            case Unflatten():
                return self.graph.call_method("unflatten", (inputs[0], 1, op.shape))
            case Add():
                return self._function(value, operator.add if op.sign == 1 else operator.sub, *inputs)
            case Multiply():
                return self._function(value, operator.mul, *inputs)
            case Concat():
                return self._function(value, torch.cat, inputs, op.axis)
            case Constant():
                return self._constant(value, op.tensor)
            case Gather():
                return self._gather(value, op, inputs[0])
            case Pad():
                return self._pad(value, op, inputs[0])
            case Subsample():
                return self._function(value, operator.getitem, inputs[0], op.index)
            case PixelShuffle():
                return self._module(value, lambda: nn.PixelShuffle(op.factor), inputs[0])
            case PixelUnshuffle(places=tuple()):
                parts = [self._function(value, operator.getitem, inputs[0], index) for index in op.indices]
                return self._function(value, torch.cat, parts, -3)
            case PixelUnshuffle():
                return self._module(value, lambda: nn.PixelUnshuffle(op.factor), inputs[0])
            case BorderFill():
                return self._assigned(value, op, self._own(value, inputs[0]))
            case Assign():
                return self._assign(value, op, inputs)
            case AxisSums():
                return self._axis_sums(value, op, inputs[0])
            case Call():
                return self._call(value, op, inputs)
        raise GraphError(f"{value.where}: no layer for the operator {op.label}")

    def _conv(self, value: Value, op: Conv, x: fx.Node) -> fx.Node:
        """The layers of a convolution: those in ``op.extras`` stand around it, in that order."""
        if op.reads_whole_map:  # PyTorch's convolutions take several times as long for one position
            return self._linear_of_map(value, op, x)
        bias_map = op.bias if op.bias is not None and op.bias.dim() > 1 else None
        plain = op if bias_map is None else replace(op, bias=None)
        if "sub" in op.extras:
            # K * pad(x, v) = K * pad(x - v, 0) + (sum of taps of K) v
            assert op.pad_value is not None
            v = op.pad_value.reshape(-1, *[1] * op.spatial)
            x = self._function(value, operator.sub, x, self._constant(value, v, "pad_value"))
            plain = replace(plain, pad_value=None, bias=_bias_of_pad_value(plain))
        if "ones" in op.extras:
            channel_behind = (*[0] * (2 * op.spatial), 0, 1)
            x = self.graph.call_function(F.pad, (x, channel_behind, "constant", 1.0))
            plain = plain.with_ones()
        if "pad" in op.extras:
            x = self._module(value, lambda: _padding_layer(plain), x, suffix="pad")
            plain = replace(plain, padding=0, padding_mode="zeros", pad_value=None)
        node = self._module(value, lambda: _convolution(plain, self._parameter), x)
        if bias_map is None:
            return node
        return self._function(value, operator.add, node, self._constant(value, bias_map, "bias_map"))

    def _linear_of_map(self, value: Value, op: Conv, x: fx.Node) -> fx.Node:
        flat = self._function(value, torch.flatten, x, -1 - op.spatial)
        bias = None if op.bias is None else op.bias.flatten()
        y = self._module(value, lambda: _convolution(Conv(op.weight.flatten(1), bias), self._parameter), flat)
        return self.graph.call_method("unflatten", (y, -1, (op.out_channels, *[1] * op.spatial)))

    def _scale(self, value: Value, op: Scale, x: fx.Node) -> fx.Node:
        """One call, so that compiling the result again finds nothing to fold."""
        shape = (-1, *[1] * (op.axes or 0))
        changing = [
            (function, tensor)
            for function, tensor, neutral in ((operator.mul, op.scale, 1), (operator.add, op.shift, 0))
            if not bool((tensor == neutral).all())
        ]
        if len(changing) == 2:
            scale, shift = (self._constant(value, tensor.view(shape), "scale") for _, tensor in changing)
            return self._function(value, torch.addcmul, shift, x, scale)
        for function, tensor in changing:
            if tensor.numel() == 1:
                return self._function(value, function, x, float(tensor))
            return self._function(value, function, x, self._constant(value, tensor.view(shape), "scale"))
        return x

    def _normalization(self, value: Value, op: Normalize, affine: Scale | None, x: fx.Node) -> fx.Node:
        key = (id(op), id(affine))
        rank = len(value.tensor_type.shape)
        path = self.modules.get(key)
        if path is None:
            path = self.modules[key] = self._place(value, _normalization(op, affine, rank, self._parameter), None)
        return self.graph.call_module(path, (x,))

    def _activation(self, value: Value, op: Activation, x: fx.Node) -> fx.Node:
        make = _ACTIVATIONS.get(op.name)
        if make is None and op.name != "prelu":
            return self._function(value, op.function, x, **dict(op.options))
        overwrite = op.inplace and self._may_overwrite(value.inputs[0])
        return self._module(value, lambda: _activation_layer(op, overwrite, self._parameter), x, shared=not overwrite)

    def _clamp(self, value: Value, op: Clamp, x: fx.Node) -> fx.Node:
        """Two calls, of which PyTorch has vector kernels for images; it has none for its ``clamp`` with tensors."""
        for function, bound in zip((torch.maximum, torch.minimum), op.bounds, strict=True):
            if bound is not None:
                x = self._function(value, function, x, self._constant(value, bound, "bounds"))
        return x

    def _may_overwrite(self, value: Value) -> bool:
        """Nobody else reads the value, and its memory is its own."""
        fresh = value.op.fresh or (isinstance(value.op, Pad) and not value.op.is_view)
        return self.source.use_count(value) == 1 and fresh and not isinstance(value.op, Input | Scale)

    def _gather(self, value: Value, op: Gather, x: fx.Node) -> fx.Node:
        for function, args in op.steps:
            args = tuple(self._constant(value, arg, "index") if isinstance(arg, Tensor) else arg for arg in args)
            known = (x, function, repr(args))  # the pieces of one chunk() share the call
            if known not in self.calls:
                self.calls[known] = self._function(value, function, x, *args)
            x = self.calls[known]
        return x

    def _pad(self, value: Value, op: Pad, x: fx.Node) -> fx.Node:
        if op.is_view:
            return self._function(value, operator.getitem, x, slices(op.padding))
        x = self._module(value, lambda: _pad_layer(op), x)
        return x if not _setitems(op) else self._assigned(value, _fill_of(op), x)

    def _own(self, value: Value, x: fx.Node) -> fx.Node:
        """The input of ``value`` as a tensor that it may overwrite."""
        return x if self._may_overwrite(value.inputs[0]) else self.graph.call_method("clone", (x,))

    def _assigned(self, value: Value, op: BorderFill, y: fx.Node) -> fx.Node:
        filling: Any = float(op.value) if op.value.numel() == 1 else self._constant(value, op.filling, "border")
        for index in op.assignments:
            self._function(value, operator.setitem, y, index, filling)
        return y

    def _assign(self, value: Value, op: Assign, inputs: list[fx.Node]) -> fx.Node:
        index, assigned = op.filled(tuple(inputs))
        index, assigned = tree_map(
            lambda leaf: self._constant(value, leaf) if isinstance(leaf, Tensor) else leaf,
            (index, assigned),
            is_leaf=_is_node,
        )
        y = self._own(value, inputs[0])
        self._function(value, operator.setitem, y, index, assigned)
        return y

    def _axis_sums(self, value: Value, op: AxisSums, x: fx.Node) -> fx.Node:
        for matrix in op.steps:
            x = self._function(value, F.linear, x, self._constant(value, matrix, "sums"))
            x = x if op.spatial == 1 else self._function(value, torch.movedim, x, -1, -op.spatial)
        return x

    def _call(self, value: Value, op: Call, inputs: list[fx.Node]) -> fx.Node:
        args = tree_map(lambda leaf: inputs[leaf.index] if isinstance(leaf, Slot) else leaf, op.args, is_leaf=_is_slot)
        kwargs = dict(
            tree_map(lambda leaf: inputs[leaf.index] if isinstance(leaf, Slot) else leaf, op.kwargs, is_leaf=_is_slot)
        )
        args, kwargs = tree_map(
            lambda leaf: self._constant(value, leaf) if isinstance(leaf, Tensor) else leaf,
            (args, kwargs),
            is_leaf=_is_node,
        )
        if isinstance(op.target, nn.Module):
            path = self.modules.get(id(op.target)) or self._place(value, self._copied(op.target), op.target)
            return self.graph.call_module(path, tuple(args), kwargs)
        if isinstance(op.target, str):
            return self.graph.call_method(op.target, tuple(args), kwargs)
        return self.graph.call_function(op.target, tuple(args), kwargs)

    # --- nodes and attributes --------------------------------------------------------------------------------------

    def _function(self, value: Value, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(function, args, kwargs)

    def _module(self, value: Value, make: Any, x: fx.Node, suffix: str = "", shared: bool = True) -> fx.Node:
        shared = shared and not suffix
        known = self.modules.get(id(value.op)) if shared else None
        path = known or self._place(value, make(), value.op if shared else None, suffix)
        return self.graph.call_module(path, (x,))

    def _place(self, value: Value, module: nn.Module, of: Operator | nn.Module | None, suffix: str = "") -> str:
        path = self._free_name(value, suffix)
        self._parent(path).add_module(path.rpartition(".")[2], module)
        if of is not None:
            self.modules[id(of)] = path
        return path

    def _copied(self, module: nn.Module) -> nn.Module:
        """A module that rgc does not look into, in the dtype of the result; it shares its parameters as it did."""
        if not self.copies:
            return copy_model(module, dtype=self.dtype, share_parameters=True)
        copied = copy_model(module, dtype=self.dtype)
        for path, parameter in module.named_parameters(remove_duplicate=False):
            parent, _, name = path.rpartition(".")
            setattr(copied.get_submodule(parent), name, self._parameter(parameter))
        return copied

    def _constant(self, value: Value, tensor: Tensor, suffix: str = "constant") -> fx.Node:
        path = self._free_name(value, suffix)
        self._parent(path).register_buffer(path.rpartition(".")[2], self._cast(tensor))
        return self.graph.get_attr(path)

    def _free_name(self, value: Value, suffix: str) -> str:
        """The user's name for the value, with a number where another layer has it already."""
        wanted = (value.origin.paths[0] if value.origin.paths else value.name) or value.op.label.split()[0]
        parts = [part + "_" * _is_reserved(part) for part in wanted.split(".") if part]
        wanted = ".".join(parts) + (f"_{suffix}" if suffix else "")
        name, number = wanted, 1
        while self._is_taken(name):
            name, number = f"{wanted}_{number}", number + 1
        self.names.add(name)
        parts = name.split(".")
        self.containers.update(".".join(parts[:depth]) for depth in range(1, len(parts)))
        return name

    def _is_taken(self, name: str) -> bool:
        """A name is free if it is no layer, no container, and lies in no layer."""
        if name in self.names or name in self.containers:
            return True
        parts = name.split(".")
        return any(".".join(parts[:depth]) in self.names for depth in range(1, len(parts)))

    def _parent(self, path: str) -> nn.Module:
        parent = self.root
        for part in path.split(".")[:-1]:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        return parent

    def _cast(self, tensor: Tensor) -> Tensor:
        dtype = tensor.dtype if self.dtype is None else dtype_in(self.dtype, tensor)
        return tensor.detach().to(dtype, copy=self.copies).contiguous()

    def _parameter(self, tensor: Tensor) -> nn.Parameter:
        """The parameter for a tensor: one and the same for layers that share their weights."""
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))
        if key not in self.parameters:
            made = nn.Parameter(self._cast(tensor), requires_grad=False)
            self.parameters[key] = (tensor, made)
        return self.parameters[key][1]

    def _node_of(self, leaf: Any) -> Any:
        return self.nodes[leaf] if isinstance(leaf, Value) else leaf


# --- layers ------------------------------------------------------------------------------------------------------


def _convolution(op: Conv, parameter: Any) -> nn.Module:
    if op.spatial == 0:
        op = ungrouped(op)
        return _with_parameters(
            nn.Linear, (op.in_channels, op.out_channels), {"bias": op.bias is not None}, op, parameter
        )
    options: dict[str, Any] = {
        "kernel_size": op.kernel, "stride": op.stride, "padding": tuple(before for before, _ in op.padding),
        "dilation": op.dilation, "groups": op.groups, "bias": op.bias is not None, "padding_mode": op.padding_mode,
    }  # fmt: skip
    if op.transposed:
        options["output_padding"] = op.output_padding
    kind = (_TRANSPOSED if op.transposed else _PLAIN)[op.spatial]
    return _with_parameters(kind, (op.in_channels, op.out_channels), options, op, parameter)


def _with_parameters(kind: Any, args: tuple[int, int], options: dict[str, Any], op: Conv, parameter: Any) -> nn.Module:
    layer: nn.Module = kind(*args, **options, device="meta")  # no memory, no random initialisation
    layer.register_parameter("weight", parameter(op.weight))
    if op.bias is not None:
        layer.register_parameter("bias", parameter(op.bias))
    return layer


def _bias_of_pad_value(op: Conv) -> Tensor:
    assert op.pad_value is not None
    total = ungrouped(op).weight.double().flatten(2).sum(-1) @ op.pad_value.double()
    return total if op.bias is None else total + op.bias.double()


def _padding_layer(op: Conv) -> nn.Module:
    amounts = [amount for sides in reversed(op.padding) for amount in sides]
    added, cropped = tuple(max(amount, 0) for amount in amounts), tuple(min(amount, 0) for amount in amounts)
    kind = {"reflect": "ReflectionPad", "replicate": "ReplicationPad", "circular": "CircularPad"}.get(op.padding_mode)
    value = 0.0 if op.pad_value is None else float(op.pad_value[0])
    layers: list[nn.Module] = []
    if any(added) and kind is not None:
        layers.append(getattr(nn, f"{kind}{op.spatial}d")(added))
    elif any(added):
        layers.append(getattr(nn, f"ConstantPad{op.spatial}d")(added, value))
    if any(cropped):
        layers.append(getattr(nn, f"ConstantPad{op.spatial}d")(cropped, 0.0))
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def _pad_layer(op: Pad) -> nn.Module:
    kinds: dict[str, Any] = {"reflect": "ReflectionPad", "replicate": "ReplicationPad", "circular": "CircularPad"}
    constant = op.value is not None and op.value.numel() == 1
    kind = getattr(nn, f"{kinds.get(op.mode, 'ConstantPad' if constant else 'ZeroPad')}{op.spatial}d")
    layer: nn.Module = kind(op.amounts, float(op.value)) if constant and op.value is not None else kind(op.amounts)
    return layer


def _setitems(op: Pad) -> list[str]:
    return [] if op.value is None or op.value.numel() == 1 else ["setitem"] * len(_fill_of(op).assignments)


def _fill_of(op: Pad) -> BorderFill:
    """What puts one value per channel where the layer has put zeros."""
    assert op.value is not None
    return BorderFill(tuple((max(before, 0), max(after, 0)) for before, after in op.padding), op.value)


def _batch_norm(op: BatchNorm, cast: Any, parameter: Any) -> nn.Module:
    kind = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[op.axes]
    layer = kind(
        op.mean.numel(), eps=op.eps, affine=op.weight is not None or op.bias is not None,
        track_running_stats=not op.training, device="meta",
    )  # fmt: skip
    if not op.training:
        layer.register_buffer("running_mean", cast(op.mean))
        layer.register_buffer("running_var", cast(op.var))
        layer.register_buffer("num_batches_tracked", torch.tensor(0))
    for name, tensor, neutral in (("weight", op.weight, 1.0), ("bias", op.bias, 0.0)):
        if layer.affine:
            filled = torch.full_like(op.mean, neutral) if tensor is None else tensor
            layer.register_parameter(name, parameter(filled))
    return layer


def _normalization(op: Normalize, affine: Scale | None, rank: int, parameter: Any) -> nn.Module:
    kind, has_weights = _normalization_kind(op, rank), affine is not None
    layer: nn.Module
    if op.kind in ("layer", "rms"):
        layer = kind(op.shape, eps=op.eps, elementwise_affine=has_weights, device="meta")
    elif op.kind == "group":
        layer = kind(op.groups, op.shape[0], eps=op.eps, affine=has_weights, device="meta")
    else:
        layer = kind(op.shape[0], eps=op.eps, affine=has_weights, device="meta")
    if affine is not None:
        layer.register_parameter("weight", parameter(affine.scale.expand(op.shape)))
        is_needed = affine.shift.numel() > 1 or bool(affine.shift.any())
        if op.kind != "rms" and (is_needed or op.kind != "layer"):
            layer.register_parameter("bias", parameter(affine.shift.expand(op.shape)))
        elif op.kind == "layer":
            layer.register_parameter("bias", None)  # as nn.LayerNorm(bias=False) has it
    return layer


def _normalization_kind(op: Normalize, rank: int) -> Any:
    fixed = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "group": nn.GroupNorm}
    return fixed.get(op.kind) or {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}[rank]


def _avg_pool(op: AvgPool) -> nn.Module:
    options: dict[str, Any] = {"ceil_mode": op.ceil_mode, "count_include_pad": op.count_include_pad}
    if op.spatial > 1:
        options["divisor_override"] = op.divisor_override
    kind: Any = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[op.spatial]
    layer: nn.Module = kind(*map(_as_written, (op.window, op.stride, op.padding)), **options)
    return layer


def _max_pool(op: MaxPool) -> nn.Module:
    kind: Any = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[op.spatial]
    sizes = map(_as_written, (op.window, op.stride, op.padding, op.dilation))
    layer: nn.Module = kind(*sizes, ceil_mode=op.ceil_mode)
    return layer


def _adaptive_max_pool(op: AdaptiveMaxPool) -> nn.Module:
    kind: Any = {1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d}[op.spatial]
    layer: nn.Module = kind(_as_written(op.output_size))
    return layer


def _upsample(op: Upsample) -> nn.Module:
    size, scale_factor = map(_as_written, (op.size, op.scale_factor))
    return nn.Upsample(size, scale_factor, op.mode, op.align_corners, op.recompute_scale_factor)


def _as_written(sizes: Any) -> Any:
    """One number where all axes have the same, as people write it."""
    return sizes[0] if sizes and all(size == sizes[0] for size in sizes) else sizes


def _activation_layer(op: Activation, overwrite: bool, parameter: Any) -> nn.Module:
    if op.weight is not None:
        layer = nn.PReLU(op.weight.numel(), device="meta")
        layer.register_parameter("weight", parameter(op.weight))
        return layer
    options = dict(op.options)
    if overwrite and op.name in _HAVE_INPLACE:
        options["inplace"] = True
    made: nn.Module = _ACTIVATIONS[op.name](**options)
    return made


_PLAIN: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_ACTIVATIONS: dict[str, Any] = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "celu": nn.CELU, "selu": nn.SELU,
    "gelu": nn.GELU, "silu": nn.SiLU, "mish": nn.Mish, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh,
    "hardswish": nn.Hardswish, "hardsigmoid": nn.Hardsigmoid, "hardtanh": nn.Hardtanh, "softplus": nn.Softplus,
    "logsigmoid": nn.LogSigmoid, "softsign": nn.Softsign, "tanhshrink": nn.Tanhshrink,
}  # fmt: skip
_HAVE_INPLACE = frozenset({
    "relu", "relu6", "leaky_relu", "elu", "celu", "selu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh",
})  # fmt: skip
_BOOKKEEPING = frozenset({
    "getattr", "getitem", "eq", "_assert", "size", "view", "reshape", "flatten", "Flatten", "unflatten", "contiguous",
    "sym_size", "_unsafe_view", "len", "ge", "OrderedDict",
})  # fmt: skip


def _is_reserved(name: str) -> bool:
    """Does Python, torch.fx or the compiled module itself use the name?"""
    return keyword.iskeyword(name) or hasattr(fx.GraphModule, name) or name in {"example", "plan", "report"}


def _is_value(leaf: Any) -> bool:
    return isinstance(leaf, Value)


def _is_slot(leaf: Any) -> bool:
    return isinstance(leaf, Slot)


def _is_node(leaf: Any) -> bool:
    return isinstance(leaf, fx.Node)
