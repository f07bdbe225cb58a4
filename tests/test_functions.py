"""Do the forms of a call mean what PyTorch says, whatever the size?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rgc
from rgc.compiler import trace


class _Calls(nn.Module):
    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def _labels(forward: Callable[[Tensor], Tensor], *shape: int) -> list[str]:
    return [value.op.label for value in trace(_Calls(forward).eval(), torch.randn(shape)).graph.nodes()]


@pytest.mark.parametrize(
    "reshaped",
    [
        lambda x: torch.relu(x).reshape(x.shape[0], -1),
        lambda x: (y := torch.relu(x)).reshape(y.shape[0], y.shape[1], -1),
        lambda x: (y := torch.sigmoid(x)).view(y.size(0), y.size(1), -1),
        lambda x: torch.relu(y := torch.tanh(x)).reshape(y.shape[0], y.shape[1], -1),
        lambda x: (y := torch.relu(x)).reshape((*y.shape[:1], y.shape[1], y.shape[2], -1)),
    ],
)
def test_a_reshape_that_keeps_the_leading_axes_is_a_flatten(reshaped: Callable[[Tensor], Tensor]) -> None:
    assert "flatten" in _labels(reshaped, 2, 3, 4, 5)
    x = torch.randn(3, 3, 6, 7)
    compiled = rgc.compile(_Calls(reshaped).eval(), torch.randn(2, 3, 4, 5))
    assert torch.equal(compiled(x), reshaped(x))


@pytest.mark.parametrize(
    "reshaped",
    [
        lambda x: torch.relu(x).reshape(x.shape[1], x.shape[0], -1),
        lambda x: torch.relu(x).reshape(x.shape[0], x.shape[2], -1),
        lambda x: torch.relu(x).reshape(x.shape[0], 3, -1),
        lambda x: torch.relu(x).transpose(2, 3).reshape(x.shape[0], x.shape[1], x.shape[2], -1),
        lambda x: torch.relu(x[:, :, :3]).reshape(x.shape[0], x.shape[2], -1),
    ],
)
def test_a_reshape_by_other_lengths_is_none(reshaped: Callable[[Tensor], Tensor]) -> None:
    """Lengths that agree at the example (3 x 3 x 3 x 3) and differ elsewhere must not be taken for each other."""
    assert "flatten" not in _labels(reshaped, 3, 3, 3, 3)
    x = torch.randn(2, 3, 6, 4)
    assert torch.equal(rgc.compile(_Calls(reshaped).eval(), torch.randn(3, 3, 3, 3))(x), reshaped(x))
