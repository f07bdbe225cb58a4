"""Does a positive scale pass max pooling, in both directions, and no other?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

NAME = "exchange_max_pool"
POOLS = [
    nn.MaxPool2d(2),
    nn.MaxPool2d(3, 2, 1),
    nn.MaxPool2d((2, 3), (1, 2), (1, 0), ceil_mode=True),
    nn.MaxPool2d(2, 1, 0, dilation=2),
]


def batch_norm(channels: int = 4, kind: Any = nn.BatchNorm2d, **gamma: float) -> nn.Module:
    """Random statistics and offsets, positive gammas but for those given by channel (``c1=-0.5``)."""
    norm = kind(channels)
    generator = torch.Generator().manual_seed(3)
    for tensor in (norm.running_mean, norm.bias.data):
        tensor.copy_(torch.randn(channels, generator=generator))
    for tensor in (norm.running_var, norm.weight.data):
        tensor.copy_(torch.rand(channels, generator=generator) + 0.2)
    for channel, value in gamma.items():
        norm.weight.data[int(channel[1:])] = value
    return norm  # type: ignore[no-any-return]


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("padding", [0, 1])
def test_a_positive_batch_norm_meets_the_convolution_before(pool: nn.Module, padding: int, compiled: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=padding), pool, batch_norm(), nn.ReLU())
    report = compiled(model, 2, 3, 9, 8, random=False)
    assert report.ops_after == {"Conv2d": 1, "MaxPool2d": 1, "ReLU": 1}


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_a_positive_batch_norm_meets_the_convolution_behind(pool: nn.Module, compiled: Any) -> None:
    model = nn.Sequential(nn.ReLU(), batch_norm(), pool, nn.Conv2d(4, 3, 3))
    assert compiled(model, 2, 4, 9, 8, random=False).ops_after == {"Conv2d": 1, "MaxPool2d": 1, "ReLU": 1}


def test_two_batch_norms_meet_too(compiled: Any) -> None:
    model = nn.Sequential(nn.ReLU(), batch_norm(c2=-1.0), nn.MaxPool2d(2), batch_norm())
    assert compiled(model, 2, 4, 9, 8, random=False).ops_after["addcmul"] == 1


@pytest.mark.parametrize(
    ("conv", "pool", "norm", "shape"),
    [
        (nn.Conv1d(3, 4, 3), nn.MaxPool1d(2), nn.BatchNorm1d, (2, 3, 9)),
        (nn.Conv3d(3, 4, 2), nn.MaxPool3d(2, padding=1), nn.BatchNorm3d, (2, 3, 5, 6, 4)),
        (nn.ConvTranspose2d(3, 4, 3, stride=2), nn.MaxPool2d(2), nn.BatchNorm2d, (2, 3, 4, 5)),
    ],
    ids=str,
)
def test_in_every_number_of_axes(
    conv: nn.Module, pool: nn.Module, norm: Any, shape: tuple[int, ...], compiled: Any
) -> None:
    report = compiled(nn.Sequential(conv, pool, batch_norm(kind=norm)), *shape, random=False)
    assert report.ops_after == {type(conv).__name__: 1, type(pool).__name__: 1}


@pytest.mark.parametrize("gamma", [-0.5, -1e-6, 0.0])
@pytest.mark.parametrize("channel", [0, 1, 3])
def test_one_channel_that_is_not_positive_holds_the_batch_norm_back(
    gamma: float, channel: int, compiled: Any, reasons: Any
) -> None:
    norm = batch_norm(**{f"c{channel}": gamma})
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), norm, nn.ReLU())
    report = compiled(model, 2, 3, 9, 8, random=False)
    assert report.ops_after["BatchNorm2d"] == 1
    assert "commutes with positive factors only, and a channel of batch norm 4 has" in reasons(report, NAME)


def test_a_factor_for_all_channels_passes_and_a_negative_one_does_not(calls: Any, compiled: Any, reasons: Any) -> None:
    pool = nn.MaxPool2d(2)
    for factor, operators in ((0.5, {"Conv2d": 1, "MaxPool2d": 1}), (-0.5, {"Conv2d": 1, "MaxPool2d": 1, "mul": 1})):
        model = calls(lambda x, a, p, factor=factor: p(a(x)) * factor, a=nn.Conv2d(3, 4, 3), p=pool)
        report = compiled(model, 2, 3, 9, 8)
        assert report.ops_after == operators
    assert "a channel of scale has -0.5" in reasons(report, NAME)


def test_a_pooling_over_the_channels_is_no_pooling_of_positions(calls: Any, compiled: Any, reasons: Any) -> None:
    model = calls(
        lambda x, a, p, b: b(p(a(x))), a=nn.Linear(6, 8), p=nn.MaxPool1d(2), b=batch_norm(5, kind=nn.BatchNorm1d)
    )
    report = compiled(model, 2, 5, 6, random=False)
    assert report.ops_after == {"Linear": 1, "MaxPool1d": 1, "BatchNorm1d": 1}
    assert "different axes" in reasons(report, NAME)
    over_channels = calls(lambda x, p: p(x * torch.arange(1.0, 7.0)) * torch.arange(1.0, 4.0), p=nn.MaxPool1d(2))
    report = compiled(over_channels, 2, 5, 6)
    assert "max pool 2 pools over the channels of scale" in reasons(report, NAME)


def test_before_a_padded_convolution_it_becomes_a_pad_value(compiled: Any) -> None:
    model = nn.Sequential(nn.ReLU(), batch_norm(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 3, padding=1))
    free = compiled(model, 2, 4, 9, 8, random=False)
    assert "BatchNorm2d" not in free.ops_after and not free.fixed_size


def test_a_pooling_that_others_read_stays(calls: Any, compiled: Any) -> None:
    def twice(x: Any, a: Any, p: Any, b: Any) -> Any:
        y = p(a(x))
        return b(y) * torch.tanh(y)

    model = calls(twice, a=nn.Conv2d(3, 4, 3), p=nn.MaxPool2d(2), b=batch_norm())
    assert compiled(model, 2, 3, 9, 8, random=False).ops_after["MaxPool2d"] == 1


def test_batch_statistics_do_not_pass(compiled: Any, reasons: Any) -> None:
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    report = compiled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), norm), 2, 3, 9, 8)
    assert "batch statistics" in reasons(report, NAME)
