"""Is what single layers promise saved end to end? ``python -m benchmarks.linear_blocks [--threads 1] [--passes all]``.

Blocks of MobileNetV2 that became linear (1x1, depthwise 3x3, 1x1, each with its batch norm, and a skip connection
where the shapes allow it), with activations between them, so that each merges by itself and no two of them do: chains
of three at one width and size, and MobileNetV2 itself with every second block made linear. Every call that the original
and the compiled network make is also measured alone, on the inputs that it has there. What the sum of those times says
that compiling saves is the prediction; the difference between the two networks is what is saved. All are measured in
turn, so each round yields one pair of the two; their ratio comes with the interval of order statistics. Calls that both
networks make cancel.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map
from torchvision.models.mobilenetv2 import InvertedResidual

import rgc
from rgc.calibration import machine_name
from rgc.samples import FEWEST_PAIRS, Ratio
from rgc.testing import randomize
from rgc.timing import Call, Turn, WallClock, take_turns

#: The blocks of MobileNetV2 at 224 x 224: channels read and made, expansion, stride, and the size that they read.
BLOCKS = (
    (16, 24, 6, 2, 112), (24, 24, 6, 1, 56), (24, 32, 6, 2, 56), (32, 32, 6, 1, 28), (32, 64, 6, 2, 28),
    (64, 64, 6, 1, 14), (64, 96, 6, 1, 14), (96, 96, 6, 1, 14), (96, 160, 6, 2, 14), (160, 160, 6, 1, 7),
    (160, 320, 6, 1, 7),
)  # fmt: skip

#: Widths and sizes beside those of MobileNetV2, with a skip connection.
OTHERS = ((16, 112), (24, 112), (16, 28), (32, 56), (64, 28), (96, 28), (160, 14), (320, 14), (320, 7))


class Block(nn.Module):
    """A block of MobileNetV2 without its activations: what training with decaying activations ends in."""

    def __init__(self, reads: int, makes: int, expansion: int = 6, stride: int = 1) -> None:
        super().__init__()
        wide = reads * expansion
        self.has_skip = reads == makes and stride == 1
        self.layers = nn.Sequential(
            nn.Conv2d(reads, wide, 1, bias=False), nn.BatchNorm2d(wide),
            nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide),
            nn.Conv2d(wide, makes, 1, bias=False), nn.BatchNorm2d(makes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layers(x)
        return x + made if self.has_skip else made


@dataclass(frozen=True)
class Entry:
    """One row of the table: a network, and the shape of a sample."""

    build: Callable[[], nn.Module]
    sample: tuple[int, ...]


@dataclass(frozen=True)
class Calls:
    """The calls that a network makes: how often, and how to make each by itself."""

    counts: Counter[str]
    alone: dict[str, Call]


@dataclass(frozen=True)
class Saving:
    """Seconds that each round predicts and measures, and the medians of the two networks."""

    predicted: list[float]
    measured: list[float]
    before: float
    after: float


def chain(reads: int, makes: int, expansion: int, stride: int) -> nn.Module:
    """Blocks of these shapes, each on the output of a convolution with an activation, or of the block before it."""
    block = partial(Block, reads, makes, expansion, stride)
    if reads == makes and stride == 1:
        return nn.Sequential(nn.ReLU6(), block(), nn.ReLU6(), block(), nn.ReLU6(), block(), nn.ReLU6())
    return nn.Sequential(nn.ReLU6(), block(), nn.ReLU6())


def mobilenet_v2(every: int) -> nn.Module:
    """MobileNetV2 of which every so many-th block is linear, behind an activation that keeps it apart from others."""
    model = torchvision.models.mobilenet_v2(weights=None)
    inverted = [name for name, module in model.named_modules() if isinstance(module, InvertedResidual)]
    for name in inverted[1::every]:
        module = model.get_submodule(name)
        for path, inner in list(module.named_modules()):
            if isinstance(inner, nn.ReLU6):
                module.set_submodule(path, nn.Identity())
        model.set_submodule(name, nn.Sequential(nn.ReLU6(), module, nn.ReLU6()))
    return model


ENTRIES: dict[str, Entry] = {
    **{
        f"{reads} -> {makes}{f' /{stride}' * (stride > 1)} at {size}": Entry(
            partial(chain, reads, makes, expansion, stride), (reads, size, size)
        )
        for reads, makes, expansion, stride, size in BLOCKS
    },
    **{f"{c} -> {c} at {size}": Entry(partial(chain, c, c, 6, 1), (c, size, size)) for c, size in OTHERS},
    **{
        f"mobilenet_v2, 1 in {every} linear": Entry(partial(mobilenet_v2, every), (3, 224, 224)) for every in (2, 4)
    },
}  # fmt: skip


def main() -> None:
    """Print the table as Markdown, each row when it is measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="", help="only these, separated by semicolons")
    parser.add_argument("--passes", default="default;all,-collapse", help="runs, separated by semicolons")
    parser.add_argument("--objective", default="latency")
    parser.add_argument("--target", default=None, help="cpu, or a file of rgc calibrate")
    parser.add_argument("--threads", default="1", help="numbers of threads, separated by commas")
    parser.add_argument("--folded", action="store_true", help="the original has its batch norms folded already")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--cpu-time", action="store_true", help="count the processor's seconds: for a busy machine")
    parser.add_argument("--calls", action="store_true", help="also print what each call takes alone")
    options = parser.parse_args()
    if options.rounds < FEWEST_PAIRS:
        parser.error(f"an interval needs {FEWEST_PAIRS} rounds")
    warnings.simplefilter("ignore")
    chosen = {name.strip(): ENTRIES[name.strip()] for name in options.rows.split(";")} if options.rows else ENTRIES
    print(f"torch {torch.__version__}, {machine_name(torch.device('cpu'))}, float32, batch 1, {options.objective}\n")
    columns = ("threads", "passes", "blocks", "operators", "ms", "predicted, ms", "saved, ms", "saved / predicted")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)
    below: list[str] = []
    for threads in map(int, options.threads.split(",")):
        torch.set_num_threads(threads)
        for passes in options.passes.split(";"):
            for name, entry in chosen.items():
                cells, ratio = row(entry, passes.strip(), options)
                print("| " + " | ".join((str(threads), passes, name, *cells)) + " |", flush=True)
                if ratio is not None and ratio.high < 0.9:
                    below.append(f"{name} ({passes}, {threads} threads)")
    print(f"\nBelow 90 % by the interval: {'; '.join(below) or 'none'}.")


def row(entry: Entry, passes: str, options: argparse.Namespace) -> tuple[tuple[str, ...], Ratio | None]:
    """What stands in the row, and the part of the prediction that is saved; None where nothing is merged."""
    torch.manual_seed(0)
    model, x = randomize(entry.build()), torch.randn(1, *entry.sample)
    compiled = rgc.compile(
        model, x, passes=passes.split(","), objective=options.objective, target=options.target or "cpu"
    )  # fmt: skip
    counts = f"{compiled.report.ops_before.total()} -> {compiled.report.ops_after.total()}"
    original: nn.Module = rgc.compile(model, x, passes=["fold_batchnorm"]) if options.folded else model
    if compiled.report.macs_after == compiled.report.macs_before and options.folded:
        return (counts, "", "", "", "nothing but batch norms merges"), None
    if options.channels_last:
        original, compiled = (m.to(memory_format=torch.channels_last) for m in (original, compiled))
        x = x.contiguous(memory_format=torch.channels_last)
    found = saving(original, compiled, x, options)
    ratio = Ratio.of(found.measured, found.predicted)
    times = f"{1e3 * found.before:.3g} -> {1e3 * found.after:.3g}"
    medians = (f"{1e3 * statistics.median(each):.3g}" for each in (found.predicted, found.measured))
    return (counts, times, *medians, f"{ratio.median:.2f} ({ratio.low:.2f} - {ratio.high:.2f})"), ratio


def saving(original: nn.Module, compiled: nn.Module, x: Tensor, options: argparse.Namespace) -> Saving:
    """Measure both networks, and each call that only one of them makes, in turn."""
    timer = WallClock(time.process_time if options.cpu_time else time.perf_counter)
    with torch.no_grad():
        before, after = calls_of(original, x), calls_of(compiled, x)
        alone = {**before.alone, **after.alone}
        weights = {name: before.counts[name] - after.counts[name] for name in alone}
        names = [name for name, weight in weights.items() if weight]
        turns = [Turn.of(call, timer) for call in (partial(original, x), partial(compiled, x), *map(alone.get, names))]
        samples = [take_turns(turns, timer, round_number=number) for number in range(options.rounds)]
    if options.calls:
        print_calls(names, weights, samples)
    predicted = [sum(weights[n] * t for n, t in zip(names, taken[2:], strict=True)) for taken in samples]
    medians = [statistics.median(taken[index] for taken in samples) for index in range(2)]
    return Saving(predicted, [taken[0] - taken[1] for taken in samples], medians[0], medians[1])


def calls_of(model: nn.Module, x: Tensor) -> Calls:
    """What the network calls, by what decides how long it takes: the layer, and its inputs' shapes and strides."""
    recorder = _Recorder(model if isinstance(model, fx.GraphModule) else fx.symbolic_trace(model))
    recorder.run(x)
    return Calls(recorder.counts, recorder.alone)


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.counts: Counter[str] = Counter()
        self.alone: dict[str, Call] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("call_module", "call_function"):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            # as laid out in the network, but memory of its own: a layer may overwrite its input
            args, kwargs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
            target: Any = self.fetch_attr(str(n.target)) if n.op == "call_module" else n.target
            result = super().run_node(n)
            if isinstance(result, Tensor):
                name = " ".join((_described(target), *map(_laid_out, _tensors((args, kwargs)))))
                self.counts[name] += 1
                self.alone.setdefault(name, partial(target, *args, **kwargs))
            return result
        return super().run_node(n)


def _described(target: Any) -> str:
    return repr(target) if isinstance(target, nn.Module) else str(getattr(target, "__name__", target))


def _tensors(structure: Any) -> Iterator[Tensor]:
    yield from (leaf for leaf in tree_leaves(structure) if isinstance(leaf, Tensor))


def _laid_out(x: Tensor) -> str:
    is_last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return "x".join(map(str, x.shape)) + " channels last" * is_last


def print_calls(names: Sequence[str], weights: dict[str, int], samples: list[list[float]]) -> None:
    """The medians of single calls: positive counts are the original's, negative ones the compiled network's."""
    table = Table("count", "ms", "call", box=MARKDOWN)
    for index, name in enumerate(names):
        milliseconds = 1e3 * statistics.median(taken[2 + index] for taken in samples)
        table.add_row(f"{weights[name]:+}", f"{milliseconds:.4g}", name)
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
