"""Does the cost model count what runs, and order what is known to be faster?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import rgc
from rgc import (
    Activation,
    Add,
    AvgPool,
    AxisSums,
    BatchNorm,
    Clamp,
    Constant,
    Conv,
    Flatten,
    InputError,
    MaxPool,
    Structural,
    Upsample,
    Value,
)
from rgc.calibration import Calibration, Key
from rgc.cost import (
    CPU,
    CUDA,
    OBJECTIVES,
    Efficiency,
    Kernel,
    Target,
    cost,
    layer_size,
    macs,
    parameters,
    target_named,
    work,
)
from rgc.ir import Input, TensorType
from rgc.operators import Slot
from rgc.testing import randomize


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
    small, large = (Structural(torch.nn.AdaptiveAvgPool2d(2), (Slot(0),))(source(8, size)) for size in (10, 200))
    assert CPU.seconds(large) > 10 * CPU.seconds(small) > 0


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
    with pytest.raises(
        InputError, match=r"unknown target 'tpu'; choose one of cpu, cuda, or a \.json of rgc calibrate"
    ):
        target_named("tpu")


def calibration(**efficiency: tuple[tuple[float, float, float, float, float], ...]) -> Calibration:
    """Figures with round numbers: 1 GFLOP/s, calls of 10, 5 and 1 us, and passes that get slower beyond 1 kB."""
    key = Key.of_this_machine("cpu", torch.float32)
    assert key is not None
    points = {name.replace("_", " ").replace("k", ""): each for name, each in efficiency.items()}
    bandwidth = ((1024.0, 4e9), (4096.0, 1e9))
    return Calibration(key, 1e9, {"conv": 1e-5, "linear": 5e-6, "pass": 1e-6}, bandwidth, points)


THREES = ((16.0, 16.0, 1.0, 49.0, 0.5), (64.0, 64.0, 1.0, 49.0, 0.8), (16.0, 16.0, 1.0, 784.0, 0.6))


def test_kernels_have_one_name_each() -> None:
    x = source(8, 16)
    names = {
        conv(8, 4, 3): "3x3 dense",
        conv(8, 4, 3, stride=2): "3x3/2 dense",
        conv(8, 4, 3, dilation=2): "3x3d dense",
        conv(8, 8, 3, groups=8): "3x3 depthwise",
        conv(8, 16, 3, groups=8, stride=2): "3x3/2 depthwise",
        conv(8, 8, 1, groups=2): "1x1 grouped",
        Conv(torch.zeros(8, 4, 2, 2), stride=2, transposed=True): "2x2/2 transposed",
        Conv(torch.zeros(4, 8, 1, 3)): "1x3 dense",
        conv(8, 4, 3, ones=torch.zeros(4, 3, 3)): "3x3 unaligned dense",
        conv(8, 4, 1, stride=2, ones=torch.zeros(4, 1, 1)): "1x1/2 unaligned dense",
    }
    assert {op: Kernel.of(op(x)).name for op in names} == names
    flat, row = (Value(Input("y"), (), TensorType(shape, torch.float32)) for shape in ((2, 8), (1, 8, 16)))
    assert Kernel.of(Conv(torch.zeros(4, 8))(flat)).name == "linear"
    assert Kernel.of(Conv(torch.zeros(4, 8, 3))(row)).name == "1x3 dense"
    assert Kernel.of(AvgPool((3, 3), (2, 2), (1, 1))(x)).name == "3x3/2 average"


def test_a_layer_has_channels_per_group_groups_and_positions() -> None:
    x = Value(Input("x"), (), TensorType((2, 8, 10, 10), torch.float32))
    assert layer_size(conv(8, 12, 3)(x)) == (8, 12, 1, 2 * 8 * 8)
    assert layer_size(conv(8, 16, 3, groups=4)(x)) == (2, 4, 4, 2 * 8 * 8)
    assert layer_size(AvgPool((2, 2), (2, 2), (0, 0))(x)) == (1, 1, 8, 2 * 5 * 5)
    assert work(AvgPool((2, 2), (2, 2), (0, 0))(x)) == 2 * 8 * 5 * 5 * 4
    assert work(conv(8, 12, 3)(x)) == macs(conv(8, 12, 3)(x))


def test_a_channel_of_ones_is_one_more_channel() -> None:
    x, op = source(8, 10), conv(8, 12, 3, padding=1, ones=torch.zeros(12, 3, 3))
    beside = conv(9, 12, 3, padding=1)(source(9, 10))
    assert macs(op(x)) == macs(beside) and parameters(op(x)) == parameters(beside)
    assert layer_size(op(x)) == layer_size(beside) and Kernel.of(op(x)) == Kernel.of(beside)
    assert Kernel.of(conv(3, 12, 3)(source(3, 10))).name == "3x3 dense"  # nobody vectorises over so few


def test_unaligned_channels_are_slower_unless_they_were_measured() -> None:
    seventeen = conv(17, 16, 3, padding=1)(source(17, 7))
    known = Target.of(calibration(k3x3_dense=THREES))
    rate = known.efficiency["3x3 dense"].at(layer_size(seventeen))[0]
    assert not known.is_measured(seventeen)
    assert known.seconds(seventeen) == pytest.approx(1e-5 + 2 * macs(seventeen) / (rate / 2 * 1e9))
    unaligned = ((17.0, 16.0, 1.0, 49.0, 0.4),)
    measured = replace(known, efficiency={**known.efficiency, "3x3 unaligned dense": Efficiency(unaligned)})
    assert measured.is_measured(seventeen)
    assert measured.seconds(seventeen) == pytest.approx(1e-5 + 2 * macs(seventeen) / 0.4e9)


@pytest.mark.parametrize("channels", [16, 32, 64])
def test_a_channel_of_ones_that_costs_more_than_it_saves_is_refused(channels: int) -> None:
    torch.manual_seed(channels)
    layers = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 3, padding=1)
    model, x = randomize(nn.Sequential(nn.ReLU(), *layers).eval()), torch.randn(1, channels, 14, 14)
    fast, short = (rgc.compile(model, x, objective=objective).report for objective in ("latency", "depth"))
    assert fast.ops_after["Conv2d"] == 2 and short.ops_after["Conv2d"] == 1
    assert any("estimated slower" in refused.reason for refused in fast.refusals)


def test_an_efficiency_stays_between_its_points_and_says_where_it_leaves_them() -> None:
    threes = Efficiency(THREES)
    assert threes.at((16.0, 16.0, 1.0, 49.0)) == (pytest.approx(0.5), True)
    middle, inside = threes.at((32.0, 32.0, 1.0, 200.0))
    assert inside and 0.5 < middle < 0.8
    for size, nearest in (((256.0, 256.0, 1.0, 49.0), 0.8), ((2.0, 2.0, 1.0, 4.0), 0.5)):
        assert threes.at(size) == (pytest.approx(nearest), False)


def test_a_measured_layer_takes_call_and_computation() -> None:
    target = Target.of(calibration(k3x3_dense=THREES))
    value = conv(16, 16, 3, padding=1)(source(16, 7))
    assert target.is_measured(value) and target.calibrated and target.name == "cpu (calibrated)"
    assert target.seconds(value) == pytest.approx(1e-5 + 2 * macs(value) / 0.5e9)


def test_moving_counts_where_it_takes_longer_than_computing() -> None:
    target = Target.of(calibration(linear=((1024.0, 1024.0, 1.0, 1.0, 1.0), (2048.0, 1024.0, 1.0, 1.0, 1.0))))
    flat = Value(Input("y"), (), TensorType((1, 1024), torch.float32), name="y")
    value = Conv(torch.zeros(1024, 1024))(flat)
    moved = 4 * (1024 * 1024 + 2 * 1024)
    assert target.seconds(value) == pytest.approx(5e-6 + moved / 1e9)


def test_another_size_of_kernel_is_never_extrapolated_but_the_slowest_of_its_kind() -> None:
    sevens = tuple((*size, eta / 4) for *size, eta in THREES)
    known = calibration(k3x3_dense=THREES, k7x7_dense=sevens, k3x3_depthwise=((1.0, 1.0, 16.0, 49.0, 0.01),))  # type: ignore[arg-type]
    target = Target.of(known)
    x = source(16, 7)
    five, seven = conv(16, 16, 5, padding=2)(x), conv(16, 16, 7, padding=3)(x)
    assert target.is_measured(seven) and not target.is_measured(five)
    assert target.seconds(five) == pytest.approx(1e-5 + 2 * macs(five) / 0.125e9)
    strided, without = conv(16, 16, 3, padding=1, stride=2)(source(16, 14)), conv(16, 16, 3, padding=1)(x)
    assert not target.is_measured(strided)  # as fast as with stride 1, as far as one knows
    assert target.seconds(strided) == pytest.approx(target.seconds(without))
    grouped = conv(16, 16, 3, groups=4, padding=1)(x)
    assert not target.is_measured(grouped)
    assert target.seconds(grouped) == pytest.approx(1e-5 + 2 * macs(grouped) / 0.01e9)


def test_passes_slow_down_with_their_size_between_what_was_measured() -> None:
    target = Target.of(calibration(k3x3_dense=THREES))

    def add(elements: int) -> float:
        x = Value(Input("x"), (), TensorType((elements,), torch.float32))
        return target.seconds(Add()(x, x)) - 1e-6

    assert add(8) == pytest.approx(3 * 32 / 4e9)  # smaller and larger than measured: as the next one
    assert add(100_000) == pytest.approx(3 * 400_000 / 1e9)
    assert add(256 * 2 // 3) == pytest.approx(2048 / 2e9, rel=0.01)  # halfway in logarithms


def test_a_bias_map_is_one_more_pass() -> None:
    target = Target.of(calibration(k1x1_dense=((8.0, 8.0, 1.0, 100.0, 0.5),)))
    x = source(8, 10)
    plain = Conv(torch.zeros(8, 8, 1, 1), torch.zeros(8))(x)
    mapped = Conv(torch.zeros(8, 8, 1, 1), torch.zeros(8, 10, 10), size=(10, 10))(x)
    extra = target.seconds(mapped) - target.seconds(plain)
    assert extra == pytest.approx(1e-6 + 3 * 4 * 800 / 1e9, rel=0.15)  # the map is read, the result read and written


def test_a_clamp_is_a_pass_for_each_side() -> None:
    bound, none = torch.tensor([0.0, 1.0]), torch.full((2,), torch.inf)
    both, lower = Clamp(bound, bound + 1, 2)(source(2)), Clamp(bound, none, 2)(source(2))
    for objective in OBJECTIVES[:2]:  # latency and depth
        assert cost([both], objective, CPU) == 2 * cost([lower], objective, CPU) > 0


def test_an_uneven_padding_is_one_more_pass() -> None:
    target = Target.of(calibration(k3x3_dense=THREES))
    even, uneven = (conv(16, 16, 3, padding=padding)(source(16, 7)) for padding in (1, ((0, 2), (0, 2))))
    assert target.seconds(uneven) > target.seconds(even) + 1e-6


def test_sums_of_positions_cost_two_thin_products_and_the_copy_of_what_is_transposed() -> None:
    value = AxisSums((torch.ones(3, 7), torch.ones(2, 7)))(source(16, 7))
    assert macs(value) == 16 * (7 * 7 * 2 + 7 * 2 * 3)
    computed = (16 * 7 + 16 * 2) * (2 * 64 * 4) / (0.6 * 6e10)  # short rows: as long as for 4 sums of 64
    copied = 2 * 4 * (16 * 2 * 7) / 8e9
    assert CPU.seconds(value) == pytest.approx(3 * 4e-6 + computed + copied)
    assert cost([value], "depth", CPU) == 1 and cost([value], "params", CPU) == 3 * 7 + 2 * 7


def test_sums_of_long_rows_cost_the_pass_over_them() -> None:
    value = AxisSums((torch.ones(1, 4096),))(Value(Input("x"), (), TensorType((1, 16, 4096), torch.float32)))
    compute = 2 * 16 * 4096 * 4 / (0.6 * 6e10)
    assert CPU.seconds(value) == pytest.approx(4e-6 + max(4 * 16 * 4097 / 8e9, compute))


def test_the_stored_calibration_of_this_machine_is_used(tmp_path: Path) -> None:
    made = calibration(k3x3_dense=THREES)
    assert target_named("cpu", torch.float32, tmp_path) is CPU
    made.save(tmp_path / made.key.file_name)
    assert target_named(None, torch.float32, tmp_path) == Target.of(made)
    assert target_named("cpu", torch.float16, tmp_path) is CPU
    assert not CPU.calibrated and not CPU.is_measured(conv(16, 16, 3)(source(16, 7)))


def test_a_target_may_be_a_file(tmp_path: Path) -> None:
    made = calibration(k3x3_dense=THREES)
    made.save(tmp_path / "server.json")
    assert target_named(str(tmp_path / "server.json")) == Target.of(made)
    with pytest.raises(InputError, match=r"elsewhere\.json: cannot be read"):
        target_named(str(tmp_path / "elsewhere.json"))


def test_the_report_says_whose_figures_decided(tmp_path: Path) -> None:
    model, x = torch.nn.Conv2d(3, 4, 1).eval(), torch.randn(1, 3, 8, 8)
    calibration(k1x1_dense=((3.0, 4.0, 1.0, 64.0, 0.5),)).save(tmp_path / "server.json")
    assert rgc.compile(model, x).report.target == "cpu"
    assert rgc.compile(model, x, target=str(tmp_path / "server.json")).report.target == "cpu (calibrated)"


def test_a_measured_bottleneck_stays_factored() -> None:
    """Multiplied out it is 16 times the work: on a machine where both are equally efficient it does not pay."""
    ones = tuple((reads, makes, 1.0, 784.0, 0.5) for reads in (8.0, 256.0) for makes in (8.0, 256.0))
    target = Target.of(calibration(k1x1_dense=ones))
    x = source(256, 28)
    narrow = conv(256, 8, 1)(x)
    wide = conv(8, 256, 1)(narrow)
    assert cost([narrow, wide], "latency", target) < cost([conv(256, 256, 1)(x)], "latency", target)
