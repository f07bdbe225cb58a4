"""What do repeated measurements say? Medians with quartiles, and the ratio of pairs with its interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rgc.errors import InputError

Verdict = Literal["faster", "slower", "no difference"]

#: How sure the interval of a ratio is, at least.
CONFIDENCE = 0.95

#: Fewer pairs than this have no interval of that confidence: 1 - 2 (1/2)^5 is less.
FEWEST_PAIRS = 6


@dataclass(frozen=True)
class Times:
    """Seconds of one call: the median and the quartiles of ``count`` samples."""

    median: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(samples: Sequence[float]) -> Times:
        """The summary of some samples; a single one is its own quartile."""
        if len(samples) == 1:
            return Times(samples[0], samples[0], samples[0], 1)
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return Times(median, low, high, len(samples))

    @property
    def spread(self) -> float:
        """The noise: the distance of the quartiles, relative to the median."""
        return (self.high - self.low) / self.median if self.median > 0 else 0.0


@dataclass(frozen=True)
class Ratio:
    """How many times as long as "after" does "before" take? The median over pairs, and an interval for it.

    ``low`` and ``high`` are order statistics of the ratios, so that they hold whatever the noise looks like: the number
    of pairs below the true median is binomial, and the ranks are the closest that leave at most 5 % outside.
    ``confidence`` is what they really reach.
    """

    median: float
    low: float
    high: float
    confidence: float

    @staticmethod
    def of(before: Sequence[float], after: Sequence[float]) -> Ratio:
        """The ratio of samples that were taken in pairs.

        >>> Ratio.of([2, 4, 6, 8, 10, 12], [1, 2, 2, 4, 5, 6])
        Ratio(median=2.0, low=2.0, high=3.0, confidence=0.96875)
        """
        ratios = sorted(first / second for first, second in zip(before, after, strict=True))
        rank = _rank(len(ratios))
        outside = 2 * _binomial_tail(len(ratios), rank)
        return Ratio(statistics.median(ratios), ratios[rank], ratios[-1 - rank], 1 - outside)

    @property
    def width(self) -> float:
        """The length of the interval relative to the ratio."""
        return (self.high - self.low) / self.median

    @property
    def verdict(self) -> Verdict:
        """What the interval, not the median, says of "after"."""
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "no difference"


def _rank(count: int) -> int:
    """The largest index k such that sorted[k] .. sorted[-1 - k] still holds the median with `CONFIDENCE`."""
    if count < FEWEST_PAIRS:
        raise InputError(f"{count} pairs are too few for an interval; measure at least {FEWEST_PAIRS}")
    rank = 0
    while 2 * _binomial_tail(count, rank + 1) <= 1 - CONFIDENCE:
        rank += 1
    return rank


def _binomial_tail(count: int, most: int) -> float:
    """The probability that of ``count`` fair coins at most ``most`` show heads."""
    return float(sum(math.comb(count, heads) for heads in range(most + 1)) / 2**count)


__all__ = ["CONFIDENCE", "FEWEST_PAIRS", "Ratio", "Times", "Verdict"]
