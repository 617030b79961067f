"""The lambda-shaped mask and its mixtures: proofs, counts by hand, refusals."""

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
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.shifted_groups import ShiftedGroupAttention, ShiftedGroupAttentionBackward
from workloads.ops.span_mixture import (
    HeadSpanAttention,
    LayerSpanAttention,
    LayerSpanAttentionBackward,
)
from workloads.ops.windowed_attention import WindowedAttention

memories = st.floats(8, 16).map(lambda exponent: int(2**exponent))


def fits(op: Op, fast_bytes: int) -> bool:
    try:
        op.tiling(fast_bytes)
    except InputError:
        return False
    return True


@st.composite
def windows(draw: st.DrawFn) -> WindowedAttention:
    kv_heads, len_q = draw(st.integers(1, 2)), draw(st.integers(1, 200))
    len_kv = len_q + draw(st.integers(0, 60))
    return WindowedAttention(
        batch=draw(st.integers(1, 2)),
        num_heads=kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        len_q=len_q,
        len_kv=len_kv,
        head_dim=draw(st.integers(1, 6)),
        head_dim_v=draw(st.sampled_from([None, 1, 5])),
        window=draw(st.integers(1, len_kv)),
        num_sinks=draw(st.one_of(st.none(), st.integers(1, 90))),
        dtype=draw(st.sampled_from([BF16, FP32])),
    )


@proves("windowed_attention", shapes=300)
@given(op=windows(), fast_bytes=memories)
def test_a_window_counts_what_the_closed_form_says(op: WindowedAttention, fast_bytes: int) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@st.composite
def head_spans(draw: st.DrawFn) -> HeadSpanAttention:
    kv_heads, len_q = draw(st.integers(2, 4)), draw(st.integers(1, 60))
    len_kv = len_q + draw(st.integers(3, 40))
    sinks = draw(st.one_of(st.none(), st.integers(1, 2)))
    return HeadSpanAttention(
        batch=draw(st.integers(1, 2)),
        num_heads=kv_heads * draw(st.integers(1, 2)),
        num_kv_heads=kv_heads,
        len_q=len_q,
        len_kv=len_kv,
        head_dim=draw(st.integers(1, 6)),
        span_local=draw(st.integers(3, len_kv)),
        num_local=draw(st.sampled_from([None, 1, kv_heads - 1])),
        num_sinks=sinks,
        density_frac=1.0 - draw(st.sampled_from([0.0, 0.25, 0.5])) * (len_kv > 12),
    )


def head_spans_or_none(draw: Any) -> HeadSpanAttention | None:
    try:
        return draw(head_spans())
    except InputError:  # the local heads took more than the budget
        return None


@proves("head_span_attention", shapes=250)
@given(data=st.data(), fast_bytes=memories)
def test_spans_by_head_count_what_the_closed_form_says(
    data: st.DataObject, fast_bytes: int
) -> None:
    op = head_spans_or_none(data.draw)
    assume(op is not None)
    assert op is not None
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@st.composite
def layer_spans(draw: st.DrawFn) -> LayerSpanAttention:
    kv_heads, span, layers = (draw(st.integers(1, n)) for n in (2, 20, 3))
    sliding, new = draw(st.booleans()), draw(st.booleans())
    length = span * draw(st.integers(1, 4)) + (draw(st.integers(0, 9)) if sliding or new else 0)
    return LayerSpanAttention(
        batch=draw(st.integers(1, 2)),
        num_layers=layers,
        num_full_layers=draw(st.integers(1, layers)),
        num_heads=kv_heads * draw(st.integers(1, 2)),
        num_kv_heads=kv_heads,
        len_q=1 if new else length,
        len_kv=length,
        head_dim=draw(st.integers(1, 6)),
        span=span,
        sliding=sliding,
    )


@proves("layer_span_attention")
@given(op=layer_spans(), fast_bytes=memories)
def test_spans_by_layer_count_what_the_closed_form_says(
    op: LayerSpanAttention, fast_bytes: int
) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@st.composite
def layer_gradients(draw: st.DrawFn) -> LayerSpanAttentionBackward:
    kv_heads, span, layers = (draw(st.integers(1, n)) for n in (2, 15, 3))
    return LayerSpanAttentionBackward(
        batch=draw(st.integers(1, 2)),
        num_layers=layers,
        num_full_layers=draw(st.integers(1, layers)),
        num_heads=kv_heads * draw(st.integers(1, 2)),
        num_kv_heads=kv_heads,
        len_q=max(span * draw(st.integers(1, 4)), 2),
        head_dim=draw(st.integers(1, 6)),
        span=span,
    )


@proves("layer_span_attention_backward")
@given(op=layer_gradients(), fast_bytes=memories)
def test_the_gradient_of_spans_by_layer_counts_what_the_closed_form_says(
    op: LayerSpanAttentionBackward, fast_bytes: int
) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


def group_fields(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads, len_group = 2 * draw(st.integers(1, 2)), draw(st.integers(2, 12))
    groups = draw(st.integers(2, 4))
    return {
        "batch": draw(st.integers(1, 2)),
        "num_heads": kv_heads * draw(st.integers(1, 2)),
        "num_kv_heads": kv_heads,
        "len_seq": len_group * groups,
        "num_groups": groups,
        "head_dim": draw(st.integers(1, 6)),
        "num_sinks": draw(st.one_of(st.none(), st.integers(1, len_group // 2))),
    }


@proves("shifted_group_attention")
@given(data=st.data(), fast_bytes=memories)
def test_shifted_groups_count_what_the_closed_form_says(
    data: st.DataObject, fast_bytes: int
) -> None:
    op = ShiftedGroupAttention(**group_fields(data.draw))
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@proves("shifted_group_attention_backward")
@given(data=st.data(), fast_bytes=st.floats(10, 16).map(lambda exponent: int(2**exponent)))
def test_the_gradient_of_shifted_groups_counts_what_the_closed_form_says(
    data: st.DataObject, fast_bytes: int
) -> None:
    op = ShiftedGroupAttentionBackward(**group_fields(data.draw))
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


# ---- counts by hand ------------------------------------------------------------------------


def test_pairs_are_those_of_the_mask() -> None:
    """7 queries, the first at position 2 of 9 keys; 2 sinks, a window of 3."""
    op = WindowedAttention(num_heads=1, len_q=7, len_kv=9, head_dim=4, window=3, num_sinks=2)
    assert op.num_pairs() == 3 + 4 + 5 + 5 + 5 + 5 + 5
    assert op.min_flops()[BF16] == 2 * 32 * 8
    assert op.over(len_q=1).num_pairs() == 5


def test_a_window_over_everything_counts_what_full_attention_does() -> None:
    shape: dict[str, Any] = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "len_q": 300,
        "len_kv": 400,
        "head_dim": 16,
    }
    whole = WindowedAttention(**shape, window=400)
    dense = FlashAttention2(**shape, causal=True)
    assert whole.min_flops() == dense.min_flops()
    assert whole.compulsory_bytes() == dense.compulsory_bytes()


def test_prefill_is_linear_in_the_length() -> None:
    op = WindowedAttention(num_heads=8, len_q=2**16, head_dim=64, window=1020, num_sinks=4)
    one, two = (op.over(len_q=n).work(2**17) for n in (2**16, 2**17))
    assert two.tensor_flops[BF16] / one.tensor_flops[BF16] == pytest.approx(2, rel=0.02)
    assert two.bytes / one.bytes == pytest.approx(2, rel=0.02)


def test_the_cache_stops_growing() -> None:
    op = WindowedAttention(num_heads=2, len_q=1, len_kv=50, head_dim=8, window=20, num_sinks=4)
    assert op.cache_bytes() == op.over(len_kv=5000).cache_bytes() == 2 * 2 * 2 * 8 * 24
    assert op.over(len_kv=21).cache_bytes() == 2 * 2 * 2 * 8 * 21
    assert op.stages()[0].op.name == "decode_attention"


def test_counts_broadcast_over_sizes() -> None:
    op = WindowedAttention(num_heads=4, len_q=64, head_dim=16, window=9, num_sinks=3)
    lengths = np.array([20.0, 64.0, 300.0, 4000.0])
    for memory in (2**11, 2**13, 2**16):
        many = op.over(len_q=lengths).work(memory)
        ones = [op.over(len_q=int(n)).work(memory) for n in lengths]
        for counter in ("bytes", "vector_flops", "special_ops"):
            found = np.broadcast_to(getattr(many, counter), 4).tolist()
            assert found == [getattr(one, counter) for one in ones], counter


def test_elastic_heads_take_what_local_ones_leave() -> None:
    op = HeadSpanAttention(num_heads=8, len_q=1, len_kv=1000, head_dim=4, span_local=100)
    assert op.span_elastic() == 900
    assert op.over(num_local=6, span_local=200).span_elastic() == 1000  # at most all
    assert op.over(len_kv=2000).span_elastic() == 1900  # alpha stays, beta grows
    assert op.cache_bytes() == 2 * 2 * 4 * (4 * 100 + 4 * 900)


def test_groups_cost_their_share() -> None:
    shape: dict[str, Any] = {"num_heads": 4, "len_seq": 64, "head_dim": 8}
    op = ShiftedGroupAttention(**shape, num_groups=4)
    assert op.min_flops()[BF16] == 4 * (4 * 16 * 17 // 2) * 4 * 8
    sinks = op.over(num_sinks=2).min_flops()[BF16] - op.min_flops()[BF16]
    assert sinks == 4 * 48 * 2 * 4 * 8


def test_full_layers_and_spans_add_up() -> None:
    op = LayerSpanAttention(
        num_layers=3, num_full_layers=1, num_heads=1, len_q=8, head_dim=1, span=2
    )
    assert op.min_flops()[BF16] == 4 * (36 + 2 * 12)
    assert op.over(sliding=True).min_flops()[BF16] == 4 * (36 + 2 * 15)


# ---- refusals ------------------------------------------------------------------------------

LINE: dict[str, Any] = {"num_heads": 4, "len_q": 64, "head_dim": 8}


@pytest.mark.parametrize(
    ("make", "fields", "says"),
    [
        (WindowedAttention, {"window": 65}, "window = 65 is longer than the len_kv = 64 keys"),
        (WindowedAttention, {"window": 8, "causal": False}, "needs causal=true"),
        (HeadSpanAttention, {"span_local": 65}, "density_frac leaves a span of"),
        (HeadSpanAttention, {"span_local": 65, "density_frac": 1.0}, "span_local = 65 is longer"),
        (HeadSpanAttention, {"span_local": 8, "num_sinks": 8}, "not more than the num_sinks = 8"),
        (HeadSpanAttention, {"span_local": 8, "num_local": 4}, "leaves a class empty"),
        (HeadSpanAttention, {"span_local": 8, "num_kv_heads": 3}, "must divide num_heads = 4"),
        (LayerSpanAttention, {"num_layers": 2, "num_full_layers": 3, "span": 8}, "is more than"),
        (LayerSpanAttention, {"num_layers": 2, "span": 128}, "span = 128 is longer than"),
        (LayerSpanAttention, {"num_layers": 2, "span": 24}, "blocks of span = 24 must divide"),
        (LayerSpanAttentionBackward, {"num_layers": 2, "span": 8, "sliding": True}, "in blocks"),
    ],
)
def test_impossible_spans_are_refused(make: type[Op], fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        make(**(LINE | fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_groups": 5}, "num_groups = 5 must be at least 2 and divide len_seq = 64"),
        ({"num_groups": 1}, "num_groups = 1 must be at least 2"),
        ({"num_heads": 3}, "num_kv_heads = 3 has no half to shift"),
        ({"num_sinks": 9}, "num_sinks = 9 is more than half a group of 16"),
    ],
)
def test_impossible_groups_are_refused(change: dict[str, int], says: str) -> None:
    fields: dict[str, Any] = {"num_heads": 4, "len_seq": 64, "head_dim": 8}
    with pytest.raises(InputError, match=says):
        ShiftedGroupAttention(**(fields | change))
