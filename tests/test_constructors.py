"""Does the text of a layer make a layer like it?"""

from __future__ import annotations

import pytest
from torch import nn

from rgc.constructors import constructor, kinds_of


@pytest.mark.parametrize("layer", [
    nn.Conv1d(2, 4, 3, stride=2, padding=1, dilation=2, groups=2, bias=False, padding_mode="reflect"),
    nn.Conv2d(2, 4, (3, 1), padding="same"), nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2),
    nn.BatchNorm2d(3, eps=0.1, affine=False), nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    nn.MaxPool1d(2, ceil_mode=True), nn.Linear(3, 4, bias=False), nn.LeakyReLU(0.3), nn.PixelShuffle(2),
])  # fmt: skip
def test_a_layer_is_made_again(layer: nn.Module) -> None:
    text = constructor(layer)
    assert text is not None
    assert repr(eval(text, {"nn": nn})) == repr(layer)


def test_a_class_of_somebody_and_a_container_are_not_told() -> None:
    class Own(nn.Conv2d):
        pass

    assert kinds_of(Own(1, 1, 1)) is None and constructor(Own(1, 1, 1)) is None
    assert constructor(nn.Sequential(nn.ReLU())) is None
