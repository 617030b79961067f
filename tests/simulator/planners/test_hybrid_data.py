"""Hybrid data parallelism: ranks by length, rings, and schedules that no one can beat."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import catalog
from hwmodels.errors import InfeasibleError, InputError
from simulator.planners.hybrid_data import (
    RingCost,
    Schedule,
    hybrid_step,
    least_ring,
    predicted_ring_cost,
    static_step,
    within,
)
from simulator.variable_length import Ints
from workloads.models.config import load_hf_config

COST = RingCost(
    square_s=1e-3, token_s=0.2, kv_bytes=1.0, token_bytes=2.0, num_layers=10, node_ranks=4,
    inside_bytes_per_s=20.0, outside_bytes_per_s=5.0, host_bytes_per_s=1.0, host_bytes=400.0,
)  # fmt: skip
ROOM, RANKS = 16, 32
steps = st.lists(st.integers(1, 400), min_size=1, max_size=40).map(np.array)


def _check(held: Ints, schedule: Schedule, *, whole: bool = False) -> None:
    """Every sequence once; no rank does two things at once; the bound holds."""
    members = np.concatenate([u.members for u in schedule.units])
    assert sorted(members) == list(range(len(held)))
    spans: dict[int, list[tuple[float, float]]] = {}
    for unit, ranks, start in zip(
        schedule.units, schedule.ranks, schedule.starts.tolist(), strict=True
    ):
        assert len(set(ranks.tolist())) == unit.degree
        own = held[unit.members].astype(float)
        assert unit.seconds == pytest.approx(
            float(COST.unit_s(own.sum(), (own**2).sum(), unit.degree))
        )
        if whole:
            assert own.sum() <= unit.degree * ROOM
        for rank in ranks.tolist():
            spans.setdefault(rank, []).append((start, start + unit.seconds))
    for rank, used in spans.items():
        used.sort()
        assert 0 <= rank < RANKS
        assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(used))
    assert schedule.lower_s <= schedule.seconds * (1 + 1e-9)


@given(held=steps)
@settings(max_examples=40, deadline=None)
def test_schedules_are_valid(held: Ints) -> None:
    _check(held, static_step(held, COST, num_ranks=RANKS, rank_tokens=ROOM, degree=32), whole=True)
    for balance in (False, True):
        plain = hybrid_step(
            held, COST, num_ranks=RANKS, rank_tokens=ROOM, balance=balance, offload=False
        )
        _check(held, plain, whole=True)
        both = hybrid_step(held, COST, num_ranks=RANKS, rank_tokens=ROOM, balance=balance)
        _check(held, both)
        assert both.seconds <= plain.seconds * (1 + 1e-9)


@given(length=st.integers(1, 400), offload=st.booleans())
@settings(max_examples=60, deadline=None)
def test_what_a_rank_keeps_fits_it(length: int, offload: bool) -> None:
    degree = int(COST.ranks(np.array([length]), ROOM, offload=offload)[0])
    most = float(COST.offload_frac(np.array([length]))[0]) if offload else 0.0
    shares = np.linspace(0, most, 11)
    moved = shares * 8 / 10
    held = (1 - moved) * length / degree <= ROOM * (1 + 1e-9)
    host = moved * COST.token_bytes * length / degree <= COST.host_bytes * (1 + 1e-9)
    assert np.any(held & host)
    if not offload:
        assert degree == -(-length // ROOM)


def test_offloading_is_hidden_under_the_forward_pass() -> None:
    # forward of one token in all layers (1e-3 s + 0.2) / 3, at 1 B/s, of 2 B
    assert COST.offload_frac(np.array([100]))[0] == pytest.approx((0.1 + 0.2) / 6)
    assert COST.offload_frac(np.array([10**6]))[0] == 1.0


def test_a_ring_costs_what_the_equation_says() -> None:
    assert COST.ring_s(60.0, 1) == 0
    assert COST.ring_s(60.0, 4) == pytest.approx(3 * 60 * 3 / 4 / 20)
    assert COST.ring_s(60.0, 8) == pytest.approx(3 * 60 * 7 / 8 / 5)
    # linear 0.2 * 60 / 8; attention 0.001 * 3600 / 8 hides nothing of the ring
    assert COST.unit_s(60.0, 3600.0, 8) == pytest.approx(1.5 + 31.5)


def test_short_sequences_pass_nothing_on_and_gain_most() -> None:
    held = np.full(64, 8)
    static = static_step(held, COST, num_ranks=RANKS, rank_tokens=ROOM, degree=RANKS)
    hybrid = hybrid_step(held, COST, num_ranks=RANKS, rank_tokens=ROOM)
    assert {u.degree for u in hybrid.units} == {1}
    assert hybrid.seconds == pytest.approx(0.2 * 16 + 1e-3 * 128)
    assert static.seconds > 10 * hybrid.seconds


def test_balance_closes_the_gap_to_the_bound() -> None:
    rng = np.random.default_rng(2)
    held = np.minimum(rng.lognormal(2.0, 1.0, 600).astype(int) + 1, 100)
    dealt, even = (
        hybrid_step(held, COST, num_ranks=RANKS, rank_tokens=ROOM, balance=balance, offload=False)
        for balance in (False, True)
    )
    assert even.seconds < dealt.seconds
    assert even.seconds <= 1.1 * even.lower_s


def test_the_fewest_ranks_in_time_are_taken() -> None:
    held, least, most = np.array([200]), np.array([2]), np.array([13])
    took = {d: float(COST.unit_s(200.0, 4e4, d)) for d in range(2, 14)}
    deadline = took[3]
    assert within(held, COST, least, most, deadline)[0] == min(
        d for d, t in took.items() if t <= deadline
    )
    assert took[int(within(held, COST, least, most, 0.0)[0])] == min(took.values())


def test_impossible_questions_are_refused() -> None:
    with pytest.raises(InfeasibleError, match="use more ranks"):
        hybrid_step(np.array([1000]), COST, num_ranks=RANKS, rank_tokens=ROOM, offload=False)
    with pytest.raises(InfeasibleError, match="do not fit"):
        static_step(np.array([100]), COST, num_ranks=RANKS, rank_tokens=ROOM, degree=4)
    with pytest.raises(InputError, match="do not divide"):
        static_step(np.array([10]), COST, num_ranks=RANKS, rank_tokens=ROOM, degree=5)
    with pytest.raises(InputError, match="at least one rank"):
        hybrid_step(np.array([0]), COST, num_ranks=RANKS, rank_tokens=ROOM)


def test_the_static_ring_of_two_million_tokens() -> None:
    assert least_ring(2**21, 8192) == 256 and least_ring(10, 8192) == 1


def test_packs_that_are_not_full_pass_their_whole_room() -> None:
    """Two packs of four ranks: half full, each still sends K and V of all its room."""
    held = np.full(8, 100)
    full = static_step(held, COST, num_ranks=4, rank_tokens=100, degree=4)
    half = static_step(held, COST, num_ranks=4, rank_tokens=100, degree=4, fill_frac=0.5)
    assert (len(full.units), len(half.units)) == (2, 4)
    ring = float(COST.ring_s(400.0, 4))
    for unit in half.units:
        attention = COST.square_s * 2 * 100**2 / 4
        assert unit.seconds == pytest.approx(COST.token_s * 200 / 4 + max(attention, ring))


def test_costs_are_predicted_from_a_model() -> None:
    """8 key heads of 128 in 32 layers of 16 bits: 128 KiB a token; the port at 96 % of its rate."""
    cfg = load_hf_config("examples/llama3-8b.json")
    on = catalog.cluster("dgx-a100-80gb", nodes=2)
    cost = predicted_ring_cost(cfg, on=on, host_bytes=1e11)
    assert cost.kv_bytes == 2**17
    assert cost.outside_bytes_per_s == pytest.approx(0.96 * on.levels[1].bytes_per_s)
    assert (cost.node_ranks, cost.host_bytes) == (8, 1e11)
