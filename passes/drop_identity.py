"""What returns its very input, or adds nothing to it, is not there: Identity, dropout in evaluation, x * 1, y + 0 x.

0 x is zero for finite x only: a branch that is infinite or NaN behind a closed gate is dropped with it.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgc import Identity, Normalize, Scale, Value, require, rewrite


def is_one(op: Identity | Scale) -> bool:
    """Does the operator return its input?"""
    return isinstance(op, Identity) or op.is_identity


def is_zero(op: Scale) -> bool:
    """Does the operator return zeros (for finite inputs)?"""
    return bool((op.scale == 0).all()) and bool((op.shift == 0).all())


@rewrite(lambda x, identity: identity(x))
def drop_identity(x: Value, identity: Annotated[Identity | Scale, is_one]) -> Value:
    costs_nothing = isinstance(x.op, Normalize) and isinstance(identity, Scale)
    require(not costs_nothing, "the weights of a normalisation are neutral, but part of its layer")
    return x


@drop_identity.also(lambda x, y, zero: y + zero(x))
def drop_zero(x: Value, y: Value, zero: Annotated[Scale, is_zero]) -> Value:
    kept, dropped = y.tensor_type, x.tensor_type
    require(kept.shape == dropped.shape, "the sum broadcasts the branch that is kept to the size of the zero branch")
    require(kept.fixed or 1 not in kept.shape[2:], "at another size the sum may broadcast the branch that is kept")
    return y


@drop_identity.fires_on(shape=(2, 3, 8, 8))
def dropout_between_convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.3), nn.ReLU(), nn.Identity(), nn.Conv2d(4, 4, 1)).eval()


class _Gated(nn.Module):
    gate: Tensor

    def __init__(self, gate: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("gate", torch.tensor(gate))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) + self.gate * torch.sigmoid(self.conv(x))


@drop_identity.fires_on(shape=(2, 3, 8, 8))
def a_branch_whose_gate_is_closed() -> nn.Module:
    return _Gated(0.0).eval()


class _GatedPool(nn.Module):
    """The kept branch has one position, and the sum with the zero branch repeats it everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True).relu() + 0.0 * x


@drop_identity.leaves_alone(shape=(2, 3, 8, 8), because="the sum broadcasts")
def a_closed_gate_whose_branch_gives_the_sum_its_size() -> nn.Module:
    return _GatedPool().eval()


@drop_identity.leaves_alone(shape=(2, 3, 1, 1), because="at another size")
def a_closed_gate_whose_branch_gives_the_sum_its_size_elsewhere() -> nn.Module:
    return _GatedPool().eval()


class _Neutral(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (8,), torch.ones(8, dtype=x.dtype))


@drop_identity.leaves_alone(shape=(2, 3, 8), because="part of its layer")
def the_neutral_weights_of_a_new_layer_norm() -> nn.Module:
    return _Neutral().eval()


@drop_identity.leaves_alone(shape=(2, 3, 8, 8), because="")
def a_branch_whose_gate_is_nearly_closed() -> nn.Module:
    return _Gated(1e-3).eval()
