"""How much larger a quantity is here than there, and what is known of that.

Each round measures both trees close after each other, so that what the machine does meanwhile cancels in its ratio. The
interval is that of a percentile bootstrap of the median ratio: rounds are drawn anew within starts, and starts among
each other, since processes that run the same code differ, for their whole lives, by where their memory happens to lie.
With few rounds it is narrower than its name: of one pair it is that pair.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
DRAWS = 10_000
ENOUGH_PAIRS = 6
"""With fewer, the largest and the smallest ratio are no 95 % interval of the median either."""
REACHED = 1.0
"""What the interval must reach down to."""
LARGEST_MEDIAN = 1.02

Pair = tuple[float, float]
"""Of one round: here, there."""


@dataclass(frozen=True)
class Ratio:
    """The median of the ratios here / there, and the interval that it lies in."""

    median: float
    low: float
    high: float

    def passes(self, limit: float | None = None) -> bool:
        """True if here is not slower, or with a limit, slower by no more than that.

        Args:
            limit: decides alone, upon the median.
        """
        if limit is not None:
            return self.median <= limit
        return self.low <= REACHED and self.median <= LARGEST_MEDIAN


def ratio_of(starts: Sequence[Sequence[Pair]]) -> Ratio:
    """The ratio of a quantity from its pairs, by start and round.

    Args:
        starts: as many pairs of each.
    """
    ratios = np.array([[here / there for here, there in pairs] for pairs in starts])
    num_starts, num_rounds = ratios.shape
    draw = np.random.default_rng(0)
    which = draw.integers(num_starts, size=(DRAWS, num_starts, 1))
    drawn = ratios[which, draw.integers(num_rounds, size=(DRAWS, num_starts, num_rounds))]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.median(drawn.reshape(DRAWS, -1), axis=1), [tail, 1 - tail])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def medians_of(starts: Sequence[Sequence[Pair]]) -> Pair:
    """Of each tree by itself."""
    here, there = zip(*(pair for pairs in starts for pair in pairs), strict=True)
    return statistics.median(here), statistics.median(there)
