"""Which parts of a graph are affine functions of one value? Regions: from a source to a sink, nothing else entering.

A `Region` is an operator like any other: it can be evaluated, and asked for its one convolution by walking it in the
domain of local affine maps instead of tensors.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rgc.algebra import Conv, Linear, Scale, Size, add, compose
from rgc.errors import GraphError, Refusal, require
from rgc.ir import Graph, Operator, TensorType, Value, evaluate_value
from rgc.operators import Add, Concat, Constant
from rgc.rearrange import Gather, Listed, selecting
from rgc.sparsity import block_diagonal, on_one_grid

#: A walk back from a join gives up after so many values, which keeps matching linear in the size of the graph.
LONGEST_WALK = 256


@dataclass(frozen=True, eq=False)
class Region(Operator):
    """The affine values between ``source`` (not included) and the last of ``values``, in topological order."""

    source: Value
    values: tuple[Value, ...]
    affine: ClassVar[bool] = True

    @property
    def sink(self) -> Value:
        """The value that the region computes."""
        return self.values[-1]

    @property
    def label(self) -> str:
        return f"affine region of {len(self.values)} operators"

    def evaluate(self, *inputs: Any) -> Any:
        (x,) = inputs
        results: dict[Value, Any] = {self.source: x}
        for value in self.values:
            results[value] = evaluate_value(value, [results[used] for used in value.inputs], {}, x.dtype)
        return results[self.sink]

    def infer(self, *types: TensorType | None) -> TensorType | None:
        return self.sink.type

    def as_linear(self, size: Size | None) -> Linear:
        """The region as one linear operator, or a refusal that names the value in the way."""
        axes, channels = self._axes_and_channels
        maps = {self.source: _Image(_identity(channels, axes), tuple(range(channels)))}
        for value in self.values:
            if not isinstance(value.op, Constant):
                maps[value] = _image(value, [maps.get(used) for used in value.inputs], size, channels)
        return _of_all_channels(maps[self.sink], size, channels, axes)

    @property
    def spatial(self) -> int:
        """The number of spatial axes on which the region acts."""
        return self._axes_and_channels[0]

    @property
    def _axes_and_channels(self) -> tuple[int, int]:
        spatial = next(
            (v.op.spatial for v in self.values if isinstance(v.op, Linear) and v.op.spatial is not None), None
        )
        shape = self.source.tensor_type.shape
        require(spatial is not None and spatial < len(shape), "nothing in the region says on which axes it acts")
        assert spatial is not None
        return spatial, shape[len(shape) - spatial - 1]


class Join(Region):
    """The smallest region that ends in a sum or a concatenation: parallel branches of one source."""


def join_at(value: Value, order: Mapping[Value, float]) -> Join | None:
    """The branches that meet in ``value``, back to the value they all start from; None where they have no such value.

    ``order`` numbers the values of the graph topologically.
    """
    if not isinstance(value.op, Add | Concat):
        return None
    inside: dict[Value, float] = {}
    frontier = [(-order[value], id(value), value)]
    seen = {value}
    while len(frontier) > 1 or not inside:
        _, _, latest = heapq.heappop(frontier)
        if not latest.op.affine or len(inside) > LONGEST_WALK or not latest.inputs:
            return None
        inside[latest] = order[latest]
        for used in latest.inputs:
            if used not in seen:
                seen.add(used)
                heapq.heappush(frontier, (-order[used], id(used), used))
    (_, _, source) = frontier[0]
    if source.type is None or isinstance(source.op, Constant):
        return None
    return Join(source, tuple(sorted(inside, key=inside.__getitem__)))


def affine_regions(graph: Graph) -> list[Region]:
    """The maximal regions with one source, in topological order of their sinks."""
    order = graph.nodes()
    number = order_of(order)
    outputs = set(graph.output_values)
    root: dict[Value, Value | None] = {}  # None: a constant, which belongs to any region
    start: dict[Value, Value | None] = {}  # where a region through the value starts: at itself, if it is needed anyway
    for value in order:
        if isinstance(value.op, Constant):
            root[value] = start[value] = None
            continue
        roots = {start[used] for used in value.inputs} - {None}
        extends = value.op.affine and len(roots) == 1 and value.type is not None
        root[value] = next(iter(roots)) if extends else value
        escapes = value in outputs or any(not user.op.affine for user in graph.users(value))
        start[value] = value if escapes else root[value]
    return [
        region
        for value in order
        if root[value] not in (None, value)
        and (start[value] is value or any(root[user] is not root[value] for user in graph.users(value)))
        and (region := _between(root[value], value, number)) is not None
    ]


def order_of(nodes: list[Value]) -> dict[Value, int]:
    """The topological number of each value."""
    return {value: index for index, value in enumerate(nodes)}


def _between(source: Value | None, sink: Value, order: dict[Value, int]) -> Region | None:
    if source is None or source.type is None:
        return None
    seen, stack = {sink}, [sink]
    while stack:
        for used in stack.pop().inputs:
            if used is not source and used not in seen:
                seen.add(used)
                stack.append(used)
    return Region(source, tuple(sorted(seen, key=order.__getitem__)))


@dataclass(frozen=True)
class _Image:
    """A value of a region: a linear operator of the source's channels ``read``, in that order."""

    op: Linear
    read: tuple[int, ...]

    @property
    def is_selection(self) -> bool:
        """Does it only select channels?"""
        return isinstance(self.op, Scale) and self.op.is_identity


def _identity(channels: int, axes: int) -> Scale:
    return Scale(torch.ones(channels), torch.zeros(channels), axes)


def _image(value: Value, images: list[_Image | None], size: Size | None, channels: int) -> _Image:
    known = [image for image in images if image is not None]
    if len(known) < len(images):
        raise Refusal(f"{value.where} mixes in a constant")
    first = known[0] if known else None
    if isinstance(value.op, Gather) and first is not None and first.is_selection and min(value.op.index) >= 0:
        require(first.op.spatial == value.op.axes, f"{value.where} selects along another axis than the channels")
        return _Image(_identity(len(value.op.index), value.op.axes), tuple(first.read[i] for i in value.op.index))
    if isinstance(value.op, Linear):
        assert first is not None
        return _Image(compose(value.op, first.op, size), first.read)
    if isinstance(value.op, Add):
        left, right = _of_same_channels(known, size, channels)
        if value.op.sign == -1:
            right = _Image(compose(Scale(-torch.ones(1), torch.zeros(1)), right.op, size), right.read)
        return _Image(add(left.op, right.op, size), left.read)
    if isinstance(value.op, Concat):
        return _stacked(value, known, size, channels)
    raise Refusal(f"{value.where} ({value.op.label}) is affine but not a convolution")


def _of_all_channels(image: _Image, size: Size | None, channels: int, axes: int) -> Linear:
    """An operator of all the source's channels."""
    if image.read == tuple(range(channels)):
        return image.op
    if image.is_selection:
        return Gather(Listed(image.read), channels, axes)
    return compose(image.op, selecting(image.read, channels, axes), size)


def _of_same_channels(images: list[_Image], size: Size | None, channels: int) -> list[_Image]:
    if len({image.read for image in images}) == 1:
        return images
    axes = next((image.op.spatial for image in images if image.op.spatial is not None), None)
    assert axes is not None  # the source says it
    return [_Image(_of_all_channels(image, size, channels, axes), tuple(range(channels))) for image in images]


def _stacked(value: Value, images: list[_Image], size: Size | None, channels: int) -> _Image:
    """A concatenation of channels: selections one after the other, blocks side by side, or a sum of moved parts."""
    if not images:
        raise GraphError(f"{value.where}: a concatenation of nothing")
    op = value.op
    assert isinstance(op, Concat)
    spatial = next((image.op.spatial for image in images if image.op.spatial is not None), -op.axis - 1)
    require(op.axis == -spatial - 1, f"{value.where} concatenates along axis {op.axis}, not along the channels")
    read = tuple(channel for image in images for channel in image.read)
    if all(image.is_selection for image in images):
        return _Image(_identity(len(read), spatial), read)
    if len(set(read)) == len(read) and len(images) > 1:
        parts = [image.op.as_conv(len(image.read), spatial) for image in images]
        if not any(part.transposed for part in parts):
            return _Image(block_diagonal(parts, size), read)
    images = _of_same_channels(images, size, channels)
    parts = on_one_grid([image.op.as_conv(len(image.read), spatial) for image in images])
    return _Image(_sum_of_moved(parts, spatial, size), images[0].read)


def _sum_of_moved(parts: list[Conv], spatial: int, size: Size | None) -> Linear:
    total = sum(part.out_channels for part in parts)
    result: Linear | None = None
    start = 0
    for part in parts:
        select = torch.zeros(total, part.out_channels, *[1] * spatial, dtype=torch.float64)
        select[start : start + part.out_channels].view(part.out_channels, -1).fill_diagonal_(1)
        moved = compose(Conv(select), part, size)
        result = moved if result is None else add(result, moved, size)
        start += part.out_channels
    assert result is not None
    return result
