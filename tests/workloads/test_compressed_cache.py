"""Compressed caches: codes restored inside the kernel, and what compressing them takes."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from tests.workloads.test_selection import fits
from workloads.ops.cache_segment import KNOWN_BITS, Coding, Segment
from workloads.ops.restoring_attention import RestoringAttention

memories = st.floats(10, 15).map(lambda exponent: int(2**exponent))
fractions = st.sampled_from([0.0, 0.02, 0.3])


@st.composite
def codings(draw: st.DrawFn, *, by_channel: bool) -> Coding:
    return Coding(
        bits=draw(st.sampled_from(KNOWN_BITS)),
        group=draw(st.sampled_from([None, 1, 3, 4, 16])),
        by_channel=by_channel and draw(st.booleans()),
        zero_point=draw(st.booleans()),
        scale_bits=draw(st.sampled_from([8, 16])),
    )


@st.composite
def segments(draw: st.DrawFn, key_dim: int, value_dim: int) -> Segment:
    pruned = draw(st.booleans())
    return Segment(
        tokens=draw(st.integers(0, 20)),
        num=draw(st.integers(1, 3)),
        key_width=draw(st.integers(1, key_dim)) if pruned else key_dim,
        value_width=value_dim,
        key=draw(codings(by_channel=True)),
        value=draw(codings(by_channel=False)),
        rank=draw(st.integers(0, 3)),
        outlier_frac=draw(fractions),
        flags=key_dim if pruned else 0,
        magnitudes=draw(st.booleans()),
    )


@st.composite
def restoring(draw: st.DrawFn) -> RestoringAttention:
    kv_heads, key_dim, value_dim = (draw(st.integers(1, n)) for n in (2, 9, 9))
    found = draw(st.lists(segments(key_dim, value_dim), min_size=1, max_size=3))
    length = sum(int(s.tokens * s.num) for s in found)
    assume(length)
    return RestoringAttention(
        batch=draw(st.integers(1, 2)),
        num_heads=kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=kv_heads,
        len_kv=length,
        head_dim=key_dim,
        head_dim_v=value_dim,
        segments=tuple(found),
        dtype=draw(st.sampled_from([BF16, FP32])),
    )


@proves("restoring_attention")
@given(op=restoring(), fast_bytes=memories)
def test_restoring_attention_counts_what_the_closed_form_says(
    op: RestoringAttention, fast_bytes: int
) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)
