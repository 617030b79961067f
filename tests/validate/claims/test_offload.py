"""Claims on caches that leave the device, on settings of our own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hwmodels import catalog
from hwmodels.dtypes import BF16, FP16
from validate.claims import offload
from validate.claims.claim import Claim, Value
from validate.claims.evaluate import NOT_MODELLED, evaluate
from validate.claims.models import model_named
from validate.claims.offload import (
    ACCELERATE,
    DEEPSPEED,
    FETCH_BYTES_PER_S,
    FLEXGEN,
    H2O,
    Generation,
    cache_bytes,
    generation_seconds,
    layer_elements,
    shadow_kv,
    step_ops,
    weight_bytes,
)

SHADOW: dict[str, Any] = {
    "gpu": "A100-80GB", "dtype": "bf16", "model": "Llama-3.1-8B", "kv_heads": 8, "seq": 90 * 1024,
    "batch": 6, "sparse_budget": "1.56% (2048 at 128K), rank 160, chunk 8",
}  # fmt: skip
TABLE: dict[str, Any] = {
    "gpu": "T4-16GB", "model": "OPT-6.7B", "prompt": 256, "new": 64, "batch": "3,G",
    "dtype": "fp16",
}  # fmt: skip


def claim(system: str, quantity: str, **setting: object) -> Claim:
    return Claim(
        id=system, family="kv_compression", quantity=quantity, unit="tokens/s", kind="latency",
        published=1.0, setting=setting,
    )  # fmt: skip


def shadow(quantity: str, **change: object) -> float:
    return number(offload.evaluate_shadowkv(claim("shadowkv", quantity, **(SHADOW | change))))


def table(system: str, **change: object) -> float:
    quantity = f"throughput OPT-6.7B {system}"
    return number(offload.evaluate_h2o(claim("h2o", quantity, **(TABLE | change))))


def number(value: Value) -> float:
    assert isinstance(value, float)
    return value


def cell(impl: str, **change: Any) -> Generation:
    fields: dict[str, Any] = {
        "model": model_named("OPT-30B"), "impl": impl, "batch": 48, "prompt": 512, "new": 32,
        "offload": True, "on": catalog.device("t4"),
    }  # fmt: skip
    return Generation(**(fields | change))


# ---- ShadowKV ------------------------------------------------------------------------------


def test_the_paper_s_roofline_by_hand() -> None:
    bytes_of_a_sequence = 2 * 32 * 8 * 128 * 2 * 90 * 1024
    assert cache_bytes(model_named("Llama-3.1-8B"), 90 * 1024, BF16) == bytes_of_a_sequence
    found = shadow("full attention, infinite batch", batch="inf")
    assert found == pytest.approx(2**41 / bytes_of_a_sequence, rel=1e-12)


def test_full_attention_reads_weights_and_cache() -> None:
    few, many = (shadow("decode throughput full attention", batch=n) for n in (1, 6))
    least = cache_bytes(model_named("Llama-3.1-8B"), 90 * 1024, BF16)
    assert many < 6 * few
    assert 6 / many > (6 * least + 15e9) / 2.039e12
    assert shadow("full attention, infinite-memory hypothetical", batch=24) < 1.2 * many


def test_a_shadow_is_faster_where_it_fits_more_sequences() -> None:
    full = shadow("decode throughput full attention")
    own = shadow("decode throughput ShadowKV", batch=36)
    assert 2 * full < own < 6 * full
    assert shadow("decode throughput ShadowKV", batch=36, sparse_budget="6.25%") < 0.5 * own


def test_the_budget_of_a_setting_is_read() -> None:
    model = model_named("Llama-3.1-8B")
    op = shadow_kv(model, 1, 131072, BF16, "3.125%, rank 64, chunk 16")
    assert (op.num_selected, op.rank, op.chunk) == (256, 64, 16)
    usual = shadow_kv(model, 1, 100_000, BF16)  # of 128 Ki
    assert (usual.num_selected, usual.rank, usual.chunk) == (256, 160, 8)


# ---- H2O -----------------------------------------------------------------------------------


def test_on_the_device_a_step_reads_the_weights() -> None:
    one = generation_seconds(cell(FLEXGEN, model=model_named("OPT-6.7B"), batch=1, offload=False))
    assert one > 31 * 13.2e9 / 220e9
    assert table("FlexGen") > table("Accelerate")  # which copies the cache in every step
    assert table("H2O 20%", new=1024) > table("FlexGen", new=1024)
    assert table("H2O 20%", new=1024) > table("H2O 60%", new=1024)


def test_fetched_weights_cross_the_link_in_every_step() -> None:
    for impl in (ACCELERATE, DEEPSPEED):
        one = cell(impl, batch=4)
        fetched = weight_bytes(one) / FETCH_BYTES_PER_S[impl]
        assert generation_seconds(one) >= 32 * fetched * (1 - 1e-9)
        longer = generation_seconds(replace(one, new=64)) - generation_seconds(one)
        assert longer == pytest.approx(32 * fetched, rel=0.1)
    assert table("DeepSpeed", batch="16,C") < table("DeepSpeed", batch="16,G")


def test_a_block_waits_for_its_weights_and_the_host_s_attention() -> None:
    model = model_named("OPT-30B")
    assert layer_elements(model) == 12 * 7168**2
    steps = [
        generation_seconds(cell(FLEXGEN, batch=b, new=33))
        - generation_seconds(cell(FLEXGEN, batch=b))
        for b in (1, 48, 144)
    ]
    link, layers = 12.89 * 2**30, 48
    weights = 0.8 * 24 * 7168**2 / link
    attention = 4 * 512 * 7168 / 12.3e9
    products = 24 * 7168**2 / 4.3e12
    for batch, step in zip((1, 48, 144), steps, strict=True):
        by_hand = layers * (weights + batch * (2 * 7168 / link + products + attention))
        assert step == pytest.approx(by_hand, rel=1e-9)


def test_fewer_rows_leave_the_host_less_to_attend_to() -> None:
    full, kept = cell(FLEXGEN, batch=144), cell(H2O, batch=144)
    flops = [sum(sum(op.min_flops().values()) for op in step_ops(c)) for c in (full, kept)]
    assert flops[1] / flops[0] == pytest.approx(109 / 512)
    assert generation_seconds(kept) < generation_seconds(full)


def test_ratios_of_the_abstract() -> None:
    gains = offload.evaluate_h2o(claim("h2o", "max throughput gains vs DeepSpeed"))
    assert isinstance(gains, tuple)
    assert 2 < gains[0] < 6 < 20 < gains[1] < 45
    setting = {"gpu": "A100", "model": "OPT-6.7B"}
    few, usual = (
        number(
            offload.evaluate_h2o(claim("h2o", "latency reduction at same batch", **setting, **s))
        )
        for s in ({"batch": 2}, {})
    )
    assert 1 < few < usual < 3


def test_the_number_format_counts() -> None:
    half = cell(ACCELERATE, batch=4)
    assert half.dtype == FP16
    assert weight_bytes(half) == pytest.approx(2 * 29.97e9, rel=0.01)


# ---- given up ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "quantity", "setting", "says"),
    [
        ("shadowkv", "decode throughput ShadowKV", {"batch": None}, "incomplete: no batch"),
        ("shadowkv", "decode throughput ShadowKV", {"seq": None}, "incomplete: no seq"),
        ("shadowkv", "decode throughput ShadowKV", {"model": "Phi-0"}, "no sizes are known"),
        ("shadowkv", "decode throughput ShadowKV", {"kv_heads": 7}, "has 8 key-value heads"),
        ("shadowkv", "accuracy on RULER", {}, "no rule for"),
        ("h2o", "throughput OPT-6.7B FlexGen", {"batch": None}, "incomplete: no batch"),
        ("h2o", "throughput OPT-6.7B FlexGen", {"prompt": None}, "incomplete: no prompt"),
        ("h2o", "throughput OPT-6.7B FlexGen", {"batch": "8,D"}, "G and C are modelled"),
        ("h2o", "throughput OPT-6.7B FlexGen", {"batch": "all,C"}, "is not a size"),
        ("h2o", "throughput OPT-6.7B", {}, "names no framework"),
        ("h2o", "perplexity of H2O", {}, "no rule for"),
        ("h2o", "throughput H2O", {"gpu": "A100", "batch": "8,C"}, "no rates are known of a host"),
    ],
)
def test_what_a_setting_leaves_open_is_not_guessed(
    system: str, quantity: str, setting: dict[str, object], says: str
) -> None:
    usual = SHADOW if system == "shadowkv" else TABLE
    verdict = evaluate(claim(system, quantity, **(usual | setting)))
    assert verdict.status == NOT_MODELLED
    assert says in verdict.reason
