"""What do casts and copies mean? A constant in the form of a tensor is a constant; a copy of a tensor is the tensor.

A model that asks for the dtype or the device of a tensor gets what the trace has, and a constant that it makes by that
is cast and moved with the compiled model like any other. A cast of a live tensor goes only where it surely changes
nothing in every dtype of the model: the trace is in float64, and cannot tell a cast that matters in half precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from rgc.algebra import Conv, Scale
from rgc.functions import Handler, Lifting
from rgc.ir import Input, Value, is_value
from rgc.operators import Activation, BatchNorm, Call, Identity, MaxPool, Normalize, Upsample

#: Values that a walk back passes at most, in search of what decides a value's dtype.
LONGEST_WALK = 32


def with_known_form(
    lifter: Lifting, name: str, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of a call that asks live tensors for dtype and device only, with the answers in their places.

    None where it needs anything else of them, or makes a tensor whose values are not defined or random.
    """
    if name.removeprefix("new_").startswith(("empty", "rand", "bernoulli", "normal", "multinomial")):
        return None
    asked = _ASKED_FOR_FORM.get(name, ())

    def answer(leaf: Any) -> Any:
        real = lifter.real.get(leaf) if isinstance(leaf, Value) else None
        return real if isinstance(real, torch.dtype | torch.device) else leaf

    def form(each: Any) -> Any:
        return lifter.real[each] if isinstance(each, Value) and _is_tensor(lifter, each) else each

    given = tuple(form(each) if place in asked else each for place, each in enumerate(args))
    options = {key: form(each) if asked and key in ("other", "tensor") else each for key, each in kwargs.items()}
    known, options = tree_map(answer, (given, options), is_leaf=is_value)
    left: list[Value] = []
    tree_map(lambda leaf: left.append(leaf) if isinstance(leaf, Value) else None, (known, options), is_leaf=is_value)
    return None if left else (known, options)


#: Calls that ask the argument at these places for its dtype and device only.
_ASKED_FOR_FORM: dict[str, tuple[int, ...]] = {
    "type_as": (1,), "to": (1,), "new_tensor": (0,), "new_zeros": (0,), "new_ones": (0,), "new_full": (0,),
}  # fmt: skip


def _clone(lifter: Lifting, x: Any, *, memory_format: Any = torch.preserve_format) -> Value | None:
    """A tensor with memory of its own. What is not dense becomes dense, which a view behind it may need."""
    if not isinstance(x, Value) or memory_format is not torch.preserve_format or not x.op.fresh:
        return None
    return lifter.emit(Identity("clone", copies=True), x) if _is_tensor(lifter, x) else None


def _detach(lifter: Lifting, x: Any) -> Value | None:
    return lifter.emit(Identity("detach"), x) if isinstance(x, Value) and _is_tensor(lifter, x) else None


def _positive(lifter: Lifting, x: Any) -> Value | None:
    """``+x`` is x itself."""
    return lifter.emit(Identity("pos"), x) if isinstance(x, Value) and _is_tensor(lifter, x) else None


def _to(lifter: Lifting, x: Any, dtype: Any) -> Value | None:
    """``x.to(y.dtype)`` where x has the dtype of y in any case."""
    if not isinstance(x, Value) or not isinstance(dtype, Value) or not _is_tensor(lifter, x):
        return None
    if not isinstance(dtype.op, Call) or dtype.op.target is not getattr or dtype.op.args[1:] != ("dtype",):
        return None
    if lifter.real.get(dtype) != lifter.real[x].dtype or not _have_one_dtype(x, dtype.inputs[0]):
        return None
    return lifter.emit(Identity("to"), x)


CASTS: dict[str, Handler] = {
    "clone": _clone, "detach": _detach, "pos": _positive, "positive": _positive, "to": _to,
}  # fmt: skip


def _is_tensor(lifter: Lifting, value: Value) -> bool:
    return isinstance(lifter.real.get(value), Tensor)


def _have_one_dtype(x: Value, y: Value) -> bool:
    """Is the dtype of the one that of the other, in whatever dtype the model runs?"""
    sources = [_source_of_dtype(each) for each in (x, y)]
    return x is y or (sources[0] is sources[1] and sources[0] is not None) or sources == [_OF_WEIGHTS, _OF_WEIGHTS]


def _source_of_dtype(value: Value) -> Any:
    """What decides the dtype of ``value``: the input that it comes from, or a layer, whose weights have the model's."""
    for _ in range(LONGEST_WALK):
        if isinstance(value.op, Conv | BatchNorm):
            return _OF_WEIGHTS
        if isinstance(value.op, Input):
            return value
        if not isinstance(value.op, Activation | Identity | MaxPool | Normalize | Upsample) and not (
            isinstance(value.op, Scale) and value.op.channels is None
        ):
            return None
        value = value.inputs[0]
    return None


_OF_WEIGHTS = "weights"

__all__ = ["CASTS", "with_known_form"]
