"""Which PyTorch calls only move elements? The part of the lift table that makes `Rearrangement` operators.

A handler returns None for a form that is none, which leaves the call as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from rgc.algebra import Linear
from rgc.errors import TraceError
from rgc.functions import FUNCTIONS, Handler, Lifting, _per_channel
from rgc.ir import Value
from rgc.lengths import length_of, measured_axis
from rgc.operators import Activation, Add, Call, Clamp, Concat, Identity, Multiply, Slot
from rgc.rearrange import (
    Assign,
    BorderFill,
    Flip,
    Gather,
    Listed,
    Pad,
    Piece,
    PixelShuffle,
    PixelUnshuffle,
    Roll,
    Selection,
    Shuffle,
    Sides,
    Slice,
    Subsample,
    ZeroChannels,
)

#: Values that a walk back passes at most, in search of the layer that says where the channels are.
LONGEST_WALK = 32


def pad(lifter: Lifting, x: Any, amounts: Any, mode: str = "constant", value: Any = None) -> Value | None:
    """``F.pad``: spatial axes, and zeros along the channel axis."""
    axes = _axes(lifter, x)
    if axes is None or not _are_numbers(amounts) or mode not in _MODES or not isinstance(value, int | float | None):
        return None
    given = [(int(b), int(a)) for b, a in zip(amounts[::2], amounts[1::2], strict=False)]
    while given and given[-1] == (0, 0):
        given.pop()
    spatial, channels = given[:axes], given[axes:]
    if len(channels) > 1 or (channels and (mode != "constant" or value or min(channels[0]) < 0)):
        return None
    result: Value = x
    if channels:
        result = lifter.emit(_gather(lifter, result, ZeroChannels(*channels[0]), axes), result)
    if spatial or result is x:
        sides = tuple(reversed([*spatial, *[(0, 0)] * (axes - len(spatial))]))
        constant = torch.tensor([float(value)], dtype=torch.float64) if value else None
        result = lifter.emit(Pad(sides, _MODES[mode], constant), result)
    return result


def pad_module(mode: str) -> Handler:
    """The layers ``nn.ZeroPad2d``, ``nn.ConstantPad2d``, ``nn.ReflectionPad2d`` and so on."""

    def handle(lifter: Lifting, module: Any, x: Any) -> Value | None:
        axes = len(module.padding) // 2
        if _axes(lifter, x) != axes:
            return None
        return pad(lifter, x, module.padding, mode, getattr(module, "value", None))

    return handle


def getitem(lifter: Lifting, x: Any, index: Any) -> Value | None:
    """Slices and lists of channels, crops and strides of spatial axes; pieces that chunk and split have cut."""
    if isinstance(x, Value) and x.type is None and isinstance(index, int):
        return _piece(lifter, x, index)
    axes = _axes(lifter, x)
    if axes is None:
        return None
    chosen = _by_axis(lifter, x, index)
    if chosen is None:
        return None
    lead = len(chosen) - axes - 1
    if any(not _is_everything(each) for each in chosen[:lead]):
        return None
    selection = _selection(chosen[lead], lifter.shape(x)[lead])
    window = _window(chosen[lead + 1 :], lifter.shape(x)[lead + 1 :])
    if selection is None or window is None:
        return None
    result: Value = x
    if not _is_everything(chosen[lead]):
        result = lifter.emit(_gather(lifter, result, selection, axes), result)
    crop, step = window
    if max(step, default=1) > 1:
        result = lifter.emit(Subsample(step, crop), result)
    elif any(map(any, crop)):
        result = lifter.emit(Pad(tuple((-before, -after) for before, after in crop)), result)
    return result


def slice_along(lifter: Lifting, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    """``aten.slice``, with the largest integer for an open end."""
    if not isinstance(x, Value) or not isinstance(lifter.real.get(x), Tensor):
        return None
    stop = None if end is None or (isinstance(end, int) and end >= 2**62) else end
    axis = dim % len(lifter.shape(x))
    return getitem(lifter, x, (*[slice(None)] * axis, slice(start or None, stop, None if step == 1 else step)))


def narrow(lifter: Lifting, x: Any, dim: Any, start: Any, length: Any) -> Value | None:
    if not isinstance(x, Value) or not isinstance(lifter.real.get(x), Tensor) or not isinstance(dim, int):
        return None
    axis = dim % len(lifter.shape(x))
    first, taken = (length_of(each, x, axis) if isinstance(each, int | Value) else None for each in (start, length))
    if first is None or taken is None or first.times or first.plus < 0:
        return None
    stop = first.plus + taken.plus
    if taken.times == 0:
        return _along_channels(lifter, x, dim, Slice(first.plus, stop))
    if taken.times != 1 or stop > 0:
        return None
    return getitem(lifter, x, (*[slice(None)] * axis, slice(first.plus or None, stop or None)))


def index_select(lifter: Lifting, x: Any, dim: int, index: Any) -> Value | None:
    listed = _listed(index, lifter.shape(x)[dim]) if _axes(lifter, x) is not None else None
    return None if listed is None else _along_channels(lifter, x, dim, listed)


def flip(lifter: Lifting, x: Any, *dims: Any) -> Value | None:
    where = dims[0] if len(dims) == 1 and isinstance(dims[0], Sequence) else dims
    return _along_channels(lifter, x, where[0], Flip()) if len(where) == 1 else None


def roll(lifter: Lifting, x: Any, shifts: Any, dims: Any = ()) -> Value | None:
    shift, where = (tuple(each) if isinstance(each, list | tuple) else (each,) for each in (shifts, dims))
    if len(shift) != 1 or len(where) != 1 or not _are_numbers(shift):
        return None
    return _along_channels(lifter, x, where[0], Roll(shift[0]))


def channel_shuffle(lifter: Lifting, x: Any, groups: Any) -> Value | None:
    return _along_channels(lifter, x, 1, Shuffle(int(groups))) if isinstance(groups, int) else None


def channel_shuffle_module(lifter: Lifting, module: Any, x: Any) -> Value | None:
    return channel_shuffle(lifter, x, module.groups)


def pixel_shuffle(lifter: Lifting, x: Any, upscale_factor: Any) -> Value | None:
    return lifter.emit(PixelShuffle(upscale_factor), x) if _axes(lifter, x) == 2 else None


def pixel_unshuffle(lifter: Lifting, x: Any, downscale_factor: Any) -> Value | None:
    return lifter.emit(PixelUnshuffle(downscale_factor), x) if _axes(lifter, x) == 2 else None


def pixel_shuffle_module(lifter: Lifting, module: Any, x: Any) -> Value | None:
    return pixel_shuffle(lifter, x, module.upscale_factor)


def pixel_unshuffle_module(lifter: Lifting, module: Any, x: Any) -> Value | None:
    return pixel_unshuffle(lifter, x, module.downscale_factor)


def reshape(lifter: Lifting, x: Any, *sizes: Any) -> Value | None:
    """The end of a channel shuffle that is written out: view [N, g, C/g, ...], transpose(1, 2), view [N, C, ...]."""
    wanted = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else sizes
    found = _transposed_blocks(lifter, x)
    if found is None:
        return None
    source, groups = found
    shape = lifter.shape(source)
    if len(wanted) != len(shape) or not _names_axes(lifter, wanted, shape, source):
        return None
    if not _leaves_positions(wanted[1:2], wanted[2:]):
        return None
    return _along_channels(lifter, source, 1, Shuffle(groups))


def flatten(lifter: Lifting, x: Any, start_dim: int = 0, end_dim: int = -1) -> Value | None:
    """Another end of it: ``flatten(1, 2)``."""
    found = _transposed_blocks(lifter, x) if (start_dim, end_dim) == (1, 2) else None
    return None if found is None else _along_channels(lifter, found[0], 1, Shuffle(found[1]))


def concat(lifter: Lifting, tensors: Any, dim: int = 0, axis: int | None = None) -> Any:
    """A concatenation of all pieces of a cut, or of every ``f``-th position from each place of a block on."""
    where = dim if axis is None else axis
    if isinstance(tensors, Value) and isinstance(lifter.real.get(tensors), list | tuple):
        pieces = [_piece(lifter, tensors, number) for number in range(len(lifter.real[tensors]))]
        return None if None in pieces else FUNCTIONS["cat"](lifter, pieces, where)
    places = _places(tensors) if isinstance(tensors, list | tuple) else None
    if places is None or where not in (-3, len(lifter.shape(tensors[0])) - 3):
        return None
    return lifter.emit(PixelUnshuffle(*places), tensors[0].inputs[0])


def setitem(lifter: Lifting, x: Any, index: Any, value: Any) -> Value:
    """``x[index] = value``, out of place: a constant over a border, or any other assignment."""
    if not isinstance(lifter.real.get(x), Tensor):
        raise TraceError("an item of something that is not a tensor is assigned")
    border = _border(lifter, x, index)
    if border is not None and not isinstance(value, Value):
        constant = _per_channel(lifter, x, value)
        if constant is not None and constant[1] in (None, len(border)):
            return lifter.emit(BorderFill(border, constant[0]), x)
    inputs: list[Value] = [x]

    def slot(leaf: Any) -> Any:
        if isinstance(leaf, slice):
            return slice(*(slot(each) for each in (leaf.start, leaf.stop, leaf.step)))
        if not isinstance(leaf, Value):
            return leaf
        inputs.append(leaf)
        return Slot(len(inputs) - 1)

    parts = tree_map(slot, (index, value), is_leaf=lambda leaf: isinstance(leaf, Value))
    return lifter.emit(Assign(*parts), *inputs)


#: Calls behind which a handler may still look: the lifting keeps what they read.
LOOKED_THROUGH = frozenset({
    "chunk", "split", "split_with_sizes", "tensor_split", "view", "reshape", "unflatten", "transpose", "swapaxes",
    "swapdims", "permute", "contiguous", "clone", "t", "mul", "multiply",
})  # fmt: skip

REARRANGEMENTS: dict[str, Handler] = {
    "pad": pad, "getitem": getitem, "slice": slice_along, "narrow": narrow, "index_select": index_select, "flip": flip,
    "roll": roll,
    "channel_shuffle": channel_shuffle, "pixel_shuffle": pixel_shuffle, "pixel_unshuffle": pixel_unshuffle,
    "cat": concat, "concat": concat, "concatenate": concat, "view": reshape, "reshape": reshape, "flatten": flatten,
    "setitem": setitem,
}  # fmt: skip

_MODES: dict[str, Any] = {
    "constant": "zeros", "reflect": "reflect", "replicate": "replicate", "circular": "circular",
}  # fmt: skip


# --- where the channels are --------------------------------------------------------------------------------------


def _axes(lifter: Lifting, x: Any) -> int | None:
    """How many axes follow the channels: by the layers that ``x`` comes from, else all behind the second.

    It only decides what an operator is called; each operator computes what the call computes, at every size.
    """
    real = lifter.real.get(x) if isinstance(x, Value) else None
    if not isinstance(real, Tensor) or not real.is_floating_point() or real.dim() < 2:
        return None
    value = x
    for _ in range(LONGEST_WALK):
        if isinstance(value.op, Linear) and value.op.spatial is not None:
            return min(value.op.spatial, real.dim() - 2)
        if not isinstance(value.op, Activation | Add | Clamp | Multiply | Concat | Identity | Linear):
            break
        value = value.inputs[0]
    return real.dim() - 2


def _along_channels(lifter: Lifting, x: Any, dim: Any, selection: Selection) -> Value | None:
    axes = _axes(lifter, x)
    if axes is None or not isinstance(dim, int):
        return None
    rank = len(lifter.shape(x))
    if dim % rank != rank - axes - 1 or (isinstance(selection, Shuffle) and (dim % rank != 1 or rank < 3)):
        return None
    return lifter.emit(_gather(lifter, x, selection, axes), x)


def _gather(lifter: Lifting, x: Value, selection: Selection, axes: int) -> Gather:
    shape = lifter.shape(x)
    return Gather(selection, shape[len(shape) - axes - 1], axes)


# --- indices -----------------------------------------------------------------------------------------------------


def _by_axis(lifter: Lifting, x: Value, index: Any) -> list[Any] | None:
    """An index as one entry per axis; None where it adds or drops axes or is no constant."""
    rank = len(lifter.shape(x))
    parts = [_as_slice(part) for part in (index if isinstance(index, tuple) else (index,))]
    if any(part is None or isinstance(part, bool | int | Value) for part in parts):
        return None
    dots = [place for place, part in enumerate(parts) if part is Ellipsis]
    if len(dots) > 1 or len(parts) - len(dots) > rank:
        return None
    where = dots[0] if dots else len(parts)
    filling = [slice(None)] * (rank - len(parts) + len(dots))
    entries = [_with_numbers(x, *each) for each in enumerate([*parts[:where], *filling, *parts[where + len(dots) :]])]
    return None if any(isinstance(each, slice) and not _is_plain(each) for each in entries) else entries


def _as_slice(part: Any) -> Any:
    """The slice that a call of ``slice`` makes: a computed end makes it a value of the program."""
    if not isinstance(part, Value) or _name(part) != "slice" or not isinstance(part.op, Call):
        return part
    args, _ = part.op.arguments(part.inputs)
    return slice(*args)


def _with_numbers(x: Value, axis: int, chosen: Any) -> Any:
    """A slice whose ends the model computes, as ``1:x.shape[axis] - 1``, by numbers, from the back where that is n."""
    if not isinstance(chosen, slice) or not any(isinstance(end, Value) for end in (chosen.start, chosen.stop)):
        return chosen
    start, stop = _end(x, axis, chosen.start), _end(x, axis, chosen.stop, from_the_back=True)
    return slice(start, stop, chosen.step)


def _end(x: Value, axis: int, end: Any, *, from_the_back: bool = False) -> Any:
    """A number that stands for ``end`` at every size, or what it was; a slice up to the end has None."""
    length = length_of(end, x, axis) if isinstance(end, Value) else None
    if length is None or (length.times == 0 and length.plus < 0):
        return end
    if length.times == 0:
        return length.plus
    return (length.plus or None) if from_the_back and length.times == 1 and length.plus <= 0 else end


def _is_plain(chosen: slice) -> bool:
    ends = (chosen.start, chosen.stop, chosen.step)
    return all(end is None or (isinstance(end, int) and not isinstance(end, bool)) for end in ends)


def _is_everything(chosen: Any) -> bool:
    return isinstance(chosen, slice) and chosen.start in (None, 0) and chosen.stop is None and chosen.step in (None, 1)


def _selection(chosen: Any, count: int) -> Selection | None:
    if isinstance(chosen, slice):
        some = range(count)[chosen]
        return Slice(chosen.start, chosen.stop, chosen.step) if len(some) else None
    return _listed(chosen, count)


def _listed(index: Any, count: int) -> Listed | None:
    if isinstance(index, Tensor) and index.dim() == 1 and index.dtype in (torch.int32, torch.int64):
        index = index.tolist()
    if not isinstance(index, list | tuple) or not index or not _are_numbers(index):
        return None
    return Listed(tuple(int(each) % count for each in index))


def _window(chosen: Sequence[Any], sizes: Sequence[int]) -> tuple[Sides, tuple[int, ...]] | None:
    """Slices of spatial axes that mean the same at every size: starts from the front, ends from the back."""
    crop, step = [], []
    for each in chosen:
        if not isinstance(each, slice):
            return None
        start, stop = each.start or 0, each.stop or 0
        if start < 0 or stop > 0 or each.stop == 0 or (each.step or 1) < 1:
            return None
        crop.append((start, -stop))
        step.append(each.step or 1)
    if any(before + after >= n for (before, after), n in zip(crop, sizes, strict=True)):
        return None
    return tuple(crop), tuple(step)


def _border(lifter: Lifting, x: Value, index: Any) -> Sides | None:
    """The width of the border that an index names, per spatial axis; None for any other index."""
    axes = _axes(lifter, x)
    chosen = None if axes is None else _by_axis(lifter, x, index)
    if chosen is None or axes is None:
        return None
    lead = len(chosen) - axes
    named = [place for place, each in enumerate(chosen) if not _is_everything(each)]
    if len(named) != 1 or named[0] < lead or not isinstance(chosen[named[0]], slice):
        return None
    side = chosen[named[0]]
    if side.step not in (None, 1):
        return None
    if side.start in (None, 0) and side.stop is not None and side.stop > 0:
        width = (side.stop, 0)
    elif side.stop is None and side.start is not None and side.start < 0:
        width = (0, -side.start)
    else:
        return None
    return tuple(width if lead + axis == named[0] else (0, 0) for axis in range(axes))


def _places(parts: Sequence[Any]) -> tuple[int, tuple[tuple[int, int], ...]] | None:
    """The block size and the places in it, where the parts are the subsamplings of one value from each place on."""
    ops = [part.op for part in parts if isinstance(part, Value) and isinstance(part.op, Subsample)]
    if not ops or len(ops) < len(parts) or len({part.inputs for part in parts}) > 1 or len({op.step for op in ops}) > 1:
        return None
    step = ops[0].step
    if len(step) != 2 or step[0] != step[1] or any(after for op in ops for _, after in op.crop):
        return None
    places = tuple((op.crop[0][0], op.crop[1][0]) for op in ops)
    every = sorted(itertools.product(range(step[0]), repeat=2))
    return (step[0], places) if sorted(places) == every else None


def _piece(lifter: Lifting, pieces: Value, number: int) -> Value | None:
    """An element of what chunk, split or tensor_split returned."""
    cut = {"split_with_sizes": "split"}.get(_name(pieces), _name(pieces))
    if cut not in ("chunk", "split", "tensor_split") or not isinstance(pieces.op, Call):
        return None
    options = dict(pieces.op.kwargs)
    given = [*pieces.op.args[1:], *(options[name] for name in _SIZES if name in options)]
    sizes = given[0] if given else None
    dim = given[1] if len(given) > 1 else options.get("dim", 0)
    if isinstance(sizes, list | tuple) and _are_numbers(sizes):
        sizes = tuple(map(int, sizes))
    elif not isinstance(sizes, int):
        return None
    return _along_channels(lifter, pieces.inputs[0], dim, Piece(cut, sizes, number))  # type: ignore[arg-type]


_SIZES = ("chunks", "split_size_or_sections", "split_size", "split_sizes", "indices_or_sections", "sections", "indices")


# --- channel shuffles that are written out -----------------------------------------------------------------------


def _transposed_blocks(lifter: Lifting, x: Any) -> tuple[Value, int] | None:
    """The source and the groups of ``source.view(N, g, C / g, ...).transpose(1, 2)``."""
    if not isinstance(x, Value):
        return None
    if _name(x) in ("contiguous", "clone"):
        x = x.inputs[0]
    if not _swaps_1_and_2(lifter, x):
        return None
    blocks = x.inputs[0]
    if _name(blocks) not in ("view", "reshape", "unflatten") or not isinstance(blocks.op, Call):
        return None
    source = blocks.inputs[0]
    shape, wide = lifter.real.get(source), lifter.real.get(blocks)
    if not isinstance(shape, Tensor) or not isinstance(wide, Tensor) or wide.dim() != shape.dim() + 1:
        return None
    if wide.shape[0] != shape.shape[0] or wide.shape[3:] != shape.shape[2:] or shape.dim() < 3:
        return None
    (_, *args), _ = blocks.op.arguments(blocks.inputs)
    if _name(blocks) == "unflatten":
        return (source, wide.shape[1]) if args[0] == 1 else None
    sizes = tuple(args[0]) if len(args) == 1 and isinstance(args[0], list | tuple) else tuple(args)
    if not _names_axes(lifter, (sizes[0], None, *sizes[3:]), tuple(shape.shape), source):
        return None
    if not all(_is_of_channels(lifter, size, source) for size in sizes[1:3]):
        return None
    if not _leaves_positions(sizes[1:3], sizes[3:]):
        return None
    return source, int(wide.shape[1])


def _swaps_1_and_2(lifter: Lifting, x: Value) -> bool:
    if not isinstance(x.op, Call) or not x.inputs:
        return False
    (_, *args), _ = x.op.arguments(x.inputs)
    if _name(x) in ("transpose", "swapaxes", "swapdims"):
        return sorted(args) == [1, 2] if _are_numbers(args) else False
    order = args[0] if len(args) == 1 else args
    rank = len(lifter.shape(x)) if isinstance(lifter.real.get(x), Tensor) else 0
    return _name(x) == "permute" and list(order) == [0, 2, 1, *range(3, rank)]


def _names_axes(lifter: Lifting, sizes: Sequence[Any], shape: Sequence[int], source: Value) -> bool:
    """Is each size that of its own axis of ``source``, whatever the input's size? At most one may be -1."""
    if sum(size is not None and not isinstance(size, Value) and size == -1 for size in sizes) > 1:
        return False
    for axis, size in enumerate(sizes):
        if size is None or (not isinstance(size, Value) and size == -1):
            continue
        if axis == 1 and _is_of_channels(lifter, size, source):
            continue
        if isinstance(size, Value):
            if measured_axis(size) not in {(source, axis), (source, axis - len(shape))}:
                return False
        elif axis == 0 or size != shape[axis]:  # a batch that is burned in must stay free
            return False
    return True


def _leaves_positions(channels: Sequence[Any], positions: Sequence[Any]) -> bool:
    """A -1 among the channels takes up what other sizes leave over, where the positions are numbers."""
    return -1 not in [n for n in channels if isinstance(n, int)] or all(isinstance(n, Value) for n in positions)


def _is_of_channels(lifter: Lifting, size: Any, source: Value) -> bool:
    """A number, or what is computed from the number of channels, which no input changes."""
    if not isinstance(size, Value):
        return isinstance(size, int)
    measured = measured_axis(size)
    if measured is not None:
        return measured in {(source, 1), (source, 1 - len(lifter.shape(source)))}
    known = _name(size) in ("floordiv", "mul", "truediv", "int", "floor_divide")
    return known and bool(size.inputs) and all(_is_of_channels(lifter, used, source) for used in size.inputs)


def _rest(value: Value) -> tuple[Any, ...]:
    """The arguments of a call behind the first."""
    return value.op.args[1:] if isinstance(value.op, Call) else ()


def _name(value: Value) -> str:
    return value.op.name if isinstance(value.op, Call) else ""


def _are_numbers(given: Any) -> bool:
    return isinstance(given, Sequence) and all(isinstance(n, int) and not isinstance(n, bool) for n in given)


__all__ = ["LOOKED_THROUGH", "REARRANGEMENTS"]
