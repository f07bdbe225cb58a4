"""Which parts of a graph are affine functions of one value? Regions: from a source to a sink, nothing else entering.

A `Region` is an operator like any other: it can be evaluated, and asked for its one convolution by walking it in the
domain of local affine maps instead of tensors.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rgc.algebra import Conv, Linear, Scale, Size, add, compose, unit
from rgc.errors import Refusal, require
from rgc.ir import Graph, Operator, TensorType, Value, evaluate_value, topological
from rgc.operators import Add, Concat, Constant
from rgc.rearrange import Gather, Listed, selecting
from rgc.sparsity import block_diagonal, on_one_grid

_MINUS = Scale(-torch.ones(1), torch.zeros(1))

#: A walk back from a join gives up after so many values, which keeps matching linear in the size of the graph.
LONGEST_WALK = 256

#: A sum is looked through up to so many addends, for the same reason.
MOST_ADDENDS = 12


@dataclass(frozen=True, eq=False)
class Region(Operator):
    """The affine values between ``source`` (not included) and the last of ``values``, in topological order.

    outlined: is only its size asked for? It evaluates to zeros then, at no cost, so that what a rewrite would make of
    it can be weighed before any number is computed.
    """

    source: Value
    values: tuple[Value, ...]
    outlined: bool = False
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
        if self.outlined:
            return x.new_zeros(x.shape[0], *self.sink.tensor_type.shape[1:])
        results: dict[Value, Any] = {self.source: x}
        for value in self.values:
            results[value] = evaluate_value(value, [results[used] for used in value.inputs], {}, x.dtype)
        return results[self.sink]

    def infer(self, *types: TensorType | None) -> TensorType | None:
        return self.sink.type

    @property
    def waists(self) -> list[int]:
        """The indices of the values through which everything passes from the source to the sink, which is the last.

        What is read behind a waist was made behind it, or is the waist, or a constant. Between any two lies a region.
        """
        number = order_of(list(self.values))
        last_read = {used: number[value] for value in self.values for used in value.inputs}
        found, reached = [], last_read[self.source]
        for index, value in enumerate(self.values):
            if isinstance(value.op, Constant):
                continue
            if reached <= index:
                found.append(index)
            reached = max(reached, last_read.get(value, index))
        return found

    def between(self, first: int, last: int) -> Region:
        """The part behind the waist at ``first`` (-1: behind the source) up to the one at ``last``."""
        own = [value for value in self.values[first + 1 : last + 1] if not isinstance(value.op, Constant)]
        read = dict.fromkeys(used for value in own for used in value.inputs)
        constants = (used for used in read if isinstance(used.op, Constant))
        return Region(self.source if first < 0 else self.values[first], (*constants, *own))

    def as_linear(self, size: Size | None) -> Linear:
        """The region as one linear operator, or a refusal that names the value in the way."""
        source = _Source(self._channels, self.spatial, size)
        start = unit() if source.channels is None else _identity(source.channels, source.axes)
        maps = {self.source: _Image(start, None)}
        for value in self.values:
            if not isinstance(value.op, Constant):
                maps[value] = _image(value, [maps.get(used) for used in value.inputs], source)
        return _of_all_channels(maps[self.sink], source)

    @property
    def spatial(self) -> int | None:
        """The number of spatial axes on which the region acts; None where it treats every element alike."""
        named = (v.op.spatial for v in self.values if isinstance(v.op, Linear) and v.op.spatial is not None)
        return next(named, None)

    @property
    def _channels(self) -> int | None:
        shape, spatial = self.source.tensor_type.shape, self.spatial
        if spatial is None:
            return None
        require(spatial < len(shape), f"the region acts on {spatial} spatial axes, {self.source.where} has fewer")
        return shape[len(shape) - spatial - 1]


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


@dataclass(frozen=True)
class PartialJoin:
    """Some addends of a sum that start at one value, as a `Join`, and the other addends with their signs."""

    join: Join
    merged: tuple[Value, ...]  # what would go, users first: the sums and the branches
    rest: tuple[tuple[Value, int], ...]

    def embed(self, value: Value) -> Value:
        """The whole sum, with ``value`` for the addends of the join."""
        for addend, sign in self.rest:
            value = Add(sign)(value, addend)
        return value


def partial_joins_at(value: Value, graph: Graph) -> Iterator[PartialJoin]:
    """Addends of the sum that ends in ``value`` which share a source: all that share it, then two at a time."""
    addends, inner = _addends(value, graph)
    if len(addends) < 3:
        return
    paths = [_linear_path(addend) for addend, _ in addends]
    shared = Counter(step for path in paths for step in path)
    seen: set[tuple[int, ...]] = set()
    for source in dict.fromkeys(step for path in paths for step in path if shared[step] > 1 and step.type is not None):
        members = [index for index, path in enumerate(paths) if source in path]
        for chosen in (tuple(members), *itertools.combinations(members, 2)):
            if len(chosen) < len(addends) and chosen not in seen:
                seen.add(chosen)
                yield _partial_join(value, source, [addends[i] for i in chosen], [paths[i] for i in chosen], inner,
                                    tuple(addends[i] for i in range(len(addends)) if i not in chosen))  # fmt: skip


def _partial_join(
    value: Value, source: Value, addends: list[tuple[Value, int]], paths: list[list[Value]], inner: list[Value],
    rest: tuple[tuple[Value, int], ...],
) -> PartialJoin:  # fmt: skip
    branches = list(dict.fromkeys(step for path in paths for step in path[: path.index(source)]))
    (total, sign), *others = addends
    sums: list[Value] = []  # not in the graph: the sum of the chosen addends alone
    if sign == -1:
        sums.append(total := _MINUS(total))
    for addend, sign in others:
        sums.append(total := Add(sign)(total, addend))
    order = topological(sums, known=lambda each: each is source)
    return PartialJoin(Join(source, tuple(order)), (value, *inner, *branches), rest)


def _addends(value: Value, graph: Graph) -> tuple[list[tuple[Value, int]], list[Value]]:
    """The leaves of a tree of sums with their signs, and the inner sums, which nobody else reads."""
    leaves: list[tuple[Value, int]] = []
    inner: list[Value] = []
    stack = [(value, 1)]
    while stack and len(leaves) + len(stack) <= MOST_ADDENDS:
        term, sign = stack.pop()
        if isinstance(term.op, Add) and (term is value or graph.use_count(term) == 1) and term.type == value.type:
            inner += [] if term is value else [term]
            stack += [(term.inputs[1], sign * term.op.sign), (term.inputs[0], sign)]
        else:
            leaves.append((term, sign))
    return leaves + stack[::-1], inner


def _linear_path(value: Value) -> list[Value]:
    """``value`` and what it is a linear function of, nearest first, back through operators of one input."""
    path = [value]
    while isinstance(path[-1].op, Linear) and len(path) < LONGEST_WALK:
        path.append(path[-1].inputs[0])
    return path


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
class _Source:
    """What the region reads: its channels and the axes behind them, None where no operator says; its size if fixed."""

    channels: int | None
    axes: int | None
    size: Size | None


@dataclass(frozen=True)
class _Image:
    """A value of a region: a linear operator of the source's channels ``read``, in that order; None for all."""

    op: Linear
    read: tuple[int, ...] | None

    @property
    def is_selection(self) -> bool:
        """Does it only select channels?"""
        return isinstance(self.op, Scale) and self.op.is_identity


def _identity(channels: int, axes: int | None) -> Scale:
    return Scale(torch.ones(channels), torch.zeros(channels), axes)


def _image(value: Value, images: list[_Image | None], source: _Source) -> _Image:
    known = [image for image in images if image is not None]
    if len(known) < len(images):
        raise Refusal(f"{value.where} mixes in a constant")
    if isinstance(value.op, Linear):
        (image,) = known
        return _selected(value.op, image, source) or _composed(value.op, image, source)
    if isinstance(value.op, Add):
        left, right = _of_same_channels([_broadcast(image, value, source) for image in known], source)
        other = right.op if value.op.sign == 1 else compose(_MINUS, right.op, source.size)
        return _Image(add(left.op, other, source.size), left.read)
    if isinstance(value.op, Concat):
        return _stacked(value, known, source)
    raise Refusal(f"{value.where} ({value.op.label}) is affine but not a convolution")


def _selected(op: Linear, image: _Image, source: _Source) -> _Image | None:
    """A selection of channels behind another one is a selection of the source's; None for anything else."""
    if not isinstance(op, Gather) or not image.is_selection or source.axes != op.axes or min(op.index) < 0:
        return None
    read = tuple(_reads(image, op.count)[i] for i in op.index)
    return _Image(_identity(len(read), op.axes), _named(read, source.channels))


def _reads(image: _Image, channels: int) -> tuple[int, ...]:
    return tuple(range(channels)) if image.read is None else image.read


def _named(read: tuple[int, ...], channels: int | None) -> tuple[int, ...] | None:
    """All channels in their order go by the name None."""
    return None if channels is not None and read == tuple(range(channels)) else read


def _of_all_channels(image: _Image, source: _Source) -> Linear:
    """An operator of all the source's channels."""
    if image.read is None:
        return image.op
    assert source.channels is not None and source.axes is not None  # what has selected some says so
    if image.is_selection:
        return Gather(Listed(image.read), source.channels, source.axes)
    return compose(image.op, selecting(image.read, source.channels, source.axes), source.size)


def _composed(op: Linear, image: _Image, source: _Source) -> _Image:
    return _Image(compose(op, image.op, source.size), image.read)


def _of_same_channels(images: list[_Image], source: _Source) -> list[_Image]:
    if len({image.read for image in images}) == 1:
        return images
    return [_Image(_of_all_channels(image, source), None) for image in images]


def _broadcast(image: _Image, value: Value, source: _Source) -> _Image:
    """One channel that a sum repeats for every channel, as a convolution that repeats it."""
    if source.channels is None or source.axes is None:
        return image
    spatial = source.axes if image.op.spatial is None else image.op.spatial
    read = len(_reads(image, source.channels))
    _, made = image.op.channels or (read, read)  # a factor for all channels alike makes as many as it reads
    wanted = value.tensor_type.shape[-spatial - 1]
    if made != 1 or wanted == 1:
        return image
    repeat = torch.ones(wanted, 1, *[1] * spatial, dtype=torch.float64)
    return _Image(compose(Conv(repeat), image.op.as_conv(read, spatial)), image.read)


def _stacked(value: Value, images: list[_Image], source: _Source) -> _Image:
    """A concatenation of channels: selections one after the other, blocks side by side, or a sum of moved parts."""
    spatial, channels, size = source.axes, source.channels, source.size
    op = value.op
    assert isinstance(op, Concat)
    read_by_a_layer = bool(images) and spatial is not None and channels is not None
    require(read_by_a_layer, f"{value.where} concatenates what no layer has read")
    assert spatial is not None and channels is not None
    require(op.axis == -spatial - 1, f"{value.where} concatenates along axis {op.axis}, not along the channels")
    read = tuple(channel for image in images for channel in _reads(image, channels))
    if all(image.is_selection for image in images):
        return _Image(_identity(len(read), spatial), _named(read, channels))
    parts = [image.op.as_conv(len(_reads(image, channels)), spatial) for image in images]
    if len(set(read)) == len(read) and len(images) > 1 and not any(part.transposed for part in parts):
        return _Image(block_diagonal(parts, size), _named(read, channels))
    images = _of_same_channels(images, source)
    parts = on_one_grid([image.op.as_conv(len(_reads(image, channels)), spatial) for image in images])
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
    assert result is not None  # some part has said on which axes it acts
    return result
