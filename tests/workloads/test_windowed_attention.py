"""The lambda-shaped mask and its mixtures: proofs, counts by hand, refusals."""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.op import Op
from workloads.ops.shifted_groups import ShiftedGroupAttention, ShiftedGroupAttentionBackward
from workloads.ops.span_mixture import HeadSpanAttention, LayerSpanAttention
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
def test_a_window_counts_what_the_closed_form_says(
    op: WindowedAttention, fast_bytes: int
) -> None:
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


def head_spans_or_none(draw: st.DrawFn) -> HeadSpanAttention | None:
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


def group_fields(draw: st.DrawFn) -> dict[str, object]:
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
    op = ShiftedGroupAttention(**group_fields(data.draw))  # type: ignore[arg-type]
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@proves("shifted_group_attention_backward")
@given(data=st.data(), fast_bytes=st.floats(10, 16).map(lambda exponent: int(2**exponent)))
def test_the_gradient_of_shifted_groups_counts_what_the_closed_form_says(
    data: st.DataObject, fast_bytes: int
) -> None:
    op = ShiftedGroupAttentionBackward(**group_fields(data.draw))  # type: ignore[arg-type]
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)
