"""What does rgc do, on real data, in two minutes? Train a ReduceNet on digits, compile it, compare.

The data are the 1,797 handwritten digits (8x8 pixels) that scikit-learn carries. While the network trains, its
activations decay to the identity; at the end it is linear, and ``rgc compile model.pt --passes all`` finds that out,
merges it into one layer, and proves the result equal. A linear network has the accuracy of a linear classifier: the
last lines show one, for comparison.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import rgc
from rgc.models import reducenet20
from rgc.nn import set_decay

BATCH = 64


def main() -> None:
    """Train, save, compile from the shell, load, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where model.pt goes (default: demo)")
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    torch.manual_seed(0)
    train, test = digits()
    model = reducenet20(in_channels=1, image_size=8)
    console.print(
        f"ReduceNet-20 on {len(train[1]):,} digits, tested on {len(test[1])}; its activations decay while it trains"
    )
    fit(model, *train, epochs=options.epochs, console=console)
    path = options.folder / "model.pt"
    torch.save(model.eval(), path)

    command = ["rgc", "compile", path.name, "--passes", "all"]
    console.print(f"\n[bold]$ {' '.join(command)}[/bold]")
    subprocess.run([sys.executable, "-m", *command], cwd=options.folder, check=True)
    written = rgc.load(options.folder / "model.fused.pt2")
    console.print()
    console.print(comparison(model, written, test))
    linear = LogisticRegression(max_iter=2000).fit(train[0].flatten(1).numpy(), train[1].numpy())
    score = linear.score(test[0].flatten(1).numpy(), test[1].numpy())
    console.print(f"A linear classifier on the same pixels (scikit-learn's logistic regression): {score:.2%}")


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images [N, 1, 8, 8] in [-1, 1] with their labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(data.target)
    train, test = train_test_split(torch.arange(len(labels)), test_size=0.25, random_state=0, stratify=labels)
    return (images[train], labels[train]), (images[test], labels[test])


def fit(model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, console: Console) -> None:
    """Train with Adam; the activations decay linearly over the first two thirds of the epochs."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    model.train()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=epochs)
        for epoch in range(epochs):
            decay = min(1.0, epoch / (2 * epochs / 3))
            set_decay(model, decay)
            total = 0.0
            for batch in torch.randperm(len(labels)).split(BATCH):
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(batch)
            schedule.step()
            progress.update(task, advance=1, description=f"training: loss {total / len(labels):.3f}, decay {decay:.2f}")
    set_decay(model, 1.0)


def comparison(model: nn.Module, written: nn.Module, test: tuple[Tensor, Tensor]) -> Table:
    """Accuracy of the model and of the file that rgc wrote; size and speed of the model and of the compiled module."""
    images, labels = test
    with torch.no_grad():
        before, after = model(images).argmax(1), written(images).argmax(1)
    table = Table("", "before", "after", title="the same function", title_justify="left")
    table.add_row("test accuracy", *(f"{(found == labels).double().mean():.2%}" for found in (before, after)))
    table.add_row("identical predictions", "", f"{int((before == after).sum())} of {len(labels)}")
    compiled = rgc.compile(model, images[:1], passes="all")
    report = compiled.report
    layers = [counts.total() for counts in (report.ops_before, report.ops_after)]
    table.add_row("operators", *map(str, layers))
    table.add_row("parameters", f"{report.params_before:,}", f"{report.params_after:,}")
    table.add_row("multiply-accumulates", f"{report.macs_before:,}", f"{report.macs_after:,}")
    for batch in (1, BATCH):
        slow, fast = latency(model, compiled, images[:batch])
        table.add_row(
            f"latency in PyTorch, batch {batch}", f"{slow * 1e3:.3f} ms", f"{fast * 1e3:.3f} ms ({slow / fast:.0f}x)"
        )
    return table


def latency(model: nn.Module, compiled: nn.Module, x: Tensor, repeats: int = 30) -> tuple[float, float]:
    """Median seconds per call of both, measured in turn so that a noisy machine treats them alike."""
    seconds: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for _ in range(repeats):
            for each, times in ((model, seconds[0]), (compiled, seconds[1])):
                started = time.perf_counter()
                each(x)
                times.append(time.perf_counter() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


if __name__ == "__main__":
    main()
