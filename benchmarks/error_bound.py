"""What is a bound of rounding worth? ``OMP_NUM_THREADS=1 python -m benchmarks.error_bound``.

Compiles models with random weights and inputs, in float32, and prints `rgc.error_bound` beside what was measured, on
the scale of the output: from input to output, and the largest part that any layer takes of its own bound.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import nn

import rgc
from rgc import models
from rgc.testing import randomize

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv 3x3, batch norm, ReLU, conv 1x1": (
        lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1)),
        (1, 3, 12, 12),
    ),
    "conv, ReLU, conv, global mean, linear": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        ),
        (1, 3, 16, 16),
    ),
    "ReduceNet-20 with its ReLUs": (models.reducenet20, (1, 3, 32, 32)),
    "ResNet-18": (torchvision.models.resnet18, (1, 3, 224, 224)),
}


def main() -> None:
    """Print the table as Markdown."""
    table = Table("model", "input", "bound / scale", "measured / scale", "largest share of a layer", box=MARKDOWN)
    for name, (build, shape) in MODELS.items():
        torch.manual_seed(0)
        compiled = rgc.compile(randomize(build()), torch.randn(shape))
        found = rgc.error_bound(compiled)
        assert found is not None, f"{name} does not run in float64"
        for output in found.outputs:
            numbers = f"{output.bound:.1e}", f"{output.measured:.1e}", f"{found.share:.0%}"
            table.add_row(name, "x".join(map(str, shape)), *numbers)
    console = Console(width=160)
    console.print(f"torch {torch.__version__}, float32, {torch.get_num_threads()} threads\n")
    console.print(table)


if __name__ == "__main__":
    main()
