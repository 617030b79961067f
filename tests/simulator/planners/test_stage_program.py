"""The stage problem as a mixed-integer program: the recursion and every bound are held to it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from hwmodels import catalog
from simulator.planners.modes import Limits
from simulator.planners.program import CBC, HIGHS, INFEASIBLE, OPTIMAL, solve
from simulator.planners.sequence_splits import ANY
from simulator.planners.stage_program import relaxed_seconds, stage_program
from simulator.planners.stages import StageProblem, best_layout
from simulator.planners.training import asked_of, groups_of
from simulator.recipe import RECIPES
from tests.simulator.planners.stage_problems import Linear, random_problem
from workloads.models.config import load_hf_config
from workloads.models.transformer import train_step

ROUNDING = 1e-6


def plain(seed: int) -> StageProblem:
    """A random mesh whose exchange does not depend on what hides it."""
    problem = random_problem(seed)
    return replace(problem, after=Linear(0.0, 0.0, 0.1 * (seed % 3)).after)


def optimum(problem: StageProblem, engine: str = HIGHS) -> float:
    """The program's; infinite where it is infeasible."""
    question = stage_program(problem)
    if question is None:
        return math.inf
    found = solve(question, engine=engine, time_limit_s=30.0, explain=False)
    assert found.status in (OPTIMAL, INFEASIBLE), found.reason
    return found.objective if found.has_point else math.inf


@pytest.mark.parametrize("block", range(4))
def test_the_program_and_the_recursion_agree(block: int) -> None:
    infeasible = 0
    for seed in range(1000 + 20 * block, 1000 + 20 * (block + 1)):
        problem = plain(seed)
        layout = best_layout(problem)
        found = optimum(problem)
        if layout is None:
            infeasible += 1
            assert math.isinf(found), seed
        else:
            assert found == pytest.approx(layout.seconds, rel=ROUNDING), seed
    assert infeasible < 15


@pytest.mark.parametrize("seed", range(2000, 2010))
def test_another_engine_agrees(seed: int) -> None:
    problem = plain(seed)
    first, second = optimum(problem), optimum(problem, CBC)
    assert first == second or first == pytest.approx(second, rel=ROUNDING)


@pytest.mark.parametrize("block", range(3))
def test_bounds_are_in_order(block: int) -> None:
    """Relaxed, then with whole counts and the longest passes, then the layout itself."""
    lifted = 0
    for seed in range(3000 + 20 * block, 3000 + 20 * (block + 1)):
        problem = random_problem(seed)
        layout, relaxed, whole = best_layout(problem), relaxed_seconds(problem), optimum(problem)
        assert relaxed <= whole * (1 + ROUNDING)
        question = stage_program(problem)
        if layout is not None and question is not None:
            assert whole <= layout.seconds * (1 + ROUNDING)
            unlifted = solve(question.relaxed(), explain=False).objective
            assert unlifted <= relaxed * (1 + ROUNDING)
            lifted += relaxed > unlifted * (1 + ROUNDING)
    assert lifted > 0


def test_the_bound_of_a_mesh_is_never_above_its_program() -> None:
    """Real meshes of a model of 12 layers, with and without room to keep everything."""
    step = train_step(load_hf_config("examples/gpt2.json"), len_seq=1024, global_batch=64)
    cluster = catalog.cluster("dgx-a100-80gb")
    for budget in (80e9, 4e9):
        limits = Limits(budget_bytes=budget)
        asked = asked_of(step, cluster, RECIPES["bf16"], limits, None, {"tp": 1}, ANY)
        (figures,) = groups_of(asked)
        chosen = [i for i in range(figures.size) if figures.plan(i).pp in (2, 4)][::24]
        assert len(chosen) >= 4
        for index in chosen:
            problem = figures.problem(index)
            whole, layout = optimum(problem), best_layout(problem)
            assert figures.bounds[index] <= whole * (1 + ROUNDING)
            assert relaxed_seconds(problem) <= whole * (1 + ROUNDING)
            if layout is None:
                assert math.isinf(whole)
            else:
                assert whole <= layout.seconds * (1 + ROUNDING)
