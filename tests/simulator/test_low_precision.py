"""Recipes of low-precision training: what is cast, how often, and what it takes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import catalog
from hwmodels.dtypes import FP8, NVFP4
from hwmodels.errors import InputError, UnsupportedError
from simulator.exchange import TENSOR, layer_exchanges
from simulator.low_precision import QUANTISE, narrowed, weight_casts
from simulator.planners.parallelism import plan_parallelism
from simulator.recipe import RECIPES, narrow_frac, recipe
from simulator.stack import OnDevice, factors_of, stack
from simulator.step import training_step
from workloads.models.config import load_hf_config
from workloads.models.transformer import TrainStep, prefill_step
from workloads.ops.matmul import Matmul
from workloads.ops.quantise_tensor import QuantiseTensor
from workloads.ops.quantised_matmul import QuantisedMatmul
from workloads.plan import Plan
from workloads.workload import Workload

LLAMA = load_hf_config("examples/llama3-8b.json")
STEP = TrainStep(config=LLAMA, len_seq=8192, global_batch=16)
H100, B200 = catalog.device("h100-sxm"), catalog.device("b200-sxm")
NARROW = [name for name, r in RECIPES.items() if r.low is not None]
HOPPER = [n for n in NARROW if n.startswith("fp8")]


def layer(name: str, *, tp: int = 1, device: str = "h100-sxm") -> Workload:
    plan = Plan(tp=tp)
    return recipe(name).layer(STEP, "dense", plan, on=catalog.device(device))


def cast_bytes(work: Workload, operand: str = "") -> float:
    """Bytes that kernels which cast move in a layer."""
    nodes = [n for n in work if n.part == QUANTISE and operand in n.name]
    return float(sum(n.op.work(2**26).bytes * n.count for n in nodes))


def on_cluster(name: str, plan: Plan, framework: str = "torchtitan-compiled") -> float:
    on = catalog.cluster("hgx-h100")
    built = OnDevice(stack=stack(framework), factors=factors_of(stack(framework), on.device, {}))
    found = training_step(STEP, plan=plan, on=on, recipe=recipe(name), stack=built)
    return float(found.seconds)


def test_every_linear_product_is_narrow_and_nothing_else() -> None:
    wide, narrow = layer("bf16-grad16"), layer("fp8-tensorwise")
    for node in wide:
        changed = narrow[node.name].op
        linear = isinstance(node.op, Matmul)
        assert isinstance(changed, QuantisedMatmul) == linear
        if isinstance(changed, QuantisedMatmul) and isinstance(node.op, Matmul):
            assert not changed.quantises  # its casts are nodes of their own
            assert changed.min_flops()[FP8] == sum(node.op.min_flops().values())
        elif not linear:
            assert changed == node.op
    ends = STEP.ends(Plan())
    assert not any(isinstance(n.op, QuantisedMatmul) for n in ends)


def test_casts_of_delayed_scaling_by_hand() -> None:
    """Cast and transposed in one kernel: 2 + 1 + 1 bytes of every X, dY and W of a layer."""
    t, h, f, qkv = 8192, 4096, 14336, 6144
    x = t * (h + h + h + f)
    dy = t * (qkv + h + 2 * f + h)
    w = h * qkv + h * h + 3 * h * f
    assert cast_bytes(layer("fp8-delayed")) == 4 * (x + dy + w)


def test_the_largest_magnitude_costs_one_more_reading() -> None:
    delayed, current = layer("fp8-delayed"), layer("fp8-current")
    assert cast_bytes(current, ".x") == cast_bytes(delayed, ".x") * 6 / 4


def test_blackwell_takes_operands_of_one_scale_in_any_layout() -> None:
    hopper, blackwell = layer("fp8-current"), layer("fp8-current", device="b200-sxm")
    assert cast_bytes(blackwell, ".x") == cast_bytes(hopper, ".x") * 5 / 6
    assert not any("across" in n.name for n in blackwell)
    along_and_across = layer("mxfp8", device="b200-sxm")
    sizes = 2 + 2 * recipe("mxfp8").low.stored.bytes_per_element  # type: ignore[union-attr]
    assert cast_bytes(along_and_across, ".x") == pytest.approx(
        cast_bytes(blackwell, ".x") / 5 * sizes
    )


def test_rowwise_reads_all_gathered_tokens_on_every_rank() -> None:
    """X of products split by columns and dY of those split by rows: not divided by tp."""
    one, eight = layer("fp8-rowwise"), layer("fp8-rowwise", tp=8)
    for whole in ("qkv.x", "up.x", "out.wgrad.dy", "down.wgrad.dy"):
        assert cast_bytes(eight, whole) == cast_bytes(one, whole) > 0
    for own in ("out.x", "down.x", "qkv.wgrad.dy", "up.wgrad.dy"):
        assert cast_bytes(eight, own) == pytest.approx(cast_bytes(one, own) / 8, rel=1e-6)


def test_cast_before_the_gather_divides_all_but_the_copy_across() -> None:
    one, eight = layer("fp8-tensorwise"), layer("fp8-tensorwise", tp=8)
    elements = 8192 * 4096
    assert cast_bytes(one, "qkv.x") == elements * (2 + 2 + 1)
    assert cast_bytes(eight, "qkv.x") == elements * (2 + 2 + 1) / 8
    assert cast_bytes(eight, "qkv.wgrad.x_across") == elements * 2
    assert cast_bytes(one, "qkv.wgrad.x_again") == elements * 3  # from bf16, the scale is known


def test_plans_as_arrays_are_cast_as_one_by_one() -> None:
    plans = Plan(tp=np.array([1.0, 8.0]))
    both = recipe("fp8-tensorwise").layer(STEP, "dense", plans, on=H100)
    each = [cast_bytes(layer("fp8-tensorwise", tp=tp)) for tp in (1, 8)]
    found = sum(n.op.work(2**26).bytes * n.count for n in both if n.part == QUANTISE)
    assert found == pytest.approx(each)


def test_weights_are_cast_in_shards_or_in_every_pass() -> None:
    tensor, row = recipe("fp8-tensorwise").low, recipe("fp8-rowwise").low
    assert tensor is not None and row is not None
    assert weight_casts(10**6, 8, row, H100) == ()
    own, turned = weight_casts(10**6, 8, tensor, H100)
    assert own.num_elements == 10**6 / 8 and turned.work(2**20).bytes == 2 * 10**6
    assert len(weight_casts(10**6, 8, tensor, B200)) == 1


def test_gathers_move_narrow_elements_where_the_framework_casts_before() -> None:
    tensor, row = recipe("fp8-tensorwise"), recipe("fp8-rowwise")
    share = narrow_frac(LLAMA)
    assert tensor.gathered_bytes(LLAMA) == pytest.approx(share + 2 * (1 - share))
    assert row.gathered_bytes(LLAMA) == 2
    sizes = {}
    for r in (tensor, row):
        exchanges = layer_exchanges(
            LLAMA, "dense", len_seq=8192, plan=Plan(tp=8), element_bytes=2,
            gathered_bytes=r.gathered_activation_bytes(),
        )  # fmt: skip
        sizes[r.name] = {
            e.collective.kind: e.collective.num_bytes for e in exchanges if e.piece == TENSOR
        }
    assert sizes["fp8-tensorwise"]["all_gather"] == sizes["fp8-rowwise"]["all_gather"] / 2
    assert sizes["fp8-tensorwise"]["reduce_scatter"] == sizes["fp8-rowwise"]["reduce_scatter"]


def test_rowwise_takes_longer_than_tensorwise_and_more_so_under_tensor_parallelism() -> None:
    plans = (Plan(dp=8, zero_stage=3), Plan(tp=8, micro_batch=16))
    ratios = [on_cluster("fp8-rowwise", p) / on_cluster("fp8-tensorwise", p) for p in plans]
    assert 1.05 < ratios[0] < ratios[1] < 1.6


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(HOPPER), tp=st.sampled_from([1, 2, 4, 8]), dp=st.sampled_from([1, 2, 4]),
    zero=st.sampled_from([0, 1, 3]),
)  # fmt: skip
def test_a_narrow_step_is_faster_than_bf16_but_by_less_than_two(
    name: str, tp: int, dp: int, zero: int
) -> None:
    plan = Plan(tp=tp, dp=min(dp, 8 // tp), micro_batch=2, zero_stage=zero)
    ratio = on_cluster("bf16-grad16", plan) / on_cluster(name, plan)
    assert 0.75 < ratio < 2


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(NARROW), tp=st.sampled_from([1, 2, 8]))
def test_casts_read_and_write_at_least_every_operand_once(name: str, tp: int) -> None:
    work = layer(name, tp=tp, device="b200-sxm" if name not in HOPPER else "h100-sxm")
    casts = [n for n in work if n.part == QUANTISE]
    assert casts and all(isinstance(n.op, QuantiseTensor) for n in casts)
    assert len({n.name for n in work}) == len(work)
    products = sum(isinstance(n.op, QuantisedMatmul) for n in work)
    assert products == 3 * 4


def test_a_recipe_may_leave_weight_gradients_wide() -> None:
    low = recipe("fp8-rowwise").low
    assert low is not None
    part = replace(low, products=("forward", "dgrad"))
    work = narrowed(STEP.layer("dense", Plan()), part, plan=Plan(), device=H100)
    assert isinstance(work["up.wgrad"].op, Matmul) and not any("x_a" in n.name for n in work)
    assert isinstance(work["up.dgrad"].op, QuantisedMatmul)
    assert any(n.name == "up.dgrad.dy" for n in work)


@pytest.mark.parametrize(
    ("name", "device"), [("fp8-tensorwise", "a100-sxm4-80gb"), ("nvfp4", "h100-sxm"),
                         ("mxfp8", "h100-sxm"), ("mxfp4", "h100-sxm")],
)  # fmt: skip
def test_a_device_without_the_format_is_told_in_a_line(name: str, device: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{device} has no .*; choose a recipe") as error:
        layer(name, device=device)
    assert "\n" not in str(error.value)


def test_nvfp4_products_run_at_four_bits() -> None:
    op = layer("nvfp4", device="b200-sxm")["up"].op
    assert isinstance(op, QuantisedMatmul) and op.dtype == NVFP4


def test_a_recipe_of_training_does_not_serve() -> None:
    serve = prefill_step(LLAMA, batch=1, len_context=1024)
    with pytest.raises(InputError, match="says how a model is trained"):
        plan_parallelism(serve, on=catalog.cluster("hgx-h100"), recipe=recipe("fp8-tensorwise"))
