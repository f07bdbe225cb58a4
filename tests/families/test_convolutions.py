"""Do convolutions of every rank and geometry take what is linear around them?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# PyTorch says once that it may copy; the copy is its own affair.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SHAPE = {1: (2, 4, 11), 2: (2, 4, 9, 8), 3: (2, 4, 5, 6, 7)}

GEOMETRY: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "padding": 1, "stride": 2},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
    "even": {"kernel_size": 2, "stride": 2},
    "even, padded": {"kernel_size": 4, "padding": 1},
    "without bias": {"kernel_size": 3, "bias": False},
    "grouped, strided, dilated": {"kernel_size": 2, "groups": 2, "stride": 2, "dilation": 2, "padding": 1},
}


@pytest.mark.parametrize("geometry", list(GEOMETRY))
@pytest.mark.parametrize("rank", [1, 2, 3])
class TestConvolution:
    def test_it_takes_the_batch_norm_and_the_pointwise_layer_behind_it(
        self, becomes: Any, rank: int, geometry: str
    ) -> None:
        conv = CONV[rank](4, 8, **GEOMETRY[geometry])
        model = nn.Sequential(conv, NORM[rank](8), CONV[rank](8, 4, 1), nn.ReLU())
        becomes(model, SHAPE[rank], {f"Conv{rank}d": 1, "ReLU": 1})

    def test_it_is_added_to_another_one_beside_it(self, becomes: Any, written: Any, rank: int, geometry: str) -> None:
        def beside(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
            return torch.relu(a(x) - b(x))

        convs = {name: nn.Sequential(CONV[rank](4, 8, **GEOMETRY[geometry]), NORM[rank](8)) for name in "ab"}
        becomes(written(beside, **convs), SHAPE[rank], {f"Conv{rank}d": 1, "ReLU": 1})


UPSAMPLING: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": 2, "stride": 2},
    "output padding": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "grouped": {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 4, "stride": 2, "padding": 1, "groups": 4},
    "dilated": {"kernel_size": 3, "stride": 2, "dilation": 2},
    "without bias": {"kernel_size": 3, "bias": False},
}


@pytest.mark.parametrize("geometry", list(UPSAMPLING))
@pytest.mark.parametrize("rank", [1, 2, 3])
class TestTransposedConvolution:
    def test_it_takes_the_batch_norm_and_the_pointwise_layer_behind_it(
        self, becomes: Any, rank: int, geometry: str
    ) -> None:
        conv = TRANSPOSED[rank](4, 8, **UPSAMPLING[geometry])
        model = nn.Sequential(conv, NORM[rank](8), CONV[rank](8, 4, 1), nn.ReLU())
        becomes(model, SHAPE[rank], {f"ConvTranspose{rank}d": 1, "ReLU": 1})

    def test_it_is_added_to_another_one_beside_it(self, becomes: Any, written: Any, rank: int, geometry: str) -> None:
        def beside(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
            return torch.relu(a(x) + b(x))

        convs = {name: nn.Sequential(TRANSPOSED[rank](4, 8, **UPSAMPLING[geometry]), NORM[rank](8)) for name in "ab"}
        becomes(written(beside, **convs), SHAPE[rank], {f"ConvTranspose{rank}d": 1, "ReLU": 1})


def test_a_pointwise_layer_without_bias_goes_into_a_transposed_convolution(becomes: Any) -> None:
    first, second = nn.Conv2d(4, 8, 1, bias=False), nn.ConvTranspose2d(8, 4, 4, 2, 1)
    becomes(nn.Sequential(first, second, nn.ReLU()), (2, 4, 7, 6), {"ConvTranspose2d": 1, "ReLU": 1})


def uneven_pad(conv: nn.Conv2d) -> dict[str, int]:
    """A padding of different sides, which no convolution of PyTorch has, is an operator of its own."""
    even = any(d * (k - 1) % 2 for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
    return {"pad": 1} if even else {}


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, (2, 3)], ids=str)
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_convolution_that_pads_to_the_same_size_takes_its_neighbours(
    becomes: Any, kernel: Any, dilation: int
) -> None:
    conv = nn.Conv2d(4, 8, kernel, padding="same", dilation=dilation)
    model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), conv, nn.BatchNorm2d(8), nn.ReLU())
    becomes(model, (2, 4, 9, 8), {"Conv2d": 1, "ReLU": 1, **uneven_pad(conv)})


def test_even_kernels_that_pad_to_the_same_size_are_added_to_odd_ones(becomes: Any, written: Any) -> None:
    def beside(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module) -> Tensor:
        return torch.relu(a(x) + b(x) + c(x) + x)

    convs = {name: nn.Conv2d(4, 4, k, padding="same") for name, k in zip("abc", (2, 3, 4), strict=True)}
    becomes(written(beside, **convs), (2, 4, 9, 8), {"pad": 1, "Conv2d": 1, "ReLU": 1})


@pytest.mark.parametrize("kernel", [1, 2, 4], ids=str)
def test_functional_same_padding_is_the_same(becomes: Any, written: Any, kernel: int) -> None:
    weight = torch.randn(8, 4, kernel, kernel, dtype=torch.float64)

    def forward(x: Tensor, bn: nn.Module) -> Tensor:
        return torch.relu(bn(F.conv2d(x, weight, padding="same")))

    pad = uneven_pad(nn.Conv2d(4, 8, kernel))
    becomes(written(forward, bn=nn.BatchNorm2d(8)), (2, 4, 9, 8), {"Conv2d": 1, "ReLU": 1, **pad})


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
class TestPaddingModes:
    def test_the_batch_norm_behind_goes_in(self, becomes: Any, mode: str) -> None:
        conv = nn.Conv2d(4, 8, 3, padding=1, padding_mode=mode)
        becomes(nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU()), (2, 4, 9, 8), {"Conv2d": 1, "ReLU": 1})

    def test_the_pointwise_layers_around_go_in(self, becomes: Any, mode: str) -> None:
        """A bias passes every padding that copies; around zeros it does not, and the first layer has none there."""
        first = nn.Conv2d(4, 6, 1, bias=mode != "zeros")
        conv = nn.Conv2d(6, 8, 3, padding=(1, 2), padding_mode=mode)
        becomes(nn.Sequential(first, conv, nn.Conv2d(8, 4, 1), nn.ReLU()), (2, 4, 9, 8), {"Conv2d": 1, "ReLU": 1})

    def test_parallel_branches_are_added(self, becomes: Any, written: Any, mode: str) -> None:
        def beside(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
            return torch.relu(a(x) + b(x) + x)

        a = nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode)
        becomes(written(beside, a=a, b=nn.Conv2d(4, 4, 1)), (2, 4, 9, 8), {"Conv2d": 1, "ReLU": 1})


PADS: dict[str, Any] = {
    "zero": nn.ZeroPad2d(1),
    "zero, one-sided": nn.ZeroPad2d((1, 0, 0, 2)),
    "constant 0.5": nn.ConstantPad2d(1, 0.5),
    "reflect": nn.ReflectionPad2d(1),
    "replicate": nn.ReplicationPad2d(1),
    "circular": nn.CircularPad2d(1),
}


class TestPads:
    @pytest.mark.parametrize("pad", list(PADS))
    def test_a_pad_goes_into_the_convolution_behind_it(self, becomes: Any, pad: str) -> None:
        """A constant other than 0, and sides of their own, need an operator of their own."""
        extra = {"pad": 1} if pad in {"constant 0.5", "zero, one-sided"} else {}
        model = nn.Sequential(PADS[pad], nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        becomes(model, (2, 4, 9, 8), {"Conv2d": 1, "ReLU": 1, **extra})

    @pytest.mark.parametrize("pad", ["reflect", "replicate", "circular"])
    def test_layers_on_both_sides_of_a_pad_that_copies_become_one(self, becomes: Any, pad: str) -> None:
        model = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), PADS[pad], nn.Conv2d(6, 8, 3), nn.ReLU())
        becomes(model, (2, 4, 9, 8), {"Conv2d": 1, "ReLU": 1})

    @pytest.mark.parametrize("amounts", [(1, 1, 1, 1), (0, 1, 0, 1), (2, 0)], ids=str)
    def test_a_functional_pad_goes_into_the_convolution_behind_it(
        self, becomes: Any, written: Any, amounts: tuple[int, ...]
    ) -> None:
        def padded(x: Tensor, conv: nn.Module) -> Tensor:
            return torch.relu(conv(F.pad(x, amounts)))

        extra = {} if len(set(amounts)) == 1 else {"pad": 1}
        becomes(written(padded, conv=nn.Conv2d(4, 8, 3, padding=1)), (2, 4, 9, 8), {"Conv2d": 1, "ReLU": 1, **extra})

    def test_a_pad_with_a_number_equal_to_the_bias_around_joins_both_layers(self, becomes: Any, written: Any) -> None:
        """Padding with what the layer before would be outside is no border at all."""
        weight = torch.randn(6, 4, 1, 1, dtype=torch.float64)
        bias = torch.full((6,), 0.5, dtype=torch.float64)

        def padded(x: Tensor, conv: nn.Module) -> Tensor:
            return torch.relu(conv(F.pad(F.conv2d(x, weight, bias), (1, 1, 1, 1), value=0.5)))

        becomes(written(padded, conv=nn.Conv2d(6, 8, 3)), (2, 4, 9, 8), {"Conv2d": 1, "ReLU": 1})

    @pytest.mark.parametrize("kernel", [1, 3])
    def test_a_negative_pad_crops_and_goes_into_the_convolution_before_it(
        self, becomes: Any, written: Any, kernel: int
    ) -> None:
        """Cropping what a padded convolution makes is padding less."""

        def cropped(x: Tensor, conv: nn.Module) -> Tensor:
            return torch.relu(F.pad(conv(x), (-1, -1, -1, -1)))

        conv = nn.Conv2d(4, 8, kernel, padding=1)
        becomes(written(cropped, conv=conv), (2, 4, 9, 8), {"Conv2d": 1, "ReLU": 1})

    def test_a_cropped_branch_is_added_to_an_unpadded_one(self, becomes: Any, written: Any) -> None:
        """A 3x3 without padding beside a 1x1 on the cropped input (negative padding)."""

        def both(x: Tensor, conv: nn.Module, point: nn.Module) -> Tensor:
            return torch.relu(conv(x) + point(F.pad(x, (-1, -1, -1, -1))))

        model = written(both, conv=nn.Conv2d(4, 8, 3), point=nn.Conv2d(4, 8, 1))
        becomes(model, (2, 4, 9, 8), {"Conv2d": 1, "ReLU": 1})

    def test_a_cropped_skip_connection_of_an_unpadded_convolution_goes_in(self, becomes: Any, written: Any) -> None:
        def both(x: Tensor, conv: nn.Module) -> Tensor:
            return torch.relu(conv(x) + x[:, :, 1:-1, 1:-1])

        becomes(written(both, conv=nn.Conv2d(4, 4, 3)), (2, 4, 9, 8), {"Conv2d": 1, "ReLU": 1})
