"""Is a call that only moves elements lifted as what it is, in every spelling, and emitted as the same function?"""

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


class Model(nn.Module):
    """An activation, the call under test, and another activation, so that nothing merges."""

    def __init__(self, call: Callable[[Any, Tensor], Any], channels: int = 8) -> None:
        super().__init__()
        self.call, self.conv = call, nn.Conv2d(channels, channels, 3, padding=1)
        self.value = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Any:
        return self.call(self, torch.relu(x))


SHAPES = ((2, 8, 6, 4), (1, 8, 6, 4), (3, 8, 4, 8), (2, 8, 8, 6))


def lifted(model: nn.Module, *, fixed: bool = False, shapes: Any = SHAPES, **options: Any) -> rgc.CompiledModule:
    """The compiled model, equal to the original at other batches and sizes too."""
    torch.manual_seed(0)
    model = randomize(model)
    compiled = rgc.compile(model, torch.randn(shapes[0]), **{"passes": [], **options})
    for shape in shapes[:2] if fixed else shapes:
        x = torch.randn(shape)
        with torch.no_grad():
            assert output_difference(model(x.clone()), compiled(x.clone())) < 1e-5, shape
    assert compiled.report.tier == "torch.fx", compiled.report.notes
    return compiled


def operators(compiled: rgc.CompiledModule) -> set[str]:
    return set(compiled.report.ops_after)


# --- pads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "found"), [
    (lambda m, x: F.pad(x, (1, 2)), {"ZeroPad2d"}),
    (lambda m, x: F.pad(x, (1, 2, 0, 3), value=0.5), {"ConstantPad2d"}),
    (lambda m, x: F.pad(x, (1, -2, 0, 1)), {"ZeroPad2d"}),
    (lambda m, x: F.pad(x, (-1, -1)), set()),
    (lambda m, x: F.pad(x, (1, 1, 2, 0), mode="reflect"), {"ReflectionPad2d"}),
    (lambda m, x: F.pad(x, (1, 1, 2, 0), "replicate"), {"ReplicationPad2d"}),
    (lambda m, x: F.pad(x, (1, 1, 2, 0), mode="circular"), {"CircularPad2d"}),
    (lambda m, x: F.pad(x, (0, 0, 0, 0, 2, 1)), {"pad"}),
    (lambda m, x: F.pad(x, (1, 0, 0, 0, 2, 1)), {"pad", "ZeroPad2d"}),
    (lambda m, x: F.pad(x, (0, 0, 0, 0, 2, 1), value=1.0), {"pad"}),
    (lambda m, x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0)), {"pad"}),
    (lambda m, x: F.pad(x, (0, 0, 0, 0, -2, -1)), {"pad"}),
    (lambda m, x: F.pad(x, (1, 1, 1, 1), value=-float("inf")).amax(3), {"ConstantPad2d", "amax"}),
])  # fmt: skip
def test_a_pad_is_lifted(call: Any, found: set[str]) -> None:
    assert operators(lifted(Model(call))) == {"ReLU"} | found


@pytest.mark.parametrize("layer", [
    nn.ZeroPad2d((1, 2, 0, 3)), nn.ConstantPad2d(1, 0.5), nn.ReflectionPad2d(2), nn.ReplicationPad2d((1, 0, 2, 0)),
    nn.CircularPad2d(1), nn.ChannelShuffle(4), nn.PixelShuffle(2), nn.PixelUnshuffle(2),
], ids=lambda layer: type(layer).__name__)  # fmt: skip
def test_a_layer_is_lifted_and_emitted_as_itself(layer: nn.Module) -> None:
    model = nn.Sequential(nn.ReLU(), layer, nn.Tanh())
    name = {"ChannelShuffle": "channel_shuffle"}.get(type(layer).__name__, type(layer).__name__)
    assert operators(lifted(model)) == {"ReLU", "Tanh", name}


def test_pads_of_one_and_of_three_axes_are_lifted() -> None:
    line = lifted(nn.Sequential(nn.ReLU(), nn.ReflectionPad1d(2), nn.Tanh()), shapes=((2, 3, 7), (1, 3, 9)))
    assert operators(line) == {"ReLU", "ReflectionPad1d", "Tanh"}
    volume = lifted(nn.Sequential(nn.ReLU(), nn.ZeroPad3d(1), nn.Tanh()), shapes=((2, 3, 4, 3, 2), (1, 3, 2, 2, 5)))
    assert operators(volume) == {"ReLU", "ZeroPad3d", "Tanh"}


# --- slices and selections ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [
    lambda m, x: x[:, 2:5], lambda m, x: x[:, :-3:2], lambda m, x: x[:, 3:, 1:-1], lambda m, x: x[..., 1:],
    lambda m, x: x[:, :, ::2, 1::2], lambda m, x: x[:, 1:, 1::3], lambda m, x: x.narrow(1, 2, 3),
    lambda m, x: x[:, :, -2:], lambda m, x: x[:, :, :3], lambda m, x: x[1:], lambda m, x: x[:, 0], lambda m, x: x[0],
    lambda m, x: x[:, None, 2:4], lambda m, x: x[:, :, 2], lambda m, x: x[:, :, :-1, ::2], lambda m, x: x[:],
    lambda m, x: torch.chunk(x, 3, 1)[1], lambda m, x: x.split([1, 5, 2], dim=1)[1], lambda m, x: x.split(3, 1)[2],
    lambda m, x: torch.cat(x.chunk(2, dim=1)[::-1], 1), lambda m, x: torch.cat(x.chunk(2, 1), 1),
    lambda m, x: torch.cat(x.chunk(2, 2), 2), lambda m, x: x.chunk(2, 3)[0], lambda m, x: x.tensor_split((2, 3), 1)[1],
    lambda m, x: torch.cat([x[..., i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))], 1),
    lambda m, x: torch.cat([x[..., i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1))], 1),
    lambda m, x: torch.cat([x[..., i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))], 0),
])  # fmt: skip
def test_views_are_equal_at_every_size_and_cost_nothing(call: Any) -> None:
    assert operators(lifted(Model(call))) <= {"ReLU", "cat", "chunk", "split", "tensor_split"}


@pytest.mark.parametrize("call", [
    lambda m, x: torch.roll(x, 3), lambda m, x: x.roll((1, 2), (1, 2)), lambda m, x: x.roll(1, 3),
    lambda m, x: x.roll((1, 2), (1, 1)), lambda m, x: torch.roll(x, 1, 0),
])  # fmt: skip
def test_a_roll_along_other_axes_than_the_channels_stays(call: Any) -> None:
    assert "roll" in operators(lifted(Model(lambda m, x: torch.tanh(call(m, x)))))


@pytest.mark.parametrize("call", [
    lambda m, x: x[:, 2:5], lambda m, x: x.chunk(2, 1)[1], lambda m, x: x.split([2, 6], 1)[1],
    lambda m, x: x[:, [2, 1, 0]], lambda m, x: x[:, torch.tensor([2, -1])], lambda m, x: x.flip(1),
    lambda m, x: torch.roll(x, 3, 1), lambda m, x: x.roll(shifts=(-2,), dims=[1]),
    lambda m, x: torch.index_select(x, 1, torch.tensor([3, 3])), lambda m, x: F.channel_shuffle(x, 2),
    lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 1)), lambda m, x: x[:, 1::2, 1:-1], lambda m, x: x[..., ::2, ::2],
    lambda m, x: F.pixel_unshuffle(x, 2), lambda m, x: x.narrow(1, 0, 4), lambda m, x: x[:, :, 1:, ::3],
])  # fmt: skip
def test_a_convolution_whose_result_is_rearranged_is_one_convolution(call: Any) -> None:
    model = randomize(Model(lambda m, x: torch.tanh(call(m, m.conv(x)))))
    x = torch.randn(2, 8, 6, 8)
    compiled = rgc.compile(model, x, objective="depth")
    torch.testing.assert_close(compiled(x), model(x))
    assert compiled.report.ops_after["Conv2d"] == 1 and operators(compiled) <= {"ReLU", "Conv2d", "Tanh"}


def test_features_of_a_linear_layer_are_channels() -> None:
    model = nn.Sequential(nn.Linear(5, 8), Model(lambda m, x: x[..., :4] * torch.sigmoid(x[..., 4:])))
    lifted(model, shapes=((2, 7, 5), (1, 7, 5), (3, 4, 5)))
    one = rgc.compile(Sliced().eval(), torch.randn(2, 7, 5), objective="depth")
    assert one.report.ops_after == {"Linear": 1, "ReLU": 1} and one.parts_linear.out_features == 3


class Sliced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts_linear = nn.Linear(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.parts_linear(x)[..., 2:5])


def test_tokens_are_no_channels() -> None:
    """[N, tokens, features]: their number is free, whatever the axis is called."""
    for call in (lambda m, x: x[:, 1:], lambda m, x: x.chunk(2, 1)[1], lambda m, x: torch.cat(x.chunk(2, 1)[::-1], 1)):
        lifted(Model(call), shapes=((2, 6, 5), (1, 6, 5), (3, 10, 5)))


def test_pieces_of_one_cut_share_its_call() -> None:
    def call(m: Any, x: Tensor) -> list[Tensor]:
        first, second, _ = x.chunk(3, 1)
        return [torch.tanh(first), torch.sigmoid(second)]

    compiled = lifted(Model(call))
    assert compiled.code.count("torch.chunk") == 1


# --- channel shuffles that are written out -----------------------------------------------------------------------


def _of_size(m: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.size()
    return torch.transpose(x.view(n, 2, c // 2, h, w), 1, 2).contiguous().view(n, -1, h, w)


def _of_shape(m: Any, x: Tensor) -> Tensor:
    n, c = x.shape[:2]
    return x.reshape(n, 2, -1, x.shape[2], x.shape[-1]).permute(0, 2, 1, 3, 4).reshape(n, c, x.size(2), x.size(3))


def _of_unflatten(m: Any, x: Tensor) -> Tensor:
    return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def _of_sizes(m: Any, x: Tensor) -> Tensor:
    h, w = x.shape[2:]
    return x.view(x.size(0), 2, 4, h, w).swapaxes(2, 1).reshape(-1, 8, h, w)


@pytest.mark.parametrize("call", [_of_size, _of_shape, _of_unflatten, _of_sizes])
def test_a_channel_shuffle_that_is_written_out_is_one(call: Any) -> None:
    assert operators(lifted(Model(call))) == {"ReLU", "channel_shuffle"}


def _swapped_axes(m: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.size()
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, w, h)


def _other_transposition(m: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.size()
    return x.view(n, 2, c // 2, h, w).transpose(2, 3).reshape(n, c, h, w)


def _batch_in_the_channels(m: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.size()
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(c, n, h, w)


@pytest.mark.parametrize("call", [_swapped_axes, _other_transposition, _batch_in_the_channels])
def test_what_only_looks_like_a_shuffle_at_the_examples_size_is_none(call: Any) -> None:
    compiled = lifted(Model(call), shapes=((8, 8, 4, 4), (1, 8, 4, 4), (3, 8, 4, 6), (2, 8, 6, 4)))
    assert "channel_shuffle" not in operators(compiled)


# --- assignments -------------------------------------------------------------------------------------------------


def _border(m: Any, x: Tensor) -> Tensor:
    y = F.pad(x, (1, 1, 1, 1))
    value = m.value.view(1, -1, 1, 1)
    y[:, :, 0:1, :] = value
    y[:, :, -1:, :] = value
    y[:, :, :, 0:1] = value
    y[..., -1:] = value
    return y


def _border_of_a_value_read_elsewhere(m: Any, x: Tensor) -> Any:
    y = x + 1
    z = torch.tanh(y)
    y[:, :, :2] = 0.5
    return y, z


def _channels(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y[:, ::2] = 0
    return m.conv(y)


def _channels_of_another(m: Any, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :4] = m.conv(x)[:, 4:]
    y[:, 4:] += 1
    return y


def _the_input_is_read_before(m: Any, x: Tensor) -> Tensor:
    y = torch.tanh(x)
    z = 2 * y
    y[:, 1, 2:] = 7.0
    return y + z


def _by_mask(m: Any, x: Tensor) -> Tensor:
    y = torch.tanh(x)
    y[x > 0.5] = 0.25
    return y


def _inner(m: Any, x: Tensor) -> Tensor:
    y = torch.tanh(x)
    y[:, :, 1:-1, 1:-1] = x[:, :, 2:, :-2]
    return y


def _a_whole_axis(m: Any, x: Tensor) -> Tensor:
    y = torch.tanh(x)
    y[:, :, 0:0] = 3.0
    y[:, :, -0:] = m.value.view(-1, 1, 1)
    return y


@pytest.mark.parametrize("call", [
    _border, _border_of_a_value_read_elsewhere, _channels, _channels_of_another, _the_input_is_read_before, _by_mask,
    _inner, _a_whole_axis,
])  # fmt: skip
def test_an_assignment_is_traced_and_keeps_its_meaning(call: Any) -> None:
    compiled = lifted(Model(call))
    assert "setitem" in operators(compiled)
    lifted(Model(call), passes="default")


def test_an_input_of_the_model_is_not_overwritten() -> None:
    class Overwrites(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x + 0
            y[:, 0] = 1.0
            x[:, 1] = 2.0
            return x + y

    compiled = rgc.compile(Overwrites().eval(), torch.randn(2, 3, 4, 4))
    x = torch.randn(2, 3, 4, 4)
    before = x.clone()
    torch.testing.assert_close(compiled(x), Overwrites()(before.clone()))
    assert torch.equal(x, before)


def test_an_assignment_below_a_view_of_another_shape_goes_to_the_next_tier() -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        part = y[:, :2]
        y[:, 0] = 5.0
        return torch.cat([part, y], 1)

    model = randomize(Model(call))
    x = torch.randn(2, 8, 6, 4)
    compiled = rgc.compile(model, x)
    torch.testing.assert_close(compiled(x), model(x))
    assert "overwrites memory that" in compiled.report.notes[0]


@pytest.mark.parametrize("call", [
    lambda m, x: x.view(x.shape[0], 2, -1, 6, 4).transpose(1, 2).reshape(x.shape[0], -1, 6, 4),
    lambda m, x: x.view(x.shape[0], 2, 4, *x.shape[2:]).transpose(1, 2).reshape(x.shape[0], -1, 6, 4),
])  # fmt: skip
def test_a_shuffle_whose_channels_take_up_what_the_positions_leave_over_is_none(call: Any) -> None:
    compiled = lifted(Model(call), shapes=((2, 8, 6, 4), (1, 8, 6, 4), (2, 8, 12, 4), (2, 8, 6, 8)))
    assert "ChannelShuffle" not in operators(compiled) and "channel_shuffle" not in operators(compiled)
