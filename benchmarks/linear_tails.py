"""What is gained where the layers before a global mean are linear? ``python -m benchmarks.linear_tails [--batch 16]``.

Each tail stands behind a nonlinearity, and is compiled with the passes for a fixed size: without those for tails, with
the whole-map collapse alone, with `box_mean` alone, and with both, between which the cost model chooses. All are
measured by `rgc.bench` against the original.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import rgc
from rgc.calibration import machine_name
from rgc.testing import randomize

PASSES = {
    "no pass for tails": "all,-box_mean,-collapse",
    "collapse": "all,-box_mean",
    "box_mean": "all,-collapse",
    "both": "all",
}


class Residual(nn.Module):
    """A shortcut, of the input or through layers of its own, around layers."""

    def __init__(self, layers: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.layers, self.shortcut = layers, shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.shortcut(x) + self.layers(x)
        return added


def conv(reads: int, makes: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution that keeps the size, and a batch norm."""
    layer = nn.Conv2d(reads, makes, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(makes)]


def head(reads: int, classes: int) -> list[nn.Module]:
    """A global mean and a linear layer."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(reads, classes)]


def one_convolution(reads: int, makes: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    """A convolution before the mean, and a nonlinearity behind it."""
    return nn.Sequential(nn.ReLU(), *conv(reads, makes, kernel, stride), nn.AdaptiveAvgPool2d(1), nn.ReLU())


def resnet_block(width: int, classes: int, blocks: int = 1) -> nn.Module:
    """The last basic blocks of a residual network, of which each became linear."""
    made = [Residual(nn.Sequential(*conv(width, width), *conv(width, width))) for _ in range(blocks)]
    return nn.Sequential(nn.ReLU(), *made, *head(width, classes))


def resnet_stage(reads: int, width: int, classes: int) -> nn.Module:
    """The last stage: a block with stride 2 and a 1x1 shortcut, then one without."""
    first = Residual(
        nn.Sequential(*conv(reads, width, 3, 2), *conv(width, width)), nn.Sequential(*conv(reads, width, 1, 2))
    )
    second = Residual(nn.Sequential(*conv(width, width), *conv(width, width)))
    return nn.Sequential(nn.ReLU(), first, second, *head(width, classes))


def mobilenet_tail(width: int, last: int, classes: int) -> nn.Module:
    """The last inverted residual of MobileNetV2, the 1x1 convolution behind it, and the head."""
    wide = 6 * width
    block = [*conv(width, wide, 1), *conv(wide, wide, 3, groups=wide), *conv(wide, 2 * width, 1)]
    return nn.Sequential(nn.ReLU(), *block, *conv(2 * width, last, 1), *head(last, classes))


@dataclass(frozen=True)
class Entry:
    """One row of the table: a tail and the shape of a sample."""

    build: Callable[[], nn.Module]
    sample: tuple[int, int, int]


TAILS: dict[str, Entry] = {
    "3x3 512->512 at 7": Entry(partial(one_convolution, 512, 512), (512, 7, 7)),
    "3x3/2 256->512 at 14": Entry(partial(one_convolution, 256, 512, 3, 2), (256, 14, 14)),
    "3x3 64->64 at 56": Entry(partial(one_convolution, 64, 64), (64, 56, 56)),
    "5x5 32->64 at 112": Entry(partial(one_convolution, 32, 64, 5), (32, 112, 112)),
    "ResNet-18, last block, 1000 classes": Entry(partial(resnet_block, 512, 1000), (512, 7, 7)),
    "ResNet-18, last stage, 10 classes": Entry(partial(resnet_stage, 256, 512, 10), (256, 14, 14)),
    "CIFAR residual, 3 blocks of 64 at 8, 10 classes": Entry(partial(resnet_block, 64, 10, 3), (64, 8, 8)),
    "CIFAR residual, 3 blocks of 64 at 32, 10 classes": Entry(partial(resnet_block, 64, 10, 3), (64, 32, 32)),
    "MobileNetV2, last block and head": Entry(partial(mobilenet_tail, 160, 1280, 1000), (160, 7, 7)),
    "MobileNetV2, last block, 10 classes": Entry(partial(mobilenet_tail, 160, 1280, 10), (160, 7, 7)),
}


def main() -> None:
    """Print the table as Markdown, each row when it is measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tails", default="", help="only these, separated by semicolons")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--objective", default="latency")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=5.0, help="for one tail with one set of passes")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    chosen = {name.strip(): TAILS[name.strip()] for name in options.tails.split(";")} if options.tails else TAILS
    threads = f"{options.threads} thread{'s' * (options.threads > 1)}"
    where = machine_name(torch.device(options.device))
    print(f"torch {torch.__version__}, {where}, {threads}, float32, batch {options.batch}\n")
    columns = ["tail", "original, ms", *(f"{name}: ms, times faster, compiled in s" for name in PASSES)]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for name, entry in chosen.items():
        print(f"| {' | '.join((name, *measured(entry, options)))} |", flush=True)


def measured(entry: Entry, options: argparse.Namespace) -> list[str]:
    """The time of the original, and for each set of passes the time, the ratio and the operators."""
    torch.manual_seed(0)
    model = randomize(entry.build()).to(options.device)
    x = torch.randn(options.batch, *entry.sample, device=options.device)
    kind = torch.device(options.device).type
    cells: list[str] = []
    original = 0.0
    for passes in PASSES.values():
        started = time.perf_counter()
        compiled = rgc.compile(model, x, passes=passes, objective=options.objective, target=kind)
        seconds = time.perf_counter() - started
        found = rgc.bench(
            model,
            compiled,
            x,
            threads=options.threads,
            runtimes=["eager"],
            pairs=options.pairs,
            seconds=options.seconds,
        )
        (each,) = found.comparisons
        original = each.before.median
        ops = ", ".join(f"{count} {name}" for name, count in compiled.report.ops_after.items() if name != "ReLU")
        cells.append(f"{1e3 * each.after.median:.3g}, {each.ratio.median:.1f}x, {seconds:.1f} ({ops})")
    return [f"{1e3 * original:.3g}", *cells]


if __name__ == "__main__":
    main()
