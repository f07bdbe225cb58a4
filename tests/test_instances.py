"""Are drawn graphs of the form that they were, with numbers from the range that was asked for, and nothing else?"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from rgc import AvgPool, BatchNorm, Conv, Graph, Scale
from rgc.compiler import trace
from rgc.instances import Draw, Range, exact_form, varied
from rgc.operators import Activation, MaxPool

NUMBERS = Range(20, 6)


def _graph(model: nn.Module, *shape: int) -> Graph:
    return trace(model.eval(), torch.zeros(shape)).graph


def _ops(graph: Graph, kind: type) -> list[Conv]:
    return [value.op for value in graph.nodes() if isinstance(value.op, kind)]


def test_integers_are_all_of_the_range_without_zero() -> None:
    drawn = Draw(Range(3, 1), 0).integers((4000,))
    counts = {float(number): int((drawn == number).sum()) for number in drawn.unique()}
    assert set(counts) == {-3.0, -2.0, -1.0, 1.0, 2.0, 3.0}
    assert all(abs(count - 4000 / 6) < 150 for count in counts.values())  # six standard deviations


def test_the_points_of_a_line_are_equally_spaced_and_never_zero() -> None:
    points = [Draw(Range(4, 1), 7, point).integers((50,)) for point in range(5)]
    steps = torch.stack(points).diff(dim=0)
    assert torch.equal(steps, steps[:1].expand_as(steps)) and bool(steps.any())
    assert all(bool((point % 2 == 1).all()) for point in points)


def test_parameters_are_integers_and_what_a_batch_norm_divides_by_is_a_power_of_two() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 2))
    drawn = Draw(NUMBERS, 3).graph(_graph(model, 1, 3, 8, 8), fixed=True)
    for conv in _ops(drawn, Conv):
        assert bool((conv.weight == conv.weight.round()).all()) and 0 < conv.weight.abs().max() <= NUMBERS.largest
        assert bool((conv.weight != 0).all()) and conv.bias is not None
    (bn,) = (value.op for value in drawn.nodes() if isinstance(value.op, BatchNorm))
    deviation = (bn.var + bn.eps).sqrt()
    assert bool((deviation.log2() == deviation.log2().round()).all()) and deviation.max() <= 2 ** (NUMBERS.scales - 1)
    assert 0 < bn.eps < 1 and bn.weight is not None and bn.bias is not None
    quotient = bn.bias * deviation / bn.weight  # which a convolution behind it pads with, beside the mean
    assert bool((quotient == quotient.round()).all())
    assert all(value.type is None or value.type.fixed for value in drawn.nodes())


class _Meant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return 0 * torch.relu(y) + 1 * y + 0.3 * torch.tanh(y)


def test_factors_of_0_and_1_stay_and_others_do_not() -> None:
    found = _ops(Draw(NUMBERS, 0).graph(_graph(_Meant(), 1, 2, 3, 3), fixed=False), Scale)
    factors = sorted(abs(float(op.scale)) for op in found)  # type: ignore[attr-defined]
    assert factors[0] == 0 and factors[-1] == round(factors[-1]) >= 1
    assert all(float(op.shift) == 0 for op in found)  # type: ignore[attr-defined]


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.other = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.first(x)) + self.second(torch.relu(x)) * self.other(x)


def test_tied_weights_are_drawn_once() -> None:
    first, second, other = _ops(Draw(NUMBERS, 0).graph(_graph(_Tied(), 1, 2, 3, 3), fixed=False), Conv)
    weights = {id(conv.weight) for conv in (first, second, other)}
    assert len(weights) == 2 and not torch.equal(first.bias, second.bias)  # type: ignore[arg-type]


def test_slopes_leave_a_power_of_two_to_divide_by() -> None:
    graph = _graph(nn.Sequential(nn.LeakyReLU(0.2), nn.PReLU(), nn.LeakyReLU(1.0)), 1, 2, 3, 3)
    for seed in range(6):
        leaky, prelu, linear = _ops(Draw(NUMBERS, seed).graph(graph, fixed=False), Activation)
        slopes = leaky.option("negative_slope", 0.01), float(prelu.weight)  # type: ignore[attr-defined]
        assert all(math.frexp(1 + slope)[0] == 0.5 for slope in slopes)
        assert linear.option("negative_slope", 0.01) == 1  # type: ignore[attr-defined]


def test_a_size_is_found_at_which_averages_are_over_powers_of_two() -> None:
    graph = _graph(nn.Sequential(nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(1)), 1, 2, 9, 8)
    found = exact_form(graph)
    assert found is not None
    conv = next(value for value in found.nodes() if isinstance(value.op, Conv))
    positions = math.prod(conv.tensor_type.shape[2:])
    assert positions & (positions - 1) == 0 and positions > 1


def test_a_pooling_over_nine_divides_by_eight_and_one_over_four_stays() -> None:
    found = exact_form(_graph(nn.Sequential(nn.AvgPool2d(3)), 1, 2, 9, 9))
    assert found is not None and [op.divisor_override for op in _ops(found, AvgPool)] == [8]  # type: ignore[attr-defined]
    graph = _graph(nn.Sequential(nn.AvgPool2d(2)), 1, 2, 9, 9)
    assert exact_form(graph) is graph
    assert exact_form(_graph(nn.Sequential(nn.AvgPool1d(3)), 1, 2, 9)) is None


@pytest.mark.parametrize("transposed", [False, True])
def test_variations_are_valid_graphs_of_every_geometry(transposed: bool) -> None:
    layer = nn.ConvTranspose2d(4, 4, 3, padding=1) if transposed else nn.Conv2d(4, 4, 3, padding=1)
    graph = _graph(nn.Sequential(layer, nn.MaxPool2d(2), nn.AvgPool2d(2)), 1, 4, 12, 12)
    draw, seen = Draw(NUMBERS, 1), set()
    for _ in range(80):
        found = varied(graph, draw)
        if found is None:
            continue
        (conv,) = _ops(found, Conv)
        (pool,) = _ops(found, MaxPool)
        seen |= {("kernel", conv.kernel), ("stride", conv.stride), ("dilation", conv.dilation),
                 ("groups", conv.groups), ("padding", conv.padding), ("ceil", pool.ceil_mode)}  # type: ignore[attr-defined]  # fmt: skip
        drawn = Draw(NUMBERS, 2).graph(found, fixed=False)
        given = torch.ones(drawn.inputs[0].tensor_type.shape, dtype=torch.float64)
        outputs = drawn.evaluate({drawn.inputs[0].op.name: given}, torch.float64)  # type: ignore[attr-defined]
        assert tuple(outputs.shape) == drawn.output_values[0].tensor_type.shape
    for name, least in (("kernel", 5), ("stride", 4), ("dilation", 3), ("groups", 3), ("padding", 2), ("ceil", 2)):
        assert len({found for kind, found in seen if kind == name}) >= least, name
