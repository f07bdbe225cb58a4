"""Does the proof ever refuse what is right? ``python -m benchmarks.false_refusals [--only PATTERN] [--count N]``.

The models of the zoo and the smallest of torchvision and timm, with random weights (`rgc.testing.randomize`), in
float32, bfloat16 and float16, run on the CPU. A built-in rewrite is right, so a firing whose check fails, a result that
is refused, or a trace that is given up because the proof of the model failed, is a false refusal; what cannot be
compiled for another reason is counted apart. Each model has a process of its own with a limit on time, and rows are
kept in a JSON lines file as they come: ``--resume`` goes on where an earlier run has stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import nn

import rgc
from benchmarks.reach import CACHE, build, every_model
from rgc.errors import NotEquivalentError, RgcError
from rgc.example import Example
from rgc.testing import randomize

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Weights are the same in every run.
SEED = 0

#: Sizes of the inputs of the zoo: smaller than in training, so that half precision on a CPU takes seconds.
SMALL = 64


@dataclass(frozen=True)
class Row:
    """What became of one model in one dtype."""

    model: str
    dtype: str
    status: str  # "equal", "false refusal", or why nothing can be said
    rewrites: int = 0
    detail: str = ""
    seconds: float = 0.0


def main() -> None:
    """Print the table as Markdown and the figures; exit status 1 if there is a false refusal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="models whose name this regular expression finds")
    parser.add_argument("--count", type=int, default=60, help="how many models of torchvision and timm, smallest first")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="separated by commas")
    parser.add_argument("--jobs", type=int, default=1, help="how many models at a time")
    parser.add_argument("--seconds", type=float, default=300.0, help="the longest that one model may take in one dtype")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the results file has already")
    parser.add_argument("--results", type=Path, default=CACHE / "false-refusals.jsonl", metavar="FILE")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(asdict(measured(*options.one))))
        return
    names = [name for name in chosen_models(options.count) if re.search(options.only, name)]
    rows = read(options.results) if options.resume else {}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    calls = [(name, dtype) for name in names for dtype in options.dtypes.split(",")]
    todo = [call for call in calls if call not in rows]
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(lambda call: isolated(*call, options.seconds), todo):
            rows[row.model, row.dtype] = row
            print(f"{row.model} {row.dtype}: {row.status} {row.detail}", file=sys.stderr)
            options.results.write_text("".join(json.dumps(asdict(each)) + "\n" for each in rows.values()))
    found = [rows[call] for call in calls]
    print_table(found)
    sys.exit(any(row.status == "false refusal" for row in found))


def chosen_models(count: int) -> list[str]:
    """The zoo, then ``count`` models of torchvision and timm."""
    zoo = [f"zoo:{name}" for name in rgc.models.names() if not re.search("_b[123]|vanillanet(9|1)", name)]
    others = [name for name in every_model() if "quantized" not in name and "rcnn" not in name]
    return [*zoo, *others[:count]]


def model_of(name: str) -> tuple[nn.Module, Example]:
    """The model with random weights, and a small input."""
    if not name.startswith("zoo:"):
        return build(name)
    torch.manual_seed(SEED)
    model = randomize(rgc.models.create(name.removeprefix("zoo:")), SEED)
    size = 32 if "reducenet" in name else SMALL
    return model, Example((torch.randn(1, 3, size, size),))


def measured(name: str, dtype: str) -> Row:
    """Compile the model in ``dtype``, in this process."""
    model, example = model_of(name)
    try:
        model, example = model.to(DTYPES[dtype]), example.cast(DTYPES[dtype])
        with torch.no_grad():
            example.run(model)
    # a model in half precision may ask for a kernel that the CPU does not have, in any way it likes
    except Exception as error:
        return Row(name, dtype, "does not run", detail=_first_line(error))
    started = time.perf_counter()
    try:
        report = rgc.compile(model, example).report
    except NotEquivalentError as error:
        return Row(name, dtype, "false refusal", detail=_first_line(error), seconds=time.perf_counter() - started)
    except RgcError as error:
        return Row(name, dtype, "not compiled", detail=_first_line(error), seconds=time.perf_counter() - started)
    seconds = time.perf_counter() - started
    refused = [f"{failure.rewrite} at {failure.where}: {failure.reason}" for failure in report.failures]
    refused += [note for note in report.notes if "the compiled model" in note]
    status = "false refusal" if refused else "equal"
    return Row(name, dtype, status, len(report.rewrites), "; ".join(refused)[:300], seconds)


def isolated(name: str, dtype: str, seconds: float) -> Row:
    """`measured` in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.false_refusals", "--one", name, dtype]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        return Row(name, dtype, f"takes longer than {seconds:.0f} s", seconds=seconds)
    if done.returncode == 0:
        return Row(**json.loads(done.stdout.strip().splitlines()[-1]))
    return Row(name, dtype, "fails", detail=(done.stderr.strip().splitlines() or ["no message"])[-1][:200])


def read(results: Path) -> dict[tuple[str, str], Row]:
    """The rows of an earlier run."""
    lines: Iterable[str] = results.read_text().splitlines() if results.exists() else []
    rows = (Row(**json.loads(line)) for line in lines)
    return {(row.model, row.dtype): row for row in rows}


def print_table(rows: list[Row]) -> None:
    """All rows that are not equal, and the figures by dtype."""
    console = Console(width=200)
    console.print(f"torch {torch.__version__}\n")
    table = Table("dtype", "models", "equal", "rewrites proved", "false refusals", "nothing to say", box=MARKDOWN)
    for dtype in dict.fromkeys(row.dtype for row in rows):
        those = [row for row in rows if row.dtype == dtype]
        equal = [row for row in those if row.status == "equal"]
        wrong = [row for row in those if row.status == "false refusal"]
        counts = (len(those), len(equal), sum(row.rewrites for row in those), len(wrong))
        table.add_row(dtype, *map(str, counts), str(len(those) - len(equal) - len(wrong)))
    console.print(table)
    for row in rows:
        if row.status != "equal":
            console.print(f"{row.model} {row.dtype}: {row.status} {row.detail}", soft_wrap=True, markup=False)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


if __name__ == "__main__":
    main()
