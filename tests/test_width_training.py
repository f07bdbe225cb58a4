"""Do the training rules add the gradients that they say, from the right teachers, at the right widths?"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rgc
from rgc import models
from rgc.errors import InputError
from rgc.nn import Between, EnsembleBootstrap, OneOf, SlimmableLinear, choose, sandwich, sandwich_step

WIDTHS = (0.25, 0.5, 0.75, 1.0)


def network(widths: tuple[float, ...] | Between = WIDTHS) -> nn.Sequential:
    first = SlimmableLinear(5, 8, widths=widths, slim_in=False)
    return nn.Sequential(first, nn.Tanh(), SlimmableLinear(8, 3, widths=widths, slim_out=False)).double()


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def at(model: nn.Module, width: float, x: Tensor) -> Tensor:
    choose(model, width=width)
    scores: Tensor = model(x)
    return scores


@pytest.mark.parametrize("widths", [WIDTHS, Between(0.25, 1.0)])
def test_a_sandwich_is_the_largest_random_ones_and_the_smallest(widths: tuple[float, ...] | Between) -> None:
    model = network(widths)
    drawn = [sandwich(model, 3, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert all(len(each) == 5 and each[0] == 1.0 and each[-1] == 0.25 for each in drawn)
    between = {width for each in drawn for width in each[1:-1]}
    assert between == {0.5, 0.75} if isinstance(widths, tuple) else len(between) == 60
    assert drawn[3] == sandwich(model, 3, torch.Generator().manual_seed(3))
    assert sandwich(network((0.5, 1.0)), 2) == [1.0, 0.5]


def test_gradients_are_those_of_labels_at_the_top_and_of_its_detached_softmax_below() -> None:
    model, (x, labels) = network(), data()
    other = copy.deepcopy(model)
    losses = sandwich_step(model, x, labels, count=1, generator=torch.Generator().manual_seed(0))
    target = at(other, 1.0, x).detach().softmax(1)
    expected = F.cross_entropy(at(other, 1.0, x), labels)
    for width in list(losses)[1:]:
        expected = expected - (target * at(other, width, x).log_softmax(1)).sum(1).mean()
    expected.backward()
    torch.testing.assert_close(gradients(model), gradients(other))
    torch.testing.assert_close(sum(losses.values()), expected.detach())
    assert not any(loss.requires_grad for loss in losses.values()) and model[0].width == 1.0


def test_the_teacher_is_a_moving_average_and_teaches_the_widths_as_in_ds_net() -> None:
    model, (x, labels) = network(), data()
    rule = EnsembleBootstrap(model, decay=0.75)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    rule.update()
    for old, new, mean in zip(start, model.parameters(), rule.teacher.module.parameters(), strict=True):
        torch.testing.assert_close(mean, 0.75 * old + 0.25 * new, check_dtype=True)
    losses = rule.step(x, labels, count=1, generator=torch.Generator().manual_seed(1))
    random = list(losses)[1]
    assert list(losses) == [1.0, random, 0.25]
    other, teacher = copy.deepcopy(model), copy.deepcopy(rule.teacher.module)
    other.zero_grad()
    targets = [at(teacher, width, x).detach().softmax(1) for width in (1.0, random)]
    expected = F.cross_entropy(at(other, 1.0, x), labels)
    expected = expected + F.cross_entropy(at(other, random, x), targets[0])
    expected = expected + F.cross_entropy(at(other, 0.25, x), (targets[0] + targets[1]) / 2)
    expected.backward()
    torch.testing.assert_close(gradients(model), gradients(other))
    assert not gradients(rule.teacher)


@pytest.mark.parametrize("rule", ["sandwich", "bootstrap"])
def test_every_width_learns(rule: str) -> None:
    """A separable task: after some steps each width, specialised and recalibrated, does better than chance."""
    torch.manual_seed(0)
    model = models.SlimmableResNet(1, Between(0.25, 1.0), num_classes=3)
    labels = torch.arange(24) % 3
    x = 0.3 * torch.randn(24, 3, 8, 8)
    x[torch.arange(24), labels] += 1.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    bootstrap = EnsembleBootstrap(model, decay=0.5)
    for _ in range(12):
        optimizer.zero_grad()
        sandwich_step(model, x, labels) if rule == "sandwich" else bootstrap.step(x, labels)
        optimizer.step()
        bootstrap.update()
    for width in (0.25, 0.6, 1.0):
        static = rgc.specialize(model, width=width)
        rgc.recalibrate(static, [x])
        accuracy = (static.eval()(x).argmax(1) == labels).float().mean()
        assert accuracy >= 0.9, width


def test_models_without_widths_or_with_different_ones_are_refused() -> None:
    x, labels = data()
    with pytest.raises(InputError, match="Linear has to have the same widths in all of its layers; found none"):
        sandwich_step(nn.Linear(5, 3), x, labels)
    mixed = nn.Sequential(network(), SlimmableLinear(3, 3, widths=(0.5, 1.0)))
    with pytest.raises(InputError, match="found one of 0.25, 0.5, 0.75, 1.0, one of 0.5, 1.0"):
        EnsembleBootstrap(mixed)
    with pytest.raises(InputError, match=r"decay of the moving average is in \[0, 1\), got 1.0"):
        EnsembleBootstrap(network(), decay=1.0)
    with pytest.raises(InputError, match="number of random widths cannot be -1"):
        sandwich(network(), -1)


def test_a_choice_by_input_counts_as_the_same_widths() -> None:
    model = models.DSNet((0.5, 1.0))
    assert model.gated.choices()["width"] == OneOf((0.5, 1.0), by_input=True)
    assert sandwich(model) == [1.0, 0.5]
