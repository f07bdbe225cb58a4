"""Do slimmable layers compute with the first of their channels, groups included, in every width?"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rgc
from rgc.errors import InputError
from rgc.nn import (
    Between,
    SlimmableBatchNorm2d,
    SlimmableConv2d,
    SlimmableLinear,
    SwitchableBatchNorm2d,
    channels_at,
    choose,
)
from rgc.testing import randomize

WIDTHS = (0.25, 0.5, 0.75, 1.0)


@given(st.integers(1, 300), st.floats(0.01, 1.0), st.sampled_from([1, 2, 8]))
def test_kept_channels_are_a_multiple_near_what_the_width_says(groups: int, width: float, divisor: int) -> None:
    channels = groups * divisor
    kept = channels_at(channels, width, divisor)
    assert kept % divisor == 0 and divisor <= kept <= channels
    assert kept >= 0.9 * channels * width and kept <= max(divisor, channels * width + divisor)
    assert channels_at(channels, 1.0, divisor) == channels


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("groups", "divisor", "multiplier"), [(1, 1, 2), (16, 1, 2), (16, 8, 1), (4, 4, 2)])
def test_a_convolution_is_its_leading_part(width: float, groups: int, divisor: int, multiplier: int) -> None:
    conv = SlimmableConv2d(16, 16 * multiplier, 3, 2, 1, 1, groups, widths=WIDTHS, divisor=divisor)
    inputs = channels_at(16, width, divisor)
    outputs = inputs * multiplier
    x = torch.randn(2, inputs, 9, 7)
    kept = groups * inputs // 16 if groups > 1 else 1
    weight = conv.weight[:outputs, : inputs if groups == 1 else 16 // groups]
    assert conv.bias is not None
    expected = F.conv2d(x, weight, conv.bias[:outputs], 2, 1, 1, kept)
    choose(conv, width=width)
    static = rgc.specialize(conv, width=width)
    assert isinstance(static, nn.Conv2d) and static.groups == kept
    assert torch.equal(conv(x), expected) and torch.equal(static(x), expected)


def test_a_grouped_convolution_keeps_the_outputs_of_the_whole_one() -> None:
    """The groups in front know nothing of the others, so they compute what they do at full width."""
    conv = SlimmableConv2d(12, 24, 3, padding=1, groups=4, widths=(0.5, 1.0), divisor=6)
    x = torch.randn(1, 12, 5, 5)
    whole = conv(x)
    choose(conv, width=0.5)
    torch.testing.assert_close(conv(x[:, :6]), whole[:, :12])


def test_groups_that_a_width_would_cut_are_refused() -> None:
    with pytest.raises(InputError, match=r"width 0.3 keeps 4 of 12 channels in and 4 of 12 out, .* groups of 3 to 3"):
        SlimmableConv2d(12, 12, 3, groups=4, widths=(0.3, 1.0))
    conv = SlimmableConv2d(12, 12, 3, groups=4, widths=Between(0.25, 1.0))
    with pytest.raises(InputError, match=r"width 0.3 keeps 4 of 12"):
        rgc.specialize(conv, width=0.3)
    with pytest.raises(InputError, match="slim both its input and its output"):
        SlimmableConv2d(4, 4, 3, groups=4, widths=(0.5, 1.0), slim_in=False)


@pytest.mark.parametrize("width", [0.5, 1.0])
def test_a_linear_layer_behind_a_flattened_map_takes_the_channels_in_front(width: float) -> None:
    layer = SlimmableLinear(8 * 6, 5, bias=False, widths=(0.5, 1.0), slim_out=False, divisor=6)
    x = torch.randn(3, channels_at(8, width), 2, 3)
    choose(layer, width=width)
    padded = F.pad(x, (0, 0, 0, 0, 0, 8 - x.shape[1]))
    torch.testing.assert_close(layer(x.flatten(1)), F.linear(padded.flatten(1), layer.weight))
    assert torch.equal(rgc.specialize(layer, width=width)(x.flatten(1)), layer(x.flatten(1)))


def test_each_width_trains_a_batch_norm_of_its_own() -> None:
    bn = SwitchableBatchNorm2d(8, widths=(0.5, 1.0))
    choose(bn, width=0.5)
    bn(torch.randn(4, 4, 3, 3) + 5)
    assert [int(each.num_batches_tracked) for each in bn.bn] == [1, 0]
    randomize(bn)
    x = torch.randn(2, 4, 3, 3)
    static = rgc.specialize(bn, width=0.5)
    assert isinstance(static, nn.BatchNorm2d) and torch.equal(static(x), bn(x))
    with pytest.raises(InputError, match="use SlimmableBatchNorm2d"):
        SwitchableBatchNorm2d(8, widths=Between(0.5, 1.0))  # type: ignore[arg-type]


def filled(bn: SlimmableBatchNorm2d) -> SlimmableBatchNorm2d:
    with torch.no_grad():
        for tensor in (bn.weight, bn.bias, bn.running_mean):
            tensor.normal_()
        bn.running_var.uniform_(0.5, 2.0)
    return bn


def test_one_batch_norm_serves_every_width_and_tracks_the_whole() -> None:
    bn = filled(SlimmableBatchNorm2d(8, eps=1e-3, widths=Between(0.25, 1.0)))
    choose(bn, width=0.4)
    x = torch.randn(4, 3, 5, 5)
    mean = bn.running_mean.clone()
    torch.testing.assert_close(bn(x), F.batch_norm(x, None, None, bn.weight[:3], bn.bias[:3], True, 0.1, 1e-3))
    assert torch.equal(bn.running_mean, mean) and int(bn.num_batches_tracked) == 0
    static = rgc.specialize(bn.eval(), width=0.4)
    assert torch.equal(static(x), bn(x)) and torch.equal(static.running_mean, mean[:3])
    choose(bn, width=1.0)
    y = torch.randn(4, 8, 5, 5)
    bn.train()(y)
    torch.testing.assert_close(bn.running_mean, 0.9 * mean + 0.1 * y.mean((0, 2, 3)))
    assert int(bn.num_batches_tracked) == 1 and int(static.num_batches_tracked) == 0


@pytest.mark.parametrize("widths", [(1.0, 0.5), (0.5, 0.75), (0.0, 1.0), Between(0.5, 0.9), Between(-1.0, 1.0)])
def test_impossible_widths_are_refused(widths: tuple[float, ...] | Between) -> None:
    with pytest.raises(InputError, match="widths must grow, from above 0 to 1"):
        SlimmableLinear(4, 4, widths=widths)


class InvertedResidual(nn.Module):
    """1x1, depthwise, 1x1 with a skip, at every width of an interval."""

    def __init__(self) -> None:
        super().__init__()
        widths = Between(0.3, 1.0)
        self.expand = SlimmableConv2d(12, 24, 1, widths=widths)
        self.depthwise = SlimmableConv2d(24, 24, 3, padding=1, groups=24, widths=widths)
        self.bn = filled(SlimmableBatchNorm2d(24, widths=widths))
        self.project = SlimmableConv2d(24, 12, 1, widths=widths)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(torch.relu(self.bn(self.depthwise(self.expand(x)))))
        return x + y


@pytest.mark.parametrize("width", [0.3, 0.37, 0.5, 0.81, 1.0])
def test_an_inverted_residual_is_compiled_at_any_width(width: float) -> None:
    model = InvertedResidual().eval()
    x = torch.randn(2, channels_at(12, width), 7, 6)
    choose(model, width=width)
    static = rgc.specialize(model, width=width)
    assert torch.equal(static(x), model(x))
    compiled = rgc.compile(static, x)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
