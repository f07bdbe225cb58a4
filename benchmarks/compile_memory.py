"""How much memory does ``rgc.compile`` take beside the model itself? ``python -m benchmarks.compile_memory``.

Each model is compiled in a process of its own, after a tiny model that loads what is loaded once. Measured is the peak
of the resident memory while compiling minus what was resident just before, so the model is not counted. One table of
networks of one structure and growing width, with the straight line through each family: its slope is bytes per byte of
weights, its constant what does not depend on them (activations of the example, the allocator). One table of models
with names.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy
import timm
import torch
import torchvision
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import rgc
from rgc import models
from rgc.testing import randomize

Build = Callable[[], nn.Module]

MEGABYTE = 1e6

#: Widths of the growing networks: 10 MB to 1 GB of weights.
WIDTHS = (176, 352, 704, 1232, 1760)

#: How many layers or blocks the growing networks have.
DEPTH = 9


def chain(width: int) -> nn.Module:
    """Convolution, batch norm and ReLU in turn, as in VGG."""
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for _ in range(DEPTH):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def linear_layers(width: int) -> nn.Module:
    """Linear layers with activations between them, where nothing merges."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    for _ in range(DEPTH * 9):  # as many weights as nine kernels of 3x3
        layers += [nn.Linear(width, width), nn.GELU()]
    return nn.Sequential(*layers)


def ladder(width: int) -> nn.Module:
    """RepVGG in its training form: 3x3, 1x1 and identity, each with a batch norm, as one convolution."""
    blocks: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
    blocks += [models.RepVGGBlock(width, width) for _ in range(DEPTH)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


FAMILIES: dict[str, Callable[[int], nn.Module]] = {
    "conv 3x3, batch norm, ReLU": chain,
    "RepVGG blocks": ladder,
    "linear, GELU": linear_layers,
}

#: Models by name, with the size of the example.
MODELS: dict[str, tuple[Build, int]] = {
    "resnet152": (partial(torchvision.models.resnet152, weights=None), 224),
    "wide_resnet101_2": (partial(torchvision.models.wide_resnet101_2, weights=None), 224),
    "vgg11_bn": (partial(torchvision.models.vgg11_bn, weights=None), 224),
    "convnext_base": (partial(torchvision.models.convnext_base, weights=None), 224),
    "vit_l_16": (partial(torchvision.models.vit_l_16, weights=None), 224),
    "repvgg_b3 (timm)": (partial(timm.create_model, "repvgg_b3"), 224),
    "regnety_320 (timm)": (partial(timm.create_model, "regnety_320"), 224),
}

#: The example of the growing networks: so small that activations do not count.
SMALL = 16


def main() -> None:
    """Print the tables as Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--passes", default="default")
    parser.add_argument("--only", choices=("models", "growth"), help="one of the two tables")
    parser.add_argument("--measure", metavar="MODEL", help="one model in this very process, as a line of JSON")
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measured_here(options.measure, options.passes)))
        return
    console = Console(width=120)
    console.print(f"torch {torch.__version__}, one thread, passes {options.passes}\n")
    if options.only != "models":
        for table in tables_of_growth(options.passes):
            console.print(table)
    if options.only != "growth":
        console.print(table_of_models(options.passes))


def tables_of_growth(passes: str) -> tuple[Table, Table]:
    """Peaks by width, and the straight line through those of each family."""
    peaks = Table("network", "width", "weights, MB", "peak beside the model, MB", "ratio", box=MARKDOWN)
    lines = Table("network", "slope, bytes per byte of weights", "constant, MB", box=MARKDOWN)
    for family in FAMILIES:
        points = []
        for width in track(WIDTHS, family, console=Console(stderr=True)):
            weights, peak = measured(f"{family}:{width}", passes)
            points.append((weights, peak))
            peaks.add_row(family, str(width), f"{weights:,.0f}", f"{peak:,.0f}", f"{peak / weights:.2f}")
        slope, constant = numpy.polyfit(*zip(*points, strict=True), 1)
        lines.add_row(family, f"{slope:.2f}", f"{constant:,.0f}")
    return peaks, lines


def table_of_models(passes: str) -> Table:
    """Peaks of models with names."""
    table = Table("model", "input", "weights, MB", "peak beside the model, MB", "ratio", box=MARKDOWN)
    for name, (_, size) in track(MODELS.items(), "models", console=Console(stderr=True)):
        weights, peak = measured(name, passes)
        table.add_row(name, f"1x3x{size}x{size}", f"{weights:,.0f}", f"{peak:,.0f}", f"{peak / weights:.2f}")
    return table


def measured(name: str, passes: str) -> tuple[float, float]:
    """Megabytes of weights and of the peak beside them, of a model compiled in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.compile_memory", "--measure", name, "--passes", passes]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return found["weights"], found["peak"]


def measured_here(name: str, passes: str) -> dict[str, float]:
    """The same for a model that is built and compiled in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of models about their own future defaults
    rgc.compile(randomize(ladder(4)), torch.randn(1, 3, SMALL, SMALL), passes=passes)  # what is loaded once
    family, _, width = name.partition(":")
    build, size = (partial(FAMILIES[family], int(width)), SMALL) if width else MODELS[name]
    model, x = randomize(build()).requires_grad_(False), torch.randn(1, 3, size, size)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
    restart_peak()
    before = resident("VmRSS")
    compiled = rgc.compile(model, x, passes=passes)
    peak = resident("VmHWM") - before
    return {"weights": weights / MEGABYTE, "peak": peak / MEGABYTE, "seconds": compiled.report.seconds}


def restart_peak() -> None:
    """Let the kernel forget the largest amount of memory that was resident up to now (Linux, `man 5 proc`)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> float:
    """Bytes of resident memory: now (VmRSS) or at most (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024.0 * int(line.split()[1])
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
