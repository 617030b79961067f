"""The backward pass of unfused attention and of the softmax in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP8, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.ops.attention import StandardAttention
from workloads.ops.attention_backward import StandardAttentionBackward
from workloads.ops.flash_attention_backward import FlashAttention2Backward
from workloads.ops.softmax_backward import SoftmaxBackward


@st.composite
def softmaxes(draw: st.DrawFn) -> SoftmaxBackward:
    return SoftmaxBackward(
        rows=draw(st.integers(1, 20)),
        cols=draw(st.integers(2, 60)),
        dtype=draw(st.sampled_from([BF16, FP8, FP32])),
    )


@proves("softmax_backward")
@given(op=softmaxes(), fast_bytes=st.floats(6, 13).map(lambda e: int(2**e)))
def test_softmax_backward_counts_what_the_closed_form_says(
    op: SoftmaxBackward, fast_bytes: int
) -> None:
    assert_proved(op, fast_bytes)


@st.composite
def shapes(draw: st.DrawFn) -> StandardAttentionBackward:
    kv_heads, causal = draw(st.integers(1, 3)), draw(st.booleans())
    len_q = draw(st.integers(1, 30))
    return StandardAttentionBackward(
        batch=draw(st.integers(1, 2)),
        num_heads=kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        len_q=len_q,
        len_kv=draw(st.integers(max(len_q if causal else 1, 2), 50)),
        head_dim=draw(st.integers(1, 20)),
        head_dim_v=draw(st.integers(1, 20)),
        causal=causal,
        dtype=draw(st.sampled_from([BF16, FP8, FP32])),
    )


@proves("attention_backward")
@given(op=shapes(), fast_bytes=st.integers(200, 20_000))
def test_program_counts_what_the_closed_form_says(
    op: StandardAttentionBackward, fast_bytes: int
) -> None:
    assert_proved(op, fast_bytes)


def test_traffic_by_hand() -> None:
    """With all of a head on chip: P read twice, dP written and read, dS written and read twice."""
    op = StandardAttentionBackward(batch=2, num_heads=3, len_q=256, head_dim=32)
    scores, rows = 2 * 3 * 256**2, 2 * 3 * 256 * 32
    assert op.work(2**22).bytes == 2 * (7 * scores + 8 * rows)
    assert op.work(2**22).vector_flops == 5 * scores
    assert op.work(2**22).launches == 5


def test_twice_the_flops_of_the_forward_pass_and_fewer_than_fused() -> None:
    shape: dict[str, Any] = {
        "num_heads": 4,
        "len_q": 128,
        "head_dim": 64,
        "head_dim_v": 32,
        "causal": True,
    }
    op = StandardAttentionBackward(**shape)
    forward, fused = (kind(**shape) for kind in (StandardAttention, FlashAttention2Backward))
    assert op.min_flops()[BF16] == 2 * forward.min_flops()[BF16] < fused.min_flops()[BF16]


def test_arrays_agree_with_scalars_and_too_little_memory_is_refused() -> None:
    lengths = np.array([2.0**i for i in range(5, 15)])
    many = StandardAttentionBackward(num_heads=4, len_q=lengths, head_dim=64).work(2**18)
    for i, length in enumerate(lengths):
        one = StandardAttentionBackward(num_heads=4, len_q=int(length), head_dim=64).work(2**18)
        for counter in ("vector_flops", "read_bytes", "write_bytes"):
            assert np.asarray(getattr(many, counter))[i] == getattr(one, counter)
    with pytest.raises(InputError, match="cannot hold one element"):
        SoftmaxBackward(rows=1, cols=8).work(16)
