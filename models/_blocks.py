"""What do the small residual networks of the zoo share? A basic block on CIFAR's terms, and a head."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

# In channels, out channels, stride -> a module that maps as a 3x3 convolution with padding 1 and no bias.
Conv3x3 = Callable[[int, int, int], nn.Module]


def plain_conv3x3(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The 3x3 convolution that a basic block has as a rule."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)


@final
class BasicBlock(nn.Module):
    """Two 3x3 convolutions with their batch norms and a shortcut, projected where shapes differ (arXiv 1512.03385)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, conv3x3: Conv3x3 = plain_conv3x3) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.conv2 = conv3x3(out_channels, out_channels, 1)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        activated: Tensor = self.relu(y + self.downsample(x))
        return activated


@final
class Head(nn.Module):
    """Global average pooling and one linear layer: [batch, features, height, width] to [batch, num_classes]."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return scores


def stem(in_channels: int, features: int) -> nn.Sequential:
    """The first layer: 3x3 convolution, batch norm, ReLU."""
    return nn.Sequential(plain_conv3x3(in_channels, features, 1), nn.BatchNorm2d(features), nn.ReLU())


def initialise(module: nn.Module) -> None:
    """The initialisation of ResNet, for ``model.apply``."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
