"""Are calls timed in turn, in samples that are long enough, after a warm-up? Told by a clock that does not tick."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from rgc.timing import (
    MOST_CALLS,
    SHORTEST_SAMPLE,
    WARM_UP,
    Call,
    CudaEvents,
    Turn,
    WallClock,
    as_cuda_graph,
    take_turns,
    timer_for,
)


@dataclass
class FakeClock:
    """Time that passes only where a call says so; ``log`` keeps who was called."""

    now: float = 0.0
    log: list[str] = field(default_factory=list)

    def call(self, name: str, seconds: float) -> Call:
        def run() -> None:
            self.log.append(name)
            self.now += seconds

        return run

    @property
    def timer(self) -> WallClock:
        return WallClock(lambda: self.now)


def test_a_timer_gives_the_mean_of_calls_in_a_row() -> None:
    clock = FakeClock()
    assert clock.timer.seconds(clock.call("a", 0.5), 4) == 0.5 and clock.log == ["a"] * 4


def test_calls_take_turns_every_second_round_backwards() -> None:
    clock = FakeClock()
    turns = [Turn(clock.call(name, seconds), 1) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
    rounds = [take_turns(turns, clock.timer, round_number=number) for number in range(3)]
    assert "".join(clock.log) == "abccbaabc"
    assert rounds == [[1.0, 2.0, 3.0]] * 3


def test_short_calls_are_repeated_until_a_sample_is_long_enough() -> None:
    clock = FakeClock()
    turn = Turn.of(clock.call("a", SHORTEST_SAMPLE / 7.5), clock.timer)
    assert turn.times == 8 and len(clock.log) == WARM_UP
    assert turn.sample(clock.timer) == pytest.approx(SHORTEST_SAMPLE / 7.5) and len(clock.log) == WARM_UP + 8
    assert Turn.of(clock.call("b", 10.0), clock.timer).times == 1
    assert Turn.of(clock.call("c", 0.0), clock.timer).times == MOST_CALLS


def test_the_cpu_is_timed_by_the_clock_and_a_gpu_by_events() -> None:
    assert isinstance(timer_for(torch.device("cpu")), WallClock)
    assert timer_for(torch.device("cuda")) == CudaEvents(torch.device("cuda"))
    assert timer_for(torch.device("cpu")).seconds(lambda: torch.ones(8).sum(), 3) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_does_the_same_work() -> None:
    x, y = torch.ones(1000, device="cuda"), torch.zeros(1000, device="cuda")
    replay = as_cuda_graph(lambda: y.copy_(x + 1), x.device)
    x.fill_(2)
    assert timer_for(x.device).seconds(replay, 3) > 0
    assert bool((y == 3).all())
