"""What do PyTorch's functions mean? One table from their names to one vocabulary of operators.

A handler returns the value that a call makes, or None for a form that it does not know, which becomes `Opaque`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rgc.algebra import Conv, Linear, Scale
from rgc.ir import Input, Operator, Value
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
    Identity,
    MaxPool,
    Multiply,
    Normalize,
    Opaque,
    Slot,
    Structural,
    Upsample,
    completes,
)
from rgc.views import carrying_axis


class Lifting(Protocol):
    """The lifting of one traced program, as far as handlers use it."""

    @property
    def real(self) -> Mapping[Value, Any]:
        """What a live value is on the example."""

    @property
    def operators(self) -> dict[int, Operator]:
        """One operator per module, by its id, so that shared modules stay shared."""

    def emit(self, op: Operator, *inputs: Value) -> Value:
        """A new value, run on the example to learn its type."""

    def shape(self, value: Value) -> tuple[int, ...]:
        """The shape of a tensor value at the example."""

    def shared(self, module: Any, make: Callable[[], Operator]) -> Operator:
        """The operator of a module: one and the same however often the module is called."""

    def recall(self, value: Value, result: Any) -> None:
        """What ``value`` is on the example, for the node under way, although nothing in the program is bound to it."""

    def mark_inplace(self, value: Value) -> None:
        """The user wished that the activation overwrites its input."""


Handler = Callable[..., Any]  # of (lifting, *args, **kwargs): a value, a tuple of results, or None


def conv(lifter: Lifting, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
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


def conv_transpose(lifter: Lifting, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
                    output_padding: Any = 0, groups: int = 1, dilation: Any = 1) -> Value | None:  # fmt: skip
    if not isinstance(x, Value) or not _are_tensors(weight, bias):
        return None
    rank = weight.dim() - 2
    op = Conv(
        weight, bias, _tuple(stride, rank), _tuple(padding, rank), _tuple(dilation, rank), groups,
        transposed=True, output_padding=_tuple(output_padding, rank),
    )  # fmt: skip
    return lifter.emit(op, x)


def linear(lifter: Lifting, x: Any, weight: Any, bias: Any = None) -> Value | None:
    if not isinstance(x, Value) or not _are_tensors(weight, bias) or weight.dim() != 2:
        return None
    return lifter.emit(Conv(weight, bias), x)


def batch_norm(lifter: Lifting, x: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
                training: bool = False, momentum: float = 0.1, eps: float = 1e-5) -> Value | None:  # fmt: skip
    if not isinstance(x, Value) or training or not _are_tensors(running_mean, running_var, weight, bias):
        return None
    if running_mean is None or running_var is None:
        return None
    return lifter.emit(BatchNorm(running_mean, running_var, weight, bias, eps, len(lifter.shape(x)) - 2), x)


def _aten_batch_norm(lifter: Lifting, x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool,
                     momentum: float, eps: float, cudnn: bool = True) -> Value | None:  # fmt: skip
    return batch_norm(lifter, x, mean, var, weight, bias, training, momentum, eps)


def _aten_batch_norm_no_training(lifter: Lifting, x: Any, weight: Any, bias: Any, mean: Any, var: Any,
                                 momentum: float, eps: float) -> Any:  # fmt: skip
    result = batch_norm(lifter, x, mean, var, weight, bias, False, momentum, eps)
    return None if result is None else (result, None, None)


def _aten_convolution(lifter: Lifting, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any,
                      transposed: bool, output_padding: Any, groups: int) -> Value | None:  # fmt: skip
    if transposed:
        return conv_transpose(lifter, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(lifter, x, weight, bias, stride, padding, dilation, groups)


def avg_pool(rank: int) -> Handler:
    def handle(lifter: Lifting, x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
               count_include_pad: bool = True, divisor_override: int | None = None) -> Value | None:  # fmt: skip
        window = _tuple(kernel_size, rank)
        step = window if stride is None or stride == () or stride == [] else _tuple(stride, rank)
        op = AvgPool(window, step, _tuple(padding, rank), ceil_mode, count_include_pad, divisor_override)
        return lifter.emit(op, x)

    return handle


def max_pool(rank: int) -> Handler:
    def handle(lifter: Lifting, x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
               ceil_mode: bool = False, return_indices: bool = False) -> Value | None:  # fmt: skip
        if return_indices or not isinstance(x, Value):
            return None
        window = _tuple(kernel_size, rank)
        step = window if stride is None or stride == () or stride == [] else _tuple(stride, rank)
        return lifter.emit(MaxPool(window, step, _tuple(padding, rank), _tuple(dilation, rank), ceil_mode), x)

    return handle


def adaptive_max_pool(rank: int) -> Handler:
    def handle(lifter: Lifting, x: Any, output_size: Any, return_indices: bool = False) -> Value | None:
        sizes = tuple(output_size) if isinstance(output_size, list | tuple) else (output_size,) * rank
        plain = all(n is None or (isinstance(n, int) and not isinstance(n, bool)) for n in sizes)
        if (
            return_indices
            or not isinstance(x, Value)
            or not plain
            or len(sizes) != rank
            or (rank == 1 and None in sizes)
        ):
            return None
        return lifter.emit(AdaptiveMaxPool(sizes), x) if _are_floating(lifter, x) else None

    return handle


def upsample(lifter: Lifting, x: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
             align_corners: Any = None, recompute_scale_factor: Any = None,
             antialias: bool = False) -> Value | None:  # fmt: skip
    if not isinstance(x, Value) or antialias or not _are_floating(lifter, x):
        return None
    rank = len(lifter.shape(x)) - 2
    given = [each if isinstance(each, list | tuple) else (each,) for each in (size, scale_factor)]
    if not 1 <= rank <= 3 or not all(each is None or isinstance(each, int | float) for each in (*given[0], *given[1])):
        return None  # a size that depends on the input
    to, by = (None if None in each else tuple(each) * (rank if len(each) == 1 else 1) for each in given)
    return lifter.emit(Upsample(rank, to, by, mode, align_corners, recompute_scale_factor), x)


def _aten_upsample(mode: str, corners: bool) -> Handler:
    """The overload ``vec``: of a size or scale factors, with corners to align where the mode has them."""

    def handle(lifter: Lifting, x: Any, size: Any, *rest: Any) -> Value | None:
        if len(rest) != 1 + corners or (size is None) == (rest[-1] is None):
            return None
        return upsample(lifter, x, size, rest[-1], mode, rest[0] if corners else None)

    return handle


def activation(name: str) -> Handler:
    def handle(lifter: Lifting, x: Any, *args: Any, **options: Any) -> Value | None:
        if args and name in _POSITIONAL:
            options.update(zip(_POSITIONAL[name], args, strict=False))
        elif args:
            return None
        if not isinstance(x, Value) or any(isinstance(option, Value) for option in options.values()):
            return None
        numbers = {key: _number(value) for key, value in options.items()}
        return lifter.emit(Activation(name, tuple(sorted(numbers.items()))), x)

    return handle


def elementwise(name: str) -> Handler:
    """A function of ``torch`` without options, which makes other types of integers."""

    def handle(lifter: Lifting, x: Any) -> Value | None:
        return lifter.emit(Activation(name), x) if _are_floating(lifter, x) else None

    return handle


def _clamp(lifter: Lifting, x: Any, min: Any = None, max: Any = None) -> Value | None:
    if any(isinstance(bound, Tensor) and bound.numel() > 1 for bound in (min, max)):
        return _clamp_channels(lifter, x, min, max)
    bounds = tuple((name, _number(bound)) for name, bound in (("max", max), ("min", min)) if bound is not None)
    if not _are_floating(lifter, x) or not all(isinstance(bound, int | float) for _, bound in bounds):
        return None
    return lifter.emit(Activation("clamp", bounds), x)


def _clamp_min(lifter: Lifting, x: Any, min: Any) -> Value | None:
    return _clamp(lifter, x, min)


def _clamp_max(lifter: Lifting, x: Any, max: Any) -> Value | None:
    return _clamp(lifter, x, None, max)


def _clamp_channels(lifter: Lifting, x: Any, min: Any, max: Any) -> Value | None:
    """Bounds of which at least one is a tensor along the channels."""
    if not isinstance(x, Value) or not _are_floating(lifter, x):
        return None
    given = (-math.inf if min is None else min, math.inf if max is None else max)
    found = [_per_channel(lifter, x, bound) for bound in given]
    known = [each for each in found if each is not None]
    axes = {own for _, own in known} - {None}
    if len(known) < 2 or len(axes) != 1:
        return None
    (behind,) = (each for each in axes if each is not None)
    channels = lifter.shape(x)[-1 - behind]
    lower, upper = (bound.expand(channels).contiguous() for bound, _ in known)
    is_bounded = bool(((lower > -math.inf) | (upper < math.inf)).any())
    has_nan = bool(lower.isnan().any() | upper.isnan().any())
    return lifter.emit(Clamp(lower, upper, behind), x) if is_bounded and not has_nan else None


def _maximum(lifter: Lifting, x: Any, y: Any) -> Value | None:
    """The larger of a value and a constant, in any order."""
    value, constant = (x, y) if isinstance(x, Value) else (y, x)
    return _clamp(lifter, value, constant) if isinstance(constant, Tensor) else None


def _minimum(lifter: Lifting, x: Any, y: Any) -> Value | None:
    value, constant = (x, y) if isinstance(x, Value) else (y, x)
    return _clamp(lifter, value, None, constant) if isinstance(constant, Tensor) else None


def _power(lifter: Lifting, x: Any, exponent: Any) -> Value | None:
    is_one = not isinstance(exponent, Value) and not (isinstance(exponent, Tensor) and exponent.dim())
    square = is_one and _number(exponent) == 2
    return elementwise("square")(lifter, x) if square else None


def prelu(lifter: Lifting, x: Any, weight: Any) -> Value | None:
    if not isinstance(x, Value) or not _are_tensors(weight):
        return None
    if weight.numel() == 1 and not isinstance(weight, nn.Parameter):  # a slope that nothing learns is a number
        return lifter.emit(Activation("leaky_relu", (("negative_slope", float(weight)),)), x)
    return lifter.emit(Activation("prelu", weight=weight), x)


def dropout(lifter: Lifting, x: Any, p: float = 0.5, training: Any = True, train: Any = None) -> Value | None:
    if (training if train is None else train) and p > 0:
        return None
    return lifter.emit(Identity("dropout"), x)


def add(lifter: Lifting, x: Any, y: Any, alpha: Any = 1) -> Value | None:
    if not isinstance(alpha, int | float):
        return None
    if alpha in (1, -1):
        return _sum(lifter, x, y, int(alpha))
    scaled = _product(lifter, y, alpha)
    return None if scaled is None else _sum(lifter, x, scaled, 1)


def _subtract(lifter: Lifting, x: Any, y: Any, alpha: Any = 1) -> Value | None:
    return add(lifter, x, y, -alpha) if isinstance(alpha, int | float) else None


def _subtract_from(lifter: Lifting, x: Any, y: Any, alpha: Any = 1) -> Value | None:
    return _subtract(lifter, y, x, alpha)


def _sum(lifter: Lifting, x: Any, y: Any, sign: int) -> Value | None:
    x, y = _without_expansion(lifter, x, y), _without_expansion(lifter, y, x)
    if isinstance(x, Value) and isinstance(y, Value):
        if not _are_floating(lifter, x, y):
            return None
        if x is y:
            return lifter.emit(Scale(_one(1.0 + sign), _one(0.0)), x)
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


def multiply(lifter: Lifting, x: Any, y: Any) -> Value | None:
    x, y = _without_expansion(lifter, x, y), _without_expansion(lifter, y, x)
    if isinstance(x, Value) and isinstance(y, Value):
        return lifter.emit(Multiply(), x, y) if _are_floating(lifter, x, y) else None
    value, constant = (x, y) if isinstance(x, Value) else (y, x)
    per_channel = _per_channel(lifter, value, constant) if _are_floating(lifter, value) else None
    if per_channel is None:
        return None
    tensor, axes = per_channel
    return lifter.emit(Scale(tensor, tensor.new_zeros(1), axes), value)


def _without_expansion(lifter: Lifting, operand: Any, other: Any) -> Any:
    """The constant of ``c.expand_as(x)`` beside a value of the shape of x, to which it is broadcast anyway."""
    if not isinstance(operand, Value) or not isinstance(other, Value) or not isinstance(operand.op, Opaque):
        return operand
    args = operand.op.args
    if operand.op.name != "expand_as" or len(args) != 2 or not isinstance(args[0], Tensor) or operand.op.kwargs:
        return operand
    (measured,) = operand.inputs
    return args[0] if measured in _of_one_shape(other) or other in _of_one_shape(measured) else operand


def _product(lifter: Lifting, x: Any, y: Any) -> Any:
    """x * y of values or constants: a value, a constant where both are constant, or None."""
    if isinstance(x, Value) or isinstance(y, Value):
        return multiply(lifter, x, y)
    return x * y


def _divide(lifter: Lifting, x: Any, y: Any, rounding_mode: str | None = None) -> Value | None:
    is_number = isinstance(y, int | float) and not isinstance(y, bool)
    if rounding_mode is not None or not (isinstance(y, Tensor) or (is_number and y != 0)):
        return None
    return multiply(lifter, x, 1.0 / (y.double() if isinstance(y, Tensor) else y))


def _negate(lifter: Lifting, x: Any) -> Value | None:
    return multiply(lifter, x, -1.0)


def _lerp(lifter: Lifting, start: Any, end: Any, weight: Any) -> Value | None:
    if isinstance(weight, Value):
        return None
    kept, added = _product(lifter, start, 1 - weight), _product(lifter, end, weight)
    return None if kept is None or added is None else _sum(lifter, kept, added, 1)


def _add_product(lifter: Lifting, x: Any, tensor1: Any, tensor2: Any, value: Any = 1) -> Value | None:
    """addcmul: x + value tensor1 tensor2; of constants and one value, a single scale."""
    factor, value_in = (tensor1, tensor2) if isinstance(tensor2, Value) else (tensor2, tensor1)
    if isinstance(value_in, Value) and not isinstance(factor, Value) and not isinstance(x, Value) and value == 1:
        return _scale(lifter, value_in, factor, x)
    product = _product(lifter, tensor1, tensor2)
    if product is None or isinstance(value, Value):
        return None
    return add(lifter, x, product, value)


def _scale(lifter: Lifting, x: Value, factor: Any, offset: Any) -> Value | None:
    """factor x + offset, both per channel along one axis."""
    if not _are_floating(lifter, x):
        return None
    scale, shift = _per_channel(lifter, x, factor), _per_channel(lifter, x, offset)
    if scale is None or shift is None or len({axes for _, axes in (scale, shift)} - {None}) > 1:
        return None
    axes = scale[1] if scale[1] is not None else shift[1]
    return lifter.emit(Scale(scale[0], shift[0], axes), x)


def _add_quotient(lifter: Lifting, x: Any, tensor1: Any, tensor2: Any, value: Any = 1) -> Value | None:
    """addcdiv: x + value tensor1 / tensor2."""
    return None if isinstance(tensor2, Value) else _add_product(lifter, x, tensor1, 1.0 / tensor2, value)


def _sum_over(lifter: Lifting, x: Any, dim: Any = None, keepdim: Any = False, dtype: Any = None) -> Value | None:
    """A sum along the axis of a stack is the sum of what was stacked, where that may merge; others are structural."""
    parts = _stacked_along(lifter, x, dim)
    if parts is None or not _share_a_source(parts) or keepdim or dtype is not None:
        return None
    total: Value | None = parts[0]
    for part in parts[1:]:
        total = None if total is None else _sum(lifter, total, part, 1)
    return total


def _share_a_source(parts: Sequence[Value]) -> bool:
    """Are two of the values affine functions of one, or is there just one? If not, a stack and its sum are less."""
    sources: set[Value] = set()
    for part in parts:
        own = {part}
        pending = [part]
        while pending:
            new = [each for value in pending if value.op.affine for each in value.inputs if each not in own]
            own.update(new)
            pending = new
        if own & sources:
            return True
        sources |= own
    return len(parts) == 1


def _mean_over(lifter: Lifting, x: Any, dim: Any = None, keepdim: Any = False, dtype: Any = None) -> Value | None:
    """A mean over a stack or over the channel axis (which stays, with one channel); other means are structural."""
    if dtype is not None or not isinstance(x, Value) or not _are_floating(lifter, x):
        return None
    parts = _stacked_along(lifter, x, dim)
    if parts is not None:
        total = _sum_over(lifter, x, dim, keepdim)
        return None if total is None else multiply(lifter, total, 1.0 / len(parts))
    shape, axis = lifter.shape(x), _one_axis(lifter, x, dim)
    if axis is None or not keepdim or len(shape) > 5:
        return None
    if axis != 1 and not ((axis, len(shape)) == (2, 3) and _is_channel_axis(x, axis, 3)):
        return None  # positions, of which an input of another size has another number
    return lifter.emit(ChannelMean(shape[axis], len(shape) - 1 - axis), x)


def _stacked_along(lifter: Lifting, x: Any, dim: Any) -> list[Value] | None:
    """The values that ``x`` stacks along the axis ``dim``, or their multiples; None where it is no such stack."""
    if isinstance(x, Value) and len(x.inputs) == 1 and (isinstance(x.op, Scale) or _name(x) in ("mul", "multiply")):
        return _weighted_along(lifter, x, dim)
    if not isinstance(x, Value) or not isinstance(x.op, Opaque) or x.op.name != "stack":
        return None
    args, kwargs = x.op.args, dict(x.op.kwargs)
    parts, along = args[0] if args else kwargs.get("tensors"), args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if not isinstance(parts, list | tuple) or not all(isinstance(part, Slot) for part in parts):
        return None
    if not isinstance(along, int) or _one_axis(lifter, x, dim) != along % len(lifter.shape(x)):
        return None
    values = [x.inputs[part.index] for part in parts]
    for index, value in enumerate(values):
        lifter.recall(value, lifter.real[x].select(along, index))
    return values


def _weighted_along(lifter: Lifting, product: Value, dim: Any) -> list[Value] | None:
    """The multiples of what is stacked, for a stack times a constant for each of its parts."""
    (stack,) = product.inputs
    axis, shape = _one_axis(lifter, product, dim), lifter.shape(product)
    weights = _weights_along(product, axis, len(shape))
    if axis is None or weights is None or stack not in lifter.real or lifter.shape(stack) != shape:
        return None
    parts = _stacked_along(lifter, stack, axis)
    if parts is None:
        return None
    scaled = [multiply(lifter, part, weight) for part, weight in zip(parts, weights.expand(len(parts)), strict=True)]
    return None if None in scaled else [each for each in scaled if each is not None]


def _weights_along(product: Value, axis: int | None, rank: int) -> Tensor | None:
    """The factors of a product with a constant, if they differ along this axis of the ``rank`` axes only."""
    op = product.op
    if isinstance(op, Scale):
        along = op.axes is None or op.scale.numel() == 1 or rank - 1 - op.axes == axis
        return op.scale if along and not bool(op.shift.any()) else None
    factors = [each for each in op.args if isinstance(each, Tensor)] if isinstance(op, Opaque) else []
    if len(factors) != 1 or axis is None or not factors[0].is_floating_point() or factors[0].dim() > rank:
        return None
    whole = factors[0].reshape(*[1] * (rank - factors[0].dim()), *factors[0].shape)
    return whole.reshape(-1) if whole.shape[axis] == whole.numel() else None


def _name(value: Value) -> str:
    return value.op.name if isinstance(value.op, Call) else ""


def _one_axis(lifter: Lifting, x: Value, dim: Any) -> int | None:
    """The one axis that ``dim`` names, counted from the front; None where it names several or all."""
    axes = (dim,) if isinstance(dim, int) else tuple(dim) if isinstance(dim, list | tuple) else ()
    return axes[0] % len(lifter.shape(x)) if len(axes) == 1 and isinstance(axes[0], int) else None


def _concat(lifter: Lifting, tensors: Any, dim: int = 0, axis: int | None = None) -> Value | None:
    where = dim if axis is None else axis
    if not isinstance(tensors, list | tuple) or not all(isinstance(each, Value) for each in tensors):
        return None
    if not _are_floating(lifter, *tensors):
        return None
    rank = len(lifter.shape(tensors[0]))
    return lifter.emit(Concat(where if where < 0 else where - rank), *tensors)


def _reshape(lifter: Lifting, x: Any, *shape: Any, **options: Any) -> Value | None:
    """``x.view(x.size(0), ...)`` keeps the batch axis whatever its size: a flatten, or a reshape of the rest.

    ``x.reshape(x.size(0), x.size(1), -1)`` keeps both axes and flattens what is behind them. [N, C, L] as
    ``x.reshape(x.size(0), C, h, w)`` splits the last axis alone.
    """
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], list | tuple) else shape
    if options or not isinstance(x, Value) or not sizes or not isinstance(sizes[0], Value):
        return None
    rank = len(lifter.shape(x))
    kept = next(
        (axis for axis, n in enumerate(sizes) if axis >= rank or not _is_length(lifter, n, x, axis)), len(sizes)
    )
    if 0 < kept == rank - 1 and len(sizes) > rank and any(isinstance(n, Value) for n in sizes[kept:]):
        return _split_last(lifter, x, sizes[kept:])
    if kept == 0 or any(isinstance(n, Value) for n in sizes[kept:]):
        return None
    if sizes[kept:] == (-1,) and kept < len(lifter.shape(x)):
        return lifter.emit(Structural(torch.flatten, (Slot(0), kept)), x)
    if kept > 1 or -1 in sizes:
        return None
    return lifter.emit(Structural(torch.reshape, (Slot(0), (-1, *sizes[1:]))), x)


def _split_last(lifter: Lifting, x: Value, sizes: tuple[Any, ...]) -> Value:
    """The last axis as several, some of whose lengths are values."""
    measured = [n for n in sizes if isinstance(n, Value)]
    parts = tuple(Slot(1 + measured.index(n)) if isinstance(n, Value) else n for n in sizes)
    return lifter.emit(Structural(torch.unflatten, (Slot(0), -1, parts)), x, *measured)


def _is_length(lifter: Lifting, size: Any, x: Value, axis: int) -> bool:
    """Is ``size`` the length of this axis of ``x`` at every size, and at the example?"""
    if isinstance(size, int):
        return axis > 0 and size == lifter.shape(x)[axis] and _is_channel_axis(x, axis, len(lifter.shape(x)))
    return isinstance(size, Value) and measures(size, x, axis) and lifter.real.get(size) == lifter.shape(x)[axis]


def _is_channel_axis(x: Value, axis: int, rank: int) -> bool:
    """Does a layer with a number of channels of its own say how long this axis is, at every size?"""
    for each in _of_one_shape(x):
        if isinstance(each.op, Linear) and each.op.channels is not None and each.op.spatial == rank - axis - 1:
            return True
        x = each
    if not isinstance(x.op, Structural) or not x.inputs or x.inputs[0].type is None:
        return False
    before = x.inputs[0]
    found = carrying_axis(x.op, before.tensor_type, axis)  # a view that leaves the axis whole
    return found is not None and _is_channel_axis(before, found, len(before.tensor_type.shape))


def measures(size: Value, x: Value, axis: int) -> bool:
    """Is ``size`` the length of this axis of ``x`` at every size, or of an input's first axis, for the batch?"""
    measured = size.inputs[0] if size.inputs else size
    args = size.op.args if isinstance(size.op, Opaque | Structural) else ()
    if _name(size) == _name(measured) == "getitem" and isinstance(args[1], int):  # x.shape[1:][0]
        cut = measured.op.args[1] if isinstance(measured.op, Opaque | Structural) else None
        if not isinstance(cut, slice) or cut.step not in (None, 1) or min(cut.start or 0, args[1]) < 0:
            return False
        args, measured = (args[0], args[1] + (cut.start or 0)), measured.inputs[0]
    if _name(size) == "getitem" and args[1:] == (axis,):  # x.shape[0], x.size()[0]
        if _name(measured) not in {"getattr", "size"}:
            return False
        measured = measured.inputs[0]
    elif args[1:] != (axis,) or _name(size) not in {"size", "sym_size"}:
        return False
    return shape_source(measured) in _of_one_shape(x) or (
        axis == 0 and isinstance(_of_one_shape(measured)[-1].op, Input)
    )


def _of_one_shape(x: Value) -> list[Value]:
    """``x`` and the values before it that have its shape at every size."""
    found = [x]
    while isinstance(x.op, Activation | BatchNorm | Clamp | Identity | Normalize | Scale):
        x = x.inputs[0]
        found.append(x)
    return found


def shape_source(value: Value) -> Value:
    """The value before a normalisation, which has the same shape; reading that one holds no weights of the norm back.

    Before other operators that keep the shape it would be a second reader of what folds into them.
    """
    while isinstance(value.op, Normalize) or completes(value):
        (value,) = value.inputs
    return value


def _attribute(lifter: Lifting, x: Any, name: Any) -> Value | None:
    """``x.T`` of a matrix, ``x.mT``."""
    rank = len(lifter.shape(x)) if isinstance(x, Value) and isinstance(lifter.real.get(x), Tensor) else 0
    is_transpose = (name == "T" and rank == 2) or (name == "mT" and rank > 1)
    return lifter.emit(Structural(torch.transpose, (Slot(0), -2, -1)), x) if is_transpose else None


FUNCTIONS: dict[str, Handler] = {
    "getattr": _attribute,
    "view": _reshape, "reshape": _reshape,
    "conv1d": conv, "conv2d": conv, "conv3d": conv,
    "conv_transpose1d": conv_transpose, "conv_transpose2d": conv_transpose, "conv_transpose3d": conv_transpose,
    "linear": linear, "batch_norm": batch_norm,
    "avg_pool1d": avg_pool(1), "avg_pool2d": avg_pool(2), "avg_pool3d": avg_pool(3),
    "max_pool1d": max_pool(1), "max_pool2d": max_pool(2), "max_pool3d": max_pool(3), "interpolate": upsample,
    "adaptive_max_pool1d": adaptive_max_pool(1), "adaptive_max_pool2d": adaptive_max_pool(2),
    "adaptive_max_pool3d": adaptive_max_pool(3),
    "abs": elementwise("abs"), "absolute": elementwise("abs"), "exp": elementwise("exp"), "sqrt": elementwise("sqrt"),
    "square": elementwise("square"), "pow": _power, "clamp": _clamp, "clip": _clamp, "clamp_min": _clamp_min,
    "clamp_max": _clamp_max, "maximum": _maximum, "minimum": _minimum,
    "add": add, "radd": add, "sub": _subtract, "subtract": _subtract, "rsub": _subtract_from,
    "mul": multiply, "rmul": multiply, "multiply": multiply, "div": _divide, "truediv": _divide,
    "true_divide": _divide, "divide": _divide, "neg": _negate, "negative": _negate, "lerp": _lerp,
    "addcmul": _add_product, "addcdiv": _add_quotient, "sum": _sum_over, "mean": _mean_over,
    "cat": _concat, "concat": _concat, "concatenate": _concat,
    "dropout": dropout, "dropout1d": dropout, "dropout2d": dropout, "dropout3d": dropout, "alpha_dropout": dropout,
    "feature_dropout": dropout, "feature_alpha_dropout": dropout, "prelu": prelu,
}  # fmt: skip

#: Elementwise functions, with the names of the options that may come by position.
_POSITIONAL: dict[str, tuple[str, ...]] = {
    "relu": (), "relu6": (), "leaky_relu": ("negative_slope",), "elu": ("alpha",), "celu": ("alpha",), "selu": (),
    "gelu": (), "silu": (), "mish": (), "sigmoid": (), "tanh": (), "hardswish": (), "hardsigmoid": (),
    "hardtanh": ("min_val", "max_val"), "softplus": ("beta", "threshold"), "logsigmoid": (), "softsign": (),
    "tanhshrink": (),
}  # fmt: skip
FUNCTIONS.update({name: activation(name) for name in _POSITIONAL})

ATEN: dict[str, Handler] = {
    "batch_norm": _aten_batch_norm,
    "_native_batch_norm_legit_no_training": _aten_batch_norm_no_training,
    "convolution": _aten_convolution,
    **{f"upsample_nearest{rank}d": _aten_upsample("nearest", corners=False) for rank in (1, 2, 3)},
    **{f"_upsample_nearest_exact{rank}d": _aten_upsample("nearest-exact", corners=False) for rank in (1, 2, 3)},
    **{
        f"upsample_{mode}{rank}d": _aten_upsample(mode, corners=True)
        for rank, mode in ((1, "linear"), (2, "bilinear"), (2, "bicubic"), (3, "trilinear"))
    },
}

#: Calls that are affine in their one tensor input, whatever their other arguments are.
STRUCTURAL = frozenset({
    "flatten", "reshape", "view", "permute", "transpose", "t", "swapaxes", "movedim", "contiguous", "clone", "squeeze",
    "unsqueeze", "unflatten", "flip", "roll", "narrow", "select", "slice", "getitem", "chunk", "split", "unbind",
    "mean", "sum", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "expand", "expand_as", "repeat",
})  # fmt: skip


def _per_channel(lifter: Lifting, value: Value, constant: Any) -> tuple[Tensor, int | None] | None:
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


def _one(number: float) -> Tensor:
    return torch.tensor([number], dtype=torch.float64)


def _are_tensors(*given: Any) -> bool:
    return all(each is None or isinstance(each, Tensor) for each in given)


def _are_floating(lifter: Lifting, *values: Any) -> bool:
    reals = [lifter.real.get(value) if isinstance(value, Value) else None for value in values]
    return all(isinstance(real, Tensor) and real.is_floating_point() for real in reals)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * rank
    values = tuple(int(each) for each in value)
    return values * rank if len(values) == 1 else values
