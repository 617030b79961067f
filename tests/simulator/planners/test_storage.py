"""Dynamic storage allocation: never below the live bytes, never overlapping, proven where met."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import InputError
from simulator.memory_timeline import Trace, stage_timeline
from simulator.planners.layer_requests import step_requests
from simulator.planners.program import solve
from simulator.planners.storage import (
    Placement,
    Tensors,
    orders,
    place,
    place_in_passes,
    program,
    proved,
)
from simulator.recipe import recipe
from simulator.schedule import schedule
from tests.simulator.planners.storage_cases import ABOVE_LIVE, random_tensors, tensors
from workloads.models.config import load_hf_config
from workloads.models.transformer import train_step
from workloads.plan import Plan, Recompute


def brute_force(given: Tensors) -> int:
    """Every order, each tensor as low as those before it let it: one of them is optimal.

    A best placement in the order of its addresses, pressed down, is among them.
    """
    rows = list(zip(given.sizes.tolist(), given.starts.tolist(), given.ends.tolist(), strict=True))
    beside = [
        [j for j, other in enumerate(rows) if row[1] < other[2] and other[1] < row[2]]
        for row in rows
    ]
    best, tops = int(given.sizes.sum()) + 1, [0] * len(rows)

    def extend(left: frozenset[int], peak: int) -> None:
        nonlocal best
        if not left:
            best = peak
        for i in left:
            top = max(tops[j] for j in beside[i]) + rows[i][0]
            if max(peak, top) < best:
                tops[i] = top
                extend(left - {i}, max(peak, top))
                tops[i] = 0

    extend(frozenset(range(len(rows))), 0)
    return best


def check(found: Placement) -> None:
    assert not list(found.overlaps())
    assert found.addresses.min() >= 0
    assert found.tensors.live_bytes <= found.lower_bytes <= found.peak_bytes


def test_planner_and_brute_force_agree_on_300_instances() -> None:
    rng = np.random.default_rng(7)
    above = 0
    for _ in range(300):
        given = random_tensors(int(rng.integers(2, 8)), rng, largest=9)
        found = place(given, time_limit_s=0.01)
        check(found)
        if found.gap_frac:
            above += 1
            found, answer = proved(found)
            check(found)
            assert answer.status == "optimal"
        assert found.status == "optimal"
        assert found.peak_bytes == brute_force(given)
    assert above < 30


@pytest.mark.parametrize("engine", ["highs", "cbc"])
def test_a_case_above_its_live_bytes_is_proven_by_a_solver(engine: str) -> None:
    """Nine tensors for which no placement meets the live bytes, by brute force too."""
    given = ABOVE_LIVE
    assert (given.live_bytes, brute_force(given)) == (8, 9)
    found = place(given, time_limit_s=0.05)
    assert (found.peak_bytes, found.lower_bytes, found.status) == (9, 8, "feasible")
    proven, answer = proved(found, engine=engine)
    assert (proven.lower_bytes, proven.status, answer.status) == (9, "optimal", "optimal")
    assert proven.gap_frac == 0 and proven.above_live_frac == pytest.approx(1 / 8)


@pytest.mark.parametrize("engine", ["highs", "cbc"])
def test_the_program_alone_agrees_with_brute_force(engine: str) -> None:
    """Without any placement to start from: pair orders and addresses from the solver."""
    rng = np.random.default_rng(11)
    for _ in range(12):
        given = random_tensors(int(rng.integers(3, 7)), rng, largest=9)
        found = solve(program(given, int(given.sizes.sum())), engine=engine, time_limit_s=30)
        assert (found.status, found.objective) == ("optimal", brute_force(given))


def test_a_solver_mends_a_bad_placement() -> None:
    given = tensors([(4, 0, 2), (2, 0, 4), (4, 2, 4)])
    stacked = Placement(
        tensors=given, addresses=np.array([0, 4, 6]), lower_bytes=6, method="stacked", solve_s=0.0
    )
    found, _ = proved(stacked)
    check(found)
    assert (found.peak_bytes, found.method) == (6, "stacked, then highs")


def test_a_bound_from_a_search_cut_short_is_kept_honest() -> None:
    given = ABOVE_LIVE
    found = place(given, time_limit_s=0.01)
    hopeless, answer = proved(found, time_limit_s=1e-3)
    assert hopeless.lower_bytes in (8, 9)
    assert (hopeless.status == "optimal") == (hopeless.lower_bytes == 9)
    assert answer.status != "optimal" or hopeless.lower_bytes == 9


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**32), st.sampled_from([2, 30, 10**12]))
def test_placements_are_valid(num: int, seed: int, largest: int) -> None:
    given = random_tensors(num, np.random.default_rng(seed), largest=largest)
    check(place(given, time_limit_s=0.02))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(0, 2**32))
def test_nested_lives_meet_the_bound_at_once(num: int, seed: int) -> None:
    """Lives of a stack: whatever starts later ends earlier, or after the other has ended."""
    rng, trace, open_ = np.random.default_rng(seed), Trace(), []
    for i in range(num):
        trace.allocate(i, float(rng.integers(1, 99)), kind="any")
        open_.append(i)
        while open_ and rng.random() < 0.4:
            trace.free(open_.pop())
    found = place(Tensors.of(trace.timeline()), time_limit_s=5.0)
    assert found.status == "optimal"


@pytest.mark.parametrize("seed", range(4))
def test_random_instances_of_60_come_close(seed: int) -> None:
    found = place(random_tensors(60, np.random.default_rng(seed), largest=1000), time_limit_s=0.5)
    check(found)
    assert found.gap_frac <= 0.03


@pytest.mark.parametrize("seed", [17, 37])
def test_the_search_closes_what_orders_leave(seed: int) -> None:
    given = random_tensors(60, np.random.default_rng(seed), largest=1000)
    first = min(place_by(given, order) for _, order in orders(given))
    assert first > given.live_bytes
    found = place(given, time_limit_s=10.0)
    check(found)
    assert found.status == "optimal" and "rules" in found.method


@pytest.mark.parametrize("seed", [0, 8, 15])
def test_the_search_comes_close_on_400(seed: int) -> None:
    """Where the best of all orders is 1 to 3 % above: 0.5 % is the aim, within a minute."""
    given = random_tensors(400, np.random.default_rng(seed), largest=1000)
    found = place(given, time_limit_s=60.0, gap_frac=0.005)
    check(found)
    assert 0 <= found.above_live_frac <= 0.005 and "rules" in found.method


def place_by(given: Tensors, order: np.ndarray) -> int:
    from simulator.planners.storage import _FirstFit

    return _FirstFit(given).placed(order)[0]


def test_orders_are_permutations_and_repeatable() -> None:
    given = random_tensors(30, np.random.default_rng(0), largest=50)
    found = list(orders(given))
    assert len({name for name, _ in found}) == len(found) > 20
    assert all(sorted(order.tolist()) == list(range(30)) for _, order in found)
    first, second = (place(given, time_limit_s=20).addresses.tolist() for _ in range(2))
    assert first == second


# ---- traces of steps -----------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gpt2", "llama3-8b", "qwen3-30b-a3b", "gemma-2-9b"])
@pytest.mark.parametrize("recompute", [Recompute.NONE, Recompute.FULL])
@pytest.mark.parametrize("swap", [False, True])
def test_layer_traces_meet_the_live_bytes(model: str, recompute: Recompute, swap: bool) -> None:
    step = train_step(load_hf_config(f"examples/{model}.json"), len_seq=2048, global_batch=1)
    requests = step_requests(step, plan=Plan(recompute=recompute), num_layers=12, swap=swap)
    given = Tensors.of(requests.timeline)
    assert given.live_bytes == pytest.approx(requests.timeline.peak_bytes, rel=1e-6)
    flat, levels = place(given), place_in_passes(given, requests.passes)
    for found in (flat, levels.whole):
        check(found)
        assert found.status == "optimal" and found.above_live_frac == 0
    assert levels.num_passes == 24 and levels.num_kinds <= 6


def test_a_pipeline_stage_is_placed_without_loss() -> None:
    step = train_step(load_hf_config("examples/gpt2.json"), len_seq=1024, global_batch=8)
    timeline = stage_timeline(
        step,
        plan=Plan(pp=4),
        recipe=recipe("bf16"),
        schedule=schedule("1f1b", num_stages=4, num_micro_batches=8),
        stage=0,
    )
    found = place(Tensors.of(timeline))
    check(found)
    assert found.status == "optimal"
    assert found.peak_bytes == pytest.approx(timeline.peak_bytes, rel=1e-6)


def test_two_levels_solve_each_kind_once_and_add_up() -> None:
    one = [(3, 0, 2), (5, 1, 3), (2, 2, 4)]
    rows = [(size, 10 * k + s, 10 * k + e) for k in range(3) for size, s, e in one]
    given = tensors([*rows, (7, 0, 30), (4, 5, 15)])
    found = place_in_passes(given, [(10 * k, 10 * k + 5) for k in range(3)])
    check(found.whole)
    assert (found.num_passes, found.num_kinds, found.inner[0].peak_bytes) == (3, 1, 8)
    assert found.whole.peak_bytes == found.outer.peak_bytes
    assert set(found.outer.tensors.sizes.tolist()) == {7, 4, 8}
    with pytest.raises(InputError, match="overlap in time"):
        place_in_passes(given, [(0, 5), (4, 9)])


# ---- tensors -------------------------------------------------------------------------------------


def test_tensors_of_a_timeline() -> None:
    trace = Trace()
    trace.allocate(("layer", 0), 10.5, kind="a")
    trace.allocate("b", 4, kind="b")
    trace.free(("layer", 0))
    trace.allocate(("layer", 0), 6, kind="a")
    found = Tensors.of(trace.timeline())
    assert found.names == ("layer.0", "b", "layer.0")
    assert found.sizes.tolist() == [11, 4, 6]
    assert list(zip(found.starts.tolist(), found.ends.tolist(), strict=True)) == [
        (0, 2), (1, 4), (3, 4),
    ]  # fmt: skip
    assert found.live_bytes == 15
    assert found.aligned(8).sizes.tolist() == [16, 8, 8]


def test_the_program_is_the_one_in_the_docstring() -> None:
    given = tensors([(4, 0, 2), (2, 1, 4), (4, 2, 4)])
    question = program(given, 10).linear
    assert len(question.rows) == 3 + 2 * 2  # two pairs share time
    assert sum(one.whole for one in question.variables) == 1 + 3 + 2


def test_bad_tensors_are_refused() -> None:
    for row in ((0, 0, 1), (-3, 0, 1), (3, 2, 2), (3, 4, 2)):
        with pytest.raises(InputError, match="at least a byte and an end"):
            tensors([row])
    with pytest.raises(InputError, match="no tensor"):
        place(tensors([]))
    with pytest.raises(InputError, match="as many names"):
        Tensors(names=("a",), sizes=np.array([1, 2]), starts=np.array([0]), ends=np.array([1]))
