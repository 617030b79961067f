"""Routed experts over ranks: who holds, computes and hits what; plans that do not divide."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import InputError
from simulator.memory import training_memory
from simulator.recipe import RECIPES
from workloads.models.architecture import Moe
from workloads.models.config import load_hf_config
from workloads.models.experts import (
    check_experts,
    distinct_copies,
    expert_replicas,
    expert_tokens,
    experts_hit,
    routed_rows,
)
from workloads.models.layer import layer
from workloads.models.parameters import (
    count_parameters,
    layer_parameters,
    matmul_parameters,
    parameters_per_rank,
)
from workloads.models.transformer import model_flops, train_step
from workloads.plan import Plan

MIXTRAL = load_hf_config("examples/mixtral-8x7b.json")
QWEN = load_hf_config("examples/qwen3-30b-a3b.json")
DEEPSEEK = load_hf_config("examples/deepseek-v3.json")
powers = st.sampled_from([1, 2, 4, 8])


def moe(**changes: Any) -> Moe:
    sizes: dict[str, Any] = {
        "num_experts": 64, "num_active": 4, "expert_ffn_dim": 32, "layers": (0,),
    }  # fmt: skip
    return Moe(**(sizes | changes))


# ---- who is hit ----------------------------------------------------------------------------


def test_tokens_share_experts() -> None:
    """Of 64 experts a token takes 4: 4, then 4 (1 - 1/16) more, not 8."""
    assert experts_hit(moe(), 1) == 4
    assert experts_hit(moe(), 2) == 8  # 7.75, rounded up
    assert experts_hit(moe(), 16) == 42  # 64 (1 - (15/16)^16) = 41.2; disjoint: 64
    assert experts_hit(moe(), 10**6) == 64


def test_the_expected_number_is_what_uniform_choices_give() -> None:
    rng = np.random.default_rng(3)
    tokens, draws = 12, 400
    hit = [
        len(set(np.concatenate([rng.permutation(64)[:4] for _ in range(tokens)]).tolist()))
        for _ in range(draws)
    ]
    exact = 64 * (1 - (1 - 4 / 64) ** tokens)
    assert np.mean(hit) == pytest.approx(exact, rel=0.02)
    assert experts_hit(moe(), tokens) == np.ceil(exact)


@settings(max_examples=60)
@given(tokens=st.integers(1, 500), ep=powers)
def test_hits_never_exceed_experts_nor_choices(tokens: int, ep: int) -> None:
    hit = experts_hit(moe(), tokens, ep)
    assert 1 <= hit <= 64 // ep
    assert hit <= np.ceil(tokens * 4 / ep)
    assert hit <= experts_hit(moe(), tokens + 1, ep)
    assert experts_hit(moe(), np.array([tokens, 1.0]), ep)[0] == hit


def test_decoding_reads_the_weights_of_experts_that_are_hit() -> None:
    one = layer(QWEN, kind="moe", batch=16, len_q=1, len_kv=128, training=False)
    assert one["experts.up"].op.batch == experts_hit(QWEN.moe, 16) < 128  # type: ignore[arg-type]


# ---- rows ----------------------------------------------------------------------------------


@settings(max_examples=80)
@given(tp=powers, dp=powers, ep=powers, split=st.booleans(), tokens=st.integers(1, 64))
def test_no_row_is_lost_nor_made(tp: int, dp: int, ep: int, split: bool, tokens: int) -> None:
    """All ranks' rows, each counted once for the etp ranks that share it, are all choices."""
    tokens *= tp
    plan = Plan(tp=tp, dp=dp, ep=ep, etp=0 if split else 1)
    rows = routed_rows(moe(), tokens, plan)
    assert rows * tp * dp / plan.expert_tp == tokens * dp * 4
    assert expert_tokens(tokens, plan) * tp == tokens * plan.expert_tp


def test_load_is_imbalance_or_capacity() -> None:
    plan = Plan(ep=8, dp=8)
    assert routed_rows(moe(imbalance=1.5), 64, plan) == 1.5 * 256
    assert routed_rows(moe(imbalance=1.5, capacity_factor=1.25), 64, plan) == 1.25 * 256


# ---- places --------------------------------------------------------------------------------


def test_copies_by_hand() -> None:
    """Four choices on two places: both unless all fall on one; half of them are away."""
    assert distinct_copies(moe(), 2) == pytest.approx(2 * (1 - 1 / 16) / 2)
    assert distinct_copies(moe(), 1) == 0
    assert distinct_copies(moe(num_active=1), 8) == pytest.approx(7 / 8)


def test_groups_limit_the_places_a_token_reaches() -> None:
    free, limited = moe(num_groups=8), moe(num_groups=8, num_open_groups=2)
    for places in (4, 8, 16):
        assert distinct_copies(limited, places) < distinct_copies(
            replace(free, num_open_groups=8), places
        )
    assert distinct_copies(limited, 8) <= 2 * 7 / 8


@settings(max_examples=40)
@given(places=st.integers(1, 64), active=st.integers(1, 8))
def test_copies_never_exceed_choices_nor_places(places: int, active: int) -> None:
    copies = distinct_copies(moe(num_active=active), places)
    assert 0 <= copies <= min(active * (places - 1) / places, places - 1) + 1e-12


# ---- who holds -----------------------------------------------------------------------------


def test_experts_across_tensor_ranks_are_not_split() -> None:
    across, split = Plan(tp=2, dp=4, ep=8, etp=1), Plan(tp=2, dp=4, ep=4)
    whole = layer_parameters(MIXTRAL, "moe").experts
    for plan in (across, split):
        assert (
            layer_parameters(MIXTRAL, "moe", plan.tp, plan.ep, plan.expert_tp).experts == whole / 8
        )
    up = layer(MIXTRAL, kind="moe", batch=1, len_q=512, plan=across, training=True)["experts.up"].op
    assert (up.batch, up.n) == (1, 2 * 14336)
    up = layer(MIXTRAL, kind="moe", batch=1, len_q=512, plan=split, training=True)["experts.up"].op
    assert (up.batch, up.n) == (2, 14336)
    assert (expert_replicas(across), expert_replicas(split)) == (1, 1)


@settings(max_examples=40)
@given(tp=powers, dp=powers, ep=powers)
def test_both_layouts_do_the_same_work(tp: int, dp: int, ep: int) -> None:
    """With etp = 1 a rank has tp times fewer rows, of tp times wider experts."""
    flops = [
        sum(
            float(sum(n.op.min_flops().values()))
            for n in layer(MIXTRAL, kind="moe", batch=4, len_q=512, plan=plan, training=True)
            if n.name in ("experts.up", "experts.down", "experts.up.wgrad")
        )
        for plan in (Plan(tp=tp, dp=dp, ep=ep), Plan(tp=tp, dp=dp, ep=ep, etp=1))
    ]
    assert flops[0] == pytest.approx(flops[1], rel=1e-9)


def test_a_rank_of_unsplit_experts_holds_tp_times_more_of_them() -> None:
    step = train_step(QWEN, len_seq=4096, global_batch=64)
    memory = [
        training_memory(step, plan=plan, recipe=RECIPES["bf16"]).bytes_by_part["weights"]
        for plan in (Plan(tp=4, dp=8, ep=8), Plan(tp=4, dp=8, ep=8, etp=1), Plan(tp=4, dp=8, ep=32,
                                                                                 etp=1))
    ]  # fmt: skip
    assert memory[0] == memory[2] < memory[1]
    first, _ = parameters_per_rank(QWEN, Plan(tp=4, dp=8, ep=8, etp=1))
    assert first.experts == layer_parameters(QWEN, "moe", 1, 8).experts * 48


# ---- plans that do not divide --------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(dp=3, ep=3), "ep must divide the 8 experts of mixtral-8x7b; 3 does not divide 8"),
        (Plan(dp=2, tp=2, ep=4), "etp * ep must divide dp * cp * tp"),
        (Plan(dp=2, tp=2, ep=8, etp=1), "8 does not divide 4"),
        (Plan(tp=4, dp=2, etp=3), "etp must divide tp (0: the same); 3 does not divide 4"),
    ],
)
def test_degrees_that_do_not_divide(plan: Plan, message: str) -> None:
    with pytest.raises(InputError) as raised:
        check_experts(MIXTRAL, plan)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_one_bad_plan_of_many_is_named() -> None:
    with pytest.raises(InputError, match="8 does not divide 2"):
        check_experts(MIXTRAL, Plan(dp=np.array([8.0, 2.0]), ep=np.array([8.0, 8.0])))
    check_experts(MIXTRAL, Plan(dp=np.array([8.0, 2.0]), ep=np.array([8.0, 2.0])))


def test_a_dense_model_has_no_experts_to_spread() -> None:
    with pytest.raises(InputError, match="has no experts; give ep = 1"):
        check_experts(load_hf_config("examples/llama3-8b.json"), Plan(dp=8, ep=8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imbalance": 0.5}, "imbalance 0.5 must lie between 1"),
        ({"imbalance": 17.0}, "imbalance 17 must lie between 1 and 16"),
        ({"capacity_factor": -1.0}, "capacity factor -1 must lie between 0"),
        ({"num_groups": 3}, "groups must divide the experts"),
        ({"num_groups": 8, "num_open_groups": 9}, "9 open of 8 groups"),
    ],
)
def test_what_a_mixture_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        moe(**changes)


# ---- multi-token prediction ----------------------------------------------------------------


def test_a_module_adds_a_layer_a_projection_and_a_head() -> None:
    with_mtp = replace(DEEPSEEK, num_mtp=1)
    per_layer = layer_parameters(DEEPSEEK, "moe").total
    added = count_parameters(with_mtp).total - count_parameters(DEEPSEEK).total
    assert added == per_layer + 2 * 7168**2 + 3 * 7168
    head = 129280 * 7168
    used = matmul_parameters(with_mtp) - matmul_parameters(DEEPSEEK)
    assert used > head + 2 * 7168**2
    # Megatron-Bridge states 260 and 249 GF a token for its steps with and without the module.
    assert model_flops(with_mtp, 4096, 1) / 1e9 == pytest.approx(260.4, rel=0.01)
    assert model_flops(DEEPSEEK, 4096, 1) / 1e9 == pytest.approx(249.1, rel=0.01)


def test_the_last_stage_holds_the_modules() -> None:
    with_mtp = replace(DEEPSEEK, num_mtp=1)
    plan = Plan(pp=4, dp=8, ep=8)
    first, last = parameters_per_rank(DEEPSEEK, plan)
    first_too, more = parameters_per_rank(with_mtp, plan)
    assert first_too == first
    assert more.experts - last.experts == layer_parameters(DEEPSEEK, "moe", 1, 8).experts
    assert more.dense > last.dense
    names = {n.part for n in train_step(with_mtp, len_seq=64, global_batch=8).ends(Plan())}
    assert names == {"embedding", "head", "mtp"}
