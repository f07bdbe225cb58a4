"""Are the models like an example different, in every way that they claim, and do they run?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rgc.rewrite import Example
from rgc.trial import drawn, made
from rgc.variations import Variation, layer_changes, other_shapes, random_variation, runs, variations


def conv_bn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


EXAMPLE = Example(conv_bn, (2, 4, 7, 6), fires=True)


def found(words: str) -> Variation:
    return next(each for each in variations(EXAMPLE) if words in each.words)


@pytest.mark.parametrize("words", [
    "stride=2", "dilation=2", "groups=2", "bias=False", "padding_mode='circular', padding=1", "kernel_size=2",
    "affine=False", "track_running_stats=False", "GELU", "behind a sigmoid", "before a batch norm", "called twice",
    "whose value '_0' is read elsewhere too", "on an input of 1x4x7x6", "on an input of 2x4x13x14",
])  # fmt: skip
def test_an_example_is_changed_in_every_way_that_an_author_forgets(words: str) -> None:
    assert runs(found(words))


def test_a_change_is_made_in_the_layer_that_it_names() -> None:
    model = found("groups=2").build()
    conv = model.get_submodule("0")
    assert isinstance(conv, nn.Conv2d) and conv.groups == 2 and conv.kernel_size == (3, 3)
    assert str(found("groups=2")) == "the example 'conv bn' with groups=2 in its layer '0' (Conv2d)"


def test_what_does_not_run_is_left_out() -> None:
    residual = Example(lambda: _Sum(), (2, 4, 7, 6), fires=True)
    listed = [each.words for each in variations(residual)]
    assert any("groups=2" in words for words in listed) and not any("stride=2" in words for words in listed)
    assert not runs(Variation(EXAMPLE, "", (2, 5, 7, 6)))


class _Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y + x


def test_a_value_that_is_read_elsewhere_is_returned_too() -> None:
    outputs = made(found("'_1' is read elsewhere").build, 0, torch.float64)(drawn((2, 4, 7, 6), 0, torch.float64))
    assert len(outputs) == 2 and torch.equal(outputs[0], outputs[1].relu())


def test_two_layers_of_one_shape_may_share_a_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    (tie,) = (change for words, change in layer_changes(model) if words.startswith("with one weight"))
    tied = tie(model)
    assert tied.get_submodule("0").weight is tied.get_submodule("1").weight


def test_sizes_reach_one_position() -> None:
    assert (2, 4, 1, 1) in other_shapes((2, 4, 7, 6)) and other_shapes((2, 4)) == [(1, 4)]


def test_random_variations_are_the_same_for_the_same_seed_and_run() -> None:
    names = [str(random_variation([EXAMPLE], seed)) for seed in (0, 0, *range(1, 9))]
    assert names[0] == names[1] and len(set(names)) > 3
    assert all(runs(random_variation([EXAMPLE], seed)) for seed in range(3))
