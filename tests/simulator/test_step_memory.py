"""Memory over the seconds of a step: peaks, what is in flight, what is left at the end."""

from __future__ import annotations

import pytest

from simulator.memory import training_memory
from simulator.memory_timeline import KEPT
from simulator.pipeline import in_flight
from simulator.recipe import RECIPES
from simulator.staged import counted_stages
from simulator.staged_timeline import simulate_staged
from simulator.step_memory import all_stages, fullest, outer_stages
from simulator.timeline import LOAD, simulate_training
from tests.simulator.random_plans import CLUSTERS, CONFIGS
from tests.simulator.test_timeline import simulated
from workloads.models.transformer import train_step
from workloads.plan import Plan

BF16 = RECIPES["bf16"]
STEP = train_step(CONFIGS[0], len_seq=2048, global_batch=16)
PIPELINED = Plan(dp=2, tp=2, pp=4, interleave=2, micro_batch=1, zero_stage=1)


def test_the_peak_is_that_of_the_plans_memory() -> None:
    """The closed form of the plan search and the replayed step tell the same, to the gradient that
    flows back through a layer."""
    found = simulated(PIPELINED)
    first = fullest(list(all_stages(found, STEP, recipe=BF16)))
    closed = float(training_memory(STEP, plan=PIPELINED, recipe=BF16).total)
    flowing = 2048 * 4096 * 2 / 2
    assert first.stage == 0
    assert closed <= first.peak_bytes <= closed + flowing


def test_stages_hold_what_is_in_flight() -> None:
    found = simulated(PIPELINED)
    stages = list(all_stages(found, STEP, recipe=BF16))
    each = [s.memory.peak_of(KEPT) / in_flight(found.schedule, s.stage) for s in stages]
    assert each == pytest.approx([each[0]] * 4)


def test_points_follow_each_other_and_end_with_the_states() -> None:
    found = simulated(PIPELINED)
    for own in outer_stages(found, STEP, recipe=BF16):
        assert (own.when_s[1:] >= own.when_s[:-1]).all()
        assert own.live_bytes.max() == own.peak_bytes
        assert own.live_bytes[-1] == own.live_bytes.min()


def test_a_step_waits_for_its_batch() -> None:
    plan = Plan(tp=8, micro_batch=1)
    step = train_step(CONFIGS[0], len_seq=2048, global_batch=8)
    asked = {"plan": plan, "on": CLUSTERS[0], "recipe": BF16}
    free = simulate_training(step, **asked)  # type: ignore[arg-type]
    hidden = simulate_training(step, **asked, loading_s=free.seconds / 2)  # type: ignore[arg-type]
    waited = simulate_training(step, **asked, loading_s=free.seconds * 2)  # type: ignore[arg-type]
    assert hidden.seconds == free.seconds
    assert waited.seconds == 2 * free.seconds
    assert waited.critical_s()[LOAD] == waited.seconds and hidden.critical_s()[LOAD] == 0


def test_the_fullest_stage_is_shown_wherever_it_is() -> None:
    """One layer at the ends, thirty between: the second stage has the peak."""
    plan = Plan(dp=8, tp=4, pp=4, micro_batch=1, zero_stage=0)
    step = train_step(CONFIGS[0], len_seq=2048, global_batch=32)
    shown = {}
    for counts in ((1, 16, 14, 1), (8, 8, 8, 8)):
        stages = counted_stages(step, plan, counts)
        found = simulate_staged(step, plan=plan, stages=stages, on=CLUSTERS[0], recipe=BF16)
        every = list(all_stages(found, step, recipe=BF16))
        shown[counts] = [s.stage for s in outer_stages(found, step, recipe=BF16)]
        assert fullest(every).stage in shown[counts]
    assert list(shown.values()) == [[0, 1, 3], [0, 3]]
