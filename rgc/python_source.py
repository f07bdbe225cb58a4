"""What readable Python computes what an fx graph computes?"""

from __future__ import annotations

import builtins
import keyword
import math
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from rgc.errors import InputError

CANNOT = "cannot be written as readable Python; save as .pt2 or .onnx instead"
INFIX = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/", operator.floordiv: "//",
    operator.mod: "%", operator.matmul: "@", operator.pow: "**", operator.eq: "==", operator.ne: "!=",
    operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=", operator.and_: "&", operator.or_: "|",
}  # fmt: skip
NAMESPACES: tuple[tuple[str, Any], ...] = (
    ("F", F),
    ("torch", torch),
    ("operator", operator),
    ("math", math),
    ("torch.linalg", torch.linalg),
    ("torch.special", torch.special),
    ("torch.fft", torch.fft),
    ("torch._C._nn", torch._C._nn),
    ("", builtins),
)
SAFE_BUILTINS = frozenset(
    ["abs", "bool", "float", "getattr", "int", "len", "list", "max", "min", "round", "slice", "sum", "tuple"]
)
IMPORTED = ("torch", "nn", "F", "math", "operator")
RESERVED = frozenset({"self", *IMPORTED, *dir(builtins), *keyword.kwlist})
SHORT_NAMES = ("x", "y", "z", "u", "v", "w")


def forward_source(graph: fx.Graph, access: Callable[[str], str]) -> str:
    """The method ``forward``: one line for each operation; ``access`` gives the expression for a layer or tensor.

    Raises InputError for a function that is not torch's own or Python's arithmetic, or a value with no plain notation.
    """
    if type(graph._codegen) is not fx.graph.CodeGen:
        raise InputError(f"a model whose inputs are nested containers {CANNOT}")
    return _ForwardWriter(graph, access).source()


def literal(value: object) -> str:
    """Python source for a plain value. Strings are always quoted; nothing of a model is pasted in as it is."""
    if value is None or value is Ellipsis or type(value) in (bool, int, str):
        return "..." if value is Ellipsis else repr(value)
    if type(value) is float:
        return repr(value) if math.isfinite(value) else f'float("{value}")'
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, (list, tuple, dict, slice)):
        return _container(value, literal)
    raise InputError(f"a value of class {type(value).__name__} {CANNOT}")


class _ForwardWriter:
    def __init__(self, graph: fx.Graph, access: Callable[[str], str]) -> None:
        self.graph = graph
        self.access = access
        self.names: dict[fx.Node, str] = {}
        self.reusable: dict[str, int] = {}  # variables of our own, with their age
        self.parameters = {node.target.lstrip("*") for node in graph.nodes if node.op == "placeholder"}
        self.last_use = {used: node for node in graph.nodes for used in node.all_input_nodes}

    def source(self) -> str:
        parameters = ["self", *self._parameters()]
        lines = [f"        {line}" for node in self.graph.nodes for line in self._statement(node)]
        return f"    def forward({', '.join(parameters)}):\n" + "\n".join(lines)

    def _parameters(self) -> Iterator[str]:
        for node in self.graph.find_nodes(op="placeholder"):
            name = node.target.lstrip("*")
            if not name.isidentifier() or keyword.iskeyword(name) or name in ("self", *IMPORTED):
                raise InputError(f"an input named {node.target!r} {CANNOT}")
            self.names[node] = name
            if name in SHORT_NAMES:
                self.reusable[name] = len(self.reusable)
            yield node.target if not node.args else f"{node.target}={literal(node.args[0])}"

    def _statement(self, node: fx.Node) -> Iterator[str]:
        if node.op == "placeholder":
            return
        if node.op == "output":
            yield f"return {self._value(node.args[0])}"
        elif node.op == "get_attr":
            self.names[node] = self.access(str(node.target))
        elif not node.users:
            yield self._expression(node)
        else:
            expression = self._expression(node)
            self.names[node] = self._variable(node)
            yield f"{self.names[node]} = {expression}"

    def _variable(self, node: fx.Node) -> str:
        """The oldest variable that ends here, as one would write by hand, or else a new one."""
        ending = [self.names[used] for used in node.all_input_nodes if self.last_use[used] is node]
        ending = sorted((name for name in ending if name in self.reusable), key=self.reusable.__getitem__)
        if ending:
            return ending[0]
        in_use = {name for used, name in self.names.items() if self._is_needed_after(used, node)} | self.parameters
        wanted = [*SHORT_NAMES] if node.op == "call_module" else []
        wanted.append(re.sub(r"\W", "_", node.name, flags=re.ASCII))
        name = next((name for name in wanted if name not in in_use and name not in RESERVED), wanted[-1])
        while name in in_use or name in RESERVED or not name.isidentifier():
            name = f"v_{name}"
        self.reusable.setdefault(name, len(self.reusable))
        return name

    def _is_needed_after(self, used: fx.Node, node: fx.Node) -> bool:
        return used in self.last_use and (self.last_use[used] > node)

    def _expression(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return self._call(self.access(str(node.target)), node)
        if node.op == "call_method":
            method = str(node.target)
            if not method.isidentifier() or keyword.iskeyword(method):
                raise InputError(f"method {method!r} {CANNOT}")
            return self._call(f"{self._operand(node.args[0])}.{method}", node, first=1)
        return self._function(node)

    def _function(self, node: fx.Node) -> str:
        target, args = node.target, node.args
        assert callable(target)
        if target in INFIX and len(args) == 2 and not node.kwargs:
            return f"{self._operand(args[0])} {INFIX[target]} {self._operand(args[1])}"
        if target is operator.neg and len(args) == 1:
            return f"-{self._operand(args[0])}"
        if target is operator.getitem and len(args) == 2:
            return f"{self._operand(args[0])}[{self._index(args[1])}]"
        if target is getattr and len(args) == 2 and isinstance(args[1], str) and args[1].isidentifier():
            return f"{self._operand(args[0])}.{args[1]}"
        return self._call(_function_name(target, node), node)

    def _call(self, function: str, node: fx.Node, first: int = 0) -> str:
        arguments = [self._value(value) for value in node.args[first:]]
        for name, value in node.kwargs.items():
            if not name.isidentifier() or keyword.iskeyword(name):
                raise InputError(f"keyword argument {name!r} of {node.name} {CANNOT}")
            arguments.append(f"{name}={self._value(value)}")
        return f"{function}({', '.join(arguments)})"

    def _operand(self, value: Any) -> str:
        text = self._value(value)
        return text if isinstance(value, fx.Node) or re.fullmatch(r"[\w.]+", text) else f"({text})"

    def _index(self, value: Any) -> str:
        if isinstance(value, tuple) and value:
            return ", ".join(self._index(item) for item in value) + ("," if len(value) == 1 else "")
        if isinstance(value, slice):
            ends = (value.start, value.stop, value.step)
            start, stop, step = ("" if end is None else self._value(end) for end in ends)
            return f"{start}:{stop}:{step}" if step else f"{start}:{stop}"
        return self._value(value)

    def _value(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.names[value]
        if isinstance(value, (list, tuple, dict, slice)):
            return _container(value, self._value)
        return literal(value)


def _container(value: list[Any] | tuple[Any, ...] | dict[Any, Any] | slice, item: Callable[[Any], str]) -> str:
    if isinstance(value, slice):
        return f"slice({item(value.start)}, {item(value.stop)}, {item(value.step)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{item(key)}: {item(part)}" for key, part in value.items()) + "}"
    if isinstance(value, tuple):
        if hasattr(value, "_fields"):
            raise InputError(f"a named tuple {type(value).__name__} {CANNOT}")
        return "(" + ", ".join(item(part) for part in value) + (",)" if len(value) == 1 else ")")
    return "[" + ", ".join(item(part) for part in value) + "]"


def _function_name(function: Callable[..., Any], node: fx.Node) -> str:
    """The dotted name under which a function of torch or Python's own arithmetic is found."""
    if isinstance(function, torch._ops.OpOverload):
        namespace, _, name = function._schema.name.partition("::")
        if namespace in ("aten", "prims") and re.fullmatch(r"\w+", name + function._overloadname):
            return f"torch.ops.{namespace}.{name}.{function._overloadname}"
    for prefix, namespace in NAMESPACES:
        for name in (getattr(function, "__name__", ""), *_names_in(namespace, function)):
            is_found = name.isidentifier() and getattr(namespace, name, None) is function
            if is_found and (namespace is not builtins or name in SAFE_BUILTINS):
                return f"{prefix}.{name}" if prefix else name
    described = f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', function)}"
    raise InputError(f"function {described} (node {node.name!r}) {CANNOT}")


def _names_in(namespace: Any, function: Callable[..., Any]) -> Iterator[str]:
    """Other names of the function: ``F.max_pool2d`` is an object called ``fn``."""
    return (name for name, value in vars(namespace).items() if value is function and not name.startswith("__"))
