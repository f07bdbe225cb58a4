"""What can be chosen in a dynamic module? Sets of values, each of which says what it holds and refuses the rest."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from rgc.errors import InputError


class Choice(ABC):
    """The values that one choice of a dynamic module has; ``str()`` of it reads as "one of 0.5, 1.0"."""

    @property
    @abstractmethod
    def by_input(self) -> bool:
        """Can the module also decide by its input, anew in each call?"""

    @abstractmethod
    def checked(self, value: Any) -> Any:
        """``value`` as the module takes it, comparable with ``==``; `InputError` saying what is possible instead."""


@final
@dataclass(frozen=True)
class OneOf(Choice):
    """One of a few values, in the order from the smallest function to the largest.

    >>> OneOf((0.25, 0.5, 1.0)).checked(0.3)
    Traceback (most recent call last):
    rgc.errors.InputError: 0.3 is not one of 0.25, 0.5, 1.0; the nearest is 0.25
    """

    values: tuple[Any, ...]
    by_input: bool = False

    def __post_init__(self) -> None:
        if not self.values or len(set(self.values)) < len(self.values):
            raise InputError(f"a choice needs different values, at least one; got {self.values}")

    def __str__(self) -> str:
        return f"one of {', '.join(map(repr, self.values))}"

    def checked(self, value: Any) -> Any:
        """The value itself, as it stands in ``values``."""
        kinds = {type(each) for each in self.values}
        if isinstance(value, bool) == (bool in kinds) and not isinstance(value, Tensor):
            for each in self.values:
                if each == value:
                    return each
        numbers = isinstance(value, int | float) and kinds <= {int, float} and math.isfinite(value)
        nearest = f"; the nearest is {min(self.values, key=lambda each: abs(each - value))!r}" if numbers else ""
        raise InputError(f"{value!r} is not {self}{nearest}")


@final
@dataclass(frozen=True)
class Between(Choice):
    """Any number from ``low`` to ``high``, both included.

    >>> Between(0.25, 1.0).checked(0.6)
    0.6
    """

    low: float
    high: float
    by_input: bool = False

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise InputError(f"an interval needs low < high, both finite; got {self.low} and {self.high}")

    def __str__(self) -> str:
        return f"from {self.low} to {self.high}"

    def checked(self, value: Any) -> float:
        """The value as a float."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number:
            raise InputError(f"{value!r} is no number {self}")
        if not self.low <= value <= self.high:
            raise InputError(f"{value!r} is not {self}")
        return float(value)


@final
@dataclass(frozen=True)
class Vector(Choice):
    """So many finite numbers: a list, a tuple, or a tensor [length].

    >>> Vector(2).checked([0.25, 0.5])
    (0.25, 0.5)
    """

    length: int
    by_input: bool = False

    def __str__(self) -> str:
        return f"{self.length} finite numbers"

    def checked(self, value: Any) -> tuple[float, ...]:
        """The numbers as a tuple of floats."""
        numbers = value.tolist() if isinstance(value, Tensor) else value
        listed = list(numbers) if isinstance(numbers, Iterable) and not isinstance(numbers, str) else []
        plain = all(isinstance(each, int | float) and not isinstance(each, bool) for each in listed)
        if not plain or len(listed) != self.length or not all(map(math.isfinite, listed)):
            shape = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise InputError(f"{shape} is not {self}")
        return tuple(map(float, listed))
