"""Do the examples of every built-in rewrite hold? They are its tests and its documentation."""

from __future__ import annotations

import pytest
from torch import nn

from rgc import Conv, Rewrite, Value, passes, rewrite
from rgc.testing import check

REWRITES = [each for each in (*passes.ALL, *passes.OPT_IN) if isinstance(each, Rewrite)]


@pytest.mark.parametrize("rewrite_", REWRITES, ids=lambda each: each.name)
def test_its_examples_hold(rewrite_: Rewrite) -> None:
    check(rewrite_, thorough=False)


@pytest.mark.parametrize("each", [*passes.ALL, *passes.OPT_IN], ids=lambda each: each.name)
def test_a_pass_states_its_algebra(each: Rewrite) -> None:
    assert len(each.statement.split()) > 5


def test_the_names_of_passes_are_those_of_their_files() -> None:
    import importlib

    for each in (*passes.ALL, *passes.OPT_IN):
        assert getattr(importlib.import_module(f"rgc.passes.{each.name}"), each.name) is each


def test_only_two_passes_need_a_fixed_size() -> None:
    assert {each.name for each in passes.ALL} - {each.name for each in passes.DEFAULT} == {"box_mean", "collapse"}


def test_what_costs_more_is_in_no_set() -> None:
    assert [each.name for each in passes.OPT_IN] == ["single_path"]
    assert not {each.name for each in passes.ALL} & {each.name for each in passes.OPT_IN}


def test_a_rewrite_may_be_checked_without_being_registered() -> None:
    @rewrite(lambda x, first, second: second(first(x)))
    def merge(x: Value, first: Conv, second: Conv) -> Value:
        return (second @ first)(x)

    @merge.fires_on(shape=(2, 3, 8, 8))
    def two_layers() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 1)).eval()

    @merge.leaves_alone(shape=(2, 3, 8, 8), because="border ring")
    def two_padded_layers() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)).eval()

    check(merge, thorough=False)
