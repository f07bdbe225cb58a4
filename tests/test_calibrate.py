"""Is every layer measured, as often as its noise asks for, and does the cost model get what was measured?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rgc import AvgPool, Conv, Deferred
from rgc.calibrate import KEPT, MOST_ROUNDS, ROUNDS, Probe, calibrate, fastest_times, module_of, standard_probes
from rgc.calibration import OVERHEADS
from rgc.cost import Target, work
from rgc.errors import InputError
from rgc.timing import Call, Timer, WallClock


def conv(reads: int, makes: int, kernel: int, *, groups: int = 1, **geometry: Any) -> Conv:
    shape = (makes, reads // groups, kernel, kernel)
    return Conv(Deferred(shape, lambda: torch.zeros(shape)), torch.zeros(makes), groups=groups, **geometry)


PROBES = [
    Probe(conv(4, 8, 3, padding=1), (1, 4, 9, 9)),
    Probe(conv(8, 8, 3, padding=1, stride=2), (1, 8, 9, 9)),
    Probe(conv(8, 8, 3, padding=1, groups=8), (1, 8, 9, 9)),
    Probe(Conv(torch.zeros(8, 16)), (4, 16)),
    Probe(AvgPool((2, 2), (2, 2), (0, 0)), (1, 4, 8, 8)),
]


class FakeTimer(Timer):
    """Runs nothing; each call takes what ``seconds_of`` says, by the order in which calls were first seen."""

    def __init__(self, seconds_of: Callable[[int, int], float]) -> None:
        self.seconds_of, self.seen, self.count, self.now = seconds_of, {}, Counter[int](), 0.0  # type: ignore[var-annotated]

    def seconds(self, call: Call, times: int) -> float:
        index = self.seen.setdefault(id(call), (len(self.seen), call))[0]
        taken = self.seconds_of(index, self.count[index])
        self.count[index] += 1
        self.now += taken * times
        return taken


def measured(seconds_of: Callable[[int, int], float], **options: Any) -> tuple[Any, FakeTimer]:
    timer = FakeTimer(seconds_of)
    return calibrate(probes=PROBES, timer=timer, now=lambda: timer.now, **options), timer


def test_a_quiet_machine_takes_the_fewest_rounds() -> None:
    found, timer = measured(lambda index, _: 1e-3 * (1 + index))
    assert set(timer.count.values()) == {ROUNDS + 1}  # one to see how many calls make a sample
    assert found.noise == 0 and found.unsettled == 0 and found.count == len(timer.count)


def test_only_noisy_layers_are_measured_again_and_their_fastest_samples_count() -> None:
    noisy = 20
    found, timer = measured(lambda index, count: 1e-3 * (1 + (index == noisy and count % 4 != 0)))
    assert {index for index, count in timer.count.items() if count > ROUNDS + 1} == {noisy}
    assert timer.count[noisy] <= 4 * KEPT + 4 and found.unsettled == 0


def test_a_machine_that_never_gets_quiet_is_not_waited_for() -> None:
    restless = range(20, 23)

    def seconds_of(index: int, count: int) -> float:
        return 1e-3 * (1 + count) if index in restless else 1e-3  # slower and slower

    found, timer = measured(seconds_of, seconds=1e9)
    assert {timer.count[index] for index in restless} == {MOST_ROUNDS + 1} and found.unsettled == len(restless)
    clock = FakeTimer(seconds_of)
    times = fastest_times([lambda: 1, lambda: 2], clock, now=lambda: clock.now, seconds=1e-9)
    assert set(clock.count.values()) == {2}  # one round there is in any case
    assert not any(each.is_steady for each in times)  # a single sample shows no noise, so nothing is known of it


def test_figures_of_a_machine_that_is_busy_are_refused() -> None:
    with pytest.raises(InputError, match=r"too busy to be measured: half of the measurements spread by \d+% or more"):
        measured(lambda index, count: 1e-3 * (1 + count))
    with pytest.raises(InputError, match="too busy to be measured: there was time for 1 of 4 samples of each call"):
        measured(lambda index, count: 1e-3, seconds=1e-9)


def test_the_figures_are_those_that_were_measured() -> None:
    found, timer = measured(lambda index, _: 1e-3)
    reference = 1 + len(OVERHEADS) + len(found.bandwidth)
    assert len(timer.count) == reference + len(PROBES)
    assert found.overhead == dict.fromkeys(OVERHEADS, 1e-3)
    assert set(found.efficiency) == {"3x3 dense", "3x3/2 dense", "3x3 depthwise", "linear", "2x2/2 average"}
    assert found.efficiency["3x3 depthwise"][0][:4] == (1, 1, 8, 81)
    assert max(eta for points in found.efficiency.values() for *_, eta in points) <= 1
    assert found.key.target == "cpu" and found.key.dtype == "float32"


def test_the_cost_model_gives_back_what_was_measured() -> None:
    small = {0: 1e-9, **dict.fromkeys(range(1, 4), 1e-6)}
    found, timer = measured(lambda index, _: small.get(index, 1e-6 * (10 + index)))
    target = Target.of(found)
    first = len(timer.count) - len(PROBES)
    for index, probe in enumerate(PROBES):
        assert target.is_measured(probe.value)
        assert target.seconds(probe.value) == pytest.approx(1e-6 * (10 + first + index), rel=1e-6)


def test_layers_that_the_model_cannot_tell_apart_are_measured_once() -> None:
    twins = [Probe(conv(4, 4, 3), (1, 4, 10, 10)), Probe(conv(4, 4, 3, padding=1), (1, 4, 8, 8))]
    timer = FakeTimer(lambda index, _: 1e-3)
    found = calibrate(probes=twins, timer=timer, now=lambda: timer.now)
    assert found.efficiency["3x3 dense"][0][:4] == (4, 4, 1, 64) and len(found.efficiency["3x3 dense"]) == 1


def test_progress_grows_to_its_total() -> None:
    told: list[tuple[int, int, str]] = []
    measured(
        lambda index, count: 1e-3 * (1 + (index == 20 and count % 4 != 0)), on_progress=lambda *step: told.append(step)
    )
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert all(done <= total for done, total, _ in told) and told[-1][0] == told[-1][1]
    assert told[0][2] == "warming up" and told[-1][2] == "measuring 1 noisy layers again"


def test_a_real_machine_is_measured() -> None:
    x = torch.randn(64, 64)
    product, addition = fastest_times([lambda: x @ x, lambda: x + x], WallClock(), seconds=1.0)
    assert product.median > 0 and addition.median > 0


@pytest.mark.parametrize("probe", [*PROBES, Probe(conv(4, 8, 2, stride=2), (1, 4, 6, 6))])
def test_what_is_measured_is_the_layer_of_the_cost_model(probe: Probe) -> None:
    def tensor(*shape: int) -> torch.Tensor:
        return torch.ones(shape)

    layer = module_of(probe.op, tensor)
    assert tuple(layer(torch.ones(probe.shape)).shape) == probe.value.tensor_type.shape


def test_a_transposed_convolution_is_measured_as_one() -> None:
    op = Conv(torch.zeros(4, 6, 3, 3), torch.zeros(6), stride=2, padding=1, output_padding=1, transposed=True)
    probe = Probe(op, (1, 4, 5, 5))
    layer = module_of(op, lambda *shape: torch.ones(shape))
    assert isinstance(layer, torch.nn.ConvTranspose2d)
    assert tuple(layer(torch.ones(1, 4, 5, 5)).shape) == probe.value.tensor_type.shape == (1, 6, 10, 10)
    assert probe.key[0] == "3x3/2 transposed"


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_standard_probes_cover_common_kernels_and_none_takes_too_long(target: str) -> None:
    probes = standard_probes(target)
    kernels = Counter(probe.key[0] for probe in probes)
    common = ["1x1 dense", "3x3 dense", "5x5 dense", "7x7 dense", "3x3/2 dense", "3x3 depthwise", "5x5/2 depthwise"]
    assert all(kernels[name] >= 15 for name in [*common, "3x3 grouped", "linear", "4x4/4 dense"])
    assert all(kernels[name] >= 15 for name in ("1x1 unaligned dense", "3x3 unaligned dense", "5x5 unaligned dense"))
    assert kernels["3x3d dense"] and kernels["2x2/2 transposed"] and kernels["2x2/2 average"]
    assert max(work(probe.value) for probe in probes) <= (3e8 if target == "cpu" else 2e10)


def test_wrong_targets_and_dtypes_are_refused() -> None:
    with pytest.raises(InputError, match="unknown target 'tpu'; choose one of cpu, cuda"):
        calibrate("tpu")
    with pytest.raises(InputError, match="this machine cannot compute in that dtype: "):
        calibrate(dtype=torch.bool, probes=PROBES)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="target cuda: this PyTorch sees no GPU"):
            calibrate("cuda")
