"""Does the interval of a ratio hold the true ratio as often as it says, and is noise told from a difference?"""

from __future__ import annotations

import math
import random

import pytest

from rgc.errors import InputError
from rgc.samples import CONFIDENCE, FEWEST_PAIRS, Ratio, Times


def noisy(generator: random.Random, count: int, mean: float) -> list[float]:
    """Times with the long tail that a busy machine gives them."""
    return [mean * (1 + 0.05 * generator.gauss(0, 1) ** 2 + (generator.random() < 0.1)) for _ in range(count)]


def test_times_are_median_and_quartiles() -> None:
    times = Times.of([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (times.median, times.low, times.high, times.count) == (3.0, 2.0, 4.0, 5)
    assert times.spread == pytest.approx(2 / 3)
    assert Times.of([2.0]) == Times(2.0, 2.0, 2.0, 1) and Times.of([2.0]).spread == 0


def test_one_outlier_moves_neither_median_nor_interval() -> None:
    before, after = [2.0] * 20, [1.0] * 19 + [100.0]
    ratio = Ratio.of(before, after)
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 2.0) and ratio.verdict == "faster"


@pytest.mark.parametrize("count", [FEWEST_PAIRS, 15, 16, 40, 101])
def test_the_interval_is_the_narrowest_symmetric_one_with_the_confidence(count: int) -> None:
    ratio = Ratio.of([float(n) for n in range(1, count + 1)], [1.0] * count)
    below = int(ratio.low) - 1  # the ratios are 1, 2, 3, ...: so many of them lie below the interval
    chances = [math.comb(count, heads) / 2**count for heads in range(count + 1)]
    assert ratio.confidence == pytest.approx(1 - 2 * sum(chances[: below + 1])) and ratio.confidence >= CONFIDENCE
    assert 1 - 2 * sum(chances[: below + 2]) < CONFIDENCE
    assert ratio.low + ratio.high == count + 1 and ratio.low < ratio.median < ratio.high


@pytest.mark.parametrize("count", [8, 15, 40])
def test_the_interval_holds_the_true_ratio_as_often_as_it_says(count: int) -> None:
    generator = random.Random(0)
    trials, held = 2000, 0
    for _ in range(trials):
        ratio = Ratio.of(noisy(generator, count, 3.0), noisy(generator, count, 2.0))
        held += ratio.low <= 1.5 <= ratio.high  # both noises are alike, so the median of the ratios is 3 / 2
    assert held / trials >= CONFIDENCE - 0.015  # three standard errors of 2000 trials


def test_verdicts_are_those_of_the_interval() -> None:
    generator = random.Random(1)
    slow, fast = noisy(generator, 60, 2.0), noisy(generator, 60, 1.0)
    assert Ratio.of(slow, fast).verdict == "faster" and Ratio.of(fast, slow).verdict == "slower"
    twin = Ratio.of(noisy(generator, 60, 1.0), noisy(generator, 60, 1.0))
    assert twin.verdict == "no difference" and twin.low <= 1 <= twin.high
    assert 0 < twin.width < 1


def test_too_few_pairs_have_no_interval() -> None:
    with pytest.raises(InputError, match="5 pairs are too few for an interval; measure at least 6"):
        Ratio.of([1.0] * 5, [1.0] * 5)
