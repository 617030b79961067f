"""Claims of FlashAttention and its block-sparse form, on settings of our own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hwmodels.dtypes import FP16
from validate.claims.claim import Claim, NotModelledError
from validate.claims.evaluate import NOT_MODELLED, evaluate
from validate.claims.flash_attention import (
    BACKWARD,
    BOTH,
    CALL_S,
    FLASH,
    FORWARD,
    KEY_BLOCK,
    MIB,
    PYTORCH,
    SPARSE,
    Call,
    evaluate_block_sparse_fa,
    evaluate_flash_attention,
    flops,
    fused,
    moved_bytes,
    peak_bytes,
)
from workloads.ops.block_sparse_attention import BlockSparseAttention

ROW: dict[str, Any] = {
    "gpu": "A100-40GB", "dtype": "fp16", "batch": 4, "heads": 12, "head_dim": 64, "seq": 3072,
    "impl": FLASH, "variant": "no mask, no dropout", "pass_": FORWARD,
}  # fmt: skip
CALL = Call(
    impl=FLASH, batch=2, heads=3, seq=512, head_dim=64, causal=False, masked=False, dropout=False,
    dtype=FP16,
)  # fmt: skip


def claim(quantity: str, **setting: Any) -> Claim:
    return Claim(
        id="flash_attention", family="attention", quantity=quantity, unit="ms", kind="latency",
        published=1.0, setting=setting,
    )  # fmt: skip


def runtime(**change: Any) -> float:
    setting = ROW | change
    run = evaluate_block_sparse_fa if setting["impl"] == SPARSE else evaluate_flash_attention
    found = run(claim("runtime", **setting))
    assert isinstance(found, float)
    return found


def test_fused_is_faster_than_unfused_and_a_block_mask_faster_still() -> None:
    times = [runtime(impl=i, pass_=BOTH) for i in (SPARSE, FLASH, "megatron", PYTORCH)]
    assert times == sorted(times)
    assert runtime(pass_=BACKWARD) > 2 * runtime()


def test_dense_attention_grows_with_the_square_and_masked_with_the_length() -> None:
    assert runtime(seq=16384) / runtime(seq=8192) == pytest.approx(4, rel=0.02)
    sparse = {"impl": SPARSE, "variant": "padding mask, no dropout"}
    ratio = runtime(**sparse, seq=2**17) / runtime(**sparse, seq=2**16)
    assert ratio == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("impl", [FLASH, PYTORCH])
@pytest.mark.parametrize("part", [FORWARD, BACKWARD])
def test_dropout_costs_and_a_mask_costs_what_is_not_fused(impl: str, part: str) -> None:
    plain, masked, dropped = (
        runtime(impl=impl, pass_=part, variant=variant)
        for variant in ("no mask, no dropout", "padding mask, no dropout", "dropout+padding mask")
    )
    assert dropped > 1.05 * masked
    assert (masked > 1.3 * plain) == (impl == PYTORCH)


def test_short_sequences_wait_for_the_host() -> None:
    assert runtime(impl=PYTORCH, seq=64) == runtime(impl=PYTORCH, seq=32) == 4 * CALL_S * 1e3


def test_arrays_at_the_peak_by_hand() -> None:
    unit, rows = 2 * 3 * 512 * 64 * 2, 2 * 3 * 512
    assert peak_bytes(CALL, BACKWARD) == 13 * unit + 8 * rows
    assert peak_bytes(replace(CALL, seq=256), BACKWARD) == 11 * unit / 2 + 4 * rows
    plain = replace(CALL, impl=PYTORCH)
    assert peak_bytes(plain, BACKWARD) == 10 * unit + 4 * 2 * 3 * 512**2 * 2
    memory = evaluate_flash_attention(claim("peak memory", **(ROW | {"impl": PYTORCH})))
    assert memory == 4 * (4 * 12 * 3072**2 * 2) / MIB + 10 * (4 * 12 * 3072 * 64 * 2) / MIB
    assert evaluate_flash_attention(claim("peak memory", **(ROW | {"seq": 2**21}))) == "OOM"


def test_bytes_moved_by_hand() -> None:
    """18 times the scores and 12 times q; FlashAttention at 512 keys: two blocks of 384."""
    unit = 2 * 3 * 512 * 64 * 2
    assert moved_bytes(replace(CALL, impl=PYTORCH)) == 18 * 2 * 3 * 512**2 * 2 + 12 * unit
    rows = 2 * 3 * 512
    assert moved_bytes(CALL) == (2 + 1 + 3 * 2 + 4 + 1 + 5 * 2) * unit + rows * 4 * (2 + 6 * 2)
    setting = {k: ROW[k] for k in ("batch", "heads", "seq", "head_dim")}
    quantity = "HBM read+write, standard attention fwd+bwd"
    scores, q = 48 * 3072**2 * 2, 48 * 3072 * 64 * 2
    assert evaluate_flash_attention(claim(quantity, **setting)) == (18 * scores + 12 * q) / 1e9


def test_flops_with_and_without_recomputation() -> None:
    assert flops(CALL) * 12 == flops(replace(CALL, impl=PYTORCH)) * 14
    found = evaluate_flash_attention(
        claim("GFLOPs standard vs flash", batch=2, heads=3, seq=512, head_dim=64)
    )
    assert isinstance(found, tuple)
    assert found[0] == pytest.approx(12 * 2 * 3 * 512**2 * 64 / 1e9)


def test_the_order_of_growth_is_counted() -> None:
    assert evaluate_flash_attention(claim("HBM accesses", formula="N^2 d^2 / M")) == "N^2 d^2 / M"


def test_a_masked_sequence_is_padded_to_whole_blocks() -> None:
    op = fused(replace(CALL, impl=SPARSE, seq=1000), FORWARD)
    assert isinstance(op, BlockSparseAttention)
    assert (op.len_q, op.kept_keys) == (1024, KEY_BLOCK)
    short = fused(replace(CALL, impl=SPARSE, seq=100), FORWARD)
    assert (short.len_q, short.num_pairs()) == (112, 112**2)


@pytest.mark.parametrize(
    ("quantity", "change", "reason"),
    [
        ("runtime", {"batch": None}, "setting incomplete: no batch"),
        ("runtime", {"pass_": "sideways"}, "setting unclear: pass_ = 'sideways'"),
        ("runtime", {"impl": "Reformer"}, "no kernels of 'Reformer' are known here"),
        ("taste", {}, "no rule for 'taste'"),
        ("LRA speedup", {}, "setting incomplete: no batch, nor which kernels the baseline fuses"),
        ("time to 72% accuracy", {}, "time to an accuracy depends on how many steps it takes"),
    ],
)
def test_what_cannot_be_told_says_why(quantity: str, change: dict[str, Any], reason: str) -> None:
    verdict = evaluate(claim(quantity, **(ROW | change)))
    assert (verdict.status, verdict.reason) == (NOT_MODELLED, reason)


def test_a_causal_block_mask_is_refused() -> None:
    one = claim("runtime", **(ROW | {"impl": SPARSE, "causal": True}))
    assert "the block mask takes the place of causal" in evaluate(one).reason
    with pytest.raises(NotModelledError, match="no gpu"):
        evaluate_block_sparse_fa(claim("runtime", **(ROW | {"gpu": None})))
