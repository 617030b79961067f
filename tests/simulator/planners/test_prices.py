"""Duals against the relaxation solved again, bandwidths against steps priced again, the curve."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hwmodels import catalog
from simulator.planners import prices
from simulator.planners.modes import Limits
from simulator.planners.prices import (
    FASTER,
    curve_around,
    levels_of,
    memory_curve,
    mesh_program,
    prices_of,
    problem_on,
    step_gradient,
)
from simulator.planners.program import OPTIMAL, solve
from simulator.planners.stages import StageProblem, best_layout
from simulator.planners.training import Answer, plan_training, search_training
from tests.simulator.planners.stage_problems import random_problem
from workloads.models.config import load_hf_config
from workloads.models.transformer import train_step


def answer(budget_gb: float, name: str = "llama3-70b", host: float = 0.0) -> Answer:
    step = train_step(load_hf_config(f"examples/{name}.json"), len_seq=8192, global_batch=64)
    on = catalog.cluster("hgx-h100", nodes=8)
    return search_training(
        step, on=on, budget_bytes=budget_gb * 1e9, host_bytes_per_node=host, num_runners_up=0
    )


TIGHT = answer(24.0, host=5e11)


def relaxed(problem: StageProblem) -> float:
    found = solve(mesh_program(problem))
    assert found.status == OPTIMAL
    return found.objective


def with_budget(problem: StageProblem, budget: float) -> StageProblem:
    return replace(problem, limits=replace(problem.limits, budget_bytes=budget))


def test_the_relaxation_is_below_every_layout() -> None:
    """Its exchange is left out, so problems without any are taken; and meshes as they are."""
    checked = 0
    for seed in range(80):
        drawn = random_problem(seed, num_kinds=1)
        problem = replace(drawn, after=lambda d, e, f, b: 0.0 * d)
        layout = best_layout(problem)
        if layout is None:
            continue
        checked += 1
        assert relaxed(problem) <= layout.seconds * (1 + 1e-9)
    assert checked >= 25
    best = TIGHT.best
    assert relaxed(best.figures.problem(best.index)) <= best.seconds


def test_memory_is_worth_what_the_relaxation_gains() -> None:
    best = TIGHT.best
    problem = best.figures.problem(best.index)
    dual = prices_of(best)[0].dual_s
    budget = problem.limits.budget_bytes
    gain = relaxed(with_budget(problem, budget - 1e6)) - relaxed(with_budget(problem, budget + 1e6))
    assert dual is not None and dual > 0
    assert dual == pytest.approx(gain / 2e-3, rel=1e-4)


@pytest.mark.parametrize("tight", [True, False])
def test_bandwidths_are_worth_what_steps_priced_again_gain(tight: bool) -> None:
    """One per cent more of a bandwidth, in 1 / bandwidth; within 1 %."""
    found = (TIGHT if tight else answer(70.0)).best
    told = {p.resource: p for p in prices_of(found)}
    now = found.figures.question
    for level in levels_of(now.on):
        price = told[level]
        assert price.dual_s is not None and price.step_s is not None
        again = relaxed(problem_on(found, level, 1.0)) - relaxed(
            problem_on(found, level, 1 / FASTER)
        )
        assert price.dual_s == pytest.approx(again, rel=0.01, abs=1e-6)
        plan = found.figures.plan(found.index)
        gained = prices._step_s(now, plan, found.stages, now.on) - prices._step_s(
            now, plan, found.stages, prices.slower(now.on, level, 1 / FASTER)
        )
        assert price.step_s == pytest.approx(gained, rel=0.01, abs=1e-6)
        assert step_gradient(found, level) >= -1e-9


def test_every_point_of_the_memory_curve_is_a_plan_of_its_own() -> None:
    points = curve_around(TIGHT, (-2.0, -1.0, 0.0, 1.0, 4.0))
    assert [p.budget_bytes for p in points] == sorted(p.budget_bytes for p in points)
    asked = TIGHT.asked.question
    for point in points:
        again = plan_training(
            asked.step, on=asked.on, budget_bytes=point.budget_bytes,
            host_bytes_per_node=5e11, num_runners_up=0,
        )  # fmt: skip
        assert point.seconds == pytest.approx(float(again.best.step.seconds), rel=1e-9)
        assert point.seconds is not None
        assert point.same_mesh_s is None or point.same_mesh_s >= point.seconds * (1 - 1e-12)
    seconds = [p.seconds for p in points if p.seconds is not None]
    assert seconds == sorted(seconds, reverse=True)


def test_the_curve_is_flat_between_its_steps() -> None:
    """From what a plan needs on, its step is the best; below, another one is, and slower."""
    for point in curve_around(TIGHT, (-1.0, 0.0, 4.0)):
        edge = point.from_bytes
        assert edge is not None and point.seconds is not None and edge <= point.budget_bytes
        at, below = memory_curve(TIGHT, [edge])[0], memory_curve(TIGHT, [edge - 1e5])[0]
        assert at.seconds == pytest.approx(point.seconds, rel=1e-12)
        assert below.seconds is None or below.seconds > point.seconds


def test_a_budget_that_nothing_fits_has_no_step() -> None:
    point = memory_curve(TIGHT, [1e8])[0]
    assert point.seconds is None and point.plan is None


def test_without_a_host_no_row_of_one_is_priced() -> None:
    problem = replace(
        TIGHT.best.figures.problem(TIGHT.best.index, Limits(budget_bytes=70e9)),
    )
    assert not any(row.name.startswith("host") for row in mesh_program(problem).rows)
