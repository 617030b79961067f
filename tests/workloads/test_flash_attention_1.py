"""FlashAttention with keys in the outer loop, dense and under a block mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP8, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.machine import Machine
from workloads.op import Op
from workloads.ops.attention import AttentionOp
from workloads.ops.block_sparse_attention import (
    BlockSparseAttention,
    BlockSparseAttentionBackward,
)
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.flash_attention_1 import FlashAttention1, FlashAttention1Backward

memories = st.floats(8, 15).map(lambda exponent: int(2**exponent))
SM_BYTES = 448 * 1024


def fits(op: Op, fast_bytes: int) -> bool:
    try:
        op.tiling(fast_bytes)
    except InputError:
        return False
    return True


@st.composite
def dense(draw: st.DrawFn, op: Callable[..., AttentionOp]) -> AttentionOp:
    kv_heads, causal = draw(st.integers(1, 2)), draw(st.booleans())
    len_q = draw(st.integers(1, 40))
    return op(
        batch=draw(st.integers(1, 2)),
        num_heads=kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        len_q=len_q,
        len_kv=draw(st.integers(max(len_q if causal else 1, 2), 60)),
        head_dim=draw(st.integers(1, 12)),
        head_dim_v=draw(st.integers(1, 12)),
        causal=causal,
        dtype=draw(st.sampled_from([BF16, FP8, FP32])),
        sram_bytes=draw(st.sampled_from([None, 64, 700])),
    )


@proves("flash_attention")
@given(op=dense(FlashAttention1), fast_bytes=memories)
def test_forward_counts_what_the_closed_form_says(op: FlashAttention1, fast_bytes: int) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@proves("flash_attention_backward")
@given(op=dense(FlashAttention1Backward), fast_bytes=memories)
def test_backward_counts_what_the_closed_form_says(
    op: FlashAttention1Backward, fast_bytes: int
) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@st.composite
def masked(draw: st.DrawFn, op: Callable[..., AttentionOp]) -> AttentionOp:
    kv_heads, block_q, parts = (draw(st.integers(1, n)) for n in (2, 3, 3))
    block_k = block_q * parts
    return op(
        batch=draw(st.integers(1, 2)),
        num_heads=kv_heads * draw(st.integers(1, 2)),
        num_kv_heads=kv_heads,
        len_q=max(block_k * draw(st.integers(1, 9)), 2),
        head_dim=draw(st.integers(1, 8)),
        head_dim_v=draw(st.integers(1, 8)),
        keys_per_query=draw(st.integers(1, 40)),
        block_q=block_q,
        block_k=block_k,
        dtype=draw(st.sampled_from([BF16, FP32])),
    )


@proves("block_sparse_attention")
@given(op=masked(BlockSparseAttention), fast_bytes=memories)
def test_masked_forward_counts_what_the_closed_form_says(
    op: BlockSparseAttention, fast_bytes: int
) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@proves("block_sparse_attention_backward")
@given(op=masked(BlockSparseAttentionBackward), fast_bytes=memories)
def test_masked_backward_counts_what_the_closed_form_says(
    op: BlockSparseAttentionBackward, fast_bytes: int
) -> None:
    # One key that is alone has no gradient to compare.
    assume(fits(op, fast_bytes) and op.kept_keys > 1)
    assert_proved(op, fast_bytes)


def test_it_computes_what_flash_attention_2_does() -> None:
    first = FlashAttention1(num_heads=4, num_kv_heads=2, len_q=30, head_dim=8, causal=True)
    second = FlashAttention2(**first.shape())
    inputs = first.inputs(np.random.default_rng(1))
    one, other = (op.program(Machine(6000), inputs) for op in (first, second))
    np.testing.assert_allclose(one["o"], other["o"])
    np.testing.assert_allclose(one["m"] + np.log(one["l"]), other["lse"])


def test_a_mask_that_keeps_all_is_no_mask() -> None:
    whole = BlockSparseAttention(num_heads=2, len_q=24, head_dim=4, block_q=2, block_k=4)
    inputs = whole.inputs(np.random.default_rng(2))
    plain = FlashAttention2(num_heads=2, len_q=24, head_dim=4)
    assert whole.kept_frac == 1
    np.testing.assert_allclose(whole.reference(inputs)["o"], plain.reference(inputs)["o"])


def test_traffic_of_both_passes_by_hand() -> None:
    """GPT-2 medium's attention, 192 KB of shared memory: blocks of 64 by 384, T_c = 3."""
    shape: dict[str, Any] = {
        "batch": 64,
        "num_heads": 16,
        "len_q": 1024,
        "head_dim": 64,
        "sram_bytes": 196_608,
    }
    rows = 64 * 16 * 1024
    moved = [op(**shape).work(2**20).bytes for op in (FlashAttention1, FlashAttention1Backward)]
    assert moved == [rows * (12 * 64 * 2 + 14 * 4), rows * (20 * 64 * 2 + 6 * 4)]


def test_flash_attention_2_moves_less_and_half_the_memory_moves_twice() -> None:
    op = FlashAttention1(num_heads=1, len_q=2**16, head_dim=64)
    small, large = (op.over(sram_bytes=m).work(2**20).bytes for m in (2**16, 2**17))
    assert small / large == pytest.approx(2, rel=0.01)
    assert FlashAttention2(**op.shape()).work(SM_BYTES).bytes < op.work(SM_BYTES).bytes


def test_blocks_are_the_papers() -> None:
    """M = 48 K elements of two bytes, d = 64: bc = ceil(M / 4 d) = 192, br = d."""
    op = FlashAttention1(num_heads=1, len_q=4096, head_dim=64, sram_bytes=2 * 48 * 1024)
    assert op.tiling(SM_BYTES) == {"br": 64, "bc": 192}
    assert op.over(len_q=50, len_kv=100).tiling(SM_BYTES) == {"br": 50, "bc": 100}


def test_a_mask_of_one_sort_is_linear_in_the_sequence() -> None:
    op = BlockSparseAttention(num_heads=8, len_q=2**14, head_dim=64)
    short, long = op.work(SM_BYTES), op.over(len_q=2**16).work(SM_BYTES)
    assert long.bytes == 4 * short.bytes and long.flops == 4 * short.flops
    assert (
        op.mask().sum() == 64
        and op.over(keys_per_query=1024).mask().sum(axis=0).tolist() == [4] * 64
    )


def test_keys_that_fit_together_spare_the_rereading() -> None:
    op = BlockSparseAttention(num_heads=1, len_q=4096, head_dim=64, keys_per_query=1024)
    apart, together = op.work(SM_BYTES), op.work(50 * 2**20)
    state = 64 * 2 + 64 * 2 + 8
    assert apart.read_bytes - together.read_bytes == 3 * 4096 * state
    assert apart.write_bytes - together.write_bytes == 3 * 4096 * (64 * 2 + 8)
    assert apart.flops == together.flops


def test_a_block_that_does_not_fit_is_cut_into_parts() -> None:
    op = BlockSparseAttentionBackward(num_heads=1, len_q=4096, head_dim=128)
    whole, halves = (op.tiling(fast)["bc"] for fast in (2**19, 2**18))
    assert (whole, halves) == (256, 128)
    assert op.work(2**18).write_bytes - op.work(2**19).write_bytes == 4096 * 128 * 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"causal": True}, "the block mask takes the place of causal"),
        ({"len_kv": 512}, "len_kv = 512 must be len_q = 1024"),
        ({"len_q": 1000}, "block_k = 256 must divide len_q = 1000"),
        ({"block_q": 48}, "block_q = 48 must divide block_k = 256"),
        ({"num_kv_heads": 3}, "num_kv_heads = 3 must divide num_heads = 8"),
    ],
)
def test_impossible_masks_are_refused(change: dict[str, Any], says: str) -> None:
    fields: dict[str, Any] = {"num_heads": 8, "len_q": 1024, "head_dim": 64}
    with pytest.raises(InputError, match=says):
        BlockSparseAttention(**(fields | change))


@pytest.mark.parametrize(
    "op",
    [FlashAttention1, FlashAttention1Backward, BlockSparseAttention, BlockSparseAttentionBackward],
)
def test_arrays_agree_with_scalars_and_too_little_memory_is_refused(
    op: type[AttentionOp],
) -> None:
    lengths = np.array([2.0**i for i in range(8, 15)])
    many = op(num_heads=4, len_q=lengths, head_dim=64).work(SM_BYTES)
    for i, length in enumerate(lengths):
        one = op(num_heads=4, len_q=int(length), head_dim=64).work(SM_BYTES)
        for counter in ("flops", "special_ops", "read_bytes", "write_bytes"):
            assert np.broadcast_to(getattr(many, counter), 7)[i] == getattr(one, counter)
    with pytest.raises(InputError, match="cannot hold one"):
        op(num_heads=1, len_q=4, head_dim=8).work(64)
