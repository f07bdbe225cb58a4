"""How long does ``rgc.compile`` take, from tracing to the verified module? ``python -m benchmarks.compile_time``.

Each model is compiled several times in turn with the others; the table gives medians in seconds, and the time of one
float32 forward pass of the original on the same machine for scale.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

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

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (lambda: torchvision.models.resnet18(weights=None), (1, 3, 224, 224)),
    "resnet50": (lambda: torchvision.models.resnet50(weights=None), (1, 3, 224, 224)),
    "repvgg_a0": (models.repvgg_a0, (1, 3, 224, 224)),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(weights=None), (1, 3, 224, 224)),
    "reducenet20": (models.reducenet20, (1, 3, 32, 32)),
}


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--passes", default="default")
    options = parser.parse_args()
    torch.manual_seed(0)
    console = Console()
    built = {name: randomize(build()) for name, (build, _) in MODELS.items()}
    examples = {name: torch.randn(shape) for name, (_, shape) in MODELS.items()}
    compiling: dict[str, list[float]] = {name: [] for name in MODELS}
    forward: dict[str, list[float]] = {name: [] for name in MODELS}
    for _ in track(range(options.repeats), "compiling", console=Console(stderr=True)):
        for name, model in built.items():
            forward[name].append(seconds(lambda model=model, x=examples[name]: model(x)))
            compiling[name].append(
                seconds(lambda model=model, x=examples[name]: rgc.compile(model, x, passes=options.passes))
            )
    table = Table("model", "input", "rgc.compile, s", "one forward, s", box=MARKDOWN)
    for name, (_, shape) in MODELS.items():
        row = statistics.median(compiling[name]), statistics.median(forward[name])
        table.add_row(name, "x".join(map(str, shape)), *(f"{value:.2f}" for value in row))
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, passes {options.passes}")
    console.print(table)


def seconds(call: Callable[[], object]) -> float:
    """The wall time of one call."""
    started = time.perf_counter()
    with torch.no_grad():
        call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
