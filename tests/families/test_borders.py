"""Do layers become one across a zero-padded border, with what it takes to be exact there?

DESIGN, section 4: predicate per axis and side, bias map, ones-channel, constant pad, global-average tail. The
linearised inverted residual is that of Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks"
(2018), section 3.3, with its activations decayed to the identity.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rgc.nn import DecayedActivation

SIZES = [(9, 9), (8, 8), (7, 12), (2, 3), (1, 1)]


class InvertedResidual(nn.Module):
    """1x1, depthwise 3x3, 1x1, each with its batch norm, and the skip; activations that have decayed."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int = 3, bias: bool = False) -> None:
        super().__init__()
        wide = inputs * expand

        def act() -> nn.Module:
            return DecayedActivation(nn.ReLU6(), 1.0)

        self.layers = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=bias), nn.BatchNorm2d(wide), act(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=bias), nn.BatchNorm2d(wide), act(),
            nn.Conv2d(wide, outputs, 1, bias=bias), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.has_skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.has_skip else y


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("outputs", "stride"), [(4, 1), (6, 1), (4, 2), (6, 2)])
class TestInvertedResidual:
    def test_at_a_fixed_size_it_is_one_3x3_and_a_bias_map(
        self, becomes: Any, outputs: int, stride: int, size: tuple[int, int]
    ) -> None:
        model = nn.Sequential(InvertedResidual(4, outputs, stride), nn.ReLU())
        compiled = becomes(model, (2, 4, *size), {"Conv2d": 1, "add": 1, "ReLU": 1}, passes="all,-collapse")
        (conv,) = (module for module in compiled.modules() if isinstance(module, nn.Conv2d))
        assert max(conv.kernel_size) <= 3

    def test_at_any_size_it_is_one_3x3_and_one_more_operator(
        self, becomes: Any, outputs: int, stride: int, size: tuple[int, int]
    ) -> None:
        model = nn.Sequential(InvertedResidual(4, outputs, stride), nn.ReLU())
        becomes(model, (2, 4, *size), {"Conv2d": 1, "pad": 1, "ReLU": 1})


def test_with_all_passes_a_linear_inverted_residual_is_one_layer(becomes: Any) -> None:
    becomes(
        nn.Sequential(InvertedResidual(4, 4, 1), nn.ReLU()),
        (2, 4, 7, 6),
        {"Conv2d": 1, "add": 1, "ReLU": 1},
        passes="all",
    )


def test_inverted_residuals_in_a_row_have_a_border_between_them(becomes: Any) -> None:
    """A padded 3x3 after a padded 3x3 is not one 5x5: two convolutions."""
    model = nn.Sequential(InvertedResidual(4, 4, 1), InvertedResidual(4, 6, 2), nn.ReLU())
    becomes(model, (2, 4, 9, 8), {"Conv2d": 2, "pad": 2, "ReLU": 1})


#: Geometries of the padded layer behind a norm or a biased 1x1.
GEOMETRY: dict[str, dict[str, Any]] = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x3, stride 2": {"kernel_size": 3, "padding": 1, "stride": 2},
    "5x5": {"kernel_size": 5, "padding": 2},
    "3x3, dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "1x3": {"kernel_size": (1, 3), "padding": (0, 1)},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
    "even": {"kernel_size": 2, "padding": 1},
    "padded 1x1": {"kernel_size": 1, "padding": 1},
    "same, even": {"kernel_size": 4, "padding": "same"},
}


def uneven(geometry: str) -> dict[str, int]:
    """A padding of different sides, which no convolution of PyTorch has, is an operator of its own."""
    return {"uneven pad": 1} if geometry == "same, even" else {}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("geometry", list(GEOMETRY))
class TestBeforeAPaddedConvolution:
    @pytest.mark.parametrize("size", [(9, 9), (6, 7)], ids=str)
    def test_a_batch_norm_takes_one_more_operator_at_any_size(
        self, becomes: Any, geometry: str, size: tuple[int, int]
    ) -> None:
        """A constant pad, or a channel of ones: the norm itself is gone."""
        model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 8, **GEOMETRY[geometry]), nn.ReLU())
        compiled = becomes(model, (2, 4, *size), {"Conv2d": 1, "pad": 1, "ReLU": 1, **uneven(geometry)})
        assert not any("Norm" in name for name in compiled.report.ops_after)

    def test_a_batch_norm_takes_a_bias_map_at_a_fixed_size(self, becomes: Any, geometry: str) -> None:
        model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 8, **GEOMETRY[geometry]), nn.ReLU())
        becomes(model, (2, 4, 7, 6), {"Conv2d": 1, "add": 1, "ReLU": 1, **uneven(geometry)}, passes="all,-collapse")

    def test_a_pointwise_layer_with_bias_takes_one_more_operator_at_any_size(self, becomes: Any, geometry: str) -> None:
        model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 8, **GEOMETRY[geometry]), nn.ReLU())
        becomes(model, (2, 4, 7, 6), {"Conv2d": 1, "pad": 1, "ReLU": 1, **uneven(geometry)})

    def test_a_norm_without_shift_takes_nothing(self, becomes: Any, written: Any, geometry: str) -> None:
        factor = torch.linspace(-2, 2, 4, dtype=torch.float64).view(4, 1, 1)
        model = written(lambda x, conv: torch.relu(conv(x * factor)), conv=nn.Conv2d(4, 8, **GEOMETRY[geometry]))
        becomes(model, (2, 4, 7, 6), {"Conv2d": 1, "ReLU": 1, **uneven(geometry)})


#: Pairs whose paddings let two kernels become one at every size, without anything more.
EXACT: dict[str, tuple[nn.Module, nn.Module]] = {
    "pad once, before both": (nn.Conv2d(4, 4, 3, padding=2), nn.Conv2d(4, 6, 3)),
    "vertical then horizontal": (
        nn.Conv2d(4, 4, (3, 1), padding=(1, 0), bias=False), nn.Conv2d(4, 6, (1, 3), padding=(0, 1)),
    ),
    "1x1 without bias, then padded": (nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 6, 5, padding=2)),
    "padded, then 1x1": (nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 6, 1)),
    "strided, then unpadded": (nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 6, 3)),
    "patches, then unpadded": (nn.Conv2d(4, 4, 2, 2), nn.Conv2d(4, 6, 2)),
    "more padding than kernel, then padded": (
        nn.Conv2d(4, 4, 3, padding=3, bias=False), nn.Conv2d(4, 6, 3, padding=1),
    ),
    "depthwise, then pointwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 6, 1)),
}  # fmt: skip

#: Pairs that no single kernel equals.
INEXACT: dict[str, tuple[nn.Module, nn.Module]] = {
    "padded 3x3 twice": (nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 6, 3, padding=1)),
    "strided, then padded": (nn.Conv2d(4, 4, 3, 2, 1, bias=False), nn.Conv2d(4, 6, 3, padding=1)),
    "unpadded, then padded": (nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 6, 3, padding=1)),
    "zeros, then reflect": (
        nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    ),
}  # fmt: skip


class TestPredicate:
    """Per axis and per side: does the padding let two kernels become one?"""

    @pytest.mark.parametrize("size", [(9, 9), (8, 11)], ids=str)
    @pytest.mark.parametrize("name", list(EXACT))
    def test_exact_pairs_become_one_convolution(self, becomes: Any, name: str, size: tuple[int, int]) -> None:
        becomes(nn.Sequential(*EXACT[name], nn.ReLU()), (2, 4, *size), {"Conv2d": 1, "ReLU": 1})

    @pytest.mark.parametrize("passes", ["default", "all,-collapse"])
    @pytest.mark.parametrize("name", list(INEXACT))
    def test_inexact_pairs_stay_two_and_say_why(self, becomes: Any, name: str, passes: str) -> None:
        model = nn.Sequential(*INEXACT[name], nn.ReLU())
        compiled = becomes(model, (2, 4, 9, 8), {"Conv2d": 2, "ReLU": 1}, passes=passes)
        assert compiled.report.ops_after["Conv2d"] == 2
        assert any("ring" in refused.reason or "pads" in refused.reason for refused in compiled.report.refusals)


class TestGlobalAverageTail:
    @pytest.mark.parametrize("size", [(9, 9), (6, 7)], ids=str)
    @pytest.mark.parametrize("kernel", [3, 5])
    def test_a_padded_convolution_before_a_global_average_is_one_layer_at_a_fixed_size(
        self, becomes: Any, kernel: int, size: tuple[int, int]
    ) -> None:
        """The average over outputs is a weighted sum over inputs: one kernel as large as the input."""
        conv = nn.Conv2d(4, 8, kernel, padding=kernel // 2)
        model = nn.Sequential(nn.Sigmoid(), conv, nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        becomes(nn.Sequential(model, nn.Linear(8, 5)), (2, 4, *size), {"Sigmoid": 1, "Linear": 1}, passes="all")

    def test_a_chain_of_padded_convolutions_before_a_global_average_is_one_layer(self, becomes: Any) -> None:
        convs = [nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8)]
        model = nn.Sequential(nn.Sigmoid(), *convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        becomes(model, (2, 4, 8, 7), {"Sigmoid": 1, "Linear": 1}, passes="all")
