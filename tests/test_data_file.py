"""Do inputs come from files as tensors, and is every hostile file one line, with nothing run?"""

from __future__ import annotations

import io
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rgc.data_file import read_data
from rgc.errors import InputError
from rgc.limits import Limits

LIMITS = Limits(memory=2**26)


@pytest.mark.parametrize("make", [lambda x: x, lambda x: (x, x), lambda x: [x], lambda x: {"input": x, "mode": "sum"}])
def test_what_torch_saves_comes_back(tmp_path: Path, make: Callable[[Any], Any]) -> None:
    data = make(torch.randn(3, 4))
    torch.save(data, tmp_path / "data.pt")
    found = read_data(tmp_path / "data.pt", LIMITS)
    assert type(found) is type(data) and str(found) == str(data)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "uint8", "bool", ">f4"])
def test_arrays_come_back_by_position_or_by_name(tmp_path: Path, dtype: str) -> None:
    arrays = [(10 * np.random.default_rng(seed).random((3, 2))).astype(dtype) for seed in range(11)]
    np.savez(tmp_path / "place.npz", *arrays)
    found = read_data(tmp_path / "place.npz", LIMITS)
    assert isinstance(found, tuple) and len(found) == 11
    assert all(np.array_equal(each.numpy(), array) for each, array in zip(found, arrays, strict=True))
    np.savez_compressed(tmp_path / "name.npz", x=arrays[0], mask=arrays[1])
    assert read_data(tmp_path / "name.npz", LIMITS).keys() == {"x", "mask"}
    np.save(tmp_path / "one.npy", np.asfortranarray(arrays[0]))
    assert np.array_equal(read_data(tmp_path / "one.npy", LIMITS).numpy(), arrays[0])


class Canary:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def packed(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def header(shape: str, dtype: str = "<f4") -> bytes:
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def saved(data: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(data, buffer)
    return buffer.getvalue()


def objects() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, np.array([{}, 1], dtype=object))
    return buffer.getvalue()


def bomb() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, np.zeros(2**22))
    return buffer.getvalue()


HOSTILE: dict[str, tuple[str, Callable[[Path], bytes], str]] = {
    "empty": ("x.pt", lambda _: b"", "is no archive of torch.save"),
    "text": ("x.npz", lambda _: b"no archive", "is no archive of numpy.savez"),
    "cut off": ("x.pt", lambda _: saved(torch.ones(9))[:300], "is no archive of torch.save, or is cut off"),
    "code": ("x.pt", lambda folder: saved({"x": Canary(folder / "canary")}), "holds more than tensors"),
    "a model": ("x.pt", lambda _: saved(nn.Linear(2, 2)), "holds more than tensors"),
    "a state dict": ("x.pt", lambda _: saved({"a.weight": torch.ones(2)}), "is it a state dict"),
    "no tensor": ("x.pt", lambda _: saved([1, 2]), "holds no tensor"),
    "sparse": ("x.pt", lambda _: saved(torch.eye(3).to_sparse()), "not dense"),
    "complex": ("x.pt", lambda _: saved(torch.ones(2, dtype=torch.complex64)), "complex64"),
    "huge view": ("x.pt", lambda _: saved(torch.zeros(1).expand(2**40)), "holds a tensor of 4,096.0 GiB"),
    "a dtype": ("x.pt", lambda _: saved({"x": torch.ones(1), "y": torch.float32}), "holds a dtype"),
    "objects": ("x.npz", lambda _: objects(), "is of object; inputs are real numbers"),
    "words": ("x.npz", lambda _: packed(arr_0=header("(0,)", "<U3")), "is of <U3"),
    "claims": ("x.npz", lambda _: packed(arr_0=header("(1000000000000,)") + b"0123"), "header claims"),
    "negative": ("x.npz", lambda _: packed(arr_0=header("(-1, 1)")), "header claims|holds no readable"),
    "expression": ("x.npz", lambda _: packed(arr_0=header("().__class__")), "holds no readable inputs"),
    "no array": ("x.npz", lambda _: packed(arr_0=b"text"), "holds no readable inputs"),
    "bomb": ("x.npz", lambda _: bomb(), "is a trap"),
    "path": ("x.npz", lambda _: packed(**{"../up": header("(0,)")}), "is no keyword argument"),
    "mixed": ("x.npz", lambda _: packed(arr_0=header("(0,)"), x=header("(0,)")), "is no keyword argument"),
    "nothing": ("x.npz", lambda _: packed(), "holds no arrays"),
    "another kind": ("x.csv", lambda _: b"1,2", "inputs are read from .pt"),
    "array of an old kind": ("x.npy", lambda _: b"\x93NUMPY\x09\x00", "holds no readable|version"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_line_and_runs_nothing(tmp_path: Path, name: str) -> None:
    file, make, reason = HOSTILE[name]
    path = tmp_path / file
    path.write_bytes(make(tmp_path))
    with pytest.raises(InputError, match=reason) as raised:
        read_data(path, LIMITS)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < len(str(path)) + 300
    assert not (tmp_path / "canary").exists()


def test_files_that_are_none_or_too_large_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_data(tmp_path / "x.pt", LIMITS)
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(InputError, match="is no file"):
        read_data(tmp_path / "folder.pt", LIMITS)
    torch.save(torch.zeros(2**12), tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"at most .* are read \(--limit memory=\)"):
        read_data(tmp_path / "x.pt", Limits(memory=2**12))


@pytest.mark.parametrize("suffix", ["pt", "npz"])
def test_no_flipped_bit_or_cut_raises_anything_but_one_line(tmp_path: Path, suffix: str) -> None:
    path, draw = tmp_path / f"x.{suffix}", random.Random(0)
    torch.save({"x": torch.ones(4)}, path) if suffix == "pt" else np.savez(path, x=np.ones(4))
    whole = path.read_bytes()
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged if draw.random() < 0.7 else damaged[: draw.randrange(len(whole))])
        try:
            read_data(path, LIMITS)
        except InputError as error:
            refused += "\n" not in str(error)
    assert refused > 40
