"""What is a traced model to rgc? A graph of SSA values: each is an operator, its inputs, a type and an origin.

Operators are frozen dataclasses that cannot be built wrong. Applying one to values makes a new value:
``relu(conv(x))``. Only a `Graph` may rewire the inputs of a value, so a rewrite never has to.
"""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from rgc.errors import GraphError

if TYPE_CHECKING:
    import networkx


@dataclass(frozen=True)
class TensorType:
    """Shape and dtype of a tensor at the example; ``fixed`` says that rewrites may rely on that very size.

    ``size(2)`` is the spatial size of an image batch where it is fixed, otherwise None (any size must work):

    >>> TensorType((1, 3, 32, 32), torch.float32, fixed=True).size(2)
    (32, 32)
    >>> TensorType((1, 3, 32, 32), torch.float32).size(2) is None
    True
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    fixed: bool = False

    def size(self, spatial: int) -> tuple[int, ...] | None:
        """The last ``spatial`` dimensions if this type is fixed, otherwise None."""
        return self.shape[len(self.shape) - spatial :] if self.fixed else None

    def with_shape(self, shape: Iterable[int]) -> TensorType:
        """The same type with another shape."""
        return dataclasses.replace(self, shape=tuple(shape))

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Origin:
    """Where a value comes from in the user's model: module paths, in order, and the source line of the call."""

    paths: tuple[str, ...] = ()
    source: str = ""

    def __or__(self, other: Origin) -> Origin:
        return Origin(tuple(dict.fromkeys(self.paths + other.paths)), self.source or other.source)

    def __str__(self) -> str:
        return " + ".join(self.paths) or self.source or "?"


class Operator(ABC):
    """A function of tensors with its parameters inside: frozen, checked when built, applied with ``op(value)``."""

    affine: ClassVar[bool] = False  # jointly affine in all tensor inputs
    fresh: ClassVar[bool] = True  # the result never shares memory with an input
    #: Fields with their defaults that a rule has to read before it may match any other value.
    geometry: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def evaluate(self, *inputs: Any) -> Any:
        """The result on real tensors, in the dtype of inputs and parameters."""

    @abstractmethod
    def infer(self, *types: TensorType | None) -> TensorType | None:
        """The type of the result; None for what is not a tensor."""

    @property
    def label(self) -> str:
        """A few words for reports and drawings: ``conv 3x3 64->128 /2``."""
        return type(self).__name__.lower()

    @property
    def any_size(self) -> bool:
        """Does the operator accept every spatial size, not only the example's?"""
        return True

    def spatial_axes(self, given: TensorType) -> int | None:
        """How many of the last axes of such a tensor are positions, for what tells them from channels; else None."""
        return None

    @property
    def reach(self) -> tuple[int, int]:
        """How many positions of an axis, beside one, it reads, cuts off or adds at most, and its largest stride."""
        return 0, 1

    def resampled(self, given: TensorType) -> int | None:
        """How many of the last axes of such a tensor it resamples (or averages away), each sample and channel alike.

        None where it is no resampling. One that is affine commutes with any map of the channels, but for what the map
        adds: see `keeps_constants`.
        """
        return None

    @property
    def keeps_constants(self) -> bool:
        """Does it turn a constant into the same constant? Asked of resamplings: counted padding does not."""
        return False

    def cast(self, dtype: torch.dtype) -> Self:
        """The same operator with its floating-point parameters in ``dtype``."""
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # every leaf is a dataclass
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != dtype:
                changed[field.name] = value.to(dtype)
        return dataclasses.replace(self, **changed) if changed else self  # type: ignore[type-var]

    def tensors(self) -> list[Tensor]:
        """The parameters, for counting and hashing."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return [value for value in values if isinstance(value, Tensor)]

    def __call__(self, *inputs: Value) -> Value:
        return Value(self, inputs, self.infer(*(value.type for value in inputs)))


class Value:
    """One SSA value: the result of ``op`` on ``inputs``. Compared by identity."""

    __slots__ = ("__weakref__", "_inputs", "name", "op", "origin", "type")

    def __init__(
        self,
        op: Operator,
        inputs: Sequence[Value],
        type: TensorType | None,
        origin: Origin | None = None,
        name: str = "",
    ) -> None:
        self.op = op
        self._inputs = tuple(inputs)
        self.type = type
        self.origin = origin or Origin()
        self.name = name

    @property
    def inputs(self) -> tuple[Value, ...]:
        """The values that the operator reads, in order."""
        return self._inputs

    @property
    def tensor_type(self) -> TensorType:
        """The type, for a value that must be a tensor."""
        if self.type is None:
            raise GraphError(f"{self.where}: expected a tensor, found {self.op.label}; use its elements instead")
        return self.type

    @property
    def where(self) -> str:
        """The value in the user's names."""
        return ".".join(filter(None, (str(self.origin),))) if self.origin.paths else (self.name or str(self.origin))

    def __repr__(self) -> str:
        return f"<{self.where}: {self.op.label} -> {self.type}>"


@dataclass(frozen=True, eq=False)
class Input(Operator):
    """A placeholder of the model's ``forward``; ``default`` is used where the caller leaves it out."""

    name: str
    default: Any = inspect.Parameter.empty
    fresh: ClassVar[bool] = False

    def evaluate(self, *inputs: Any) -> Any:
        raise GraphError(f"input {self.name!r} has no value; pass one to evaluate()")

    def infer(self, *types: TensorType | None) -> TensorType | None:
        raise GraphError(f"input {self.name!r} cannot be applied to values")


class Graph:
    """Inputs, a nested structure of output values, and who uses what. Linear-time views, constant-time rewiring."""

    def __init__(self, inputs: Sequence[Value], outputs: Any, effects: Sequence[Value] = ()) -> None:
        self.inputs = list(inputs)
        leaves, self._structure = tree_flatten(outputs, is_leaf=lambda leaf: isinstance(leaf, Value))
        self._outputs: list[Any] = list(leaves)
        self.effects = list(effects)
        self._users: dict[Value, dict[Value, None]] = {}
        for value in self._reachable():
            self._users.setdefault(value, {})
            for used in value.inputs:
                self._users.setdefault(used, {})[value] = None

    @property
    def outputs(self) -> Any:
        """The outputs in the structure that ``forward`` returns: values where it returns tensors."""
        return tree_unflatten(self._outputs, self._structure)

    @property
    def output_values(self) -> list[Value]:
        """The values among the outputs, in order; constants of the structure are left out."""
        return [leaf for leaf in self._outputs if isinstance(leaf, Value)]

    def nodes(self) -> list[Value]:
        """Every value that an input, an output or an effect needs, in topological order."""
        return self._reachable()

    def __contains__(self, value: object) -> bool:
        return value in self._users

    def __len__(self) -> int:
        return len(self._users)

    def users(self, value: Value) -> list[Value]:
        """The values that read ``value``, in the order they were made."""
        return list(self._users[value])

    def use_count(self, value: Value) -> int:
        """In how many places ``value`` is read, outputs of the graph included."""
        reads = sum(user.inputs.count(value) for user in self._users[value])
        return reads + sum(leaf is value for leaf in self._outputs)

    def replace(self, old: Value, new: Value) -> list[Value]:
        """Let every user of ``old`` read ``new`` instead; drop what nobody needs any more; return what was added."""
        if new is old:
            return []
        added = self._adopt(new)
        for user in self.users(old):
            if user not in added:  # what is new may read what it replaces
                user._inputs = tuple(new if used is old else used for used in user._inputs)
                self._users[new][user] = None
                del self._users[old][user]
        self._outputs = (
            [new if leaf is old else leaf for leaf in self._outputs] if self._is_output(old) else self._outputs
        )
        self.effects = [new if effect is old else effect for effect in self.effects]
        self._collect([old])
        return added

    def evaluate(self, inputs: Mapping[str, Any], dtype: torch.dtype | None = None) -> Any:
        """Run the graph on real values by input name, parameters cast to ``dtype``; the outputs in their structure."""
        order = self.nodes()
        last_use = {used: index for index, value in enumerate(order) for used in value.inputs}
        keep = set(self.output_values)
        results: dict[Value, Any] = {}
        with torch.no_grad():
            for index, value in enumerate(order):
                results[value] = evaluate_value(value, [results[used] for used in value.inputs], inputs, dtype)
                for used in set(value.inputs):
                    if last_use[used] == index and used not in keep:
                        del results[used]
        return tree_map(lambda leaf: results[leaf] if isinstance(leaf, Value) else leaf, self.outputs, is_leaf=is_value)

    def networkx(self) -> networkx.DiGraph[Value]:
        """The same graph for networkx: an edge from each value to each that reads it."""
        import networkx

        view: networkx.DiGraph[Value] = networkx.DiGraph()
        for value in self.nodes():
            view.add_node(value, label=value.op.label, where=value.where)
            view.add_edges_from((used, value) for used in value.inputs)
        return view

    def __str__(self) -> str:
        names: dict[Value, str] = {}
        lines = []
        for index, value in enumerate(self.nodes()):
            names[value] = f"%{index}"
            arguments = ", ".join(names[used] for used in value.inputs)
            source = f"  # {value.where}" + (f" ({value.origin.source})" if value.origin.source else "")
            lines.append(f"{names[value]} = {value.op.label}({arguments}) : {value.type}{source}")
        returned = tree_map(
            lambda leaf: names[leaf] if isinstance(leaf, Value) else leaf, self.outputs, is_leaf=is_value
        )
        return "\n".join([*lines, f"return {returned}"])

    def _is_output(self, value: Value) -> bool:
        return any(leaf is value for leaf in self._outputs)

    def _reachable(self) -> list[Value]:
        return topological([*self.inputs, *self.effects, *(leaf for leaf in self._outputs if isinstance(leaf, Value))])

    def _adopt(self, new: Value) -> list[Value]:
        added = topological([new], known=self._users.__contains__)
        for value in added:
            self._users[value] = {}
            for used in value.inputs:
                self._users[used][value] = None
        return added

    def _collect(self, candidates: list[Value]) -> None:
        kept = {*self.inputs, *self.effects}
        while candidates:
            value = candidates.pop()
            if value not in self._users or self._users[value] or value in kept or self._is_output(value):
                continue
            del self._users[value]
            for used in dict.fromkeys(value.inputs):
                self._users[used].pop(value, None)
                candidates.append(used)


def is_value(leaf: object) -> bool:
    """Is this leaf of a nested structure a value of the graph?"""
    return isinstance(leaf, Value)


def evaluate_value(
    value: Value, arguments: Sequence[Any], inputs: Mapping[str, Any], dtype: torch.dtype | None = None
) -> Any:
    """The result of one value on real ``arguments``; a graph input takes its value from ``inputs`` by name."""
    if isinstance(value.op, Input):
        given = inputs.get(value.op.name, value.op.default)
        return value.op.evaluate() if given is inspect.Parameter.empty else given
    return (value.op if dtype is None else value.op.cast(dtype)).evaluate(*arguments)


def topological(roots: Iterable[Value], known: Callable[[Value], bool] = lambda _: False) -> list[Value]:
    """Everything that ``roots`` depend on and is not ``known``, each value after its inputs (no recursion)."""
    order: list[Value] = []
    state: dict[Value, bool] = {}  # False: inputs under way, True: done
    stack: list[tuple[Value, Iterator[Value]]] = []

    def enter(value: Value) -> None:
        if known(value) or state.get(value):
            return
        if value in state:
            raise GraphError(f"{value.where}: the value depends on itself; a graph must not have cycles")
        state[value] = False
        stack.append((value, iter(value.inputs)))

    for root in roots:
        enter(root)
        while stack:
            value, pending = stack[-1]
            following = next(pending, None)
            if following is not None:
                enter(following)
                continue
            stack.pop()
            state[value] = True
            order.append(value)
    return order
