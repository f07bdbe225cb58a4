"""How do users write and read results? ``rgc.save`` proves the file before it appears, ``rgc.load`` reads it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from rgc.certificate import (
    SEEDS,
    Certificate,
    Check,
    Original,
    described,
    drawn,
    made_of,
    preconditions,
    versions,
)
from rgc.compiler import CompiledModule, error_bound
from rgc.errors import InputError, NotEquivalentError
from rgc.subject import floating_dtype

if TYPE_CHECKING:
    from rgc.artifact import Artifact

PathLike = str | os.PathLike[str]


def save(
    compiled: CompiledModule, path: PathLike, *, format: str | None = None, protect: Iterable[PathLike] = ()
) -> Artifact:
    """Write a compiled model as ``.pt2``, ``.onnx`` or a folder of readable Python (a path that ends in ``/``).

    What the file gives back, in onnxruntime where it is ONNX, is held against the original model before the file
    appears; it appears whole or not at all, and its certificate (`rgc.certificate`) beside it or in the folder.
    ``format`` ("pt2", "onnx", "python") overrules the suffix; files in ``protect`` are never overwritten. The batch
    stays free, and the sizes where the compiled model leaves them free.

    Raises `InputError` for a path that cannot be written, `NotEquivalentError` for a file that is not equal.
    """
    return save_from(compiled, path, None, format=format, protect=protect)


def save_from(
    compiled: CompiledModule, path: PathLike, source: Path | None, *, format: str | None, protect: Iterable[PathLike]
) -> Artifact:
    """`save` of a model that came from the file ``source``, which the certificate names."""
    from rgc import artifact  # the exporters take seconds to import
    from rgc.artifact_check import compare

    def check(loaded: nn.Module) -> None:
        try:
            found = compare(compiled.plan.source, loaded, compiled.example)
        except InputError as error:
            raise NotEquivalentError(f"{path}: the written file does not run: {error}; nothing is kept") from error
        if not found.equal:
            raise NotEquivalentError(f"{path}: the written file {found.reason}; nothing is kept")

    def certify(loaded: nn.Module, files: Path, kind: str) -> str:
        return _certificate(compiled, loaded, files, kind, source).to_json()

    return artifact.save(
        compiled, path, format=format, example_args=compiled.example.args, example_kwargs=compiled.example.kwargs,
        free_sizes=not compiled.report.fixed_size, protect=protect, check=check, certify=certify,
    )  # fmt: skip


def _certificate(
    compiled: CompiledModule, loaded: nn.Module, files: Path, kind: str, source: Path | None
) -> Certificate:
    report, options = compiled.report, compiled.plan.options
    dtype = floating_dtype(compiled, compiled.example)
    remarks, inputs, checks = [], None, []
    try:
        inputs = described(compiled.example)
        checks = _checks(compiled, loaded, inputs)
    except InputError as error:
        remarks.append(f"the artifact was compared on inputs drawn from the example only: {error}")
    conditions = [f"{each.condition} ({each.rewrite} at {each.where})" for each in report.rewrites if each.condition]
    return Certificate(
        original=Original.of(compiled.plan.source, source),
        artifact=made_of(files, kind),
        options={
            "passes": report.passes, "objective": report.objective, "target": report.target,
            "dtype": str(dtype).removeprefix("torch."), "verify": options.verify, "strict": options.strict,
            "fixed_size": report.fixed_size,
        },
        rewrites=report.rewrites,
        undone=report.failures,
        verification=report.verification,
        bound=report.bound or error_bound(compiled),
        preconditions=(*preconditions(dtype, report.fixed_size, conditions), *remarks),
        inputs=inputs,
        checks=checks,
        versions=versions(kind),
    )  # fmt: skip


def _checks(compiled: CompiledModule, loaded: nn.Module, inputs: dict[str, Any]) -> list[Check]:
    """The errors of the written file on the inputs of each seed that the original takes."""
    from rgc.artifact_check import compare_each

    found = compare_each(compiled.plan.source, loaded, [drawn(inputs, seed) for seed in SEEDS])
    checks = []
    for seed, each in zip(SEEDS, found, strict=True):
        if each is not None and not each.equal:
            raise NotEquivalentError(f"the written file {each.reason} (seed {seed}); nothing is kept")
        if each is not None:
            checks.append(Check(seed, each.deployed_error, each.original_error, each.allowed_error))
    return checks


def load(path: PathLike, *, trust: bool = False) -> nn.Module:
    """Read back what `save` wrote, as a module; an ``.onnx`` file runs in onnxruntime and returns a flat list.

    ``trust`` allows what can run code: a folder (its ``model.py``), or a ``.pt2`` archive with more in it than a plain
    program. Raises `InputError` without it, and for a file that is missing or damaged.
    """
    from rgc import artifact  # the exporters take seconds to import

    return artifact.load(path, trust=trust)
