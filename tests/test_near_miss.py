"""Is it told where a pattern comes closest to matching, and what is in its way?"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from rgc import Activation, BatchNorm, Conv, Rewrite, Value, rewrite
from rgc.compiler import trace
from rgc.near_miss import near_miss


def said(pass_: Rewrite, model: nn.Module) -> str:
    return near_miss(pass_, trace(model.eval(), torch.randn(2, 3, 6, 6)).graph)


def fold(x: Value, conv: Conv, bn: BatchNorm) -> Value:
    return x


FOLD = rewrite(lambda x, conv, bn: bn(conv(x)))(fold)


def test_an_operator_of_another_class_is_named_with_its_place() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.BatchNorm2d(3))
    assert said(FOLD, model) == "before 2 (batch norm 3), the pattern has conv: Conv, where the model has relu"


def test_where_nothing_fits_the_model_is_shown() -> None:
    assert "nothing in the traced model is like its pattern; the model is relu, tanh" in said(
        FOLD, nn.Sequential(nn.ReLU(), nn.Tanh())
    )


def test_a_predicate_that_does_not_hold_is_named() -> None:
    def is_wide(conv: Conv) -> bool:
        return conv.out_channels > 10

    def narrow(x: Value, conv: Annotated[Conv, is_wide], bn: BatchNorm) -> Value:
        return x

    narrow.__annotations__["conv"] = Annotated[Conv, is_wide]
    pass_ = rewrite(lambda x, conv, bn: bn(conv(x)))(narrow)
    assert "is_wide does not hold for conv 3x3 3->3" in said(
        pass_, nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    )


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y + torch.relu(x)


def test_a_sum_is_looked_at_in_both_orders_and_a_name_that_occurs_twice_is_told() -> None:
    def residual(x: Value, conv: Conv) -> Value:
        return x

    def gated(x: Value, conv: Conv, act: Activation, bn: BatchNorm) -> Value:
        return x

    assert "a name that occurs twice" in said(rewrite(lambda x, conv: x + conv(x))(residual), Sum())
    pattern = rewrite(lambda x, conv, act, bn: bn(act(x)) + conv(x))(gated)
    assert "the pattern has bn: BatchNorm, where the model has relu" in said(pattern, Sum())
    difference = rewrite(lambda x, conv: conv(x) - conv(x))(residual)
    assert "nothing in the traced model is like its pattern" in said(difference, Sum())
