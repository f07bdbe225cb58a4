"""How long is an axis, compared with that of another tensor, whatever the input's size? For ``x[:, 1:x.shape[1] - 1]``.

A length is n + c of the length n of an axis before it, as far as the operators between them add or take away a number.
"""

from __future__ import annotations

from dataclasses import dataclass

from rgc.algebra import Conv, Scale
from rgc.ir import Value
from rgc.operators import Activation, AvgPool, BatchNorm, Call, Identity, MaxPool
from rgc.rearrange import Pad

#: A walk back gives up after so many values, which keeps lifting linear in the size of the graph.
LONGEST_WALK = 32

#: Expressions of sizes are looked into so deep.
DEEPEST = 8


@dataclass(frozen=True)
class Length:
    """``times`` n + ``plus``, at every length n of an axis: of a number, ``times`` is 0."""

    times: int
    plus: int


def length_of(size: int | Value, x: Value, axis: int, depth: int = DEEPEST) -> Length | None:
    """A number, or what the model computes of sizes, by the length of ``axis`` of ``x``; None for anything else."""
    if isinstance(size, int):
        return Length(0, size)
    if measured_axis(size) is not None:
        return _relative(size, x, axis)
    name = _name(size)
    if not depth or name not in ("add", "sub", "floordiv", "floor_divide") or not isinstance(size.op, Call):
        return None
    args, options = size.op.arguments(size.inputs)
    if options or len(args) != 2 or not all(isinstance(arg, int | Value) for arg in args):
        return None
    left, right = (length_of(arg, x, axis, depth - 1) for arg in args)
    if left is None or right is None:
        return None
    if name in ("add", "sub"):
        sign = 1 if name == "add" else -1
        return Length(left.times + sign * right.times, left.plus + sign * right.plus)
    numbers = left.times == right.times == 0 and right.plus != 0
    return Length(0, left.plus // right.plus) if numbers else None


def _relative(size: Value, x: Value, axis: int) -> Length | None:
    """The length of an axis of a value that has a value before it in common with ``x``."""
    found = measured_axis(size)
    assert found is not None
    value, place = found
    if value.type is None or x.type is None:
        return None
    behind = len(x.type.shape) - axis % len(x.type.shape)
    if len(value.type.shape) - place % len(value.type.shape) != behind:
        return None
    own, its = _lengths(x, behind), _lengths(value, behind)
    shared = next((each for each in own if each in its), None)
    return None if shared is None else Length(1, its[shared] - own[shared])


def measured_axis(size: Value) -> tuple[Value, int] | None:
    """The tensor and the axis of which ``size`` is the length: x.shape[0], x.size(0), x.size()[0], x.shape[2:][0]."""
    (number, *_) = _rest(size) or (None,)
    if not isinstance(number, int) or not size.inputs:
        return None
    whole = size.inputs[0]
    if _name(size) in ("size", "sym_size"):
        return whole, number
    if _name(size) != "getitem" or not whole.inputs:
        return None
    (some, *_) = _rest(whole) or (None,)
    if _name(whole) == "getitem" and isinstance(some, slice):
        if some.step not in (None, 1) or (some.start or 0) < 0 or number < 0 or not whole.inputs[0].inputs:
            return None
        whole, number = whole.inputs[0], number + (some.start or 0)
    is_shape = (_name(whole), *_rest(whole)) in {("size",), ("getattr", "shape")}
    return (whole.inputs[0], number) if is_shape else None


def _lengths(value: Value, behind: int) -> dict[Value, int]:
    """``value`` and those before it, with how much longer than theirs its axis is, the ``behind``-th from the back."""
    found, longer = {value: 0}, 0
    while len(found) < LONGEST_WALK:
        added = _added(value, behind)
        if added is None:
            break
        value, longer = value.inputs[0], longer + added
        found[value] = longer
    return found


def _added(value: Value, behind: int) -> int | None:
    """How much longer the operator makes the axis; None where that depends on the length, or is not known."""
    op = value.op
    if isinstance(op, Activation | BatchNorm | Identity | Scale):
        return 0
    if isinstance(op, Pad):
        return sum(op.padding[-behind]) if behind <= op.spatial else 0
    if isinstance(op, Conv) and not op.transposed:
        if behind > op.spatial:
            return 0 if behind > op.spatial + 1 else None
        axis = op.axes[-behind]
        return axis.reach + 1 if axis.stride == 1 else None
    if isinstance(op, AvgPool | MaxPool) and behind <= op.spatial and op.stride[-behind] == 1:
        dilation = op.dilation[-behind] if isinstance(op, MaxPool) else 1
        return 2 * op.padding[-behind] - dilation * (op.window[-behind] - 1)
    return None


def _rest(value: Value) -> tuple[object, ...]:
    """The arguments of a call behind the first."""
    return value.op.args[1:] if isinstance(value.op, Call) else ()


def _name(value: Value) -> str:
    return value.op.name if isinstance(value.op, Call) else ""


__all__ = ["Length", "length_of", "measured_axis"]
