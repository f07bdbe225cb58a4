"""Does the cost model know when a merge pays? ``python -m benchmarks.cost_model [--threads 1]``, under ten minutes.

A grid of pairs, triples and parallel branches, each as it is and merged to one operator by rgc, all measured in turn
in eager PyTorch. The model is calibrated on the layers of one half of the grid and predicts the other half, both ways
round: is the merged form faster? Counted where the measured gain or loss is over 10 %. Beside it: the calibration of
`rgc calibrate`, which has seen none of the grid; the conservative figures of a machine that nobody measured; and the
rule "fewer multiply-accumulates are faster" (as many: fewer layers are).
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table
from torch import Tensor, nn

from rgc.algebra import Conv
from rgc.calibrate import Probe, calibrate, fastest_times
from rgc.calibrate import Progress as Told
from rgc.calibration import machine_name
from rgc.compiler import trace
from rgc.cost import CPU, Target, cost, macs
from rgc.emit import emit
from rgc.ir import Graph
from rgc.operators import AvgPool
from rgc.testing import randomize
from rgc.timing import WallClock

CHANNELS, SIZES = (16, 24, 32, 48, 64, 96, 128, 160, 240, 320), (7, 14, 28, 56, 112)

#: A case with more multiply-accumulates than this takes too long.
LARGEST = 4e8

#: Gains and losses below this do not count.
NOTABLE = 0.10


class Branches(nn.Module):
    """The sum of several maps of one input."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.branches
        total: Tensor = first(x)
        for branch in others:
            total = total + branch(x)
        return total


def conv(
    reads: int, makes: int, kernel: int | tuple[int, int], padding: int | tuple[int, int] | None = None, **options: int
) -> nn.Conv2d:
    """A convolution without bias that keeps the size unless ``padding`` says otherwise."""
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    same = tuple(side // 2 for side in sides) if padding is None else padding
    return nn.Conv2d(reads, makes, kernel, padding=same, bias=False, **options)  # type: ignore[arg-type]


def inverted(c: int, expansion: int) -> nn.Sequential:
    """An inverted residual without its activations."""
    wide = c * expansion
    return nn.Sequential(conv(c, wide, 1), conv(wide, wide, 3, groups=wide), conv(wide, c, 1))


#: What is merged, by name: a function of the number of channels.
KINDS: dict[str, Callable[[int], nn.Module]] = {
    "1x1 -> 1x1": lambda c: nn.Sequential(conv(c, c, 1), conv(c, c, 1)),
    "1x1 -> 1x1, 1/4 between": lambda c: nn.Sequential(conv(c, c // 4, 1), conv(c // 4, c, 1)),
    "1x1 -> 3x3": lambda c: nn.Sequential(conv(c, c, 1), conv(c, c, 3)),
    "1x1 -> 3x3, 4x between": lambda c: nn.Sequential(conv(c, 4 * c, 1), conv(4 * c, c, 3)),
    "1x1 -> 3x3, 1/4 between": lambda c: nn.Sequential(conv(c, c // 4, 1), conv(c // 4, c, 3)),
    "1x1 with bias -> 3x3": lambda c: nn.Sequential(nn.Conv2d(c, c, 1), conv(c, c, 3)),
    "3x3 -> 1x1": lambda c: nn.Sequential(conv(c, c, 3), conv(c, c, 1)),
    "3x3 -> 1x1, 4x between": lambda c: nn.Sequential(conv(c, 4 * c, 3), conv(4 * c, c, 1)),
    "3x3 -> 1x1, 1/4 between": lambda c: nn.Sequential(conv(c, c // 4, 3), conv(c // 4, c, 1)),
    "3x3/2 -> 1x1": lambda c: nn.Sequential(conv(c, c, 3, stride=2), conv(c, 2 * c, 1)),
    "3x3 -> 3x3": lambda c: nn.Sequential(conv(c, c, 3, 2), conv(c, c, 3, 0)),
    "3x3 -> 3x3, 4x between": lambda c: nn.Sequential(conv(c, 4 * c, 3, 2), conv(4 * c, c, 3, 0)),
    "3x3 -> 5x5": lambda c: nn.Sequential(conv(c, c, 3, 3), conv(c, c, 5, 0)),
    "3x3 -> 3x3 -> 3x3": lambda c: nn.Sequential(conv(c, c, 3, 3), conv(c, c, 3, 0), conv(c, c, 3, 0)),
    "1x1 -> average 2x2": lambda c: nn.Sequential(conv(c, c, 1), nn.AvgPool2d(2)),
    "dw 3x3 -> 1x1": lambda c: nn.Sequential(conv(c, c, 3, groups=c), conv(c, c, 1)),
    "1x1 -> dw 3x3": lambda c: nn.Sequential(conv(c, c, 1), conv(c, c, 3, groups=c)),
    "1x1 -> dw 3x3 -> 1x1": lambda c: inverted(c, 1),
    "1x1 -> dw 3x3 -> 1x1, 6x between": lambda c: inverted(c, 6),
    "1x1 -> dw 3x3 -> 1x1, 6x, skip": lambda c: Branches(inverted(c, 6), nn.Identity()),
    "3x3 + 1x1": lambda c: Branches(conv(c, c, 3), conv(c, c, 1)),
    "3x3 + skip": lambda c: Branches(conv(c, c, 3), nn.Identity()),
    "3x3 + 1x3 + 3x1": lambda c: Branches(conv(c, c, 3), conv(c, c, (1, 3)), conv(c, c, (3, 1))),
    "dw 5x5 + dw 3x3": lambda c: Branches(conv(c, c, 5, groups=c), conv(c, c, 3, groups=c)),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One entry of the grid: its graphs as they are and merged."""

    kind: str
    channels: int
    size: int
    before: Graph
    after: Graph

    @property
    def input(self) -> Tensor:
        """What it runs on."""
        return torch.randn(1, self.channels, self.size, self.size, generator=torch.Generator().manual_seed(0))

    @property
    def probes(self) -> Iterator[Probe]:
        """Its layers, before and after, for a calibration."""
        for value in (*self.before.nodes(), *self.after.nodes()):
            if isinstance(value.op, Conv | AvgPool):
                yield Probe(value.op, value.inputs[0].tensor_type.shape)

    def gain(self, target: Target) -> float:
        """How many times as fast the merged form is by the cost model."""
        return cost(self.before.nodes(), "latency", target) / cost(self.after.nodes(), "latency", target)

    @property
    def saves_macs(self) -> bool:
        """Does the merged form have no more multiply-accumulates?"""
        before, after = (sum(map(macs, graph.nodes())) for graph in (self.before, self.after))
        return after <= before


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--each", type=int, default=12, help="cases of each kind")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=100.0, help="for which each of four measurements may go on")
    parser.add_argument("--wrong", action="store_true", help="list what was predicted wrong")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    errors = Console(stderr=True)
    cases = [case for case in map(merged, track(drawn(options.each), "merging", console=errors)) if case is not None]
    random.Random(0).shuffle(cases)
    with Progress(console=errors) as bar:
        gains = measured_gains(cases, options.seconds, told(bar, "grid"))
        halves = cases[::2], cases[1::2]
        targets = [
            Target.of(
                calibrate(
                    probes=[p for case in half for p in case.probes],
                    seconds=options.seconds,
                    on_progress=told(bar, name),
                )
            )
            for half, name in zip(halves, ("one half", "other half"), strict=True)
        ]
        standard = Target.of(calibrate(seconds=options.seconds, on_progress=told(bar, "rgc calibrate")))
    halfway = [case.gain(targets[1 - index % 2]) for index, case in enumerate(cases)]
    predictions = {
        "calibrated on the other half": [gain > 1 for gain in halfway],
        "rgc calibrate": [case.gain(standard) > 1 for case in cases],
        "uncalibrated": [case.gain(CPU) > 1 for case in cases],
        "MACs": [case.saves_macs for case in cases],
    }
    report(cases, gains, predictions)
    for case, gain, said in zip(cases, gains, halfway, strict=True) if options.wrong else ():
        if is_notable(gain) and (gain > 1) != (said > 1):
            print(f"{case.kind}, {case.channels} channels at {case.size}: {gain:.2f}, predicted {said:.2f}")


def is_notable(gain: float) -> bool:
    """Is it a gain or a loss that counts?"""
    return abs(math.log(gain)) > math.log(1 + NOTABLE)


def told(bar: Progress, name: str) -> Told:
    """A line of the progress bar."""
    task = bar.add_task(name)
    return lambda done, total, doing: bar.update(task, completed=done, total=total, description=f"{name}: {doing}")


def drawn(each: int) -> list[tuple[str, int, int]]:
    """Kinds with channels and sizes, at random, as many of every kind."""
    generator = random.Random(0)
    chosen = []
    for kind in KINDS:
        places = list(itertools.product(CHANNELS, SIZES))
        chosen += [(kind, *place) for place in generator.sample(places, len(places))]
    counts = dict.fromkeys(KINDS, 0)
    kept = []
    for kind, channels, size in chosen:
        kernel = (
            7
            if ("5x5" in kind and "dw" not in kind) or kind.count("3x3") == 3
            else 5
            if kind.startswith("3x3 -> 3x3")
            else 3
        )
        wide = 4 if "4x" in kind else 6 if "6x" in kind else 1
        most = size * size * channels * channels * max(kernel * kernel, 9 * (wide if "dw" not in kind else 1))
        if counts[kind] < each and most <= LARGEST:
            counts[kind] += 1
            kept.append((kind, channels, size))
    return kept


def merged(place: tuple[str, int, int]) -> Case | None:
    """The case at a place of the grid; None where rgc does not merge it to fewer layers."""
    kind, channels, size = place
    model = randomize(KINDS[kind](channels).eval())
    x = torch.randn(1, channels, size, size)
    traced = trace(model, x, passes=["all", "-collapse"], objective="depth")
    if not traced.rewrites:
        print(f"{kind}, {channels} channels at {size}: not merged", file=sys.stderr)
        return None
    return Case(kind, channels, size, traced.original, traced.graph)


def measured_gains(cases: Sequence[Case], seconds: float, on_progress: Told) -> list[float]:
    """How many times as fast the merged form of each is."""
    calls = []
    for case in cases:
        for graph in (case.before, case.after):
            module = emit(graph, torch.float32).eval()
            calls.append(lambda module=module, x=case.input: module(x))
    with torch.no_grad():
        times = fastest_times(calls, WallClock(), seconds=seconds, on_progress=on_progress)
    spreads = sorted(each.spread for each in times)
    median, most = (f"{spreads[len(spreads) * tenths // 10]:.1%}" for tenths in (5, 9))
    print(f"spread of the grid: median {median}, of nine in ten at most {most}", file=sys.stderr)
    return [before.median / after.median for before, after in zip(times[::2], times[1::2], strict=True)]


def report(cases: Sequence[Case], gains: Sequence[float], predictions: dict[str, list[bool]]) -> None:
    """The table: of the cases with a notable gain or loss, which part was predicted right."""
    table = Table("layers", "cases", "over 10 %", "faster merged", "gain", *predictions, box=MARKDOWN)
    every = range(len(cases))
    rows = {kind: [index for index in every if cases[index].kind == kind] for kind in KINDS}
    rows["all"] = list(every)
    rows["where MACs are wrong"] = [
        i for i in every if is_notable(gains[i]) and predictions["MACs"][i] != (gains[i] > 1)
    ]
    for name, mine in rows.items():
        if not mine:
            continue
        notable = [index for index in mine if is_notable(gains[index])]
        right = (sum(said[index] == (gains[index] > 1) for index in notable) for said in predictions.values())
        faster = sum(gains[index] > 1 for index in notable)
        span = f"{min(gains[i] for i in mine):.2f} - {max(gains[i] for i in mine):.2f}"
        shares = (f"{count / len(notable):.0%}" if notable else "" for count in right)
        table.add_row(name, str(len(mine)), str(len(notable)), str(faster), span, *shares)
    console = Console(width=200)
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    console.print(f"torch {torch.__version__}, {machine_name(torch.device('cpu'))}, {threads}, float32, batch 1\n")
    console.print(table)


if __name__ == "__main__":
    main()
