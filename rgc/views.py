"""Where do calls that rearrange, select or average leave the channels? A map along channels moves through such calls.

``op(call(x)) = call(op(x))`` holds for an affine map along one axis where the call leaves that axis whole and in order,
treats all of it alike, and makes a constant of a constant: permutations, reshapes of other axes, selections, means.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from rgc.algebra import Conv, Deferred, Linear, Scale, compose, unit
from rgc.errors import Refusal, require
from rgc.ir import Operator, TensorType
from rgc.operators import Call, ChannelMean, Opaque, Slot, Structural


def carried_axis(call: Structural | ChannelMean, given: TensorType, axis: int) -> int:
    """The axis of ``call``'s result that holds just what ``axis`` of a tensor of the type ``given`` held.

    Raises a `Refusal` where the call changes that axis, or is not known to leave it alone at every size.
    """
    place = _place(call, given, axis)
    if place is None:
        raise Refusal(f"{call.label} is not known to leave axis {axis} of {given} whole at every size")
    return place


def carrying_axis(call: Structural | ChannelMean, given: TensorType, axis: int) -> int | None:
    """The axis of the tensor of the type ``given`` that ``call`` puts on ``axis``; None where it is not known."""
    return next((source for source in range(len(given.shape)) if _place(call, given, source) == axis), None)


def relocated(op: Linear, spatial: int) -> Linear:
    """The same map where the channels are followed by ``spatial`` axes; it must read one position at a time."""
    plain = op.as_linear()
    if isinstance(plain, Scale):
        return Scale(plain.scale, plain.shift, None if plain.channels is None else spatial)
    conv = compose(plain, unit())
    assert isinstance(conv, Conv)
    require(conv.is_pointwise and not conv.transposed, f"{conv.label} reads more than one position at a time")
    require(conv.bias is None or conv.bias.dim() == 1, f"{conv.label} differs from position to position")
    require(spatial <= 3, f"no convolution has {spatial} spatial axes")
    shape = (*conv.shape[:2], *[1] * spatial)
    return Conv(Deferred(shape, lambda: conv.weight.reshape(shape)), conv.bias, groups=conv.groups)


def is_permutation(call: Operator) -> bool:
    """Does the call put the axes into another order, and nothing else?"""
    return isinstance(call, Structural) and call.name in _PERMUTATIONS


def inverts(back: Operator, call: Operator, rank: int) -> bool:
    """Do two permutations of ``rank`` axes, ``call`` and then ``back``, leave everything in its place?"""
    orders = [_order(each, rank) for each in (call, back)]
    return None not in orders and [orders[0][place] for place in orders[1]] == list(range(rank))  # type: ignore[index,union-attr]  # not None


def is_reshape(call: Operator) -> bool:
    """Does the call keep the order of all elements, and change only how they are counted?"""
    return isinstance(call, Structural) and call.name in _RESHAPES


def takes_shape_of_another(call: Operator) -> bool:
    """``x.reshape_as(y)`` or ``x.view_as(y)``?"""
    named = isinstance(call, Opaque) and call.name in {"reshape_as", "view_as"}
    return named and isinstance(call, Call) and call.args == (Slot(0), Slot(1)) and not call.kwargs


_RESHAPES = frozenset({"flatten", "Flatten", "unflatten", "Unflatten", "reshape", "view", "squeeze", "unsqueeze"})


_PERMUTATIONS = frozenset({"t", "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"})


def _place(call: Structural | ChannelMean, given: TensorType, axis: int) -> int | None:
    if isinstance(call, ChannelMean):  # of the positions, where the channels are on another axis
        return None if axis == len(given.shape) - 1 - call.axes else axis
    args, kwargs = _arguments(call)
    follow = _FOLLOW.get(call.name)
    if follow is None or call.args[:1] not in ((Slot(0),), ()) or not _accepts(follow, given, axis, args, kwargs):
        return None
    return follow(given, axis, *args, **kwargs)


def _arguments(call: Structural) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What is called beside the tensor; for a module, the attributes that stand for it."""
    target = call.target
    if isinstance(target, nn.Flatten):
        return (target.start_dim, target.end_dim), {}
    if isinstance(target, nn.Unflatten):
        return (target.dim, target.unflattened_size), {}
    if isinstance(target, nn.Module):
        return (), {}
    return call.args[1:], dict(call.kwargs)


def _accepts(follow: Callable[..., Any], given: TensorType, axis: int, args: Any, kwargs: Any) -> bool:
    try:
        inspect.signature(follow).bind(given, axis, *args, **kwargs)
    except TypeError:
        return False
    return True


def _order(call: Operator, rank: int) -> list[int] | None:
    """The axis of the input that each axis of the result is, for a permutation."""
    if not isinstance(call, Structural):
        return None
    args, kwargs = _arguments(call)
    kind = call.name
    if kwargs or kind not in _PERMUTATIONS:
        return None
    if kind == "t":
        return list(range(rank))[::-1] if rank <= 2 else None
    if kind == "permute":
        return [dim % rank for dim in _integers(args)]
    first, second = args
    if not isinstance(first, int) or not isinstance(second, int):
        return None
    order = list(range(rank))
    if kind in {"movedim", "moveaxis"}:
        order.insert(second % rank, order.pop(first % rank))
    else:
        order[first % rank], order[second % rank] = order[second % rank], order[first % rank]
    return order


def _integers(given: Sequence[Any]) -> tuple[int, ...]:
    return tuple(given[0]) if len(given) == 1 and isinstance(given[0], list | tuple) else tuple(given)


def _permute(given: TensorType, axis: int, *order: Any, dims: Any = ()) -> int | None:
    rank = len(given.shape)
    return [dim % rank for dim in _integers(order or (dims,))].index(axis)


def _transpose(given: TensorType, axis: int, dim0: int, dim1: int) -> int | None:
    first, second = dim0 % len(given.shape), dim1 % len(given.shape)
    return {first: second, second: first}.get(axis, axis)


def _t(given: TensorType, axis: int) -> int | None:
    return 1 - axis if len(given.shape) == 2 else axis


def _movedim(given: TensorType, axis: int, source: Any, destination: Any) -> int | None:
    if not isinstance(source, int) or not isinstance(destination, int):
        return None
    order = list(range(len(given.shape)))
    order.insert(destination % len(order), order.pop(source % len(order)))
    return order.index(axis)


def _flatten(given: TensorType, axis: int, start_dim: int = 0, end_dim: int = -1) -> int | None:
    first, last = start_dim % len(given.shape), end_dim % len(given.shape)
    if axis < first or first == last:
        return axis
    if axis > last:
        return axis - (last - first)
    # inside of what is flattened, the axis stays whole only beside axes of one element, such as pooled ones
    alone = all(given.shape[other] == 1 for other in range(first, last + 1) if other != axis)
    return first if alone else None


def _unflatten(given: TensorType, axis: int, dim: Any, sizes: Any) -> int | None:
    if not isinstance(dim, int) or dim % len(given.shape) == axis:
        return None
    return axis if axis < dim % len(given.shape) else axis + len(sizes) - 1


def _squeeze(given: TensorType, axis: int, dim: Any) -> int | None:
    """At another size the axis may not be of one element, and then it stays."""
    dims = {d % len(given.shape) for d in _integers((dim,))}
    if not given.fixed or axis in dims:
        return None
    return axis - sum(d < axis for d in dims if given.shape[d] == 1)


def _unsqueeze(given: TensorType, axis: int, dim: int) -> int | None:
    return axis + (dim % (len(given.shape) + 1) <= axis)


def _same(given: TensorType, axis: int, **options: Any) -> int | None:
    return axis


def _flip(given: TensorType, axis: int, *order: Any, dims: Any = ()) -> int | None:
    return None if axis in {d % len(given.shape) for d in _integers(order or (dims,))} else axis


def _roll(given: TensorType, axis: int, shifts: Any, dims: Any = ()) -> int | None:
    named = {d % len(given.shape) for d in _integers((dims,))}
    return None if axis in named or not named else axis  # without axes it rolls all elements in a row


def _select(given: TensorType, axis: int, dim: int, index: Any) -> int | None:
    where = dim % len(given.shape)
    return None if where == axis else axis - (where < axis)


def _narrow(given: TensorType, axis: int, dim: int = 0, *bounds: Any) -> int | None:
    return None if dim % len(given.shape) == axis else axis


def _getitem(given: TensorType, axis: int, index: Any) -> int | None:
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(part is None or part is Ellipsis or isinstance(part, int | slice) for part in parts):
        return None
    named = sum(part is not None and part is not Ellipsis for part in parts)
    where = parts.index(Ellipsis) if Ellipsis in parts else len(parts)
    parts[where : where + 1] = [slice(None)] * (len(given.shape) - named)
    source = place = 0
    for part in parts:
        if part is None:
            place += 1
            continue
        if source == axis:
            return place if part == slice(None) else None
        source, place = source + 1, place + isinstance(part, slice)
    return None


def _mean(given: TensorType, axis: int, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> int | None:
    if dim is None or dtype is not None:
        return None
    dims = {d % len(given.shape) for d in _integers((dim,))}
    if axis in dims or not dims:
        return None
    return axis if keepdim else axis - sum(d < axis for d in dims)


def _pooled(spatial: int) -> Callable[..., int | None]:
    def follow(given: TensorType, axis: int, output_size: Any = None) -> int | None:
        return axis if axis < len(given.shape) - spatial else None

    return follow


def _reshape(given: TensorType, axis: int, *shape: Any) -> int | None:
    """The last axis where the new shape names it; others only at a fixed size, where every count is sure."""
    sizes, old = _integers(shape), given.shape
    if not all(isinstance(n, int) for n in sizes):
        return None
    if axis == len(old) - 1 and sizes[-1] == old[-1]:
        return len(sizes) - 1
    if not given.fixed or sizes[0] != -1 or axis == 0:
        return None
    before, after = math.prod(old[1:axis]), math.prod(old[axis + 1 :])
    for place in range(1, len(sizes)):
        if (math.prod(sizes[1:place]), sizes[place], math.prod(sizes[place + 1 :])) == (before, old[axis], after):
            return place
    return None


_FOLLOW: dict[str, Callable[..., int | None]] = {
    "permute": _permute, "transpose": _transpose, "swapaxes": _transpose, "swapdims": _transpose, "t": _t,
    "movedim": _movedim, "moveaxis": _movedim, "flatten": _flatten, "Flatten": _flatten, "unflatten": _unflatten,
    "Unflatten": _unflatten, "squeeze": _squeeze, "unsqueeze": _unsqueeze, "contiguous": _same, "clone": _same,
    "flip": _flip, "roll": _roll, "select": _select, "narrow": _narrow, "slice": _narrow, "getitem": _getitem,
    "mean": _mean, "reshape": _reshape, "view": _reshape,
    **{f"{prefix}{rank}d": _pooled(rank) for prefix in ("adaptive_avg_pool", "AdaptiveAvgPool") for rank in (1, 2, 3)},
}  # fmt: skip
