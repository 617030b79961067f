"""Caches of heavy hitters: scores, eviction, decoding and prompts, refusals."""

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
from workloads.ops.decode_attention import DecodeAttention
from workloads.ops.heavy_hitter import EvictLeast, HeavyHitterDecode, HeavyHitterPrefill

memories = st.floats(9, 15).map(lambda exponent: int(2**exponent))
SHAPE: dict[str, Any] = {"batch": 2, "num_heads": 4, "len_kv": 50, "head_dim": 8}


def fits(op: Op, fast_bytes: int) -> bool:
    try:
        op.work(fast_bytes)
    except InputError:
        return False
    return True


@st.composite
def evictions(draw: st.DrawFn) -> EvictLeast:
    cols = draw(st.integers(1, 60))
    return EvictLeast(
        rows=draw(st.integers(1, 4)), cols=cols, num_candidates=draw(st.integers(1, cols)),
        group=draw(st.integers(1, 4)), dtype=draw(st.sampled_from([BF16, FP32])),
    )  # fmt: skip


@proves("evict_least")
@given(op=evictions(), fast_bytes=st.floats(6, 12).map(lambda e: int(2**e)))
def test_eviction_counts_what_the_closed_form_says(op: EvictLeast, fast_bytes: int) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@st.composite
def caches(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads = draw(st.integers(1, 2))
    return {
        "batch": draw(st.integers(1, 2)),
        "num_heads": kv_heads * draw(st.integers(1, 3)),
        "num_kv_heads": kv_heads,
        "len_kv": draw(st.integers(1, 40)),
        "head_dim": draw(st.integers(1, 8)),
        "budget_frac": draw(st.floats(0, 1)),
        "recent_frac": draw(st.floats(0, 1)),
        "dtype": draw(st.sampled_from([BF16, FP32])),
    }


@proves("heavy_hitter_decode")
@given(shape=caches(), fast_bytes=memories)
def test_a_step_counts_what_the_closed_form_says(shape: dict[str, Any], fast_bytes: int) -> None:
    op = HeavyHitterDecode(**shape)
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@proves("heavy_hitter_prefill")
@given(shape=caches(), fast_bytes=st.floats(10.5, 15).map(lambda e: int(2**e)))
def test_a_prompt_counts_what_the_closed_form_says(shape: dict[str, Any], fast_bytes: int) -> None:
    op = HeavyHitterPrefill(**shape)
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


def test_a_step_by_hand() -> None:
    op = HeavyHitterDecode(**SHAPE, dtype=FP16)  # 10 of 50 rows, 5 of them heavy
    assert (op.len_kept, op.num_heavy, op.num_recent) == (10, 5, 5)
    work, lists = op.work(2**20), 2 * 4
    kv, row, p = lists * 10 * 8 * 2, lists * 8 * 2, lists * 10 * 2
    # q, k, s written; s read, p written; p and v read, o written; p and the scores once more
    attention = row + kv + p + 2 * p + p + kv + row
    assert work.bytes == attention + p + 2 * lists * 10 * 4 + lists * 4
    assert work.tensor_flops[FP16] == 4 * lists * 10 * 8
    assert op.cache_bytes() == 2 * kv + lists * 10 * 4


def test_the_budget_is_the_whole_cache_at_one() -> None:
    op = HeavyHitterDecode(**SHAPE, budget_frac=1.0)
    plain = DecodeAttention(**SHAPE)
    assert op.len_kept == 50
    assert op.min_flops() == plain.min_flops()
    assert op.full_cache_bytes() == plain.cache_bytes()
    assert HeavyHitterDecode(**SHAPE, budget_frac=0.0).len_kept == 1


def test_the_least_of_the_heavy_is_evicted_and_the_recent_stay() -> None:
    op = HeavyHitterDecode(num_heads=1, len_kv=4, head_dim=2, budget_frac=1.0)
    inputs = {
        "q": np.zeros((1, 1, 1, 2)), "k": np.zeros((1, 1, 4, 2)), "v": np.zeros((1, 1, 4, 2)),
        "acc": np.array([[3.0, 2.0, 1.0, 0.0]]),
    }  # fmt: skip
    found = op.reference(inputs)
    assert found["evict"].tolist() == [[1.0]]
    assert found["acc"].tolist() == [[3.25, 2.25, 1.25, 0.25]]


def test_a_prompt_keeps_its_most_attended_and_its_last_rows() -> None:
    op = HeavyHitterPrefill(num_heads=1, len_kv=10, head_dim=1)
    keys = np.zeros((1, 1, 10, 1))
    keys[0, 0, 3] = 5.0  # every query from the third on prefers it
    rows = np.arange(10.0).reshape(1, 1, 10, 1)
    found = op.reference({"q": np.ones((1, 1, 10, 1)), "k": keys, "v": rows})
    assert found["index"].tolist() == [[3.0]]
    assert found["v"][0, :, 0].tolist() == [3.0, 9.0]


def test_counts_broadcast_over_sizes() -> None:
    many = HeavyHitterDecode(**SHAPE).over(len_kv=np.array([50.0, 100.0]))
    ones = [HeavyHitterDecode(**SHAPE).over(len_kv=n) for n in (50, 100)]
    assert many.work(2**16).bytes.tolist() == [op.work(2**16).bytes for op in ones]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads = 3 must divide num_heads = 4"),
        ({"budget_frac": 1.5}, "budget_frac = 1.5 must be a fraction"),
    ],
)
def test_impossible_caches_are_refused(change: dict[str, float], says: str) -> None:
    for op in (HeavyHitterDecode, HeavyHitterPrefill):
        with pytest.raises(InputError, match=says):
            op(**(SHAPE | change))


def test_more_candidates_than_slots_are_refused() -> None:
    with pytest.raises(InputError, match="num_candidates = 9 is more than cols = 8"):
        EvictLeast(rows=1, cols=8, num_candidates=9)
