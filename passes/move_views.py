"""A map along the channels commutes with what rearranges, selects or averages other axes: B(v(A x)) = v((B A) x).

So linear operators merge across reshapes, permutations, selections and means, on the side where it costs less, and a
view that is undone behind one operator goes: u(A(v(x))) = A x with A on the axes of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor, nn

from rgc import (
    BatchNorm,
    ChannelMean,
    Conv,
    Linear,
    Opaque,
    Refusal,
    Scale,
    Structural,
    TensorType,
    Value,
    carried_axis,
    compose,
    inverts,
    is_permutation,
    is_reshape,
    relocated,
    require,
    rewrite,
    takes_shape_of_another,
)

Map = Conv | Scale | BatchNorm | ChannelMean
View = Structural | ChannelMean
Reshape = Annotated[Structural, is_reshape]
Permutation = Annotated[Structural, is_permutation]
ReshapeAs = Annotated[Opaque, takes_shape_of_another]


@rewrite(lambda x, first, view, second: second(view(first(x))))
def move_views(x: Value, first: Map, view: View, second: Map) -> Value:
    return _merged_behind(x, first, [view], second)


@move_views.also(lambda x, first, view, second: second(view(first(x))))
def merge_before_view(x: Value, first: Map, view: View, second: Map) -> Value:
    return _merged_before(x, first, [view], second)


@move_views.also(lambda x, first, a, b, second: second(b(a(first(x)))))
def merge_behind_two_views(x: Value, first: Map, a: View, b: View, second: Map) -> Value:
    return _merged_behind(x, first, [a, b], second)


@move_views.also(lambda x, first, a, b, second: second(b(a(first(x)))))
def merge_before_two_views(x: Value, first: Map, a: View, b: View, second: Map) -> Value:
    return _merged_before(x, first, [a, b], second)


@move_views.also(lambda x, view, op, back: back(op(view(x)), x))
def drop_reshape_that_is_undone(x: Value, view: Reshape, op: Map, back: ReshapeAs) -> Value:
    return _without_view(x, view, op)


@move_views.also(lambda x, view, op, back: back(op(view(x))))
def drop_permutation_that_is_undone(x: Value, view: Permutation, op: Map, back: Permutation) -> Value:
    rank = len(x.tensor_type.shape)
    require(inverts(back, view, rank), f"{back.label} does not undo {view.label}")
    return _without_view(x, view, op)


@move_views.also(lambda x, view, back: back(view(x)))
def drop_pair_of_permutations(x: Value, view: Permutation, back: Permutation) -> Value:
    rank = len(x.tensor_type.shape)
    require(inverts(back, view, rank), f"{back.label} does not undo {view.label}")
    return x


def _merged_behind(x: Value, first: Linear, views: Sequence[View], second: Linear) -> Value:
    """second(v(first(x))) as one operator behind the views."""
    before, spatial = _spatial_axes(_after(first, x), first, views, second)
    require(second.spatial is not None or first.spatial is None, "a factor for all channels alike moves to the others")
    _require_same_way(x.tensor_type, before, views, spatial)
    y = x
    for view in views:
        y = view(y)
    moved = relocated(first, spatial)
    _require_one_batch_axis(moved, y.tensor_type, spatial)
    return compose(second, moved, y.tensor_type.size(spatial))(y)


def _merged_before(x: Value, first: Linear, views: Sequence[View], second: Linear) -> Value:
    """second(v(first(x))) as one operator before the views."""
    spatial, behind = _spatial_axes(_after(first, x), first, views, second)
    require(first.spatial is not None or second.spatial is None, "a factor for all channels alike moves to the others")
    moved = relocated(second, spatial)
    _require_one_batch_axis(moved, x.tensor_type, spatial)
    y = compose(moved, first, x.tensor_type.size(spatial))(x)
    _require_same_way(y.tensor_type, spatial, views, behind)
    for view in views:
        y = view(y)
    return y


def _without_view(x: Value, view: Structural, op: Linear) -> Value:
    spatial, _ = _spatial_axes(x.tensor_type, None, [view], op)
    moved = relocated(op, spatial)
    _require_one_batch_axis(moved, x.tensor_type, spatial)
    return moved(x)


def _after(first: Linear, x: Value) -> TensorType:
    return first(x).tensor_type


def _spatial_axes(given: TensorType, first: Linear | None, views: Sequence[View], second: Linear) -> tuple[int, int]:
    """How many axes stand behind the channels before the views, and behind them.

    The channel axis is the one on which the two operators act; a factor that is the same for all channels acts on any.
    """
    known = None if first is None else first.spatial
    candidates = range(len(given.shape)) if known is None else [len(given.shape) - 1 - known]
    refusal = Refusal("neither operator says on which axis it acts")
    for axis in candidates:
        try:
            spatial = _followed(given, axis, views)
        except Refusal as found:
            refusal = found
            continue
        if second.spatial in (None, spatial):
            require(axis > 0 or (known is None and second.spatial is None), "the view makes channels of the batch")
            return len(given.shape) - 1 - axis, spatial
        refusal = Refusal(
            "the two operators act on different axes, also where the view between them leaves the channels"
        )
    raise refusal


def _followed(given: TensorType, axis: int, views: Sequence[View]) -> int:
    for view in views:
        axis = carried_axis(view, given, axis)
        found = view.infer(given)
        require(found is not None, f"{view.label} makes no tensor")
        assert found is not None
        given = found
    return len(given.shape) - 1 - axis


def _require_same_way(given: TensorType, before: int, views: Sequence[View], behind: int) -> None:
    """Views that name the number of channels do not take another number."""
    try:
        found = _followed(given, len(given.shape) - 1 - before, views)
    except Refusal as refusal:
        raise Refusal(f"the view between the two operators names the number of channels: {refusal.reason}") from refusal
    require(found == behind, "the view between the two operators treats another number of channels in another way")


def _require_one_batch_axis(op: Linear, given: TensorType, spatial: int) -> None:
    free = not isinstance(op, Conv) or spatial == 0 or len(given.shape) == spatial + 2
    require(free, f"a convolution takes one batch axis before its channels, and {given} has more")


class _Views(nn.Module):
    """Calls of tensor methods, with their arguments, in order."""

    def __init__(self, *calls: tuple[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        for name, arguments in self.calls:
            x = getattr(x, name)(*arguments)
        return x


def _tokens() -> nn.Module:
    return _Views(("flatten", (2,)), ("transpose", (1, 2)))


class _NormalisedTokens(nn.Module):
    """A batch norm over the channels of tokens, as LeViT (arXiv:2104.01136) has it behind each linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        normalised: Tensor = self.norm(x.flatten(0, 1)).reshape_as(x)
        return torch.relu(normalised)


@move_views.fires_on(shape=(2, 5, 6))
def batch_norm_of_tokens_behind_a_reshape() -> nn.Module:
    return _NormalisedTokens().eval()


@move_views.fires_on(shape=(2, 3, 8, 8))
def patches_that_become_tokens_before_a_linear_layer() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 4, 4), _tokens(), nn.Linear(6, 5)).eval()


@move_views.fires_on(shape=(2, 3, 8, 8))
def linear_layer_on_channels_last_between_convolutions() -> nn.Module:
    last, first = _Views(("permute", (0, 2, 3, 1))), _Views(("permute", (0, 3, 1, 2)))
    return nn.Sequential(nn.ReLU(), last, nn.Linear(3, 3), first, nn.Conv2d(3, 4, 3)).eval()


@move_views.fires_on(shape=(2, 6, 8, 8))
def pointwise_head_before_global_pooling() -> nn.Module:
    return nn.Sequential(nn.Conv2d(6, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)).eval()


@move_views.fires_on(shape=(2, 5, 6))
def norm_before_the_token_that_is_classified() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(5), _Views(("select", (2, 0))), nn.Linear(5, 3)).eval()


@move_views.leaves_alone(shape=(2, 4, 4, 6), because="is not known to leave axis")
def linear_layer_behind_a_flatten_of_its_channels() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Flatten(), nn.Linear(96, 3)).eval()


@move_views.leaves_alone(shape=(2, 6, 6), because="act on different axes")
def linear_layers_on_the_two_axes_of_a_transposition() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), _Views(("transpose", (1, 2))), nn.Linear(6, 6)).eval()


@move_views.leaves_alone(shape=(2, 3, 8, 8), because="more than one position")
def convolution_behind_a_convolution_with_a_permutation_of_positions_between() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), _Views(("transpose", (2, 3))), nn.Conv2d(4, 4, 3)).eval()


@move_views.leaves_alone(shape=(2, 3, 6, 6), because="does not undo")
def permutations_that_do_not_undo_each_other() -> nn.Module:
    return nn.Sequential(nn.ReLU(), _Views(("permute", (0, 2, 3, 1)), ("permute", (0, 2, 3, 1)))).eval()


@move_views.leaves_alone(shape=(2, 3, 6, 5), because="one batch axis")
def linear_layer_on_an_axis_with_two_batch_axes_before_it() -> nn.Module:
    swap = _Views(("transpose", (2, 3)))
    return nn.Sequential(nn.ReLU(), swap, nn.Linear(6, 6), swap, nn.ReLU()).eval()


@move_views.leaves_alone(shape=(2, 3, 5, 6), because="names the number")
def reshape_that_names_the_channels_between_layers_that_change_them() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), _Views(("reshape", (-1, 8))), nn.Linear(8, 4)).eval()
