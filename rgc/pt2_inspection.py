"""Can a .pt2 archive be loaded without running code that it carries?

``torch.export.load`` is no safe reader. Besides pickled tensors and objects (``torch.load(weights_only=False)``) and
compiled libraries, an archive holds text that torch evaluates: sizes go through ``sympy.sympify``, guards through
``exec``, and names of nodes and parameters into generated source. So nothing is searched for what is bad: every record
and every string must be one that a plain exported program has.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.export.pt2_archive import PT2ArchiveReader

from rgc.archive import UNREADABLE_ARCHIVE, fault_of_archive
from rgc.limits import machine_memory

MODEL = "models/model.json"
SAMPLE_INPUTS = "data/sample_inputs/model.pt"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
RECORD = re.compile(
    r"data/weights/weight_\d+|data/constants/tensor_\d+|archive_format|archive_version|byteorder"
    r"|\.data/(version|serialization_id)|\.format_version|\.storage_alignment"
    + "".join("|" + re.escape(name) for name in (MODEL, SAMPLE_INPUTS, WEIGHTS, CONSTANTS))
)
PLAIN_TEXT = re.compile(r"[\w.\-+:]*")  # no quote, bracket, blank or line break: cannot leave its place in source text
OPERATOR = re.compile(
    r"torch\.ops\.aten\.\w+\.\w+|_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|getitem|eq|ne|lt|le|gt|ge|and_|or_)"
    r"|math\.(ceil|floor|trunc|sqrt)|torch\.sym_(max|min|float|int|not|ite|sum)"
)
FILE_OPERATORS = ("torch.ops.aten.from_file", "torch.ops.aten.save")
FORBIDDEN_ARGUMENTS = ("as_custom_obj", "as_operator", "as_graph")
CONTAINERS = (
    None,
    "builtins.list",
    "builtins.tuple",
    "builtins.dict",
    "collections.OrderedDict",
    "torch.fx.immutable_collections.immutable_list",
    "torch.fx.immutable_collections.immutable_dict",
)
SIZE_FUNCTIONS = frozenset(
    [
        "Symbol",
        "Integer",
        "Rational",
        "Float",
        "Add",
        "Mul",
        "Pow",
        "Mod",
        "Max",
        "Min",
        "Abs",
        "FloorDiv",
        "CleanDiv",
        "CeilDiv",
        "PythonMod",
        "ModularIndexing",
        "IntTrueDiv",
        "FloatTrueDiv",
        "ToFloat",
        "TruncToInt",
        "CeilToInt",
        "FloorToInt",
        "RoundToInt",
        "PowByNatural",
        "Where",
        "Identity",
        "Eq",
        "Ne",
        "Lt",
        "Le",
        "Gt",
        "Ge",
        "Equality",
        "Unequality",
        "StrictLessThan",
        "LessThan",
        "StrictGreaterThan",
        "GreaterThan",
        "And",
        "Or",
        "Not",
    ]
)
SIZE_SYNTAX = (
    ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.BinOp, ast.UnaryOp, ast.Compare,
    ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip


def is_pickle_free_pt2(path: Path) -> bool:
    """Whether loading the archive unpickles nothing unsafely and evaluates nothing beyond plain sizes and names."""
    return reason_to_distrust(Path(path).read_bytes()) is None


def reason_to_distrust(content: bytes) -> str | None:
    """What in the archive keeps it from being loaded without trust; None if nothing does. Never unpickles unsafely."""
    try:
        return next(_reasons(content), None)
    # Not an archive, truncated, or JSON of another structure: no plain exported program either way.
    except (*UNREADABLE_ARCHIVE, LookupError, TypeError, AttributeError, SyntaxError, MemoryError) as error:
        return f"it is malformed: {(str(error) or type(error).__name__).splitlines()[0]}"


def _reasons(content: bytes) -> Iterator[str]:
    fault = fault_of_archive(io.BytesIO(content), machine_memory())
    if fault is not None:
        yield f"it {fault}"
        return
    with PT2ArchiveReader(io.BytesIO(content)) as reader:
        records = reader.get_file_names()
        yield from _records_out_of_place(content, records)
        for config in (WEIGHTS, CONSTANTS):
            yield from _pickled_payloads(json.loads(reader.read_string(config)))
        if len(reader.read_bytes(SAMPLE_INPUTS)) > 0:
            # torch.export runs guards, which are source text, only where there is an example to name its inputs;
            # and the example itself is unpickled with weights_only=False when the safe way fails.
            yield "it holds pickled example inputs"
        yield from _unexpected_text(json.loads(reader.read_string(MODEL)))


def _records_out_of_place(content: bytes, records: list[str]) -> Iterator[str]:
    strangers = (name for name in records if not RECORD.fullmatch(name))
    yield from (f"record {name!r} is not part of a plain exported program" for name in strangers)
    # torch falls back to Python's zipfile and an older layout when its own reader fails: both must see the same.
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
    root = names[0].split("/")[0]
    if len(names) != len(set(names)) or {name.removeprefix(root + "/") for name in names} != set(records):
        yield "its directory is ambiguous"


def _pickled_payloads(config: dict[str, Any]) -> Iterator[str]:
    for name, payload in config["config"].items():
        if not PLAIN_TEXT.fullmatch(name):
            yield f"tensor name {name!r}"
        if payload["use_pickle"] is not False or not re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]):
            yield f"{name!r} is pickled"


def _unexpected_text(program: dict[str, Any]) -> Iterator[str]:
    graph_module = program["graph_module"]
    yield from _unexpected_operators(graph_module["graph"]["nodes"])
    for entry in graph_module["module_call_graph"]:
        for spec in ("in_spec", "out_spec"):
            if entry["signature"] is not None:
                yield from _unexpected_containers(json.loads(entry["signature"].pop(spec))[1])
    for node in graph_module["graph"]["nodes"]:
        node.pop("metadata")  # stack traces and module names: split at commas and kept, never evaluated
        for argument in node["inputs"]:
            argument["arg"].pop("as_string", None)  # a literal, which torch writes into source with repr()
    program.pop("guards_code", None)  # not run without example inputs
    yield from _unexpected_strings(program)


def _unexpected_operators(nodes: list[dict[str, Any]]) -> Iterator[str]:
    for node in nodes:
        target = node["target"]
        if not OPERATOR.fullmatch(target) or target.rpartition(".")[0] in FILE_OPERATORS:
            yield f"operator {target!r} is not one of plain tensor arithmetic"


def _unexpected_containers(spec: dict[str, Any]) -> Iterator[str]:
    if spec["type"] not in CONTAINERS:
        yield f"container {spec['type']!r}"
    keys = json.loads(spec["context"]) if spec["context"] is not None else None
    if keys is not None and not (isinstance(keys, list) and all(_is_plain_key(key) for key in keys)):
        yield f"container keys {keys!r}"
    for child in spec["children_spec"]:
        yield from _unexpected_containers(child)


def _is_plain_key(key: object) -> bool:
    return isinstance(key, int) or (isinstance(key, str) and PLAIN_TEXT.fullmatch(key) is not None)


def _unexpected_strings(value: object) -> Iterator[str]:
    if isinstance(value, str) and not PLAIN_TEXT.fullmatch(value):
        yield f"text {value[:40]!r}"
    elif isinstance(value, list):
        for item in value:
            yield from _unexpected_strings(item)
    elif isinstance(value, dict):
        yield from (f"argument of kind {key}" for key in FORBIDDEN_ARGUMENTS if key in value)
        yield from _unexpected_strings(list(value))
        for key, item in value.items():
            if key == "expr_str":
                yield from _unexpected_size(item)
            else:
                yield from _unexpected_strings(item)


def _unexpected_size(text: str) -> Iterator[str]:
    for part in ast.walk(ast.parse(text, mode="eval")):
        known = isinstance(part, SIZE_SYNTAX)
        if isinstance(part, ast.Call):
            known = isinstance(part.func, ast.Name) and part.func.id in SIZE_FUNCTIONS
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            known = re.fullmatch(r"\w+", part.value) is not None
        elif isinstance(part, ast.Name):
            known = part.id in SIZE_FUNCTIONS or re.fullmatch(r"[a-z]+\d+|true|false|oo|int_oo", part.id) is not None
        if not known:
            yield f"size expression {text[:60]!r}"
            return
