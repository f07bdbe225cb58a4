"""A channel that is the same number everywhere, or that nobody reads, need not be computed: W [x; k] = V x + U k.

Two sweeps over the graph say which channels are dead. Forwards: what is constant (a kernel of zeros leaves its bias, a
gamma of zero leaves beta, and act(k), s k + t, k + l, k l and means of constants are constants). Backwards: what is
read (a column of zeros reads nothing, and a constant is known without reading it). Where values are combined channel
by channel, a channel goes from all of them or stays in all. The layers that made dead channels lose rows, those that
read them lose columns, and U k becomes a bias. A padded convolution sees the constants end at the border: there one of
them stays, k0, and takes on the columns of the others, U k = (sum of U_i k_i / k0) k0. At least one channel of each
value stays.

What pruning leaves (gammas of network slimming, arXiv 1708.06519; compactors of ResRep, arXiv 2007.03260) goes this
way, without any loss.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rgc import (
    Activation,
    Add,
    BatchNorm,
    Clamp,
    Concat,
    Conv,
    Flatten,
    Graph,
    Identity,
    Multiply,
    Operator,
    Pad,
    Refusal,
    Scale,
    Structural,
    Subsample,
    Value,
    carried_axis,
    graph_pass,
)


@graph_pass
def drop_dead_channels(graph: Graph) -> Graph:
    """Channels that are constant or that nobody reads are not computed: W [x; k] = V x + U k."""
    order = graph.nodes()
    constants = _constants(order)
    narrowed = _Narrowed(constants, _kept(graph, order, constants))
    for old, new in narrowed.of(order):
        graph.replace(old, new)
    return graph


# --- forwards: what is constant --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Channels:
    """The channels of a value lie on ``axis`` (from the end); ``constant`` [C] holds their numbers, NaN if unknown."""

    axis: int
    constant: Tensor

    @property
    def known(self) -> Tensor:
        """Which are constant, [C]."""
        return ~self.constant.isnan()


def _constants(order: Iterable[Value]) -> dict[Value, _Channels]:
    """What is known of the channels of each value; values whose channels cannot be told are left out."""
    found: dict[Value, _Channels] = {}
    for value in order:
        given = [found.get(used) for used in value.inputs]
        channels = _channels_of(value, given)
        if channels is not None:
            found[value] = channels
    return found


def _channels_of(value: Value, given: list[_Channels | None]) -> _Channels | None:
    op = value.op
    if value.type is None or not value.type.dtype.is_floating_point:
        return None
    if isinstance(op, Conv):
        return _Channels(-op.spatial - 1, _of_conv(op, given[0]))
    known = [each for each in given if each is not None]
    if len(known) < len(given) or not known or len({each.axis for each in known}) > 1:
        return None
    axis, numbers = known[0].axis, [each.constant for each in known]
    if isinstance(op, Add | Multiply):
        return _Channels(axis, _of_pair(op, *numbers)) if _is_channelwise(value, axis) else None
    if isinstance(op, Concat):
        return _Channels(axis, torch.cat(numbers)) if op.axis == axis else None
    if len(value.inputs) > 1:
        return None
    if _takes(op, value.inputs[0], axis):
        return _Channels(axis, _mapped(op, numbers[0]))
    return _moved(value, known[0])


def _of_conv(conv: Conv, given: _Channels | None) -> Tensor:
    """b + W k of the rows that read nothing but constants which no border interrupts."""
    unknown = torch.full((conv.out_channels,), math.nan, dtype=torch.float64)
    if conv.ones is not None or (conv.bias is not None and conv.bias.dim() > 1) or not _is_dense_or_depthwise(conv):
        return unknown
    bias = torch.zeros_like(unknown) if conv.bias is None else conv.bias.double().cpu()
    numbers = _inputs(conv, given)
    if bool(numbers.isnan().all()):
        return torch.where(_ends(conv)[0], unknown, bias)
    reads, steady = _reads(conv), _is_steady(conv, numbers)
    if conv.groups > 1:
        return torch.where(reads[:, 0] & ~steady, unknown, bias + _sums(conv, slice(None))[:, 0] * numbers.nan_to_num())
    rows = torch.where((reads & ~steady).any(1), unknown, bias)
    return rows + _sums(conv, steady) @ numbers[steady]


def _inputs(conv: Conv, given: _Channels | None) -> Tensor:
    if given is not None and given.axis == -conv.spatial - 1:
        return given.constant
    return torch.full((conv.in_channels,), math.nan, dtype=torch.float64)


def _is_steady(conv: Conv, constant: Tensor) -> Tensor:
    """Which input channels are the same number for every tap at every position, [in]."""
    if conv.transposed:  # at the border fewer taps meet the input
        return constant == 0
    if not conv.is_padded or conv.padding_mode != "zeros":
        return ~constant.isnan()
    return constant == _around(conv)


def _around(conv: Conv) -> Tensor:
    """What the convolution pads with, [in]."""
    if conv.pad_value is None:
        return torch.zeros(conv.in_channels, dtype=torch.float64)
    return conv.pad_value.double().cpu()


def _matrix(conv: Conv) -> Tensor:
    """The weight as [out, in / groups, taps], of one group also if transposed."""
    weight = conv.weight.transpose(0, 1) if conv.transposed else conv.weight
    return weight.reshape(*weight.shape[:2], -1)


def _reads(conv: Conv) -> Tensor:
    """[out, in / groups]: is there a tap that is not zero?"""
    return (_matrix(conv) != 0).any(2).cpu()


def _sums(conv: Conv, columns: Tensor | slice) -> Tensor:
    """[out, columns]: the sums of the taps."""
    return _matrix(conv)[:, columns].double().sum(2).cpu()


#: Found once for each operator, for as long as it lives: models without dead channels should cost one look.
_KNOWN_ENDS: WeakKeyDictionary[Conv, tuple[Tensor, Tensor]] = WeakKeyDictionary()


def _ends(conv: Conv) -> tuple[Tensor, Tensor]:
    """[out] and [in / groups]: which rows and which columns of the weight are not zero."""
    if conv not in _KNOWN_ENDS:
        reads = _reads(conv)
        _KNOWN_ENDS[conv] = reads.any(1), reads.any(0)
    return _KNOWN_ENDS[conv]


def _is_dense_or_depthwise(conv: Conv) -> bool:
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    return conv.groups == 1 or (depthwise and not conv.transposed)


def _of_pair(op: Add | Multiply, x: Tensor, y: Tensor) -> Tensor:
    if isinstance(op, Add):
        return x + op.sign * y
    return torch.where((x == 0) | (y == 0), 0.0, x * y)


def _is_channelwise(value: Value, axis: int) -> bool:
    """Has each input as many channels as the result, so that none is broadcast along them?"""
    sizes = {used.tensor_type.shape[axis] for used in value.inputs if len(used.tensor_type.shape) >= -axis}
    return sizes == {value.tensor_type.shape[axis]} and all(len(v.tensor_type.shape) >= -axis for v in value.inputs)


def _takes(op: Operator, source: Value, axis: int) -> bool:
    """Does ``op`` map each channel of ``source`` alone, and keep the channels where they are?"""
    match op:
        case Activation():
            slopes = 1 if op.weight is None else op.weight.numel()
            return slopes == 1 or len(source.tensor_type.shape) + axis == 1
        case Scale():
            return op.spatial in (None, -axis - 1)
        case BatchNorm():
            return op.axes == -axis - 1 and not op.training
        case Clamp():
            return op.axes == -axis - 1
        case Identity() | Subsample():
            return True
        case Pad():
            return op.value is None and op.spatial < -axis
        case Structural():
            return False  # it may remove axes: see `_moved`
    axes = op.resampled(source.tensor_type)
    return axes is not None and axes < -axis


def _mapped(op: Operator, k: Tensor) -> Tensor:
    """What ``op`` makes of channels that are the constants ``k`` [C], NaN where they are none."""
    match op:
        case Activation():
            return torch.where(k.isnan(), k, _activated(op.cast(torch.float64), k))
        case Scale():
            scale, shift = op.scale.double().cpu(), op.shift.double().cpu()
            return torch.where(scale == 0, shift, scale * k + shift)
        case BatchNorm():
            return _mapped(op.as_linear(), k)
        case Clamp():
            lower, upper = op.lower.double().cpu(), op.upper.double().cpu()
            return torch.where(lower == upper, lower, torch.minimum(torch.maximum(k, lower), upper))
        case Identity() | Subsample():
            return k
        case Pad() if op.mode != "zeros" or op.is_view:
            return k
    return k if op.keeps_constants else torch.where((k == 0) & op.affine, k, math.nan)


def _activated(op: Activation, k: Tensor) -> Tensor:
    has_slopes = op.weight is not None and op.weight.numel() > 1
    made: Tensor = op.evaluate(k[None])[0] if has_slopes else op.evaluate(k)
    return made


def _moved(value: Value, given: _Channels) -> _Channels | None:
    """The channels behind a call that moves axes, averages positions, or counts channels and positions in one row."""
    (source,) = value.inputs
    shape, rank = source.tensor_type.shape, len(source.tensor_type.shape)
    if isinstance(value.op, Structural):
        try:
            place = carried_axis(value.op, source.tensor_type, rank + given.axis)
        except Refusal:
            place = None
        if place is not None:
            return dataclasses.replace(given, axis=place - len(value.tensor_type.shape))
    if not _flattens(value) or given.axis != 1 - rank:
        return None
    return _Channels(-1, given.constant.repeat_interleave(math.prod(shape[2:])))


def _flattens(value: Value) -> bool:
    """Are samples [C, ...] turned into vectors?"""
    shape = value.inputs[0].tensor_type.shape
    is_flatten = isinstance(value.op, Flatten) or (
        isinstance(value.op, Structural) and value.op.name in ("flatten", "Flatten")
    )
    return is_flatten and len(shape) > 1 and value.tensor_type.shape == (shape[0], math.prod(shape[1:]))


# --- backwards: what is read -----------------------------------------------------------------------------------------


def _kept(graph: Graph, order: list[Value], constants: dict[Value, _Channels]) -> dict[Value, Tensor]:
    """The channels that stay, [C], of each value whose channels can be told."""
    kept = {value: torch.zeros_like(each.known) for value, each in constants.items()}
    for value in [*graph.output_values, *graph.effects]:
        if value in kept:
            kept[value][:] = True
    sweep = _Sweep(constants, kept)
    while sweep.grew:
        sweep.grew = False
        for value in reversed(order):
            sweep.visit(value)
    return kept


@dataclass
class _Sweep:
    """Lets every value ask its inputs for the channels that it needs; masks only grow."""

    constants: dict[Value, _Channels]
    kept: dict[Value, Tensor]
    grew: bool = True

    def visit(self, value: Value) -> None:
        """Ask for what ``value`` reads."""
        if value in self.kept and not self.kept[value].any():
            self._need(value, torch.arange(self.kept[value].numel()) == 0)
        op, sources = value.op, value.inputs
        if value not in self.constants:
            for source in sources:
                self._need(source, True)
        elif isinstance(op, Conv):
            self._visit_conv(op, value, sources[0])
        elif isinstance(op, Concat):
            sizes = [source.tensor_type.shape[op.axis] for source in sources]
            parts = torch.split(self.kept[value], sizes)
            self._tie(value, [(source, part) for source, part in zip(sources, parts, strict=True)])
        elif _flattens(value) and self.kept[value].numel() != self.kept[sources[0]].numel():
            channels = self.kept[sources[0]].numel()
            self._need(sources[0], self.kept[value].view(channels, -1).any(1))
            self._need(value, self.kept[sources[0]].repeat_interleave(self.kept[value].numel() // channels))
        else:
            self._tie(value, [(source, self.kept[value]) for source in sources])

    def _visit_conv(self, conv: Conv, value: Value, source: Value) -> None:
        follows = source in self.kept and self.constants[source].axis == -conv.spatial - 1
        if not _is_dense_or_depthwise(conv) or (conv.groups > 1 and not follows):
            self._need(value, True)
            self._need(source, True)
        elif not follows:
            self._need(source, True)
        elif conv.groups > 1:
            self._tie(value, [(source, self.kept[value])])
        else:
            self._need(source, self._read_by(conv, self.kept[value], source))

    def _read_by(self, conv: Conv, rows: Tensor, source: Value) -> Tensor:
        constant = self.constants[source].constant
        if rows.all() and constant.isnan().all():
            return _ends(conv)[1]
        read, kept = _reads(conv)[rows].any(0), self.kept[source]
        ending = _ending(conv, constant)
        needed = read & ~_is_steady(conv, constant) & ~ending
        if bool((read & ending).any()) and not bool((kept & ending).any()):
            needed[torch.where(ending, constant.abs(), -1.0).argmax()] = True  # it takes on the others
        return needed

    def _tie(self, value: Value, parts: list[tuple[Value, Tensor]]) -> None:
        """The same channels stay in the inputs, or in these parts of them, as in the value."""
        for source, mask in parts:
            self._need(source, mask)
        if isinstance(value.op, Concat):
            self._need(value, torch.cat([self.kept[source] for source, _ in parts]))
            return
        for source, _ in parts:
            self._need(value, self.kept[source])

    def _need(self, value: Value, mask: Tensor | bool) -> None:
        if value not in self.kept:
            return
        more = self.kept[value] | mask
        if not torch.equal(more, self.kept[value]):
            self.kept[value][:] = more
            self.grew = True


# --- the narrower graph ----------------------------------------------------------------------------------------------


@dataclass
class _Narrowed:
    """The values without their dead channels."""

    constants: dict[Value, _Channels]
    kept: dict[Value, Tensor]
    _made: dict[Value, Value] = field(default_factory=dict)
    _operators: dict[tuple[int, bytes], Operator] = field(default_factory=dict)

    def of(self, order: Iterable[Value]) -> list[tuple[Value, Value]]:
        """The values that stay whole though they read what does not, each with what takes its place."""
        replaced = []
        for value in order:
            reads_less = any(map(self._loses, value.inputs))
            if self._loses(value) or reads_less:
                self._made[value] = self._rebuilt(value)
            if reads_less and not self._loses(value):
                replaced.append((value, self._made[value]))
        return replaced

    def _loses(self, value: Value) -> bool:
        return value in self.kept and not bool(self.kept[value].all())

    def _rebuilt(self, value: Value) -> Value:
        new = self._operator(value)(*(self._made.get(used, used) for used in value.inputs))
        new.origin, new.name = value.origin, value.name
        return new

    def _operator(self, value: Value) -> Operator:
        """A layer that is called twice stays one if it loses the same in both places."""
        source = self.constants.get(value.inputs[0])
        tensors = self.kept.get(value), self.kept.get(value.inputs[0]), None if source is None else source.constant
        numbers = b"|".join(b"" if each is None else each.numpy().tobytes() for each in tensors)
        key = id(value.op), numbers
        if key not in self._operators:
            self._operators[key] = self._narrowed(value)
        return self._operators[key]

    def _narrowed(self, value: Value) -> Operator:
        op, mask = value.op, self.kept.get(value)
        if isinstance(op, Conv):
            return self._conv(op, value)
        if mask is None or mask.all():
            return op
        match op:
            case Scale():
                return Scale(_of(op.scale, mask), _of(op.shift, mask), op.axes)
            case BatchNorm():
                weight, bias = (None if each is None else _of(each, mask) for each in (op.weight, op.bias))
                return dataclasses.replace(op, mean=_of(op.mean, mask), var=_of(op.var, mask), weight=weight, bias=bias)
            case Clamp():
                return _clamp(op, mask)
            case Activation() if op.weight is not None:
                return dataclasses.replace(op, weight=_of(op.weight, mask))
            case Flatten():
                return Flatten((int(self.kept[value.inputs[0]].sum()), *op.shape[1:]))
        return op

    def _conv(self, conv: Conv, value: Value) -> Conv:
        rows, source = self.kept[value], value.inputs[0]
        if not self._loses(source):
            return _rows(conv, rows)
        if conv.groups > 1:
            return _of_depthwise(conv, rows)
        columns, constant = self.kept[source], self.constants[source].constant
        return _columns(_without_constants(_rows(conv, rows), columns, constant), columns)


def _ending(conv: Conv, constant: Tensor) -> Tensor:
    """Which input channels are constants that end at the border, behind which there are zeros, [in]."""
    return ~constant.isnan() & ~_is_steady(conv, constant) & (_around(conv) == 0)


def _without_constants(conv: Conv, columns: Tensor, constant: Tensor) -> Conv:
    """The same where the constants outside of ``columns`` [in] are zeros: in the bias, or in a constant that stays."""
    steady = ~columns & _is_steady(conv, constant) & (constant != 0)
    if steady.any():
        shift = (_sums(conv, steady) @ constant[steady]).view(
            -1, *[1] * (0 if conv.bias is None else conv.bias.dim() - 1)
        )
        conv = conv.changed(bias=shift if conv.bias is None else conv.bias.double() + shift.to(conv.bias.device))
    ending = _ending(conv, constant)
    gone = ~columns & ending & _reads(conv).any(0)
    if not gone.any():
        return conv
    heir = torch.where(columns & ending, constant.abs(), -1.0).argmax()
    weight = conv.kernels.weight.clone()  # [out, in, *kernel], also of a transposed convolution
    ratios = (constant[gone] / constant[heir]).to(weight).view(-1, *[1] * conv.spatial)
    weight[:, heir] += (weight[:, gone] * ratios).sum(1)
    return conv.changed(weight=weight.transpose(0, 1).contiguous() if conv.transposed else weight)


def _of(tensor: Tensor, mask: Tensor) -> Tensor:
    """Its elements of these channels, [C]; one element stands for all channels."""
    return tensor if tensor.numel() == 1 else tensor[mask.to(tensor.device)]


def _clamp(op: Clamp, mask: Tensor) -> Operator:
    lower, upper = _of(op.lower, mask), _of(op.upper, mask)
    if bool((lower == -math.inf).all() & (upper == math.inf).all()):
        return Identity("clamp of nothing")
    return Clamp(lower, upper, op.axes)


def _rows(conv: Conv, mask: Tensor) -> Conv:
    """The convolution with these output channels only, [out]; of one group."""
    if mask.all():
        return conv
    mask = mask.to(conv.weight.device)
    weight = conv.weight[:, mask] if conv.transposed else conv.weight[mask]
    bias = None if conv.bias is None else conv.bias[mask]
    return conv.changed(weight=weight, bias=bias, ones=None if conv.ones is None else conv.ones[mask])


def _columns(conv: Conv, mask: Tensor) -> Conv:
    """The convolution of these input channels only, [in]; of one group."""
    mask = mask.to(conv.weight.device)
    weight = conv.weight[mask] if conv.transposed else conv.weight[:, mask]
    return conv.changed(weight=weight, pad_value=None if conv.pad_value is None else conv.pad_value[mask])


def _of_depthwise(conv: Conv, mask: Tensor) -> Conv:
    mask = mask.to(conv.weight.device)
    return conv.changed(
        weight=conv.weight[mask],
        bias=None if conv.bias is None else conv.bias[mask],
        pad_value=None if conv.pad_value is None else conv.pad_value[mask],
        groups=int(mask.sum()),
    )


def _without(layer: nn.Module, *, rows: Iterable[int] = (), columns: Iterable[int] = ()) -> nn.Module:
    """A layer whose kernels of these output and input channels are zeros, as pruning leaves them."""
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    with torch.no_grad():
        layer.weight[list(rows)] = 0
        layer.weight[:, list(columns)] = 0
    return layer


@drop_dead_channels.fires_on(shape=(2, 3, 9, 8))
def kernels_of_zeros_before_a_padded_convolution() -> nn.Module:
    pruned = _without(nn.Conv2d(3, 8, 3, bias=False), rows=(0, 3, 7))
    return nn.Sequential(pruned, nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3, padding=1)).eval()


@drop_dead_channels.fires_on(shape=(2, 3, 9, 8))
def kernels_of_zeros_whose_norm_makes_constants_of_them() -> nn.Module:
    pruned = _without(nn.Conv2d(3, 8, 3), rows=(1, 2))
    return nn.Sequential(pruned, nn.BatchNorm2d(8), nn.Hardtanh(), nn.Conv2d(8, 4, 3), nn.Sigmoid()).eval()


@drop_dead_channels.fires_on(shape=(2, 3, 9, 8))
def channels_that_no_layer_reads() -> nn.Module:
    reader = _without(nn.Conv2d(8, 4, 3, padding=1), columns=(0, 5))
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Hardswish(), depthwise, nn.ReLU(), reader).eval()


@drop_dead_channels.fires_on(shape=(2, 3, 10, 10))
def dead_channels_before_a_classifier() -> nn.Module:
    pruned = _without(nn.Conv2d(3, 8, 3), rows=(2, 4))
    return nn.Sequential(pruned, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)).eval()


class _Residual(nn.Module):
    """A residual block whose layers were pruned, and a layer that reads the sum."""

    def __init__(self, shortcut: Iterable[int], branch: Iterable[int]) -> None:
        super().__init__()
        self.shortcut = _without(nn.Conv2d(3, 8, 3, padding=1, bias=False), rows=shortcut)
        self.branch = _without(nn.Conv2d(8, 8, 3, padding=1, bias=False), rows=branch)
        self.last = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.shortcut(x))
        last: Tensor = self.last(torch.relu(x + self.branch(x)))
        return last


@drop_dead_channels.fires_on(shape=(2, 3, 9, 8))
def channels_that_are_dead_in_both_branches_of_a_sum() -> nn.Module:
    return _Residual((1, 2, 6), (2, 5, 6)).eval()


@drop_dead_channels.leaves_alone(shape=(2, 3, 9, 8), because="")
def channels_that_are_dead_in_one_branch_of_a_sum() -> nn.Module:
    return _Residual((1,), (2,)).eval()


@drop_dead_channels.leaves_alone(shape=(2, 3, 9, 8), because="")
def dead_channels_of_the_output() -> nn.Module:
    return _without(nn.Conv2d(3, 8, 3), rows=(1, 2)).eval()


@drop_dead_channels.fires_on(shape=(2, 3, 9, 8))
def constants_that_end_at_the_border_of_a_padded_convolution() -> nn.Module:
    pruned = _without(nn.Conv2d(3, 8, 3), rows=(1, 2, 5))
    return nn.Sequential(pruned, nn.Hardtanh(), nn.Conv2d(8, 4, 3, padding=1), nn.ReLU()).eval()


@drop_dead_channels.fires_on(shape=(2, 3, 5, 6))
def constants_that_end_at_the_border_of_a_transposed_convolution() -> nn.Module:
    pruned = _without(nn.Conv2d(3, 8, 3), rows=(0, 4))
    return nn.Sequential(pruned, nn.Hardtanh(), nn.ConvTranspose2d(8, 4, 3, stride=2), nn.ReLU()).eval()


@drop_dead_channels.leaves_alone(shape=(2, 3, 9, 8), because="")
def one_constant_before_a_padded_convolution() -> nn.Module:
    pruned = _without(nn.Conv2d(3, 8, 3), rows=(1,))
    return nn.Sequential(pruned, nn.Hardtanh(), nn.Conv2d(8, 4, 3, padding=1), nn.ReLU()).eval()
