"""Between which bounds does a value of the graph lie, whatever the inputs are? Intervals, from operator to operator.

`range_of` answers with one closed interval for the whole tensor, over every input of every size. It is a statement
about the reals: what rounds may leave it by its rounding, and NaN and infinities, which no interval holds, are excluded
by precondition. Inputs, and whatever has no rule here, are unbounded, so a missing rule is never a wrong one.

An interval is a fact about a value's function, and no rewrite changes the function of a value that it keeps. So it is
remembered with the value, and all ranges of a graph together cost one visit of each value.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgc.algebra import Conv, Deferred, Scale
from rgc.errors import GraphError
from rgc.ir import Operator, Value, topological
from rgc.operators import (
    Activation,
    AdaptiveMaxPool,
    Add,
    AvgPool,
    BatchNorm,
    Call,
    Clamp,
    Concat,
    Constant,
    Flatten,
    Identity,
    MaxPool,
    Multiply,
    Opaque,
    Structural,
    Unflatten,
    Upsample,
)
from rgc.rearrange import BorderFill, Gather, Pad, PixelShuffle, PixelUnshuffle, Subsample


@dataclass(frozen=True)
class Interval:
    """The numbers from ``lower`` to ``upper``, both included where they are finite.

    >>> Interval(0, 6) + Interval(-1, 1), Interval(0, 6) * Interval(-2, 1), Interval(0) | Interval(-1, 1)
    (Interval(lower=-1, upper=7), Interval(lower=-12, upper=6), Interval(lower=-1, upper=inf))
    >>> print(Interval(0), Interval(0, 6) in Interval(0), Interval(0) in Interval(0, 6))
    [0, inf) True False
    """

    lower: float = -math.inf
    upper: float = math.inf

    def __post_init__(self) -> None:
        if not self.lower <= self.upper or self.lower == math.inf or self.upper == -math.inf:
            raise GraphError(f"Interval: no number lies between {self.lower} and {self.upper}")

    @property
    def is_unbounded(self) -> bool:
        """Does every number lie in it?"""
        return self.lower == -math.inf and self.upper == math.inf

    def __contains__(self, other: Interval | float) -> bool:
        low, high = (other.lower, other.upper) if isinstance(other, Interval) else (other, other)
        return self.lower <= low and high <= self.upper

    def __or__(self, other: Interval) -> Interval:
        return Interval(min(self.lower, other.lower), max(self.upper, other.upper))

    def __add__(self, other: Interval) -> Interval:
        return _hull([self.lower + other.lower, self.upper + other.upper])

    def __neg__(self) -> Interval:
        return Interval(-self.upper, -self.lower)

    def __mul__(self, other: Interval) -> Interval:
        return _hull(_times(a, b) for a in (self.lower, self.upper) for b in (other.lower, other.upper))

    def __str__(self) -> str:
        left = "(-inf" if self.lower == -math.inf else f"[{self.lower:.6g}"
        right = "inf)" if self.upper == math.inf else f"{self.upper:.6g}]"
        return f"{left}, {right}"


ANY = Interval()
ZERO = Interval(0.0, 0.0)


def range_of(value: Value) -> Interval:
    """Bounds of every element of ``value``, for every finite input of the model.

    >>> from rgc import Activation, Scale, TensorType
    >>> from rgc.ir import Input
    >>> x = Value(Input("x"), (), TensorType((2, 3), torch.float32))
    >>> y = Activation("relu6")(x)
    >>> print(range_of(x), range_of(y), range_of(Scale(torch.tensor([-1.0]), torch.tensor([3.0]))(y)))
    (-inf, inf) [0, 6] [-3, 3]
    """
    for each in topological([value], known=_KNOWN.__contains__):
        _KNOWN[each] = _range(each, [_KNOWN[used] for used in each.inputs])
    return _KNOWN[value]


#: What has been asked before, for as long as the values live. It never changes an answer.
_KNOWN: WeakKeyDictionary[Value, Interval] = WeakKeyDictionary()


def _range(value: Value, given: list[Interval]) -> Interval:
    op = value.op
    if value.type is not None and not value.type.dtype.is_floating_point:
        return ANY
    match op:
        case Constant():
            return _range_of_tensor(op.tensor)
        case Identity() | Flatten() | Unflatten():
            return given[0]
        case Activation():
            return _activated(op, given[0])
        case Clamp():
            return _clamped(op, given[0])
        case Add():
            return given[0] + (given[1] if op.sign == 1 else -given[1])
        case Multiply():
            product = given[0] * given[1]
            return Interval(max(product.lower, 0.0), product.upper) if value.inputs[0] is value.inputs[1] else product
        case Scale():
            return _scaled(op, given[0])
        case BatchNorm():
            return ANY if op.training else _scaled(op.as_linear(), given[0])
        case Conv():
            return _convolved(op, given[0])
        case Concat():
            return _union(given)
    return _resampled(value, given)


def _resampled(value: Value, given: list[Interval]) -> Interval:
    """What an operator that moves, picks and averages elements makes of their interval."""
    op = value.op
    match op:
        case AvgPool():
            return _averaged(op, given[0])
        case MaxPool():
            # With dilation, all that a window reads may be padding: then its maximum is -inf.
            hollow = any(p and d > 1 for p, d in zip(op.padding, op.dilation, strict=True))
            return Interval(-math.inf, given[0].upper) if hollow else given[0]
        case AdaptiveMaxPool():  # every window reads an element, and nothing is padded
            return given[0]
        case Upsample():
            return ANY if op.mode == "bicubic" else given[0]  # the others have no negative weights
        case Pad() | Gather() | Subsample() | PixelUnshuffle() | PixelShuffle():
            return _rearranged(op, given[0])
        case BorderFill():
            return given[0] | _range_of_tensor(op.value)
        case Structural():
            return _moved(op, given)
        case Opaque():
            return Interval(0.0, 1.0) if _is_softmax(op) else ANY
    return ANY


# --- linear operators ------------------------------------------------------------------------------------------------


def _scaled(op: object, x: Interval) -> Interval:
    """Scale per channel, then the hull of the channels."""
    assert isinstance(op, Scale)
    scale, shift = op.scale.double().cpu(), op.shift.double().cpu()
    return _range_of_tensor(torch.stack([_finite_product(scale, bound) + shift for bound in (x.lower, x.upper)]))


def _convolved(conv: Conv, x: Interval) -> Interval:
    """sum of W x over channels and taps: positive weights reach their bound where x does, negative ones at the other.

    A weight that is not computed yet is not computed for this.
    """
    if x.is_unbounded or isinstance(conv.__dict__["weight"], Deferred):
        return ANY
    if (math.isinf(x.lower) or math.isinf(x.upper)) and _has_both_signs(conv.weight):
        return ANY  # the usual case, after a ReLU
    if conv.transposed:
        x = x | ZERO  # each output reads some of the taps
    elif conv.is_padded and conv.padding_mode == "zeros":
        x = x | (ZERO if conv.pad_value is None else _range_of_tensor(conv.pad_value))
    sums = torch.stack([_sums_of_weights(conv, part) for part in (F.relu, lambda w: -F.relu(-w))])
    positive, negative = sums
    lower = _finite_product(positive, x.lower) + _finite_product(negative, x.upper)
    upper = _finite_product(positive, x.upper) + _finite_product(negative, x.lower)
    if conv.bias is not None:
        bias = conv.bias.double().cpu().flatten(1) if conv.bias.dim() > 1 else conv.bias.double().cpu()[:, None]
        lower, upper = lower + bias.amin(1), upper + bias.amax(1)
    return _range_of_tensor(torch.stack([lower, upper]))


def _sums_of_weights(conv: Conv, part: Callable[[Tensor], Tensor]) -> Tensor:
    """[out]: the sum over inputs and taps of a part of the weights."""
    weight = part(conv.weight.detach().cpu().double())
    if not conv.transposed:
        return weight.flatten(1).sum(1)
    groups, per_group = conv.groups, weight.shape[1]
    return weight.reshape(groups, weight.shape[0] // groups, per_group, -1).sum((1, 3)).flatten()


def _has_both_signs(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and float(tensor.min()) < 0 < float(tensor.max())


def _averaged(pool: AvgPool, x: Interval) -> Interval:
    count = math.prod(pool.window)
    if pool.divisor_override is not None:  # a window at the border has fewer elements, and the same divisor
        factor = count / pool.divisor_override
        return ZERO | x * Interval(factor, factor)
    return x if pool.keeps_constants else ZERO | x


def _rearranged(op: Operator, x: Interval) -> Interval:
    """The elements that are moved, and the constants that are put beside them."""
    if isinstance(op, Pad) and op.mode == "zeros" and not op.is_view:
        return x | (ZERO if op.value is None else _range_of_tensor(op.value))
    return x | ZERO if isinstance(op, Gather) and -1 in op.index else x


# --- calls -----------------------------------------------------------------------------------------------------------

#: Structural calls whose elements are elements of the input, or averages of them.
_MOVES = frozenset({
    "flatten", "reshape", "view", "permute", "transpose", "t", "swapaxes", "movedim", "contiguous", "clone", "squeeze",
    "unsqueeze", "unflatten", "flip", "roll", "narrow", "select", "slice", "getitem", "chunk", "split", "unbind",
    "mean", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "expand", "expand_as", "repeat",
})  # fmt: skip

_MOVING_MODULES = (
    nn.Flatten, nn.Unflatten, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.PixelShuffle,
    nn.PixelUnshuffle, nn.ChannelShuffle, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d,
    nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d,
    nn.CircularPad3d,
)  # fmt: skip

_SOFTMAX = ("softmax", torch.softmax, F.softmax, torch.ops.aten.softmax.int, torch.ops.aten._softmax.default)


def _moved(call: Call, given: list[Interval]) -> Interval:
    x = _union(given)
    if isinstance(call.target, nn.Module):
        if type(call.target) in (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d):
            return x | ZERO
        return x if type(call.target) in _MOVING_MODULES else ANY
    if call.name == "sum":  # of any number of elements, none included
        return Interval(0.0 if x.lower >= 0 else -math.inf, 0.0 if x.upper <= 0 else math.inf)
    return x if call.name in _MOVES else ANY


def _is_softmax(call: Call) -> bool:
    if isinstance(call.target, nn.Module):
        return type(call.target) in (nn.Softmax, nn.Softmax2d)
    return call.target in _SOFTMAX


# --- activations -----------------------------------------------------------------------------------------------------

#: Where functions turn, that is, change from falling to rising; between its turns a function is monotone.
#: - gelu: f' = P + x p with P, p the normal distribution and density, f'' = p (2 - x^2): f' falls from 0 until -sqrt 2,
#:   rises until sqrt 2 and stays positive after: one zero.
#: - x sigmoid(h(x)) with h' > 0: f' = 0 iff 1 + exp(h) + x h' = 0. Rising in x for silu (h = x) and for the tanh form
#:   of gelu (h = 2 sqrt(2 / pi) (x + 0.044715 x^3)): one zero.
#: - mish: f' = exp(x) w / d^2 with w = 4(x + 1) + 4 exp(2x) + exp(3x) + exp(x)(4x + 6) (arXiv 1908.08681, section 3),
#:   w' = 4 + 8 exp(2x) + 3 exp(3x) + exp(x)(4x + 10) > 4 - 4 exp(-3.5) > 0: one zero.
#: - hardswish: x (x + 3) / 6 between -3 and 3.
_TURNS: dict[str, tuple[float, ...]] = {
    "relu": (), "relu6": (), "sigmoid": (), "hardsigmoid": (), "tanh": (), "hardtanh": (), "clamp": (), "selu": (),
    "logsigmoid": (), "softsign": (), "tanhshrink": (), "exp": (), "sqrt": (), "softplus": (),
    "abs": (0.0,), "square": (0.0,), "leaky_relu": (0.0,), "prelu": (0.0,), "elu": (0.0,), "celu": (0.0,),
    "gelu": (-0.7517915246935645,), "silu": (-1.2784645427610738,), "mish": (-1.1924312145154952,),
    "hardswish": (-1.5,),
}  # fmt: skip
_TURN_OF_GELU_BY_TANH = -0.7524614220710163

#: Limits at -inf and inf where PyTorch's function returns NaN there.
_LIMITS = dict.fromkeys(("gelu", "silu", "mish", "hardswish"), (0.0, math.inf)) | {"softsign": (-1.0, 1.0)}


def _activated(op: Activation, x: Interval) -> Interval:
    """The image of an interval: a function that is monotone between its turns is extreme there or at the ends."""
    if op.name not in _TURNS:
        return ANY
    if op.name == "sqrt":
        if x.upper < 0:
            return ANY  # nothing but NaN
        x = Interval(max(x.lower, 0.0), x.upper)
    points = [x.lower, x.upper, *(turn for turn in _turns(op) if turn in x)]
    if op.name == "prelu":
        assert op.weight is not None
        grid = torch.tensor(points, dtype=torch.float64)[:, None].expand(-1, op.weight.numel())
        return _range_of_tensor(F.prelu(grid, op.weight.double().cpu()))
    values = [float(op.evaluate(torch.tensor(point, dtype=torch.float64))) for point in points]
    for index, limit in enumerate(_LIMITS.get(op.name, ())):
        values[index] = limit if math.isinf(points[index]) else values[index]
    return _hull(values + _jumps(op, x))


def _clamped(op: Clamp, x: Interval) -> Interval:
    """It rises in each channel, so the ends of the interval go to the ends; then the hull of the channels."""
    lower, upper = op.lower.double().cpu(), op.upper.double().cpu()
    return _range_of_tensor(torch.stack([torch.minimum(lower.clamp(min=end), upper) for end in (x.lower, x.upper)]))


def _turns(op: Activation) -> tuple[float, ...]:
    if op.name == "gelu" and op.option("approximate", "none") == "tanh":
        return (_TURN_OF_GELU_BY_TANH,)
    return (_threshold(op),) if op.name == "softplus" else _TURNS[op.name]


def _jumps(op: Activation, x: Interval) -> list[float]:
    """Where softplus becomes x itself, beta x > threshold, it falls back to it from a little above."""
    return [_threshold(op)] if op.name == "softplus" and _threshold(op) in x else []


def _threshold(op: Activation) -> float:
    return float(op.option("threshold", 20.0) / op.option("beta", 1.0))


# --- numbers ---------------------------------------------------------------------------------------------------------


def _range_of_tensor(tensor: Tensor) -> Interval:
    if not tensor.numel() or not tensor.is_floating_point():
        return ANY
    return _hull([float(tensor.min()), float(tensor.max())])


def _union(intervals: Iterable[Interval]) -> Interval:
    known = list(intervals)
    return Interval(min(each.lower for each in known), max(each.upper for each in known)) if known else ANY


def _hull(values: Iterable[float]) -> Interval:
    """The smallest interval around ``values``, where it is known; a bound that overflows is the largest number."""
    known = list(values)
    if any(math.isnan(value) for value in known):
        return ANY
    largest = sys.float_info.max
    return Interval(min(*known, largest), max(*known, -largest))


def _times(a: float, b: float) -> float:
    """a b, where 0 times a bound that is infinite is 0: what it bounds is finite."""
    return 0.0 if a == 0 or b == 0 else a * b


def _finite_product(tensor: Tensor, bound: float) -> Tensor:
    """The same for a tensor."""
    return torch.where(tensor == 0, 0.0, tensor * bound)


__all__ = ["Interval", "range_of"]
