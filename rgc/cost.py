"""What does an operator cost? Parameters, multiply-accumulates, and a roofline estimate of its time on a target.

t = t0 + max(2 MAC / (eta peak), bytes / bandwidth). eta, the efficiency, belongs to a class of kernels (size, stride,
groups, alignment of the channels) and depends on the channels and positions: it is interpolated between points that
were measured, and never taken from outside of them or from another size of kernel without saying so. What runs around a
convolution (a bias map, uneven padding) and what is no convolution costs passes over memory. The figures come from
`rgc calibrate`; without it, from conservative ones for one machine of each kind, which are not measurements of yours.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from rgc.algebra import Conv
from rgc.calibration import Calibration, LayerSize, Point, read_calibration, stored_calibration
from rgc.errors import InputError
from rgc.ir import Input, TensorType, Value
from rgc.operators import (
    AvgPool,
    BatchNorm,
    Clamp,
    Constant,
    Flatten,
    Structural,
    Unflatten,
    completes,
    is_adaptive_average,
)
from rgc.rearrange import BorderFill, Gather, Rearrangement
from rgc.tail import AxisSums

Objective = Literal["latency", "depth", "macs", "params"]
OBJECTIVES: tuple[Objective, ...] = ("latency", "depth", "macs", "params")

#: A product with a matrix of a few columns takes as long as one with so many sums, of rows so long: measured on a CPU
#: for 3 sums of 7 to 56 elements.
_LEAST_SUMS, _LEAST_LENGTH = 4, 64

#: Kernels compute so many input channels at a time. Those of a number that this does not divide, as where a channel of
#: ones is added, are a class of their own; where it was not measured, they reach this part of the rate of the others:
#: onnxruntime took twice as long for 17 and 33 channels as for 16 and 32 (3x3 at 14 to 56, AVX-512).
VECTOR, _OF_UNALIGNED = 4, 0.5

#: How many measured points an efficiency is interpolated from, and how fast their weight falls with the distance.
NEAREST, FALLOFF = 8, 3.0


@dataclass(frozen=True)
class Efficiency:
    """The rate of one class of kernels, as a part of the peak, where it was measured.

    points: (input channels per group, output channels per group, groups, positions, efficiency).

    >>> rising = Efficiency(((16.0, 16.0, 1.0, 784.0, 0.2), (64.0, 64.0, 1.0, 784.0, 0.8)))
    >>> [(round(eta, 3), inside) for eta, inside in map(rising.at, [(32, 32, 1, 784), (128, 128, 1, 784)])]
    [(0.4, True), (0.8, False)]
    """

    points: tuple[Point, ...]
    _known: dict[LayerSize, tuple[float, bool]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def at(self, size: LayerSize) -> tuple[float, bool]:
        """The efficiency at ``size``, and whether that lies within what was measured (if not: that of the edge)."""
        if size not in self._known:
            self._known[size] = self._interpolated(size)
        return self._known[size]

    @cached_property
    def _logarithms(self) -> np.ndarray:
        logarithms: np.ndarray = np.log2(np.array(self.points))
        return logarithms

    def _interpolated(self, size: LayerSize) -> tuple[float, bool]:
        places, rates = self._logarithms[:, :-1], self._logarithms[:, -1]
        wanted = np.log2(np.array(size))
        inside = np.clip(wanted, places.min(axis=0), places.max(axis=0))
        distances = np.sqrt(((places - inside) ** 2).sum(axis=1))
        nearest = np.argsort(distances, kind="stable")[:NEAREST]
        if distances[nearest[0]] < 1e-9:
            rate = rates[nearest[0]]
        else:
            weights = distances[nearest] ** -FALLOFF
            rate = (weights * rates[nearest]).sum() / weights.sum()
        return float(2**rate), bool(np.allclose(inside, wanted))


@dataclass(frozen=True)
class Target:
    """A machine: peak rate [FLOP/s], time per call [s], bandwidth [byte/s] by size of a pass, efficiency by kernel.

    overhead: of a layer ("conv", "linear") and of any other call ("pass"). bandwidth: (bytes of a pass, byte/s),
    increasing in bytes. calibrated: do the figures come from measurements?
    """

    name: str
    peak: float
    overhead: Mapping[str, float]
    bandwidth: tuple[tuple[float, float], ...]
    efficiency: Mapping[str, Efficiency]
    calibrated: bool = False

    @staticmethod
    def of(calibration: Calibration) -> Target:
        """The machine that was measured."""
        efficiency = {name: Efficiency(points) for name, points in calibration.efficiency.items()}
        name = f"{calibration.key.target} (calibrated)"
        return Target(name, calibration.peak, calibration.overhead, calibration.bandwidth, efficiency, calibrated=True)

    @cached_property
    def in_any_runtime(self) -> Target:
        """The machine under a runtime of which nobody knows the kernels: each dense one at the same rate.

        Eager PyTorch, Inductor and onnxruntime differ in what a depthwise band or a 5x5 costs them, but not in how the
        time grows with the work and the memory that moves.
        """
        overhead = {kind: min(value, 1e-6) for kind, value in self.overhead.items()}
        return replace(self, name="any runtime", overhead=overhead, efficiency=_EVEN, calibrated=False)

    def seconds(self, value: Value) -> float:
        """Estimated time of the operator that makes ``value``, at the example's shapes."""
        if isinstance(value.op, Input | Constant | Flatten | Unflatten) or completes(value):
            return 0.0
        if isinstance(value.op, Structural) and not is_adaptive_average(value.op):
            return 0.0
        if isinstance(value.op, Rearrangement) and value.op.is_view:
            return 0.0 if isinstance(value.op, Gather) else self._moving(2 * _bytes(value.type))  # the reader copies it
        if isinstance(value.op, BorderFill):
            return len(value.op.assignments) * self.overhead["pass"]
        if isinstance(value.op, AxisSums):
            return self._summing(value)
        moving = self._moving(_bytes_moved(value))
        if not isinstance(value.op, Conv | AvgPool):
            return _calls(value) * (self.overhead["pass"] + moving)
        compute = 2 * work(value) / (self.peak * self._efficiency(value)[0])
        kind = "linear" if Kernel.of(value).kind == "linear" else "conv"
        around = sum(self.overhead["pass"] + self._moving(size) for size in _passes_around(value))
        return self.overhead[kind] + max(compute, moving) + around

    def _summing(self, value: Value) -> float:
        """The time of sums along each axis, and of a copy of what has been transposed before the next."""
        width, total = value.tensor_type.dtype.itemsize, 0.0
        products = _products_of_sums(value)
        for index, (rows, length, sums) in enumerate(products):
            size = (max(length, _LEAST_LENGTH), max(sums, _LEAST_SUMS), 1.0, rows)
            rate = self.peak * self._efficiency_at(Kernel("", 1, "linear"), size)[0]
            compute = 2 * math.prod(size) / rate
            total += self.overhead["linear"] + max(compute, self._moving(width * rows * (length + sums)))
            total += (self.overhead["pass"] + self._moving(2 * width * rows * length)) * (index > 0)
        return total

    def is_measured(self, value: Value) -> bool:
        """Does the estimate lie within what was measured on the machine?"""
        if not isinstance(value.op, Conv | AvgPool):
            return self.calibrated
        return self.calibrated and self._efficiency(value)[1]

    def _moving(self, size: float) -> float:
        """The time of a pass over so many bytes: what fits into a cache moves faster."""
        sizes = [known for known, _ in self.bandwidth]
        place = bisect_right(sizes, size)
        if place in (0, len(sizes)):
            return size / self.bandwidth[min(place, len(sizes) - 1)][1]
        (left, slow), (right, fast) = self.bandwidth[place - 1 : place + 1]
        share = math.log(size / left) / math.log(right / left)
        return size / (slow * math.pow(fast / slow, share))

    def _efficiency(self, value: Value) -> tuple[float, bool]:
        """The efficiency, and whether it was measured for such a kernel and size.

        An unknown stride is that of stride 1; an unknown kernel is as slow as the slowest known one of its kind, and an
        unaligned one that is unknown is slower than the aligned one.
        """
        return self._efficiency_at(Kernel.of(value), layer_size(value))

    def _efficiency_at(self, kernel: Kernel, size: LayerSize) -> tuple[float, bool]:
        if kernel.name in self.efficiency:
            return self.efficiency[kernel.name].at(size)
        if kernel.unaligned:
            return _OF_UNALIGNED * self._efficiency_at(replace(kernel, unaligned=False), size)[0], False
        without_stride = Kernel(kernel.extent, 1, kernel.kind, kernel.dilated)
        if without_stride.name in self.efficiency:
            return self.efficiency[without_stride.name].at(size)[0], False
        alike = [each for name, each in self.efficiency.items() if name.split()[-1] == kernel.kind]
        return min(each.at(size)[0] for each in alike or self.efficiency.values()), False


@dataclass(frozen=True)
class Kernel:
    """A class of kernels: what is known of one says nothing of another. ``name`` is its key, and ends in the kind."""

    extent: str
    stride: int
    kind: str
    dilated: bool = False
    unaligned: bool = False

    @staticmethod
    def of(value: Value) -> Kernel:
        """The class of a convolution, linear layer or average pool; one spatial axis counts as a row."""
        op = value.op
        if isinstance(op, AvgPool):
            return Kernel(_extent(op.window), max(op.stride), "average")
        assert isinstance(op, Conv)
        if op.spatial == 0 or op.reads_whole_map:
            return Kernel("", 1, "linear")
        kind = "transposed" if op.transposed else "dense" if op.groups == 1 else "grouped"
        if op.groups == op.in_channels and op.groups > 1 and not op.transposed:
            kind = "depthwise"
        reads = _channels_read(op)
        unaligned = kind == "dense" and reads >= 2 * VECTOR and reads % VECTOR > 0  # few channels are not vectorised
        return Kernel(_extent(op.kernel), max(op.stride), kind, dilated=max(op.dilation) > 1, unaligned=unaligned)

    @property
    def name(self) -> str:
        """``3x3/2 depthwise``."""
        stride = "" if self.stride == 1 else f"/{self.stride}"
        return f"{self.extent}{'d' * self.dilated}{stride}{' unaligned' * self.unaligned} {self.kind}".strip()


def _extent(window: tuple[int, ...]) -> str:
    return "x".join(map(str, (1, *window) if len(window) == 1 else window))


def layer_size(value: Value) -> LayerSize:
    """What an efficiency depends on: channels read and made per group, groups, and positions of the whole batch."""
    op, elements = value.op, math.prod(value.tensor_type.shape)
    if isinstance(op, AvgPool):
        channels = value.tensor_type.shape[-1 - op.spatial]
        return 1.0, 1.0, float(channels), elements / channels
    assert isinstance(op, Conv)
    reads = _channels_read(op) * (math.prod(op.kernel) if op.reads_whole_map else 1)
    return reads / op.groups, op.out_channels / op.groups, float(op.groups), elements / op.out_channels


def _channels_read(conv: Conv) -> int:
    """The input channels, and the channel of ones if there is one."""
    return conv.in_channels + (conv.ones is not None)


def work(value: Value) -> int:
    """Multiply-accumulates of a convolution, or additions of an average pool."""
    if isinstance(value.op, AvgPool):
        return math.prod(value.tensor_type.shape) * math.prod(value.op.window)
    return macs(value)


def _flat(efficiency: float) -> Efficiency:
    return Efficiency(((1.0, 1.0, 1.0, 1.0, efficiency),))


def _conservative(
    linear: float, pointwise: float, small: float, large: float, depthwise: float, grouped: float
) -> Mapping[str, Efficiency]:
    """Efficiencies of a machine that nobody measured: one for each kind of kernel, at every size."""
    dense = {"1x1": pointwise, **dict.fromkeys(("1x2", "1x3", "2x1", "3x1", "2x2", "3x3"), small), "5x5": large}
    known = {"linear": linear, **{f"{extent} dense": value for extent, value in dense.items()}}
    known |= {"3x3 depthwise": depthwise, "3x3 grouped": grouped, "3x3 transposed": large, "2x2 average": 1.0}
    return {name: _flat(value) for name, value in known.items()}


#: Rates of kernels that hold for no runtime in particular.
_EVEN = _conservative(linear=0.7, pointwise=0.7, small=0.7, large=0.7, depthwise=0.2, grouped=0.4)

CPU = Target(
    "cpu", peak=6e10, overhead=dict.fromkeys(("conv", "linear", "pass"), 4e-6), bandwidth=((1.0, 8e9),),
    efficiency=_conservative(0.6, 0.7, 0.8, 0.6, 0.08, 0.3),
)  # fmt: skip
CUDA = Target(
    "cuda", peak=3e13, overhead=dict.fromkeys(("conv", "linear", "pass"), 5e-6), bandwidth=((1.0, 1.2e12),),
    efficiency=_conservative(0.6, 0.6, 0.8, 0.4, 0.03, 0.2),
)  # fmt: skip
TARGETS = {target.name: target for target in (CPU, CUDA)}


def target_named(name: str | None, dtype: torch.dtype = torch.float32, folder: Path | None = None) -> Target:
    """The machine called "cpu" (None) or "cuda", or the one that a file of `rgc calibrate` describes.

    For a name: the calibration of this machine for ``dtype``, if `rgc calibrate` has stored one (in ``folder``, by
    default the user's cache), otherwise conservative figures. `InputError` for anything else.
    """
    wanted = name or "cpu"
    if wanted in TARGETS:
        calibration = stored_calibration(wanted, dtype, folder)
        return TARGETS[wanted] if calibration is None else Target.of(calibration)
    if wanted.endswith(".json"):
        return Target.of(read_calibration(Path(wanted)))
    raise InputError(f"unknown target {wanted!r}; choose one of {', '.join(TARGETS)}, or a .json of rgc calibrate")


def cost(values: Iterable[Value], objective: Objective, target: Target) -> float:
    """What ``values`` cost together: seconds, layers, multiply-accumulates or parameters."""
    if objective == "latency":
        return math.fsum(target.seconds(value) for value in values)
    if objective == "macs":
        return math.fsum(macs(value) for value in values)
    if objective == "params":
        return math.fsum(parameters(value) for value in values)
    return math.fsum(_layers(value) for value in values)


def macs(value: Value) -> int:
    """Multiply-accumulates of a convolution or linear layer; other operators count as none."""
    if isinstance(value.op, AxisSums):
        return sum(map(math.prod, _products_of_sums(value)))
    if not isinstance(value.op, Conv):
        return 0
    counted = value.inputs[0] if value.op.transposed else value
    found = math.prod(counted.tensor_type.shape) * math.prod(value.op.shape[1:])
    return found if value.op.ones is None else found // value.op.in_channels * _channels_read(value.op)


def parameters(value: Value) -> int:
    """Elements of the operator's parameters; the statistics of a batch norm are no parameters."""
    if isinstance(value.op, Conv):  # without computing a deferred weight
        ones = 0 if value.op.ones is None else value.op.ones.numel()
        return math.prod(value.op.shape) + ones + _bias_elements(value.op)
    if isinstance(value.op, BatchNorm):
        return sum(tensor.numel() for tensor in (value.op.weight, value.op.bias) if tensor is not None)
    return 0 if isinstance(value.op, Input) else sum(tensor.numel() for tensor in value.op.tensors())


def _layers(value: Value) -> float:
    """Layers first; what has to run around a convolution (a bias map, uneven padding) counts a little."""
    if isinstance(value.op, Input | Constant) or completes(value):
        return 0.0
    if isinstance(value.op, Structural | Flatten | Unflatten):
        return 0.01
    if isinstance(value.op, Rearrangement) and value.op.is_view:
        return 0.01
    return _calls(value) + 0.1 * len(_extras(value))


def _calls(value: Value) -> float:
    """How often something that is no convolution runs over its input: a clamp once for each side that it bounds."""
    return float(sum(bound is not None for bound in value.op.bounds)) if isinstance(value.op, Clamp) else 1.0


def _extras(value: Value) -> tuple[str, ...]:
    return value.op.extras if isinstance(value.op, Conv) else ()


def _passes_around(value: Value) -> list[float]:
    """The bytes of each pass that has to run around PyTorch's own convolution: read, written, and read beside."""
    given, made = _bytes(value.inputs[0].type), _bytes(value.type)
    return [2 * made + _bytes_of_bias(value) if extra == "add" else 2 * given for extra in _extras(value)]


def _products_of_sums(value: Value) -> list[tuple[int, int, int]]:
    """The matrix product along each axis in turn: rows, elements in each, and sums that are made of each."""
    assert isinstance(value.op, AxisSums)
    elements, found = math.prod(value.inputs[0].tensor_type.shape), []
    for matrix in value.op.steps:
        sums, length = matrix.shape
        found.append((elements // length, length, sums))
        elements = elements // length * sums
    return found


def _bytes_of_bias(value: Value) -> float:
    return float(_bias_elements(value.op) * value.tensor_type.dtype.itemsize) if isinstance(value.op, Conv) else 0.0


def _bias_elements(conv: Conv) -> int:
    return 0 if conv.bias_shape is None else math.prod(conv.bias_shape)


def _bytes_moved(value: Value) -> float:
    moved = sum(_bytes(given.type) for given in (value, *value.inputs))
    width = value.type.dtype.itemsize if value.type is not None else 4
    return moved + parameters(value) * width


def _bytes(given: TensorType | None) -> float:
    return 0.0 if given is None else float(math.prod(given.shape) * given.dtype.itemsize)


__all__ = [
    "CPU", "CUDA", "OBJECTIVES", "Efficiency", "Kernel", "Objective", "Target", "cost", "layer_size", "macs",
    "parameters", "target_named", "work",
]  # fmt: skip
