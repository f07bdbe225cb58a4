"""What does a ResNet-18 look like whose pairs of 3x3 convolution and batch norm are replaced by another block?

The topology of arXiv 1512.03385 (table 1, 18 layers, projection shortcuts), with the parameter-free choices of
torchvision: stride in the first 3x3 of a block, 7x7 stem, max pooling, activations after the addition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from rgc.models._example import example

# In channels, out channels, stride -> a module that maps as a 3x3 convolution with padding 1 and its batch norm.
Conv3x3 = Callable[[int, int, int], nn.Module]


@final
class ResNet18(nn.Module):
    """ResNet-18 with ``conv3x3(in_channels, out_channels, stride)`` for each 3x3 convolution and its batch norm.

    The 7x7 stem and the 1x1 shortcuts stay as they are. Input [batch, in_channels, height, width], output [batch,
    num_classes]; ``image_size`` only says what ``example_inputs`` gives.
    """

    def __init__(
        self, conv3x3: Conv3x3, *, num_classes: int = 1000, in_channels: int = 3, image_size: int = 224
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.image_size = image_size
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.Sequential(_BasicBlock(conv3x3, 64, 64, 1), _BasicBlock(conv3x3, 64, 64, 1))
        self.layer2 = nn.Sequential(_BasicBlock(conv3x3, 64, 128, 2), _BasicBlock(conv3x3, 128, 128, 1))
        self.layer3 = nn.Sequential(_BasicBlock(conv3x3, 128, 256, 2), _BasicBlock(conv3x3, 256, 256, 1))
        self.layer4 = nn.Sequential(_BasicBlock(conv3x3, 256, 512, 2), _BasicBlock(conv3x3, 512, 512, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, num_classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        scores: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return scores

    def example_inputs(self) -> tuple[Tensor, ...]:
        """One image, [1, in_channels, image_size, image_size]."""
        return example(self, 1, self.in_channels, self.image_size, self.image_size)


@final
class _BasicBlock(nn.Module):
    def __init__(self, conv3x3: Conv3x3, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.relu = nn.ReLU()
        self.conv2 = conv3x3(out_channels, out_channels, 1)
        keeps_shape = stride == 1 and in_channels == out_channels
        self.downsample = nn.Identity() if keeps_shape else _projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.relu(self.conv1(x)))
        activated: Tensor = self.relu(y + self.downsample(x))
        return activated


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
