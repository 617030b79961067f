"""Sequence parallelism: schedules, messages, balance, all ranks' programs against the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP32
from hwmodels.errors import InputError, UnknownNameError
from tests.workloads.proof import assert_proved, proves
from workloads.op import Op
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.linear_states import LinearStates
from workloads.ops.sequence_attention import RingAttention, RingSelfAttention, UlyssesAttention
from workloads.sequence_parallel import (
    LAYOUTS,
    RINGS,
    STRATEGIES,
    ZIGZAG,
    assignment,
    attention_speedup,
    balance_frac,
    buffer_bytes,
    check_ranks,
    chunk,
    exchange_bytes,
    kept_bytes,
    messages,
    num_pairs,
    num_steps,
    strategy,
    tokens_of,
    with_layout,
)
from workloads.workload import BACKWARD, FORWARD

FUSED_RINGS = [s.name for s in STRATEGIES.values() if s.moves in RINGS and s.fused]
memories = st.floats(11, 15).map(lambda exponent: int(2**exponent))
ranks_of = st.integers(2, 6)


def whole(length: int = 48, **changes: Any) -> FlashAttention2:
    values: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "causal": True}
    return FlashAttention2(len_q=length, **(values | changes))


def fits(op: Op, fast_bytes: int) -> bool:
    try:
        op.work(fast_bytes)
    except InputError:
        return False
    return True


# ---- programs ------------------------------------------------------------------------------


@st.composite
def rings(draw: st.DrawFn) -> RingAttention:
    ranks, kv_heads = draw(ranks_of), draw(st.integers(1, 2))
    return RingAttention(
        batch=draw(st.integers(1, 2)), num_heads=kv_heads * draw(st.integers(1, 2)),
        num_kv_heads=kv_heads, len_seq=2 * ranks * draw(st.integers(1, 3)),
        head_dim=draw(st.integers(1, 6)), num_ranks=ranks, causal=draw(st.booleans()),
        strategy=draw(st.sampled_from(FUSED_RINGS)), dtype=draw(st.sampled_from([BF16, FP32])),
    )  # fmt: skip


@proves("ring_attention")
@given(op=rings(), fast_bytes=memories)
def test_ranks_in_step_compute_whole_attention(op: RingAttention, fast_bytes: int) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@st.composite
def of_heads(draw: st.DrawFn) -> UlyssesAttention:
    ranks, kv_heads = draw(ranks_of), draw(st.integers(1, 2))
    return UlyssesAttention(
        batch=draw(st.integers(1, 2)), num_heads=ranks * kv_heads * draw(st.integers(1, 2)),
        num_kv_heads=ranks * kv_heads, len_seq=ranks * draw(st.integers(1, 4)),
        head_dim=draw(st.integers(1, 6)), num_ranks=ranks, causal=draw(st.booleans()),
    )  # fmt: skip


@proves("ulysses_attention")
@given(op=of_heads(), fast_bytes=memories)
def test_heads_for_tokens_computes_whole_attention(op: UlyssesAttention, fast_bytes: int) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@st.composite
def unfused(draw: st.DrawFn) -> RingSelfAttention:
    ranks = draw(ranks_of)
    return RingSelfAttention(
        batch=draw(st.integers(1, 2)), num_heads=draw(st.integers(1, 3)),
        len_seq=ranks * draw(st.integers(1, 5)), head_dim=draw(st.integers(1, 6)),
        num_ranks=ranks, dtype=draw(st.sampled_from([BF16, FP32])),
    )  # fmt: skip


@proves("ring_self_attention")
@given(op=unfused(), fast_bytes=memories)
def test_two_rings_around_a_softmax_compute_whole_attention(
    op: RingSelfAttention, fast_bytes: int
) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@st.composite
def linear(draw: st.DrawFn) -> LinearStates:
    ranks, length = draw(ranks_of), draw(st.integers(1, 9))
    return LinearStates(
        batch=draw(st.integers(1, 2)), num_heads=draw(st.integers(1, 3)),
        len_seq=ranks * length, head_dim=draw(st.integers(1, 6)), num_ranks=ranks,
        chunk=draw(st.integers(1, 5)), dtype=draw(st.sampled_from([BF16, FP32])),
    )  # fmt: skip


@proves("linear_states")
@given(op=linear(), fast_bytes=memories)
def test_states_of_all_ranks_give_whole_linear_attention(op: LinearStates, fast_bytes: int) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


# ---- schedules -----------------------------------------------------------------------------


@given(name=st.sampled_from(FUSED_RINGS), num_ranks=ranks_of, causal=st.booleans())
def test_every_pair_is_computed_once(name: str, num_ranks: int, causal: bool) -> None:
    how, shape = strategy(name), whole(12 * num_ranks, causal=causal)
    total = sum(num_pairs(how, shape, num_ranks, rank) for rank in range(num_ranks))
    assert total == shape.num_pairs()


@given(name=st.sampled_from(FUSED_RINGS), num_ranks=ranks_of, causal=st.booleans())
def test_a_rank_has_been_sent_what_it_works_on(name: str, num_ranks: int, causal: bool) -> None:
    """Follow keys and queries from hand to hand: no rank uses what nobody sent it."""
    how, shape = strategy(name), whole(12 * num_ranks, causal=causal)
    held = {rank: {("keys", rank), ("query", rank)} for rank in range(num_ranks)}
    for step in range(num_steps(how, num_ranks, causal=causal)):
        for rank in range(num_ranks):
            work = assignment(how, num_ranks, rank, step, causal=causal)
            if work and chunk(how, shape, num_ranks, *work):
                assert {("query", work[0]), ("keys", work[1])} <= held[rank]
        before = {rank: set(found) for rank, found in held.items()}
        for message in messages(how, shape, num_ranks, step):
            found = {item for item in before[message.source] if item[0] == message.what}
            held[message.target] |= found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_every_token_to_one_rank(layout: str) -> None:
    found = np.concatenate([tokens_of(layout, 3, 24, rank) for rank in range(3)])
    assert sorted(found) == list(range(24))


def test_balance_by_hand() -> None:
    """8 ranks, blocks of c: contiguous lasts 7.5 c^2 where 4 c^2 of 8 ranks would do."""
    shape = whole(8 * 2**12)
    assert attention_speedup(strategy("ring_attention"), shape, 8) == pytest.approx(
        32 / 7.5, rel=1e-3
    )
    assert attention_speedup(strategy("lightseq"), shape, 8) == pytest.approx(32 / 4.5, rel=1e-3)
    assert balance_frac(strategy("zigzag_ring"), shape, 8) == pytest.approx(1, abs=1e-3)
    assert balance_frac(strategy("striped_attention"), shape, 8) == pytest.approx(1, abs=1e-3)


@given(half=st.integers(1, 6))
def test_an_odd_number_of_ranks_is_never_idle_under_the_balanced_schedule(half: int) -> None:
    """Idle fraction 0 where P is odd, 1 / (2 P) where even (section 3.2), the diagonal aside."""
    for num_ranks in (2 * half + 1, 2 * half):
        steps = num_steps(strategy("lightseq"), num_ranks, causal=True)
        idle = sum(
            assignment(strategy("lightseq"), num_ranks, rank, step, causal=True) is None
            for rank in range(num_ranks)
            for step in range(steps)
        )
        assert idle == (0 if num_ranks % 2 else num_ranks // 2)


# ---- bytes ---------------------------------------------------------------------------------


def test_bytes_by_hand() -> None:
    """N 4096, P 8, 4 heads of 8, 2 of keys: c = 512; K and V 512 * 2 * 2 * 8 * 2 B."""
    shape, keys = whole(4096), 512 * 2 * 2 * 8 * 2
    query = 512 * 4 * 8 * 2
    assert exchange_bytes(strategy("ring_attention"), shape, 8) == {"send_recv": 7 * keys}
    back = exchange_bytes(strategy("ring_attention"), shape, 8, phase=BACKWARD)
    assert back == {"send_recv": 14 * keys}
    of_heads = exchange_bytes(strategy("ulysses"), shape.over(num_kv_heads=4), 4)
    assert of_heads == {"all_to_all": 4 * 2 * query * 3 / 4}  # c is twice as long on 4 ranks
    states = exchange_bytes(strategy("lasp2"), shape, 8)
    assert states == exchange_bytes(strategy("lasp2"), whole(8192), 8) == {"all_gather": 7 * 512}


def test_queries_that_travel_leave_keys_where_they_are() -> None:
    """Q out 7 times, O with the logsumexp back: whole from 0 to others' later, else halves."""
    shape = whole(4096)
    query, rows = 512 * 4 * 8 * 2, 512 * 4 * 4
    sent = exchange_bytes(strategy("token_ring"), shape, 8)["send_recv"]
    assert sent == 7 * query + 7 * (query + rows)  # rank 0 answers for all ranks behind it


def test_li_et_al_send_as_much_as_tensor_parallelism() -> None:
    """8 (N - 1) B Z (L / N) A elements, forward and backward."""
    shape, how = whole(512, num_kv_heads=4, causal=False), strategy("ring_self_attention")
    both = sum(exchange_bytes(how, shape, 4, phase=p)["send_recv"] for p in (FORWARD, BACKWARD))
    assert both / 2 == 8 * 3 * 4 * (512 / 4) * 8


def test_memory_of_a_rank() -> None:
    shape = whole(4096)
    fused, scores = (
        kept_bytes(strategy(n), shape, 8) for n in ("ring_attention", "ring_self_attention")
    )
    assert scores - fused == 4 * 512 * 4096 * 2 - 512 * 4 * 4
    assert kept_bytes(strategy("ring_attention"), shape, 16) == fused / 2
    for name in STRATEGIES:
        assert buffer_bytes(strategy(name), shape, 8) > 0


# ---- what is refused -----------------------------------------------------------------------


def test_more_ranks_than_heads_are_refused_with_the_way_out() -> None:
    with pytest.raises(InputError, match=r"degree 4 must divide the 2 key and value heads.*ring"):
        check_ranks(strategy("ulysses"), whole(), 4)
    with pytest.raises(InputError, match="must divide"):
        UlyssesAttention(num_heads=32, num_kv_heads=8, len_seq=4096, head_dim=128, num_ranks=16)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_ranks": 1}, "nobody to send to"),
        ({"num_ranks": 3}, "that 6 divides.*pad"),
        ({"num_ranks": np.array([2, 4])}, "ask once for each"),
        ({"strategy": "ulysses"}, "its own op"),
    ],
)
def test_bad_rings_are_refused_in_a_line(values: dict[str, Any], said: str) -> None:
    shape: dict[str, Any] = {
        "num_heads": 4,
        "len_seq": 64,
        "head_dim": 8,
        "strategy": "zigzag_ring",
    }
    with pytest.raises(InputError, match=said):
        RingAttention(**(shape | values))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="ring_atention"):
        strategy("ring_atention")
    with pytest.raises(InputError, match="leave the layout out"):
        with_layout(strategy("lightseq"), ZIGZAG)
    assert with_layout(strategy("ring_attention"), ZIGZAG).layout == ZIGZAG
