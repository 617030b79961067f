"""Layouts of stages against every split and every mode, and the recursion's parts by hand."""

from __future__ import annotations

import math

import pytest

from simulator.planners.stages import best_layout, objective
from tests.simulator.planners.stage_problems import by_brute_force, random_problem


@pytest.mark.parametrize("block", range(8))
def test_the_best_layout_is_that_of_a_loop_over_everything(block: int) -> None:
    infeasible = 0
    for seed in range(60 * block, 60 * (block + 1)):
        problem = random_problem(seed)
        best = by_brute_force(problem)
        layout = best_layout(problem)
        if math.isinf(best):
            infeasible += 1
            assert layout is None, seed
            continue
        assert layout is not None, seed
        assert layout.seconds == pytest.approx(best, rel=1e-9), seed
        assert objective(problem, layout.choices) == layout.seconds
        assert best_layout(problem, below_s=best * (1 - 1e-6)) is None
        assert best_layout(problem, below_s=best * (1 + 1e-6)) is not None
    assert 5 <= infeasible <= 40
