"""Which refusals can a pass give? The reasons in its source: of `require`, of `Refusal`, and of what it calls for help.

Source is read, not run, so that all reasons are known and not only those that an example meets.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from types import FunctionType

from rgc.errors import Refusal, require
from rgc.rewrite import GraphPass, Pass


def reasons_of(each: Pass) -> list[str]:
    """The reasons that ``each`` may give for leaving a model alone, in the order of its source.

    What a reason names of the model is in braces. Those of the algebra, which `rgc.compose` and `rgc.add` give to every
    pass that calls them, are left out.

    >>> from rgc.passes import fold_border
    >>> reasons_of(fold_border)[0]
    'the border that is assigned ({widths}) is not just the padding ({padding})'
    """
    starts = [each.run] if isinstance(each, GraphPass) else [case.build for case in each.cases]
    pending = [start for start in starts if isinstance(start, FunctionType)]
    module = {start.__module__ for start in pending}
    seen, found = set[FunctionType](), dict[str, None]()
    while pending:
        function = pending.pop(0)
        if function in seen:
            continue
        seen.add(function)
        tree = _source(function)
        for node in ast.walk(tree):
            found.update(dict.fromkeys(_reason(node, tree, function)))
        pending += [helper for helper in _helpers(tree, function) if helper.__module__ in module]
    return list(found)


def _source(function: FunctionType) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError):  # typed into an interpreter
        return ast.Module([], [])


def _reason(node: ast.AST, tree: ast.AST, function: FunctionType) -> Iterator[str]:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
        return
    called = function.__globals__.get(node.func.id)
    if called is require or called is Refusal:
        yield from _text(node.args[-1], tree)


def _text(reason: ast.expr, tree: ast.AST) -> Iterator[str]:
    """A literal, an f-string, or what a name was given as one."""
    if isinstance(reason, ast.Constant):
        yield str(reason.value)
    elif isinstance(reason, ast.JoinedStr):
        yield "".join(str(p.value) if isinstance(p, ast.Constant) else f"{{{_name(p)}}}" for p in reason.values)
    elif isinstance(reason, ast.Name):
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and reason.id in (ast.unparse(target) for target in node.targets):
                yield from _text(node.value, tree)


def _name(part: ast.expr) -> str:
    """What an expression is of: ``', '.join(extra)`` of extra, ``conv.label`` of conv, ``fill.widths`` of widths."""
    match part:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=name):
            return _name(value) if name in ("label", "name", "where", "reason", "op") else name
        case ast.Call(args=[first, *_]) | ast.FormattedValue(value=first) | ast.Subscript(value=first):
            return _name(first)
        case ast.Call(func=ast.Attribute(value=first)) | ast.BinOp(left=first):
            return _name(first)
    return "..."


def _helpers(tree: ast.AST, function: FunctionType) -> Iterator[FunctionType]:
    """The functions that are named, and the methods of the classes that are."""
    names = dict.fromkeys(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
    for value in (function.__globals__.get(name) for name in names):
        if isinstance(value, FunctionType):
            yield value
        elif isinstance(value, type):
            yield from _methods(value)


def _methods(cls: type) -> Iterator[FunctionType]:
    for value in vars(cls).values():
        plain = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        if isinstance(plain, FunctionType) and not plain.__name__.startswith("__"):
            yield plain
