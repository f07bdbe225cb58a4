"""A residual can go through the activations beside it, in channels of its own: x + B f(A x) = B' f(A' x). Opt-in.

S is the skip connection; A' = [A; E S] makes copies of its result s beside A x, and B' = [B, L] takes them up, such
that L f(E s) = s. In this order:

- A range proof says that f leaves s alone (ReLU and s >= 0, ReLU6 and s in [0, 6]): one copy does.
- f takes parameters of each channel's own, and has some with which it is the identity: one copy does, and f becomes a
  clamp whose bounds are infinite there (ReLU6, Hardtanh, clamp), or a PReLU whose slopes are 1 there.
- f(t) = t g(t) with g(t) + g(-t) = 1 (ReLU, GELU, SiLU, Hardswish; LeakyReLU of slope a, with 1 + a): of two copies,
  f(s) - f(-s) = (1 + a) s.

A network of residual blocks becomes a single path of convolutions and activations. It has more multiply-accumulates
than before, which the report tells, and is made only if asked for by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rgc import (
    Activation,
    Clamp,
    Conv,
    Identity,
    Interval,
    Linear,
    Refusal,
    Scale,
    Value,
    add,
    block_diagonal,
    compose,
    range_of,
    require,
    rewrite,
    unit,
)

Pointwise = Activation | Clamp


@rewrite(lambda x, first, f, second: second(f(first(x))) + x, relies_on_range=True, weighed=False)
def single_path(x: Value, first: Conv, f: Pointwise, second: Conv) -> Value:
    return _carried(x, [first, second], [f], unit())


@single_path.also(lambda x, first, f, second, skip: second(f(first(x))) + skip(x), relies_on_range=True, weighed=False)
def single_path_of_a_projection(
    x: Value, first: Conv, f: Pointwise, second: Conv, skip: Conv | Scale | Identity
) -> Value:
    return _carried(x, [first, second], [f], skip)


@single_path.also(
    lambda x, first, f, second, g, third: third(g(second(f(first(x))))) + x, relies_on_range=True, weighed=False
)
def single_path_of_a_bottleneck(x: Value, first: Conv, f: Pointwise, second: Conv, g: Pointwise, third: Conv) -> Value:
    return _carried(x, [first, second, third], [f, g], unit())


@single_path.also(
    lambda x, first, f, second, g, third, skip: third(g(second(f(first(x))))) + skip(x),
    relies_on_range=True, weighed=False,
)  # fmt: skip
def single_path_of_a_projected_bottleneck(
    x: Value, first: Conv, f: Pointwise, second: Conv, g: Pointwise, third: Conv, skip: Conv | Scale | Identity
) -> Value:
    return _carried(x, [first, second, third], [f, g], skip)


def _carried(x: Value, layers: Sequence[Conv], activations: Sequence[Pointwise], skip: Linear) -> Value:
    """The path with the skip connection inside, taken up beside the first layer whose stride it has."""
    spatial = layers[0].spatial
    channels = x.tensor_type.shape[-spatial - 1]
    through = skip.as_conv(channels, spatial)
    reasons = []
    for place in range(len(layers)):
        try:
            return _path(x, layers, activations, through, place)
        except Refusal as refusal:
            reasons.append(refusal.reason)
    raise Refusal(reasons[0])


def _path(x: Value, layers: Sequence[Conv], activations: Sequence[Pointwise], skip: Conv, place: int) -> Value:
    first, *inner, last = layers
    carried = skip(x) if place == 0 else x
    carry = _Carry.through(activations[0], first.out_channels, carried, skip.spatial)
    entering = compose(carry.enter, skip) if place == 0 else carry.enter
    size = x.tensor_type.size(skip.spatial)
    value = carry.activation(_stacked(first, entering, size)(x))
    for index, (layer, f) in enumerate(zip(inner, activations[1:], strict=True), start=1):
        left = compose(skip, carry.leave) if index == place else carry.leave
        carried = skip(x) if index == place else carried
        carry = _Carry.through(f, layer.out_channels, carried, skip.spatial)
        beside = compose(carry.enter, left)
        assert isinstance(beside, Conv)
        both = block_diagonal([layer, beside], value.tensor_type.size(skip.spatial))
        value = carry.activation(both(value))
    left = compose(skip, carry.leave) if place == len(inner) + 1 else carry.leave
    return _summed(last, left, value.tensor_type.size(skip.spatial))(value)


@dataclass(frozen=True)
class _Carry:
    """How a value gets through an activation: ``enter`` makes its copies, ``leave`` makes it of them again.

    activation: what the activation becomes, of its own channels and the copies behind them.
    """

    enter: Conv
    leave: Conv
    activation: Pointwise

    @staticmethod
    def through(f: Pointwise, own: int, carried: Value, spatial: int) -> _Carry:
        channels = carried.tensor_type.shape[-spatial - 1]
        once = _per_channel([[1.0]], channels, spatial)
        kept = _kept_by(f)
        if kept is not None and range_of(carried) in kept:
            return _Carry(once, once, f)
        sparing = _sparing(f, own, carried, spatial)
        if sparing is not None:
            return _Carry(once, once, sparing)
        share = 1 / _sum_of_slopes(f)
        return _Carry(
            _per_channel([[1.0], [-1.0]], channels, spatial), _per_channel([[share, -share]], channels, spatial), f
        )


def _per_channel(block: list[list[float]], channels: int, spatial: int) -> Conv:
    """The same matrix for each channel, whose copies lie side by side."""
    weight = torch.tensor(block, dtype=torch.float64).repeat(channels, 1)
    return Conv(weight.reshape(*weight.shape, *[1] * spatial), groups=channels)


def _bounds(f: Pointwise) -> Interval | None:
    """Where one clamp of all channels leaves its input alone."""
    if not isinstance(f, Activation) or f.name not in {"relu6", "hardtanh", "clamp"}:
        return None
    names, limits = (("min", "max"), (-math.inf, math.inf)) if f.name == "clamp" else (("min_val", "max_val"), (-1, 1))
    low, high = (0.0, 6.0) if f.name == "relu6" else tuple(map(f.option, names, limits))
    return Interval(low, high) if low <= high and low < math.inf and high > -math.inf else None


def _kept_by(f: Pointwise) -> Interval | None:
    """The interval of values that ``f`` leaves alone."""
    return Interval(0.0) if isinstance(f, Activation) and f.name in {"relu", "leaky_relu"} else _bounds(f)


def _sparing(f: Pointwise, own: int, carried: Value, spatial: int) -> Pointwise | None:
    """``f`` on its ``own`` channels, and the identity on those carried behind them; None if it has no such form."""
    shape = carried.tensor_type.shape
    channels, along = shape[-spatial - 1], len(shape) - spatial - 1
    free = torch.full((channels,), math.inf, dtype=torch.float64)
    if isinstance(f, Clamp):
        return Clamp(torch.cat([f.lower.double(), -free]), torch.cat([f.upper.double(), free]), spatial)
    bounds = _bounds(f)
    if bounds is not None:
        low, high = (free.new_full((own,), end) for end in (bounds.lower, bounds.upper))
        return Clamp(torch.cat([low, -free]), torch.cat([high, free]), spatial)
    if f.weight is None or (f.weight.numel() == 1 and along != 1):
        return None
    require(along == 1, f"prelu has its slopes along axis 1, and the channels are on axis {along}")
    slopes = f.weight.double().expand(own)
    return Activation("prelu", weight=torch.cat([slopes, slopes.new_ones(channels)]))


def _sum_of_slopes(f: Pointwise) -> float:
    """1 + a, with f(t) - f(-t) = (1 + a) t."""
    assert isinstance(f, Activation)
    if f.name in {"leaky_relu", "prelu"}:
        slope = float(f.option("negative_slope", 0.01) if f.weight is None else f.weight)
        require(slope != -1, f"{f.name} of slope -1 is |t|: f(t) - f(-t) = 0 gives nothing back")
        return 1.0 + slope
    require(
        f.name in {"relu", "gelu", "silu", "hardswish"},
        f"{f.name} does not give back what it is given: f(t) - f(-t) is no multiple of t",
    )
    return 1.0


def _stacked(top: Linear, bottom: Linear, size: tuple[int, ...] | None) -> Linear:
    """Two maps of one source as one, the channels of ``bottom`` behind those of ``top``."""
    assert isinstance(top, Conv) and isinstance(bottom, Conv)
    every = torch.eye(top.out_channels + bottom.out_channels, dtype=torch.float64)
    left, right = (_matrix(part, top.spatial) for part in (every[:, : top.out_channels], every[:, top.out_channels :]))
    return add(compose(left, top, size), compose(right, bottom, size), size)


def _summed(first: Linear, second: Linear, size: tuple[int, ...] | None) -> Linear:
    """The sum of a map of the first channels and one of the channels behind them."""
    assert isinstance(first, Conv) and isinstance(second, Conv)
    every = torch.eye(first.in_channels + second.in_channels, dtype=torch.float64)
    left, right = (_matrix(part, first.spatial) for part in (every[: first.in_channels], every[first.in_channels :]))
    return add(compose(first, left, size), compose(second, right, size), size)


def _matrix(matrix: Tensor, spatial: int) -> Conv:
    return Conv(matrix.reshape(*matrix.shape, *[1] * spatial))


class _Block(nn.Module):
    def __init__(self, body: nn.Module, skip: nn.Module) -> None:
        super().__init__()
        self.body, self.skip = body, skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def _basic(f: nn.Module, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, 3, stride, 1), f, nn.Conv2d(6, 4, 3, padding=1))


@single_path.fires_on(shape=(2, 4, 9, 8))
def residual_block_on_rectified_values() -> nn.Module:
    return nn.Sequential(nn.ReLU(), _Block(_basic(nn.ReLU()), nn.Identity())).eval()


@single_path.fires_on(shape=(2, 4, 9, 8))
def residual_block_on_any_values() -> nn.Module:
    return _Block(_basic(nn.GELU()), nn.Identity()).eval()


@single_path.fires_on(shape=(2, 4, 9, 8))
def strided_block_with_a_projection() -> nn.Module:
    return _Block(_basic(nn.LeakyReLU(0.2), 2), nn.Conv2d(4, 4, 1, 2)).eval()


@single_path.fires_on(shape=(2, 4, 9, 8))
def bottleneck_whose_second_layer_is_strided() -> nn.Module:
    body = nn.Sequential(
        nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 3, 2, 1), nn.SiLU(), nn.Conv2d(2, 8, 1)
    )  # fmt: skip
    return _Block(body, nn.Conv2d(4, 8, 1, 2)).eval()


@single_path.fires_on(shape=(2, 4, 9, 8))
def residual_in_the_range_of_relu6() -> nn.Module:
    return nn.Sequential(nn.ReLU6(), _Block(_basic(nn.ReLU6()), nn.Identity())).eval()


@single_path.fires_on(shape=(2, 4, 9, 8))
def inverted_bottleneck_around_relu6() -> nn.Module:
    body = nn.Sequential(
        nn.Conv2d(4, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6(), nn.Conv2d(8, 4, 1)
    )  # fmt: skip
    return _Block(body, nn.Identity()).eval()


@single_path.fires_on(shape=(2, 4, 9, 8))
def residual_block_on_a_prelu() -> nn.Module:
    return _Block(_basic(nn.PReLU(6, init=0.3)), nn.Identity()).eval()


class _PlainBlock(nn.Module):
    """A skip connection that is no layer."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + x)


@single_path.fires_on(shape=(2, 4, 7, 6))
def residual_block_without_a_layer_on_its_skip() -> nn.Module:
    return _PlainBlock(_basic(nn.SiLU())).eval()


@single_path.fires_on(shape=(2, 4, 7, 6))
def bottleneck_without_a_layer_on_its_skip() -> nn.Module:
    body = nn.Sequential(
        nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 4, 1)
    )  # fmt: skip
    return _PlainBlock(body).eval()


@single_path.leaves_alone(shape=(2, 4, 9, 8), because="does not give back what it is given")
def residual_beside_mish() -> nn.Module:
    return _Block(_basic(nn.Mish()), nn.Identity()).eval()
