"""Are the laws of the algebra true, exactly, and does each refusal say why? Checked against dense matrices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, reject
from hypothesis import strategies as st
from torch import Tensor

from rgc.algebra import (
    Conv,
    Deferred,
    Linear,
    Scale,
    _linear_part,  # the candidate that the border predicate judges
    add,
    border,
    compose,
    pad,
    regrouped,
    ungrouped,
)
from rgc.errors import GraphError, Refusal
from rgc.ir import TensorType
from rgc.operators import AvgPool, BatchNorm, Identity

Size = tuple[int, ...]
MODES = ("zeros", "constant", "reflect", "replicate", "circular")
SIZES: dict[int, list[Size]] = {
    0: [()],
    1: [(n,) for n in range(1, 16)],
    2: [(1, 1), (3, 4), (5, 5), (6, 6), (7, 6), (8, 11), (12, 9)],
    3: [(3, 3, 3), (4, 5, 6), (5, 5, 5), (7, 6, 6)],
}


# Random integers in float64: every sum below is exact, so equality is `torch.equal`.


def integers(seed: int, *shape: int, low: int = -4, high: int = 5) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).double()


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.float64)


def probe(channels: int, size: Size) -> Tensor:
    return integers(sum(size), 2, channels, *size, low=-1000, high=1001)


def fits(op: Linear, size: Size) -> bool:
    """Does PyTorch run the operator at this size?"""
    if isinstance(op, AvgPool):
        op = op.as_conv(1, op.spatial)
    if not isinstance(op, Conv):
        return True
    if op.size not in (None, size) or min([*op.output_size(size), *size, 1]) < 1:
        return False
    most = {"reflect": -1, "circular": 0}.get(op.padding_mode, 10**6)
    return all(max(sides) <= n + most for sides, n in zip(op.padding, size, strict=True))


def after(op: Linear, size: Size) -> Size:
    if isinstance(op, AvgPool):
        op = op.as_conv(1, op.spatial)
    return op.output_size(size) if isinstance(op, Conv) else size


def both_run(second: Linear, first: Linear, size: Size) -> bool:
    return fits(first, size) and fits(second, after(first, size))


def assert_equal_in_two_steps(merged: Linear, second: Linear, first: Linear, channels: int, size: Size) -> None:
    x = probe(channels, size)
    expected = second.evaluate(first.evaluate(x))
    assert torch.equal(merged.evaluate(x), expected), f"{second.label} after {first.label} differs at {size}"
    if isinstance(merged, Conv):
        assert merged.output_size(size) == tuple(expected.shape[2:])


# The oracle: the matrix of a convolution from the definition, one tap at a time.


def dense(conv: Conv, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """M [out, in] and c [out] with conv(x) = M x + c, all axes flattened."""
    weight = conv.weight.numpy()
    outputs = _scattered_size(conv, size) if conv.transposed else _gathered_size(conv, size)
    M = np.zeros((conv.out_channels, *outputs, conv.in_channels, *size))
    c = np.zeros((conv.out_channels, *outputs))
    rows, columns = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    taps = list(itertools.product(*map(range, weight.shape[2:])))
    for group, row, column, tap in itertools.product(range(conv.groups), range(rows), range(columns), taps):
        o, i = group * rows + row, group * columns + column
        if conv.transposed:
            for position in itertools.product(*map(range, size)):
                place = _scattered(conv, position, tap)
                if all(0 <= at < n for at, n in zip(place, outputs, strict=True)):
                    M[(o, *place, i, *position)] += weight[(i, row, *tap)]
                    if conv.ones is not None and i == 0:
                        c[(o, *place)] += float(conv.ones[(o, *tap)])
            continue
        for place in itertools.product(*map(range, outputs)):
            position = _gathered(conv, place, tap, size)
            if None not in position:
                M[(o, *place, i, *position)] += weight[(o, column, *tap)]
            elif conv.pad_value is not None:
                c[(o, *place)] += weight[(o, column, *tap)] * float(conv.pad_value[i])
            if conv.ones is not None and i == 0 and None not in position:
                c[(o, *place)] += float(conv.ones[(o, *tap)])
    for o, place in itertools.product(range(conv.out_channels), itertools.product(*map(range, outputs))):
        if conv.bias is not None:
            c[(o, *place)] += float(conv.bias[o] if conv.bias.dim() == 1 else conv.bias[(o, *place)])
    return M.reshape(c.size, -1), c.reshape(-1)


def _gathered_size(conv: Conv, size: Size) -> Size:
    """How many windows fit on each axis: o is one while its last tap o s + d (k - 1) is inside the padded input."""
    return tuple(
        sum(o * s + d * (k - 1) < n + b + a for o in range(n + b + a))
        for n, k, s, d, (b, a) in zip(
            size, conv.weight.shape[2:], conv.stride, conv.dilation, conv.padding, strict=True
        )
    )


def _gathered(conv: Conv, place: Size, tap: Size, size: Size) -> list[int | None]:
    axes = zip(place, tap, conv.stride, conv.dilation, conv.padding, size, strict=True)
    return [_looked_up(o * s + j * d - b, n, conv.padding_mode) for o, j, s, d, (b, _), n in axes]


def _looked_up(position: int, n: int, mode: str) -> int | None:
    """Which input element stands at this position of the padded input; None for the constant."""
    if 0 <= position < n:
        return position
    if mode == "zeros":
        return None
    if mode == "replicate":
        return 0 if position < 0 else n - 1
    if mode == "circular":
        return position + n if position < 0 else position - n
    return -position if position < 0 else 2 * (n - 1) - position


def _scattered(conv: Conv, position: Size, tap: Size) -> list[int]:
    axes = zip(position, tap, conv.stride, conv.dilation, conv.padding, strict=True)
    return [i * s + j * d - b for i, j, s, d, (b, _) in axes]


def _scattered_size(conv: Conv, size: Size) -> Size:
    """From the first to the last element written, cropped on both sides, and the extra ones asked for."""
    last = tuple(n - 1 for n in size)
    tap = tuple(k - 1 for k in conv.weight.shape[2:])
    ends = _scattered(conv, last, tap)
    return tuple(
        end + 1 - a + extra for end, (_, a), extra in zip(ends, conv.padding, conv.output_padding, strict=True)
    )


def assert_equals_its_matrix(conv: Conv, size: Size) -> None:
    M, c = dense(conv, size)
    x = probe(conv.in_channels, size)
    expected = torch.stack([torch.from_numpy(M @ item.numpy().reshape(-1) + c) for item in x])
    assert torch.equal(conv.evaluate(x).flatten(1), expected)


# What the properties draw from.

SEEDS = st.integers(0, 2**20)


def divisors(*numbers: int) -> list[int]:
    return [g for g in range(1, min(numbers) + 1) if all(n % g == 0 for n in numbers)]


@st.composite
def convolutions(
    draw: st.DrawFn,
    rank: int,
    reads: int | None = None,
    makes: int | None = None,
    modes: tuple[str, ...] = MODES,
    pointwise: bool = False,
    padded: bool = True,
    bias: bool | None = None,
) -> Conv:
    widths = st.sampled_from((1, 2, 4, 6) if rank > 1 else (1, 2, 4, 6, 12))
    reads, makes = reads or draw(widths), makes or draw(widths)
    groups = draw(st.sampled_from(divisors(reads, makes)))
    largest = {0: 1, 1: 4, 2: 3, 3: 2}[rank]

    def per_axis(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    kernel = per_axis(1, 1 if pointwise else largest)
    stride = per_axis(1, 1 if pointwise else 2 if rank > 1 else 3)
    padding = tuple(zip(per_axis(-1, 2), per_axis(-1, 2), strict=True)) if padded and not pointwise else 0
    mode = draw(st.sampled_from(modes))
    seed = draw(SEEDS)
    ones = integers(seed + 3, makes, *kernel) if groups == 1 and mode in ("zeros", "constant") and rank else None
    return Conv(
        integers(seed, makes, reads // groups, *kernel),
        integers(seed + 1, makes) if (draw(st.booleans()) if bias is None else bias) else None,
        stride,
        padding,
        per_axis(1, 2 if rank > 1 else 3),
        groups,
        "zeros" if mode == "constant" else mode,
        integers(seed + 2, reads) if mode == "constant" else None,
        ones=ones if draw(st.integers(0, 3)) == 0 else None,
    )


@st.composite
def transposed_convolutions(draw: st.DrawFn, rank: int, reads: int | None = None) -> Conv:
    plain = draw(
        convolutions(rank, reads=draw(st.sampled_from((1, 2, 4))) if reads is None else reads, modes=("zeros",))
    )
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(plain.stride, plain.dilation, strict=True))
    rows, columns = plain.out_channels // plain.groups, plain.in_channels
    weight = integers(draw(SEEDS), columns, rows, *plain.kernel)
    before = tuple((abs(b), abs(b)) for b, _ in plain.padding)
    return Conv(
        weight, plain.bias, plain.stride, before, plain.dilation, plain.groups, transposed=True, output_padding=extra,
        ones=plain.ones,
    )  # fmt: skip


@st.composite
def followed(draw: st.DrawFn, rank: int) -> tuple[Conv, Conv]:
    """(second, first), half of them where the border cannot hurt."""
    kind = draw(st.sampled_from(("any", "inner padding only", "first pointwise", "second pointwise")))
    first = draw(convolutions(rank, pointwise=kind == "first pointwise"))
    padded = kind != "inner padding only"
    second = draw(convolutions(rank, first.out_channels, pointwise=kind == "second pointwise", padded=padded))
    return second, first


@st.composite
def siblings(draw: st.DrawFn, rank: int) -> tuple[Conv, Conv]:
    """Two branches of the same stride, mostly of the same output grid."""
    a = draw(convolutions(rank))
    b = draw(convolutions(rank, a.in_channels, a.out_channels))
    b = replace(b, stride=a.stride)
    if not draw(st.integers(0, 4)):
        return a, b
    padding = []
    for (before, behind), d1, k1, d2, k2 in zip(a.padding, a.dilation, a.kernel, b.dilation, b.kernel, strict=True):
        total = before + behind - d1 * (k1 - 1) + d2 * (k2 - 1)
        padding.append((start := draw(st.integers(min(total, 0), max(total, 0))), total - start))
    mode = draw(st.sampled_from((a.padding_mode, "zeros"))) if not any(map(any, padding)) else a.padding_mode
    value, ones = (a.pad_value, b.ones) if mode == "zeros" else (None, None)
    return a, replace(b, padding=tuple(padding), padding_mode=mode, pad_value=value, ones=ones)


def unless_refused(law: Callable[..., Linear], *arguments: Any) -> Linear:
    """What the law returns; an example that it refuses is drawn again."""
    try:
        return law(*arguments)
    except Refusal:
        reject()


# --- the operator is what its definition says ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("rank", "size"), [(0, ()), (1, (7,)), (2, (4, 5)), (3, (3, 4, 3))])
@given(data=st.data())
def test_a_convolution_equals_its_matrix(mode: str, rank: int, size: Size, data: st.DataObject) -> None:
    widths = st.sampled_from((1, 2, 4))
    conv = data.draw(convolutions(rank, data.draw(widths), data.draw(widths), modes=(mode,)))
    assume(fits(conv, size))
    assert_equals_its_matrix(conv, size)


@pytest.mark.parametrize(("rank", "size"), [(1, (4,)), (2, (2, 3)), (3, (2, 1, 3))])
@given(data=st.data())
def test_a_transposed_convolution_equals_its_matrix(rank: int, size: Size, data: st.DataObject) -> None:
    conv = data.draw(transposed_convolutions(rank))
    assume(fits(conv, size))
    assert_equals_its_matrix(conv, size)


@pytest.mark.parametrize(("rank", "size"), [(1, (6,)), (2, (5, 4))])
@given(data=st.data())
def test_a_bias_map_is_added_where_it_stands(rank: int, size: Size, data: st.DataObject) -> None:
    conv = data.draw(convolutions(rank, 2, 2))
    assume(fits(conv, size))
    bias = integers(data.draw(SEEDS), 2, *conv.output_size(size))
    assert_equals_its_matrix(replace(conv, bias=bias, size=size), size)


@given(conv=convolutions(2, 4, 4, modes=("zeros", "circular")))
def test_fewer_groups_are_the_same_convolution(conv: Conv) -> None:
    assume(fits(conv, (5, 6)))
    x = probe(4, (5, 6))
    for groups in divisors(conv.groups):
        assert regrouped(conv, groups).groups == groups
        assert torch.equal(regrouped(conv, groups).evaluate(x), conv.evaluate(x))
    assert ungrouped(conv).groups == 1


def test_padding_is_what_the_convolution_sees() -> None:
    x = probe(2, (3, 4))
    conv = Conv(ones(1, 2, 1, 1), padding=((1, 0), (0, 2)), pad_value=torch.tensor([3.0, 5.0]).double())
    padded = pad(x, conv)
    assert padded.shape == (2, 2, 4, 6)
    assert torch.equal(padded[:, :, 1:, :4], x)
    assert torch.equal(padded[0, :, 0, 0], torch.tensor([3.0, 5.0]).double())
    assert torch.equal(padded[1, :, 3, 5], torch.tensor([3.0, 5.0]).double())


# --- composition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@given(data=st.data())
def test_what_compose_returns_without_a_size_holds_at_every_size(rank: int, data: st.DataObject) -> None:
    second, first = data.draw(followed(rank))
    merged = unless_refused(compose, second, first)
    assert isinstance(merged, Conv) and merged.size is None
    for size in SIZES[rank]:
        if both_run(second, first, size):
            assert fits(merged, size)
            assert_equal_in_two_steps(merged, second, first, first.in_channels, size)


@pytest.mark.parametrize("rank", [1, 2, 3])
@given(data=st.data())
def test_what_compose_returns_for_a_size_holds_there_and_is_pinned_only_if_it_must_be(
    rank: int, data: st.DataObject
) -> None:
    second, first = data.draw(followed(rank))
    size = data.draw(st.sampled_from(SIZES[rank]))
    assume(both_run(second, first, size))
    merged = unless_refused(compose, second, first, size)
    assert isinstance(merged, Conv) and merged.size in (None, size)
    assert_equal_in_two_steps(merged, second, first, first.in_channels, size)
    if merged.size is None:
        for other in SIZES[rank]:
            if both_run(second, first, other):
                assert_equal_in_two_steps(merged, second, first, first.in_channels, other)
    else:
        with pytest.raises(GraphError, match="only, got"):
            merged.evaluate(probe(first.in_channels, tuple(n + 1 for n in size)))


@given(pair=followed(1), n=st.integers(3, 9))
def test_the_matrix_of_a_composition_is_the_product_of_the_matrices(pair: tuple[Conv, Conv], n: int) -> None:
    second, first = pair
    assume(both_run(second, first, (n,)))
    merged = unless_refused(compose, second, first, (n,))
    assert isinstance(merged, Conv)
    (M1, c1), (M2, c2), (M, c) = dense(first, (n,)), dense(second, first.output_size((n,))), dense(merged, (n,))
    assert np.array_equal(M, M2 @ M1)
    assert np.array_equal(c, M2 @ c1 + c2)


@given(data=st.data())
def test_a_bias_map_composes_on_either_side(data: st.DataObject) -> None:
    second, first = data.draw(followed(1))
    n = data.draw(st.integers(3, 9))
    assume(both_run(second, first, (n,)))
    middle = first.output_size((n,))
    seed = data.draw(SEEDS)
    if data.draw(st.booleans()):
        first = replace(first, bias=integers(seed, first.out_channels, *middle), size=(n,))
    else:
        second = replace(second, bias=integers(seed, second.out_channels, *second.output_size(middle)), size=middle)
    merged = unless_refused(compose, second, first, (n,))
    assert isinstance(merged, Conv) and merged.size == (n,)
    assert_equal_in_two_steps(merged, second, first, first.in_channels, (n,))


@pytest.mark.parametrize(("inner", "outer"), [(4, 6), (6, 4), (12, 1), (1, 12), (12, 12), (12, 4), (3, 12)])
@pytest.mark.parametrize("size", [None, (5, 6)])
def test_groups_that_do_not_divide_each_other_meet_in_their_gcd(inner: int, outer: int, size: Size | None) -> None:
    first = Conv(integers(1, 24, 12 // inner, 2, 1), groups=inner)
    second = Conv(integers(2, 12, 24 // outer, 1, 3), integers(3, 12), groups=outer, padding=((0, 0), (2, 1)))
    merged = compose(second, first, size)
    assert isinstance(merged, Conv) and merged.groups == math.gcd(inner, outer)
    assert_equal_in_two_steps(merged, second, first, 12, (5, 6))


def affine_operands(rank: int, channels: int) -> st.SearchStrategy[Linear]:
    """Operators that are not written as convolutions, with parameters that keep the arithmetic exact."""

    def scale(seed: int) -> Scale:
        return Scale(integers(seed, channels), integers(seed + 1, channels), rank)

    def batch_norm(seed: int) -> BatchNorm:
        var = 4.0 ** integers(seed, channels, low=0, high=3) - 0.25  # with eps, powers of two under the root
        weight, bias = (integers(seed + i, channels) for i in (1, 2))
        return BatchNorm(integers(seed + 3, channels), var, weight, bias, 0.25, rank)

    pools = [AvgPool((2,) * rank, (s,) * rank, (p,) * rank) for s in (1, 2, 3) for p in (0, 1)] if rank else []
    plain = [Identity(), Scale(torch.tensor([-2.0]), torch.tensor([3.0])), *pools]
    return st.one_of(SEEDS.map(scale), SEEDS.map(batch_norm), st.sampled_from(plain))


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@pytest.mark.parametrize("sized", [False, True])
@given(data=st.data())
def test_scales_norms_pools_and_identities_compose_on_either_side(rank: int, sized: bool, data: st.DataObject) -> None:
    conv = data.draw(convolutions(rank, 2, 2))
    other = data.draw(affine_operands(rank, 2))
    second, first = (conv, other) if data.draw(st.booleans()) else (other, conv)
    size = data.draw(st.sampled_from(SIZES[rank]))
    assume(both_run(second, first, size))
    merged = unless_refused(compose, second, first, size if sized else None)
    for each in [size] if sized else SIZES[rank]:
        if both_run(second, first, each):
            assert_equal_in_two_steps(merged, second, first, 2, each)


@pytest.mark.parametrize("rank", [1, 2, 3])
@given(data=st.data())
def test_a_pointwise_layer_merges_into_a_transposed_one_on_either_side(rank: int, data: st.DataObject) -> None:
    transposed = data.draw(transposed_convolutions(rank))
    if data.draw(st.booleans()):
        first: Conv = transposed
        second = data.draw(convolutions(rank, first.out_channels, modes=("zeros",), pointwise=True))
    else:
        second = transposed
        first = data.draw(convolutions(rank, None, second.in_channels, modes=("zeros",), pointwise=True))
    size = data.draw(st.sampled_from(SIZES[rank][:4]))
    assume(both_run(second, first, size))
    with_size = compose(second, first, size)
    assert_equal_in_two_steps(with_size, second, first, first.in_channels, size)
    merged = unless_refused(compose, second, first)
    for each in SIZES[rank]:
        if both_run(second, first, each):
            assert_equal_in_two_steps(merged, second, first, first.in_channels, each)


@pytest.mark.parametrize("bias", [None, integers(2, 3)], ids=["without bias", "with bias"])
def test_a_bias_map_after_a_transposed_layer_is_pinned_to_the_size_before_it(bias: Tensor | None) -> None:
    first = Conv(integers(1, 2, 3, 2), bias, stride=2, transposed=True)
    second = Conv(integers(3, 2, 3, 1), integers(4, 2, 10), size=(10,))
    merged = compose(second, first, (5,))
    assert isinstance(merged, Conv) and merged.size == (5,)
    assert_equal_in_two_steps(merged, second, first, 2, (5,))


@given(a=SEEDS, b=SEEDS, x=SEEDS)
def test_two_scales_are_one_scale(a: int, b: int, x: int) -> None:
    first, second = (Scale(integers(s, 3), integers(s + 1, 3), 1) for s in (a, b))
    single = Scale(integers(a, 1), integers(b, 1))
    given_x = integers(x, 2, 3, 4)
    for one, two in ((first, second), (first, single), (single, second), (single, single)):
        product, total = two @ one, two + one
        assert isinstance(product, Scale) and isinstance(total, Scale)
        assert torch.equal(product.evaluate(given_x), two.evaluate(one.evaluate(given_x)))
        assert torch.equal(total.evaluate(given_x), two.evaluate(given_x) + one.evaluate(given_x))


def test_two_identities_are_the_identity() -> None:
    for merged in (Identity() @ Identity(), Identity("dropout") @ Scale(ones(1), torch.zeros(1))):
        assert isinstance(merged, Scale) and merged.is_identity


# --- sum ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@given(data=st.data())
def test_what_add_returns_without_a_size_holds_at_every_size(rank: int, data: st.DataObject) -> None:
    a, b = data.draw(siblings(rank))
    merged = unless_refused(add, a, b)
    assert isinstance(merged, Conv) and merged.size is None
    for size in SIZES[rank]:
        if fits(a, size) and fits(b, size):
            x = probe(a.in_channels, size)
            assert merged.output_size(size) == a.output_size(size) == b.output_size(size)
            assert torch.equal(merged.evaluate(x), a.evaluate(x) + b.evaluate(x))


@pytest.mark.parametrize("rank", [1, 2, 3])
@given(data=st.data())
def test_what_add_returns_for_a_size_holds_there(rank: int, data: st.DataObject) -> None:
    a, b = data.draw(siblings(rank))
    more = data.draw(st.integers(0, 1))  # with a stride, one more element behind need not be one more output
    b = replace(b, padding=tuple((before, behind + more) for before, behind in b.padding))
    sizes = [s for s in SIZES[rank] if fits(a, s) and fits(b, s) and a.output_size(s) == b.output_size(s)]
    assume(sizes)
    for size in sizes:
        maps = {"bias": integers(1, a.out_channels, *a.output_size(size)), "size": size}
        for left, right in ((a, b), (replace(a, **maps), b), (a, replace(b, **maps))):
            merged = unless_refused(add, left, right, size)
            x = probe(a.in_channels, size)
            assert isinstance(merged, Conv) and merged.size in (None, size)
            assert torch.equal(merged.evaluate(x), left.evaluate(x) + right.evaluate(x))


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@given(data=st.data())
def test_scales_norms_pools_and_identities_add_on_either_side(rank: int, data: st.DataObject) -> None:
    conv = data.draw(convolutions(rank, 2, 2, modes=("zeros",)))
    if data.draw(st.booleans()):  # the usual branch: same size, stride one
        extents = [d * (k - 1) for k, d in zip(conv.kernel, conv.dilation, strict=True)]
        conv = replace(conv, stride=1, padding=tuple((extent - extent // 2, extent // 2) for extent in extents))
    other = data.draw(affine_operands(rank, 2))
    left, right = (conv, other) if data.draw(st.booleans()) else (other, conv)
    merged = unless_refused(add, left, right)
    for size in SIZES[rank]:
        if fits(left, size) and fits(right, size):
            x = probe(2, size)
            assert torch.equal(merged.evaluate(x), left.evaluate(x) + right.evaluate(x))


@given(a=transposed_convolutions(2), seed=SEEDS)
def test_transposed_branches_of_one_geometry_add(a: Conv, seed: int) -> None:
    b = replace(a, weight=integers(seed, *a.weight.shape), bias=integers(seed, a.out_channels))
    size = (3, 4)
    assume(fits(a, size))
    x = probe(a.in_channels, size)
    assert torch.equal((a + b).evaluate(x), a.evaluate(x) + b.evaluate(x))


def test_the_three_branches_of_repvgg_are_one_3x3() -> None:
    var = 4.0 ** integers(2, 4, low=0, high=2) - 0.25
    norm = BatchNorm(integers(1, 4), var, integers(3, 4), integers(4, 4), 0.25, 2)
    three, one = Conv(integers(5, 4, 4, 3, 3), integers(6, 4), padding=1), Conv(integers(7, 4, 4, 1, 1))
    merged = (three + one) + norm
    assert isinstance(merged, Conv) and merged.kernel == (3, 3) and merged.padding == ((1, 1), (1, 1))
    for size in SIZES[2]:
        x = probe(4, size)
        assert torch.equal(merged.evaluate(x), three.evaluate(x) + one.evaluate(x) + norm.evaluate(x))


def test_branches_of_different_grids_add_at_a_size_where_they_agree_and_pad_no_more_than_they_did() -> None:
    a, b = Conv(integers(1, 1, 1, 2), stride=2), Conv(integers(2, 1, 1, 3), stride=2)
    merged = add(a, b, (7,))
    assert isinstance(merged, Conv) and merged.size == (7,) and not merged.is_padded
    assert torch.equal(merged.evaluate(probe(1, (7,))), a.evaluate(probe(1, (7,))) + b.evaluate(probe(1, (7,))))


# --- the border predicate is exact --------------------------------------------------------------------------------


def matrix(convs: list[Conv], size: Size) -> Tensor:
    """The matrix of a chain of bias-free convolutions of one channel: its answer to each unit vector."""
    count = math.prod(size)
    y = torch.eye(count, dtype=torch.float64).view(count, 1, *size)
    for conv in convs:
        y = conv.evaluate(y)
    return y


@st.composite
def positive_pairs(draw: st.DrawFn, rank: int) -> tuple[Conv, Conv]:
    """(second, first) of one channel, zero-padded, without bias; positive weights, so that nothing cancels."""

    def one() -> Conv:
        def per_axis(low: int, high: int) -> tuple[int, ...]:
            return tuple(draw(st.integers(low, high if rank == 1 else min(high, 2))) for _ in range(rank))

        kernel = tuple(draw(st.integers(1, 4 if rank == 1 else 3)) for _ in range(rank))
        padding = tuple(zip(per_axis(-1, 3), per_axis(-1, 3), strict=True))
        weight = integers(draw(SEEDS), 1, 1, *kernel, low=1)
        return Conv(weight, stride=per_axis(1, 3), padding=padding, dilation=per_axis(1, 3))

    return one(), one()


@pytest.mark.parametrize(("rank", "largest"), [(1, 12), (2, 5)])
@given(data=st.data())
def test_at_a_size_the_border_refuses_just_where_one_convolution_would_differ(
    rank: int, largest: int, data: st.DataObject
) -> None:
    second, first = data.draw(positive_pairs(rank))
    candidate = _linear_part(second, first)
    for size in itertools.product(range(1, largest + 1), repeat=rank):
        if both_run(second, first, size):
            equal = torch.equal(matrix([candidate], size), matrix([first, second], size))
            assert (border(second, first, size) is None) == equal, size


@pytest.mark.parametrize(("rank", "largest"), [(1, 60), (2, 20)])
@given(data=st.data())
def test_without_a_size_the_border_refuses_just_where_some_size_would_be_refused(
    rank: int, largest: int, data: st.DataObject
) -> None:
    second, first = data.draw(positive_pairs(rank))
    sizes: Iterator[Size] = itertools.product(range(1, largest + 1), repeat=rank)
    refused = any(both_run(second, first, size) and border(second, first, size) is not None for size in sizes)
    assert (border(second, first, None) is not None) == refused


def test_a_ring_that_the_second_steps_over_does_no_harm() -> None:
    first = Conv(integers(1, 1, 1, 3), padding=1)
    second = Conv(integers(2, 1, 1, 3), stride=2, dilation=2, padding=((2, 0),))  # reads -2, 0, 2, ... but never -1
    assert border(second, first, None) is None
    for n in range(5, 12):
        assert_equal_in_two_steps(second @ first, second, first, 1, (n,))


def test_a_ring_that_is_not_read_at_one_size_pins_the_composition_to_that_size() -> None:
    first = Conv(integers(1, 1, 1, 2, low=1))
    second = Conv(integers(2, 1, 1, 3, low=1), stride=2, padding=((0, 1),))  # the last window ends inside at even sizes
    merged = compose(second, first, (6,))
    assert isinstance(merged, Conv) and merged.size == (6,)
    assert_equal_in_two_steps(merged, second, first, 1, (6,))
    for size in (None, (7,)):
        with pytest.raises(Refusal, match="trailing side"):
            compose(second, first, size)


# --- named facts --------------------------------------------------------------------------------------------------


def three_by_three(seed: int, padding: int = 1, bias: bool = False, **options: Any) -> Conv:
    return Conv(integers(seed, 2, 2, 3, 3), integers(seed + 1, 2) if bias else None, padding=padding, **options)


def pointwise(seed: int, bias: bool = True, **options: Any) -> Conv:
    return Conv(integers(seed, 2, 2, 1, 1), integers(seed + 1, 2, low=1) if bias else None, **options)


def assert_exact_everywhere(second: Linear, first: Linear) -> None:
    merged = second @ first
    for size in SIZES[2]:
        if both_run(second, first, size):
            assert_equal_in_two_steps(merged, second, first, 2, size)


@pytest.mark.parametrize("size", [None, (8, 8), (7, 9)])
def test_a_padded_3x3_after_a_padded_3x3_is_refused_for_its_border_ring(size: Size | None) -> None:
    with pytest.raises(Refusal, match=r"border ring: .* 1 wide .* \(axis 0, leading side\)"):
        compose(three_by_three(1), three_by_three(2), size)


def test_the_trailing_side_alone_is_named() -> None:
    with pytest.raises(Refusal, match=r"axis 1, trailing side"):
        compose(Conv(ones(1, 1, 1, 2), padding=((0, 0), (0, 1))), Conv(ones(1, 1, 1, 2)))


@pytest.mark.parametrize(("inner", "outer"), [(2, 1), (0, 0), (1, 0)])
def test_a_3x3_after_a_3x3_is_exact_where_the_padding_comes_first(inner: int, outer: int) -> None:
    second, first = three_by_three(1, outer), three_by_three(2, inner)
    assert_exact_everywhere(second, first)
    merged = second @ first
    assert isinstance(merged, Conv)
    assert merged.kernel == (5, 5) and merged.padding == ((inner + outer,) * 2,) * 2


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(6, 6), (7, 7), (8, 5)])
@pytest.mark.parametrize("padding", [1, 2])
def test_a_biased_1x1_before_a_padded_convolution_is_one_with_ones_or_a_bias_map(
    stride: int, size: Size, padding: int
) -> None:
    kernel = 2 * padding + 1
    second = Conv(integers(1, 2, 2, kernel, kernel), integers(2, 2), stride, padding)
    first = pointwise(3)
    anywhere = compose(second, first)
    assert isinstance(anywhere, Conv) and anywhere.size is None and anywhere.ones is not None
    assert_equal_in_two_steps(anywhere, second, first, 2, size)
    merged = compose(second, first, size)
    assert isinstance(merged, Conv) and merged.size == size and merged.bias is not None
    assert_equal_in_two_steps(merged, second, first, 2, size)
    distinct = torch.unique(merged.bias.flatten(1), dim=1).shape[1]
    assert 1 < distinct <= (2 * padding + 1) ** 2


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_an_unbiased_1x1_before_a_padded_convolution_is_exact_everywhere(stride: int) -> None:
    assert_exact_everywhere(three_by_three(1, bias=True, stride=stride), pointwise(3, bias=False))


def test_a_strided_1x1_before_a_padded_convolution_is_exact_everywhere() -> None:
    assert_exact_everywhere(three_by_three(1, bias=True), pointwise(3, bias=False, stride=2))


def test_padding_with_the_bias_needs_neither_a_map_nor_a_size() -> None:
    first = pointwise(3)
    assert_exact_everywhere(three_by_three(1, bias=True, pad_value=first.bias), first)


def test_a_strided_1x1_with_a_bias_before_a_padded_convolution_is_one_with_ones() -> None:
    assert_exact_everywhere(three_by_three(1, bias=True), pointwise(3, stride=2))


def test_a_biased_depthwise_layer_before_a_padded_depthwise_one_pads_with_what_becomes_zero() -> None:
    first = Conv(4 * torch.tensor([1.0, -1.0]).double().view(2, 1, 1, 1), 8 * ones(2), groups=2)
    second = Conv(integers(2, 2, 1, 3, 3), padding=1, groups=2)
    merged = second @ first
    assert isinstance(merged, Conv) and merged.groups == 2 and merged.pad_value is not None
    assert merged.pad_value.tolist() == [-2, 2]
    assert_exact_everywhere(second, first)


def test_a_biased_pointwise_layer_of_groups_before_a_padded_one_gives_up_its_groups_or_needs_a_map() -> None:
    first = Conv(integers(1, 4, 2, 1, 1), integers(2, 4), groups=2)
    second = Conv(integers(3, 4, 1, 3, 3), padding=1, groups=4)
    merged = compose(second, first)
    assert isinstance(merged, Conv) and merged.ones is not None and merged.groups == 1
    for size in SIZES[2]:
        assert_equal_in_two_steps(merged, second, first, 4, size)
    assert_equal_in_two_steps(compose(second, first, (5, 4)), second, first, 4, (5, 4))


def test_a_factor_of_zero_cannot_make_up_for_a_bias_but_ones_can() -> None:
    first = Conv(torch.zeros(2, 1, 1, 1).double(), ones(2), groups=2)
    second = Conv(integers(3, 2, 1, 3, 3), padding=1, groups=2)
    merged = second @ first
    assert isinstance(merged, Conv) and merged.pad_value is None and merged.ones is not None
    assert_exact_everywhere(second, first)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
def test_a_biased_band_before_the_band_across_it_is_one_with_ones(kernel: int, stride: int, groups: int) -> None:
    """1xk then kx1: where the second pads, the first reads one element; where the first pads, its middle is inside."""
    half = kernel // 2
    first = Conv(
        integers(1, 2, 2 // groups, 1, kernel), integers(2, 2, low=1), (1, stride), ((0, 0), (half, half)),
        groups=groups,
    )  # fmt: skip
    second = Conv(integers(3, 2, 2 // groups, kernel, 1), integers(4, 2), padding=((half, half), (0, 0)), groups=groups)
    merged = second @ first
    assert isinstance(merged, Conv) and merged.ones is not None and merged.groups == 1
    assert_exact_everywhere(second, first)
    again = replace(second, weight=integers(5, 2, 2, kernel, 1), groups=1, ones=integers(6, 2, kernel, 1))
    assert_exact_everywhere(again, first)  # a channel of ones of the second is 1 just there as well


def test_a_band_whose_outputs_reach_beyond_its_input_needs_a_map() -> None:
    first = Conv(integers(1, 2, 2, 1, 3), integers(2, 2, low=1), padding=((0, 0), (2, 2)))
    second = Conv(integers(3, 2, 2, 3, 1), padding=((1, 1), (0, 0)))
    with pytest.raises(Refusal, match="reads a ring .* as zeros, not as its bias: exact only with a bias map"):
        compose(second, first)
    assert_equal_in_two_steps(compose(second, first, (4, 3)), second, first, 2, (4, 3))


def test_a_band_that_pads_by_copies_or_a_constant_takes_no_ones() -> None:
    second = Conv(integers(3, 2, 2, 3, 1), padding=((1, 1), (0, 0)))
    for options in ({"padding_mode": "reflect"}, {"pad_value": 3 * ones(2)}):
        first = Conv(integers(1, 2, 2, 1, 3), integers(2, 2, low=1), padding=((0, 0), (1, 1)), **options)
        with pytest.raises(Refusal, match="bias map|pads by reflect"):
            compose(second, first)


def test_a_crop_before_a_kernel_is_a_crop_of_its_padding() -> None:
    crop = Conv(ones(2, 1, 1, 1), padding=((-1, 0), (0, -2)), groups=2)
    merged = three_by_three(1, 0) @ crop
    assert isinstance(merged, Conv) and merged.padding == ((-1, 0), (0, -2))
    assert_exact_everywhere(three_by_three(1, 0), crop)


def test_zeros_around_a_crop_are_refused() -> None:
    with pytest.raises(Refusal, match="border ring"):
        three_by_three(1) @ Conv(ones(2, 1, 1, 1), padding=-1, groups=2)


def test_padding_with_another_constant_than_the_bias_needs_a_map() -> None:
    with pytest.raises(Refusal, match="reads a ring .* as its pad value, not as its bias"):
        compose(three_by_three(1, pad_value=ones(2)), pointwise(3, bias=True))


def test_a_constant_padded_twice_is_exact_where_the_constants_agree() -> None:
    first = Conv(ones(1, 1, 1), torch.tensor([2.0]).double(), padding=1, pad_value=3 * ones(1))
    second = Conv(integers(1, 1, 1, 3), padding=1, pad_value=5 * ones(1))  # 1 * 3 + 2
    merged = second @ first
    for n in range(1, 8):
        assert_equal_in_two_steps(merged, second, first, 1, (n,))


def test_what_an_unpadded_convolution_would_pad_with_does_not_count() -> None:
    five = 5 * ones(1)
    merged = compose(Conv(ones(1, 1, 3), padding=1, pad_value=five), Conv(2 * ones(1, 1, 1), pad_value=five))
    assert isinstance(merged, Conv) and merged.pad_value is not None and merged.pad_value.item() == 2.5
    second, first = Conv(integers(1, 1, 1, 3), padding=1), Conv(integers(2, 1, 1, 1), padding_mode="reflect")
    for n in range(1, 6):
        assert_equal_in_two_steps(second @ first, second, first, 1, (n,))


def test_a_batch_norm_before_a_padded_convolution_pads_with_what_becomes_zero_or_needs_a_bias_map() -> None:
    norm = BatchNorm(integers(1, 2, low=1), 3.75 * ones(2), integers(2, 2, low=1), integers(3, 2), 0.25, 2)
    second = three_by_three(4, bias=True)
    for size in SIZES[2]:
        assert_equal_in_two_steps(compose(second, norm, size), second, norm, 2, size)
        found, expected = (
            f(probe(2, size)) for f in ((second @ norm).evaluate, lambda x: second.evaluate(norm.evaluate(x)))
        )
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-9)  # the pad value is a quotient


def test_circular_after_circular_is_exact_at_a_size_and_refused_without() -> None:
    second, first = (three_by_three(s, bias=True, padding_mode="circular") for s in (1, 3))
    with pytest.raises(Refusal, match="circular padding of 2 must not wrap twice: exact at a fixed size"):
        compose(second, first)
    for size in [(2, 3), (5, 4), (7, 7)]:
        merged = compose(second, first, size)
        assert isinstance(merged, Conv) and merged.size == size
        assert_equal_in_two_steps(merged, second, first, 2, size)
    with pytest.raises(Refusal, match=r"circular padding of 2 would wrap twice around an input of \(1, 5\)"):
        compose(second, first, (1, 5))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_by_copies_commutes_with_a_biased_1x1(mode: Any) -> None:
    assert_exact_everywhere(three_by_three(1, bias=True, padding_mode=mode), pointwise(3))


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
@pytest.mark.parametrize("size", [None, (6, 6)])
def test_padding_by_copies_is_refused_after_anything_wider(mode: Any, size: Size | None) -> None:
    second, first = (three_by_three(s, padding_mode=mode) for s in (1, 3))
    with pytest.raises(Refusal, match=f"pads by {mode}, which commutes only with a pointwise layer; found conv 3x3"):
        compose(second, first, size)


@pytest.mark.parametrize(
    ("mode", "stride", "inner", "outer"),
    [("reflect", 3, (0, 0), (1, 0)), ("replicate", 1, (2, 2), (1, 1)), ("replicate", 2, (2, 3), (2, 0))],
)
def test_copies_of_the_same_elements_are_exact_after_a_wider_or_strided_layer(
    mode: Any, stride: int, inner: tuple[int, int], outer: tuple[int, int]
) -> None:
    """The first element is copied before it only; or every window outside sees nothing but copies of the edge."""
    kernel = 1 if mode == "reflect" else 3
    first = Conv(integers(1, 2, 2, kernel, kernel), padding=(inner,) * 2, stride=stride, padding_mode=mode)
    second = three_by_three(3, bias=True, padding_mode=mode)
    assert_exact_everywhere(replace(second, padding=(outer,) * 2), first)


def test_zeros_around_the_output_of_a_convolution_that_pads_by_copies_are_refused() -> None:
    first = three_by_three(1, padding_mode="reflect")
    with pytest.raises(Refusal, match="pads by reflect where conv 3x3 2->2 pads zeros around its output"):
        compose(three_by_three(3), first)


def test_reflection_on_one_axis_then_on_the_other_is_one_reflection() -> None:
    first = Conv(integers(1, 2, 2, 3, 1), integers(2, 2), padding=(1, 0), padding_mode="reflect")
    second = Conv(integers(3, 2, 2, 1, 3), integers(4, 2), padding=(0, 1), padding_mode="reflect")
    assert_exact_everywhere(second, first)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(6, 6), (7, 7), (5, 8)])
def test_a_linearised_inverted_residual_is_one_3x3_and_a_bias_map(stride: int, size: Size) -> None:
    expand = Conv(integers(1, 12, 2, 1, 1), integers(2, 12, low=1))
    depthwise = Conv(integers(3, 12, 1, 3, 3), integers(4, 12), stride, 1, groups=12)
    project = Conv(integers(5, 2, 12, 1, 1), integers(6, 2))
    body = compose(project, compose(depthwise, expand, size), size)
    x = probe(2, size)
    expected = project.evaluate(depthwise.evaluate(expand.evaluate(x)))
    if stride == 1:
        body, expected = add(body, Identity(), size), expected + x
    assert isinstance(body, Conv) and body.kernel == (3, 3) and body.groups == 1 and body.size == size
    assert body.label.endswith("+ bias map")
    assert torch.equal(body.evaluate(x), expected)


def test_what_is_merged_from_float32_is_float64_throughout() -> None:
    up = Conv(torch.ones(2, 2, 2), torch.ones(2), stride=2, transposed=True)
    for merged in (compose(up, Conv(torch.ones(2, 2, 1))), compose(Conv(torch.ones(2, 2, 1), torch.ones(2)), up)):
        assert {t.dtype for t in merged.tensors()} == {torch.float64}


# --- every refusal says why ---------------------------------------------------------------------------------------


def test_a_transposed_layer_takes_in_pointwise_layers_only() -> None:
    up, wide = Conv(ones(2, 2, 2, 2), stride=2, transposed=True), three_by_three(1)
    with pytest.raises(Refusal, match="only a pointwise layer merges into transposed conv 2x2 2->2 /2; found conv 3x3"):
        wide @ up
    with pytest.raises(Refusal, match="only a pointwise layer merges into transposed conv 2x2 2->2 /2; found conv 3x3"):
        up @ wide


def test_a_bias_before_a_transposed_layer_needs_ones_or_a_size() -> None:
    up = Conv(integers(1, 2, 2, 3, 3), integers(2, 2), stride=2, transposed=True)
    merged = up @ pointwise(1)
    assert isinstance(merged, Conv) and merged.ones is not None and merged.size is None
    for size in SIZES[2]:
        assert_equal_in_two_steps(merged, up, pointwise(1), 2, size)
    grouped = Conv(integers(1, 4, 1, 3, 3), stride=2, groups=4, transposed=True)
    with pytest.raises(
        Refusal, match="reaches the border and the gaps of transposed conv 3x3 4->4 /2 groups=4 unevenly"
    ):
        grouped @ Conv(integers(1, 4, 2, 1, 1), integers(2, 4), groups=2)


def scaled_down(factor: float, groups: int = 1) -> Conv:
    """A padded convolution of s x + t, as one that pads with -t / s."""
    scale = Scale(factor * ones(2), torch.tensor([1.0, 2.0]).double(), axes=2)
    merged = compose(Conv(integers(1, 2, 2 // groups, 3, 3), padding=1, groups=groups), scale)
    assert isinstance(merged, Conv) and merged.pad_value is not None
    return merged


def rounding(conv: Linear, oracle: Linear) -> float:
    """The error in float32 on inputs of unit size, of the largest output."""
    x = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = oracle.evaluate(x)
    return float((conv.as_conv(2, 2).cast(torch.float32).evaluate(x.float()) - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("factor", [1.0, 0.1, 1e-3, 1e-6, -1e-6])
def test_a_sum_with_an_unpadded_branch_rounds_no_worse_for_the_pad_value_of_the_other(factor: float) -> None:
    padded, identity = scaled_down(factor), Conv(2 * torch.eye(2, dtype=torch.float64).reshape(2, 2, 1, 1))
    for merged in (add(padded, identity), add(identity, padded)):
        assert isinstance(merged, Conv) and (merged.pad_value is None) == (abs(factor) < 0.01)
        x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
        torch.testing.assert_close(merged.evaluate(x), padded.evaluate(x) + 2 * x, rtol=0, atol=1e-9)
        assert rounding(merged, merged) < 1e-6


def test_a_pad_value_that_would_leave_little_but_rounding_is_refused_where_ones_do_not_help() -> None:
    identity = Conv(ones(2, 1, 1, 1), groups=2)
    kept = add(scaled_down(1.0, groups=2), identity)
    assert isinstance(kept, Conv) and kept.groups == 2 and kept.pad_value is not None
    with pytest.raises(Refusal, match=r"conv 3x3 .* pads with constants of up to 2.0e\+06, .* little but rounding"):
        add(scaled_down(1e-6, groups=2), identity)


def test_branches_that_pad_with_different_constants_are_one_with_ones() -> None:
    a, b = three_by_three(1, bias=True), three_by_three(2, pad_value=integers(3, 2))
    merged = a + b
    assert isinstance(merged, Conv) and merged.ones is not None
    for size in SIZES[2]:
        x = probe(2, size)
        assert torch.equal(merged.evaluate(x), a.evaluate(x) + b.evaluate(x))


@pytest.mark.parametrize(
    ("left", "right", "reason"),
    [
        (three_by_three(1, stride=2), three_by_three(1), r"strides differ: \(2, 2\) and \(1, 1\)"),
        (Conv(ones(2, 2, 1, 1), transposed=True), pointwise(1), "a convolution and a transposed convolution"),
        (three_by_three(1), three_by_three(1, 0), "have different output sizes"),
        (three_by_three(1), three_by_three(1, padding_mode="reflect"), "padding modes differ: zeros and reflect"),
        (
            Conv(ones(2, 1, 3, 3), padding=1, groups=2),
            Conv(ones(2, 1, 3, 3), padding=1, groups=2, pad_value=ones(2)),
            "pad with different constants",
        ),
        (
            Conv(ones(2, 1, 3, 3), padding=1, groups=2, padding_mode="reflect"),
            Conv(ones(2, 2, 3, 3), padding=1, ones=ones(2, 3, 3)),
            "padding modes differ",
        ),
        (Conv(ones(4, 2, 1, 1)), Conv(ones(1, 2, 1, 1)), "conv 1x1 2->4 and conv 1x1 2->1 make different channels"),
        (
            Conv(ones(2, 2, 2, 2), transposed=True),
            Conv(ones(2, 2, 3, 3), transposed=True),
            "transposed branches are added only where their geometry is the same",
        ),
        (pointwise(1), Conv(ones(2, 2, 1)), "acts on other axes than its neighbour"),
        (Scale(ones(2), ones(2), 1), Scale(ones(2), ones(2), 2), "the two scales act on different axes"),
        (Scale(ones(2), ones(2), 1), pointwise(1), "a scale and a convolution act on different axes"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_sum_is_refused_with_its_reason(left: Linear, right: Linear, reason: str) -> None:
    with pytest.raises(Refusal, match=reason):
        left + right


def test_branches_whose_sizes_differ_at_the_size_asked_for_are_refused() -> None:
    with pytest.raises(Refusal, match="have different output sizes"):
        add(three_by_three(1), three_by_three(1, 0), (6, 6))


def test_a_composition_of_operators_that_fit_any_tensor_is_refused() -> None:
    pool = AvgPool((2, 2), (2, 2), (0, 0))
    with pytest.raises(Refusal, match="neither operator says how many channels it reads"):
        pool @ pool
    with pytest.raises(Refusal, match="neither operator says on which axes it acts"):
        Scale(ones(1), ones(1)) @ _Anything()


class _Anything(Linear):
    """An operator of any channels and axes that is no scale."""

    def as_conv(self, channels: int, spatial: int) -> Conv:
        raise AssertionError

    def evaluate(self, *inputs: Any) -> Any:
        raise AssertionError

    def infer(self, *types: TensorType | None) -> TensorType | None:
        raise AssertionError


def test_a_map_that_holds_at_one_size_is_refused_after_a_free_one() -> None:
    with pytest.raises(Refusal, match="holds at one size only, and the size before it is free"):
        Conv(ones(1, 1, 1), ones(1, 5), size=(5,)) @ Conv(ones(1, 1, 3))


# --- what cannot be built, and what does not fit -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Scale(ones(2, 2), ones(2), 1), r"scale must be one value per channel, got shape \[2, 2\]"),
        (lambda: Scale(ones(2), ones(()), 1), r"shift must be one value per channel, got shape \[\]"),
        (lambda: Scale(ones(2), ones(3), 1), "2 scales and 3 shifts do not match"),
        (lambda: Scale(ones(2), ones(2)), "a scale per channel needs the number of spatial axes"),
        (lambda: Conv(ones(3)), r"weight must be \[out, in / groups, \*kernel\], got \[3\]"),
        (lambda: Conv(ones(3, 1, 1), groups=2), "3 channels do not divide into 2 groups"),
        (lambda: Conv(ones(3, 1, 1), groups=0), "3 channels do not divide into 0 groups"),
        (lambda: Conv(ones(3, 1, 1), ones(2)), r"bias \[2\] does not fit 3 output channels"),
        (lambda: Conv(ones(3, 1, 1), ones(3, 4, 4), size=(4,)), r"bias \[3, 4, 4\] does not fit 3 output channels"),
        (lambda: Conv(ones(3, 1, 1), ones(3, 4)), "a bias map needs the input size at which it holds"),
        (lambda: Conv(ones(3, 1, 2), ones(3, 4), size=(4,)), r"bias map \[4\] does not fit the output \[3\] at \[4\]"),
        (lambda: Conv(ones(3, 1, 1), pad_value=ones(3)), r"pad_value \[3\] must be one value per input channel"),
        (
            lambda: Conv(ones(3, 1, 1), pad_value=ones(1), padding_mode="reflect"),
            "a constant pad value contradicts padding mode 'reflect'",
        ),
        (lambda: Conv(ones(1, 1, 1), stride=0), r"stride \(0,\) or dilation \(1,\) is below 1"),
        (lambda: Conv(ones(1, 1, 1), dilation=0), r"stride \(1,\) or dilation \(0,\) is below 1"),
        (lambda: Conv(ones(1, 1, 0)), r"kernel \(0,\), .* is below 1"),
        (lambda: Conv(ones(1, 1, 1), padding=-1, transposed=True), r"padding \(\(-1, -1\),\) of a trans.* is negative"),
        (lambda: Conv(ones(2, 1, 3), ones=ones(2, 2)), r"ones \[2, 2\] must be \[out, \*kernel\]"),
        (lambda: Conv(ones(2, 1, 3), ones=ones(2, 3), groups=2), "a channel of ones needs one group"),
        (lambda: Conv(ones(2, 1, 3), ones=ones(2, 3), padding_mode="circular"), "a channel of ones needs one group"),
        (lambda: Conv(ones(2, 1, 3)).with_ones(), "there is no channel of ones"),
        (lambda: Conv(ones(1, 1, 1), transposed=True, output_padding=-1), r"output padding \(-1,\) is negative"),
        (lambda: Conv(ones(1, 1, 1), output_padding=1), "only a transposed convolution has an output padding"),
        (
            lambda: Conv(ones(1, 1, 3), padding=((1, 0),), transposed=True),
            r"a transposed convolution crops both sides alike, got padding \(\(1, 0\),\)",
        ),
        (lambda: Conv(ones(1, 1, 3), transposed=True, padding_mode="reflect"), "transposed .* pads with zeros only"),
        (lambda: Conv(ones(1, 1, 3), transposed=True, pad_value=ones(1)), "transposed .* pads with zeros only"),
        (lambda: Conv(ones(1, 1, 1), size=(4, 4)), r"size \(4, 4\) does not name 1 axes"),
        (lambda: Conv(ones(1, 1, 1), stride=(1, 1)), r"stride \(1, 1\) does not name 1 axes"),
        (lambda: Conv(ones(1, 1, 1, 1), padding=(1, 1, 1)), r"padding \(1, 1, 1\) does not name 2 axes"),
    ],
)
def test_an_operator_cannot_be_built_wrong(build: Callable[[], Linear], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        build()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Conv(ones(2, 3, 1)) @ Conv(ones(2, 2, 1)), "conv 1 3->2: expects 3 channels, got 2"),
        (lambda: Conv(ones(2, 3, 1)) + Conv(ones(2, 2, 1)), "conv 1 3->2: expects 3 channels, got 2"),
        (
            lambda: Scale(ones(3), ones(3), 1) @ Conv(ones(2, 2, 1)),
            "Scale: 3 channels meet a tensor of 2 channels",
        ),
        (
            lambda: Scale(ones(3), ones(3), 1) @ Scale(ones(2), ones(2), 1),
            "Scale: 2 channels meet a scale of 3 channels",
        ),
        (
            lambda: compose(Conv(ones(1, 1, 1)), Conv(ones(1, 1, 1), ones(1, 5), size=(5,)), (6,)),
            r"conv 1 1->1 \+ bias map holds at \(5,\), used at \(6,\)",
        ),
        (
            lambda: compose(Conv(ones(1, 1, 1), ones(1, 5), size=(5,)), Conv(ones(1, 1, 3)), (5,)),
            r"conv 1 1->1 \+ bias map holds at \(5,\), used at \(3,\)",
        ),
        (
            lambda: Conv(ones(1, 1, 1), ones(1, 5), size=(5,)).evaluate(ones(1, 1, 6)),
            r"conv 1 1->1 \+ bias map: holds at 5 only, got 6",
        ),
        (
            lambda: Conv(ones(1, 2, 3, 3)).infer(TensorType((1, 3, 4, 4), torch.float32)),
            "conv 3x3 2->1: weight expects 2 input channels, got 3",
        ),
        (
            lambda: Conv(ones(1, 2, 3, 3)).infer(TensorType((4, 4), torch.float32)),
            r"conv 3x3 2->1: needs a tensor with 3 axes or more, got float32\[4, 4\]",
        ),
        (lambda: Conv(ones(1, 2)).infer(None), "linear 2->1: needs a tensor with 1 axes or more, got None"),
    ],
)
def test_what_does_not_fit_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        call()


def test_the_inferred_type_is_the_type_of_the_result() -> None:
    for conv, shape in (
        (Conv(ones(4, 1, 3, 2), stride=2, padding=((0, 1), (2, 0)), groups=2), (2, 2, 7, 6)),
        (Conv(ones(2, 3, 3), stride=3, transposed=True, output_padding=1, groups=2), (1, 2, 5)),
        (Conv(ones(5, 3)), (2, 4, 3)),
        (Scale(ones(3), ones(3), 1), (2, 3, 4)),
    ):
        inferred = conv.infer(TensorType(shape, torch.float64, fixed=True))
        assert inferred == TensorType(tuple(conv.evaluate(ones(*shape)).shape), torch.float64, fixed=True)


@pytest.mark.parametrize(
    ("op", "label"),
    [
        (Conv(ones(5, 3)), "linear 3->5"),
        (Conv(ones(4, 1, 3, 2), stride=2, groups=4), "conv 3x2 4->4 /2 groups=4"),
        (Conv(ones(4, 1, 3, 3), stride=(1, 2)), "conv 3x3 1->4 /1x2"),
        (Conv(ones(4, 1, 3), transposed=True), "transposed conv 3 4->1"),
        (Scale(ones(1), ones(1)), "scale"),
    ],
)
def test_labels_are_what_a_user_would_say(op: Linear, label: str) -> None:
    assert op.label == label


@pytest.mark.parametrize("law", [compose, add])
def test_a_size_of_other_axes_than_those_of_the_first_operator_is_a_refusal(law: Any) -> None:
    linear, channels = Conv(ones(2, 3)), Scale(ones(3), ones(3), 1)
    with pytest.raises(Refusal, match="act on different axes"):
        law(linear, channels, ())
    with pytest.raises(Refusal, match="act on different axes"):
        law(linear, Conv(ones(3, 3, 1)), ())


def test_a_composition_computes_neither_weight_nor_bias_before_they_are_read() -> None:
    first, second = (Conv(torch.randn(4, 4, 3, 3), torch.randn(4)) for _ in range(2))
    made = second @ first
    assert isinstance(made, Conv) and made.bias_shape == (4,) and not made.has_bias_map
    assert all(isinstance(made.__dict__[name], Deferred) for name in ("weight", "bias"))
    assert made.bias is not None and made.bias.shape == (4,) and isinstance(made.__dict__["bias"], torch.Tensor)
    x = torch.randn(1, 4, 9, 9, dtype=torch.float64)
    twice = second.cast(torch.float64).evaluate(first.cast(torch.float64).evaluate(x))
    torch.testing.assert_close(made.evaluate(x), twice)
