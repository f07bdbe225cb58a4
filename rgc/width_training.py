"""How is a network trained at many widths at once? The largest learns from labels, the others from what it says.

The sandwich rule and in-place distillation (arXiv 1903.05134), and in-place ensemble
bootstrapping, whose teacher is a moving average (DS-Net, arXiv 2103.13258, section 3).
"""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rgc.choices import Between, OneOf
from rgc.dynamic import choose, dynamic_modules
from rgc.errors import InputError


def sandwich(model: nn.Module, count: int = 2, generator: torch.Generator | None = None) -> list[float]:
    """The widths of one training step: the largest, ``count`` random ones, the smallest.

    The random ones are drawn evenly from those between (none where there are none). Ranks of one training that draw
    from generators of the same seed train the same widths.

    Raises ``InputError`` for a model without widths, or whose layers do not have the same.

    >>> from rgc.nn import SlimmableLinear
    >>> sandwich(SlimmableLinear(8, 8, widths=(0.25, 0.5, 1.0)))
    [1.0, 0.5, 0.5, 0.25]
    """
    if count < 0:
        raise InputError(f"sandwich: the number of random widths cannot be {count}")
    widths = _widths(model)
    if isinstance(widths, Between):
        drawn = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
        return [widths.high, *(widths.low + (widths.high - widths.low) * each for each in drawn), widths.low]
    between = widths.values[1:-1]
    picks = torch.randint(len(between), (count,), generator=generator).tolist() if between else []
    return [widths.values[-1], *(between[pick] for pick in picks), widths.values[0]]


def sandwich_step(
    model: nn.Module, x: Tensor, labels: Tensor, *, count: int = 2, generator: torch.Generator | None = None
) -> dict[float, Tensor]:
    """Forward and backward of one step by the sandwich rule, with in-place distillation; gradients add up.

    The largest width learns from ``labels``; the others from its softmax, which gets no gradient. What is left to the
    caller is ``zero_grad`` before and the optimizer's step after. The losses come back by width, without a graph; the
    model stays at its largest width. x: what the model takes; its output is [batch, classes].

    >>> from rgc.nn import SlimmableLinear
    >>> model = SlimmableLinear(4, 3, widths=(0.5, 1.0), slim_in=False, slim_out=False)
    >>> list(sandwich_step(model, torch.zeros(2, 4), torch.tensor([0, 2])))
    [1.0, 0.5]
    """
    largest, *others = sandwich(model, count, generator)
    choose(model, width=largest)
    scores = model(x)
    losses = {largest: _backward(F.cross_entropy(scores, labels))}
    target = scores.detach().softmax(1)
    for width in others:
        choose(model, width=width)
        losses[width] = _backward(F.cross_entropy(model(x), target))
    choose(model, width=largest)
    return losses


@final
class EnsembleBootstrap:
    """In-place ensemble bootstrapping: a moving average of the model teaches its narrower widths.

    The largest width learns from the labels, random ones from the largest of the teacher, the smallest from the mean of
    the probabilities of the teacher's largest and random ones. The teacher is in
    training mode, so that batch norms use the batch; it gets no gradient, and belongs in a checkpoint (it is a module).

    decay: of the moving average. Raises ``InputError`` for one outside [0, 1), and for a model without widths.

    >>> from rgc.nn import SlimmableLinear
    >>> model = SlimmableLinear(4, 3, widths=(0.25, 0.5, 1.0), slim_in=False, slim_out=False)
    >>> rule = EnsembleBootstrap(model)
    >>> list(rule.step(torch.zeros(2, 4), torch.tensor([0, 2])))
    [1.0, 0.5, 0.25]
    >>> rule.update()  # after the optimizer's step
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"EnsembleBootstrap: the decay of the moving average is in [0, 1), got {decay}")
        _widths(model)
        self.model = model
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # PyTorch does not annotate it
        self.teacher = AveragedModel(model, multi_avg_fn=average)
        self.teacher.update_parameters(model)  # the first one copies
        self.teacher.train().requires_grad_(False)

    def step(
        self, x: Tensor, labels: Tensor, *, count: int = 2, generator: torch.Generator | None = None
    ) -> dict[float, Tensor]:
        """Forward and backward of one step; as `sandwich_step`."""
        largest, *others, smallest = sandwich(self.model, count, generator)
        targets = [self._probabilities(x, width) for width in (largest, *others)]
        choose(self.model, width=largest)
        losses = {largest: _backward(F.cross_entropy(self.model(x), labels))}
        ensemble = torch.stack(targets).mean(0)
        for width, target in [*((width, targets[0]) for width in others), (smallest, ensemble)]:
            choose(self.model, width=width)
            losses[width] = _backward(F.cross_entropy(self.model(x), target))
        choose(self.model, width=largest)
        return losses

    def update(self) -> None:
        """Let the teacher follow the model: after each step of the optimizer."""
        self.teacher.update_parameters(self.model)

    def _probabilities(self, x: Tensor, width: float) -> Tensor:
        choose(self.teacher, width=width)
        with torch.no_grad():
            probabilities: Tensor = self.teacher(x).softmax(1)
        return probabilities


def _widths(model: nn.Module) -> OneOf | Between:
    found: list[OneOf | Between] = []
    for _, module in dynamic_modules(model):
        width = module.choices().get("width")
        if isinstance(width, Between):
            found.append(Between(width.low, width.high))
        elif isinstance(width, OneOf):
            found.append(OneOf(width.values))
    if not found or any(each != found[0] for each in found):
        different = ", ".join(dict.fromkeys(map(str, found))) or "none"
        raise InputError(f"{type(model).__name__} has to have the same widths in all of its layers; found {different}")
    return found[0]


def _backward(loss: Tensor) -> Tensor:
    torch.autograd.backward(loss)
    return loss.detach()
