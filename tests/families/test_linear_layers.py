"""Do linear layers join their neighbours in every form in which they are written?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5


W, b = drawn(8, 8), drawn(8)

#: y = W x + b or y = W^T x, as people write it, over the last axis.
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "x @ W + b": lambda x: x @ W + b,
    "x @ W.t()": lambda x: x @ W.t(),
    "matmul(x, W.t())": lambda x: torch.matmul(x, W.t()),
    "x.matmul(W)": lambda x: x.matmul(W),
    "F.linear": lambda x: F.linear(x, W, b),
    "F.linear without bias": lambda x: F.linear(x, W),
    "einsum bnc,dc->bnd": lambda x: torch.einsum("...c,dc->...d", x, W),
    "W.T in einsum": lambda x: torch.einsum("...c,cd->...d", x, W),
    "tensordot": lambda x: torch.tensordot(x, W, dims=1),
}

#: Only for a matrix [N, C].
MATRIX_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "mm": lambda x: torch.mm(x, W),
    "addmm": lambda x: torch.addmm(b, x, W),
    "addmm with factors": lambda x: torch.addmm(b, x, W, beta=0.5, alpha=2.0),
    "einsum nc,dc->nd": lambda x: torch.einsum("nc,dc->nd", x, W),
    "transposed product": lambda x: (W @ x.t()).t(),
}

#: Only for tokens [B, N, C].
TOKEN_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "einsum bnc,dc->bnd": lambda x: torch.einsum("bnc,dc->bnd", x, W),
    "einsum with spaces": lambda x: torch.einsum("b n c, d c -> b n d", x, W),
    "einsum without an arrow": lambda x: torch.einsum("bnx,xz", x, W),
}


class TestForms:
    @pytest.mark.parametrize("form", list(FORMS))
    @pytest.mark.parametrize("shape", [(4, 8), (2, 5, 8)], ids=str)
    def test_a_product_joins_the_linear_layers_around_it(
        self, becomes: Any, written: Any, form: str, shape: tuple[int, ...]
    ) -> None:
        def chain(x: Tensor, first: nn.Module, last: nn.Module) -> Tensor:
            y: Tensor = torch.tanh(last(FORMS[form](first(x))))
            return y

        model = written(chain, first=nn.Linear(8, 8), last=nn.Linear(8, 4))
        becomes(model, shape, {"Linear": 1, "Tanh": 1})

    @pytest.mark.parametrize("form", list(MATRIX_FORMS))
    def test_a_product_of_matrices_joins_the_linear_layers_around_it(
        self, becomes: Any, written: Any, form: str
    ) -> None:
        def chain(x: Tensor, first: nn.Module, last: nn.Module) -> Tensor:
            y: Tensor = torch.tanh(last(MATRIX_FORMS[form](first(x))))
            return y

        becomes(written(chain, first=nn.Linear(8, 8), last=nn.Linear(8, 4)), (4, 8), {"Linear": 1, "Tanh": 1})

    @pytest.mark.parametrize("form", list(TOKEN_FORMS))
    def test_a_product_over_tokens_joins_the_linear_layers_around_it(
        self, becomes: Any, written: Any, form: str
    ) -> None:
        def chain(x: Tensor, first: nn.Module, last: nn.Module) -> Tensor:
            y: Tensor = torch.tanh(last(TOKEN_FORMS[form](first(x))))
            return y

        becomes(written(chain, first=nn.Linear(8, 8), last=nn.Linear(8, 4)), (2, 5, 8), {"Linear": 1, "Tanh": 1})

    @pytest.mark.parametrize("form", list(FORMS))
    def test_a_product_takes_the_scale_and_the_batch_norm_around_it(
        self, becomes: Any, written: Any, form: str
    ) -> None:
        def chain(x: Tensor, bn: nn.Module) -> Tensor:
            return torch.tanh(bn(FORMS[form]((x - 0.5) / 0.25)) * b + 1)

        becomes(written(chain, bn=nn.BatchNorm1d(8)), (4, 8), {"Linear": 1, "Tanh": 1})

    @pytest.mark.parametrize("form", list(FORMS))
    def test_products_of_one_input_are_added(self, becomes: Any, written: Any, form: str) -> None:
        def chain(x: Tensor, beside: nn.Module) -> Tensor:
            return torch.tanh(FORMS[form](x) + beside(x) + x)

        becomes(written(chain, beside=nn.Linear(8, 8)), (2, 5, 8), {"Linear": 1, "Tanh": 1})


class TestChannelsFirst:
    def test_an_einsum_over_channels_joins_the_convolutions_around_it(self, becomes: Any, written: Any) -> None:
        def chain(x: Tensor, first: nn.Module, last: nn.Module) -> Tensor:
            y: Tensor = torch.tanh(last(torch.einsum("nchw,oc->nohw", first(x), W)))
            return y

        model = written(chain, first=nn.Conv2d(4, 8, 3, padding=1), last=nn.Conv2d(8, 4, 1))
        becomes(model, (2, 4, 7, 9), {"Conv2d": 1, "Tanh": 1})

    def test_an_einsum_of_a_number_per_channel_is_a_scale(self, becomes: Any, written: Any) -> None:
        def chain(x: Tensor, conv: nn.Module) -> Tensor:
            return torch.tanh(torch.einsum("bchw,c->bchw", conv(x), b))

        becomes(written(chain, conv=nn.Conv2d(4, 8, 3, padding=1)), (2, 4, 7, 9), {"Conv2d": 1, "Tanh": 1})

    def test_a_linear_layer_between_permutations_is_a_pointwise_convolution(self, becomes: Any, written: Any) -> None:
        def chain(x: Tensor, conv: nn.Module, linear: nn.Module, norm: nn.Module) -> Tensor:
            y = linear(conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return torch.tanh(norm(y))

        model = written(chain, conv=nn.Conv2d(4, 8, 3, padding=1), linear=nn.Linear(8, 6), norm=nn.BatchNorm2d(6))
        becomes(model, (2, 4, 7, 9), {"Conv2d": 1, "Tanh": 1})

    def test_a_linear_layer_over_flattened_positions_is_a_pointwise_convolution(
        self, becomes: Any, written: Any
    ) -> None:
        def chain(x: Tensor, conv: nn.Module, linear: nn.Module) -> Tensor:
            return torch.tanh(linear(conv(x).flatten(2).transpose(1, 2)))

        model = written(chain, conv=nn.Conv2d(4, 8, 3, 2, 1), linear=nn.Linear(8, 6))
        becomes(model, (2, 4, 7, 9), {"Conv2d": 1, "Tanh": 1, "transpose": 1})

    def test_a_batch_norm_over_channels_goes_through_the_transpose_into_the_linear_layer(
        self, becomes: Any, written: Any
    ) -> None:
        def chain(x: Tensor, linear: nn.Module, norm: nn.Module, last: nn.Module) -> Tensor:
            y: Tensor = torch.tanh(last(norm(linear(x).transpose(1, 2)).transpose(1, 2)))
            return y

        model = written(chain, linear=nn.Linear(8, 6), norm=nn.BatchNorm1d(6), last=nn.Linear(6, 4))
        becomes(model, (2, 5, 8), {"Linear": 1, "Tanh": 1})


class TestLinearLayers:
    @pytest.mark.parametrize("shape", [(4, 8), (2, 5, 8), (2, 3, 5, 8)], ids=str)
    def test_linear_layers_in_a_row_become_one(self, becomes: Any, shape: tuple[int, ...]) -> None:
        model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Linear(16, 12, bias=False), nn.Linear(12, 4))
        becomes(model, shape, {"Linear": 1}, any_size=False)

    def test_a_residual_linear_layer_is_one(self, becomes: Any, written: Any) -> None:
        becomes(written(lambda x, linear: x + linear(x), linear=nn.Linear(8, 8)), (2, 5, 8), {"Linear": 1})

    def test_a_linear_layer_before_a_flattened_convolution_goes_into_the_head(self, becomes: Any) -> None:
        head = nn.Sequential(nn.Conv2d(8, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))
        becomes(head, (2, 8, 5, 6), {"AdaptiveAvgPool2d": 1, "Linear": 1})
