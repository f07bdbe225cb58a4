"""How is a rewrite stated? A decorated function: pattern and result are plain expressions, guards give reasons.

    @rewrite(lambda x, conv, bn: bn(conv(x)))
    def fold_batchnorm(x: Value, conv: Conv, bn: BatchNorm) -> Value:
        require(not bn.training, "batch norm still uses batch statistics; call model.eval() first")
        return (bn.as_linear() @ conv)(x)

The parameters of the function are the holes of the pattern. A hole is typed by what may fill it: ``Value`` (anything),
an operator class, `Linear` (any linear operator), `Region` or `Join` (an affine part of the graph), or
``Annotated[Conv, predicate]`` for what satisfies a predicate. ``+``, ``-`` and ``*`` stand for `Add` and `Multiply`;
sums match in both orders.

A rewrite that is equal only where `rgc.range_of` says that the values lie declares it: ``relies_on_range=True``.
"""

from __future__ import annotations

import importlib
import inspect
import pickle
import sys
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Annotated, Any

from torch import nn

from rgc.errors import GraphError, RgcError
from rgc.ir import Graph, Operator, Value
from rgc.operators import Add, Multiply
from rgc.region import PartialJoin, Region

Predicate = Callable[[Any], bool]


@dataclass(frozen=True)
class Hole:
    """A named place in a pattern: for a value, or, when applied, for an operator."""

    name: str

    def __call__(self, *arguments: Term) -> Applied:
        return Applied(self.name, arguments)

    def __add__(self, other: Term) -> Sum:
        return Sum(self, other, 1)

    def __sub__(self, other: Term) -> Sum:
        return Sum(self, other, -1)

    def __mul__(self, other: Term) -> Product:
        return Product(self, other)


@dataclass(frozen=True)
class Applied:
    """An operator hole applied to terms."""

    operator: str
    arguments: tuple[Term, ...]
    __add__, __sub__, __mul__ = Hole.__add__, Hole.__sub__, Hole.__mul__


@dataclass(frozen=True)
class Sum:
    """left + sign * right."""

    left: Term
    right: Term
    sign: int
    __add__, __sub__, __mul__ = Hole.__add__, Hole.__sub__, Hole.__mul__


@dataclass(frozen=True)
class Product:
    """left * right."""

    left: Term
    right: Term
    __add__, __sub__, __mul__ = Hole.__add__, Hole.__sub__, Hole.__mul__


Term = Hole | Applied | Sum | Product


@dataclass(frozen=True)
class Match:
    """What fills the holes, and the values between them that the rewrite would make superfluous."""

    values: dict[str, Value] = field(default_factory=dict)
    operators: dict[str, Operator] = field(default_factory=dict)
    interior: tuple[Value, ...] = ()
    partial: PartialJoin | None = None

    @property
    def root(self) -> Value:
        """The value that is replaced."""
        return self.interior[0]

    @property
    def target(self) -> Value:
        """The value that the rewrite speaks of: the root, or some addends of the sum that ends there."""
        return self.root if self.partial is None else self.partial.join.sink

    def embed(self, value: Value) -> Value:
        """What replaces the root, where ``value`` replaces the target."""
        return value if self.partial is None else self.partial.embed(value)


@dataclass(frozen=True)
class Case:
    """One pattern with the function that makes its result, and the classes of its holes.

    ``relies_on_range``: equal for values in the ranges of the matched ones, not for any. It is checked for those, and
    its record names them. ``weighed``: made only where it pays; a form that is asked for by name is made anyway.
    """

    pattern: Term
    build: Callable[..., Value]
    holes: dict[str, tuple[Any, tuple[Predicate, ...]]]
    relies_on_range: bool = False
    weighed: bool = True

    @property
    def matches_regions(self) -> bool:
        """Is the whole pattern one affine region?"""
        return isinstance(self.pattern, Applied) and self._region_class() is not None

    @property
    def matches_parts(self) -> bool:
        """Is the whole pattern any part of an affine region, not only where branches join?"""
        return isinstance(self.pattern, Applied) and self._region_class() is Region

    @property
    def is_pair(self) -> bool:
        """Is the pattern two operators in a row, second(first(x))?"""
        outer = self.pattern
        inner = outer.arguments[0] if isinstance(outer, Applied) and len(outer.arguments) == 1 else None
        return isinstance(inner, Applied) and len(inner.arguments) == 1 and isinstance(inner.arguments[0], Hole)

    def _region_class(self) -> type[Region] | None:
        kind = self.holes[self.pattern.operator][0] if isinstance(self.pattern, Applied) else None
        return kind if isinstance(kind, type) and issubclass(kind, Region) else None

    def match(self, value: Value) -> Iterator[Match]:
        """Every way in which the pattern ends at ``value``."""
        return _match(self.pattern, value, Match(), self.holes)

    def match_region(self, region: Region) -> Match | None:
        """The match of a whole region, if it is of the class that the hole asks for."""
        kind = self._region_class()
        if kind is None or type(region) is not kind:
            return None
        assert isinstance(self.pattern, Applied) and isinstance(self.pattern.arguments[0], Hole)
        if not _satisfies(region, self.holes[self.pattern.operator][1]):
            return None
        source = self.pattern.arguments[0].name
        return Match({source: region.source}, {self.pattern.operator: region}, region.values[::-1])

    def match_partial(self, partial: PartialJoin) -> Match | None:
        """The match of some addends of a sum: sums are matched modulo order and bracketing."""
        match = self.match_region(partial.join)
        return None if match is None else replace(match, interior=partial.merged, partial=partial)


@dataclass(frozen=True)
class Example:
    """A model on which a rewrite must fire, or must not and say why; it is test and documentation at once."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    fires: bool
    because: str = ""
    fixed_size: bool = False

    @property
    def name(self) -> str:
        """The example's name as words."""
        return self.build.__name__.replace("_", " ")


#: What makes the model of an example, and is decorated with `fires_on` or `leaves_alone`.
Factory = Callable[[], nn.Module]


class WithExamples:
    """What has examples, and decorators that add to them."""

    examples: list[Example]

    def fires_on(self, shape: tuple[int, ...], *, fixed_size: bool = False) -> Callable[[Factory], Factory]:
        """The decorated factory makes a model on which the pass fires; ``fixed_size`` as under --passes all."""
        return self._attaching(shape, fires=True, fixed_size=fixed_size)

    def leaves_alone(
        self, shape: tuple[int, ...], because: str, *, fixed_size: bool = False
    ) -> Callable[[Factory], Factory]:
        """The decorated factory makes a model that the pass leaves as it is, with ``because`` in a rewrite's reason."""
        return self._attaching(shape, fires=False, because=because, fixed_size=fixed_size)

    def _attaching(self, shape: tuple[int, ...], **how: Any) -> Callable[[Factory], Factory]:
        def attach(build: Factory) -> Factory:
            self.examples.append(Example(build, shape, **how))
            return build

        return attach


@dataclass(frozen=True, eq=False)
class Rewrite(WithExamples):
    """A named rewrite: its cases in the order in which they are tried, and its examples."""

    name: str
    statement: str
    cases: list[Case]
    examples: list[Example]

    def also(
        self, pattern: Callable[..., Term], *, relies_on_range: bool = False, weighed: bool = True
    ) -> Callable[[Callable[..., Value]], Rewrite]:
        """Another pattern of the same rewrite, with a function of its own."""

        def attach(build: Callable[..., Value]) -> Rewrite:
            self.cases.append(_case(pattern, build, relies_on_range, weighed))
            return self

        return attach

    def __reduce__(self) -> Any:
        return _by_name(self, self.cases[0].build.__module__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rewrite:
        return self


@dataclass(frozen=True, eq=False)
class GraphPass(WithExamples):
    """A named function from graph to graph, for what no local pattern says. Checked as a whole."""

    name: str
    statement: str
    run: Callable[[Graph], Graph]
    examples: list[Example] = field(default_factory=list)

    def __reduce__(self) -> Any:
        return _by_name(self, self.run.__module__)

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphPass:
        return self


Pass = Rewrite | GraphPass


def rewrite(
    pattern: Callable[..., Term], *, relies_on_range: bool = False, weighed: bool = True
) -> Callable[[Callable[..., Value]], Rewrite]:
    """Turn a function into a rewrite; ``pattern`` is a lambda whose parameters are holes.

    Raises `GraphError` where pattern and function name different holes, or a hole is unused or has no fitting type.
    """

    def make(build: Callable[..., Value]) -> Rewrite:
        statement = inspect.getdoc(build) or inspect.getdoc(inspect.getmodule(build)) or ""
        return Rewrite(build.__name__, statement, [_case(pattern, build, relies_on_range, weighed)], [])

    return make


def graph_pass(run: Callable[[Graph], Graph]) -> GraphPass:
    """Turn a function from graph to graph into a pass: the escape hatch for what no local pattern says."""
    statement = inspect.getdoc(run) or inspect.getdoc(inspect.getmodule(run)) or ""
    return GraphPass(run.__name__, statement, run)


def _by_name(own: Pass, module: str) -> tuple[Callable[[str, str], Any], tuple[str, str]]:
    """How to pickle a pass: as where it is found, the way functions are."""
    if vars(sys.modules.get(module, types)).get(own.name) is not own:
        raise pickle.PicklingError(
            f"the pass {own.name} is not {module}.{own.name}, where unpickling would look for it"
        )
    return _imported, (module, own.name)


def _imported(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def observed(op: Operator) -> Operator:
    """The same operator, remembering which of its geometry fields are read (see `unread_geometry`)."""
    if not op.geometry:
        return op
    copy = object.__new__(_observed_class(type(op)))
    copy.__dict__.update(op.__dict__, _original=op, _reads=set())
    return copy


def unread_geometry(op: Operator) -> list[str]:
    """The geometry fields that are not at their default and that nobody has read."""
    reads = op.__dict__.get("_reads")
    if reads is None:
        return []
    return [name for name, default in op.geometry.items() if name not in reads and not _is(op.__dict__[name], default)]


def _is(value: Any, default: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is(item, default) for item in value)
    return value is default if default is None or value is None else bool(value == default)


#: Views that state sizes, not geometry: reading them says nothing about the stride or the padding.
_PLAIN_VIEWS = frozenset({"label", "kernel", "channels", "in_channels", "out_channels", "spatial"})


@cache
def _observed_class(cls: type[Operator]) -> type[Operator]:
    def get(self: Any, name: str) -> Any:
        state = object.__getattribute__(self, "__dict__")
        if name in cls.geometry and "_reads" in state:
            state["_reads"].add(name)
        if name in _PLAIN_VIEWS and "_original" in state:
            return getattr(state["_original"], name)
        return object.__getattribute__(self, name)

    # dataclasses.replace() builds obj.__class__, which has to be the plain class
    return type(cls.__name__, (cls,), {"__getattribute__": get, "__class__": property(lambda self: cls)})


def _case(pattern: Callable[..., Term], build: Callable[..., Value], relies_on_range: bool, weighed: bool) -> Case:
    names = list(inspect.signature(pattern).parameters)
    wanted = list(inspect.signature(build).parameters)
    if sorted(names) != sorted(wanted):
        raise GraphError(f"rewrite {build.__name__}: the pattern has the holes {names}, the function takes {wanted}")
    term = pattern(*map(Hole, names))
    if not isinstance(term, Applied | Sum | Product):
        raise GraphError(f"rewrite {build.__name__}: the pattern must apply at least one operator")
    hints = typing.get_type_hints(build, include_extras=True)
    missing = [name for name in names if name not in hints]
    if missing:
        raise GraphError(f"rewrite {build.__name__}: the hole {missing[0]!r} has no type")
    holes = {name: _hole_type(hints[name]) for name in names}
    _check_holes(build.__name__, term, holes)
    return Case(term, build, holes, relies_on_range, weighed)


def _check_holes(rewrite_name: str, term: Term, holes: dict[str, tuple[Any, tuple[Predicate, ...]]]) -> None:
    used = list(_uses(term))
    for name, (kind, _) in holes.items():
        roles = {role for hole, role in used if hole == name}
        problem = None
        if not roles:
            problem = "does not occur in the pattern"
        elif len(roles) > 1:
            problem = "stands for an operator and for a value"
        elif roles == {"value"} and kind is not Value:
            problem = f"stands for a value, so its type must be Value, got {kind}"
        elif roles == {"operator"} and not all(issubclass(each, Operator) for each in _classes(kind)):
            problem = f"is applied to values, so its type must be an operator class, got {kind}"
        elif any(issubclass(each, Region) for each in _classes(kind)) and not _is_whole(term, name):
            problem = "stands for a region, which must be the whole pattern: region(x)"
        if problem is not None:
            raise GraphError(f"rewrite {rewrite_name}: the hole {name!r} {problem}")


def _is_whole(term: Term, name: str) -> bool:
    return (
        isinstance(term, Applied)
        and term.operator == name
        and len(term.arguments) == 1
        and isinstance(term.arguments[0], Hole)
    )


def _uses(term: Term) -> Iterator[tuple[str, str]]:
    if isinstance(term, Hole):
        yield term.name, "value"
        return
    if isinstance(term, Applied):
        yield term.operator, "operator"
    for inner in term.arguments if isinstance(term, Applied) else (term.left, term.right):
        yield from _uses(inner)


def _classes(kind: Any) -> tuple[type, ...]:
    """The classes of a union, or the one class; `object` for what is no class."""
    members = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    return tuple(each if isinstance(each, type) else object for each in members)


def _hole_type(hint: Any) -> tuple[Any, tuple[Predicate, ...]]:
    if typing.get_origin(hint) is Annotated:
        kind, *predicates = typing.get_args(hint)
        return kind, tuple(predicates)
    return hint, ()


def _satisfies(found: Any, predicates: tuple[Predicate, ...]) -> bool:
    """Do all predicates hold? One that raises is a fault of the rewrite: a `GraphError` that names it."""
    for holds in predicates:
        try:
            if not holds(found):
                return False
        except RgcError:
            raise
        except Exception as error:  # a predicate is its author's code and may raise anything: reported, the model kept
            raise GraphError(f"its predicate {holds.__name__} raised {type(error).__name__}: {error}") from error
    return True


def _match(term: Term, value: Value, match: Match, holes: dict[str, Any]) -> Iterator[Match]:
    if isinstance(term, Hole):
        bound = match.values.get(term.name)
        if bound is None and _satisfies(value, holes[term.name][1]):
            yield replace(match, values={**match.values, term.name: value})
        elif bound is value:
            yield match
        return
    inside = replace(match, interior=(*match.interior, value))
    if isinstance(term, Applied):
        op, (kind, predicates) = value.op, holes[term.operator]
        if not isinstance(op, kind) or len(value.inputs) != len(term.arguments):
            return
        if match.operators.get(term.operator, op) is not op or not _satisfies(op, predicates):
            return
        bound_here = replace(inside, operators={**inside.operators, term.operator: op})
        yield from _match_all(term.arguments, value.inputs, bound_here, holes)
        return
    if isinstance(term, Sum):
        if isinstance(value.op, Add) and value.op.sign == term.sign:
            yield from _match_all((term.left, term.right), value.inputs, inside, holes)
            if term.sign == 1:
                yield from _match_all((term.left, term.right), value.inputs[::-1], inside, holes)
        return
    if isinstance(value.op, Multiply):
        yield from _match_all((term.left, term.right), value.inputs, inside, holes)
        yield from _match_all((term.left, term.right), value.inputs[::-1], inside, holes)


def _match_all(
    terms: tuple[Term, ...], values: tuple[Value, ...], match: Match, holes: dict[str, Any]
) -> Iterator[Match]:
    if not terms:
        yield match
        return
    for first in _match(terms[0], values[0], match, holes):
        yield from _match_all(terms[1:], values[1:], first, holes)
