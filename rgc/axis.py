"""How do two windows on one axis compose and add, and what does the second see outside the first's output?

Everything here is integers: the formulas that DESIGN section 4 states per axis. Tensors are in `rgc.kernels`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """A window on one axis: taps, stride, dilation, and padding before and after (negative: cropped)."""

    kernel: int
    stride: int
    dilation: int
    before: int
    after: int

    def output_size(self, n: int) -> int:
        """Positions of the window on ``n`` elements (torch.nn.Conv2d, "Shape").

        >>> Axis(kernel=3, stride=2, dilation=1, before=1, after=1).output_size(7)
        4
        """
        return (n + self.before + self.after - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    @property
    def reach(self) -> int:
        """before + after - d (k - 1) - 1: equal reach and stride means equal output size for every input size."""
        return self.before + self.after - self.dilation * (self.kernel - 1) - 1

    @property
    def padding(self) -> tuple[int, int]:
        """Before and after."""
        return self.before, self.after

    @property
    def is_padded(self) -> bool:
        """Does the window read beyond the input on a side?"""
        return self.before > 0 or self.after > 0

    @property
    def is_pointwise(self) -> bool:
        """Does each position read just the element at that position?"""
        return (self.kernel, self.stride, self.before, self.after) == (1, 1, 0, 0)


@dataclass(frozen=True)
class Composition:
    """Two windows in a row as one; tap j1 of the first and j2 of the second meet at tap inner j1 + outer j2."""

    axis: Axis
    inner: int
    outer: int


def compose_axes(second: Axis, first: Axis) -> Composition:
    """``first`` then ``second``: stride s1 s2, padding p1 + s1 p2, extent d1 (k1 - 1) + s1 d2 (k2 - 1) + 1.

    >>> compose_axes(Axis(3, 2, 1, 0, 0), Axis(3, 1, 1, 1, 1)).axis
    Axis(kernel=5, stride=2, dilation=1, before=1, after=1)
    """
    inner = first.dilation if first.kernel > 1 else 0
    outer = first.stride * second.dilation if second.kernel > 1 else 0
    dilation = math.gcd(inner, outer) or 1
    inner, outer = inner // dilation, outer // dilation
    kernel = inner * (first.kernel - 1) + outer * (second.kernel - 1) + 1
    before, after = first.before + first.stride * second.before, first.after + first.stride * second.after
    return Composition(Axis(kernel, first.stride * second.stride, dilation, before, after), inner, outer)


@dataclass(frozen=True)
class Alignment:
    """Two windows side by side as one; ``places`` is where the taps of each lie in the common window."""

    axis: Axis
    places: tuple[slice, slice]


def align_axes(a: Axis, b: Axis) -> Alignment:
    """The common window of ``a`` and ``b`` (same stride), aligned by what each reads; even kernels embed too.

    >>> align_axes(Axis(3, 1, 1, 1, 1), Axis(1, 1, 1, 0, 0)).places
    (slice(0, 3, 1), slice(1, 2, 1))
    """
    starts, pair = (-a.before, -b.before), (a, b)
    first = min(starts)
    last = max(start + axis.dilation * (axis.kernel - 1) for start, axis in zip(starts, pair, strict=True))
    offsets = [abs(starts[0] - starts[1]), *(axis.dilation for axis in pair if axis.kernel > 1)]
    dilation = math.gcd(*offsets) or 1

    def place(start: int, axis: Axis) -> slice:
        begin = (start - first) // dilation
        return slice(
            begin, begin + axis.dilation * (axis.kernel - 1) // dilation + 1, max(axis.dilation // dilation, 1)
        )

    after = min(a.reach, b.reach) + 1 + last  # keeps the output grid of both
    common = Axis((last - first) // dilation + 1, a.stride, dilation, -first, after)
    return Alignment(common, (place(starts[0], a), place(starts[1], b)))


@dataclass(frozen=True)
class Ring:
    """What the second window reads outside the output of the first."""

    touched: str  # "leading" or "trailing": where a window of the first, out there, touches real input; else ""
    reads_input: bool  # does any window of the first that is read, in or out, touch real input?


def ring(second: Axis, first: Axis, n: int | None) -> Ring:
    """The ring at input size ``n``, or the worst over all sizes (None), in closed form."""
    if n is None:
        starts = (j * second.dilation - second.before for j in range(second.kernel))
        nearest = [start % -second.stride or -second.stride for start in starts if start < 0]
        span = first.dilation * (first.kernel - 1)
        left = any(span + first.stride * position >= first.before for position in nearest)
        right = second.after > 0 and span > first.after
        return Ring("leading" if left else "trailing" if right else "", True)
    inside = first.output_size(n)
    taps = range(second.kernel)
    outputs = range(second.output_size(inside))
    read = {o * second.stride + j * second.dilation - second.before for o in outputs for j in taps}
    touching = {
        r for r in read
        if any(0 <= r * first.stride + j * first.dilation - first.before < n for j in range(first.kernel))
    }  # fmt: skip
    left, right = any(r < 0 for r in touching), any(r >= inside for r in touching)
    return Ring("leading" if left else "trailing" if right else "", bool(touching))


def inside_tap(second: Axis, first: Axis) -> int | None:
    """The tap of ``first`` that reads input at each of its outputs, and beside them, where ``second`` reads, none.

    At position r tap j reads element r s1 + o, with o = j d1 - p1. Of n elements there are m outputs, and (m - 1) s1 is
    the largest multiple of s1 up to n + reach. So for every n

    - inside, 0 <= r < m: o >= 0, and (m - 1) s1 + o < n: reach + o < 0;
    - in front, where the nearest position read is -g: o < g s1 (asked only if ``second`` pads there);
    - behind, r >= m: m s1 + o >= n, where m s1 > n + reach: reach + o >= -1 (the same).

    >>> inside_tap(Axis(3, 1, 1, 1, 1), Axis(3, 1, 1, 1, 1)), inside_tap(Axis(3, 1, 1, 1, 1), Axis(3, 1, 1, 0, 0))
    (1, None)
    >>> inside_tap(Axis(3, 1, 1, 0, 0), Axis(3, 1, 1, 0, 0))
    0
    """
    nearest = _nearest_in_front(second)
    for tap in range(first.kernel):
        offset = tap * first.dilation - first.before
        inside = offset >= 0 and first.reach + offset < 0
        in_front = nearest is None or offset < nearest * first.stride
        behind = second.after <= 0 or first.reach + offset >= -1
        if inside and in_front and behind:
            return tap
    return None


def _nearest_in_front(axis: Axis) -> int | None:
    """How far in front of the input lies the nearest position that is read? None if none is."""
    starts = (j * axis.dilation - axis.before for j in range(axis.kernel))
    return min((-start % axis.stride or axis.stride for start in starts if start < 0), default=None)


@dataclass(frozen=True)
class Copies:
    """Padding by copies of elements, in one step against two."""

    differ: bool  # does a tap read another element?
    wrap: bool  # would PyTorch have to copy copies?
    reads_input: bool  # does any tap read an element at all?


def copies(second: Axis, first: Axis, modes: tuple[str, str, str], n: int | None) -> Copies:
    """How ``first`` then ``second`` compare with their composition at ``n`` elements; ``modes`` are what they pad with
    (second, first, composition).

    Without n: the worst over all sizes. Beyond the width of all kernels and paddings a larger input only moves its two
    ends apart, and how depends on its remainder by the strides, so one period of sizes from there shows all others.

    >>> copies(Axis(3, 1, 1, 1, 1), Axis(1, 1, 1, 0, 0), ("reflect", "zeros", "reflect"), None).differ
    False
    >>> copies(Axis(3, 1, 1, 1, 1), Axis(3, 1, 1, 0, 0), ("reflect", "zeros", "reflect"), None).differ
    True
    """
    if n is not None:
        return _copies_at(second, first, modes, n)
    whole = compose_axes(second, first).axis
    width = whole.dilation * (whole.kernel - 1) + sum(map(abs, first.padding))
    large = width + first.stride * sum(map(abs, second.padding)) + 1
    cases = [_copies_at(second, first, modes, m) for m in range(1, large + whole.stride + 1)]
    return Copies(any(each.differ for each in cases), any(each.wrap for each in cases), True)


def _copies_at(second: Axis, first: Axis, modes: tuple[str, str, str], n: int) -> Copies:
    inside = first.output_size(n)
    runs = inside > 0 and second.output_size(inside) > 0
    if not runs or not _can_pad(first, modes[1], n) or not _can_pad(second, modes[0], inside):
        return Copies(differ=False, wrap=False, reads_input=False)  # the two do not run at this size either
    if not _can_pad(compose_axes(second, first).axis, modes[2], n):
        return Copies(differ=False, wrap=True, reads_input=True)
    differ = reads_input = False
    for output, outer, inner in itertools.product(
        range(second.output_size(inside)), range(second.kernel), range(first.kernel)
    ):
        position = output * second.stride + outer * second.dilation - second.before
        tap = inner * first.dilation - first.before
        middle = element(position, inside, modes[0])
        in_two = None if middle is None else element(middle * first.stride + tap, n, modes[1])
        in_one = element(position * first.stride + tap, n, modes[2])
        differ |= in_one != in_two
        reads_input |= in_one is not None or in_two is not None
    return Copies(differ, False, reads_input)


def _can_pad(axis: Axis, mode: str, n: int) -> bool:
    """PyTorch copies what is there, once."""
    return max(axis.padding) <= {"reflect": n - 1, "circular": n}.get(mode, max(axis.padding))


def element(position: int, n: int, mode: str) -> int | None:
    """Which of ``n`` elements stands at a position of the padded axis; None for a constant."""
    if 0 <= position < n:
        return position
    if mode == "zeros":
        return None
    if mode == "replicate":
        return min(max(position, 0), n - 1)
    return position % n if mode == "circular" else (-position if position < 0 else 2 * (n - 1) - position)
