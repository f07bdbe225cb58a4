"""Are two models measured in pairs, until enough is known, and is what they show said as the interval has it?"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import rgc
from rgc import bench
from rgc.errors import InputError
from rgc.measurement import NARROW, Comparison, LeftOut, Measurement
from rgc.runtimes import Setting
from rgc.samples import Ratio, Times
from rgc.timing import WARM_UP, WallClock

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@dataclass
class FakeTime:
    """Time passes only in the models that are run; ``log`` keeps which."""

    now: float = 0.0
    log: list[str] = field(default_factory=list)


class Sleeper(nn.Module):
    """Takes the next of its times, over and over."""

    def __init__(self, clock: FakeTime, name: str, times: list[float]) -> None:
        super().__init__()
        self.step: Callable[[], None] = _Step(clock, name, times)

    def forward(self, x: Tensor) -> Tensor:
        self.step()
        return x


class _Step:
    """Shared by copies of a model, as a clock on the wall is."""

    def __init__(self, clock: FakeTime, name: str, times: list[float]) -> None:
        self.clock, self.name, self.times, self.count = clock, name, times, 0

    def __call__(self) -> None:
        self.clock.log.append(self.name)
        self.clock.now += self.times[self.count % len(self.times)]
        self.count += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> _Step:
        return self


def measured(before: list[float], after: list[float], **options: Any) -> tuple[Measurement, FakeTime]:
    clock = FakeTime()
    found = bench(
        Sleeper(clock, "o", before).eval(), Sleeper(clock, "c", after).eval(), X, runtimes=["eager"],
        timer=WallClock(lambda: clock.now), now=lambda: clock.now, **options,
    )  # fmt: skip
    return found, clock


def test_original_and_compiled_take_turns_after_a_warm_up() -> None:
    found, clock = measured([2.0], [1.0], pairs=6, seconds=1e-9)
    start = "co" + "c" * WARM_UP + "o" * WARM_UP  # seen to work, then warmed up
    assert "".join(clock.log) == start + "co" + "occo" * 3  # one pair is thrown away
    (only,) = found.comparisons
    assert only.before == Times(2.0, 2.0, 2.0, 6) and only.after == Times(1.0, 1.0, 1.0, 6)
    assert only.ratio == Ratio(2.0, 2.0, 2.0, 1 - 2 / 64) and only.settled and not found.is_slower


def test_short_calls_are_timed_many_at_once() -> None:
    found, clock = measured([2.0**-13], [2.0**-11], pairs=6)  # 0.12 and 0.49 ms
    assert found.comparisons[0].calls == (9, 3) and found.is_slower
    assert "o" * 9 + "ccc" + "ccc" + "o" * 9 in "".join(clock.log)


def test_pairs_are_added_until_the_time_is_spent() -> None:
    noise = [1.0, 1.5, 1.1, 1.9, 1.0, 1.3, 1.7]
    found, clock = measured(noise, noise[::-1], pairs=8, seconds=200.0)
    (only,) = found.comparisons
    assert only.before.count > 8 and not only.settled and only.ratio.width > NARROW
    assert 200 <= clock.now <= 215


def test_pairs_are_added_until_the_interval_is_narrow() -> None:
    settling = [1.0, 1.3] * 5 + [1.0] * 1000
    found, _ = measured(settling, [1.0], pairs=6, seconds=900.0)
    (only,) = found.comparisons
    assert only.settled and only.ratio.width <= NARROW and 6 < only.before.count < 200


def test_every_combination_is_measured_in_order() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    told: list[str] = []
    threads = torch.get_num_threads()
    found = bench(
        model, rgc.compile(model, X), X, runtimes=["onnxruntime", "eager"], batch_sizes=[1, 3], threads=[1, 2],
        pairs=6, seconds=0.01, on_progress=told.append,
    )  # fmt: skip
    settings = [(each.setting.runtime, each.setting.threads, each.setting.batch) for each in found.comparisons]
    assert settings == [
        (name, count, batch) for name in ("eager", "onnxruntime") for count in (1, 2) for batch in (1, 3)
    ]
    assert told == [str(each.setting) for each in found.comparisons] and not found.left_out
    assert torch.get_num_threads() == threads
    assert found.input_shapes == ((2, 3, 8, 8),)


def test_what_cannot_be_measured_is_left_out_with_its_reason() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    runtimes = ["eager", "onnxruntime"]
    found = bench(model, rgc.compile(model, X), X, runtimes=runtimes, dtype=torch.bfloat16, pairs=6, seconds=0.01)
    assert [each.setting.runtime for each in found.comparisons] == ["eager"]
    (missing,) = found.left_out
    assert missing.setting.runtime == "onnxruntime"
    assert missing.reason == "compiled: onnxruntime takes no bfloat16 tensors from PyTorch"
    with pytest.raises(InputError, match="nothing can be measured: compiled: onnxruntime takes no bfloat16"):
        bench(model, rgc.compile(model, X), X, runtimes=["onnxruntime"], dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtimes": ["tensorrt"]}, "unknown runtime 'tensorrt'; choose of eager, torch.compile, onnxruntime"),
        ({"runtimes": []}, "no runtime is named; choose of eager, torch.compile, onnxruntime"),
        ({"batch_sizes": [4, 0]}, "a batch size is a positive number, got [4, 0]"),
        ({"threads": 0}, "a number of threads is a positive number, got [0]"),
        ({"threads": []}, "a number of threads is a positive number, got []"),
        ({"pairs": 5}, "5 pairs are too few for an interval; measure at least 6"),
        ({"seconds": 0.0}, "the time for a setting is a positive number of seconds, got 0"),
        ({"device": "abacus"}, "unknown device 'abacus'; use cpu or cuda"),
        ({"device": "meta"}, "cannot time calls on meta; use cpu or cuda"),
        ({"cuda_graphs": True}, "CUDA graphs need device cuda, got cpu"),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(options: dict[str, Any], message: str) -> None:
    model = nn.Conv2d(3, 4, 3).eval()
    with pytest.raises(InputError) as refused:
        bench(model, model, X, **options)
    assert str(refused.value) == message


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there_is_named() -> None:
    model = nn.Conv2d(3, 4, 3).eval()
    with pytest.raises(InputError, match="device cuda: this PyTorch sees no GPU"):
        bench(model, model, X, device="cuda")


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(InputError, match="training mode"):
        bench(nn.BatchNorm2d(3), nn.Identity(), X)


def comparison(low: float, high: float, settled: bool) -> Comparison:
    setting = Setting("eager", 4, 2, torch.device("cpu"), torch.float16)
    ratio = Ratio((low + high) / 2, low, high, 0.96)
    return Comparison(setting, Times(2e-3, 1e-3, 3e-3, 9), Times(1e-3, 1e-3, 1.1e-3, 9), ratio, (1, 2), settled)


def printed(*comparisons: Comparison, left_out: tuple[LeftOut, ...] = ()) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - rich writes to it
    with console.file:
        console.print(Measurement("a.pt", "b.pt2", "abacus", "2.14", ((1, 3, 8, 8),), comparisons, left_out))
        return " ".join(console.export_text().split())


def test_the_table_says_what_the_interval_says() -> None:
    text = printed(comparison(1.5, 2.5, False))
    assert "a.pt and b.pt2 on abacus, torch 2.14" in text
    assert "eager 4 2 2 -> 1 2.000 1.500 - 2.500 100% faster" in text and "unclear" not in text
    assert "0.700 100% slower" in printed(comparison(0.5, 0.7, True))
    assert "1.010 100% equal" in printed(comparison(0.99, 1.01, True))


def test_an_interval_that_holds_one_comes_with_a_hint() -> None:
    text = printed(comparison(0.9, 1.2, False))
    assert "1.200 100% unclear" in text
    assert "the noise hides any difference; give it more time (--seconds), or let nothing else run" in text


def test_what_was_left_out_is_printed() -> None:
    missing = LeftOut(Setting("onnxruntime", 1, 1, torch.device("cpu")), "b.pt2: not today")
    assert "left out: onnxruntime, batch 1, 1 thread: b.pt2: not today" in printed(left_out=(missing,))


def test_json_holds_what_was_measured() -> None:
    missing = LeftOut(Setting("onnxruntime", 1, 1, torch.device("cpu")), "why")
    found = Measurement("a", "b", "abacus", "2.14", ((1, 3),), (comparison(1.5, 2.5, False),), (missing,))
    plain = json.loads(found.to_json())
    (entry,) = plain["comparisons"]
    assert entry["setting"]["device"] == "cpu" and entry["setting"]["dtype"] == "float16"
    assert entry["ratio"] == {"median": 2.0, "low": 1.5, "high": 2.5, "confidence": 0.96, "verdict": "faster"}
    assert entry["before"]["spread"] == 1.0 and entry["after"]["median"] == 1e-3
    assert plain["left_out"][0]["reason"] == "why" and plain["input_shapes"] == [[1, 3]]
