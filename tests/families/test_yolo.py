"""Do the re-parameterised convolutions and implicit heads of the YOLO line become plain convolutions?

YOLOv7: Wang et al., "YOLOv7: Trainable bag-of-freebies sets new state-of-the-art for real-time object detectors"
(2023), section 4.1 (RepConvN: RepConv without identity). ImplicitA and ImplicitM: Wang et al., "You Only Learn One
Representation: Unified Network for Multiple Tasks" (2021), section 3.3. RepConvN in CSP layers: Wang et al., "YOLOv9:
Learning What You Want to Learn Using Programmable Gradient Information" (2024), section 4.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class RepConv(nn.Module):
    """silu(bn(W3 x) + bn(W1 x) + bn(x)); RepConvN leaves the last out."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1, identity: bool = True) -> None:
        super().__init__()
        self.rbr_dense = conv_bn(inputs, outputs, 3, stride, groups)
        self.rbr_1x1 = conv_bn(inputs, outputs, 1, stride, groups)
        self.rbr_identity = nn.BatchNorm2d(inputs) if identity and inputs == outputs and stride == 1 else None
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        identity: Any = 0 if self.rbr_identity is None else self.rbr_identity(x)
        out: Tensor = self.act(self.rbr_dense(x) + self.rbr_1x1(x) + identity)
        return out


@pytest.mark.parametrize("identity", [True, False], ids=["RepConv", "RepConvN"])
@pytest.mark.parametrize(("outputs", "stride", "groups"), [(8, 1, 1), (8, 1, 2), (12, 2, 1), (16, 1, 4)])
def test_a_repconv_becomes_one_convolution(
    becomes: Any, outputs: int, stride: int, groups: int, identity: bool
) -> None:
    becomes(RepConv(8, outputs, stride, groups, identity), (2, 8, 9, 8), {"Conv2d": 1, "SiLU": 1})


class RepBottleneck(nn.Module):
    """YOLOv9's RepNBottleneck: x + conv(repconv(x))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = RepConv(channels, channels, identity=False)
        self.second = nn.Sequential(*conv_bn(channels, channels, 3), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class RepCSP(nn.Module):
    """Two 1x1 branches of one input, one with bottlenecks, concatenated: cv3(cat(m(cv1(x)), cv2(x)))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.cv1, self.cv2 = (nn.Sequential(*conv_bn(channels, half, 1), nn.SiLU()) for _ in range(2))
        self.m = RepBottleneck(half)
        self.cv3 = nn.Sequential(*conv_bn(channels, channels, 1), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))
        return out


def test_a_csp_layer_of_repconvn_becomes_its_plain_convolutions(becomes: Any) -> None:
    becomes(RepCSP(8), (2, 8, 7, 9), {"Conv2d": 5, "SiLU": 5, "add": 1, "cat": 1})


class ImplicitA(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.implicit = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.implicit + x


class ImplicitM(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.implicit = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.implicit * x


def test_an_implicit_head_becomes_one_convolution(becomes: Any) -> None:
    becomes(nn.Sequential(ImplicitA(8), nn.Conv2d(8, 12, 1), ImplicitM(12)), (2, 8, 5, 6), {"Conv2d": 1})


def test_an_implicit_head_goes_into_the_convolution_before_it_as_well(becomes: Any) -> None:
    head = nn.Sequential(*conv_bn(8, 8, 3), ImplicitA(8), nn.Conv2d(8, 12, 1), ImplicitM(12))
    becomes(head, (2, 8, 5, 6), {"Conv2d": 1})


class Detect(nn.Module):
    """Heads over several scales; every output as anchors [N, anchors, height, width, values]."""

    def __init__(self, channels: tuple[int, ...], anchors: int, values: int) -> None:
        super().__init__()
        self.anchors, self.values = anchors, values
        outputs = anchors * values
        self.down = nn.ModuleList([RepConv(channels[i], channels[i + 1], 2) for i in range(len(channels) - 1)])
        self.m = nn.ModuleList([nn.Conv2d(count, outputs, 1) for count in channels])
        self.ia = nn.ModuleList([ImplicitA(count) for count in channels])
        self.im = nn.ModuleList([ImplicitM(outputs) for _ in channels])

    def forward(self, x: Tensor) -> list[Tensor]:
        scales = [x]
        for layer in self.down:
            scales.append(layer(scales[-1]))
        outputs = []
        for i, scale in enumerate(scales):
            y = self.im[i](self.m[i](self.ia[i](scale)))
            batch, _, height, width = y.shape
            y = y.view(batch, self.anchors, self.values, height, width).permute(0, 1, 3, 4, 2).contiguous()
            outputs.append(y)
        return outputs


def test_a_detection_head_over_scales_keeps_its_convolutions_and_permutations_only(becomes: Any) -> None:
    becomes(Detect((4, 8, 8), 2, 5), (2, 4, 9, 8), {"Conv2d": 5, "SiLU": 2, "permute": 3})
