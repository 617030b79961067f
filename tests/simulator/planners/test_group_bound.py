"""The bound of groups: holds against brute force, whatever the prices and the solver."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.planners import group_bound
from simulator.planners.group_bound import (
    Question,
    Z,
    branched,
    classes,
    lower_bound_s,
    needed_ranks,
    whole_groups,
)
from simulator.planners.group_program import program_at
from simulator.planners.program import INFEASIBLE, OPTIMAL, solve
from simulator.variable_length import GroupCost, Ints

COST = GroupCost(
    square_s=1e-3, token_s=0.1, fixed_s=3.0, rank_tokens=40.0,
    exchange_s={1: 0.0, 2: 0.002, 4: 0.003},
)  # fmt: skip
RANKS = 4
few = st.lists(st.integers(1, 60), min_size=1, max_size=5).map(np.array)


def best_of(held: Ints) -> float:
    """The best of all groupings on four ranks; infinite where none fits."""
    best = math.inf
    for sizes in ([4], [2, 2], [2, 1, 1], [1, 1, 1, 1]):
        for owners in itertools.product(range(len(sizes)), repeat=len(held)):
            loads = [held[np.array(owners) == g] for g in range(len(sizes))]
            fits = all(
                own.sum() <= COST.capacity_tokens(d) for own, d in zip(loads, sizes, strict=True)
            )
            if fits:
                took = [COST.group_s(o, d) for o, d in zip(loads, sizes, strict=True) if len(o)]
                best = min(best, max(took))
    return best


@given(held=few)
@settings(max_examples=40, deadline=None)
def test_bounds_do_not_pass_the_best(held: Ints) -> None:
    best = best_of(held)
    upper = best if math.isfinite(best) else 1e3
    low = lower_bound_s(held, COST, RANKS, upper_s=2 * upper)
    assert low.seconds <= best * (1 + 1e-9)
    for part in (0.7, 0.95, 1.0 + 1e-6):
        found = branched(held, COST, RANKS, part * upper, time_limit_s=2.0)
        assert not (found.is_short and part * upper >= best * (1 + 1e-9))


@given(held=few, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_any_prices_prove_only_what_holds(held: Ints, seed: int) -> None:
    best = best_of(held)
    prices = np.random.default_rng(seed).exponential(1.0, (len(Z), 3))
    if math.isfinite(best):
        needed = needed_ranks(Question.of(held, COST, RANKS), prices, best * (1 + 1e-9))
        assert needed <= RANKS


@pytest.mark.parametrize("limit_s", [0.0, 1e-9, 1e-3])
def test_a_solver_that_is_stopped_proves_nothing(limit_s: float) -> None:
    held = np.array([30, 20, 14, 9, 8, 5])
    best = lower_bound_s(held, COST, RANKS, upper_s=1e3)
    hurried = lower_bound_s(held, COST, RANKS, upper_s=1e3, time_limit_s=limit_s)
    assert hurried.seconds <= best.seconds * (1 + 1e-3)
    assert not branched(held, COST, RANKS, best.seconds * 1.2, time_limit_s=limit_s).is_short


def test_a_stopped_program_raises_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    held = np.array([30, 20, 14, 9, 8, 5])
    trivial = group_bound.trivial_bound_s(Question.of(held, COST, RANKS), RANKS)
    monkeypatch.setattr(group_bound._Fixed, "solve", lambda *_: None)
    assert lower_bound_s(held, COST, RANKS, upper_s=1e3).seconds == trivial
    assert not branched(held, COST, RANKS, trivial * 1.01, time_limit_s=1.0).is_short


def test_equal_sequences_by_hand() -> None:
    held = np.full(4, 40)
    alone = 3.0 + 40 * (1e-3 * 40 + 0.1)
    assert lower_bound_s(held, COST, RANKS, upper_s=20.0).seconds == pytest.approx(alone, rel=2e-3)


def test_classes_count_everyone_at_no_more_than_their_length() -> None:
    held = np.arange(1, 500)[::-1].copy()
    kinds = classes(held, 64)
    assert len(kinds.lengths) <= 64 and kinds.counts.sum() == 499
    assert np.all(kinds.lengths[kinds.of] <= held)
    assert np.dot(kinds.means, kinds.counts) == pytest.approx(held.sum())


def test_whole_groups_keep_to_the_ranks() -> None:
    held = np.array([60, 20, 10, 10, 5])
    kinds = classes(held)
    question = Question.of(kinds.means, COST, RANKS)
    found = whole_groups(question, kinds.counts, RANKS, 12.0, time_limit_s=2.0)
    assert found is not None
    assert sum(d * n for d, n in found.groups.items()) <= RANKS
    assert found.assigned.sum(axis=0) == pytest.approx(kinds.counts)
    assert whole_groups(question, kinds.counts, RANKS, 3.5, time_limit_s=2.0) is None


def test_the_program_of_the_seam_agrees() -> None:
    held = np.array([30, 20, 14, 9, 8, 5])
    low = lower_bound_s(held, COST, RANKS, upper_s=1e3).seconds
    found = solve(program_at(held, COST, RANKS, 2 * low, num_classes=64))
    assert found.status == OPTIMAL and found.objective <= RANKS
    short = solve(program_at(held, COST, RANKS, 0.9 * low, num_classes=64), explain=False)
    assert short.status == INFEASIBLE or short.objective > RANKS


@given(held=few, seconds=st.floats(3.5, 30.0))
@settings(max_examples=60, deadline=None)
def test_no_group_that_fits_exceeds_any_row(held: Ints, seconds: float) -> None:
    parts, _ = Question.of(held, COST, RANKS).parts(seconds)
    for i, degree in enumerate((1, 2, 4)):
        for chosen in itertools.product((False, True), repeat=len(held)):
            own = held[np.array(chosen)]
            ends = COST.group_s(own, degree) <= seconds
            if ends and own.sum() <= COST.capacity_tokens(degree):
                assert np.all(parts[:, i, np.array(chosen)].sum(axis=1) <= Z + 1e-6)
