"""Does the proof of a whole model tell a fault from rounding?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rgc
from rgc.errors import InputError, NotEquivalentError
from rgc.subject import example_of
from rgc.testing import randomize
from rgc.verify import DRAWS, LARGEST_DRAWN, Pair, draw_examples, require_level


def model() -> nn.Module:
    torch.manual_seed(0)
    return randomize(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)))


X = torch.randn(2, 3, 10, 12, generator=torch.Generator().manual_seed(1))


def with_change(change: Callable[[nn.Module], Any]) -> nn.Module:
    changed = copy.deepcopy(model())
    with torch.no_grad():
        change(changed)
    return changed


def test_a_model_equals_itself_and_its_compiled_form() -> None:
    original = model()
    for other in (original, rgc.compile(original, X)):
        found = rgc.verify(original, other, X)
        assert found.equal and found.deployed_error <= found.allowed_error and found.examples > 1


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m[0].weight.mul_(1 + 1e-4),
        lambda m: m[3].bias.add_(1e-4),
        lambda m: m[1].running_var.mul_(1.001),
        lambda m: setattr(m[0], "padding_mode", "replicate"),
        lambda m: m.__setitem__(2, nn.ReLU6()) or m[1].weight.mul_(10),
    ],
)
def test_a_changed_model_is_not_equal_and_the_reason_says_how_far(change: Callable[[nn.Module], Any]) -> None:
    found = rgc.verify(model(), with_change(change), X)
    assert not found.equal and "of its scale in float32 on an input of 2x3x10x12" in found.reason


def test_rounding_is_no_fault() -> None:
    rounded = with_change(lambda m: m[3].weight.mul_(1 + 2**-22))
    assert rgc.verify(model(), rounded, X).equal


class Best(nn.Module):
    """Returns the indices of large scores, all of them nearly equal: rounding decides which, and how many."""

    def __init__(self, bias: float = 0.0, count: int = 0) -> None:
        super().__init__()
        self.layer, self.count = nn.Conv2d(3, 64, 1), count
        with torch.no_grad():
            self.layer.weight.fill_(1 / 3)
            self.layer.bias.fill_(bias)

    def forward(self, x: Tensor) -> Tensor:
        score = self.layer(x * 0.1 + 1000.0)
        return score[score >= score.mean()][self.count :]


def test_an_original_that_rounding_throws_about_is_compared_in_float64() -> None:
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    original = Best().eval()
    pair = Pair(original, rgc.compile(original, image), copy.deepcopy(original).double(), None, torch.float32)
    assert pair.check(example_of(original, image), level="quick", free_sizes=False).equal


def test_an_original_that_computes_something_else_in_its_own_dtype_is_no_excuse_for_a_fault() -> None:
    class InItsOwnDtype(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (3 if x.dtype == torch.float32 else 1)

    original = InItsOwnDtype(nn.Conv2d(3, 2, 1)).eval()
    wrong = copy.deepcopy(original)
    with torch.no_grad():
        wrong[0].weight.mul_(0.5)
    found = rgc.verify(original, wrong, X)
    assert not found.equal and "which itself computes something else in float64" in found.reason


class Cancelling(nn.Module):
    """A large bias that is subtracted again: where the input is small, what is left is mostly rounding."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.layer, self.size = nn.Conv2d(3, 3, 1), size
        nn.init.constant_(self.layer.bias, size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y - self.size


def float64_pair(original: nn.Module, compiled: nn.Module) -> Pair:
    return Pair(original, compiled, copy.deepcopy(original).double(), copy.deepcopy(compiled).double(), torch.float32)


def scaled_by(original: nn.Module, factor: float) -> nn.Module:
    changed = copy.deepcopy(original).double()
    with torch.no_grad():
        changed.layer.weight.mul_(factor)
    return changed


def test_what_rounding_in_float64_explains_is_no_fault_there() -> None:
    original = Cancelling(3000.0).eval()
    reordered = nn.Conv2d(3, 3, 1, bias=False)
    reordered.weight = original.layer.weight
    image = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 1e-3
    cases = float64_pair(original, reordered).check_in_float64(
        example_of(original, image), level="quick", free_sizes=False
    )
    assert cases.exact is not None and 1e-10 < cases.exact <= 1e-9 and len(cases.cases) > 1


@pytest.mark.parametrize("size", [0.0, 8192.0])
def test_a_fault_of_1e8_of_the_scale_is_a_fault_however_badly_the_original_rounds(size: float) -> None:
    original = Cancelling(size).eval()
    image = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    example = example_of(original, image)
    pair = float64_pair(original, scaled_by(original, 1 + 1e-7))
    with pytest.raises(NotEquivalentError, match="of its scale in float64 on an input of 1x3x8x8"):
        pair.check_in_float64(example, level="quick", free_sizes=False)


def test_a_removed_activation_shows_on_drawn_inputs_even_where_the_example_hides_it() -> None:
    original, linear = nn.Sequential(nn.ReLU()).eval(), nn.Sequential(nn.Identity()).eval()
    assert not rgc.verify(original, linear, torch.rand(2, 3)).equal


def test_outputs_of_another_shape_or_structure_are_infinitely_far() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    same, flat = nn.Sequential(nn.Identity()).eval(), nn.Sequential(nn.Flatten()).eval()
    assert "differs by inf" in rgc.verify(same, flat, X).reason
    assert "differs by inf" in rgc.verify(same, Pair().eval(), X).reason


def test_a_model_in_training_mode_cannot_be_verified() -> None:
    with pytest.raises(InputError, match="is in training mode"):
        rgc.verify(model().train(), model(), X)


def test_levels_have_names() -> None:
    assert require_level("quick") == "quick" and require_level("full") == "full"
    with pytest.raises(InputError, match="unknown verification level 'slow'; choose one of quick, full"):
        require_level("slow")


def test_full_draws_more_than_quick() -> None:
    original = model()
    counts = [rgc.verify(original, original, X, level=level).examples for level in ("quick", "full")]
    assert counts[0] <= DRAWS["quick"] + 1 < counts[1] <= DRAWS["full"] + 1


def test_drawn_inputs_vary_in_batch_size_and_values_and_are_the_same_every_time() -> None:
    example = example_of(nn.ReLU(), torch.randn(2, 3, 100, 90))
    free, again, fixed = (
        [each.tensors[0] for each in draw_examples(example, 12, free_sizes)] for free_sizes in (True, True, False)
    )
    assert all(torch.equal(a, b) for a, b in zip(free, again, strict=True))
    assert {x.shape[0] for x in free} == {1, 2, 3} and len({x.shape[2] % 2 for x in free}) == 2
    assert all(x.shape[2] <= LARGEST_DRAWN + 3 for x in free) and {x.shape[2:] for x in fixed} == {(100, 90)}
    assert max(float(x.abs().max()) for x in free) > 10


def sizes_of(*shapes: tuple[int, ...], count: int = DRAWS["quick"]) -> list[list[tuple[int, ...]]]:
    example = example_of(nn.ReLU(), tuple(torch.zeros(shape) for shape in shapes))
    return [[tuple(x.shape) for x in drawn.tensors] for drawn in draw_examples(example, count, True)]


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 3, 7, 7), (2, 3, 32, 20), (1, 3, 9), (1, 2, 8, 8, 8)])
def test_four_draws_are_larger_smaller_and_no_square_and_have_other_batches(shape: tuple[int, ...]) -> None:
    drawn = [shapes for (shapes,) in sizes_of(shape)]
    assert len(drawn) == 4 and drawn[0][2:] == shape[2:] and drawn[0][0] != shape[0]
    assert {1, 2, 3} == {each[0] for each in drawn}
    assert sum(all(n > m for n, m in zip(each[2:], shape[2:], strict=True)) for each in drawn) == 2
    assert any(n < m for each in drawn for n, m in zip(each[2:], shape[2:], strict=True)) or shape[2:] == (1, 1)
    assert len(shape) == 3 or any(len(set(each[2:])) > 1 for each in drawn)


def test_what_is_as_wide_as_proofs_go_is_drawn_smaller_and_keeps_its_aspect() -> None:
    drawn = [shapes for (shapes,) in sizes_of((1, 3, 640, 480), count=12)]
    assert all(n < 640 and m < 480 for _, _, n, m in drawn) and (32, 24) in {each[2:] for each in drawn}
    positions = sum(samples * h * w for ((samples, _, h, w),) in sizes_of((1, 3, 224, 224)))
    assert positions < 224 * 224 / 2


def test_inputs_that_belong_together_are_changed_alike() -> None:
    for image, twin in sizes_of((2, 3, 12, 12), (2, 1, 12, 12), count=12):
        assert image[0] == twin[0] and image[2:] == twin[2:]
    ratios = [(low[2:], high[2:]) for low, high in sizes_of((2, 3, 8, 8), (2, 3, 16, 16))]
    assert sum(all(2 * n == m for n, m in zip(low, high, strict=True)) for low, high in ratios) == 3


def test_one_position_stays_one_in_some_draw_of_larger_inputs() -> None:
    drawn = sizes_of((2, 3, 16, 16), (2, 1, 1, 16))
    assert any(x[2] == 32 and mask[2:] == (1, 32) for x, mask in drawn)


def test_integers_are_drawn_from_the_example() -> None:
    example = example_of(nn.ReLU(), (torch.tensor([[3, 5]]), 7))
    for drawn in draw_examples(example, 5, False):
        assert set(drawn.tensors[0].flatten().tolist()) <= {3, 5} and drawn.args[1] == 7


@pytest.mark.parametrize("product", [
    lambda x, w: torch.tensordot(x, w, dims=1), lambda x, w: torch.einsum("nkl,lo->nko", x, w),
])  # fmt: skip
def test_an_axis_of_one_element_that_only_the_original_broadcasts_is_no_difference(product: Any) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = product(x, self.w)
            return y

    assert Product()(torch.randn(2, 4, 1)).shape == (2, 4, 3)
    compiled = rgc.compile(Product().eval(), torch.randn(2, 4, 8), verify="full", strict=True)
    assert compiled.report.ops_after == {"Linear": 1}


def test_an_input_on_which_the_original_overflows_excuses_nothing_on_others() -> None:
    """In float16 the large inputs that are drawn leave its range; the others still tell the two models apart."""
    model = nn.Sequential(nn.Linear(4, 4)).eval().half()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4) * 3e3)
    x = torch.randn(2, 4).half()
    found = rgc.verify(model, lambda x: model(x), x)
    assert found.equal and found.original_error < 1e-2
    wrong = rgc.verify(model, lambda x: model(x) * 1.05, x)
    assert not wrong.equal


class Gated(nn.Module):
    """The zero branch gives the sum its size, but not where that is one position."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True).relu() + 0.0 * x


@rgc.rewrite(lambda x, y, zero: y + zero(x))
def drop_a_zero_branch_that_looks_as_large(x: rgc.Value, y: rgc.Value, zero: rgc.Scale) -> rgc.Value:
    rgc.require(y.tensor_type.shape == x.tensor_type.shape and not bool(zero.scale.any()), "another size")
    return y


def test_a_rule_that_holds_at_sizes_of_one_only_is_found_on_a_larger_input() -> None:
    passes = [drop_a_zero_branch_that_looks_as_large]
    with pytest.raises(NotEquivalentError, match=r"on an input of 2x3x\dx\d"):
        rgc.compile(Gated().eval(), torch.randn(2, 3, 1, 1), passes=passes, objective="depth", strict=True)
    report = rgc.compile(Gated().eval(), torch.randn(2, 3, 1, 1), passes=passes, objective="depth").report
    assert report.failures or any("on an input of 2x3x" in note for note in report.notes)


class WrongWhere(nn.Module):
    """Takes something away where ``applies`` to the shape."""

    def __init__(self, applies: Callable[[torch.Size], bool]) -> None:
        super().__init__()
        self.applies = applies

    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5 if self.applies(x.shape) else x


@pytest.mark.parametrize(
    "applies",
    [
        lambda shape: shape[2] > 16,
        lambda shape: shape[2] < 16,
        lambda shape: shape[2] != shape[3],
        lambda shape: shape[0] == 1,
        lambda shape: shape[0] > 2,
        lambda shape: shape[3] % 2 == 1,
    ],
    ids=["larger", "smaller", "not square", "one sample", "three samples", "odd"],
)
def test_what_differs_at_other_sizes_than_the_example_is_found(applies: Callable[[torch.Size], bool]) -> None:
    original, example = nn.Sequential(nn.Identity()).eval(), torch.randn(2, 3, 16, 16)
    assert torch.equal(WrongWhere(applies)(example), example)
    with pytest.raises(NotEquivalentError, match="in float64 on an input of"):
        float64_pair(original, WrongWhere(applies)).check_in_float64(
            example_of(original, example), level="quick", free_sizes=True
        )


def test_a_size_at_which_the_original_itself_makes_infinities_says_nothing() -> None:
    """With dilation, all that a window of max pooling reads of one position is padding, which is -inf."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.norm = nn.MaxPool2d(2, padding=1, dilation=2), randomize(nn.BatchNorm2d(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.pool(x)
            return torch.cat([y, self.norm(y), y], 1)

    model = Pooled().eval()
    assert not model(torch.randn(1, 3, 1, 1)).isfinite().all()
    report = rgc.compile(model, torch.randn(2, 3, 9, 9), objective="depth", strict=True).report
    assert not report.failures and report.rewrites


class Cropped(nn.Module):
    """A padded convolution whose border is cut off, which is a convolution without padding where anything is left."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return torch.relu(y[..., 1:-1, 1:-1])


def test_a_drawn_input_of_which_the_original_leaves_nothing_is_no_difference() -> None:
    original, example = Cropped().eval(), torch.randn(2, 3, 4, 4)
    assert original(example[..., :2, :2]).numel() == 0
    compiled = rgc.compile(original, example, objective="depth", strict=True)
    assert compiled.report.ops_after == {"Conv2d": 1, "ReLU": 1} and not compiled.report.fixed_size
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        compiled(example[..., :2, :2])
