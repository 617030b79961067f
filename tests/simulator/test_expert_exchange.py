"""Dispatch and combine: bytes by hand, nothing lost, dispatchers in order, loads that grow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import catalog
from hwmodels.errors import InputError, UnknownNameError
from simulator.expert_exchange import (
    COMBINE,
    DEEPEP,
    DISPATCH,
    DISPATCHERS,
    FLAT,
    HIERARCHICAL,
    NODE_LIMITED,
    Dispatch,
    moe_exchanges,
)
from simulator.layer_collective import EXPERT, TENSOR
from workloads.models.config import load_hf_config
from workloads.plan import Plan

DEEPSEEK = load_hf_config("examples/deepseek-v3.json")
QWEN = load_hf_config("examples/qwen3-30b-a3b.json")
NODES = catalog.cluster("hgx-h100", nodes=8)
NODE = catalog.cluster("hgx-h100")
RACK = catalog.cluster("gb200-nvl72", nodes=18)


def dispatches(plan: Plan, cfg: Any = QWEN, **how: Any) -> list[Dispatch]:
    made = moe_exchanges(cfg, num_tokens=4096, plan=plan, element_bytes=2, **how)
    return [x for x in made if isinstance(x, Dispatch)]


def seconds(plan: Plan, cfg: Any = QWEN, *, calibrated: bool = False, on: Any = NODES,
            **how: Any) -> float:  # fmt: skip
    return sum(
        float(sum(x.seconds(on=on, calibrated=calibrated))) for x in dispatches(plan, cfg, **how)
    )


@settings(max_examples=60)
@given(
    ep=st.sampled_from([1, 2, 8, 16, 64]), dispatcher=st.sampled_from(DISPATCHERS),
    tp=st.sampled_from([1, 2]), etp=st.sampled_from([0, 1]),
)  # fmt: skip
def test_what_goes_out_comes_back(ep: int, dispatcher: str, tp: int, etp: int) -> None:
    plan = Plan(dp=64, tp=tp, ep=ep, etp=etp)
    there, back = dispatches(plan, dispatcher=dispatcher)
    assert (there.direction, back.direction) == (DISPATCH, COMBINE)
    assert there.collective == back.collective
    inside = min(ep, 8)
    assert there.wire_bytes(inside) == back.wire_bytes(inside)
    assert there.forward == back.forward == there.backward == back.backward == 1


def test_bytes_by_hand() -> None:
    """4096 tokens of 2048 16-bit elements to 8 of 128 experts each; 16 ranks on two nodes."""
    sent = 4096 * 2048 * 2
    plan = Plan(dp=16, ep=16)
    flat, staged, once = (
        dispatches(plan, dispatcher=d)[0].wire_bytes(8) for d in (FLAT, HIERARCHICAL, NODE_LIMITED)
    )
    assert flat == (sent * 8 * 7 / 16, sent * 8 * 8 / 16)
    assert staged == (sent * 8 * 7 / 8, sent * 8 / 2)
    assert once[0] == pytest.approx(sent * 16 * (1 - (15 / 16) ** 8) * 15 / 16)
    assert once[1] == pytest.approx(sent * 2 * (1 - 1 / 2**8) / 2)


@settings(max_examples=60)
@given(ep=st.sampled_from([2, 4, 8, 16, 32, 64]))
def test_every_choice_leaves_or_stays(ep: int) -> None:
    """Flat: what crosses both links and what stays on the rank are all choices."""
    one = dispatches(Plan(dp=64, ep=ep), dispatcher=FLAT)[0]
    inside = min(ep, 8)
    linked, crossing = one.wire_bytes(inside)
    all_bytes = 4096 * 8 * 2048 * 2
    assert linked + crossing + all_bytes / ep == pytest.approx(all_bytes)
    once = dispatches(Plan(dp=64, ep=ep), dispatcher=NODE_LIMITED)[0].wire_bytes(inside)
    assert once[1] <= crossing * (1 + 1e-12)
    assert sum(once) <= sum(one.wire_bytes(inside)) + once[1]


def test_one_rank_exchanges_nothing() -> None:
    for dispatcher in DISPATCHERS:
        for calibrated in (False, True):
            plan = Plan(dp=8, ep=1)
            assert seconds(plan, dispatcher=dispatcher, calibrated=calibrated) == 0


def test_sending_once_is_faster_over_nodes() -> None:
    plan = Plan(dp=64, ep=64)
    limited, flat, staged = (
        seconds(plan, DEEPSEEK, dispatcher=d) for d in (NODE_LIMITED, FLAT, HIERARCHICAL)
    )
    assert limited < flat < staged
    groups = replace(DEEPSEEK, moe=replace(DEEPSEEK.moe, num_groups=8, num_open_groups=4))
    assert seconds(plan, groups, dispatcher=NODE_LIMITED) < limited


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("on", [NODE, NODES, RACK])
@pytest.mark.parametrize("calibrated", [False, True])
def test_time_grows_with_the_loaded_rank(dispatcher: str, on: Any, calibrated: bool) -> None:
    plan, times = Plan(dp=8, ep=8), []
    for imbalance in (1.0, 1.3, 2.0):
        cfg = replace(QWEN, moe=replace(QWEN.moe, imbalance=imbalance))
        times.append(seconds(plan, cfg, dispatcher=dispatcher, calibrated=calibrated, on=on))
    assert times == sorted(times)
    assert times[0] < times[-1]


def test_the_calibrated_rung_is_slower_than_the_links() -> None:
    for on, ep in ((NODE, 8), (NODES, 64), (RACK, 64)):
        for dispatcher in (FLAT, NODE_LIMITED, DEEPEP):
            plan = Plan(dp=ep, ep=ep)
            bound = seconds(plan, dispatcher=dispatcher, on=on)
            assert bound < seconds(plan, dispatcher=dispatcher, on=on, calibrated=True) < 10 * bound


def test_padded_rows_travel_one_by_one() -> None:
    cfg = replace(QWEN, moe=replace(QWEN.moe, capacity_factor=1.25))
    flat = dispatches(Plan(dp=8, ep=8), cfg, dispatcher=FLAT)[0]
    assert flat.collective.num_bytes == 1.25 * 4096 * 8 * 2048 * 2
    with pytest.raises(InputError, match="travel one by one"):
        dispatches(Plan(dp=8, ep=8), cfg, dispatcher=DEEPEP)
    with pytest.raises(UnknownNameError, match="dispatcher"):
        dispatches(Plan(dp=8, ep=8), dispatcher="carrier pigeon")


def test_experts_across_tensor_ranks_gather_nothing_but_what_shared_experts_need() -> None:
    split, across = (
        sum(
            x.collective.num_bytes * (x.collective.num_ranks > 1)
            for x in moe_exchanges(DEEPSEEK, num_tokens=4096, plan=plan, element_bytes=2)
            if x.piece == TENSOR
        )
        for plan in (Plan(dp=8, tp=2, ep=8), Plan(dp=8, tp=2, ep=16, etp=1))
    )
    hidden = 4096 * 7168 * 2
    assert (split, across) == (2 * 9 * hidden, 2 * hidden)
    made = moe_exchanges(QWEN, num_tokens=4096, plan=Plan(dp=8, tp=2, ep=16, etp=1),
                         element_bytes=2)  # fmt: skip
    gathered = [x for x in made if x.piece == TENSOR and x.collective.num_ranks > 1]
    assert not any(x.collective.num_bytes for x in gathered)
    assert {x.stride for x in made if x.piece == EXPERT} == {1}
