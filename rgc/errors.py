"""Which errors can rgc raise? One tree; every message says where, what was found and what to do."""

from __future__ import annotations

import math


class RgcError(Exception):
    """Base of every error that rgc raises on purpose."""


class InputError(RgcError):
    """What the user handed in cannot be used (a file, an option, a model in training mode): exit status 2."""


class TraceError(RgcError):
    """A model, or a part of it, cannot be captured faithfully by the tier of the front end that tried."""


class GraphError(RgcError):
    """An operator or a graph would be malformed: wrong shapes, wrong channel counts, a cycle."""


class NotEquivalentError(RgcError):
    """A result differs from its original; it is never emitted: exit status 1.

    ``difference``, of which ``allowed`` would be rounding, relative to the output's scale, in the dtype ``precision``;
    ``sample`` names the part of a user's data on which it shows. Where nothing was measured they keep their defaults.
    """

    def __init__(
        self, message: str, *, difference: float = math.inf, allowed: float = 0.0, precision: str = "", sample: str = ""
    ) -> None:
        super().__init__(message)
        self.difference, self.allowed, self.precision, self.sample = difference, allowed, precision, sample


class Refusal(RgcError):  # noqa: N818 - a value as much as an error
    """A rewrite declines to fire; ``reason`` is one sentence that a user can act on."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its class where it says nothing; at most 160 characters.

    >>> first_line(ValueError("no such layer\\nsecond line")), first_line(KeyError())
    ('no such layer', 'KeyError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def require(condition: bool, reason: str) -> None:
    """Refuse the rewrite under way, with a reason, unless ``condition`` holds.

    >>> require(1 + 1 == 2, "arithmetic is broken")
    >>> require(False, "grouped convolution (groups=4) cannot be merged")
    Traceback (most recent call last):
    rgc.errors.Refusal: grouped convolution (groups=4) cannot be merged
    """
    if not condition:
        raise Refusal(reason)
