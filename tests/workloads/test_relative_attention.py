"""Relative positions: skewing and the whole proved, memory by hand."""

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
from workloads.ops.relative_attention import RelativeAttention, Skew

SHAPE: dict[str, Any] = {"batch": 2, "num_heads": 3, "len_seq": 10, "head_dim": 8}
memories = st.floats(8, 15).map(lambda exponent: int(2**exponent))
dtypes = st.sampled_from([BF16, FP32])


def fits(op: Op, fast_bytes: int) -> bool:
    try:
        op.work(fast_bytes)
    except InputError:
        return False
    return True


@proves("skew")
@given(
    count=st.integers(1, 3),
    length=st.integers(1, 12),
    dtype=dtypes,
    fast_bytes=st.integers(4, 80),
)
def test_skewing_counts_what_the_closed_form_says(
    count: int, length: int, dtype: object, fast_bytes: int
) -> None:
    op = Skew(count=count, len_seq=length, dtype=dtype)  # type: ignore[arg-type]
    assert_proved(op, fast_bytes)


@st.composite
def relative(draw: st.DrawFn) -> RelativeAttention:
    return RelativeAttention(
        batch=draw(st.integers(1, 3)), num_heads=draw(st.integers(1, 3)),
        len_seq=draw(st.integers(1, 12)), head_dim=draw(st.integers(1, 8)), dtype=draw(dtypes),
    )  # fmt: skip


@proves("relative_attention")
@given(op=relative(), fast_bytes=memories)
def test_relative_attention_counts_what_the_closed_form_says(
    op: RelativeAttention, fast_bytes: int
) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


def test_skewing_by_hand() -> None:
    """Row i of the relative scores ends with distance 0, which belongs to key i."""
    x = np.arange(9.0).reshape(1, 3, 3)
    y = Skew(len_seq=3).reference({"x": x})["y"][0]
    assert [y[i, : i + 1].tolist() for i in range(3)] == [[2], [4, 5], [6, 7, 8]]


def test_memory_of_a_head_as_in_the_papers_first_table() -> None:
    """16 GB and width 64: 650 positions take 108 + 1.7 MB gathered, 3500 take 0.9 + 49 skewed."""
    gathered, skewed = (
        RelativeAttention(num_heads=1, len_seq=n, head_dim=64, dtype=FP32) for n in (650, 3500)
    )
    assert gathered.gathered_bytes() / 1e6 == pytest.approx(108, rel=0.01)
    assert gathered.logits_bytes() / 1e6 == pytest.approx(1.7, rel=0.01)
    assert skewed.embedding_bytes() / 1e6 == pytest.approx(0.9, rel=0.01)
    assert skewed.logits_bytes() / 1e6 == pytest.approx(49, rel=0.01)


def test_intermediates_by_hand() -> None:
    op = RelativeAttention(**SHAPE, dtype=FP16)
    assert op.intermediate_bytes() == 2 * (3 * 10 * 8 + 2 * 3 * 100)
    assert op.intermediate_bytes(gathered=True) == 2 * (3 * 100 * 8 + 2 * 3 * 100)


def test_three_products_and_seven_kernels() -> None:
    op = RelativeAttention(**SHAPE, dtype=FP16)
    work = op.work(2**20)
    assert work.tensor_flops[FP16] == 3 * 2 * 2 * 3 * 100 * 8
    assert work.launches == 7
    assert op.min_flops()[FP16] == 6 * 2 * 3 * 55 * 8


def test_a_memory_without_room_is_refused() -> None:
    with pytest.raises(InputError, match="cannot hold one element"):
        Skew(len_seq=3).work(1)
