"""Statistics of repeated timings: the median, its interval, and what the L2 holds meanwhile.

The interval of the median is that of order statistics: with n samples its ends are the k-th
smallest and k-th largest, k the largest number with 2 P(Binomial(n, 1/2) < k) <= 5 % (David and
Nagaraja, Order Statistics, section 7.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from validate.record import COLD, ROTATED, WARM

COPIES: Final = 24
"""Most sets of inputs and outputs that take turns."""
L2_MULTIPLE: Final = 2.0
"""L2s that the sets together must exceed; also the size of the buffer that flushes it."""
MEMORY_SHARE: Final = 0.6
"""Share of the free memory that sets may fill."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The samples of one attempt, seconds a launch."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle sample, or the mean of the middle two."""
        return quantile(self.seconds, 0.5)

    @property
    def ends(self) -> tuple[float, float]:
        """The 95 % interval of the median."""
        rising, k = sorted(self.seconds), order_rank(len(self.seconds))
        return rising[k - 1], rising[-k]

    @property
    def half_width_frac(self) -> float:
        """Half the interval over the median."""
        low, high = self.ends
        return (high - low) / 2 / self.median

    @property
    def spread_frac(self) -> float:
        """(90th - 10th percentile) / median."""
        return (quantile(self.seconds, 0.9) - quantile(self.seconds, 0.1)) / self.median


@lru_cache(maxsize=1024)
def order_rank(size: int) -> int:
    """k such that the k-th smallest and k-th largest of `size` samples hold the median at 95 %.

    1 for fewer than six samples, whose range holds it less often than that.

    >>> order_rank(6), order_rank(11), order_rank(100)
    (1, 2, 40)
    """
    tail, k, weight = 0.0, 0, 0.5**size
    for i in range(size // 2):
        tail += weight
        if 2 * tail > 0.05:
            break
        k, weight = i + 1, weight * (size - i) / (i + 1)
    return max(k, 1)


def quantile(values: Sequence[float], share: float) -> float:
    """The quantile by linear interpolation between order statistics.

    >>> quantile([1.0, 2.0, 4.0], 0.5), quantile([1.0, 3.0], 0.5)
    (2.0, 2.0)
    """
    rising = sorted(values)
    at = share * (len(rising) - 1)
    low = math.floor(at)
    high = min(low + 1, len(rising) - 1)
    return rising[low] + (rising[high] - rising[low]) * (at - low)


def num_copies(set_bytes: float, l2_bytes: float, free_bytes: float) -> tuple[int, str]:
    """How many sets take turns, and the state of the L2 that this makes.

    >>> num_copies(1e6, 50e6, 80e9), num_copies(10e6, 50e6, 80e9), num_copies(60e9, 50e6, 20e9)
    ((1, 'warm'), (10, 'rotated'), (1, 'cold'))
    """
    wanted = max(2, math.ceil(L2_MULTIPLE * l2_bytes / max(set_bytes, 1.0)))
    if wanted > COPIES:
        return 1, WARM
    if (wanted - 1) * set_bytes > MEMORY_SHARE * free_bytes:
        return 1, COLD
    return wanted, ROTATED
