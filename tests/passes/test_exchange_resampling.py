"""Do maps of the channels pass linear resamplings, and only those that keep what the map adds?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

NAME = "exchange_resampling"


def pointwise(reads: int = 4, makes: int = 4, **options: Any) -> nn.Module:
    return nn.Conv2d(reads, makes, 1, **options)


KEEPING = [
    nn.Upsample(scale_factor=2),
    nn.Upsample(scale_factor=(1.5, 3.0), mode="bilinear"),
    nn.Upsample(size=(12, 7), mode="bilinear", align_corners=True),
    nn.Upsample(scale_factor=2, mode="bicubic"),
    nn.Upsample(scale_factor=1.7, mode="nearest-exact"),
    nn.UpsamplingNearest2d(scale_factor=3),
    nn.UpsamplingBilinear2d(size=(9, 9)),
    nn.AvgPool2d(2),
    nn.AvgPool2d(3, 1, ceil_mode=True),
    nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    nn.AdaptiveAvgPool2d((2, 3)),
    nn.AdaptiveAvgPool2d(1),
]


@pytest.mark.parametrize("resampling", KEEPING, ids=str)
def test_two_pointwise_layers_around_a_resampling_are_one(resampling: nn.Module, compiled: Any) -> None:
    model = nn.Sequential(pointwise(4, 8), resampling, pointwise(8, 3), nn.ReLU())
    report = compiled(model, 2, 4, 9, 8)
    assert report.ops_after["Conv2d"] == 1 and report.ops_after.total() <= 3


@pytest.mark.parametrize("resampling", KEEPING, ids=str)
def test_a_batch_norm_passes_to_the_convolution_on_the_other_side(resampling: nn.Module, compiled: Any) -> None:
    behind = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, stride=2), resampling, nn.BatchNorm2d(8), nn.ReLU())
    assert "BatchNorm2d" not in compiled(behind, 2, 4, 9, 8).ops_after
    before = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), resampling, nn.Conv2d(4, 8, 1, stride=2), nn.ReLU())
    assert "BatchNorm2d" not in compiled(before, 2, 4, 9, 8).ops_after


@pytest.mark.parametrize(
    "pool", [nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(2, divisor_override=3), nn.AvgPool2d(3, 1, 1)], ids=str
)
def test_what_does_not_keep_constants_lets_only_a_map_without_bias_pass(
    pool: nn.Module, compiled: Any, reasons: Any
) -> None:
    free = compiled(nn.Sequential(pointwise(4, 8, bias=False), pool, pointwise(8, 3, bias=True), nn.ReLU()), 2, 4, 9, 8)
    assert free.ops_after["Conv2d"] == 1
    held = compiled(nn.Sequential(pointwise(4, 8), pool, pointwise(8, 3), nn.ReLU()), 2, 4, 9, 8, passes=NAME)
    assert held.ops_after["Conv2d"] == 2
    assert "so the bias of conv 1x1 4->8 does not pass it" in reasons(held, NAME)


@pytest.mark.parametrize(
    "interpolate",
    [
        lambda x: F.interpolate(x, scale_factor=2.0),
        lambda x: F.interpolate(x, size=(11, 13), mode="bilinear", align_corners=True),
        lambda x: F.interpolate(x, size=11, mode="area"),
        lambda x: torch.flip(x, (2, 3)),
        lambda x: x.flip(-1),
        lambda x: x.flip(2, 3),
        lambda x: x.mean((-1, -2), keepdim=True),
        lambda x: x.mean(dim=3, keepdim=True),
        lambda x: F.adaptive_avg_pool2d(x, (1, 2)),
        lambda x: F.avg_pool2d(F.interpolate(x, scale_factor=2.0), 3, 1),
    ],
)
def test_resamplings_may_be_functions(interpolate: Any, calls: Any, compiled: Any) -> None:
    model = calls(lambda x, a, b: torch.relu(b(interpolate(a(x)))), a=pointwise(4, 8), b=pointwise(8, 3))
    assert compiled(model, 2, 4, 9, 8).ops_after["Conv2d"] == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear", antialias=True),
        lambda x: F.interpolate(x, size=x.shape[2]),
        lambda x: x.mean((1, 2), keepdim=True).expand(-1, 8, -1, -1),
        lambda x: F.adaptive_max_pool2d(x, 2),
        lambda x: F.max_pool2d(x, 2),
    ],
)
def test_other_calls_keep_the_layers_apart(other: Any, calls: Any, compiled: Any) -> None:
    model = calls(lambda x, a, b: torch.relu(b(other(a(x)))), a=pointwise(4, 8), b=pointwise(8, 3))
    assert compiled(model, 2, 4, 8, 8).ops_after["Conv2d"] == 2


@pytest.mark.parametrize(
    ("conv", "upsample", "shape"),
    [
        (nn.Conv1d, nn.Upsample(scale_factor=2, mode="linear"), (2, 4, 7)),
        (nn.Conv3d, nn.Upsample(scale_factor=2, mode="trilinear"), (2, 4, 3, 4, 2)),
    ],
)
def test_in_other_numbers_of_axes(conv: Any, upsample: nn.Module, shape: tuple[int, ...], compiled: Any) -> None:
    report = compiled(nn.Sequential(conv(4, 8, 1), upsample, conv(8, 3, 1), nn.ReLU()), *shape)
    assert report.ops_after == {conv.__name__: 1, "Upsample": 1, "ReLU": 1}


# --- heads -----------------------------------------------------------------------------------------------------------

HEADS = [
    lambda x: torch.flatten(F.adaptive_avg_pool2d(x, 1), 1),
    lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    lambda x: x.mean((2, 3)),
    lambda x: x.mean([-2, -1]),
    lambda x: (lambda y: y.view(y.size(0), -1))(F.adaptive_avg_pool2d(x, 1)),
    lambda x: x.mean((2, 3), keepdim=True).flatten(1),
]


@pytest.mark.parametrize("pool", HEADS)
def test_a_pointwise_layer_before_the_global_mean_meets_the_linear_layer(pool: Any, calls: Any, compiled: Any) -> None:
    model = calls(lambda x, a, b: b(pool(a(torch.relu(x)))), a=pointwise(4, 16), b=nn.Linear(16, 5))
    report = compiled(model, 2, 4, 9, 8, objective="latency")
    assert report.ops_after["Conv2d"] == 0 and report.ops_after["Linear"] == 1


@pytest.mark.parametrize("pool", HEADS)
def test_a_linear_layer_meets_the_convolution_before_the_global_mean(pool: Any, calls: Any, compiled: Any) -> None:
    model = calls(lambda x, a, b: b(pool(a(torch.relu(x)))), a=nn.Conv2d(4, 64, 3, padding=1), b=nn.Linear(64, 2))
    report = compiled(model, 2, 4, 9, 8)
    assert report.ops_after["Conv2d"] == 1 and report.ops_after["Linear"] == 0


@pytest.mark.parametrize("pool", HEADS)
def test_a_batch_norm_of_vectors_passes_the_global_mean(pool: Any, calls: Any, compiled: Any) -> None:
    model = calls(lambda x, a, b: b(pool(a(torch.relu(x)))), a=nn.Conv2d(4, 6, 3), b=nn.BatchNorm1d(6))
    assert "BatchNorm1d" not in compiled(model, 2, 4, 9, 8).ops_after


@pytest.mark.parametrize(
    ("flatten", "reads", "reason"),
    [
        (lambda x: torch.flatten(x, 1), 288, "flattens several positions"),
        (lambda x: torch.flatten(x, 2), 72, "flattens other axes than those behind the channels"),
        (lambda x: torch.flatten(x[:, :, :1, :1], 0), 8, "flattens other axes"),
    ],
)
def test_a_flattening_of_other_axes_is_refused(
    flatten: Any, reads: int, reason: str, calls: Any, compiled: Any, reasons: Any
) -> None:
    model = calls(lambda x, a, b: b(flatten(a(x))), a=pointwise(4, 4), b=nn.Linear(reads, 3))
    report = compiled(model, 2, 4, 9, 8) if reads != 8 else compiled(model, 2, 4, 1, 1)
    assert report.ops_after["Linear"] == 1
    assert reads == 8 or reason in reasons(report, NAME)


def test_one_factor_for_all_takes_any_number_of_positions(calls: Any, compiled: Any, reasons: Any) -> None:
    model = calls(lambda x, a: torch.flatten(a(x), 1) * 0.5, a=nn.Conv2d(4, 4, 3))
    report = compiled(model, 2, 4, 3, 3, passes=NAME)
    assert "scale takes any number of positions" in reasons(report, NAME)


def test_layers_on_other_axes_stay_apart(calls: Any, compiled: Any, reasons: Any) -> None:
    model = calls(lambda x, a, p, b: b(p(a(x))), a=nn.Conv2d(4, 4, 3), p=nn.AvgPool2d(2), b=nn.Linear(3, 3))
    report = compiled(model, 2, 4, 9, 8, passes=NAME)
    assert report.ops_after["Linear"] == 1 and "act on different axes" in reasons(report, NAME)


def test_a_mean_of_tokens_is_no_mean_of_positions(calls: Any, compiled: Any, reasons: Any) -> None:
    model = calls(lambda x, a, b: b(a(x).mean(1)), a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    report = compiled(model, 2, 7, 4, passes=NAME)
    assert report.ops_after["Linear"] == 2 and "acts on more than the positions" in reasons(report, NAME)
    assert compiled(model, 2, 7, 4).ops_after == {"mean": 1, "Linear": 1}  # it is a view of the channels


# --- the side with fewer positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["latency", "macs", "depth"])
def test_a_pointwise_layer_moves_to_the_side_with_fewer_positions_and_stays(objective: str, compiled: Any) -> None:
    for resampling in (nn.Upsample(scale_factor=2), nn.AvgPool2d(2)):
        for layers in ((pointwise(8, 8), resampling), (resampling, pointwise(8, 8))):
            model = nn.Sequential(nn.ReLU(), *layers, nn.ReLU())
            report = compiled(model, 2, 8, 16, 16, objective=objective)
            fewer = 2 * 8 * 8 * (8 * 8 if isinstance(resampling, nn.AvgPool2d) else 16 * 16)
            if report.ops_after.total() == 4:  # at such a width a 1x1 and a pooling are cheaper as one 2x2 of stride 2
                assert report.macs_after == fewer
            else:
                assert objective != "macs" and report.ops_after == {"ReLU": 2, "Conv2d": 1}


def test_a_resampling_that_saves_nothing_is_left_where_it_is(calls: Any, compiled: Any, reasons: Any) -> None:
    model = calls(lambda x, a: torch.relu(a(F.interpolate(torch.relu(x), scale_factor=0.5))), a=pointwise())
    report = compiled(model, 2, 4, 8, 8)
    assert "makes no more positions than it reads" in reasons(report, NAME)
    model = calls(lambda x, a: torch.relu(a(torch.relu(x)).flip(3)), a=pointwise())
    report = compiled(model, 2, 4, 8, 8)
    assert "leaves no fewer positions than it reads" in reasons(report, NAME)


def test_strided_padded_and_transposed_pointwise_layers_do_not_move(compiled: Any) -> None:
    for layer in (pointwise(stride=2), pointwise(padding=1), nn.ConvTranspose2d(4, 4, 1)):
        report = compiled(nn.Sequential(nn.ReLU(), layer, nn.AvgPool2d(2), nn.ReLU()), 2, 4, 8, 8, passes=NAME)
        assert report.rewrites == []


def test_a_shared_layer_may_move_from_one_of_its_places(calls: Any, compiled: Any) -> None:
    up, layer = nn.Upsample(scale_factor=2), pointwise()
    model = calls(lambda x, a, up: torch.relu(a(torch.relu(a(up(torch.relu(x)))))), a=layer, up=up)
    report = compiled(model, 2, 4, 8, 8)
    assert [firing.rewrite for firing in report.rewrites] == [NAME]


def test_compiling_twice_changes_nothing_the_second_time(compiled: Any) -> None:
    import copy

    import rgc

    model = nn.Sequential(
        nn.ReLU(), nn.Conv2d(4, 8, 1), nn.AvgPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.Upsample(scale_factor=2),
        nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    ).eval()  # fmt: skip
    x = torch.randn(2, 4, 8, 8)
    once = rgc.compile(model, x, objective="depth")
    assert once.report.rewrites
    assert rgc.compile(copy.deepcopy(once), x, objective="depth").report.rewrites == []


def test_a_pooling_that_fits_only_behind_the_layer_stays_there(calls: Any, compiled: Any) -> None:
    model = calls(lambda x, linear, pool: pool(linear(x)), linear=nn.Linear(1, 4), pool=nn.AvgPool2d(2))
    report = compiled(model, 2, 3, 4, 1, objective="params")
    assert not report.failures and report.ops_after == {"Linear": 1, "AvgPool2d": 1}
