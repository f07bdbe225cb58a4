"""Does a scale with several linear readers go into all of them, and stay whole where one reader needs it?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

TWO_READERS = {"bn": nn.BatchNorm2d(6), "a": nn.Conv2d(6, 5, 3, bias=False), "b": nn.Conv2d(6, 4, 1, groups=2)}


def _two(x: Tensor, bn: nn.Module, a: nn.Module, b: nn.Module) -> tuple[Tensor, Tensor]:
    y = bn(torch.relu(x))
    return torch.relu(a(y)), torch.sigmoid(b(y))


@pytest.mark.parametrize("passes", ["default", "all"])
def test_two_convolutions_take_the_batch_norm_that_both_read(passes: str, calls: Any, compiled: Any) -> None:
    report = compiled(calls(_two, **TWO_READERS), 2, 6, 7, 8, passes=passes)
    assert report.ops_after["BatchNorm2d"] == 0 and report.ops_after["Conv2d"] == 2
    assert "distribute_scale" in {firing.rewrite for firing in report.rewrites}


def test_one_convolution_may_read_another_value_too(calls: Any, compiled: Any) -> None:
    def shared(x: Tensor, a: nn.Module, bn: nn.Module) -> Tensor:
        y = bn(torch.relu(x))
        return torch.sigmoid(a(y)) * torch.sigmoid(a(y.clone())) * torch.sigmoid(a(torch.tanh(x)))

    report = compiled(calls(shared, a=nn.Conv2d(6, 6, 1), bn=nn.BatchNorm2d(6)), 2, 6, 5, 5)
    assert report.ops_after["BatchNorm2d"] == 0


def test_tokens_of_an_image_reach_their_linear_layers(calls: Any, compiled: Any) -> None:
    """The queries read every token, the keys a pooled one, the shape is asked for on the way."""

    def attention(x: Tensor, bn: nn.Module, k: nn.Module, pool: nn.Module, q: nn.Module) -> tuple[Tensor, Tensor]:
        batch, channels, _, _ = x.shape
        tokens = bn(torch.relu(x)).reshape(batch, channels, -1).transpose(-1, -2)
        count = tokens.shape[1]
        return torch.relu(q(tokens)) / count, torch.relu(k(pool(tokens.transpose(1, 2)).transpose(1, 2)))

    parts = {"bn": nn.BatchNorm2d(6), "k": nn.Linear(6, 4, bias=False), "pool": nn.AvgPool1d(4), "q": nn.Linear(6, 6)}
    report = compiled(calls(attention, **parts), 2, 6, 8, 8)
    assert report.ops_after["BatchNorm2d"] == 0 and report.ops_after["Linear"] == 2


def test_batch_norm_before_a_pooled_head(calls: Any, compiled: Any) -> None:
    head = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    assert compiled(head, 2, 6, 8, 8).ops_after["BatchNorm2d"] == 0


def test_batch_norm_over_tokens_before_two_linear_layers(calls: Any, compiled: Any) -> None:
    def heads(x: Tensor, a: nn.Module, b: nn.Module, bn: nn.Module) -> Tensor:
        y = bn(torch.relu(x)).transpose(1, 2)
        return torch.sigmoid(a(y)) * torch.tanh(b(y))

    report = compiled(calls(heads, a=nn.Linear(6, 3), b=nn.Linear(6, 3), bn=nn.BatchNorm1d(6)), 2, 6, 9)
    assert report.ops_after["BatchNorm1d"] == 0


@pytest.mark.parametrize(
    ("reader", "reason"),
    [
        (lambda y, conv, padded: (conv(y), y + 1 / y), "is not linear"),
        (lambda y, conv, padded: (conv(y), y), "output of the model"),
        (lambda y, conv, padded: (conv(y), padded(y)), "correction of its own"),
        (lambda y, conv, padded: (conv(y), y.flip(1).sigmoid()), "mixes the channels"),
        (lambda y, conv, padded: (conv(y), conv(y.transpose(1, 2).contiguous())), "acts on other axes"),
        (lambda y, conv, padded: (conv(y), y.sum((2, 3)).sigmoid()), "changes a constant"),
        (lambda y, conv, padded: (conv(y), conv(nn.functional.pad(y, (1, 1)))), "correction of its own"),
        (lambda y, conv, padded: (conv(y), nn.functional.pad(y, (1, 1)).sigmoid()), "changes a constant"),
    ],
)
def test_one_reader_that_needs_the_scale_keeps_it(
    reader: Any, reason: str, calls: Any, compiled: Any, reasons: Any
) -> None:
    parts = {"bn": nn.BatchNorm2d(6), "conv": nn.Conv2d(6, 6, 1), "padded": nn.Conv2d(6, 6, 3, padding=1)}
    model = calls(lambda x, bn, conv, padded: reader(bn(torch.relu(x)), conv, padded), **parts)
    report = compiled(model, 2, 6, 6, 6)
    assert report.ops_after["BatchNorm2d"] == 1
    assert reason in reasons(report, "distribute_scale") and "bn" in reasons(report, "distribute_scale")


def test_a_reshape_that_keeps_the_channels_only_at_the_example_size(calls: Any, compiled: Any, reasons: Any) -> None:
    """[N, 6, 8, 8] as samples of 6 x 64 mixes channels with samples for any other image."""
    model = calls(
        lambda x, bn, linear: torch.relu(linear(bn(torch.relu(x)).reshape(-1, 6, 64).transpose(1, 2))),
        bn=nn.BatchNorm2d(6),
        linear=nn.Linear(6, 6),
    )
    report = compiled(model, 2, 6, 8, 8)
    assert report.ops_after["BatchNorm2d"] == 1
    assert "mixes the channels" in reasons(report, "distribute_scale")
    assert compiled(model, 2, 6, 8, 8, passes="all").ops_after["BatchNorm2d"] == 0


def test_batch_statistics_are_no_scale(calls: Any, compiled: Any, reasons: Any) -> None:
    parts = {**TWO_READERS, "bn": nn.BatchNorm2d(6, track_running_stats=False)}
    report = compiled(calls(_two, **parts), 2, 6, 7, 8)
    assert report.ops_after["BatchNorm2d"] == 1 and "batch statistics" in reasons(report, "distribute_scale")


def test_a_single_channel_names_no_axis(calls: Any, compiled: Any, reasons: Any) -> None:
    parts = {"bn": nn.BatchNorm2d(1), "a": nn.Conv2d(1, 2, 1), "b": nn.Conv2d(1, 2, 1)}
    report = compiled(calls(_two, **parts), 2, 1, 7, 8)
    assert report.ops_after["BatchNorm2d"] == 1 and "single factor" in reasons(report, "distribute_scale")


@pytest.mark.parametrize("options", [{"padding": 1}, {"divisor_override": 3}])
def test_pooling_that_changes_a_constant(options: dict[str, Any], calls: Any, compiled: Any, reasons: Any) -> None:
    model = calls(
        lambda x, bn, conv, pool: torch.sigmoid(pool(y := bn(torch.relu(x)))).mean() + torch.relu(conv(y)).mean(),
        bn=nn.BatchNorm2d(6),
        conv=nn.Conv2d(6, 6, 1),
        pool=nn.AvgPool2d(2, **options),
    )
    report = compiled(model, 2, 6, 8, 8)
    assert report.ops_after["BatchNorm2d"] == 1
    assert "changes a constant" in reasons(report, "distribute_scale")


@pytest.mark.parametrize("norm", [False, True])
def test_a_scale_behind_tokens_that_become_an_image_goes_into_the_linear_layer(
    norm: bool, calls: Any, compiled: Any
) -> None:
    """As behind an attention over tokens: [N, L, C] -> [N, C, L] -> [N, C, H, W] * gamma."""

    def mixed(x: Tensor, linear: nn.Module, scale: nn.Module) -> Tensor:
        batch, _, height, width = x.shape
        tokens = torch.relu(x).flatten(2).transpose(1, 2)
        mixed = linear(torch.softmax(tokens, 1))
        image = mixed.transpose(-2, -1).reshape(batch, 6, height, width)
        return x + scale(image)

    scale = nn.BatchNorm2d(6) if norm else LayerScale(6)
    report = compiled(calls(mixed, linear=nn.Linear(6, 6), scale=scale), 2, 6, 5, 4)
    assert set(report.ops_after) == {"ReLU", "transpose", "Linear", "softmax", "add"}
    assert [firing.rewrite for firing in report.rewrites] == ["distribute_scale"] and not report.fixed_size


def test_a_scale_behind_an_image_whose_tokens_others_read_stays(calls: Any, compiled: Any) -> None:
    def mixed(x: Tensor, linear: nn.Module, scale: nn.Module) -> Tensor:
        tokens = linear(torch.relu(x).flatten(2).transpose(1, 2))
        image = tokens.transpose(-2, -1).reshape(x.shape[0], 6, *x.shape[2:])
        return scale(image) + tokens.mean()

    report = compiled(calls(mixed, linear=nn.Linear(6, 6), scale=LayerScale(6)), 2, 6, 5, 4)
    assert report.ops_after["mul"] == 1


def test_a_scale_behind_a_reshape_that_mixes_the_channels_stays(calls: Any, compiled: Any) -> None:
    def mixed(x: Tensor, linear: nn.Module, scale: nn.Module) -> Tensor:
        tokens = linear(torch.relu(x).flatten(2).transpose(1, 2))
        return scale(tokens.reshape(x.shape[0], 6, *x.shape[2:]))

    report = compiled(calls(mixed, linear=nn.Linear(6, 6), scale=LayerScale(6)), 2, 6, 3, 2)
    assert report.ops_after["mul"] == 1


def test_a_number_of_channels_keeps_its_axis_on_the_way_to_the_linear_layers(calls: Any, compiled: Any) -> None:
    def heads(x: Tensor, first: nn.Module, norm: nn.Module, a: nn.Module, b: nn.Module) -> Tensor:
        y = first(x)
        tokens = norm(y).reshape(y.shape[0], 6, -1).transpose(-1, -2)
        return (torch.sigmoid(a(tokens)) * torch.tanh(b(tokens))).sum(1) + y.sum((2, 3))

    parts = {"first": nn.Conv2d(4, 6, 1), "norm": nn.BatchNorm2d(6), "a": nn.Linear(6, 6), "b": nn.Linear(6, 6)}
    report = compiled(calls(heads, **parts), 2, 4, 5, 4)
    assert report.ops_after["BatchNorm2d"] == 0 and report.ops_after["Conv2d"] == 1


class LayerScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(-1, 1, channels).reshape(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma
