"""What do tests of several passes need? To compile a model with random weights and hold it against eager PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rgc
from rgc import Report
from rgc.testing import randomize


class Calls(nn.Module):
    """Modules, and a function that calls them in order of their names."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.call = forward

    def forward(self, x: Tensor) -> Any:
        return self.call(x, **self.parts)


@pytest.fixture
def calls() -> type[Calls]:
    return Calls


@pytest.fixture
def compiled() -> Callable[..., Report]:
    def compile_and_compare(model: nn.Module, *shape: int, random: bool = True, **options: Any) -> Report:
        model = (randomize(model) if random else model.eval()).double()
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        result = rgc.compile(model, x, **{"objective": "depth", **options})
        with torch.no_grad():
            expected, found = copy.deepcopy(model)(x.clone()), result(x.clone())
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
        assert result.report.failures == []
        return result.report

    return compile_and_compare


@pytest.fixture
def reasons() -> Callable[[Report, str], str]:
    """What a pass said where it refused."""
    return lambda report, name: "; ".join(each.reason for each in report.refusals if each.rewrite == name)
