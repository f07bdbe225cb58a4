"""How long does ``rgc.compile`` take, from tracing to the verified module? ``python -m benchmarks.compile_time``.

One table of models, with three float32 forward passes of the original for scale, and one of chains, residual ladders
and sums of 100, 1,000 and 10,000 calls, with the time per call: linear growth is a ratio that stays near one. Seconds
are those of the processor, medians over the repeats, on one thread by default: what an idle core would take, whatever
else the machine does at the time.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import timm
import torch
import torchvision
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import rgc
from rgc import models
from rgc.testing import randomize

Build = Callable[[], nn.Module]

MODELS: dict[str, tuple[Build, int]] = {
    "resnet18": (partial(torchvision.models.resnet18, weights=None), 224),
    "resnet50": (partial(torchvision.models.resnet50, weights=None), 224),
    "repvgg_a0 (zoo)": (models.repvgg_a0, 224),
    "repvgg_a0 (timm)": (partial(timm.create_model, "repvgg_a0"), 224),
    "mobilenet_v2": (partial(torchvision.models.mobilenet_v2, weights=None), 224),
    "mobileone_s1": (partial(timm.create_model, "mobileone_s1"), 224),
    "fastvit_t8": (partial(timm.create_model, "fastvit_t8"), 256),
    "levit_128s": (partial(timm.create_model, "levit_128s"), 224),
    "inception_next_atto": (partial(timm.create_model, "inception_next_atto"), 64),
    "convnext_atto": (partial(timm.create_model, "convnext_atto"), 64),
    "densenet121": (partial(torchvision.models.densenet121, weights=None), 64),
    "reducenet20": (models.reducenet20, 32),
}

#: How many calls the growing models make.
LENGTHS = (100, 1_000, 10_000)


class Chain(nn.Sequential):
    """Convolutions and ReLUs in turn, where nothing merges."""

    def __init__(self, calls: int) -> None:
        super().__init__(*(layer for _ in range(calls // 2) for layer in (_convolution(), nn.ReLU())))


class Ladder(nn.Module):
    """relu(conv(x) + x), over and over: every residual is absorbed."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(_convolution() for _ in range(calls // 3))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = torch.relu(step(x) + x)
        return x


class Branches(nn.Module):
    """A long sum of convolutions of one input, which becomes one convolution."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(_convolution() for _ in range(calls // 2))

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return torch.relu(total)


class Addends(nn.Module):
    """A long sum of what is not linear, where nothing merges."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(_convolution() for _ in range(calls // 3))

    def forward(self, x: Tensor) -> Tensor:
        total = x
        for branch in self.branches:
            total = total + torch.tanh(branch(x))
        return total


class Steps(nn.Sequential):
    """Convolution, batch norm, 1x1 convolution and ReLU, over and over: three of the four become one."""

    def __init__(self, calls: int) -> None:
        super().__init__(
            *(
                layer
                for _ in range(calls // 4)
                for layer in (_convolution(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.ReLU())
            )
        )


class Nested(nn.Module):
    """y = relu(conv(x)); y + conv(y) + x: a residual of two layers around one of one layer."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.ModuleList((_convolution(), _convolution())) for _ in range(calls // 6))

    def forward(self, x: Tensor) -> Tensor:
        for outer, inner in self.steps:
            y = torch.relu(outer(x))
            x = torch.relu(y + inner(y) + x)
        return x


class Matrices(nn.Module):
    """Linear layers without activations, all of which become one, on each pixel."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(_orthogonal() for _ in range(calls)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


class Padded(nn.Sequential):
    """Padded convolutions without activations, whose borders keep them apart, with a batch norm and a 1x1 between."""

    def __init__(self, calls: int) -> None:
        super().__init__(
            *(layer for _ in range(calls // 3) for layer in (_convolution(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)))
        )


GROWING: dict[str, Callable[[int], nn.Module]] = {
    "chain of conv, relu": Chain,
    "residual ladder": Ladder,
    "sum of convolutions": Branches,
    "sum of other addends": Addends,
    "conv, batch norm, 1x1, relu": Steps,
    "nested residuals": Nested,
    "linear layers only": Matrices,
    "conv, batch norm, 1x1 only": Padded,
}


def _convolution() -> nn.Module:
    return nn.Conv2d(4, 4, 3, padding=1)


def _orthogonal() -> nn.Module:
    """A layer that keeps the size of its input, so that ten thousand of them in a row have an output."""
    layer = nn.Linear(8, 8)
    nn.init.orthogonal_(layer.weight)
    return layer


def main() -> None:
    """Print the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--passes", default="default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("models", "growth"), help="one of the two tables")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # of models about their own future defaults
    rgc.compile(Chain(4).eval(), torch.randn(1, 4, 8, 8), passes=options.passes)  # what is loaded once does not count
    console = Console(width=120)
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, passes {options.passes}\n")
    if options.only != "growth":
        console.print(table_of_models(options.repeats, options.passes))
    if options.only != "models":
        console.print(table_of_growth(options.repeats, options.passes))


def table_of_models(repeats: int, passes: str) -> Table:
    """Compile time beside three forward passes, model by model."""
    table = Table("model", "input", "rgc.compile, s", "three forward, s", box=MARKDOWN)
    for name, (build, size) in track(MODELS.items(), "models", console=Console(stderr=True)):
        model, x = randomize(build()), torch.randn(1, 3, size, size)
        forward, compiling = measured(model, x, repeats, passes)
        table.add_row(name, f"1x3x{size}x{size}", f"{compiling:.2f}", f"{3 * forward:.2f}")
    return table


def table_of_growth(repeats: int, passes: str) -> Table:
    """Milliseconds per call, by the number of calls."""
    lengths = [f"{length:,} calls, ms per call" for length in LENGTHS]
    table = Table("model", *lengths, "last / first", box=MARKDOWN)
    x = torch.randn(1, 4, 8, 8)
    for name, build in track(GROWING.items(), "growth", console=Console(stderr=True)):
        each = [1e3 * measured(randomize(build(n)), x, repeats, passes)[1] / n for n in LENGTHS]
        table.add_row(name, *(f"{value:.2f}" for value in each), f"{each[-1] / each[0]:.2f}")
    return table


def measured(model: nn.Module, x: Tensor, repeats: int, passes: str | Sequence[str]) -> tuple[float, float]:
    """Median seconds of one forward pass and of one compilation, after one forward pass that does not count."""
    seconds(lambda: model(x))
    forward, compiling = [], []
    for _ in range(repeats):
        forward.append(seconds(lambda: model(x)))
        compiling.append(seconds(lambda: rgc.compile(model, x, passes=passes)))
    return statistics.median(forward), statistics.median(compiling)


def seconds(call: Callable[[], object]) -> float:
    """The processor time of one call."""
    started = time.process_time()
    with torch.no_grad():
        call()
    return time.process_time() - started


if __name__ == "__main__":
    main()
