"""Does a residual get through the activations beside it, exactly, at every size, and at a price that is told?"""

from __future__ import annotations

from pathlib import Path
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


@pytest.mark.parametrize(
    ("f", "emitted"),
    [
        (nn.ReLU6(), {"maximum": 1, "minimum": 1}),
        (nn.Hardtanh(-0.5, 0.25), {"maximum": 1, "minimum": 1}),
        (nn.Hardtanh(), {"maximum": 1, "minimum": 1}),
        (nn.PReLU(8), {"PReLU": 1}),
        (nn.PReLU(), {"PReLU": 1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_an_activation_with_parameters_per_channel_leaves_the_carried_ones_alone(
    f: nn.Module, emitted: dict[str, int], rank: int, compiled: Any
) -> None:
    slopes = [module for module in f.modules() if isinstance(module, nn.PReLU)]
    for prelu in slopes:
        nn.init.uniform_(prelu.weight, -1.5, 0.5)
    conv: Any = getattr(nn, f"Conv{rank}d")
    body = nn.Sequential(conv(4, 8, 3, padding=1), f, conv(8, 4, 3, padding=1))
    report = compiled(Residual(body), 2, 4, *(9, 8, 5)[:rank], passes=PASSES)
    (firing,) = [each for each in report.rewrites if each.rewrite == NAME]
    assert firing.result[0].split()[2] == "4->12"  # one copy of the 4
    assert firing.evidence == "exact" and not firing.condition  # on all values: no range had to be proved
    assert {name: n for name, n in report.ops_after.items() if not name.startswith("Conv")} == emitted
    assert firing.macs > 0


def test_tokens_are_carried_too_but_not_beside_slopes_of_another_axis(compiled: Any, reasons: Any) -> None:
    def block(f: nn.Module) -> nn.Module:
        return Residual(nn.Sequential(nn.Linear(4, 6), f, nn.Linear(6, 4)))

    for f, layers in ((nn.ReLU6(), "maximum"), (nn.GELU(), "GELU"), (nn.PReLU(init=0.3), "PReLU")):
        report = compiled(block(f), 2, 5, 4, passes=PASSES)
        assert report.ops_after["add"] == 0 and report.ops_after[layers] == 1
    report = compiled(block(nn.PReLU(5)), 2, 5, 4, passes=PASSES)
    assert report.ops_after["add"] == 1 and "slopes along axis 1" in reasons(report, NAME)
    report = compiled(block(nn.PReLU(init=-1.0)), 2, 5, 4, passes=PASSES)
    assert "prelu of slope -1" in reasons(report, NAME)


def test_bounds_of_the_users_own_per_channel_are_carried_around(calls: Any, compiled: Any) -> None:
    bound = torch.linspace(-0.5, 2, 8).reshape(8, 1, 1)
    model = calls(
        lambda x, a, b: b(torch.minimum(a(x), bound)) + x, a=nn.Conv2d(4, 8, 1), b=nn.Conv2d(8, 4, 3, padding=1)
    )
    assert compiled(model, 2, 4, 9, 8, passes=PASSES).ops_after == {"Conv2d": 2, "minimum": 1}


@pytest.mark.parametrize("kind", [nn.ReLU6, nn.SiLU])
def test_a_depthwise_layer_stays_depthwise_or_nearly_so(kind: Any, compiled: Any) -> None:
    body = nn.Sequential(
        nn.Conv2d(4, 24, 1), kind(), nn.Conv2d(24, 24, 3, padding=1, groups=24), kind(), nn.Conv2d(24, 4, 1)
    )  # fmt: skip
    report = compiled(Residual(body), 2, 4, 9, 8, passes=PASSES)
    (firing,) = [each for each in report.rewrites if each.rewrite == NAME]
    (depthwise,) = [label for label in firing.result if label.startswith("conv 3x3")]
    assert depthwise == ("conv 3x3 28->28 groups=28" if kind is nn.ReLU6 else "conv 3x3 32->32 groups=16")


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
        (nn.CELU(), "celu does not give back"),
        (nn.Sigmoid(), "sigmoid does not give back"),
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


def test_a_mobilenet_v2_has_no_residuals_left_in_any_dtype() -> None:
    model = randomize(torchvision.models.mobilenet_v2(num_classes=10))
    compiled = rgc.compile(model, torch.randn(1, 3, 65, 64), passes=PASSES)
    report = compiled.report
    assert report.ops_after["add"] == 0 and report.ops_after["Conv2d"] == 52 and not report.fixed_size
    assert report.ops_after["ReLU6"] == 15 and report.ops_after["maximum"] == report.ops_after["minimum"] == 20
    assert report.macs_before < report.macs_after < 1.1 * report.macs_before
    assert sum(each.macs for each in report.rewrites if each.rewrite == NAME) == report.macs_after - report.macs_before
    other = torch.randn(2, 3, 70, 61)
    with torch.no_grad():
        torch.testing.assert_close(compiled(other), model(other), rtol=1e-3, atol=1e-4)
    for dtype in (torch.float16, torch.bfloat16):
        low = rgc.compile(model, torch.randn(1, 3, 65, 64), passes=PASSES, dtype=dtype).report
        assert low.ops_after == report.ops_after and low.verification is not None and low.verification.equal


def test_a_clamp_of_a_single_path_runs_in_onnxruntime_and_comes_back(tmp_path: Path) -> None:
    body = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6(),
                         nn.Conv2d(8, 4, 1))  # fmt: skip
    model, x = randomize(Residual(body)), 20 * torch.randn(2, 4, 9, 8)
    compiled = rgc.compile(model, x, passes=PASSES)
    assert compiled.report.ops_after == {"Conv2d": 3, "maximum": 2, "minimum": 2}
    for name in ("model.onnx", "model.pt2", "folder/"):
        rgc.save(compiled, tmp_path / name if name[-1] != "/" else f"{tmp_path / name}/")
        loaded = rgc.load(tmp_path / name, trust=True)
        with torch.no_grad():
            found = loaded(x)
            torch.testing.assert_close(found[0] if name.endswith("onnx") else found, model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("f", [nn.GELU(), nn.SiLU(), nn.LeakyReLU(0.3), nn.ReLU6()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_that_passes_many_activations_is_not_rounded_away(f: nn.Module, dtype: torch.dtype) -> None:
    model = randomize(nn.Sequential(*(Residual(basic(f)) for _ in range(6))))
    report = rgc.compile(model, torch.randn(2, 4, 9, 8), passes=PASSES, dtype=dtype).report
    assert report.ops_after["add"] == 0 and report.ops_after["Conv2d"] == 12
    proof = report.verification
    assert proof is not None and proof.equal and proof.deployed_error < 4 * proof.original_error


def test_a_resnet_of_bottlenecks_becomes_a_single_path_too() -> None:
    model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [2, 1, 1, 1], num_classes=10)
    report = rgc.compile(randomize(model), torch.randn(1, 3, 33, 32), passes=PASSES).report
    assert report.ops_after == {"Conv2d": 16, "ReLU": 16, "MaxPool2d": 1, "AdaptiveAvgPool2d": 1, "Linear": 1}
    assert not report.fixed_size and not report.failures
