"""Is a convolution before a global mean one position of it, and is a whole linear tail one kernel on sums?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rgc
from rgc import passes
from rgc.attempt import Options
from rgc.compiler import compile_with
from rgc.subject import example_of
from rgc.testing import randomize

ALONE = [passes.box_mean]

MEANS: dict[str, Any] = {
    "adaptive module": (nn.AdaptiveAvgPool2d(1), True),
    "adaptive, a size per axis": (nn.AdaptiveAvgPool2d((1, 1)), True),
    "average of the whole map": (nn.AvgPool2d((9, 8)), True),
    "mean": (lambda x: x.mean((2, 3)), False),
    "mean that keeps its axes": (lambda x: x.mean(dim=(-1, -2), keepdim=True), True),
    "mean twice": (lambda x: x.mean(-1).mean(-1), False),
    "mean twice that keeps": (lambda x: x.mean(3, keepdim=True).mean(2, keepdim=True), True),
}


class Averaged(nn.Module):
    def __init__(self, conv: nn.Module, mean: Any) -> None:
        super().__init__()
        self.conv, self.mean = conv, mean

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.mean(self.conv(x)))


@pytest.mark.parametrize("form", list(MEANS))
def test_the_mean_may_be_spelled_in_any_way(form: str, compiled: Any) -> None:
    mean, keeps = MEANS[form]
    report = compiled(Averaged(nn.Conv2d(4, 6, 3, padding=1), mean), 2, 4, 9, 8, passes=ALONE, objective="macs")
    left = {} if keeps else {"mean": 2 if "twice" in form else 1}
    assert report.ops_after == {"linear": 2, "Linear": 1, "ReLU": 1, **left} and report.fixed_size


@pytest.mark.parametrize(
    ("conv", "size"),
    [
        (nn.Conv2d(8, 8, 5, stride=2, padding=2), (9, 12)),
        (nn.Conv2d(8, 8, 3, stride=3, padding=1, dilation=2), (16, 13)),
        (nn.Conv2d(8, 8, 3, padding=1, groups=4), (9, 8)),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), (9, 8)),
        (nn.Conv2d(8, 8, 3, padding="same"), (9, 8)),
        (nn.Conv2d(8, 8, 3), (9, 8)),
        (nn.Conv2d(8, 8, (2, 4), padding="same"), (9, 8)),
        (nn.Conv2d(8, 8, 3, padding=(5, 0)), (4, 11)),
        (nn.Conv2d(8, 8, 3, padding=2, padding_mode="reflect"), (9, 8)),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), (9, 8)),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="replicate"), (9, 8)),
        (nn.Conv2d(8, 8, 1, stride=2), (9, 8)),
        (nn.Conv1d(8, 8, 5, padding=2), (20,)),
        (nn.Conv3d(8, 8, 3, padding=1), (5, 6, 7)),
        (nn.Sequential(nn.ConstantPad2d(1, 0.5), nn.Conv2d(8, 8, 3)), (9, 8)),
        (nn.Sequential(nn.ZeroPad2d((0, 1, 2, 0)), nn.Conv2d(8, 8, 3)), (9, 8)),
        (nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)), (9, 8)),
    ],
)
def test_any_geometry_becomes_one_position(conv: nn.Module, size: tuple[int, ...], compiled: Any) -> None:
    pool: Any = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[len(size) - 1](1)
    report = compiled(
        nn.Sequential(nn.Sigmoid(), conv, pool, nn.ReLU()), 2, 8, *size, passes="all,-collapse", objective="macs"
    )
    assert report.ops_after["linear"] == len(size) and "box_mean" in {each.rewrite for each in report.rewrites}
    assert report.macs_after < report.macs_before


def test_a_pointwise_layer_passes_the_mean_at_every_size_without_it(compiled: Any) -> None:
    model = nn.Sequential(nn.Sigmoid(), nn.Conv2d(8, 16, 1), nn.AdaptiveAvgPool2d(1), nn.ReLU())
    report = compiled(model, 2, 8, 9, 8, objective="latency")
    assert [each.rewrite for each in report.rewrites] == ["exchange_resampling"] and not report.fixed_size


def test_the_head_behind_it_joins_it_where_that_pays(compiled: Any) -> None:
    layers = nn.Conv2d(16, 64, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3)
    report = compiled(nn.Sequential(nn.Sigmoid(), *layers), 2, 16, 12, 12, passes="all,-collapse", objective="macs")
    assert report.macs_after == 2 * (16 * (12 * 12 * 3 + 12 * 3 * 3) + 16 * 3 * 9)


@pytest.mark.parametrize("objective", ["macs", "latency"])
def test_a_linear_stage_with_skips_is_one_kernel_on_sums(objective: str, compiled: Any) -> None:
    model = nn.Sequential(nn.Sigmoid(), Stage(16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    report = compiled(model, 2, 16, 24, 20, passes="all,-collapse", objective=objective)
    assert report.ops_after.keys() == {"Sigmoid", "linear", "Linear"} and report.ops_after["Linear"] == 1
    assert report.ops_after["linear"] == 2
    kernel = 5 * 16 * 7 * 7
    assert report.macs_after == 2 * (16 * (24 * 20 * 7 + 24 * 7 * 7) + kernel)


class Stage(nn.Module):
    """Convolutions that keep the size, each with a batch norm and a skip around both."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        convs = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(blocks))
        self.blocks = nn.ModuleList(nn.Sequential(conv, nn.BatchNorm2d(width)) for conv in convs)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_collapse_takes_the_rest_where_fewer_layers_are_wanted(compiled: Any) -> None:
    model = nn.Sequential(nn.Sigmoid(), Stage(4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    report = compiled(model, 2, 4, 8, 8, passes="all", objective="depth")
    assert report.ops_after == {"Sigmoid": 1, "Linear": 1}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.AvgPool2d(7, 1, 3)), "does not average over all positions"),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d((1, None))), "does not average over all positions"),
        (nn.Sequential(nn.Conv2d(4, 4, (9, 8)), nn.AdaptiveAvgPool2d(1)), "there is no mean to take"),
        (Averaged(nn.Conv2d(4, 4, 3), lambda x: x.mean((1, 2, 3))), "more than the positions"),
        (Averaged(nn.Conv2d(4, 4, 3), lambda x: x.mean(3)), "leave several positions"),
        (Averaged(nn.Conv2d(4, 4, 3), lambda x: x.mean(2)), "does not average over all positions"),
        (Averaged(nn.Conv2d(4, 4, 3), lambda x: x.mean(3).mean((1, 2))), "more than the positions"),
    ],
)
def test_what_is_no_mean_of_all_positions_is_refused(
    model: nn.Module, reason: str, compiled: Any, reasons: Any
) -> None:
    report = compiled(nn.Sequential(nn.Sigmoid(), model), 2, 4, 9, 8, passes=ALONE, objective="macs")
    assert report.rewrites == [] and reason in reasons(report, "box_mean")


def test_a_free_size_is_refused(reasons: Any) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1)))
    options = Options(passes=ALONE, objective="macs", fixed_size=False)
    report = compile_with(model, example_of(model, torch.randn(2, 4, 8, 8)), options).report
    assert "known at a fixed size only (--passes all)" in reasons(report, "box_mean")


def test_a_kernel_that_is_too_large_is_refused(compiled: Any, reasons: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    monkeypatch.setattr(importlib.import_module("rgc.passes.box_mean"), "LARGEST_KERNEL", 100)
    model = nn.Sequential(nn.Sigmoid(), Stage(4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    report = compiled(model, 2, 4, 12, 12, passes=ALONE, objective="macs")
    assert "the tail would be a kernel of 0 M elements" in reasons(report, "box_mean")


def test_another_size_at_run_time_is_an_error() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.ReLU()))
    compiled = rgc.compile(model, torch.randn(1, 4, 9, 9), passes="box_mean", objective="macs")
    assert compiled(torch.randn(3, 4, 9, 9)).shape == (3, 4, 1, 1)
    with pytest.raises(AssertionError, match="holds for inputs of size 4x9x9"):
        compiled(torch.randn(1, 4, 8, 9))


def test_what_is_saved_is_the_same_in_every_format(tmp_path: Any) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.ReLU()))
    x = torch.randn(2, 4, 9, 8)
    compiled = rgc.compile(model, x, passes="box_mean", objective="macs")
    assert compiled.report.ops_after["linear"] == 2
    for name in ("model.pt2", "model.onnx", "folder/"):
        rgc.save(compiled, str(tmp_path / name) + "/" * name.endswith("/"))
    for name in ("model.pt2", "folder"):
        torch.testing.assert_close(rgc.load(tmp_path / name, trust=True)(x), model(x))


def test_in_half_precision_the_sums_do_not_overflow() -> None:
    """They are means: a sum over 128 x 128 positions would be beyond 65,504."""
    model = randomize(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.ReLU()))
    x = 20 + torch.randn(1, 2, 128, 128)
    compiled = rgc.compile(model, x, passes="box_mean", objective="macs", dtype=torch.float16)
    assert compiled.report.ops_after["linear"] == 2 and compiled(x.half()).isfinite().all()
