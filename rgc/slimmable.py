"""Which layers can run with only the first of their channels? Slimmable ones, at one of several widths.

A width w in (0, 1] keeps `channels_at(c, w)` of c channels, always the first. arXiv 1812.08928 (slimmable networks) has
a few widths, each with a batch norm of its own; arXiv 1903.05134 (universally slimmable networks) every width of an
interval, with statistics that are measured afterwards (`rgc.recalibrate`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgc.choices import Between, Choice, OneOf
from rgc.dynamic import Dynamic
from rgc.errors import InputError

Widths = Sequence[float] | Between


def channels_at(channels: int, width: float, divisor: int = 1) -> int:
    """How many of ``channels`` a width keeps: the nearest multiple of ``divisor``, at least 0.9 of what it says.

    It is the rounding of MobileNet and of US-Net.

    >>> channels_at(64, 0.25), channels_at(64, 0.3, divisor=8), channels_at(10, 0.01)
    (16, 24, 1)
    """
    exact = channels * width
    rounded = max(divisor, int(exact + divisor / 2) // divisor * divisor)
    return min(channels, rounded + divisor if rounded < 0.9 * exact else rounded)


def width_choice(widths: Widths) -> OneOf | Between:
    """The widths as a choice: growing, above 0, up to 1.

    >>> str(width_choice((0.5, 1.0)))
    'one of 0.5, 1.0'
    """
    choice = widths if isinstance(widths, Between) else OneOf(tuple(map(float, widths)))
    values = (choice.low, choice.high) if isinstance(choice, Between) else choice.values
    if not 0 < values[0] <= values[-1] == 1 or any(a >= b for a, b in pairwise(values)):
        raise InputError(f"widths must grow, from above 0 to 1, which is the whole layer; got {choice}")
    return choice


@final
class SlimmableConv2d(Dynamic):
    """A convolution that uses the first of its channels: ``weight[:out, :in]`` at the chosen width.

    widths: the widths that there are, growing up to 1 (at which it starts), or `Between` for all of an interval.
    slim_in, slim_out: False for the image of the first layer and the output of a last one, which keep their channels.
    divisor: of the channels kept, see `channels_at`. The other arguments are those of ``nn.Conv2d``.

    Of a grouped convolution whole groups are kept, of a depthwise one single channels. So the channels kept, in and
    out, have to be the same number of groups (with ``divisor`` a multiple of the channels of a group).

    Input [batch, channels_at(in_channels, width), height, width]. Raises ``InputError`` for impossible widths.

    >>> conv = SlimmableConv2d(8, 16, 3, padding=1, widths=(0.25, 0.5, 1.0))
    >>> conv.choose(width=0.25)
    >>> conv(torch.randn(1, 2, 5, 5)).shape
    torch.Size([1, 4, 5, 5])
    >>> conv.specialized(width=0.5)
    Conv2d(4, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        widths: Widths,
        slim_in: bool = True,
        slim_out: bool = True,
        divisor: int = 1,
    ) -> None:
        super().__init__()
        if groups > 1 and not (slim_in and slim_out):
            raise InputError(f"a convolution of {groups} groups keeps whole groups: slim both its input and its output")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.slim_in, self.slim_out, self.divisor = slim_in, slim_out, divisor
        self.widths = width_choice(widths)
        self.width = 1.0
        whole = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation
        self.weight, self.bias = whole.weight, whole.bias
        for width in self.widths.values if isinstance(self.widths, OneOf) else ():
            self._geometry(width)

    def choices(self) -> Mapping[str, Choice]:
        """The width."""
        return {"width": self.widths}

    def choose(self, **choices: Any) -> None:
        """Run at this ``width`` from now on."""
        for value in choices.values():
            width = self.widths.checked(value)
            self._geometry(width)
            self.width = width

    def specialized(self, **choices: Any) -> nn.Module:
        """An ``nn.Conv2d`` with the weights of this width."""
        inputs, outputs, groups = self._geometry(choices["width"])
        weight, bias = self._sliced(choices["width"])
        conv = nn.Conv2d(
            inputs, outputs, self.kernel_size, self.stride, self.padding, self.dilation, groups, bias is not None,
            device="meta",
        )  # fmt: skip
        conv.weight = _parameter(weight, self.weight)
        if bias is not None and self.bias is not None:
            conv.bias = _parameter(bias, self.bias)
        return conv

    def forward(self, x: Tensor) -> Tensor:
        groups = self._geometry(self.width)[2]
        return F.conv2d(x, *self._sliced(self.width), self.stride, self.padding, self.dilation, groups)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, width={self.width}"

    def _geometry(self, width: float) -> tuple[int, int, int]:
        """Channels in, channels out and groups at this width."""
        inputs = channels_at(self.in_channels, width, self.divisor) if self.slim_in else self.in_channels
        outputs = channels_at(self.out_channels, width, self.divisor) if self.slim_out else self.out_channels
        if self.groups == 1:
            return inputs, outputs, 1
        each_in, each_out = self.in_channels // self.groups, self.out_channels // self.groups
        if inputs % each_in or outputs % each_out or inputs // each_in != outputs // each_out:
            raise InputError(
                f"width {width} keeps {inputs} of {self.in_channels} channels in and {outputs} of {self.out_channels} "
                f"out, which is no number of whole groups of {each_in} to {each_out} channels; choose "
                f"channels, widths and a divisor that keep whole ones"
            )
        return inputs, outputs, inputs // each_in

    def _sliced(self, width: float) -> tuple[Tensor, Tensor | None]:
        inputs, outputs, groups = self._geometry(width)
        bias = None if self.bias is None else self.bias[:outputs]
        return self.weight[:outputs, : inputs // groups], bias


class _OfWidths(Dynamic):
    """A layer whose one choice is its width, which any of ``widths`` may be."""

    widths: OneOf | Between
    width: float

    def choices(self) -> Mapping[str, Choice]:
        """The width."""
        return {"width": self.widths}

    def choose(self, **choices: Any) -> None:
        """Run at this ``width`` from now on."""
        for value in choices.values():
            self.width = self.widths.checked(value)


@final
class SlimmableLinear(_OfWidths):
    """A linear layer that uses the first of its features: ``weight[:out, :in]`` at the chosen width.

    Arguments as of `SlimmableConv2d`. Behind a flattened map of p positions, ``divisor`` is p times that of the map.
    Input [..., channels_at(in_features, width)].

    >>> SlimmableLinear(8, 10, widths=(0.5, 1.0), slim_out=False).specialized(width=0.5)
    Linear(in_features=4, out_features=10, bias=True)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        widths: Widths,
        slim_in: bool = True,
        slim_out: bool = True,
        divisor: int = 1,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.slim_in, self.slim_out, self.divisor = slim_in, slim_out, divisor
        self.widths = width_choice(widths)
        self.width = 1.0
        whole = nn.Linear(in_features, out_features, bias)
        self.weight, self.bias = whole.weight, whole.bias

    def specialized(self, **choices: Any) -> nn.Module:
        """An ``nn.Linear`` with the weights of this width."""
        weight, bias = self._sliced(choices["width"])
        outputs, inputs = weight.shape
        linear = nn.Linear(inputs, outputs, bias is not None, device="meta")
        linear.weight = _parameter(weight, self.weight)
        if bias is not None and self.bias is not None:
            linear.bias = _parameter(bias, self.bias)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self._sliced(self.width))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, width={self.width}"

    def _sliced(self, width: float) -> tuple[Tensor, Tensor | None]:
        inputs = channels_at(self.in_features, width, self.divisor) if self.slim_in else self.in_features
        outputs = channels_at(self.out_features, width, self.divisor) if self.slim_out else self.out_features
        bias = None if self.bias is None else self.bias[:outputs]
        return self.weight[:outputs, :inputs], bias


@final
class SwitchableBatchNorm2d(_OfWidths):
    """A batch norm for each width, with parameters and statistics of its own (arXiv 1812.08928, section 3).

    Input [batch, channels_at(num_features, width), height, width]. ``eps`` and ``momentum`` are of ``nn.BatchNorm2d``.

    >>> SwitchableBatchNorm2d(16, widths=(0.25, 1.0)).specialized(width=0.25).num_features
    4
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        widths: Sequence[float],
        divisor: int = 1,
    ) -> None:
        super().__init__()
        choice = width_choice(widths)
        if not isinstance(choice, OneOf):
            raise InputError(
                f"SwitchableBatchNorm2d has a batch norm for each of a few widths, not for all {choice}; "
                f"use SlimmableBatchNorm2d"
            )
        self.widths = choice
        self.width = 1.0
        counts = [channels_at(num_features, width, divisor) for width in choice.values]
        self.bn = nn.ModuleList(nn.BatchNorm2d(count, eps, momentum) for count in counts)

    def specialized(self, **choices: Any) -> nn.Module:
        """The batch norm of this width."""
        return self._norm(choices["width"])

    def forward(self, x: Tensor) -> Tensor:
        normalised: Tensor = self._norm(self.width)(x)
        return normalised

    def _norm(self, width: float) -> nn.Module:
        assert isinstance(self.widths, OneOf)
        return self.bn[self.widths.values.index(width)]


@final
class SlimmableBatchNorm2d(_OfWidths):
    """One batch norm whose first channels serve every width of an interval (arXiv 1903.05134, section 3).

    In training it uses the statistics of the batch, and keeps the running ones up to date at width 1 only: at other
    widths the channels in front carry other values, and the average over widths would fit none of them. So a narrower
    network that was specialised wants `rgc.recalibrate`; until then it has the first of the statistics of width 1.

    >>> SlimmableBatchNorm2d(16, widths=Between(0.25, 1.0)).specialized(width=0.6).num_features
    10
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, *, widths: Widths, divisor: int = 1
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum, self.divisor = num_features, eps, momentum, divisor
        self.widths = width_choice(widths)
        self.width = 1.0
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def specialized(self, **choices: Any) -> nn.Module:
        """An ``nn.BatchNorm2d`` of the channels in front."""
        kept = channels_at(self.num_features, choices["width"], self.divisor)
        bn = nn.BatchNorm2d(kept, self.eps, self.momentum, device="meta")
        bn.weight, bn.bias = _parameter(self.weight[:kept], self.weight), _parameter(self.bias[:kept], self.bias)
        bn.running_mean, bn.running_var = self.running_mean[:kept].clone(), self.running_var[:kept].clone()
        bn.num_batches_tracked = self.num_batches_tracked.clone()
        return bn

    def forward(self, x: Tensor) -> Tensor:
        kept = channels_at(self.num_features, self.width, self.divisor)
        tracked = not self.training or self.width == 1.0
        mean, var = (self.running_mean[:kept], self.running_var[:kept]) if tracked else (None, None)
        if self.training and tracked:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(x, mean, var, self.weight[:kept], self.bias[:kept], self.training, self.momentum, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, width={self.width}"


def _parameter(part: Tensor, whole: Tensor) -> nn.Parameter:
    """A parameter of its own storage, dense, in the memory format of the ``whole`` that it is a part of."""
    last = whole.dim() == 4 and whole.is_contiguous(memory_format=torch.channels_last) and not whole.is_contiguous()
    memory_format = torch.channels_last if last else torch.contiguous_format
    return nn.Parameter(part.detach().clone(memory_format=memory_format), whole.requires_grad)
