"""Are equal operators on equal inputs computed once, and different ones not?"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def test_a_convolution_called_twice_on_one_value_is_called_once(calls: Any, compiled: Any) -> None:
    model = calls(lambda x, conv: torch.relu(conv(x)) * torch.tanh(conv(x)), conv=nn.Conv2d(3, 4, 3))
    report = compiled(model, 2, 3, 8, 8)
    assert report.ops_after["Conv2d"] == 1
    assert report.rewrites[0].rewrite == "hygiene" and report.rewrites[0].where == "model"


def test_equal_activations_and_views_are_one(calls: Any, compiled: Any) -> None:
    model = calls(lambda x: torch.relu(x).flatten(1) * torch.relu(x).flatten(1))
    assert (
        compiled(model, 2, 3, 4).ops_after == {"ReLU": 1, "mul": 1} or compiled(model, 2, 3, 4).ops_after["ReLU"] == 1
    )


def test_weights_of_their_own_make_two_operators(calls: Any, compiled: Any) -> None:
    model = calls(lambda x, a, b: torch.relu(a(x)) * torch.tanh(b(x)), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 4, 3))
    report = compiled(model, 2, 3, 8, 8)
    assert report.ops_after["Conv2d"] == 2 and report.rewrites == []


def test_options_make_two_operators(calls: Any, compiled: Any) -> None:
    model = calls(lambda x, a, b: a(x) * b(x), a=nn.LeakyReLU(0.1), b=nn.LeakyReLU(0.2))
    assert compiled(model, 2, 3, 8, 8).ops_after["LeakyReLU"] == 2


def test_views_of_other_shapes_are_two(calls: Any, compiled: Any) -> None:
    model = calls(lambda x: torch.relu(x).flatten(1).sum() + torch.relu(x).flatten(2).mean())
    assert compiled(model, 2, 3, 4, 4).ops_after["ReLU"] == 1
