"""Why does a pattern not match? The place in a graph where the most of it fits, and what stands there instead."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from typing import Any

from rgc.ir import Graph, Value
from rgc.operators import Add, Multiply
from rgc.rewrite import Applied, Case, Hole, Product, Rewrite, Sum, Term

#: So many operations of a graph are shown.
MOST_SHOWN = 12


def near_miss(rewrite: Rewrite, graph: Graph) -> str:
    """In words, where a pattern of ``rewrite`` comes closest to matching in ``graph``, and what is in its way."""
    local = [(case, value) for case in rewrite.cases if not case.matches_regions for value in graph.nodes()]
    places = [(value, _miss(case.pattern, value, case)) for case, value in local]
    fits = next((value for value, miss in places if miss is None), None)
    if fits is not None:
        return f"its operators fit at {fits.where}, but a name that occurs twice in the pattern is two things there"
    misses = [miss for _, miss in places if miss is not None and miss[0] > 0]
    if not misses:
        return f"nothing in the traced model is like its pattern; the model is {shown(graph)}"
    return max(misses, key=lambda miss: miss[0])[1]


def shown(graph: Graph) -> str:
    """The operations of a graph in order, by what they are called.

    >>> from rgc.compiler import trace
    >>> import torch
    >>> shown(trace(torch.nn.Sequential(torch.nn.Conv1d(1, 2, 3), torch.nn.ReLU()).eval(), torch.ones(1, 1, 8)).graph)
    'conv 3 1->2, relu'
    """
    labels = [value.op.label for value in graph.nodes() if value.inputs]
    more = [f"and {len(labels) - MOST_SHOWN} more"] if len(labels) > MOST_SHOWN else []
    return ", ".join([*labels[:MOST_SHOWN], *more]) or "empty"


def _miss(term: Term, value: Value, case: Case) -> tuple[int, str] | None:
    """How much of ``term`` fits at ``value``, and what does not; None where all of it does."""
    if isinstance(term, Hole):
        return None
    wrong = _wrong(term, value, case)
    if wrong is not None:
        return 0, wrong
    orders = [value.inputs, value.inputs[::-1]] if isinstance(term, Sum | Product) else [value.inputs]
    misses = [_miss_below(term, value, inputs, case) for inputs in orders]
    return None if None in misses else max(filter(None, misses), key=lambda miss: miss[0])


def _miss_below(term: Term, value: Value, inputs: Sequence[Value], case: Case) -> tuple[int, str] | None:
    misses = [_miss(inner, given, case) for inner, given in zip(_arguments(term), inputs, strict=True)]
    found = [miss for miss in misses if miss is not None]
    if not found:
        return None
    deepest, words = max(found, key=lambda miss: miss[0])
    fitting = 1 + misses.count(None) + sum(score for score, _ in found)
    return fitting, words if deepest else f"before {value.where} ({value.op.label}), {words}"


def _wrong(term: Term, value: Value, case: Case) -> str | None:
    """What is wrong with the operator itself; None where it is of the class that the pattern wants, if not more."""
    found = value.op.label if value.inputs else f"the input {value.name or 'of the model'}"
    if isinstance(term, Applied):
        kind, predicates = case.holes[term.operator]
        if not isinstance(value.op, kind):
            return f"the pattern has {term.operator}: {_names_of(kind)}, where the model has {found}"
        if len(value.inputs) != len(term.arguments):
            return (
                f"{found} reads {len(value.inputs)} values, and the pattern gives {term.operator} {len(term.arguments)}"
            )
        denied = [each.__name__ for each in predicates if not each(value.op)]
        return f"{denied[0]} does not hold for {found}" if denied else None
    if isinstance(term, Sum):
        fits = isinstance(value.op, Add) and value.op.sign == term.sign
        return None if fits else f"the pattern has a {'sum' if term.sign > 0 else 'difference'}, the model {found}"
    return None if isinstance(value.op, Multiply) else f"the pattern has a product, where the model has {found}"


def _arguments(term: Term) -> Iterator[Term]:
    assert not isinstance(term, Hole)
    yield from term.arguments if isinstance(term, Applied) else (term.left, term.right)


def _names_of(kind: Any) -> str:
    """A class, or the classes of a union, without their modules."""
    return " | ".join(getattr(each, "__name__", str(each)) for each in typing.get_args(kind) or (kind,))


__all__ = ["near_miss", "shown"]
