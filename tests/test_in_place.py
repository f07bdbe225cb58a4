"""Is it told right whether somebody reads what an activation overwrites?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgc.activation_sites import call_sites, forwards, layer_sites
from rgc.in_place import unseen_reader


class Block(nn.Module):
    def __init__(self, function: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def reasons(model: nn.Module) -> list[str]:
    traced = forwards(model)
    return [unseen_reader(site, model, traced) for site in [*layer_sites(model), *call_sites(traced)]]


@pytest.mark.parametrize(
    "function",
    [
        lambda b, x: b.act(b.bn(b.conv(x))),
        lambda b, x: b.act(b.bn(x)) + b.act(b.conv(x)),
        lambda b, x: b.act(b.drop(b.bn(x))),
        lambda b, x: b.act(b.bn(x) + x) + x,
        lambda b, x: b.act(torch.cat([x, x], 1)),
        lambda b, x: (lambda y: (y.shape[0] + y.size(1)) * b.act(b.conv(y) + b.act(y)))(b.bn(x)),
        lambda b, x: b.act(b.bn(x).__iadd__(x)),
        lambda b, x: b.act(F.relu(b.conv(x), inplace=True) + F.relu_(b.bn(x))),
    ],
)
def test_an_own_value_that_nobody_reads_later_is_seen(function: Callable[[Block, Tensor], Tensor]) -> None:
    assert not any(reasons(nn.Sequential(Block(function))))


def pass_and_read(block: Block, x: Tensor) -> Tensor:
    y = block.bn(x)
    z = y.view(-1)
    return block.act(y) + z.sum()


def add_and_read(block: Block, x: Tensor) -> Tensor:
    y = block.bn(x)
    z = y
    z += x
    return block.act(z) + y


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda b, x: b.act(x), "overwrites x, which may have readers that cannot be seen"),
        (lambda b, x: b.act(x.view(-1)), "overwrites view, which may have readers"),
        (
            lambda b, x: F.relu_(x) + b.act(b.bn(x)),
            "0.relu works in place, and x, which it overwrites, is read again by bn",
        ),
        (lambda b, x: (lambda y: b.act(y) + y)(b.bn(x)), "bn, which it overwrites, is read again by add"),
        (add_and_read, "is read again by add"),
        (lambda b, x: (lambda y: b.act(b.drop(y)) + y)(b.bn(x)), "bn, which it overwrites, is read again by add"),
    ],
)
def test_a_value_that_others_may_read_is_told_with_its_reader(
    function: Callable[[Block, Tensor], Tensor], reason: str
) -> None:
    found = [each for each in reasons(nn.Sequential(Block(function))) if each]
    assert len(found) == 1 and reason in found[0]


def test_a_view_that_was_made_before_is_a_reader() -> None:
    [reason] = reasons(nn.Sequential(Block(pass_and_read)))
    assert reason == "0.act overwrites bn, of which view may be a view that is read again"


def test_in_a_sequential_the_layer_before_decides() -> None:
    assert reasons(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Identity(), nn.ReLU(inplace=True))) == [""]
    assert reasons(nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.ReLU(inplace=True))) == [""]
    assert reasons(nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True))) != [""]
    hooked = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    hooked[0].register_forward_hook(lambda module, args, output: None)
    assert reasons(hooked) != [""]


def test_whoever_calls_a_module_is_asked_however_deep_it_lies() -> None:
    class Reaches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.ModuleDict({"bn": nn.BatchNorm2d(3), "act": nn.ReLU(inplace=True)})])

        def forward(self, x: Tensor) -> Tensor:
            y = self.parts[0]["bn"](x)
            return self.parts[0]["act"](y) + (y if self.reads else 0)

    Reaches.reads = False
    assert reasons(Reaches()) == [""]
    Reaches.reads = True
    assert "is read again by add" in reasons(Reaches())[0]


def test_out_of_place_nothing_is_asked() -> None:
    block = Block(lambda b, x: b.act(x) + x)
    block.act.inplace = False
    assert reasons(block) == [""]
