"""Which linear operators are one linear operator? The local affine map, its two laws, and the exact border predicate.

A `Conv` is kernel, bias, stride, dilation, groups, padding (each side its own) and *what is padded*. It acts on the
channel axis followed by its spatial axes; everything before is batch. So ``nn.Linear`` is a `Conv` with no spatial
axis, whatever the rank of its input, and a batch norm over [N, C, L] has one.

**Composition** (per axis) of (k1, s1, p1, d1) then (k2, s2, p2, d2): stride s1 s2, padding p1 + s1 p2 on each side,
kernel extent d1 (k1 - 1) + s1 d2 (k2 - 1) + 1, groups gcd(g1, g2), bias b2 + sum W2 b1. The output sizes always agree.

**Sum** of two maps with one source, stride and output grid: kernels aligned by their offsets, then added.

**Border.** Zero padding is not shift-invariant. Let R be the positions outside the first map's output that the second
reads. The composition is linear-exact iff for no r in R a window of the first map at r touches real input; with a bias
the constant that the first map would have at r must also equal what the second pads with, or the difference becomes a
bias map at a fixed size. Refusals name the ring.

Everything is computed in float64: integers stay exact.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rgc.errors import GraphError, Refusal, require
from rgc.ir import Operator, TensorType

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
Size = tuple[int, ...]


class Linear(Operator):
    """Any linear operator of one input. ``B @ A`` is A followed by B; ``A + B`` is their sum; both may refuse."""

    affine: ClassVar[bool] = True

    @abstractmethod
    def as_conv(self, channels: int, spatial: int) -> Conv:
        """The same map of ``channels`` input channels as a `Conv` with ``spatial`` axes, or a refusal."""

    @property
    def channels(self) -> tuple[int, int] | None:
        """Input and output channels, or None where any number will do."""
        return None

    @property
    def spatial(self) -> int | None:
        """Number of spatial axes, or None where any number will do."""
        return None

    def as_linear(self) -> Linear:
        """The plainest linear operator that equals this one, or a refusal."""
        return self

    def __matmul__(self, first: Linear) -> Linear:
        return compose(self, first)

    def __add__(self, other: Linear) -> Linear:
        return add(self, other)


@dataclass(frozen=True, eq=False)
class Scale(Linear):
    """x * scale + shift along the channel axis. A scale of one element stands for every channel.

    ``scale`` and ``shift`` are [C] or [1]; the channel axis is the one before the ``axes`` trailing spatial axes.
    """

    scale: Tensor
    shift: Tensor
    axes: int | None = None

    def __post_init__(self) -> None:
        for name in ("scale", "shift"):
            if getattr(self, name).dim() != 1:
                shape = list(getattr(self, name).shape)
                raise GraphError(f"Scale: {name} must be one value per channel, got shape {shape}")
        sizes = {self.scale.numel(), self.shift.numel()} - {1}
        if len(sizes) > 1:
            raise GraphError(f"Scale: {self.scale.numel()} scales and {self.shift.numel()} shifts do not match")
        if sizes and self.axes is None:
            raise GraphError("Scale: a scale per channel needs the number of spatial axes")

    @property
    def channels(self) -> tuple[int, int] | None:
        count = max(self.scale.numel(), self.shift.numel())
        return None if count == 1 else (count, count)

    @property
    def spatial(self) -> int | None:
        return None if self.channels is None else self.axes

    @property
    def label(self) -> str:
        return "scale"

    @property
    def is_identity(self) -> bool:
        """Does it return its input unchanged?"""
        return bool((self.scale == 1).all()) and bool((self.shift == 0).all())

    def as_conv(self, channels: int, spatial: int) -> Conv:
        require(self.spatial in (None, spatial), "a scale and a convolution act on different axes")
        own = self.channels
        if own is not None and own[0] != channels:
            raise GraphError(f"Scale: {own[0]} channels meet a tensor of {channels} channels")
        scale, shift = (t.double().expand(channels) for t in (self.scale, self.shift))
        bias = shift.contiguous() if bool((shift != 0).any()) else None
        return Conv(scale.reshape(channels, 1, *[1] * spatial), bias, groups=channels)

    def evaluate(self, *inputs: Any) -> Any:
        (x,) = inputs
        shape = (-1, *[1] * (self.axes or 0))
        return x * self.scale.view(shape) + self.shift.view(shape)

    def infer(self, *types: TensorType | None) -> TensorType | None:
        return types[0]


@dataclass(frozen=True)
class Deferred:
    """A weight of known shape that is computed when somebody reads it, so that costs can be weighed before the work."""

    shape: Size
    compute: Callable[[], Tensor]


class _Weight:
    """The weight field of a `Conv`: a tensor, or a `Deferred` one that becomes a tensor on first reading."""

    def __get__(self, conv: Any, owner: type) -> Tensor:
        if conv is None:
            raise AttributeError("weight has no default")
        stored = conv.__dict__["weight"]
        if isinstance(stored, Deferred):
            stored = conv.__dict__["weight"] = stored.compute()
        return cast(Tensor, stored)

    def __set__(self, conv: Any, value: Tensor | Deferred) -> None:
        conv.__dict__["weight"] = value


@dataclass(frozen=True, eq=False)
class Conv(Linear):
    """A local affine map: convolution of any rank, ``nn.Linear`` (no spatial axis), or a transposed convolution.

    weight: [out, in / groups, *kernel] (transposed: [in, out / groups, *kernel], as torch has it).
    bias: [out], or, where ``size`` is fixed, a map [out, *output size]; None for no bias.
    stride, dilation, output_padding: one integer per axis (an integer stands for all axes).
    padding: (before, after) per axis (an integer for both sides of all axes).
    padding_mode: what is padded: "zeros" (or ``pad_value`` [in], a constant per channel), "reflect", "replicate",
    "circular".
    size: the only spatial input size at which the map holds; None for every size.
    """

    weight: _Weight = _Weight()
    bias: Tensor | None = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1
    padding_mode: PaddingMode = "zeros"
    pad_value: Tensor | None = None
    transposed: bool = False
    output_padding: Any = 0
    size: Size | None = None

    geometry: ClassVar[Mapping[str, Any]] = {
        "stride": 1, "padding": 0, "dilation": 1, "groups": 1, "padding_mode": "zeros", "pad_value": None,
        "transposed": False, "output_padding": 0, "size": None,
    }  # fmt: skip

    def __post_init__(self) -> None:
        if len(self.shape) < 2:
            raise GraphError(f"Conv: weight must be [out, in / groups, *kernel], got {list(self.shape)}")
        rank = len(self.shape) - 2
        for name in ("stride", "dilation", "output_padding"):
            object.__setattr__(self, name, _per_axis(name, getattr(self, name), rank))
        object.__setattr__(self, "padding", _both_sides(self.padding, rank))
        self._check()

    def _check(self) -> None:
        first, rank = self.shape[0], len(self.shape) - 2
        if self.groups < 1 or first % self.groups:
            raise GraphError(f"Conv: {first} channels do not divide into {self.groups} groups")
        if self.bias is not None and (self.bias.shape[0] != self.out_channels or self.bias.dim() not in (1, 1 + rank)):
            raise GraphError(f"Conv: bias {list(self.bias.shape)} does not fit {self.out_channels} output channels")
        if self.bias is not None and self.bias.dim() > 1 and self.size is None:
            raise GraphError("Conv: a bias map needs the input size at which it holds")
        if self.pad_value is not None and tuple(self.pad_value.shape) != (self.in_channels,):
            raise GraphError(f"Conv: pad_value {list(self.pad_value.shape)} must be one value per input channel")
        if self.pad_value is not None and self.padding_mode != "zeros":
            raise GraphError(f"Conv: a constant pad value contradicts padding mode {self.padding_mode!r}")
        if min(*self.kernel, *self.stride, *self.dilation, 1, 1) < 1:
            raise GraphError(f"Conv: kernel {self.kernel}, stride {self.stride} or dilation {self.dilation} is below 1")
        if min(*self.output_padding, 0, 0) < 0:
            raise GraphError(f"Conv: output padding {self.output_padding} is negative")
        if any(self.output_padding) and not self.transposed:
            raise GraphError("Conv: only a transposed convolution has an output padding")
        if self.transposed and any(before != after for before, after in self.padding):
            raise GraphError(f"Conv: a transposed convolution crops both sides alike, got padding {self.padding}")
        if self.transposed and (self.padding_mode != "zeros" or self.pad_value is not None):
            raise GraphError("Conv: a transposed convolution pads with zeros only")
        if self.size is not None and len(self.size) != rank:
            raise GraphError(f"Conv: size {self.size} does not name {rank} axes")
        self._check_bias_map()

    def _check_bias_map(self) -> None:
        if self.bias is None or self.bias.dim() == 1 or self.size is None:
            return
        found, expected = tuple(self.bias.shape[1:]), self.output_size(self.size)
        if found != expected:
            where = f"the output {list(expected)} at {list(self.size)}"
            raise GraphError(f"Conv: bias map {list(found)} does not fit {where}")

    @property
    def shape(self) -> Size:
        """The shape of the weight, known also where the weight is not computed yet."""
        return tuple(self.__dict__["weight"].shape)

    @property
    def kernel(self) -> Size:
        """Taps per axis."""
        return tuple(self.shape[2:])

    @property
    def in_channels(self) -> int:
        """Channels read."""
        return self.shape[0] if self.transposed else self.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        """Channels made."""
        return self.shape[1] * self.groups if self.transposed else self.shape[0]

    @property
    def channels(self) -> tuple[int, int]:
        return self.in_channels, self.out_channels

    @property
    def spatial(self) -> int:
        return len(self.shape) - 2

    @property
    def any_size(self) -> bool:
        return self.size is None

    @property
    def is_padded(self) -> bool:
        """Does any side read beyond the input?"""
        return any(before or after for before, after in self.padding)

    @property
    def is_pointwise(self) -> bool:
        """Does each output position read just the input at that position?"""
        plain = not self.is_padded and not any(self.output_padding)
        return plain and all(k == 1 for k in self.kernel) and all(s == 1 for s in self.stride)

    @property
    def label(self) -> str:
        if self.spatial == 0:
            return f"linear {self.in_channels}->{self.out_channels}"
        kernel = "x".join(map(str, self.kernel))
        stride = "" if set(self.stride) == {1} else f" /{'x'.join(map(str, dict.fromkeys(self.stride)))}"
        kind = "transposed conv" if self.transposed else "conv"
        groups = "" if self.groups == 1 else f" groups={self.groups}"
        extra = " + bias map" if self.bias is not None and self.bias.dim() > 1 else ""
        return f"{kind} {kernel} {self.in_channels}->{self.out_channels}{stride}{groups}{extra}"

    def as_conv(self, channels: int, spatial: int) -> Conv:
        require(spatial == self.spatial, f"{self.label} acts on other axes than its neighbour")
        if channels != self.in_channels:
            raise GraphError(f"{self.label}: expects {self.in_channels} channels, got {channels}")
        return self

    def output_size(self, size: Size) -> Size:
        """Spatial output size for a spatial input size (torch.nn.Conv2d and ConvTranspose2d, "Shape")."""
        axes = zip(size, self.kernel, self.stride, self.padding, self.dilation, self.output_padding, strict=True)
        if self.transposed:
            return tuple((n - 1) * s - b - a + d * (k - 1) + o + 1 for n, k, s, (b, a), d, o in axes)
        return tuple((n + b + a - d * (k - 1) - 1) // s + 1 for n, k, s, (b, a), d, _ in axes)

    def evaluate(self, *inputs: Any) -> Any:
        (x,) = inputs
        if self.size is not None and tuple(x.shape[x.dim() - self.spatial :]) != self.size:
            found = "x".join(map(str, x.shape[x.dim() - self.spatial :]))
            raise GraphError(f"{self.label}: holds at {'x'.join(map(str, self.size))} only, got {found}")
        bias = self.bias if self.bias is not None and self.bias.dim() == 1 else None
        y = self._convolve(x, bias)
        return y if self.bias is None or bias is not None else y + self.bias

    def _convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.spatial == 0:
            return F.linear(x, ungrouped(self).weight, bias)
        convolve, transposed = _CONVOLUTIONS[self.spatial]
        if self.transposed:
            before = [b for b, _ in self.padding]
            return transposed(
                x, self.weight, bias, self.stride, before, self.output_padding, self.groups, self.dilation
            )
        if self.padding_mode == "zeros" and self.pad_value is None and all(b == a >= 0 for b, a in self.padding):
            return convolve(x, self.weight, bias, self.stride, [b for b, _ in self.padding], self.dilation, self.groups)
        return convolve(pad(x, self), self.weight, bias, self.stride, 0, self.dilation, self.groups)

    def infer(self, *types: TensorType | None) -> TensorType | None:
        (given,) = types
        if given is None or len(given.shape) <= self.spatial:
            raise GraphError(f"{self.label}: needs a tensor with {self.spatial + 1} axes or more, got {given}")
        axis = len(given.shape) - self.spatial - 1
        if given.shape[axis] != self.in_channels:
            raise GraphError(f"{self.label}: weight expects {self.in_channels} input channels, got {given.shape[axis]}")
        return given.with_shape((*given.shape[:axis], self.out_channels, *self.output_size(given.shape[axis + 1 :])))


def compose(second: Linear, first: Linear, size: Size | None = None) -> Linear:
    """``first`` followed by ``second`` as one operator; ``size`` is the spatial input size where it is fixed.

    Without ``size`` the result holds at every size; with it, it may carry a bias map and hold at that size only.
    Raises a `Refusal` that names what stands in the way.
    """
    second, first = second.as_linear(), first.as_linear()
    if isinstance(second, Scale) and isinstance(first, Scale) and _same_axes(second, first):
        scale = second.scale.double() * first.scale.double()
        shift = second.scale.double() * first.shift.double() + second.shift.double()
        return Scale(scale, shift, first.axes if first.channels else second.axes)
    a, b = _as_convs(second, first)
    if b.out_channels != a.in_channels:
        raise GraphError(f"{b.label} makes {b.out_channels} channels, {a.label} reads {a.in_channels}")
    size = _common_size(a, b, size)
    if isinstance(first, Scale) and first.is_identity:
        return a
    if a.transposed or b.transposed:
        return _compose_transposed(a, b, size)
    anywhere = border(a, b, None)
    if anywhere is not None:
        if size is None:
            raise anywhere
        here = border(a, b, size)
        if here is not None:
            raise here
    return _with_bias(_linear_part(a, b), a, b, size, pinned=anywhere is not None)


def add(left: Linear, right: Linear, size: Size | None = None) -> Linear:
    """The sum of two operators of one source as one operator, or a `Refusal`: same stride, same output grid."""
    left, right = left.as_linear(), right.as_linear()
    if isinstance(left, Scale) and isinstance(right, Scale) and _same_axes(left, right):
        scale = left.scale.double() + right.scale.double()
        return Scale(scale, left.shift.double() + right.shift.double(), left.axes if left.channels else right.axes)
    a, b = _as_convs(left, right, parallel=True)
    require(a.channels == b.channels, f"{a.label} and {b.label} make different channels, so their sum broadcasts")
    require(a.stride == b.stride, f"strides differ: {a.stride} and {b.stride}")
    require(a.transposed == b.transposed, "a convolution and a transposed convolution")
    size = _common_size(a, b, size, parallel=True)
    pinned = a.size or b.size
    if a.transposed:
        return _add_transposed(a, b)
    if _reach(a) != _reach(b):
        reason = f"{a.label} and {b.label} have different output sizes"
        require(size is not None and a.output_size(size) == b.output_size(size), reason)
        pinned = size
    mode, value = _common_padding(a, b)
    groups = math.gcd(a.groups, b.groups)
    axes = [_align(a, b, axis) for axis in range(a.spatial)]
    shape = (a.out_channels, a.in_channels // groups, *(axis.taps for axis in axes))
    weight = Deferred(shape, lambda: _sum_of_kernels(a, b, groups, axes))
    total = _sum_of_biases(a.bias, b.bias)
    return Conv(
        weight, total, a.stride, tuple(axis.padding for axis in axes), tuple(axis.dilation for axis in axes),
        groups, mode, value, size=pinned,
    )  # fmt: skip


def unit() -> Scale:
    """The identity on any channels and axes."""
    return Scale(torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))


def border(second: Conv, first: Conv, size: Size | None) -> Refusal | None:
    """Why the linear part of ``first`` then ``second`` is not one convolution, or None if it is, exactly.

    Exact iff no window of ``first`` at a position outside its output that ``second`` reads touches real input
    (DESIGN section 4). ``size=None`` asks for every input size at once.
    """
    padded = [axis for axis, sides in enumerate(second.padding) if any(sides)]
    if not padded:
        return None
    if second.padding_mode != "zeros":
        return _border_of_copies(second, first, size, padded)
    if first.is_padded and first.padding_mode != "zeros":
        return Refusal(f"{first.label} pads by {first.padding_mode} where {second.label} pads zeros around its output")
    rings = [_Ring.of(first, second, axis, None if size is None else size[axis]) for axis in range(first.spatial)]
    offenders = [axis for axis, ring in enumerate(rings) if ring.touched]
    for axis in offenders:
        if all(ring.reads_input for other, ring in enumerate(rings) if other != axis):
            width = max(second.padding[axis])
            return Refusal(
                f"border ring: {second.label} reads a ring {width} wide around the output of {first.label} as zeros, "
                f"but there (axis {axis}, {rings[axis].touched} side) a window of {first.label} would still touch "
                "real input; pad once, before the first of the two, to make them one"
            )
    return None


def pad(x: Tensor, conv: Conv) -> Tensor:
    """``x`` padded as ``conv`` pads it, along its last spatial axes."""
    amounts = [amount for sides in reversed(conv.padding) for amount in sides]
    if conv.padding_mode != "zeros":
        return F.pad(x, amounts, mode=conv.padding_mode)
    padded = F.pad(x, amounts)
    if conv.pad_value is None:
        return padded
    shape = (-1, *[1] * conv.spatial)
    outside = 1 - F.pad(x.new_ones(x.shape[x.dim() - conv.spatial :]), amounts)
    return padded + conv.pad_value.to(x.dtype).view(shape) * outside


def regrouped(conv: Conv, groups: int) -> Conv:
    """The same convolution with fewer ``groups`` (a divisor of its own), the weight filled up with zeros."""
    if groups == conv.groups:
        return conv
    ratio = conv.groups // groups
    rows, columns = conv.weight.shape[0] // conv.groups, conv.weight.shape[1]
    w = conv.weight.reshape(groups, ratio, rows, columns, *conv.kernel)
    wide = w.new_zeros(groups, ratio, rows, ratio, columns, *conv.kernel)
    for index in range(ratio):
        wide[:, index, :, index] = w[:, index]
    return replace(conv, weight=wide.reshape(conv.weight.shape[0], ratio * columns, *conv.kernel), groups=groups)


def ungrouped(conv: Conv) -> Conv:
    """The same convolution with one group."""
    return regrouped(conv, 1)


# --- composition -------------------------------------------------------------------------------------------------


def _linear_part(second: Conv, first: Conv) -> Conv:
    axes = list(zip(first.kernel, first.stride, first.dilation, second.kernel, second.dilation, strict=True))
    steps = [(d1 if k1 > 1 else 0, s1 * d2 if k2 > 1 else 0) for k1, s1, d1, k2, d2 in axes]
    dilation = tuple(math.gcd(*step) or 1 for step in steps)
    inner = [step1 // d for (step1, _), d in zip(steps, dilation, strict=True)]
    outer = [step2 // d for (_, step2), d in zip(steps, dilation, strict=True)]
    groups = math.gcd(first.groups, second.groups)
    extents = zip(inner, outer, first.kernel, second.kernel, strict=True)
    extent = tuple(i * (k1 - 1) + o * (k2 - 1) + 1 for i, o, k1, k2 in extents)
    shape = (second.out_channels, first.in_channels // groups, *extent)
    weight = Deferred(shape, lambda: _compose_kernels(second, first, inner, outer))
    padding = tuple(
        (b1 + s1 * b2, a1 + s1 * a2)
        for (b1, a1), s1, (b2, a2) in zip(first.padding, first.stride, second.padding, strict=True)
    )
    stride = tuple(s1 * s2 for s1, s2 in zip(first.stride, second.stride, strict=True))
    padded = [conv for conv in (second, first) if conv.is_padded]
    mode: PaddingMode = next((conv.padding_mode for conv in padded if conv.padding_mode != "zeros"), "zeros")
    value = first.pad_value if first.is_padded else None
    return Conv(weight, None, stride, padding, dilation, groups, mode, value)


def _compose_kernels(second: Conv, first: Conv, inner: list[int], outer: list[int]) -> Tensor:
    """W[o, i] = sum over m of W2[o, m] W1[m, i], taps at inner j1 + outer j2; groups stay block-diagonal."""
    if second.groups % first.groups and first.groups % second.groups:
        first = regrouped(first, math.gcd(first.groups, second.groups))
    w1, w2 = first.weight.double(), second.weight.double()
    middle, split = first.out_channels, max(first.groups, second.groups)
    if second.groups >= first.groups:  # each group of the second reads one block of rows of the first
        left = w2.reshape(split, -1, middle // split, *second.kernel)
        right = w1.reshape(split, middle // split, -1, *first.kernel)
    else:  # each group of the second reads several whole groups of the first
        per = first.groups // second.groups
        left = w2.reshape(second.groups, -1, per, middle // split, *second.kernel)
        left = left.transpose(1, 2).reshape(split, -1, middle // split, *second.kernel)
        right = w1.reshape(split, middle // split, -1, *first.kernel)
    extent = [
        i * (k1 - 1) + o * (k2 - 1) + 1 for i, o, k1, k2 in zip(inner, outer, first.kernel, second.kernel, strict=True)
    ]
    rows, columns = left.shape[1], right.shape[2]
    product = w1.new_zeros(split, rows, columns, *extent)
    taps, flat = left.reshape(split, rows, middle // split, -1), right.reshape(split, middle // split, -1)
    for index, tap in enumerate(itertools.product(*map(range, second.kernel))):
        window: tuple[slice, ...] = tuple(
            slice(o * j, o * j + i * (k1 - 1) + 1, max(i, 1))
            for i, o, j, k1 in zip(inner, outer, tap, first.kernel, strict=True)
        )
        block = torch.bmm(taps[..., index], flat) if middle > split else taps[..., index] * flat
        product[(slice(None), slice(None), slice(None), *window)] += block.reshape(split, rows, columns, *first.kernel)
    if second.groups >= first.groups:
        return product.reshape(second.out_channels, columns, *extent)
    per = first.groups // second.groups
    product = product.reshape(second.groups, per, rows, columns, *extent).transpose(1, 2)
    return product.reshape(second.out_channels, per * columns, *extent)


def _with_bias(linear: Conv, second: Conv, first: Conv, size: Size | None, pinned: bool) -> Conv:
    maps = [conv.bias for conv in (first, second) if conv.bias is not None and conv.bias.dim() > 1]
    if not maps and _ring_is_constant(second, first):
        bias = _pushed_bias(second, first)
        return _changed(linear, bias=bias, size=size if pinned or first.size or second.size else None)
    if size is None:
        raise Refusal(
            f"{second.label} reads a ring around the output of {first.label} as "
            f"{'zeros' if second.pad_value is None else 'its pad value'}, not as its bias: "
            "exact only with a bias map at a fixed size (--passes all)"
        )
    at_zero = _response_to_zero(second, first, size)
    return _changed(linear, bias=_without_constant_axes(at_zero[0]), pad_value=None, size=size)


def _ring_is_constant(second: Conv, first: Conv) -> bool:
    """Does ``second`` pad with just what ``first`` would be outside: its bias plus the pad value it would see?"""
    if not second.is_padded:
        return True
    if second.padding_mode != "zeros":
        return True  # the ring repeats outputs, bias included; border() has vetted the rest
    outside = torch.zeros(first.out_channels, dtype=torch.float64)
    if first.bias is not None:
        outside = outside + first.bias.double().cpu()
    if first.is_padded and first.pad_value is not None:
        total = _sum_of_taps(ungrouped(first))
        outside = outside + (total @ first.pad_value.double()).cpu()
    padded = torch.zeros_like(outside) if second.pad_value is None else second.pad_value.double().cpu()
    scale = torch.maximum(outside.abs().max(), padded.abs().max())  # the two may have been computed in other orders
    return bool(((outside - padded).abs() <= 8 * torch.finfo(torch.float64).eps * scale).all())


def _pushed_bias(second: Conv, first: Conv) -> Tensor | None:
    if first.bias is None:
        return None if second.bias is None else second.bias.double()
    total = _sum_of_taps(second)
    grouped = total.reshape(second.groups, -1, total.shape[1])
    pushed = (grouped @ first.bias.double().reshape(second.groups, -1, 1)).flatten()
    return pushed if second.bias is None else pushed + second.bias.double()


def _response_to_zero(second: Conv, first: Conv, size: Size) -> Tensor:
    """What the two maps in a row make of zeros: the bias map of their composition, [1, out, *output size]."""
    first, second = first.cast(torch.float64), second.cast(torch.float64)
    return cast(Tensor, second.evaluate(first.evaluate(first.weight.new_zeros(1, first.in_channels, *size))))


def _compose_transposed(second: Conv, first: Conv, size: Size | None) -> Conv:
    """A transposed convolution and a pointwise one: y = W^T x upsampled, so channels mix exactly on either side."""
    if first.transposed:
        require(
            not second.transposed and second.is_pointwise,
            f"only a pointwise layer merges into {first.label}; found {second.label}",
        )
        kernel = _compose_kernels(second, _untransposed(first), [1] * first.spatial, [0] * first.spatial)
    else:
        require(first.is_pointwise, f"only a pointwise layer merges into {second.label}; found {first.label}")
        plain = _untransposed(second)
        kernel = _compose_kernels(plain, first, [0] * first.spatial, [1] * first.spatial)
    geometry = first if first.transposed else second
    groups = math.gcd(first.groups, second.groups)
    pinned = size if first.size or second.size else None
    merged = replace(geometry, weight=_retransposed(kernel, groups), bias=None, groups=groups, size=pinned)
    if (
        first.transposed
        and (first.bias is None or first.bias.dim() == 1)
        and (second.bias is None or second.bias.dim() == 1)
    ):
        return replace(merged, bias=_pushed_bias(second, first))
    if first.bias is None or not bool((first.bias != 0).any()):
        return replace(merged, bias=None if second.bias is None else second.bias.double())
    if size is None:
        raise Refusal(
            f"the bias of {first.label} reaches the border and the gaps of {second.label} unevenly: "
            "exact only with a bias map at a fixed size (--passes all)"
        )
    at_zero = _response_to_zero(second, first, size)
    return replace(merged, bias=_without_constant_axes(at_zero[0]), size=size)


def _untransposed(conv: Conv) -> Conv:
    """The weight of a transposed convolution as [out, in / groups, *kernel]; only channels matter to the caller."""
    w = conv.weight.reshape(conv.groups, -1, *conv.weight.shape[1:]).transpose(1, 2)
    return Conv(w.reshape(conv.out_channels, -1, *conv.kernel), groups=conv.groups)


def _retransposed(weight: Tensor, groups: int) -> Tensor:
    w = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2)
    return w.reshape(groups * weight.shape[1], -1, *weight.shape[2:]).contiguous()


# --- the border --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ring:
    """What ``second`` reads outside the output of ``first`` on one axis."""

    touched: str  # the side on which a window of the first map out there touches real input, or ""
    reads_input: bool  # does any window that is read, in or out, touch real input?

    @staticmethod
    def of(first: Conv, second: Conv, axis: int, n: int | None) -> _Ring:
        k1, s1, d1, (before, after) = (
            first.kernel[axis], first.stride[axis], first.dilation[axis], first.padding[axis],
        )  # fmt: skip
        outer_before, outer_after = second.padding[axis]
        if n is None:  # the worst case over all sizes, in closed form
            starts = (j * second.dilation[axis] - outer_before for j in range(second.kernel[axis]))
            nearest = [start % -second.stride[axis] or -second.stride[axis] for start in starts if start < 0]
            left = any(d1 * (k1 - 1) + s1 * position >= before for position in nearest)
            right = outer_after > 0 and d1 * (k1 - 1) > after
            return _Ring("leading" if left else "trailing" if right else "", True)
        inside = (n + before + after - d1 * (k1 - 1) - 1) // s1 + 1
        span = inside + outer_before + outer_after - second.dilation[axis] * (second.kernel[axis] - 1)
        outputs = range((span - 1) // second.stride[axis] + 1)
        taps = range(second.kernel[axis])
        read = {o * second.stride[axis] + j * second.dilation[axis] - outer_before for o in outputs for j in taps}
        touching = {r for r in read if any(0 <= r * s1 + j * d1 - before < n for j in range(k1))}
        left, right = any(r < 0 for r in touching), any(r >= inside for r in touching)
        return _Ring("leading" if left else "trailing" if right else "", bool(touching))


def _border_of_copies(second: Conv, first: Conv, size: Size | None, padded: list[int]) -> Refusal | None:
    """reflect, replicate, circular: padding copies outputs, so it commutes with what treats all positions alike."""
    mode = second.padding_mode
    plain = all(first.kernel[axis] == 1 and first.stride[axis] == 1 and not any(first.padding[axis]) for axis in padded)
    if plain and (not first.is_padded or (first.padding_mode == mode and first.pad_value is None)):
        return None
    same = all(
        s == 1 and b + a == d * (k - 1)
        for k, s, d, (b, a) in zip(first.kernel, first.stride, first.dilation, first.padding, strict=True)
    )
    if mode == "circular" and first.padding_mode == "circular" and same:
        reach = [max(b1 + b2, a1 + a2) for (b1, a1), (b2, a2) in zip(first.padding, second.padding, strict=True)]
        if size is None:
            return Refusal(
                f"circular padding of {max(reach)} must not wrap twice: exact at a fixed size (--passes all)"
            )
        wraps = any(r > n for r, n in zip(reach, size, strict=True))
        return Refusal(f"circular padding of {reach} would wrap twice around an input of {size}") if wraps else None
    return Refusal(f"{second.label} pads by {mode}, which commutes only with a pointwise layer; found {first.label}")


# --- sums --------------------------------------------------------------------------------------------------------


def _sum_of_kernels(a: Conv, b: Conv, groups: int, axes: list[_Alignment]) -> Tensor:
    wa, wb = (regrouped(conv, groups).weight.double() for conv in (a, b))
    weight = wa.new_zeros(a.out_channels, a.in_channels // groups, *(axis.taps for axis in axes))
    for w, index in ((wa, 0), (wb, 1)):
        weight[(slice(None), slice(None), *(axis.place[index] for axis in axes))] += w
    return weight


@dataclass(frozen=True)
class _Alignment:
    taps: int
    dilation: int
    padding: tuple[int, int]
    place: tuple[slice, slice]  # where each kernel lies in the common one


def _align(a: Conv, b: Conv, axis: int) -> _Alignment:
    starts = [-conv.padding[axis][0] for conv in (a, b)]
    steps = [conv.dilation[axis] for conv in (a, b)]
    counts = [conv.kernel[axis] for conv in (a, b)]
    first = min(starts)
    last = max(start + step * (count - 1) for start, step, count in zip(starts, steps, counts, strict=True))
    offsets = [abs(starts[0] - starts[1]), *(step for step, count in zip(steps, counts, strict=True) if count > 1)]
    dilation = math.gcd(*offsets) or 1
    place = tuple(
        slice(
            (start - first) // dilation, (start - first + step * (count - 1)) // dilation + 1, max(step // dilation, 1)
        )
        for start, step, count in zip(starts, steps, counts, strict=True)
    )
    after = min(_reach(a)[axis], _reach(b)[axis]) + 1 + last  # keeps the output grid of both
    return _Alignment((last - first) // dilation + 1, dilation, (-first, after), cast(tuple[slice, slice], place))


def _reach(conv: Conv) -> Size:
    """before + after - d (k - 1) - 1 per axis: equal reach means equal output size for every input size."""
    return tuple(b + a - d * (k - 1) - 1 for (b, a), d, k in zip(conv.padding, conv.dilation, conv.kernel, strict=True))


def _common_padding(a: Conv, b: Conv) -> tuple[PaddingMode, Tensor | None]:
    padded = [conv for conv in (a, b) if conv.is_padded]
    if not padded:
        return "zeros", None
    require(
        all(conv.padding_mode == padded[0].padding_mode for conv in padded),
        f"padding modes differ: {a.padding_mode} and {b.padding_mode}",
    )
    values = [torch.zeros(a.in_channels) if c.pad_value is None else c.pad_value.cpu() for c in padded]
    require(
        all(torch.equal(value.double(), values[0].double()) for value in values),
        "the two branches pad with different constants",
    )
    return padded[0].padding_mode, padded[0].pad_value


def _add_transposed(a: Conv, b: Conv) -> Conv:
    same = all(
        getattr(a, name) == getattr(b, name) for name in ("kernel", "padding", "dilation", "output_padding", "groups")
    )
    require(same, f"{a.label} and {b.label}: transposed branches are added only where their geometry is the same")
    size = a.size or b.size
    return replace(a, weight=a.weight.double() + b.weight.double(), bias=_sum_of_biases(a.bias, b.bias), size=size)


def _sum_of_biases(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    given = [bias.double() for bias in (a, b) if bias is not None]
    if not given:
        return None
    rank = max(bias.dim() for bias in given)
    total = sum(bias.reshape(*bias.shape, *[1] * (rank - bias.dim())) for bias in given)
    return cast(Tensor, total)


# --- small helpers -----------------------------------------------------------------------------------------------


def _as_convs(second: Linear, first: Linear, parallel: bool = False) -> tuple[Conv, Conv]:
    """Both as convolutions: what one leaves open (channels, axes) is taken from the other."""
    second, first = second.as_linear(), first.as_linear()
    spatial = first.spatial if first.spatial is not None else second.spatial
    require(spatial is not None, "neither operator says on which axes it acts")
    outer, inner = second.channels, first.channels
    known = inner or outer
    require(known is not None, "neither operator says how many channels it reads")
    assert known is not None and spatial is not None
    entering = (inner or known)[0]
    b = first.as_conv(entering, spatial)
    a = second.as_conv(entering if parallel else b.out_channels, spatial)
    return _changed(a), _changed(b)  # the laws account for every field, so every field counts as read


def _same_axes(a: Scale, b: Scale) -> bool:
    if a.channels is None or b.channels is None:
        return True
    require(a.axes == b.axes, "the two scales act on different axes")
    if a.channels != b.channels:
        raise GraphError(f"Scale: {b.channels[0]} channels meet a scale of {a.channels[0]} channels")
    return True


def _common_size(second: Conv, first: Conv, size: Size | None, parallel: bool = False) -> Size | None:
    known = first.size or size or (second.size if parallel else None)
    if first.size is not None and size is not None and first.size != size:
        raise GraphError(f"{first.label} holds at {first.size}, used at {size}")
    if second.size is None:
        return known
    require(known is not None, f"{second.label} holds at one size only, and the size before it is free")
    assert known is not None
    reached = known if parallel else first.output_size(known)
    if reached != second.size:
        raise GraphError(f"{second.label} holds at {second.size}, used at {reached}")
    return known


def _without_constant_axes(bias_map: Tensor) -> Tensor:
    """A bias map that is the same everywhere is an ordinary bias."""
    flat = bias_map.reshape(bias_map.shape[0], -1)
    return flat[:, 0].contiguous() if bool((flat == flat[:, :1]).all()) else bias_map


def _changed(conv: Conv, **changes: Any) -> Conv:
    """`dataclasses.replace` that leaves a deferred weight deferred."""
    fields = {name: getattr(conv, name) for name in ("bias", *conv.geometry)}
    return Conv(**{"weight": conv.__dict__["weight"], **fields, **changes})


def _sum_of_taps(conv: Conv) -> Tensor:
    return conv.weight.double().reshape(*conv.weight.shape[:2], -1).sum(dim=-1)


def _per_axis(name: str, value: Any, rank: int) -> Size:
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(values) != rank:
        raise GraphError(f"Conv: {name} {value} does not name {rank} axes")
    return values


def _both_sides(value: Any, rank: int) -> tuple[tuple[int, int], ...]:
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(values) != rank:
        raise GraphError(f"Conv: padding {value} does not name {rank} axes")
    return tuple((side, side) if isinstance(side, int) else (side[0], side[1]) for side in values)


_CONVOLUTIONS: dict[int, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    1: (F.conv1d, F.conv_transpose1d),
    2: (F.conv2d, F.conv_transpose2d),
    3: (F.conv3d, F.conv_transpose3d),
}
