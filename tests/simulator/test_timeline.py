"""Simulated steps: limits, closed forms, agreement with the analytic step, what is refused."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.errors import InputError
from hwmodels.step_factors import shipped_factors
from simulator.recipe import RECIPES
from simulator.schedule import DUALPIPE, GPIPE, ONE_F_ONE_B, ZERO_BUBBLE
from simulator.stack import STACKS, Factors, OnDevice, factors_of
from simulator.step import training_step
from simulator.timeline import COMPUTE, GATHER, REDUCE, StepTimeline, simulate_training
from workloads.models.config import load_hf_config
from workloads.models.transformer import TrainStep, train_step
from workloads.plan import Plan

CONFIGS = [load_hf_config(f"examples/{name}.json") for name in ("llama3-8b", "gpt3-175b", "gpt2")]
CLUSTERS = [catalog.cluster(name, nodes=16) for name in ("hgx-h100", "dgx-a100-80gb")]
BF16 = RECIPES["bf16"]
PLAIN = OnDevice(stack=STACKS["megatron"], factors=Factors())


def simulated(
    plan: Plan, num_micro: int = 8, stack: OnDevice | None = PLAIN, schedule: str | None = None
) -> StepTimeline:
    step = train_step(CONFIGS[0], len_seq=2048, global_batch=plan.dp * plan.micro_batch * num_micro)
    return simulate_training(
        step, plan=plan, on=CLUSTERS[0], recipe=BF16, stack=stack, schedule_name=schedule
    )


def random_case(rng: random.Random) -> tuple[TrainStep, Plan, OnDevice, int] | None:
    cfg, which = rng.choice(CONFIGS), rng.randrange(len(CLUSTERS))
    tp, pp, dp = rng.choice([1, 2, 4, 8]), rng.choice([1, 1, 2, 4, 8]), rng.choice([1, 2, 8, 16])
    v, mb = rng.choice([1, 1, 2, 4]) if pp > 1 else 1, rng.choice([1, 2, 4])
    num_micro = pp * rng.choice([1, 2, 4, 8])
    if cfg.num_layers % (pp * v) or tp * pp * dp > 128 or cfg.attention.num_heads % tp:
        return None
    plan = Plan(
        dp=dp, tp=tp, pp=pp, micro_batch=mb, interleave=v, recompute=rng.choice([0, 1, 2]),
        zero_stage=rng.choice([0, 1, 2, 3] if pp == 1 else [0, 1]),
    )  # fmt: skip
    framework, shipped = STACKS[rng.choice(list(STACKS))], shipped_factors()
    assert shipped is not None
    factors = factors_of(framework, CLUSTERS[which].device, shipped.values)
    step = train_step(cfg, len_seq=rng.choice([1024, 2048, 8192]), global_batch=dp * mb * num_micro)
    return step, plan, OnDevice(stack=framework, factors=factors), which


def test_the_analytic_step_agrees_on_a_thousand_random_plans() -> None:
    """Two per cent on nine in ten; the others exchange about as long as they compute, or longer."""
    rng, off, unlike = random.Random(7), [], []
    while len(off) < 1000:
        case = random_case(rng)
        if case is None:
            continue
        step, plan, stack, which = case
        asked = {"plan": plan, "on": CLUSTERS[which], "recipe": BF16, "stack": stack}
        found = simulate_training(step, **asked)  # type: ignore[arg-type]
        analytic = training_step(step, **asked)  # type: ignore[arg-type]
        off.append(found.seconds / float(analytic.seconds) - 1)
        if abs(off[-1]) > 0.02:
            unlike.append(float(analytic.seconds_by_piece["data parallel"]) / found.seconds)
    assert np.mean(np.abs(off) <= 0.02) > 0.88
    assert np.mean(np.abs(off) <= 0.05) > 0.96 and np.abs(off).max() < 0.2
    assert np.quantile(unlike, 0.1) > 0.02  # without exchange there is nothing to disagree on


def test_a_step_lies_between_its_busiest_stage_and_everything_in_turn() -> None:
    rng, count = random.Random(3), 0
    while count < 60:
        case = random_case(rng)
        if case is None:
            continue
        count += 1
        step, plan, stack, which = case
        found = simulate_training(step, plan=plan, on=CLUSTERS[which], recipe=BF16, stack=stack)
        tasks = found.timeline.tasks
        busiest = max(
            sum(t.seconds for t in tasks if t.stream == f"stage {s}")
            for s in range(found.schedule.num_stages)
        )
        assert busiest <= found.seconds * (1 + 1e-9)
        assert found.seconds <= sum(t.seconds for t in tasks) * (1 + 1e-9)
        assert 0 <= found.bubble_frac() < 1


@pytest.mark.parametrize("v", [1, 2, 4])
def test_the_bubble_of_equal_stages_is_the_closed_form(v: int) -> None:
    """(p - 1) / v passes of a stage, if sends and the ends were free."""
    found = simulated(Plan(tp=2, pp=4, interleave=v, micro_batch=1), num_micro=16)
    t, p = found.layers, 4
    ends = sum(t.embedding) + sum(t.head)
    one = found.stage_layers[0] * (t.forward + t.input_grad + t.weight_grad)
    free = (16 + (p - 1) / v) * one + t.update
    assert free <= found.seconds <= free + (16 + p) * ends + 40 * t.send * v


def test_split_backward_passes_idle_less() -> None:
    plan = Plan(tp=2, pp=4, micro_batch=1)
    gpipe, plain, split = (
        simulated(plan, schedule=name).seconds for name in (GPIPE, ONE_F_ONE_B, ZERO_BUBBLE)
    )
    assert split < plain <= gpipe * (1 + 1e-9)


def test_dualpipe_runs_from_both_ends() -> None:
    found = simulated(Plan(tp=2, pp=4, micro_batch=1), num_micro=16, schedule=DUALPIPE)
    assert found.seconds < simulated(Plan(tp=2, pp=4, micro_batch=1), num_micro=16).seconds


def test_exchange_beside_passes_slows_them_by_its_share() -> None:
    plan = Plan(dp=8, micro_batch=1, zero_stage=1)
    felt = OnDevice(stack=STACKS["megatron"], factors=Factors(exposed=0.5))
    alone, beside = simulated(plan), simulated(plan, stack=felt)
    moved = sum(t.seconds for t in alone.timeline.tasks if t.kind in (GATHER, REDUCE))
    assert beside.seconds - alone.seconds == pytest.approx(0.5 * moved, rel=0.1)


def test_the_critical_path_and_what_is_exposed() -> None:
    found = simulated(Plan(dp=8, micro_batch=1, zero_stage=3))
    assert sum(found.critical_s().values()) == pytest.approx(found.seconds)
    assert found.critical_s()[COMPUTE] > 0.9 * found.seconds
    # Nothing runs beside the first layer's gather and the last layer's reduction.
    assert found.exposed_s() >= found.layers.gather + found.layers.reduce - 1e-9


def test_nothing_is_exchanged_by_one_rank() -> None:
    found = simulated(Plan(micro_batch=1, tp=8))
    assert not [t for t in found.timeline.tasks if t.kind in (GATHER, REDUCE)]


def test_without_a_framework_kernels_are_at_their_bound() -> None:
    plan = Plan(tp=8, micro_batch=1)
    assert simulated(plan, stack=None).seconds < simulated(plan).seconds


@pytest.mark.parametrize(
    ("change", "num_micro", "schedule", "said"),
    [
        ({"dp": 3}, 8 / 3, None, "no whole number of micro-batches"),
        ({"pp": 32, "tp": 1}, 8, GPIPE, None),
        ({"pp": 12}, 12, None, "leave a stage of 12 empty"),
        ({"pp": 4, "interleave": 2}, 6, None, "no multiple of 4 stages"),
        ({"pp": 4}, 6, DUALPIPE, "at least twice the 4 stages"),
    ],
)
def test_plans_that_cannot_run_are_refused(
    change: dict[str, int], num_micro: float, schedule: str | None, said: str | None
) -> None:
    plan = replace(Plan(micro_batch=1), **change)
    step = train_step(CONFIGS[0], len_seq=1024, global_batch=int(plan.dp * num_micro))

    def ask() -> StepTimeline:
        return simulate_training(
            step, plan=plan, on=CLUSTERS[0], recipe=BF16, stack=PLAIN, schedule_name=schedule
        )

    if said is None:
        assert ask().seconds > 0
        return
    with pytest.raises(InputError, match=said):
        ask()
