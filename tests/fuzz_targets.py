"""What is fuzzed? Bytes as a file for the loaders, and bytes as calls for the lift table; all but a refusal raises.

A target takes bytes and returns what became of them. It raises on a fault of rgc's: an error that is no `RgcError`, an
operation that a file must not cause, or a lifted program that computes something else than PyTorch does.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import math
import pickle
import random
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rgc.artifact import load
from rgc.compiler import trace
from rgc.errors import RgcError
from rgc.example import output_difference
from rgc.functions import STRUCTURAL
from rgc.ir import Graph
from rgc.lift import _FUNCTIONS, Source, lift
from rgc.limits import Limits
from rgc.loading import load_model
from rgc.modules import MODULES
from rgc.rearrange_calls import REARRANGEMENTS
from rgc.subject import require_eval

#: What no file may cause while it is read without trust.
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "ctypes.dlopen",
             "os.remove", "os.rename", "os.rmdir", "shutil.rmtree", "pty.spawn")  # fmt: skip
SMALL = Limits(nodes=200, memory=2**26)
SUFFIXES = (".pt", ".safetensors", ".pt2", ".onnx")


class Forbidden(Exception):  # noqa: N818 - it is the finding itself
    """A file caused what none may cause."""


_armed = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _armed and event in FORBIDDEN:
        raise Forbidden(f"{event}{arguments}")
    if _armed and event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        raise Forbidden(f"open{arguments}")


@contextlib.contextmanager
def nothing_is_executed() -> Iterator[None]:
    """A context in which starting a program, connecting, or writing a file raises `Forbidden`."""
    global _armed
    if not getattr(sys, "_rgc_fuzz_audited", False):
        sys.addaudithook(_audit)  # there is no way to take one away again
        sys._rgc_fuzz_audited = True  # type: ignore[attr-defined]
    _armed = True
    try:
        yield
    finally:
        _armed = False


# Files


def file_target(data: bytes, folder: Path) -> str:
    """The first byte says what kind of file the rest is; the verdict of the loader on it."""
    kind, body = (data[0] % len(FILES), data[1:]) if data else (0, b"")
    name, make = list(FILES.items())[kind]
    path = folder / f"fuzzed{name.partition(' ')[0]}"
    content = make(body)
    path.write_bytes(content)
    try:
        with nothing_is_executed():
            model = load(path) if path.suffix in (".pt2", ".onnx") else load_model(str(path), limits=SMALL)
            if path.suffix == ".pt":
                _look_at(model)
    except RgcError as error:
        if "\n" in str(error):
            raise AssertionError(f"an error of several lines: {error}") from error
        return type(error).__name__
    return "loaded"


def _look_at(model: nn.Module) -> None:
    """What ``rgc inspect`` does with a model, beyond loading it."""
    require_eval(model)
    trace(model, torch.randn(1, 3, 6, 6), limits=SMALL)


def _saved(index: int) -> bytes:
    """The torch.save archive of one of the `_models`."""
    buffer = io.BytesIO()
    torch.save(_models()[index], buffer)
    return buffer.getvalue()


def _models() -> list[object]:
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 2))
    wrapped = {"epoch": 3, "model": nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=2)).eval()}
    return [nn.Sequential(*layers).eval(), nn.TransformerEncoderLayer(8, 2).eval(), {"a": torch.zeros(3)}, wrapped]


def _with_pickle(program: bytes) -> bytes:
    """A torch.save archive with ``program`` as its pickle, whose checksums are right; its first byte picks the rest."""
    index = program[0] % len(_models()) if program else 0
    with zipfile.ZipFile(io.BytesIO(_saved(index))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    return _zipped({n: program[1:] if n.endswith("/data.pkl") else content for n, content in members.items()})


def _as_program(text: bytes) -> bytes:
    """A .pt2 archive whose program is ``text``."""
    global _exported
    if not _exported:
        buffer = io.BytesIO()
        program = torch.export.export(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), (torch.randn(2, 3, 6, 6),))
        program._example_inputs = None
        torch.export.save(program, buffer)
        with zipfile.ZipFile(buffer) as archive:
            _exported.update({name: archive.read(name) for name in archive.namelist()})
    return _zipped({n: text if n.endswith("models/model.json") else content for n, content in _exported.items()})


_exported: dict[str, bytes] = {}


def _zipped(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


#: By suffix and what is left to chance, how the bytes become the file.
FILES: dict[str, Callable[[bytes], bytes]] = {
    ".pt file": bytes,
    ".pt pickle": _with_pickle,
    ".safetensors file": bytes,
    ".pt2 program": _as_program,
    ".onnx file": bytes,
}


def file_seeds() -> Iterator[bytes]:
    """One input of every kind that is not refused, as a fuzzer needs to start from."""
    kinds = list(FILES)
    for index in range(len(_models())):
        yield bytes([kinds.index(".pt file")]) + _saved(index)
        with zipfile.ZipFile(io.BytesIO(_saved(index))) as archive:
            yield bytes([kinds.index(".pt pickle"), index]) + archive.read("archive/data.pkl")
    yield bytes([kinds.index(".pt file")]) + pickle.dumps({"a": 1})
    yield bytes([kinds.index(".safetensors file")]) + safetensors.torch.save({"a": torch.zeros(3)})
    yield bytes([kinds.index(".pt2 program")]) + _program_text()
    yield bytes([kinds.index(".onnx file")]) + _onnx_model()


def _program_text() -> bytes:
    _as_program(b"")
    return next(content for name, content in _exported.items() if name.endswith("models/model.json"))


def _onnx_model() -> bytes:
    import onnx
    from onnx import TensorProto, helper

    weight = helper.make_tensor("w", TensorProto.FLOAT, (3,), [1.0, 2.0, 3.0])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (2, 3)) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Mul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight])
    content: bytes = onnx.ModelProto.SerializeToString(
        helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    )
    return content


# Calls


class Choices:
    """Bytes as a sequence of choices; when they are used up, every choice is the first."""

    def __init__(self, data: bytes) -> None:
        self._data, self._position = data, 0

    def byte(self) -> int:
        """0 to 255."""
        self._position += 1
        return self._data[self._position - 1] if self._position <= len(self._data) else 0

    def among(self, options: Any) -> Any:
        """One of a sequence."""
        return options[self.byte() % len(options)]

    @property
    def is_over(self) -> bool:
        """Are the bytes used up?"""
        return self._position >= len(self._data)


#: What the lift table knows by name; dropout draws random numbers unless it is told not to.
NAMES = tuple(
    name for name in sorted({*_FUNCTIONS, *STRUCTURAL, *REARRANGEMENTS} - {"getattr", "getitem", "setitem"})
    if "dropout" not in name
)  # fmt: skip
LAYERS = tuple(sorted(MODULES, key=lambda kind: str(kind.__name__)))
SHAPES = ((2, 4, 6, 5), (1, 4), (2, 4, 6), (4,), (2, 4, 1, 1), (3, 2, 4, 4, 3))
NUMBERS = (1, 2, 3, 0, -1, 4, 5, 0.5, -0.25, 1.0, 7, -2, 6)


def call_target(data: bytes, folder: Path) -> str:
    """A program of a few calls of the lift table: what PyTorch computes is what the lifted graph computes."""
    choices = Choices(data)
    generator = torch.Generator().manual_seed(choices.byte())
    x = torch.randn(choices.among(SHAPES), generator=generator, dtype=torch.float64)
    root, graph = nn.Module(), fx.Graph()
    nodes = [graph.placeholder("x")]
    values: dict[fx.Node, Any] = {nodes[0]: x}
    while not choices.is_over and len(nodes) < 6:
        try:
            node, value = _draw_call(choices, graph, root, nodes, values, generator)
        except Exception:  # PyTorch refuses most calls, each in its own way: the next may do
            continue
        if not isinstance(value, Tensor) or value.numel() > 2**16:
            continue
        nodes.append(node)
        values[node] = value
    for node in reversed([node for node in graph.nodes if node not in values and node.op != "get_attr"]):
        graph.erase_node(node)
    graph.output((nodes[-1],))
    program = fx.GraphModule(root, graph)
    try:
        with torch.no_grad():
            expected = program(x.clone())
            if output_difference(expected, program(x.clone())) != 0:
                return "random"
            jitter = 1 + 1e-14 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
            if not output_difference(expected, program(x * jitter)) <= 1e-11:
                return "ill-conditioned"  # what rounding does to it says nothing
    except Exception:  # as above
        return "refused by PyTorch"
    fixed = bool(choices.byte() % 2)
    source = Source(program.graph, program, {"x": x.clone()}, {}, lambda leaves: leaves)
    try:
        lifted: Graph = lift(source, torch.float32, fixed)
    except RgcError as error:
        return type(error).__name__
    difference = output_difference(expected, lifted.evaluate({"x": x.clone()}))
    if not difference <= 1e-9:
        raise AssertionError(f"lifted to another function (off by {difference:.1e}):\n{program.graph}\n{lifted}")
    return "lifted" if len(nodes) > 1 else "empty"


def _draw_call(
    choices: Choices, graph: fx.Graph, root: nn.Module, nodes: list[fx.Node], values: Mapping[fx.Node, Any],
    generator: torch.Generator,
) -> tuple[fx.Node, Any]:  # fmt: skip
    """One more call of the program, and what it returns."""

    def argument(depth: int = 0) -> Any:
        kind = choices.byte() % (9 if depth else 12)
        if kind < 2:
            return nodes[-1 - choices.byte() % len(nodes)]
        if kind < 6:
            return choices.among(NUMBERS)
        if kind == 6:
            return choices.among((None, True, False, "mean", "nearest", "bilinear", "reflect", "constant", torch.int64))
        if kind < 9:
            shape = [choices.among((4, 1, 3, 2, 5)) for _ in range(choices.byte() % 5)]
            name = f"constant_{sum(1 for _ in root.buffers())}"
            root.register_buffer(name, torch.randn(shape, generator=generator, dtype=torch.float64))
            return graph.get_attr(name)
        return [argument(1) for _ in range(choices.byte() % 4)] if kind < 11 else (argument(1), argument(1))

    def real(structure: Any) -> Any:
        return fx.node.map_arg(
            structure,
            lambda node: values[node].clone() if isinstance(values.get(node), Tensor)
            else values[node] if node in values else root.get_buffer(str(node.target)).clone(),
        )  # fmt: skip

    how = choices.byte() % 3
    if how == 0:
        kind = choices.among(LAYERS)
        layer = kind(*[choices.among((4, 1, 2, 3, 5, 0, (2, 1), 0.5)) for _ in range(choices.byte() % 5)])
        layer = _randomised(layer.double().eval(), generator)
        name = f"layer_{sum(1 for _ in root.children())}"
        root.add_module(name, layer)
        node = graph.call_module(name, (nodes[-1],))
        with torch.no_grad():
            return node, layer(*real(node.args))
    name = choices.among(NAMES)
    args = (nodes[-1], *(argument() for _ in range(choices.byte() % 5)))
    home = next((home for home in (F, torch) if callable(getattr(home, name, None))), None)
    if how == 1 and home is not None:
        if home is F and "inplace" in inspect.signature(getattr(F, name)).bind(*args).arguments:
            raise TypeError("a trace shows this argument by its keyword")
        node = graph.call_function(getattr(home, name), args)
        with torch.no_grad():
            return node, getattr(home, name)(*real(args))
    node = graph.call_method(name + ("_" if choices.byte() % 5 == 0 else ""), args)
    first, *rest = real(args)
    with torch.no_grad():
        return node, getattr(first, str(node.target))(*rest)


def _randomised(layer: nn.Module, generator: torch.Generator) -> nn.Module:
    """The layer with statistics, both signs of gamma, and biases of its own."""
    with torch.no_grad():
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            if tensor.is_floating_point() and math.prod(tensor.shape) < 2**16:
                tensor.normal_(generator=generator)
                if name == "running_var":
                    tensor.abs_().add_(0.1)
    return layer


def call_seeds() -> Iterator[bytes]:
    """A program for every layer and every name that chance finds one for, in a few tries each."""
    chance = random.Random(0)
    starts = [(0, index) for index in range(len(LAYERS))]
    starts += [(how, index) for how in (1, 2) for index in range(len(NAMES))]
    for start in starts:
        for _ in range(40):
            tail = bytes(chance.choice((0, 0, 1, 2, 3, 3, 4, 6, 9)) for _ in range(chance.randrange(3, 12)))
            data = bytes([chance.randrange(256), chance.randrange(len(SHAPES)), *start]) + tail
            if call_target(data, Path()) == "lifted":
                yield data
                break


Target = Callable[[bytes, Path], str]
TARGETS: dict[str, tuple[Target, Callable[[], Iterator[bytes]]]] = {
    "loader": (file_target, file_seeds),
    "lift": (call_target, call_seeds),
}

__all__ = ["FILES", "FORBIDDEN", "TARGETS", "call_seeds", "call_target", "file_seeds", "file_target"]


def reproduce(data: bytes, target: str) -> str:
    """Run one input again, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="rgc-fuzz-") as folder:
        return TARGETS[target][0](data, Path(folder))
