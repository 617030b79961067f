"""Frameworks: which factor a kernel gets, what a device without a fit gets, limits of the step."""

from __future__ import annotations

import dataclasses

import pytest

from hwmodels import catalog
from hwmodels.dtypes import BF16
from hwmodels.errors import UnknownNameError
from simulator.kernel_time.predict import CALIBRATED, predict
from simulator.pieces import OPTIMIZER_STEP, stack_seconds
from simulator.recipe import RECIPES
from simulator.stack import (
    ATTENTION,
    POINTWISE,
    PRODUCT,
    SCORES,
    STACKS,
    Factors,
    OnDevice,
    class_of,
    factor_names,
    factors_of,
    prior_of,
    stack,
)
from simulator.step import training_step
from workloads.models.config import load_hf_config
from workloads.models.transformer import train_step
from workloads.ops.attention import StandardAttention
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.matmul import Matmul
from workloads.ops.norm import RmsNorm
from workloads.plan import Plan, Recompute

H100 = catalog.device("h100-sxm")
NODE = catalog.cluster("hgx-h100")
STEP = train_step(load_hf_config("examples/llama3-8b.json"), len_seq=4096, global_batch=64)


def seconds(plan: Plan, name: str = "torchtitan-compiled", **factors: float) -> float:
    on_device = OnDevice(stack=STACKS[name], factors=Factors(**factors))
    e = training_step(STEP, plan=plan, on=NODE, recipe=RECIPES["bf16"], stack=on_device)
    assert e.rung == CALIBRATED
    return float(e.seconds)


def test_classes_of_kernels() -> None:
    shape = {"num_heads": 8, "len_q": 512, "head_dim": 64}
    assert class_of(Matmul(m=8, n=8, k=8)) == PRODUCT
    assert class_of(FlashAttention2(**shape)) == ATTENTION
    assert class_of(RmsNorm(rows=8, cols=8)) == POINTWISE


def test_unfused_attention_is_products_and_scores() -> None:
    op = StandardAttention(num_heads=8, len_q=512, head_dim=64)
    factors = Factors(product=2.0, scores=3.0)
    found = stack_seconds(op, on=H100, stack=OnDevice(stack=STACKS["megatron-2022"],
                                                      factors=factors))  # fmt: skip
    assert [name for name, _ in found] == [PRODUCT, SCORES, PRODUCT]
    alone = [float(predict(s.op, on=H100).seconds) for s in op.stages()]
    assert [float(t) for _, t in found] == pytest.approx([2 * alone[0], 3 * alone[1], 2 * alone[2]])


def test_without_factors_the_kernels_are_those_of_the_models() -> None:
    op = Matmul(m=4096, n=4096, k=4096, dtype=BF16)
    plain = OnDevice(stack=STACKS["megatron"], factors=Factors())
    ((_, found),) = stack_seconds(op, on=H100, stack=plain)
    assert found == predict(op, on=H100).seconds


@pytest.mark.parametrize(
    "name", ["product", "attention", "pointwise", "optimizer", "layer_s", "tensor", "exposed"]
)
def test_a_larger_factor_never_makes_a_step_faster(name: str) -> None:
    plan = Plan(dp=2, tp=4, micro_batch=1, zero_stage=3)
    base = getattr(Factors(), name)
    more = base * 2 if base else 1e-3 if name == "layer_s" else 1.0
    assert seconds(plan, **{name: more}) > seconds(plan)


def test_recomputation_costs_what_it_runs_again() -> None:
    plan = Plan(dp=8, micro_batch=1, zero_stage=3)
    none, some, full = (
        seconds(dataclasses.replace(plan, recompute=r))
        for r in (Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL)
    )
    assert none < some < full < 1.36 * none
    # Without fused attention, selective recomputation repeats attention's own kernels alone.
    again = seconds(dataclasses.replace(plan, recompute=Recompute.SELECTIVE), "megatron-2022")
    assert (
        seconds(plan, "megatron-2022")
        < again
        < seconds(dataclasses.replace(plan, recompute=Recompute.FULL), "megatron-2022")
    )


def test_the_optimizer_has_a_factor_of_its_own() -> None:
    plan = Plan(dp=8, micro_batch=1, zero_stage=1)

    def update(**factors: float) -> float:
        on_device = OnDevice(stack=STACKS["megatron"], factors=Factors(**factors))
        e = training_step(STEP, plan=plan, on=NODE, recipe=RECIPES["bf16"], stack=on_device)
        return float(e.seconds_by_piece[OPTIMIZER_STEP])

    assert update(optimizer=3.0, pointwise=2.0) == pytest.approx(3 * update())


def test_a_step_is_never_faster_than_its_bound() -> None:
    plan = Plan(dp=2, tp=2, pp=2, micro_batch=1, interleave=2)
    bound = training_step(STEP, plan=plan, on=NODE, recipe=RECIPES["bf16"])
    assert seconds(plan) > float(bound.lower_s)


def test_a_device_without_a_fit_has_its_kin_s_factor_and_its_own_power() -> None:
    framework, values = stack("megatron"), {"product/h100-sxm": 1.3}
    h200 = factors_of(framework, catalog.device("h200-sxm"), values)
    assert h200.product == pytest.approx(1.3)  # the same power
    slow = factors_of(framework, catalog.device("h100-sxm-96gb"), values)
    assert slow.product == pytest.approx(1.3 * (700 / 500) ** 0.4)
    other = factors_of(framework, catalog.device("b200-sxm"), values)
    assert other.product == prior_of("product/b200-sxm")[0]


def test_every_framework_names_factors_that_have_priors() -> None:
    for framework in STACKS.values():
        for name in factor_names(framework, H100):
            value, spread = prior_of(name)
            assert value > 0 and spread > 0


def test_an_unknown_framework_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="stack 'megatrom'; did you mean"):
        stack("megatrom")
