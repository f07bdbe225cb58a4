"""What is a conditionally parameterised convolution? One whose kernel is a mixture, weighed by its input.

CondConv (arXiv 1904.04971, section 3): sigma((r1 W1 + ... + rn Wn) * x) with r = sigmoid(R mean(x)). A fixed r makes it
an ordinary convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgc.choices import Choice, Vector
from rgc.dynamic import Dynamic
from rgc.errors import InputError


@final
class CondConv2d(Dynamic):
    """A convolution whose kernel, and bias, is a sum of ``experts`` kernels; the choice ``routing`` is their weights.

    It starts with the routing by input, for each sample its own: sigmoid of a linear layer on the global mean. The
    routing of a trained layer on some data is ``layer.route(x)``, [batch, experts], whose mean is a fixed one to take.

    Arguments as of ``nn.Conv2d``; input [batch, in_channels, height, width].

    >>> conv = CondConv2d(4, 8, 3, padding=1, experts=2)
    >>> conv(torch.randn(2, 4, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    >>> conv.specialized(routing=(0.3, 0.7))
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
        experts: int = 4,
    ) -> None:
        super().__init__()
        if experts < 1:
            raise InputError(f"CondConv2d needs at least one expert, got {experts}")
        self.in_channels, self.out_channels, self.groups, self.experts = in_channels, out_channels, groups, experts
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation
        each = [
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
            for _ in range(experts)
        ]
        self.weight = nn.Parameter(torch.stack([conv.weight.detach() for conv in each]))  # [experts, out, in, kh, kw]
        biases = [conv.bias.detach() for conv in each if conv.bias is not None]
        self.bias = nn.Parameter(torch.stack(biases)) if biases else None  # [experts, out]
        self.routing_fn = nn.Linear(in_channels, experts)
        self.routing: tuple[float, ...] | None = None

    def choices(self) -> Mapping[str, Choice]:
        """The weights of the experts."""
        return {"routing": Vector(self.experts, by_input=True)}

    def choose(self, **choices: Any) -> None:
        """Weigh the experts like this from now on; ``None`` lets the input decide."""
        for value in choices.values():
            self.routing = None if value is None else self.choices()["routing"].checked(value)

    def specialized(self, **choices: Any) -> nn.Module:
        """An ``nn.Conv2d`` with the mixed kernel."""
        weight, bias = self._mixed(choices["routing"])
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, bias is not None, device="meta",
        )  # fmt: skip
        conv.weight = nn.Parameter(weight.detach(), self.weight.requires_grad)
        if bias is not None and self.bias is not None:
            conv.bias = nn.Parameter(bias.detach(), self.bias.requires_grad)
        return conv

    def route(self, x: Tensor) -> Tensor:
        """The weights of the experts for each sample: [batch, experts]."""
        return torch.sigmoid(self.routing_fn(x.mean((2, 3))))

    def forward(self, x: Tensor) -> Tensor:
        if self.routing is not None:
            return F.conv2d(x, *self._mixed(self.routing), self.stride, self.padding, self.dilation, self.groups)
        routing = self.route(x)
        # A convolution is linear in its kernel: each expert by itself, then the sum, needs no kernel per sample.
        parts = []
        for expert in range(self.experts):
            bias = None if self.bias is None else self.bias[expert]
            y = F.conv2d(x, self.weight[expert], bias, self.stride, self.padding, self.dilation, self.groups)
            parts.append(routing[:, expert, None, None, None] * y)
        return torch.stack(parts).sum(0)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, experts={self.experts}"

    def _mixed(self, routing: tuple[float, ...]) -> tuple[Tensor, Tensor | None]:
        weights = torch.tensor(routing, device=self.weight.device, dtype=self.weight.dtype)
        bias = None if self.bias is None else torch.einsum("n,no->o", weights, self.bias)
        return torch.einsum("n,noikl->oikl", weights, self.weight), bias
