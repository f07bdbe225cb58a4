"""Are regions just the affine parts of one source, and is a region as one operator the same function?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, reject
from hypothesis import strategies as st
from torch import Tensor

from rgc.algebra import Conv, Linear, Scale
from rgc.errors import Refusal
from rgc.ir import Graph, Input, Origin, TensorType, Value
from rgc.operators import Activation, Add, AvgPool, Concat, Constant, Identity, Multiply, Slot, Structural
from rgc.rearrange import Gather, Slice, Subsample, ZeroChannels
from rgc.region import LONGEST_WALK, Join, Region, affine_regions, join_at, order_of


def integers(seed: int, *shape: int) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).double()


def source(*shape: int, name: str = "x") -> Value:
    return Value(Input(name), (), TensorType(shape or (2, 2, 5, 6), torch.float64), name=name)


def conv(seed: int, kernel: int = 1, makes: int = 2, reads: int = 2, bias: bool = True, **options: Any) -> Conv:
    return Conv(integers(seed, makes, reads, kernel, kernel), integers(seed + 1, makes) if bias else None, **options)


def named(value: Value, *paths: str) -> Value:
    value.origin = Origin(paths)
    return value


def relu(value: Value) -> Value:
    return Activation("relu")(value)


def joined(value: Value, *inputs: Value) -> Join | None:
    return join_at(value, order_of(Graph(inputs, value).nodes()))


def assert_is_the_graph(region: Region, linear: Linear | None = None) -> None:
    """The region, and its linear form, compute what a graph from its source to its sink computes."""
    x = integers(7, *region.source.tensor_type.shape)
    start = region.source
    known = {start: x}
    for value in region.values:
        known[value] = value.op.evaluate(*(known[used] for used in value.inputs))
    assert torch.equal(region.evaluate(x), known[region.sink])
    if isinstance(start.op, Input):
        assert torch.equal(Graph([start], region.sink).evaluate({start.op.name: x}), known[region.sink])
    if linear is not None:
        assert torch.equal(linear.evaluate(x), known[region.sink])


# --- where branches meet -------------------------------------------------------------------------------------------


def test_two_branches_meet_back_at_their_source() -> None:
    x = source()
    a, b = conv(1)(x), conv(3)(x)
    total = Add()(a, b)
    join = joined(total, x)
    assert join is not None and join.source is x and join.sink is total
    assert set(join.values) == {a, b, total}
    assert_is_the_graph(join, join.as_linear(None))


def test_a_skip_connection_is_a_branch_of_nothing() -> None:
    x = source()
    total = Add()(conv(1)(x), x)
    join = joined(total, x)
    assert join is not None and join.source is x and len(join.values) == 2
    assert_is_the_graph(join, join.as_linear(None))


def test_a_value_added_to_itself_has_itself_for_source() -> None:
    x = source()
    middle = conv(1)(x)
    join = joined(Add()(middle, middle), x)
    assert join is not None and join.source is middle and len(join.values) == 1


def test_nested_branches_go_back_to_the_source_of_all() -> None:
    x = source()
    inner = Add()(conv(1)(x), conv(3)(x))
    outer = Add(-1)(conv(5)(inner), conv(7)(x))
    join = joined(outer, x)
    assert join is not None and join.source is x and len(join.values) == 6
    assert_is_the_graph(join, join.as_linear(None))


def test_the_source_is_the_nearest_common_one() -> None:
    x = source()
    stem = conv(1)(relu(x))
    join = joined(Add()(conv(3)(stem), stem), x)
    assert join is not None and join.source is stem


@pytest.mark.parametrize("combine", [Add(), Concat(-3)])
def test_branches_of_two_inputs_do_not_meet(combine: Any) -> None:
    x, y = source(), source(name="y")
    assert joined(combine(conv(1)(x), conv(3)(y)), x, y) is None


def test_a_branch_that_is_not_affine_does_not_meet_the_other() -> None:
    x = source()
    middle = conv(1)(x)
    assert joined(Add()(relu(middle), middle), x) is None


def test_only_sums_and_concatenations_are_joins() -> None:
    x = source()
    assert joined(conv(1)(x), x) is None
    assert joined(Multiply()(x, x), x) is None


def test_a_constant_is_no_source_of_branches() -> None:
    x = source()
    constant = Constant(torch.ones(2, 2, 5, 6))()
    assert joined(Add()(conv(1)(x), constant), x) is None
    assert joined(Add()(conv(1)(constant), constant), x) is None


def test_the_walk_back_gives_up_on_very_long_branches() -> None:
    def branch(length: int) -> tuple[Value, Value]:
        x = source()
        value = x
        for _ in range(length):
            value = Identity()(value)
        return Add()(value, x), x

    assert joined(*branch(LONGEST_WALK - 1)) is not None
    assert joined(*branch(LONGEST_WALK + 2)) is None


# --- maximal regions -----------------------------------------------------------------------------------------------


def test_a_chain_of_affine_values_between_activations_is_one_region() -> None:
    x = source()
    start = relu(x)
    a = conv(1)(start)
    b = conv(3)(a)
    (region,) = affine_regions(Graph([x], relu(b)))
    assert region.source is start and region.values == (a, b) and region.label == "affine region of 2 operators"
    assert region.infer(region.source.type) == b.type
    assert_is_the_graph(region, region.as_linear(None))


def test_nested_branches_are_one_region() -> None:
    x = source()
    inner = Add()(conv(1)(x), x)
    outer = Add()(conv(3)(inner), inner)
    (region,) = affine_regions(Graph([x], outer))
    assert region.source is x and region.sink is outer and len(region.values) == 4
    assert_is_the_graph(region, region.as_linear(None))


def test_a_value_that_is_needed_anyway_ends_one_region_and_starts_the_next() -> None:
    x = source()
    a = conv(1)(x)
    b = conv(3)(a)
    regions = affine_regions(Graph([x], (relu(a), b)))
    assert [(region.source, region.sink) for region in regions] == [(x, a), (a, b)]


def test_a_sum_of_two_sources_belongs_to_neither() -> None:
    x, y = source(), source(name="y")
    a, b = conv(1)(x), conv(3)(y)
    total = Add()(a, b)
    end = conv(5)(total)
    regions = affine_regions(Graph([x, y], end))
    assert [(region.source, region.sink) for region in regions] == [(x, a), (y, b), (total, end)]


def test_a_constant_belongs_to_the_region_that_reads_it() -> None:
    x = source()
    constant = Constant(integers(9, 5, 6))()
    total = named(Add()(conv(1)(x), constant), "head.add")
    (region,) = affine_regions(Graph([x], total))
    assert region.source is x and constant in region.values
    assert_is_the_graph(region)
    with pytest.raises(Refusal, match="head.add mixes in a constant"):
        region.as_linear(None)


def test_a_graph_without_affine_values_has_no_regions() -> None:
    x = source()
    assert affine_regions(Graph([x], Multiply()(relu(x), x))) == []


def test_an_outline_has_the_size_of_its_region_and_computes_nothing() -> None:
    x = source()
    middle = conv(1)(x)
    (region,) = affine_regions(Graph([x], conv(3, 3, makes=5)(middle)))
    outline = replace(region, outlined=True)
    made = outline.evaluate(torch.full((7, 2, 5, 6), torch.nan, dtype=torch.float64))
    assert made.shape == (7, 5, 3, 4) and made.dtype == torch.float64 and not made.any()


# --- a region as one operator --------------------------------------------------------------------------------------


@st.composite
def branches(draw: st.DrawFn, x: Value) -> Value:
    """Up to three convolutions, scales or pools in a row, all of which keep the size."""
    value = x
    for _ in range(draw(st.integers(0, 3))):
        seed, groups = draw(st.integers(0, 99)), draw(st.sampled_from((1, 2)))
        op: Linear = draw(
            st.sampled_from(
                (
                    Conv(integers(seed, 2, 2 // groups, 1, 1), integers(seed + 1, 2), groups=groups),
                    Conv(integers(seed, 2, 2 // groups, 3, 3), integers(seed + 1, 2), padding=1, groups=groups),
                    Conv(integers(seed, 2, 2 // groups, 1, 3), None, padding=((0, 0), (2, 0)), groups=groups),
                    Scale(integers(seed, 2), integers(seed + 1, 2), 2),
                    Scale(torch.tensor([-3.0]).double(), torch.zeros(1).double()),
                    AvgPool((1, 1), (1, 1), (0, 0)),
                    Identity(),
                )
            )
        )
        value = op(value)
    return value


@given(data=st.data())
@pytest.mark.parametrize("combine", [Add(), Add(-1), Concat(-3)], ids=lambda op: op.label)
@pytest.mark.parametrize("size", [None, (5, 6)])
def test_a_join_of_branches_as_one_operator_is_the_same_function(
    combine: Any, size: tuple[int, int] | None, data: st.DataObject
) -> None:
    x = source()
    a, b = data.draw(branches(x)), data.draw(branches(x))
    assume(any(isinstance(v.op, Linear) and v.op.spatial is not None for v in Graph([x], (a, b)).nodes()))
    join = joined(combine(a, b), x)
    assert join is not None
    try:
        linear = join.as_linear(size)
    except Refusal:
        reject()
    assert_is_the_graph(join, linear)


def test_a_concatenation_of_branches_and_the_source_itself_is_one_convolution() -> None:
    x = source()
    wide = Conv(integers(1, 3, 2, 3, 3), integers(2, 3), padding=1)(x)
    join = joined(Concat(-3)(wide, x, AvgPool((1, 1), (1, 1), (0, 0))(x)), x)
    assert join is not None
    linear = join.as_linear(None)
    assert isinstance(linear, Conv) and linear.channels == (2, 7) and linear.kernel == (3, 3)
    assert_is_the_graph(join, linear)


def test_a_concatenation_then_a_sum_over_it_is_one_convolution() -> None:
    x = source()
    both = Concat(-3)(conv(1)(x), conv(3, kernel=3, padding=1)(x))
    (region,) = affine_regions(Graph([x], conv(5, reads=4)(both)))
    linear = region.as_linear(None)
    assert isinstance(linear, Conv) and linear.channels == (2, 2)
    assert_is_the_graph(region, linear)


def piece(x: Value, start: int, stop: int, channels: int = 12) -> Value:
    return Gather(Slice(start, stop), channels, 2)(x)


def test_branches_of_channels_of_their_own_are_one_grouped_convolution() -> None:
    x = source(2, 12, 9, 8)
    ones = [(3, 3, 1), (1, 5, 2), (5, 1, 3)]
    depthwise = [
        Conv(integers(seed, 2, 1, h, w), integers(seed + 9, 2), padding=(h // 2, w // 2), groups=2)(
            piece(x, 4 + 2 * seed, 6 + 2 * seed)
        )
        for h, w, seed in ones
    ]
    join = joined(Concat(-3)(piece(x, 0, 6), *depthwise), x)
    assert join is not None
    linear = join.as_linear(None)
    assert isinstance(linear, Conv) and linear.groups == 12 and linear.kernel == (5, 5)
    assert_is_the_graph(join, linear)


def test_a_branch_of_some_channels_beside_the_others_has_groups_of_its_width() -> None:
    x = source(2, 12, 5, 6)
    some = Conv(integers(1, 3, 3, 3, 3), padding=1)(piece(x, 0, 3))
    join = joined(Concat(-3)(some, piece(x, 3, 12)), x)
    assert join is not None
    linear = join.as_linear(None)
    assert isinstance(linear, Conv) and linear.groups == 4
    assert_is_the_graph(join, linear)


def test_pieces_that_are_put_together_again_are_the_source_or_a_selection() -> None:
    x = source(2, 12, 5, 6)
    whole = joined(Concat(-3)(piece(x, 0, 5), piece(x, 5, 12)), x)
    turned = joined(Concat(-3)(piece(x, 5, 12), piece(piece(x, 0, 5), 1, 3, 5)), x)
    assert whole is not None and turned is not None
    same, selection = whole.as_linear(None), turned.as_linear(None)
    assert isinstance(same, Scale) and same.is_identity
    assert isinstance(selection, Gather) and selection.index == (*range(5, 12), 1, 2)
    assert_is_the_graph(turned, selection)


def test_a_sum_of_branches_of_different_channels_reads_all() -> None:
    x = source(2, 12, 5, 6)
    left = Conv(integers(1, 4, 6, 3, 3), padding=1)(piece(x, 0, 6))
    right = Conv(integers(2, 4, 8, 1, 1), integers(3, 4))(piece(x, 4, 12))
    join = joined(Add(-1)(left, right), x)
    assert join is not None
    linear = join.as_linear(None)
    assert isinstance(linear, Conv) and linear.channels == (12, 4)
    assert_is_the_graph(join, linear)


def test_channels_of_zeros_beside_a_strided_view_join_a_convolution() -> None:
    x = source(2, 4, 7, 8)
    shortcut = Gather(ZeroChannels(1, 3), 4, 2)(Subsample((2, 2), ((0, 0), (0, 0)))(x))
    join = joined(Add()(shortcut, Conv(integers(1, 8, 4, 3, 3), stride=2, padding=1)(x)), x)
    assert join is not None
    linear = join.as_linear(None)
    assert isinstance(linear, Conv) and linear.kernel == (3, 3)
    assert_is_the_graph(join, linear)


def test_layers_of_linear_type_concatenate_along_the_last_axis() -> None:
    x = source(4, 3)
    join = joined(Concat(-1)(Conv(integers(1, 2, 3))(x), x), x)
    assert join is not None
    linear = join.as_linear(None)
    assert isinstance(linear, Conv) and linear.channels == (3, 5)
    assert_is_the_graph(join, linear)


@pytest.mark.parametrize("first", [AvgPool((2, 2), (1, 1), (0, 0)), Identity("dropout")])
def test_a_region_may_start_with_an_operator_of_any_channels(first: Linear) -> None:
    x = source()
    (region,) = affine_regions(Graph([x], conv(1)(first(x))))
    assert_is_the_graph(region, region.as_linear(None))


def test_a_linearised_inverted_residual_is_one_operator() -> None:
    x = source()
    depthwise = Conv(integers(1, 6, 1, 3, 3), integers(2, 6), padding=1, groups=6)
    body = conv(5, reads=6)(depthwise(conv(3, makes=6)(x)))
    join = joined(Add()(body, x), x)
    assert join is not None
    anywhere = join.as_linear(None)
    assert isinstance(anywhere, Conv) and anywhere.kernel == (3, 3) and anywhere.ones is not None
    assert_is_the_graph(join, anywhere)
    linear = join.as_linear((5, 6))
    assert isinstance(linear, Conv) and linear.kernel == (3, 3) and linear.size == (5, 6)
    assert_is_the_graph(join, linear)


# --- refusals ------------------------------------------------------------------------------------------------------


def test_a_refusal_names_the_affine_value_that_is_no_convolution() -> None:
    x = source()
    flipped = named(Structural("flip", (Slot(0), (3,)))(conv(1)(x)), "neck.flip")
    join = joined(Add()(flipped, conv(3)(x)), x)
    assert join is not None
    assert_is_the_graph(join)
    with pytest.raises(Refusal, match=r"neck.flip \(flip\) is affine but not a convolution"):
        join.as_linear(None)


def test_a_concatenation_along_another_axis_than_the_channels_is_refused() -> None:
    x = source()
    join = joined(named(Concat(-1)(conv(1)(x), conv(3)(x)), "neck.cat"), x)
    assert join is not None
    with pytest.raises(Refusal, match="neck.cat concatenates along axis -1, not along the channels"):
        join.as_linear(None)


def test_a_sum_of_other_channels_is_refused_where_none_is_repeated() -> None:
    x = source()
    total = Value(Add(), (conv(1, makes=4)(x), conv(3, makes=3)(x)), x.type)
    join = joined(total, x)
    assert join is not None
    with pytest.raises(Refusal, match="make different channels, so their sum broadcasts"):
        join.as_linear(None)


def test_a_channel_that_is_repeated_by_a_sum_is_one_operator_with_the_rest() -> None:
    x = source()
    join = joined(Add(-1)(conv(1)(x), conv(3, makes=1)(x)), x)
    assert join is not None
    assert_is_the_graph(join, join.as_linear(None))


def test_a_region_that_fits_any_axes_is_a_factor() -> None:
    x = source()
    join = joined(Add()(Identity()(x), x), x)
    assert join is not None
    twice = join.as_linear(None)
    assert isinstance(twice, Scale) and twice.scale.tolist() == [2] and twice.spatial is None


def test_a_concatenation_of_nothing_is_refused() -> None:
    x = source()
    empty = Value(Concat(-3), (), None, Origin(("neck.cat",)))
    with pytest.raises(Refusal, match="neck.cat concatenates what no layer has read"):
        Region(x, (conv(1)(x), empty)).as_linear(None)
