"""Cuts by time: bounds below every plan, cuts that are whole, and never worse than by tokens."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import InfeasibleError
from simulator.planners.micro_batches import (
    bounds_of,
    cheapest,
    lower_step_s,
    places_of,
    time_cut,
)
from simulator.planners.sequence_groups import plan_groups, plan_step, split
from simulator.variable_length import GroupCost, Ints

COST = GroupCost(
    square_s=1e-4, token_s=0.01, fixed_s=0.05, exchange_s={1: 0.0, 2: 1e-4, 4: 3e-3},
    rank_tokens=100.0,
)  # fmt: skip
RANKS = 4


def seconds(part: Ints) -> float:
    try:
        return plan_groups(part, COST, RANKS, prove=False).seconds
    except InfeasibleError:
        return math.inf


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=5))
def test_bounds_lie_below_the_plans_of_every_run(lengths: list[int]) -> None:
    held = np.array(lengths)
    bounds = bounds_of(held, COST, RANKS)
    for i, j in itertools.combinations(range(len(held) + 1), 2):
        assert bounds.low_s[i, j] <= seconds(bounds.run(i, j)) * (1 + 1e-9)


@settings(max_examples=6, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=5))
def test_no_cut_beats_the_bound_of_all_cuts(lengths: list[int]) -> None:
    held = np.sort(lengths)[::-1]
    low = lower_step_s(held, COST, RANKS, time_limit_s=5.0)
    best = math.inf
    for chosen in itertools.product((False, True), repeat=len(held) - 1):
        stops = [k + 1 for k, cut in enumerate(chosen) if cut]
        best = min(best, sum(seconds(part) for part in np.split(held, stops)))
    assert low <= best * (1 + 1e-9)
    assert low > 0


def test_a_cut_is_whole_and_no_worse_than_what_is_given() -> None:
    held = np.random.default_rng(3).integers(1, 120, 16)
    given_cuts = [split(held, num) for num in (4, 5, 6)]
    bounds = bounds_of(held, COST, RANKS, places_of(given_cuts, len(held)))
    found = time_cut(bounds, seconds, given_cuts, time_limit_s=30.0)
    assert np.concatenate(found).tolist() == np.sort(held)[::-1].tolist()
    best = min(sum(map(seconds, cut)) for cut in given_cuts)
    assert sum(map(seconds, found)) <= best * (1 + 1e-12)


def test_time_and_tokens_cut_differently() -> None:
    """Time grows with the square: by tokens one long and many short ones count alike."""
    held = np.array([90, 90, 90, 90, *[10] * 36])
    cost = GroupCost(square_s=1e-2, token_s=0.0, fixed_s=0.0, exchange_s={1: 0.0},
                     rank_tokens=100.0)  # fmt: skip
    bounds = bounds_of(held, cost, RANKS)
    alone = bounds.low_s[0, 4]  # four of 90 on four ranks: 81 seconds
    assert alone == pytest.approx(81.0, rel=0.011) and alone <= 81.0
    assert cheapest(bounds.low_s)[0] >= alone


def test_nothing_is_planned_without_time() -> None:
    held = np.array([50, 40, 30])
    bounds = bounds_of(held, COST, RANKS)
    assert time_cut(bounds, seconds, [], time_limit_s=0.0) == []
    assert lower_step_s(np.ones(2000, dtype=np.int64), COST, RANKS, time_limit_s=1.0) == 0.0


def test_a_step_with_cuts_by_time() -> None:
    held = np.random.default_rng(5).integers(1, 120, 30)
    tokens = plan_step(held, COST, RANKS, prove=False, by_time=False)
    both = plan_step(held, COST, RANKS, time_limit_s=1.0)
    assert both.seconds <= tokens.seconds * (1 + 1e-12)
    assert both.cut_lower_s <= both.seconds
