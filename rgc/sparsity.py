"""Which convolution of many groups is it? Groups from zeros in a weight, and convolutions side by side as one.

A convolution has G groups where its channel incidence, output by input, is block-diagonal in G contiguous equal blocks:
the connected components of the incidence, as far as PyTorch's ``groups`` can say them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from rgc.algebra import Conv, Deferred, Size, add
from rgc.errors import require


def regroup_by_sparsity(conv: Conv) -> Conv:
    """The same convolution in as many groups as the exact zeros of its weight allow. Reads the weight.

    >>> regroup_by_sparsity(Conv(torch.eye(6).reshape(6, 6, 1))).groups
    6
    """
    w = conv.weight
    rows, columns = w.shape[0], w.shape[1] * conv.groups
    row, column = (w.reshape(rows, w.shape[1], -1) != 0).any(-1).nonzero(as_tuple=True)
    column = column + row // (rows // conv.groups) * w.shape[1]  # as if there were one group
    for groups in _divisors(math.gcd(rows, columns)):
        if groups % conv.groups:
            continue
        if torch.equal(row // (rows // groups), column // (columns // groups)):
            return conv if groups == conv.groups else _diagonal_blocks(conv, groups)
    return conv


def block_diagonal(parts: Sequence[Conv], size: Size | None = None) -> Conv:
    """Convolutions beside each other, each of channels of its own: y = (A a, B b, ...) of x = (a, b, ...).

    As one convolution in as many groups as the parts allow; ``size`` is the spatial input size where it is fixed.
    Raises a `Refusal` where strides or paddings differ.
    """
    require(not any(part.transposed for part in parts), "transposed convolutions side by side are not merged")
    require(all(part.ones is None for part in parts), "a channel of ones would make convolutions side by side dense")
    inputs, outputs = (sum(part.channels[end] for part in parts) for end in (0, 1))
    starts = [list(itertools.accumulate((part.channels[end] for part in parts), initial=0)) for end in (0, 1)]
    groups = _common_groups(parts, starts, inputs, outputs)
    value = _pad_values(parts)
    embedded = [
        _embedded(part, a, c, inputs // groups, outputs, groups, value)
        for part, a, c in zip(on_one_grid(parts), starts[0][:-1], starts[1][:-1], strict=True)
    ]
    return functools.reduce(lambda left, right: cast(Conv, add(left, right, size)), embedded)


def on_one_grid(parts: Sequence[Conv]) -> list[Conv]:
    """The same convolutions, whose outputs are known to be of one size, padded such that they are so at every size.

    ``x[..., ::2]`` and ``x[..., 1::2]`` are of one size at even sizes, and otherwise nobody concatenates them.
    """
    if len({part.stride for part in parts}) > 1 or any(part.transposed for part in parts):
        return list(parts)
    ends = [[b + a - d * (k - 1) for (b, a), d, k in _axes_of(part)] for part in parts]
    least = [min(axis) for axis in zip(*ends, strict=True)]
    made = []
    for part, own in zip(parts, ends, strict=True):
        padding = tuple((b, a - e + n) for (b, a), e, n in zip(part.padding, own, least, strict=True))
        crops = any(amount < 0 for sides in padding for amount in sides)
        same = padding == part.padding or (crops and part.padding_mode != "zeros")
        made.append(part if same else part.changed(padding=padding))
    return made


def _axes_of(conv: Conv) -> zip[tuple[tuple[int, int], int, int]]:
    return zip(conv.padding, conv.dilation, conv.kernel, strict=True)


def _diagonal_blocks(conv: Conv, groups: int) -> Conv:
    ratio = groups // conv.groups
    rows, columns = conv.weight.shape[0] // groups, conv.weight.shape[1] // ratio
    blocks = conv.weight.reshape(conv.groups, ratio, rows, ratio, columns, *conv.kernel)
    diagonal = torch.stack([blocks[:, index, :, index] for index in range(ratio)], dim=1)
    return replace(conv, weight=diagonal.reshape(conv.weight.shape[0], columns, *conv.kernel), groups=groups)


def _common_groups(parts: Sequence[Conv], starts: list[list[int]], inputs: int, outputs: int) -> int:
    """The most groups of equal width such that each group of each part lies in one."""
    cells = [
        (a + group * n, a + (group + 1) * n - 1, c + group * m, c + (group + 1) * m - 1)
        for part, a, c in zip(parts, starts[0][:-1], starts[1][:-1], strict=True)
        for n, m in [(part.in_channels // part.groups, part.out_channels // part.groups)]
        for group in range(part.groups)
    ]
    for groups in _divisors(math.gcd(inputs, outputs)):
        width, height = inputs // groups, outputs // groups
        if all(a // width == b // width == c // height == d // height for a, b, c, d in cells):
            return groups
    return 1


def _pad_values(parts: Sequence[Conv]) -> Tensor | None:
    if all(part.pad_value is None or not part.is_padded for part in parts):
        return None
    values = [torch.zeros(part.in_channels) if part.pad_value is None else part.pad_value for part in parts]
    return torch.cat([value.double() for value in values])


def _embedded(part: Conv, a: int, c: int, width: int, outputs: int, groups: int, value: Tensor | None) -> Conv:
    """``part`` as a map of all channels: from input ``a`` on to output ``c`` on, zero elsewhere."""
    n, m = part.in_channels // part.groups, part.out_channels // part.groups

    def weight() -> Tensor:
        w = part.weight.double()
        wide = w.new_zeros(outputs, width, *part.kernel)
        row = torch.arange(part.out_channels, device=w.device)
        column = (a + row // m * n)[:, None] + torch.arange(n, device=w.device)
        wide[(c + row)[:, None], column % width] = w
        return wide

    bias = None
    if part.bias is not None:
        bias = part.bias.new_zeros(outputs, *part.bias.shape[1:], dtype=torch.float64)
        bias[c : c + part.out_channels] = part.bias.double()
    made = Deferred((outputs, width, *part.kernel), weight)
    mode = part.padding_mode if part.is_padded else "zeros"
    return part.changed(
        weight=made, bias=bias, groups=groups, padding_mode=mode, pad_value=value if part.is_padded else None
    )


def _divisors(n: int) -> list[int]:
    return [d for d in range(n, 0, -1) if n % d == 0]


__all__ = ["block_diagonal", "on_one_grid", "regroup_by_sparsity"]
