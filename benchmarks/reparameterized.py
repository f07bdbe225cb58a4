"""Does rgc merge at least what each project's own method merges? ``python -m benchmarks.reparameterized``.

Every class of timm that offers a method to re-parameterise itself is found by looking; for each, the smallest model
that has an instance of it is built, with batch norms, biases and constant parameters (LayerScale) drawn at random.
Convolutions, linear layers, batch norms and additions are counted as they are executed, independently of rgc: in the
original, in what timm's own method makes of it, and in what ``rgc.compile`` makes of it. Each result is compared with
the original in float64, so a merge that is wrong shows in its column, whoever made it.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import timm
import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rgc
from rgc.cost import Objective
from rgc.testing import randomize

#: What projects call the method that turns the training form of a module into the form for inference.
METHOD = re.compile(r"_?(reparam|fuse|switch_to_deploy|convert_to_deploy|merge_(bn|kernel|branch|conv))")

#: Kinds of operators that are counted, and ATen's names of each.
KINDS: dict[str, frozenset[str]] = {
    "conv": frozenset(
        {"convolution", "_convolution", "_convolution_mode"}
        | {f"conv{rank}d" for rank in (1, 2, 3)}
        | {f"conv_transpose{rank}d" for rank in (1, 2, 3)}
    ),
    "linear": frozenset({"linear", "addmm", "mm", "mv", "bmm", "baddbmm", "matmul", "einsum"}),
    "norm": frozenset({
        "batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
        "cudnn_batch_norm", "_batch_norm_impl_index",
    }),
    "add": frozenset({"add", "add_", "sub", "sub_", "rsub"}),
}  # fmt: skip

#: No output is further from the float64 original than this times the original's own distance, unless it is wrong.
NOISE = 50.0

#: The largest activation that a model may have: beyond it, softmax and squares amplify rounding until it hides faults.
LARGEST_ACTIVATION = 100.0

#: The forms of a model that are compared, with their titles.
FORMS = {"original": "original", "timm": "timm's own", "default": "rgc default", "all": "rgc all, depth"}


@dataclass(frozen=True)
class Result:
    """One form of a model: how often it executes each kind of operator, and how far it is from the float64 original."""

    counts: dict[str, int]
    error: float
    note: str = ""

    @property
    def total(self) -> int:
        """Convolutions, linear layers, batch norms and additions together."""
        return sum(self.counts.values())


@dataclass(frozen=True)
class Row:
    """One model: the result for each form, or why there is none."""

    model: str
    results: dict[str, Result | str]

    @property
    def verdict(self) -> str:
        """Does rgc execute fewer operators than the better of timm's own forms?"""
        own, ours = self.results.get("timm"), [self.results.get(form) for form in ("default", "all")]
        right = [result for result in ours if isinstance(result, Result)]
        if len(right) < len(ours):
            return "FAILS"
        if not isinstance(own, Result):
            return "timm's fails"
        return ", ".join(_compared(result.total, own.total) for result in right)


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="", help="only these, separated by commas")
    parser.add_argument("--timeout", type=int, default=1200, help="seconds for one model")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one model, as JSON: what the subprocesses run
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.measure:
        print(json.dumps({form: _plain(result) for form, result in measured(options.measure).items()}))
        return
    chosen = smallest_models(reparameterisable_classes())
    if options.models:
        wanted = options.models.split(",")
        chosen = {name: chosen.get(name, []) for name in wanted}
    rows = []
    for name in track(chosen, "measuring", console=Console(stderr=True)):
        rows.append(in_subprocess(name, options.timeout))
        print(f"{name}: {rows[-1].verdict}", file=sys.stderr)
    report(rows, chosen)


def reparameterisable_classes() -> list[type[nn.Module]]:
    """Every module class of timm with a method that re-parameterises it and takes no argument but itself."""
    found: dict[type[nn.Module], None] = {}
    for package in (timm.models, timm.layers):
        for entry in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            module = importlib.import_module(entry.name)
            for each in vars(module).values():
                is_new = inspect.isclass(each) and issubclass(each, nn.Module) and each.__module__ == entry.name
                if is_new and own_methods(each):
                    found[each] = None
    return sorted(found, key=lambda each: (each.__module__, each.__qualname__))


def own_methods(kind: type[nn.Module]) -> list[str]:
    """The names of the methods of a class that re-parameterise an instance: callable without an argument."""
    names = [name for name in dir(kind) if METHOD.match(name) and not hasattr(nn.Module, name)]
    return [name for name in names if _takes_no_argument(getattr(kind, name))]


def smallest_models(classes: Sequence[type[nn.Module]]) -> dict[str, list[type[nn.Module]]]:
    """The smallest registered model with an instance of each class, and the classes that it stands for.

    Models are looked for in the modules that define or import the class.
    """
    best: dict[type[nn.Module], tuple[int, str]] = {}
    modules = {name for name in sys.modules if name.startswith("timm.models.")}
    homes = {each: [m for m in modules if getattr(sys.modules[m], each.__name__, None) is each] for each in classes}
    for home in sorted({home for found in homes.values() for home in found}):
        for name in timm.list_models(module=home.rsplit(".", 1)[-1]):
            for kind, size in _contents(name, [each for each in classes if home in homes[each]]):
                best[kind] = min(best.get(kind, (size, name)), (size, name))
    rows: dict[str, list[type[nn.Module]]] = {}
    for kind, (_, name) in best.items():
        rows.setdefault(name, []).append(kind)
    rows["none"] = [each for each in classes if each not in best]
    return {name: rows[name] for name in sorted(rows) if rows[name]}


def in_subprocess(name: str, timeout: int) -> Row:
    """Measure one model in a process of its own, which gives its memory back."""
    command = [sys.executable, "-m", "benchmarks.reparameterized", "--measure", name]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return Row(name, dict.fromkeys(FORMS, f"not finished after {timeout} s"))
    if finished.returncode != 0:
        lines = finished.stderr.strip().splitlines() or [f"exit status {finished.returncode}"]
        return Row(name, dict.fromkeys(FORMS, lines[-1]))
    found = json.loads(finished.stdout.strip().splitlines()[-1])
    return Row(name, {form: Result(**each) if isinstance(each, dict) else each for form, each in found.items()})


def measured(name: str) -> dict[str, Result | str]:
    """The results of one model by form: the original, timm's own, and rgc's two."""
    model, x = prepared(name)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())

    def result(make: Callable[[], nn.Module]) -> Result | str:
        started = time.perf_counter()
        try:
            made = make()
            note = f"{time.perf_counter() - started:.1f} s"
            return Result(executed(made, x), distance(made(x), expected), note)
        except Exception as error:  # a row that says so: whatever stops one form, the others are still measured
            print(traceback.format_exc(), file=sys.stderr)
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def compiled(passes: str, objective: Objective) -> Result | str:
        return result(lambda: rgc.compile(model, x, passes=passes, objective=objective))

    with torch.no_grad():
        own = [result(partial(make, copy.deepcopy(model))) for make in own_ways(model)]
    finished = [each for each in own if isinstance(each, Result)]
    return {
        "original": result(lambda: model),
        "timm": min(finished, key=lambda each: each.total) if finished else own[0],
        "default": compiled("default", "latency"),
        "all": compiled("all", "depth"),
    }


def prepared(name: str) -> tuple[nn.Module, Tensor]:
    """The model in eval mode with weights that hide nothing, and an input at its own size."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False)
    randomize(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):  # LayerScale at 1e-5
                parameter.add_(torch.rand(parameter.shape, generator=generator) - 0.5)
    configuration: Any = model.pretrained_cfg
    size = configuration.get("input_size", (3, 224, 224))
    x = torch.randn(2, *size, generator=generator)
    for _ in range(20):
        if largest_activation(model, x) < LARGEST_ACTIVATION:
            return model, x
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.weight is not None:
                module.weight.data.mul_(0.7)
    raise RuntimeError(f"{name}: activations do not stay below {LARGEST_ACTIVATION:.0e}")


def largest_activation(model: nn.Module, x: Tensor) -> float:
    """The largest absolute value that a module returns; infinity where one is not finite."""
    largest = [0.0]

    def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            largest.append(float(output.abs().max().nan_to_num(float("inf"))))

    hooks = [module.register_forward_hook(look) for module in model.modules()]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return max(largest)


def own_ways(model: nn.Module) -> Iterator[Callable[[nn.Module], nn.Module]]:
    """What timm offers for a model: its own methods, and the helper that walks over its modules."""
    yield partial(reparameterize_model, inplace=True)
    for name in own_methods(type(model)):
        yield partial(_converted, method=name)


def executed(model: nn.Module, x: Tensor) -> dict[str, int]:
    """How often each kind of operator runs in one call of the model."""
    constants = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    # without autograd, a linear layer arrives as one call and not as the matrix product and addition inside it
    with torch.inference_mode(), _Count(constants) as count:
        model(x)
    return {kind: count.found[kind] for kind in KINDS}


class _Count(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Counts calls by kind; a product counts where one factor is a parameter, which leaves attention out."""

    def __init__(self, constants: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.constants = constants
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        kind = next((kind for kind, names in KINDS.items() if name in names), None)
        tensors = [each for each in _flat(args) if isinstance(each, Tensor)]
        if kind == "add" and sum(tensor.dim() > 0 for tensor in tensors) < 2:
            kind = None
        if kind == "linear" and not any(t.untyped_storage().data_ptr() in self.constants for t in tensors):
            kind = None
        if kind is not None:
            self.found[kind] += 1
        return func(*args, **(kwargs or {}))


def distance(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest expected value."""
    pairs = list(zip(_flat([found]), _flat([expected]), strict=True))
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)


def report(rows: Sequence[Row], chosen: dict[str, list[type[nn.Module]]]) -> None:
    """The table, and what could not be put into it."""
    console = Console(width=400, soft_wrap=True)
    console.print(f"torch {torch.__version__}, timm {timm.__version__}\n")
    table = Table("model", "classes", *FORMS.values(), "errors", "rgc executes", box=MARKDOWN)
    for row in rows:
        classes = ", ".join(dict.fromkeys(each.__qualname__ for each in chosen[row.model]))
        cells = [_cell(row.results[form]) for form in FORMS]
        errors = " / ".join(_error(row.results[form], row.results["original"]) for form in FORMS)
        table.add_row(row.model, classes, *cells, errors, row.verdict)
    console.print(table)
    for row in rows:
        for form, result in row.results.items():
            if isinstance(result, str):
                console.print(f"- {row.model}, {FORMS[form]}: {result}", markup=False)


def _converted(model: nn.Module, method: str) -> nn.Module:
    """Some methods change the model in place, some return another one."""
    result = getattr(model, method)()
    return result if isinstance(result, nn.Module) else model


def _contents(name: str, classes: Sequence[type[nn.Module]]) -> Iterator[tuple[type[nn.Module], int]]:
    """Which of the classes a model has instances of, with the model's size; its weights are never allocated."""
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    size = sum(parameter.numel() for parameter in model.parameters())
    present = {type(module) for module in model.modules()}
    yield from ((kind, size) for kind in classes if kind in present)


def _takes_no_argument(method: Any) -> bool:
    if not inspect.isfunction(method):
        return False
    _, *others = inspect.signature(method).parameters.values()
    return all(each.default is not inspect.Parameter.empty for each in others)


def _compared(ours: int, theirs: int) -> str:
    return "fewer" if ours < theirs else "equal" if ours == theirs else "MORE"


def _cell(result: Result | str) -> str:
    if isinstance(result, str):
        return "fails"
    return f"{result.total} = " + " + ".join(map(str, result.counts.values()))


def _error(result: Result | str, original: Result | str) -> str:
    if isinstance(result, str):
        return "-"
    floor = original.error if isinstance(original, Result) else 0.0
    return f"{result.error:.0e}" + (" WRONG" if not result.error <= NOISE * floor + 1e-6 else "")


def _plain(result: Result | str) -> Any:
    return result if isinstance(result, str) else asdict(result)


def _flat(structure: Iterable[Any]) -> Iterator[Any]:
    for each in structure:
        if isinstance(each, list | tuple):
            yield from _flat(each)
        else:
            yield each


if __name__ == "__main__":
    main()
