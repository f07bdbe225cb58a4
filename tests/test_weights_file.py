"""Is a tensor that a .safetensors file names twice found, by every reader of such files?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import rgc
from rgc.errors import InputError
from rgc.loading import load_model
from rgc.weights_file import MOST_BYTES, repeated_name

ENTRY = json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})


def with_header(path: Path, header: str) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    return path


def test_a_name_given_twice_is_found(tmp_path: Path) -> None:
    path = with_header(tmp_path / "model.safetensors", f'{{"a": {ENTRY}, "b": {ENTRY}, "a": {ENTRY}}}')
    assert repeated_name(path) == "a"
    with pytest.raises(InputError, match="names 'a' twice, and readers differ in which they take"):
        load_model(str(path), arch="torch.nn:Identity")


def test_a_plain_file_and_one_that_is_none_repeat_nothing(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(1), "b": torch.zeros(2)}, tmp_path / "plain.safetensors")
    assert repeated_name(tmp_path / "plain.safetensors") is None
    assert repeated_name(with_header(tmp_path / "nested.safetensors", "[" * 100_000)) is None
    for content in (b"", b"12", (MOST_BYTES + 1).to_bytes(8, "little"), b"\xff" * 30):
        (tmp_path / "other.safetensors").write_bytes(content)
        assert repeated_name(tmp_path / "other.safetensors") is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", len(h := f'{{"0.bias": {ENTRY}, "0.bias": {ENTRY}}}').to_bytes(8, "little") + h.encode(),
         "names '0.bias' twice"),
        ("model.safetensors", b"", "cannot be loaded: "),
        ("model.py", b"def load(:", "cannot be loaded: SyntaxError"),
        ("model.py", b"1 / 0", "cannot be loaded: ZeroDivisionError: division by zero"),
        ("model.py", b"load = dict", "its load() returns a dict"),
        ("model.py", b"\xff", "cannot be loaded: UnicodeDecodeError"),
    ],
)  # fmt: skip
def test_a_folder_that_is_damaged_is_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    compiled = rgc.compile(nn.Sequential(nn.Linear(2, 2)).eval(), torch.randn(1, 2))
    rgc.save(compiled, f"{tmp_path}/model/")
    (tmp_path / "model" / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        rgc.load(tmp_path / "model", trust=True)
    assert message in str(caught.value) and "\n" not in str(caught.value)
