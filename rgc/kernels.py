"""What are the weights of a composition, of a sum, of the same map in other groups? Tensors and plain integers only.

A weight is [out, in / groups, *kernel]; everything is computed in the dtype of what is given.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rgc.axis import Alignment


@dataclass(frozen=True)
class Kernel:
    """A weight [out, in / groups, *kernel] and its groups."""

    weight: Tensor
    groups: int = 1

    @property
    def extent(self) -> tuple[int, ...]:
        """Taps per axis."""
        return tuple(self.weight.shape[2:])

    @property
    def out_channels(self) -> int:
        """Channels made."""
        return self.weight.shape[0]

    def taps(self) -> Tensor:
        """The sum over the taps, [out, in / groups]."""
        return self.weight.reshape(*self.weight.shape[:2], -1).sum(dim=-1)


def regroup(kernel: Kernel, groups: int) -> Kernel:
    """The same map with fewer ``groups`` (a divisor of its own), the weight filled up with zeros."""
    if groups == kernel.groups:
        return kernel
    weight, ratio = kernel.weight, kernel.groups // groups
    rows, columns = weight.shape[0] // kernel.groups, weight.shape[1]
    blocks = weight.reshape(groups, ratio, rows, columns, *kernel.extent)
    wide = blocks.new_zeros(groups, ratio, rows, ratio, columns, *kernel.extent)
    for index in range(ratio):
        wide[:, index, :, index] = blocks[:, index]
    return Kernel(wide.reshape(weight.shape[0], ratio * columns, *kernel.extent), groups)


def compose_kernels(second: Kernel, first: Kernel, inner: Sequence[int], outer: Sequence[int]) -> Kernel:
    """W[o, i] = sum over m of W2[o, m] W1[m, i], taps at inner j1 + outer j2; groups stay block-diagonal."""
    if second.groups % first.groups and first.groups % second.groups:
        first = regroup(first, math.gcd(first.groups, second.groups))
    split, groups = max(first.groups, second.groups), min(first.groups, second.groups)
    per = split // second.groups  # groups of the first that one group of the second reads
    middle = first.out_channels // split
    left = second.weight.reshape(second.groups, -1, per, middle, *second.extent).transpose(1, 2)
    left = left.reshape(split, -1, middle, math.prod(second.extent))
    right = first.weight.reshape(split, middle, -1)
    rows, columns = left.shape[1], first.weight.shape[1]
    steps = list(zip(inner, outer, first.extent, second.extent, strict=True))
    extent = [i * (k1 - 1) + o * (k2 - 1) + 1 for i, o, k1, k2 in steps]
    product = right.new_zeros(split, rows, columns, *extent)
    for index, tap in enumerate(itertools.product(*map(range, second.extent))):
        window = tuple(
            slice(o * j, o * j + i * (k1 - 1) + 1, max(i, 1)) for (i, o, k1, _), j in zip(steps, tap, strict=True)
        )
        block = torch.bmm(left[..., index], right) if middle > 1 else left[..., index] * right
        product[(slice(None), slice(None), slice(None), *window)] += block.reshape(split, rows, columns, *first.extent)
    product = product.reshape(second.groups, per, rows, columns, *extent).transpose(1, 2)
    return Kernel(product.reshape(second.out_channels, per * columns, *extent), groups)


def add_kernels(a: Kernel, b: Kernel, alignments: Sequence[Alignment]) -> Kernel:
    """The sum of two kernels, each at its place in the common window, in the gcd of the groups."""
    groups = math.gcd(a.groups, b.groups)
    extent = [alignment.axis.kernel for alignment in alignments]
    first, second = regroup(a, groups).weight, regroup(b, groups).weight
    total = first.new_zeros(*first.shape[:2], *extent)
    for weight, index in ((first, 0), (second, 1)):
        total[(slice(None), slice(None), *(alignment.places[index] for alignment in alignments))] += weight
    return Kernel(total, groups)


def transpose_kernel(kernel: Kernel) -> Kernel:
    """From [out, in / groups] to [in, out / groups] and back: what torch's transposed convolutions keep."""
    blocks = kernel.weight.reshape(kernel.groups, -1, *kernel.weight.shape[1:]).transpose(1, 2)
    return Kernel(blocks.reshape(-1, blocks.shape[2], *kernel.extent).contiguous(), kernel.groups)
