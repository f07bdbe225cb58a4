"""Is an affine region between fixed sizes one matrix, and is every reason not to make it one named?"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from rgc import passes
from rgc.compiler import Options, compile_with, example_of
from rgc.testing import randomize

collapse = passes.collapse


def test_more_inputs_than_outputs_and_the_reverse(compiled: Any) -> None:
    narrow = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(32, 3))
    wide = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 50))
    assert compiled(narrow, 2, 3, 6, 6, passes=[collapse]).ops_after == {"Linear": 1}
    assert compiled(wide, 2, 3, passes=[collapse]).ops_after == {"Linear": 1}


def test_a_region_that_ends_in_an_image_ends_in_an_image_again(compiled: Any) -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1), nn.ReLU())
    report = compiled(model, 2, 2, 3, 4, passes=[collapse])
    assert report.ops_after == {"Linear": 1, "ReLU": 1} and report.fixed_size


def test_a_chunk_at_a_time_is_the_same_matrix(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("rgc.passes.collapse"), "CHUNK", 100)
    for shape, layers in (
        ((2, 30), (nn.Linear(30, 20), nn.Linear(20, 7))),
        ((2, 7), (nn.Linear(7, 20), nn.Linear(20, 30))),
    ):
        assert compiled(nn.Sequential(*layers), *shape, passes=[collapse]).ops_after == {"Linear": 1}


def test_an_inner_value_that_is_an_output_stays(calls: Any, compiled: Any) -> None:
    def both(x: Any, first: Any, second: Any) -> Any:
        y = first(x)
        return y, second(y)

    report = compiled(calls(both, first=nn.Linear(6, 6), second=nn.Linear(6, 6)), 2, 6, passes=[collapse])
    assert report.ops_after == {"Linear": 2}


def test_a_matrix_that_is_too_large_is_refused(compiled: Any, reasons: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("rgc.passes.collapse"), "LARGEST_MATRIX", 100)
    report = compiled(nn.Sequential(nn.Linear(20, 2), nn.Linear(2, 20)), 2, 20, passes=[collapse])
    assert "a matrix of 20 x 20: 400 numbers (0.0 MiB); at most 100 numbers (0.0 MiB)" in reasons(report, "collapse")


def test_a_region_that_mixes_samples_is_refused(calls: Any, compiled: Any, reasons: Any) -> None:
    mixed = calls(lambda x, a, b: b(a(x).flip(0)), a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    report = compiled(mixed, 2, 6, passes=[collapse])
    assert report.rewrites == [] and "mixes the samples of a batch" in reasons(report, "collapse")


def test_a_region_for_one_batch_size_is_refused(calls: Any, compiled: Any, reasons: Any) -> None:
    stuck = calls(lambda x, a, b: b(a(x).reshape(2, 6)), a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    report = compiled(stuck, 2, 6, passes=[collapse])
    assert report.rewrites == [] and "does not run on every batch size" in reasons(report, "collapse")


def test_a_free_size_is_refused(reasons: Any) -> None:
    model = randomize(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    options = Options(passes=[collapse], fixed_size=False)
    report = compile_with(model, example_of(model, torch.randn(2, 6)), options).report
    assert "one matrix only at a fixed size (--passes all)" in reasons(report, "collapse")


def test_a_region_of_one_layer_is_left_as_it_is(compiled: Any) -> None:
    assert compiled(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), 2, 3, 2, 2, passes=[collapse]).rewrites == []
