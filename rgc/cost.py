"""What does an operator cost? Parameters, multiply-accumulates, and a roofline estimate of its time on a target.

t = t0 + max(2 MAC / (eta peak), bytes / bandwidth), with eta by kind of kernel (DESIGN section 4). The defaults below
are conservative figures for one machine of each kind, not measurements of yours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from rgc.algebra import Conv
from rgc.errors import InputError
from rgc.ir import Input, TensorType, Value
from rgc.operators import BatchNorm, Constant, Flatten, Structural, Unflatten, completes, is_adaptive_average
from rgc.rearrange import BorderFill, Gather, Rearrangement

Objective = Literal["latency", "depth", "macs", "params"]
OBJECTIVES: tuple[Objective, ...] = ("latency", "depth", "macs", "params")


@dataclass(frozen=True)
class Target:
    """A machine: peak arithmetic rate [FLOP/s], bandwidth [byte/s], time per call [s], efficiency by kernel."""

    name: str
    peak: float
    bandwidth: float
    overhead: float
    efficiency: Mapping[str, float]

    def seconds(self, value: Value) -> float:
        """Estimated time of the operator that makes ``value``, at the example's shapes."""
        if isinstance(value.op, Input | Constant | Flatten | Unflatten) or completes(value):
            return 0.0
        if isinstance(value.op, Structural) and not is_adaptive_average(value.op):
            return 0.0
        if isinstance(value.op, Rearrangement) and value.op.is_view:
            return 0.0 if isinstance(value.op, Gather) else self._copied_by_the_reader(value)
        if isinstance(value.op, BorderFill):
            return len(value.op.assignments) * self.overhead
        compute = 2 * macs(value) / (self.peak * self.efficiency[_kernel_class(value)])
        calls = 1 + len(_extras(value))
        return calls * self.overhead + max(compute, _bytes_moved(value) / self.bandwidth)

    def _copied_by_the_reader(self, value: Value) -> float:
        """A view with gaps is free, but kernels read contiguous memory, so who reads it makes a copy."""
        assert value.type is not None
        return 2 * math.prod(value.type.shape) * value.type.dtype.itemsize / self.bandwidth


CPU = Target(
    "cpu", peak=6e10, bandwidth=8e9, overhead=4e-6,
    efficiency={"linear": 0.6, "1x1": 0.7, "3x3": 0.8, "kxk": 0.6, "depthwise": 0.08, "grouped": 0.3, "other": 1.0},
)  # fmt: skip
CUDA = Target(
    "cuda", peak=3e13, bandwidth=1.2e12, overhead=5e-6,
    efficiency={"linear": 0.6, "1x1": 0.6, "3x3": 0.8, "kxk": 0.4, "depthwise": 0.03, "grouped": 0.2, "other": 1.0},
)  # fmt: skip
TARGETS = {target.name: target for target in (CPU, CUDA)}


def target_named(name: str | None) -> Target:
    """The default figures for "cpu" (None) or "cuda"; `InputError` for any other name."""
    target = TARGETS.get(name or "cpu")
    if target is None:
        raise InputError(f"unknown target {name!r}; choose one of {', '.join(TARGETS)}")
    return target


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
    if not isinstance(value.op, Conv):
        return 0
    counted = value.inputs[0] if value.op.transposed else value
    return math.prod(counted.tensor_type.shape) * math.prod(value.op.shape[1:])


def parameters(value: Value) -> int:
    """Elements of the operator's parameters; the statistics of a batch norm are no parameters."""
    if isinstance(value.op, Conv):  # without computing a deferred weight
        return math.prod(value.op.shape) + (0 if value.op.bias is None else value.op.bias.numel())
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
    return 1.0 + 0.1 * len(_extras(value))


def _extras(value: Value) -> tuple[str, ...]:
    return value.op.extras if isinstance(value.op, Conv) else ()


def _bytes_moved(value: Value) -> float:
    moved = sum(_bytes(given.type) for given in (value, *value.inputs))
    width = value.type.dtype.itemsize if value.type is not None else 4
    passes = (2 * _bytes((value if extra == "add" else value.inputs[0]).type) for extra in _extras(value))
    return moved + sum(passes) + parameters(value) * width


def _bytes(given: TensorType | None) -> float:
    return 0.0 if given is None else math.prod(given.shape) * given.dtype.itemsize


def _kernel_class(value: Value) -> str:
    op = value.op
    if not isinstance(op, Conv):
        return "other"
    if op.spatial == 0:
        return "linear"
    if op.groups == op.in_channels and op.groups > 1:
        return "depthwise"
    if op.groups > 1:
        return "grouped"
    if set(op.kernel) == {1}:
        return "1x1"
    return "3x3" if max(op.kernel) <= 3 else "kxk"
