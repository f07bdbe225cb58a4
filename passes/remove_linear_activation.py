"""An activation that has decayed is the identity: (1 - l) act(x) + l x = x at l = 1, slope 1, PReLU of ones.

So is one whose input always lies where it is the identity, max(x, 0) = x for x >= 0: after another ReLU, a sigmoid, an
average of those.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgc import Activation, Clamp, Identity, Interval, Scale, Value, range_of, require, rewrite
from rgc.nn import DecayedActivation


def has_slope(activation: Activation) -> bool:
    """Is it linear on each side of zero, with a slope that may have become 1?"""
    return activation.name in {"leaky_relu", "prelu"}


@rewrite(lambda x, activation: activation(x))
def remove_linear_activation(x: Value, activation: Annotated[Activation, has_slope]) -> Value:
    if activation.weight is not None:
        slope = activation.weight[(activation.weight - 1).abs().argmax()].item()
    else:
        slope = activation.option("negative_slope", 0.01)
    require(slope == 1, f"{activation.name} is not the identity: its negative slope is {slope:.6g}, not 1")
    return x


def has_a_bound(x: Value) -> bool:
    """Is anything known of the range of the value?"""
    return not range_of(x).is_unbounded


def is_identity_somewhere(activation: Activation) -> bool:
    """Does the activation return its input on an interval?"""
    return _identity_interval(activation) is not None


@remove_linear_activation.also(lambda x, activation: activation(x), relies_on_range=True)
def remove_inactive_activation(
    x: Annotated[Value, has_a_bound], activation: Annotated[Activation, is_identity_somewhere]
) -> Value:
    found, wanted = range_of(x), _identity_interval(activation)
    assert wanted is not None
    require(found in wanted, f"{activation.name} takes part: its input may lie in {found}, not only in {wanted}")
    return x


@remove_linear_activation.also(lambda x, clamp: clamp(x), relies_on_range=True)
def remove_inactive_clamp(x: Annotated[Value, has_a_bound], clamp: Clamp) -> Value:
    found, low, high = range_of(x), float(clamp.lower.max()), float(clamp.upper.min())
    require(low <= found.lower and found.upper <= high, f"{clamp.label} takes part: its input may lie in {found}")
    return x


def _identity_interval(activation: Activation) -> Interval | None:
    """The widest interval around 0 or beside it on which the activation is the identity."""
    match activation.name:
        case "relu" | "leaky_relu" | "prelu" | "elu" | "celu" | "abs":
            return Interval(0.0)
        case "relu6":
            return Interval(0.0, 6.0)
        case "hardtanh":
            return Interval(activation.option("min_val", -1.0), activation.option("max_val", 1.0))
        case "clamp":
            low, high = activation.option("min", -math.inf), activation.option("max", math.inf)
            return Interval(low, high) if low <= high and low < math.inf and high > -math.inf else None
    return None


@remove_linear_activation.also(lambda x, activation, blend, skip: blend(activation(x)) + skip(x))
def remove_blended_activation(x: Value, activation: Activation, blend: Scale, skip: Scale | Identity) -> Value:
    return skip(x) if _is_removed(activation, blend) else x


@remove_linear_activation.also(lambda x, activation, blend: blend(activation(x)) + x)
def remove_faded_activation(x: Value, activation: Activation, blend: Scale) -> Value:
    _is_removed(activation, blend)
    return x


def _is_removed(activation: Activation, blend: Scale) -> bool:
    largest = blend.scale.abs().max().item()
    require(
        largest == 0 and not bool(blend.shift.any()),
        f"{activation.name} still takes part: its weight in the blend is {largest:.6g}, not 0 "
        f"(decay lambda = {1 - largest:.6g}, not 1)",
    )
    return True


@remove_linear_activation.fires_on(shape=(2, 3, 8, 8))
def decayed_activation() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), DecayedActivation(nn.GELU(), 1.0), nn.Conv2d(4, 4, 1)).eval()


@remove_linear_activation.fires_on(shape=(2, 3, 8, 8))
def leaky_relu_of_slope_one() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(1.0)).eval()


@remove_linear_activation.fires_on(shape=(2, 3, 8, 8))
def prelu_of_ones() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4, init=1.0)).eval()


@remove_linear_activation.fires_on(shape=(2, 3, 8, 8))
def relu_after_an_average_of_rectified_values() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()


@remove_linear_activation.fires_on(shape=(2, 3, 8, 8))
def relu6_after_a_sigmoid() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.ReLU6()).eval()


class _Bounded(nn.Module):
    """Bounds of each channel's own."""

    upper: Tensor

    def __init__(self, *upper: float) -> None:
        super().__init__()
        self.register_buffer("upper", torch.tensor(upper).reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(x, self.upper)


@remove_linear_activation.fires_on(shape=(2, 3, 8, 8))
def clamp_of_channels_after_a_sigmoid() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 3), nn.Sigmoid(), _Bounded(1.0, 3.0, math.inf)).eval()


@remove_linear_activation.leaves_alone(shape=(2, 3, 8, 8), because="takes part: its input may lie in [0, 1]")
def clamp_of_channels_one_of_which_takes_part() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 3), nn.Sigmoid(), _Bounded(0.9, 3.0, math.inf)).eval()


@remove_linear_activation.leaves_alone(shape=(2, 3, 8, 8), because="may lie in [-0.169971, inf), not only in [0, inf)")
def relu_after_a_gelu() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.ReLU()).eval()


@remove_linear_activation.leaves_alone(shape=(2, 3, 8, 8), because="lambda = 0.999")
def activation_that_has_not_quite_decayed() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), DecayedActivation(nn.ReLU(), 0.999)).eval()


@remove_linear_activation.leaves_alone(shape=(2, 3, 8, 8), because="negative slope is 0.5")
def prelu_of_halves() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4, init=0.5)).eval()


class _OverwritingBlend(nn.Module):
    """The known trap: the in-place ReLU overwrites what the other half reads, so this is relu(x) for every s."""

    s: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("s", torch.tensor(0.25))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        blend: Tensor = self.s * F.relu(out, inplace=True) + (1 - self.s) * out
        return blend


@remove_linear_activation.leaves_alone(shape=(2, 3, 8, 8), because="")
def blend_with_an_in_place_relu() -> nn.Module:
    return _OverwritingBlend().eval()
