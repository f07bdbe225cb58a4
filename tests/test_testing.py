"""Does `rgc.testing` tell an author in plain words what is wrong with a rewrite?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rgc import BatchNorm, Conv, Rewrite, Value, require, rewrite
from rgc.errors import RgcError
from rgc.testing import ExampleError, check, randomize


def fold(wrong: bool = False) -> Rewrite:
    @rewrite(lambda x, conv, bn: bn(conv(x)))
    def fold(x: Value, conv: Conv, bn: BatchNorm) -> Value:
        require(conv.groups == 1, "grouped")
        return (bn.as_linear() @ bn.as_linear() @ conv)(x) if wrong else (bn.as_linear() @ conv)(x)

    return fold


def conv_bn(**options: int) -> Callable[[], nn.Module]:
    def conv_then_bn() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3, **options), nn.BatchNorm2d(4)).eval()  # type: ignore[arg-type]

    return conv_then_bn


SHAPE = (2, 4, 8, 8)


def test_a_rewrite_with_both_kinds_of_examples_that_hold_passes() -> None:
    good = fold()
    good.fires_on(SHAPE)(conv_bn())
    good.leaves_alone(SHAPE, because="grouped")(conv_bn(groups=2))
    check(good, thorough=False)


def test_a_rewrite_without_both_kinds_of_examples_is_not_finished() -> None:
    unfinished = fold()
    with pytest.raises(ExampleError, match="fold is not finished: it has no example with @fold.fires_on"):
        check(unfinished, thorough=False)
    unfinished.fires_on(SHAPE)(conv_bn())
    with pytest.raises(ExampleError, match="fold is not finished: it has no example with @fold.leaves_alone"):
        check(unfinished, thorough=False)


def test_an_example_that_must_fire_and_does_not_says_what_happened() -> None:
    refusing, silent = fold(), fold()
    refusing.fires_on(SHAPE)(conv_bn(groups=2))
    silent.fires_on(SHAPE)(lambda: nn.Sequential(nn.ReLU()).eval())
    for rewrite_, words in ((refusing, "must fire, but refuses: grouped"), (silent, "its pattern does not match")):
        rewrite_.leaves_alone(SHAPE, because="")(conv_bn(groups=2))
        with pytest.raises(ExampleError, match=words):
            check(rewrite_, thorough=False)


def test_an_example_that_must_be_left_alone_and_is_not_says_so() -> None:
    eager = fold()
    eager.fires_on(SHAPE)(conv_bn())
    eager.leaves_alone(SHAPE, because="")(conv_bn(stride=2))
    with pytest.raises(ExampleError, match=r"'conv then bn' \(seed 0\): it must leave the model alone, but fires"):
        check(eager, thorough=False)


def test_an_example_that_is_refused_for_another_reason_says_so() -> None:
    other = fold()
    other.fires_on(SHAPE)(conv_bn())
    other.leaves_alone(SHAPE, because="dilated")(conv_bn(groups=2))
    with pytest.raises(ExampleError, match="must refuse because of 'dilated', but refuses: grouped"):
        check(other, thorough=False)


def test_a_wrong_result_is_an_error() -> None:
    wrong = fold(wrong=True)
    wrong.fires_on(SHAPE)(conv_bn())
    wrong.leaves_alone(SHAPE, because="")(conv_bn(groups=2))
    with pytest.raises(ExampleError, match="the result is not equal: .* differs by"):
        check(wrong, thorough=False)


def test_an_example_that_does_not_run_is_an_error() -> None:
    broken = fold()
    broken.fires_on((2, 5, 8, 8))(conv_bn())
    broken.leaves_alone(SHAPE, because="")(conv_bn(groups=2))
    with pytest.raises(ExampleError, match="compiling fails: Sequential does not run on an input of 2x5x8x8"):
        check(broken, thorough=False)


def test_the_error_is_one_of_rgc_and_an_assertion() -> None:
    assert issubclass(ExampleError, RgcError) and issubclass(ExampleError, AssertionError)


def test_random_weights_are_the_same_for_the_same_seed_and_leave_nothing_at_its_default() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8))

    first, second, third = randomize(model(), 1), randomize(model(), 1), randomize(model(), 2)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert not torch.equal(first[1].running_mean, third[1].running_mean)  # type: ignore[index, union-attr, arg-type]
    for bn in (first[1], first[3]):  # type: ignore[index]
        assert isinstance(bn, nn.BatchNorm2d) and not bn.training and bn.running_mean is not None
        assert (bn.weight < 0).any() and (bn.weight > 0).any() and (bn.running_mean != 0).all() and (bn.bias != 0).all()


class Heads(nn.Module):
    """What fresh models leave constant, and a train() as some have it, which returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(
            [nn.LayerNorm(16), nn.GroupNorm(4, 16), nn.RMSNorm(16), nn.InstanceNorm2d(16, affine=True)]
        )
        self.gamma = nn.Parameter(1e-6 * torch.ones(16, 1, 1))
        self.implicit = nn.Parameter(torch.ones(1, 16, 1, 1))
        self.gate = nn.Parameter(torch.zeros(()))
        self.head = nn.Linear(16, 64)
        nn.init.zeros_(self.head.weight)
        self.slope = nn.PReLU(16)
        self.decayed = nn.Parameter(torch.tensor(1.0), requires_grad=False)
        self.trained = nn.Parameter(torch.arange(4.0))

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


def test_no_parameter_is_left_constant_that_a_fresh_model_has_constant() -> None:
    model = randomize(Heads()).requires_grad_(False)
    assert isinstance(model, Heads) and not model.training
    for norm in model.norms:
        weight = norm.weight
        assert isinstance(weight, Tensor) and (weight < 0).any() and (weight > 0).any()
        assert float(weight.abs().min()) >= 0.4 and float(weight.abs().max()) <= 1.5
    for parameter in (model.gamma, model.implicit):
        assert (parameter < 0).any() and (parameter > 0).any() and 0.4 <= float(parameter.abs().min()) <= 1
    assert 0.4 <= float(model.gate.abs()) <= 1
    assert (model.head.weight < 0).any() and (model.head.weight > 0).any()
    with torch.no_grad():
        assert 0.3 < float(model.head(torch.randn(256, 16)).std()) < 3


def test_what_is_trained_or_meant_to_be_constant_stays() -> None:
    model = randomize(Heads())
    assert bool((model.slope.weight == 0.25).all()) and float(model.decayed) == 1
    assert model.trained.tolist() == [0, 1, 2, 3]


def test_a_norm_without_parameters_or_statistics_is_taken_as_it_is() -> None:
    assert not randomize(nn.BatchNorm1d(3, affine=False, track_running_stats=False)).training


@pytest.mark.parametrize("layers", [4, 40])
def test_activations_neither_vanish_nor_explode(layers: int) -> None:
    torch.manual_seed(0)
    parts = (part for _ in range(layers) for part in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()))
    with torch.no_grad():
        y = randomize(nn.Sequential(*parts))(torch.randn(2, 8, 16, 16))
    assert 1e-3 < float(y.abs().max()) < 1e4
