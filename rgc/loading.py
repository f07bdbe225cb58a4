"""How does a model get in from a file or a name, without running what the file carries?"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from rgc.archive import fault_of_archive, is_archive
from rgc.errors import InputError
from rgc.limits import Limits, human_bytes
from rgc.safe_pickle import judge
from rgc.soundness import require_sound
from rgc.weights_file import repeated_name

_ZOO = "zoo:"
_WRAPPERS = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every name
_TRUST = "loading it can run code; add --trust (trust=True) if you trust where it came from"
_ARCH = "name its model with --arch package.module:factory"
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# What torch and the unpickler raise on bytes that they cannot read.
_UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    json.JSONDecodeError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def load_model(source: str, *, arch: str | None = None, trust: bool = False, limits: Limits | None = None) -> nn.Module:
    """Load a model from the zoo, a pickled module, a checkpoint or, if trusted, an exported program; onto the CPU.

    ``source`` is ``zoo:NAME`` or a path. A checkpoint (state dict, also ``.safetensors``) needs ``arch``, the
    ``package.module:factory`` that makes its model when called without arguments; that model comes back in eval form.
    Other models come back as they were saved. Nothing that a file carries is run unless ``trust`` is set, and nothing
    is unpacked that is larger than ``limits`` allow. Raises ``InputError``, one line, if the source cannot be used.
    """
    limits = limits or Limits()
    if source.startswith(_ZOO):
        return _from_zoo(source, arch)
    path = Path(source)
    _require_file(path)
    contents = _unwrap(_contents(path, trust, limits))
    if isinstance(contents, nn.Module):
        if arch is not None:
            raise InputError(f"{path}: holds a whole {type(contents).__name__}, not a state dict: leave --arch out")
        require_sound(str(path), contents, limits)
        return contents
    state = _state_dict(path, contents)
    if arch is None:
        raise InputError(f"{path}: is a state dict of {len(state)} tensors; {_ARCH}")
    with _working_directory_importable():
        model = _build(arch)
    _fill(path, model, arch, state)
    return model.eval()


def _from_zoo(source: str, arch: str | None) -> nn.Module:
    if arch is not None:
        raise InputError(f"{source}: a zoo name already says which model it is: leave --arch out")
    from rgc import models  # most loads need no zoo

    return models.create(source.removeprefix(_ZOO))


def _require_file(path: Path) -> None:
    if not path.exists():
        raise InputError(f"{path}: no such file (a model of the zoo is written {_ZOO}NAME)")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name the model file in it")
    if not path.is_file():
        raise InputError(f"{path}: is not a regular file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: is empty; save the model again")


def _contents(path: Path, trust: bool, limits: Limits) -> object:
    """What the file holds, by its own bytes rather than by what its name promises."""
    size = path.stat().st_size
    if size > limits.memory:
        raise InputError(f"{path}: is of {human_bytes(size)}; at most {limits.in_words} are read (--limit memory=)")
    try:
        with path.open("rb") as file:
            start = file.read(64)
            if path.suffix == ".safetensors":
                if (name := repeated_name(path)) is not None:
                    raise InputError(f"{path}: names {name[:80]!r} twice, and readers differ in which they take")
                return safetensors.torch.load_file(path)
            if is_archive(file):
                return _archive(path, file, trust, limits)
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: is not a readable safetensors file ({_one_line(error)})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or _one_line(error)})") from error
    if start.startswith(b"PK"):
        raise InputError(f"{path}: is cut off or damaged: its archive has no end; copy or save it again")
    if start.startswith(_LEGACY_MAGIC) and not trust:
        raise InputError(
            f"{path}: is in the format of torch.save before PyTorch 1.6, which cannot be checked: {_TRUST}"
        )
    if start.startswith(b"\x80") and not trust:
        raise InputError(f"{path}: is a bare pickle, which torch.save did not write: {_TRUST}")
    if start.startswith(b"\x80"):
        with path.open("rb") as file:
            return _load_trusted(path, file)
    raise InputError(f"{path}: is not a model that rgc reads; save it with torch.save or as .safetensors")


def _archive(path: Path, file: BinaryIO, trust: bool, limits: Limits) -> object:
    kind = _kind_of_archive(path, file, limits)
    file.seek(0)
    if kind == "exported program":
        return _load_exported(path, file, trust)
    return _load_trusted(path, file) if trust else _load_checked(path, file)


def _kind_of_archive(path: Path, file: BinaryIO, limits: Limits) -> str:
    try:
        fault = fault_of_archive(file, limits.memory)
        with zipfile.ZipFile(file) as archive:
            members = archive.namelist()
    except _UNREADABLE as error:
        raise InputError(f"{path}: is damaged ({_one_line(error)}); copy or save it again") from error
    if fault is not None:
        raise InputError(f"{path}: {fault}")
    files = {member.rpartition("/")[2] for member in members}
    if "archive_format" in files or "serialized_exported_program.json" in files:
        return "exported program"
    if "constants.pkl" in files:
        raise InputError(f"{path}: is a TorchScript archive, whose layers are lost; give the Python model it came from")
    if "data.pkl" in files:
        return "pickle"
    raise InputError(f"{path}: is an archive, but not one of torch.save (it has no data.pkl)")


def _load_checked(path: Path, file: BinaryIO) -> object:
    """Read the pickle as text, judge its names, and only then load it, with those names and no others."""
    try:
        # The reader that torch.load uses: another zip reader might be shown another pickle than the one that is run.
        verdict = judge(torch._C.PyTorchFileReader(file).get_record("data.pkl"))
    except _UNREADABLE as error:
        raise InputError(f"{path}: cannot be loaded: {_one_line(error)}") from error
    if verdict.refused:
        raise InputError(f"{path}: {_refusal(verdict.refused)}")
    file.seek(0)
    try:
        with torch.serialization.safe_globals(list(verdict.admitted)):  # type: ignore[arg-type]  # pairs of object, name
            return torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise InputError(f"{path}: cannot be loaded ({_one_line(error)}); save it again") from error


def _refusal(refused: tuple[str, ...]) -> str:
    more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
    names = ", ".join(ascii(name[:80]).strip("'") for name in refused[:3])
    return f"uses {names}{more}, not a layer of torch.nn, torchvision, timm or rgc: {_TRUST}"


def _load_trusted(path: Path, file: BinaryIO) -> object:
    try:
        with _working_directory_importable():
            return torch.load(file, map_location="cpu", weights_only=False)
    except _UNREADABLE as error:
        raise InputError(f"{path}: cannot be loaded ({_one_line(error)})") from error


def _load_exported(path: Path, file: BinaryIO, trust: bool) -> nn.Module:
    if not trust:
        raise InputError(f"{path}: is an exported program, whose archive may carry pickles: {_TRUST}")
    try:
        model = torch.export.load(file).module()
    except _UNREADABLE as error:
        raise InputError(f"{path}: is an exported program that cannot be loaded ({_one_line(error)})") from error
    for module in model.modules():
        module.training = False  # a program has no mode; its module only says so by default, and refuses eval()
    return model


def _unwrap(contents: object) -> object:
    """The state dict or module inside a training checkpoint, or the contents as they are."""
    if not isinstance(contents, Mapping):
        return contents
    for key in _WRAPPERS:
        if isinstance(contents.get(key), Mapping | nn.Module):
            return contents[key]
    return contents


def _state_dict(path: Path, contents: object) -> dict[str, Tensor]:
    found = f"holds a {type(contents).__name__}"
    if not isinstance(contents, Mapping) or not contents:
        raise InputError(f"{path}: {found}, not a model or a state dict; save the model or its state_dict()")
    # get_extra_state() may return anything; load_state_dict hands it back to the layer that made it.
    state = {key: value for key, value in contents.items() if not str(key).endswith("_extra_state")}
    odd = next((key for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))), None)
    if odd is not None:
        raise InputError(
            f"{path}: {found} whose entry {odd!r} is of type {type(state[odd]).__name__}, not a tensor; "
            "save the model or its state_dict()"
        )
    return dict(contents)


def _build(arch: str) -> nn.Module:
    """Make the model that ``package.module:factory`` names."""
    module_name, colon, attribute = arch.partition(":")
    if not (module_name and colon and attribute) or module_name.startswith("."):
        raise InputError(f"--arch {arch}: is not of the form package.module:factory")
    try:
        found: object = importlib.import_module(module_name)
    except (ImportError, SyntaxError, ValueError) as error:
        raise InputError(f"--arch {arch}: cannot import {module_name} ({_one_line(error)})") from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise InputError(f"--arch {arch}: {module_name} has no {attribute}")
        found = getattr(found, name)
    if not callable(found):
        raise InputError(
            f"--arch {arch}: is of type {type(found).__name__}, not a function or class that makes a model"
        )
    if needed := _required_parameters(found):
        raise InputError(f"--arch {arch}: needs arguments ({', '.join(needed)}); name a factory that needs none")
    model = found()
    if not isinstance(model, nn.Module):
        raise InputError(f"--arch {arch}: returned something of type {type(model).__name__}, not a torch.nn.Module")
    return model


def _required_parameters(factory: object) -> list[str]:
    try:
        signature = inspect.signature(factory)  # type: ignore[arg-type]  # the caller checked that it is callable
    except ValueError:  # a builtin without a signature: the call will tell
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        name
        for name, parameter in signature.parameters.items()
        if parameter.default is parameter.empty and parameter.kind not in optional
    ]


def _fill(path: Path, model: nn.Module, arch: str, state: dict[str, Tensor]) -> None:
    """Put the checkpoint into the model; every tensor finds its place, or the error says which does not."""
    own = model.state_dict()
    state = _without_prefixes(state, own)
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    shared = [key for key in tensors if isinstance(own.get(key), Tensor)]
    complaints = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {_shape(state[key])} instead of {_shape(own[key])}"
            for key in shared
            if state[key].shape != own[key].shape
        ],
        "of a type that would lose digits": [
            f"{key} {state[key].dtype} into {own[key].dtype}"
            for key in shared
            if torch.promote_types(state[key].dtype, own[key].dtype) != own[key].dtype
        ],
    }
    if any(complaints.values()):
        listing = "; ".join(f"{len(keys)} {what}: {_first(keys)}" for what, keys in complaints.items() if keys)
        raise InputError(f"{path}: does not fit --arch {arch}: {listing}")
    model.load_state_dict(state)


def _without_prefixes(state: dict[str, Tensor], own: Mapping[str, object]) -> dict[str, Tensor]:
    """Take away what a wrapper put before every name, unless the model's own names start like that."""
    for prefix in _PREFIXES * 2:  # the two wrappers nest either way
        if all(key.startswith(prefix) for key in state) and not any(key.startswith(prefix) for key in own):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _shape(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "scalar"


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


@contextlib.contextmanager
def _working_directory_importable() -> Iterator[None]:
    """Let the user's own modules be imported from where they stand, as ``python`` does and an installed script not."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def _one_line(error: BaseException) -> str:
    """The first line of a library's message, short enough to stand within one of ours."""
    lines = str(error).strip().splitlines()
    first = lines[0].strip() if lines else type(error).__name__
    return first if len(first) <= 160 else first[:157] + "..."
