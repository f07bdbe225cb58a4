"""Are a user's inputs cut into calls that the model takes, with every sample in one, and refused where none fits?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rgc.data import samples_of
from rgc.errors import InputError
from rgc.example import Example


class Two(nn.Module):
    """An image batch, a table that every sample shares, one number a sample, and a constant."""

    def forward(self, x: Tensor, table: Tensor, scale: Tensor, mode: str = "sum") -> Tensor:
        return x * table.sum() * scale[:, None]


EXAMPLE = Example((torch.zeros(2, 5), torch.zeros(7, 7)), {"scale": torch.zeros(2)})


@pytest.mark.parametrize(
    ("count", "calls"), [(1, [(0, 0)]), (2, [(0, 1)]), (4, [(0, 1), (2, 3)]), (5, [(0, 1), (2, 3), (3, 4)])]
)
def test_calls_are_as_large_as_the_example_and_hold_every_sample(count: int, calls: list[tuple[int, int]]) -> None:
    x, table, scale = torch.randn(count, 5), torch.randn(7, 7), torch.randn(count)
    samples = samples_of((x, table, scale), EXAMPLE, Two())
    assert [(sample.first, sample.last) for sample in samples] == calls
    for sample in samples:
        found = sample.example.bind(Two())
        assert torch.equal(found["x"], x[sample.first : sample.last + 1])
        assert torch.equal(found["scale"], scale[sample.first : sample.last + 1])
        assert torch.equal(found["table"], table)


def test_what_has_no_axis_of_samples_is_never_cut_even_where_its_length_is_the_number_of_samples() -> None:
    samples = samples_of((torch.randn(7, 5), torch.ones(7, 7), torch.randn(7)), EXAMPLE, Two())
    assert all(sample.example.args[1].shape == (7, 7) for sample in samples)
    assert all(single.example.args[1].shape == (7, 7) for sample in samples for single in sample.singles())


def test_each_sample_of_a_call_can_stand_alone_under_its_own_number() -> None:
    x = torch.randn(5, 5)
    last = samples_of((x, torch.ones(7, 7), torch.ones(5)), EXAMPLE, Two())[-1]
    assert [single.name for single in last.singles()] == ["sample 3 of the data", "sample 4 of the data"]
    assert last.name == "samples 3 to 4 of the data"
    assert torch.equal(last.singles()[1].example.args[0], x[4:])


@pytest.mark.parametrize("given", ["tensor", "tuple", "list", "dict"])
def test_data_come_in_every_form_of_an_example(given: str) -> None:
    x = torch.randn(3, 4)
    data: Any = {"tensor": x, "tuple": (x,), "list": [x], "dict": {"input": x}}[given]
    samples = samples_of(data, Example((torch.zeros(1, 4),)), nn.Linear(4, 2))
    assert [sample.example.tensors[0].tolist() for sample in samples] == [x[i : i + 1].tolist() for i in range(3)]


def test_floats_may_have_another_precision_and_keep_it() -> None:
    (sample,) = samples_of(torch.randn(1, 4).double(), Example((torch.zeros(1, 4),)), nn.Linear(4, 2))
    assert sample.example.tensors[0].dtype == torch.float64


def test_a_structure_inside_an_argument_is_kept() -> None:
    class Nested(nn.Module):
        def forward(self, parts: dict[str, Any]) -> Tensor:
            return parts["a"] + parts["rest"][0]  # type: ignore[no-any-return]

    def made(count: int) -> dict[str, Any]:
        return {"parts": {"a": torch.ones(count, 2), "rest": [torch.ones(count, 2)]}}

    samples = samples_of(made(3), Example((), made(1)), Nested())
    assert [sample.example.args[0].keys() for sample in samples] == 3 * [{"a", "rest"}]
    with pytest.raises(InputError, match="'parts' in another structure"):
        samples_of({"parts": {"a": torch.ones(3, 2)}}, Example((), made(1)), Nested())


def nan() -> Tensor:
    x = torch.randn(3, 5)
    x[1, 2] = float("nan")
    return x


TABLE, SCALE = torch.ones(7, 7), torch.ones(3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ((torch.ones(3, 5), TABLE), "the data do not fit Two.forward: missing a required argument: 'scale'"),
        ((torch.ones(3, 5), TABLE, SCALE, "sum"), r"calls of different arguments \(mode\)"),
        ((torch.ones(3, 5), TABLE, torch.ones(4)), "different numbers of samples: 3, 4"),
        ((torch.ones(0, 5), TABLE, torch.ones(0)), "the data have no samples"),
        ((torch.ones(3, 5, 5), TABLE, SCALE), r"'x' with 3 axes \(3x5x5\); the example has 2 \(2x5\)"),
        ((torch.ones(3, 5).long(), TABLE, SCALE), "'x' in torch.int64; the example has torch.float32"),
        ((torch.ones(3, 5), torch.ones(3, 7), SCALE), "'table' of 3x7; it has no axis of samples and is 7x7"),
        ((torch.ones(3, 5), 7, SCALE), "'table' as int; the example has a tensor there"),
        ((nan(), TABLE, SCALE), r"the data hold NaN \('x', sample 1\)"),
        ((torch.ones(3, 5), TABLE, SCALE, "mean", 1), "the data do not fit Two.forward: too many"),
    ],
)
def test_data_that_do_not_fit_are_refused_with_what_was_found(data: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        samples_of(data, EXAMPLE, Two())


def test_a_constant_of_the_example_is_one_of_the_data() -> None:
    example = Example(EXAMPLE.args, {**EXAMPLE.kwargs, "mode": "sum"})
    data = {"x": torch.ones(3, 5), "table": TABLE, "scale": SCALE, "mode": "sum"}
    assert len(samples_of(data, example, Two())) == 2
    with pytest.raises(InputError, match="another 'mode' than the example"):
        samples_of({**data, "mode": "mean"}, example, Two())
