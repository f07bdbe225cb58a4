"""Is anything slower after compiling? ``python -m benchmarks.latency --store rows.jsonl [--device cuda]``.

Original and compiled model are measured by `rgc.bench` in eager PyTorch, torch.compile and onnxruntime: in turn, until
the interval of their ratio is narrow or the time is spent. The models are those that people deploy, the zoo in its
training form, and chains of linearised MobileNetV2 blocks.

Slower is what has its whole interval below 1, and that again with other models: two loads of one network differ by
about 2 % in onnxruntime, by where their weights lie in memory, and the interval of one pair of models does not hold
that. So a row that is slower by its interval is measured again with models built, compiled and loaded anew, up to
`MOST_LOADS` times in all, and what decides is the union of the intervals: slower is what is slower in every load.

With ``--store`` each row is appended to a file of JSON lines once it is measured, and those that are there for the same
model, runtime and options (machine and version of PyTorch too, not the version of rgc) are not measured again.
``--print`` renders the file without measuring.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import timm
import torch
import torchvision
from rich.console import Console
from rich.progress import track
from torch import nn

import rgc
from benchmarks.linear_blocks import Block
from rgc import Measurement, models
from rgc.calibration import machine_name
from rgc.errors import InputError
from rgc.measurement import Comparison
from rgc.nn import set_decay
from rgc.runtimes import RUNTIMES
from rgc.testing import randomize

#: A row that is slower by its interval is measured with so many pairs of models at most.
MOST_LOADS = 3


@dataclass(frozen=True)
class Conditions:
    """Under what a table is measured: rows of other conditions are no rows of it."""

    machine: str
    torch_version: str
    device: str
    dtype: str
    target: str
    batch: int
    threads: int
    channels_last: bool
    cuda_graphs: bool

    def __str__(self) -> str:
        """One line above the table."""
        words = [f"torch {self.torch_version}", f"{self.device} ({self.machine})", self.dtype, f"batch {self.batch}"]
        words += [f"{self.threads} thread{'s' * (self.threads > 1)}"] * (self.device == "cpu")
        words += [f"target {self.target}"] * (self.target != self.device)
        words += ["channels last"] * self.channels_last + ["CUDA graphs"] * self.cuda_graphs
        return ", ".join(words)


@dataclass(frozen=True)
class Row:
    """A model in one runtime: its operators, medians [s], and for each load the median ratio and its interval.

    left_out: why nothing was measured; None where something was.
    """

    conditions: Conditions
    model: str
    passes: str
    runtime: str
    operators: str
    before: float = 0.0
    after: float = 0.0
    loads: tuple[tuple[float, float, float], ...] = ()
    left_out: str | None = None

    @property
    def key(self) -> tuple[Conditions, str, str, str]:
        """What makes two rows the same row."""
        return self.conditions, self.model, self.passes, self.runtime

    @property
    def interval(self) -> tuple[float, float]:
        """The union of the intervals of all loads."""
        return min(low for _, low, _ in self.loads), max(high for _, _, high in self.loads)

    @property
    def is_slower(self) -> bool:
        """Was it slower in every load, by the interval?"""
        return bool(self.loads) and self.interval[1] < 1

    def with_load(self, other: Row) -> Row:
        """The same with the evidence of another load."""
        return replace(self, loads=(*self.loads, *other.loads))

    def __str__(self) -> str:
        """``23.1 -> 22.5: 1.02 (1.01 - 1.03)``."""
        if self.left_out is not None:
            return "left out"
        times = " -> ".join(f"{1e3 * value:.3g}" for value in (self.before, self.after))
        low, high = self.interval
        more = f", {len(self.loads)} loads" if len(self.loads) > 1 else ""
        return f"{times}: {statistics.median(ratio for ratio, _, _ in self.loads):.2f} ({low:.2f} - {high:.2f}{more})"


@dataclass(frozen=True)
class Entry:
    """One row of the table: a model, the shape of a sample, and the passes that compile it."""

    build: Callable[[], nn.Module]
    sample: tuple[int, ...] = (3, 224, 224)
    passes: str = "default"


def linear(build: Callable[[], nn.Module]) -> nn.Module:
    """The model with its activations decayed to nothing."""
    model = build()
    set_decay(model, 1.0)
    return model


def chain(width: int) -> nn.Module:
    """Three blocks with an activation between, as in a network of which each block became linear."""
    first, second, third = (Block(width, width) for _ in range(3))
    return nn.Sequential(first, nn.ReLU6(), second, nn.ReLU6(), third)


def from_timm(name: str, size: int = 224) -> Entry:
    """A model of timm without its pretrained weights."""
    return Entry(partial(timm.create_model, name), (3, size, size))


def from_torchvision(name: str) -> Entry:
    """A model of torchvision without its pretrained weights."""
    return Entry(partial(getattr(torchvision.models, name), weights=None))


SMALL = (3, 32, 32)
MODELS: dict[str, Entry] = {
    **{name: from_torchvision(name) for name in ("resnet18", "resnet50", "mobilenet_v2", "vgg11_bn", "densenet121")},
    **{name: from_timm(name) for name in ("efficientnet_b0", "convnext_atto", "repvit_m0_9", "levit_128s")},
    **{name: from_timm(name) for name in ("repghostnet_050", "mobilenetv3_small_100")},
    "fastvit_t8": from_timm("fastvit_t8", 256),
    "repvgg_a0": Entry(models.repvgg_a0),
    "acnet_resnet18": Entry(models.acnet_resnet18),
    "dbb_resnet18": Entry(models.dbb_resnet18),
    "vanillanet5, decay 1": Entry(partial(linear, models.vanillanet5)),
    "reducenet20, decay 1": Entry(partial(linear, models.reducenet20), SMALL),
    "reducenet20, decay 1, all": Entry(partial(linear, models.reducenet20), SMALL, "all"),
    "reducenet56, decay 1": Entry(partial(linear, models.reducenet56), SMALL),
    "reducenet56, decay 1, all": Entry(partial(linear, models.reducenet56), SMALL, "all"),
    **{
        f"3 linear blocks, {width} at {size}": Entry(partial(chain, width), (width, size, size), "all,-collapse")
        for width, size in ((16, 112), (24, 56), (32, 28), (64, 14), (96, 14), (160, 7), (320, 7))
    },
}


def main() -> None:
    """Measure what is missing, and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="", help="only these, separated by semicolons")
    parser.add_argument("--runtimes", default=",".join(RUNTIMES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--target", default=None, help="cpu, cuda, or a file of rgc calibrate")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--cuda-graphs", action="store_true")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=10.0, help="for one model in one runtime")
    parser.add_argument("--store", type=Path, help="a file of JSON lines: rows that are there are not measured again")
    parser.add_argument("--print", action="store_true", help="render the rows of --store, and measure nothing")
    options = parser.parse_args()
    runtimes = options.runtimes.split(",")
    unknown = [name.strip() for name in options.models.split(";") if options.models and name.strip() not in MODELS]
    unknown += [name for name in runtimes if name not in RUNTIMES]
    if unknown or (options.print and options.store is None):
        parser.error(f"there is no {unknown[0]!r}" if unknown else "--print needs --store")
    try:
        rows = {} if options.store is None else stored_rows(options.store)
    except InputError as error:
        parser.error(str(error))
    if options.print:
        print_tables(rows.values())
        return
    warnings.simplefilter("ignore")  # those of torch.compile about itself
    torch.set_num_threads(options.threads)
    conditions = conditions_of(options)
    chosen = [name.strip() for name in options.models.split(";")] if options.models else list(MODELS)
    for name in track(chosen, "measuring", console=Console(stderr=True)):
        entry = MODELS[name]
        keys = {runtime: (conditions, name, entry.passes, runtime) for runtime in runtimes}
        missing = [runtime for runtime, key in keys.items() if key not in rows]
        for row in measured_rows(name, entry, conditions, options, missing):
            rows[row.key] = row
            if options.store is not None:
                append(options.store, row)
            if row.left_out is not None:
                print(f"{name}: left out: {row.runtime}: {row.left_out}", file=sys.stderr)
    print_tables(row for key, row in rows.items() if key[0] == conditions)


def conditions_of(options: argparse.Namespace) -> Conditions:
    """What the options and this machine say."""
    device = torch.device(options.device)
    return Conditions(
        machine_name(device), torch.__version__, device.type, options.dtype, options.target or device.type,
        options.batch, options.threads, options.channels_last, options.cuda_graphs,
    )  # fmt: skip


def measured_rows(
    name: str, entry: Entry, conditions: Conditions, options: argparse.Namespace, runtimes: Sequence[str]
) -> Iterator[Row]:
    """A row for each of ``runtimes``; what is slower by its interval is measured with other loads as well."""
    if not runtimes:
        return
    first = rows_of_one_load(name, entry, conditions, options, runtimes)
    for row in first:
        while row.is_slower and len(row.loads) < MOST_LOADS:
            (again,) = rows_of_one_load(name, entry, conditions, options, [row.runtime])
            if again.left_out is not None:
                break
            row = row.with_load(again)
        yield row


def rows_of_one_load(
    name: str, entry: Entry, conditions: Conditions, options: argparse.Namespace, runtimes: Sequence[str]
) -> list[Row]:
    """Build and compile the model, and measure it in each of ``runtimes``."""
    gc.collect()
    try:
        operators, found = measured(entry, options, runtimes)
    except InputError as error:  # in no runtime at all
        return [Row(conditions, name, entry.passes, runtime, "", left_out=str(error)) for runtime in runtimes]
    by_runtime: dict[str, Comparison] = {each.setting.runtime: each for each in found.comparisons}
    reasons: dict[str, str] = {each.setting.runtime: each.reason for each in found.left_out}
    rows = []
    for runtime in runtimes:
        row = Row(conditions, name, entry.passes, runtime, operators, left_out=reasons.get(runtime))
        each = by_runtime.get(runtime)
        if each is not None:
            load = (each.ratio.median, each.ratio.low, each.ratio.high)
            row = replace(row, before=each.before.median, after=each.after.median, loads=(load,))
        rows.append(row)
    return rows


def measured(entry: Entry, options: argparse.Namespace, runtimes: Sequence[str]) -> tuple[str, Measurement]:
    """The operators before and after compiling, and the times."""
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    model = randomize(entry.build()).to(options.device, dtype)
    x = torch.randn(options.batch, *entry.sample).to(options.device, dtype)
    target = options.target or torch.device(options.device).type
    compiled = rgc.compile(model, x, passes=entry.passes.split(","), target=target)
    found = rgc.bench(
        model, compiled, x, threads=options.threads, channels_last=options.channels_last, runtimes=runtimes,
        pairs=options.pairs, seconds=options.seconds, cuda_graphs=options.cuda_graphs,
    )  # fmt: skip
    report = compiled.report
    return f"{report.ops_before.total()} -> {report.ops_after.total()}", found


def stored_rows(path: Path) -> dict[tuple[Conditions, str, str, str], Row]:
    """The rows of a file of JSON lines, none where there is no file; a last line that was cut off is no row.

    Raises `InputError` for a file that holds anything else.
    """
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = {}
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break  # the run that wrote it was killed
        try:
            plain = json.loads(line)
            loads = tuple(map(tuple, plain.pop("loads")))
            row = Row(Conditions(**plain.pop("conditions")), loads=loads, **plain)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{path}, line {number}: is no row of this benchmark ({error}); name another file"
            ) from error
        rows[row.key] = row
    return rows


def append(path: Path, row: Row) -> None:
    """Add the row to the file, and see that it gets there; what was cut off before it goes."""
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(asdict(row)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def print_tables(rows: Iterable[Row]) -> None:
    """A table for each of the conditions, as Markdown."""
    by_conditions: dict[Conditions, list[Row]] = {}
    for row in rows:
        by_conditions.setdefault(row.conditions, []).append(row)
    for conditions, those in by_conditions.items():
        runtimes = [name for name in RUNTIMES if any(row.runtime == name for row in those)]
        columns = ("model", "passes", "operators", *(f"{name}, ms: ratio" for name in runtimes))
        print(f"{conditions}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        models_of: dict[tuple[str, str], dict[str, Row]] = {}
        for row in those:
            models_of.setdefault((row.model, row.passes), {})[row.runtime] = row
        for (name, passes), found in models_of.items():
            operators = next((row.operators for row in found.values() if row.operators), "")
            cells = (str(found[runtime]) if runtime in found else "not measured" for runtime in runtimes)
            print(f"| {' | '.join((name, passes, operators, *cells))} |")
        slower = [f"{row.model} in {row.runtime}" for row in those if row.is_slower]
        print(f"\nSlower by the interval in each of {MOST_LOADS} loads: {'; '.join(slower) or 'none'}.\n")


if __name__ == "__main__":
    main()
