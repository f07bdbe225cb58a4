"""Constants assigned over a border: two of one value are one, and one over just the padding is the padding.

fill(v, w2)(fill(v, w1)(x)) = fill(v, max(w1, w2))(x), and fill(v, w)(pad(w)(x)) = pad(w, v)(x).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgc import BorderFill, Pad, Value, require, rewrite


@rewrite(lambda x, pad, fill: fill(pad(x)))
def fold_border(x: Value, pad: Pad, fill: BorderFill) -> Value:
    require(
        fill.widths == pad.padding,
        f"the border that is assigned ({fill.widths}) is not just the padding ({pad.padding})",
    )
    return Pad(pad.padding, value=fill.value)(x)


@fold_border.also(lambda x, first, second: second(first(x)))
def fold_border_pair(x: Value, first: BorderFill, second: BorderFill) -> Value:
    require(torch.equal(first.value, second.value), "the two borders have different values")
    require(len(first.widths) == len(second.widths), "the two borders are of different axes")
    pairs = zip(first.widths, second.widths, strict=True)
    return BorderFill(tuple((max(b1, b2), max(a1, a2)) for (b1, a1), (b2, a2) in pairs), first.value)(x)


class _BatchNormAndPad(nn.Module):
    """Padding of a normalised input with the batch norm's image of zero, by slice assignment (arXiv 2103.13425)."""

    def __init__(self, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.bn, self.widths = nn.BatchNorm2d(4), widths

    def forward(self, x: Tensor) -> Tensor:
        bn, (top, bottom, left, right) = self.bn, self.widths
        assert bn.running_mean is not None and bn.running_var is not None
        value = bn.bias - bn.running_mean * bn.weight / torch.sqrt(bn.running_var + bn.eps)
        value = value.view(1, -1, 1, 1)
        y = F.pad(torch.relu(bn(x)), (1, 1, 1, 1))
        y[:, :, :top, :] = value
        y[:, :, -bottom:, :] = value
        y[:, :, :, 0:left] = value
        y[:, :, :, -right:] = value
        return y


@fold_border.fires_on(shape=(2, 4, 7, 6))
def border_of_just_the_padding() -> nn.Module:
    return nn.Sequential(_BatchNormAndPad((1, 1, 1, 1)), nn.Conv2d(4, 4, 3)).eval()


@fold_border.leaves_alone(shape=(2, 4, 7, 6), because="is not just the padding")
def border_that_is_wider_than_the_padding() -> nn.Module:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = F.pad(torch.relu(x), (1, 1, 1, 1))
            y[:, :, :2] = 0.5
            return y

    return Wide().eval()
