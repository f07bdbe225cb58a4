"""Is anything slower after compiling? ``python -m benchmarks.latency [--device cuda] [--dtype float16]``.

Original and compiled model are measured by `rgc.bench` in eager PyTorch, torch.compile and onnxruntime: in turn, until
the interval of their ratio is narrow or the time is spent. Slower is what has its whole interval below 1. The models
are those that people deploy, the zoo in its training form, and chains of linearised MobileNetV2 blocks.
"""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import timm
import torch
import torchvision
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import rgc
from benchmarks.linear_blocks import Block
from rgc import Measurement, models
from rgc.calibration import machine_name
from rgc.nn import set_decay
from rgc.runtimes import RUNTIMES
from rgc.testing import randomize


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
    """Print the table as Markdown."""
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
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # those of torch.compile about itself
    torch.set_num_threads(options.threads)
    runtimes = options.runtimes.split(",")
    chosen = {name.strip(): MODELS[name.strip()] for name in options.models.split(";")} if options.models else MODELS
    table = Table("model", "passes", "operators", *(f"{name}, ms: ratio" for name in runtimes), box=MARKDOWN)
    slower: list[str] = []
    for name, entry in track(chosen.items(), "measuring", console=Console(stderr=True)):
        counts, found = measured(entry, options, runtimes)
        table.add_row(name, entry.passes, counts, *cells(found, runtimes))
        slower += [f"{name} in {each.setting.runtime}" for each in found.comparisons if each.ratio.verdict == "slower"]
        for missing in found.left_out:
            print(f"{name}: left out: {missing.setting}: {missing.reason}", file=sys.stderr)
        gc.collect()
    console = Console(width=220)
    device = torch.device(options.device)
    threads = f", {options.threads} thread{'s' * (options.threads > 1)}" if device.type == "cpu" else ""
    where = f"{machine_name(device)}{threads}"
    console.print(f"torch {torch.__version__}, {options.device} ({where}), {options.dtype}, batch {options.batch}\n")
    console.print(table)
    console.print(f"\nSlower by the interval: {'; '.join(slower) or 'none'}.")


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


def cells(found: Measurement, runtimes: Sequence[str]) -> list[str]:
    """For each runtime: the medians, the ratio, and its interval."""
    by_runtime = {each.setting.runtime: each for each in found.comparisons}
    texts = []
    for runtime in runtimes:
        each = by_runtime.get(runtime)  # type: ignore[call-overload]  # a str from the command line
        if each is None:
            texts.append("left out")
            continue
        times = " -> ".join(f"{1e3 * value:.3g}" for value in (each.before.median, each.after.median))
        texts.append(f"{times}: {each.ratio.median:.2f} ({each.ratio.low:.2f} - {each.ratio.high:.2f})")
    return texts


if __name__ == "__main__":
    main()
