"""What does readable Python that builds a model's layers, under their nested names, look like?"""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from rgc.errors import InputError
from rgc.python_source import literal

CANNOT = "cannot be written as readable Python; save as .pt2 or .onnx instead"


def layer_source(layer: nn.Module, name: str) -> str:
    """The constructor call that builds ``layer``, checked by running it: ``nn.Conv2d(3, 64, kernel_size=7, stride=2)``.

    Raises InputError if the layer is not an unmodified instance of one of torch.nn's classes.
    """
    kind = type(layer)
    if getattr(nn, kind.__name__, None) is not kind:
        raise InputError(f"layer {name!r} of class {kind.__module__}.{kind.__qualname__} {CANNOT}")
    if isinstance(layer, nn.Sequential):
        parts = [layer_source(part, f"{name}.{key}") for key, part in layer.named_children()]
        if [key for key, _ in layer.named_children()] == [str(index) for index in range(len(parts))]:
            return f"nn.Sequential({', '.join(parts)})"
        raise InputError(f"layer {name!r}, an nn.Sequential with gaps in its numbering, {CANNOT}")
    arguments = _constructor_arguments(layer)
    try:
        with torch.device("meta"):
            rebuilt = kind(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"layer {name!r} of class nn.{kind.__name__} {CANNOT}") from error
    if difference := _first_difference(layer, rebuilt):
        described = f"layer {name!r} of class nn.{kind.__name__}"
        raise InputError(f"{described} differs from a fresh one in {difference}: it {CANNOT}")
    return f"nn.{kind.__name__}({', '.join(_argument_sources(kind, arguments))})"


class LayerTree:
    """Layers and tensors by dotted name, and how they are built in ``__init__`` and reached from ``self``.

    A group whose members are the layers 0, 1, 2... is an nn.ModuleList, one with another layer that is no Python name
    an nn.ModuleDict, any other a ``Block``. What no Python name can reach in a Block is reached by ``getattr``.
    """

    def __init__(self, layers: Mapping[str, str], tensors: Mapping[str, str]) -> None:
        """``layers`` and ``tensors`` map dotted names to the source that builds them."""
        self._root: dict[str, Any] = {}
        self._tensors = frozenset(tensors)
        for name, source in [*layers.items(), *tensors.items()]:
            *groups, last = name.split(".")
            group = self._root
            for part in groups:
                group = group.setdefault(part, {})
                if not isinstance(group, dict):
                    raise InputError(f"{name!r} is used beside a layer that it is a part of; it {CANNOT}")
            if last in group:
                raise InputError(f"{name!r} is both a layer and a group of layers; it {CANNOT}")
            group[last] = source
        for part in self._root:
            _require_free_name(part, part)

    def init_lines(self) -> Iterator[str]:
        """The statements of ``__init__``, without indentation."""
        if not self._root:
            yield "pass"
        for name, part in self._root.items():
            if name in self._tensors and not part.startswith("nn.Parameter"):
                yield f"self.register_buffer({name!r}, {part})"
            elif not _is_identifier(name):
                kind = "register_parameter" if name in self._tensors else "add_module"
                yield from f"self.{kind}({name!r}, {self._build(part, name)})".split("\n")
            else:
                yield from f"self.{name} = {self._build(part, name)}".split("\n")

    def access(self, name: str, root: str = "self") -> str:
        """The expression for a layer, or for a tensor of one, from ``root``."""
        source = root
        group: dict[str, Any] | None = self._root
        path = ""
        for part in name.split("."):
            kind = self._kind(group, path) if isinstance(group, dict) and group is not self._root else "Block"
            kind = "nn.ModuleList" if group is None and part.isdecimal() else kind  # inside an nn.Sequential
            if kind == "Block":
                source = f"{source}.{part}" if _is_identifier(part) else f"getattr({source}, {part!r})"
            else:
                source += f"[{part}]" if kind == "nn.ModuleList" else f"[{part!r}]"
            path = f"{path}.{part}".lstrip(".")
            group = group.get(part) if isinstance(group, dict) else None
        return source

    def _kind(self, group: dict[str, Any], path: str) -> str:
        if any(f"{path}.{key}" in self._tensors for key in group):
            return "Block"
        return _group_kind(group)

    def _build(self, part: Any, name: str) -> str:
        if isinstance(part, str):
            return part
        kind = self._kind(part, name)
        if kind == "Block":
            members = []
            for key, member in part.items():
                _require_free_name(key, f"{name}.{key}")
                built = self._build(member, f"{name}.{key}")
                members.append(f"{key}={built}" if _is_identifier(key) else f"**{{{key!r}: {built}}}")
            return _call("Block(", members, ")")
        if kind == "nn.ModuleList":
            ordered = sorted(part, key=int)
            return _call("nn.ModuleList([", [self._build(part[key], f"{name}.{key}") for key in ordered], "])")
        for key in part:
            if hasattr(nn.ModuleDict, key) or not key:
                raise InputError(f"{name}.{key} has a name that torch.nn.ModuleDict reserves: the model {CANNOT}")
        members = [f"{key!r}: {self._build(member, f'{name}.{key}')}" for key, member in part.items()]
        return _call("nn.ModuleDict({", members, "})")


def _constructor_arguments(layer: nn.Module) -> dict[str, Any]:
    """The constructor's arguments, read back from the attributes of the same names; defaults are left out."""
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(layer).__init__).parameters.items():
        if name in ("self", "device", "dtype") or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = getattr(layer, name, parameter.default)
        if name == "bias" and (value is None or isinstance(value, torch.Tensor)):
            value = value is not None
        value = _without_repetition(name, value)
        if value is parameter.empty or isinstance(value, torch.Tensor):
            continue
        is_default = type(value) is type(parameter.default) and value == parameter.default
        if not is_default:
            arguments[name] = value
    return arguments


def _without_repetition(name: str, value: Any) -> Any:
    """``3`` for the ``(3, 3)`` that torch makes of it; shapes stay whole."""
    is_per_axis = name in ("kernel_size", "stride", "padding", "dilation", "output_padding")
    if is_per_axis and isinstance(value, tuple) and value and all(item == value[0] for item in value):
        return value[0]
    return value


def _argument_sources(kind: type[nn.Module], arguments: dict[str, Any]) -> Iterator[str]:
    """The first arguments by position while they have no default and none is skipped, then by name."""
    is_leading = True
    for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        is_size = name in ("kernel_size", "output_size", "normalized_shape", "num_parameters")
        is_required = name in arguments and parameter.default is parameter.empty
        is_leading &= is_required and (not is_size or len(arguments) == 1)
        if name in arguments:
            yield literal(arguments[name]) if is_leading else f"{name}={literal(arguments[name])}"


def _first_difference(layer: nn.Module, rebuilt: nn.Module) -> str | None:
    ours, fresh = layer.state_dict(), rebuilt.state_dict()
    if {name: tensor.shape for name, tensor in ours.items()} != {name: tensor.shape for name, tensor in fresh.items()}:
        return "its parameters"
    if "forward" in vars(layer):
        return "'forward'"
    for name, value in vars(rebuilt).items():
        if name in ("training", "_parameters", "_buffers", "_modules") or isinstance(value, torch.Tensor):
            continue
        if name not in vars(layer) or vars(layer)[name] != value:
            return "a hook" if "hooks" in name else repr(name)
    return None


def _group_kind(group: dict[str, Any]) -> str:
    if set(group) == {str(index) for index in range(len(group))}:
        return "nn.ModuleList"
    return "Block" if all(map(_is_identifier, group)) else "nn.ModuleDict"


def _is_identifier(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)


def _require_free_name(name: str, path: str) -> None:
    if not name or hasattr(nn.Module(), name):
        raise InputError(f"{path!r} is a name that torch.nn.Module reserves: the model {CANNOT}")


def _call(opening: str, members: list[str], closing: str) -> str:
    """A call with one member a line, or on one line where it is short."""
    line = f"{opening}{', '.join(members)}{closing}"
    if len(members) < 2 and "\n" not in line:
        return line
    body = "".join(f"{member},\n" for member in members)
    return opening + "\n" + "".join(f"    {text}\n" for text in body.splitlines()) + closing
