"""May an .onnx file be handed to onnxruntime? Only if it reads no file but its own, and its graph is one.

An ONNX model may keep weights in other files, which it names. A name that leads out of the model's folder would let a
model read (and so, as weights, give away) any file of whoever runs it: an absolute path, ``..``, a symbolic link on the
way, or a hard link to a file elsewhere. And a graph defines every value once, before it is used.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rgc.errors import InputError, first_line

if TYPE_CHECKING:  # onnx takes a second to import, and most uses of rgc never need it
    import onnx


def require_plain_onnx(path: Path, most_bytes: int) -> None:
    """`InputError`, one line, for a file that is no ONNX model, reads other files than its own, or defines no graph."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped,unused-ignore]  # it ships no types

    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except (DecodeError, ValueError) as error:
        raise InputError(f"{path} is not an ONNX model, or is damaged: {first_line(error)}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if not model.HasField("graph"):
        raise InputError(f"{path} is not an ONNX model, or is damaged: it has no graph")
    fault = next(_faults(model, path.absolute().parent, most_bytes), None)
    if fault is not None:
        raise InputError(f"{path} {fault}")


def _faults(model: onnx.ModelProto, folder: Path, most_bytes: int) -> Iterator[str]:
    keys = [(function.domain, function.name, function.overload) for function in model.functions]
    if len(set(keys)) < len(keys):
        yield "defines two functions of one name"
    for function in model.functions:
        yield from _faults_of_nodes(function.node, set(function.input), folder, most_bytes)
    yield from _faults_of_graph(model.graph, set(), folder, most_bytes)


def _faults_of_graph(graph: onnx.GraphProto, outer: set[str], folder: Path, most_bytes: int) -> Iterator[str]:
    for tensor in _stored_tensors(graph):
        yield from _fault_of_tensor(tensor, folder, most_bytes)
    weights = [tensor.name for tensor in graph.initializer] + [each.values.name for each in graph.sparse_initializer]
    inputs = [entry.name for entry in graph.input]
    for what, names in (("inputs", inputs), ("weights", weights)):
        if len(set(names)) < len(names):
            yield f"has two {what} of the name {_repeated(names)!r}"
    known = outer | set(inputs) | set(weights)
    yield from _faults_of_nodes(graph.node, known, folder, most_bytes)
    for entry in graph.output:
        if entry.name not in known:
            yield f"returns {entry.name[:80]!r}, which nothing computes"


def _faults_of_nodes(nodes: Any, known: set[str], folder: Path, most_bytes: int) -> Iterator[str]:
    """Every value once, and before it is used; ``known`` grows by what the nodes compute."""
    everything = {name for node in nodes for name in node.output if name}
    for node in nodes:
        missing = next((name for name in node.input if name and name not in known), None)
        if missing is not None:
            why = "before it is computed (is there a cycle?)" if missing in everything else "which nothing computes"
            yield f"uses {missing[:80]!r} in {_describe(node)}, {why}"
        for name in filter(None, node.output):
            if name in known:
                yield f"computes {name[:80]!r} twice, the second time in {_describe(node)}"
            known.add(name)
        for attribute in node.attribute:
            for tensor in (attribute.t, *attribute.tensors):
                yield from _fault_of_tensor(tensor, folder, most_bytes)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from _fault_of_tensor(sparse.values, folder, most_bytes)
                yield from _fault_of_tensor(sparse.indices, folder, most_bytes)
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _faults_of_graph(inner, set(known), folder, most_bytes)


def _stored_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)


def _fault_of_tensor(tensor: onnx.TensorProto, folder: Path, most_bytes: int) -> Iterator[str]:
    if not tensor.external_data and tensor.data_location != tensor.EXTERNAL:
        return
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    reason = _fault_of_location(location, folder)
    if reason is not None:
        yield f"keeps the weight {tensor.name[:80]!r} in {location[:80]!r}, {reason}"
        return
    size = (folder / location).stat().st_size
    bounds = [entries.get(key) or default for key, default in (("offset", "0"), ("length", "0"))]
    if not all(text.isascii() and text.isdigit() for text in bounds) or sum(map(int, bounds)) > size:
        yield f"keeps the weight {tensor.name[:80]!r} beyond the end of {location[:80]!r}, which is cut off or damaged"
    elif size > most_bytes:
        yield f"keeps weights in {location[:80]!r}, which is larger than what is read (--limit memory=)"


def _fault_of_location(location: str, folder: Path) -> str | None:
    """Why a file is not one beside the model, by every way in which a name can lead elsewhere."""
    parts = location.replace("\\", "/").split("/")
    if not location or "\0" in location or location.startswith(("/", "\\", "~")) or ":" in parts[0] or ".." in parts:
        return "which is not a file in the folder of the model"
    place = folder
    for part in parts:
        place = place / part
        try:
            found = os.lstat(place)
        except (OSError, ValueError):
            return "which is not there"
        if stat.S_ISLNK(found.st_mode):
            return "which is a symbolic link, and so may be any other file"
    if not stat.S_ISREG(found.st_mode):
        return "which is not a file"
    if found.st_nlink > 1:
        return "which is a hard link, and so may be any other file; make a copy of it"
    return None


def _repeated(names: list[str]) -> str:
    return next(name for name in names if names.count(name) > 1)[:80]


def _describe(node: onnx.NodeProto) -> str:
    return f"{node.op_type[:40]} {node.name[:40]!r}" if node.name else str(node.op_type)[:40]
