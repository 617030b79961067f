"""Counts of decoding attention against a naive computation that counts itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hwmodels.dtypes import BF16, FP8, FP16, FP32
from hwmodels.errors import InputError
from workloads.ops.decode_attention import DecodeAttention, MlaDecode
from workloads.ops.flash_attention import FlashAttention2


def decode(**changes: Any) -> DecodeAttention:
    values: dict[str, Any] = {
        "batch": 3, "num_heads": 8, "num_kv_heads": 2, "len_kv": 100, "head_dim": 16,
    }  # fmt: skip
    return DecodeAttention(**(values | changes))


@pytest.mark.parametrize("window", [None, 1, 40, 100, 1000])
@pytest.mark.parametrize("head_dim_v", [None, 24])
def test_counts_are_those_of_loops_over_heads_and_rows(
    window: int | None, head_dim_v: int | None
) -> None:
    op = decode(window=window, head_dim_v=head_dim_v, kv_dtype=FP8)
    read, products, exps = set(), 0, 0
    for sequence in range(3):
        for head in range(8):
            for position in range(100):
                if window is not None and position < 100 - window:
                    continue
                read.add((sequence, head // 4, position))
                products += 16 + (head_dim_v or 16)
                exps += 1
    assert op.cache_bytes() == len(read) * (16 + (head_dim_v or 16))
    assert op.min_flops() == {BF16: 2 * products}
    assert op.work(2**20).special_ops == exps + 3 * 8  # and one reciprocal a head
    assert op.work(2**20).vector_flops == 4 * exps + 3 * 8 * (head_dim_v or 16)


def test_one_query_of_flash_attention_has_the_same_products_and_bytes() -> None:
    flash = FlashAttention2(
        batch=3, num_heads=8, num_kv_heads=2, len_q=1, len_kv=100, head_dim=16
    )  # fmt: skip
    assert decode().min_flops() == flash.min_flops()
    logsumexp_bytes = 3 * 8 * 4
    assert decode().compulsory_bytes() == flash.compulsory_bytes() - logsumexp_bytes


def test_bytes_read_and_written_are_the_compulsory_ones() -> None:
    for op in (decode(), decode(kv_dtype=FP8), MlaDecode(num_heads=16, len_kv=300)):
        work = op.work(2**18)
        assert work.bytes == op.compulsory_bytes()
        assert work.write_bytes == op.batch * op.num_heads * op.value_dim * 2
        assert work.launches == 1


def test_latents_are_read_once_for_all_heads() -> None:
    few, many = (MlaDecode(batch=2, num_heads=h, len_kv=1000) for h in (1, 128))
    assert few.cache_bytes() == many.cache_bytes() == 2 * 1000 * 576 * 2
    assert many.min_flops()[BF16] == 2 * 2 * 128 * 1000 * (576 + 512)
    assert many.over(latent_dim=256).row_elements == 320


def test_absorbed_attention_is_attention_over_up_projected_keys_and_values() -> None:
    rng = np.random.default_rng(1)
    latent, rope, dim, heads, length = 6, 2, 4, 3, 7
    up_k, up_v = rng.standard_normal((2, heads, latent, dim))
    cache, rotary = rng.standard_normal((length, latent)), rng.standard_normal((length, rope))
    q, q_rope = rng.standard_normal((heads, dim)), rng.standard_normal((heads, rope))
    plain = np.einsum("hd,lc,hcd->hl", q, cache, up_k) + q_rope @ rotary.T
    absorbed = np.einsum("hd,hcd->hc", q, up_k)
    joined = np.concatenate([absorbed, q_rope], axis=1)
    scores = joined @ np.concatenate([cache, rotary], axis=1).T
    assert scores == pytest.approx(plain)
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    out = np.einsum("hl,lc,hcd->hd", p, cache, up_v)
    assert np.einsum("hc,hcd->hd", p @ cache, up_v) == pytest.approx(out)
    # the two products of the absorbed form are those that the op counts
    op = MlaDecode(num_heads=heads, len_kv=length, latent_dim=latent, rope_dim=rope)
    assert op.min_flops()[BF16] == 2 * (scores.size * joined.shape[1] + p.size * latent)


def test_formats_are_told_apart() -> None:
    op = decode(dtype=FP16, kv_dtype="fp8", product_dtype="fp8")
    assert (op.dtype, op.cache_dtype, op.matmul_dtype) == (FP16, FP8, FP8)
    assert set(op.min_flops()) == {FP8}
    same = decode(dtype=FP32)
    assert (same.cache_dtype, same.matmul_dtype) == (FP32, FP32)
    assert decode(kv_dtype=FP8).matmul_dtype == BF16


def test_arrays_count_like_their_entries() -> None:
    lengths = np.array([1.0, 64, 1000])
    many = decode(len_kv=lengths, window=500)
    for i, length in enumerate(lengths):
        one = decode(len_kv=length, window=500)
        assert np.asarray(many.cache_bytes())[i] == one.cache_bytes()
        assert np.asarray(many.work(2**20).vector_flops)[i] == one.work(2**20).vector_flops


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="must divide"):
        decode(num_kv_heads=3)
    with pytest.raises(InputError, match="cannot hold one query head and one cached row"):
        decode().work(64)
    assert decode().tiling(2**16) == {"heads": 4}
    assert decode(num_kv_heads=None).heads_per_kv == 1
