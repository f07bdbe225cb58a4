"""Is a length that a model computes known by the length of the axis that it cuts, at every size, or not at all?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rgc
from rgc.testing import randomize


class Cropping(nn.Module):
    """A convolution without padding, and its input cropped by a function of both."""

    def __init__(self, crop: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.crop = nn.Conv2d(3, 3, (5, 3)), nn.BatchNorm2d(3), crop

    def forward(self, x: Tensor) -> Tensor:
        return self.crop(torch.relu(x), self.norm(self.conv(x)))


def crops_of(model: nn.Module) -> list[str]:
    """The crops that the model is lifted to; it is held against the original at three sizes."""
    model = randomize(model)
    shapes = (2, 3, 9, 8), (1, 3, 8, 8), (3, 3, 7, 12)
    compiled = rgc.compile(model, torch.randn(shapes[0]), passes=[])
    for shape in shapes:
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
    graph = rgc.compiler.trace(model, torch.randn(shapes[0])).graph
    return [value.op.label for value in graph.nodes() if value.op.label.startswith("crop")]


@pytest.mark.parametrize(
    ("crop", "labels"),
    [
        (lambda x, y: x[:, :, 1 : x.shape[2] - 2], ["crop -1,-2x0"]),
        (lambda x, y: x[..., 2 : 2 + x.size(-2) - 4, :], ["crop -2x0"]),
        (lambda x, y: x[:, :, : x.shape[2:][0] - 1, 1 : x.size()[3]], ["crop 0,-1x-1,0"]),
        (lambda x, y: x[:, :, 2 : 2 + y.shape[2], 1 : y.shape[3] + 1], ["crop -2x-1"]),
        (lambda x, y: x[:, :, (x.shape[2] - y.shape[2]) // 2 : -2], ["crop -2x0"]),
        (lambda x, y: x.narrow(2, 2, y.size(2)).narrow(-1, 1, y.size(-1)), ["crop -2x0", "crop 0x-1"]),
        (lambda x, y: x.narrow(2, (x.size(2) - y.size(2)) // 2, x.size(2) - 4), ["crop -2x0"]),
        (lambda x, y: x.narrow(2, 3, x.size(2) - 3), ["crop -3,0x0"]),
    ],
)
def test_a_crop_by_computed_lengths_is_a_crop(crop: Any, labels: list[str]) -> None:
    assert crops_of(Cropping(crop)) == labels


@pytest.mark.parametrize(
    "crop",
    [
        lambda x, y: x[:, :, : x.shape[2] // 2],
        lambda x, y: x[:, :, : x.shape[3] - 1],
        lambda x, y: x[:, :, 1 : x.shape[2] + 1],
        lambda x, y: x[:, :, x.shape[2] - 2 :],
        lambda x, y: x[:, :, : x.shape[2] * 2 - 12],
        lambda x, y: x.narrow(2, 0, x.shape[2] // 2),
        lambda x, y: x.narrow(2, 1, 4),
        lambda x, y: x[:, :, : torch.nn.functional.max_pool2d(y, 2, 1).shape[2] - 8 // x.shape[2]],
    ],
)
def test_what_is_another_crop_at_another_size_stays_as_it_is(crop: Any) -> None:
    assert crops_of(Cropping(crop)) == []


def test_a_pooling_and_a_pad_between_add_their_own() -> None:
    def crop(x: Tensor, y: Tensor) -> Tensor:
        y = nn.functional.avg_pool2d(nn.functional.pad(y, (0, 0, 1, 0)), 3, stride=1, padding=1)
        y = nn.functional.max_pool2d(y, 3, stride=1, dilation=1)
        return x[:, :, 3 : 3 + y.shape[2]]

    assert crops_of(Cropping(crop)) == ["crop -3,-2x0"]


def test_a_stride_between_leaves_the_length_unknown() -> None:
    def crop(x: Tensor, y: Tensor) -> Tensor:
        return x[:, :, 1 : nn.functional.avg_pool2d(y, 2).shape[2]]

    assert crops_of(Cropping(crop)) == []
