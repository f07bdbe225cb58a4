"""Do models of every kind compile, stay equal, keep no batch norm without a reason, and settle?

A handful of small ones; ``python -m benchmarks.reach`` does the same for all of torchvision and each family of timm.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.segmentation.fcn import FCN, FCNHead
from torchvision.models.video.resnet import BasicBlock, BasicStem, Conv3DSimple, VideoResNet

import rgc
from rgc.example import Example, output_difference
from rgc.testing import randomize


class Backbone(nn.Sequential):
    """Two stages, the second of which the heads read."""

    out_channels = 8

    def __init__(self, name: str) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        )  # fmt: skip
        self.name = name

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return OrderedDict([(self.name, super().forward(x))])


def detector() -> nn.Module:
    anchors = AnchorGenerator(((16,),), ((0.5, 1.0),))
    return RetinaNet(Backbone("0"), 3, anchor_generator=anchors, min_size=48, max_size=64, detections_per_img=5)


MODELS: dict[str, tuple[Callable[[], nn.Module], Example, str]] = {
    "classification": (
        lambda: torchvision.models.shufflenet_v2_x0_5(weights=None), Example((torch.randn(1, 3, 64, 64),)), "torch.fx",
    ),
    "segmentation": (lambda: FCN(Backbone("out"), FCNHead(8, 4)), Example((torch.randn(1, 3, 33, 40),)), "torch.fx"),
    "detection": (detector, Example(([torch.rand(3, 48, 56)],)), "submodules"),
    "video": (
        lambda: VideoResNet(BasicBlock, [Conv3DSimple] * 4, [1, 1, 1, 1], BasicStem, num_classes=5),
        Example((torch.randn(1, 3, 4, 16, 16),)), "torch.fx",
    ),
    "a vision transformer": (
        lambda: timm.create_model("test_vit", img_size=64), Example((torch.randn(1, 3, 64, 64),)), "torch.fx",
    ),
    "attention behind batch norms over tokens": (
        lambda: timm.create_model("levit_128s", img_size=64), Example((torch.randn(1, 3, 64, 64),)), "torch.fx",
    ),
    "attention between convolutions": (
        lambda: timm.create_model("test_coatnet", img_size=64), Example((torch.randn(1, 3, 64, 64),)), "torch.fx",
    ),
    "inverted residuals": (
        lambda: timm.create_model("test_efficientnet"), Example((torch.randn(1, 3, 64, 64),)), "torch.fx",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_it_compiles_stays_equal_explains_each_batch_norm_and_settles(name: str) -> None:
    build, example, tier = MODELS[name]
    torch.manual_seed(0)
    model, example = randomize(build()).double(), example.cast(torch.float64)
    compiled = rgc.compile(model, example)
    report = compiled.report
    assert report.tier == tier and not report.failures
    assert report.ops_after.total() <= report.ops_before.total()
    assert output_difference(example.run(model), example.run(compiled)) < 1e-9

    left = [path for path, part in compiled.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    named = {place for refused in report.refusals for place in refused.where.split(" + ")}
    assert [path for path in left if path.removeprefix("model.") not in named] == []

    again = rgc.compile(compiled, example).report
    # a factor with an offset is written as two calls, which are one operator again
    assert [each for each in again.rewrites if (each.rewrite, each.result) != ("fold_scale", ("scale",))] == []
    assert without_kept(again) == without_kept(report)


def without_kept(report: rgc.Report) -> dict[str, int]:
    """Counts of operators; a model that is kept as it is has the class of its compiled form the second time."""
    kept = {"RetinaNet", "GraphModule"}
    return {operator: count for operator, count in report.ops_after.items() if operator not in kept}
