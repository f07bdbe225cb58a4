"""Is what is left of a linear tail the tail, exactly, whatever it pads, strides, dilates, groups and adds?"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgc import (
    AxisSums,
    Conv,
    Deferred,
    Graph,
    GraphError,
    Refusal,
    Region,
    Tail,
    TensorType,
    Value,
    averaged,
    compiler,
    tail_of,
)
from rgc.ir import Input
from rgc.region import affine_regions
from rgc.testing import randomize


def integers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).double()


CONVS: list[tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]] = [
    ({"padding": 1}, (3, 3), (8, 4)),
    ({"padding": ((2, 0), (0, 1))}, (3, 2), (7, 8)),
    ({"padding": 3}, (3, 3), (4, 2)),
    ({"padding": -1}, (3, 1), (10, 6)),
    ({"padding": 1, "stride": 2}, (3, 3), (8, 4)),
    ({"padding": 2, "stride": (3, 1), "dilation": (1, 2)}, (2, 3), (10, 4)),
    ({"padding": 1, "padding_mode": "reflect"}, (3, 3), (4, 8)),
    ({"padding": 2, "padding_mode": "replicate", "stride": 2}, (3, 3), (5, 7)),
    ({"padding": 1, "padding_mode": "circular"}, (3, 3), (4, 4)),
    ({"stride": 2}, (1, 1), (7, 8)),
    ({"padding": 1, "groups": 2}, (3, 3), (4, 4)),
    ({"padding": 1, "groups": 4}, (3, 3), (4, 4)),
    ({"padding": 2, "dilation": 2}, (3,), (8,)),
    ({"padding": 1, "stride": (1, 2, 1)}, (3, 3, 1), (4, 8, 2)),
    ({"padding": 1, "pad_value": torch.tensor([1.0, -2.0, 3.0, 4.0])}, (3, 3), (4, 4)),
    ({"padding": 1, "ones": True}, (3, 3), (4, 4)),
    ({"padding": 1, "bias_map": True}, (3, 3), (4, 8)),
]


def conv_of(options: dict[str, Any], kernel: tuple[int, ...], size: tuple[int, ...]) -> Conv:
    """Four channels to eight, with integers for weights and bias."""
    options = dict(options)
    groups, with_ones, mapped = options.get("groups", 1), options.pop("ones", False), options.pop("bias_map", False)
    conv = Conv(integers(8, 4 // groups, *kernel), integers(8, seed=1), **options)
    if with_ones:
        conv = conv.changed(ones=integers(8, *kernel, seed=2))
    return conv.changed(bias=integers(8, *conv.output_size(size), seed=3), size=size) if mapped else conv


@pytest.mark.parametrize(("options", "kernel", "size"), CONVS)
def test_the_mean_of_a_convolution_is_its_kernel_on_means(
    options: dict[str, Any], kernel: tuple[int, ...], size: tuple[int, ...]
) -> None:
    conv = conv_of(options, kernel, size)
    x = integers(2, 4, *size, seed=4)
    sums, plain = averaged(conv, size)
    axes = tuple(range(2, 2 + len(size)))
    expected = conv.evaluate(x).mean(axes, keepdim=True)
    found = plain.evaluate(sums.evaluate(x))
    assert plain.groups == conv.groups and found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-12)
    positions = torch.tensor(conv.output_size(size)).prod()
    if bin(int(positions)).count("1") == 1:  # then every fraction is exact in binary
        assert torch.equal(found, expected)


def test_the_weight_of_such_a_kernel_stays_deferred() -> None:
    def never() -> Tensor:
        raise AssertionError("computed")

    sums, plain = averaged(Conv(Deferred((5, 4, 3, 3), never), padding=1), (6, 7))
    assert sums.label == "sums of 6x7 to 3x3" and plain.shape == (5, 4, 3, 3)


def test_a_transposed_convolution_is_refused() -> None:
    with pytest.raises(Refusal, match="spreads its input instead of reading it"):
        averaged(Conv(integers(4, 4, 3, 3), transposed=True), (6, 6))


@pytest.mark.parametrize(("options", "kernel", "size"), [case for case in CONVS if "bias_map" not in case[0]])
def test_a_tail_is_pulled_back_exactly(options: dict[str, Any], kernel: tuple[int, ...], size: tuple[int, ...]) -> None:
    conv = conv_of(options, kernel, size)
    made = conv.output_size(size)
    last = integers(3, 8, seed=5)
    tail = Tail(3, 8, (), lambda: last).before_mean(made).before_conv(conv, size)
    x = integers(2, 4, *size, seed=6)
    linear = conv.changed(bias=None, pad_value=None, ones=None)
    expected = linear.evaluate(x).mean(tuple(range(2, 2 + len(size)))) @ last.T
    found = result(tail, x)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-12)
    assert all(count <= n for count, n in zip(tail.counts, size, strict=True))


def result(tail: Tail, x: Tensor) -> Tensor:
    source = Value(Input("x"), (), TensorType(tuple(x.shape), x.dtype, fixed=True))
    made = tail.applied(source, torch.zeros(tail.out_channels, dtype=torch.float64))
    y: Tensor = Graph([source], made).evaluate({"x": x})
    return y.flatten(1)


def test_convolutions_that_keep_the_size_leave_two_more_sums_each() -> None:
    tail = Tail.identity(4).before_mean((16, 16))
    counts = []
    for seed in range(9):
        tail = tail.before_conv(Conv(integers(4, 4, 3, 3, seed=seed), padding=1), (16, 16))
        counts.append(tail.counts)
    assert counts == [*((n, n) for n in (3, 5, 7, 9, 11, 13, 15)), (16, 16), (16, 16)]


def test_the_sum_of_two_tails_shares_their_sums() -> None:
    first, second = (Conv(integers(4, 4, *k, seed=7), padding=p) for k, p in (((3, 3), 1), ((5, 1), (2, 0))))
    mean = Tail.identity(4).before_mean((8, 9))
    one, other = (mean.before_conv(conv, (8, 9)) for conv in (first, second))
    x = integers(2, 4, 8, 9)
    both = one + -other
    torch.testing.assert_close(result(both, x), result(one, x) - result(other, x))
    assert both.counts == (5, 3)


# --- regions -----------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Layers of every kind that a tail may hold, with a nonlinearity in front."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        norm: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
        self.rank = rank
        self.first = nn.Sequential(conv(4, 6, 3, padding=1), norm(6), conv(6, 6, 3, padding=1, groups=3))
        self.skip = conv(4, 6, 1)
        self.down = conv(6, 5, 3, stride=2, padding=1)
        self.wide = conv(4, 3, (5,) * rank, padding=2, padding_mode="reflect")
        self.head = nn.Linear(8, 7)
        self.shift = nn.Parameter(torch.randn(6, *[1] * rank))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(x)
        pool: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[self.rank - 1]
        average: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[self.rank - 1]
        y = self.down(self.first(x) - self.skip(x) + self.shift)
        z = average(self.wide(x[:, [2, 0, 3, 1]]), 2)
        parts = [pool(y, 1).flatten(1), z.mean(tuple(range(2, 2 + self.rank)))]
        scores: Tensor = self.head(torch.cat(parts, 1))
        return scores


class Calling(nn.Module):
    """A function of a sigmoid and of a layer."""

    def __init__(self, function: Any, conv: nn.Module) -> None:
        super().__init__()
        self.function, self.conv = function, conv

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.function(torch.sigmoid(x), self.conv)
        return y


class Behind(nn.Module):
    """A function of a map, behind a nonlinearity, and of a layer."""

    def __init__(self, forward: Any, conv: nn.Module) -> None:
        super().__init__()
        self.call, self.conv = forward, conv

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.call(torch.sigmoid(x), self.conv)
        return y


def region_of(model: nn.Module, x: Tensor) -> Region:
    graph = compiler.trace(model, x, passes="all,-box_mean,-collapse").original
    for value in graph.nodes():
        if value.type is not None:
            value.type = TensorType(value.type.shape, value.type.dtype, fixed=True)
    return affine_regions(graph)[-1]


@pytest.mark.parametrize(("rank", "size"), list(itertools.product([1, 2, 3], [12, 9])))
def test_a_region_of_many_kinds_is_one_tail(rank: int, size: int) -> None:
    model = randomize(Network(rank)).double()
    x = torch.randn(2, 4, *range(size, size + rank), dtype=torch.float64)
    region = region_of(model, x)
    assert region.source.op.label == "sigmoid"
    given = torch.sigmoid(x)
    expected = region.evaluate(given) - region.evaluate(torch.zeros_like(given))
    torch.testing.assert_close(result(tail_of(region), given), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "forward",
    [
        lambda x, conv: conv(x).mean(3).mean(2),
        lambda x, conv: conv(x).mean(3, keepdim=True).mean(2, keepdim=True).flatten(1),
        lambda x, conv: F.adaptive_avg_pool2d(conv(x), 1).squeeze(3).squeeze(2),
        lambda x, conv: F.adaptive_avg_pool2d(conv(x), (2, 2)).mean((2, 3)),
        lambda x, conv: conv(x).flatten(2).mean(2),
        lambda x, conv: F.pad(conv(x), (1, 0, 0, 2))[..., ::2, 1:].mean((2, 3)),
    ],
)
def test_a_mean_may_be_spelled_in_many_ways(forward: Any) -> None:
    model = randomize(Calling(forward, nn.Conv2d(4, 3, 3, padding=1))).double()
    x = torch.randn(2, 4, 8, 6, dtype=torch.float64)
    region, given = region_of(model, x), torch.sigmoid(x)
    expected = region.evaluate(given) - region.evaluate(torch.zeros_like(given))
    torch.testing.assert_close(result(tail_of(region), given), expected.flatten(1), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda x, conv: conv(x), "has several positions"),
        (lambda x, conv: F.interpolate(conv(x), scale_factor=2.0).mean((2, 3)), "neither a convolution nor a mean"),
        (lambda x, conv: conv(x).mean(2).mean(2), "neither a convolution nor a mean"),
        (lambda x, conv: (conv(x) + x.mean((2, 3), keepdim=True)).mean((2, 3)), "broadcasts one of its inputs"),
        (lambda x, conv: torch.cat([conv(x), x], 2).mean((2, 3)), "along another axis than the channels"),
        (lambda x, conv: F.conv_transpose2d(x, conv.weight).mean((2, 3)), "spreads its input"),
    ],
)
def test_what_is_no_tail_is_refused_by_name(forward: Any, reason: str) -> None:
    model = randomize(Calling(forward, nn.Conv2d(4, 4, 3, padding=1))).double()
    with pytest.raises(Refusal, match=reason):
        tail_of(region_of(model, torch.randn(2, 4, 8, 6, dtype=torch.float64)))


def test_a_source_without_positions_is_refused() -> None:
    model = randomize(nn.Sequential(nn.Sigmoid(), nn.Linear(4, 4), nn.Linear(4, 2))).double()
    with pytest.raises(Refusal, match="has no positions"):
        tail_of(region_of(model, torch.randn(2, 4, dtype=torch.float64)))


# --- the operator ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(5,), (5, 4), (3, 5, 4)])
def test_sums_along_axes_are_products_with_matrices(size: tuple[int, ...]) -> None:
    matrices = tuple(integers(2 + axis, n, seed=axis) for axis, n in enumerate(size))
    op, x = AxisSums(matrices), integers(2, 3, *size)
    letters = "abc"[: len(size)], "uvw"[: len(size)]
    factors = ",".join(new + old for old, new in zip(*letters, strict=True))
    expected = torch.einsum(f"ij{letters[0]},{factors}->ij{letters[1]}", x, *matrices)
    assert torch.equal(op.evaluate(x), expected)
    given = TensorType(tuple(x.shape), x.dtype)
    assert op.infer(given) == given.with_shape(expected.shape)
    assert op.cast(torch.float32).tensors()[0].dtype == torch.float32


def test_another_size_is_refused() -> None:
    op = AxisSums((torch.ones(1, 4),))
    with pytest.raises(GraphError, match=r"sums of 4 to 1: got \[1, 2, 5\]"):
        op.evaluate(torch.ones(1, 2, 5))
    with pytest.raises(GraphError, match="sums of 4 to 1: got float32"):
        op.infer(TensorType((1, 2, 5), torch.float32))


def test_sums_need_a_matrix() -> None:
    with pytest.raises(GraphError, match="one axis or more"):
        AxisSums(())
