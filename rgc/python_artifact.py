"""How is a compiled model written to, and read from, a folder of readable Python that needs only torch?"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from rgc.errors import InputError
from rgc.python_layers import LayerTree, layer_source
from rgc.python_source import forward_source
from rgc.weights_file import repeated_name

MODEL_FILE = "model.py"
WEIGHTS_FILE = "model.safetensors"

SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

TEMPLATE = '''"""A neural network of {count} layers, written by rgc. It needs only torch.

    from model import load
    model = load()

The weights are in {weights_file}, beside this file.
"""

import json
import math
import operator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
{init}

{forward}

{block}def load(path=None, device="cpu"):
    """The model with its weights, in eval mode; ``path`` is another weights file of the same model."""
    weights = read_safetensors(path or Path(__file__).with_name("{weights_file}"))
    with torch.device("meta"):  # the layers' own random weights are never made
        model = Model()
{load}
    return model.to(device).eval()


def read_safetensors(path):
    """Every tensor of a .safetensors file by name: the header's length, the header in JSON, the values."""
    dtypes = {dtypes}
    tensors = {{}}
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                file.seek(start + first)
                values = bytearray(file.read(last - first))
                dtype = dtypes[entry["dtype"]]
                flat = torch.frombuffer(values, dtype=dtype).clone() if values else torch.empty(0, dtype=dtype)
                tensors[name] = flat.reshape(entry["shape"])
    return tensors
'''

BLOCK = '''class Block(nn.Module):
    """Layers, parameters and buffers, each under its own name."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            else:
                self.register_buffer(name, part)


'''


def write_folder(module: nn.Module, path: Path) -> tuple[str, ...]:
    """Write ``model.py`` and ``model.safetensors`` into the new folder ``path``; returns remarks for the user.

    The names in ``state_dict()``, the dtypes and the sharing of parameters stay as they are in ``module``.
    Raises InputError, naming it, for a layer or function that is not torch's own.
    """
    from safetensors.torch import save

    if not isinstance(module, fx.GraphModule):
        raise InputError(f"only a compiled model can be written as Python; got {type(module).__name__}")
    source, weights = _source_and_weights(module)
    path.mkdir()
    (path / MODEL_FILE).write_text(source, encoding="utf-8")
    (path / WEIGHTS_FILE).write_bytes(save(weights, metadata={"format": "pt"}))
    return ()


def read_folder(path: Path) -> nn.Module:
    """Run the folder's ``model.py`` and return its model with its weights. Raises InputError if that fails."""
    for name in (MODEL_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise InputError(f"{path} is not a Python artifact: it has no {name}")
    if (repeated := repeated_name(path / WEIGHTS_FILE)) is not None:
        raise InputError(f"{path / WEIGHTS_FILE} names {repeated[:80]!r} twice, and readers differ in which they take")
    spec = importlib.util.spec_from_file_location("_rgc_artifact_model", path / MODEL_FILE)
    assert spec is not None and spec.loader is not None
    namespace = importlib.util.module_from_spec(spec)
    # Executed from its text, so that no byte code appears in the user's folder.
    try:
        text = (path / MODEL_FILE).read_text(encoding="utf-8")
        exec(compile(text, str(path / MODEL_FILE), "exec", dont_inherit=True), namespace.__dict__)
        model = namespace.load()
    except Exception as error:  # it is the file's own code, on weights that may not fit it: both may raise anything
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"{path} cannot be loaded: {type(error).__name__}: {reason}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{path} is not a Python artifact: its load() returns a {type(model).__name__}")
    return model


def _source_and_weights(module: fx.GraphModule) -> tuple[str, dict[str, Tensor]]:
    layers = {node.target: module.get_submodule(node.target) for node in module.graph.nodes if node.op == "call_module"}
    constructors = {name: layer_source(layer, name) for name, layer in layers.items()}
    tensors = dict(_tensors(module))
    loose = {name: tensor for name, tensor in tensors.items() if not _is_inside(name, constructors)}
    tree = LayerTree(constructors, {name: _placeholder_source(tensor) for name, tensor in loose.items()})
    weights, load_lines = _weights_and_loading(module, tensors, tree)
    init = "\n".join(f"        {line}" for line in tree.init_lines())
    used = sorted({tensor.dtype for tensor in weights.values()}, key=str)
    source = TEMPLATE.format(
        count=len(layers),
        weights_file=WEIGHTS_FILE,
        init=init,
        forward=forward_source(module.graph, tree.access),
        block=f"\n{BLOCK}" if "Block(" in init else "\n",
        load="\n".join(f"    {line}" for line in load_lines),
        dtypes="{" + ", ".join(f'"{SAFETENSORS_NAMES[dtype]}": {dtype}' for dtype in used) + "}",
    )
    body = source.split("from torch import nn\n", 1)[1]
    for name, statement in {"math": "import math\n", "operator": "import operator\n",
                            "F": "import torch.nn.functional as F\n"}.items():  # fmt: skip
        if f"{name}." not in body:
            source = source.replace(statement, "", 1)
    return source, weights


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under each of its names, and every plain tensor that the graph reads."""
    state = module.state_dict(keep_vars=True)
    yield from state.items()
    yield from ((name, buffer) for name, buffer in module.named_buffers(remove_duplicate=False) if name not in state)
    if isinstance(module, fx.GraphModule):
        for name in sorted({node.target for node in module.graph.nodes if node.op == "get_attr"} - set(state)):
            value = module
            for part in name.split("."):
                value = getattr(value, part)
            if not isinstance(value, Tensor):
                raise InputError(f"attribute {name!r} is no tensor ({type(value).__name__}); save as .pt2 or .onnx")
            yield name, value


def _is_inside(name: str, layers: dict[str, str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:length]) in layers for length in range(1, len(parts)))


def _placeholder_source(tensor: Tensor) -> str:
    shape = ", ".join(str(size) for size in tensor.shape) if tensor.dim() else "()"
    empty = f"torch.empty({shape})" if tensor.dtype == torch.float32 else f"torch.empty({shape}, dtype={tensor.dtype})"
    return f"nn.Parameter({empty})" if isinstance(tensor, nn.Parameter) else empty


def _weights_and_loading(
    module: nn.Module, tensors: dict[str, Tensor], tree: LayerTree
) -> tuple[dict[str, Tensor], list[str]]:
    """What goes into the file, each shared tensor once, and the lines that put it back, shared again."""
    persistent = module.state_dict()
    weights: dict[str, Tensor] = {}
    first_names: dict[tuple[object, ...], str] = {}
    shared: list[tuple[str, str]] = []
    lines: list[str] = []
    for name, tensor in tensors.items():
        if tensor.dtype not in SAFETENSORS_NAMES or tensor.layout != torch.strided:
            raise InputError(f"tensor {name!r} ({tensor.dtype}, {tensor.layout}) cannot be stored; save as .pt2")
        same = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        first = first_names.setdefault(same, name) if tensor.numel() else name
        if first != name:
            shared.append((name, first))
            continue
        order = _memory_order(tensor)
        weights[name] = tensor.detach().cpu().permute(order).contiguous().clone()
        if order != sorted(order):
            inverse = [order.index(axis) for axis in range(tensor.dim())]
            lines.append(f"weights[{name!r}] = weights[{name!r}].permute({inverse})  # its order in memory")
    lines += [f"weights[{name!r}] = weights[{first!r}]  # one tensor, two names" for name, first in shared]
    lines.append("model.load_state_dict(weights, assign=True)")
    lines += [
        f"{tree.access(name, 'model')} = {tree.access(first, 'model')}"
        for name, first in shared
        if isinstance(tensors[name], nn.Parameter) and isinstance(tensors[first], nn.Parameter)
    ]
    for name in tensors:
        if name not in persistent:  # buffers that state_dict() leaves out
            owner, _, last = name.rpartition(".")
            group = tree.access(owner, "model") if owner else "model"
            lines.append(f"{group}.register_buffer({last!r}, {tree.access(name, 'model')}, persistent=False)")
    return weights, lines


def _memory_order(tensor: Tensor) -> list[int]:
    """The axes from the slowest to the fastest in memory: the order of axes decides the order of sums in a kernel."""
    if tensor.is_contiguous() or 0 in tensor.stride():
        return list(range(tensor.dim()))
    return sorted(range(tensor.dim()), key=lambda axis: -tensor.stride()[axis])
