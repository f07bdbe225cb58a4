"""Which small faults can a source file have? Every mutation of its functions, and a way to plant one in running code.

A mutation changes one expression or statement: an operator, a comparison, a sign, a constant, an argument, a term of a
sum, a guard, a side of the padding. It is planted by giving the live function the mutated code, and taken out again
after, so that a process can try hundreds of them. In the same way a fault can be observed instead: the whole code runs
on, and for each evaluation it is noted whether the fault would have given the same value.
"""

from __future__ import annotations

import ast
import copy
import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, MappingProxyType
from typing import Any

import torch
from torch import Tensor

#: What `require(condition, reason)` is called: a guard.
_GUARD = "require"

#: By which name observed code finds what counts.
_OBSERVER = "__observed_by_rgc__"

#: Names that a hand swaps for one another.
_TWINS = {
    "before": "after", "after": "before", "first": "second", "second": "first", "inner": "outer", "outer": "inner",
    "left": "right", "right": "left", "a": "b", "b": "a", "scale": "shift", "shift": "scale", "stride": "dilation",
    "dilation": "stride", "in_channels": "out_channels", "out_channels": "in_channels",
}  # fmt: skip

_ARITHMETIC: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Add,), ast.Div: (ast.Mult,), ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.Add,), ast.Pow: (ast.Mult,), ast.BitAnd: (ast.BitOr,), ast.BitOr: (ast.BitAnd,),
}  # fmt: skip
_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_SYMBOLS: dict[type[ast.AST], str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**",
    ast.BitAnd: "&", ast.BitOr: "|", ast.MatMult: "@", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=",
    ast.Eq: "==", ast.NotEq: "!=", ast.Is: "is", ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in",
    ast.And: "and", ast.Or: "or",
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One fault: where it is, which kind, and in words; ``place`` and ``way`` say which node is changed and how."""

    path: str
    function: str
    line: int
    kind: str
    change: str
    place: int
    way: int

    @property
    def name(self) -> str:
        """The fault in one line."""
        return f"{Path(self.path).name}:{self.line} {self.function}: {self.change}"


#: One way to change a node: the kind of the fault, the fault in words, and the node in place of the old one.
Change = tuple[str, str, ast.AST]


def mutants_of(path: str, is_code: Callable[[ast.AST], bool] = lambda _: True) -> list[Mutant]:
    """Every mutant of the functions in the file, in the order of the source; what ``is_code`` denies is left alone.

    >>> import rgc.axis
    >>> "`>` becomes `>=`" in [each.change for each in mutants_of(rgc.axis.__file__) if each.function == "compose_axes"]
    True
    """
    tree = _parsed(path)
    found = []
    for place, (node, function) in enumerate(_nodes(tree)):
        if function is None or not _is_inside(function, is_code):
            continue
        for way, (kind, change, _) in enumerate(_changes(node)):
            name = ".".join(each.name for each in function if isinstance(each, _DEFINITIONS))
            found.append(Mutant(path, name, getattr(node, "lineno", function[-1].lineno), kind, change, place, way))
    return found


@contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """Let every live function of the mutant's file that contains the fault run the mutated code, for a while.

    Raises `LookupError` where no live function contains it.
    """
    with _running(mutant, _mutated(mutant)):
        yield


@dataclass
class Observed:
    """How often a mutated expression was evaluated, and how often the fault would have given another value."""

    evaluations: int = 0
    differences: int = 0

    def __call__(self, whole: Callable[[], Any], faulty: Callable[[], Any]) -> Any:
        """The value of the whole expression, after a look at that of the faulty one."""
        value = whole()
        self.evaluations += 1
        try:
            same = _is_same(value, faulty())
        except Exception:  # a fault may raise anything, and then it has no value
            same = False
        self.differences += not same
        return value


@contextmanager
def observed(mutant: Mutant) -> Iterator[Observed]:
    """Count, for a while, how often the fault would give another value; nothing that the code computes changes.

    A guard that is dropped gives another value where it refuses. Raises `LookupError` as `planted`.
    """
    record = Observed()
    with _running(mutant, _observing(mutant), {_OBSERVER: record}):
        yield record


@contextmanager
def _running(mutant: Mutant, tree: ast.Module, names: Mapping[str, Any] = MappingProxyType({})) -> Iterator[None]:
    """The live functions of the mutant's file run what ``tree`` says, with ``names`` among their globals."""
    changed_codes = _codes(compile(tree, mutant.path, "exec", dont_inherit=True))
    whole = _codes_of(mutant.path, _source(mutant.path))
    changed = {key: code for key, code in changed_codes.items() if key in whole and code != whole[key]}
    replaced: list[tuple[FunctionType, CodeType]] = []
    for function in _functions_of(mutant.path):
        code = changed.get(_key(function.__code__))
        if code is not None and code.co_freevars == function.__code__.co_freevars:
            replaced.append((function, function.__code__))
            function.__code__ = code
            function.__globals__.update(names)
    if not replaced:
        raise LookupError(f"{mutant.name}: no live function runs this line")
    try:
        yield
    finally:
        for function, code in replaced:
            function.__code__ = code
            for name in names:
                function.__globals__.pop(name, None)


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _source(path: str) -> str:
    return Path(path).read_text()


def _parsed(path: str) -> ast.Module:
    """The tree of the file; a new one for each call, because a mutation changes it."""
    return ast.parse(_source(path), path)


@cache
def _codes_of(path: str, source: str) -> dict[tuple[str, int], CodeType]:
    return _codes(compile(source, path, "exec", dont_inherit=True))


def _nodes(tree: ast.Module) -> list[tuple[ast.AST, tuple[Definition, ...] | None]]:
    """Every node with the definitions around it; None for what does not run in a function: types, decorators, docs."""
    found: list[tuple[ast.AST, tuple[Definition, ...] | None]] = []

    def visit(node: ast.AST, around: tuple[Definition, ...], runs: bool) -> None:
        found.append((node, around if runs else None))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for child in [*node.decorator_list, node.args, *([node.returns] if node.returns else [])]:
                visit(child, around, False)
            for child in node.body:
                visit(child, (*around, node), True)
        elif isinstance(node, ast.ClassDef):
            for child in ast.iter_child_nodes(node):
                visit(child, (*around, node), False)
        elif isinstance(node, ast.AnnAssign):
            visit(node.target, around, runs)
            visit(node.annotation, around, False)
            if node.value is not None:
                visit(node.value, around, runs)
        elif isinstance(node, ast.JoinedStr):  # the words of a message are no code
            for child in ast.iter_child_nodes(node):
                visit(child, around, False)
        else:
            for child in ast.iter_child_nodes(node):
                visit(child, around, runs)

    for child in tree.body:
        visit(child, (), False)
    return found


def _is_inside(function: Sequence[Definition], is_code: Callable[[ast.AST], bool]) -> bool:
    return all(map(is_code, function))


def _mutated(mutant: Mutant) -> ast.Module:
    tree, old, new = _parts(mutant)
    return _replaced(tree, old, new)


def _observing(mutant: Mutant) -> ast.Module:
    """The file with `Observed` asked for the value of the changed expression; that of a condition, for a statement."""
    tree, old, new = _parts(mutant)
    match old, new:
        case ast.If(test), ast.If(other):
            return _replaced(tree, test, _observation(test, other))
        case ast.Expr(ast.Call(_, [condition, *_])), ast.Pass():
            return _replaced(tree, condition, _observation(condition, ast.Constant(True)))
        case ast.expr(), ast.expr():
            return _replaced(tree, old, _observation(old, new))
    raise LookupError(f"{mutant.name}: no expression")  # pragma: no cover


def _observation(old: ast.expr, new: ast.expr) -> ast.Call:
    nothing = ast.arguments([], [], None, [], [], None, [])
    # a copy: where the new expression holds parts of the old one, a node would be visited twice
    both: list[ast.expr] = [ast.Lambda(nothing, copy.deepcopy(each)) for each in (old, new)]
    return ast.Call(ast.Name(_OBSERVER, ast.Load()), both, [])


def _parts(mutant: Mutant) -> tuple[ast.Module, ast.AST, ast.AST]:
    """The file, the node that the mutant changes, and what it becomes."""
    tree = _parsed(mutant.path)
    old, _ = _nodes(tree)[mutant.place]
    _, _, new = _changes(old)[mutant.way]
    return tree, old, new


def _replaced(tree: ast.Module, old: ast.AST, new: ast.AST) -> ast.Module:
    ast.copy_location(new, old)

    class Replace(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return new if node is old else self.generic_visit(node)

    Replace().visit(tree)
    return ast.fix_missing_locations(tree)


def _is_same(value: Any, other: Any) -> bool:
    """Is it the same value, bit for bit?"""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value.dtype == other.dtype and torch.equal(value, other)
    if isinstance(value, list | tuple) and isinstance(other, list | tuple):
        return len(value) == len(other) and all(map(_is_same, value, other))
    if type(value) is type(other) and is_dataclass(value) and not isinstance(value, type):  # some compare by identity
        left, right = vars(value), vars(other)
        return left.keys() == right.keys() and all(_is_same(left[name], right[name]) for name in left)
    return value is other or (type(value) is type(other) and bool(value == other))


def _changes(node: ast.AST) -> list[Change]:
    """Every way to change this one node; parts of the old node are shared, never altered."""
    match node:
        case ast.BinOp(left, op, right):
            return _of_arithmetic(node, left, op, right)
        case ast.Compare(left, [op], [right]) if type(op) in _COMPARISONS:
            other = _COMPARISONS[type(op)]
            changed = ast.Compare(left, [other()], [right])
            return [("comparison", f"`{_SYMBOLS[type(op)]}` becomes `{_SYMBOLS[other]}`", changed)]
        case ast.BoolOp(op, values):
            joined = ast.Or() if isinstance(op, ast.And) else ast.And()
            change = f"`{_SYMBOLS[type(op)]}` becomes `{_SYMBOLS[type(joined)]}`"
            dropped: list[Change] = [
                ("condition", f"`{_text(value)}` is dropped", _joined(op, [v for v in values if v is not value]))
                for value in values
            ]
            return [("condition", change, ast.BoolOp(joined, values)), *dropped]
        case ast.UnaryOp(ast.USub(), operand):
            return [("sign", f"`{_text(node)}` loses its sign", operand)]
        case ast.UnaryOp(ast.Not(), operand):
            return [("condition", "`not` is dropped", operand)]
        case ast.IfExp(_, body, orelse):
            always = (("then", body), ("else", orelse))
            return [("branch", f"always `{_text(kept)}`", kept) for _, kept in always]
        case ast.If(test, body, orelse):
            negated = ast.If(ast.UnaryOp(ast.Not(), test), body, orelse)
            return [("branch", f"`if {_text(test)}` is negated", negated)]
        case ast.Expr(ast.Call(ast.Name(name))) if name == _GUARD:
            return [("guard", f"`{_text(node)}` is dropped", ast.Pass())]
        case ast.Call(function, arguments, keywords):
            return _of_call(node, function, arguments, keywords)
        case ast.Constant(bool() as value):
            return [("constant", f"`{value}` becomes `{not value}`", ast.Constant(not value))]
        case ast.Constant(int() | float() as number):
            ways = (number + 1, number - 1) if isinstance(number, int) else (number * 2 or 1.0,)
            return [("constant", f"`{number}` becomes `{other}`", ast.Constant(other)) for other in ways]
        case ast.Attribute(value, name) if name in _TWINS and isinstance(node.ctx, ast.Load):
            twin = ast.Attribute(value, _TWINS[name], ast.Load())
            return [("name", f"`{_text(node)}` becomes `{_text(twin)}`", twin)]
        case ast.Name(name) if name in _TWINS and isinstance(node.ctx, ast.Load):
            return [("name", f"`{name}` becomes `{_TWINS[name]}`", ast.Name(_TWINS[name], ast.Load()))]
    return []


def _of_arithmetic(node: ast.BinOp, left: ast.expr, op: ast.operator, right: ast.expr) -> list[Change]:
    here = f"`{_text(node)}`: `{_SYMBOLS.get(type(op), '?')}` becomes"
    changes: list[Change] = [
        ("arithmetic", f"{here} `{_SYMBOLS[other]}`", _binary(left, other(), right))
        for other in _ARITHMETIC.get(type(op), ())
    ]
    if isinstance(op, ast.MatMult | ast.Sub | ast.Div | ast.FloorDiv):
        changes.append(("swap", f"`{_text(node)}` is turned around", _binary(right, op, left)))
    if isinstance(op, ast.Add | ast.Sub | ast.Mult):
        changes += [
            ("term", f"`{_text(node)}` becomes `{_text(left)}`", left),
            ("term", f"`{_text(node)}` becomes `{_text(right)}`", right),
        ]
    return changes


def _of_call(
    node: ast.Call, function: ast.expr, arguments: list[ast.expr], keywords: list[ast.keyword]
) -> list[Change]:
    if isinstance(function, ast.Name) and function.id in (_GUARD, "isinstance", "getattr", "Refusal", "GraphError"):
        return []
    changes: list[Change] = [
        (
            "argument",
            f"`{_text(function)}(...)` loses `{_text(keyword)}`",
            ast.Call(function, arguments, [each for each in keywords if each is not keyword]),
        )
        for keyword in keywords
        if keyword.arg is not None
    ]
    if len(arguments) > 1 and not any(isinstance(each, ast.Starred) for each in arguments[:2]):
        first, second, *others = arguments
        if ast.dump(first) != ast.dump(second):
            swapped = ast.Call(function, [second, first, *others], keywords)
            changes.append(("swap", f"`{_text(node)}`: the first two arguments change places", swapped))
    return changes


def _binary(left: ast.expr, op: ast.operator, right: ast.expr) -> ast.BinOp:
    return ast.BinOp(left, op, right)


def _joined(op: ast.boolop, values: list[ast.expr]) -> ast.expr:
    return values[0] if len(values) == 1 else ast.BoolOp(op, values)


def _text(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _codes(code: CodeType) -> dict[tuple[str, int], CodeType]:
    """All code objects within ``code``, by name and first line."""
    found = {}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found[_key(constant)] = constant
            found.update(_codes(constant))
    return found


def _key(code: CodeType) -> tuple[str, int]:
    return code.co_qualname, code.co_firstlineno


def _functions_of(path: str) -> list[FunctionType]:
    """Every live function, methods and those behind decorators included, that was compiled from the file."""
    where = _resolved(path)
    functions = (each for each in gc.get_objects() if type(each) is FunctionType)
    return [each for each in functions if _resolved(each.__code__.co_filename) == where]


@cache
def _resolved(path: str) -> str:
    """The passes are reached by two paths."""
    return os.path.realpath(path)


__all__ = ["Mutant", "Observed", "mutants_of", "observed", "planted"]
