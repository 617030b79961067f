"""Pins against the rules of the space: each rule in a line, and no pin refused that a plan has."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import catalog
from hwmodels.cluster import Cluster
from hwmodels.errors import InputError
from simulator.planners.parallelism import COLUMNS, check_against_rules, plan_space
from simulator.planners.training import training_space
from workloads.models.config import load_hf_config
from workloads.models.transformer import Inference, TrainStep, decode_step, train_step
from workloads.plan import Plan

LLAMA = replace(load_hf_config("examples/llama3-8b.json"), num_layers=12)
MIXTRAL = replace(load_hf_config("examples/mixtral-8x7b.json"), num_layers=6)
ON = catalog.cluster("hgx-h100", nodes=2)
STEPS: tuple[TrainStep | Inference, ...] = (
    train_step(LLAMA, len_seq=2048, global_batch=24),
    train_step(LLAMA, len_seq=96, global_batch=8),
    decode_step(LLAMA, batch=16, len_context=2048),
)


@pytest.mark.parametrize(
    ("pins", "said"),
    [
        ({"tp": 8, "dp": 3}, "tp=8, dp=3 make 24 ranks, which do not divide the 16 accelerators"),
        ({"dp": 1, "tp": 1, "pp": 1, "cp": 1}, "make 1 ranks of 16 accelerators"),
        ({"dp": 3}, "dp=3 does not divide the 16 accelerators"),
        ({"tp": 3}, "does not divide the 32 query heads"),
        ({"tp": 16}, "does not divide the 8 accelerators of one nvlink group"),
        ({"pp": 16}, "pp=16 is more than the model's 12 layers"),
        ({"cp": 3}, "no power of two"),
        ({"pp": 2, "interleave": 5}, "interleave=5 does not divide the 12 layers"),
        ({"pp": 8, "interleave": 2}, "16 chunks of 12 layers"),
        ({"pp": 1, "interleave": 2}, "needs pipeline stages"),
        ({"interleave": 12}, "more than the 8 chunks"),
        ({"pp": 2, "interleave": 2, "dp": 8, "micro_batch": 1}, "divide the 3 micro-batches"),
        ({"ep": 2}, "has no experts"),
        ({"etp": 2}, "neither 0"),
        ({"micro_batch": 5}, "micro_batch=5 does not divide the global batch of 24"),
        ({"dp": 8, "micro_batch": 4}, "make 32 sequences, which do not divide"),
        ({"micro_batch": 24}, "more than the 16 that are searched"),
        ({"zero_stage": 4}, "none of 0, 1, 2, 3"),
        ({"zero_stage": 2, "pp": 2}, "would exchange for every micro-batch"),
        ({"zero_stage": 1, "tp": 8, "pp": 2}, "and here that is 1"),
        ({"recompute": 1}, "never stores"),
        ({"recompute": 7}, "no mode"),
        ({"foo": 1}, "a plan has no 'foo'"),
    ],
)
def test_every_rule_is_a_line(pins: dict[str, int], said: str) -> None:
    with pytest.raises(InputError) as told:
        check_against_rules(pins, STEPS[0], ON, even=True)
    assert said in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("pins", "said"),
    [
        ({"ep": 3}, "ep=3 does not divide the 8 experts; pin a divisor of 8"),
        ({"ep": 16}, "ep=16 does not divide the 8 experts"),
        ({"ep": 8, "pp": 4}, "does not divide the 4 ranks"),
        ({"ep": 8, "dp": 2, "cp": 1, "tp": 8, "etp": 0}, "does not divide dp x cp = 2"),
    ],
)
def test_experts(pins: dict[str, int], said: str) -> None:
    step = train_step(MIXTRAL, len_seq=2048, global_batch=16)
    with pytest.raises(InputError, match=said):
        check_against_rules(pins, step, ON, even=True)


def test_serving_is_not_pinned_as_training() -> None:
    for pins, said in (
        ({"interleave": 2}, "is for training"),
        ({"cp": 2}, "not split"),
        ({"dp": 8, "pp": 4}, "divide"),
    ):
        with pytest.raises(InputError, match=said):
            check_against_rules(pins, STEPS[2], ON, even=True)


@cache
def space(index: int, even: bool) -> Plan:
    step = STEPS[index]
    if even or not isinstance(step, TrainStep):
        return plan_space(step, on=ON)
    return training_space(step, on=ON)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_pin_is_refused_that_a_plan_has(data: st.DataObject) -> None:
    index, even = data.draw(st.integers(0, 2)), data.draw(st.booleans())
    pins = data.draw(st.dictionaries(st.sampled_from(COLUMNS), st.integers(0, 17), max_size=4))
    plans = space(index, even)
    held = np.ones(np.size(plans.dp), dtype=bool)
    for name, value in pins.items():
        held &= np.asarray(getattr(plans, name)) == value
    if held.any():
        check_against_rules(pins, STEPS[index], ON, even=even)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_values_of_one_plan_are_never_refused(data: st.DataObject) -> None:
    index, even = data.draw(st.integers(0, 2)), data.draw(st.booleans())
    plans = space(index, even)
    one = plans.at(data.draw(st.integers(0, np.size(plans.dp) - 1)))
    names = data.draw(st.sets(st.sampled_from(COLUMNS)))
    check_against_rules(
        {name: int(getattr(one, name)) for name in names}, STEPS[index], ON, even=even
    )


def test_a_lone_accelerator_has_nothing_to_shard() -> None:
    lone: Cluster = replace(ON, num_nodes=1, accelerators_per_node=1)
    with pytest.raises(InputError, match="here that is 1"):
        check_against_rules({"zero_stage": 1}, STEPS[0], lone, even=True)
