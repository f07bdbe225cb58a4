"""Does the first head that is sure answer, sample by sample, and is each exit a network by itself?"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rgc
from rgc.errors import InputError
from rgc.nn import EarlyExit, choose, joint_exit_loss
from rgc.testing import randomize


def network(threshold: float = 0.9) -> EarlyExit:
    stages = [nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 5, 1)]
    heads = [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 3)) for n in (4, 4, 5)]
    return randomize(EarlyExit(stages, heads, threshold=threshold))


@pytest.mark.parametrize("exit_", [1, 2, 3])
def test_each_exit_is_the_stages_up_to_it_and_its_head(exit_: int) -> None:
    model = network()
    x = torch.randn(4, 2, 9, 8)
    choose(model, exit=exit_)
    static = rgc.specialize(model, exit=exit_)
    assert torch.equal(static(x), model(x)) and torch.equal(static(x), model.all_exits(x)[exit_ - 1])
    names = {name.split(".")[0] for name, _ in static.named_parameters()}
    assert names == {"head", *(f"stage{number}" for number in range(1, exit_ + 1))}
    compiled = rgc.compile(static, x)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def test_the_first_head_below_the_threshold_answers_for_each_sample() -> None:
    model = network()
    x = 4 * torch.randn(16, 2, 9, 8)
    scores = [each.detach() for each in model.all_exits(x)]
    entropies = [torch.distributions.Categorical(logits=each).entropy() for each in scores]
    ordered = torch.cat(entropies[:2]).sort().values
    model.threshold = float((ordered[15] + ordered[16]) / 2)  # between two of them: none lies on the threshold
    first = [next((n for n in (0, 1) if entropies[n][i] < model.threshold), 2) for i in range(16)]
    assert set(first) == {0, 1, 2}
    expected = torch.stack([scores[n][i] for i, n in enumerate(first)])
    choose(model, exit=None)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x[:1]), expected[:1])


def test_all_heads_learn_together() -> None:
    model = network().train()
    x, labels = torch.randn(4, 2, 9, 8), torch.tensor([0, 1, 2, 0])
    scores = model.all_exits(x)
    loss = joint_exit_loss(scores, labels, [0.5, 0.25, 1.0])
    expected = sum(w * F.cross_entropy(s, labels) for w, s in zip((0.5, 0.25, 1.0), scores, strict=True))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_makes_no_early_exit_is_refused() -> None:
    with pytest.raises(InputError, match="a head for each stage, got 1 and 0"):
        EarlyExit([nn.Identity()], [])
    with pytest.raises(InputError, match="positive entropy in nats, got 0"):
        EarlyExit([nn.Identity()], [nn.Identity()], threshold=0)
    with pytest.raises(InputError, match="one weight for each head, got 1 for 2"):
        joint_exit_loss([torch.zeros(1, 2)] * 2, torch.tensor([0]), [1.0])
    with pytest.raises(InputError, match="4 is not one of 1, 2, 3; the nearest is 3"):
        rgc.specialize(network(), exit=4)
    with pytest.raises(InputError, match="leaves exit open; pass exit=, one of 1, 2, 3"):
        rgc.specialize(network())
