"""Does every model compile and stay equal? ``python -m benchmarks.reach [--only PATTERN] [--resume]``.

Every model of ``torchvision.models.list_models()`` and the smallest model of each module of ``timm.models``, with
random weights (`rgc.testing.randomize`) and the smallest sensible input, each in a process of its own with a limit on
time and memory. A row says by which tier the model was traced, what is left of its operators and of its batch norms,
how many operators passed through untouched, and how far the result is from the original. Rows are kept in a JSON lines
file as they come; ``--resume`` goes on where an earlier run has stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import rgc
from rgc.errors import RgcError
from rgc.example import Example, output_difference
from rgc.report import Report
from rgc.testing import randomize

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rgc"

#: Heights and widths that are tried in turn where a model does not say what it takes.
SIZES = (64, 96, 128, 160, 192, 224, 240, 256, 299, 331, 384, 448, 512, 1024)


@dataclass(frozen=True)
class Row:
    """What became of one model."""

    model: str
    status: str  # "equal", or what went wrong
    input: str = ""
    tier: str = ""
    before: int = 0
    after: int = 0
    batch_norms: int = 0  # eval batch norms in the result ...
    unexplained: tuple[str, ...] = ()  # ... those of them that no refusal and no note names
    opaque: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    error: float | None = None
    notes: tuple[str, ...] = ()
    settled: bool | None = None  # compiling the result again changes nothing (None: not tried)


def main() -> None:
    """Print the table as Markdown; progress goes to stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="models whose name this regular expression finds")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the results file has already")
    parser.add_argument("--results", type=Path, default=CACHE / "reach.jsonl", metavar="FILE")
    parser.add_argument("--seconds", type=float, default=900.0, help="the longest that one model may take")
    parser.add_argument("--gigabytes", type=float, default=12.0, help="the most memory that one model may take")
    parser.add_argument("--twice", action="store_true", help="also compile the result again: nothing may change")
    parser.add_argument("--one", metavar="MODEL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(asdict(measured(options.one, options.twice))))
        return
    names = [name for name in every_model() if re.search(options.only, name)]
    rows = _read(options.results) if options.resume or options.only else {}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    todo = [name for name in names if not (options.resume and name in rows)]
    for name in track(todo, "compiling", console=Console(stderr=True)):
        rows[name] = isolated(name, options.seconds, options.gigabytes, options.twice)
        print(f"{name}: {rows[name].status}", file=sys.stderr)
        options.results.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows.values()))
    print_table([rows[name] for name in names if name in rows])


# --- which models ------------------------------------------------------------------------------------------------


def every_model() -> list[str]:
    """The names of all models, small ones first; those of timm with ``timm/`` before them."""
    sizes = _sizes()
    return sorted(sizes, key=lambda name: (sizes[name], name))


def _sizes() -> dict[str, int]:
    """Elements of the parameters by model. It takes minutes to build them all, so it is kept for these versions."""
    kept = CACHE / f"reach-sizes-{torchvision.__version__}-{timm.__version__}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    sizes = {name: _size(partial(_torchvision_model, name)) for name in torchvision.models.list_models()}
    for module in track(timm.list_modules(), "looking for the smallest models", console=Console(stderr=True)):
        every = {name: _size(partial(timm.create_model, name)) for name in timm.list_models(module=module)}
        if every:
            smallest = min(every, key=every.__getitem__)
            sizes[f"timm/{smallest}"] = every[smallest]
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(sizes))
    return sizes


#: The place in the order for models that cannot be built without memory: in the middle.
UNKNOWN_SIZE = 30_000_000


def _size(build: Callable[[], nn.Module]) -> int:
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sum(parameter.numel() for parameter in build().parameters())
    except (RuntimeError, NotImplementedError, TypeError, ValueError):  # its constructor computes with values
        return UNKNOWN_SIZE


def _torchvision_model(name: str, **options: Any) -> nn.Module:
    if name.startswith("quantized_"):
        module = torchvision.models.quantization
        build: Callable[..., nn.Module] = getattr(module, name.removeprefix("quantized_"))
        return build(weights=None, quantize=False, **options)  # the float model; int8 layers have no float form
    kind = _torchvision_kind(name)
    if kind in ("detection", "segmentation"):
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    model: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    return model


def _torchvision_kind(name: str) -> str:
    """The subpackage: "detection", "segmentation", "video", "optical_flow", or "models" for classification."""
    return str(torchvision.models.get_model_builder(name).__module__.split(".")[2])


# --- one model ---------------------------------------------------------------------------------------------------


def build(name: str) -> tuple[nn.Module, Example]:
    """The model with random weights, and the smallest input that it takes."""
    torch.manual_seed(0)
    if name.startswith("timm/"):
        return _smallest(lambda **options: timm.create_model(name.removeprefix("timm/"), **options), "img_size")
    kind = _torchvision_kind(name)
    if kind == "detection":
        return randomize(_torchvision_model(name, **_DETECTORS.get(name.split("_")[0], {}))), Example(([_image(96)],))
    if kind == "optical_flow":
        return randomize(_torchvision_model(name)), Example((_images(128), _images(128)), {"num_flow_updates": 2})
    if kind == "video":
        shape = _VIDEO.get(name.split("_")[0], (3, 4, 32, 32))
        return randomize(_torchvision_model(name)), Example((torch.randn(1, *shape),))
    option = {"vit": "image_size", "maxvit": "input_size"}.get(name.split("_")[0], "")
    return _smallest(lambda **options: _torchvision_model(name, **options), option)


_SMALL: dict[str, Any] = {"min_size": 96, "max_size": 128}
_DETECTORS: dict[str, dict[str, Any]] = dict.fromkeys(
    ["fasterrcnn", "maskrcnn", "keypointrcnn", "fcos", "retinanet"], _SMALL
)
_VIDEO: dict[str, tuple[int, ...]] = {
    "s3d": (3, 16, 224, 224),  # its last pooling is over 2 x 7 x 7
    "mvit": (3, 16, 224, 224),  # its positions are those of this size
}


def _smallest(make: Callable[..., nn.Module], option: str) -> tuple[nn.Module, Example]:
    """The model at the first of `SIZES` that it takes, told of the size by ``option`` where it has such a one."""
    fixed: nn.Module | None = None
    for size in SIZES:
        try:
            if fixed is None:
                given = (size, size) if option == "input_size" else size
                model = randomize(make(**{option: given} if option else {}))
                fixed = None if option else model
            else:
                model = fixed
        except TypeError:
            if not option:
                raise
            option = ""
            model = fixed = randomize(make())
        except (AssertionError, ValueError, RuntimeError, IndexError, ZeroDivisionError):
            continue  # it cannot be built for this size
        try:
            example = Example((_images(size),))
            example.run(model)
        except (AssertionError, ValueError, RuntimeError, IndexError, ZeroDivisionError):
            continue
        return model, example
    raise ValueError(f"the model takes none of the sizes {', '.join(map(str, SIZES))}")


def _images(size: int) -> Tensor:
    return torch.randn(1, 3, size, size)


def _image(size: int) -> Tensor:
    return torch.rand(3, size, size)


def measured(name: str, twice: bool) -> Row:
    """Compile the model, in this process."""
    model, example = build(name)
    shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in example.tensors)
    started = time.perf_counter()
    try:
        compiled = rgc.compile(model, example)
    except RgcError as error:
        return Row(name, f"{type(error).__name__}: {error}", shapes, seconds=time.perf_counter() - started)
    report, seconds = compiled.report, time.perf_counter() - started
    again = rgc.compile(compiled, example).report if twice else None
    proof = report.verification
    status = "equal" if proof is not None and proof.equal else "not proved"
    # the proof compared them on copies; once more, as a user would
    difference = output_difference(example.run(model), example.run(compiled))
    if status == "equal" and proof is not None and difference > 2 * proof.allowed_error:
        status = f"differs by {difference:.1e} as it is called"
    paths = [path for path, module in compiled.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return Row(
        name, status, shapes, report.tier, report.ops_before.total(), report.ops_after.total(), len(paths),
        tuple(path for path in paths if not is_explained(path, report)), dict(report.opaque),
        seconds, report.max_error, tuple(report.notes),
        None if again is None else not again.rewrites and again.ops_after == report.ops_after,
    )  # fmt: skip


def is_explained(path: str, report: Report) -> bool:
    """Does a refusal name the layer at ``path`` of the compiled model, or a note the part in which it was kept?"""
    if report.tier == "submodules":
        path = path.removeprefix("model.")
        compiled = report.notes[-1].partition("compiled in place: ")[2].split(", ")
        if not any(path.startswith(f"{part}.") for part in compiled):
            return True
    named = {part for refused in report.refusals for part in refused.where.split(" + ")}
    return path in named or any(re.fullmatch(re.escape(each) + r"_\d+", path) for each in named)


def isolated(name: str, seconds: float, gigabytes: float, twice: bool) -> Row:
    """`measured` in a process of its own."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 2**30),) * 2)

    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.reach", "--one", name, *(["--twice"] * twice)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, preexec_fn=limit, env=environment
        )
    except subprocess.TimeoutExpired:
        return Row(name, f"takes longer than {seconds:.0f} s", seconds=seconds)
    if done.returncode == 0:
        return _row(done.stdout.strip().splitlines()[-1])
    reason = (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]
    return Row(name, f"fails: {reason[:200]}", seconds=time.perf_counter() - started)


def _row(line: str) -> Row:
    read = json.loads(line)
    return Row(**{**read, "unexplained": tuple(read["unexplained"]), "notes": tuple(read["notes"])})


def _read(results: Path) -> dict[str, Row]:
    lines: Iterator[str] = iter(results.read_text().splitlines() if results.exists() else [])
    return {row.model: row for row in map(_row, lines)}


# --- the table ---------------------------------------------------------------------------------------------------


def print_table(rows: list[Row]) -> None:
    """The rows, those with trouble first, and a summary."""
    console = Console(width=200)
    console.print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}\n")
    console.print(summary(rows) + "\n")
    table = Table(
        "model", "input", "status", "tier", "operators", "batch norms left", "untouched", "seconds", "max error",
        box=MARKDOWN,
    )  # fmt: skip
    for row in sorted(rows, key=lambda row: row.model):
        left = f"{row.batch_norms}" + (f" ({len(row.unexplained)} unexplained)" if row.unexplained else "")
        counts = f"{row.before} -> {row.after}" if row.tier else ""
        error = "" if row.error is None else f"{row.error:.0e}"
        untouched = str(sum(row.opaque.values()))
        table.add_row(row.model, row.input, row.status, row.tier, counts, left, untouched, f"{row.seconds:.0f}", error)
    console.print(table)


def summary(rows: list[Row]) -> str:
    """How many models, how many equal, by which tier."""
    tiers = Counter(row.tier for row in rows if row.tier)
    equal = sum(row.status == "equal" for row in rows)
    by_tier = ", ".join(f"{tier} {count}" for tier, count in tiers.most_common())
    unexplained = sum(len(row.unexplained) for row in rows)
    left = sum(row.batch_norms for row in rows)
    return f"{equal} of {len(rows)} equal; {by_tier}; {left} batch norms left, {unexplained} without a reason"


if __name__ == "__main__":
    main()
