"""Is anything slower after compiling? ``python -m benchmarks.latency [--device cuda] [--dtype float16]``.

Original and compiled model are called in turn, many times, so that a noisy machine treats them alike; the table gives
the median time of each and the median of the ratios pair by pair, with its quartiles.
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
from torch import Tensor, nn

import rgc
from rgc import models
from rgc.nn import set_decay
from rgc.testing import randomize


def linear(model: nn.Module) -> nn.Module:
    """The model with its activations decayed to nothing."""
    set_decay(model, 1.0)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "resnet18": (lambda: torchvision.models.resnet18(weights=None), 224, "default"),
    "resnet50": (lambda: torchvision.models.resnet50(weights=None), 224, "default"),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(weights=None), 224, "default"),
    "vgg11_bn": (lambda: torchvision.models.vgg11_bn(weights=None), 224, "default"),
    "repvgg_a0": (models.repvgg_a0, 224, "default"),
    "acnet_resnet18": (models.acnet_resnet18, 224, "default"),
    "dbb_resnet18": (models.dbb_resnet18, 224, "default"),
    "reducenet20, decay 1": (lambda: linear(models.reducenet20()), 32, "default"),
    "reducenet20, decay 1, all": (lambda: linear(models.reducenet20()), 32, "all"),
    "reducenet56, decay 1, all": (lambda: linear(models.reducenet56()), 32, "all"),
}


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=30)
    options = parser.parse_args()
    torch.manual_seed(0)
    console = Console(width=140)
    table = Table(
        "model", "passes", "operators", "before, ms", "after, ms", "before / after", "quartiles", box=MARKDOWN
    )
    for name, (build, size, passes) in track(MODELS.items(), "measuring", console=Console(stderr=True)):
        model = randomize(build()).to(options.device, getattr(torch, options.dtype))
        x = torch.randn(options.batch, 3, size, size).to(options.device, getattr(torch, options.dtype))
        compiled = rgc.compile(model, x, passes=passes, target=torch.device(options.device).type)
        pairs = [(seconds(model, x), seconds(compiled, x)) for _ in range(options.pairs + 3)][3:]
        low, middle, high = statistics.quantiles([before / after for before, after in pairs], n=4)
        before, after = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
        report = compiled.report
        counts = f"{report.ops_before.total()} -> {report.ops_after.total()}"
        table.add_row(name, passes, counts, f"{before:.2f}", f"{after:.2f}", f"{middle:.2f}", f"{low:.2f} - {high:.2f}")
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    console.print(f"torch {torch.__version__}, {options.device} ({where}), {options.dtype}, batch {options.batch}\n")
    console.print(table)


def seconds(model: nn.Module, x: Tensor) -> float:
    """The time of one call, the device's work included."""
    with torch.no_grad():
        started = time.perf_counter()
        model(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
