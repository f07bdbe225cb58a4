"""How does a network stop early? Heads between its stages, of which the first that is sure of itself answers.

BranchyNet (arXiv 1709.01686): a head is sure where the entropy of its softmax is below its threshold,
and all heads are trained together, by the weighted sum of their losses.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgc.choices import Choice, OneOf
from rgc.dynamic import Dynamic
from rgc.errors import InputError


@final
class EarlyExit(Dynamic):
    """Stages in a row with a head behind each; the choice ``exit`` is the number of the head that answers, from 1.

    It starts with the last head. ``choose(model, exit=None)`` decides for each sample: the first head whose entropy
    (in nats) is below ``threshold`` answers, the last one for what is left; samples are told apart, so the others in
    the batch do not matter. That is a Python loop, which ends as soon as nothing is left.

    Input what the first stage takes, output [batch, classes] of every head. Raises ``InputError`` where stages and
    heads are not equally many, and for a threshold that is not positive.

    >>> stages, heads = [nn.Linear(3, 4), nn.Linear(4, 4)], [nn.Linear(4, 2), nn.Linear(4, 2)]
    >>> EarlyExit(stages, heads).specialized(exit=1)
    Sequential(
      (stage1): Linear(in_features=3, out_features=4, bias=True)
      (head): Linear(in_features=4, out_features=2, bias=True)
    )
    """

    def __init__(self, stages: Iterable[nn.Module], heads: Iterable[nn.Module], *, threshold: float = 0.5) -> None:
        super().__init__()
        self.stages, self.heads = nn.ModuleList(stages), nn.ModuleList(heads)
        if not len(self.stages) == len(self.heads) > 0:
            raise InputError(f"an early exit has a head for each stage, got {len(self.stages)} and {len(self.heads)}")
        if not 0 < threshold < math.inf:
            raise InputError(f"the threshold of an early exit is a positive entropy in nats, got {threshold}")
        self.threshold = threshold
        self.exit: int | None = len(self.stages)

    def choices(self) -> Mapping[str, Choice]:
        """The number of the head."""
        return {"exit": OneOf(tuple(range(1, len(self.stages) + 1)), by_input=True)}

    def choose(self, **choices: Any) -> None:
        """Answer by the head number ``exit`` from now on; ``None`` decides for each sample."""
        for value in choices.values():
            self.exit = None if value is None else self.choices()["exit"].checked(value)

    def specialized(self, **choices: Any) -> nn.Module:
        """The stages up to the head, and the head."""
        exit_ = choices["exit"]
        named = [(f"stage{number}", stage) for number, stage in enumerate(self.stages[:exit_], 1)]
        return nn.Sequential(OrderedDict([*named, ("head", self.heads[exit_ - 1])]))

    def forward(self, x: Tensor) -> Tensor:
        if self.exit is None:
            return self._answers(x)
        for stage in self.stages[: self.exit]:
            x = stage(x)
        scores: Tensor = self.heads[self.exit - 1](x)
        return scores

    def all_exits(self, x: Tensor) -> list[Tensor]:
        """What every head says, from the first to the last: for training."""
        scores = []
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = stage(x)
            scores.append(head(x))
        return scores

    def _answers(self, x: Tensor) -> Tensor:
        left = torch.arange(x.shape[0], device=x.device)  # the samples that nobody has answered yet
        answers: list[Tensor] = []
        owners: list[Tensor] = []
        for number, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True), 1):
            x = stage(x)
            scores = head(x)
            logarithms = F.log_softmax(scores, 1)
            sure = -(logarithms.exp() * logarithms).sum(1) < self.threshold
            if number == len(self.stages):
                sure = torch.ones_like(sure)
            answers.append(scores[sure])
            owners.append(left[sure])
            x, left = x[~sure], left[~sure]
            if not len(left):
                break
        return torch.cat(answers)[torch.cat(owners).argsort()]


def joint_exit_loss(scores: Sequence[Tensor], labels: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """What a network with early exits is to minimise: the weighted sum of the cross entropies of all of its heads.

    scores: as of `EarlyExit.all_exits`, each [batch, classes]. weights: by default 1 for each.

    Raises ``InputError`` where there is not one weight for each head.

    >>> joint_exit_loss([torch.zeros(1, 2), torch.zeros(1, 2)], torch.tensor([0]), [0.5, 1.0])
    tensor(1.0397)
    """
    factors = [1.0] * len(scores) if weights is None else list(weights)
    if not len(factors) == len(scores) > 0:
        raise InputError(f"joint_exit_loss takes one weight for each head, got {len(factors)} for {len(scores)}")
    losses = [w * F.cross_entropy(each, labels) for w, each in zip(factors, scores, strict=True)]
    return torch.stack(losses).sum()
