"""Did anything round? The processor's own record: the inexact flag of IEEE 754 (section 7.6), which C99 lets one read.

An operation whose result is not the real one raises the flag, in whichever library it is done, and it stays up. So what
leaves it down has computed without any rounding: a proof by integers needs no bound on how large the sums became.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from rgc.errors import RgcError

#: Every flag of every processor that C99's ``fenv.h`` runs on here: x86-64 uses bits 0 to 5, AArch64 0 to 4 and 7.
_ALL = 0xBF


class Rounding:
    """Whether anything has rounded, once the context that gave it is left."""

    happened = False


@contextmanager
def watch_rounding() -> Iterator[Rounding]:
    """Say whether anything inside rounds, on this thread. What has rounded before makes no difference.

    Use it inside `on_one_thread`, for PyTorch's other threads have flags of their own.

    >>> three = torch.tensor(3.0, dtype=torch.float64)
    >>> with on_one_thread(), watch_rounding() as exact:
    ...     _ = three / 4
    >>> with on_one_thread(), watch_rounding() as rounded:
    ...     _ = 4 / three
    >>> exact.happened, rounded.happened
    (False, True)
    """
    library, inexact = _environment()
    found, collects = Rounding(), gc.isenabled()
    gc.disable()  # whoever has a callback there, as Hypothesis has, computes with floats of its own in between
    library.feclearexcept(_ALL)
    try:
        yield found
        found.happened = bool(library.fetestexcept(_ALL) & inexact)
    finally:
        if collects:
            gc.enable()


@contextmanager
def on_one_thread() -> Iterator[None]:
    """PyTorch computes on this thread alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def _environment() -> tuple[Any, int]:
    """The C library, and the bit that is the inexact flag, by experiment; `RgcError` where it cannot be read."""
    library = ctypes.CDLL(None)
    three = torch.tensor([3.0] * 8, dtype=torch.float64)

    def flags_after(divisor: Any) -> int:
        library.feclearexcept(_ALL)
        _ = three / divisor
        return int(library.fetestexcept(_ALL))

    try:
        inexact = flags_after(three + 4) & ~flags_after(4)
    except AttributeError as error:
        raise RgcError("this C library does not tell whether the processor has rounded (fenv.h)") from error
    if inexact.bit_count() != 1:
        raise RgcError("this processor does not tell whether it has rounded (the inexact flag of IEEE 754)")
    return library, inexact
