"""Groups for sequences of different lengths: valid, within memory, near the best there is."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import InfeasibleError, InputError
from simulator.planners.group_placement import GroupPlan
from simulator.planners.sequence_groups import (
    StepPlan,
    best_fit,
    best_homogeneous,
    bucket_error_frac,
    equal_groups,
    homogeneous_step,
    plan_groups,
    plan_step,
    split,
)
from simulator.variable_length import GroupCost, Ints

COST = GroupCost(
    square_s=1e-3, token_s=0.1, fixed_s=3.0, rank_tokens=40.0,
    exchange_s={1: 0.0, 2: 0.002, 4: 0.003, 8: 0.02},
)  # fmt: skip
held_lists = st.lists(st.integers(1, 120), min_size=1, max_size=14).map(np.array)


def _check(held: Ints, plan: GroupPlan, num_ranks: int) -> None:
    """Everything once, nothing over its room, the seconds those of the slowest group."""
    assert plan.owners.shape == held.shape
    assert plan.owners.min() >= 0 and plan.owners.max() < len(plan.degrees)
    assert sum(plan.degrees) <= num_ranks
    slowest = 0.0
    for group, degree in enumerate(plan.degrees):
        own = held[plan.owners == group]
        assert own.sum() <= COST.capacity_tokens(degree)
        slowest = max(slowest, COST.group_s(own, degree)) if len(own) else slowest
    assert plan.seconds == pytest.approx(slowest)


def _brute(held: Ints, num_ranks: int) -> float:
    """The best of all groupings."""
    best = math.inf
    for sizes in _partitions(num_ranks, [8, 4, 2, 1]):
        for owners in itertools.product(range(len(sizes)), repeat=len(held)):
            chosen, worst = np.array(owners), 0.0
            for group, degree in enumerate(sizes):
                own = held[chosen == group]
                fits = own.sum() <= COST.capacity_tokens(degree)
                worst = max(worst, COST.group_s(own, degree) if fits else math.inf)
            best = min(best, worst)
    return best


def _partitions(total: int, sizes: list[int]) -> list[list[int]]:
    if total == 0:
        return [[]]
    return [
        [size, *rest]
        for place, size in enumerate(sizes)
        if size <= total
        for rest in _partitions(total - size, sizes[place:])
    ]


@given(held=held_lists)
@settings(max_examples=40, deadline=None)
def test_plans_are_valid_and_between_the_bound_and_equal_groups(held: Ints) -> None:
    held = held[np.cumsum(held) <= max(0.6 * 8 * COST.rank_tokens, held[0])]
    plan = plan_groups(held, COST, 8)
    _check(held, plan, 8)
    assert plan.lower_s <= plan.seconds * (1 + 1e-9)
    for degree in COST.degrees:
        equal = equal_groups(held, COST, 8, degree)
        assert equal is None or plan.seconds <= equal.seconds * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_plans_agree_with_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    best = math.inf
    while not math.isfinite(best):  # until the sequences fit
        held = rng.integers(1, 45, rng.integers(3, 6))
        best = _brute(held, 4) if held.sum() <= 160 else math.inf
    plan = plan_groups(held, COST, 4)
    assert plan.lower_s <= best * (1 + 1e-9)
    assert best <= plan.seconds * (1 + 1e-9) and plan.seconds <= best * 1.02
    assert plan_groups(held, COST, 4, gap_frac=0.0).seconds == pytest.approx(best)


def test_a_mix_of_lengths_gets_a_mix_of_groups() -> None:
    held = np.array([125, *[10] * 16])
    cost = dataclasses.replace(COST, square_s=0.0, exchange_s={1: 0.0, 2: 0.05, 4: 0.1, 8: 0.2})
    plan = plan_groups(held, cost, 8)
    degrees = [plan.degrees[g] for g in plan.owners.tolist()]
    assert degrees[0] == 4 and max(degrees[1:]) < 4
    best = min(e.seconds for d in cost.degrees if (e := equal_groups(held, cost, 8, d)))
    assert plan.seconds < 0.9 * best


def test_equal_lengths_gain_nothing() -> None:
    held = np.full(8, 20)
    plan = plan_groups(held, COST, 8)
    assert set(plan.degrees) == {1} and plan.gap_frac < 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_many_lengths_end_within_the_gap_asked(seed: int) -> None:
    rng = np.random.default_rng(seed)
    held = np.minimum(rng.lognormal(1.5, 1.2, 300).astype(int) + 1, 150)
    cost = dataclasses.replace(
        COST, rank_tokens=240.0, exchange_s={1: 0.0, 2: 0.002, 4: 0.003, 8: 0.02, 16: 0.04}
    )
    plan = plan_groups(held, cost, 16, gap_frac=0.02)
    assert -1e-9 <= plan.gap_frac <= 0.02 + 1e-9
    quick = plan_groups(held, cost, 16, gap_frac=0.02, prove=False)
    assert quick.lower_s <= plan.seconds * (1 + 1e-9)


def test_a_search_without_time_still_returns_a_plan_and_a_bound_that_holds() -> None:
    held = np.array([60, 33, 20, 12, 9, 9, 5, 4, 3])
    hurried = plan_groups(held, COST, 8, gap_frac=0.0, time_limit_s=1e-9)
    full = plan_groups(held, COST, 8, gap_frac=0.0)
    _check(held, hurried, 8)
    assert 0 < hurried.lower_s <= full.seconds * (1 + 1e-9) <= hurried.seconds * (1 + 2e-9)


def test_a_proven_step_has_bounds_for_all_its_micro_batches() -> None:
    held = np.array([90, 60, *[25] * 10, *[6] * 40])
    step = plan_step(held, COST, 8, extra_splits=1)
    assert 0 < step.lower_s <= step.seconds * (1 + 1e-9)
    assert step.gap_frac == pytest.approx(step.seconds / step.lower_s - 1)
    assert math.isinf(homogeneous_step(held, COST, 8, 4).gap_frac)


@given(held=st.lists(st.integers(1, 300), min_size=1, max_size=60).map(np.array))
@settings(max_examples=25, deadline=None)
def test_a_step_places_every_sequence_once(held: Ints) -> None:
    step = plan_step(held, COST, 8, prove=False, extra_splits=1)
    assert sorted(np.concatenate([part for part, _ in step.micro_batches])) == sorted(held)
    for part, plan in step.micro_batches:
        _check(part, plan, 8)
    assert step.seconds <= best_homogeneous(held, COST, 8).seconds * (1 + 1e-9)


@given(held=st.lists(st.integers(1, 70), min_size=1, max_size=40).map(np.array))
@settings(max_examples=25, deadline=None)
def test_homogeneous_steps_are_valid(held: Ints) -> None:
    for degree in (2, 4, 8):
        step = homogeneous_step(held, COST, 8, degree)
        assert sorted(np.concatenate([part for part, _ in step.micro_batches])) == sorted(held)
        for part, plan in step.micro_batches:
            _check(part, plan, 8)
            assert set(plan.degrees) == {degree}


@given(held=held_lists, num=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_splits_make_the_fullest_part_smallest(held: Ints, num: int) -> None:
    parts = split(held, num)
    assert len(parts) <= num
    ordered = np.sort(held)[::-1]
    assert np.array_equal(np.concatenate(parts), ordered)
    if len(held) <= 8:
        cuts = itertools.combinations_with_replacement(range(len(held) + 1), num - 1)
        best = min(max(p.sum() for p in np.split(ordered, list(c))) for c in cuts)
        assert max(p.sum() for p in parts) == best


@given(held=held_lists, room=st.integers(120, 300))
@settings(max_examples=40, deadline=None)
def test_packs_hold_everything_once_within_their_room(held: Ints, room: int) -> None:
    packs = best_fit(held, room)
    assert sorted(np.concatenate(packs)) == list(range(len(held)))
    assert all(held[p].sum() <= room for p in packs)
    assert len(packs) >= math.ceil(held.sum() / room)


@given(held=held_lists, num=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_buckets_of_the_program_add_least(held: Ints, num: int) -> None:
    least = bucket_error_frac(held, num)
    assert -1e-12 <= least <= bucket_error_frac(held, num, even=True) + 1e-12
    unique = np.unique(held)
    if len(unique) <= 8:
        bounds = itertools.combinations(unique[:-1], min(num, len(unique)) - 1)
        tried = [
            sum(min(x for x in (*b, unique[-1]) if x >= s) for s in held) / held.sum() - 1
            for b in bounds
        ]
        assert least == pytest.approx(min(tried), abs=1e-12)


def test_exchange_is_that_of_the_groups() -> None:
    plan = GroupPlan(degrees=(4, 4), owners=np.array([0, 1]), seconds=1.0)
    step = StepPlan(micro_batches=((np.array([100, 50]), plan),))
    assert step.exchange_s(COST) == pytest.approx(0.003 * 75)
    assert str(step) == "<4x2>"


def test_impossible_questions_are_refused() -> None:
    with pytest.raises(InputError, match="at least one rank"):
        plan_groups(np.array([], dtype=np.int64), COST, 8)
    with pytest.raises(InfeasibleError, match="does not fit"):
        plan_groups(np.array([500]), COST, 8)
    with pytest.raises(InfeasibleError, match="more than 2 ranks"):
        plan_groups(np.array([100]), COST, 2)
    with pytest.raises(InfeasibleError, match="split it"):
        plan_groups(np.full(40, 30), COST, 8)
