"""Does the zoo make every model that it names, the same one for the same seed, and say what it does not know?"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

from rgc import models
from rgc.errors import InputError


@pytest.mark.parametrize("name", models.names())
def test_every_name_makes_a_model_with_an_example_input(name: str) -> None:
    with torch.device("meta"):
        model = models.create(name)
    assert isinstance(model, nn.Module)
    assert model.training
    (x,) = model.example_inputs()  # type: ignore[operator]  # every model of the zoo has this method
    assert x.shape[0] == 1 and x.is_meta


@pytest.mark.parametrize("name", [name for name in models.names() if "vanillanet" not in name])
def test_every_model_without_a_slope_to_read_traces_even_without_weights(name: str) -> None:
    with torch.device("meta"):
        model = models.create(name).eval()
    symbolic_trace(model)


def test_every_name_is_public_and_so_is_its_factory() -> None:
    assert set(models.names()) < set(models.__all__)
    assert all(hasattr(models, name) for name in models.__all__)
    assert len(set(models.names())) == len(models.names())


@pytest.mark.parametrize("spelling", ["repvgg_a0", "repvgg-a0", "RepVGG-A0", "repvgga0"])
def test_case_and_separators_do_not_matter(spelling: str) -> None:
    with torch.device("meta"):
        assert isinstance(models.create(spelling), models.RepVGG)


def test_options_go_to_the_factory() -> None:
    model = models.create("reducenet-20", num_classes=3, decay=1.0)
    assert isinstance(model, models.ReduceNet)
    assert model.fc.out_features == 3


def test_the_same_seed_makes_the_same_model() -> None:
    first, second = (_seeded(0), _seeded(0))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["fc.weight"], _seeded(1)["fc.weight"])


def test_an_example_input_is_always_the_same_and_leaves_the_random_state_alone() -> None:
    model = models.create("reducenet20")
    state = torch.get_rng_state()
    (first,), (second,) = model.example_inputs(), model.example_inputs()  # type: ignore[operator]
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("repvgg_a9", "did you mean repvgg_a"),
        ("reducenet", "did you mean reducenet"),
        ("bert", "the zoo has reducenet20,"),
    ],
)
def test_an_unknown_name_is_refused_with_a_suggestion(name: str, hint: str) -> None:
    with pytest.raises(InputError, match=f"no zoo model is named '{name}'; {hint}"):
        models.create(name)


def test_an_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="zoo model 'repvgg_a0': .*'depth'"):
        models.create("repvgg_a0", depth=3)


def _seeded(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return models.create("reducenet20").state_dict()
