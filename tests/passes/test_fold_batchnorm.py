"""Does a frozen batch norm go into the convolution beside it, for every kind of convolution and of norm?"""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SIZES = {1: (9,), 2: (9, 8), 3: (5, 4, 6)}
KINDS = [
    (1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d),
    (1, nn.ConvTranspose1d), (2, nn.ConvTranspose2d), (3, nn.ConvTranspose3d),
]  # fmt: skip


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rank", "kind"), KINDS)
def test_after_a_convolution(rank: int, kind: Any, bias: bool, groups: int, compiled: Any) -> None:
    model = nn.Sequential(kind(4, 4, 3, stride=2, padding=1, groups=groups, bias=bias), NORMS[rank](4, eps=1e-3))
    assert compiled(model, 2, 4, *SIZES[rank], passes="fold_batchnorm").ops_after == {kind.__name__: 1}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("eps", [1e-9, 0.3])
def test_with_and_without_parameters_of_its_own(affine: bool, eps: float, compiled: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=eps, affine=affine))
    assert compiled(model, 2, 3, 8, 8, passes="fold_batchnorm").ops_after == {"Conv2d": 1}


@pytest.mark.parametrize("groups", [1, 4])
def test_before_a_convolution_that_pads_nothing(groups: int, compiled: Any) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, stride=2, groups=groups))
    assert compiled(model, 2, 4, 8, 8, passes="fold_batchnorm").ops_after == {"Conv2d": 1}


def test_before_a_padded_convolution_with_another_pad_value_or_a_bias_map(compiled: Any) -> None:
    for passes in ("fold_batchnorm", "all,-collapse"):  # the input is smaller than the output
        report = compiled(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, padding=1)), 2, 4, 8, 8, passes=passes)
        assert report.ops_after == {"sub": 1, "Conv2d": 1} and not report.fixed_size
    strided = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, stride=2, padding=1))
    report = compiled(strided, 2, 4, 8, 8, passes="all,-collapse")
    assert report.ops_after == {"Conv2d": 1, "add": 1} and report.fixed_size


def test_before_a_padded_convolution_a_gamma_of_zero_takes_ones(compiled: Any) -> None:
    norm = nn.BatchNorm2d(4)
    nn.init.constant_(norm.weight, 0.0)
    nn.init.ones_(norm.bias)
    model = nn.Sequential(norm, nn.Conv2d(4, 4, 3, padding=1, groups=4))
    report = compiled(model.eval(), 2, 4, 8, 8, passes="fold_batchnorm", random=False)
    assert report.ops_after == {"Conv2d": 1, "pad": 1}  # no pad value becomes zero, and four groups are cheap to lose


def test_two_in_a_row(compiled: Any) -> None:
    report = compiled(
        nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU()), 2, 4, 5, 5, passes="fold_batchnorm"
    )
    assert set(report.ops_after) == {"addcmul", "ReLU"}


def test_after_a_linear_layer_on_samples_but_not_on_tokens(compiled: Any, reasons: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    assert compiled(model, 3, 6, passes="fold_batchnorm").ops_after == {"Linear": 1}
    report = compiled(model, 3, 5, 6, passes="fold_batchnorm")
    assert report.rewrites == [] and "different axes" in reasons(report, "fold_batchnorm")


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        (nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 4, 3)),
        (nn.BatchNorm2d(4, track_running_stats=False), nn.BatchNorm2d(4)),
    ],
)
def test_statistics_of_the_batch_are_refused_in_every_position(layers: Any, compiled: Any, reasons: Any) -> None:
    report = compiled(nn.Sequential(*layers), 2, 4, 8, 8, passes="fold_batchnorm")
    assert report.rewrites == []
    assert "batch norm still uses batch statistics; call model.eval() first" in reasons(report, "fold_batchnorm")


def test_one_norm_after_two_convolutions_goes_into_both(calls: Any, compiled: Any) -> None:
    def shared(x: Any, bn: Any, first: Any, second: Any) -> Any:
        return bn(first(x)).relu() * bn(second(x)).tanh()

    parts = {"bn": nn.BatchNorm2d(4), "first": nn.Conv2d(4, 4, 3), "second": nn.Conv2d(4, 4, 3)}
    report = compiled(calls(shared, **parts), 2, 4, 8, 8, passes="fold_batchnorm")
    assert "BatchNorm2d" not in report.ops_after and report.ops_after["Conv2d"] == 2


def test_the_report_names_the_norm(compiled: Any) -> None:
    report = compiled(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), 2, 3, 8, 8)
    assert [(firing.rewrite, firing.where) for firing in report.rewrites] == [("fold_batchnorm", "0.1")]
