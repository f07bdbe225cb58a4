"""An affine region between fixed sizes is one matrix, whatever it is made of: y = Mx + c.

M comes exactly from the region itself, from min(inputs, outputs) backward or forward passes in float64 on unit vectors
(adjoint probing), in chunks, so that memory stays bounded by `LARGEST_MATRIX` entries.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor, nn

from rgc import Conv, Deferred, Flatten, Refusal, Region, Unflatten, Value, require, rewrite

#: Entries of the largest matrix that is computed (128 MiB in float64).
LARGEST_MATRIX = 2**24

#: Unit vectors in one pass are as many as keep a batch of inputs below so many elements.
CHUNK = 2**22


#: Calls that only look at the same memory in another way.
VIEWS = frozenset({"flatten", "unflatten", "Flatten", "Unflatten", "reshape", "view", "squeeze", "unsqueeze"})


def has_several_layers(region: Region) -> bool:
    """Is there more than one layer to save?"""
    return sum(value.op.label not in VIEWS for value in region.values) > 1


@rewrite(lambda x, region: region(x))
def collapse(x: Value, region: Annotated[Region, has_several_layers]) -> Value:
    require(x.tensor_type.fixed, "a region is one matrix only at a fixed size (--passes all)")
    entering, leaving = x.tensor_type.shape[1:], region.sink.tensor_type.shape[1:]
    inputs, outputs = math.prod(entering), math.prod(leaving)
    require(
        inputs * outputs <= LARGEST_MATRIX,
        f"the region would be a matrix of {outputs:,} x {inputs:,} ({inputs * outputs / 1e6:,.0f} M entries; "
        f"at most {LARGEST_MATRIX / 1e6:,.0f} M are computed)",
    )
    _require_independent_samples(region, entering)
    offset = region.evaluate(torch.zeros(1, *entering, dtype=torch.float64)).reshape(-1)
    spatial = len(entering) - 1
    if spatial > 0 and len(leaving) == len(entering) and set(leaving[1:]) == {1}:
        kernel = Deferred(
            (outputs, *entering), lambda: _matrix(region, offset, entering, leaving).reshape(-1, *entering)
        )
        return Conv(kernel, offset, size=entering[1:])(x)
    flat = x if len(entering) == 1 else Flatten(entering)(x)
    y = Conv(Deferred((outputs, inputs), lambda: _matrix(region, offset, entering, leaving)), offset)(flat)
    return y if len(leaving) == 1 else Unflatten(leaving)(y)


def _require_independent_samples(region: Region, entering: tuple[int, ...]) -> None:
    """The batch must be free: three samples at once give what each gives alone."""
    x = torch.randn(3, *entering, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    try:
        together = region.evaluate(x)
        alone = torch.cat([region.evaluate(x[index : index + 1]) for index in range(3)])
    except RuntimeError as error:
        raise Refusal(f"the region does not run on every batch size: {str(error).splitlines()[0]}") from error
    same = together.shape == alone.shape and torch.allclose(
        together, alone, rtol=1e-9, atol=1e-9 * float(alone.abs().max())
    )
    require(same, "the region mixes the samples of a batch")


def _matrix(region: Region, offset: Tensor, entering: tuple[int, ...], leaving: tuple[int, ...]) -> Tensor:
    """M [outputs, inputs] of the region, in float64; ``offset`` is what it makes of zeros."""
    inputs, outputs = math.prod(entering), math.prod(leaving)
    step = max(1, CHUNK // max(inputs, outputs))
    units = torch.split(torch.eye(min(inputs, outputs), dtype=torch.float64), step)
    if inputs <= outputs:
        columns = [region.evaluate(unit.reshape(-1, *entering)).flatten(1) - offset for unit in units]
        return torch.cat(columns).T.contiguous()
    return torch.cat([_rows(region, unit.reshape(-1, *leaving), entering) for unit in units])


def _rows(region: Region, units: Tensor, entering: tuple[int, ...]) -> Tensor:
    """Rows of M: the adjoint applied to unit vectors."""
    with torch.enable_grad():
        x = torch.zeros(len(units), *entering, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(region.evaluate(x), x, units)
    return gradient.flatten(1)


@collapse.fires_on(shape=(2, 3, 8, 8), fixed_size=True)
def linear_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 4),
    ).eval()  # fmt: skip


@collapse.fires_on(shape=(2, 3, 8, 8), fixed_size=True)
def padded_chain_that_ends_in_one_position() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 4, 8)).eval()


@collapse.leaves_alone(shape=(2, 3, 8, 8), because="fixed size")
def linear_network_of_any_size() -> nn.Module:
    return linear_network()
