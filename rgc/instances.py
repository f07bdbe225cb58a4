"""Which integers, and which geometries, is a graph tried with? Its parameters redrawn so that nothing has to round.

A law holds for all numbers, so any numbers may stand for them: integers, and powers of two where something is divided.
What is derived from others is drawn as a product, such that its quotient is an integer: the bias of a batch norm is
a multiple of its scale, for a convolution behind it pads with their quotient. Zeros stay zero, and factors that are
0 or 1 stay: there a constant is meant, such as a closed gate or a decayed lambda.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from rgc.algebra import Conv, Scale
from rgc.errors import RgcError
from rgc.ir import Graph, Input, Operator, TensorType, Value, is_value
from rgc.operators import Activation, AvgPool, BatchNorm, ChannelMean, MaxPool, Structural
from rgc.rearrange import BorderFill, Pad

#: Slopes a with which 1 + a, by which a residual is divided, is a power of two.
_SLOPES = (3.0, 7.0, -0.5)

#: How an operator says that it does not fit what is before it.
_DECLINES = (RuntimeError, ValueError, TypeError, IndexError, RgcError)

#: Sizes on an axis that a variation may have.
_SIZES = (4, 5, 6, 7, 8, 9, 11)

#: Sizes that are tried, in this order, for one at which every average is over a power of two.
_SIZES_OF_AVERAGES = (8, 4, 16, 6, 10, 5, 7, 9, 12, 15, 17, 18)


@dataclass(frozen=True)
class Range:
    """What numbers are drawn from: the integers from -``largest`` to ``largest`` without 0, each as likely.

    Standard deviations are the powers of two from 1 to 2^(``scales`` - 1).
    """

    largest: int
    scales: int

    @property
    def count(self) -> int:
        """How many integers there are."""
        return 2 * self.largest


class Draw:
    """Numbers from a range, in the order in which they are asked for.

    With a ``point``, the integers are those at that point of a random line, all odd, so none is 0.
    """

    def __init__(self, numbers: Range, seed: int, point: int | None = None) -> None:
        self.numbers, self.point = numbers, point
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn: dict[Any, Any] = {}

    def integers(self, shape: tuple[int, ...] | torch.Size) -> Tensor:
        """Integers as float64."""
        if self.point is not None:
            start, direction = (self._below(self.numbers.count, shape) - self.numbers.largest for _ in range(2))
            return 2 * (start + self.point * direction) + 1
        return (1 + self._below(self.numbers.largest, shape)) * (2 * self._below(2, shape) - 1)

    def below(self, count: int) -> int:
        """One of 0, 1, ..., count - 1."""
        return int(self._below(count, ()))

    def graph(self, graph: Graph, *, fixed: bool) -> Graph:
        """A graph of the same form with drawn parameters; what was shared or tied is so again."""

        def kept(value: Value, op: Operator, inputs: list[Value]) -> TensorType | None:
            return None if value.type is None else replace(value.type, fixed=fixed)

        return _mapped(graph, self._operator, kept)

    def _below(self, count: int, shape: tuple[int, ...] | torch.Size) -> Tensor:
        return torch.randint(0, count, tuple(shape), generator=self._generator, dtype=torch.float64)

    def _operator(self, op: Operator) -> Operator:
        if id(op) not in self._drawn:
            self._drawn[id(op)] = op, self._redrawn(op)  # with op, so that its id stays its own
        made: Operator = self._drawn[id(op)][1]
        return made

    def _redrawn(self, op: Operator) -> Operator:
        match op:
            case BatchNorm():
                return self._batch_norm(op)
            case Conv():
                return self._conv(op)
            case Scale() if not _is_meant(op.scale) or bool((op.shift != 0).any()):
                scale = op.scale.double() if _is_meant(op.scale) else self._like(op.scale)
                return Scale(scale, scale * self._like(op.shift), op.axes)
            case Pad() if op.value is not None:
                return replace(op, value=self._like(op.value))
            case BorderFill():  # equal ones stay equal: a border is assigned side by side
                return replace(op, value=self._like(op.value, key=tuple(op.value.flatten().tolist())))
            case Activation() if op.weight is not None and not _is_meant(op.weight):
                weight = self._like(op.weight) if op.weight.numel() > 1 else torch.tensor([self._slope()]).double()
                return replace(op, weight=weight)
            case Activation(name="leaky_relu") if op.option("negative_slope", 0.01) != 1:
                return replace(op, options=(("negative_slope", self._slope()),))
        return op

    def _batch_norm(self, op: BatchNorm) -> BatchNorm:
        deviation, eps = self._deviation(op.var)
        weight = None if op.weight is None else self._like(op.weight, masked=False)
        bias = None
        if op.bias is not None:
            bias = self._like(op.bias, masked=False) / deviation
            bias = bias if weight is None else bias * weight
        mean = self._like(op.mean, masked=False)
        return replace(op, mean=mean, var=deviation**2 - eps, weight=weight, bias=bias, eps=eps)

    def _deviation(self, var: Tensor) -> tuple[Tensor, float]:
        """Powers of two, and what is added to their squares' difference from it; the same for the same tensor."""
        key = "deviation", id(var)
        if key not in self._drawn:
            deviation = 2.0 ** self._below(self.numbers.scales, var.shape)
            self._drawn[key] = var, (deviation, 2.0 ** -(1 + self.below(6)))
        made: tuple[Tensor, float] = self._drawn[key][1]
        return made

    def _conv(self, op: Conv) -> Conv:
        weight = self._like(op.weight)
        bias = None if op.bias is None else self._like(op.bias)
        if bias is not None and op.groups == op.in_channels == op.out_channels and op.reads_one_element:
            bias = bias * weight.reshape(-1, *[1] * (bias.dim() - 1))
        more = {name: self._like(getattr(op, name)) for name in ("pad_value", "ones") if getattr(op, name) is not None}
        return op.changed(weight=weight, bias=bias, **more)

    def _like(self, tensor: Tensor, *, masked: bool = True, key: Any = None) -> Tensor:
        """Integers where ``tensor`` is not zero; the same for the same tensor."""
        key = id(tensor) if key is None else key
        if key not in self._drawn:
            drawn = self.integers(tensor.shape)
            self._drawn[key] = tensor, drawn * (tensor != 0) if masked else drawn
        made: Tensor = self._drawn[key][1]
        return made

    def _slope(self) -> float:
        return _SLOPES[self.below(len(_SLOPES))]


def exact_form(graph: Graph) -> Graph | None:
    """``graph`` at a size, and with divisors, at which its averages are over powers of two; None if none is found."""
    if _averages_exactly(graph):
        return graph

    def change(op: Operator) -> Operator:
        if isinstance(op, AvgPool) and op.spatial > 1 and not _is_power_of_two(math.prod(op.window)):
            return replace(op, divisor_override=8)
        return op

    own = (size for given in graph.inputs if given.type is not None for size in [given.type.shape[2:]])
    axes = max((len(size) for size in own), default=0)
    sizes: Iterator[tuple[int, ...] | None] = iter([None])
    if 0 < axes <= 2:
        sizes = itertools.chain([None], itertools.product(_SIZES_OF_AVERAGES, repeat=axes))
    for size in sizes:
        made = _inferred(graph, change, size)
        if made is not None and _averages_exactly(made):
            return made
    return None


def varied(graph: Graph, draw: Draw) -> Graph | None:
    """``graph`` with other kernels, strides, paddings, dilations, groups and sizes; None where they do not fit."""
    changed: dict[int, tuple[Operator, Operator]] = {}
    one_grid, factor = bool(draw.below(2)), 1 + draw.below(3) // 2

    def change(op: Operator) -> Operator:
        if id(op) not in changed:
            grid = one_grid and isinstance(op, Conv) and op.spatial > 0 and op.size is None and not op.transposed
            made = _on_the_same_grid(op, factor, draw) if grid and isinstance(op, Conv) else _varied(op, draw)
            changed[id(op)] = op, made
        return changed[id(op)][1]

    axes = max((len(given.type.shape) - 2 for given in graph.inputs if given.type is not None), default=0)
    size = tuple(_SIZES[draw.below(len(_SIZES))] for _ in range(axes)) if axes > 0 and draw.below(2) else None
    try:
        made = _inferred(graph, change, size)
    except _DECLINES:
        return None
    return made if made is not None and _averages_exactly(made) else None


def _on_the_same_grid(op: Conv, factor: int, draw: Draw) -> Conv:
    """Another window with as many outputs, every stride by the same ``factor``: so branches still add up."""
    kernel = tuple(1 + draw.below(4) for _ in op.kernel)
    dilation = tuple(1 + draw.below(2) for _ in kernel)
    sides = []
    for axis, k, d in zip(op.axes, kernel, dilation, strict=True):
        total = max(axis.reach + d * (k - 1) + 1, 0)
        before = draw.below(total + 1)
        sides.append((before, total - before))
    groups = [g for g in (1, 2, 3, 4) if op.in_channels % g == 0 and op.out_channels % g == 0]
    count = groups[draw.below(len(groups))]
    weight = torch.ones(op.out_channels, op.in_channels // count, *kernel, dtype=torch.float64)
    stride = tuple(factor * s for s in op.stride)
    return op.changed(weight=weight, stride=stride, dilation=dilation, padding=tuple(sides), groups=count, ones=None)


def _varied(op: Operator, draw: Draw) -> Operator:
    match op:
        case Conv() if op.spatial > 0 and op.size is None:
            return _varied_conv(op, draw)
        case AvgPool(size=None):
            window, stride = (tuple(2 ** (first + n) for n in _up_to(1, op.spatial, draw)) for first in (1, 0))
            return replace(op, window=window, stride=stride, padding=_up_to(1, op.spatial, draw))
        case MaxPool():
            window, stride, dilation = (
                tuple(first + n for n in _up_to(1, op.spatial, draw)) for first in (2, 1, 1)
            )  # fmt: skip
            padding, ceil = _up_to(1, op.spatial, draw), bool(draw.below(2))
            return replace(op, window=window, stride=stride, dilation=dilation, padding=padding, ceil_mode=ceil)
    return op


def _up_to(largest: int, axes: int, draw: Draw) -> tuple[int, ...]:
    """An integer from 0 to ``largest`` for each axis."""
    return tuple(draw.below(largest + 1) for _ in range(axes))


def _varied_conv(op: Conv, draw: Draw) -> Conv:
    """Each field as it is or another, about half of the time."""

    def chosen(own: Any, *others: Any) -> Any:
        return others[draw.below(len(others))] if draw.below(2) else own

    kernel = tuple(1 if k == 1 and draw.below(4) else chosen(k, 1, 2, 3, 4) for k in op.kernel)
    sides = [chosen(side, 0, 1, 2) for sides in op.padding for side in sides]
    groups = chosen(op.groups, *(g for g in (1, 2, 3, 4) if op.in_channels % g == 0 and op.out_channels % g == 0))
    lead = (op.in_channels, op.out_channels) if op.transposed else (op.out_channels, op.in_channels)
    padding = tuple((b, b if op.transposed else a) for b, a in zip(sides[::2], sides[1::2], strict=True))
    changes: dict[str, Any] = {
        "weight": torch.ones(lead[0], lead[1] // groups, *kernel, dtype=torch.float64),
        "stride": tuple(chosen(s, 1, 2, 3) for s in op.stride),
        "dilation": tuple(chosen(d, 1, 2) for d in op.dilation),
        "padding": padding,
        "groups": groups,
        "bias": None if op.bias is None else chosen(op.bias, None),
        "pad_value": op.pad_value,
    }
    if op.padding_mode == "zeros" and not op.transposed and not draw.below(4):
        changes["pad_value"] = torch.ones(op.in_channels, dtype=torch.float64)
    return op.changed(**changes)


def _averages_exactly(graph: Graph) -> bool:
    return all(_is_power_of_two(count) for value in graph.nodes() for count in _averaged(value))


def _averaged(value: Value) -> Iterator[float]:
    """Over how many elements a value averages."""
    op = value.op
    if isinstance(op, AvgPool):
        yield math.prod(op.window) if op.divisor_override is None else op.divisor_override
    elif isinstance(op, ChannelMean):
        yield op.count
    elif isinstance(op, Structural) and op.name != "flip" and value.inputs and value.inputs[0].type is not None:
        given, made = value.inputs[0].tensor_type, value.tensor_type
        if op.resampled(given) is not None or op.name == "mean":
            pairs = zip(given.shape, made.shape, strict=False)
            even = len(given.shape) != len(made.shape) or all(n % m == 0 for n, m in pairs)
            yield math.prod(given.shape) / math.prod(made.shape) if even else 3


def _is_power_of_two(count: float) -> bool:
    return count > 0 and math.frexp(count)[0] == 0.5


def _is_meant(factors: Tensor) -> bool:
    """Factors that are all 0 or all 1 are no numbers like others."""
    return bool((factors == 0).all()) or bool((factors == 1).all())


def _inferred(graph: Graph, change: Callable[[Operator], Operator], size: tuple[int, ...] | None) -> Graph | None:
    """The graph with other operators, at another spatial size of its inputs; None where they do not fit together."""

    def found(value: Value, op: Operator, inputs: list[Value]) -> TensorType | None:
        if isinstance(op, Input):
            given = value.type
            axes = 0 if size is None else len(size)
            fits = size is not None and given is not None and len(given.shape) > axes + 1
            return given.with_shape((*given.shape[:-axes], *size)) if fits else given  # type: ignore[union-attr,misc]  # fits
        made = op.infer(*(each.type for each in inputs))
        if made is not None and min(made.shape, default=1) < 1:
            raise ValueError("nothing is left")
        return made

    try:
        return _mapped(graph, change, found)
    except _DECLINES:
        return None


def _mapped(
    graph: Graph,
    change: Callable[[Operator], Operator],
    type_of: Callable[[Value, Operator, list[Value]], TensorType | None],
) -> Graph:
    twins: dict[Value, Value] = {}
    for value in graph.nodes():
        op, inputs = change(value.op), [twins[used] for used in value.inputs]
        twins[value] = Value(op, inputs, type_of(value, op, inputs), value.origin, value.name)
    outputs = tree_map(lambda leaf: twins[leaf] if isinstance(leaf, Value) else leaf, graph.outputs, is_leaf=is_value)
    return Graph([twins[value] for value in graph.inputs], outputs, [twins[value] for value in graph.effects])
