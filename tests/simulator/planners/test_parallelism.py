"""The planner against a loop over its space, its constraints checked one by one, its refusals."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.cluster import Cluster
from hwmodels.errors import InfeasibleError, InputError
from simulator.inference import inference_step
from simulator.memory import inference_memory, training_memory
from simulator.planners.parallelism import (
    COLUMNS,
    MAX_INTERLEAVE,
    MAX_MICRO_BATCH,
    PlanChoice,
    extra_seconds,
    narrowed,
    plan_parallelism,
    plan_space,
    select,
)
from simulator.planners.sequence_splits import ANY
from simulator.recipe import RECIPES
from simulator.step import training_step
from workloads.models.config import TransformerConfig, load_hf_config
from workloads.models.transformer import TrainStep, decode_step, prefill_step, train_step
from workloads.plan import Plan, Recompute

BF16 = RECIPES["bf16"]


def model(name: str) -> TransformerConfig:
    return load_hf_config(f"examples/{name}.json")


def question(
    name: str, cluster: str, nodes: int, batch: int, len_seq: int = 2048
) -> tuple[TrainStep, Cluster]:
    step = train_step(model(name), len_seq=len_seq, global_batch=batch)
    return step, catalog.cluster(cluster, nodes=nodes)


def rows(plans: Plan) -> list[Plan]:
    return [plans.at(i) for i in range(np.size(plans.dp))]


SMALL = [
    ("gpt2", "hgx-h100", 1, 12),
    ("gpt2", "l40s-pcie-8", 2, 6),
    ("llama3-8b", "hgx-h100", 1, 8),
    ("llama3-8b", "dgx-a100-40gb", 2, 4),
    ("gemma-2-9b", "dgx-h100", 2, 6),
    ("mixtral-8x7b", "hgx-h100", 2, 4),
    ("qwen3-30b-a3b", "gb200-nvl72", 2, 4),
]


# ---- against loops -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "cluster", "nodes", "batch"), SMALL)
def test_the_best_plan_is_the_best_of_a_loop(
    name: str, cluster: str, nodes: int, batch: int
) -> None:
    step, on = question(name, cluster, nodes, batch)
    choice = plan_parallelism(step, on=on)
    budget = 0.92 * on.device.hbm.capacity_bytes
    best, feasible = math.inf, 0
    space = rows(narrowed(plan_space(step, on=on), step, {}, ANY, on=on))
    assert {replace(p, order=0) for p in space} == set(rows(plan_space(step, on=on)))
    for plan in space:
        if training_memory(step, plan=plan, recipe=BF16).total <= budget:
            feasible += 1
            best = min(best, float(training_step(step, plan=plan, on=on, recipe=BF16).seconds))
    assert feasible > 0
    assert choice.best.step.seconds == pytest.approx(best, rel=1e-9)
    assert (choice.num_feasible, choice.num_evaluated) == (feasible, len(space))
    assert choice.lower_bound_s == pytest.approx(best, rel=1e-9)
    assert choice.gap_frac == 0


def every_plan(step: TrainStep, on: Cluster) -> set[tuple[int, ...]]:
    """The stated space by trying every combination of numbers against the constraints."""
    cfg, total = step.config, on.num_accelerators
    batch, length = int(step.global_batch), int(step.len_seq)
    numbers = range(1, total + 1)
    found = set()
    meshes = (
        (dp, tp, pp, cp, ep, etp)
        for dp, tp, pp, cp in product(numbers, repeat=4)
        if dp * tp * pp * cp == total
        for etp in (0, 1)
        for ep in range(1, dp * cp * (tp if etp else 1) + 1)
        if not etp or (tp > 1 and ep > 1)
    )
    for dp, tp, pp, cp, ep, etp in meshes:
        experts = cfg.moe.num_experts if cfg.moe else 1
        group = min(on.levels[0].size, total)
        if cfg.attention.num_heads % tp or group % tp or pp > cfg.num_layers:
            continue
        spread = dp * cp * (tp if etp else 1)
        if math.log2(cp) % 1 or length % cp or spread % ep or experts % ep or batch % dp:
            continue
        for micro, v, mode, zero in product(
            range(1, MAX_MICRO_BATCH + 1), range(1, MAX_INTERLEAVE + 1), (0, 2), range(4)
        ):
            if (batch // dp) % micro:
                continue
            num_micro = batch // dp // micro
            if v > 1 and (pp == 1 or num_micro % pp or cfg.num_layers % (pp * v)):
                continue
            if (zero and dp * cp == 1) or (zero > 1 and pp > 1):
                continue
            found.add((dp, tp, pp, cp, ep, etp, micro, v, mode, zero))
    return found


@pytest.mark.parametrize(
    ("name", "cluster", "nodes", "batch"),
    [*SMALL[:4], ("mixtral-8x7b", "hgx-h100", 1, 8), ("gpt2", "hgx-h100", 3, 12)],
)
def test_the_space_is_exactly_what_is_stated(
    name: str, cluster: str, nodes: int, batch: int
) -> None:
    step, on = question(name, cluster, nodes, batch)
    space = rows(plan_space(step, on=on))
    found = {tuple(int(getattr(p, name)) for name in COLUMNS) for p in space}
    assert len(found) == len(space), "a plan is listed twice"
    assert found == every_plan(step, on)


def test_tensor_groups_never_straddle_nodes() -> None:
    """12 heads on three nodes of eight: a group of six or three would lie across two nodes."""
    step, on = question("gpt2", "hgx-h100", 3, 24)
    space = plan_space(step, on=on)
    assert set(np.asarray(space.tp)) == {1.0, 2.0, 4.0}


def test_a_plan_uses_every_accelerator_and_every_sequence() -> None:
    step, on = question("mixtral-8x7b", "hgx-h100", 4, 64)
    space = plan_space(step, on=on)
    assert np.all(np.asarray(space.num_ranks) == 32)
    micro = np.asarray(space.num_micro_batches(64))
    assert np.all(micro == np.round(micro))
    assert np.all(micro * space.dp * space.micro_batch == 64)
    assert set(np.asarray(space.ep)) == {1.0, 2.0, 4.0, 8.0}
    spread = space.dp * space.cp * np.where(space.etp == 1, space.tp, 1)
    assert np.all(spread % space.ep == 0)


# ---- the order of answers ------------------------------------------------------------------


def chosen(choice: PlanChoice) -> list[Plan]:
    return [choice.best.plan, *(c.plan for c in choice.runners_up)]


@pytest.mark.parametrize(("name", "cluster", "nodes", "batch"), SMALL)
def test_runners_up_follow_in_order_on_other_meshes(
    name: str, cluster: str, nodes: int, batch: int
) -> None:
    step, on = question(name, cluster, nodes, batch)
    choice = plan_parallelism(step, on=on, num_runners_up=6)
    seconds = [float(c.step.seconds) for c in (choice.best, *choice.runners_up)]
    assert all(a <= b * (1 + 1e-8) for a, b in pairwise(seconds))
    meshes = [tuple(getattr(p, name) for name in COLUMNS[:6]) for p in chosen(choice)]
    assert len(set(meshes)) == len(meshes)
    all_meshes = zip(
        *(np.asarray(getattr(choice.feasible, a)) for a in COLUMNS[:6]),
        strict=True,
    )
    assert len(meshes) == min(7, len(set(all_meshes)))
    for c in (choice.best, *choice.runners_up):
        assert c.memory.total <= choice.budget_bytes
        again = training_step(step, plan=c.plan, on=on, recipe=BF16)
        assert again.seconds == c.step.seconds
        extra = extra_seconds(c, choice.best)
        assert sum(extra.values()) == pytest.approx(
            float(c.step.seconds) - float(choice.best.step.seconds), abs=1e-9
        )
        assert list(extra.values()) == sorted(extra.values(), reverse=True)


def test_the_whole_search_is_handed_back_fastest_first() -> None:
    step, on = question("llama3-8b", "hgx-h100", 1, 8)
    choice = plan_parallelism(step, on=on)
    assert choice.seconds.size == choice.total_bytes.size == choice.num_feasible
    assert np.all(np.diff(choice.seconds) >= -1e-8 * choice.seconds[:-1])
    assert np.all(choice.total_bytes <= choice.budget_bytes)
    for i in (0, choice.num_feasible // 2, choice.num_feasible - 1):
        plan = choice.feasible.at(i)
        e = training_step(step, plan=plan, on=on, recipe=BF16)
        assert choice.seconds[i] == pytest.approx(float(e.seconds), rel=1e-9)
        held = training_memory(step, plan=plan, recipe=BF16).total
        assert choice.total_bytes[i] == pytest.approx(float(held), rel=1e-12)


def test_the_answer_is_the_same_every_time() -> None:
    step, on = question("mixtral-8x7b", "hgx-h100", 2, 16)
    first, second = (plan_parallelism(step, on=on) for _ in range(2))
    assert chosen(first) == chosen(second)
    assert np.array_equal(first.seconds, second.seconds)


def test_a_larger_budget_is_never_slower() -> None:
    step, on = question("llama3-8b", "dgx-a100-40gb", 1, 8)
    best = [
        float(plan_parallelism(step, on=on, hbm_frac=frac).best.step.seconds)
        for frac in (0.5, 0.6, 0.8, 1.0)
    ]
    assert all(a >= b for a, b in pairwise(best))
    assert best[0] > best[-1]


# ---- shapes at the edge --------------------------------------------------------------------


def test_one_gpu_has_one_mesh() -> None:
    """Micro-batches that divide six, with and without recompute."""
    on = replace(catalog.cluster("hgx-h100"), accelerators_per_node=1)
    step = train_step(model("gpt2"), len_seq=1024, global_batch=6)
    choice = plan_parallelism(step, on=on)
    assert choice.num_evaluated == 4 * 2
    assert (choice.plan.dp, choice.plan.tp, choice.plan.pp, choice.plan.cp) == (1, 1, 1, 1)
    assert choice.plan.recompute == Recompute.NONE
    assert choice.runners_up == ()


@pytest.mark.parametrize("batch", [1, 7, 13, 97])
def test_batches_that_hardly_divide(batch: int) -> None:
    """dp is 1 (a prime batch shares nothing with eight); the other axes take the accelerators."""
    step, on = question("llama3-8b", "hgx-h100", 1, batch)
    choice = plan_parallelism(step, on=on)
    assert set(np.asarray(choice.feasible.dp)) == {1.0}
    assert choice.plan.tp * choice.plan.pp * choice.plan.cp == 8
    assert choice.plan.num_micro_batches(batch) in (batch, 1)


def test_a_rack_of_72() -> None:
    step = train_step(model("llama3-70b"), len_seq=8192, global_batch=72)
    on = catalog.cluster("gb200-nvl72", nodes=18)
    choice = plan_parallelism(step, on=on)
    assert choice.plan.num_ranks == 72
    assert set(np.asarray(plan_space(step, on=on).tp)) == {1.0, 2.0, 4.0, 8.0}
    assert 0 < choice.best.step.mfu_frac < 1


def test_experts_are_spread_when_they_do_not_fit() -> None:
    step, on = question("mixtral-8x7b", "hgx-h100", 2, 32)
    choice = plan_parallelism(step, on=on)
    alone = np.asarray(choice.feasible.ep) == 1
    spread = np.asarray(choice.feasible.ep) > 1
    assert spread.any()
    assert np.asarray(choice.seconds)[spread].min() <= np.asarray(choice.seconds)[alone].min()


def test_deepseek_on_256_gpus_fits_somewhere() -> None:
    step, on = question("deepseek-v3", "hgx-h200", 32, 512, 4096)
    choice = plan_parallelism(step, on=on)
    assert choice.plan.ep > 1
    assert choice.best.memory.total <= choice.budget_bytes


# ---- serving -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [prefill_step, decode_step])
@pytest.mark.parametrize("name", ["llama3-8b", "mixtral-8x7b"])
def test_serving_plans_are_the_best_of_a_loop(make, name: str) -> None:  # type: ignore[no-untyped-def]
    step, on = make(model(name), batch=32, len_context=2048), catalog.cluster("hgx-h100", nodes=1)
    choice = plan_parallelism(step, on=on)
    best, feasible = math.inf, 0
    space = rows(plan_space(step, on=on))
    for plan in space:
        slot = replace(step, batch=32 // (plan.dp * plan.pp))
        assert plan.micro_batch == slot.batch
        if inference_memory(slot, plan=plan, recipe=BF16).total <= choice.budget_bytes:
            feasible += 1
            e = inference_step(slot, plan=plan, on=on, recipe=BF16)
            assert e.num_tokens == 32 * step.len_new
            best = min(best, float(e.seconds))
    assert choice.best.step.seconds == pytest.approx(best, rel=1e-9)
    assert (choice.num_feasible, choice.num_evaluated) == (feasible, len(space))


def test_decoding_splits_no_single_token() -> None:
    space = plan_space(
        decode_step(model("llama3-8b"), batch=64, len_context=4096),
        on=catalog.cluster("hgx-h100", nodes=1),
    )
    assert set(np.asarray(space.cp)) == {1.0}


# ---- refusals ------------------------------------------------------------------------------


def refusal(step: TrainStep, on: Cluster, **more: float) -> str:
    with pytest.raises(InfeasibleError) as caught:
        plan_parallelism(step, on=on, **more)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "cluster", "nodes", "batch", "len_seq"),
    [
        ("llama3-70b", "hgx-h100", 1, 8, 8192),
        ("llama3-405b", "hgx-h100", 2, 64, 8192),
        ("mixtral-8x7b", "dgx-a100-40gb", 1, 8, 4096),
    ],
)
def test_what_does_not_fit_is_told_where_it_does(
    name: str, cluster: str, nodes: int, batch: int, len_seq: int
) -> None:
    step, on = question(name, cluster, nodes, batch, len_seq)
    message = refusal(step, on)
    space = plan_space(step, on=on)
    totals = np.asarray(training_memory(step, plan=space, recipe=BF16).total)
    assert f"needs {totals.min() / 2**30:.1f} GiB" in message
    assert str(space.at(int(np.argmin(totals)))) in message
    budget = 0.92 * on.device.hbm.capacity_bytes
    assert f"budget of {budget / 2**30:.1f} GiB" in message
    assert totals.min() > budget
    found = re.search(r"it fits on (\d+) nodes", message)
    assert found, message
    enough = int(found[1])
    assert plan_parallelism(step, on=catalog.cluster(cluster, nodes=enough)).num_feasible > 0
    if enough // 2 > nodes:
        refusal(step, catalog.cluster(cluster, nodes=enough // 2))


def test_where_no_cluster_helps_the_message_says_what_would() -> None:
    """HGX H800 ends at eight accelerators."""
    message = refusal(*question("llama3-70b", "hgx-h800", 1, 8, 8192))
    assert "nodes" not in message
    assert re.search("shorten|shrink|device", message), message


def test_what_does_not_divide_is_told() -> None:
    """48 heads cannot take 7 ways, nor the sequence; the batch is 1."""
    on = replace(catalog.cluster("hgx-h100"), accelerators_per_node=7)
    step = train_step(replace(model("gpt2"), num_layers=5), len_seq=1023, global_batch=1)
    with pytest.raises(InfeasibleError, match=r"no plan divides .*batch 1 .*over 7 accelerators"):
        plan_parallelism(step, on=on)


@pytest.mark.parametrize("frac", [0.0, -1.0, 1.5, math.nan])
def test_a_fraction_of_memory_is_a_fraction(frac: float) -> None:
    step, on = question("gpt2", "hgx-h100", 1, 8)
    with pytest.raises(InputError, match="HBM fraction"):
        plan_parallelism(step, on=on, hbm_frac=frac)


def test_pins_keep_their_plans_only() -> None:
    step, on = question("llama3-8b", "hgx-h100", 1, 8)
    pinned = plan_parallelism(step, on=on, pins={"tp": 2, "zero_stage": 1})
    assert set(np.asarray(pinned.feasible.tp)) == {2.0}
    assert set(np.asarray(pinned.feasible.zero_stage)) == {1.0}
    free = plan_parallelism(step, on=on)
    mine = (np.asarray(free.feasible.tp) == 2) & (np.asarray(free.feasible.zero_stage) == 1)
    assert pinned.best.step.seconds == pytest.approx(free.seconds[mine].min(), rel=1e-9)
    with pytest.raises(InputError, match="a plan has no 'tensor'; pin one of dp, tp"):
        plan_parallelism(step, on=on, pins={"tensor": 2})
    with pytest.raises(InputError, match="tp=3 does not divide the 32 query heads"):
        plan_parallelism(step, on=on, pins={"tp": 3})


def test_selecting_keeps_fields_together() -> None:
    step, on = question("gpt2", "hgx-h100", 1, 8)
    space = plan_space(step, on=on)
    some = select(space, np.array([5, 0, 2]))
    assert [some.at(i) for i in range(3)] == [space.at(5), space.at(0), space.at(2)]
