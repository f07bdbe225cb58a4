"""Does a stage that pads once, with shortcuts that are cropped to match, become one convolution at every size?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Call = Callable[[Tensor], Tensor]

CROPS: dict[str, Call] = {
    "slices": lambda x: x[:, :, 1:-1, 1:-1],
    "slices behind dots": lambda x: x[..., 1:-1, 1:-1],
    "negative padding": lambda x: F.pad(x, (-1, -1, -1, -1)),
    "a layer of negative padding": nn.ZeroPad2d(-1),
    "slices up to the size": lambda x: x[:, :, 1 : x.shape[2] - 1, 1 : x.size(-1) - 1],
    "narrow": lambda x: x.narrow(2, 1, x.shape[2] - 2).narrow(-1, 1, x.size(-1) - 2),
}

PADS: dict[str, Callable[[int], Call]] = {
    "zeros": lambda width: lambda x: F.pad(x, (width,) * 4),
    "layer of zeros": nn.ZeroPad2d,
    "reflection": lambda width: lambda x: F.pad(x, (width,) * 4, mode="reflect"),
    "layer of reflection": nn.ReflectionPad2d,
    "replication": nn.ReplicationPad2d,
    "nothing": lambda width: lambda x: x,
}


class Block(nn.Module):
    """3x3, 1x1 and batch norms without padding, plus the input cropped to match."""

    def __init__(self, crop: Call) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
        )
        self.crop = crop

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.crop(x) + self.layers(x)
        return y


class Downsampling(nn.Module):
    """A block of stride 2, with a 1x1 convolution of stride 2 as shortcut, of the input cropped to match."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(4, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        )
        self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 1, stride=2, bias=False), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.shortcut(x[..., 3:-3, 3:-3]) + self.layers(x)
        return y


class Stage(nn.Module):
    def __init__(self, pad: Call, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.pad, self.blocks = pad, nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.blocks(self.pad(torch.sigmoid(x))))


@pytest.mark.parametrize("crop", list(CROPS))
@pytest.mark.parametrize("pad", ["zeros", "nothing"])
def test_a_shortcut_may_be_cropped_in_any_spelling(pad: str, crop: str, becomes: Any) -> None:
    model = Stage(PADS[pad](3), [Block(CROPS[crop]) for _ in range(3)])
    becomes(model, (2, 4, 9, 8), {"Sigmoid": 1, "Conv2d": 1, "ReLU": 1})


@pytest.mark.parametrize("pad", list(PADS))
def test_the_stage_may_pad_in_any_spelling(pad: str, becomes: Any) -> None:
    model = Stage(PADS[pad](3), [Block(CROPS["slices"]) for _ in range(3)])
    ops = {"Sigmoid": 1, "Conv2d": 1, "ReLU": 1}
    becomes(model, (2, 4, 9, 8), ops)


@pytest.mark.parametrize("pad", ["zeros", "layer of reflection", "nothing"])
def test_a_block_of_stride_two_with_a_convolution_as_shortcut_is_part_of_it(pad: str, becomes: Any) -> None:
    model = Stage(PADS[pad](7), [Downsampling(), Block(CROPS["slices"]), Block(CROPS["slices"])])
    becomes(model, (2, 4, 17, 16), {"Sigmoid": 1, "Conv2d": 1, "ReLU": 1})


def test_two_stages_of_three_that_each_pad_are_two_convolutions(becomes: Any) -> None:
    """The second stage reads zeros around the first one's output, which is not what the first would have there."""
    stages = [Stage(PADS["zeros"](2), [Block(CROPS["slices"]) for _ in range(2)]).blocks for _ in range(2)]
    model = nn.Sequential(nn.ZeroPad2d(2), stages[0], nn.ZeroPad2d(2), stages[1], nn.ReLU())
    becomes(model, (2, 4, 9, 8), {"Conv2d": 2, "ReLU": 1})


def test_a_shortcut_that_is_cropped_off_centre_is_a_tap_of_its_own(becomes: Any) -> None:
    model = Stage(PADS["zeros"](2), [Block(lambda x: x[..., 2:, :-2]), Block(lambda x: x[..., :-2, 1:-1])])
    becomes(model, (2, 4, 9, 8), {"Sigmoid": 1, "Conv2d": 1, "ReLU": 1})
