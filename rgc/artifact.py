"""How does a compiled model become a file, and come back?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rgc.certificate import FILE, certificate_of, is_certificate
from rgc.errors import InputError
from rgc.onnx_artifact import PROTOBUF_LIMIT, OnnxModel, weights_beside, write_onnx
from rgc.pt2_artifact import read_pt2, write_pt2
from rgc.python_artifact import MODEL_FILE, WEIGHTS_FILE, read_folder, write_folder
from rgc.workshop import publish, workshop

PathLike = str | os.PathLike[str]
FORMATS = ("pt2", "onnx", "python")


@dataclass(frozen=True)
class Artifact:
    """What was written: where, as what, which input dimensions are free in it, and remarks for the user.

    ``free_dimensions`` holds entries such as ``"x[0]"``; it is None for a Python folder, which fixes none.
    """

    path: Path
    format: str
    free_dimensions: tuple[str, ...] | None
    notes: tuple[str, ...] = ()


def save(
    module: nn.Module,
    path: PathLike,
    *,
    example_args: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    free_sizes: bool = False,
    format: str | None = None,
    protect: Iterable[PathLike] = (),
    check: Callable[[nn.Module], None] | None = None,
    certify: Callable[[nn.Module, Path, str], str] | None = None,
    size_limit: int = PROTOBUF_LIMIT,
) -> Artifact:
    """Write a compiled model to ``path``: ``.pt2``, ``.onnx``, or a folder (a trailing ``/``) of readable Python.

    The artifact appears whole or not at all. Before it appears it is loaded back and handed to ``check``, which may
    raise to prevent it. ``certify`` is given what was loaded back, the path of the files and the format, and returns
    the certificate that appears with them. ``size_limit`` is the size in bytes beyond which an ONNX model keeps its
    weights in a second file. Raises InputError if the format is unknown, the model cannot be expressed in it, the path
    cannot be written, is listed in ``protect``, or is a folder that holds anything but an earlier artifact.
    """
    kind = choose_format(path, format)
    target = Path(path)
    _refuse_unsafe_target(target, kind, protect)
    kwargs = dict(example_kwargs or {})
    try:
        with workshop(target.absolute().parent) as place:
            draft = place / target.name
            old_data = weights_beside(target) if kind == "onnx" else None
            data_name = next(path.name for path in data_files(target) if path != old_data)
            if kind == "python":
                free_dimensions, notes = None, write_folder(module, draft)
            elif kind == "pt2":
                exported = write_pt2(module, draft, example_args, kwargs, free_sizes=free_sizes)
                free_dimensions, notes = exported.free_dimensions, exported.notes
            else:
                exported = write_onnx(
                    module, draft, example_args, kwargs,
                    free_sizes=free_sizes, size_limit=size_limit, data_name=data_name,
                )  # fmt: skip
                free_dimensions, notes = exported.free_dimensions, exported.notes
            loaded = None if check is None and certify is None else load(draft, trust=True, format=kind)
            if check is not None and loaded is not None:
                check(loaded)
            if certify is not None and loaded is not None:
                certificate_of(draft, kind).write_text(certify(loaded, draft, kind))
            del loaded
            _publish(draft, target, kind, old_data)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from error
    return Artifact(target, kind, free_dimensions, notes)


def load(path: PathLike, *, trust: bool = False, format: str | None = None) -> nn.Module:
    """Read an artifact back as a callable module; ``.onnx`` gives an OnnxModel, which returns a flat list.

    Raises InputError if it is missing or malformed, or if loading it would run code and ``trust`` is False: a folder
    always does (its ``model.py``), a ``.pt2`` archive unless it holds nothing but a plain exported program.
    """
    kind = choose_format(path, format)
    source = Path(path)
    if not source.exists():
        raise InputError(f"{source} does not exist")
    if kind == "pt2":
        return read_pt2(source, trust=trust)
    if kind == "onnx":
        return OnnxModel(source)
    if not trust:
        raise InputError(f"loading {source} runs its {MODEL_FILE}; load it only if you trust where it came from")
    return read_folder(source)


def choose_format(path: PathLike, format: str | None = None) -> str:
    """The format that ``path`` asks for: "pt2", "onnx" or "python".

    >>> choose_format("model.onnx"), choose_format("out/")
    ('onnx', 'python')
    >>> choose_format("model.h5")
    Traceback (most recent call last):
    rgc.errors.InputError: cannot tell the format of model.h5: use a path that ends in .pt2, .onnx or /
    """
    if format is not None:
        if format not in FORMATS:
            raise InputError(f"unknown format {format!r}: use {', '.join(FORMATS)}")
        return format
    text = os.fspath(path)
    if text.endswith(("/", os.sep)) or Path(text).is_dir():
        return "python"
    suffix = Path(text).suffix.lower()
    if suffix not in (".pt2", ".onnx"):
        raise InputError(f"cannot tell the format of {text}: use a path that ends in .pt2, .onnx or /")
    return suffix[1:]


def _refuse_unsafe_target(target: Path, kind: str, protect: Iterable[PathLike]) -> None:
    """Nothing but an earlier artifact may be overwritten, and never a file that the caller still needs."""
    written = {
        target.resolve(),
        certificate_of(target, kind).resolve(),
        *(path.resolve() for path in data_files(target) if kind == "onnx"),
    }
    for protected in (Path(entry).resolve() for entry in protect):
        if protected in written or (kind == "python" and target.resolve() in protected.parents):
            raise InputError(f"{target} would overwrite {protected}, which is an input; choose another path")
    if kind != "python":
        if target.is_dir():
            raise InputError(f"{target} is a folder; a {kind} artifact is a file")
        certificate = certificate_of(target, kind)
        if certificate.exists() and not is_certificate(certificate):
            raise InputError(f"{certificate} is no certificate of rgc, and would be overwritten; choose another path")
        return
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; a Python artifact is a folder")
    strangers = {entry.name for entry in target.iterdir()} if target.exists() else set()
    if strangers := strangers - {MODEL_FILE, WEIGHTS_FILE, FILE, "__pycache__"}:
        raise InputError(f"{target} holds other files ({min(strangers)}); choose a new or empty folder")


def _publish(draft: Path, target: Path, kind: str, old_data: Path | None) -> None:
    """Let the draft appear; the weights of an ONNX model first, under a name that the old model does not use.

    A certificate goes before the artifact that it describes is replaced, and comes after the new one, so that at no
    moment one lies beside what it does not describe. That of a folder is in it, and appears with the rest.
    """
    new_data = [target.with_name(data.name) for data in data_files(draft) if data.exists()]
    old_certificate = None if kind == "python" else _taken(certificate_of(target, kind))
    try:
        for data in new_data:
            publish(draft.with_name(data.name), data)
        publish(draft, target)
    except BaseException:
        for data in new_data:
            data.unlink(missing_ok=True)
        if old_certificate is not None:
            certificate_of(target, kind).write_bytes(old_certificate)
        raise
    if old_data is not None:
        old_data.unlink(missing_ok=True)
    if kind != "python" and (certificate := certificate_of(draft, kind)).exists():
        publish(certificate, certificate_of(target, kind))


def _taken(path: Path) -> bytes | None:
    """What the file held, which is gone now."""
    if not path.exists():
        return None
    content = path.read_bytes()
    path.unlink()
    return content


def data_files(path: Path) -> tuple[Path, Path]:
    """Where the weights of an ONNX model beyond protobuf's limit may be: a new pair must not share them with an old."""
    return path.with_name(f"{path.name}.data"), path.with_name(f"{path.name}.data2")
