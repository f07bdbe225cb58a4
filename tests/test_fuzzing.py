"""Does the fuzzer find what is wrong, make it small, and find nothing wrong in rgc?"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import rgc
from rgc import BatchNorm, Conv, Value, fuzzing, rewrite
from rgc.compiler import trace
from rgc.errors import InputError
from rgc.fuzzing import DTYPES, MADE, VOCABULARY, Setting, check_recipe, drawn, pass_sets
from rgc.ir import Input, Operator
from rgc.passes import ALL, OPT_IN
from rgc.recipe import Recipe, Step
from rgc.region import Join, Region
from rgc.testing import fuzz

#: Random models in ``make test``; thousands by ``python -m benchmarks.fuzz``.
EXAMPLES = 300


def of_layers(*constructors: str) -> Recipe:
    names = [f"m{index}" for index in range(len(constructors))]
    reads = ["x0", *(f"v{index}" for index in range(len(constructors)))]
    steps = [Step("{y0} = {m}({0})", (reads[i],), (reads[i + 1],), name) for i, name in enumerate(names)]
    layers = tuple(zip(names, constructors, strict=True))
    return Recipe((("x0", (2, 3, 6, 5)),), layers, (), tuple(steps), (reads[-1],), seed=1)


FOLDABLE = of_layers("nn.Conv2d(3, 4, 3)", "nn.BatchNorm2d(4)")


@pytest.mark.parametrize("part", range(3))
def test_random_models_stay_equal_under_every_set_of_passes_and_objective(part: int) -> None:
    tally = fuzz(EXAMPLES // 3, seed=part)
    assert not tally.faults, tally.faults[0].script
    assert tally.equal + tally.refused.total() + tally.unusable == EXAMPLES // 3
    assert tally.equal > 0.9 * tally.examples and tally.comparisons > 3 * tally.equal
    assert len(tally.firings) > 8 and len(tally.operators) > 12


def operators(kind: type[Operator] = Operator) -> Iterator[type[Operator]]:
    for each in kind.__subclasses__():
        yield from operators(each)
        if not inspect.isabstract(each) and each.__module__.startswith("rgc."):
            yield each


def test_the_vocabulary_is_every_operator_that_a_graph_can_hold() -> None:
    patterns = {Join, Region}  # what a rule matches, never what a graph holds
    assert len(VOCABULARY) + len(MADE) == len({*VOCABULARY, *MADE})
    assert {*VOCABULARY, *MADE, *patterns, Input} == set(operators())


def test_random_models_reach_every_operator_that_tracing_makes() -> None:
    missing = set(VOCABULARY)
    for index in range(300):
        recipe, _ = drawn(0, index)
        traced = trace(recipe.model(torch.float64), recipe.call(torch.float64))
        missing -= {type(value.op) for value in traced.graph.nodes()}
        if not missing:
            return
    pytest.fail(f"no random model has {', '.join(each.__name__ for each in missing)}: add a maker to rgc.recipe_steps")


def test_random_models_reach_every_operator_that_rewrites_make() -> None:
    missing = set(MADE)
    for index in range(400):
        recipe, _ = drawn(0, index)
        if "mean" not in recipe.source and "AdaptiveAvgPool" not in recipe.source:
            continue  # so that this takes seconds
        traced = trace(recipe.model(torch.float64), recipe.call(torch.float64), passes="all", objective="macs")
        missing -= {type(value.op) for value in traced.graph.nodes()}
        if not missing:
            return
    pytest.fail(f"no rewrite of a random model makes {', '.join(each.__name__ for each in missing)}")


def test_the_settings_reach_every_dtype_and_both_ways_of_calling() -> None:
    settings = [drawn(0, index)[1] for index in range(40)]
    assert {each.dtype for each in settings} == set(DTYPES) and {each.by_name for each in settings} == {True, False}


@pytest.mark.parametrize("dtype", sorted(set(DTYPES), key=str))
@pytest.mark.parametrize("by_name", [False, True])
def test_a_model_is_checked_in_its_own_dtype_and_called_as_it_was_compiled(dtype: torch.dtype, by_name: bool) -> None:
    tally = fuzzing.Tally()
    assert check_recipe(FOLDABLE, Setting(dtype=dtype, by_name=by_name), tally) is None
    assert tally.equal == 1 and tally.comparisons == 6 and list(tally.dtypes) == [str(dtype).removeprefix("torch.")]


def test_an_output_put_together_in_another_way_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapped(nn.Module):
        def __init__(self, compiled: rgc.CompiledModule) -> None:
            super().__init__()
            self.compiled, self.report = compiled, compiled.report

        def forward(self, x: torch.Tensor) -> Any:
            return [self.compiled(x)]

    monkeypatch.setattr(fuzzing, "compile", lambda *args, **options: Wrapped(rgc.compile(*args, **options)))
    found = check_recipe(FOLDABLE, Setting())
    assert found is not None and found.kind == "differs"


def test_a_model_that_overflows_in_its_own_dtype_is_no_model_to_compare() -> None:
    tally = fuzzing.Tally()
    large = Recipe((("x0", (2, 3)),), (), (), (Step("{y0} = {0} * 60000.0 * 60000.0", ("x0",), ("v0",)),), ("v0",))
    assert check_recipe(large, Setting(dtype=torch.float16), tally) is None
    assert (tally.unusable, tally.equal) == (1, 0)


def test_every_pass_is_left_out_of_some_set_and_each_set_is_one_that_compile_takes() -> None:
    sets = set(pass_sets())
    assert {"default", "all"} < sets and any(OPT_IN[0].name in each for each in sets)
    assert all({f"default,-{each.name}", f"all,-{each.name}"} < sets for each in ALL)
    assert {drawn(0, index)[1].objective for index in range(40)} == {"latency", "depth", "macs", "params"}


def test_a_rewrite_that_is_wrong_is_found_made_small_and_shown_by_a_program() -> None:
    @rewrite(lambda x, conv, bn: bn(conv(x)))
    def fold_twice(x: Value, conv: Conv, bn: BatchNorm) -> Value:
        return (bn.as_linear() @ bn.as_linear() @ conv)(x)

    tally = fuzz(25, seed=1, passes=[(fold_twice,)])
    assert {fault.kind for fault in tally.faults} <= {"failure of fold_twice", "raises NotEquivalentError"}
    assert tally.faults
    assert min(len(fault.recipe.steps) for fault in tally.faults) == 2, tally.faults[0].script


def spoiled(model: nn.Module, inputs: Any, **options: Any) -> rgc.CompiledModule:
    compiled = rgc.compile(model, inputs, **options)
    with torch.no_grad():
        for parameter in compiled.parameters():
            parameter.mul_(1 + 1e-6)
    return compiled


def test_a_small_difference_that_the_proof_has_missed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_recipe(FOLDABLE, Setting()) is None
    monkeypatch.setattr(fuzzing, "compile", spoiled)
    found = check_recipe(FOLDABLE, Setting())
    assert found is not None and found.kind == "differs" and "of the output's scale on a batch of 2" in found.reason


def test_a_source_model_that_has_changed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def changing(model: nn.Module, inputs: Any, **options: Any) -> rgc.CompiledModule:
        compiled = rgc.compile(model, inputs, **options)
        next(model.parameters()).data.view(-1)[0] += 1
        return compiled

    monkeypatch.setattr(fuzzing, "compile", changing)
    found = check_recipe(FOLDABLE, Setting())
    assert found is not None and (found.kind, found.reason) == ("changed", "the source model")


@pytest.mark.parametrize(("error", "kind"), [
    (InputError("no such model"), None), (ZeroDivisionError("oh"), "raises ZeroDivisionError"),
])  # fmt: skip
def test_a_refusal_is_counted_and_any_other_error_is_a_fault(
    error: Exception, kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(fuzzing, "compile", failing)
    tally = fuzzing.Tally()
    found = check_recipe(FOLDABLE, Setting(), tally)
    assert (found.kind if found else None) == kind
    assert (tally.refused.total() == 1) == (kind is None)


def test_a_fault_shows_as_a_program_with_the_way_of_compiling_and_the_reason() -> None:
    program = fuzzing.Fault(
        "differs", "by much", FOLDABLE, Setting("all,-collapse", "depth", dtype=torch.float32)
    ).script
    assert program.startswith("# differs: by much\n") and FOLDABLE.source in program
    assert "passes='all,-collapse', objective='depth', strict=False" in program and "torch.float32" in program
    compile(program, "<fault>", "exec")


def test_the_tally_says_what_was_seen_and_what_was_not() -> None:
    tally = fuzzing.Tally(examples=1)
    assert check_recipe(FOLDABLE, Setting(), tally) is None
    told = str(tally)
    assert told.startswith("1 models: 1 equal, 0 refused, 0 unusable, 0 faults")
    assert "fold_batchnorm 1" in told and "collapse" in tally.idle and "fold_batchnorm" not in tally.idle
    assert {"Upsample", "Pad"} < set(tally.undrawn) and "Conv" not in tally.undrawn
