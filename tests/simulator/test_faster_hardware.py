"""A faster part never makes a step slower: the sum of pieces and the simulated timeline."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import pytest

from hwmodels.cluster import Cluster
from hwmodels.frozen import FrozenDict
from simulator.recipe import RECIPES
from simulator.step import training_step
from simulator.timeline import StepTimeline, simulate_training
from tests.simulator.random_plans import CLUSTERS, random_cases

BF16 = RECIPES["bf16"]
RATES = ("tensor", "vector", "hbm", "inner link", "outer link")


def faster(on: Cluster, rate: str, factor: float) -> Cluster:
    """The cluster with one rate times `factor`."""
    d = on.device

    def times(rates: Mapping[str, float]) -> FrozenDict[str, float]:
        return FrozenDict({k: v * factor for k, v in rates.items()})

    if rate == "tensor":
        return replace(on, device=replace(d, tensor_flops_per_s=times(d.tensor_flops_per_s)))
    if rate == "vector":
        return replace(on, device=replace(d, vector_flops_per_s=times(d.vector_flops_per_s)))
    if rate == "hbm":
        assert d.hbm.bytes_per_s is not None
        hbm = replace(d.hbm, bytes_per_s=d.hbm.bytes_per_s * factor)
        return replace(on, device=replace(d, memory=(*d.memory[:-1], hbm)))
    at = 0 if rate == "inner link" else len(on.levels) - 1
    level = on.levels[at]
    node = level.bytes_per_s_per_node
    wider = replace(
        level,
        bytes_per_s=level.bytes_per_s * factor,
        bytes_per_s_per_node=None if node is None else node * factor,
    )
    return replace(on, levels=(*on.levels[:at], wider, *on.levels[at + 1 :]))


def taken_s(found: StepTimeline) -> float:
    """What exchange may take from the last passes of stages that wait for each other.

    Over a slower network it falls into the time in which a stage idles, and takes nothing: this is
    the one way in which a faster part lengthens a step. None without a pipeline.
    """
    t = found.layers
    if found.schedule.num_stages == 1:
        return 0.0
    return t.felt * (t.gather + t.reduce) * sum(found.stage_layers)


@pytest.mark.parametrize("rate", RATES)
def test_no_step_of_a_thousand_gets_slower(rate: str) -> None:
    """Each rate on 200 plans of its own, on the bound rung or as a framework trains."""
    rng, moved = random.Random(rate), 0
    for step, plan, stack, which in random_cases(RATES.index(rate), 200):
        on, better = CLUSTERS[which], faster(CLUSTERS[which], rate, rng.choice([1.05, 1.3, 2, 10]))
        felt = rng.choice([None, stack])
        before, after = (
            training_step(step, plan=plan, on=c, recipe=BF16, stack=felt) for c in (on, better)
        )
        assert after.seconds <= before.seconds * (1 + 1e-12), plan
        assert after.lower_s <= before.lower_s * (1 + 1e-12), plan
        assert after.upper_s <= before.upper_s * (1 + 1e-12), plan
        moved += float(after.seconds) < float(before.seconds)
        line, shorter = (
            simulate_training(step, plan=plan, on=c, recipe=BF16, stack=felt) for c in (on, better)
        )
        assert shorter.seconds <= line.seconds * (1 + 1e-9) + taken_s(shorter), plan
    assert moved > (20 if rate != "vector" else 0)  # else the rate is not felt at all
