"""What is left of linear layers before one position, such as a global mean? Sums of positions, and one kernel on them.

y[o] = sum over c, h, w of M[o, c, h, w] x[c, h, w]. Inside the map, the slices of M at one row and at the next are the
same, but for the borders, so rows (and columns) are summed first: y = M' (R x C^T). Of one convolution, behind which
all positions are averaged, R has one row per tap: the mean of what that tap reads, a box that the border cuts.

A `Tail` is pulled back through the layers before it. S[u] selects what tap u of a convolution reads: then R S[u], for
each u, are the new rows, and M'[o, c, r] is the sum of M[o, m, a] K[m, c, u] over the pairs of row and tap that make r.
Either equal rows become one, or the positions at which all rows have equal entries become one sum, whichever are fewer:
after n convolutions of 3 taps that keep the size there are n sums for each border and one for the inside.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial, reduce
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgc.algebra import Conv, Deferred, Linear, Scale, Size
from rgc.axis import Axis, element
from rgc.errors import GraphError, require
from rgc.ir import Operator, TensorType, Value
from rgc.operators import Add, Concat, Constant, Flatten, Structural, Unflatten, average_pool_at, is_adaptive_average
from rgc.region import Region


@dataclass(frozen=True, eq=False)
class AxisSums(Operator):
    """Weighted sums of positions, along one spatial axis after the other, the same for each channel: R x C^T.

    matrices: [sums, size] for each of the trailing axes.

    >>> AxisSums((torch.ones(1, 4), torch.eye(3))).evaluate(torch.ones(1, 2, 4, 3)).shape
    torch.Size([1, 2, 1, 3])
    """

    matrices: tuple[Tensor, ...]
    affine: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.matrices or any(matrix.dim() != 2 for matrix in self.matrices):
            raise GraphError("AxisSums: needs a matrix [sums, size] for each axis, one axis or more")

    @property
    def spatial(self) -> int:
        """The number of axes."""
        return len(self.matrices)

    @property
    def size(self) -> Size:
        """The only spatial size that it takes."""
        return tuple(matrix.shape[1] for matrix in self.matrices)

    @property
    def label(self) -> str:
        return f"sums of {'x'.join(map(str, self.size))} to {'x'.join(str(len(matrix)) for matrix in self.matrices)}"

    @property
    def any_size(self) -> bool:
        return False

    def spatial_axes(self, given: TensorType) -> int | None:
        return self.spatial

    def resampled(self, given: TensorType) -> int | None:
        return self.spatial

    @property
    def steps(self) -> list[Tensor]:
        """The matrices in the order in which they are applied, each to the last axis, which then goes to the front."""
        return list(reversed(self.matrices))

    def evaluate(self, *inputs: Any) -> Any:
        (x,) = inputs
        if tuple(x.shape[x.dim() - self.spatial :]) != self.size:
            raise GraphError(f"{self.label}: got {list(x.shape)}")
        for matrix in self.steps:
            x = torch.movedim(F.linear(x, matrix.to(x)), -1, -self.spatial)
        return x

    def infer(self, *types: TensorType | None) -> TensorType | None:
        (given,) = types
        if given is None or len(given.shape) <= self.spatial or given.shape[-self.spatial :] != self.size:
            raise GraphError(f"{self.label}: got {given}")
        return given.with_shape((*given.shape[: -self.spatial], *(len(matrix) for matrix in self.matrices)))

    def cast(self, dtype: torch.dtype) -> Self:
        return type(self)(tuple(matrix.to(dtype) for matrix in self.matrices))

    def tensors(self) -> list[Tensor]:
        return list(self.matrices)


@dataclass(frozen=True, eq=False)
class Tail:
    """y[o] = sum of weight[o, c, a, b] (R x C^T)[c, a, b]: an operator that leaves one position per channel.

    sums: R and C, [sums, size]. compute: the weight, [out, in, *sums] in float64, computed once when it is read.
    """

    out_channels: int
    in_channels: int
    sums: tuple[Tensor, ...]
    compute: Callable[[], Tensor]

    @staticmethod
    def identity(channels: int) -> Tail:
        """The identity on a vector, which has no positions."""
        return Tail(channels, channels, (), lambda: torch.eye(channels, dtype=torch.float64))

    @property
    def counts(self) -> Size:
        """Sums along each axis."""
        return tuple(len(matrix) for matrix in self.sums)

    @property
    def size(self) -> Size:
        """The spatial size that it reads."""
        return tuple(matrix.shape[1] for matrix in self.sums)

    @property
    def entries(self) -> int:
        """Elements of the weight."""
        return self.out_channels * self.in_channels * math.prod(self.counts)

    def applied(self, x: Value, offset: Tensor) -> Value:
        """``offset`` and the tail of ``x``, with one position on each axis: sums of positions, then one kernel.

        The sums are means, which are no larger than what is summed.
        """
        means = AxisSums(tuple(matrix / matrix.shape[1] for matrix in self.sums))
        scale = math.prod(self.size)
        shape = (self.out_channels, self.in_channels, *self.counts)
        return Conv(Deferred(shape, lambda: self.compute() * scale), offset, size=self.counts)(means(x))

    def before_mean(self, size: Size) -> Tail:
        """Of what is averaged over the positions of the last axes, of just this ``size``."""
        ones = tuple(torch.ones(1, n, dtype=torch.float64) for n in size)
        shape = (self.out_channels, self.in_channels, *self.counts, *[1] * len(size))
        weight = cache(lambda: self.compute().reshape(shape) / math.prod(size))
        return Tail(self.out_channels, self.in_channels, self.sums + ones, weight)

    def before_axes(self, count: int) -> Tail:
        """Of what has lost its last ``count`` axes, on which it had one position."""
        kept = len(self.sums) - count
        factors = [matrix[:, 0] for matrix in reversed(self.sums[kept:])]
        weight = cache(lambda: reduce(torch.matmul, factors, self.compute()))
        return Tail(self.out_channels, self.in_channels, self.sums[:kept], weight)

    def before_flatten(self, channels: int, size: Size) -> Tail:
        """Of what is flattened to the vectors that it reads: every position is a sum of its own."""
        every = tuple(torch.eye(n, dtype=torch.float64) for n in size)
        shape = (self.out_channels, channels, *size)
        return Tail(self.out_channels, channels, every, cache(lambda: self.compute().reshape(shape)))

    def before_sums(self, op: AxisSums) -> Tail:
        """Of what `AxisSums` leaves."""
        sums = tuple(mine @ its.double() for mine, its in zip(self.sums, op.matrices, strict=True))
        return Tail(self.out_channels, self.in_channels, sums, self.compute)

    def before_scale(self, factor: Tensor) -> Tail:
        """Of what has been multiplied by a ``factor`` [in] or [1]."""
        shape = (1, -1, *[1] * len(self.sums))
        weight = cache(lambda: self.compute() * factor.double().reshape(shape))
        return Tail(self.out_channels, self.in_channels, self.sums, weight)

    def before_conv(self, conv: Conv, size: Size) -> Tail:
        """Of the output of the linear part of ``conv`` on an input of ``size``."""
        bases = [_basis(matrix @ reads) for matrix, reads in zip(self.sums, selected(conv, size), strict=True)]
        weight = cache(partial(_pulled_back, self.compute, conv, [basis.coordinates for basis in bases]))
        return Tail(self.out_channels, conv.in_channels, tuple(basis.rows for basis in bases), weight)

    def of_channels(self, start: int, count: int) -> Tail:
        """Of some of the channels."""
        weight = cache(lambda: self.compute()[:, start : start + count])
        return Tail(self.out_channels, count, self.sums, weight)

    def __neg__(self) -> Tail:
        return self.before_scale(-torch.ones(1))

    def __add__(self, other: Tail) -> Tail:
        bases = [_basis(torch.cat(pair)) for pair in zip(self.sums, other.sums, strict=True)]

        def weight() -> Tensor:
            mine, its = self.compute(), other.compute()
            for axis, basis in enumerate(bases):
                first = len(self.sums[axis])
                mine = _along(mine, axis + 2, basis.coordinates[:first])
                its = _along(its, axis + 2, basis.coordinates[first:])
            return mine + its

        return Tail(self.out_channels, self.in_channels, tuple(basis.rows for basis in bases), cache(weight))


def tail_of(region: Region) -> Tail:
    """The linear part of a region that leaves one position per channel; a `Refusal` names what is in the way."""
    source, sink = region.source.tensor_type, region.sink.tensor_type
    require(len(source.shape) > 2, f"{region.source.where} has no positions")
    require(
        len(sink.shape) > 1 and set(sink.shape[2:]) <= {1}, f"{region.sink.where} has several positions: no linear tail"
    )
    final = Tail.identity(sink.shape[1])
    tails: dict[Value, Tail] = {region.sink: final.before_mean(sink.shape[2:])}
    for value in reversed(region.values):
        tail = tails.pop(value, None)
        if tail is None or isinstance(value.op, Constant):  # which is no linear part
            continue
        for used, part in _before(value, tail):
            tails[used] = tails[used] + part if used in tails else part
    return tails[region.source]


def averaged(conv: Conv, size: Size) -> tuple[AxisSums, Conv]:
    """The mean over all outputs of ``conv`` on an input of ``size``: means of what each tap reads, then the kernel.

    The kernel keeps its groups, and its weight stays deferred.
    """
    reads = selected(conv, size)
    means = AxisSums(tuple(tap.mean(dim=1) for tap in reads))
    plain = conv.changed(
        bias=_mean_of_zeros(conv, size), stride=1, padding=0, dilation=1, padding_mode="zeros", pad_value=None,
        ones=None, size=conv.kernel,
    )  # fmt: skip
    return means, plain


def _mean_of_zeros(conv: Conv, size: Size) -> Tensor | None:
    """The mean of what ``conv`` makes of zeros: of its bias or bias map, its pad value, its ones."""
    constant = conv.ones is None and (conv.pad_value is None or not conv.is_padded)
    if constant:
        return None if conv.bias is None else conv.bias.double().reshape(conv.out_channels, -1).mean(1)
    zeros = torch.zeros(1, conv.in_channels, *size, dtype=torch.float64)
    made: Tensor = conv.cast(torch.float64).evaluate(zeros)
    return made.reshape(conv.out_channels, -1).mean(1)


def selected(conv: Conv, size: Size) -> list[Tensor]:
    """For each axis, S [tap, output, input]: 1 where the tap reads that element for the output, at ``size``."""
    require(not conv.transposed, f"{conv.label} spreads its input instead of reading it")
    return [_selected(axis, n, conv.padding_mode) for axis, n in zip(conv.axes, size, strict=True)]


def _selected(axis: Axis, n: int, mode: str) -> Tensor:
    made = torch.zeros(axis.kernel, axis.output_size(n), n, dtype=torch.float64)
    for tap in range(axis.kernel):
        for output in range(axis.output_size(n)):
            read = element(output * axis.stride + tap * axis.dilation - axis.before, n, mode)
            if read is not None:
                made[tap, output, read] = 1
    return made


@dataclass(frozen=True)
class _Basis:
    """Rows [r, n], and the coordinates [..., r] of others in them."""

    rows: Tensor
    coordinates: Tensor


def _basis(given: Tensor) -> _Basis:
    """What [..., n] can be summed of: its different rows, or sums over the positions with equal columns, if fewer.

    Rows of zeros and positions that nothing reads are left out; one remains, where there is nothing else.
    """
    flat = given.reshape(-1, given.shape[-1])
    rows, row_of = torch.unique(flat, dim=0, return_inverse=True)
    columns, class_of = torch.unique(flat, dim=1, return_inverse=True)
    kept_rows, kept_columns = _at_least_one(rows.any(dim=1)), _at_least_one(columns.any(dim=0))
    if int(kept_rows.sum()) <= int(kept_columns.sum()):
        coordinates = F.one_hot(row_of, len(rows)).to(given.dtype)[:, kept_rows]
        return _Basis(rows[kept_rows], coordinates.reshape(*given.shape[:-1], -1))
    classes = F.one_hot(class_of, columns.shape[1]).to(given.dtype).T
    return _Basis(classes[kept_columns], columns[:, kept_columns].reshape(*given.shape[:-1], -1))


def _at_least_one(kept: Tensor) -> Tensor:
    return kept if bool(kept.any()) else torch.arange(len(kept)) == 0


def _pulled_back(compute: Callable[[], Tensor], conv: Conv, coordinates: Sequence[Tensor]) -> Tensor:
    """M'[o, c, r] = sum over taps u and sums a of M[o, m, a] K[m, c, u] Q[u, a, r], one tap at a time."""
    weight, kernel = compute(), conv.kernels
    groups, counts = conv.groups, weight.shape[2:]
    grouped = weight.reshape(len(weight), groups, -1, math.prod(counts)).permute(1, 0, 3, 2)  # [g, o, a, m]
    grouped = grouped.reshape(groups, -1, grouped.shape[3])
    taps = kernel.weight.reshape(groups, -1, *kernel.weight.shape[1:])  # [g, m, c, *u]
    total: Tensor | None = None
    for place in itertools.product(*map(range, conv.kernel)):
        index: tuple[Any, ...] = (..., *place)
        block = torch.bmm(grouped, taps[index])  # [g, o a, c]
        part = block.reshape(groups, len(weight), -1, block.shape[2]).permute(1, 0, 3, 2)
        part = part.reshape(len(weight), conv.in_channels, *counts)
        for axis, tap in enumerate(place):
            part = _along(part, axis + 2, coordinates[axis][tap])
        total = part if total is None else total + part
    assert total is not None
    return total


def _along(weight: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """The product with ``matrix`` [a, r] along an axis of length a."""
    return torch.movedim(torch.movedim(weight, axis, -1) @ matrix, -1, axis)


def _before(value: Value, tail: Tail) -> list[tuple[Value, Tail]]:
    """``tail`` pulled back through the operator that makes ``value``, for each of its inputs."""
    op, shapes = value.op, [used.tensor_type.shape for used in value.inputs]
    if isinstance(op, Add):
        whole = all(shape == value.tensor_type.shape or isinstance(used.op, Constant)
                    for used, shape in zip(value.inputs, shapes, strict=True))  # fmt: skip
        require(whole, f"{value.where} broadcasts one of its inputs")
        left, right = value.inputs
        return [(left, tail), (right, tail if op.sign == 1 else -tail)]
    if isinstance(op, Concat):
        require(op.axis == 1 - len(shapes[0]), f"{value.where} concatenates along another axis than the channels")
        starts = [sum(shape[1] for shape in shapes[:index]) for index in range(len(shapes))]
        parts = zip(value.inputs, starts, shapes, strict=True)
        return [(used, tail.of_channels(start, shape[1])) for used, start, shape in parts]
    return [(value.inputs[0], _before_one(value, tail, shapes[0]))]


def _before_one(value: Value, tail: Tail, given: Size) -> Tail:
    op, made = value.op, value.tensor_type.shape
    unknown = f"{value.where} ({op.label}) is affine but neither a convolution nor a mean"
    require(len(given) > 1 and len(made) > 1 and given[0] == made[0], unknown)
    channels, size = given[1], given[2:]
    if isinstance(op, AxisSums) and op.spatial == len(size):
        return tail.before_sums(op)
    if isinstance(op, Linear):
        linear = op.at(size).as_linear()
        if isinstance(linear, Scale) and linear.spatial in (None, len(size)):
            return tail.before_scale(linear.scale)
        return tail.before_conv(linear.as_conv(channels, len(size)), size)
    if isinstance(op, Flatten | Unflatten | Structural) and _moves_nothing(op, given, made):
        if len(made) == 2:
            return tail.before_flatten(channels, size)
        if len(made) == 3 and made[1] == channels and len(size) > 1 and _sums_everything(tail):
            whole = torch.tensor([float(math.prod(size))], dtype=torch.float64)
            return tail.before_axes(1).before_mean(size).before_scale(whole)
        require(made[1] == channels and set(made[2:] + size) <= {1}, unknown)
        return tail.before_axes(len(made) - 2).before_mean(size)
    require(isinstance(op, Structural), unknown)
    assert isinstance(op, Structural)
    averaged_axes = _averaged_axes(op, given, made)
    if averaged_axes:
        kept = len(size) - averaged_axes
        return tail.before_axes(len(made) - 2 - kept).before_mean(size[kept:])
    require(is_adaptive_average(op), unknown)
    pool = average_pool_at(op, value.inputs[0].tensor_type)
    return tail.before_conv(pool.as_conv(channels, len(size)), size)


def _moves_nothing(op: Flatten | Unflatten | Structural, given: Size, made: Size) -> bool:
    """Is it a call that looks at the same elements in another shape, samples apart?"""
    if isinstance(op, Structural):
        named = len(op.args) > 1 or bool(op.kwargs) or isinstance(op.target, nn.Module) or op.name == "flatten"
        if op.name not in _VIEWS or not named:  # a squeeze of all axes drops the batch, if it is one sample
            return False
    return math.prod(given) == math.prod(made) and given[0] == made[0]


def _sums_everything(tail: Tail) -> bool:
    """Does each sum along the one axis take all positions alike?"""
    (matrix,) = tail.sums
    return bool((matrix == matrix[:, :1]).all())


_VIEWS = frozenset({"flatten", "Flatten", "squeeze", "unsqueeze", "reshape", "view", "unflatten", "Unflatten"})


def _averaged_axes(op: Structural, given: Size, made: Size) -> int:
    """Over how many of the last axes does it average, each channel alone? 0 where it does something else."""
    averages = op.name == "mean" or is_adaptive_average(op)
    axes = op.resampled(TensorType(given, torch.float64)) if averages else None
    if axes is None or axes > len(given) - 2:
        return 0
    kept = len(given) - axes
    return axes if made[:kept] == given[:kept] and set(made[kept:]) <= {1} else 0


__all__ = ["AxisSums", "Tail", "averaged", "selected", "tail_of"]
