"""The parts that selections are made of: top-k, block means, attention over lists, host copies."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP8, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.op import Op
from workloads.ops.block_pool import KINDS, BlockPool
from workloads.ops.host_copy import HostCopy
from workloads.ops.selected_attention import SelectedAttention
from workloads.ops.top_k import TopK

memories = st.floats(8, 16).map(lambda exponent: int(2**exponent))


def fits(op: Op, fast_bytes: int) -> bool:
    try:
        op.tiling(fast_bytes)
    except InputError:
        return False
    return True


@st.composite
def top_ks(draw: st.DrawFn) -> TopK:
    cols = draw(st.integers(1, 300))
    dtype = draw(st.sampled_from([BF16, FP8, FP32]))
    k = draw(st.integers(1, cols))
    return TopK(rows=draw(st.integers(1, 3)), cols=cols, k=k, dtype=dtype)


@proves("top_k")
@given(op=top_ks(), fast_bytes=st.floats(10.1, 13).map(lambda e: int(2**e)))
def test_top_k_counts_what_the_closed_form_says(op: TopK, fast_bytes: int) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@st.composite
def pools(draw: st.DrawFn) -> BlockPool:
    length = draw(st.integers(1, 60))
    return BlockPool(
        batch=draw(st.integers(1, 3)), len_seq=length, dim=draw(st.integers(1, 20)),
        block=draw(st.integers(1, length)), dtype=draw(st.sampled_from([BF16, FP32])),
        out_dtype=draw(st.sampled_from([None, FP32])), kind=draw(st.sampled_from(KINDS)),
    )  # fmt: skip


@proves("block_pool")
@given(op=pools(), fast_bytes=memories)
def test_block_means_count_what_the_closed_form_says(op: BlockPool, fast_bytes: int) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@st.composite
def selected(draw: st.DrawFn) -> SelectedAttention:
    kv_heads, block_q, block_k = (draw(st.integers(1, n)) for n in (2, 5, 4))
    runs = draw(st.integers(1, 12))
    return SelectedAttention(
        batch=draw(st.integers(1, 2)),
        num_heads=kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        len_q=block_q * draw(st.integers(1, 3)),
        len_kv=runs * block_k + draw(st.integers(0, 5)),
        head_dim=draw(st.integers(1, 12)),
        head_dim_v=draw(st.integers(1, 12)),
        len_selected=draw(st.integers(1, runs * block_k)),
        block_q=block_q,
        block_k=block_k,
        per_head=draw(st.booleans()),
    )


@proves("selected_attention")
@given(op=selected(), fast_bytes=memories)
def test_selected_attention_counts_what_the_closed_form_says(
    op: SelectedAttention, fast_bytes: int
) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"len_selected": 65}, "len_selected = 65 is more than the len_kv = 64"),
        ({"num_kv_heads": 3}, "num_kv_heads = 3 must divide num_heads = 8"),
        ({"len_q": 6, "block_q": 4}, "block_q = 4 must divide len_q = 6"),
    ],
)
def test_impossible_lists_are_refused(change: dict[str, int], says: str) -> None:
    fields = {"num_heads": 8, "len_kv": 64, "head_dim": 8, "len_selected": 8} | change
    with pytest.raises(InputError, match=says):
        SelectedAttention(**fields)


def test_more_than_all_and_longer_than_the_sequence_are_refused() -> None:
    with pytest.raises(InputError, match="k = 9 is more than cols = 8"):
        TopK(rows=1, cols=8, k=9)
    with pytest.raises(InputError, match="block = 9 is longer than len_seq = 8"):
        BlockPool(len_seq=8, dim=1, block=9)
    with pytest.raises(InputError, match="kind = 'median' must be one of mean, sum, max"):
        BlockPool(len_seq=8, dim=1, block=8, kind="median")


def test_a_copy_to_the_host_reads_device_memory() -> None:
    out, back = (HostCopy(num_bytes=8, to_host=flag).work(64) for flag in (True, False))
    assert (out.read_bytes, out.write_bytes, out.host_bytes) == (8, 0, 8)
    assert (back.read_bytes, back.write_bytes, back.host_bytes) == (0, 8, 8)
