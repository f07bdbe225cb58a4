"""Does the predicate say exactly when two layers are one? A grid of drawn layers, measured without the algebra.

*Predicted* is what `rgc.border` and `rgc.compose` say, at one size or (size None) at every size. *Measured* is an
oracle that knows neither: the layers are run by `torch.nn.functional` on unit vectors, and their linear part is one
convolution iff its matrix is that of a convolution with the geometry of the composition law (which pads by copies if
one of the layers does, the last before the first) and with the kernel that holds in the interior. That kernel is read
off the layers without their padding, on an input as large as their receptive field. A constant part is judged by what
`compose` returns: it must equal the two layers, at every size if it claims every size, and it may refuse a bias only
where the ring shows it.

Weights are integers and everything is float64, so all sums are exact and equality is `torch.equal`. The weights are
drawn from 1 .. 2^17 and never vanish. Where zeros are padded, a tap that the ring cuts off adds a product of positive
numbers to one side only: an inexact pair cannot look exact by accident. Where copies are padded, the difference is a
polynomial of degree 2 in the weights, so it vanishes by accident with a probability of at most 2 / 2^17 (Schwartz and
Zippel), for each of its entries. Inputs too large for all unit vectors are probed by 16 random integer vectors instead:
a matrix that is not zero maps all of them to zero with a probability of at most 2^-80.

How many cases: a test below draws ``max_examples`` for each of its parameters and fails if it drew fewer; one test adds
up the grid for both profiles. The grid alone, by hand:

    HYPOTHESIS_PROFILE=ci      python -m pytest -q tests/test_exactness.py      # as in make test
    HYPOTHESIS_PROFILE=nightly python -m pytest -q tests/test_exactness.py      # as in make nightly
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rgc
from rgc import AvgPool, BatchNorm, Conv, Linear, Refusal, Scale, border, compose
from rgc.compiler import trace
from rgc.emit import operator_counts

Size = tuple[int, ...]

#: Weights are drawn from 1 .. 2^BITS: products of two, summed over all taps and channels, stay below 2^53.
BITS = 17

#: Inputs with at most so many elements are probed by all unit vectors, larger ones by random vectors.
MOST_UNITS = 600

COPIES = ("reflect", "replicate", "circular")
CONV = (F.linear, F.conv1d, F.conv2d, F.conv3d)
POOL = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


#: Negative padding crops.
LOWEST_PADDING = -2

# --- layers without the algebra --------------------------------------------------------------------------------------


def run(layer: Linear, x: Tensor) -> Tensor:
    """What PyTorch's own functions make of ``x``."""
    match layer:
        case Conv(spatial=0):
            return F.linear(x, layer.weight, layer.bias)
        case Conv():
            return CONV[layer.spatial](
                padded(x, layer), layer.weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups
            )
        case AvgPool():
            divisor = () if layer.spatial == 1 else (layer.divisor_override,)
            return POOL[layer.spatial - 1](
                x, layer.window, layer.stride, layer.padding, layer.ceil_mode, layer.count_include_pad, *divisor
            )
        case BatchNorm():
            return F.batch_norm(x, layer.mean, layer.var, layer.weight, layer.bias, False, 0.0, layer.eps)
        case Scale():
            channels = (-1, *[1] * (x.dim() - 2))
            return x * layer.scale.view(channels) + layer.shift.view(channels)
    raise AssertionError(f"the grid draws no {type(layer).__name__}")


def padded(x: Tensor, conv: Conv) -> Tensor:
    """Padded, then cropped where the padding is negative."""
    if conv.pad_value is None:
        return pad(x, conv.padding, conv.padding_mode)
    return torch.cat([pad(x[:, [i]], conv.padding, "constant", float(v)) for i, v in enumerate(conv.pad_value)], 1)


def pad(x: Tensor, padding: Sequence[tuple[int, int]], mode: str, value: float = 0.0) -> Tensor:
    amounts = [amount for sides in reversed(padding) for amount in sides]
    widened, cropped = [max(amount, 0) for amount in amounts], [min(amount, 0) for amount in amounts]
    if mode in COPIES:
        return F.pad(F.pad(x, widened, mode=mode), cropped)
    return F.pad(F.pad(x, widened, value=value), cropped)


@dataclass(frozen=True)
class Axis:
    """What a layer does along one axis, and how it pads there."""

    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0
    mode: str = "zeros"
    least: int = 1  # elements that PyTorch asks for

    @property
    def extent(self) -> int:
        return self.dilation * (self.kernel - 1) + 1

    def runs(self, n: int) -> bool:
        """Does PyTorch run it on ``n`` elements?"""
        reach = {"reflect": n - 1, "circular": n}.get(self.mode, 10**6)
        return n >= self.least and max(self.before, self.after) <= reach and n + self.before + self.after >= self.extent

    def outputs(self, n: int) -> int:
        return (n + self.before + self.after - self.extent) // self.stride + 1


def axes_of(layer: Linear, rank: int) -> list[Axis]:
    if isinstance(layer, Conv):
        parts = zip(layer.kernel, layer.stride, layer.dilation, layer.padding, strict=True)
        return [Axis(k, s, d, b, a, layer.padding_mode) for k, s, d, (b, a) in parts]
    if isinstance(layer, AvgPool):
        parts = zip(layer.window, layer.stride, layer.padding, strict=True)
        return [Axis(k, s, 1, p, p, least=k if rank == 3 else 1) for k, s, p in parts]  # avg_pool3d counts no padding
    return [Axis()] * rank


def composed(axes: Sequence[Axis]) -> Axis:
    """The geometry of the composition law (DESIGN section 4), with every offset a tap of its own."""
    total = Axis()
    for axis in axes:
        total = Axis(
            total.extent + total.stride * (axis.extent - 1),
            total.stride * axis.stride,
            1,
            total.before + total.stride * axis.before,
            total.after + total.stride * axis.after,
        )
    return total


@dataclass(frozen=True)
class Chain:
    """Layers one after the other, on ``rank`` spatial axes and ``channels`` channels."""

    layers: tuple[Linear, ...]
    rank: int
    channels: int

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = run(layer, x)
        return x

    @property
    def axes(self) -> list[tuple[Axis, ...]]:
        """For each spatial axis, what each layer does there."""
        return list(zip(*(axes_of(layer, self.rank) for layer in self.layers), strict=True))

    def runs(self, size: Size) -> bool:
        return all(runs_along(axes, n) for axes, n in zip(self.axes, size, strict=True))

    def without_padding(self) -> Chain:
        def plain(layer: Linear) -> Linear:
            if isinstance(layer, Conv):
                return replace(layer, padding=0, padding_mode="zeros", pad_value=None)
            return replace(layer, padding=(0,) * self.rank) if isinstance(layer, AvgPool) else layer

        return replace(self, layers=tuple(map(plain, self.layers)))


def runs_along(axes: Sequence[Axis], n: int) -> bool:
    for axis in axes:
        if not axis.runs(n):
            return False
        n = axis.outputs(n)
    return True


# --- the oracle ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Oracle:
    """Is the linear part of a chain one convolution of the composition law's geometry? By matrices, not by algebra."""

    chain: Chain
    kernel: Tensor
    geometry: tuple[Axis, ...]
    mode: str

    @staticmethod
    def of(chain: Chain) -> Oracle:
        geometry = tuple(composed(axes) for axes in chain.axes)
        extent = tuple(axis.kernel for axis in geometry)
        modes = [layer.padding_mode for layer in chain.layers[::-1] if isinstance(layer, Conv) and layer.is_padded]
        mode = next((mode for mode in modes if mode != "zeros"), "zeros")
        return Oracle(chain, interior_kernel(chain.without_padding(), extent), geometry, mode)

    def is_exact(self, size: Size) -> bool:
        """Are the two matrices equal at this size? Not where PyTorch cannot pad the one convolution that far."""
        if not all(replace(axis, mode=self.mode).runs(n) for axis, n in zip(self.geometry, size, strict=True)):
            return False
        probes = vectors(self.chain.channels, size)
        expected = self.chain.run(probes) - self.chain.run(torch.zeros_like(probes[:1]))
        return torch.equal(self._convolve(probes), expected)

    def _convolve(self, x: Tensor) -> Tensor:
        x = pad(x, [(axis.before, axis.after) for axis in self.geometry], self.mode)
        return CONV[self.chain.rank](x, self.kernel, None, tuple(axis.stride for axis in self.geometry))

    def covering_sizes(self) -> list[Size]:
        """Sizes at which the chain is one convolution iff it is one at every size.

        Along one axis, let K be the extent, S the stride and C what is cropped, of the composition. From K + S - 1 + C
        elements on there is a full window of real input, every position before the first output that the second layer
        ever reads is read, and n and n + S differ by a shift of the trailing end: nothing else changes there. So a
        period of S sizes from there on shows every behaviour of a large input, on both sides. Sizes grow along all axes
        at once: whatever an axis does wrong at some residue is met while the other axes read real input.

        With zeros padded, a wrong small size implies a wrong large one: a ring position that is read and touches
        real input keeps doing so when the input grows (before), or moves along with the end (after). Padding by copies
        can also fail at small sizes alone, where it wraps twice; so the smallest sizes that run are tried as well.
        """
        periods = max((axis.stride for axis in self.geometry), default=1)
        large = [_large_enough(axes) for axes in self.chain.axes]
        small = [next(n for n in itertools.count(1) if runs_along(axes, n)) for axes in self.chain.axes]
        return [tuple(n + step for n in start) for start in (small, large) for step in range(periods)]


def _large_enough(axes: Sequence[Axis]) -> int:
    total = composed(axes)
    cropped, stride = 0, 1
    for axis in axes:
        cropped += stride * (max(-axis.before, 0) + max(-axis.after, 0))
        stride *= axis.stride
    copies = max(total.before, total.after, 0) + 1 if any(axis.mode != "zeros" for axis in axes) else 0
    return max(total.kernel + total.stride - 1 + cropped, copies)


def interior_kernel(unpadded: Chain, extent: Size) -> Tensor:
    """[out, in, *extent]: how the one output on an input of just that extent depends on each element."""
    x = torch.zeros(1, unpadded.channels, *extent, dtype=torch.float64)
    outputs = unpadded.run(x).numel()
    x = x.expand(outputs, *x.shape[1:]).clone().requires_grad_()
    y = unpadded.run(x).reshape(outputs, outputs)
    (rows,) = torch.autograd.grad(y, x, torch.eye(outputs, dtype=torch.float64))
    return rows


def vectors(channels: int, size: Size) -> Tensor:
    """All unit vectors of a small input; otherwise random integers, which no matrix but zero maps to zero."""
    count = channels * math.prod(size)
    if count <= MOST_UNITS:
        return torch.eye(count, dtype=torch.float64).view(count, channels, *size)
    return integers(count, 16, channels, *size, bits=5)


def integers(seed: int, *shape: int, bits: int = BITS) -> Tensor:
    """Positive random integers."""
    return torch.randint(1, 2**bits + 1, shape, generator=torch.Generator().manual_seed(seed)).double()


# --- what is drawn ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """The largest values of one rank: an input of rank 3 has many elements."""

    kernel: int
    stride: int
    dilation: int
    padding: int
    channels: int


LIMITS = {1: Limits(5, 3, 3, 5, 4), 2: Limits(5, 3, 3, 4, 3), 3: Limits(3, 2, 2, 3, 2)}
SEEDS = st.integers(0, 2**30)
BORDERS = ("none", "same", "full", "before", "after", "any")


@st.composite
def axes(draw: st.DrawFn, limits: Limits, borders: str) -> Axis:
    """One axis of a convolution: padding none, to the same size, all that the kernel spans, on one side, or any."""
    kernel, stride = draw(st.integers(1, limits.kernel)), draw(st.integers(1, limits.stride))
    widest = limits.dilation if kernel < 4 else 1  # keeps the extent, and so the input, small
    axis = Axis(kernel, stride, draw(st.integers(1, widest)))
    total = axis.extent - 1
    if borders == "none":
        return axis
    if borders in ("before", "after"):
        return replace(axis, **{borders: draw(st.integers(1, limits.padding))})
    if borders == "same":
        return replace(axis, before=total // 2, after=total - total // 2)
    if borders == "full":
        return replace(axis, before=total + draw(st.integers(0, 1)), after=total + draw(st.integers(0, 1)))
    amounts = st.integers(LOWEST_PADDING, limits.padding)
    return replace(axis, before=draw(amounts), after=draw(amounts))


@st.composite
def convolutions(
    draw: st.DrawFn, rank: int, reads: int, modes: Sequence[str] = ("zeros",), bits: int = BITS, bias: bool = True
) -> Conv:
    """A convolution of ``reads`` channels: any geometry, without bias, with a bias of zeros, or with a bias."""
    limits = LIMITS[rank]
    shared = draw(st.sampled_from((None, *BORDERS)))
    parts = [draw(axes(limits, shared or draw(st.sampled_from(BORDERS)))) for _ in range(rank)]
    makes = draw(st.integers(1, limits.channels))
    groups = draw(st.sampled_from([g for g in range(1, reads + 1) if reads % g == makes % g == 0]))
    mode, seed = draw(st.sampled_from(modes)), draw(SEEDS)
    kind = draw(st.sampled_from(("none", "zero", "any"))) if bias else "none"
    return Conv(
        integers(seed, makes, reads // groups, *(axis.kernel for axis in parts), bits=bits),
        {"none": None, "zero": torch.zeros(makes).double(), "any": integers(seed + 1, makes, bits=5)}[kind],
        tuple(axis.stride for axis in parts),
        tuple((axis.before, axis.after) for axis in parts),
        tuple(axis.dilation for axis in parts),
        groups,
        "zeros" if mode == "constant" else mode,
        integers(seed + 2, reads, bits=5) if mode == "constant" else None,
    )


@st.composite
def pools(draw: st.DrawFn, rank: int) -> AvgPool:
    """Windows of a power of two elements, so that the average of integers is exact in float64."""
    window = tuple(draw(st.sampled_from((1, 2, 4) if rank < 3 else (1, 2))) for _ in range(rank))
    stride = tuple(draw(st.integers(1, LIMITS[rank].stride)) for _ in range(rank))
    padding = tuple(draw(st.integers(0, k // 2)) for k in window)
    divisor = draw(st.sampled_from((None, 8))) if rank > 1 else None
    return AvgPool(window, stride, padding, divisor_override=divisor)


@st.composite
def norms(draw: st.DrawFn, rank: int, channels: int) -> BatchNorm:
    """1 / sqrt(var + eps) is 2 or 4: the batch norm of integers is exact in float64, and no two undo each other."""
    seed, eps = draw(SEEDS), 2.0**-10
    var = 4.0 ** torch.randint(-2, 0, (channels,), generator=torch.Generator().manual_seed(seed)).double() - eps
    mean, weight, bias = (integers(seed + index, channels, bits=3) for index in range(3))
    weight = weight * (2 * torch.randint(0, 2, (channels,), generator=torch.Generator().manual_seed(seed)) - 1)
    affine = draw(st.booleans())
    return BatchNorm(mean - 4, var, weight if affine else None, bias if affine else None, eps, rank)


@st.composite
def scales(draw: st.DrawFn, rank: int, channels: int) -> Scale:
    seed = draw(SEEDS)
    shift = integers(seed + 1, channels, bits=3) if draw(st.booleans()) else torch.zeros(channels).double()
    return Scale(integers(seed, channels, bits=3), shift, rank)


@st.composite
def layers(draw: st.DrawFn, rank: int, reads: int, **options: Any) -> Linear:
    kind = draw(st.sampled_from(("conv", "conv", "conv", "conv", "conv", "pool", "norm", "scale")))
    if kind == "conv":
        return draw(convolutions(rank, reads, **options))
    return draw({"pool": pools(rank), "norm": norms(rank, reads), "scale": scales(rank, reads)}[kind])


@st.composite
def chains(draw: st.DrawFn, rank: int, length: int, copies: bool, bits: int = BITS) -> Chain:
    """``length`` layers, at least one of them a convolution; with ``copies`` they may pad by any mode."""
    reads = channels = draw(st.integers(1, LIMITS[rank].channels))
    modes = ("zeros", "constant", *COPIES) if copies else ("zeros", "zeros", "constant")
    drawn: list[Linear] = []
    conv = draw(st.integers(0, length - 1))
    for index in range(length):
        options = {"modes": modes, "bits": bits}
        drawn.append(draw(convolutions(rank, reads, **options) if index == conv else layers(rank, reads, **options)))
        reads = drawn[-1].out_channels if isinstance(drawn[-1], Conv) else reads
    return Chain(tuple(drawn), rank, channels)


def smallest(chain: Chain) -> Size:
    return tuple(next(n for n in itertools.count(1) if runs_along(axes, n)) for axes in chain.axes)


@dataclass
class Tally:
    """How many cases a test drew, by what was predicted: a grid of one outcome would prove little."""

    drawn: Counter[bool] = field(default_factory=Counter)

    def check(self, wanted: int, rare: float = 0.05) -> None:
        total = self.drawn.total()
        assert total >= wanted, f"drew {total} cases of {wanted}"
        assert min(self.drawn[True], self.drawn[False]) >= rare * total, f"one-sided: {dict(self.drawn)}"


def examples() -> int:
    """What the profile says."""
    return settings().max_examples


# --- pairs -----------------------------------------------------------------------------------------------------------

#: Each of these draws ``max_examples`` cases: 50 in make test, 1000 in make nightly.
GRID = [
    (rank, sized, copies)
    for rank in (1, 2, 3)
    for sized in (True, False)
    for copies in (False, True)
    if rank < 3 or not copies
]


def test_the_grid_is_as_large_as_promised() -> None:
    for profile, promised in (("ci", 300), ("nightly", 5000)):
        assert settings.get_profile(profile).max_examples * len(GRID) >= promised


def as_convs(chain: Chain) -> list[Conv]:
    """The layers as convolutions of the channels that they meet."""
    convs: list[Conv] = []
    channels = chain.channels
    for layer in chain.layers:
        convs.append(layer.as_linear().as_conv(channels, chain.rank))
        channels = convs[-1].out_channels
    return convs


def refused(law: Callable[[], Linear]) -> tuple[Linear | None, str]:
    try:
        return law(), ""
    except Refusal as refusal:
        return None, refusal.reason


@pytest.mark.parametrize(("rank", "sized", "copies"), GRID)
def test_predicted_exactness_is_measured_exactness(rank: int, sized: bool, copies: bool) -> None:
    tally = Tally()

    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        chain = data.draw(chains(rank, 2, copies))
        extra = st.tuples(*[st.integers(0, 7 if rank < 3 else 3)] * rank)
        size = tuple(map(sum, zip(smallest(chain), data.draw(extra), strict=True))) if sized else None
        tally.drawn[check_pair(chain, size)] += 1

    check()
    tally.check(examples())


def check_pair(chain: Chain, size: Size | None) -> bool:
    """The border of the linear parts, and what `compose` makes of the layers themselves; is the border exact?"""
    oracle = Oracle.of(chain)
    sizes = oracle.covering_sizes() if size is None else [size]
    exact = all(oracle.is_exact(each) for each in sizes)
    first, second = as_convs(chain)
    reason = border(second, first, size)
    assert (reason is None) == exact, f"predicted {reason or 'exact'}, measured {'exact' if exact else 'inexact'}"
    bare, why = refused(lambda: compose(replace(second, bias=None), replace(first, bias=None, pad_value=None), size))
    if second.pad_value is None or size is not None:
        assert (bare is not None) == exact, f"without bias: {why or 'composed'}, measured {exact}"
    merged, why = refused(lambda: compose(second, first, size))
    assert exact or merged is None, "composed what is not one convolution"
    if merged is None:
        assert not exact or (size is None and the_ring_shows(chain, sizes)), f"refused what is one convolution: {why}"
        return exact
    free = not isinstance(merged, Conv) or merged.size is None
    for each in oracle.covering_sizes() if free else sizes:
        probe = integers(sum(each), 2, chain.channels, *each, bits=5)
        quotients = isinstance(merged, Conv) and merged.pad_value is not None
        assert agree(merged.evaluate(probe), chain.run(probe), quotients=quotients), f"composed wrongly at {each}"
    return exact


def agree(found: Tensor, expected: Tensor, *, quotients: bool) -> bool:
    """Equal; but a pad value that is solved for is a quotient, which float64 rounds, and large terms may cancel."""
    if quotients:
        return float((found - expected).abs().max()) <= 1e-10 * float(expected.abs().max())
    return torch.equal(found, expected)


def the_ring_shows(chain: Chain, sizes: Sequence[Size]) -> bool:
    """Is the answer to zeros uneven somewhere, so that no plain bias is enough? With a constant padded it may be."""
    if any(isinstance(layer, Conv) and layer.pad_value is not None for layer in chain.layers):
        return True
    answers = [chain.run(torch.zeros(1, chain.channels, *size, dtype=torch.float64)).flatten(2) for size in sizes]
    return any(bool((answer != answers[-1][:, :, :1]).any()) for answer in answers)


# --- longer chains, and linear layers --------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "sized"), [(1, True), (1, False), (2, True)])
def test_three_layers_merged_in_any_order_are_measured_to_be_one(rank: int, sized: bool) -> None:
    """A merged kernel may have gaps, so here what is predicted is sure to hold, but not the other way round."""
    tally = Tally()

    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        chain = data.draw(chains(rank, 3, copies=False, bits=9))
        extra = data.draw(st.tuples(*[st.integers(0, 5)] * rank))
        size = tuple(map(sum, zip(smallest(chain), extra, strict=True)))
        merged = single_operators(as_convs(chain), size if sized else None)
        tally.drawn[bool(merged)] += 1
        oracle = Oracle.of(chain)
        for each in [size] if sized else [size, *oracle.covering_sizes()[:: 1 + 3 * (rank - 1)]]:
            assert not merged or oracle.is_exact(each), f"merged three layers that are not one at {each}"
            for operator in merged:
                probe = integers(sum(each), 2, chain.channels, *each, bits=5)
                equal = agree(operator.evaluate(probe), chain.run(probe), quotients=True)  # from between two of them
                assert equal, f"merged wrongly at {each}"

    check()
    tally.check(examples(), rare=0.02)  # most triples merge in some order


def single_operators(operators: Sequence[Linear], size: Size | None) -> list[Linear]:
    """What exact merges, in every order, make of operators in a row: each result that is one operator."""
    if len(operators) == 1:
        return list(operators)
    found: list[Linear] = []
    for cut in range(1, len(operators)):
        for first in single_operators(operators[:cut], size):
            after = size if size is None or not isinstance(first, Conv) else first.output_size(size)
            for second in single_operators(operators[cut:], after):
                merged, _ = refused(lambda second=second, first=first: compose(second, first, size))  # type: ignore[misc]
                found += [] if merged is None else [merged]
    return found


def fewest(operators: Sequence[Linear], size: Size | None) -> int:
    """The smallest number of operators that exact merges leave of operators in a row, by trying every cut."""
    if not operators:
        return 0
    best = len(operators)
    for count in range(1, len(operators) + 1):
        after = size
        for operator in operators[:count]:
            after = operator.output_size(after) if after is not None and isinstance(operator, Conv) else after
        if single_operators(operators[:count], size):
            best = min(best, 1 + fewest(operators[count:], after))
    return best


# --- models ----------------------------------------------------------------------------------------------------------

NORM = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
LAYER = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
AVERAGE = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def module_of(layer: Linear) -> nn.Module:
    """The PyTorch module of a drawn layer, in float64."""
    match layer:
        case Conv(spatial=0):
            module: nn.Module = nn.Linear(layer.in_channels, layer.out_channels, layer.bias is not None)
        case Conv():
            total = [axis.extent - 1 for axis in axes_of(layer, layer.spatial)]
            same = all(b == t // 2 and a == t - t // 2 for (b, a), t in zip(layer.padding, total, strict=True))
            module = LAYER[layer.spatial](
                layer.in_channels,
                layer.out_channels,
                layer.kernel,
                layer.stride,
                "same" if same and set(layer.stride) == {1} else tuple(before for before, _ in layer.padding),
                layer.dilation,
                layer.groups,
                layer.bias is not None,
                layer.padding_mode,
            )
        case AvgPool():
            divisor = () if layer.spatial == 1 else (layer.divisor_override,)
            module = AVERAGE[layer.spatial - 1](layer.window, layer.stride, layer.padding, False, True, *divisor)
        case BatchNorm():
            module = NORM[layer.axes](layer.mean.numel(), layer.eps, affine=layer.weight is not None)
            module.running_mean, module.running_var = layer.mean.clone(), layer.var.clone()
        case _:
            raise AssertionError(f"no module is {layer.label}")
    with torch.no_grad():
        for name, parameter in module.double().named_parameters():
            parameter.copy_(getattr(layer, name))
    return module.eval()


@st.composite
def model_chains(draw: st.DrawFn, rank: int) -> Chain:
    """Two to four layers that torch.nn can say: a convolution pads both sides alike, or to the same size."""
    drawn: list[Linear] = []
    channels = reads = draw(st.integers(1, 3))
    for _ in range(draw(st.integers(2, 4))):
        kinds = ("conv", "conv", "conv", "norm", "pool") if rank else ("conv", "norm")
        kind = draw(st.sampled_from(kinds))
        if kind == "conv" and rank:
            modes = ("zeros",) * 6 + COPIES
            drawn.append(expressible(draw(convolutions(rank, reads, modes, bits=3))))
        elif kind == "conv":
            makes, seed = draw(st.integers(1, 4)), draw(SEEDS)
            bias = integers(seed + 1, makes, bits=3) if draw(st.booleans()) else None
            drawn.append(Conv(integers(seed, makes, reads, bits=3), bias))
        else:
            drawn.append(draw(norms(rank, reads) if kind == "norm" else pools(rank)))
        reads = drawn[-1].out_channels if isinstance(drawn[-1], Conv) else reads
    return Chain(tuple(drawn), rank, channels)


def expressible(conv: Conv) -> Conv:
    """The nearest convolution that torch.nn can say."""
    total = [axis.extent - 1 for axis in axes_of(conv, conv.spatial)]
    same = all(b == t // 2 and a == t - t // 2 for (b, a), t in zip(conv.padding, total, strict=True))
    if same and any(before != after for before, after in conv.padding):
        return replace(conv, stride=1)
    return replace(conv, padding=tuple(max(before, 0) for before, _ in conv.padding))


MODELS = [(rank, passes) for rank in (0, 1, 2, 3) for passes in ("default", "all,-box_mean,-collapse")]


#: Compiling takes a thousand times as long as composing: so many times fewer are drawn, for each of `MODELS`.
FEWER = 5


def model_examples() -> int:
    return examples() // FEWER


def test_the_grid_of_models_is_as_large_as_promised() -> None:
    for profile, promised in (("ci", 60), ("nightly", 500)):
        assert settings.get_profile(profile).max_examples // FEWER * len(MODELS) >= promised


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("rank", "passes"), MODELS)
def test_everything_that_the_predicate_allows_is_merged_and_nothing_else(rank: int, passes: str) -> None:
    """Under objective="depth". ``collapse`` is left out: it makes one matrix of any linear model at a fixed size."""
    drawn = Counter[int]()
    nested = (*settings().suppress_health_check, HealthCheck.nested_given)  # compiling proves its result by Hypothesis

    @settings(max_examples=model_examples(), suppress_health_check=nested)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        chain = data.draw(model_chains(rank))
        extra = data.draw(st.tuples(*[st.integers(0, 6 if rank < 3 else 2)] * rank))
        size = tuple(map(sum, zip(smallest(chain), extra, strict=True)))
        drawn[check_model(chain, passes, size)] += 1

    check()
    assert drawn.total() >= model_examples()
    assert rank == 0 or len(drawn) > 1, f"one-sided: {drawn}"


def check_model(chain: Chain, passes: str, size: Size) -> int:
    model = nn.Sequential(*map(module_of, chain.layers)).eval()
    x = integers(sum(size), 2, chain.channels, *size, bits=3)
    options: dict[str, Any] = {"passes": passes, "objective": "depth"}
    compiled = rgc.compile(model, x, **options, verify="quick")
    assert not compiled.report.failures
    graph = trace(model, x, **options).graph
    assert operator_counts(graph) == compiled.report.ops_after
    left = [value.op.label for value in graph.nodes() if isinstance(value.op, Linear)]
    predicted = fewest(as_convs(chain), None if passes == "default" else size)
    reasons = "; ".join(f"{each.rewrite}: {each.reason}" for each in compiled.report.refusals)
    assert len(left) == predicted, f"{len(left)} layers are left ({', '.join(left)}), predicted {predicted}; {reasons}"
    sizes = [size] if passes != "default" else [size, *(tuple(n + more for n in size) for more in (1, 2, 5))]
    for each in sizes:
        probe = integers(sum(each), 3, chain.channels, *each, bits=3)
        with torch.no_grad():
            expected, found = model(probe), compiled(probe)
        error = float((found - expected).abs().max())  # a pad value that is solved for is a quotient
        assert error <= 1e-12 * float(expected.abs().max()), f"differs by {error} at {each}"
    return predicted
