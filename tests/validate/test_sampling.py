"""Intervals by order statistics hold the median as often as they say."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from validate.sampling import Sample, num_copies, order_rank, quantile


@pytest.mark.parametrize("size", [6, 7, 8, 11, 21, 40, 101, 401])
def test_ranks_are_those_of_the_binomial(size: int) -> None:
    k = order_rank(size)

    def outside(rank: int) -> float:
        return 2 * sum(comb(size, i) for i in range(rank)) / 2**size

    assert outside(k) <= 0.05 < outside(k + 1)


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    ends = [Sample(tuple(rng.lognormal(0, 0.3, 31))).ends for _ in range(2000)]
    held = sum(low <= 1.0 <= high for low, high in ends) / len(ends)
    assert 0.94 <= held <= 0.98


def test_outliers_widen_the_spread_and_not_the_median() -> None:
    sample = Sample((*[1.0] * 20, 50.0))
    assert sample.median == 1.0 and sample.half_width_frac == 0.0 and sample.spread_frac == 0.0
    assert quantile([0.0, 10.0], 0.9) == pytest.approx(9.0)


@pytest.mark.parametrize("set_bytes", [1e3, 4e6, 5e6, 30e6, 1e9, 40e9])
def test_sets_that_take_turns_exceed_the_cache_or_say_that_they_do_not(set_bytes: float) -> None:
    copies, state = num_copies(set_bytes, 50e6, 80e9)
    if state == "rotated":
        assert copies * set_bytes >= 100e6 and copies >= 2
    elif state == "warm":
        assert copies == 1 and set_bytes * 24 < 100e6
    assert (copies - 1) * set_bytes <= 0.6 * 80e9


def test_a_set_that_does_not_fit_twice_is_flushed() -> None:
    assert num_copies(60e9, 50e6, 20e9) == (1, "cold")
