"""How close does a fully linear network come to the one layer that it is? ``python -m benchmarks.linear_network``.

ReduceNet-56 with every decay at 1, batch norms and biases at random, is compiled with ``--passes all`` and measured
beside its original and beside a plain ``nn.Linear`` with the same numbers, called on an input that is flattened
already: calls in turn, medians, and ratios with their intervals. What the compiled module adds to the plain layer, the
check of the input's size included, is the last column. Seconds to compile are medians of the wall clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import rgc
from rgc import models
from rgc.calibration import machine_name
from rgc.nn import set_decay
from rgc.samples import Ratio, Times
from rgc.testing import randomize
from rgc.timing import Call, Turn, WallClock, take_turns

#: The largest difference of the outputs, in units of their scale, that the rounding of float32 explains.
ROUNDING = 1e-4


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--repeats", type=int, default=5, help="compilations; the first, which loads code, not counted")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    model = randomize(models.reducenet(options.depth))
    set_decay(model, 1.0)
    x = torch.randn(1, 3, options.size, options.size)
    compiled, seconds = compilation(model, x, options.repeats)
    console = Console(width=160)
    threads = f"{options.threads} thread{'s' * (options.threads > 1)}"
    console.print(f"torch {torch.__version__}, cpu ({machine_name(torch.device('cpu'))}, {threads}), float32\n")
    console.print(f"ReduceNet-{options.depth}, decay 1, at {options.size}x{options.size}: {seconds:.2f} s to compile, ")
    console.print(f"{model_size(compiled.report.ops_before)} -> {model_size(compiled.report.ops_after)}.\n")
    columns = ("original, ms", "compiled, us", "nn.Linear, us", "original / compiled", "compiled / nn.Linear")
    table = Table("batch", *columns, box=MARKDOWN)
    for batch in track(list(map(int, options.batches.split(","))), "measuring", console=Console(stderr=True)):
        table.add_row(f"{batch}", *measured(model, compiled, torch.randn(batch, *x.shape[1:]), options.rounds))
    console.print(table)


def compilation(model: nn.Module, x: Tensor, repeats: int) -> tuple[rgc.CompiledModule, float]:
    """The compiled model, and the median seconds that this takes."""
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        compiled = rgc.compile(model, x, passes="all")
        taken.append(time.perf_counter() - started)
    return compiled, statistics.median(taken[1:])


def model_size(counts: dict[str, int]) -> str:
    """Layers and functions by name."""
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def measured(model: nn.Module, compiled: nn.Module, x: Tensor, rounds: int) -> list[str]:
    """The cells of one row: medians of the three, and the two ratios."""
    plain, flat = plain_layer(compiled), x.flatten(1)
    with torch.no_grad():
        require_equal(compiled(x), model(x))
        require_equal(plain(flat), model(x))
        original, after_it = in_turn(lambda: model(x), lambda: compiled(x), rounds)
        result, layer = in_turn(lambda: compiled(x), lambda: plain(flat), rounds)  # the original would fill the cache
    medians = [Times.of(each).median for each in (original, result, layer)]
    times = [f"{1e3 * medians[0]:.3g}", *(f"{1e6 * median:.3g}" for median in medians[1:])]
    return [*times, cell(original, after_it), cell(result, layer)]


def in_turn(first: Call, second: Call, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of two calls, in pairs."""
    timer = WallClock()
    turns = [Turn.of(call, timer) for call in (first, second)]
    pairs = [take_turns(turns, timer, round_number=number) for number in range(rounds)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def plain_layer(compiled: nn.Module) -> nn.Linear:
    """A layer of PyTorch with the numbers of the one that the compiled model consists of."""
    (found,) = (module for module in compiled.modules() if isinstance(module, nn.Linear))
    plain = nn.Linear(found.in_features, found.out_features)
    plain.load_state_dict(found.state_dict())
    return plain.eval().requires_grad_(False)


def require_equal(found: Tensor, expected: Tensor) -> None:
    """`SystemExit` where two outputs differ by more than rounding: then no time means anything."""
    distance = float((found - expected).abs().max() / expected.abs().max())
    if not distance <= ROUNDING:
        raise SystemExit(f"the results differ by {distance:.1e} of their scale")


def cell(before: Sequence[float], after: Sequence[float]) -> str:
    """The ratio of two columns and its interval."""
    ratio = Ratio.of(before, after)
    digits = 0 if ratio.median >= 100 else 2
    return f"{ratio.median:,.{digits}f} ({ratio.low:,.{digits}f} - {ratio.high:,.{digits}f})"


if __name__ == "__main__":
    main()
