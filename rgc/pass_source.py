"""What can be told from the source code of a pass, before it runs? Guards without a reason, private names, clashes."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from rgc.rewrite import GraphPass, Pass


def remarks(pass_: Pass) -> tuple[list[tuple[str, str]], list[str]]:
    """What is wrong, each with what to do about it; and what is worth a note."""
    problems, notes = [], []
    if clash := name_clash(pass_):
        problems.append((f"{pass_.name} {clash}", "give the function another name"))
    if not pass_.statement.strip():
        notes.append("it has no docstring: say there, as an equation, why the result is equal")
    for function in _functions(pass_):
        for node, line in _nodes(function):
            if _is_empty_guard(node):
                problem = f"the guard in line {line} of {pass_.name} gives no reason: `{_text(node)}`"
                problems.append((problem, "say in it what was found, and what a user could do"))
            if private := _private_name(node):
                notes.append(f"line {line} reads `{private}`, which is private and may change without notice")
    return problems, list(dict.fromkeys(notes))


def name_clash(pass_: Pass) -> str:
    """Why no other pass may have this name; "" if it may."""
    from rgc.passes import ALL, OPT_IN

    if pass_.name in ("default", "all"):
        return "has the name of a set of passes, so it cannot be asked for by name"
    same = next((each for each in (*ALL, *OPT_IN) if each.name == pass_.name), pass_)
    return "" if same is pass_ else "has the name of a built-in pass, which it would silently replace"


def _functions(pass_: Pass) -> list[Callable[..., Any]]:
    return [pass_.run] if isinstance(pass_, GraphPass) else [case.build for case in pass_.cases]


def _nodes(function: Callable[..., Any]) -> Iterator[tuple[ast.AST, int]]:
    """The nodes of a function, with their lines in its file; none where there is no source."""
    try:
        lines, start = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return
    for node in ast.walk(tree):
        yield node, start + getattr(node, "lineno", 1) - 1


def _is_empty_guard(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
        return False
    name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
    given = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "reason")]
    place = {"require": 1, "Refusal": 0}.get(name)
    reason = given[place] if place is not None and len(given) > place else None
    return isinstance(reason, ast.Constant) and not str(reason.value).strip()


def _private_name(node: ast.AST) -> str:
    if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
        return ""
    return _text(node)


def _text(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())


__all__ = ["name_clash", "remarks"]
