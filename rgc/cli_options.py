"""What does the user of the command line mean? Inputs, passes, and where results go, from the text of the options."""

from __future__ import annotations

import math
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rgc.artifact import choose_format
from rgc.errors import InputError
from rgc.frontend import Example
from rgc.pass_source import name_clash
from rgc.passbook import load_passes, resolve
from rgc.rewrite import Pass
from rgc.subject import example_of

_INPUT = re.compile(r"(?:(?P<name>[^\W\d]\w*)=)?(?P<shape>[1-9]\d*(?:x[1-9]\d*)*)(?::(?P<dtype>\w+))?", re.ASCII)
_INTEGERS = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
}
#: More elements than this (8 GiB in float32) are a slip of the finger.
_MOST_ELEMENTS = 2**31
#: No batch and no number of threads is larger.
_LARGEST_COUNT = 2**20
_SUFFIXES = {"pt2": ".pt2", "onnx": ".onnx", "python": "/"}
#: Parts of torchvision whose models take something else than a batch of images.
_NOT_IMAGES = ("detection", "video", "optical_flow")


@dataclass(frozen=True)
class InputSpec:
    """One input of a model as the command line describes it: a shape, an integer dtype or None, a keyword or ""."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> InputSpec:
        """``1x3x224x224``, ``mask=1x16``, ``1x16:int64``.

        >>> InputSpec.parse("tokens=1x16:int64")
        InputSpec(shape=(1, 16), dtype=torch.int64, name='tokens')
        """
        found = _INPUT.fullmatch(text.strip())
        if found is None:
            raise InputError(f"--input {text}: is no shape; write 1x3x224x224, name=1x16 or 1x16:int64")
        shape = tuple(int(size) for size in found["shape"].split("x"))
        if math.prod(shape) > _MOST_ELEMENTS:
            raise InputError(f"--input {text}: has {math.prod(shape):,} elements, more than rgc tries")
        kind = found["dtype"] or ""
        if kind and kind not in _INTEGERS:
            choices = ", ".join(_INTEGERS)
            raise InputError(f"--input {text}: {kind!r} is none of {choices}; other inputs take the dtype of the model")
        return cls(shape, _INTEGERS.get(kind), found["name"] or "")

    def draw(self, generator: torch.Generator, vocabulary: int) -> Tensor:
        """Normal values, or integers below ``vocabulary``."""
        if self.dtype is None:
            return torch.randn(self.shape, generator=generator)
        most = min(vocabulary, 2 if self.dtype is torch.bool else 128)
        return torch.randint(0, most, self.shape, generator=generator).to(self.dtype)


def parse_inputs(texts: Sequence[str]) -> tuple[InputSpec, ...]:
    """The inputs in order; `InputError` for what is no shape, and for a keyword given twice."""
    specs = tuple(map(InputSpec.parse, texts))
    names = [spec.name for spec in specs if spec.name]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"--input {repeated[0]}=...: is given twice")
    return specs


def parse_counts(option: str, text: str | None) -> tuple[int, ...] | None:
    """Positive numbers separated by commas; None where the option is left out.

    >>> parse_counts("--batch", "1,64")
    (1, 64)
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) <= _LARGEST_COUNT for part in parts):
        raise InputError(f"{option} {text}: is no positive number, nor several separated by commas")
    return tuple(dict.fromkeys(map(int, parts)))


def json_path(option: str, given: str | None) -> Path | None:
    """Where a JSON file goes; `InputError` for another suffix, and for a place that cannot be written."""
    if given is None:
        return None
    if not given.endswith(".json"):
        raise InputError(f"{option} {given}: this version writes .json files only")
    _require_writable(option, Path(given), [])
    return Path(given)


def example_for(model: nn.Module, specs: Sequence[InputSpec]) -> Example:
    """The example to trace with: what ``specs`` say, or else what the model is known to take. Seeded."""
    if not specs:
        if callable(getattr(model, "example_inputs", None)):
            return example_of(model, None)
        specs = [InputSpec((1, *_known_image_size(model)))]
    generator = torch.Generator().manual_seed(0)
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    drawn = [(spec.name, spec.draw(generator, min(tables, default=2))) for spec in specs]
    return Example(tuple(t for name, t in drawn if not name), {name: t for name, t in drawn if name})


def _known_image_size(model: nn.Module) -> tuple[int, ...]:
    """Channels, height and width that a model of timm or torchvision was made for."""
    for attribute in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, attribute, None)
        size = config.get("input_size") if isinstance(config, Mapping) else None
        if isinstance(size, tuple | list) and _is_image_size(size):
            return tuple(size)
    library, _, part = type(model).__module__.partition(".models.")
    if library == "torchvision" and part.partition(".")[0] not in _NOT_IMAGES:
        return (3, 299, 299) if part == "inception" else (3, 224, 224)
    raise InputError(f"cannot tell what {type(model).__name__} takes; say it with --input, e.g. --input 1x3x224x224")


def chosen_passes(text: str, plugins: Sequence[str]) -> list[Any]:
    """What `rgc.compile` takes as ``passes``: the names in ``text``, and every pass of the plugins.

    Runs the plugins. ``text`` may name their passes as well: ``-name`` takes one away.
    """
    added: dict[str, Pass] = {}
    for plugin in plugins:
        for each in load_plugin(plugin):
            if clash := name_clash(each):
                raise InputError(f"--plugin {plugin}: the pass {each.name} {clash}; give it another name")
            if added.setdefault(each.name, each) is not each:
                raise InputError(f"--plugin {plugin}: another plugin has a pass {each.name} too; rename one of them")
    names = [name.strip() for name in text.split(",")]
    if all(name.startswith("-") for name in names):
        names = ["default", *names]
    taken_away = {name[1:] for name in names if name[:1] == "-" and name[1:] in added}
    kept = [each for name, each in added.items() if name not in taken_away]
    passes = [*(name for name in names if name.removeprefix("-") not in added), *kept]
    resolve(passes)  # a misspelt name is found before the model is loaded
    return passes


def load_plugin(source: str, option: str = "--plugin ") -> tuple[Pass, ...]:
    """The passes of a plugin; `InputError`, with the line, for one that cannot be run. ``option``: how it was named."""
    here = os.getcwd()
    sys.path.insert(0, here)  # as `python` does, and an installed command does not
    try:
        return load_passes(source)
    except InputError:
        raise
    except Exception as error:  # it is the user's own code, which may raise anything
        line = error.lineno if isinstance(error, SyntaxError) else traceback.extract_tb(error.__traceback__)[-1].lineno
        reason = f"line {line}: {type(error).__name__}: {error}"
        raise InputError(f"{option}{source}: cannot be loaded ({reason})") from error
    finally:
        if here in sys.path:
            sys.path.remove(here)


def _is_image_size(size: Sequence[Any]) -> bool:
    """Whole numbers that make an image: a model from a file may claim anything."""
    whole = all(isinstance(n, int) and 0 < n <= _LARGEST_COUNT for n in size)
    return whole and len(size) in (2, 3, 4) and math.prod(size) <= _MOST_ELEMENTS


@dataclass(frozen=True)
class Destination:
    """Where an artifact goes and in which format, and where its report and its plan go, if anywhere."""

    artifact: Path
    format: str
    report: Path | None = None
    plan: Path | None = None

    @classmethod
    def of(
        cls, model: str, output: str | None, format: str | None, report: str | None, plan: str | None = None
    ) -> Destination:
        """What ``--output``, ``--format``, ``--report`` and ``--save-plan`` say for the model of this file or zoo name.

        Raises `InputError` where they contradict each other or name a place that cannot be written.
        """
        chosen = _format(output, format)
        path = Path(output) if output is not None else default_output(model, chosen)
        given, kept = (None if each is None else Path(each) for each in (report, plan))
        if given is not None and given.suffix != ".json":
            raise InputError(f"--report {report}: this version writes .json reports only")
        if kept is not None and kept.suffix != ".json":
            raise InputError(f"--save-plan {plan}: a plan is written as .json")
        taken = [("the input", Path(model))]
        for option, place, what in (
            ("--output", path, "the artifact"), ("--report", given, "the report"), ("--save-plan", kept, "the plan"),
        ):  # fmt: skip
            if place is not None:
                _require_writable(option, place, taken)
                taken.append((what, place))
        return cls(path, chosen, given, kept)


def default_output(model: str, format: str) -> Path:
    """Beside the input: ``model.pt`` gives ``model.fused.pt2``; a model of the zoo goes to the working directory.

    >>> str(default_output("runs/model.pt", "onnx")), str(default_output("zoo:repvgg_a0", "pt2"))
    ('runs/model.fused.onnx', 'repvgg_a0.fused.pt2')
    """
    suffix = "" if format == "python" else _SUFFIXES[format]
    if model.startswith("zoo:"):
        return Path(f"{model.removeprefix('zoo:')}.fused{suffix}")
    return Path(model).with_name(f"{Path(model).stem}.fused{suffix}")


def _format(output: str | None, given: str | None) -> str:
    if output is None:
        return given or "pt2"
    if given is None:
        return choose_format(output)
    ends = next((kind for kind, suffix in _SUFFIXES.items() if output.lower().endswith(suffix)), given)
    if ends != given:
        raise InputError(f"--format {given} contradicts --output {output}, which ends as {ends} does; leave one out")
    return given


def _require_writable(option: str, place: Path, taken: Sequence[tuple[str, Path]]) -> None:
    if place.name in ("", ".."):
        raise InputError(f"{option} {place}: names no file or folder to make")
    folder = place.absolute().parent
    if not folder.is_dir():
        raise InputError(f"{option} {place}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{option} {place}: the folder {folder} is not writable")
    if place.suffix == ".json" and place.is_dir():
        raise InputError(f"{option} {place}: is a folder")
    for what, path in taken:
        if place.resolve() == path.resolve():
            raise InputError(f"{option} {place}: is {what} itself; choose another path")
