"""Are the parts of a model that cannot be traced compiled in place, and only where nobody notices?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rgc
from rgc.example import output_difference


class Detector(nn.Module):
    """Returns as many boxes as it finds: no graph can hold that."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.head = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
        nn.init.normal_(self.backbone[1].running_mean)
        nn.init.normal_(self.backbone[1].weight)

    def forward(self, x: Tensor) -> Any:
        score = self.head(self.backbone(x))
        return [each[each > score.mean()] for each in score]


X = torch.randn(2, 4, 9, 8)


def test_the_traceable_parts_of_a_detector_are_compiled_and_named() -> None:
    model = Detector().eval()
    compiled = rgc.compile(model, X)
    report = compiled.report
    assert report.tier == "submodules" and not report.fixed_size
    assert report.notes[-1] == "the model is kept as it is; compiled in place: backbone, head"
    assert report.ops_before == {"Detector": 1, "Conv2d": 4, "BatchNorm2d": 1, "ReLU": 1}
    assert report.ops_after == {"Detector": 1, "Conv2d": 3, "ReLU": 1}
    assert {(each.rewrite, each.where) for each in report.rewrites} == {
        ("fold_batchnorm", "backbone.1"), ("merge_pointwise", "head.1")
    }  # fmt: skip
    for shape in ((2, 4, 9, 8), (1, 4, 12, 11), (5, 4, 6, 6)):
        x = torch.randn(shape)
        assert output_difference(model(x), compiled(x)) < 1e-5


def test_a_part_compiled_for_one_size_makes_the_model_hold_for_that_size_only() -> None:
    class Fixed(Detector):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1))

    compiled = rgc.compile(Fixed().eval(), X, passes="all", objective="depth")
    assert compiled.report.tier == "submodules" and compiled.report.fixed_size
    with pytest.raises(AssertionError, match=r"this compiled model holds for inputs of size 4x5x4 \(any batch\)"):
        compiled(torch.randn(2, 4, 10, 8))


def test_a_part_whose_layers_the_model_reads_stays_as_it_is() -> None:
    class ReadsItsHead(Detector):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), self.head[0].weight.sum() * (1 if isinstance(self.head, nn.Sequential) else 2)

    model = ReadsItsHead().eval()
    compiled = rgc.compile(model, X)
    assert compiled.report.notes[-2:] == [
        "head is kept as it is: the model reads more of it than its output",
        "the model is kept as it is; compiled in place: backbone",
    ]
    assert output_difference(model(X), compiled(X)) < 1e-5


def test_a_part_called_in_two_ways_stays_as_it_is() -> None:
    class Twice(Detector):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), self.backbone(x[:, :, :7, :7])

    notes = rgc.compile(Twice().eval(), X).report.notes
    assert notes[-1].endswith("compiled in place: head")
    assert notes[-2] == "backbone is kept as it is: it is not called on the example, or in several ways"


def test_a_part_that_asks_about_its_size_stays_as_it_is_for_other_sizes_may_come() -> None:
    class Pads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(nn.functional.pad(x, (0, 1)) if x.shape[-1] % 2 else x)

    model = Detector().eval()
    model.backbone = Pads().eval()
    compiled = rgc.compile(model, X)
    assert compiled.report.notes[-1].endswith("compiled in place: backbone.layers, head")
    assert not compiled.report.fixed_size
    for width in (7, 8):
        x = torch.randn(2, 4, 9, width)
        assert output_difference(model(x), compiled(x)) < 1e-5


def test_a_part_that_cannot_be_traced_is_named_once_with_the_reason() -> None:
    class Branches(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.mean() > -1e9 else x

    model = Detector().eval()
    model.head = Branches(Branches(nn.Conv2d(4, 4, 1)), nn.Conv2d(4, 2, 1)).eval()
    kept = [note for note in rgc.compile(model, X).report.notes if " is kept as it is: " in note]
    assert len(kept) == 1 and kept[0].startswith("head is kept as it is: torch.fx cannot trace the model: TraceError")


class Overwrites(nn.Sequential):
    """A part that changes its input besides returning something."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.relu_())


def test_a_part_that_overwrites_its_input_stays_as_it_is() -> None:
    class Reads(Detector):
        def forward(self, x: Tensor) -> Any:
            features = self.backbone(x)
            return self.head(features) + features[:, :2] if features.sum() > -1e9 else x

    model = Reads()
    model.head = Overwrites(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
    model = model.eval()
    compiled = rgc.compile(model, X)
    assert compiled.report.notes[-1].endswith("compiled in place: backbone")
    assert output_difference(model(X), compiled(X)) < 1e-5


def test_a_counting_model_counts_on_from_where_it_was() -> None:
    class Counts(Detector):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.tensor(5))

        def forward(self, x: Tensor) -> Any:
            self.calls += 1
            return self.head(self.backbone(x))

    model = Counts().eval()
    compiled = rgc.compile(model, X)
    assert model.calls == 5 and compiled.model.calls == 5
    torch.testing.assert_close(compiled(X), model(X))
    assert model.calls == 6 and compiled.model.calls == 6


def test_the_hooks_of_parts_stay_and_what_is_beside_them_is_compiled() -> None:
    model = Detector().eval()
    model.head.register_forward_hook(lambda module, args, output: output * 2)
    compiled = rgc.compile(model, X)
    assert compiled.report.notes[-1].endswith("compiled in place: backbone")
    assert output_difference(model(X), compiled(X)) < 1e-5


def test_a_part_runs_in_the_dtype_of_the_result() -> None:
    model = Detector().eval()
    compiled = rgc.compile(model, X, dtype=torch.float64)
    assert output_difference(model.double()(X.double()), compiled(X.double())) < 1e-10
