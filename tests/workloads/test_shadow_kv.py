"""ShadowKV: recovered chunks, a decoding step, memory on both sides, what a prompt adds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.op import Op
from workloads.ops.decode_attention import DecodeAttention
from workloads.ops.shadow_kv import RecoverChunks, ShadowKvBuild, ShadowKvDecode

memories = st.floats(10, 15).map(lambda exponent: int(2**exponent))
SHAPE: dict[str, Any] = {
    "batch": 2, "num_heads": 4, "num_kv_heads": 2, "len_kv": 103, "head_dim": 8, "rank": 6,
    "chunk": 4, "num_selected": 5, "num_outliers": 2, "num_local": 1,
}  # fmt: skip


def fits(op: Op, fast_bytes: int) -> bool:
    try:
        op.work(fast_bytes)
    except InputError:
        return False
    return True


@st.composite
def recoveries(draw: st.DrawFn) -> RecoverChunks:
    return RecoverChunks(
        lists=draw(st.integers(1, 4)), num_tokens=draw(st.integers(1, 20)),
        head_dim=2 * draw(st.integers(1, 6)), rank=draw(st.integers(1, 12)),
        dtype=draw(st.sampled_from([BF16, FP32])),
    )  # fmt: skip


@proves("recover_chunks")
@given(op=recoveries(), fast_bytes=memories)
def test_recovering_counts_what_the_closed_form_says(op: RecoverChunks, fast_bytes: int) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@st.composite
def steps(draw: st.DrawFn) -> ShadowKvDecode:
    kv_heads, chunk = draw(st.integers(1, 2)), draw(st.integers(1, 5))
    head_dim = 2 * draw(st.integers(1, 4))
    return ShadowKvDecode(
        batch=draw(st.integers(1, 2)),
        num_heads=kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        len_kv=chunk * draw(st.integers(2, 14)) + draw(st.integers(0, chunk - 1)),
        head_dim=head_dim,
        rank=draw(st.integers(1, kv_heads * head_dim)),
        chunk=chunk,
        num_selected=draw(st.integers(1, 8)),
        num_outliers=draw(st.integers(1, 4)),
        num_local=draw(st.integers(1, 3)),
        hit_frac=draw(st.sampled_from([0.0, 0.6, 1.0])),
        dtype=draw(st.sampled_from([BF16, FP32])),
    )


@proves("shadow_kv_decode")
@given(op=steps(), fast_bytes=st.floats(11, 15).map(lambda e: int(2**e)))
def test_a_step_counts_what_the_closed_form_says(op: ShadowKvDecode, fast_bytes: int) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


def test_a_step_by_hand() -> None:
    op = ShadowKvDecode(**SHAPE)  # 25 chunks and three tokens, 3 chunks stay
    assert (op.num_landmarks, op.num_chosen, op.num_missed) == (22, 5, 2)
    assert op.len_attended == (3 + 5) * 4 + 3
    work, lists = op.work(2**20), 4
    assert work.host_bytes == lists * 2 * 4 * 8 * 2
    product, scores, attention = 8 * 6 * 8, 2 * 22 * 8, 2 * 2 * 35 * 8
    assert work.tensor_flops[BF16] == 2 * lists * (product + scores + attention)
    assert work.launches == 4 + 3 + 1
    elements = 2 * 103 * 6 + lists * 8 * (22 + 6 + 2 * 35)
    assert op.cache_bytes() == 2 * elements
    assert op.host_cache_bytes() == 2 * lists * 103 * 8


def test_nothing_crosses_the_link_where_every_chunk_is_there() -> None:
    found, missed = (ShadowKvDecode(**SHAPE, hit_frac=f) for f in (1.0, 0.0))
    assert (found.num_missed, missed.num_missed) == (0, 5)
    assert found.work(2**20).host_bytes == 0
    assert missed.work(2**20).host_bytes == 4 * 5 * 4 * 8 * 2


def test_a_short_sequence_is_attended_to_whole() -> None:
    op = ShadowKvDecode(num_heads=4, len_kv=70, head_dim=64)
    assert (op.num_resident, op.num_landmarks, op.len_attended) == (7, 1, 70)


def test_one_head_a_list_needs_no_maximum() -> None:
    plain = {s.name: s.times for s in ShadowKvDecode(**(SHAPE | {"num_kv_heads": 4})).stages()}
    grouped = {s.name: s.times for s in ShadowKvDecode(**SHAPE).stages()}
    assert (plain["largest"], grouped["largest"]) == (0, 1)


def test_the_full_cache_is_plain_attention_s() -> None:
    op = ShadowKvDecode(**SHAPE)
    plain = DecodeAttention(batch=2, num_heads=4, num_kv_heads=2, len_kv=103, head_dim=8)
    assert op.full_cache_bytes() == plain.cache_bytes()


def test_counts_broadcast_over_sizes() -> None:
    many = ShadowKvDecode(**SHAPE).over(len_kv=np.array([103.0, 400.0]))
    ones = [ShadowKvDecode(**SHAPE).over(len_kv=n) for n in (103, 400)]
    assert many.work(2**16).bytes.tolist() == [op.work(2**16).bytes for op in ones]  # type: ignore[union-attr]


def test_what_a_prompt_adds_by_hand() -> None:
    op = ShadowKvBuild(batch=2, num_kv_heads=2, len_kv=103, head_dim=8, chunk=4, num_outliers=3)
    assert op.svd_flops() == 6 * 103 * 16**2 + 20 * 16**3
    assert ShadowKvBuild(num_kv_heads=2, len_kv=8, head_dim=8).svd_flops() == (
        6 * 16 * 8**2 + 20 * 8**3
    )
    work = op.work(2**20)
    assert work.host_bytes == 2 * 2 * 2 * 103 * 8
    assert work.tensor_flops[FP32] == 2 * op.svd_flops()
    assert work.tensor_flops[BF16] == 2 * 4 * 100 * 8


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads = 3 must divide num_heads = 4"),
        ({"head_dim": 7}, "head_dim = 7 must be even"),
        ({"len_kv": 7}, "len_kv = 7 must hold two chunks of 4"),
        ({"rank": 17}, "rank = 17 is more than the num_kv_heads x head_dim = 16"),
        ({"hit_frac": 2}, "hit_frac = 2 must be a fraction"),
    ],
)
def test_impossible_steps_are_refused(change: dict[str, float], says: str) -> None:
    with pytest.raises(InputError, match=says):
        ShadowKvDecode(**(SHAPE | change))


def test_a_prompt_without_a_chunk_is_refused() -> None:
    with pytest.raises(InputError, match="len_kv = 7 must hold a chunk of 8"):
        ShadowKvBuild(num_kv_heads=1, len_kv=7, head_dim=8)
