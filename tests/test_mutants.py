"""Are faults planted where they say, and taken out again; and does the proof refuse a sample of them?"""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks.mutation import FILES, all_mutants, compiled_again, corpus, sample, verdict_on
from rgc import engine
from rgc.mutants import Mutant, Observed, mutants_of, observed, planted

SOURCE = '''
"""Words that are no code: 1 + 1."""

LIMIT = 3 + 4


def require(condition, reason):
    if not condition:
        raise ValueError(reason)


def area(width: int, height: int = 2 + 1) -> int:
    """Nor are these: 2 * 3."""
    require(width > 0, f"a width of {width + 0} is none")
    return width * height


def twice(function):
    def both(x):
        return function(function(x) + 1)
    return both


@twice
def shifted(x):
    return x - 5


def capped(x, left, right):
    return max(left, right) if x is not None and x < 3 else -left


class Box:
    def __init__(self, stride):
        self.stride = stride
        self.dilation = 7

    def step(self, scale=2):
        return pow(self.stride, scale, mod=None) @ self if False else self.stride
'''


@pytest.fixture
def module(tmp_path: Path) -> Iterator[ModuleType]:
    path = tmp_path / "to_be_mutated.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("to_be_mutated", path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    yield found
    del sys.modules[spec.name]


def mutants(module: ModuleType, function: str) -> dict[str, Mutant]:
    assert module.__file__ is not None
    return {each.change: each for each in mutants_of(module.__file__) if each.function == function}


def test_only_what_runs_in_functions_is_mutated(module: ModuleType) -> None:
    assert module.__file__ is not None
    found = mutants_of(module.__file__)
    assert {each.function for each in found} == {
        "require", "area", "twice.both", "shifted", "capped", "Box.__init__", "Box.step",
    }  # fmt: skip
    arithmetic = {each.change for each in found if each.kind in ("arithmetic", "term") and each.function == "area"}
    assert arithmetic == {
        f"`width * height`{how}" for how in (": `*` becomes `+`", " becomes `width`", " becomes `height`")
    }
    assert len({(each.place, each.way) for each in found}) == len(found)


@pytest.mark.parametrize(
    ("function", "change", "call", "before", "after"),
    [
        ("area", "`width * height`: `*` becomes `+`", lambda m: m.area(4), 12, 7),
        ("area", "`width * height` becomes `height`", lambda m: m.area(4), 12, 3),
        ("area", "`>` becomes `>=`", lambda m: m.area(4), 12, 12),
        ("shifted", "`x - 5` is turned around", lambda m: m.shifted(1), -8, 5 - (5 - 1 + 1)),
        ("shifted", "`5` becomes `6`", lambda m: m.shifted(1), -8, -10),
        ("twice.both", "`1` becomes `0`", lambda m: m.shifted(1), -8, -9),
        ("capped", "`and` becomes `or`", lambda m: m.capped(5, 1, 2), -1, 2),
        ("capped", "`x < 3` is dropped", lambda m: m.capped(5, 1, 2), -1, 2),
        ("capped", "`is not` becomes `is`", lambda m: m.capped(1, 1, 2), 2, -1),
        ("capped", "always `max(left, right)`", lambda m: m.capped(5, 1, 2), -1, 2),
        ("capped", "`-left` loses its sign", lambda m: m.capped(5, 1, 2), -1, 1),
        ("capped", "`left` becomes `right`", lambda m: m.capped(1, 1, 2), 2, 2),
        ("Box.step", "`self.stride` becomes `self.dilation`", lambda m: m.Box(3).step(), 3, 7),
    ],
)
def test_a_fault_is_there_while_it_is_planted_and_gone_after(
    module: ModuleType, function: str, change: str, call: Callable[[Any], Any], before: Any, after: Any
) -> None:
    assert module.__file__ is not None
    same = [each for each in mutants_of(module.__file__) if (each.function, each.change) == (function, change)]
    assert call(module) == before
    found = []
    for mutant in same:  # the last of several places is the one that runs
        with planted(mutant):
            found.append(call(module))
        assert call(module) == before
    assert after in found


def test_a_guard_is_dropped_whole(module: ModuleType) -> None:
    (guard,) = (each for change, each in mutants(module, "area").items() if change.endswith("is dropped"))
    with planted(guard):
        assert module.area(-1) == -3
    with pytest.raises(ValueError, match="a width of -1 is none"):
        module.area(-1)


def test_a_fault_is_taken_out_even_where_what_runs_it_raises(module: ModuleType) -> None:
    with pytest.raises(KeyError), planted(mutants(module, "shifted")["`5` becomes `6`"]):
        raise KeyError
    assert module.shifted(1) == -8


def test_what_no_function_runs_cannot_be_planted(module: ModuleType) -> None:
    mutant = mutants(module, "shifted")["`5` becomes `6`"]
    del module.shifted, module.twice
    with pytest.raises(LookupError, match="no live function runs this line"), planted(mutant):
        pass


def test_observing_counts_the_values_that_a_fault_would_change_and_changes_none(module: ModuleType) -> None:
    with observed(mutants(module, "area")["`width * height`: `*` becomes `+`"]) as found:
        assert [module.area(width, 2) for width in (1, 2, 3)] == [2, 4, 6]
    assert found == Observed(evaluations=3, differences=2)
    with observed(mutants(module, "require")["`if not condition` is negated"]) as found:
        assert module.area(5) == 15
    assert found == Observed(1, 1)
    guard = next(each for change, each in mutants(module, "area").items() if change.endswith("is dropped"))
    with observed(guard) as found:
        assert module.area(5) == 15
        with pytest.raises(ValueError, match="a width of -5"):
            module.area(-5)
    assert found == Observed(2, 1)
    assert not any(name.startswith("__observed") for name in vars(module))


def test_a_fault_that_raises_has_another_value_and_tensors_are_compared_bit_for_bit() -> None:
    found = Observed()
    assert found(lambda: 1, lambda: {}["missing"]) == 1 and found == Observed(1, 1)
    for other, differences in ((torch.ones(2), 0), (torch.ones(2).double(), 1), (torch.ones(3), 1), (1.0, 1)):
        found = Observed()
        found(lambda: [torch.ones(2)], lambda other=other: [other])
        assert found == Observed(1, differences)


# --- a sample of the faults of rgc itself; all by ``python -m benchmarks.mutation`` ---------------------------

#: A file that is mutated, and a rewrite on whose examples it is tried.
TRIED = {
    "algebra": "merge_stage", "axis": "merge_stage", "kernels": "absorb_residual", "region": "merge_branches",
    "rearrange": "merge_rearrangement", "fold_batchnorm": "fold_batchnorm", "fold_scale": "fold_scale",
    "drop_identity": "drop_identity", "merge_pointwise": "merge_pointwise", "fold_border": "fold_border",
    "remove_linear_activation": "remove_linear_activation", "exchange_max_pool": "exchange_max_pool",
}  # fmt: skip


def models_for(rewrite: str, most: int = 2) -> list[int]:
    return [index for index, subject in enumerate(corpus()) if subject.name.startswith(f"{rewrite}: ")][:most]


def running(file: str, models: list[int]) -> Iterator[Mutant]:
    """The mutants of a file in some order, those that do not run on the first of the models left out."""
    pool = [mutant for mutant in all_mutants() if Path(mutant.path).stem == file]
    random.Random(file).shuffle(pool)
    compiled_again(models[0])  # what runs only the first time runs before
    for mutant in pool:
        with observed(mutant) as found:
            compiled_again(models[0])
        if found.evaluations:
            yield mutant


@pytest.mark.parametrize("file", TRIED)
def test_a_fault_of_rgc_is_refused_or_changes_no_function(file: str) -> None:
    models = models_for(TRIED[file])
    verdict = verdict_on(next(running(file, models)), models)
    assert verdict.status in ("refused", "harmless"), verdict


def test_a_fault_that_is_refused_survives_in_a_compiler_without_a_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    (mutant,) = (
        m for m in all_mutants() if m.function == "drop_zero" and "or 1 not in" in m.change and m.kind == "guard"
    )
    models = [i for i in models_for("drop_identity", most=20) if corpus()[i].name.endswith("its size elsewhere")]
    assert verdict_on(mutant, models).status == "refused"
    monkeypatch.setattr(engine, "check_firing", lambda *args, **options: 0.0)
    monkeypatch.setattr(sys.modules["rgc.verify"], "output_difference", lambda *args: 0.0)
    assert verdict_on(mutant, models).status == "survivor"


def test_the_sample_of_the_benchmark_is_the_same_every_time_and_has_every_file() -> None:
    chosen = sample(all_mutants(), 100, seed=0)
    assert chosen == sample(all_mutants(), 100, seed=0) != sample(all_mutants(), 100, seed=1)
    assert {mutant.path for mutant in chosen} == set(FILES) and len(all_mutants()) > 2000
