"""How does a network pick its width by its input? A gate with two heads: one that attends, one that picks.

The double-headed slimming gate of DS-Net (arXiv 2103.13258, section 3), and the targets it learns from.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from rgc.choices import Choice, OneOf
from rgc.dynamic import Dynamic, choose
from rgc.errors import InputError
from rgc.slimmable import width_choice


@final
class ChannelAttention(nn.Module):
    """The attention head: x (1 + tanh(V relu(U mean(x)))), channel by channel. It depends on no width, and stays.

    Input and output [batch, channels, height, width].

    >>> ChannelAttention(8)(torch.zeros(2, 8, 3, 3)).shape
    torch.Size([2, 8, 3, 3])
    """

    def __init__(self, channels: int, hidden: int = 16) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, hidden)
        self.relu = nn.ReLU()
        self.expand = nn.Linear(hidden, channels)

    def encoded(self, x: Tensor) -> Tensor:
        """What both heads see: [batch, hidden]."""
        code: Tensor = self.relu(self.reduce(x.mean((2, 3))))
        return code

    def forward(self, x: Tensor) -> Tensor:
        weights: Tensor = self.expand(self.encoded(x))
        return x * (1 + torch.tanh(weights))[:, :, None, None]


@final
class SlimmingGate(nn.Module):
    """A score for each width, [batch, widths], of an input [batch, channels, height, width]; and its attention head.

    >>> SlimmingGate(8, 4).scores(torch.zeros(2, 8, 3, 3)).shape
    torch.Size([2, 4])
    """

    def __init__(self, channels: int, widths: int, hidden: int = 16) -> None:
        super().__init__()
        self.attention = ChannelAttention(channels, hidden)
        self.slimming = nn.Linear(hidden, widths)

    def scores(self, x: Tensor) -> Tensor:
        """The slimming head: the largest score is of the width to take; trained with cross entropy."""
        found: Tensor = self.slimming(self.attention.encoded(x))
        return found

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = self.attention(x)
        return attended


@final
class GatedWidth(Dynamic):
    """Slimmable layers behind a gate that picks their width; the choice ``width`` is one of ``widths``.

    It starts at the largest. ``choose(model, width=None)`` lets the gate pick for each sample, in a Python loop over
    the widths that are picked. A fixed width leaves out what picks, and keeps the gate's attention.

    gate: has a score for each of ``widths``. body: maps what the gate sees to [batch, ...], and its own layers have
    the same ``widths``.

    >>> from rgc.nn import SlimmableLinear
    >>> body = nn.Sequential(nn.Flatten(), SlimmableLinear(8, 3, widths=(0.5, 1.0), slim_in=False, slim_out=False))
    >>> gated = GatedWidth(SlimmingGate(8, 2), body, widths=(0.5, 1.0))
    >>> choose(gated, width=None)
    >>> gated(torch.zeros(2, 8, 1, 1)).shape
    torch.Size([2, 3])
    """

    def __init__(self, gate: SlimmingGate, body: nn.Module, *, widths: Sequence[float]) -> None:
        super().__init__()
        choice = width_choice(widths)
        if not isinstance(choice, OneOf) or len(choice.values) != gate.slimming.out_features:
            raise InputError(f"a gate of {gate.slimming.out_features} scores picks one of as many widths, not {choice}")
        self.gate, self.body = gate, body
        self.widths = OneOf(choice.values, by_input=True)
        self.width: float | None = 1.0

    def choices(self) -> Mapping[str, Choice]:
        """The width."""
        return {"width": self.widths}

    def choose(self, **choices: Any) -> None:
        """Run at this ``width`` from now on; ``None`` lets the gate pick. Layers are told by ``rgc.nn.choose``."""
        for value in choices.values():
            self.width = None if value is None else self.widths.checked(value)

    def specialized(self, **choices: Any) -> nn.Module:
        """Attention and body; the layers of the body become those of the width."""
        return nn.Sequential(OrderedDict(attention=self.gate.attention, body=self.body))

    def forward(self, x: Tensor) -> Tensor:
        attended = self.gate(x)
        if self.width is not None:
            fixed: Tensor = self.body(attended)
            return fixed
        picks = self.gate.scores(x).argmax(1)
        answers: list[Tensor] = []
        owners: list[Tensor] = []
        for index, width in enumerate(self.widths.values):
            mine = (picks == index).nonzero()[:, 0]
            if len(mine):
                choose(self.body, width=width)
                answers.append(self.body(attended[mine]))
                owners.append(mine)
        return torch.cat(answers)[torch.cat(owners).argsort()]


def gate_targets(
    smallest: Tensor, largest: Tensor, labels: Tensor, widths: int, *, hard: Literal["give up", "try best"] = "give up"
) -> Tensor:
    """Which width a gate should have taken, [batch]: the target of a cross entropy with ``SlimmingGate.scores``.

    Sandwich gate sparsification: a sample that the smallest network gets right is for the smallest (0), one that only
    the largest gets right is for the largest (``widths - 1``). One that both get wrong is for the smallest under "give
    up", for the largest under "try best". smallest, largest: the scores of both, [batch, classes].

    Raises ``InputError`` for another strategy.

    >>> right, wrong = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> labels = torch.tensor([0])
    >>> gate_targets(right, right, labels, 4), gate_targets(wrong, right, labels, 4)
    (tensor([0]), tensor([3]))
    """
    if hard not in ("give up", "try best"):
        raise InputError(f"hard samples 'give up' or 'try best', got {hard!r}")
    easy = smallest.argmax(1) == labels
    helped = torch.ones_like(easy) if hard == "try best" else largest.argmax(1) == labels
    return torch.where(~easy & helped, widths - 1, 0)
