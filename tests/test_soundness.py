"""Is a module from a file, whatever its pickle filled it with, found out in one line before PyTorch trips over it?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rgc
from rgc.errors import InputError
from rgc.limits import Limits
from rgc.loading import load_model
from rgc.soundness import require_sound


def set_entry(attribute: str, name: Any, part: Any) -> Callable[[nn.Module], None]:
    return lambda module: module.__dict__[attribute].__setitem__(name, part)


def set_attribute(name: str, value: Any) -> Callable[[nn.Module], None]:
    return lambda module: module.__dict__.__setitem__(name, value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (set_attribute("_modules", [nn.ReLU()]), "lacks its modules"),
        (lambda module: module.__dict__.pop("_parameters"), "lacks its parameters"),
        (set_attribute("_buffers", None), "lacks its buffers"),
        (set_attribute("training", 0), "is in training mode '0'"),
        (set_attribute("_forward_hooks", 3), "lacks its forward_hooks"),
        (set_entry("_modules", "a.b", nn.ReLU()), "names one of its modules 'a.b'"),
        (set_entry("_modules", "", nn.ReLU()), "names one of its modules ''"),
        (set_entry("_modules", 3, nn.ReLU()), "names one of its modules '3'"),
        (set_entry("_buffers", "a\nb", torch.zeros(1)), r"names one of its buffers 'a\\nb'"),
        (set_entry("_modules", "weight", nn.ReLU()), "has two parts of the name 'weight'"),
        (set_entry("_buffers", "weight", torch.zeros(1)), "has two parts of the name 'weight'"),
        (set_entry("_parameters", "scale", torch.zeros(1)), "keeps a Tensor as 'scale' among its parameters"),
        (set_entry("_modules", "inner", 7), "keeps a int as 'inner' among its modules"),
    ],
)
def test_a_damaged_module_is_called_by_its_path(
    tmp_path: Path, damage: Callable[[nn.Module], None], message: str
) -> None:
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(2, 2)))
    damage(model[1][0])  # type: ignore[index]  # a Sequential inside a Sequential
    with pytest.raises(InputError, match=rf"model.pt: is damaged: its layer '1.0' \(Linear\) {message}"):
        require_sound("model.pt", model, Limits())


def test_a_module_that_contains_itself_is_refused_from_a_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Sequential())
    model[0].add_module("up", model)
    torch.save(model, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"model.pt: the layer '0.up' contains itself"):
        load_model(str(tmp_path / "model.pt"))


def test_a_module_with_shared_empty_and_missing_parts_is_sound() -> None:
    layer = nn.Linear(2, 2, bias=False)
    require_sound("model.pt", nn.Sequential(layer, layer, nn.Sequential()), Limits())


@pytest.mark.parametrize("size", [(-1, 3, 3), "abc", (3, 1.5, 2), (2**30, 2**30, 3), 7, (3,)])
def test_an_input_size_that_a_file_claims_is_not_taken_at_its_word(size: Any) -> None:
    from rgc.cli_options import example_for

    model = nn.Sequential(nn.ReLU()).eval()
    model.default_cfg = {"input_size": size}  # type: ignore[assignment]  # as timm keeps it
    with pytest.raises(InputError, match="cannot tell what Sequential takes"):
        example_for(model, [])


def test_example_inputs_that_a_file_put_there_may_raise_anything() -> None:
    model = nn.Sequential(nn.ReLU()).eval()
    model.example_inputs = torch.nn.functional.relu  # type: ignore[assignment]  # what an allowed pickle can mention
    with pytest.raises(InputError, match=r"example_inputs\(\) of Sequential raised TypeError"):
        rgc.compile(model)
