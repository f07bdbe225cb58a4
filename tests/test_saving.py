"""Do rgc.save and rgc.load give back the model, and does nothing wrong ever reach the disk?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import rgc
from rgc.errors import InputError, NotEquivalentError


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    norm = made[1]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(norm.weight, -1.5, 1.5)
    nn.init.normal_(norm.bias)
    return made


@pytest.mark.parametrize("name", ["model.pt2", "model.onnx", "folder/"])
def test_what_is_saved_comes_back_and_computes_the_same(model: nn.Module, tmp_path: Path, name: str) -> None:
    x = torch.randn(2, 3, 12, 12)
    compiled = rgc.compile(model, x)
    rgc.save(compiled, f"{tmp_path}/{name}")
    loaded = rgc.load(f"{tmp_path}/{name}", trust=name.endswith("/"))
    y = torch.randn(3, 3, 9, 17)  # another batch, another size: both are free
    found = loaded(y)
    torch.testing.assert_close(found[0] if isinstance(found, list) else found, model(y), rtol=1e-5, atol=1e-5)


def test_an_artifact_that_differs_from_the_original_is_not_written(model: nn.Module, tmp_path: Path) -> None:
    compiled = rgc.compile(model, torch.randn(2, 3, 12, 12))
    weight = next(compiled.parameters())
    weight.data[0, 0, 0, 0] += 0.5
    with pytest.raises(NotEquivalentError, match="the written file differs"):
        rgc.save(compiled, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_loaded_only_with_trust(model: nn.Module, tmp_path: Path) -> None:
    rgc.save(rgc.compile(model, torch.randn(2, 3, 12, 12)), f"{tmp_path}/folder/")
    with pytest.raises(InputError, match="runs its"):
        rgc.load(tmp_path / "folder")


def test_a_protected_file_is_never_overwritten(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"the user's own")
    with pytest.raises(InputError, match="would overwrite"):
        rgc.save(rgc.compile(model, torch.randn(2, 3, 12, 12)), path, protect=[path])
    assert path.read_bytes() == b"the user's own"


def test_another_checkpoint_goes_through_the_same_plan(model: nn.Module) -> None:
    x = torch.randn(2, 3, 12, 12)
    compiled = rgc.compile(model, x)
    other = {name: t + 0.25 if t.is_floating_point() else t for name, t in model.state_dict().items()}
    applied = compiled.plan.apply(other).state_dict()
    model.load_state_dict(other)
    afresh = rgc.compile(model, x).state_dict()
    assert list(applied) == list(afresh)
    assert all(torch.equal(applied[name], afresh[name]) for name in afresh)


def test_a_checkpoint_for_which_a_decision_no_longer_holds_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.PReLU(init=1.0), nn.Conv2d(4, 4, 1)).eval()
    compiled = rgc.compile(model, torch.randn(1, 3, 8, 8))
    changed = {**model.state_dict(), "1.weight": torch.tensor([0.5])}
    expected = "remove_linear_activation at 1 does not hold for this checkpoint.*negative slope is 0.5"
    with pytest.raises(NotEquivalentError, match=expected):
        compiled.plan.apply(changed)


def test_a_checkpoint_of_another_shape_is_refused_in_one_line(model: nn.Module) -> None:
    compiled = rgc.compile(model, torch.randn(2, 3, 12, 12))
    with pytest.raises(InputError, match="the checkpoint does not fit the model") as raised:
        compiled.plan.apply({"0.weight": torch.zeros(1)})
    assert "\n" not in str(raised.value)
