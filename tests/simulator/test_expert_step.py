"""Steps of mixtures of experts: host, overlap, factors, gradients, prediction modules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.dtypes import BF16 as BITS
from hwmodels.dtypes import FP8
from hwmodels.errors import InputError
from simulator.exchange import EXPERT
from simulator.expert_exchange import FLAT
from simulator.expert_run import ExpertRun, module_shares
from simulator.grouped_products import grouped_seconds
from simulator.kernel_time.predict import predict
from simulator.pieces import GAPS, StepEstimate
from simulator.recipe import RECIPES
from simulator.stack import Factors, OnDevice, stack
from simulator.step import data_seconds, replicated_parameters, training_step
from simulator.timeline import simulate_training
from workloads.models.config import load_hf_config
from workloads.models.parameters import parameters_per_rank
from workloads.models.transformer import train_step
from workloads.ops.grouped_matmul import GroupedMatmul
from workloads.plan import Plan

QWEN = load_hf_config("examples/qwen3-30b-a3b.json")
DEEPSEEK = load_hf_config("examples/deepseek-v3.json")
NODE = catalog.cluster("hgx-h100")
NODES = catalog.cluster("hgx-h100", nodes=8)
PLAN = Plan(dp=8, ep=8, zero_stage=1)
BF16 = RECIPES["bf16-grad16"]


def step_of(run: ExpertRun | None, plan: Plan = PLAN, cfg: Any = QWEN, on: Any = NODE,
            batch: int = 32) -> StepEstimate:  # fmt: skip
    framework = None
    if run is not None:
        framework = OnDevice(stack=stack("megatron"), factors=Factors(), experts=run)
    one = train_step(cfg, len_seq=4096, global_batch=batch)
    return training_step(one, plan=plan, on=on, recipe=BF16, stack=framework)


def seconds(run: ExpertRun | None, plan: Plan = PLAN, **how: Any) -> float:
    return float(step_of(run, plan, **how).seconds)


# ---- what a framework adds -------------------------------------------------------------------


def test_the_host_is_a_floor() -> None:
    free = seconds(ExpertRun())
    busy = step_of(ExpertRun())
    assert seconds(ExpertRun(host_s=1e-4)) == free
    slow = step_of(ExpertRun(host_s=0.05))
    assert float(slow.seconds) > free
    passes = 48 * 4  # layers times micro-batches
    assert float(slow.seconds) == pytest.approx(
        passes * 0.05 + float(sum(v for k, v in busy.seconds_by_piece.items()
                                  if k in ("head", "embedding", "optimizer", "data parallel"))),
        rel=0.05,
    )  # fmt: skip
    assert float(slow.seconds_by_piece[GAPS]) > 0
    assert seconds(ExpertRun(host_s=0.05, graphs_frac=1.0)) == free
    half = seconds(ExpertRun(host_s=0.05, graphs_frac=0.5))
    assert half == pytest.approx(seconds(ExpertRun(host_s=0.025)), rel=1e-12)


def test_overlap_stays_between_hidden_and_exposed() -> None:
    for plan, on in ((PLAN, NODE), (Plan(dp=64, ep=64), NODES)):
        shown = step_of(ExpertRun(dispatcher=FLAT), plan, on=on, batch=64)
        hidden = step_of(ExpertRun(dispatcher=FLAT, overlapped=True), plan, on=on, batch=64)
        exchange = float(shown.seconds_by_piece[EXPERT])
        assert exchange > 0
        assert float(shown.seconds) - exchange <= float(hidden.seconds) <= float(shown.seconds)


def test_experts_kernels_take_their_factor() -> None:
    once, twice = (step_of(ExpertRun(kernels=k)).seconds_by_piece["moe"] for k in (1.0, 2.0))
    assert float(twice) == pytest.approx(2 * float(once), rel=1e-9)


@pytest.mark.parametrize("run", [None, ExpertRun(dispatcher=FLAT), ExpertRun(host_s=5e-3)])
def test_time_grows_with_imbalance_and_capacity(run: ExpertRun | None) -> None:
    times = [
        seconds(run, cfg=replace(QWEN, moe=replace(QWEN.moe, imbalance=load)))
        for load in (1.0, 1.2, 2.0)
    ]
    assert times[0] < times[1] < times[2]


def test_capacity_replaces_imbalance() -> None:
    padded = replace(QWEN, moe=replace(QWEN.moe, capacity_factor=1.0, imbalance=2.0))
    run = ExpertRun(dispatcher=FLAT)
    assert seconds(run, cfg=padded) == pytest.approx(seconds(run), rel=1e-12)


def test_a_plan_that_does_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="ep must divide the 128 experts"):
        seconds(None, Plan(dp=8, ep=3))


def test_a_rank_of_one_exchanges_nothing() -> None:
    assert float(step_of(ExpertRun(), Plan(dp=8, ep=1)).seconds_by_piece[EXPERT]) == 0


# ---- gradients -------------------------------------------------------------------------------


def test_expert_gradients_are_reduced_over_their_own_replicas() -> None:
    plan = Plan(dp=16, tp=2, ep=8, etp=1, zero_stage=1)
    dense, experts = replicated_parameters(QWEN, plan)
    held, _ = parameters_per_rank(QWEN, plan)
    assert dense == (held.dense, 16, 2)
    assert experts == (held.experts, 4, 8)
    alone = replicated_parameters(QWEN, replace(plan, ep=32))[1]
    assert alone[1:] == (1, 32)
    reduce_s, _ = data_seconds(QWEN, plan, NODES, BF16)
    less_s, _ = data_seconds(QWEN, replace(plan, ep=32), NODES, BF16)
    assert less_s < reduce_s


# ---- recomputation of modules ----------------------------------------------------------------


def test_modules_are_nodes_of_a_layer() -> None:
    nodes = (
        train_step(DEEPSEEK, len_seq=64, global_batch=8)
        .layer("moe", Plan())
        .select(phase="forward")
    )
    shares = module_shares(nodes, ("mla_up_proj", "moe_act"))
    assert [n.name for n, s in zip(nodes, shares, strict=True) if s] == [
        "q_b", "kv_b", "rope", "experts.activation",
    ]  # fmt: skip
    with pytest.raises(InputError, match="no module 'mlp_act'"):
        module_shares(nodes, ("mlp_act",))
    with pytest.raises(InputError, match="graphs_frac"):
        ExpertRun(graphs_frac=1.5)


# ---- multi-token prediction ------------------------------------------------------------------


@pytest.mark.parametrize("run", [None, ExpertRun(), ExpertRun(host_s=0.02, kernels=2.0)])
def test_a_module_costs_about_a_layer_and_a_head(run: ExpertRun | None) -> None:
    plan = Plan(dp=64, ep=64)
    without = step_of(run, plan, cfg=DEEPSEEK, on=NODES, batch=64)
    with_mtp = step_of(run, plan, cfg=replace(DEEPSEEK, num_mtp=1), on=NODES, batch=64)
    ends = sum(float(without.seconds_by_piece[k]) for k in ("head", "embedding"))
    layer_s = (float(without.seconds) - ends) / 61
    added = float(with_mtp.seconds - without.seconds)
    assert 0.9 * layer_s < added < 2.5 * layer_s + 2 * ends


def test_the_timeline_agrees_with_the_analytic_step() -> None:
    cfg = replace(DEEPSEEK, num_mtp=1, num_layers=8,
                  moe=replace(DEEPSEEK.moe, layers=tuple(range(1, 8))))  # fmt: skip
    run = OnDevice(stack=stack("megatron"), factors=Factors(),
                   experts=ExpertRun(host_s=5e-3, kernels=1.5))  # fmt: skip
    one = train_step(cfg, len_seq=4096, global_batch=64)
    for plan in (Plan(dp=8, ep=8), Plan(dp=4, pp=2, ep=4)):
        found = simulate_training(one, plan=plan, on=NODE, recipe=BF16, stack=run)
        analytic = training_step(one, plan=plan, on=NODE, recipe=BF16, stack=run)
        assert found.seconds == pytest.approx(float(analytic.seconds), rel=0.05)


def test_arrays_of_plans_agree_with_single_plans() -> None:
    one = train_step(QWEN, len_seq=4096, global_batch=64)
    run = OnDevice(stack=stack("megatron"), factors=Factors(),
                   experts=ExpertRun(host_s=8e-3, kernels=1.5))  # fmt: skip
    plans = Plan(dp=np.array([8.0, 4.0, 4.0]), tp=np.array([1.0, 2.0, 2.0]),
                 ep=np.array([8.0, 4.0, 8.0]), etp=np.array([0.0, 0.0, 1.0]))  # fmt: skip
    many = training_step(one, plan=plans, on=NODE, recipe=BF16, stack=run)
    for i in range(3):
        alone = training_step(one, plan=plans.at(i), on=NODE, recipe=BF16, stack=run)
        assert float(np.asarray(many.seconds)[i]) == pytest.approx(float(alone.seconds), rel=1e-9)


# ---- grouped products ------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["h100-sxm", "b200-sxm", "a100-sxm4-80gb"])
@pytest.mark.parametrize("dtype", [BITS, FP8])
def test_the_faster_way_counts(device: str, dtype: Any) -> None:
    on = catalog.device(device)
    if dtype == FP8 and device.startswith("a100"):
        return
    op = GroupedMatmul(batch=16, m=2048, n=1536, k=2048, dtype=dtype, out_dtype=BITS)
    found = float(grouped_seconds(op, on=on))
    assert 0 < found <= float(predict(op, on=on).seconds)
    peak = on.matmul_rate_flops_per_s(dtype)[0]
    assert found > 16 * 2 * 2048 * 1536 * 2048 / peak
    assert float(grouped_seconds(replace(op, m=4096), on=on)) > found


def test_grouped_products_grow_with_every_size() -> None:
    on = catalog.device("h100-sxm")
    base = GroupedMatmul(batch=8, m=1000, n=1000, k=1000)
    before = float(predict(base, on=on).seconds)
    for name in ("batch", "m", "n", "k"):
        more = replace(base, **{name: 2 * getattr(base, name)})
        assert float(predict(more, on=on).seconds) > before
    wide = GroupedMatmul(batch=8, m=np.array([100.0, 1000.0]), n=1000, k=1000)
    assert predict(wide, on=on).seconds[1] == pytest.approx(before)
