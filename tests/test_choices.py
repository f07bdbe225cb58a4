"""Do choices take what they hold, and refuse the rest with what is possible?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rgc.errors import InputError
from rgc.nn import Between, Choice, OneOf, Vector


@pytest.mark.parametrize(
    ("choice", "value", "checked"),
    [
        (OneOf((0.5, 1.0)), 1, 1.0),
        (OneOf((True, False)), False, False),
        (OneOf(("a", "b")), "b", "b"),
        (Between(0.25, 1.0), 0.25, 0.25),
        (Between(0.25, 1.0), 1, 1.0),
        (Vector(3), torch.tensor([1.0, 0.0, -2.0]), (1.0, 0.0, -2.0)),
        (Vector(2), [1, 2], (1.0, 2.0)),
    ],
)
def test_what_a_choice_holds_comes_back_in_one_form(choice: Choice, value: Any, checked: Any) -> None:
    assert choice.checked(value) == checked
    assert type(choice.checked(value)) is type(checked)


@pytest.mark.parametrize(
    ("choice", "value", "message"),
    [
        (OneOf((0.25, 0.5, 1.0)), 0.4, r"0.4 is not one of 0.25, 0.5, 1.0; the nearest is 0.5"),
        (OneOf((0.25, 0.5, 1.0)), True, r"True is not one of"),
        (OneOf((0.25, 1.0)), float("nan"), r"nan is not one of 0.25, 1.0$"),
        (OneOf((True, False)), 1, r"1 is not one of True, False$"),
        (OneOf(("a", "b")), 3, r"3 is not one of 'a', 'b'$"),
        (OneOf((1, 2)), torch.tensor(1), r"tensor\(1\) is not one of"),
        (Between(0.25, 1.0), 0.2, r"0.2 is not from 0.25 to 1.0"),
        (Between(0.25, 1.0), float("nan"), r"nan is not from"),
        (Between(0.25, 1.0), "0.5", r"'0.5' is no number"),
        (Vector(2), [1.0], r"\[1.0\] is not 2 finite numbers"),
        (Vector(2), [1.0, float("inf")], r"is not 2 finite numbers"),
        (Vector(2), torch.zeros(2, 2), r"a tensor \[2, 2\] is not 2 finite numbers"),
        (Vector(2), "ab", r"'ab' is not"),
        (Vector(2), 7, r"7 is not"),
    ],
)
def test_the_rest_is_refused_with_what_is_possible(choice: Choice, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choice.checked(value)


def test_choices_cannot_be_built_empty() -> None:
    for build in (lambda: OneOf(()), lambda: OneOf((1, 1)), lambda: Between(1.0, 1.0), lambda: Between(0.0, torch.inf)):
        with pytest.raises(InputError, match="got"):
            build()
