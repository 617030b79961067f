from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP8, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.ops.attention import StandardAttention


@st.composite
def shapes(draw: st.DrawFn) -> StandardAttention:
    kv_heads, causal = draw(st.integers(1, 3)), draw(st.booleans())
    len_q = draw(st.integers(1, 40))
    return StandardAttention(
        batch=draw(st.integers(1, 2)),
        num_heads=kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        len_q=len_q,
        len_kv=draw(st.integers(len_q if causal else 1, 60)),
        head_dim=draw(st.integers(1, 24)),
        head_dim_v=draw(st.integers(1, 24)),
        causal=causal,
        dtype=draw(st.sampled_from([BF16, FP8, FP32])),
    )


memories = st.integers(200, 20_000)


@proves("attention")
@given(op=shapes(), fast_bytes=memories)
def test_program_counts_what_the_closed_form_says(op: StandardAttention, fast_bytes: int) -> None:
    assert_proved(op, fast_bytes)


@settings(max_examples=200, deadline=None)
@given(op=shapes(), fast_bytes=memories)
def test_a_larger_fast_memory_never_moves_more(op: StandardAttention, fast_bytes: int) -> None:
    assert op.work(4 * fast_bytes).bytes <= op.work(fast_bytes).bytes


def test_arrays_agree_with_scalars() -> None:
    rng = np.random.default_rng(3)
    kv_heads = rng.integers(1, 9, 200)
    heads = kv_heads * rng.integers(1, 9, 200)
    len_q = rng.integers(1, 4000, 200)
    len_kv = len_q + rng.integers(0, 4000, 200)
    op = StandardAttention(
        num_heads=heads, num_kv_heads=kv_heads, len_q=len_q, len_kv=len_kv, head_dim=64, causal=True
    )
    many = op.work(2**17)
    for i in range(0, 200, 5):
        one = StandardAttention(
            num_heads=int(heads[i]),
            num_kv_heads=int(kv_heads[i]),
            len_q=int(len_q[i]),
            len_kv=int(len_kv[i]),
            head_dim=64,
            causal=True,
        )
        work = one.work(2**17)
        for field in ("vector_flops", "special_ops", "read_bytes", "write_bytes", "flops"):
            assert getattr(work, field) == getattr(many, field)[i]
        assert one.min_flops()[BF16] == np.asarray(op.min_flops()[BF16])[i]


def test_known_numbers() -> None:
    op = StandardAttention(num_heads=32, len_q=8192, head_dim=128, causal=True)
    scores = 32 * 8192**2
    assert op.work(2**20).tensor_flops[BF16] == 2 * scores * (128 + 128)
    assert op.min_flops()[BF16] == 32 * (8192 * 8193 // 2) * 512
    assert op.work(2**20).launches == 3
    # Softmax on a row that fits: 4 flops, scale and mask 3 more; one exp per score, 1 / l per row.
    assert op.work(2**20).vector_flops == 7 * scores
    assert op.work(2**20).special_ops == scores + 32 * 8192


def test_grouped_heads_read_keys_once_per_group() -> None:
    whole = StandardAttention(num_heads=8, num_kv_heads=8, len_q=16, len_kv=64, head_dim=32)
    grouped = whole.over(num_kv_heads=2)
    saved = 2 * (8 - 2) * 64 * 32 * 2
    assert whole.work(2**20).bytes - grouped.work(2**20).bytes == saved


def test_left_out_sizes_follow() -> None:
    op = StandardAttention(num_heads=4, len_q=16, head_dim=8).over(len_q=[16, 32], head_dim=4)
    np.testing.assert_array_equal(op.len_keys, [16, 32])
    assert (op.kv_heads, op.value_dim, op.heads_per_kv) == (4, 4, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads = 3 must divide num_heads = 4"),
        ({"num_kv_heads": 8}, "must divide"),
        ({"len_kv": 15, "causal": True}, "leaves queries without a key"),
        ({"len_kv": [16, 15], "causal": True}, "leaves queries without a key"),
        ({"len_kv": 0}, "attention: len_kv = 0"),
        ({"head_dim_v": 2.5}, "attention: head_dim_v = 2.5"),
        ({"num_kv_heads": "two"}, "num_kv_heads = 'two' is not a number"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, object], message: str) -> None:
    op = StandardAttention(num_heads=4, len_q=16, head_dim=8)
    with pytest.raises(InputError, match=message):
        op.over(**changes)


def test_too_small_a_fast_memory_is_refused() -> None:
    with pytest.raises(InputError, match="cannot hold"):
        StandardAttention(num_heads=1, len_q=4, head_dim=8).work(16)
