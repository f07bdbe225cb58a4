"""Which merges pay? Each decision by the form of what was weighed, so that it can be taken again without weighing.

What a merge costs depends on the form of the operators (kinds, shapes, strides, what runs around them), never on the
numbers in their weights. So a decision holds for every checkpoint in which the same question comes up: a rewrite, at a
place, about operators of this form. Guards do read weights, and are asked again for each checkpoint; where they lead
to a question that was never decided, the new checkpoint allows something else, and that is noted as such.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rgc.algebra import Conv, Deferred
from rgc.ir import Operator, TensorType, Value
from rgc.operators import Clamp, completes

#: The questions beside those of a rewrite: how a region is cut, and in which order a part is offered to rewrites.
PARTS, ORDER = "parts of a region", "order of rewrites"

#: Why a merge is not made that the decisions do not know.
UNDECIDED = "no decision is recorded on it"


@dataclass(frozen=True)
class Question:
    """What was to be decided: by which rewrite (or `PARTS`, `ORDER`), at which layer, about operators of which form."""

    subject: str
    where: str
    form: str


@dataclass
class Decisions:
    """The answers by question, text each: empty for a merge that is made, else why it is not.

    is_closed: nothing is weighed any more. What was not decided before is not made, and noted in ``undecided``.
    """

    answers: dict[Question, str] = field(default_factory=dict)
    is_closed: bool = False
    undecided: list[Question] = field(default_factory=list)

    def closed(self) -> Decisions:
        """The same answers, to be taken as they are."""
        return Decisions(dict(self.answers), is_closed=True)

    def answer(self, question: Question, weigh: Callable[[], str]) -> str | None:
        """What ``weigh`` says, or what was decided before; None for what is undecided."""
        if not self.is_closed:
            self.answers[question] = weigh()
        elif question not in self.answers:
            self.undecided.append(question)
        return self.answers.get(question)


def form_of(*groups: Iterable[Value], more: Iterable[str] = ()) -> str:
    """A digest of all that a cost can depend on: the operators of each group, how they are connected, their types."""
    lists = [list(group) for group in groups]
    numbers = {value: index for index, value in enumerate(dict.fromkeys(v for each in lists for v in each))}

    def described(value: Value) -> Any:
        inputs = [(numbers.get(used), _typed(used.type)) for used in value.inputs]
        return describe(value.op), inputs, _typed(value.type), completes(value)

    return digest([[numbers[value] for value in each] for each in lists], [*map(described, numbers)], list(more))


def form_of_chain(chain: Sequence[Value], made: Iterable[tuple[object, Operator | None]]) -> str:
    """A digest of a chain and of what its parts, each with its name, would become."""
    return digest(form_of(chain), [(part, None if op is None else describe(op)) for part, op in made])


def digest(*parts: Any) -> str:
    """Sixteen hexadecimal digits that stand for ``parts``."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def describe(op: Operator) -> Any:
    """The form of an operator: its fields without the numbers in them, and what those decide about its cost."""
    fields = [(each.name, _shape(vars(op).get(each.name))) for each in dataclasses.fields(op)]  # type: ignore[arg-type]
    decided: tuple[Any, ...] = ()
    if isinstance(op, Conv):
        decided = op.extras
    elif isinstance(op, Clamp):
        decided = tuple(bound is not None for bound in op.bounds)
    return type(op).__name__, fields, decided


def _shape(value: Any) -> Any:
    """``value`` without its numbers: tensors by their shapes, floats as such, modules and functions by their names."""
    if isinstance(value, Tensor | Deferred):
        return "tensor", *value.shape
    if isinstance(value, Value):
        return "value", _typed(value.type)
    if value is None or isinstance(value, bool | int | str | slice | torch.dtype | torch.device):
        return value
    if isinstance(value, list | tuple):
        return [_shape(each) for each in value]
    if isinstance(value, dict):
        return [(key, _shape(each)) for key, each in value.items()]
    if isinstance(value, nn.Module):
        return type(value).__qualname__, [(name, *tensor.shape) for name, tensor in value.named_parameters()]
    if dataclasses.is_dataclass(value):
        named = (each.name for each in dataclasses.fields(value))
        return type(value).__name__, [(name, _shape(getattr(value, name))) for name in named]
    return getattr(value, "__name__", type(value).__name__)


def _typed(given: TensorType | None) -> Any:
    return None if given is None else (given.shape, str(given.dtype), given.fixed)


def barred(names: Iterable[tuple[str, str]]) -> Iterator[str]:
    """What was not to be tried, as a part of a form."""
    return (f"{name} at {where}" for name, where in sorted(names))


__all__ = [
    "ORDER", "PARTS", "UNDECIDED", "Decisions", "Question", "barred", "describe", "digest", "form_of",
    "form_of_chain",
]  # fmt: skip
