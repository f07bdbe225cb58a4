"""Which linear operators are one linear operator? The local affine map, its two laws, and the exact border predicate.

A `Conv` is kernel, bias, stride, dilation, groups, padding (each side its own) and *what is padded*. It acts on the
channel axis followed by its spatial axes; everything before is batch. So ``nn.Linear`` is a `Conv` with no spatial
axis, whatever the rank of its input, and a batch norm over [N, C, L] has one.

**Composition** (per axis, `rgc.axis`) of (k1, s1, p1, d1) then (k2, s2, p2, d2): stride s1 s2, padding p1 + s1 p2 on
each side, kernel extent d1 (k1 - 1) + s1 d2 (k2 - 1) + 1, groups gcd(g1, g2), bias b2 + sum W2 b1. The output sizes
always agree.

**Sum** of two maps with one source, stride and output grid: kernels aligned by their offsets, then added.

**Border.** Zero padding is not shift-invariant. Let R be the positions outside the first map's output that the second
reads. The linear part is exact iff for no r in R a window of the first map at r touches real input. The constant part
is exact as a bias if what the first map would have at r equals what the second pads with. If not, in this order: at a
fixed size, a bias map; where the first map is one factor per channel, another pad value; where one tap of it tells
inside from outside (`rgc.axis.inside_tap`), an implicit channel of ones beside the input, which is 1 inside and padded
with 0, and for which groups are given up. Refusals name the ring.

Everything is computed in float64: integers stay exact.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rgc.axis import Axis, align_axes, compose_axes, copies, inside_tap, ring
from rgc.errors import GraphError, Refusal, require
from rgc.ir import Operator, TensorType
from rgc.kernels import Kernel, add_kernels, compose_kernels, regroup, transpose_kernel
from rgc.precision import in_float64

#: Into a sum goes no pad value whose rounding grows by more than this there: the proof of the model allows 8 in all.
LARGEST_AMPLIFICATION = 4.0

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

    def spatial_axes(self, given: TensorType) -> int | None:
        return self.spatial

    def as_linear(self) -> Linear:
        """The plainest linear operator that equals this one, or a refusal."""
        return self

    def at(self, size: Size | None) -> Linear:
        """The same, said more plainly where that holds at the spatial input size ``size`` (None: at every size)."""
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
        shape = (-1, *[1] * (self.axes or 0)) if x.dim() else ()  # a single number stays one
        return x * self.scale.view(shape) + self.shift.view(shape)

    def infer(self, *types: TensorType | None) -> TensorType | None:
        return types[0]


@dataclass(frozen=True)
class Deferred:
    """A weight or bias of known shape that is computed when somebody reads it, so that costs are weighed first."""

    shape: Size
    compute: Callable[[], Tensor]


class _Weight:
    """The weight field of a `Conv`: a tensor, or a `Deferred` one that becomes a tensor on first reading."""

    def __get__(self, conv: Any, owner: type) -> Tensor:
        if conv is None:
            raise AttributeError("weight has no default")
        return cast(Tensor, _computed(conv, "weight"))

    def __set__(self, conv: Any, value: Tensor | Deferred) -> None:
        conv.__dict__["weight"] = value


class _Bias:
    """The bias field of a `Conv`: as its weight, or None, which is the default."""

    def __get__(self, conv: Any, owner: type) -> Tensor | None:
        return None if conv is None else _computed(conv, "bias")

    def __set__(self, conv: Any, value: Tensor | Deferred | None) -> None:
        conv.__dict__["bias"] = value


def _computed(conv: Any, name: str) -> Tensor | None:
    stored: Tensor | Deferred | None = conv.__dict__[name]
    if isinstance(stored, Deferred):
        with in_float64():
            stored = stored.compute()
        conv.__dict__[name] = stored
    return stored


@dataclass(frozen=True, eq=False)
class Conv(Linear):
    """A local affine map: convolution of any rank, ``nn.Linear`` (no spatial axis), or a transposed convolution.

    weight: [out, in / groups, *kernel] (transposed: [in, out / groups, *kernel], as torch has it).
    bias: [out], or, where ``size`` is fixed, a map [out, *output size]; None for no bias.
    stride, dilation, output_padding: one integer per axis (an integer stands for all axes).
    padding: (before, after) per axis (an integer for both sides of all axes); negative amounts crop.
    padding_mode: what is padded: "zeros" (or ``pad_value`` [in], a constant per channel), "reflect", "replicate",
    "circular".
    ones: [out, *kernel], the weight of an implicit input channel that is 1 inside and padded with 0; None for none.
    size: the only spatial input size at which the map holds; None for every size.
    """

    weight: _Weight = _Weight()
    bias: _Bias = _Bias()
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1
    padding_mode: PaddingMode = "zeros"
    pad_value: Tensor | None = None
    transposed: bool = False
    output_padding: Any = 0
    ones: Tensor | None = None
    size: Size | None = None

    geometry: ClassVar[Mapping[str, Any]] = {
        "stride": 1, "padding": 0, "dilation": 1, "groups": 1, "padding_mode": "zeros", "pad_value": None,
        "transposed": False, "output_padding": 0, "ones": None, "size": None,
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
        bias = self.bias_shape
        if bias is not None and (bias[0] != self.out_channels or len(bias) not in (1, 1 + rank)):
            raise GraphError(f"Conv: bias {list(bias)} does not fit {self.out_channels} output channels")
        if self.has_bias_map and self.size is None:
            raise GraphError("Conv: a bias map needs the input size at which it holds")
        if self.pad_value is not None and tuple(self.pad_value.shape) != (self.in_channels,):
            raise GraphError(f"Conv: pad_value {list(self.pad_value.shape)} must be one value per input channel")
        if self.pad_value is not None and self.padding_mode != "zeros":
            raise GraphError(f"Conv: a constant pad value contradicts padding mode {self.padding_mode!r}")
        if min(*self.kernel, *self.stride, *self.dilation, 1, 1) < 1:
            raise GraphError(f"Conv: kernel {self.kernel}, stride {self.stride} or dilation {self.dilation} is below 1")
        if min(*self.output_padding, 0, 0) < 0:
            raise GraphError(f"Conv: output padding {self.output_padding} is negative")
        if self.transposed and min(*itertools.chain(*self.padding), 0, 0) < 0:
            raise GraphError(f"Conv: the padding {self.padding} of a transposed convolution is negative")
        if self.ones is not None and tuple(self.ones.shape) != (self.out_channels, *self.kernel):
            raise GraphError(f"Conv: ones {list(self.ones.shape)} must be [out, *kernel]")
        if self.ones is not None and (self.groups != 1 or self.padding_mode != "zeros"):
            raise GraphError("Conv: a channel of ones needs one group and padding by constants")
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
        if self.bias_shape is None or not self.has_bias_map or self.size is None:
            return
        found, expected = self.bias_shape[1:], self.output_size(self.size)
        if found != expected:
            where = f"the output {list(expected)} at {list(self.size)}"
            raise GraphError(f"Conv: bias map {list(found)} does not fit {where}")

    @property
    def shape(self) -> Size:
        """The shape of the weight, known also where the weight is not computed yet."""
        return tuple(self.__dict__["weight"].shape)

    @property
    def bias_shape(self) -> Size | None:
        """The shape of the bias, known also where the bias is not computed yet."""
        stored = self.__dict__["bias"]
        return None if stored is None else tuple(stored.shape)

    @property
    def has_bias_map(self) -> bool:
        """Does what it adds differ from position to position?"""
        return self.bias_shape is not None and len(self.bias_shape) > 1

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
    def reach(self) -> tuple[int, int]:
        extents = (d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))
        return max(extents, default=0), 1 if self.transposed else max(self.stride, default=1)

    @property
    def any_size(self) -> bool:
        return self.size is None

    @property
    def is_padded(self) -> bool:
        """Does any side read beyond the input?"""
        return any(before > 0 or after > 0 for before, after in self.padding)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The window on each axis."""
        return tuple(map(Axis, self.kernel, self.stride, self.dilation, *zip(*self.padding, strict=True)))

    @property
    def kernels(self) -> Kernel:
        """The weight in float64 as [out, in / groups, *kernel], also of a transposed convolution."""
        kernel = Kernel(self.weight.double(), self.groups)
        return transpose_kernel(kernel) if self.transposed else kernel

    @property
    def is_pointwise(self) -> bool:
        """Does each output position read just the input at that position?"""
        return not any(self.output_padding) and all(axis.is_pointwise for axis in self.axes)

    @property
    def maps_channels(self) -> bool:
        """Is it the same map of the channels at every position, whatever the size?"""
        return self.is_pointwise and not self.transposed and self.size is None

    @property
    def reads_one_element(self) -> bool:
        """Does each output position read one element of the input, none of them padding?"""
        return not self.transposed and set(self.kernel) <= {1} and not any(itertools.chain(*self.padding))

    @property
    def reads_whole_map(self) -> bool:
        """Is its one size that of its kernel, so that it is a linear layer of the flattened map?"""
        plain = not self.transposed and self.groups == 1 and self.ones is None
        return self.spatial > 0 and self.size == self.kernel and plain and not any(itertools.chain(*self.padding))

    @property
    def label(self) -> str:
        if self.spatial == 0:
            return f"linear {self.in_channels}->{self.out_channels}"
        kernel = "x".join(map(str, self.kernel))
        stride = "" if set(self.stride) == {1} else f" /{'x'.join(map(str, dict.fromkeys(self.stride)))}"
        kind = "transposed conv" if self.transposed else "conv"
        groups = "" if self.groups == 1 else f" groups={self.groups}"
        extra = " + bias map" if self.has_bias_map else ""
        extra += "" if self.ones is None else " + ones"
        return f"{kind} {kernel} {self.in_channels}->{self.out_channels}{stride}{groups}{extra}"

    @property
    def extras(self) -> tuple[str, ...]:
        """What has to run around PyTorch's own convolution, which knows neither ones, nor uneven padding, nor maps."""
        shifted = self.is_padded and self.pad_value is not None and not self.pads_evenly
        uneven = any(before != after or before < 0 for before, after in self.padding)
        padded = uneven or self.pads_evenly
        present = {"sub": shifted, "ones": self.ones is not None, "pad": padded, "add": self.has_bias_map}
        return tuple(name for name, needed in present.items() if needed)

    @property
    def pads_evenly(self) -> bool:
        """Does it pad with one and the same constant in all channels?"""
        value = self.pad_value
        return self.is_padded and self.ones is None and value is not None and bool((value == value[0]).all())

    def as_conv(self, channels: int, spatial: int) -> Conv:
        require(spatial == self.spatial, f"{self.label} acts on other axes than its neighbour")
        if channels != self.in_channels:
            raise GraphError(f"{self.label}: expects {self.in_channels} channels, got {channels}")
        return self

    def output_size(self, size: Size) -> Size:
        """Spatial output size for a spatial input size (torch.nn.Conv2d and ConvTranspose2d, "Shape")."""
        axes = list(zip(size, self.axes, self.output_padding, strict=True))
        if self.transposed:
            return tuple(
                (n - 1) * a.stride - a.before - a.after + a.dilation * (a.kernel - 1) + o + 1 for n, a, o in axes
            )
        return tuple(axis.output_size(n) for n, axis, _ in axes)

    def evaluate(self, *inputs: Any) -> Any:
        (x,) = inputs
        if self.size is not None and tuple(x.shape[x.dim() - self.spatial :]) != self.size:
            found = "x".join(map(str, x.shape[x.dim() - self.spatial :]))
            raise GraphError(f"{self.label}: holds at {'x'.join(map(str, self.size))} only, got {found}")
        bias = None if self.has_bias_map else self.bias
        y = self._convolve(x, bias)
        return y if self.bias is None or bias is not None else y + self.bias

    def _convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.spatial == 0:
            return F.linear(x, ungrouped(self).weight, bias)
        if self.ones is not None:
            channel = -self.spatial - 1
            return self.with_ones()._convolve(torch.cat([x, torch.ones_like(x.narrow(channel, 0, 1))], channel), bias)
        convolve, transposed = _CONVOLUTIONS[self.spatial]
        before = [b for b, _ in self.padding]
        if self.transposed:
            return transposed(
                x, self.weight, bias, self.stride, before, self.output_padding, self.groups, self.dilation
            )
        if self.padding_mode == "zeros" and self.pad_value is None and all(b == a >= 0 for b, a in self.padding):
            return convolve(x, self.weight, bias, self.stride, before, self.dilation, self.groups)
        return convolve(pad(x, self), self.weight, bias, self.stride, 0, self.dilation, self.groups)

    def changed(self, **changes: Any) -> Conv:
        """`dataclasses.replace` that leaves a deferred weight, or bias, deferred."""
        fields = {name: getattr(self, name) for name in self.geometry}
        return Conv(**{"weight": self.__dict__["weight"], "bias": self.__dict__["bias"], **fields, **changes})

    def with_ones(self) -> Conv:
        """The same map with the channel of ones as its last input channel, for whoever puts it there."""
        if self.ones is None:
            raise GraphError(f"{self.label}: there is no channel of ones")
        axis = 0 if self.transposed else 1
        dtype = torch.promote_types(self.weight.dtype, self.ones.dtype)
        weight = torch.cat([self.weight.to(dtype), self.ones.unsqueeze(axis).to(dtype)], axis)
        value = self.pad_value
        if value is not None:
            value = torch.cat([value, value.new_zeros(1)])
        return replace(self, weight=weight, ones=None, pad_value=value)

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
    a, b = _as_convs(second, first, size)
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
    return _with_constant_part(_linear_part(a, b), a, b, size, pinned=anywhere is not None)


def add(left: Linear, right: Linear, size: Size | None = None) -> Linear:
    """The sum of two operators of one source as one operator, or a `Refusal`: same stride, same output grid."""
    left, right = left.as_linear(), right.as_linear()
    if isinstance(left, Scale) and isinstance(right, Scale) and _same_axes(left, right):
        scale = left.scale.double() + right.scale.double()
        return Scale(scale, left.shift.double() + right.shift.double(), left.axes if left.channels else right.axes)
    a, b = _as_convs(left, right, size, parallel=True)
    require(a.channels == b.channels, f"{a.label} and {b.label} make different channels, so their sum broadcasts")
    require(a.stride == b.stride, f"strides differ: {a.stride} and {b.stride}")
    require(a.transposed == b.transposed, "a convolution and a transposed convolution")
    size = _common_size(a, b, size, parallel=True)
    pinned = a.size or b.size
    if a.transposed:
        return _add_transposed(a, b)
    if any(one.reach != other.reach for one, other in zip(a.axes, b.axes, strict=True)):
        reason = f"{a.label} and {b.label} have different output sizes"
        require(size is not None and a.output_size(size) == b.output_size(size), reason)
        pinned = size
    a, b = _padded_alike(a, b)
    return _side_by_side(a, b, pinned)


def unit() -> Scale:
    """The identity on any channels and axes."""
    return Scale(torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))


def border(second: Conv, first: Conv, size: Size | None) -> Refusal | None:
    """Why the linear part of ``first`` then ``second`` is not one convolution, or None if it is, exactly.

    Exact iff no window of ``first`` at a position outside its output that ``second`` reads touches real input
    (DESIGN section 4). ``size=None`` asks for every input size at once.
    """
    if not second.is_padded:
        return None
    if _padding_mode(second, first) != "zeros":
        return _border_of_copies(second, first, size)
    rings = [ring(outer, inner, None if size is None else size[axis])
             for axis, (outer, inner) in enumerate(zip(second.axes, first.axes, strict=True))]  # fmt: skip
    for axis in [axis for axis, each in enumerate(rings) if each.touched]:
        if all(each.reads_input for other, each in enumerate(rings) if other != axis):
            width = max(second.padding[axis])
            return Refusal(
                f"border ring: {second.label} reads a ring {width} wide around the output of {first.label} as zeros, "
                f"but there (axis {axis}, {rings[axis].touched} side) a window of {first.label} would still touch "
                "real input; pad once, before the first of the two, to make them one"
            )
    return None


def pad(x: Tensor, conv: Conv) -> Tensor:
    """``x`` padded and cropped as ``conv`` does it, along its last spatial axes."""
    amounts = [amount for sides in reversed(conv.padding) for amount in sides]
    added, cropped = [max(amount, 0) for amount in amounts], [min(amount, 0) for amount in amounts]
    padded = F.pad(x, added, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    if conv.pad_value is not None:
        shape = (-1, *[1] * conv.spatial)
        outside = 1 - F.pad(x.new_ones(x.shape[x.dim() - conv.spatial :]), added)
        padded = padded + conv.pad_value.to(x.dtype).view(shape) * outside
    return F.pad(padded, cropped) if any(cropped) else padded


def regrouped(conv: Conv, groups: int) -> Conv:
    """The same convolution with fewer ``groups`` (a divisor of its own), the weight filled up with zeros."""
    kernel = regroup(Kernel(conv.weight, conv.groups), groups)
    return conv if groups == conv.groups else replace(conv, weight=kernel.weight, groups=groups)


def ungrouped(conv: Conv) -> Conv:
    """The same convolution with one group."""
    return regrouped(conv, 1)


# --- composition -------------------------------------------------------------------------------------------------


def _linear_part(second: Conv, first: Conv) -> Conv:
    composed = [compose_axes(outer, inner) for outer, inner in zip(second.axes, first.axes, strict=True)]
    steps = [each.inner for each in composed], [each.outer for each in composed]
    axes = [each.axis for each in composed]
    groups = math.gcd(first.groups, second.groups)
    shape = (second.out_channels, first.in_channels // groups, *(axis.kernel for axis in axes))
    weight = Deferred(shape, lambda: compose_kernels(second.kernels, first.kernels, *steps).weight)
    mode, value = _padding_mode(second, first), first.pad_value if first.is_padded else None
    return _conv_on(axes, weight, groups, padding_mode=mode, pad_value=value)


def _padding_mode(second: Conv, first: Conv) -> PaddingMode:
    """What the composition pads with: copies, if one of the two does; the second's before the first's."""
    padded = [conv.padding_mode for conv in (second, first) if conv.is_padded]
    return next((mode for mode in padded if mode != "zeros"), "zeros")


def _conv_on(axes: Sequence[Axis], weight: Tensor | Deferred, groups: int, **fields: Any) -> Conv:
    return Conv(
        weight,
        stride=tuple(axis.stride for axis in axes),
        padding=tuple((axis.before, axis.after) for axis in axes),
        dilation=tuple(axis.dilation for axis in axes),
        groups=groups,
        **fields,
    )


def _with_constant_part(linear: Conv, second: Conv, first: Conv, size: Size | None, pinned: bool) -> Conv:
    """``linear`` with what the two make of zeros, as a bias, bias map, pad value or channel of ones; or a refusal."""
    has_maps = first.has_bias_map or second.has_bias_map
    tells_inside = _inside(second, first) is not None
    transfers = not has_maps and (second.ones is None or tells_inside)
    at = size if pinned or first.size or second.size else None
    if transfers and _ring_is_constant(second, first):
        return linear.changed(bias=_pushed_bias(second, first), ones=_pushed_ones(second, first), size=at)
    carries = transfers and tells_inside
    value = _value_that_becomes(second.pad_value, first) if carries else None
    if value is not None and (size is None or _reads_less_than_it_makes(linear, size)):
        ones = _pushed_ones(second, first)
        return linear.changed(bias=_pushed_bias(second, first), pad_value=value, ones=ones, size=at)
    if size is not None:
        at_zero = _response_to_zero(second, first, size)
        return linear.changed(bias=_without_constant_axes(at_zero[0]), pad_value=None, size=size)
    if carries and second.pad_value is None and linear.pad_value is None:
        ones = _pushed_ones(second, first, with_bias=True)
        return _dense(linear).changed(bias=None if second.bias is None else second.bias.double(), ones=ones)
    raise Refusal(
        f"{second.label} reads a ring around the output of {first.label} as "
        f"{'zeros' if second.pad_value is None else 'its pad value'}, not as its bias: "
        "exact only with a bias map at a fixed size (--passes all)"
    )


def _reads_less_than_it_makes(conv: Conv, size: Size) -> bool:
    """A pad value is subtracted from the input, a bias map is added to the output: which has fewer elements?"""
    return conv.in_channels * math.prod(size) <= conv.out_channels * math.prod(conv.output_size(size))


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
        total = regroup(first.kernels, 1).taps()
        outside = outside + (total @ first.pad_value.double()).cpu()
    padded = torch.zeros_like(outside) if second.pad_value is None else second.pad_value.double().cpu()
    scale = torch.maximum(outside.abs().max(), padded.abs().max())  # the two may have been computed in other orders
    return bool(((outside - padded).abs() <= 8 * torch.finfo(torch.float64).eps * scale).all())


def _value_that_becomes(wanted: Tensor | None, first: Conv) -> Tensor | None:
    """The pad value v with s v + b = ``wanted`` (zeros for None) where ``first`` is one factor s per channel."""
    if not first.groups == first.in_channels == first.out_channels or not first.reads_one_element:
        return None
    factor = first.weight.double().reshape(-1)
    bias = torch.zeros_like(factor) if first.bias is None else first.bias.double()
    missing = -bias if wanted is None else wanted.double() - bias
    if bool(((factor == 0) & (missing != 0)).any()):
        return None
    return torch.where(missing == 0, torch.zeros_like(missing), missing / factor)


def _pushed_bias(second: Conv, first: Conv) -> Deferred | None:
    """b2 + sum W2 b1, which takes the numbers of both."""

    def pushed() -> Tensor:
        reached = None
        if first.bias is not None:
            total = second.kernels.taps()
            grouped = total.reshape(second.groups, -1, total.shape[1])
            reached = (grouped @ first.bias.double().reshape(second.groups, -1, 1)).flatten()
        return cast(Tensor, _sum_of_biases(reached, second.bias))

    return None if first.bias_shape is None and second.bias_shape is None else Deferred((second.out_channels,), pushed)


def _pushed_ones(second: Conv, first: Conv, *, with_bias: bool = False) -> Tensor | None:
    """The channel of ones of the composition; ``with_bias`` carries the bias of ``first`` there as well."""
    inside = _inside(second, first)
    entering = None if first.ones is None else first.ones.double()
    if with_bias and first.bias is not None:
        assert inside is not None  # who asks for the bias has asked for this before
        bias = first.bias.double().reshape(-1, *[1] * first.spatial) * inside
        entering = bias if entering is None else entering + bias
    composed = [compose_axes(outer, inner) for outer, inner in zip(second.axes, first.axes, strict=True)]
    steps = [each.inner for each in composed], [each.outer for each in composed]
    leaving = None
    if second.ones is not None:
        assert inside is not None
        leaving = compose_kernels(_ones_of(second), Kernel(inside[None, None]), *steps).weight.squeeze(1)
    if entering is None:
        return leaving
    pushed = compose_kernels(second.kernels, Kernel(entering.unsqueeze(1)), *steps).weight.squeeze(1)
    return pushed if leaving is None else pushed + leaving


def _inside(second: Conv, first: Conv) -> Tensor | None:
    """The kernel [*kernel of the first], one tap of which is 1, that makes of ones on the input, padded with 0, ones on
    the output of ``first`` and 0 wherever else ``second`` reads, at every size; None if there is none.

    Both are products over the axes, so it is enough that one tap does so on each axis by itself.
    """
    if any(conv.is_padded and conv.padding_mode != "zeros" for conv in (second, first)):
        return None
    taps = [inside_tap(outer, inner) for outer, inner in zip(second.axes, first.axes, strict=True)]
    if None in taps:
        return None
    kernel = torch.zeros(first.kernel, dtype=torch.float64)
    kernel[tuple(tap for tap in taps if tap is not None)] = 1
    return kernel


def _dense(conv: Conv) -> Conv:
    """The same convolution with one group; the weight stays deferred."""
    if conv.groups == 1:
        return conv
    shape = (conv.out_channels, conv.in_channels, *conv.kernel)
    return conv.changed(weight=Deferred(shape, lambda: regroup(conv.kernels, 1).weight), groups=1)


def _response_to_zero(second: Conv, first: Conv, size: Size) -> Tensor:
    """What the two maps in a row make of zeros: the bias map of their composition, [1, out, *output size]."""
    first, second = first.cast(torch.float64), second.cast(torch.float64)
    return cast(Tensor, second.evaluate(first.evaluate(first.weight.new_zeros(1, first.in_channels, *size))))


def _compose_transposed(second: Conv, first: Conv, size: Size | None) -> Conv:
    """A transposed convolution and a pointwise one: y = W^T x upsampled, so channels mix exactly on either side."""
    pointwise, transposed = (second, first) if first.transposed else (first, second)
    require(
        pointwise.is_pointwise and not pointwise.transposed,
        f"only a pointwise layer merges into {transposed.label}; found {pointwise.label}",
    )
    none, every = [0] * first.spatial, [1] * first.spatial
    steps = (every, none) if first.transposed else (none, every)
    kernel = transpose_kernel(compose_kernels(second.kernels, first.kernels, *steps))
    merged = replace(
        transposed, weight=kernel.weight, bias=None, ones=None, groups=kernel.groups,
        size=size if first.size or second.size else None,
    )  # fmt: skip
    has_maps = first.has_bias_map or second.has_bias_map
    has_bias = first.bias is not None and bool((first.bias != 0).any())
    if not has_maps and (first.transposed or not has_bias):
        own = None if second.bias is None else second.bias.double()
        ones = None if first.ones is None else _pushed_ones_of_transposed(second, first.ones, steps)
        ones = second.ones if ones is None else ones
        return replace(merged, bias=_pushed_bias(second, first) if has_bias else own, ones=ones)
    if size is not None:
        at_zero = _response_to_zero(second, first, size)
        return replace(merged, bias=_without_constant_axes(at_zero[0]), size=size)
    if not has_maps and merged.groups == 1:
        assert first.bias is not None
        ones = _pushed_ones_of_transposed(second, first.bias.reshape(-1, *[1] * first.spatial), steps)
        ones = ones if second.ones is None else ones + second.ones.double()
        return replace(merged, bias=None if second.bias is None else second.bias.double(), ones=ones)
    raise Refusal(
        f"the bias of {first.label} reaches the border and the gaps of {second.label} unevenly: "
        "exact only with a bias map at a fixed size (--passes all)"
    )


def _pushed_ones_of_transposed(second: Conv, entering: Tensor, steps: tuple[list[int], list[int]]) -> Tensor:
    return compose_kernels(second.kernels, Kernel(entering.double().unsqueeze(1)), *steps).weight.squeeze(1)


# --- the border of padding that copies -----------------------------------------------------------------------------


def _border_of_copies(second: Conv, first: Conv, size: Size | None) -> Refusal | None:
    """reflect, replicate, circular: exact iff each tap reads the same element in one step as in two, on every axis."""
    mode = _padding_mode(second, first)
    axes = [
        copies(outer, inner, (second.padding_mode, first.padding_mode, mode), None if size is None else size[axis])
        for axis, (outer, inner) in enumerate(zip(second.axes, first.axes, strict=True))
    ]
    shown = [axis for axis in range(len(axes)) if all(each.reads_input for each in (*axes[:axis], *axes[axis + 1 :]))]
    for axis in (axis for axis in shown if axes[axis].differ):
        if second.padding_mode == "zeros":
            around = f"{second.label} pads zeros around its output"
            return Refusal(f"{first.label} pads by {first.padding_mode} where {around} (axis {axis})")
        commutes = "which commutes only with a pointwise layer"
        return Refusal(f"{second.label} pads by {second.padding_mode}, {commutes}; found {first.label} (axis {axis})")
    for axis in (axis for axis in shown if axes[axis].wrap):
        widest = max(compose_axes(second.axes[axis], first.axes[axis]).axis.padding)
        if size is None:
            return Refusal(f"{mode} padding of {widest} must not wrap twice: exact at a fixed size (--passes all)")
        return Refusal(f"{mode} padding of {widest} would wrap twice around an input of {size}")
    return None


# --- sums --------------------------------------------------------------------------------------------------------


def _side_by_side(a: Conv, b: Conv, size: Size | None) -> Conv:
    alignments = [align_axes(one, other) for one, other in zip(a.axes, b.axes, strict=True)]
    axes = [alignment.axis for alignment in alignments]
    groups = math.gcd(a.groups, b.groups)
    shape = (a.out_channels, a.in_channels // groups, *(axis.kernel for axis in axes))
    weight = Deferred(shape, lambda: add_kernels(a.kernels, b.kernels, alignments).weight)
    ones = None
    if a.ones is not None or b.ones is not None:
        require(groups == 1, f"{a.label} and {b.label}: a channel of ones would make a sum of groups dense")
        ones = add_kernels(_ones_of(a), _ones_of(b), alignments).weight.squeeze(1)
    shapes = [shape for shape in (a.bias_shape, b.bias_shape) if shape is not None]
    total = Deferred(max(shapes, key=len, default=()), lambda: cast(Tensor, _sum_of_biases(a.bias, b.bias)))
    bias = total if shapes else None
    padded = next((conv for conv in (a, b) if conv.is_padded), None)
    if padded is None:
        return _conv_on(axes, weight, groups, bias=bias, ones=ones, size=size)
    mode, value = padded.padding_mode, padded.pad_value
    return _conv_on(axes, weight, groups, bias=bias, padding_mode=mode, pad_value=value, ones=ones, size=size)


def _ones_of(conv: Conv) -> Kernel:
    if conv.ones is None:
        return Kernel(torch.zeros(conv.out_channels, 1, *conv.kernel, dtype=torch.float64))
    return Kernel(conv.ones.double().unsqueeze(1))


def _padded_alike(a: Conv, b: Conv) -> tuple[Conv, Conv]:
    """Both with one padding mode and one pad value, or a refusal."""
    if not (a.is_padded and b.is_padded):
        padded, other = (a, b) if a.is_padded else (b, a)
        if _pads_within_reason(padded, other):
            return a, b
        largest = 0.0 if padded.pad_value is None else float(padded.pad_value.abs().max())
        require(
            math.gcd(a.groups, b.groups) == 1,
            f"{padded.label} pads with constants of up to {largest:.1e}, which it scales down again: beside "
            f"{other.label}, which does not, they would leave little but rounding",
        )
        return _padded_with_zeros(a), _padded_with_zeros(b)
    require(a.padding_mode == b.padding_mode, f"padding modes differ: {a.padding_mode} and {b.padding_mode}")
    values = [torch.zeros(a.in_channels) if c.pad_value is None else c.pad_value.cpu() for c in (a, b)]
    if torch.equal(values[0].double(), values[1].double()):
        return a, b
    require(math.gcd(a.groups, b.groups) == 1, "the two branches pad with different constants")
    return _padded_with_zeros(a), _padded_with_zeros(b)


def _pads_within_reason(padded: Conv, other: Conv) -> bool:
    """Does what ``padded`` pads with round no worse in the sum with ``other`` than in ``padded`` by itself?

    PyTorch pads with zeros, so the sum reads x - v and adds back what its kernel makes of v. Rounding moves x - v by
    about eps |v|, which ``padded`` multiplies by its kernel K: eps |K| |v| is in its outputs however it is written. The
    other kernel L makes eps |L| |v| of it, and where v = b / s for a scale s near 0, K carries that s and L does not.
    """
    value = padded.pad_value
    if value is None:
        return True
    ours, theirs = (_reached_by(conv, value) for conv in (padded, other))
    own = 0.0 if padded.bias is None else float(padded.bias.double().abs().max())
    return float(theirs.max()) <= LARGEST_AMPLIFICATION * max(float(ours.max()), own)


def _reached_by(conv: Conv, value: Tensor) -> Tensor:
    """sum |K| |v| of each output channel, over all taps."""
    total = Kernel(conv.kernels.weight.abs(), conv.groups).taps()
    grouped = total.reshape(conv.groups, -1, total.shape[1])
    return (grouped @ value.double().abs().reshape(conv.groups, -1, 1)).flatten()


def _padded_with_zeros(conv: Conv) -> Conv:
    """K pad(x, v) = K pad(x, 0) + (sum of the taps of K v) - (K v) pad(1, 0): the pad value as a channel of ones."""
    if conv.pad_value is None:
        return conv
    value = Kernel(conv.pad_value.double().reshape(-1, 1, *[1] * conv.spatial))
    none, every = [0] * conv.spatial, [1] * conv.spatial
    reached = compose_kernels(regroup(conv.kernels, 1), value, none, every)
    bias = _sum_of_biases(conv.bias, reached.taps().squeeze(1))
    ones = _ones_of(conv).weight - reached.weight
    return replace(ungrouped(conv), pad_value=None, bias=bias, ones=ones.squeeze(1))


def _add_transposed(a: Conv, b: Conv) -> Conv:
    same = all(
        getattr(a, name) == getattr(b, name) for name in ("kernel", "padding", "dilation", "output_padding", "groups")
    )
    require(same, f"{a.label} and {b.label}: transposed branches are added only where their geometry is the same")
    ones = None
    if a.ones is not None or b.ones is not None:
        ones = (_ones_of(a).weight + _ones_of(b).weight).squeeze(1)
    total = a.weight.double() + b.weight.double()
    return replace(a, weight=total, bias=_sum_of_biases(a.bias, b.bias), ones=ones, size=a.size or b.size)


def _sum_of_biases(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    given = [bias.double() for bias in (a, b) if bias is not None]
    if not given:
        return None
    rank = max(bias.dim() for bias in given)
    total = sum(bias.reshape(*bias.shape, *[1] * (rank - bias.dim())) for bias in given)
    return cast(Tensor, total)


# --- small helpers -----------------------------------------------------------------------------------------------


def _as_convs(second: Linear, first: Linear, size: Size | None, parallel: bool = False) -> tuple[Conv, Conv]:
    """Both as convolutions: what one leaves open (channels, axes) is taken from the other."""
    second, first = second.as_linear(), first.as_linear()
    spatial = first.spatial if first.spatial is not None else second.spatial
    require(spatial is not None, "neither operator says on which axes it acts")
    outer, inner = second.channels, first.channels
    known = inner or outer
    require(known is not None, "neither operator says how many channels it reads")
    assert known is not None and spatial is not None
    entering = (inner or known)[0]
    b = first.at(size).as_conv(entering, spatial)
    known_size = b.size or size
    fits = known_size is None or len(known_size) == spatial
    require(fits, f"{second.label} and {first.label} act on different axes")
    reached = known_size if parallel or known_size is None else b.output_size(known_size)
    a = second.at(reached).as_conv(entering if parallel else b.out_channels, spatial)
    return _settled(a), _settled(b)


def _settled(conv: Conv) -> Conv:
    """The same map; ones that no window leaves are a bias. The laws account for every field, so all count as read."""
    if conv.ones is None or conv.is_padded or conv.transposed:
        return conv.changed()
    total = conv.ones.double().reshape(conv.out_channels, -1).sum(-1)
    return conv.changed(bias=_sum_of_biases(conv.bias, total), ones=None)


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
