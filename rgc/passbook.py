"""Which passes does a user mean? Sets by name, names with ``-`` taken away, pass objects, files and modules."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from rgc.errors import InputError
from rgc.rewrite import GraphPass, Pass, Rewrite


def resolve(passes: str | Sequence[Any]) -> tuple[tuple[Pass, ...], bool]:
    """The passes in the order in which they are tried, and whether they may rely on the example's size.

    Only "all" relies on it, or naming `box_mean` or `collapse`. Raises `InputError` for a name that is no pass, with a
    suggestion.
    """
    from rgc.passes import ALL, DEFAULT, OPT_IN

    items: list[Any] = passes.split(",") if isinstance(passes, str) else list(passes)
    items = [item.strip() if isinstance(item, str) else item for item in items]
    known = {each.name: each for each in (*ALL, *OPT_IN)}
    chosen: dict[str, Pass] = {}
    fixed = False
    if items and all(isinstance(item, str) and item.startswith("-") for item in items):
        items = ["default", *items]
    for item in items:
        fixed = fixed or item == "all"
        if isinstance(item, str) and item.startswith("-"):
            _named(item[1:], known)
            chosen.pop(item[1:], None)
            continue
        for each in {"all": ALL, "default": DEFAULT}[item] if item in ("all", "default") else _found(item, known):
            chosen[each.name] = each
    order = {name: index for index, name in enumerate(known)}
    ordered = sorted(chosen.values(), key=lambda each: order.get(each.name, len(order)))
    return tuple(ordered), fixed or not chosen.keys().isdisjoint(("box_mean", "collapse"))


def passes_in(module: ModuleType) -> tuple[Pass, ...]:
    """The passes that a module defines, in the order of definition; `InputError` if there are none."""
    found = {value.name: value for value in vars(module).values() if isinstance(value, Rewrite | GraphPass)}
    if not found:
        raise InputError(f"{module.__name__} defines no pass; decorate a function with @rgc.rewrite or @rgc.graph_pass")
    return tuple(found.values())


def load_passes(source: str) -> tuple[Pass, ...]:
    """The passes in a Python file or an importable module. This runs the file."""
    if not source.endswith(".py"):
        try:
            return passes_in(importlib.import_module(source))
        except ModuleNotFoundError as error:
            raise InputError(f"no module {source!r} for passes: {error}") from error
    path = Path(source)
    if not path.is_file():
        raise InputError(f"{source}: no such file of passes")
    spec = importlib.util.spec_from_file_location(f"rgc_plugin_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        error.add_note(f"raised while loading the passes in {source}")
        raise
    return passes_in(module)


def _found(item: Any, known: dict[str, Pass]) -> tuple[Pass, ...]:
    if isinstance(item, Rewrite | GraphPass):
        return (item,)
    if isinstance(item, ModuleType):
        return passes_in(item)
    if isinstance(item, str) and (item.endswith(".py") or ("." in item and item not in known)):
        return load_passes(item)
    if isinstance(item, str):
        return (_named(item, known),)
    raise InputError(f"{item!r} is no pass: expected a name, a file, a module or what @rgc.rewrite returns")


def _named(name: str, known: dict[str, Pass]) -> Pass:
    if name in known:
        return known[name]
    close = get_close_matches(name, [*known, "all", "default"], n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(['default', 'all', *known])}"
    raise InputError(f"unknown pass {name!r}; {hint}")
