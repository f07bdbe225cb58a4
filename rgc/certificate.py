"""What can be handed on with an artifact, so that somebody else can check it from nothing? Its certificate, as JSON.

It lies beside the artifact (``model.onnx.certificate.json``; ``certificate.json`` inside a folder) and says of what the
artifact was made, how, on what evidence, and under which conditions: nothing that was not checked, and no time, path or
value, so that the same compilation gives the same certificate. `Certificate.require_files` and `require_original` tell
whether it belongs to given files and a given model; `draw` makes the inputs on which the two have to agree again.

The fields, in the order in which they are written:

    kind, format    "rgc certificate" and the number of this list of fields, 1
    original        file and sha256 (null for a model in memory), model (its class), weights and architecture (digests)
    artifact        format ("pt2", "onnx", "python"), files: name, bytes and sha256 of each
    options         those of `rgc.compile`: passes, objective, target, dtype, verify, strict, fixed_size
    rewrites        every firing: rewrite, where, evidence (its class), max_error, result, sources, condition, macs
    undone          firings that a check refused: rewrite, where, reason
    verification    of the compiled model against the original: as `rgc.Verification`
    bound           of rounding: as `rgc.ErrorBound`; null where the original does not run in float64
    preconditions   what is taken for granted
    inputs          args and kwargs of a call: tensors (shape, dtype; low and high of integers) and plain values
    checks          for each seed the errors of the artifact, as loaded from its files, on inputs drawn by it
    versions        of rgc, python, torch, numpy, and of onnx and onnxruntime where they were used
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from rgc.errors import InputError, NotEquivalentError
from rgc.example import Example
from rgc.report import ErrorBound, Failure, Firing, Verification

KIND, FORMAT = "rgc certificate", 1
#: The seeds of the inputs on which an artifact and its original are compared again.
SEEDS = (0, 1, 2)
#: Inside of a folder.
FILE = "certificate.json"
#: No certificate is larger, and no input that one describes.
_MOST_BYTES, _MOST_ELEMENTS = 2**26, 2**31
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


@dataclass(frozen=True)
class FileDigest:
    """A file of an artifact: its name in the folder of the artifact, its size in bytes, and its SHA-256."""

    name: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, name: str = "") -> FileDigest:
        """The digest of what a file holds now; `InputError` where it cannot be read."""
        try:
            with path.open("rb") as file:
                return cls(name or path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


@dataclass(frozen=True)
class Original:
    """Which model an artifact was made of: its file, if it came from one, its class, its weights and its layers."""

    file: str | None
    sha256: str | None
    model: str
    weights: str
    architecture: str

    @classmethod
    def of(cls, model: nn.Module, file: Path | None = None) -> Original:
        """The identity of ``model``, which ``file`` holds."""
        digest = None if file is None else FileDigest.of(file)
        return cls(
            None if digest is None else digest.name, None if digest is None else digest.sha256,
            type(model).__name__, weights_digest(model), architecture_digest(model),
        )  # fmt: skip


@dataclass(frozen=True)
class Made:
    """The files of an artifact and their format."""

    format: str
    files: tuple[FileDigest, ...]


@dataclass(frozen=True)
class Check:
    """The errors of an artifact on the inputs of a seed; as in `rgc.Verification`."""

    seed: int
    deployed_error: float
    original_error: float
    allowed_error: float


@dataclass(frozen=True)
class Certificate:
    """What is known of an artifact; the fields as in the list above."""

    original: Original
    artifact: Made
    options: Mapping[str, Any]
    rewrites: Sequence[Firing]
    undone: Sequence[Failure]
    verification: Verification | None
    bound: ErrorBound | None
    preconditions: Sequence[str]
    inputs: Mapping[str, Any] | None
    checks: Sequence[Check]
    versions: Mapping[str, str]

    def to_json(self) -> str:
        """The certificate as text, always in the same order."""
        return json.dumps({"kind": KIND, "format": FORMAT, **_plain(self)}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Certificate:
        """A certificate from its file; `InputError`, one line, for what is none, damaged, or of a later version."""
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise InputError(f"{path}: is too large for a certificate")
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
        try:
            data = json.loads(content.decode())
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: is damaged or no certificate ({type(error).__name__}: {error})") from error
        if not isinstance(data, dict) or data.pop("kind", None) != KIND:
            raise InputError(f"{path}: is no certificate of rgc; name the .certificate.json beside the artifact")
        if (version := data.pop("format", None)) != FORMAT:
            raise InputError(f"{path}: is a certificate of format {version!r}; this rgc reads {FORMAT}: update rgc")
        try:
            made: Certificate = _built(cls, data, "")
            _require_plain_names(made.artifact.files)
            if made.inputs is not None:
                if made.inputs.keys() != {"args", "kwargs"}:
                    raise ValueError("inputs are not args and kwargs")
                _require_described({"list": made.inputs["args"]})
                _require_described({"dict": made.inputs["kwargs"]})
            return made
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{path}: is damaged: {error}; compile again") from error

    def require_files(self, artifact: Path) -> None:
        """`NotEquivalentError`, with the name of the file, unless these are the very files that were certified."""
        kind = self.artifact.format
        if artifact.is_dir() != (kind == "python"):
            raise NotEquivalentError(f"{artifact}: is no {kind} artifact, as the certificate describes it")
        for index, known in enumerate(self.artifact.files):
            # The first file of the others is the one that the user names, however it is called by now.
            path = (
                artifact
                if kind != "python" and index == 0
                else (artifact.parent, artifact)[kind == "python"] / known.name
            )
            if not path.is_file():
                raise NotEquivalentError(f"{path}: is missing, though the certificate describes it")
            found = FileDigest.of(path).sha256
            if found != known.sha256:
                raise NotEquivalentError(f"{path}: {_differs('is not the file', found, known.sha256)}")
        names = (
            {path.relative_to(artifact).as_posix() for path in files_of(artifact, kind)} if kind == "python" else set()
        )
        if strangers := sorted(names - {known.name for known in self.artifact.files}):
            raise NotEquivalentError(
                f"{artifact / strangers[0]}: is no part of the artifact that the certificate describes"
            )

    def require_original(self, source: str, model: nn.Module) -> str | None:
        """`NotEquivalentError` unless ``model``, from ``source``, is the one that was compiled; a remark, if any."""
        found = Original.of(model)
        if found.weights != self.original.weights:
            raise NotEquivalentError(
                f"{source}: {_differs('holds other weights than the model', found.weights, self.original.weights)}"
            )
        if (found.model, found.architecture) != (self.original.model, self.original.architecture):
            theirs, ours = self.versions.get("torch", "?"), torch.__version__
            hint = f" (torch {theirs} then, {ours} now)" if theirs != ours else ""
            raise NotEquivalentError(
                f"{source}: is a {found.model} of other layers than the {self.original.model} of the certificate{hint}"
            )
        path = Path(source)
        if self.original.sha256 is None or not path.is_file() or FileDigest.of(path).sha256 == self.original.sha256:
            return None
        return f"{source} is not the same file as {self.original.file}, but holds the same model"

    def draw(self, seed: int) -> Example:
        """The call of a seed. `InputError` where the certificate describes none."""
        if self.inputs is None:
            raise InputError("the certificate does not describe the inputs of the model; give them with --input")
        return drawn(self.inputs, seed)


def certificate_of(artifact: Path, format: str) -> Path:
    """Where the certificate of an artifact lies.

    >>> str(certificate_of(Path("a/model.onnx"), "onnx")), str(certificate_of(Path("a/model"), "python"))
    ('a/model.onnx.certificate.json', 'a/model/certificate.json')
    """
    return artifact / FILE if format == "python" else artifact.with_name(f"{artifact.name}.certificate.json")


def is_certificate(path: Path) -> bool:
    """Does the file say that it is one, of whatever version? It may be overwritten then."""
    try:
        with path.open("rb") as file:
            start = file.read(256)
    except OSError:
        return False
    return f'"kind": "{KIND}"'.encode() in start


def files_of(artifact: Path, format: str) -> tuple[Path, ...]:
    """The files that an artifact consists of, itself or the model first; for ONNX also the weights beside it."""
    if format == "python":
        parts = sorted(path for path in artifact.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return tuple(path for path in parts if path != artifact / FILE)
    if format == "onnx":
        from rgc.onnx_artifact import weights_beside

        beside = weights_beside(artifact)
        return (artifact,) if beside is None else (artifact, beside)
    return (artifact,)


def made_of(artifact: Path, format: str) -> Made:
    """The digests of an artifact."""
    root = artifact if format == "python" else artifact.parent
    return Made(
        format, tuple(FileDigest.of(path, path.relative_to(root).as_posix()) for path in files_of(artifact, format))
    )


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters, buffers and other tensors by name: dtypes, shapes and bits, on whatever device.

    >>> layer = nn.Linear(2, 2)
    >>> before = weights_digest(layer)
    >>> weights_digest(layer.to("cpu")) == before, weights_digest(layer.double()) == before
    (True, False)
    """
    named = {
        **dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))
    }  # fmt: skip
    for path, module in model.named_modules():
        plain = {name: each for name, each in vars(module).items() if isinstance(each, Tensor)}
        named.update({f"{path}.{name}".lstrip("."): each for name, each in plain.items()})
    digest = hashlib.sha256()
    for name, tensor in sorted(named.items()):
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
        digest.update(dense.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def architecture_digest(model: nn.Module) -> str:
    """SHA-256 of the layers by path: their classes, and what they print of their options."""
    lines = (
        f"{path} {type(module).__module__}.{type(module).__qualname__} {module.extra_repr()}"
        for path, module in model.named_modules()
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def preconditions(dtype: torch.dtype, fixed_size: bool, conditions: Sequence[str]) -> tuple[str, ...]:
    """What is taken for granted, as no run can prove it; ``conditions`` are those under which rewrites are equal."""
    size = (
        "the size of the example; another size is refused at run time" if fixed_size else "any size the original takes"
    )
    half = dtype in (torch.float16, torch.bfloat16)
    return (
        "the original is in eval mode, and so is the artifact",
        "no hooks, and nothing that changes weights, buffers or layers after compilation",
        f"inputs are of {size}; the batch is free where the file format says so",
        "inputs are finite: NaN and infinities may come out otherwise where zero channels or factors were removed",
        *(f"a value stays in its range: {each}" for each in dict.fromkeys(conditions)),
        "equal means in the reals; the bits differ as those of any two orders of summation do",
        "error bounds: kernels sum the products themselves (no Winograd, FFT or Strassen; TF32 only where PyTorch's "
        "switches say so), and elementary functions are within the units stated in rgc.rounding",
        *(["error bounds: half precision is summed in float32 and rounded when stored"] if half else []),
        "PyTorch, onnxruntime and their kernels are free of faults on inputs that were not drawn",
    )


def versions(format: str) -> dict[str, str]:
    """The versions of what had a part in the work."""
    import rgc

    used = ("torch", "numpy", *(("onnx", "onnxruntime") if format == "onnx" else ()))
    found = {name: metadata.version(name) for name in used}
    return {"rgc": rgc.__version__, "python": platform.python_version(), **found}


# --- inputs ------------------------------------------------------------------------------------------------------


def described(example: Example) -> dict[str, Any]:
    """How a call looks, without the values of its tensors; `InputError` for arguments that JSON cannot describe."""
    return {"args": [_described(each) for each in example.args],
            "kwargs": {name: _described(each) for name, each in example.kwargs.items()}}  # fmt: skip


def drawn(inputs: Mapping[str, Any], seed: int) -> Example:
    """A call as ``inputs`` describe it: normal values in float64, integers from low to high, in order, by ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    args = tuple(_drawn(each, generator) for each in inputs["args"])
    return Example(args, {name: _drawn(each, generator) for name, each in inputs["kwargs"].items()})


def _described(leaf: Any) -> dict[str, Any]:
    if isinstance(leaf, Tensor):
        name = str(leaf.dtype).removeprefix("torch.")
        if name not in _DTYPES:
            raise InputError(f"inputs of {name} cannot be described")
        form: dict[str, Any] = {"shape": list(leaf.shape), "dtype": name}
        if not leaf.is_floating_point():
            form |= {"low": int(leaf.min()), "high": int(leaf.max())} if leaf.numel() else {"low": 0, "high": 0}
        return {"tensor": form}
    if leaf is None or isinstance(leaf, bool | int | str) or (isinstance(leaf, float) and math.isfinite(leaf)):
        return {"value": leaf}
    if type(leaf) in (list, tuple):
        return {type(leaf).__name__: [_described(each) for each in leaf]}
    if type(leaf) is dict and all(isinstance(key, str) for key in leaf):
        return {"dict": {key: _described(each) for key, each in leaf.items()}}
    raise InputError(f"an argument of type {type(leaf).__name__} cannot be described")


def _drawn(form: Any, generator: torch.Generator) -> Any:
    ((kind, content),) = form.items()
    if kind == "value":
        return content
    if kind == "dict":
        return {key: _drawn(each, generator) for key, each in content.items()}
    if kind in ("list", "tuple"):
        parts = [_drawn(each, generator) for each in content]
        return parts if kind == "list" else tuple(parts)
    dtype = _DTYPES[content["dtype"]]
    if dtype.is_floating_point:
        return torch.randn(content["shape"], generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(content["low"], content["high"] + 1, content["shape"], generator=generator).to(dtype)


def _require_described(form: Any, depth: int = 0) -> None:
    """`ValueError` unless `_drawn` can do with ``form``."""
    if not isinstance(form, dict) or len(form) != 1 or depth > 32:
        raise ValueError("inputs: an argument is described in no way that this rgc knows")
    ((kind, content),) = form.items()
    parts = list(content.values()) if isinstance(content, dict) and kind == "dict" else content
    if kind == "value" and (content is None or isinstance(content, bool | int | float | str)):
        return
    if kind in ("list", "tuple", "dict") and isinstance(parts, list):
        for each in parts:
            _require_described(each, depth + 1)
        return
    if kind != "tensor" or not isinstance(content, dict) or content.get("dtype") not in _DTYPES:
        raise ValueError("inputs: an argument is described in no way that this rgc knows")
    shape = content.get("shape")
    if not isinstance(shape, list) or not all(_is_count(n) for n in shape) or math.prod(shape) > _MOST_ELEMENTS:
        raise ValueError(f"inputs: {shape!r} is no shape")
    low, high = content.get("low", 0), content.get("high", 0)
    if not (isinstance(low, int) and isinstance(high, int) and -(2**62) < low <= high < 2**62):
        raise ValueError(f"inputs: there are no integers from {low!r} to {high!r}")


def _is_count(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= _MOST_ELEMENTS


# --- JSON --------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """As JSON has it: dataclasses as objects in the order of their fields; a number that is not finite as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _built(kind: Any, data: Any, where: str) -> Any:
    """A value of this type from JSON; `ValueError` says which field is of another one, missing or too much."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return kind(**_fields(kind, data, where))
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        (other,) = (each for each in inner if each is not type(None))
        return None if data is None else _built(other, data, where)
    if origin in (tuple, Sequence):
        if not isinstance(data, list):
            raise ValueError(f"{where} is no list")
        return tuple(_built(inner[0], each, f"{where}[{index}]") for index, each in enumerate(data))
    if origin is Mapping:
        if not isinstance(data, dict):
            raise ValueError(f"{where} is no object")
        return data
    if kind is float and data is None:
        return math.inf  # as `_plain` writes it
    wanted = (int, float) if kind is float else kind
    if not isinstance(data, wanted) or (isinstance(data, bool) and kind is not bool):
        raise ValueError(f"{where} is no {kind.__name__}")
    return data


def _fields(kind: type, data: Any, where: str) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    if not isinstance(data, dict):
        raise ValueError(f"{where or 'it'} is no object")
    if lacking := [name for name in hints if name not in data]:
        raise ValueError(f"{where}.{lacking[0]} is missing".lstrip("."))
    if beyond := sorted(data.keys() - hints.keys()):
        raise ValueError(f"{where}.{beyond[0][:80]} is no field of it".lstrip("."))
    return {name: _built(hint, data[name], f"{where}.{name}".lstrip(".")) for name, hint in hints.items()}


def _require_plain_names(files: Sequence[FileDigest]) -> None:
    """A certificate may come from anywhere: it names files of the artifact, and no others."""
    if not files:
        raise ValueError("artifact.files is empty")
    for each in files:
        path = PurePosixPath(each.name)
        if path.is_absolute() or ".." in path.parts or "\\" in each.name or not each.name:
            raise ValueError(f"artifact.files: {each.name[:80]!r} is no file of an artifact")


def _differs(how: str, found: str, known: str) -> str:
    return f"{how} that the certificate describes (SHA-256 {found[:16]}... instead of {known[:16]}...)"


__all__ = [
    "FILE", "FORMAT", "SEEDS", "Certificate", "Check", "FileDigest", "Made", "Original", "certificate_of", "described",
    "drawn", "files_of", "is_certificate", "made_of", "preconditions", "versions",
]  # fmt: skip
