"""Does one firing keep the function? The matched values and their replacement, same real weights, in float64.

Sizes are small, odd and even, and large enough to reach every border and the interior; where an operator holds at one
size only, that size is used. An affine difference that is not zero shows at a random point with probability 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rgc.algebra import Conv
from rgc.errors import NotEquivalentError
from rgc.ir import Value, evaluate_value, topological
from rgc.operators import AvgPool, BatchNorm, Call, Constant

#: Largest difference, relative to the largest intermediate value, that float64 rounding explains.
TOLERANCE = 1e-10


def check_firing(old: Value, new: Value, sources: Sequence[Value], seed: int = 0) -> float:
    """The largest relative difference between ``old`` and ``new`` as functions of ``sources``.

    Raises `NotEquivalentError` where it exceeds float64 rounding.
    """
    known = set(sources)
    before, after = (topological([value], known=known.__contains__) for value in (old, new))
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for shapes in _probe_shapes(before + after, sources):
        inputs = {s: _random(shape, s, generator) for s, shape in zip(sources, shapes, strict=True)}
        expected, scale = _run(before, old, inputs)
        found, _ = _run(after, new, inputs)
        worst = max(worst, relative_difference(expected, found, scale))
        if not worst <= TOLERANCE:
            shape = "x".join(map(str, shapes[0]))
            raise NotEquivalentError(f"{old.where}: differs by {worst:.1e} of its scale on a random input of {shape}")
    return worst


def relative_difference(expected: Tensor, found: Tensor, scale: float | None = None) -> float:
    """max |expected - found| over ``scale`` (the largest magnitude of ``expected``); infinite where they cannot compare."""
    if expected.shape != found.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(expected, found) else float("inf")
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()) or not torch.equal(expected[~finite].isnan(), found[~finite].isnan()):
        return float("inf")
    difference = (expected[finite].double() - found[finite].double()).abs()
    if difference.numel() == 0:
        return 0.0
    size = float(expected[finite].abs().max()) if scale is None else scale
    return float(difference.max()) / max(size, torch.finfo(torch.float64).tiny)


def _run(values: list[Value], root: Value, inputs: dict[Value, Tensor]) -> tuple[Tensor, float]:
    results: dict[Value, Any] = dict(inputs)
    scale = 0.0
    with torch.no_grad():
        for value in values:
            result = evaluate_value(value, [results[used] for used in value.inputs], {}, torch.float64)
            results[value] = result
            if isinstance(result, Tensor) and result.is_floating_point() and result.numel():
                finite = result[result.isfinite()]
                scale = max(scale, float(finite.abs().max()) if finite.numel() else 0.0)
    return results[root], scale


def _probe_shapes(values: list[Value], sources: Sequence[Value]) -> Iterator[list[tuple[int, ...]]]:
    exact = [source.tensor_type.shape for source in sources]
    spatial = {v.op.spatial for v in values if isinstance(v.op, Conv | AvgPool | BatchNorm)} - {None}
    ranks = {len(shape) for shape in exact}
    free = all(v.op.any_size and not isinstance(v.op, Call | Constant) for v in values)
    if not free or len(spatial) > 1 or len(ranks) > 1 or (len(sources) > 1 and len({s[1:] for s in exact}) > 1):
        yield exact
        return
    axes = next(iter(spatial), 0) or 0
    extent = _extent(values, sources, axes)
    for parity in ((1, 2), (2, 1)):
        size = tuple(itertools.islice(itertools.cycle(extent + p for p in parity), axes))
        yield [_small(shape, axes, size) for shape in exact]


def _small(shape: tuple[int, ...], axes: int, size: tuple[int, ...]) -> tuple[int, ...]:
    """Batch axes shrink to 2, the channel axis stays, spatial axes become ``size``."""
    lead = len(shape) - axes - 1
    if lead < 0:
        return shape
    return (*(min(n, 2) for n in shape[:lead]), shape[lead], *size)


def _extent(values: list[Value], sources: Sequence[Value], axes: int) -> int:
    """A size at which every window fits with one step of room: the receptive field and the stride."""
    fields = {source: (1, 1) for source in sources}  # receptive field and stride of each value
    for value in values:
        op = value.op
        before = [fields.get(used, (1, 1)) for used in value.inputs] or [(1, 1)]
        reach, stride = max(r for r, _ in before), max(s for _, s in before)
        if isinstance(op, Conv) and op.spatial == axes and axes:
            widest = max(d * (k - 1) for d, k in zip(op.dilation, op.kernel, strict=True))
            fields[value] = (reach + widest * stride, stride * (1 if op.transposed else max(op.stride)))
        elif isinstance(op, AvgPool):
            fields[value] = (reach + (max(op.window) - 1) * stride, stride * max(op.stride))
        else:
            fields[value] = (reach, stride)
    return max(reach + stride - 1 for reach, stride in fields.values())


def _random(shape: tuple[int, ...], source: Value, generator: torch.Generator) -> Tensor:
    if not source.tensor_type.dtype.is_floating_point:
        return torch.randint(0, 2, shape, generator=generator).to(source.tensor_type.dtype)
    return torch.randn(shape, generator=generator, dtype=torch.float64)
