"""Does the processor's record tell what rounds from what does not, in every library that computes for PyTorch?"""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rgc import inexact
from rgc.errors import RgcError
from rgc.inexact import on_one_thread, watch_rounding


def _integers(*shape: int, largest: int = 100) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-largest, largest + 1, shape, generator=generator).double()


def _rounds(call: Callable[[], Any]) -> bool:
    with on_one_thread(), watch_rounding() as found:
        call()
    return found.happened


X, W, B = _integers(2, 5, 8, 8), _integers(7, 5, 3, 3), _integers(7)
CALLS: list[Callable[[Tensor, Tensor], Any]] = [
    lambda x, w: F.conv2d(x, w, B, padding=1),
    lambda x, w: F.conv2d(x, w[:, :1].repeat(5, 1, 1, 1)[:35], groups=5),
    lambda x, w: F.conv_transpose2d(x, w.transpose(0, 1).contiguous(), B, stride=2),
    lambda x, w: F.linear(x.flatten(1), w.flatten()[:64].repeat(3, 5)),
    lambda x, w: torch.einsum("nchw,ocij->nohwij", x, w),
    lambda x, w: x.cumsum(1) * w[0, 0, 0, 0],
]


@pytest.mark.parametrize("call", CALLS)
def test_integers_do_not_round_and_other_numbers_do(call: Callable[[Tensor, Tensor], Any]) -> None:
    assert not _rounds(lambda: call(X, W))
    assert not _rounds(lambda: call(X * 2.0**-30, W * 2.0**40))
    assert _rounds(lambda: call(X + 2.0**-40, W + 2.0**-40))  # products of 94 bits


@pytest.mark.parametrize("shape", [(2, 5, 8, 8), (1, 3, 5, 7), (3, 1, 1, 9), (1, 33, 2, 3)])
def test_no_alarm_is_false_at_any_remainder_of_the_vectors(shape: tuple[int, ...]) -> None:
    x = _integers(*shape)
    w = _integers(3, shape[1], 1, 1)
    assert not _rounds(lambda: F.conv2d(x, w)) and not _rounds(lambda: x * 3 - x / 4)
    assert not _rounds(lambda: F.batch_norm(x, x[0, :, 0, 0], torch.full(shape[1:2], 3.0).double(), eps=1.0))
    assert _rounds(lambda: x / 3)


def test_a_sum_that_just_fits_is_exact_and_one_bit_more_is_not() -> None:
    large = torch.tensor([2.0**53 - 1], dtype=torch.float64)
    assert not _rounds(lambda: large + 1)
    assert _rounds(lambda: large + 2)


def test_averages_are_exact_over_powers_of_two_only() -> None:
    assert not _rounds(lambda: F.avg_pool2d(X, 2)) and not _rounds(lambda: X.mean((2, 3)))
    assert _rounds(lambda: F.avg_pool2d(X, 3)) and _rounds(lambda: X[..., :7].mean((2, 3)))


def test_what_has_rounded_before_does_not_count() -> None:
    _ = X / 3
    assert not _rounds(lambda: X / 4)


def test_the_number_of_threads_is_put_back() -> None:
    before = torch.get_num_threads()
    with on_one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before

    def fail() -> None:
        assert torch.get_num_threads() == 1
        raise ValueError("in between")

    with pytest.raises(ValueError, match="in between"), on_one_thread():
        fail()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (SimpleNamespace(), "this C library does not tell whether"),
        (SimpleNamespace(feclearexcept=lambda _: 0, fetestexcept=lambda _: 0), "this processor does not tell whether"),
    ],
)
def test_a_machine_that_keeps_no_record_is_told(
    monkeypatch: pytest.MonkeyPatch, library: SimpleNamespace, message: str
) -> None:
    monkeypatch.setattr(inexact.ctypes, "CDLL", lambda _: library)
    with pytest.raises(RgcError, match=message):
        inexact._environment.__wrapped__()


def test_what_a_callback_of_the_garbage_collection_computes_is_none_of_it() -> None:
    def computes(phase: str, info: dict[str, int]) -> None:
        assert len(phase) / 7.0 > 0

    kept: list[object] = []
    before = gc.get_threshold()
    gc.callbacks.append(computes)
    gc.set_threshold(1)
    try:
        with on_one_thread(), watch_rounding() as found:
            kept += [[index] for index in range(100)]
        assert not found.happened and gc.isenabled()
    finally:
        gc.callbacks.remove(computes)
        gc.set_threshold(*before)
