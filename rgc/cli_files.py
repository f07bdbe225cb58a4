"""How do models get in, and artifact and report out, of the command line? Both files are written, or neither."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import nn

from rgc.artifact import Artifact, choose_format, load, save
from rgc.artifact_check import compare
from rgc.cli_options import Destination
from rgc.compiler import CompiledModule
from rgc.errors import InputError, NotEquivalentError
from rgc.loading import load_model
from rgc.pt2_inspection import reason_to_distrust


def load_original(source: str, arch: str | None, trust: bool) -> nn.Module:
    """The model; one of the zoo in eval mode (it has no training to lose), always with the same weights."""
    if not source.startswith("zoo:"):
        return load_model(source, arch=arch, trust=trust)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return load_model(source, arch=arch, trust=trust).eval()


def load_artifact(artifact: str, trust: bool) -> nn.Module:
    """An artifact; `InputError`, with the option that permits it, where loading it could run code."""
    path, kind = Path(artifact), choose_format(artifact)
    distrusted = not trust and path.exists()
    if distrusted and kind == "python":
        raise InputError(
            f"{artifact}: holds Python code, which loading runs; add --trust if you trust where it came from"
        )
    if (
        distrusted
        and kind == "pt2"
        and path.is_file()
        and (reason := reason_to_distrust(path.read_bytes())) is not None
    ):
        raise InputError(
            f"{artifact}: loading it could run code ({reason}); add --trust if you trust where it came from"
        )
    return load(path, trust=trust, format=kind)


def write(compiled: CompiledModule, original: nn.Module, destination: Destination, source: str) -> Artifact:
    """Artifact and report, or neither. What the artifact's file gives back is held against the original first.

    ``source`` is where the original came from, which is never overwritten.
    """
    path = destination.artifact

    def check(loaded: nn.Module) -> None:
        try:
            found = compare(original, loaded, compiled.example)
        except InputError as error:
            raise NotEquivalentError(f"{path}: the written file does not run: {error}; nothing is kept") from error
        if not found.equal:
            raise NotEquivalentError(f"{path}: the written file {found.reason}; nothing is kept")

    draft = None if destination.report is None else _draft(destination.report, compiled.report.to_json())
    try:
        written = save(
            compiled, path, format=destination.format, protect=() if source.startswith("zoo:") else (source,), check=check,
            example_args=compiled.example.args, example_kwargs=compiled.example.kwargs,
            free_sizes=not compiled.report.fixed_size,
        )  # fmt: skip
        if draft is not None and destination.report is not None:
            os.replace(draft, destination.report)
            draft = None
        return written
    finally:
        if draft is not None:
            draft.unlink(missing_ok=True)


def _draft(path: Path, text: str) -> Path:
    """A file beside ``path`` with this text, to be renamed."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.absolute().parent, prefix=".rgc-", delete=False) as file:
            file.write(text + "\n")
            return Path(file.name)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
