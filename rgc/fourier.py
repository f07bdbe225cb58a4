"""How are convolutions with large kernels computed in reasonable time? By the convolution theorem.

PyTorch has no fast convolution in float64: its time grows with the taps of the kernel times the positions. The product
of the transforms gives the same to a few units in the last place of the largest result, in a time that grows with the
positions alone. What is deployed and measured is always computed by PyTorch's own convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: A transform of n elements takes about 2.5 n log2 n operations, each as long as so many of a matrix product.
_OF_A_PRODUCT = 4

#: So many elements of the kernel are transformed at once: what a cache holds, and the bound of the memory.
_ELEMENTS = 1 << 18


def fourier_convolutions() -> AbstractContextManager[Any]:
    """A context in which a convolution in float64 is computed by Fourier transforms where these take less work."""
    return _FourierConvolutions()


class _FourierConvolutions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rank = _RANKS.get(func)
        if rank is not None and not kwargs:
            found = _convolved(rank, *args)
            if found is not None:
                return found
        return func(*args, **(kwargs or {}))


#: By identity and not by name: what PyTorch itself calls inside is left alone.
_RANKS: dict[Any, int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


def _convolved(
    rank: int, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Tensor | None:  # fmt: skip
    """What ``conv1d`` to ``conv3d`` make of these arguments; None where that is left to them."""
    is_usual = x.dim() == weight.dim() == rank + 2 and x.dtype == weight.dtype == torch.float64
    if not is_usual or isinstance(padding, str) or x.shape[1] != weight.shape[1] * groups:
        return None
    strides, paddings, dilations = (_per_axis(given, rank) for given in (stride, padding, dilation))
    size = [n + 2 * p for n, p in zip(x.shape[2:], paddings, strict=True)]
    extent = [d * (k - 1) + 1 for d, k in zip(dilations, weight.shape[2:], strict=True)]
    valid = [n - e + 1 for n, e in zip(size, extent, strict=True)]
    if min(valid) < 1 or not _pays(x, weight, size, [-(-v // s) for v, s in zip(valid, strides, strict=True)]):
        return None
    padded = F.pad(x, [p for p in reversed(paddings) for _ in range(2)])
    spread = weight.new_zeros(*weight.shape[:2], *extent)
    taps: tuple[Any, ...] = (..., *(slice(0, e, d) for e, d in zip(extent, dilations, strict=True)))
    spread[taps] = weight
    axes, longer = tuple(range(-rank, 0)), [_fast_length(n) for n in size]
    signal = torch.fft.rfftn(padded, longer, axes).chunk(groups, 1)
    # a window that begins at a valid position ends inside, so nothing wraps around
    steps = tuple(slice(0, v, s) for v, s in zip(valid, strides, strict=True))
    made = x.new_empty(x.shape[0], weight.shape[0], *(len(range(v)[s]) for v, s in zip(valid, steps, strict=True)))
    per, width = weight.shape[0] // groups, max(1, _ELEMENTS // (weight.shape[1] * math.prod(longer)))
    for first in range(0, weight.shape[0], per):
        for start in range(first, first + per, width):
            some = slice(start, min(start + width, first + per))
            kernel = torch.fft.rfftn(spread[some], longer, axes).conj()
            product = (signal[first // per].unsqueeze(1) * kernel).sum(2)
            made[:, some] = torch.fft.irfftn(product, longer, axes)[(..., *steps)]
    if not bool(made.isfinite().all()):
        return None  # a transform spreads what is not finite over all positions
    return made if bias is None else made + bias.reshape(-1, *[1] * rank)


def _pays(x: Tensor, weight: Tensor, size: Sequence[int], made: Sequence[int]) -> bool:
    """Do the transforms take less work than the sums over the taps?"""
    positions = math.prod(size)
    planes = x.shape[0] * (x.shape[1] + weight.shape[0]) + weight.shape[0] * weight.shape[1]
    transforms = 2.5 * planes * positions * math.log2(max(positions, 2))
    return 2 * x.shape[0] * weight.numel() * math.prod(made) > _OF_A_PRODUCT * transforms


def _per_axis(given: Any, rank: int) -> list[int]:
    return [given] * rank if isinstance(given, int) else [*given] * (rank // len(given))


def _fast_length(length: int) -> int:
    """The next length without prime factors beyond 5, which transforms are fast for.

    >>> [_fast_length(n) for n in (7, 64, 127, 251)]
    [8, 64, 128, 256]
    """
    while True:
        rest = length
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return length
        length += 1


__all__ = ["fourier_convolutions"]
