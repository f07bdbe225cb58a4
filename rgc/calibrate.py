"""How fast is this machine? ``rgc calibrate``: layers of every kind and size in turn, passes over memory, and calls.

Noise only ever adds to a time, so of each layer's samples the fastest few count: their median, and their spread, from
the first to the last. All layers are measured in turn, round after round; those whose spread is over 5 % get more
rounds while there is time.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rgc.algebra import Conv, Deferred
from rgc.calibration import OVERHEADS, Calibration, Key, LayerSize
from rgc.cost import Kernel, layer_size, work
from rgc.errors import InputError
from rgc.ir import Input, TensorType, Value
from rgc.operators import AvgPool
from rgc.timing import Call, Clock, Timer, Turn, take_turns, timer_for

#: Rounds over all probes at least; of the samples of each the fastest so many count.
ROUNDS, KEPT = 7, 4

#: A probe whose kept samples spread more than this is measured again.
STEADY = 0.05

#: After so many calls it is asked whether the time is spent, and progress is told.
_AT_ONCE = 50

#: Where half of the measurements spread more than this, they describe what else runs, not the machine.
TOO_NOISY = 0.25

#: More rounds than this do not make a noisy machine quiet.
MOST_ROUNDS = 60

#: Layers with more multiply-accumulates than this take too long on a CPU, and tell nothing that smaller ones do not.
LARGEST_ON_CPU, LARGEST_ON_CUDA = 3e8, 2e10

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Probe:
    """One layer on one input, to be measured."""

    op: Conv | AvgPool
    shape: tuple[int, ...]

    @property
    def value(self) -> Value:
        """The layer as the cost model sees it."""
        return self.op(Value(Input("x"), (), TensorType(self.shape, torch.float32), name="x"))

    @property
    def key(self) -> tuple[str, LayerSize]:
        """What the cost model tells layers apart by."""
        return Kernel.of(self.value).name, layer_size(self.value)


def calibrate(
    target: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    probes: Sequence[Probe] | None = None,
    seconds: float = 150.0,
    timer: Timer | None = None,
    now: Clock = time.perf_counter,
    on_progress: Progress = lambda done, of, doing: None,
) -> Calibration:
    """Measure this machine, with the threads that PyTorch uses now; at most about ``seconds`` long.

    probes: the layers to measure; by default `standard_probes`. Raises `InputError` where there is no such machine,
    where it cannot compute in ``dtype``, or where it is too busy for the figures to mean anything.
    """
    if target not in ("cpu", "cuda"):
        raise InputError(f"unknown target {target!r}; choose one of cpu, cuda")
    key = Key.of_this_machine(target, dtype)
    if key is None:
        raise InputError("target cuda: this PyTorch sees no GPU")
    device = torch.device(target)
    chosen = standard_probes(target) if probes is None else probes
    unique = list({probe.key: probe for probe in reversed(chosen)}.values())[::-1]  # of equal ones the first
    with torch.no_grad():
        memory = _Memory.of(unique, device, dtype)
        calls = [*_reference_calls(memory), *(memory.layer(probe) for probe in unique)]
        times = fastest_times(calls, timer or timer_for(device), now=now, seconds=seconds, on_progress=on_progress)
    return _calibration(key, memory.side, unique, times)


def _calibration(key: Key, side: int, probes: Sequence[Probe], times: Sequence[FastestTime]) -> Calibration:
    """The figures that the times of `_reference_calls` and of the probes, in this order, show."""
    rest = iter(times)
    product = 2 * side**3 / next(rest).median
    overhead = {kind: next(rest).median for kind in OVERHEADS}
    bandwidth = tuple((float(size), size / _beyond(overhead["pass"], next(rest).median)) for size in _PASSES)
    rates: dict[str, list[tuple[LayerSize, float]]] = {}
    for probe, each in zip(probes, rest, strict=True):
        name, size = probe.key
        own = _beyond(overhead["linear" if name == "linear" else "conv"], each.median)
        rates.setdefault(name, []).append((size, 2 * work(probe.value) / own))
    peak = max(product, *(rate for measured in rates.values() for _, rate in measured))
    noise = statistics.median(each.spread for each in times)
    samples = statistics.median_low(each.count for each in times)
    if noise > TOO_NOISY or samples < KEPT:
        slow = f"there was time for {samples} of {KEPT} samples of each call"
        found = slow if samples < KEPT else f"half of the measurements spread by {noise:.0%} or more"
        raise InputError(f"the machine is too busy to be measured: {found}; let nothing else run and repeat it")
    return Calibration(
        key, peak, overhead, bandwidth,
        {name: tuple((*size, rate / peak) for size, rate in measured) for name, measured in rates.items()},
        noise=noise, unsettled=sum(not each.is_steady for each in times), count=len(times),
    )  # fmt: skip


def _beyond(overhead: float, seconds: float) -> float:
    """The time that is not the call's own; a layer is not faster than a twentieth of what was measured."""
    return max(seconds - overhead, seconds / 20)


@dataclass(frozen=True)
class FastestTime:
    """The median of a call's fastest samples [s], and the distance of the first from the last, relative to it."""

    median: float
    spread: float
    count: int

    @staticmethod
    def of(samples: Sequence[float]) -> FastestTime:
        """The summary of all samples of a call."""
        kept = sorted(samples)[:KEPT]
        median = statistics.median(kept)
        return FastestTime(median, (kept[-1] - kept[0]) / median, len(kept))

    @property
    def is_steady(self) -> bool:
        """Were there enough samples, close enough to each other?"""
        return self.count == KEPT and self.spread <= STEADY


def fastest_times(
    calls: Sequence[Call], timer: Timer, *, now: Clock = time.perf_counter, seconds: float = 150.0,
    on_progress: Progress = lambda done, of, doing: None,
) -> list[FastestTime]:  # fmt: skip
    """Measure ``calls`` in turn, round after round; the noisy ones again, until ``seconds`` are spent."""
    started = now()
    turns = []
    for index, call in enumerate(calls):
        on_progress(index, len(calls) * (ROUNDS + 1), "warming up")
        turns.append(_turn(call, timer))
    samples: list[list[float]] = [[] for _ in turns]
    noisy = list(range(len(turns)))
    done, total = len(turns), len(turns) * (ROUNDS + 1)
    for number in range(MOST_ROUNDS):
        doing = "measuring" if number < ROUNDS else f"measuring {len(noisy)} noisy layers again"
        for start in range(0, len(noisy), _AT_ONCE):
            if number > 0 and now() - started > seconds:
                return list(map(FastestTime.of, samples))
            some = noisy[start : start + _AT_ONCE]
            taken = take_turns([turns[index] for index in some], timer, round_number=number)
            for index, sample in zip(some, taken, strict=True):
                samples[index].append(sample)
            done += len(some)
            on_progress(done, max(done, total), doing)
        if number + 1 >= ROUNDS:
            noisy = [index for index in noisy if not FastestTime.of(samples[index]).is_steady]
            total = done + len(noisy)
    return list(map(FastestTime.of, samples))


def _turn(call: Call, timer: Timer) -> Turn:
    try:
        return Turn.of(call, timer)
    except RuntimeError as error:
        raise InputError(f"this machine cannot compute in that dtype: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True)
class _Memory:
    """Numbers that all layers share: what is measured is the work on them, not their making."""

    numbers: Tensor
    side: int

    @staticmethod
    def of(probes: Iterable[Probe], device: torch.device, dtype: torch.dtype) -> _Memory:
        side = 1024 if device.type == "cpu" else 4096
        most = max([side * side, _PASSES[-1] // 3 // dtype.itemsize, *(_elements(probe) for probe in probes)])
        return _Memory((torch.randn(most, device=device) / 16).to(dtype), side)

    def tensor(self, *shape: int) -> Tensor:
        return self.numbers[: math.prod(shape)].view(shape)

    def layer(self, probe: Probe) -> Call:
        x, layer = self.tensor(*probe.shape), module_of(probe.op, self.tensor)
        return lambda: layer(x)


def _elements(probe: Probe) -> int:
    weight = math.prod(probe.op.shape) if isinstance(probe.op, Conv) else 0
    return max(math.prod(probe.shape), weight)


def module_of(op: Conv | AvgPool, tensor: Callable[..., Tensor]) -> nn.Module:
    """PyTorch's layer for ``op`` with weights made by ``tensor``, plainly: what runs around it is extra."""
    if isinstance(op, AvgPool):
        pool: type[nn.Module] = getattr(nn, f"AvgPool{len(op.window)}d")
        return pool(op.window, op.stride, op.padding, op.ceil_mode, op.count_include_pad)
    with torch.device("meta"):
        layer = nn.Linear(op.in_channels, op.out_channels) if op.spatial == 0 else _convolution(op)
    layer.weight = nn.Parameter(tensor(*op.shape), requires_grad=False)
    layer.bias = nn.Parameter(tensor(op.out_channels), requires_grad=False)
    return layer.eval()


def _convolution(op: Conv) -> nn.Module:
    kind: type[nn.Module] = getattr(nn, f"Conv{'Transpose' * op.transposed}{op.spatial}d")
    padding = tuple(max(0, min(sides)) for sides in op.padding)
    channels = (op.in_channels, op.out_channels, op.kernel, op.stride, padding)
    if op.transposed:
        return kind(*channels, op.output_padding, op.groups, dilation=op.dilation)
    return kind(*channels, op.dilation, op.groups)


#: Bytes read and written by a pass: from what a first cache holds to what none does.
_PASSES = tuple(3 * 2**power for power in range(12, 26))


def _reference_calls(memory: _Memory) -> list[Call]:
    """A matrix product, the smallest call of each of `OVERHEADS`, additions of two growing tensors."""
    square, dot = memory.tensor(memory.side, memory.side), memory.tensor(1, 1)
    width = memory.numbers.dtype.itemsize
    conv = memory.layer(Probe(_conv(1, 1, (1, 1)), (1, 1, 1, 1)))
    linear = memory.layer(Probe(_conv(1, 1, ()), (1, 1)))
    additions = [memory.tensor(size // 3 // width) for size in _PASSES]
    return [
        lambda: square @ square, conv, linear, lambda: dot + dot, *((lambda x=x: x + x) for x in additions)
    ]  # fmt: skip


# --- what is measured -------------------------------------------------------------------------------------------

_CHANNELS, _FEW_CHANNELS = (16, 32, 64, 128, 256), (16, 64, 256)
_SIDES, _FEW_SIDES = (7, 14, 28, 56, 112), (7, 28, 112)


def standard_probes(target: str) -> list[Probe]:
    """The layers of image models: common kernels closely, others at fewer sizes; none that takes too long."""
    every = [
        *(probe for side in (1, 3, 5, 7) for probe in _dense((side, side), _CHANNELS, _SIDES)),
        *(probe for kernel in _RARE for probe in _dense(kernel, _FEW_CHANNELS, _FEW_SIDES)),
        *(probe for side in (1, 3, 5, 7) for probe in _dense((side, side), _CHANNELS, (14, 28, 112), stride=2)),
        *(probe for side in (2, 4) for probe in _dense((side, side), _CHANNELS, (14, 56, 112), stride=side)),
        *(probe for side in (1, 3, 5) for probe in _unaligned((side, side))),
        *_dense((3, 3), _FEW_CHANNELS, _FEW_SIDES, dilation=2), *_stems(), *_depthwise(), *_grouped(), *_batches(),
        *_transposed(), *_pools(), *_linear(),
    ]  # fmt: skip
    largest = LARGEST_ON_CPU if target == "cpu" else LARGEST_ON_CUDA
    return [probe for probe in every if work(probe.value) <= largest]


_RARE = ((2, 2), (4, 4), (6, 6), (9, 9), (11, 11), (13, 13), (1, 3), (3, 1), (1, 5), (5, 1), (1, 7), (7, 1))


def _conv(reads: int, makes: int, kernel: tuple[int, ...], *, groups: int = 1, **geometry: Any) -> Conv:
    shape = (makes, reads // groups, *kernel)
    if geometry.get("transposed"):
        shape = (reads, makes // groups, *kernel)
    return Conv(Deferred(shape, lambda: torch.zeros(shape)), torch.zeros(makes), groups=groups, **geometry)


def _same(kernel: tuple[int, ...], stride: int = 1, dilation: int = 1) -> list[tuple[int, int]]:
    """Padding on both sides that keeps the size, where the kernel is odd; none where kernels tile the input."""
    return [(0, 0) if stride == extent else (dilation * (extent - 1) // 2,) * 2 for extent in kernel]


def _dense(
    kernel: tuple[int, int], channels: Sequence[int], sides: Sequence[int], *, stride: int = 1, dilation: int = 1
) -> Iterable[Probe]:
    padding = _same(kernel, stride, dilation)
    for reads, makes, side in itertools.product(channels, channels, sides):
        if side >= max(kernel) // 2:
            conv = _conv(reads, makes, kernel, stride=stride, dilation=dilation, padding=padding)
            yield Probe(conv, (1, reads, side, side))


def _unaligned(kernel: tuple[int, int]) -> Iterable[Probe]:
    """A channel of ones more than what kernels are made for."""
    for reads, makes, side in itertools.product(_FEW_CHANNELS, _FEW_CHANNELS, _FEW_SIDES):
        yield Probe(_conv(reads + 1, makes, kernel, padding=_same(kernel)), (1, reads + 1, side, side))


def _stems() -> Iterable[Probe]:
    """The first layer of an image model reads three channels."""
    for side, stride in ((1, 1), (3, 1), (3, 2), (5, 1), (5, 2), (7, 1), (7, 2), (4, 4), (16, 16)):
        kernel = (side, side)
        for makes, size in itertools.product(_FEW_CHANNELS, (32, 112, 224)):
            conv = _conv(3, makes, kernel, stride=stride, padding=_same(kernel, stride))
            yield Probe(conv, (1, 3, size, size))


def _depthwise() -> Iterable[Probe]:
    for side, stride, channels, size in itertools.product((3, 5, 7), (1, 2), (16, 32, 64, 128, 256, 1024), _SIDES):
        kernel = (side, side)
        conv = _conv(channels, channels, kernel, groups=channels, stride=stride, padding=_same(kernel, stride))
        yield Probe(conv, (1, channels, size, size))
    for channels, size in itertools.product((16, 64, 256), _FEW_SIDES):
        yield Probe(_conv(channels, channels, (1, 1), groups=channels), (1, channels, size, size))


def _grouped() -> Iterable[Probe]:
    for side, width, channels, size in itertools.product((1, 3, 5), (4, 16, 64), (128, 256), _FEW_SIDES):
        kernel = (side, side)
        conv = _conv(channels, channels, kernel, groups=channels // width, padding=_same(kernel))
        yield Probe(conv, (1, channels, size, size))


def _batches() -> Iterable[Probe]:
    """More samples at once: the same kernels over more positions."""
    for side, channels, size in itertools.product((1, 3, 5), _FEW_CHANNELS, (7, 14)):
        kernel = (side, side)
        yield Probe(_conv(channels, channels, kernel, padding=_same(kernel)), (32, channels, size, size))


def _transposed() -> Iterable[Probe]:
    for (side, stride, padding), reads, makes, size in itertools.product(
        ((2, 2, 0), (3, 2, 1), (4, 2, 1), (3, 1, 1)), _FEW_CHANNELS, _FEW_CHANNELS, (7, 28)
    ):
        conv = _conv(reads, makes, (side, side), stride=stride, padding=padding, transposed=True)
        yield Probe(conv, (1, reads, size, size))


def _pools() -> Iterable[Probe]:
    for (side, stride), channels, size in itertools.product(((2, 2), (3, 2), (3, 1), (7, 7)), _FEW_CHANNELS, (14, 56)):
        padding = 1 if side == 3 else 0
        yield Probe(AvgPool((side,) * 2, (stride,) * 2, (padding,) * 2), (1, channels, size, size))


def _linear() -> Iterable[Probe]:
    for reads, makes, rows in itertools.product((16, 64, 256, 1024, 4096), (16, 64, 256, 1024, 4096), (1, 8, 64, 512)):
        yield Probe(_conv(reads, makes, ()), (rows, reads))


__all__ = ["FastestTime", "Probe", "calibrate", "fastest_times", "module_of", "standard_probes"]
