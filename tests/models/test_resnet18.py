"""With plain convolutions and batch norms, is the shared skeleton torchvision's ResNet-18?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rgc.models._resnet18 import ResNet18

Randomise = Callable[[Any], Any]


def plain(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out_channels)
    )


def test_with_the_same_weights_torchvision_computes_the_same_scores(randomise: Randomise) -> None:
    torchvision = pytest.importorskip("torchvision")
    ours = randomise(ResNet18(plain, num_classes=7))
    theirs = torchvision.models.resnet18(num_classes=7).double().eval()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    x = torch.randn(2, 3, 65, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_the_example_input_is_what_the_model_was_built_for() -> None:
    with torch.device("meta"):
        assert ResNet18(plain).example_inputs()[0].shape == (1, 3, 224, 224)
        assert ResNet18(plain, in_channels=1, image_size=64).example_inputs()[0].shape == (1, 1, 64, 64)
