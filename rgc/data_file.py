"""How do a user's own inputs get in from a file? As tensors and plain values: nothing that the file carries is run.

``.pt`` and ``.pth``: what torch.save wrote of a tensor, a tuple or list of positional or a dict of keyword arguments.
``.npz``: arrays by keyword, or, where numpy named them (``arr_0``, ``arr_1``, ...), by position. ``.npy``: one array.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import tokenize
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rgc.archive import UNREADABLE_ARCHIVE, fault_of_archive, is_archive
from rgc.errors import InputError
from rgc.limits import Limits, human_bytes

#: What torch and numpy raise on bytes that they cannot read.
_UNREADABLE = (
    *UNREADABLE_ARCHIVE, pickle.UnpicklingError, tokenize.TokenError, ArithmeticError, AssertionError, AttributeError,
    ImportError, LookupError, SyntaxError, TypeError,
)  # fmt: skip
_BY_POSITION = re.compile(r"arr_(\d+)")
_PLAIN = (type(None), bool, int, float, str)


def read_data(path: Path, limits: Limits) -> Any:
    """What a file of inputs holds, in the form in which `rgc.verify` takes ``data``.

    Raises `InputError`, one line, for a file that is missing, damaged, too large, or holds anything but tensors and
    plain values.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file of inputs")
    if not path.is_file():
        raise InputError(f"{path}: is no file of inputs")
    suffix = path.suffix.lower()
    readers = {".pt": _of_torch, ".pth": _of_torch, ".npz": _of_numpy, ".npy": _of_numpy}
    if suffix not in readers:
        raise InputError(f"{path}: inputs are read from .pt (torch.save) and .npz (numpy.savez)")
    size = path.stat().st_size
    if size > limits.memory:
        raise InputError(f"{path}: is of {human_bytes(size)}; at most {limits.in_words} are read (--limit memory=)")
    try:
        with path.open("rb") as file:
            found = readers[suffix](path, file, limits)
    except _UNREADABLE as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{path}: holds no readable inputs ({lines[0][:120]})") from error
    return found


def _of_torch(path: Path, file: IO[bytes], limits: Limits) -> Any:
    if not is_archive(file):
        raise InputError(f"{path}: is no archive of torch.save, or is cut off; save the inputs again")
    _require_harmless(path, file, limits)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # whose message is a page about how to run the file all the same
        raise InputError(
            f"{path}: holds more than tensors and plain containers, or is damaged; save the inputs alone"
        ) from error
    leaves = tree_leaves(found)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise InputError(f"{path}: holds no tensor; save a tensor, a tuple of them or a dict of keyword arguments")
    if isinstance(found, dict) and not all(isinstance(key, str) and key.isidentifier() for key in found):
        raise InputError(f"{path}: holds a dict whose keys are no keyword arguments; is it a state dict?")
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            _require_plain(path, leaf, limits)
        elif not isinstance(leaf, _PLAIN):
            raise InputError(f"{path}: holds a {type(leaf).__name__}; inputs are tensors and plain values")
    return found


def _require_plain(path: Path, tensor: Tensor, limits: Limits) -> None:
    """A view may claim any number of elements of a small storage, and other layouts have no samples to cut."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise InputError(f"{path}: holds a tensor that is not dense (of {str(tensor.layout)[:40]}); save plain tensors")
    if tensor.is_complex():
        raise InputError(f"{path}: holds a tensor of {tensor.dtype}; inputs are real numbers, integers or truth values")
    size = tensor.numel() * tensor.element_size()
    if size > limits.memory:
        raise InputError(f"{path}: holds a tensor of {human_bytes(size)}; at most {limits.in_words} (--limit memory=)")


def _of_numpy(path: Path, file: IO[bytes], limits: Limits) -> Any:
    if path.suffix.lower() == ".npy":
        return _array(path, path.stem, file, path.stat().st_size)
    if not is_archive(file):
        raise InputError(f"{path}: is no archive of numpy.savez, or is cut off; save the inputs again")
    _require_harmless(path, file, limits)
    arrays: dict[str, Tensor] = {}
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            name, dot, suffix = entry.filename.rpartition(".")
            if not dot or suffix != "npy":
                raise InputError(f"{path}: holds {entry.filename[:80]!r}, which is no array; save it with numpy.savez")
            with archive.open(entry) as opened:
                arrays[name] = _array(path, name, opened, entry.file_size)
    if not arrays:
        raise InputError(f"{path}: holds no arrays")
    places = {name: _BY_POSITION.fullmatch(name) for name in arrays}
    if all(places.values()):
        ordered = sorted(arrays, key=lambda name: int(name.removeprefix("arr_")))
        return tuple(arrays[name] for name in ordered)
    odd = next((name for name in arrays if not name.isidentifier() or places[name]), None)
    if odd is not None:
        raise InputError(f"{path}: {odd[:80]!r} is no keyword argument; name every array, or none (numpy.savez)")
    return arrays


def _array(path: Path, name: str, file: IO[bytes], size: int) -> Tensor:
    """One array, if its header tells the truth about its size and it holds no objects."""
    content = io.BytesIO(file.read(size))
    version = np.lib.format.read_magic(content)
    if version not in ((1, 0), (2, 0)):
        raise InputError(f"{path}: {name[:80]!r} is in version {version} of numpy's format; save plain numbers")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(content)
    if dtype.hasobject or dtype.kind not in "fiub":
        raise InputError(f"{path}: {name[:80]!r} is of {str(dtype)[:40]}; inputs are real numbers, integers or truth")
    left = len(content.getbuffer()) - content.tell()
    if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != left:
        raise InputError(f"{path}: {name[:80]!r} is damaged: its header claims {shape}, which is not what follows")
    content.seek(0)
    array = np.lib.format.read_array(content, allow_pickle=False)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))


def _require_harmless(path: Path, file: IO[bytes], limits: Limits) -> None:
    fault = fault_of_archive(file, limits.memory)
    if fault is not None:
        raise InputError(f"{path}: {fault}")
    file.seek(0)


__all__ = ["read_data"]
