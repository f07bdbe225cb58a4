"""Is the proof awake? Faults are planted in the algebra, the passes, the lift and the emitter; none may get through."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rgc
from rgc import (
    BatchNorm,
    Conv,
    Interval,
    Pad,
    PixelUnshuffle,
    Scale,
    Subsample,
    Value,
    algebra,
    contractions,
    emit,
    engine,
    functions,
    kernels,
    lift,
    modules,
    operators,
    ranges,
    rearrange,
    region,
    rewrite,
    sparsity,
    views,
)
from rgc.axis import Axis
from rgc.kernels import Kernel
from rgc.operators import AvgPool, Normalize
from rgc.rearrange import BorderFill
from rgc.region import PartialJoin
from rgc.rewrite import Case, Match
from rgc.testing import randomize

Faulty = Callable[..., Any]

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


class Planter:
    """Plants one fault, and counts how often the faulty code ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.reached = 0

    def replace(self, owner: Any, name: str, faulty: Faulty) -> None:
        """Calls of ``owner.name`` become ``faulty(original, ...)``."""
        self._monkeypatch.setattr(owner, name, self._counting(getattr(owner, name), faulty))

    def replace_item(self, table: Any, key: Any, faulty: Faulty) -> None:
        """The same for an entry of a table."""
        self._monkeypatch.setitem(table, key, self._counting(table[key], faulty))

    def replace_result(self, rewrite_name: str, case: int, faulty: Faulty) -> None:
        """The same for the function of a built-in rewrite."""
        fields = getattr(importlib.import_module("rgc.passes"), rewrite_name).cases[case].__dict__  # a Case is frozen
        self._monkeypatch.setitem(fields, "build", self._counting(fields["build"], faulty))

    def _counting(self, original: Any, faulty: Faulty) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.reached += 1
            return faulty(original, *args, **kwargs)

        return counted


@dataclass(frozen=True)
class Mutant:
    """A fault, and a model that exercises it."""

    fault: str
    plant: Callable[[Planter], None]
    model: Callable[[], nn.Module]
    shape: tuple[int, ...] = (2, 4, 9, 8)
    passes: Any = "default"


# --- models --------------------------------------------------------------------------------------------------------


def chain(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: copy.deepcopy(nn.Sequential(*layers))


class Together(nn.Module):
    """Branches of one input that are combined, then a ReLU."""

    def __init__(self, combine: Callable[..., Tensor], *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.combine(*(branch(x) for branch in self.branches)))


def together(combine: Callable[..., Tensor], *branches: nn.Module) -> Callable[[], nn.Module]:
    return lambda: copy.deepcopy(Together(combine, *branches))


def add(a: Tensor, b: Tensor) -> Tensor:
    return a + b


def subtract(a: Tensor, b: Tensor) -> Tensor:
    return a - b


def concatenate(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, b], 1)


class Rectified(nn.Module):
    """The input of the join is not the input of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Together(add, nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(torch.relu(x))
        return y


class UsedTwice(nn.Module):
    """One convolution under two names: through a batch norm, and as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.relu(self.bn(y)) + torch.tanh(y)


class OverwritingBlend(nn.Module):
    """The in-place ReLU overwrites what the other half of the blend reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return 0.25 * F.relu(y, inplace=True) + 0.75 * y


class OverwrittenTwin(nn.Module):
    """Two equal convolutions, one of them rectified in place before the other is read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv(x))
        return y + torch.sigmoid(self.conv(x))


class WithHook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.conv.register_forward_hook(lambda module, args, output: 2 * output)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return y


class Blend(nn.Module):
    """A ReLU that has faded out to a weight of one in a thousand."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.001 * torch.relu(x) + 0.999 * x


class ClosedGate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x.mean((2, 3), keepdim=True)) + 0.0 * x


class Twins(nn.Module):
    """Two convolutions of the same form with weights of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.first(x)) * torch.tanh(self.second(x))


POINTWISE_THEN_PADDED = chain(nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 3, padding=1))
PADDED_THEN_POINTWISE = chain(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1))
BIASED_THEN_PADDED = chain(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1))
CONV_THEN_BN = chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, eps=1e-2))
TRANSPOSED_THEN_BN = chain(nn.ConvTranspose2d(4, 4, 3, stride=2, groups=1), nn.BatchNorm2d(4))
GROUPED_THEN_POINTWISE = chain(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1, groups=1))
EVEN_KERNEL = chain(nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 2, padding="same"))
SQUARE_AND_POINTWISE = together(add, nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1))
LINEAR_NETWORK = chain(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 32))


# --- a correct rewrite of a user that pads with a constant -----------------------------------------------------------


@rewrite(lambda x, bn, conv: conv(bn(x)))
def pad_what_the_batch_norm_maps_to_zero(x: Value, bn: BatchNorm, conv: Conv) -> Value:
    """conv(s x + t) with zero padding is a convolution that pads x with -t / s, which s x + t takes to zero."""
    folded = bn.as_linear()
    assert isinstance(folded, Scale)
    s, t = folded.scale, folded.shift
    weight = conv.weight.double()
    bias = (weight.sum((2, 3)) @ t) + (0 if conv.bias is None else conv.bias.double())
    return replace(conv, weight=weight * s.view(1, -1, 1, 1), bias=bias, pad_value=-t / s)(x)


BN_THEN_PADDED = chain(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1))


# --- faults ----------------------------------------------------------------------------------------------------------


def in_kernel(change: Callable[[Tensor], Tensor]) -> Callable[[Planter], None]:
    """A fault in the weight of two merged convolutions."""

    def faulty(original: Any, *args: Any) -> Kernel:
        right = original(*args)
        return Kernel(change(right.weight), right.groups)

    return lambda p: p.replace(algebra, "compose_kernels", faulty)


def in_geometry(**change: Callable[[Conv, Conv, Conv], Any]) -> Callable[[Planter], None]:
    """A fault in a geometry field of the composition: a function of (right result, second, first)."""

    def faulty(original: Any, second: Conv, first: Conv) -> Conv:
        right = original(second, first)
        return replace(right, **{name: wrong(right, second, first) for name, wrong in change.items()})

    return lambda p: p.replace(algebra, "_linear_part", faulty)


def in_batch_norm(wrong: Callable[[BatchNorm], tuple[Tensor, Tensor]]) -> Callable[[Planter], None]:
    """A fault in the scale and shift of a batch norm."""
    return lambda p: p.replace(BatchNorm, "as_linear", lambda original, bn: Scale(*wrong(bn), bn.axes))


def statistics(bn: BatchNorm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert bn.weight is not None and bn.bias is not None
    return bn.weight.double(), bn.bias.double(), bn.mean.double(), bn.var.double()


def eps_forgotten(bn: BatchNorm) -> tuple[Tensor, Tensor]:
    gamma, beta, mean, var = statistics(bn)
    return gamma * var.rsqrt(), beta - gamma * mean * var.rsqrt()


def eps_of_one_in_100000(bn: BatchNorm) -> tuple[Tensor, Tensor]:
    gamma, beta, mean, var = statistics(bn)
    s = gamma * (var + 1e-5).rsqrt()
    return s, beta - s * mean


def eps_on_the_deviation(bn: BatchNorm) -> tuple[Tensor, Tensor]:
    gamma, beta, mean, var = statistics(bn)
    s = gamma / (var.sqrt() + bn.eps)
    return s, beta - s * mean


def gamma_and_beta_swapped(bn: BatchNorm) -> tuple[Tensor, Tensor]:
    gamma, beta, mean, var = statistics(bn)
    s = beta * (var + bn.eps).rsqrt()
    return s, gamma - s * mean


def mean_not_subtracted(bn: BatchNorm) -> tuple[Tensor, Tensor]:
    gamma, beta, _, var = statistics(bn)
    return gamma * (var + bn.eps).rsqrt(), beta


def mean_not_scaled(bn: BatchNorm) -> tuple[Tensor, Tensor]:
    gamma, beta, mean, var = statistics(bn)
    return gamma * (var + bn.eps).rsqrt(), beta - mean


def variance_for_deviation(bn: BatchNorm) -> tuple[Tensor, Tensor]:
    gamma, beta, mean, var = statistics(bn)
    s = gamma / (var + bn.eps)
    return s, beta - s * mean


def wrong_axis_of_a_transposed_convolution(p: Planter) -> None:
    p.replace(algebra, "transpose_kernel", lambda original, kernel: kernel)


def groups_ignored(p: Planter) -> None:
    def tiled(original: Any, kernel: Kernel, groups: int) -> Kernel:
        ratio = kernel.groups // groups
        return Kernel(kernel.weight.repeat(1, ratio, *[1] * len(kernel.extent)), groups)

    p.replace(kernels, "regroup", tiled)


def kernels_misaligned(p: Planter) -> None:
    def shifted(original: Any, a: Axis, b: Axis) -> Any:
        right = original(a, b)
        first, second = right.places
        return replace(right, places=(first, slice(second.start - 1, second.stop - 1, second.step)))

    p.replace(algebra, "align_axes", shifted)


def identity_in_the_middle_of_an_even_kernel(p: Planter) -> None:
    def centred(original: Any, a: Axis, b: Axis) -> Any:
        right = original(a, b)
        middle = right.axis.kernel // 2
        return replace(right, places=(right.places[0], slice(middle, middle + 1, 1)))

    p.replace(algebra, "align_axes", centred)


def ones_doubled(original: Any, second: Conv, first: Conv, with_bias: bool = False) -> Tensor | None:
    ones: Tensor | None = original(second, first, with_bias=with_bias)
    return None if ones is None else 2 * ones


def identity_of_ones(p: Planter) -> None:
    def ones(original: Any, scale: Scale, channels: int, spatial: int) -> Conv:
        groups = 2
        return Conv(torch.ones(channels, channels // groups, *[1] * spatial, dtype=torch.float64), groups=groups)

    p.replace(Scale, "as_conv", ones)


def pooling_guards_forgotten(p: Planter) -> None:
    def unguarded(original: Any, pool: AvgPool, channels: int, spatial: int) -> Conv:
        _ = pool.ceil_mode, pool.count_include_pad, pool.divisor_override  # read, or the engine would refuse
        return original(
            replace(pool, ceil_mode=False, count_include_pad=True, divisor_override=None), channels, spatial
        )

    p.replace(AvgPool, "as_conv", unguarded)


def convolutions_lifted_with(**change: Any) -> Callable[[Planter], None]:
    """A fault in the lift of convolutions: a field with a fixed value."""

    def faulty(original: Any, lifter: Any, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
               dilation: Any = 1, groups: int = 1, padding_mode: str = "zeros") -> Any:  # fmt: skip
        given = {
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "padding_mode": padding_mode,
        }
        return original(lifter, x, weight, bias, **{**given, **change})

    return lambda p: p.replace(modules, "conv", faulty)


def output_padding_dropped(p: Planter) -> None:
    def faulty(original: Any, lifter: Any, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
               output_padding: Any = 0, groups: int = 1, dilation: Any = 1) -> Any:  # fmt: skip
        return original(lifter, x, weight, bias, stride, padding, 0, groups, dilation)

    p.replace(modules, "conv_transpose", faulty)


def batch_statistics_folded(p: Planter) -> None:
    def faulty(original: Any, lifter: Any, module: Any, x: Any) -> Any:
        value = original(lifter, module, x)
        value.op = replace(value.op, training=False)
        return value

    p.replace_item(modules.MODULES, nn.BatchNorm2d, faulty)


def emitted_convolutions_with(**change: Any) -> Callable[[Planter], None]:
    """A fault in the layers that are made of convolutions."""
    return lambda p: p.replace(emit, "_convolution", lambda original, op, cast: original(replace(op, **change), cast))


def pad_amounts_not_reversed(p: Planter) -> None:
    def faulty(original: Any, op: Conv) -> nn.Module:
        amounts = tuple(amount for sides in op.padding for amount in sides)
        return nn.ZeroPad2d(amounts)  # type: ignore[arg-type]  # four numbers

    p.replace(emit, "_padding_layer", faulty)


def bias_map_lost_on_emission(p: Planter) -> None:
    def faulty(original: Any, emitter: Any, value: Value, op: Conv, x: Any) -> Any:
        pinned = op.bias is not None and op.bias.dim() > 1
        return original(emitter, value, replace(op, bias=op.bias[:, 4, 4]) if pinned and op.bias is not None else op, x)

    p.replace(emit._Emitter, "_conv", faulty)


def pad_value_lost_on_emission(p: Planter) -> None:
    p.replace(
        emit._Emitter,
        "_conv",
        lambda original, emitter, value, op, x: original(emitter, value, replace(op, pad_value=None), x),
    )


def in_the_region_source(p: Planter) -> None:
    def faulty(original: Any, case: Case, found: Any) -> Match | None:
        match: Match | None = original(case, found)
        if match is None or not found.source.inputs:
            return match
        return replace(match, values={name: value.inputs[0] for name, value in match.values.items()})

    p.replace(Case, "match_region", faulty)


def sign_of_a_difference_ignored(p: Planter) -> None:
    def faulty(original: Any, second: Any, first: Any, size: Any = None) -> Any:
        negation = isinstance(second, Scale) and bool((second.scale == -1).all())
        return first if negation else original(second, first, size)

    p.replace(region, "compose", faulty)


def concatenation_in_the_wrong_order(p: Planter) -> None:
    p.replace(
        region,
        "_stacked",
        lambda original, value, images, size, channels: original(value, images[::-1], size, channels),
    )


def shared_convolution_scaled_in_place(p: Planter) -> None:
    def faulty(original: Any, x: Value, conv: Conv, bn: BatchNorm) -> Value:
        folded = bn.as_linear()
        assert isinstance(folded, Scale) and conv.bias is not None
        conv.weight.mul_(folded.scale.view(-1, 1, 1, 1))
        conv.bias.mul_(folded.scale).add_(folded.shift)
        return replace(conv, weight=conv.weight, bias=conv.bias)(x)

    p.replace_result("fold_batchnorm", 0, faulty)


def nearly_faded_is_faded(p: Planter) -> None:
    module = importlib.import_module("rgc.passes.remove_linear_activation")
    p.replace(module, "require", lambda original, condition, reason: None)


def slope_not_looked_at(p: Planter) -> None:
    p.replace_result("remove_linear_activation", 0, lambda original, x, activation: x)


def slope_of_the_first_channel_only(p: Planter) -> None:
    def faulty(original: Any, x: Value, activation: Any) -> Value:
        rgc.require(activation.weight is not None and bool(activation.weight[0] == 1), "not the identity")
        return x

    p.replace_result("remove_linear_activation", 0, faulty)


def shape_of_the_zero_branch_ignored(p: Planter) -> None:
    p.replace_result("drop_identity", 1, lambda original, x, y, zero: y)


def different_operators_taken_for_equal(p: Planter) -> None:
    module = importlib.import_module("rgc.passes.hygiene")
    p.replace(module, "_key", lambda original, op: op.label)


def collapse_transposed(p: Planter) -> None:
    module = importlib.import_module("rgc.passes.collapse")
    p.replace(module, "_matrix", lambda original, *args: original(*args).T.contiguous())


def collapse_offset_dropped(p: Planter) -> None:
    def faulty(original: Any, x: Value, region: Any) -> Value:
        made: Value = original(x, region)
        return cast(Conv, made.op).changed(bias=None)(*made.inputs)

    p.replace_result("collapse", 0, faulty)


def ranges_of_activations_with(**change: Any) -> Callable[[Planter], None]:
    """A fault in the range of an activation, by its name."""

    def faulty(original: Any, op: Any, x: Interval) -> Interval:
        wrong: Interval = change.get(op.name, original(op, x))
        return wrong

    return lambda p: p.replace(ranges, "_activated", faulty)


def every_gamma_taken_for_positive(p: Planter) -> None:
    module = importlib.import_module("rgc.passes.exchange_max_pool")
    p.replace(module, "require", lambda original, condition, reason: None)


def constants_kept_by_every_pooling(p: Planter) -> None:
    module = importlib.import_module("rgc.passes.exchange_resampling")
    p.replace(module, "_has_offset", always(False))


def several_positions_taken_for_one(p: Planter) -> None:
    module = importlib.import_module("rgc.passes.exchange_resampling")
    p.replace(module, "_require_one_position", always(None))


def every_axis_taken_for_a_position(p: Planter) -> None:
    p.replace(operators, "_resampled_by", always(0))


def dilation_of_a_max_pooling_not_emitted(p: Planter) -> None:
    p.replace(emit, "_max_pool", lambda original, op: original(replace(op, dilation=(1, 1))))


def corners_not_lifted(p: Planter) -> None:
    p.replace(
        modules,
        "upsample",
        lambda original, lifter, x, size, factor, mode, corners, recompute: original(
            lifter, x, size, factor, mode, False, recompute
        ),
    )


class Then(nn.Module):
    """Modules by name, and a function that says what becomes of the input."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.call = forward

    def forward(self, x: Tensor) -> Any:
        return self.call(x, **self.parts)


def then(forward: Callable[..., Any], **parts: nn.Module) -> Callable[[], nn.Module]:
    return lambda: copy.deepcopy(Then(forward, **parts))


def with_padding(change: Callable[[Any], Any]) -> Callable[[Planter], None]:
    """A fault in the sides of a pad or crop that becomes a convolution."""

    def faulty(original: Any, pad: Pad, channels: int, spatial: int) -> Conv:
        return original(replace(pad, padding=tuple(map(change, pad.padding))), channels, spatial)  # type: ignore[no-any-return]

    return lambda p: p.replace(Pad, "as_conv", faulty)


def selection_off_by_one(p: Planter) -> None:
    def faulty(original: Any, index: tuple[int, ...], channels: int, spatial: int) -> Conv:
        return original(tuple((each + 1) % channels for each in index), channels, spatial)  # type: ignore[no-any-return]

    p.replace(rearrange, "selecting", faulty)


def offset_of_a_subsampling_dropped(p: Planter) -> None:
    def faulty(original: Any, op: Subsample, channels: int, spatial: int) -> Conv:
        return original(replace(op, crop=tuple((0, 0) for _ in op.crop)), channels, spatial)  # type: ignore[no-any-return]

    p.replace(Subsample, "as_conv", faulty)


def places_of_a_block_reversed(p: Planter) -> None:
    def faulty(original: Any, op: PixelUnshuffle, channels: int, spatial: int) -> Conv:
        right: Conv = original(op, channels, spatial)
        return right.changed(weight=right.weight.flip(2, 3))

    p.replace(PixelUnshuffle, "as_conv", faulty)


def channels_in_another_order_before_a_pixel_shuffle(p: Planter) -> None:
    module = importlib.import_module("rgc.passes.exchange_pixel_shuffle")

    def faulty(original: Any, pointwise: Conv, blocks: int) -> Conv:
        right: Conv = original(pointwise, blocks)
        out, columns = right.out_channels, right.in_channels
        weight = right.weight.reshape(out // blocks, blocks, -1, 1, 1).transpose(0, 1)  # places first, then channels
        assert right.groups == 1
        return right.changed(weight=weight.reshape(out, columns, 1, 1))

    p.replace(module, "_before", faulty)


def axes_of_a_transposition_taken_to_stay(p: Planter) -> None:
    p.replace_item(views._FOLLOW, "transpose", lambda original, given, axis, *dims: axis)


def weights_of_the_first_norm_for_all(p: Planter) -> None:
    seen: list[Scale | None] = []

    def faulty(original: Any, emitter: Any, value: Value, op: Normalize, affine: Scale | None, x: Any) -> Any:
        seen.append(affine)
        return original(emitter, value, op, seen[0], x)

    p.replace(emit._Emitter, "_normalization", faulty)


def one_reader_forgotten(p: Planter) -> None:
    module = importlib.import_module("rgc.passes.distribute_scale")
    p.replace(module, "_merged_readers", lambda original, graph, value: original(graph, value)[:-1])


def layer_before_the_views_reversed(p: Planter) -> None:
    module = importlib.import_module("rgc.passes.distribute_scale")

    def faulty(original: Any, graph: Any, value: Value) -> Any:
        before = original(graph, value)
        return before and (before[0], before[1].changed(weight=before[1].weight.flip(0)))

    p.replace(module, "_layer_before", faulty)


def rest_of_a_sum(change: Callable[[Any], Any]) -> Callable[[Planter], None]:
    """A fault in the addends that a partial join leaves as they are."""

    def faulty(original: Any, partial: PartialJoin, value: Value) -> Value:
        return original(replace(partial, rest=change(partial.rest)), value)  # type: ignore[no-any-return]

    return lambda p: p.replace(PartialJoin, "embed", faulty)


def weight_dropped_where_groups_are_found(p: Planter) -> None:
    module = importlib.import_module("rgc.passes.merge_branches")

    def faulty(original: Any, conv: Conv) -> Conv:
        weight = conv.weight.clone()
        weight[tuple(weight.nonzero()[0])] = 0
        return original(conv.changed(weight=weight))  # type: ignore[no-any-return]

    p.replace(module, "regroup_by_sparsity", faulty)


def diagonal_blocks_in_another_order(p: Planter) -> None:
    def faulty(original: Any, conv: Conv, groups: int) -> Conv:
        right: Conv = original(conv, groups)
        return right.changed(weight=right.weight.flip(0))

    p.replace(sparsity, "_diagonal_blocks", faulty)


def one_side_of_a_border_forgotten(p: Planter) -> None:
    def faulty(original: Any, x: Value, first: BorderFill, second: BorderFill) -> Value:
        value = original(x, first, second)
        fill = value.op
        widths = ((0, fill.widths[0][1]), *fill.widths[1:])
        return replace(fill, widths=widths)(x)

    p.replace_result("fold_border", 1, faulty)


def border_not_filled_on_emission(p: Planter) -> None:
    p.replace(
        emit._Emitter,
        "_assigned",
        lambda original, emitter, value, op, y: original(
            emitter, value, replace(op, widths=((0, 0), *op.widths[1:])), y
        ),
    )


def constants_in_both_branches(p: Planter) -> None:
    module = importlib.import_module("rgc.passes.distribute_over_branches")
    p.replace(module, "_without_constants", lambda original, layer: layer)


def slices_of_a_norm_shifted(p: Planter) -> None:
    module = importlib.import_module("rgc.passes.distribute_over_branches")

    def faulty(original: Any, layer: Any, channels: Any) -> Any:
        linear = layer.as_linear()
        return original(Scale(linear.scale.roll(1), linear.shift, linear.axes), channels)

    p.replace(module, "_parts", faulty)


def rows(x: Tensor) -> Tensor:
    """Constants over the outermost rows and columns, side by side."""
    y = torch.relu(x) * torch.sigmoid(x)
    y[:, :, :1] = 0.5
    y[:, :, -1:] = 0.5
    y[:, :, :, :2] = 0.5
    return torch.tanh(y)


def partial_sum(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    y = torch.relu(x)
    return torch.sigmoid(a(y) - torch.tanh(x) + b(y) + torch.sigmoid(x))


def parts(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    y = torch.relu(x)
    return torch.tanh(torch.cat([a(y[:, :1]), b(y[:, 1:])], 1))


def two_readers(x: Tensor, bn: nn.Module, a: nn.Module, b: nn.Module) -> Tensor:
    y = bn(torch.relu(x))
    return torch.tanh(a(y)) * torch.sigmoid(b(y))


def of_two_inputs(combine: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def forward(x: Tensor, a: nn.Module, b: nn.Module, last: nn.Module) -> Tensor:
        return torch.relu(last(combine(a(x), b(torch.sigmoid(x)))))

    return forward


def tokens_and_back(x: Tensor, linear: nn.Module, bn: nn.Module) -> Tensor:
    tokens = torch.softmax(x.flatten(2).transpose(1, 2), 1)
    return x + bn(linear(tokens).transpose(1, 2).reshape(x.shape[0], 4, *x.shape[2:]))


def product(x: Tensor, linear: nn.Module, matrix: nn.Linear) -> Tensor:
    return torch.relu(linear(x) @ matrix.weight)


def mean_of_channels_and_rows(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    return torch.relu(second(first(x).mean((1, 2), keepdim=True)))


def always(result: Any) -> Faulty:
    return lambda original, *args, **kwargs: result


def prelu_of_two_slopes() -> nn.Module:
    layer = nn.PReLU(4, init=1.0)
    with torch.no_grad():
        layer.weight[2] = 0.5
    return nn.Sequential(nn.Conv2d(4, 4, 3), layer)


MUTANTS = [
    # batch norm
    Mutant("eps forgotten", in_batch_norm(eps_forgotten), CONV_THEN_BN),
    Mutant("eps assumed to be 1e-5", in_batch_norm(eps_of_one_in_100000), CONV_THEN_BN),
    Mutant("eps added to the deviation", in_batch_norm(eps_on_the_deviation), CONV_THEN_BN),
    Mutant("gamma and beta swapped", in_batch_norm(gamma_and_beta_swapped), CONV_THEN_BN),
    Mutant("mean not subtracted", in_batch_norm(mean_not_subtracted), CONV_THEN_BN),
    Mutant("mean not scaled", in_batch_norm(mean_not_scaled), CONV_THEN_BN),
    Mutant("variance for deviation", in_batch_norm(variance_for_deviation), CONV_THEN_BN),
    Mutant("wrong axis of a transposed convolution", wrong_axis_of_a_transposed_convolution, TRANSPOSED_THEN_BN),
    # composition
    Mutant("kernel flipped", in_kernel(lambda w: w.flip(-1)), POINTWISE_THEN_PADDED),
    Mutant("kernel transposed", in_kernel(lambda w: w.transpose(-1, -2)), POINTWISE_THEN_PADDED),
    Mutant("channels transposed", in_kernel(lambda w: w.transpose(0, 1)), POINTWISE_THEN_PADDED),
    Mutant(
        "kernel rounded to single precision", in_kernel(lambda w: (w * 2**24).round() / 2**24), POINTWISE_THEN_PADDED
    ),
    Mutant(
        "second before first",
        lambda p: p.replace(algebra, "compose_kernels", lambda original, a, b, i, o: original(b, a, o, i)),
        chain(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)),
    ),
    Mutant(
        "padding of the second layer subtracted",
        in_geometry(
            padding=lambda right, a, b: tuple(
                (q, q) for q in (abs(y[0] - x[0]) for x, y in zip(a.padding, b.padding, strict=True))
            )
        ),
        chain(nn.Conv2d(4, 4, 1, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1)),
    ),
    Mutant(
        "padding not multiplied by the stride",
        in_geometry(padding=lambda right, a, b: a.padding),
        chain(nn.Conv2d(4, 4, 1, stride=2, bias=False), nn.Conv2d(4, 4, 3, padding=1)),
    ),
    Mutant(
        "sides of the padding swapped",
        in_geometry(padding=lambda right, a, b: tuple(sides[::-1] for sides in right.padding)),
        EVEN_KERNEL,
    ),
    Mutant(
        "stride of the first layer lost",
        in_geometry(stride=lambda right, a, b: a.stride),
        chain(nn.Conv2d(4, 4, 3, stride=2), nn.Conv2d(4, 4, 1)),
    ),
    Mutant(
        "dilation ignored",
        in_geometry(dilation=lambda right, a, b: 1),
        chain(nn.Conv2d(4, 4, 3, dilation=2, padding=2), nn.Conv2d(4, 4, 1)),
    ),
    Mutant("blocks of a grouped kernel swapped", in_kernel(lambda w: w.roll(2, 1)), GROUPED_THEN_POINTWISE),
    Mutant(
        "border never refuses",
        lambda p: p.replace(algebra, "border", always(None)),
        chain(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1)),
    ),
    # biases
    Mutant("bias dropped", lambda p: p.replace(algebra, "_pushed_bias", always(None)), PADDED_THEN_POINTWISE),
    Mutant(
        "bias doubled",
        lambda p: p.replace(algebra, "_pushed_bias", lambda original, a, b: 2 * original(a, b)),
        PADDED_THEN_POINTWISE,
    ),
    Mutant(
        "bias of the first layer lost",
        lambda p: p.replace(algebra, "_pushed_bias", lambda original, a, b: a.bias.double()),
        PADDED_THEN_POINTWISE,
    ),
    Mutant(
        "bias not multiplied by the second kernel",
        lambda p: p.replace(algebra, "_pushed_bias", lambda original, a, b: a.bias.double() + b.bias.double()),
        PADDED_THEN_POINTWISE,
    ),
    Mutant(
        "ring taken for the bias", lambda p: p.replace(algebra, "_ring_is_constant", always(True)), BIASED_THEN_PADDED
    ),
    Mutant(
        "bias map replaced by its middle",
        lambda p: p.replace(algebra, "_without_constant_axes", lambda original, bias: bias[:, 4, 4].contiguous()),
        BIASED_THEN_PADDED,
        passes="all,-collapse",
    ),
    Mutant(
        "bias map shifted by one",
        lambda p: p.replace(algebra, "_without_constant_axes", lambda original, bias: bias.roll(1, -1)),
        BIASED_THEN_PADDED,
        passes="all,-collapse",
    ),
    Mutant(
        "channel of ones without the bias",
        lambda p: p.replace(algebra, "_pushed_ones", lambda original, a, b, with_bias=False: original(a, b)),
        BIASED_THEN_PADDED,
    ),
    Mutant(
        "channel of ones doubled",
        lambda p: p.replace(algebra, "_pushed_ones", ones_doubled),
        BIASED_THEN_PADDED,
    ),
    Mutant(
        "pad value of the wrong sign",
        lambda p: p.replace(algebra, "_value_that_becomes", lambda original, wanted, first: -original(wanted, first)),
        BN_THEN_PADDED,
    ),
    # sums
    Mutant("sum misaligned by one", kernels_misaligned, SQUARE_AND_POINTWISE),
    Mutant(
        "groups ignored", groups_ignored, together(add, nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Conv2d(4, 4, 1))
    ),
    Mutant(
        "identity in the middle of an even kernel",
        identity_in_the_middle_of_an_even_kernel,
        together(add, nn.Conv2d(4, 4, 2, padding="same"), nn.Identity()),
    ),
    Mutant(
        "identity of ones for a grouped convolution",
        identity_of_ones,
        together(add, nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Identity()),
    ),
    Mutant(
        "bias of a branch dropped",
        lambda p: p.replace(algebra, "_sum_of_biases", lambda original, a, b: a.double()),
        SQUARE_AND_POINTWISE,
    ),
    Mutant(
        "padding modes mixed",
        lambda p: p.replace(algebra, "_padded_alike", lambda original, a, b: (a, replace(b, padding_mode="zeros"))),
        together(add, nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
    ),
    Mutant(
        "sign of a difference ignored",
        sign_of_a_difference_ignored,
        together(subtract, nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)),
    ),
    Mutant(
        "concatenation in the wrong order",
        concatenation_in_the_wrong_order,
        together(concatenate, nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)),
    ),
    Mutant("wrong source of a region", in_the_region_source, Rectified),
    # pooling
    Mutant(
        "count_include_pad ignored",
        pooling_guards_forgotten,
        together(add, nn.Conv2d(4, 4, 3, padding=1), nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
    ),
    Mutant(
        "ceil_mode ignored",
        pooling_guards_forgotten,
        chain(nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(4, 4, 3)),
        (2, 4, 8, 8),
    ),
    Mutant(
        "divisor_override ignored",
        pooling_guards_forgotten,
        chain(nn.AvgPool2d(2, divisor_override=3), nn.Conv2d(4, 4, 3)),
    ),
    # passes
    Mutant("nearly faded taken for faded", nearly_faded_is_faded, chain(nn.Conv2d(4, 4, 3), Blend())),
    Mutant("slope of 0.01 taken for the identity", slope_not_looked_at, chain(nn.Conv2d(4, 4, 3), nn.LeakyReLU(0.01))),
    Mutant("slope of the first channel only", slope_of_the_first_channel_only, prelu_of_two_slopes),
    Mutant("shape of the zero branch ignored", shape_of_the_zero_branch_ignored, ClosedGate),
    Mutant("shared convolution scaled in place", shared_convolution_scaled_in_place, UsedTwice),
    Mutant("different operators taken for equal", different_operators_taken_for_equal, Twins),
    Mutant("collapsed matrix transposed", collapse_transposed, LINEAR_NETWORK, (2, 2, 4, 4), passes="collapse"),
    Mutant("collapsed offset dropped", collapse_offset_dropped, LINEAR_NETWORK, (2, 2, 4, 4), passes="collapse"),
    # ranges
    Mutant(
        "gelu taken for non-negative",
        ranges_of_activations_with(gelu=Interval(0)),
        chain(nn.Conv2d(4, 4, 3), nn.GELU(), nn.ReLU()),
    ),
    Mutant(
        "tanh taken for non-negative",
        ranges_of_activations_with(tanh=Interval(0, 1)),
        chain(nn.Conv2d(4, 4, 3), nn.Tanh(), nn.LeakyReLU(0.5)),
    ),
    Mutant(
        "relu taken for bounded",
        ranges_of_activations_with(relu=Interval(0, 6)),
        chain(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Hardtanh(-1.0, 6.0)),
    ),
    Mutant(
        "signs of weights ignored",
        lambda p: p.replace(ranges, "_convolved", always(Interval(0))),
        chain(nn.Conv2d(4, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 1), nn.ReLU()),
    ),
    Mutant(
        "shift of a batch norm ignored",
        lambda p: p.replace(ranges, "_scaled", lambda original, op, x: x),
        chain(nn.Conv2d(4, 4, 3), nn.Sigmoid(), nn.BatchNorm2d(4), nn.ReLU()),
    ),
    Mutant(
        "difference taken for a sum in ranges",
        lambda p: p.replace(Interval, "__neg__", lambda original, x: x),
        together(subtract, nn.Sigmoid(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sigmoid())),
    ),
    # exchanges
    Mutant(
        "every gamma taken for positive",
        every_gamma_taken_for_positive,
        chain(nn.Conv2d(4, 4, 3), nn.MaxPool2d(2), nn.BatchNorm2d(4)),
    ),
    Mutant(
        "constants kept by every pooling",
        constants_kept_by_every_pooling,
        chain(nn.ReLU(), nn.Conv2d(4, 4, 1), nn.AvgPool2d(3, 2, 1), nn.ReLU()),
        passes="exchange_resampling",  # all passes make one convolution of the two
    ),
    Mutant(
        "several positions taken for one",
        several_positions_taken_for_one,
        chain(nn.Conv2d(4, 4, 1), nn.Flatten(), nn.BatchNorm1d(288)),
    ),
    Mutant(
        "every axis taken for a position",
        every_axis_taken_for_a_position,
        then(mean_of_channels_and_rows, first=nn.Conv2d(4, 4, 1), second=nn.Conv2d(1, 2, 1)),
    ),
    # lift
    Mutant(
        "corners not lifted",
        corners_not_lifted,
        chain(nn.Conv2d(4, 4, 3), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)),
    ),
    Mutant(
        "dilation not lifted",
        convolutions_lifted_with(dilation=1),
        chain(nn.Conv2d(4, 4, 3, dilation=2), nn.BatchNorm2d(4)),
    ),
    Mutant(
        "padding mode not lifted",
        convolutions_lifted_with(padding_mode="zeros"),
        chain(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(4)),
    ),
    Mutant(
        "output padding not lifted",
        output_padding_dropped,
        chain(nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1), nn.BatchNorm2d(4)),
    ),
    Mutant(
        "batch statistics not lifted",
        batch_statistics_folded,
        chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
    ),
    Mutant(
        "difference lifted as a sum",
        lambda p: p.replace_item(functions.FUNCTIONS, "sub", lambda original, *args: functions.add(*args)),
        together(subtract, nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)),
    ),
    Mutant(
        "aliasing of in-place calls ignored",
        lambda p: p.replace(lift._Lifter, "_rebind", lambda original, lifter, node, result: lifter._bind(node, result)),
        OverwritingBlend,
    ),
    Mutant(
        "hooks not seen",
        lambda p: [p.replace(module, "has_hooks", always(False)) for module in (lift, modules)],
        WithHook,
    ),
    # emission
    Mutant(
        "dilation of a max pooling not emitted",
        dilation_of_a_max_pooling_not_emitted,
        chain(nn.Conv2d(4, 4, 3), nn.MaxPool2d(2, 1, dilation=2)),
    ),
    Mutant(
        "dilation not emitted",
        emitted_convolutions_with(dilation=1),
        chain(nn.Conv2d(4, 4, 3, dilation=2, padding=2), nn.ReLU()),
    ),
    Mutant(
        "padding mode not emitted",
        emitted_convolutions_with(padding_mode="zeros"),
        chain(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU()),
    ),
    Mutant("bias not emitted", emitted_convolutions_with(bias=None), chain(nn.Conv2d(4, 4, 3), nn.ReLU())),
    Mutant(
        "axes of the padding mixed up on emission",
        pad_amounts_not_reversed,
        chain(nn.Conv2d(4, 4, (2, 4), padding="same"), nn.ReLU()),
    ),
    Mutant("bias map lost on emission", bias_map_lost_on_emission, BIASED_THEN_PADDED, passes="all,-collapse"),
    Mutant(
        "pad value lost on emission",
        pad_value_lost_on_emission,
        BN_THEN_PADDED,
        passes=[pad_what_the_batch_norm_maps_to_zero],
    ),
    Mutant(
        "pad value forgotten in the bias",
        lambda p: p.replace(emit, "_bias_of_pad_value", lambda original, op: op.bias.double()),
        BN_THEN_PADDED,
        passes=[pad_what_the_batch_norm_maps_to_zero],
    ),
    Mutant(
        "values overwritten that others read",
        lambda p: p.replace(emit._Emitter, "_may_overwrite", always(True)),
        OverwrittenTwin,
    ),
    # rearrangements
    Mutant(
        "selection of channels off by one",
        selection_off_by_one,
        then(lambda x, conv: torch.relu(conv(x)[:, 1:5]), conv=nn.Conv2d(4, 8, 3)),
    ),
    Mutant(
        "sides of a pad swapped",
        with_padding(lambda sides: sides[::-1]),
        chain(nn.Conv2d(4, 8, 1, bias=False), nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(8, 4, 3, stride=2)),
    ),
    Mutant(
        "sign of a crop ignored",
        with_padding(lambda sides: tuple(-amount for amount in sides)),
        chain(nn.Conv2d(4, 8, 1, bias=False), nn.ZeroPad2d((-1, 1, -1, 1)), nn.Conv2d(8, 4, 1)),
    ),
    Mutant(
        "offset of a subsampling dropped",
        offset_of_a_subsampling_dropped,
        then(lambda x, conv: torch.relu(conv(x)[:, :, :, 1::2]), conv=nn.Conv2d(4, 4, 1)),
    ),
    Mutant(
        "places of a block reversed",
        places_of_a_block_reversed,
        chain(nn.ReLU(), nn.PixelUnshuffle(2), nn.Conv2d(16, 4, 3, padding=1)),
        (2, 4, 8, 6),
    ),
    Mutant(
        "channels in another order before a pixel shuffle",
        channels_in_another_order_before_a_pixel_shuffle,
        chain(nn.Conv2d(4, 16, 3), nn.PixelShuffle(2), nn.Conv2d(4, 4, 1), nn.ReLU()),
    ),
    Mutant("one side of a border forgotten", one_side_of_a_border_forgotten, then(rows)),
    Mutant("border not filled on emission", border_not_filled_on_emission, then(rows)),
    # views and products
    Mutant(
        "axes of a transposition taken to stay",
        axes_of_a_transposition_taken_to_stay,
        then(lambda x, a, b: b(a(x).transpose(1, 2)), a=nn.Linear(6, 6), b=nn.Linear(6, 6)),
        (2, 6, 6),
    ),
    Mutant(
        "transposed matrix of a product",
        lambda p: p.replace(contractions, "_from_the_right", lambda original, lifter, x, w: original(lifter, x, w.T)),
        then(product, linear=nn.Linear(4, 4), matrix=nn.Linear(4, 4)),
        (2, 5, 4),
    ),
    # norms and scales
    Mutant(
        "weights of the first norm for all",
        weights_of_the_first_norm_for_all,
        chain(nn.LayerNorm(8), nn.ReLU(), nn.LayerNorm(8), nn.Sigmoid()),
    ),
    Mutant(
        "one reader of a scale forgotten",
        one_reader_forgotten,
        then(two_readers, bn=nn.BatchNorm2d(4), a=nn.Conv2d(4, 4, 3), b=nn.Conv2d(4, 4, 3)),
    ),
    Mutant(
        "layer before the views reversed",
        layer_before_the_views_reversed,
        then(tokens_and_back, linear=nn.Linear(4, 4), bn=nn.BatchNorm2d(4)),
    ),
    # regions and branches
    Mutant(
        "sign of a remaining addend ignored",
        rest_of_a_sum(lambda rest: tuple((value, 1) for value, _ in rest)),
        then(partial_sum, a=nn.Conv2d(4, 4, 3, padding=1), b=nn.Conv2d(4, 4, 1)),
    ),
    Mutant(
        "remaining addend dropped",
        rest_of_a_sum(lambda rest: rest[1:]),
        then(partial_sum, a=nn.Conv2d(4, 4, 3, padding=1), b=nn.Conv2d(4, 4, 1)),
    ),
    Mutant(
        "weight dropped where groups are found",
        weight_dropped_where_groups_are_found,
        then(parts, a=nn.Conv2d(1, 1, 3, padding=1), b=nn.Conv2d(3, 3, 3, padding=1)),
    ),
    Mutant(
        "constants in both branches of a sum",
        constants_in_both_branches,
        then(of_two_inputs(torch.add), a=nn.Conv2d(4, 4, 3), b=nn.Conv2d(4, 4, 3), last=nn.Conv2d(4, 4, 1)),
    ),
    Mutant(
        "slices of a norm shifted",
        slices_of_a_norm_shifted,
        then(of_two_inputs(concatenate), a=nn.Conv2d(4, 6, 3), b=nn.Conv2d(4, 2, 3), last=nn.BatchNorm2d(8)),
    ),
    Mutant(
        "ones taken from the first tap of a band",
        lambda p: p.replace(algebra, "inside_tap", always(0)),
        chain(nn.Conv2d(4, 4, (1, 3), padding=(0, 1)), nn.Conv2d(4, 4, (3, 1), padding=(1, 0))),
    ),
    # engine
    Mutant(
        "replacement reads the wrong value",
        lambda p: p.replace(engine, "build", lambda original, r, c, m: m.root.inputs[0]),
        chain(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
        passes="fold_batchnorm",
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.fault)
def test_a_planted_fault_is_noticed(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = randomize(mutant.model())
    x = torch.randn(mutant.shape)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
    planter = Planter(monkeypatch)
    mutant.plant(planter)
    try:
        compiled = rgc.compile(model, x, passes=mutant.passes, objective="depth")
    except (rgc.NotEquivalentError, rgc.GraphError):
        noticed = True
    else:
        report = compiled.report
        noticed = bool(report.failures) or any("differs" in note for note in report.notes)
        distance = float((compiled(x).double() - expected).abs().max() / expected.abs().max())
        assert distance <= 1e-5, f"silently wrong by {distance:.1e}"
    assert planter.reached, "the faulty code never ran"
    assert noticed


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.fault)
def test_the_same_model_compiles_where_no_fault_is_planted(mutant: Mutant) -> None:
    torch.manual_seed(0)
    x = torch.randn(mutant.shape)
    report = rgc.compile(randomize(mutant.model()), x, passes=mutant.passes, objective="depth").report
    assert report.verification is not None and report.verification.equal
    assert report.failures == [] and not any("differs" in note for note in report.notes)


def test_every_fault_is_another_one() -> None:
    assert len({mutant.fault for mutant in MUTANTS}) == len(MUTANTS)
