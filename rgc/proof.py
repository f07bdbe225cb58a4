"""Does one firing keep the function? The matched values and their replacement, same real weights, in float64.

Sizes are small, odd and even, and large enough to reach every border and the interior; one image is long, one is as
small as the windows allow, and batches differ, so that a rule shows which holds at some of them only. Where an operator
holds at one size only, that size is used. An affine difference that is not zero shows at a random point with
probability 1; inputs of two magnitudes show what clamps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rgc.errors import NotEquivalentError, RgcError
from rgc.fourier import fourier_convolutions
from rgc.ir import Value, evaluate_value, topological
from rgc.operators import Call, Constant
from rgc.ranges import Interval
from rgc.rearrange import Assign

#: Largest difference, relative to the largest intermediate value, that float64 rounding explains.
TOLERANCE = 1e-10

#: Standard deviations of the inputs, in turn: the large one reaches the clamps of ReLU6, Hardtanh and their like.
MAGNITUDES = (1.0, 100.0)

#: Positions on an axis, at least: so many that a draw shows what a bound of a range hides.
SMALLEST = 4

#: Samples of the inputs, in turn.
BATCHES = (1, 2)

#: So many times the stride, at least, is the last axis of the first image longer than the others.
LONGER = 3

#: How an operator says that it does not take an input.
_DECLINES = (RuntimeError, ValueError, TypeError, IndexError, RgcError)


def check_firing(
    old: Value, new: Value, sources: Sequence[Value], seed: int = 0, ranges: Mapping[Value, Interval] | None = None
) -> float:
    """The largest relative difference between ``old`` and ``new`` as functions of ``sources``.

    A source takes any value, or, where ``ranges`` names it, those of its interval.
    Raises `NotEquivalentError` where it exceeds float64 rounding.
    """
    known = set(sources)
    before, after = (topological([value], known=known.__contains__) for value in (old, new))
    generator = torch.Generator().manual_seed(seed)
    exact = [source.tensor_type.shape for source in sources]

    def difference(index: int, shapes: Sequence[tuple[int, ...]]) -> float | None:
        size = ", ".join("x".join(map(str, shape)) for shape in shapes)
        magnitude = MAGNITUDES[index % len(MAGNITUDES)]
        inputs = {
            s: _random(shape, s, magnitude, generator, (ranges or {}).get(s, Interval()))
            for s, shape in zip(sources, shapes, strict=True)
        }
        try:
            expected, scale = _run(before, old, inputs)
        except _DECLINES:
            return None  # the original itself does not take this size
        if not expected.numel():
            return None  # all of it is cut off
        try:
            found, _ = _run(after, new, inputs)
        # The result is its author's code, weights that are put off too, and may raise anything.
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip()[:160]}"
            raise NotEquivalentError(f"{old.where}: the result fails on a random input of {size}: {reason}") from error
        distance = relative_difference(expected, found, scale)
        if not distance <= TOLERANCE:
            raise NotEquivalentError(f"{old.where}: differs by {distance:.1e} of its scale on a random input of {size}")
        return distance

    seen = [difference(index, shapes) for index, shapes in enumerate(small_shapes(before + after, sources))]
    if all(distance is None for distance in seen):
        seen = [difference(index, exact) for index in range(len(MAGNITUDES))]
    if None in seen and len(set(seen)) == 1:
        raise NotEquivalentError(
            f"{old.where}: it does not run in float64 on a random input, so nothing proves the result"
        )
    seen += [difference(0, shapes) for shapes in _smallest_shapes(before + after, sources)]
    return max(distance for distance in seen if distance is not None)


def relative_difference(expected: Tensor, found: Tensor, scale: float | None = None) -> float:
    """max |expected - found| over ``scale`` (by default max |expected|); infinite where they cannot compare."""
    if expected.shape != found.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(expected, found) else float("inf")
    size = _peak(expected) if scale is None else scale
    wide = torch.complex128 if expected.is_complex() else torch.float64
    distance = _largest(expected.to(wide) - found.to(wide))
    if math.isfinite(distance):  # so neither holds NaN or infinities, and there is nothing to leave out
        return distance / max(size, torch.finfo(torch.float64).tiny)
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()) or not torch.equal(expected[~finite].isnan(), found[~finite].isnan()):
        return float("inf")
    distance = _largest(expected[finite].to(wide) - found[finite].to(wide))
    return distance / max(size, torch.finfo(torch.float64).tiny)


def _peak(tensor: Tensor) -> float:
    """The largest magnitude among the finite elements."""
    found = _largest(tensor)
    return found if math.isfinite(found) else _largest(tensor[tensor.isfinite()])


def _largest(tensor: Tensor) -> float:
    """The largest magnitude: not finite where an element is not, zero for a tensor without elements."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _run(values: list[Value], root: Value, inputs: dict[Value, Tensor]) -> tuple[Tensor, float]:
    results: dict[Value, Any] = dict(inputs)
    scale = 0.0
    with torch.no_grad(), fourier_convolutions():
        for value in values:
            result = evaluate_value(value, [results[used] for used in value.inputs], {}, torch.float64)
            results[value] = result
            if isinstance(result, Tensor) and result.is_floating_point():
                scale = max(scale, _peak(result))
    return results[root], scale


def small_shapes(values: list[Value], sources: Sequence[Value]) -> list[list[tuple[int, ...]]]:
    """Shapes of the sources at small sizes, odd and even on each axis; none where only the example's size is sure."""
    axes = _free_axes(values, sources)
    if axes is None:
        return []
    reach, stride = _reach(values, sources)
    reach = max(reach, SMALLEST)
    residues = min(max(stride, 2), 4)  # sizes that leave different remainders behind the last window
    sizes = [[reach + stride + (index + axis) % residues for axis in range(axes)] for index in range(residues)]
    if axes:
        sizes[0][-1] += LONGER * residues
    images = [(BATCHES[index % len(BATCHES)], size) for index, size in enumerate(sizes)]
    return [[_small(source, samples, size) for source in sources] for samples, size in images]


def _smallest_shapes(values: list[Value], sources: Sequence[Value]) -> list[list[tuple[int, ...]]]:
    """One position, and as many as the widest window, on every axis alike; none as for `small_shapes`."""
    axes = _free_axes(values, sources)
    if not axes:
        return []
    window, _ = _reach(values, sources)
    return [[_small(source, 1, [n] * axes) for source in sources] for n in dict.fromkeys((1, window))]


def _free_axes(values: list[Value], sources: Sequence[Value]) -> int | None:
    """How many of the last axes of all sources may have any size; None where only the example's size is sure."""
    exact = [source.tensor_type.shape for source in sources]
    spatial = {value.op.spatial_axes(value.type) for value in values if value.type is not None} - {None}
    free = all(v.op.any_size and not isinstance(v.op, Assign | Call | Constant) for v in values)
    if not free or len(spatial) > 1 or len({len(shape) for shape in exact}) > 1:
        return None
    axes = next(iter(spatial), None)
    if axes is None:  # nothing tells channels from positions: the first two axes stay as they are
        axes = max(len(exact[0]) - 2, 0)
    channel = len(exact[0]) - axes - 1
    if channel < 1 or len({(shape[1:channel], shape[channel + 1 :]) for shape in exact}) > 1:
        return None
    return axes


def _small(source: Value, samples: int, size: Sequence[int]) -> tuple[int, ...]:
    """So many samples, other batch axes of at most 2, the channels as they are, spatial axes of ``size``."""
    shape = source.tensor_type.shape
    lead = len(shape) - len(size) - 1
    return (samples, *(min(n, 2) for n in shape[1:lead]), shape[lead], *size)


def _reach(values: list[Value], sources: Sequence[Value]) -> tuple[int, int]:
    """The widest receptive field and the largest stride: a size above their sum has every border and an interior."""
    fields = dict.fromkeys(sources, (1, 1))  # receptive field and stride of each value
    for value in values:
        before = [fields.get(used, (1, 1)) for used in value.inputs] or [(1, 1)]
        field, stride = max(r for r, _ in before), max(s for _, s in before)
        wider, step = value.op.reach
        fields[value] = (field + wider * stride, stride * step)
    return max(reach for reach, _ in fields.values()), max(stride for _, stride in fields.values())


def _random(
    shape: tuple[int, ...], source: Value, magnitude: float, generator: torch.Generator, interval: Interval
) -> Tensor:
    if not source.tensor_type.dtype.is_floating_point:
        return torch.randint(0, 2, shape, generator=generator).to(source.tensor_type.dtype)
    lower, upper = interval.lower, interval.upper
    if math.isfinite(lower) and math.isfinite(upper):  # all over the interval, and every third time one of its bounds
        spread = 1.5 * torch.rand(shape, generator=generator, dtype=torch.float64) - 0.25
        return (lower + (upper - lower) * spread).clamp(lower, upper)
    x = magnitude * torch.randn(shape, generator=generator, dtype=torch.float64)
    if math.isfinite(lower):  # every second time the bound itself
        return lower + x.clamp(min=0)
    return upper - x.clamp(min=0) if math.isfinite(upper) else x
