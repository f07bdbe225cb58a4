"""What returns its very input, or adds nothing to it, is not there: Identity, dropout in evaluation, x * 1, y + 0 x."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from rgc import Identity, Scale, Value, require, rewrite


def is_one(op: Identity | Scale) -> bool:
    """Does the operator return its input?"""
    return isinstance(op, Identity) or op.is_identity


def is_zero(op: Scale) -> bool:
    """Does the operator return zeros (for finite inputs)?"""
    return bool((op.scale == 0).all()) and bool((op.shift == 0).all())


@rewrite(lambda x, identity: identity(x))
def drop_identity(x: Value, identity: Annotated[Identity | Scale, is_one]) -> Value:
    return x


@drop_identity.also(lambda x, y, zero: y + zero(x))
def drop_zero(x: Value, y: Value, zero: Annotated[Scale, is_zero]) -> Value:
    same = x.type is not None and y.type is not None and x.type.shape == y.type.shape
    require(same, "the sum broadcasts the zero branch")
    return y


@drop_identity.fires_on(shape=(2, 3, 8, 8))
def dropout_between_convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.3), nn.ReLU(), nn.Identity(), nn.Conv2d(4, 4, 1)).eval()


class _Gated(nn.Module):
    def __init__(self, gate: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("gate", torch.tensor(gate))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) + self.gate * self.conv(x).sigmoid()


@drop_identity.fires_on(shape=(2, 3, 8, 8))
def a_branch_whose_gate_is_closed() -> nn.Module:
    return _Gated(0.0).eval()
