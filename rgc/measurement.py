"""Is the compiled model faster? Original and compiled in turn, medians and quartiles, and a ratio with its interval.

What counts is the interval: "no slower" means that it does not lie below 1. Pairs are measured until the interval is
narrow or the time for it is spent, and the result says which.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rgc.calibration import machine_name
from rgc.errors import InputError
from rgc.example import Example
from rgc.runtimes import RUNTIMES, Runner, Runtime, Setting
from rgc.samples import CONFIDENCE, FEWEST_PAIRS, Ratio, Times
from rgc.subject import device_of, example_of, require_eval
from rgc.timing import Clock, Timer, Turn, take_turns, timer_for

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

#: Pairs are added until the interval of the ratio is no longer than this part of the ratio.
NARROW = 0.02


@dataclass(frozen=True)
class Comparison:
    """Original and compiled under one setting: the times of a call [s] and the ratio original / compiled.

    calls: how many calls make a sample of each. settled: was the interval narrow before the time was spent?
    """

    setting: Setting
    before: Times
    after: Times
    ratio: Ratio
    calls: tuple[int, int]
    settled: bool


@dataclass(frozen=True)
class LeftOut:
    """What was not measured, and why."""

    setting: Setting
    reason: str


@dataclass(frozen=True)
class Measurement:
    """What `bench` found; ``rich.print(measurement)`` for people, ``to_json()`` for machines."""

    original: str
    compiled: str
    machine: str
    torch_version: str
    input_shapes: tuple[tuple[int, ...], ...]
    comparisons: tuple[Comparison, ...]
    left_out: tuple[LeftOut, ...] = ()

    @property
    def is_slower(self) -> bool:
        """Is the compiled model slower under any setting, by the interval?"""
        return any(each.ratio.verdict == "slower" for each in self.comparisons)

    def to_json(self) -> str:
        """The whole measurement as JSON; times in seconds."""
        plain = dataclasses.asdict(self)
        for entry, each in zip(plain["comparisons"], self.comparisons, strict=True):
            entry["ratio"]["verdict"] = each.ratio.verdict
            entry["before"]["spread"], entry["after"]["spread"] = each.before.spread, each.after.spread
        return json.dumps(plain, indent=2, default=lambda leaf: str(leaf).removeprefix("torch."))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        yield Text(f"{self.original} and {self.compiled} on {self.machine}, torch {self.torch_version}", style="bold")
        columns = ("runtime", "batch", "threads", "ms", "ratio", "interval", "noise", "")
        table = Table(*columns, box=None, pad_edge=False)
        for column in table.columns[1:7]:
            column.justify = "right"
        for each in self.comparisons:
            table.add_row(*_row(each), style=_STYLES[each.ratio.verdict])
        yield table
        yield Text(
            f"ms: medians, before -> after. ratio: before / after, its median over pairs, with the {CONFIDENCE:.0%} "
            "interval of order statistics. noise: the distance of the quartiles, the larger of the two."
        )
        if any(_result(each) == "unclear" for each in self.comparisons):
            yield Text(
                "note: unclear: the interval holds 1, so the noise hides any difference; give it more time "
                "(--seconds), or let nothing else run"
            )
        for missing in self.left_out:
            yield Text(f"left out: {missing.setting}: {missing.reason}")


_STYLES = {"faster": "green", "slower": "red", "no difference": ""}


def bench(
    original: nn.Module,
    compiled: nn.Module,
    example_inputs: Any = None,
    *,
    batch_sizes: Sequence[int] | None = None,
    threads: int | Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    device: str | torch.device | None = None,
    runtimes: Sequence[str] = RUNTIMES,
    pairs: int = 15,
    seconds: float = 20.0,
    cuda_graphs: bool = False,
    names: tuple[str, str] | None = None,
    timer: Timer | None = None,
    now: Clock = time.perf_counter,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Measurement:
    """Measure ``original`` and ``compiled`` in turn, under every combination of batch size, threads and runtime.

    example_inputs: as in `rgc.compile`. batch_sizes: default the example's own. threads: default those of PyTorch now.
    dtype: what both are cast to; default each one's own. channels_last: weights and images in that memory format.
    device: default that of the original. runtimes: of "eager", "torch.compile", "onnxruntime" (exported as by
    `rgc.save`). pairs: at least so many are measured; more, until the interval is narrow or ``seconds`` are spent (for
    each setting, compiling not counted). cuda_graphs: replay each call as one launch. names: what the report calls the
    two. What cannot be measured is left out with its reason.

    Raises `InputError` where nothing can be measured.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
    >>> x = torch.randn(1, 3, 8, 8)
    >>> import rgc
    >>> measured = bench(model, rgc.compile(model, x), x, runtimes=["eager"], pairs=6, seconds=0.1)
    >>> [comparison.setting.runtime for comparison in measured.comparisons]
    ['eager']
    """
    require_eval(original)
    example = example_of(original, example_inputs)
    place = _device(original, device)
    _require_sensible(pairs, seconds, batch_sizes, threads, cuda_graphs, place)
    own_batch = next((tensor.shape[0] for tensor in example.tensors if tensor.dim() > 1), 1)
    counts = [torch.get_num_threads()] if threads is None else [threads] if isinstance(threads, int) else threads
    settings = [
        Setting(runtime, batch, count, place, dtype, channels_last, cuda_graphs)
        for runtime, count, batch in itertools.product(_known(runtimes), counts, batch_sizes or [own_batch])
    ]
    titles = names or ("original", "compiled")
    effort = _Effort(timer or timer_for(place), now, pairs, seconds)
    found: list[Comparison | LeftOut] = []
    with Runner(original, titles[0]) as first, Runner(compiled, titles[1]) as second, torch.no_grad():
        for setting in settings:
            on_progress(str(setting))
            given = example if setting.batch == own_batch else example.redrawn(setting.batch)
            with _threads(setting.threads):
                found.append(_compare(first, second, given, setting, effort))
    comparisons = tuple(each for each in found if isinstance(each, Comparison))
    left_out = tuple(each for each in found if isinstance(each, LeftOut))
    if not comparisons:
        raise InputError(f"nothing can be measured: {'; '.join(dict.fromkeys(each.reason for each in left_out))}")
    shapes = tuple(tuple(tensor.shape) for tensor in example.tensors)
    return Measurement(*titles, machine_name(place), torch.__version__, shapes, comparisons, left_out)


def _device(original: nn.Module, device: str | torch.device | None) -> torch.device:
    if device is None:
        return device_of(original)
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"unknown device {str(device)!r}; use cpu or cuda") from error
    if place.type not in ("cpu", "cuda"):
        raise InputError(f"cannot time calls on {place}; use cpu or cuda")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {place}: this PyTorch sees no GPU")
    return place


def _require_sensible(
    pairs: int, seconds: float, batch_sizes: Sequence[int] | None, threads: int | Sequence[int] | None,
    cuda_graphs: bool, place: torch.device,
) -> None:  # fmt: skip
    counts = [threads] if isinstance(threads, int) else threads
    for what, numbers in (("batch size", batch_sizes), ("number of threads", counts)):
        if numbers is not None and (not numbers or min(numbers) < 1):
            raise InputError(f"a {what} is a positive number, got {list(numbers)}")
    if pairs < FEWEST_PAIRS:
        raise InputError(f"{pairs} pairs are too few for an interval; measure at least {FEWEST_PAIRS}")
    if not 0 < seconds < float("inf"):
        raise InputError(f"the time for a setting is a positive number of seconds, got {seconds:g}")
    if cuda_graphs and place.type != "cuda":
        raise InputError(f"CUDA graphs need device cuda, got {place}")


def _known(runtimes: Sequence[str]) -> list[Runtime]:
    unknown = [name for name in runtimes if name not in RUNTIMES]
    if unknown or not runtimes:
        found = f"unknown runtime {unknown[0]!r}" if unknown else "no runtime is named"
        raise InputError(f"{found}; choose of {', '.join(RUNTIMES)}")
    return [name for name in RUNTIMES if name in runtimes]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Effort:
    """How times are taken, and how many."""

    timer: Timer
    now: Clock
    pairs: int
    seconds: float


def _compare(
    first: Runner, second: Runner, example: Example, setting: Setting, effort: _Effort
) -> Comparison | LeftOut:
    if setting.runtime == "torch.compile":
        torch._dynamo.reset()  # what earlier settings compiled counts against a limit
    calls = []
    for runner in (second, first):  # the compiled form first: it says sooner what it does not take
        try:
            calls.append(runner.call(example, setting))
        except InputError as error:
            reason = str(error)
            return LeftOut(setting, reason if runner.name in reason else f"{runner.name}: {reason}")
    after, before = (Turn.of(call, effort.timer) for call in calls)
    return _measured(before, after, setting, effort)


def _measured(before: Turn, after: Turn, setting: Setting, effort: _Effort) -> Comparison:
    take_turns([before, after], effort.timer, round_number=1)  # both have now met the other's leftovers
    started = effort.now()
    pairs: list[list[float]] = []
    while True:
        pairs.append(take_turns([before, after], effort.timer, round_number=len(pairs)))
        if len(pairs) < effort.pairs:
            continue
        firsts, seconds = zip(*pairs, strict=True)
        ratio = Ratio.of(firsts, seconds)
        settled = ratio.width <= NARROW
        if settled or effort.now() - started >= effort.seconds:
            times = (Times.of(firsts), Times.of(seconds))
            return Comparison(setting, *times, ratio, (before.times, after.times), settled)


def _row(each: Comparison) -> tuple[str, ...]:
    setting, ratio = each.setting, each.ratio
    times = " -> ".join(f"{1e3 * value:.4g}" for value in (each.before.median, each.after.median))
    interval = f"{ratio.low:.3f} - {ratio.high:.3f}"
    noise = f"{max(each.before.spread, each.after.spread):.0%}"
    counts = (str(setting.batch), str(setting.threads) if setting.device.type == "cpu" else "")
    return (setting.runtime, *counts, times, f"{ratio.median:.3f}", interval, noise, _result(each))


def _result(each: Comparison) -> str:
    """The verdict; where the interval holds 1, whether it is narrow enough to call the two equally fast."""
    if each.ratio.verdict != "no difference":
        return each.ratio.verdict
    return "equal" if each.settled else "unclear"


__all__ = ["Comparison", "LeftOut", "Measurement", "bench"]
