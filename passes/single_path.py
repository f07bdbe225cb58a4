"""A residual can go through the activations beside it, in channels of its own: x + B f(A x) = B' f(A' x). Opt-in.

For f(t) = t g(t) with g(t) + g(-t) = 1 (ReLU, GELU, SiLU, Hardswish; LeakyReLU of slope a, with 1 + a) the two copies
f(s) and f(-s) of a carried value s give it back: f(s) - f(-s) = (1 + a) s. So A' = [A; S; -S] makes them beside A x,
where S is the skip connection, and B' = [B, 1 / (1 + a), -1 / (1 + a)] takes them up. Where a range proof says that f
leaves s alone (ReLU and s >= 0, ReLU6 and s in [0, 6]), one copy does. A network of residual blocks becomes a single
path of convolutions and activations. It has more multiply-accumulates than before, and is made only if asked for by
name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rgc import (
    Activation,
    Conv,
    Identity,
    Linear,
    Refusal,
    Scale,
    Value,
    add,
    compose,
    range_of,
    require,
    rewrite,
    unit,
)


@rewrite(lambda x, first, f, second: second(f(first(x))) + x, relies_on_range=True, weighed=False)
def single_path(x: Value, first: Conv, f: Activation, second: Conv) -> Value:
    return _carried(x, [first, second], [f], unit())


@single_path.also(lambda x, first, f, second, skip: second(f(first(x))) + skip(x), relies_on_range=True, weighed=False)
def single_path_of_a_projection(
    x: Value, first: Conv, f: Activation, second: Conv, skip: Conv | Scale | Identity
) -> Value:
    return _carried(x, [first, second], [f], skip)


@single_path.also(
    lambda x, first, f, second, g, third: third(g(second(f(first(x))))) + x, relies_on_range=True, weighed=False
)
def single_path_of_a_bottleneck(
    x: Value, first: Conv, f: Activation, second: Conv, g: Activation, third: Conv
) -> Value:
    return _carried(x, [first, second, third], [f, g], unit())


@single_path.also(
    lambda x, first, f, second, g, third, skip: third(g(second(f(first(x))))) + skip(x),
    relies_on_range=True, weighed=False,
)  # fmt: skip
def single_path_of_a_projected_bottleneck(
    x: Value, first: Conv, f: Activation, second: Conv, g: Activation, third: Conv, skip: Conv | Scale | Identity
) -> Value:
    return _carried(x, [first, second, third], [f, g], skip)


def _carried(x: Value, layers: Sequence[Conv], activations: Sequence[Activation], skip: Linear) -> Value:
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


def _path(x: Value, layers: Sequence[Conv], activations: Sequence[Activation], skip: Conv, place: int) -> Value:
    value, carry = x, _Carry.nothing(skip.in_channels, skip.spatial)
    carried: Value = x
    for index, layer in enumerate(layers):
        own = _selecting(layer.in_channels, carry.width, skip.spatial, index > 0)
        taken = carry.leave if index != place else compose(skip, carry.leave)
        carried = skip(x) if index == place else carried
        size = value.tensor_type.size(skip.spatial)
        kept = compose(layer, own[0], size) if index else layer
        beside = compose(taken, own[1], size) if index else taken
        if index == len(layers) - 1:
            return add(kept, beside, size)(value)
        carry = _Carry.through(activations[index], carried, skip.spatial)
        value = activations[index](_stacked(kept, compose(carry.enter, beside, size), size)(value))
    raise AssertionError("a path has layers")


@dataclass(frozen=True)
class _Carry:
    """How a value gets through an activation: ``enter`` makes its copies, ``leave`` makes it of them again."""

    enter: Conv
    leave: Conv
    width: int

    @staticmethod
    def nothing(channels: int, spatial: int) -> _Carry:
        identity = _weights(torch.eye(channels, dtype=torch.float64), spatial)
        return _Carry(identity, identity, channels)

    @staticmethod
    def through(f: Activation, carried: Value, spatial: int) -> _Carry:
        channels = carried.tensor_type.shape[-spatial - 1]
        one = torch.eye(channels, dtype=torch.float64)
        if _leaves_alone(f, carried):
            return _Carry(_weights(one, spatial), _weights(one, spatial), channels)
        sum_of_slopes = _sum_of_slopes(f)
        both = _weights(torch.cat([one, -one]), spatial)
        return _Carry(both, _weights(torch.cat([one, -one], 1) / sum_of_slopes, spatial), 2 * channels)


def _leaves_alone(f: Activation, carried: Value) -> bool:
    interval = range_of(carried)
    highest = {"relu": float("inf"), "leaky_relu": float("inf"), "relu6": 6.0}.get(f.name, -1.0)
    return interval.lower >= 0 and interval.upper <= highest


def _sum_of_slopes(f: Activation) -> float:
    """1 + a, with f(t) - f(-t) = (1 + a) t."""
    if f.name == "leaky_relu":
        slope = float(f.option("negative_slope", 0.01))
        require(slope != -1, "leaky_relu of slope -1 is |t|: f(t) - f(-t) = 0 gives nothing back")
        return 1.0 + slope
    require(
        f.name in {"relu", "gelu", "silu", "hardswish"},
        f"{f.name} does not give back what it is given: f(t) - f(-t) is no multiple of t"
        + (", and the residual is not proved to lie in [0, 6]" if f.name == "relu6" else ""),
    )
    return 1.0


def _weights(matrix: Tensor, spatial: int) -> Conv:
    return Conv(matrix.reshape(*matrix.shape, *[1] * spatial))


def _selecting(own: int, carried: int, spatial: int, is_mixed: bool) -> tuple[Conv, Conv]:
    """What picks the layer's own channels, and the carried ones behind them."""
    every = torch.eye(own + carried if is_mixed else max(own, carried), dtype=torch.float64)
    return _weights(every[:own], spatial), _weights(every[own:] if is_mixed else every, spatial)


def _stacked(top: Linear, bottom: Linear, size: tuple[int, ...] | None) -> Linear:
    """The results of both as one result, the channels of ``bottom`` behind those of ``top``."""
    assert isinstance(top, Conv) and isinstance(bottom, Conv)
    every = torch.eye(top.out_channels + bottom.out_channels, dtype=torch.float64)
    left, right = every[:, : top.out_channels], every[:, top.out_channels :]
    return add(
        compose(_weights(left, top.spatial), top, size), compose(_weights(right, top.spatial), bottom, size), size
    )


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


@single_path.leaves_alone(shape=(2, 4, 9, 8), because="not proved to lie in [0, 6]")
def residual_beside_relu6() -> nn.Module:
    return _Block(_basic(nn.ReLU6()), nn.Identity()).eval()


@single_path.leaves_alone(shape=(2, 4, 9, 8), because="does not give back what it is given")
def residual_beside_mish() -> nn.Module:
    return _Block(_basic(nn.Mish()), nn.Identity()).eval()
