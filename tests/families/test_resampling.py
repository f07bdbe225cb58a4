"""Do pooling, upsampling and global averages let the linear layers around them meet?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

UPSAMPLING: dict[str, Any] = {
    "nearest": nn.Upsample(scale_factor=2, mode="nearest"),
    "bilinear": nn.Upsample(scale_factor=2, mode="bilinear"),
    "bilinear, corners aligned": nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
    "bicubic": nn.Upsample(scale_factor=2, mode="bicubic"),
    "nearest module": nn.UpsamplingNearest2d(scale_factor=2),
    "bilinear module": nn.UpsamplingBilinear2d(scale_factor=2),
    "to a size": nn.Upsample(size=(12, 10), mode="bilinear"),
}


class TestUpsampling:
    @pytest.mark.parametrize("mode", list(UPSAMPLING))
    def test_pointwise_layers_on_both_sides_become_one(self, becomes: Any, mode: str) -> None:
        """Every interpolation has weights that sum to one, so a bias passes it too."""
        model = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), UPSAMPLING[mode], nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6),
            nn.ReLU(),
        )  # fmt: skip
        becomes(model, (2, 4, 6, 5), {"Conv2d": 1, "Upsample": 1, "ReLU": 1})

    @pytest.mark.parametrize("mode", ["nearest", "bilinear", "area"])
    def test_a_functional_interpolation_is_passed_as_well(self, becomes: Any, written: Any, mode: str) -> None:
        def forward(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
            y: Tensor = torch.relu(second(F.interpolate(first(x), scale_factor=2, mode=mode)))
            return y

        model = written(forward, first=nn.Conv2d(4, 8, 1), second=nn.Conv2d(8, 6, 1))
        becomes(model, (2, 4, 6, 5), {"Conv2d": 1, "interpolate": 1, "ReLU": 1})

    def test_a_lateral_sum_as_in_a_feature_pyramid_keeps_two_convolutions(self, becomes: Any, written: Any) -> None:
        """The 1x1 behind the sum goes into both branches."""

        def forward(x: Tensor, small: nn.Module, large: nn.Module, last: nn.Module) -> Tensor:
            high = F.max_pool2d(torch.sigmoid(x), 2)
            y: Tensor = torch.relu(last(F.interpolate(small(high), scale_factor=2, mode="nearest") + large(x)))
            return y

        model = written(forward, small=nn.Conv2d(4, 8, 1), large=nn.Conv2d(4, 8, 1), last=nn.Conv2d(8, 6, 1))
        ops = {"Conv2d": 2, "interpolate": 1, "add": 1, "ReLU": 1, "Sigmoid": 1, "max_pool2d": 1}
        becomes(model, (2, 4, 6, 8), ops, any_size=False)


GLOBAL: dict[str, Any] = {
    "module": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "mean over positions": lambda x: x.mean((2, 3)),
    "mean by name": lambda x: x.mean(dim=[-2, -1]),
    "mean twice": lambda x: x.mean(3).mean(2),
    "mean of flattened positions": lambda x: x.flatten(2).mean(-1),
    "kept axes": lambda x: x.mean((2, 3), keepdim=True).flatten(1),
}


class TestGlobalAverage:
    @pytest.mark.parametrize("form", list(GLOBAL))
    def test_a_pointwise_layer_before_goes_into_the_head_behind(self, becomes: Any, written: Any, form: str) -> None:
        def forward(x: Tensor, conv: nn.Module, norm: nn.Module, head: nn.Module) -> Tensor:
            y: Tensor = head(GLOBAL[form](norm(conv(torch.sigmoid(x)))))
            return y

        model = written(forward, conv=nn.Conv2d(4, 8, 1), norm=nn.BatchNorm2d(8), head=nn.Linear(8, 5))
        average = 2 if form == "mean twice" else 1
        becomes(model, (2, 4, 6, 5), {"Sigmoid": 1, "mean": average, "Linear": 1})

    def test_a_convolution_as_head_takes_the_pointwise_layer_as_well(self, becomes: Any) -> None:
        model = nn.Sequential(
            nn.Sigmoid(), nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 5, 1)
        )
        becomes(model, (2, 4, 6, 5), {"Sigmoid": 1, "AdaptiveAvgPool2d": 1, "Conv2d": 1})

    def test_a_batch_norm_behind_a_global_average_goes_into_the_layers_around(self, becomes: Any) -> None:
        tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 5)]
        becomes(nn.Sequential(nn.Sigmoid(), *tail), (2, 8, 6, 5), {"Sigmoid": 1, "AdaptiveAvgPool2d": 1, "Linear": 1})

    def test_a_batch_norm_before_a_global_average_goes_into_the_head(self, becomes: Any) -> None:
        tail = [nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
        becomes(nn.Sequential(nn.Sigmoid(), *tail), (2, 8, 6, 5), {"Sigmoid": 1, "AdaptiveAvgPool2d": 1, "Linear": 1})

    @pytest.mark.parametrize("kernel", [1, 3])
    def test_an_unpadded_patch_embedding_before_a_global_average_is_one_layer_at_a_fixed_size(
        self, becomes: Any, kernel: int
    ) -> None:
        tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
        model = nn.Sequential(nn.Conv2d(4, 8, kernel), *tail)
        becomes(model, (2, 4, 6, 5), {"Conv2d": 1}, passes="all")


class TestAveragePooling:
    @pytest.mark.parametrize("stride", [1, 2, 3])
    @pytest.mark.parametrize("window", [2, 3])
    def test_a_pooling_goes_into_the_pointwise_layer_behind_it(self, becomes: Any, window: int, stride: int) -> None:
        model = nn.Sequential(nn.AvgPool2d(window, stride), nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        becomes(model, (2, 4, 9, 8), {"Conv2d": 1, "ReLU": 1})

    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_a_pooling_goes_into_the_unpadded_convolution_before_it(self, becomes: Any, rank: int) -> None:
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](4, 8, 3)
        pool = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[rank - 1](2)
        becomes(nn.Sequential(conv, pool, nn.ReLU()), (2, 4, *(9, 8, 7)[:rank]), {f"Conv{rank}d": 1, "ReLU": 1})

    @pytest.mark.parametrize(
        "options",
        [
            {"kernel_size": 3, "stride": 1, "padding": 1},
            {"kernel_size": 3, "stride": 1, "padding": 1, "divisor_override": 7},
            {"kernel_size": (3, 1), "stride": 1, "padding": (1, 0)},
            {"kernel_size": 1},
        ],
        ids=str,
    )
    def test_a_pooling_beside_a_convolution_is_part_of_it(
        self, becomes: Any, written: Any, options: dict[str, Any]
    ) -> None:
        def forward(x: Tensor, conv: nn.Module, pool: nn.Module) -> Tensor:
            return torch.relu(conv(x) - pool(x))

        model = written(forward, conv=nn.Conv2d(4, 4, 3, padding=1), pool=nn.AvgPool2d(**options))
        becomes(model, (2, 4, 9, 8), {"Conv2d": 1, "ReLU": 1})

    @pytest.mark.parametrize("size", [(8, 8), (6, 10)], ids=str)
    @pytest.mark.parametrize("options", [{"ceil_mode": True}, {"count_include_pad": False}], ids=str)
    def test_a_pooling_whose_windows_are_equal_at_the_fixed_size_is_a_convolution_there(
        self, becomes: Any, options: dict[str, bool], size: tuple[int, int]
    ) -> None:
        model = nn.Sequential(nn.AvgPool2d(2, 2, **options), nn.Conv2d(4, 8, 1), nn.ReLU())  # type: ignore[arg-type]
        becomes(model, (2, 4, *size), {"Conv2d": 1, "ReLU": 1}, passes="all,-collapse")

    def test_a_pooling_that_does_not_count_no_padding_is_a_convolution(self, becomes: Any) -> None:
        model = nn.Sequential(nn.AvgPool2d(2, count_include_pad=False), nn.Conv2d(4, 8, 1), nn.ReLU())
        becomes(model, (2, 4, 9, 8), {"Conv2d": 1, "ReLU": 1})

    @pytest.mark.parametrize("options", [{"ceil_mode": True}, {"padding": 1, "count_include_pad": False}], ids=str)
    def test_a_norm_and_a_pointwise_layer_pass_a_pooling_of_unequal_windows(
        self, becomes: Any, options: dict[str, Any]
    ) -> None:
        """Every window is an average whose weights sum to one, so what acts on channels alone passes it."""
        pool = nn.AvgPool2d(3, 2, **options)
        model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), pool, nn.Conv2d(8, 6, 1), nn.ReLU())
        becomes(model, (2, 4, 9, 8), {"Conv2d": 1, "AvgPool2d": 1, "ReLU": 1})

    def test_adaptive_pooling_to_a_divisor_is_an_average_pooling_at_the_fixed_size(self, becomes: Any) -> None:
        model = nn.Sequential(nn.AdaptiveAvgPool2d((3, 2)), nn.Conv2d(4, 8, 1), nn.ReLU())
        becomes(model, (2, 4, 9, 8), {"Conv2d": 1, "ReLU": 1}, passes="all,-collapse")
