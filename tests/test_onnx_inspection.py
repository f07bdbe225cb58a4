"""Is an ONNX file stopped that reads other files than its own, or whose graph is none, and a plain one let through?"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from rgc.errors import InputError
from rgc.onnx_artifact import OnnxModel
from rgc.onnx_inspection import require_plain_onnx

ENOUGH = 2**20


def value(name: str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, (2, 3))


def graph(*nodes: Any, weights: Any = (), inputs: Any = ("x",), outputs: Any = ("y",)) -> Any:
    return helper.make_graph(list(nodes), "g", list(map(value, inputs)), list(map(value, outputs)), list(weights))


def written(path: Path, content: Any) -> Path:
    model = helper.make_model(content, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    path.write_bytes(model.SerializeToString())
    return path


def add(first: str, second: str, result: str) -> Any:
    return helper.make_node("Add", [first, second], [result])


def with_external(path: Path, location: str, **bounds: int) -> Path:
    """y = x + w, where w stands in another file."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=(2, 3), data_location=TensorProto.EXTERNAL)
    for key, entry in {"location": location, **bounds}.items():
        weight.external_data.add(key=key, value=str(entry))
    return written(path, graph(add("x", "w", "y"), weights=[weight]))


def refusal(path: Path) -> str:
    """What is said of a file, the same by the inspection and by what loads models."""
    with pytest.raises(InputError) as caught:
        require_plain_onnx(path, ENOUGH)
    with pytest.raises(InputError) as loading:
        OnnxModel(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 400
    assert str(loading.value) == message
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for models, beside a secret of the right size for the weight."""
    (tmp_path / "secret").write_bytes(bytes(24))
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def test_weights_in_a_file_beside_the_model_are_read(folder: Path) -> None:
    (folder / "data").mkdir()
    for name in ("w.bin", "data/w.bin"):
        (folder / name).write_bytes(torch.full((2, 3), 2.0).numpy().tobytes())
        model = OnnxModel(with_external(folder / "model.onnx", name, offset=0, length=24))
        assert torch.equal(model(torch.ones(2, 3))[0], torch.full((2, 3), 3.0))


@pytest.mark.parametrize(
    ("location", "make"),
    [
        ("{secret}", lambda folder: None),
        ("../secret", lambda folder: None),
        ("data/../../secret", lambda folder: (folder / "data").mkdir()),
        ("..\\secret", lambda folder: None),
        ("~/secret", lambda folder: None),
        ("", lambda folder: None),
        ("file:///secret", lambda folder: None),
        ("link", lambda folder: (folder / "link").symlink_to(folder.parent / "secret")),
        ("up/secret", lambda folder: (folder / "up").symlink_to(folder.parent)),
        ("hard", lambda folder: os.link(folder.parent / "secret", folder / "hard")),
        ("pipe", lambda folder: os.mkfifo(folder / "pipe")),
        ("missing", lambda folder: None),
        (".", lambda folder: None),
    ],
)  # fmt: skip
def test_no_name_leads_out_of_the_folder(folder: Path, location: str, make: Callable[[Path], Any]) -> None:
    make(folder)
    location = location.format(secret=folder.parent / "secret")
    message = refusal(with_external(folder / "model.onnx", location))
    assert f"keeps the weight 'w' in {location[:80]!r}, which " in message


def test_a_weight_beyond_its_file_is_refused(folder: Path) -> None:
    (folder / "w.bin").write_bytes(bytes(20))
    for bounds in ({"length": 24}, {"offset": 4, "length": 20}, {"length": -1}, {"offset": 10**30}):
        assert "beyond the end of 'w.bin'" in refusal(with_external(folder / "model.onnx", "w.bin", **bounds))


def test_a_file_of_weights_beyond_the_memory_is_refused(folder: Path) -> None:
    with (folder / "w.bin").open("wb") as file:
        file.truncate(ENOUGH + 1)
    with pytest.raises(InputError, match="larger than what is read"):
        require_plain_onnx(with_external(folder / "model.onnx", "w.bin"), ENOUGH)


def test_a_weight_inside_a_branch_may_not_lead_out_either(folder: Path) -> None:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=(2, 3), data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="../secret")
    constant = helper.make_node("Constant", [], ["inner"])
    constant.attribute.append(helper.make_attribute("value", weight))
    branch = helper.make_graph([constant], "b", [], [value("inner")])
    yes = numpy_helper.from_array(torch.tensor(True).numpy(), "yes")
    choose = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
    assert "'../secret'" in refusal(written(folder / "model.onnx", graph(choose, weights=[yes])))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (graph(add("x", "b", "a"), add("x", "a", "b"), add("a", "b", "y")), "'b' in Add, before it is computed (is"),
        (graph(add("x", "y", "y")), "uses 'y' in Add, before it is computed"),
        (graph(add("x", "z", "y")), "uses 'z' in Add, which nothing computes"),
        (graph(add("x", "x", "a"), add("x", "x", "a"), add("a", "a", "y")), "computes 'a' twice, the second time in"),
        (graph(add("x", "x", "x"), add("x", "x", "y")), "computes 'x' twice"),
        (graph(add("x", "x", "y"), inputs=("x", "x")), "has two inputs of the name 'x'"),
        (graph(add("x", "w", "y"), weights=[helper.make_tensor("w", 1, (3,), [1, 2, 3])] * 2), "has two weights of"),
        (graph(add("x", "x", "z")), "returns 'y', which nothing computes"),
    ],
    ids=["cycle", "own", "nothing", "twice", "input", "inputs", "weights", "output"],
)  # fmt: skip
def test_a_graph_that_is_none_is_refused(folder: Path, content: Any, message: str) -> None:
    assert message in refusal(written(folder / "model.onnx", content))


def test_graphs_nested_without_end_are_refused(folder: Path) -> None:
    def field(number: int, content: bytes) -> bytes:
        size, length = len(content), b""
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + content

    content = b""
    for _ in range(2000):  # a graph in an attribute of a node of a graph ...
        content = field(1, field(5, field(6, content)))
    (folder / "model.onnx").write_bytes(field(7, content))
    assert "is not an ONNX model, or is damaged" in refusal(folder / "model.onnx")


def outcome(path: Path) -> str:
    """Loaded, or refused in one line; anything else is raised."""
    try:
        OnnxModel(path)
    except InputError as error:
        return "refused" if "\n" not in str(error) else f"refused in several lines: {error}"
    return "loaded"


def test_a_damaged_file_is_refused_or_still_the_same_kind_of_model(folder: Path) -> None:
    weight = helper.make_tensor("w", TensorProto.FLOAT, (3,), [1.0, 2.0, 3.0])
    whole = written(folder / "model.onnx", graph(add("x", "w", "a"), add("a", "x", "y"), weights=[weight])).read_bytes()
    chance = random.Random(0)
    outcomes = set()
    for position in range(len(whole)):
        cut, flipped = whole[:position], bytearray(whole)
        flipped[position] ^= 1 << chance.randrange(8)
        for content in (cut, bytes(flipped)):
            (folder / "model.onnx").write_bytes(content)
            outcomes.add(outcome(folder / "model.onnx"))
    assert outcomes == {"refused", "loaded"}
