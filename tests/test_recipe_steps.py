"""Does every maker draw calls that run, for each number of axes that it is meant for?"""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rgc import recipe_steps
from rgc.recipe_steps import BROADCAST, CHAINS, PAIRS, Chooser, Maker, makers

SHAPES = ((2, 4), (2, 4, 8), (2, 4, 6, 8), (2, 4, 4, 4, 6))
EVERY = sorted({maker for shape in SHAPES for maker in makers(shape)} | {maker for chain in CHAINS for maker in chain},
               key=lambda maker: maker.__name__)  # fmt: skip


def choose(seed: int) -> Chooser:
    return Chooser(random.Random(seed).randint)


def runs(code: str, layer: str | None, *shapes: tuple[int, ...]) -> bool:
    scope = {"torch": torch, "F": F, "nn": nn}
    names = [f"x{index}" for index in range(len(shapes))]
    values = {name: torch.randn(shape) for name, shape in zip(names, shapes, strict=True)}
    lines = code if "{y0}" in code else f"{{y0}} = {code}"
    try:
        with torch.no_grad():
            made = None if layer is None else eval(layer, dict(scope))
            exec(lines.format(*names, y0="y0", y1="y1", m="m"), {**scope, **values, "m": made})
    except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
        return False
    return True


@pytest.mark.parametrize("maker", EVERY, ids=lambda maker: maker.__name__)
def test_a_maker_draws_calls_that_mostly_run(maker: Maker) -> None:
    torch.manual_seed(0)
    fitting = [shape for shape in SHAPES if maker in makers(shape)] or [(2, 16, 6, 8)]
    for shape in fitting:
        made = [maker(choose(seed), shape) for seed in range(60)]
        found = [runs(each.code, each.layer, shape) for each in made]
        assert sum(found) > len(found) / 4, [m for m, ran in zip(made, found, strict=True) if not ran]


@pytest.mark.parametrize("code", [*PAIRS, *BROADCAST])
def test_every_meeting_of_two_values_runs(code: str) -> None:
    assert runs(code, None, (2, 4, 6), (2, 4, 6))
    assert code not in BROADCAST or runs(code, None, (2, 4, 6), (2, 4, 1))


def test_every_spelling_of_an_activation_runs() -> None:
    for code in recipe_steps._CALLS:
        assert runs(code, None, (2, 4, 6)), code
    for layer in recipe_steps._MODULES:
        assert runs("{m}({0})", layer, (2, 4, 6)), layer


def test_smaller_draws_are_simpler() -> None:
    least = Chooser(lambda low, high: low)
    assert least.pick(["first", "second"]) == "first" and not least.flag() and least.numbers(1, 3, 2) == (1, 1)
