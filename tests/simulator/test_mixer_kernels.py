"""Serving of scans and convolutions: their kernels, their states, what their ranks exchange."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.dtypes import BF16, FP8
from hwmodels.errors import InputError
from simulator.exchange import TENSOR, layer_exchanges
from simulator.inference import inference_step
from simulator.mixer_kernels import CONVOLUTION, SCAN, mixer_kernels, pass_kernels
from simulator.recipe import RECIPES
from simulator.serving import Load, forward_pass, least_s
from simulator.serving_estimate import estimate_serving
from simulator.serving_kernels import ENGINES, Batch, Formats, Layout, Linear, Served
from simulator.serving_memory import cache_bytes, paged, state_bytes, weight_bytes
from workloads.models.config import load_hf_config
from workloads.models.parameters import count_parameters
from workloads.models.transformer import decode_step
from workloads.ops.collective_transfer import CustomAllReduce
from workloads.ops.matmul import Matmul
from workloads.ops.selective_scan import SelectiveScan
from workloads.ops.selective_scan_backward import SelectiveScanBackward, SelectiveStep
from workloads.plan import Plan

NAMES = ("bamba-9b", "jamba-v0.1", "qwen3-next-80b-a3b", "lfm2-1.2b")
MIXED = Batch(num_prompts=1, len_prompt=512, num_decoding=8, len_context=1000)


def served(name: str, *, formats: Formats | None = None, **split: int) -> Served:
    config = load_hf_config(f"examples/{name}.json")
    tp = split.get("tp", 1)
    layout = Layout(**split, moe_tp=tp) if config.moe else Layout(**split)
    return Served(
        config=config, device=catalog.device("h200-sxm"), engine=ENGINES["vllm"],
        formats=formats or Formats(), layout=layout,
    )  # fmt: skip


# ---- kernels -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_prompts_and_decoding_have_kernels_of_their_own(name: str) -> None:
    found = list(mixer_kernels(served(name), MIXED))
    convs = [k.op for k in found if k.part == CONVOLUTION]
    assert [(c.update, c.batch, c.len_seq) for c in convs] == [(True, 8, 1), (False, 1, 512)]
    scans = [k.op.name for k in found if k.part == SCAN]
    assert len(scans) == (0 if name == "lfm2-1.2b" else 2)
    rows = {k.op.m for k in found if isinstance(k.op, Matmul)}
    assert rows == {520}


def test_products_have_the_weights_of_a_rank() -> None:
    whole, half = (
        sum(k.op.n * k.op.k for k in mixer_kernels(served("jamba-v0.1", tp=tp), MIXED)
            if isinstance(k.op, Matmul))
        for tp in (1, 2)
    )  # fmt: skip
    assert whole == 2 * half == 4096 * 16384 + 8192 * 288 + 256 * 8192 + 8192 * 4096


def test_mamba_sums_its_narrow_product_too() -> None:
    tokens = Batch(num_decoding=8, len_context=1000)
    sizes = [
        k.op.num_bytes for k in mixer_kernels(served("jamba-v0.1", tp=2), tokens)
        if isinstance(k.op, CustomAllReduce)
    ]  # fmt: skip
    assert sizes == [8 * 288 * 2, 8 * 4096 * 2]


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_has_every_layer_once(name: str) -> None:
    one = served(name)
    cfg = one.config
    found = list(pass_kernels(one, Batch(num_decoding=4, len_context=100)))
    convs = sum(k.times for k in found if k.part == CONVOLUTION)
    attended = sum(k.times for k in found if k.part == "attention")
    assert (convs, attended) == (cfg.num_mixer_layers, cfg.num_attention_layers)


# ---- memory --------------------------------------------------------------------------------


def test_states_take_no_pages() -> None:
    """Bamba: pages of 3 layers; 29 states of 128 x 128 x 64 fp32, 3 inputs of 8448 channels."""
    one = served("bamba-9b")
    states = 29 * (128 * 128 * 64 * 4 + 3 * 8448 * 2)
    assert state_bytes(one) == pytest.approx(states)
    assert cache_bytes(one, 1000) == 3 * 1000 * 2 * 8 * 128 * 2
    found = paged(one, isl=1000, osl=200)
    room = 0.9 * one.device.hbm.capacity_bytes - weight_bytes(one)
    longest = 3 * 75 * 16 * 4096 + states
    assert found.safe_requests == int(room / longest)
    assert found.state_bytes == pytest.approx(states)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_all_parameters_but_norms(name: str) -> None:
    one = served(name)
    count = count_parameters(one.config)
    assert weight_bytes(one) == 2 * (count.total - count.norms)


def test_a_model_without_attention_has_no_pages() -> None:
    cfg = load_hf_config("examples/bamba-9b.json")
    alone = replace(served("bamba-9b"), config=replace(cfg, mixer_layers=tuple(range(32))))
    found = paged(alone, isl=1000, osl=1000)
    assert (found.num_pages, found.page_bytes, found.waste_frac) == (0, 0.0, 0.0)
    longer = paged(alone, isl=100_000, osl=1000)
    assert found.safe_requests == longer.safe_requests > 100


@pytest.mark.parametrize("name", NAMES)
def test_no_step_is_faster_than_its_bytes(name: str) -> None:
    one = served(name, tp=2)
    load = Load(concurrency=8, isl=2000, osl=100)
    found = estimate_serving(one, load)
    assert least_s(one, load) < found.tpot_s
    more = estimate_serving(one, replace(load, concurrency=32))
    assert more.tpot_s > found.tpot_s and more.tokens_per_s > found.tokens_per_s


def test_narrow_projections_are_narrow() -> None:
    eight = Linear(dtype=FP8)
    formats = Formats(attention=eight, mlp=eight, experts=eight, cache=FP8)
    wide, narrow = (
        forward_pass(served("bamba-9b", formats=f), Batch(num_decoding=8, len_context=100)).parts
        for f in (Formats(), formats)
    )
    assert dict(narrow)["mixer"] < 0.7 * dict(wide)["mixer"]
    assert dict(narrow)[SCAN] == dict(wide)[SCAN]


def test_ranks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match="3 tensor parallel ranks do not divide 32 heads of"):
        served("lfm2-1.2b", tp=3)


# ---- plans ---------------------------------------------------------------------------------


def test_a_long_context_costs_attention_alone() -> None:
    """On the bound rung: twice the context adds the cache of the attention layers, no more."""
    cfg, on = load_hf_config("examples/bamba-9b.json"), catalog.cluster("dgx-h100")
    steps = [
        inference_step(decode_step(cfg, batch=8, len_context=n), plan=Plan(dp=8), on=on,
                       recipe=RECIPES["bf16"]).seconds_by_piece
        for n in (32768, 65536)
    ]  # fmt: skip
    assert steps[1]["mixer"] == steps[0]["mixer"]
    added = 8 * 32768 * 3 * 2 * 8 * 128 * 2 / 3.35e12
    assert steps[1]["attention"] - steps[0]["attention"] == pytest.approx(added, rel=0.01)


def test_a_mambas_ranks_sum_inside_the_layer() -> None:
    cfg = load_hf_config("examples/jamba-v0.1.json")
    asked = {"len_seq": 4096, "plan": Plan(tp=2, micro_batch=3), "element_bytes": 2}
    plain, mixed = (layer_exchanges(cfg, k, **asked) for k in ("dense", "dense mamba"))  # type: ignore[arg-type]
    assert len(mixed) == len(plain) + 1
    (inside,) = [e for e in mixed if e.collective.kind == "all_reduce"]
    assert (inside.piece, inside.forward, inside.backward) == (TENSOR, 1, 1)
    assert inside.collective.num_bytes == 3 * 4096 * (256 + 2 * 16) * 2


# ---- the ops beside --------------------------------------------------------------------------


def test_a_step_is_a_scan_of_one_and_its_states() -> None:
    one = SelectiveStep(batch=4, channels=64, state_dim=16)
    scan = SelectiveScan(batch=4, len_seq=1, channels=64, state_dim=16)
    work = one.work(0)
    assert work.bytes == scan.compulsory_bytes() + 2 * 4 * 64 * 16 * 4
    assert (work.vector_flops, work.special_ops) == (scan.vector_flops(), scan.special_ops())


def test_a_backward_scan_is_priced_by_its_flops() -> None:
    op = SelectiveScanBackward(batch=2, len_seq=128, channels=64, state_dim=16)
    (stage,) = op.stages()
    assert stage.times == (19 * 16 + 16) / (6 * 16 + 7)
    moved = 128 * 2 * 64 * 2 * (3 + 1 + 3) + 2 * 128 * 2 * 16 * (2 + 4) + 2 * 64 * 17 * 4
    assert op.work(0).bytes == moved
    many = op.over(channels=np.array([64, 128]))
    assert many.work(0).bytes[0] == moved and many.dtype == BF16
