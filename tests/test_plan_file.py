"""Does a plan come back from its file for the same model, and is every other file or model one line?"""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rgc
from rgc import BatchNorm, Conv, Plan, Value, rewrite
from rgc.errors import InputError
from rgc.testing import randomize

X = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))


@rewrite(lambda x, conv, bn: bn(conv(x)))
def my_fold(x: Value, conv: Conv, bn: BatchNorm) -> Value:
    """The fold of a user's own."""
    return (bn.as_linear() @ conv)(x)


def network() -> nn.Module:
    """With a layer in two places."""
    shared = nn.Conv2d(8, 8, 1)
    return randomize(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), shared, nn.ReLU(), shared, nn.Conv2d(8, 4, 1))
    )


def same(first: rgc.CompiledModule, second: rgc.CompiledModule) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return first.code == second.code and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def compiled() -> rgc.CompiledModule:
    torch.manual_seed(0)
    return rgc.compile(network(), X)


def test_a_plan_that_was_kept_decides_like_the_one_in_memory(compiled: rgc.CompiledModule, tmp_path: Path) -> None:
    compiled.plan.save(tmp_path / "plan.json")
    other = randomize(network(), seed=3)
    plan = Plan.load(tmp_path / "plan.json", other)
    assert plan.firings == compiled.plan.firings and plan.decisions.answers == compiled.plan.decisions.answers
    applied = plan.apply(other.state_dict())
    assert same(applied, compiled.plan.apply(other.state_dict()))
    assert same(applied, rgc.compile(other, X))
    applied.plan.save(tmp_path / "again.json")
    again, first = (json.loads((tmp_path / name).read_text()) for name in ("again.json", "plan.json"))
    # the example's values are not kept, only their range
    assert {**again, "example": None} == {**first, "example": None}


def test_a_plan_survives_pickle_torch_save_and_deepcopy(compiled: rgc.CompiledModule) -> None:
    file = io.BytesIO()
    torch.save(compiled, file)
    file.seek(0)
    other = randomize(network(), seed=4).state_dict()
    expected = compiled.plan.apply(other)
    for twin in (pickle.loads(pickle.dumps(compiled)), copy.deepcopy(compiled), torch.load(file, weights_only=False)):
        assert same(twin.plan.apply(other), expected)


def test_passes_of_a_user_are_kept_by_name_and_handed_in_again(tmp_path: Path) -> None:
    model = network()
    compiled = rgc.compile(model, X, passes=[my_fold])
    assert compiled.plan.firings == (("my_fold", "1"),)
    compiled.plan.save(tmp_path / "plan.json")
    with pytest.raises(InputError, match=r"uses the pass 'my_fold', which is none of rgc's own; hand it in"):
        Plan.load(tmp_path / "plan.json", model)
    assert same(Plan.load(tmp_path / "plan.json", model, [my_fold]).apply(model.state_dict()), compiled)
    assert pickle.loads(pickle.dumps(compiled.plan)).options.passes == [my_fold]


def test_an_example_of_any_structure_is_drawn_again_in_its_range(tmp_path: Path) -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(5, 3), nn.Linear(3, 2)

        def forward(self, tokens: Tensor, extra: dict[str, Any], scale: float = 2.0) -> Tensor:
            return self.layer(self.table(tokens) * scale + extra["more"][0].log())  # type: ignore[no-any-return]

    model = randomize(Many())
    tokens = torch.tensor([[0, 4, 3, 1], [2, 2, 0, 4]])
    given = {"tokens": tokens, "extra": {"more": [torch.rand(2, 4, 3) + 0.5]}, "scale": 0.5}
    plan = rgc.compile(model, given).plan
    plan.save(tmp_path / "plan.json")
    drawn = Plan.load(tmp_path / "plan.json", model).example
    own = plan.example.bind(model)
    found = drawn.bind(model)
    assert found["scale"] == 0.5 and found["tokens"].shape == tokens.shape and found["tokens"].dtype == tokens.dtype
    assert int(found["tokens"].min()) >= 0 and int(found["tokens"].max()) <= 4
    assert float(found["extra"]["more"][0].min()) >= float(own["extra"]["more"][0].min())
    Plan.load(tmp_path / "plan.json", model).apply(model.state_dict())


def wider(model: nn.Sequential) -> nn.Module:
    model[5] = nn.Conv2d(8, 5, 1)
    return model.eval()


def other_layer(model: nn.Sequential) -> nn.Module:
    model[3] = nn.Tanh()
    return model.eval()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (wider, r"of its tensors, '5.weight' is float32\[4, 8, 1, 1\] in the plan and float32\[5, 8, 1, 1\]"),
        (other_layer, "of its layers, '3' is torch.nn.modules.activation.ReLU in the plan and .*Tanh"),
        (lambda model: model.double(), r"is float32\[8, 3, 3, 3\] in the plan and float64"),
        (lambda model: model[:5].eval(), "'5' is torch.nn.modules.conv.Conv2d in the plan and nothing"),
        (lambda model: model.train(), "is in training mode"),
        (lambda model: 7, "a plan is read for a torch.nn.Module, not int"),
    ],
)
def test_another_model_is_refused_with_the_first_difference(
    compiled: rgc.CompiledModule, tmp_path: Path, change: Callable[[Any], Any], reason: str
) -> None:
    compiled.plan.save(tmp_path / "plan.json")
    with pytest.raises(InputError, match=reason):
        Plan.load(tmp_path / "plan.json", change(network()))


def test_what_another_geometry_changes_is_told_when_it_is_applied(compiled: rgc.CompiledModule, tmp_path: Path) -> None:
    compiled.plan.save(tmp_path / "plan.json")
    model = network()
    assert isinstance(model, nn.Sequential)
    model[0].stride = (2, 2)
    with pytest.raises(rgc.NotEquivalentError, match=r"does not hold|allows what the plan has not decided"):
        Plan.load(tmp_path / "plan.json", model).apply(model.state_dict())


def edited(content: dict[str, Any], *path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(content)
    inner = changed
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("format",), "certificate", "is no plan of rgc compile; write one with --save-plan"),
        (("version",), 2, "is a plan of version 2, this rgc reads version 1"),
        (("options", "passes"), ["os.system"], "uses the pass 'os.system'"),
        (("options", "passes"), ["/tmp/evil.py"], "uses the pass '/tmp/evil.py'"),
        (("options", "passes"), "all", "damaged: its passes is of another kind"),
        (("options", "objective"), "speed", "its objective is 'speed'"),
        (("options", "strict"), 1, "its strict is of another kind"),
        (("options", "limits"), {"nodes": -1}, "the limit nodes=-1"),
        (("options", "limits"), {"sides": 1}, "limits of other names"),
        (("options", "dtype"), "int64", "its dtype is 'int64'"),
        (("example", "args"), {"tensor": [1], "dtype": "float32", "low": 0, "high": 1}, "its example is no call"),
        (("example", "args"), {"tuple": [[1]]}, "holds a bare list"),
        (("example", "args"), {"tuple": [{"set": [1]}]}, "holds something unknown"),
        (
            ("example", "args"),
            {"tuple": [{"tensor": [2**40, 2**40], "dtype": "float32", "low": 0, "high": 1}]},
            "no possible shape",
        ),
        (
            ("example", "args"),
            {"tuple": [{"tensor": [1], "dtype": "float32", "low": 2, "high": 1}]},
            "no possible range",
        ),
        (("decisions",), [["fold", "a", "b"]], "a row of 3 columns instead of 4"),
        (("firings",), {"a": 1}, "its firings is of another kind"),
        (("target",), None, "its target is missing"),
        (("model",), [], "in the place of a dict"),
    ],
)
def test_a_damaged_plan_is_one_line(
    compiled: rgc.CompiledModule, tmp_path: Path, path: tuple[str, ...], value: Any, reason: str
) -> None:
    file = tmp_path / "plan.json"
    compiled.plan.save(file)
    file.write_text(json.dumps(edited(json.loads(file.read_text()), *path, value=value)))
    with pytest.raises(InputError, match=reason) as raised:
        Plan.load(file, network())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"format": "rgc plan"', b"1e999"])
def test_what_is_no_plan_at_all_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(InputError, match="is no JSON|is no plan"):
        Plan.load(tmp_path / "plan.json", network())
    with pytest.raises(InputError, match="cannot be read"):
        Plan.load(tmp_path / "none.json", network())


def test_a_damaged_byte_is_refused_or_changes_nothing_but_a_name(compiled: rgc.CompiledModule, tmp_path: Path) -> None:
    file, draw, model = tmp_path / "plan.json", random.Random(0), network()
    compiled.plan.save(file)
    whole = file.read_bytes()
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] = draw.randrange(256)
        file.write_bytes(damaged)
        try:
            Plan.load(file, model)
        except InputError as error:
            refused += "\n" not in str(error)
    assert refused > 60


def test_a_place_that_cannot_be_written_is_one_line(compiled: rgc.CompiledModule, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        compiled.plan.save(tmp_path / "nowhere" / "plan.json")
