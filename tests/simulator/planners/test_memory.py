"""Swap and storage of pipeline stages: layers, micro-batches in flight, ends."""

from __future__ import annotations

import dataclasses

import pytest

from hwmodels import catalog
from hwmodels.errors import InfeasibleError, InputError
from simulator.memory import in_flight
from simulator.planners.layer_requests import step_requests
from simulator.planners.memory import part_of, plan_stages, stage_of, swap_question
from simulator.planners.storage import Tensors
from simulator.recipe import recipe
from workloads.models.activations import layer_bytes
from workloads.models.config import load_hf_config
from workloads.models.transformer import train_step
from workloads.plan import Plan

CFG = load_hf_config("examples/gpt2.json")
ON = catalog.cluster("hgx-h100", 1)
PLAN = Plan(dp=2, pp=4)
STEP = train_step(CFG, len_seq=65536, global_batch=16)
GIVEN = {"on": ON, "recipe": recipe("bf16"), "host_bytes": 2e12}


def test_stages_share_the_layers_and_hold_what_1f1b_holds() -> None:
    swaps = plan_stages(STEP, plan=PLAN, **GIVEN)
    assert [s.question.num_layers for s in swaps] == [3, 3, 3, 3]
    assert [s.question.in_flight for s in swaps] == [4, 3, 2, 1]
    assert [s.question.offloaded_layers for s in swaps] == [3, 3, 3, 1]
    assert [int(in_flight(STEP, PLAN, i)) for i in range(4)] == [4, 3, 2, 1]
    assert stage_of(STEP, PLAN, 3) == (9, 12)


def test_one_stage_is_the_whole_model() -> None:
    whole = swap_question(STEP, plan=Plan(dp=8), **GIVEN)
    assert (whole.num_layers, whole.in_flight, whole.last_kept) == (12, 1.0, 2)


def test_little_host_memory_names_the_stage() -> None:
    with pytest.raises(InfeasibleError, match="stage 0 of 4: host memory"):
        plan_stages(STEP, plan=PLAN, **{**GIVEN, "host_bytes": 1e9})
    with pytest.raises(InputError, match="without any"):
        plan_stages(STEP, plan=Plan(pp=8), **GIVEN)


def test_storage_holds_the_other_micro_batches() -> None:
    """Stage 0 of 4 holds what three layers keep of three more micro-batches, and no head."""
    sizes = []
    for stage in (0, 3):
        asked = step_requests(STEP, plan=PLAN, num_layers=3, part=part_of(STEP, PLAN, stage))
        held = Tensors.of(asked.timeline)
        sizes.append(dict(zip(held.names, held.sizes.tolist(), strict=True)))
    first, last = sizes
    own = 3 * layer_bytes(CFG, batch=1, len_seq=int(STEP.len_seq))
    assert first["other micro-batches"] == 3 * own
    assert "head" not in first and "head" in last
    assert "other micro-batches" not in last and "embedding" not in last


def test_swapped_micro_batches_are_on_the_host() -> None:
    part = part_of(STEP, PLAN, 0)
    given = {"plan": PLAN, "num_layers": 3, "swap": True}
    alone, among = (
        Tensors.of(step_requests(STEP, **given, part=one).timeline).live_bytes
        for one in (dataclasses.replace(part, others=0.0), part)
    )
    assert alone == among
