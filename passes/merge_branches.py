"""Parallel linear branches of one source that meet in a sum or a concatenation are one operator: Ax + Bx = (A + B)x.

The whole region between the source and the meeting point is taken at once, so a chain that would not pay by itself
(1x1 then average pooling) merges where its neighbour hides it. Of a longer sum, those addends that share a source.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rgc import Conv, Gather, Join, Linear, Scale, Value, regroup_by_sparsity, rewrite

#: Weights in which zeros are looked for, which means that they are computed before the cost is weighed.
MOST_WEIGHTS = 2**22


@rewrite(lambda x, branches: branches(x))
def merge_branches(x: Value, branches: Join) -> Value:
    size = None if branches.spatial is None else x.tensor_type.size(branches.spatial)
    linear = branches.as_linear(size)
    if isinstance(linear, Scale) and linear.is_identity:
        return x
    return _in_groups(linear, branches)(x)


def _in_groups(linear: Linear, branches: Join) -> Linear:
    """Branches of some of the channels leave zeros in the merged weight, and those are groups."""
    selects = any(isinstance(value.op, Gather) for value in branches.values)
    if not selects or not isinstance(linear, Conv) or linear.groups > 1 or math.prod(linear.shape) > MOST_WEIGHTS:
        return linear
    return regroup_by_sparsity(linear)


class _Branches(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return torch.relu(total)


@merge_branches.fires_on(shape=(2, 4, 9, 8))
def square_vertical_and_horizontal_kernel() -> nn.Module:
    return _Branches(
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, (3, 1), padding=(1, 0)),
        nn.Conv2d(4, 4, (1, 3), padding=(0, 1)),
    ).eval()


@merge_branches.fires_on(shape=(2, 8, 14, 14))
def pointwise_then_average_pooling_beside_a_convolution() -> nn.Module:
    pooled = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False, padding=1), nn.AvgPool2d(3, 1))
    return _Branches(nn.Conv2d(8, 8, 3, padding=1), pooled).eval()


@merge_branches.fires_on(shape=(2, 4, 9, 8))
def strided_branches_of_different_groups() -> nn.Module:
    return _Branches(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), nn.Conv2d(4, 8, 1, stride=2, groups=4)).eval()


class _TwoSources(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 4, 1)
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        return torch.relu(self.first(y) - torch.tanh(x) + self.second(y) + y)


class _Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x)
        return torch.tanh(y + y)


@merge_branches.fires_on(shape=(2, 4, 9, 8))
def a_value_added_to_itself() -> nn.Module:
    return _Twice().eval()


@merge_branches.fires_on(shape=(2, 4, 9, 8))
def branches_in_a_sum_with_something_else() -> nn.Module:
    return _TwoSources().eval()


@merge_branches.leaves_alone(shape=(2, 4, 9, 9), because="padding modes differ")
def branches_that_pad_differently() -> nn.Module:
    return _Branches(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")).eval()
