"""Does DS-Net run at the width that its gate picks, and is each width a static network?"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import rgc
from rgc import models
from rgc.nn import EnsembleBootstrap, choose, gate_targets
from rgc.testing import randomize


@pytest.mark.parametrize("width", [0.25, 0.5, 0.75, 1.0])
def test_each_width_is_a_static_network_with_the_gate_s_attention_only(width: float) -> None:
    model = randomize(models.dsnet_small())
    x = torch.randn(2, 3, 16, 16)
    choose(model, width=width)
    static = rgc.specialize(model, width=width)
    assert torch.equal(static(x), model(x))
    assert not [name for name, _ in static.named_parameters() if "slimming" in name]
    assert static.gated.body[0][0].in_channels == 32 and static.gated.body[1][0].groups == int(64 * width)


def test_the_gate_picks_a_width_for_each_sample() -> None:
    model = randomize(models.DSNet((0.5, 0.75, 1.0)))
    x = 2 * torch.randn(12, 3, 16, 16)
    with torch.no_grad():
        scores = model.gate_scores(x)
        model.gated.gate.slimming.bias.sub_(scores.mean(0))
        model.gated.gate.slimming.weight.mul_(10)
        model.gated.gate.slimming.bias.mul_(10)
        picks = model.gate_scores(x).argmax(1)
    assert len(set(picks.tolist())) > 1
    static = [rgc.specialize(model, width=width)(x) for width in (0.5, 0.75, 1.0)]
    expected = torch.stack([static[pick][index] for index, pick in enumerate(picks.tolist())])
    choose(model, width=None)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x[:1]), expected[:1])


def test_it_compiles_at_its_default_and_at_a_width() -> None:
    model = randomize(models.dsnet_small())
    x = torch.randn(2, 3, 32, 32)
    for compiled, width in ((rgc.compile(model), 1.0), (rgc.compile(rgc.specialize(model, width=0.25)), 0.25)):
        assert not compiled.report.failures and compiled.report.ops_after["BatchNorm2d"] == 0
        torch.testing.assert_close(compiled(x), rgc.specialize(model, width=width)(x), rtol=1e-4, atol=1e-4)


def test_it_learns_in_two_stages() -> None:
    model = models.DSNet((0.5, 1.0), num_classes=3)
    x, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % 3
    EnsembleBootstrap(model).step(x, labels)
    heads = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert heads == {"gated.gate.slimming.weight", "gated.gate.slimming.bias"}
    model.zero_grad()
    smallest, largest = (rgc.specialize(model, width=width)(x) for width in (0.5, 1.0))
    F.cross_entropy(model.gate_scores(x), gate_targets(smallest, largest, labels, 2)).backward()
    assert all((parameter.grad is not None) == ("reduce" in name or "slimming" in name)
               for name, parameter in model.named_parameters())  # fmt: skip
