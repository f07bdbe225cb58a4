"""Does a convolution get the most groups that its zeros allow, and do convolutions side by side stay what they are?"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rgc.algebra import Conv, ungrouped
from rgc.errors import Refusal
from rgc.sparsity import block_diagonal, on_one_grid, regroup_by_sparsity


def integers(seed: int, *shape: int) -> Tensor:
    return torch.randint(1, 5, shape, generator=torch.Generator().manual_seed(seed)).double()


def conv(seed: int, out: int, width: int, kernel: int = 3, groups: int = 1, **options: object) -> Conv:
    weight = integers(seed, out, width, kernel, kernel)
    return Conv(weight, integers(seed + 1, out), groups=groups, **options)  # type: ignore[arg-type]


@given(groups=st.sampled_from((1, 2, 3, 4, 6, 12)), known=st.sampled_from((1, 2, 3)), wide=st.integers(1, 2))
def test_groups_come_back_from_the_zeros_of_a_dense_weight(groups: int, known: int, wide: int) -> None:
    original = conv(groups, 12 * wide, 12 // groups, groups=groups, padding=1)
    start = original if groups % known else Conv(
        ungrouped(original).weight, original.bias, padding=1
    )  # fmt: skip
    found = regroup_by_sparsity(start)
    assert found.groups == groups and torch.equal(found.weight, original.weight)
    x = integers(7, 2, 12, 5, 4)
    assert torch.equal(found.evaluate(x), original.evaluate(x))


def test_groups_that_are_not_contiguous_and_equal_stay_together() -> None:
    weight = torch.zeros(4, 4, 1, dtype=torch.float64)
    for row, column in ((0, 2), (1, 3), (2, 0), (3, 1)):
        weight[row, column] = 1
    assert regroup_by_sparsity(Conv(weight)).groups == 1
    uneven = torch.zeros(4, 4, 1, dtype=torch.float64)
    uneven[:3, :3], uneven[3, 3] = 1, 1
    assert regroup_by_sparsity(Conv(uneven)).groups == 1
    almost = torch.eye(4, dtype=torch.float64).reshape(4, 4, 1)
    almost[0, 3] = 1e-30
    assert regroup_by_sparsity(Conv(almost)).groups == 1


def test_groups_of_a_transposed_convolution_are_found_as_well() -> None:
    weight = torch.zeros(4, 6, 2, 2, dtype=torch.float64)
    weight[:2, :3], weight[2:, 3:] = integers(1, 2, 3, 2, 2), integers(2, 2, 3, 2, 2)
    dense = Conv(weight, stride=2, transposed=True)
    found = regroup_by_sparsity(dense)
    x = integers(3, 2, 4, 3, 3)
    assert found.groups == 2 and torch.equal(found.evaluate(x), dense.evaluate(x))


def test_a_convolution_that_has_its_groups_is_itself() -> None:
    depthwise = conv(1, 4, 1, groups=4)
    assert regroup_by_sparsity(depthwise) is depthwise


# --- side by side ------------------------------------------------------------------------------------------------


@st.composite
def parts(draw: st.DrawFn) -> list[Conv]:
    made = []
    for seed in range(draw(st.integers(1, 4))):
        groups = draw(st.sampled_from((1, 2, 3)))
        n, m = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
        kernel = draw(st.sampled_from((1, 3)))
        value = draw(st.sampled_from((None, integers(seed + 9, n))))
        padding = kernel // 2
        made.append(conv(seed, m, n // groups, kernel, groups, padding=padding, pad_value=value))
    return made


@given(parts())
def test_convolutions_side_by_side_are_one(drawn: list[Conv]) -> None:
    x = integers(5, 2, sum(part.in_channels for part in drawn), 5, 6)
    pieces = x.split([part.in_channels for part in drawn], 1)
    expected = torch.cat([part.evaluate(piece) for part, piece in zip(drawn, pieces, strict=True)], 1)
    merged = block_diagonal(drawn)
    assert torch.equal(merged.evaluate(x), expected)
    assert regroup_by_sparsity(merged).groups == merged.groups or any(not bool(p.weight.all()) for p in drawn)


@pytest.mark.parametrize(("widths", "groups"), [
    ([(10, 10, 10), (2, 2, 2), (2, 2, 2)], 14), ([(4, 4, 1), (12, 12, 12)], 4), ([(3, 3, 1), (4, 4, 1)], 1),
    ([(2, 4, 2), (4, 8, 4)], 6), ([(2, 4, 1), (4, 2, 1)], 1),
])  # fmt: skip
def test_they_have_the_most_groups_of_equal_width(widths: list[tuple[int, int, int]], groups: int) -> None:
    merged = block_diagonal([conv(1, m, n // g, groups=g) for n, m, g in widths])
    assert merged.groups == groups


def test_many_channels_side_by_side_never_become_dense() -> None:
    """InceptionNeXt at 768 channels: 11x11 depthwise, not 768 x 768 x 11 x 11."""
    identity = Conv(torch.ones(480, 1, 1, 1).double(), groups=480)
    band = Conv(torch.ones(96, 1, 1, 11).double(), groups=96, padding=((0, 0), (5, 5)))
    column = Conv(torch.ones(96, 1, 11, 1).double(), groups=96, padding=((5, 5), (0, 0)))
    square = Conv(torch.ones(96, 1, 3, 3).double(), groups=96, padding=1)
    merged = block_diagonal([identity, square, band, column])
    assert merged.groups == 768 and merged.weight.shape == (768, 1, 11, 11)


def test_what_differs_in_stride_or_has_ones_or_is_transposed_is_refused() -> None:
    with pytest.raises(Refusal, match="strides differ"):
        block_diagonal([conv(1, 2, 2), conv(2, 2, 2, stride=2)])
    with pytest.raises(Refusal, match="padding modes differ"):
        block_diagonal([conv(1, 2, 2, padding=1), conv(2, 2, 2, padding=1, padding_mode="reflect")])
    with pytest.raises(Refusal, match="transposed convolutions side by side"):
        block_diagonal([conv(1, 2, 2, transposed=True)])
    with pytest.raises(Refusal, match="a channel of ones"):
        block_diagonal([conv(1, 2, 2, ones=integers(3, 2, 3, 3))])


def test_outputs_that_must_be_of_one_size_are_put_on_one_grid() -> None:
    every = Conv(torch.ones(2, 1, 1, 1).double(), stride=2, groups=2)
    shifted = Conv(torch.ones(2, 1, 1, 1).double(), stride=2, groups=2, padding=((-1, 0), (-1, 0)))
    merged = block_diagonal([every, shifted])
    x = integers(1, 2, 4, 6, 8)
    assert torch.equal(merged.evaluate(x), torch.cat([x[:, :2, ::2, ::2], x[:, 2:, 1::2, 1::2]], 1))
    unlike = [conv(1, 2, 2), conv(1, 2, 2, stride=2)]
    assert on_one_grid(unlike) == unlike
