"""An affine region between fixed sizes is one matrix, whatever it is made of: y = Mx + c.

M comes exactly from the region itself, in float64 on unit vectors: its columns from forward passes, or its rows from
backward ones (adjoint probing), whichever are cheaper. Memory is bounded: M has at most `LARGEST_MATRIX` entries, and
is filled by one pass after another, none of which holds more than `LARGEST_PASS` elements at once, the inner values of
the region and their gradients included: 256 MiB in all, and the weights of one of its layers at a time in float64. A
region that needs more is refused with what it would take.

It becomes a linear layer between views or, where it ends in one position, a convolution as large as its input: the one
that costs less. The engine asks it of the parts of a region too (`rgc/partition.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from rgc import Conv, Deferred, Flatten, Refusal, Region, Unflatten, Value, require, rewrite

#: Entries of the largest matrix that is computed (128 MiB in float64).
LARGEST_MATRIX = 2**24

#: Elements that a pass over the region may hold at once (128 MiB in float64).
LARGEST_PASS = 2**24

#: A pass takes as many unit vectors as hold so many elements, and at least one: more would be slower, out of the cache.
CHUNK = 2**22

#: So many samples show whether those of a batch are mixed.
SAMPLES = 3

#: A backward pass takes about so many forward ones, for it comes behind one.
FORWARD_PASSES_OF_A_BACKWARD = 2

#: Calls that only look at the same memory in another way.
VIEWS = frozenset({"flatten", "unflatten", "Flatten", "Unflatten", "reshape", "view", "squeeze", "unsqueeze"})


def has_several_layers(region: Region) -> bool:
    """Is there more than one layer to save?"""
    return sum(value.op.label not in VIEWS for value in region.values) > 1


@rewrite(lambda x, region: region(x))
def collapse(x: Value, region: Annotated[Region, has_several_layers]) -> Value:
    probe = _Probe.of(region)
    flat = x if len(probe.entering) == 1 else Flatten(probe.entering)(x)
    weight = Deferred((probe.outputs, probe.inputs), lambda: _matrix(probe))
    y = Conv(weight, probe.offset)(flat)
    return y if len(probe.leaving) == 1 else Unflatten(probe.leaving)(y)


@collapse.also(lambda x, region: region(x))
def collapse_to_one_position(x: Value, region: Annotated[Region, has_several_layers]) -> Value:
    """What ends in one position is a convolution as large as its input."""
    probe = _Probe.of(region)
    entering, leaving = probe.entering, probe.leaving
    has_one_position = len(entering) == len(leaving) > 1 and set(leaving[1:]) == {1}
    require(has_one_position, "only what ends in one position is one convolution as large as its input")
    weight = Deferred((probe.outputs, *entering), lambda: _matrix(probe).reshape(-1, *entering))
    return Conv(weight, probe.offset, size=entering[1:])(x)


@dataclass(frozen=True)
class _Probe:
    """A region that may be probed: what goes in and comes out without the batch, and what it makes of zeros."""

    region: Region
    entering: tuple[int, ...]
    leaving: tuple[int, ...]
    offset: Tensor

    @staticmethod
    def of(region: Region) -> _Probe:
        """The probe, or a refusal that says what stands in the way."""
        given, made = region.source.tensor_type, region.sink.tensor_type
        require(given.fixed, "a region is one matrix only at a fixed size (--passes all)")
        require(min(len(given.shape), len(made.shape)) > 1, "the region has no batch axis, or nothing behind it")
        entering, leaving = given.shape[1:], made.shape[1:]
        _require_memory(region, math.prod(entering), math.prod(leaving))
        _require_independent_samples(region, entering)
        offset = region.evaluate(torch.zeros(1, *entering, dtype=torch.float64)).reshape(-1)
        return _Probe(region, entering, leaving, offset)

    @property
    def inputs(self) -> int:
        """Columns of the matrix."""
        return math.prod(self.entering)

    @property
    def outputs(self) -> int:
        """Rows of the matrix."""
        return math.prod(self.leaving)


def _require_memory(region: Region, inputs: int, outputs: int) -> None:
    entries, held = inputs * outputs, SAMPLES * _held_by_a_sample(region)
    require(
        entries <= LARGEST_MATRIX,
        f"the region would be a matrix of {outputs:,} x {inputs:,}: {_size(entries)}; at most {_size(LARGEST_MATRIX)}",
    )
    require(
        held <= LARGEST_PASS,
        f"probing the region holds {_size(held)} for {SAMPLES} samples; at most {_size(LARGEST_PASS)}",
    )


def _size(elements: int) -> str:
    return f"{elements:,} numbers ({8 * elements / 2**20:,.1f} MiB)"


def _held_by_a_sample(region: Region) -> int:
    """Elements, at most, that a pass holds for a sample: every value, its gradient, and what an operator works with.

    PyTorch's convolution in float64 lays out the input once for every tap before it multiplies.
    """
    values = [value for value in region.values if value.inputs]
    held = 2 * (_elements(region.source) + sum(map(_elements, values)))
    return held + max(map(_worked_with, values))


def _elements(value: Value) -> int:
    return 0 if value.type is None else math.prod(value.type.shape[1:])


def _worked_with(value: Value) -> int:
    """What an operator reads and writes, and for a convolution its padded input and that input once for every tap."""
    op, around = value.op, _elements(value) + sum(map(_elements, value.inputs))
    if not isinstance(op, Conv):
        return around
    narrow, wide = (value, value.inputs[0]) if op.transposed else (value.inputs[0], value)
    batch_and_channels, size = _split(narrow, op.spatial)
    padded = (n + max(before, 0) + max(after, 0) for n, (before, after) in zip(size, op.padding, strict=True))
    columns = math.prod(op.kernel) * math.prod(_split(wide, op.spatial)[1]) // op.groups  # one group at a time
    return around + math.prod(batch_and_channels[1:]) * int(math.prod(padded) + columns)


def _split(value: Value, spatial: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape = value.tensor_type.shape
    return shape[: len(shape) - spatial], shape[len(shape) - spatial :]


def _require_independent_samples(region: Region, entering: tuple[int, ...]) -> None:
    """The batch must be free: several samples at once give what each gives alone."""
    x = torch.randn(SAMPLES, *entering, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    try:
        together = region.evaluate(x)
        alone = torch.cat([region.evaluate(x[index : index + 1]) for index in range(SAMPLES)])
    except RuntimeError as error:
        raise Refusal(f"the region does not run on every batch size: {str(error).splitlines()[0]}") from error
    same = together.shape == alone.shape and torch.allclose(
        together, alone, rtol=1e-9, atol=1e-9 * float(alone.abs().max())
    )
    require(same, "the region mixes the samples of a batch")


def _matrix(probe: _Probe) -> Tensor:
    """M [outputs, inputs] of the region, in float64."""
    matrix = torch.empty(probe.outputs, probe.inputs, dtype=torch.float64)
    by_columns = probe.inputs <= FORWARD_PASSES_OF_A_BACKWARD * probe.outputs
    count = probe.inputs if by_columns else probe.outputs
    step = max(1, CHUNK // _held_by_a_sample(probe.region))
    for start in range(0, count, step):
        units = torch.zeros(min(step, count - start), count, dtype=torch.float64)
        units.diagonal(start).fill_(1)
        part = slice(start, start + len(units))
        if by_columns:
            matrix[:, part] = _columns(probe, units).T
        else:
            matrix[part] = _rows(probe, units)
    return matrix


def _columns(probe: _Probe, units: Tensor) -> Tensor:
    """Columns of M: what the region makes of unit vectors, without what it makes of zeros."""
    with torch.no_grad():
        columns: Tensor = probe.region.evaluate(units.reshape(-1, *probe.entering)).flatten(1) - probe.offset
    return columns


def _rows(probe: _Probe, units: Tensor) -> Tensor:
    """Rows of M: the adjoint applied to unit vectors."""
    with torch.enable_grad():
        x = torch.zeros(len(units), *probe.entering, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(probe.region.evaluate(x), x, units.reshape(-1, *probe.leaving))
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


@collapse.fires_on(shape=(2, 64, 6, 6), fixed_size=True)
def narrow_part_of_a_wide_region() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.Conv2d(64, 64, 3, stride=6, padding=1),
        nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 8, 3, padding=1), nn.Upsample(scale_factor=64),
    ).eval()  # fmt: skip


@collapse.leaves_alone(shape=(2, 3, 8, 8), because="fixed size")
def linear_network_of_any_size() -> nn.Module:
    return linear_network()


@collapse.leaves_alone(shape=(2, 500), because="estimated slower", fixed_size=True)
def bottleneck_of_low_rank() -> nn.Module:
    return nn.Sequential(nn.Linear(500, 5), nn.Linear(5, 500)).eval()


@collapse.leaves_alone(shape=(2, 16, 32, 32), because="MiB", fixed_size=True)
def region_between_large_images() -> nn.Module:
    return nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)).eval()
