"""Do rearrangements of channels (concat, split, shuffle, pixel shuffle) go into the linear layers around them?

Channel shuffle: Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices"
(2018), section 3.1 and figure 1. Pixel shuffle: Shi et al., "Real-Time Single Image and Video Super-Resolution Using
an Efficient Sub-Pixel Convolutional Neural Network" (2016), section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class TestConcat:
    @pytest.mark.parametrize("kernels", [(1, 1), (1, 3), (3, 5)], ids=str)
    def test_parallel_convolutions_that_are_concatenated_become_one(
        self, becomes: Any, written: Any, kernels: tuple[int, int]
    ) -> None:
        def forward(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
            return torch.relu(torch.cat([a(x), b(x)], 1))

        a, b = (nn.Sequential(nn.Conv2d(4, 6, k, padding=k // 2), nn.BatchNorm2d(6)) for k in kernels)
        becomes(written(forward, a=a, b=b), (2, 4, 7, 9), {"Conv2d": 1, "ReLU": 1})

    def test_parallel_linear_layers_that_are_concatenated_become_one(self, becomes: Any, written: Any) -> None:
        def forward(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
            return torch.relu(torch.cat((a(x), b(x)), dim=-1))

        becomes(written(forward, a=nn.Linear(8, 6), b=nn.Linear(8, 3)), (2, 5, 8), {"Linear": 1, "ReLU": 1})

    def test_an_input_beside_its_convolution_becomes_one_convolution(self, becomes: Any, written: Any) -> None:
        def forward(x: Tensor, a: nn.Module) -> Tensor:
            return torch.relu(torch.cat([x, a(x), -x], 1))

        becomes(written(forward, a=nn.Conv2d(4, 6, 3, padding=1)), (2, 4, 7, 9), {"Conv2d": 1, "ReLU": 1})

    def test_a_concatenation_before_a_pointwise_layer_becomes_one_convolution(self, becomes: Any, written: Any) -> None:
        def forward(x: Tensor, a: nn.Module, b: nn.Module, last: nn.Module) -> Tensor:
            y: Tensor = torch.relu(last(torch.cat([a(x), b(x), x], 1)))
            return y

        a, b = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 5, 1)
        becomes(written(forward, a=a, b=b, last=nn.Conv2d(15, 8, 1)), (2, 4, 7, 9), {"Conv2d": 1, "ReLU": 1})

    def test_a_batch_norm_behind_a_concatenation_goes_into_its_branches(self, becomes: Any, written: Any) -> None:
        """As in a dense block: the parts come from different inputs, each takes its slice of the norm."""

        def forward(x: Tensor, a: nn.Module, b: nn.Module, norm: nn.Module) -> Tensor:
            return torch.relu(norm(torch.cat([a(x), b(torch.sigmoid(x))], 1)))

        model = written(forward, a=nn.Conv2d(4, 6, 3), b=nn.Conv2d(4, 2, 3), norm=nn.BatchNorm2d(8))
        becomes(model, (2, 4, 7, 9), {"Conv2d": 2, "Sigmoid": 1, "cat": 1, "ReLU": 1})


class TestSplit:
    def test_linear_parts_of_a_split_convolution_go_into_it(self, becomes: Any, written: Any) -> None:
        """a + W b for the halves of one convolution: one convolution of half the width."""

        def forward(x: Tensor, conv: nn.Module, point: nn.Module) -> Tensor:
            a, b = conv(x).chunk(2, 1)
            return torch.relu(a + point(b))

        model = written(forward, conv=nn.Conv2d(4, 8, 3, padding=1), point=nn.Conv2d(4, 4, 1))
        becomes(model, (2, 4, 7, 9), {"Conv2d": 1, "ReLU": 1})

    def test_scaled_parts_that_are_joined_again_go_into_the_convolution(self, becomes: Any, written: Any) -> None:
        def forward(x: Tensor, conv: nn.Module) -> Tensor:
            a, b, c = torch.split(conv(x), [2, 4, 2], dim=1)
            return torch.relu(torch.cat([2 * c, a - 1, -b], 1))

        becomes(written(forward, conv=nn.Conv2d(4, 8, 3, padding=1)), (2, 4, 7, 9), {"Conv2d": 1, "ReLU": 1})

    def test_pointwise_layers_on_the_parts_become_one_grouped_layer(self, becomes: Any, written: Any) -> None:
        def forward(x: Tensor, p: nn.Module, q: nn.Module) -> Tensor:
            a, b = x.chunk(2, dim=1)
            return torch.relu(torch.cat([p(a), q(b)], dim=1))

        becomes(written(forward, p=nn.Conv2d(4, 6, 1), q=nn.Conv2d(4, 6, 1)), (2, 8, 7, 9), {"Conv2d": 1, "ReLU": 1})

    def test_a_slice_of_channels_leaves_a_narrower_convolution(self, becomes: Any, written: Any) -> None:
        def forward(x: Tensor, conv: nn.Module) -> Tensor:
            return torch.relu(conv(x)[:, 2:5])

        compiled = becomes(written(forward, conv=nn.Conv2d(4, 8, 3, padding=1)), (2, 4, 7, 9), {"Conv2d": 1, "ReLU": 1})
        assert compiled.report.params_after == 3 * 4 * 9 + 3

    def test_a_convolution_of_a_slice_of_channels_reads_them_itself(self, becomes: Any, written: Any) -> None:
        def forward(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
            y: Tensor = torch.relu(second(first(x)[:, ::2]))
            return y

        model = written(forward, first=nn.Conv2d(4, 8, 3, padding=1), second=nn.Conv2d(4, 6, 1))
        becomes(model, (2, 4, 7, 9), {"Conv2d": 1, "ReLU": 1})


def shuffled(x: Tensor) -> Tensor:
    """As ShuffleNet writes it."""
    batch, channels, height, width = x.size()
    x = x.view(batch, 4, channels // 4, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batch, -1, height, width)


def shuffled_by_reshape(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return (
        x.reshape(batch, 2, channels // 2, height, width).permute(0, 2, 1, 3, 4).reshape(batch, channels, height, width)
    )


def shuffled_by_flatten(x: Tensor) -> Tensor:
    return x.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2)


ORDER = torch.tensor([3, 0, 7, 1, 2, 6, 5, 4])

#: Permutations of 8 channels, as people write them.
PERMUTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "ShuffleNet": shuffled,
    "reshape and permute": shuffled_by_reshape,
    "unflatten and flatten": shuffled_by_flatten,
    "module": nn.ChannelShuffle(2),
    "function": lambda x: torch.nn.functional.channel_shuffle(x, 4),
    "index_select": lambda x: torch.index_select(x, 1, ORDER),
    "indexing": lambda x: x[:, ORDER],
    "flip": lambda x: torch.flip(x, [1]),
    "flip by method": lambda x: x.flip(1),
    "roll": lambda x: torch.roll(x, 3, dims=1),
    "halves exchanged": lambda x: torch.cat([x[:, 4:], x[:, :4]], 1),
    "interleaved": lambda x: torch.cat([x[:, ::2], x[:, 1::2]], dim=1),
}


def permutation_named(name: str, written: Any) -> nn.Module:
    permutation = PERMUTATIONS[name]
    module: nn.Module = permutation if isinstance(permutation, nn.Module) else written(permutation)
    return module


class TestPermutations:
    @pytest.mark.parametrize("name", list(PERMUTATIONS))
    def test_a_permutation_between_pointwise_layers_is_not_there(self, becomes: Any, written: Any, name: str) -> None:
        permutation = permutation_named(name, written)
        model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), permutation, nn.Conv2d(8, 6, 1), nn.ReLU())
        becomes(model, (2, 4, 7, 9), {"Conv2d": 1, "ReLU": 1})

    @pytest.mark.parametrize("name", list(PERMUTATIONS))
    def test_a_permutation_behind_an_activation_goes_into_the_next_layer(
        self, becomes: Any, written: Any, name: str
    ) -> None:
        permutation = permutation_named(name, written)
        model = nn.Sequential(nn.Sigmoid(), permutation, nn.Conv2d(8, 6, 3, padding=1), nn.ReLU())
        becomes(model, (2, 8, 7, 9), {"Sigmoid": 1, "Conv2d": 1, "ReLU": 1})

    def test_a_permutation_before_a_depthwise_convolution_goes_into_the_layers_around(
        self, becomes: Any, written: Any
    ) -> None:
        """The unit of ShuffleNet without its activation: grouped 1x1, shuffle, depthwise 3x3, grouped 1x1."""

        def forward(x: Tensor, first: nn.Module, depthwise: nn.Module, last: nn.Module) -> Tensor:
            y: Tensor = last(depthwise(shuffled(torch.relu(first(x)))))
            return y

        def conv_bn(kernel: int, groups: int) -> nn.Sequential:
            conv = nn.Conv2d(8, 8, kernel, padding=kernel // 2, groups=groups, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(8))

        model = written(forward, first=conv_bn(1, 4), depthwise=conv_bn(3, 8), last=conv_bn(1, 4))
        becomes(model, (2, 8, 7, 9), {"Conv2d": 2, "ReLU": 1})

    def test_a_pointwise_layer_passes_a_flip_of_positions(self, becomes: Any, written: Any) -> None:
        """The flip itself is no map of channels and stays."""

        def forward(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
            y: Tensor = torch.relu(second(torch.flip(first(x), [3])))
            return y

        model = written(forward, first=nn.Conv2d(4, 8, 3, padding=1), second=nn.Conv2d(8, 6, 1))
        becomes(model, (2, 4, 7, 9), {"Conv2d": 1, "flip": 1, "ReLU": 1})


class TestPixelShuffle:
    def test_a_pointwise_layer_behind_a_pixel_shuffle_goes_before_it(self, becomes: Any) -> None:
        """By hand: it acts on each sub-position alike, so it is a grouped layer in front, and joins the convolution."""
        model = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(4, 3, 1), nn.ReLU())
        becomes(model, (2, 4, 7, 6), {"Conv2d": 1, "PixelShuffle": 1, "ReLU": 1})

    def test_a_batch_norm_behind_a_pixel_shuffle_goes_into_the_convolution_before_it(self, becomes: Any) -> None:
        model = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.PixelShuffle(2), nn.BatchNorm2d(4), nn.ReLU())
        becomes(model, (2, 4, 7, 6), {"Conv2d": 1, "PixelShuffle": 1, "ReLU": 1})

    def test_a_pixel_unshuffle_before_a_convolution_is_a_stride(self, becomes: Any) -> None:
        """A 1x1 on unshuffled pixels is a 2x2 convolution of stride 2."""
        model = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        becomes(model, (2, 4, 8, 6), {"Conv2d": 1, "ReLU": 1}, passes="all,-collapse")

    def test_a_pointwise_layer_before_a_pixel_unshuffle_goes_behind_it(self, becomes: Any) -> None:
        model = nn.Sequential(nn.Conv2d(4, 6, 1), nn.PixelUnshuffle(2), nn.Conv2d(24, 8, 1), nn.ReLU())
        becomes(model, (2, 4, 8, 6), {"Conv2d": 1, "PixelUnshuffle": 1, "ReLU": 1}, passes="all,-collapse")

    def test_unshuffling_what_was_shuffled_is_nothing(self, becomes: Any) -> None:
        first, second = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 8, 1)
        model = nn.Sequential(first, nn.PixelShuffle(2), nn.PixelUnshuffle(2), second, nn.ReLU())
        becomes(model, (2, 4, 7, 6), {"Conv2d": 1, "ReLU": 1})
