"""Does a residual get through the activations beside it, exactly, at every size, and at a price that is told?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import rgc
from rgc.testing import randomize

PASSES = "default,single_path"
NAME = "single_path"


class Residual(nn.Module):
    def __init__(self, body: nn.Module, skip: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.skip = body, skip or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.body(x)


def basic(f: nn.Module, stride: int = 1, makes: int = 4, groups: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride, 1, groups=groups), nn.BatchNorm2d(8), f, nn.Conv2d(8, makes, 3, padding=1),
        nn.BatchNorm2d(makes),
    )  # fmt: skip


@pytest.mark.parametrize(
    "f", [nn.ReLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.Hardswish(), nn.LeakyReLU(0.3)], ids=str
)
@pytest.mark.parametrize("stride", [1, 2])
def test_any_values_are_carried_in_two_copies(f: nn.Module, stride: int, compiled: Any) -> None:
    skip = nn.Sequential(nn.Conv2d(4, 5, 1, stride), nn.BatchNorm2d(5)) if stride > 1 else nn.Conv2d(4, 5, 1)
    report = compiled(Residual(basic(f, stride, 5), skip), 2, 4, 9, 8, passes=PASSES)
    assert report.ops_after["Conv2d"] == 2 and report.ops_after.total() == 3 and not report.fixed_size
    (firing,) = [each for each in report.rewrites if each.rewrite == NAME]
    assert firing.result[0].split()[2] == "4->18"  # 8 of its own, twice 5 carried


@pytest.mark.parametrize(("before", "f"), [(nn.ReLU(), nn.ReLU()), (nn.ReLU6(), nn.ReLU6()), (nn.Sigmoid(), nn.ReLU())])
def test_values_that_the_activation_leaves_alone_are_carried_once(before: Any, f: Any, compiled: Any) -> None:
    report = compiled(nn.Sequential(before, Residual(basic(f)), nn.ReLU()), 2, 4, 9, 8, passes=PASSES)
    (firing,) = [each for each in report.rewrites if each.rewrite == NAME]
    assert firing.result[0].split()[2] == "4->12" and firing.evidence == "range-conditional"
    assert "in [0, " in firing.condition


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("f", [nn.ReLU(), nn.SiLU()], ids=str)
def test_a_bottleneck_carries_through_both_activations(stride: int, f: nn.Module, compiled: Any) -> None:
    body = nn.Sequential(nn.Conv2d(4, 3, 1), f, nn.Conv2d(3, 3, 3, stride, 1), f, nn.Conv2d(3, 6, 1))
    report = compiled(Residual(body, nn.Conv2d(4, 6, 1, stride)), 2, 4, 9, 8, passes=PASSES)
    assert report.ops_after["Conv2d"] == 3 and report.ops_after["add"] == 0


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (nn.Mish(), "mish does not give back what it is given"),
        (nn.ELU(), "elu does not give back"),
        (nn.ReLU6(), "is not proved to lie in [0, 6]"),
        (nn.LeakyReLU(-1.0), "slope -1"),
    ],
    ids=str,
)
def test_other_activations_are_refused(f: nn.Module, reason: str, compiled: Any, reasons: Any) -> None:
    report = compiled(Residual(basic(f)), 2, 4, 9, 8, passes=PASSES)
    assert report.ops_after["add"] == 1 and reason in reasons(report, NAME)


def test_grids_that_do_not_meet_are_refused(compiled: Any, reasons: Any) -> None:
    report = compiled(Residual(basic(nn.ReLU(), 2, 5), nn.Conv2d(4, 5, 2, 2)), 2, 4, 8, 8, passes=PASSES)
    assert report.ops_after["add"] == 1 and "output sizes" in reasons(report, NAME)


def test_a_body_that_others_read_is_not_computed_twice(calls: Any, compiled: Any, reasons: Any) -> None:
    def taps(x: Any, a: Any, b: Any) -> Any:
        y = torch.relu(a(x))
        return torch.tanh(b(y) + x), torch.sigmoid(y)

    model = calls(taps, a=nn.Conv2d(4, 4, 3, padding=1), b=nn.Conv2d(4, 4, 3, padding=1))
    report = compiled(model, 2, 4, 9, 8, passes=PASSES)
    assert report.ops_after["add"] == 1 and "would be computed twice" in reasons(report, NAME)


@pytest.mark.parametrize("passes", ["default", "all"])
def test_it_is_made_only_if_asked_for_by_name(passes: str, compiled: Any) -> None:
    assert compiled(Residual(basic(nn.ReLU())), 2, 4, 9, 8, passes=passes).ops_after["add"] == 1


def test_a_resnet_18_becomes_convolutions_activations_poolings_and_a_linear_layer() -> None:
    model, x = randomize(torchvision.models.resnet18(num_classes=10)), torch.randn(1, 3, 65, 64)
    compiled = rgc.compile(model, x, passes=PASSES)
    report = compiled.report
    assert report.ops_after == {"Conv2d": 17, "ReLU": 17, "MaxPool2d": 1, "AdaptiveAvgPool2d": 1, "Linear": 1}
    assert report.macs_after > report.macs_before and not report.fixed_size and not report.failures
    other = torch.randn(2, 3, 70, 61)
    with torch.no_grad():
        torch.testing.assert_close(compiled(other), model(other), rtol=1e-3, atol=1e-4)
