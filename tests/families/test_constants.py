"""Do constants around linear layers go into them, however they are written?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

C = torch.linspace(-1.5, 1.5, 8, dtype=torch.float64).view(8, 1, 1)
B = C.view(1, 8, 1, 1)


def in_place_add(x: Tensor) -> Tensor:
    x += C
    return x


def in_place_chain(x: Tensor) -> Tensor:
    x *= 2
    x -= B
    x /= 4
    return x


def in_place_methods(x: Tensor) -> Tensor:
    return x.mul_(C).add_(1).div_(2).neg_().sub_(B)


#: Affine functions of one tensor, as people write them.
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "x + 0.5": lambda x: x + 0.5,
    "0.5 + x": lambda x: 0.5 + x,
    "x + c": lambda x: x + C,
    "c + x": lambda x: B + x,
    "x - c": lambda x: x - C,
    "c - x": lambda x: C - x,
    "1 - x": lambda x: 1 - x,
    "rsub": lambda x: torch.rsub(x, 2.0),
    "rsub with alpha": lambda x: torch.rsub(x, 2.0, alpha=3),
    "x * c": lambda x: x * C,
    "c * x": lambda x: B * x,
    "x / 255": lambda x: x / 255,
    "x / c": lambda x: x / (C + 3),
    "-x": lambda x: -x,
    "neg": lambda x: torch.neg(x),
    "add with alpha": lambda x: torch.add(x, C, alpha=0.5),
    "sub with alpha": lambda x: torch.sub(x, B, alpha=2),
    "addcmul": lambda x: torch.addcmul(x, C, B, value=0.5),
    "lerp": lambda x: torch.lerp(x, C.expand(1, 8, 1, 1), 0.25),
    "expanded": lambda x: x * C.expand_as(x),
    "(x - m) / s * g + b": lambda x: (x - C) / (C + 3) * B + 0.25,
    "in place: +=": in_place_add,
    "in place: *=, -=, /=": in_place_chain,
    "in place: methods": in_place_methods,
    "type_as": lambda x: x * C.type_as(x),
    "to": lambda x: x + C.to(x.dtype),
    "positive": lambda x: +x,
}


#: Copies that change nothing, whatever the dtype of the model is.
COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "detach": lambda x: x.detach(),
    "to its own dtype": lambda x: x.to(x.dtype),
}


class TestConstants:
    @pytest.mark.parametrize("form", list(FORMS))
    def test_a_constant_goes_into_the_convolution_before_it(self, becomes: Any, written: Any, form: str) -> None:
        def forward(x: Tensor, conv: nn.Module) -> Tensor:
            return torch.relu(FORMS[form](conv(x)))

        becomes(written(forward, conv=nn.Conv2d(4, 8, 3, padding=1)), (2, 4, 7, 9), {"Conv2d": 1, "ReLU": 1})

    @pytest.mark.parametrize("form", list(FORMS))
    def test_a_constant_goes_into_the_pointwise_convolution_behind_it(
        self, becomes: Any, written: Any, form: str
    ) -> None:
        def forward(x: Tensor, conv: nn.Module) -> Tensor:
            return torch.relu(conv(FORMS[form](torch.sigmoid(x))))

        model = written(forward, conv=nn.Conv2d(8, 4, 1))
        becomes(model, (2, 8, 7, 9), {"Sigmoid": 1, "Conv2d": 1, "ReLU": 1})

    @pytest.mark.parametrize("copy", list(COPIES))
    def test_a_copy_between_layers_is_not_there(self, becomes: Any, written: Any, copy: str) -> None:
        def forward(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
            y: Tensor = torch.relu(second(COPIES[copy](first(x))))
            return y

        model = written(forward, first=nn.Conv2d(4, 8, 3, padding=1), second=nn.Conv2d(8, 4, 1))
        becomes(model, (2, 4, 7, 9), {"Conv2d": 1, "ReLU": 1})


def sum_of_list(ys: list[Tensor]) -> Tensor:
    return sum(ys)  # type: ignore[return-value]  # of tensors


#: Sums of parallel branches, as people write them.
SUMS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "sum of a list": sum_of_list,
    "stack, sum": lambda ys: torch.stack(ys).sum(0),
    "stack on the last axis, sum": lambda ys: torch.stack(ys, dim=-1).sum(-1),
    "stack, mean": lambda ys: torch.stack(ys, 0).mean(0),
    "stack, mean by keyword": lambda ys: torch.stack(ys, dim=1).mean(dim=1),
    "stack, weighted sum": lambda ys: (torch.stack(ys) * torch.tensor([1.0, 2.0, -1.0]).view(3, 1, 1, 1, 1)).sum(0),
    "average of three": lambda ys: (ys[0] + ys[1] + ys[2]) / 3,
    "differences": lambda ys: ys[0] - (ys[1] - ys[2]),
    "weighted": lambda ys: 0.5 * ys[0] - ys[1] * 2 + ys[2].neg(),
    "add with alpha": lambda ys: torch.add(torch.sub(ys[0], ys[1], alpha=2), ys[2], alpha=0.5),
    "lerp": lambda ys: torch.lerp(ys[0], ys[1], 0.25) + ys[2],
}


def in_place_sum(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module) -> Tensor:
    y: Tensor = a(x)
    y += b(x)
    y *= 0.5
    y -= c(x)
    y.add_(x)
    return torch.relu(y)


class TestSums:
    @pytest.mark.parametrize("form", list(SUMS))
    def test_parallel_branches_become_one_convolution(self, becomes: Any, written: Any, form: str) -> None:
        def forward(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module) -> Tensor:
            return torch.relu(SUMS[form]([a(x), b(x), c(x)]))

        convs = {name: nn.Conv2d(4, 8, k, padding=k // 2) for name, k in zip("abc", (1, 3, 5), strict=True)}
        becomes(written(forward, **convs), (2, 4, 7, 9), {"Conv2d": 1, "ReLU": 1})

    def test_branches_added_in_place_become_one_convolution(self, becomes: Any, written: Any) -> None:
        convs = {name: nn.Conv2d(4, 4, k, padding=k // 2) for name, k in zip("abc", (1, 3, 5), strict=True)}
        becomes(written(in_place_sum, **convs), (2, 4, 7, 9), {"Conv2d": 1, "ReLU": 1})

    @pytest.mark.parametrize("factor", [1.0, -1.0, 0.5], ids=str)
    def test_a_scaled_skip_connection_goes_in(self, becomes: Any, written: Any, factor: float) -> None:
        def forward(x: Tensor, conv: nn.Module) -> Tensor:
            return torch.relu(conv(x) + factor * x)

        becomes(written(forward, conv=nn.Conv2d(8, 8, 3, padding=1)), (2, 8, 7, 9), {"Conv2d": 1, "ReLU": 1})

    def test_nested_residuals_become_one_convolution(self, becomes: Any, written: Any) -> None:
        def forward(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
            y = x + a(x)
            return torch.relu(x - C * (y + b(y)))

        convs = {"a": nn.Conv2d(8, 8, 3, padding=1), "b": nn.Conv2d(8, 8, 1)}
        becomes(written(forward, **convs), (2, 8, 7, 9), {"Conv2d": 1, "ReLU": 1})

    def test_opposite_terms_cancel(self, becomes: Any, written: Any) -> None:
        def forward(x: Tensor, conv: nn.Module) -> Tensor:
            return torch.relu(conv(x) + x - x)

        becomes(written(forward, conv=nn.Conv2d(8, 8, 1)), (2, 8, 7, 9), {"Conv2d": 1, "ReLU": 1})


class TestMeanSubtraction:
    def test_subtracting_the_mean_over_channels_goes_into_the_convolution_behind_it(
        self, becomes: Any, written: Any
    ) -> None:
        """x - mean(x) over channels is the matrix I - 1/C."""

        def forward(x: Tensor, conv: nn.Module) -> Tensor:
            return torch.relu(conv(x - x.mean(1, keepdim=True)))

        becomes(written(forward, conv=nn.Conv2d(8, 6, 1)), (2, 8, 7, 9), {"Conv2d": 1, "ReLU": 1})

    def test_subtracting_the_mean_over_channels_goes_into_the_convolution_before_it(
        self, becomes: Any, written: Any
    ) -> None:
        def forward(x: Tensor, conv: nn.Module) -> Tensor:
            y = conv(x)
            return torch.relu(y - y.mean(dim=1, keepdim=True))

        becomes(written(forward, conv=nn.Conv2d(4, 8, 3, padding=1)), (2, 4, 7, 9), {"Conv2d": 1, "ReLU": 1})

    def test_subtracting_the_mean_over_features_goes_into_the_linear_layer(self, becomes: Any, written: Any) -> None:
        def forward(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
            y = first(x)
            z: Tensor = torch.relu(second(y - y.mean(-1, keepdim=True)))
            return z

        model = written(forward, first=nn.Linear(8, 6), second=nn.Linear(6, 4))
        becomes(model, (2, 5, 8), {"Linear": 1, "ReLU": 1})

    @pytest.mark.parametrize("keepdim", [True, False])
    def test_a_mean_over_channels_is_a_pointwise_convolution_to_one_channel(
        self, becomes: Any, written: Any, keepdim: bool
    ) -> None:
        def forward(x: Tensor, conv: nn.Module) -> Tensor:
            return torch.sigmoid(conv(x).mean(1, keepdim=keepdim))

        model = written(forward, conv=nn.Conv2d(4, 8, 3, padding=1))
        view = {} if keepdim else {"squeeze": 1}
        becomes(model, (2, 4, 7, 9), {"Conv2d": 1, "Sigmoid": 1, **view})
