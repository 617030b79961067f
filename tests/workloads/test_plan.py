"""A plan is data: ranks, micro-batches, one plan out of an array, and a name."""

from __future__ import annotations

import numpy as np

from workloads.plan import Plan, Recompute


def test_ranks_and_micro_batches() -> None:
    plan = Plan(dp=4, tp=8, pp=2, cp=2, micro_batch=2)
    assert plan.num_ranks == 128
    assert plan.num_micro_batches(64) == 8


def test_one_plan_out_of_an_array() -> None:
    plans = Plan(dp=np.array([1.0, 2.0, 4.0]), tp=8, recompute=np.array([0.0, 2.0, 0.0]))
    assert plans.at(1) == Plan(dp=2, tp=8, recompute=2)
    assert isinstance(plans.at(2).dp, int)


def test_the_name_leaves_out_what_is_one() -> None:
    plan = Plan(dp=4, tp=2, cp=16, interleave=8, recompute=Recompute.FULL, zero_stage=1)
    assert str(plan) == "dp4 tp2 pp1 cp16 mb1 v8 recompute-full zero1"
    assert str(Plan()) == "dp1 tp1 pp1 mb1 recompute-none zero0"
