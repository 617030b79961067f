"""Rings and orders searched: valid schedules, both bounds, and the program of the units."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.planners.hybrid_data import RingCost, Schedule
from simulator.planners.hybrid_search import lower_of_all_s, plan_hybrid, unit_program
from simulator.planners.program import OPTIMAL, solve

COST = RingCost(
    square_s=1e-4, token_s=0.01, kv_bytes=1.0, token_bytes=100.0, num_layers=8, node_ranks=4,
    inside_bytes_per_s=1e4, outside_bytes_per_s=1e3, host_bytes_per_s=1e4, host_bytes=1e5,
)  # fmt: skip
ROOM, RANKS = 50, 4


def check(found: Schedule, held: np.ndarray) -> None:
    """Every sequence once; no rank works on two units at once."""
    placed = sorted(k for unit in found.units for k in unit.members.tolist())
    assert placed == list(range(len(held)))
    for rank in range(found.num_ranks):
        spans = sorted(
            (start, start + unit.seconds)
            for unit, ranks, start in zip(
                found.units, found.ranks, found.starts.tolist(), strict=True
            )
            if rank in ranks
        )
        assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(spans))
    for unit, ranks in zip(found.units, found.ranks, strict=True):
        assert len(ranks) == unit.degree


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=10))
def test_plans_are_valid_and_no_worse_than_bytescales(lengths: list[int]) -> None:
    held = np.array(lengths)
    plan = plan_hybrid(
        held, COST, num_ranks=RANKS, rank_tokens=ROOM, offload=False, time_limit_s=0.1
    )
    check(plan.schedule, held)
    assert plan.lower_s <= plan.seconds <= plan.balanced.seconds
    assert plan.lower_s <= plan.balanced.seconds and plan.units_lower_s <= plan.seconds


def test_idle_ranks_are_used() -> None:
    """Two sequences that fit a rank each are packed together; four ranks stand ready."""
    held = np.array([25, 25])
    plan = plan_hybrid(held, COST, num_ranks=RANKS, rank_tokens=ROOM, offload=False)
    assert len(plan.balanced.units) == 1
    alone = 0.01 * 25 + 1e-4 * 25**2
    assert plan.seconds == pytest.approx(alone) and plan.balanced.seconds == pytest.approx(
        2 * alone
    )
    assert plan.lower_s == pytest.approx(alone) and plan.gap_frac == pytest.approx(0.0)


def test_the_program_of_units_by_hand() -> None:
    """Units of 3, 3 and 2 seconds (a rank each) on two ranks: 5 seconds, the mean is 4."""
    held = np.array([40, 40, 30])
    cost = RingCost(**{**{f: getattr(COST, f) for f in COST.__slots__}, "square_s": 0.0,
                       "token_s": 0.1})  # fmt: skip
    plan = plan_hybrid(held, cost, num_ranks=2, rank_tokens=40, offload=False)
    assert plan.seconds == pytest.approx(7.0)
    answer = solve(unit_program(plan.schedule))
    assert (answer.status, answer.objective) == (OPTIMAL, pytest.approx(7.0))
    assert plan.units_lower_s == pytest.approx(7.0)
    low = lower_of_all_s(held, cost, num_ranks=2, rank_tokens=40, offload=False)
    assert low == pytest.approx(5.5)  # 11 seconds of work on two ranks
