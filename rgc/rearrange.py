"""Which operators only move elements? Pads, crops, subsamplings, selections of channels, pixel shuffles, assignments.

Each `Rearrangement` is a convolution whose weights are 0 and 1, so it merges into its neighbours by the laws of the
algebra. What stays is emitted as what the user wrote: a slice as a view, a shuffle as a shuffle.
"""

from __future__ import annotations

import itertools
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from rgc.algebra import Conv, Linear, PaddingMode, pad
from rgc.errors import GraphError, require
from rgc.ir import Operator, TensorType
from rgc.operators import Slot

Sides = tuple[tuple[int, int], ...]
#: One call: a function, and its arguments behind the tensor.
Step = tuple[Callable[..., Any], tuple[Any, ...]]


class Rearrangement(Linear):
    """A linear operator that moves elements, leaves some out, or puts constants beside them."""

    fresh: ClassVar[bool] = False

    @property
    @abstractmethod
    def is_view(self) -> bool:
        """Does the result only look at the input's memory?"""


# --- along the spatial axes --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pad(Rearrangement):
    """Padding of the trailing spatial axes, as ``F.pad``: (before, after) per axis; a negative amount crops.

    ``value`` is what is padded in mode "zeros": None for zeros, [1] for one number, [C] for one per channel.

    >>> Pad(((0, 0), (1, -1))).infer(TensorType((1, 2, 4, 4), torch.float32)).shape
    (1, 2, 4, 4)
    """

    padding: Sides
    mode: PaddingMode = "zeros"
    value: Tensor | None = None

    geometry: ClassVar[dict[str, Any]] = {"padding": 0, "mode": "zeros", "value": None}

    def __post_init__(self) -> None:
        if self.value is not None and self.mode != "zeros":
            raise GraphError(f"Pad: a constant value contradicts mode {self.mode!r}")
        if self.value is not None and self.value.dim() != 1:
            raise GraphError(f"Pad: value must be one number per channel, got shape {list(self.value.shape)}")

    @property
    def channels(self) -> tuple[int, int] | None:
        count = 1 if self.value is None else self.value.numel()
        return None if count == 1 else (count, count)

    @property
    def spatial(self) -> int:
        return len(self.padding)

    @property
    def is_view(self) -> bool:
        return all(amount <= 0 for sides in self.padding for amount in sides)

    @property
    def reach(self) -> tuple[int, int]:
        return max((abs(before) + abs(after) for before, after in self.padding), default=0), 1

    @property
    def label(self) -> str:
        kind = "crop" if self.is_view else "pad" if self.mode == "zeros" else f"{self.mode} pad"
        sides = (f"{before}" if before == after else f"{before},{after}" for before, after in self.padding)
        return f"{kind} {'x'.join(sides)}"

    @property
    def amounts(self) -> tuple[int, ...]:
        """The padding as ``F.pad`` takes it: last axis first."""
        return tuple(amount for sides in reversed(self.padding) for amount in sides)

    def as_conv(self, channels: int, spatial: int) -> Conv:
        require(spatial == self.spatial, f"{self.label} and its neighbour act on different axes")
        crops = any(amount < 0 for amount in self.amounts)
        require(self.mode == "zeros" or not crops, f"{self.label} crops one side and pads the other by {self.mode}")
        value = None if self.value is None else self.value.double().expand(channels).contiguous()
        require(value is None or bool(value.isfinite().all()), f"{self.label} pads with a value that is not finite")
        if self.is_view or (value is not None and not bool(value.any())):
            value = None  # zeros are the default
        return Conv(
            _identity(channels, spatial), padding=self.padding, groups=channels, padding_mode=self.mode, pad_value=value
        )

    def evaluate(self, *inputs: Any) -> Any:
        (x,) = inputs
        if self.is_view:
            return x[slices(self.padding)]
        if self.value is not None and self.value.numel() > 1:
            return pad(x, self.as_conv(self.value.numel(), self.spatial))
        if self.mode == "zeros":
            return F.pad(x, self.amounts, value=None if self.value is None else float(self.value))
        return F.pad(x, self.amounts, mode=self.mode)

    def infer(self, *types: TensorType | None) -> TensorType | None:
        given = _known(self, *types)
        lead = len(given.shape) - self.spatial
        sizes = (n + b + a for n, (b, a) in zip(given.shape[lead:], self.padding, strict=True))
        return given.with_shape((*given.shape[:lead], *sizes))


@dataclass(frozen=True, eq=False)
class Subsample(Rearrangement):
    """Every ``step``-th position of the trailing spatial axes, from ``crop`` on: ``x[..., 1::2, 0:-1:2]``.

    crop: how many positions are left out (before, after) per axis, 0 or more.
    """

    step: tuple[int, ...]
    crop: Sides

    geometry: ClassVar[dict[str, Any]] = {"step": 1, "crop": 0}

    def __post_init__(self) -> None:
        if len(self.step) != len(self.crop) or min(self.step) < 1 or min(map(min, self.crop)) < 0:
            raise GraphError(f"Subsample: step {self.step} and crop {self.crop} are no slices with a positive step")

    @property
    def spatial(self) -> int:
        return len(self.step)

    @property
    def is_view(self) -> bool:
        return True

    @property
    def reach(self) -> tuple[int, int]:
        return max(before + after for before, after in self.crop), max(self.step)

    @property
    def label(self) -> str:
        return f"subsample /{'x'.join(map(str, dict.fromkeys(self.step)))}"

    def as_conv(self, channels: int, spatial: int) -> Conv:
        require(spatial == self.spatial, f"{self.label} and its neighbour act on different axes")
        padding = tuple((-before, -after) for before, after in self.crop)
        return Conv(_identity(channels, spatial), stride=self.step, padding=padding, groups=channels)

    @property
    def index(self) -> tuple[Any, ...]:
        """The index that makes it: ``x[index]``."""
        return slices(tuple((-before, -after) for before, after in self.crop), self.step)

    def evaluate(self, *inputs: Any) -> Any:
        (x,) = inputs
        return x[self.index]

    def infer(self, *types: TensorType | None) -> TensorType | None:
        given = _known(self, *types)
        lead = len(given.shape) - self.spatial
        axes = zip(given.shape[lead:], self.crop, self.step, strict=True)
        return given.with_shape((*given.shape[:lead], *(-(-max(n - b - a, 0) // s) for n, (b, a), s in axes)))


@dataclass(frozen=True, eq=False)
class BorderFill(Operator):
    """Constants over the outermost positions: ``y[:, :, :1] = v; y[:, :, :, -1:] = v``, on a copy.

    widths: how many positions (before, after) per trailing spatial axis. value: [1], or [C] for one per channel.
    """

    widths: Sides
    value: Tensor
    affine: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.value.dim() != 1:
            raise GraphError(f"BorderFill: value must be one number per channel, got {list(self.value.shape)}")
        if min(map(min, self.widths)) < 0 or not max(map(max, self.widths)):
            raise GraphError(f"BorderFill: {self.widths} names no border")

    @property
    def label(self) -> str:
        return "border fill"

    def spatial_axes(self, given: TensorType) -> int | None:
        return len(self.widths)

    @property
    def reach(self) -> tuple[int, int]:
        return max(map(sum, self.widths)), 1

    @property
    def assignments(self) -> list[tuple[Any, ...]]:
        """The indices that are assigned, each a slab along one side."""
        axes = len(self.widths)
        made = []
        for axis, sides in enumerate(self.widths):
            for width, chosen in zip(sides, (slice(0, sides[0]), slice(-sides[1], None)), strict=True):
                rest = [slice(None)] * (axes - axis - 1)
                made += [(Ellipsis, *[slice(None)] * axis, chosen, *rest)] * (width > 0)
        return made

    @property
    def filling(self) -> Tensor:
        """The value in a shape that broadcasts over channels."""
        return self.value.reshape(-1, *[1] * len(self.widths))

    def evaluate(self, *inputs: Any) -> Any:
        y = inputs[0].clone()
        for index in self.assignments:
            y[index] = self.filling.to(y.dtype)
        return y

    def infer(self, *types: TensorType | None) -> TensorType | None:
        return _known(self, *types)


@dataclass(frozen=True, eq=False)
class Assign(Operator):
    """``x[index] = value`` on a copy of x. What depends on the inputs stands as a `Slot` of its input."""

    index: Any
    value: Any

    @property
    def label(self) -> str:
        return "setitem"

    def filled(self, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
        """Index and value with ``inputs`` in their places."""

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, slice):
                return slice(*(fill(each) for each in (leaf.start, leaf.stop, leaf.step)))
            return inputs[leaf.index] if isinstance(leaf, Slot) else leaf

        index, value = tree_map(fill, (self.index, self.value), is_leaf=lambda leaf: isinstance(leaf, Slot))
        return index, value

    def evaluate(self, *inputs: Any) -> Any:
        y = inputs[0].clone()
        index, value = self.filled(inputs)
        y[index] = value.to(y.dtype) if isinstance(value, Tensor) else value
        return y

    def infer(self, *types: TensorType | None) -> TensorType | None:
        return types[0]


# --- along the channels ------------------------------------------------------------------------------------------


class Selection(ABC):
    """Which channels, said as the user said it: a value that is compared by what it says."""

    @abstractmethod
    def steps(self, axes: int) -> tuple[Step, ...]:
        """The calls that select from the axis that ``axes`` others follow."""

    @property
    def is_view(self) -> bool:
        """Do the calls only look at the input's memory?"""
        return False

    @property
    def label(self) -> str:
        """A word for reports."""
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Slice(Selection):
    """``x[:, start:stop:step]``."""

    start: int | None
    stop: int | None
    step: int | None = None

    def steps(self, axes: int) -> tuple[Step, ...]:
        chosen = slice(self.start, self.stop, self.step)
        return ((operator.getitem, ((Ellipsis, chosen, *[slice(None)] * axes),)),)

    @property
    def is_view(self) -> bool:
        return True


@dataclass(frozen=True)
class Piece(Selection):
    """One of the pieces that ``torch.chunk``, ``torch.split`` or ``torch.tensor_split`` cuts."""

    cut: Literal["chunk", "split", "tensor_split"]
    sizes: int | tuple[int, ...]
    number: int

    def steps(self, axes: int) -> tuple[Step, ...]:
        sizes = self.sizes if isinstance(self.sizes, int) else list(self.sizes)
        return (getattr(torch, self.cut), (sizes, -1 - axes)), (operator.getitem, (self.number,))

    @property
    def is_view(self) -> bool:
        return True


@dataclass(frozen=True)
class Listed(Selection):
    """``x[:, [2, 0, 1]]``, ``torch.index_select``."""

    index: tuple[int, ...]

    def steps(self, axes: int) -> tuple[Step, ...]:
        return ((torch.index_select, (-1 - axes, torch.tensor(self.index, dtype=torch.long))),)


@dataclass(frozen=True)
class Flip(Selection):
    """``x.flip(1)``."""

    def steps(self, axes: int) -> tuple[Step, ...]:
        return ((torch.flip, ([-1 - axes],)),)


@dataclass(frozen=True)
class Roll(Selection):
    """``torch.roll(x, shift, 1)``: channel i becomes channel i + shift, and what leaves behind enters in front."""

    shift: int

    def steps(self, axes: int) -> tuple[Step, ...]:
        return ((torch.roll, (self.shift, -1 - axes)),)


@dataclass(frozen=True)
class Shuffle(Selection):
    """``nn.ChannelShuffle``: channels as [groups, C / groups], transposed. The channel axis is the second."""

    groups: int

    def steps(self, axes: int) -> tuple[Step, ...]:
        return ((F.channel_shuffle, (self.groups,)),)


@dataclass(frozen=True)
class ZeroChannels(Selection):
    """Channels of zeros before and behind: ``F.pad`` along the channel axis."""

    before: int
    after: int

    def steps(self, axes: int) -> tuple[Step, ...]:
        return ((F.pad, ([*[0] * (2 * axes), self.before, self.after],)),)


@dataclass(frozen=True, eq=False)
class Gather(Rearrangement):
    """y[:, i] = x[:, index[i]] along the channel axis, which ``axes`` spatial axes follow; zeros at index -1.

    count: the number of channels of x.

    >>> Gather(Slice(None, None, 2), 5, 2).index
    (0, 2, 4)
    >>> Gather(ZeroChannels(1, 0), 2, 2).index
    (-1, 0, 1)
    """

    selection: Selection
    count: int
    axes: int

    def __post_init__(self) -> None:
        if not self.index:
            raise GraphError(f"Gather: {self.selection} selects none of {self.count} channels")

    @cached_property
    def index(self) -> tuple[int, ...]:
        """For each channel of the result the channel of the input, or -1 for zeros."""
        numbers = torch.arange(1.0, self.count + 1, dtype=torch.float64).reshape(1, -1, *[1] * self.axes)
        return tuple(int(number) - 1 for number in self.evaluate(numbers).flatten())

    @property
    def channels(self) -> tuple[int, int]:
        return self.count, len(self.index)

    @property
    def spatial(self) -> int:
        return self.axes

    @property
    def is_view(self) -> bool:
        return self.selection.is_view

    @property
    def is_identity(self) -> bool:
        """Does it return every channel in its place?"""
        return self.index == tuple(range(self.count))

    @property
    def label(self) -> str:
        return f"channel {self.selection.label} {self.count}->{len(self.index)}"

    def as_conv(self, channels: int, spatial: int) -> Conv:
        require(spatial == self.axes, f"{self.label} and its neighbour act on different axes")
        if channels != self.count:
            raise GraphError(f"{self.label}: expects {self.count} channels, got {channels}")
        return selecting(self.index, channels, spatial)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The calls that it is."""
        return self.selection.steps(self.axes)

    def evaluate(self, *inputs: Any) -> Any:
        (x,) = inputs
        for function, args in self.steps:
            x = function(x, *(arg.to(x.device) if isinstance(arg, Tensor) else arg for arg in args))
        return x

    def infer(self, *types: TensorType | None) -> TensorType | None:
        given = _known(self, *types)
        axis = len(given.shape) - self.axes - 1
        if given.shape[axis] != self.count:
            raise GraphError(f"{self.label}: expects {self.count} channels, got {given.shape[axis]}")
        return given.with_shape((*given.shape[:axis], len(self.index), *given.shape[axis + 1 :]))


def selecting(index: tuple[int, ...], channels: int, spatial: int) -> Conv:
    """The 1x1 convolution that selects ``index`` of ``channels`` channels, in as many groups as it has."""
    chosen = torch.tensor(index)
    rows = torch.arange(len(index))
    groups = next(g for g in _divisors(math.gcd(len(index), channels)) if _keeps_groups(chosen, rows, channels, g))
    width = channels // groups
    weight = torch.zeros(len(index), width, dtype=torch.float64)
    real = chosen >= 0
    weight[rows[real], chosen[real] % width] = 1
    return Conv(weight.reshape(len(index), width, *[1] * spatial), groups=groups)


# --- between channels and space ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PixelUnshuffle(Rearrangement):
    """Space to depth: a block of ``factor`` x ``factor`` positions becomes channels, [C, H, W] -> [C f f, H/f, W/f].

    ``places`` is None for ``nn.PixelUnshuffle``, where the places of one channel follow each other. Otherwise it names
    the places (row, column) in the order in which each gives all channels: ``cat([x[..., ::2, ::2], ...], 1)``.
    """

    factor: int
    places: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        every = list(itertools.product(range(self.factor), repeat=2))
        if self.places is not None and sorted(self.places) != every:
            raise GraphError(f"PixelUnshuffle: {self.places} are not the places of a {self.factor}x{self.factor} block")

    @property
    def spatial(self) -> int:
        return 2

    @property
    def is_view(self) -> bool:
        return False

    @property
    def reach(self) -> tuple[int, int]:
        return self.factor - 1, self.factor

    @property
    def label(self) -> str:
        return f"pixel unshuffle {self.factor}"

    def as_conv(self, channels: int, spatial: int) -> Conv:
        require(spatial == 2, f"{self.label} and its neighbour act on different axes")
        f = self.factor
        taps = torch.eye(f * f, dtype=torch.float64).reshape(f * f, 1, f, f)
        if self.places is None:
            return Conv(taps.repeat(channels, 1, 1, 1), stride=f, groups=channels)
        chosen = torch.stack([taps[row * f + column, 0] for row, column in self.places])
        weight = torch.einsum("pkl,oi->poikl", chosen, torch.eye(channels, dtype=torch.float64))
        return Conv(weight.reshape(f * f * channels, channels, f, f), stride=f)

    def as_conv_before(self, channels: int, spatial: int) -> Conv:
        """The same where ``factor`` divides the size, as it must, for a neighbour that pads.

        The padding behind adds no output at these sizes, but says that there are zeros beyond the last block.
        """
        behind = (0, self.factor - 1)
        return replace(self.as_conv(channels, spatial), padding=(behind, behind))

    @property
    def indices(self) -> list[tuple[Any, ...]]:
        """The index of each place, where the places are named."""
        f = self.factor
        return [
            (Ellipsis, slice(row or None, None, f), slice(column or None, None, f)) for row, column in self.places or ()
        ]

    def evaluate(self, *inputs: Any) -> Any:
        (x,) = inputs
        return F.pixel_unshuffle(x, self.factor) if self.places is None else torch.cat([x[i] for i in self.indices], -3)

    def infer(self, *types: TensorType | None) -> TensorType | None:
        given, f = _known(self, *types), self.factor
        *lead, channels, height, width = given.shape
        if height % f or width % f:
            raise GraphError(f"{self.label}: does not divide {height}x{width}")
        return given.with_shape((*lead, channels * f * f, height // f, width // f))


@dataclass(frozen=True, eq=False)
class PixelShuffle(Operator):
    """Depth to space, the inverse of `PixelUnshuffle`: [C f f, H, W] -> [C, H f, W f]."""

    factor: int
    affine: ClassVar[bool] = True

    @property
    def label(self) -> str:
        return f"pixel shuffle {self.factor}"

    def spatial_axes(self, given: TensorType) -> int | None:
        return 2

    def evaluate(self, *inputs: Any) -> Any:
        return F.pixel_shuffle(inputs[0], self.factor)

    def infer(self, *types: TensorType | None) -> TensorType | None:
        given, f = _known(self, *types), self.factor
        *lead, channels, height, width = given.shape
        if channels % (f * f):
            raise GraphError(f"{self.label}: {channels} channels are no blocks of {f}x{f}")
        return given.with_shape((*lead, channels // (f * f), height * f, width * f))


# --- small helpers -----------------------------------------------------------------------------------------------


def slices(padding: Sides, step: tuple[int, ...] | None = None) -> tuple[Any, ...]:
    """The index that crops by a negative ``padding`` and takes every ``step``-th position that is left."""
    steps = step or (1,) * len(padding)
    return (
        Ellipsis,
        *(slice(-b if b else None, a or None, s if s > 1 else None) for (b, a), s in zip(padding, steps, strict=True)),
    )


def _identity(channels: int, spatial: int) -> Tensor:
    return torch.ones(channels, 1, *[1] * spatial, dtype=torch.float64)


def _known(op: Operator, *types: TensorType | None) -> TensorType:
    (given,) = types
    if given is None:
        raise GraphError(f"{op.label}: needs a tensor")
    return given


def _divisors(n: int) -> list[int]:
    return [d for d in range(n, 0, -1) if n % d == 0]


def _keeps_groups(chosen: Tensor, rows: Tensor, channels: int, groups: int) -> bool:
    same = chosen // (channels // groups) == rows // (len(rows) // groups)
    return bool((same | (chosen < 0)).all())


__all__ = [
    "Assign", "BorderFill", "Flip", "Gather", "Listed", "Pad", "Piece", "PixelShuffle", "PixelUnshuffle",
    "Rearrangement", "Roll", "Selection", "Shuffle", "Slice", "Subsample", "ZeroChannels", "selecting",
]  # fmt: skip
