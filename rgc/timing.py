"""How long does a call take? Timers for CPU and CUDA, and several calls in turn until enough is known.

Calls that are to be compared are never timed one after the other but in turn, every second round backwards: whatever
the machine does meanwhile, it does to all of them.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
Clock = Callable[[], float]

#: A sample shorter than this [s] holds several calls, so that the clock and the interpreter do not show in it.
SHORTEST_SAMPLE = 1e-3

#: More calls than this in one sample tell nothing more.
MOST_CALLS = 1000

#: Calls before anything is timed: caches, lazy initialisation, the allocator.
WARM_UP = 3


class Timer(ABC):
    """Takes the time of calls, the device's work included."""

    @abstractmethod
    def seconds(self, call: Call, times: int) -> float:
        """The mean time [s] of ``times`` calls in a row."""


@dataclass(frozen=True)
class WallClock(Timer):
    """The time that passes, for work that is done when the call returns."""

    now: Clock = time.perf_counter

    def seconds(self, call: Call, times: int) -> float:
        started = self.now()
        for _ in range(times):
            call()
        return (self.now() - started) / times


@dataclass(frozen=True)
class CudaEvents(Timer):
    """The time between two events on the stream of a GPU, which the waiting of the host does not lengthen."""

    device: torch.device

    def seconds(self, call: Call, times: int) -> float:
        with torch.cuda.device(self.device):
            first = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's own
            last = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's own
            torch.cuda.synchronize()
            first.record()
            for _ in range(times):
                call()
            last.record()
            last.synchronize()
            return float(first.elapsed_time(last)) / 1e3 / times


def timer_for(device: torch.device) -> Timer:
    """Events on a GPU, the clock on the CPU."""
    return CudaEvents(device) if device.type == "cuda" else WallClock()


def as_cuda_graph(call: Call, device: torch.device) -> Call:
    """The same work as one launch, without the host's part: captured once, replayed at each call."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    return graph.replay


@dataclass(frozen=True)
class Turn:
    """A call, warmed up, with the number of calls that make a sample of it."""

    call: Call
    times: int

    @staticmethod
    def of(call: Call, timer: Timer) -> Turn:
        """Warm ``call`` up and see how many calls a sample needs."""
        for _ in range(WARM_UP - 1):
            call()
        once = timer.seconds(call, 1)
        enough = math.ceil(SHORTEST_SAMPLE / once) if once > 0 else MOST_CALLS
        return Turn(call, min(max(enough, 1), MOST_CALLS))

    def sample(self, timer: Timer) -> float:
        """The time of one call [s]."""
        return timer.seconds(self.call, self.times)


def take_turns(turns: Sequence[Turn], timer: Timer, *, round_number: int) -> list[float]:
    """One sample of each, in order, in every second round backwards."""
    order = range(len(turns)) if round_number % 2 == 0 else reversed(range(len(turns)))
    samples = {index: turns[index].sample(timer) for index in order}
    return [samples[index] for index in range(len(turns))]


__all__ = ["Call", "Clock", "CudaEvents", "Timer", "Turn", "WallClock", "as_cuda_graph", "take_turns", "timer_for"]
