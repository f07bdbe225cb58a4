"""How does a network leave out a block? A gate in front of it looks at the input and says so.

SkipNet (arXiv 1711.09485, section 3): y = g(x) F(x) + (1 - g(x)) x with a gate g in {0, 1}, whose gradient in training
is that of its soft value (straight through).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from rgc.choices import Choice, OneOf
from rgc.dynamic import Dynamic


@final
class Skippable(Dynamic):
    """A block that a gate may leave out, sample by sample; the choice ``keep`` says so once and for all.

    block: maps [batch, ...] to the same shape. gate: maps its input to one number per sample, [batch, 1], which is
    positive where the block is kept. It starts with the gate; specialised, it is the block or nothing, without a gate.

    In evaluation all samples go through the block and the gate selects: the batch stays whole, and the answer does not
    depend on who is in it.

    >>> layer = Skippable(nn.Linear(3, 3), nn.Linear(3, 1))
    >>> layer.specialized(keep=True), layer.specialized(keep=False)
    (Linear(in_features=3, out_features=3, bias=True), Identity())
    """

    def __init__(self, block: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.block, self.gate = block, gate
        self.keep: bool | None = None

    def choices(self) -> Mapping[str, Choice]:
        """Whether the block is kept."""
        return {"keep": OneOf((False, True), by_input=True)}

    def choose(self, **choices: Any) -> None:
        """Keep the block from now on, or leave it out; ``None`` asks the gate."""
        for value in choices.values():
            self.keep = None if value is None else self.choices()["keep"].checked(value)

    def specialized(self, **choices: Any) -> nn.Module:
        """The block, or an ``nn.Identity``."""
        return self.block if choices["keep"] else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.keep is not None:
            kept: Tensor = self.block(x) if self.keep else x
            return kept
        y: Tensor = self.block(x)
        score: Tensor = self.gate(x).reshape((-1,) + (1,) * (y.dim() - 1))
        hard = (score > 0).to(y.dtype)
        if not self.training:
            return torch.where(score > 0, y, x)
        soft = torch.sigmoid(score)
        gate = hard + soft - soft.detach()
        return gate * y + (1 - gate) * x


@final
class SkipGate(nn.Module):
    """The feed-forward gate of SkipNet: a 3x3 convolution with stride 2, batch norm, ReLU, global mean, linear.

    Input [batch, channels, height, width], output [batch, 1].

    >>> SkipGate(8)(torch.randn(2, 8, 9, 9)).shape
    torch.Size([2, 1])
    """

    def __init__(self, channels: int, hidden: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, hidden, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(hidden)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(hidden, 1)
        nn.init.ones_(self.fc.bias)  # gates begin open

    def forward(self, x: Tensor) -> Tensor:
        score: Tensor = self.fc(self.relu(self.bn(self.conv(x))).mean((2, 3)))
        return score
