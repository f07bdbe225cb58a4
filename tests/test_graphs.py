"""Does every model that is drawn run, and do the draws reach what a model may be made of?"""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, find, given, settings
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rgc.graphs import draw_recipe, recipes
from rgc.recipe import Recipe
from rgc.recipe_steps import Chooser


def drawn(seed: int) -> Recipe:
    return draw_recipe(Chooser(random.Random(seed).randint))


@settings(suppress_health_check=list(HealthCheck))
@given(recipes())
def test_a_drawn_model_runs_on_its_call_and_returns_a_finite_tensor(recipe: Recipe) -> None:
    with torch.no_grad():
        output = recipe.model(torch.float64)(*recipe.call(torch.float64))
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    assert tensors and not recipe.model().training


def test_the_draws_reach_every_form_of_a_model() -> None:
    found: Counter[str] = Counter()
    for seed in range(400):
        recipe = drawn(seed)
        layers = [step.layer for step in recipe.steps if step.layer is not None]
        found["several inputs"] += len(recipe.inputs) > 1
        found["several outputs"] += len(recipe.returned) > 1
        found["a dict"] += "{{" in recipe.structure
        found["tied weights"] += bool(recipe.ties)
        found["a shared layer"] += len(set(layers)) < len(layers)
        found["an overwritten value"] += recipe.overwrites
        found["a dead value"] += len(recipe.pruned().steps) < len(recipe.steps)
        found["an input returned"] += any(name in recipe.returned for name, _ in recipe.inputs)
        found["a value returned twice"] += len(set(recipe.returned)) < len(recipe.returned)
        found["a named tuple"] += "Pair(" in recipe.structure
        found["an ordered dict"] += "OrderedDict(" in recipe.structure
        found["a layer of two names"] += any(made.startswith("self.") for _, made in recipe.layers)
        found["a layer twice in a container"] += "] * 2)" in recipe.source
        found["a value read twice"] += max(Counter(n for s in recipe.steps for n in s.inputs).values(), default=0) > 1
        found[f"{len(recipe.inputs[0][1]) - 2} spatial axes"] += 1
    assert len(found) == 18 and min(found.values()) >= 10, found


def test_a_failing_model_shrinks_to_the_layer_that_fails() -> None:
    def has_a_norm(recipe: Recipe) -> bool:
        return "BatchNorm" in recipe.source

    chosen = settings(max_examples=2000, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    smallest = find(recipes(), has_a_norm, settings=chosen, random=random.Random(1))
    assert len(smallest.steps) <= 5 and len(smallest.inputs) == 1


@pytest.mark.parametrize("seed", range(5))
def test_the_same_draws_make_the_same_recipe(seed: int) -> None:
    assert drawn(seed) == drawn(seed)
