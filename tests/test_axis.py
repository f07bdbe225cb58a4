"""Do the shape, padding and border formulas of the algebra hold for all numbers? Proofs with integer symbols."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any, cast

import pytest
import sympy as sp
import torch
import torch.nn.functional as F

from rgc.algebra import Conv
from rgc.axis import Axis, align_axes, compose_axes, inside_tap, ring
from rgc.operators import _rounds_up

# A number below another is written with its slack: 0 <= r < s becomes s = r + 1 + slack, slack >= 0. What sympy then
# derives from the signs of the symbols holds for every number.
n, q, u = sp.symbols("n q u", integer=True)
k1, k2, d1, d2, s1, s2 = sp.symbols("k1 k2 d1 d2 s1 s2", integer=True, positive=True)
b1, a1, b2, a2 = sp.symbols("b1 a1 b2 a2", integer=True, nonnegative=True)  # padding before and after
o, j1, j2 = sp.symbols("o j1 j2", integer=True, nonnegative=True)  # output position, taps
r, v, f, i, m, slack1, slack2 = sp.symbols("r v f i m slack1 slack2", integer=True, nonnegative=True)


FIRST = Axis(k1, s1, d1, b1, a1)  # type: ignore[arg-type]  # symbols for numbers
SECOND = Axis(k2, s2, d2, b2, a2)  # type: ignore[arg-type]
#: Extent minus one, padding of the composition: rgc.algebra, "Composition".
EXTENT = d1 * (k1 - 1) + s1 * d2 * (k2 - 1)
PADDING = (b1 + s1 * b2, a1 + s1 * a2)


def assert_floor(ratio: Any, expected: Any) -> None:
    """floor(ratio) = expected, because expected is an integer and 0 <= ratio - expected < 1."""
    assert expected.is_integer
    numerator, denominator = sp.fraction(sp.together(sp.expand(ratio - expected)))
    assert denominator.is_positive
    assert sp.expand(numerator).is_nonnegative
    assert sp.expand(denominator - numerator).is_positive


def test_a_floor_of_a_floor_is_one_floor() -> None:
    """floor((floor((n + a) / s1) + b) / s2) = floor((n + a + s1 b) / (s1 s2)), b any integer."""
    a, b = sp.symbols("a b", integer=True)
    bounded = {s1: r + 1 + slack1, s2: v + 1 + slack2}
    numbers = sp.solve([sp.Eq(n + a, s1 * q + r), sp.Eq(q + b, s2 * u + v)], [n, b], dict=True)[0]
    assert_floor(((n + a) / s1).subs(numbers).subs(bounded), q)
    assert_floor(((q + b) / s2).subs(numbers).subs(bounded), u)
    assert_floor(((n + a + s1 * b) / (s1 * s2)).subs(numbers).subs(bounded), u)


def test_the_output_size_of_a_composition_is_the_composed_output_size() -> None:
    bounded = {s1: r + 1 + slack1, s2: v + 1 + slack2}
    composed = Axis(EXTENT + 1, s1 * s2, 1, *PADDING)
    between = FIRST.output_size(n)
    last = SECOND.output_size(q + 1)
    at_once = composed.output_size(n)
    inner, outer, whole = (_floored(size) for size in (between, last, at_once))
    euclid = sp.solve([sp.Eq(inner * s1, s1 * q + r), sp.Eq(outer * s2, s2 * u + v)], [n, q], dict=True)[0]
    divided = {n: euclid[n].subs(q, euclid[q]), q: euclid[q]}
    intermediate = {n: sp.solve(sp.Eq(inner * s1, s1 * q + r), n)[0]}
    assert_floor(inner.subs(intermediate).subs(bounded), q)  # so `between` is q + 1, which the second reads
    assert_floor(outer.subs(divided).subs(bounded), u)
    assert_floor(whole.subs(divided).subs(bounded), u)


def _floored(size: Any) -> Any:
    """x of floor(x) + 1."""
    (inside,) = size.atoms(sp.floor)
    assert size - inside == 1 or sp.expand(size - inside - 1).is_integer
    return inside.args[0] + sp.expand(size - inside - 1)  # sympy takes integers out of a floor


def test_each_pair_of_taps_reads_where_the_composed_tap_reads() -> None:
    in_first = o * s2 + j2 * d2 - b2  # the position of y1 that tap j2 of the second reads
    in_input = in_first * s1 + j1 * d1 - b1
    composed = o * (s1 * s2) + (j1 * d1 + j2 * s1 * d2) - PADDING[0]
    assert sp.expand(in_input - composed) == 0


def test_the_composed_taps_fill_the_composed_extent() -> None:
    offset = j1 * d1 + j2 * s1 * d2
    assert offset.subs({j1: 0, j2: 0}) == 0
    assert sp.expand(offset.subs({j1: k1 - 1, j2: k2 - 1}) - EXTENT) == 0
    below = EXTENT - offset.subs({j1: k1 - 1 - i, j2: k2 - 1 - f})
    assert sp.expand(below).is_nonnegative  # no tap lies beyond


def test_a_common_divisor_of_the_steps_divides_every_composed_offset() -> None:
    g, x, y = sp.symbols("g x y", integer=True, positive=True)
    offset = (j1 * d1 + j2 * s1 * d2).subs({d1: g * x, d2: g * y / s1})
    assert sp.simplify(offset / g).is_integer


@pytest.mark.parametrize("axis", list(itertools.product((1, 2, 3), (1, 2), (1, 2), (0, 2), (1, 3), (1, 3), (2,), (1,))))
def test_the_compiler_uses_these_formulas(axis: tuple[int, ...]) -> None:
    kernel1, stride1, dilation1, pad1, kernel2, stride2, dilation2, pad2 = axis
    first = Axis(kernel1, stride1, dilation1, pad1, 1)
    second = Axis(kernel2, stride2, dilation2, 0, pad2)
    numbers = {
        k1: kernel1, s1: stride1, d1: dilation1, b1: pad1, a1: 1,
        k2: kernel2, s2: stride2, d2: dilation2, b2: 0, a2: pad2,
    }  # fmt: skip
    merged = compose_axes(second, first).axis
    assert merged.dilation * (merged.kernel - 1) == EXTENT.subs(numbers)
    assert (merged.before, merged.after) == tuple(side.subs(numbers) for side in PADDING)
    assert merged.stride == stride1 * stride2


def test_a_transposed_convolution_ends_after_its_last_written_element() -> None:
    extra = sp.Symbol("extra", integer=True, nonnegative=True)
    shape = SimpleNamespace(axes=(FIRST,), output_padding=(extra,), transposed=True)
    (size,) = Conv.output_size(cast(Conv, shape), (n,))
    written = (n - 1) * s1 + (k1 - 1) * d1 - b1  # the last input element through the last tap
    assert sp.expand(size - (written + 1 - a1 + extra)) == 0


# --- sum -----------------------------------------------------------------------------------------------------------


def test_branches_of_equal_reach_have_equal_output_sizes() -> None:
    reach = FIRST.reach
    size = FIRST.output_size(n)
    assert sp.simplify(size - (sp.floor((n + reach) / s1) + 1)) == 0  # the size depends on n, stride and reach alone


def test_the_aligned_kernel_keeps_the_reach_and_never_crops() -> None:
    lower, upper = sp.symbols("lower upper", integer=True, nonnegative=True)
    first = -b1 - lower  # the earliest offset of both kernels, at or before that of this one
    last = d1 * (k1 - 1) - b1 + upper  # the latest, at or after that of this one
    behind = FIRST.reach + 1 + last
    aligned = Axis(1 + (last - first), s1, 1, -first, behind)
    assert sp.expand(aligned.reach - FIRST.reach) == 0
    assert sp.expand(behind - a1).is_nonnegative
    assert sp.expand(-first - b1).is_nonnegative
    tap = o * s1 + j1 * d1 - b1  # where this branch reads, and where the aligned kernel has put the tap
    assert sp.expand(tap - (o * s1 + (j1 * d1 - b1 - first) + first)) == 0


@pytest.mark.parametrize(
    ("k", "d", "b", "a"),
    [(1, 1, 0, 0), (3, 2, 2, 2), (2, 3, 1, 2), (4, 1, 0, 3), (5, 1, 3, 1), (1, 1, -1, 1), (2, 1, -1, 2)],
)
def test_the_compiler_aligns_by_offset(k: int, d: int, b: int, a: int) -> None:
    wide, other = Axis(3, 1, 1, 1, 1), Axis(k, 1, d, b, a)
    aligned = align_axes(wide, other)
    common = aligned.axis
    for place, own in zip(aligned.places, (wide, other), strict=True):
        offsets = [tap * common.dilation - common.before for tap in range(common.kernel)[place]]
        assert offsets == [tap * own.dilation - own.before for tap in range(own.kernel)]


# --- the border at any size ----------------------------------------------------------------------------------------


def test_the_leading_ring_is_harmless_where_the_kernel_does_not_reach_over_stride_and_padding() -> None:
    """Not d1 (k1 - 1) >= g s1 + b1: no window at -g or before, and no tap of it, touches position 0 or beyond."""
    g = sp.Symbol("g", integer=True, positive=True)  # the second reads -g, and nothing nearer to the output
    position = (-g - f) * s1 + j1 * d1 - b1
    short = sp.solve(sp.Eq(d1 * (k1 - 1), g * s1 + b1 - 1 - m), b1)[0]  # m >= 0: the negated condition
    assert sp.expand(position.subs(b1, short).subs(j1, k1 - 1 - i)).is_negative


def test_the_leading_ring_does_harm_where_it_does_reach() -> None:
    g = sp.Symbol("g", integer=True, positive=True)
    position = -g * s1 + (k1 - 1) * d1 - b1
    long = sp.solve(sp.Eq(d1 * (k1 - 1), g * s1 + b1 + m), b1)[0]
    assert sp.expand(position.subs(b1, long)) == m  # a real element of every input longer than m


def test_the_trailing_ring_is_harmless_where_the_kernel_does_not_reach_over_the_padding() -> None:
    """Not d1 (k1 - 1) > a1: no window behind the output touches the input, at any size n."""
    behind = _beyond_the_end().subs(a1, d1 * (k1 - 1) + m)
    assert sp.expand(behind.subs(s1, r + 1 + slack1)).is_nonnegative


def test_the_trailing_ring_does_harm_at_some_size_where_it_does_reach() -> None:
    behind = _beyond_the_end().subs({f: 0, j1: 0, r: s1 - 1})  # n with the largest remainder
    reaching = sp.solve(sp.Eq(d1 * (k1 - 1), a1 + 1 + m), a1)[0]
    assert sp.expand(behind.subs(a1, reaching)) == -1 - m  # before the end of the input
    position = (q + 1) * s1 - b1
    large = {q: b1 + i, s1: 1 + slack1}
    assert sp.expand(position.subs(large)).is_nonnegative  # and behind its start, for every large n


def _beyond_the_end() -> Any:
    """How far tap j1 of the window at f >= 0 behind the output of the first lies behind the input: 0 is just behind."""
    size = FIRST.output_size(n)
    length = sp.solve(sp.Eq(_floored(size) * s1, s1 * q + r), n)[0]  # so the output has q + 1 elements
    return sp.expand((q + 1 + f) * s1 + j1 * d1 - b1 - length)


def test_the_second_reads_the_first_element_behind_the_output_at_some_size() -> None:
    """Where it pads behind at all: at the sizes m = o s2 + d2 (k2 - 1) - b2 its last tap stands there."""
    between = o * s2 + d2 * (k2 - 1) - b2
    count = SECOND.output_size(between)
    windows = count.subs(a2, 1 + m)
    assert sp.simplify(windows - (o + 1 + sp.floor(m / s2))) == 0
    assert sp.floor(m / s2).is_nonnegative  # so the window o exists
    assert sp.expand(o * s2 + (k2 - 1) * d2 - b2 - between) == 0


@pytest.mark.parametrize("second", [(1, 1, 1), (3, 1, 1), (3, 2, 1), (2, 2, 2), (2, 3, 3), (3, 3, 2), (1, 3, 1)])
@pytest.mark.parametrize("padding", [1, 2, 3, 4])
def test_the_compiler_looks_at_the_nearest_position_that_is_read(second: tuple[int, int, int], padding: int) -> None:
    kernel2, stride2, dilation2 = second
    outer = Axis(kernel2, stride2, dilation2, padding, 0)
    reads = {out * stride2 + tap * dilation2 - padding for out in range(20) for tap in range(kernel2)}
    nearest = min((-position for position in reads if position < 0), default=None)
    for kernel1, stride1, dilation1, before in itertools.product((1, 2, 3, 5), (1, 2), (1, 2), (-1, 0, 1, 2)):
        first = Axis(kernel1, stride1, dilation1, before, 9)
        reaches = nearest is not None and dilation1 * (kernel1 - 1) >= nearest * stride1 + before
        assert (ring(outer, first, None).touched == "leading") == reaches


# --- inside and outside ------------------------------------------------------------------------------------------


def test_the_tap_that_tells_inside_from_outside_does_so_at_every_size() -> None:
    """Every pair of small windows, at sizes beyond all of them: counted, not derived."""
    found = 0
    ranges = [(1, 2, 3), (1, 2, 3), (1, 2), (-1, 0, 1, 2), (-1, 0, 1), (1, 3), (1, 2), (-1, 0, 1), (0, 1)]
    for kernel1, stride1, dilation1, pad1, behind1, kernel2, stride2, pad2, behind2 in itertools.product(*ranges):
        first = Axis(kernel1, stride1, dilation1, pad1, behind1)
        second = Axis(kernel2, stride2, 1, pad2, behind2)
        tap = inside_tap(second, first)
        if tap is not None:
            found += 1
            assert all(_tells_inside(second, first, tap, n) for n in range(1, 14)), (second, first, tap)
        elif stride1 == stride2 == 1 and pad2 >= 0:  # what a second that crops does not read is not asked for
            for other in range(kernel1):
                assert not all(_tells_inside(second, first, other, n) for n in range(1, 14)), (second, first, other)
    assert found > 500


def _tells_inside(second: Axis, first: Axis, tap: int, n: int) -> bool:
    inside = first.output_size(n)
    if inside < 1:
        return True
    read = {
        output * second.stride + j * second.dilation - second.before
        for output in range(second.output_size(inside))
        for j in range(second.kernel)
    }
    elements = {position: position * first.stride + tap * first.dilation - first.before for position in read}
    return all((0 <= position < inside) == (0 <= elements[position] < n) for position in read)


def _size_in_front(offset: Any) -> tuple[Any, Any]:
    """How far (m - 1) s1 + offset and m s1 + offset lie behind the input, if it has m = q + 1 outputs.

    0 is just behind the last element. Behind the last window 0 <= r < s1 elements are left over.
    """
    length = sp.solve(sp.Eq(_floored(FIRST.output_size(n)) * s1, s1 * q + r), n)[0]
    return sp.expand(q * s1 + offset - length), sp.expand((q + 1) * s1 + offset - length)


def test_a_tap_with_an_offset_from_0_below_the_reach_reads_input_at_every_output() -> None:
    """reach + o < 0: at the last of the outputs the tap stands before the end, whatever is left over."""
    at_last, _ = _size_in_front(v)
    short = sp.solve(sp.Eq(FIRST.reach + v, -1 - m), v)[0]
    assert sp.expand(at_last.subs(v, short)) == -1 - m - r  # negative
    assert (i * s1 + v).is_nonnegative  # and at every output i, with an offset v >= 0, behind the start


def test_a_tap_reads_no_input_behind_the_outputs_where_reach_and_offset_make_minus_one_or_more() -> None:
    """reach + o >= -1: at f >= 0 positions behind the outputs the tap stands behind the end, at every size."""
    _, behind = _size_in_front(v)
    long = sp.solve(sp.Eq(FIRST.reach + v, m - 1), v)[0]
    assert sp.expand((behind + f * s1).subs(v, long).subs(s1, r + 1 + slack1)).is_nonnegative


def test_a_tap_with_an_offset_below_the_step_reads_no_input_in_front() -> None:
    """o < g s1: at -g, and at every position before it, the tap stands in front of the input."""
    g = sp.Symbol("g", integer=True, positive=True)
    assert sp.expand(((-g - f) * s1 + v).subs(v, g * s1 - 1 - m)).is_negative


# --- pooling -------------------------------------------------------------------------------------------------------


def test_a_pooling_has_as_many_windows_as_the_convolution_that_stands_for_it() -> None:
    """PyTorch, "Shape": floor((n + 2 padding - dilation (k - 1) - 1) / stride) + 1; dilation 1 of an average."""
    same = Axis(k1, s1, d1, b1, b1)  # type: ignore[arg-type]  # symbols for numbers
    assert sp.simplify(same.output_size(n) - (sp.floor((n + 2 * b1 - d1 * (k1 - 1) - 1) / s1) + 1)) == 0
    plain = Axis(k1, s1, 1, b1, b1)  # type: ignore[arg-type]
    assert sp.simplify(plain.output_size(n) - (sp.floor((n + 2 * b1 - k1) / s1) + 1)) == 0


def test_a_size_that_is_rounded_up_is_one_more_just_where_elements_are_left_over() -> None:
    """ceil(rest / s) = floor((rest + s - 1) / s): q + 1 for rest = s q + r with r > 0, and q for r = 0."""
    bounded = {s1: r + 1 + slack1}
    assert_floor(((s1 * q + r) / s1).subs(bounded), q)
    assert_floor((s1 * q + s1 - 1) / s1, q)
    left = r + 1  # at least one left over, and fewer than s1
    assert_floor(((s1 * q + left + s1 - 1) / s1).subs(s1, left + 1 + slack1), q + 1)


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_the_compiler_rounds_up_where_pytorch_has_one_window_more(stride: int, padding: int) -> None:
    for window, size in itertools.product(range(max(1, 2 * padding), 6), range(1, 14)):
        if size + 2 * padding < window:
            continue
        x = torch.zeros(1, 1, size)
        down, up = (F.avg_pool1d(x, window, stride, padding, ceil_mode=ceil).shape[-1] for ceil in (False, True))
        assert _rounds_up(size, window, stride, padding) == (up == down + 1)
        assert down == Axis(window, stride, 1, padding, padding).output_size(size)


# --- transposed ----------------------------------------------------------------------------------------------------


def test_a_pointwise_layer_on_either_side_leaves_the_size_of_a_transposed_convolution() -> None:
    extra = sp.Symbol("extra", integer=True, nonnegative=True)
    shape = SimpleNamespace(axes=(FIRST,), output_padding=(extra,), transposed=True)
    (size,) = Conv.output_size(cast(Conv, shape), (n,))
    point = Axis(1, 1, 1, 0, 0)
    (before,) = Conv.output_size(cast(Conv, shape), (point.output_size(n),))
    assert sp.expand(before - size) == 0
    assert sp.expand(point.output_size(size) - size) == 0


# --- space to depth ------------------------------------------------------------------------------------------------


def test_padding_that_no_window_reaches_may_go_where_the_factor_divides_the_size() -> None:
    """floor((g m + g t + r) / (g s)) = floor((m + t) / s) for 0 <= r < g: without r there are as many windows."""
    g = r + 1 + slack1  # the factor
    bounded = {s2: v + 1 + slack2}
    whole = g * (s2 * u + v)  # g (m + t), with m + t = s2 u + v and 0 <= v < s2
    assert_floor(((whole + r) / (g * s2)).subs(bounded), u)
    assert_floor((whole / (g * s2)).subs(bounded), u)
