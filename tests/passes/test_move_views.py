"""Do linear operators find each other across views, on either side of them, and views that are undone go?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rgc
from rgc.testing import randomize

PASSES = ["move_views", "fold_scale", "fold_batchnorm", "merge_pointwise", "drop_identity"]


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(("call", "parts", "shape", "left"), [
    (lambda x, a, b: b(tokens(a(x))), (nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 5)), (2, 3, 9, 8), {"Conv2d": 1}),
    (lambda x, a, b: b(tokens(a(x))), (nn.Conv2d(6, 8, 1), nn.Linear(8, 5)), (2, 6, 5, 4), {"Linear": 1}),
    (lambda x, a, b: b(a(x).transpose(1, 2)), (nn.Conv1d(6, 4, 3), nn.Linear(4, 5)), (2, 6, 9), {"Conv1d": 1}),
    (lambda x, a, b: b(a(x).mean((2, 3))), (nn.Conv2d(6, 8, 1), nn.Linear(8, 5)), (2, 6, 5, 4), {"Linear": 1}),
    (lambda x, a, b: b(a(x).mean(1)), (nn.Linear(6, 8), nn.Linear(8, 5)), (2, 7, 6), {"Linear": 1}),
    (lambda x, a, b: b(a(x)[:, 0]), (nn.Linear(6, 8), nn.Linear(8, 5)), (2, 7, 6), {"Linear": 1}),
    (lambda x, a, b: b(a(x).permute(0, 3, 1, 2)), (nn.Linear(6, 4), nn.Conv2d(4, 5, 3)), (2, 9, 8, 6), {"Conv2d": 1}),
    (lambda x, a, b: b(a(x).permute(0, 2, 3, 1)), (nn.Conv2d(6, 4, 3), nn.Linear(4, 5)), (2, 6, 9, 8), {"Conv2d": 1}),
    (lambda x, a, b: b(a(x).mean(2, keepdim=True)), (nn.Conv1d(6, 8, 1), nn.Conv1d(8, 5, 1)), (2, 6, 9), {"Conv1d": 1}),
    (lambda x, a, b: b(2 * a(x).flatten(2)), (nn.Conv2d(6, 4, 3), nn.Conv1d(4, 5, 1)), (2, 6, 9, 8), {"Conv2d": 1}),
])  # fmt: skip
@pytest.mark.parametrize("objective", ["depth", "latency"])
def test_two_operators_with_a_view_between_are_one(
    calls: Any, compiled: Any, call: Any, parts: Any, shape: Any, left: Any, objective: str
) -> None:
    model = calls(lambda x, a, b: torch.sigmoid(call(x, a, b)), a=parts[0], b=parts[1])
    report = compiled(model, *shape, passes=PASSES, objective=objective)
    views = {"mean", "transpose", "permute", "getitem"}
    assert {name: count for name, count in report.ops_after.items() if name not in views} == {**left, "Sigmoid": 1}


@pytest.mark.parametrize("call", [
    lambda x, linear, bn: bn(linear(x).transpose(1, 2)).transpose(1, 2),
    lambda x, linear, bn: (lambda y: bn(y.flatten(0, 1)).reshape_as(y))(linear(x)),
    lambda x, linear, bn: (lambda y: bn(y.reshape(-1, 4)).view_as(y))(linear(x)),
    lambda x, linear, bn: bn(linear(x).permute(0, 2, 1)).permute(0, 2, 1),
])  # fmt: skip
def test_a_batch_norm_of_tokens_goes_into_the_linear_layer_before(calls: Any, compiled: Any, call: Any) -> None:
    model = calls(lambda x, bn, linear: torch.relu(call(x, linear, bn)), linear=nn.Linear(6, 4), bn=nn.BatchNorm1d(4))
    report = compiled(model, 2, 7, 6, passes=PASSES)
    assert report.ops_after == {"Linear": 1, "ReLU": 1}


def test_a_batch_norm_of_tokens_goes_into_the_linear_layer_behind(calls: Any, compiled: Any) -> None:
    def call(x: Tensor, bn: nn.Module, linear: nn.Module) -> Tensor:
        x = torch.relu(x)
        return torch.relu(linear(bn(x.flatten(0, 1)).reshape_as(x)))

    report = compiled(calls(call, bn=nn.BatchNorm1d(6), linear=nn.Linear(6, 4)), 2, 7, 6, passes=PASSES)
    assert report.ops_after == {"Linear": 1, "ReLU": 2}


def test_channels_last_layers_between_convolutions_become_convolutions(calls: Any, compiled: Any) -> None:
    def call(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module) -> Tensor:
        y = b(a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return torch.relu(c(y))

    parts = {"a": nn.Conv2d(3, 8, 3, padding=1), "b": nn.Linear(8, 8), "c": nn.Conv2d(8, 4, 1)}
    report = compiled(calls(call, **parts), 2, 3, 9, 8, passes=PASSES)
    assert report.ops_after == {"Conv2d": 1, "ReLU": 1}


def test_the_weights_of_a_channels_last_norm_go_into_the_convolution_behind(calls: Any, compiled: Any) -> None:
    def call(x: Tensor, conv: nn.Module, norm: nn.Module) -> Tensor:
        return torch.relu(conv(norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))

    norm = nn.LayerNorm(6)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, 6))
    report = compiled(calls(call, norm=norm, conv=nn.Conv2d(6, 4, 2, 2)), 2, 6, 8, 8, passes=PASSES)
    assert {each.rewrite for each in report.rewrites} == {"move_views"}
    padded = calls(call, norm=norm, conv=nn.Conv2d(6, 4, 3, padding=1))
    report = compiled(padded, 2, 6, 8, 8, passes=PASSES)
    assert report.rewrites == [] and report.ops_after["LayerNorm"] == 1


def test_a_value_that_others_read_before_the_view_is_not_computed_twice(calls: Any, compiled: Any) -> None:
    def call(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
        y = a(x)
        return torch.relu(b(y.transpose(1, 2))) + torch.relu(y).transpose(1, 2)

    report = compiled(calls(call, a=nn.Conv1d(6, 6, 1), b=nn.Linear(6, 6)), 2, 6, 9, passes=PASSES)
    assert report.ops_after["Conv1d"] == report.ops_after["Linear"] == 1


def test_a_batch_norm_over_the_batch_stays_where_it_is(calls: Any, compiled: Any, reasons: Any) -> None:
    def call(x: Tensor, bn: nn.Module, linear: nn.Module) -> Tensor:
        y: Tensor = linear(x)
        return torch.relu(bn(y.transpose(0, 1)).transpose(0, 1))

    report = compiled(calls(call, linear=nn.Linear(6, 4), bn=nn.BatchNorm1d(4)), 4, 4, 6, passes=PASSES)
    assert report.ops_after["Linear"] == 1 and report.ops_after["BatchNorm1d"] == 1
    assert "makes channels of the batch" in reasons(report, "move_views")


def test_a_view_as_the_shape_of_another_value_is_kept(calls: Any, compiled: Any) -> None:
    def call(x: Tensor, bn: nn.Module, linear: nn.Module) -> Tensor:
        y: Tensor = linear(x)
        return torch.relu(bn(y.flatten(0, 1)).reshape_as(torch.relu(x)[..., :4]))

    report = compiled(calls(call, linear=nn.Linear(6, 4), bn=nn.BatchNorm1d(4)), 2, 7, 6, passes=PASSES)
    assert report.ops_after["reshape_as"] == 1 and report.ops_after["Linear"] == 1


def test_what_holds_at_one_size_of_the_view_is_not_relied_on_at_others() -> None:
    """Where H W = 1 the reshape keeps the channels last; at other sizes it mixes them with the positions."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 4, 1), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.linear(self.conv(x).reshape(-1, 1, 4)))

    model = randomize(Mixed())
    compiled = rgc.compile(model, torch.randn(2, 3, 1, 1), objective="depth")
    for size in ((1, 1), (2, 2), (3, 5)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(compiled(x), model(x).detach())
