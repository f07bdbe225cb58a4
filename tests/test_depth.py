"""The benchmark of depth sees every pair that is left, and why."""

from __future__ import annotations

from torch import nn

from benchmarks.depth import kind_of, linear_operators, pairs_left, traced
from benchmarks.latency import Entry


def test_a_pair_that_cannot_merge_is_left_with_its_reason() -> None:
    def padded_twice() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5)).eval()

    found = traced(Entry(padded_twice, (3, 8, 8)), "depth")
    (pair,) = pairs_left(found)
    assert linear_operators(found.original) == 3 and linear_operators(found.graph) == 2
    assert [kind_of(reason) for reason in pair.reasons] == ["border ring"]


def test_what_merges_or_is_apart_is_no_pair() -> None:
    def apart() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 3)).eval()

    found = traced(Entry(apart, (3, 8, 8)), "depth")
    assert linear_operators(found.graph) == 2 and not list(pairs_left(found))


def test_a_kind_names_no_layer() -> None:
    assert kind_of("conv 3x3 64->128 /2 reads more than one position at a time") == (
        "a layer reads more than one position at a time"
    )
    assert kind_of("saves nothing: stem.0 is also used elsewhere") == "saves nothing"
