"""Convolutions by Fourier transforms are PyTorch's convolutions."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rgc import fourier
from rgc.fourier import fourier_convolutions

CONVOLUTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Transforms also where they do not pay, so that small cases show them; holds one entry for each."""
    seen: list[bool] = []

    def pays(*_: Any) -> bool:
        seen.append(True)
        return True

    monkeypatch.setattr(fourier, "_pays", pays)
    return seen


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("with_bias", [True, False])
def test_it_is_the_convolution_for_every_geometry(rank: int, with_bias: bool, always: list[bool]) -> None:
    generator = torch.Generator().manual_seed(rank)
    cases = list(itertools.product((1, 3), (0, 2), (1, 2), (1, 2)))
    for stride, padding, dilation, groups in cases:
        sizes, kernel = [11, 10, 9][:rank], [4, 3, 2][:rank]
        x = torch.randn(2, 4, *sizes, generator=generator, dtype=torch.float64)
        weight = torch.randn(6, 4 // groups, *kernel, generator=generator, dtype=torch.float64)
        bias = torch.randn(6, generator=generator, dtype=torch.float64) if with_bias else None
        arguments = (x, weight, bias, stride, [padding] * rank, dilation, groups)
        expected = CONVOLUTIONS[rank](*arguments)
        with fourier_convolutions():
            found = CONVOLUTIONS[rank](*arguments)
        assert found.shape == expected.shape and found.is_contiguous()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13 * float(expected.abs().max()))
    assert len(always) == len(cases)


def test_what_is_not_finite_stays_where_the_convolution_has_it(always: list[bool]) -> None:
    x = torch.ones(1, 1, 9, 9, dtype=torch.float64)
    x[0, 0, 0, 0], x[0, 0, 8, 8] = float("inf"), float("nan")
    weight = torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with fourier_convolutions():
        found = F.conv2d(x, weight)
    assert always
    assert torch.equal(found.isfinite(), F.conv2d(x, weight).isfinite()) and not bool(found.isfinite().all())


def test_transforms_are_taken_for_large_kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    transformed: list[Tensor] = []
    rfftn = torch.fft.rfftn

    def counted(x: Tensor, *rest: Any) -> Tensor:
        transformed.append(x)
        return rfftn(x, *rest)

    monkeypatch.setattr(torch.fft, "rfftn", counted)
    x, large, small = (torch.randn(2, 2, n, n, dtype=torch.float64) for n in (64, 33, 3))
    with fourier_convolutions():
        F.conv2d(x, small)
        assert not transformed
        F.conv2d(x.float(), large.float())
        assert not transformed
        F.conv2d(x, large)
        assert transformed


def test_wrong_arguments_raise_what_the_convolution_raises(always: list[bool]) -> None:
    x, weight = torch.randn(1, 3, 9, 9, dtype=torch.float64), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    with fourier_convolutions(), pytest.raises(RuntimeError, match="channels"):
        F.conv2d(x, weight)
    with fourier_convolutions(), pytest.raises(RuntimeError, match="size"):
        F.conv2d(x[:, :, :2, :2], weight[:, :3])
    assert not always
