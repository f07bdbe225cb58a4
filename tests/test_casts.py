"""Is a constant in the form of a tensor a constant, and does a copy or cast go only where it changes nothing?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rgc
from rgc.example import output_difference
from rgc.testing import randomize

Body = Callable[[Any, Tensor], Any]


class Model(nn.Module):
    """Two layers, a constant per channel, and what stands between."""

    table: Tensor

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.register_buffer("table", torch.tensor([0.5, -1.5, 2.0, 0.25]).reshape(4, 1, 1))
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def compiled_equal(body: Body, dtype: torch.dtype = torch.float32, **options: Any) -> rgc.CompiledModule:
    torch.manual_seed(0)
    model = randomize(Model(body)).to(dtype)
    compiled = rgc.compile(model, torch.randn(2, 4, 7, 6).to(dtype), **options)
    assert not compiled.report.failures and not compiled.report.fixed_size
    for shape in ((2, 4, 7, 6), (1, 4, 9, 5)):
        x = torch.randn(shape).to(dtype)
        with torch.no_grad():
            expected, found = model(x.clone()), compiled(x.clone())
        assert output_difference(expected, found) < (1e-2 if dtype == torch.float16 else 1e-5)
    return compiled


def ops(body: Body, **options: Any) -> dict[str, int]:
    return dict(compiled_equal(body, **options).report.ops_after)


CONSTANTS: list[Body] = [
    lambda m, x: x * m.table.type_as(x),
    lambda m, x: x + m.table.to(x.dtype),
    lambda m, x: x * m.table.to(dtype=x.dtype),
    lambda m, x: x * m.table.to(x.device, x.dtype),
    lambda m, x: x - m.table.to(x),
    lambda m, x: x - m.table.type_as(other=x),
    lambda m, x: x * m.table.double().type(x.dtype),
    lambda m, x: x * m.table.expand_as(x),
    lambda m, x: m.table.expand_as(x) - x,
    lambda m, x: x + m.table.squeeze().type_as(x).reshape(1, -1, 1, 1),
    lambda m, x: x * x.new_tensor([1.0, 2.0, -1.0, 0.5]).view(4, 1, 1),
    lambda m, x: x * x.new_full((4, 1, 1), 0.5) + x.new_ones(1),
    lambda m, x: x * torch.full((4, 1, 1), 2.5, dtype=x.dtype, device=x.device),
    lambda m, x: x * torch.linspace(-1, 1, 4, dtype=x.dtype, device=x.device)[:, None, None],
]


@pytest.mark.parametrize("body", CONSTANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_in_the_form_of_a_tensor_goes_into_the_layers_around_it(body: Body, dtype: torch.dtype) -> None:
    compiled = compiled_equal(lambda m, x: torch.relu(m.second(body(m, m.first(x)))), dtype, objective="depth")
    assert dict(compiled.report.ops_after) == {"Conv2d": 1, "ReLU": 1}
    assert "device" not in compiled.code and "dtype" not in compiled.code
    assert {each.dtype for each in (*compiled.parameters(), *compiled.buffers()) if each.is_floating_point()} == {dtype}


def test_a_constant_that_stays_moves_and_is_cast_with_the_model() -> None:
    """An add behind an activation is no part of any layer, and its constant is a buffer."""
    compiled = compiled_equal(lambda m, x: torch.relu(m.first(x)) * m.table.to(x.device, x.dtype))
    assert dict(compiled.report.ops_after) == {"Conv2d": 1, "ReLU": 1, "mul": 1}
    compiled.to(torch.float64)
    assert compiled(torch.randn(1, 4, 5, 5, dtype=torch.float64)).dtype == torch.float64
    compiled.to("meta")
    assert compiled(torch.empty(1, 4, 5, 5, dtype=torch.float64, device="meta")).device.type == "meta"


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (lambda m, x: x + torch.zeros_like(x), "zeros_like"),  # of the size of x
        (lambda m, x: x * m.table.expand_as(x).flatten(1).mean(), "expand_as"),  # which the mean sees
        (lambda m, x: torch.cat([x, m.table.expand_as(x)], 1), "expand_as"),
    ],
)
def test_what_depends_on_the_size_as_well_stays(body: Body, kept: str) -> None:
    assert kept in ops(lambda m, x: torch.relu(body(m, m.first(x))))


def test_a_constant_is_not_broadcast_where_expanding_it_makes_the_result_larger() -> None:
    """c.expand_as(x) beside a tensor of one position has the size of x."""
    found = ops(lambda m, x: m.first(x).mean((2, 3), keepdim=True).relu() * m.table.expand_as(x))
    assert found["expand_as"] == 1


def overwritten(m: Any, x: Tensor) -> Tensor:
    zeros = torch.zeros(4, 1, 1, dtype=x.dtype)
    zeros += m.table
    return x * zeros


def assigned(m: Any, x: Tensor) -> Tensor:
    mask = x.new_ones(4, 1, 1)
    mask[1] = 0.5
    return x * mask


@pytest.mark.parametrize("body", [overwritten, assigned])
def test_a_new_tensor_may_be_overwritten(body: Body) -> None:
    compiled_equal(lambda m, x: torch.relu(body(m, m.first(x))))


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": lambda x: x.clone(),
    "torch.clone": torch.clone,
    "detach": lambda x: x.detach(),
    "positive": lambda x: +x,
    "torch.positive": torch.positive,
    "to its own dtype": lambda x: x.to(x.dtype),
}


@pytest.mark.parametrize("copy", list(COPIES))
def test_a_copy_that_changes_nothing_is_not_there(copy: str) -> None:
    found = ops(lambda m, x: torch.relu(m.second(COPIES[copy](m.first(x)))), objective="depth")
    assert found == {"Conv2d": 1, "ReLU": 1}


def test_a_copy_that_no_pass_removes_is_made() -> None:
    found = ops(lambda m, x: torch.relu(m.second(m.first(x).clone())), passes=[])
    assert found == {"Conv2d": 2, "clone": 1, "ReLU": 1}


def written_to_a_copy(copy: Callable[[Tensor], Tensor]) -> Body:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.first(x)
        z = copy(y)
        z.mul_(2).add_(m.table)
        return torch.relu(y - 3 * z)

    return body


def written_to_the_original(copy: Callable[[Tensor], Tensor]) -> Body:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.first(x)
        z = copy(y)
        y.mul_(2).add_(m.table)
        return torch.relu(y - 3 * z)

    return body


@pytest.mark.parametrize("written", [written_to_a_copy, written_to_the_original])
@pytest.mark.parametrize("copy", list(COPIES))
def test_a_write_reaches_what_shares_the_memory_and_nothing_else(copy: str, written: Any) -> None:
    """A clone has memory of its own; the others are the very tensor by another name."""
    assert ops(written(COPIES[copy]), objective="depth") == {"Conv2d": 1, "ReLU": 1}


def test_a_clone_that_makes_a_view_possible_stays() -> None:
    found = ops(lambda m, x: torch.relu(m.first(x))[:, :2].clone().view(-1).sigmoid())
    assert found["clone"] == 1


def test_a_clone_that_is_returned_has_memory_of_its_own() -> None:
    def body(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.first(x)
        return y, y.clone()

    compiled = compiled_equal(body)
    first, second = compiled(torch.randn(1, 4, 5, 5))
    assert first.data_ptr() != second.data_ptr()


def upcast(m: Any, x: Tensor) -> Tensor:
    return torch.relu(m.first(x).float()).to(x.dtype)


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (upcast, {"float", "to"}),
        (lambda m, x: torch.relu(m.first(x)).double().to(torch.float16), {"double", "to"}),
        (lambda m, x: F.softmax(m.first(x), 1, dtype=torch.float32).to(x.dtype), {"softmax", "to"}),
    ],
)
def test_a_cast_stays_where_it_changes_the_dtype_of_a_model_in_half_precision(body: Body, kept: set[str]) -> None:
    compiled = compiled_equal(body, torch.float16)
    assert kept <= set(compiled.report.ops_after)
    assert compiled(torch.randn(1, 4, 5, 5).half()).dtype == torch.float16


@pytest.mark.parametrize(
    ("body", "gone"),
    [
        (lambda m, x: m.second(torch.relu(m.first(x)).to(x.dtype)), False),  # an input may have another dtype
        (lambda m, x: m.second(torch.relu(y := m.first(x)).to(y.dtype)), True),
        (lambda m, x: torch.relu(x).to(x.dtype) * 2, True),
        (lambda m, x: torch.relu(x).to(x.dtype, copy=True) * 2, False),
    ],
)
def test_a_cast_to_the_dtype_of_another_tensor_goes_where_one_source_decides_both(body: Body, gone: bool) -> None:
    assert ("to" in ops(body)) is not gone
