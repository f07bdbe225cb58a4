"""How do models get in, and artifact and report out, of the command line? Both files are written, or neither."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from rgc.archive import is_archive
from rgc.artifact import Artifact, choose_format, load
from rgc.cli_options import Destination
from rgc.compiler import CompiledModule
from rgc.errors import InputError
from rgc.limits import Limits
from rgc.loading import load_model
from rgc.plan_file import plan_text
from rgc.pt2_inspection import reason_to_distrust
from rgc.saving import save_from
from rgc.workshop import publish, workshop, write_whole


def load_original(source: str, arch: str | None, trust: bool, limits: Limits) -> nn.Module:
    """The model; one of the zoo in eval mode (it has no training to lose), always with the same weights."""
    if not source.startswith("zoo:"):
        return load_model(source, arch=arch, trust=trust, limits=limits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return load_model(source, arch=arch, trust=trust, limits=limits).eval()


def load_artifact(artifact: str, trust: bool, limits: Limits) -> nn.Module:
    """An artifact; `InputError`, with the option that permits it, where loading it could run code."""
    path, kind = Path(artifact), choose_format(artifact)
    if path.is_file() and path.stat().st_size > limits.memory:
        raise InputError(f"{artifact}: is larger than the {limits.in_words} that are read (--limit memory=)")
    reason = None if trust else _reason_to_distrust(path, kind)
    if reason is not None:
        raise InputError(f"{artifact}: {reason}; add --trust if you trust where it came from")
    return load(path, trust=trust, format=kind)


def load_compiled(source: str, trust: bool, limits: Limits) -> nn.Module:
    """What is to be compared with an original: an artifact, or any model that `load_original` takes."""
    if source.startswith("zoo:") or Path(source).suffix.lower() in (".pt", ".pth"):
        return load_original(source, None, trust, limits)
    return load_artifact(source, trust, limits)


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all; `InputError` where it cannot be written."""
    with _written(path):
        write_whole(path, text)


def write(compiled: CompiledModule, destination: Destination, source: str) -> Artifact:
    """Artifact, report and plan, or none; ``source``, where the model came from, is never overwritten."""
    file = None if source.startswith("zoo:") else Path(source)
    protect = () if file is None else (file,)
    texts: dict[Path, str] = {}
    if destination.report is not None:
        texts[destination.report] = compiled.report.to_json() + "\n"
    if destination.plan is not None:
        texts[destination.plan] = plan_text(compiled.plan)
    with contextlib.ExitStack() as drafting:
        drafts = {path: _draft(drafting, path, text) for path, text in texts.items()}
        written = save_from(compiled, destination.artifact, file, format=destination.format, protect=protect)
        for path, draft in drafts.items():
            with _written(path):
                publish(draft, path)
    return written


def _draft(drafting: contextlib.ExitStack, path: Path, text: str) -> Path:
    with _written(path):
        draft = drafting.enter_context(workshop(path.absolute().parent)) / path.name
        draft.write_text(text)
        return draft


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    """`InputError` where the file cannot be written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _reason_to_distrust(path: Path, kind: str) -> str | None:
    if kind == "python" and path.exists():
        return "holds Python code, which loading runs"
    if kind == "pt2" and path.is_file() and is_archive(io.BytesIO(content := path.read_bytes())):
        reason = reason_to_distrust(content)
        return None if reason is None else f"loading it could run code ({reason})"
    return None
