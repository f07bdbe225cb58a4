"""Does the cost model count what runs, and order what is known to be faster?"""

from __future__ import annotations

import pytest
import torch

from rgc import (
    Activation,
    Add,
    AvgPool,
    BatchNorm,
    Constant,
    Conv,
    Flatten,
    InputError,
    MaxPool,
    Structural,
    Upsample,
    Value,
)
from rgc.cost import CPU, CUDA, OBJECTIVES, cost, macs, parameters, target_named
from rgc.ir import Input, TensorType
from rgc.operators import Slot


def source(channels: int = 64, size: int = 28) -> Value:
    return Value(Input("x"), (), TensorType((1, channels, size, size), torch.float32), name="x")


def conv(reads: int, makes: int, kernel: int, groups: int = 1, **options: object) -> Conv:
    return Conv(torch.zeros(makes, reads // groups, kernel, kernel), groups=groups, **options)  # type: ignore[arg-type]


def test_macs_are_those_of_convolutions() -> None:
    x = source(8, 10)
    assert macs(conv(8, 16, 3)(x)) == 8 * 8 * 16 * 8 * 9
    assert macs(conv(8, 16, 3, groups=4, stride=2)(x)) == 4 * 4 * 16 * 2 * 9
    transposed = Conv(torch.zeros(8, 16, 3, 3), stride=2, transposed=True)
    assert macs(transposed(x)) == 10 * 10 * 8 * 16 * 9
    assert macs(Activation("relu")(x)) == 0


def test_parameters_are_counted_and_statistics_are_not() -> None:
    x = source(8, 10)
    assert parameters(Conv(torch.zeros(4, 8, 3, 3), torch.zeros(4))(x)) == 4 * 8 * 9 + 4
    four = torch.ones(8)
    assert parameters(BatchNorm(four, four, four, four, 1e-5, 2)(x)) == 16
    assert parameters(BatchNorm(four, four, None, None, 1e-5, 2)(x)) == 0
    assert parameters(x) == 0 and parameters(Activation("prelu", weight=four)(x)) == 8


def test_views_inputs_and_constants_cost_no_time() -> None:
    x = source(8, 10)
    for value in (x, Constant(torch.zeros(3))(), Structural(torch.flatten, (Slot(0), 1))(x), Flatten((8, 10, 10))(x)):
        assert CPU.seconds(value) == CUDA.seconds(value) == 0
        assert cost([value], "depth", CPU) < 0.1


def test_an_adaptive_pooling_takes_the_time_to_read_its_input() -> None:
    x = source(8, 10)
    pooled = Structural(torch.nn.AdaptiveAvgPool2d(2), (Slot(0),))(x)
    assert CPU.seconds(pooled) > 8 * 10 * 10 * 4 / CPU.bandwidth


def test_depth_counts_layers_and_a_bias_map_a_little() -> None:
    x = source(8, 10)
    plain = conv(8, 8, 1)(x)
    mapped = Conv(torch.zeros(8, 8, 1, 1), torch.zeros(8, 10, 10), size=(10, 10))(x)
    assert cost([plain], "depth", CPU) == 1 < cost([mapped], "depth", CPU) < 2
    assert cost([plain, Activation("relu")(plain)], "depth", CPU) == 2


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nothing_costs_nothing(objective: str) -> None:
    assert cost([], objective, CPU) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("target", [CPU, CUDA])
def test_what_is_known_to_be_slower_is_estimated_slower(target: object) -> None:
    def seconds(*operators: Conv) -> float:
        value, total = source(), 0.0
        for op in operators:
            value = op(value)
            total += target.seconds(value)  # type: ignore[attr-defined]
        return total

    depthwise = conv(64, 64, 3, groups=64, padding=1)
    assert seconds(depthwise, conv(64, 64, 1)) < seconds(conv(64, 64, 3, padding=1)) * 3
    assert seconds(conv(64, 4, 1), conv(4, 64, 1)) <= seconds(conv(64, 64, 1)) * 2.5
    assert seconds(conv(64, 64, 3)) < seconds(conv(64, 64, 7))
    assert seconds(conv(64, 64, 1)) < seconds(conv(64, 64, 3))


def test_every_kind_of_kernel_has_an_efficiency() -> None:
    x = source()
    flat = Value(Input("y"), (), TensorType((1, 64), torch.float32), name="y")
    values = [conv(64, 64, 1)(x), conv(64, 64, 3)(x), conv(64, 64, 5)(x), conv(64, 64, 3, groups=64)(x)]
    values += [
        conv(64, 64, 3, groups=2)(x),
        Conv(torch.zeros(3, 64))(flat),
        AvgPool((2, 2), (2, 2), (0, 0))(x),
        MaxPool((2, 2), (2, 2), (0, 0), (1, 1))(x),
        Upsample(2, scale_factor=(2.0, 2.0))(x),
        Add()(x, x),
    ]
    assert all(CPU.seconds(value) > 0 and CUDA.seconds(value) > 0 for value in values)


def test_targets_are_named() -> None:
    assert target_named(None) is target_named("cpu") is CPU and target_named("cuda") is CUDA
    with pytest.raises(InputError, match="unknown target 'tpu'; choose one of cpu, cuda"):
        target_named("tpu")
