"""Does the report say what happened, to people and to machines?"""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

import rgc
from rgc.report import Failure, Firing, Refused, Report, summary
from rgc.testing import randomize


@pytest.fixture(scope="module")
def report() -> Report:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.LeakyReLU(0.5), nn.Conv2d(4, 4, 3, padding=1))
    return rgc.compile(randomize(nn.Sequential(*layers)), torch.randn(1, 3, 8, 8)).report


def printed(report: Report) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(report)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_counts_are_those_of_the_model(report: Report) -> None:
    assert report.ops_before == {"Conv2d": 2, "BatchNorm2d": 1, "LeakyReLU": 1}
    assert report.ops_after == {"Conv2d": 2, "LeakyReLU": 1}
    first, second = 4 * 27 + 4, 4 * 36 + 4
    assert report.params_before == first + second + 8 and report.params_after == first + second
    assert report.macs_before == report.macs_after == 64 * (4 * 27 + 4 * 36)
    assert report.input_shapes == ((1, 3, 8, 8),) and report.seconds > 0 and not report.fixed_size


def test_every_merge_has_evidence_and_every_refusal_a_reason(report: Report) -> None:
    (firing,) = report.rewrites
    assert (firing.rewrite, firing.where, firing.evidence) == ("fold_batchnorm", "1", "exact")
    assert 0 <= firing.max_error < 1e-10 and firing.result == ("conv 3x3 3->4",)
    assert firing.sources == ("0", "1")
    (refused,) = report.refusals
    assert (refused.rewrite, refused.where) == ("remove_linear_activation", "2") and "0.5" in refused.reason


def test_json_holds_all_of_it(report: Report) -> None:
    found = json.loads(report.to_json())
    assert found["rewrites"][0]["rewrite"] == "fold_batchnorm" and found["refusals"][0]["where"] == "2"
    assert found["ops_after"] == {"Conv2d": 2, "LeakyReLU": 1} and found["max_error"] == report.max_error
    assert found["verification"]["equal"] is True


def test_people_read_the_same(report: Report) -> None:
    text = printed(report)
    for words in (
        "Sequential: 1 rewrites, 1 refusals",
        "BatchNorm2d",
        "fold_batchnorm",
        "its negative slope is 0.5",
        "proved equal on",
    ):
        assert words in text


def test_operators_that_rgc_does_not_know_are_counted_and_named() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = x.shape[0] * x.shape[2]  # arithmetic on sizes is no operator
            return torch.cumsum(self.pool(self.pool(self.conv(x))).relu(), 1) / rows

    known = rgc.compile(Model().eval().conv, torch.randn(1, 3, 16, 16)).report
    assert known.opaque == {} and "untouched" not in printed(known)
    found = rgc.compile(Model().eval(), torch.randn(1, 3, 16, 16)).report
    assert found.opaque == {"cumsum": 1, "truediv": 1}
    assert found.opaque <= found.ops_after and "mul" not in found.ops_after
    assert json.loads(found.to_json())["opaque"] == {"cumsum": 1, "truediv": 1}
    assert "passed through untouched: cumsum 1, truediv 1" in printed(found)


def test_bugs_and_notes_are_printed(report: Report) -> None:
    text = printed(replace(report, failures=[Failure("mine", "conv1", "differs [a lot]")], notes=["a note"]))
    assert "bug: mine at conv1, undone: differs [a lot]" in text and "note: a note" in text


def test_brackets_in_names_are_not_markup(report: Report) -> None:
    text = printed(replace(report, refusals=[Refused("mine", "blocks[0]", "padding [1, 1]")]))
    assert "blocks[0]" in text and "padding [1, 1]" in text


def test_a_merge_that_happened_often_is_one_line_with_its_worst_error(report: Report) -> None:
    twice = [Firing("mine", where, "exact", error) for where, error in (("a", 1e-15), ("b", 3e-12))]
    text = printed(replace(report, rewrites=[replace(each, macs=1500) for each in twice]))
    assert "3.0e-12" in text and "+3,000" in text and "1.0e-15" not in text


def test_the_summary_is_the_proof_in_a_sentence(report: Report) -> None:
    assert summary(report).startswith("proved equal on ") and "float64 difference" in summary(report)
    assert summary(replace(report, fixed_size=True)).endswith("holds at this input size only")
    unverified = replace(report, verification=None)
    assert summary(unverified) == "not verified" and unverified.max_error is None
    assert report.verification is not None
    low = replace(report, verification=replace(report.verification, max_error=None))
    assert "float64 difference" not in summary(low)
