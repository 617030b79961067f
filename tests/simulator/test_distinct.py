"""Plans that are alike, found once; and the seconds of many plans without their pieces."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from hwmodels import catalog
from simulator.distinct import MOST_MARKS, distinct, taken
from simulator.planners.parallelism import plan_space
from simulator.recipe import RECIPES
from simulator.stack import STACKS, Factors, OnDevice
from simulator.step import BLOCK, step_seconds, training_step
from tests.simulator.random_plans import CONFIGS
from workloads.models.transformer import train_step
from workloads.plan import Plan

RNG = np.random.default_rng(5)


@pytest.mark.parametrize("scale", [1, MOST_MARKS])
def test_every_plan_finds_its_own_among_as_few_as_there_are(scale: int) -> None:
    """With numbers too large to mark, plans are sorted: the same answer."""
    tp, dp = RNG.integers(1, 9, (3, 500)), scale * RNG.integers(1, 5, 500)
    alike, index = distinct(Plan(tp=tp, dp=dp, pp=4), ["tp", "dp", "pp"])
    assert index is not None and index.shape == (3, 500)
    assert (np.asarray(alike.tp)[index] == tp).all() and (np.asarray(alike.dp)[index] == dp).all()
    assert (np.asarray(alike.pp) == 4).all()
    both = {(int(t), int(d)) for t, d in zip(tp.flat, np.tile(dp, 3), strict=True)}
    assert np.size(alike.tp) == len(both)


def test_fields_that_are_not_named_do_not_matter() -> None:
    alike, index = distinct(Plan(tp=np.array([2, 2]), dp=np.array([1, 7])), ["tp"])
    assert index is not None and index.tolist() == [0, 0] and np.size(alike.tp) == 1
    assert distinct(Plan(tp=2), ["tp"]) == (Plan(tp=2), None)


@dataclass(frozen=True)
class Nest:
    one: object
    two: object = None


def test_everything_inside_is_taken() -> None:
    index = np.array([1, 0, 1])
    found = taken(Nest({"a": np.array([3.0, 4.0])}, (Nest(np.array([5.0, 6.0])), 7)), index)
    assert found.one["a"].tolist() == [4, 3, 4]  # type: ignore[index]
    assert found.two[0].one.tolist() == [6, 5, 6] and found.two[1] == 7  # type: ignore[index]


@pytest.mark.parametrize("stack", [None, OnDevice(stack=STACKS["megatron"], factors=Factors())])
def test_seconds_alone_are_those_of_the_whole_step(stack: OnDevice | None) -> None:
    step = train_step(CONFIGS[0], len_seq=4096, global_batch=1024)
    on = catalog.cluster("hgx-h100", nodes=64)
    plans = plan_space(step, on=on)
    assert np.size(plans.tp) > 3 * BLOCK / 2 or np.size(plans.tp) > 1000
    asked = {"plan": plans, "on": on, "recipe": RECIPES["bf16"], "stack": stack}
    whole = training_step(step, **asked).seconds  # type: ignore[arg-type]
    assert np.asarray(step_seconds(step, **asked)) == pytest.approx(  # type: ignore[arg-type]
        np.asarray(whole), rel=1e-12
    )
    alone = plans.at(7)
    asked["plan"] = alone
    assert float(step_seconds(step, **asked)) == pytest.approx(  # type: ignore[arg-type]
        float(np.asarray(whole)[7]), rel=1e-12
    )
