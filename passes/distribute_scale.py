"""A channel scale is part of every linear operator that reads it, also behind reshapes: W P(s x + t) = (W s) P x + W t.

So it is of the one that it reads, also before reshapes: s P(Wx + b) + t = P((s W) x + s b + t). P may be whatever
leaves the channels whole: reshapes, transposes, slices and averages of the other axes. It is all or nothing: a scale
that one reader still needs saves nothing in the others. The pairs of a scale and one neighbour are `fold_batchnorm` and
`fold_scale`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from rgc import (
    BatchNorm,
    Conv,
    Graph,
    Opaque,
    Operator,
    Refusal,
    Scale,
    Structural,
    Value,
    carrying_axis,
    compose,
    graph_pass,
    require,
)

#: Attributes and methods of a tensor that a scale does not change.
UNCHANGED = frozenset({"shape", "ndim", "dtype", "device", "size", "dim", "sym_size"})


@graph_pass
def distribute_scale(graph: Graph) -> Graph:
    """A channel scale, or batch norm in evaluation, is folded into all linear operators that read it, if all can."""
    reasons = []
    changed = False
    for value in reversed(graph.nodes()):
        if not isinstance(value.op, BatchNorm | Scale) or _has_a_neighbour_of_its_own(graph, value):
            continue
        if (before := _layer_before(graph, value)) is not None:
            layer, op = before
            graph.replace(layer, Value(op, layer.inputs, layer.type, layer.origin | value.origin, layer.name))
            graph.replace(value, value.inputs[0])
            changed = True
            continue
        try:
            merged = _merged_readers(graph, value)
        except Refusal as refusal:
            reasons += [f"{value.where}: {refusal.reason}"] if _is_left_to_us(value) else []
            continue
        for reader, op in merged:
            graph.replace(reader, Value(op, reader.inputs, reader.type, reader.origin | value.origin, reader.name))
        graph.replace(value, value.inputs[0])
        changed = True
    if reasons and not changed:
        raise Refusal("; ".join(reversed(reasons)))
    return graph


def _has_a_neighbour_of_its_own(graph: Graph, value: Value) -> bool:
    """Is there one convolution before or after it, and nothing else that reads what is between?"""
    before, readers = value.inputs[0], graph.users(value)
    own = isinstance(before.op, Conv | Scale | BatchNorm) and graph.use_count(before) == 1
    return own or (len(readers) == 1 and isinstance(readers[0].op, Conv) and graph.use_count(value) == 1)


def _layer_before(graph: Graph, value: Value) -> tuple[Value, Conv] | None:
    """The convolution before the reshapes before a scale, which nobody else reads, with the one that replaces it."""
    assert isinstance(value.op, BatchNorm | Scale)
    scale = value.op.as_linear()
    assert isinstance(scale, Scale)
    if scale.spatial is None:
        return None
    axis = len(value.tensor_type.shape) - scale.spatial - 1
    before = value.inputs[0]
    while isinstance(before.op, Structural) and before.inputs and _has_one_reader(graph, before):
        source = before.inputs[0]
        found = None if source.type is None else carrying_axis(before.op, source.type, axis)
        if found is None:
            return None
        axis, before = found, source
    conv = before.op
    if before is value.inputs[0] or not isinstance(conv, Conv) or not _has_one_reader(graph, before):
        return None
    if len(before.tensor_type.shape) - conv.spatial - 1 != axis:
        return None
    there = Scale(scale.scale, scale.shift, conv.spatial)
    size = before.inputs[0].tensor_type.size(conv.spatial)
    return before, compose(there, conv, size).as_conv(conv.in_channels, conv.spatial)


def _has_one_reader(graph: Graph, value: Value) -> bool:
    """Is it computed for one other value? Who asks for its shape does not mind its numbers."""
    readers = [each for each in graph.users(value) if not _asks_for_the_form(each.op)]
    is_output = any(leaf is value for leaf in graph.output_values)
    return len(readers) == 1 and readers[0].inputs.count(value) == 1 and not is_output and value not in graph.effects


def _is_left_to_us(value: Value) -> bool:
    """Is it a batch norm of which no other rewrite says why it stays?"""
    return isinstance(value.op, BatchNorm) and not isinstance(value.inputs[0].op, Conv | Scale | BatchNorm)


def _merged_readers(graph: Graph, value: Value) -> list[tuple[Value, Conv]]:
    """Every convolution that reads the scale with the one that replaces it, or a refusal that names another reader."""
    assert isinstance(value.op, BatchNorm | Scale)
    scale = value.op.as_linear()
    require(isinstance(scale, Scale) and scale.spatial is not None, "a single factor names no channel axis to follow")
    assert isinstance(scale, Scale) and scale.axes is not None
    shape = value.tensor_type.shape
    axis = len(shape) - scale.axes - 1
    require(axis > 0, "the scale is along the batch")
    channels = torch.randn(shape[axis], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    probes = [_along(channels, axis, probe) for probe in _probe_shapes(value, axis)]
    merged = list(_readers(graph, value, scale, channels, axis, probes))
    require(bool(merged), "no linear operator reads it")
    return merged


def _readers(
    graph: Graph, value: Value, scale: Scale, channels: Tensor, axis: int, probes: Sequence[Tensor]
) -> Iterator[tuple[Value, Conv]]:
    """The readers of ``value``, whose channels are along ``axis``; ``probes`` show where they go, at several sizes."""
    readers = [each for each in graph.users(value) if not _asks_for_the_form(each.op)]
    is_output = any(leaf is value for leaf in graph.output_values)
    require(not is_output and value not in graph.effects, f"{value.where} is an output of the model")
    for reader in readers:
        linear = reader.op.affine and len(reader.inputs) == 1
        require(linear and reader.type is not None, f"{reader.where} ({reader.op.label}) reads it, and is not linear")
    for reader in readers:
        if isinstance(reader.op, Conv):
            yield reader, _folded(reader, scale, probes[0].dim() - 1 - axis)
            continue
        moved = _moved(reader, probes)
        found = _channel_axis(moved, channels)
        if found is None:
            raise Refusal(f"{reader.where} ({reader.op.label}) mixes the channels or changes a constant")
        yield from _readers(graph, reader, scale, channels, found, moved)


def _folded(reader: Value, scale: Scale, axes: int) -> Conv:
    conv = reader.op
    assert isinstance(conv, Conv)
    require(conv.spatial == axes, f"{reader.where} ({conv.label}) acts on other axes")
    there = Scale(scale.scale, scale.shift, axes)
    merged = compose(conv, there, reader.inputs[0].tensor_type.size(axes)).as_conv(conv.in_channels, axes)
    extra = ", ".join(name for name in merged.extras if name not in conv.extras)
    require(not extra, f"{reader.where} ({conv.label}) pads, so it would need a correction of its own ({extra})")
    return merged


def _asks_for_the_form(op: Operator) -> bool:
    if not isinstance(op, Opaque | Structural):
        return False
    asked = op.args[1] if op.target is getattr else op.name
    return asked in UNCHANGED


def _probe_shapes(value: Value, axis: int) -> list[tuple[int, ...]]:
    """The example's shape first; where sizes are free, others too: what keeps channels whole must do so at any."""
    shape = value.tensor_type.shape
    wider = [(n + 1, 2 * n, 3 * n + 1) for n in shape]
    others = [
        tuple(n if at == axis else wider[at][way] if at > 0 else n + way for at, n in enumerate(shape))
        for way in range(3)
    ]
    return [shape, *([] if value.tensor_type.fixed else others)]


def _along(channels: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    return channels.reshape(-1, *[1] * (len(shape) - axis - 1)).expand(*shape)


def _moved(reader: Value, probes: Sequence[Tensor]) -> list[Tensor]:
    """What the reader makes of the probes; one that it does not take is of a size that the model does not take."""
    op = reader.op.cast(torch.float64)
    moved = [op.evaluate(probes[0])]
    for probe in probes[1:]:
        try:
            moved.append(op.evaluate(probe))
        except (RuntimeError, ValueError, IndexError):
            continue
    return moved


def _channel_axis(probes: Sequence[Tensor], channels: Tensor) -> int | None:
    """The one axis, counted from the front, along which every probe is ``channels`` and nothing else varies."""
    for axis in range(1, probes[0].dim()):
        if all(_runs_along(probe, axis, channels) for probe in probes):
            return axis
    return None


def _runs_along(probe: Tensor, axis: int, channels: Tensor) -> bool:
    if probe.dim() <= axis or probe.shape[axis] != channels.numel():
        return False
    # an axis of stride 0 repeats one element, as the probes do: one of them stands for all
    repeats = [stride == 0 and at != axis for at, stride in enumerate(probe.stride())]
    probe = probe[tuple(slice(0, 1) if each else slice(None) for each in repeats)]
    return torch.allclose(probe, _along(channels, axis, probe.shape), rtol=1e-12, atol=0)


class _Readers(nn.Module):
    """A norm that two layers read, or the layers and what ``also`` makes of it."""

    def __init__(self, also: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.also = nn.BatchNorm2d(4), also
        self.first, self.second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, stride=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(torch.sigmoid(x))
        z = torch.relu(self.first(y)) + torch.tanh(self.second(y))
        return z if self.also is None else z + self.also(y)[:, :, 1:-1, 1:-1]


@distribute_scale.fires_on(shape=(2, 4, 7, 6))
def norm_that_two_convolutions_read() -> nn.Module:
    return _Readers().eval()


class _Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.norm(torch.sigmoid(x)).flatten(2).transpose(1, 2))
        return y


@distribute_scale.fires_on(shape=(2, 4, 6, 5))
def norm_before_tokens() -> nn.Module:
    return _Tokens().eval()


class _Columns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.linear(x).transpose(1, 2))
        return torch.relu(y)


@distribute_scale.fires_on(shape=(2, 5, 4))
def norm_behind_a_transposition_of_a_linear_layer() -> nn.Module:
    return _Columns().eval()


@distribute_scale.leaves_alone(shape=(2, 4, 7, 6), because="is not linear")
def norm_that_an_activation_reads_as_well() -> nn.Module:
    return _Readers(nn.ReLU()).eval()
