"""Shared prefixes: the parts and what puts them together, decoding and training on groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP16, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.op import Op
from workloads.ops.matmul import Matmul
from workloads.ops.shared_prefix import (
    CombineParts,
    PrefixGroupedAttention,
    PrefixGroupedAttentionBackward,
    SharedPrefixAttention,
)

memories = st.floats(9, 16).map(lambda exponent: int(2**exponent))
SHAPE: dict[str, Any] = {
    "batch": 6,
    "num_heads": 4,
    "len_prefix": 12,
    "len_suffix": 5,
    "head_dim": 8,
}
GROUP: dict[str, Any] = {
    "num_responses": 3,
    "len_prefix": 7,
    "len_response": 4,
    "num_heads": 4,
    "head_dim": 8,
}


def fits(op: Op, fast_bytes: int) -> bool:
    try:
        op.work(fast_bytes)
    except InputError:
        return False
    return True


@st.composite
def combinations(draw: st.DrawFn) -> CombineParts:
    return CombineParts(
        rows=draw(st.integers(1, 40)), dim=draw(st.integers(1, 20)),
        num_parts=draw(st.integers(1, 5)), dtype=draw(st.sampled_from([BF16, FP32])),
    )  # fmt: skip


@proves("combine_parts")
@given(op=combinations(), fast_bytes=memories)
def test_parts_put_together_count_what_the_closed_form_says(
    op: CombineParts, fast_bytes: int
) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@st.composite
def shared(draw: st.DrawFn) -> SharedPrefixAttention:
    kv_heads, len_q, splits, group = (draw(st.integers(1, n)) for n in (2, 3, 3, 3))
    return SharedPrefixAttention(
        batch=group * draw(st.integers(1, 3)),
        num_heads=kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        len_q=len_q,
        len_prefix=splits * draw(st.integers(1, 12)),
        len_suffix=len_q + draw(st.integers(0, 9)),
        len_shared_2=draw(st.none() | st.integers(1, 10)),
        group_2=group,
        head_dim=draw(st.integers(1, 10)),
        num_splits=splits,
        dtype=draw(st.sampled_from([BF16, FP32])),
    )


@proves("shared_prefix_attention")
@given(op=shared(), fast_bytes=memories)
def test_a_shared_prefix_counts_what_the_closed_form_says(
    op: SharedPrefixAttention, fast_bytes: int
) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@st.composite
def groups(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads = draw(st.integers(1, 2))
    return {
        "batch": draw(st.integers(1, 2)),
        "num_responses": draw(st.integers(1, 4)),
        "len_prefix": draw(st.integers(1, 12)),
        "len_response": draw(st.integers(1, 8)),
        "num_heads": kv_heads * draw(st.integers(1, 3)),
        "num_kv_heads": kv_heads,
        "head_dim": draw(st.integers(1, 8)),
        "dtype": draw(st.sampled_from([BF16, FP32])),
    }


@proves("prefix_grouped_attention")
@given(shape=groups(), fast_bytes=memories)
def test_a_group_counts_what_the_closed_form_says(shape: dict[str, Any], fast_bytes: int) -> None:
    op = PrefixGroupedAttention(**shape)
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@proves("prefix_grouped_attention_backward")
@given(shape=groups(), fast_bytes=memories)
def test_the_gradients_of_a_group_count_what_the_closed_form_says(
    shape: dict[str, Any], fast_bytes: int
) -> None:
    op = PrefixGroupedAttentionBackward(**shape)
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


def test_sharing_by_hand() -> None:
    op = SharedPrefixAttention(**SHAPE, dtype=FP16)
    assert op.cache_bytes() == 2 * 2 * 4 * 8 * (12 + 6 * 5)
    assert op.unshared().cache_bytes() == 2 * 2 * 4 * 8 * 6 * (12 + 5)
    assert op.min_flops()[FP16] == op.unshared().min_flops()[FP16] == 4 * 6 * 4 * 8 * (12 + 5)
    # K and V, Q twice, O and its fp32 logsumexp of two parts there and back, then once more
    rows, e = 6 * 4, 2
    one = rows * (8 * e + 4)
    assert op.work(2**20).bytes == op.cache_bytes() + 2 * rows * 8 * e + 5 * one


def test_a_second_level_is_kept_once_a_group() -> None:
    op = SharedPrefixAttention(**SHAPE, len_shared_2=10, group_2=3, dtype=FP16)
    assert op.cache_bytes() == 2 * 2 * 4 * 8 * (12 + 2 * 10 + 6 * 5)
    assert set(op.parts()) == {"prefix", "shared_2", "suffix"}
    assert op.combine().num_parts == 3


def test_splitting_the_prefix_moves_more_and_computes_the_same() -> None:
    one, four = (SharedPrefixAttention(**SHAPE, num_splits=n) for n in (1, 4))
    assert one.min_flops() == four.min_flops()
    assert four.work(2**20).bytes > one.work(2**20).bytes


def test_new_tokens_are_packed_into_the_decoding_kernel() -> None:
    one, three = (SharedPrefixAttention(**SHAPE, len_q=n).stages() for n in (1, 3))
    assert [s.op.name for s in one] == ["flash_attention_2", "decode_attention", "combine_parts"]
    assert three[1].op == one[1].op.over(num_heads=12, num_kv_heads=4)


def test_counts_broadcast_over_sizes() -> None:
    many = SharedPrefixAttention(**SHAPE).over(len_prefix=np.array([12.0, 24.0]))
    ones = [SharedPrefixAttention(**SHAPE).over(len_prefix=n) for n in (12, 24)]
    assert many.work(2**16).bytes.tolist() == [op.work(2**16).bytes for op in ones]  # type: ignore[union-attr]


def test_a_group_of_one_is_a_plain_causal_sequence() -> None:
    op = PrefixGroupedAttention(**(GROUP | {"num_responses": 1}))
    assert op.min_flops() == op.repeated().min_flops()
    assert op.num_tokens() == op.num_tokens_repeated() == 11


def test_linear_layers_see_the_prompt_once() -> None:
    op = PrefixGroupedAttention(**GROUP)
    new, old = (
        Matmul(m=m, n=32, k=32).min_flops()[BF16]
        for m in (op.num_tokens(), op.num_tokens_repeated())
    )
    assert new / old == (7 + 3 * 4) / (3 * (7 + 4))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads = 3 must divide num_heads = 4"),
        ({"group_2": 4}, "group_2 = 4 must divide batch = 6"),
        ({"num_splits": 5}, "num_splits = 5 must divide len_prefix = 12"),
        ({"len_q": 6}, "len_suffix = 5 counts the len_q = 6 new tokens"),
    ],
)
def test_impossible_trees_are_refused(change: dict[str, int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        SharedPrefixAttention(**(SHAPE | change))


def test_a_group_whose_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="num_kv_heads = 3 must divide num_heads = 4"):
        PrefixGroupedAttention(**GROUP, num_kv_heads=3)
