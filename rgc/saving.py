"""How do users write and read results? ``rgc.save`` proves the file before it appears, ``rgc.load`` reads it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from rgc.compiler import CompiledModule
from rgc.errors import InputError, NotEquivalentError

if TYPE_CHECKING:
    from rgc.artifact import Artifact

PathLike = str | os.PathLike[str]


def save(
    compiled: CompiledModule, path: PathLike, *, format: str | None = None, protect: Iterable[PathLike] = ()
) -> Artifact:
    """Write a compiled model as ``.pt2``, ``.onnx`` or a folder of readable Python (a path that ends in ``/``).

    What the file gives back, in onnxruntime where it is ONNX, is held against the original model before the file
    appears; it appears whole or not at all. ``format`` ("pt2", "onnx", "python") overrules the suffix; files in
    ``protect`` are never overwritten. The batch stays free, and the sizes where the compiled model leaves them free.

    Raises `InputError` for a path that cannot be written, `NotEquivalentError` for a file that is not equal.
    """
    from rgc import artifact  # the exporters take seconds to import
    from rgc.artifact_check import compare

    def check(loaded: nn.Module) -> None:
        try:
            found = compare(compiled.plan.source, loaded, compiled.example)
        except InputError as error:
            raise NotEquivalentError(f"{path}: the written file does not run: {error}; nothing is kept") from error
        if not found.equal:
            raise NotEquivalentError(f"{path}: the written file {found.reason}; nothing is kept")

    return artifact.save(
        compiled, path, format=format, example_args=compiled.example.args, example_kwargs=compiled.example.kwargs,
        free_sizes=not compiled.report.fixed_size, protect=protect, check=check,
    )  # fmt: skip


def load(path: PathLike, *, trust: bool = False) -> nn.Module:
    """Read back what `save` wrote, as a module; an ``.onnx`` file runs in onnxruntime and returns a flat list.

    ``trust`` allows what can run code: a folder (its ``model.py``), or a ``.pt2`` archive with more in it than a plain
    program. Raises `InputError` without it, and for a file that is missing or damaged.
    """
    from rgc import artifact  # the exporters take seconds to import

    return artifact.load(path, trust=trust)
