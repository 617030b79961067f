"""Compressed caches: codes restored inside the kernel, and what compressing them takes."""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from tests.workloads.test_selection import fits
from workloads.ops.cache_segment import KNOWN_BITS, Coding, Segment
from workloads.ops.compress_cache import CompressCache
from workloads.ops.compressed_cache import CompressedAttention
from workloads.ops.layered_cache import (
    LayerBudgetAttention,
    LayerBudgetSelection,
    MergedLayersAttention,
)
from workloads.ops.merge_layers import MergeLayers, SlerpMerge
from workloads.ops.quantise_groups import ChannelScores, QuantiseGroups
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


def schemes(draw: st.DrawFn) -> dict[str, object]:
    """Fields of a random scheme: any mixture of the published ideas."""
    joined, cached = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    length, d = draw(st.integers(2, 40)), draw(st.integers(1, 10))
    buffer = draw(st.sampled_from([None, 1, 3, length]))
    generated = draw(st.integers(1, length - 1)) if buffer and draw(st.booleans()) else None
    bits = st.sampled_from(KNOWN_BITS)
    return {
        "batch": draw(st.integers(1, 2)),
        "num_heads": joined * cached * draw(st.integers(1, 3)),
        "num_kv_heads": joined * cached,
        "heads_joined": joined,
        "len_kv": length,
        "head_dim": d,
        "key_bits": draw(bits),
        "value_bits": draw(bits),
        "group_size": draw(st.sampled_from([None, 2, 5])),
        "keys_per_channel": draw(st.booleans()),
        "zero_point": draw(st.booleans()),
        "scale_bits": draw(st.sampled_from([8, 16])),
        "full_frac": draw(st.sampled_from([0.0, 0.25, 1.0])),
        "len_buffer": buffer,
        "len_generated": generated,
        "rank": draw(st.sampled_from([None, 1, 4])),
        "rank_generated": draw(st.sampled_from([None, 2])),
        "outlier_frac": draw(fractions),
        "pruned_frac": draw(st.sampled_from([0.0, 0.4])),
        "key_frac": draw(st.sampled_from([1.0, 0.5])),
        "value_frac": draw(st.sampled_from([1.0, 0.3])),
        "absorbed": draw(st.booleans()),
    }


@st.composite
def compressed(draw: st.DrawFn) -> CompressedAttention:
    return CompressedAttention(**schemes(draw))  # type: ignore[arg-type]


@proves("compressed_attention")
@given(op=compressed(), fast_bytes=memories)
def test_compressed_attention_counts_what_the_closed_form_says(
    op: CompressedAttention, fast_bytes: int
) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@st.composite
def quantisers(draw: st.DrawFn) -> QuantiseGroups:
    return QuantiseGroups(
        rows=draw(st.integers(1, 4)), cols=draw(st.integers(1, 70)),
        bits=draw(st.sampled_from(KNOWN_BITS[:-1])),
        group=draw(st.sampled_from([None, 1, 7, 32])), zero_point=draw(st.booleans()),
        scale_bits=draw(st.sampled_from([8, 16])), dtype=draw(st.sampled_from([BF16, FP32])),
    )  # fmt: skip


@proves("quantise_groups")
@given(op=quantisers(), fast_bytes=st.integers(30, 300))
def test_quantising_counts_what_the_closed_form_says(op: QuantiseGroups, fast_bytes: int) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@st.composite
def scored(draw: st.DrawFn) -> ChannelScores:
    streams, len_q, len_kv, dim = (draw(st.integers(1, n)) for n in (3, 6, 20, 20))
    return ChannelScores(streams=streams, len_q=len_q, len_kv=len_kv, dim=dim)


@proves("channel_scores")
@given(op=scored(), fast_bytes=st.integers(8, 300))
def test_channel_scores_count_what_the_closed_form_says(op: ChannelScores, fast_bytes: int) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@st.composite
def compressors(draw: st.DrawFn) -> CompressCache:
    try:
        return CompressCache(**schemes(draw), len_window=draw(st.integers(1, 3)))  # type: ignore[arg-type]
    except InputError:
        assume(False)
        raise


@proves("compress_cache")
@given(op=compressors(), fast_bytes=st.floats(11.5, 15).map(lambda e: int(2**e)))
def test_compressing_counts_what_the_closed_form_says(op: CompressCache, fast_bytes: int) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@st.composite
def merged_layers(draw: st.DrawFn) -> MergedLayersAttention:
    kv_heads = draw(st.integers(1, 2))
    return MergedLayersAttention(
        batch=draw(st.integers(1, 2)),
        num_heads=kv_heads * draw(st.integers(1, 2)),
        num_kv_heads=kv_heads,
        len_kv=draw(st.integers(1, 30)),
        head_dim=draw(st.integers(1, 8)),
        num_layers=draw(st.integers(1, 7)),
        merged_frac=draw(st.sampled_from([0.0, 0.5, 1.0])),
        retained_frac=draw(st.sampled_from([0.0, 0.05, 1.0])),
        bits=draw(st.sampled_from(KNOWN_BITS)),
        group_size=draw(st.sampled_from([None, 3])),
        zero_point=draw(st.booleans()),
    )


@proves("merged_layers_attention")
@given(op=merged_layers(), fast_bytes=memories)
def test_merged_layers_count_what_the_closed_form_says(
    op: MergedLayersAttention, fast_bytes: int
) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@st.composite
def budgets(draw: st.DrawFn) -> dict[str, object]:
    kv_heads, layers, length = draw(st.integers(1, 2)), draw(st.integers(1, 7)), 40
    fields: dict[str, object] = {
        "batch": draw(st.integers(1, 2)),
        "num_heads": kv_heads * draw(st.integers(1, 2)),
        "num_kv_heads": kv_heads,
        "len_kv": draw(st.integers(5, length)),
        "head_dim": draw(st.integers(1, 8)),
        "num_layers": layers,
        "budget_frac": draw(st.sampled_from([0.2, 0.33, 0.99, 1.0])),
        "spread_frac": draw(st.sampled_from([0.0, 0.4, 1.0])),
    }
    op = LayerBudgetSelection(**fields)  # type: ignore[arg-type]
    assert sum(size * count for _, size, count in op.sizes()) == op.num_kept
    assert sum(count for _, _, count in op.sizes()) == layers
    return fields


@proves("layer_budget_attention", "layer_budget_selection")
@given(fields=budgets(), fast_bytes=st.floats(10.5, 14).map(lambda e: int(2**e)))
def test_layer_budgets_count_what_the_closed_form_says(
    fields: dict[str, object], fast_bytes: int
) -> None:
    for kind in (LayerBudgetAttention, LayerBudgetSelection):
        op = kind(**fields)  # type: ignore[arg-type]
        assume(fits(op, fast_bytes))
        assert_proved(op, fast_bytes)


@st.composite
def merges(draw: st.DrawFn) -> SlerpMerge:
    rows, cols = draw(st.integers(1, 5)), draw(st.integers(2, 40))
    return SlerpMerge(rows=rows, cols=cols, dtype=draw(st.sampled_from([BF16, FP32])))


@proves("slerp_merge")
@given(op=merges(), fast_bytes=st.integers(70, 400))
def test_merging_counts_what_the_closed_form_says(op: SlerpMerge, fast_bytes: int) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@st.composite
def pairs(draw: st.DrawFn) -> MergeLayers:
    return MergeLayers(
        batch=draw(st.integers(1, 2)),
        num_kv_heads=draw(st.integers(1, 3)),
        len_kv=draw(st.integers(1, 20)),
        head_dim=draw(st.integers(2, 9)),
        retained_frac=draw(st.sampled_from([0.0, 0.05, 0.5])),
        bits=draw(st.sampled_from(KNOWN_BITS)),
        zero_point=draw(st.booleans()),
    )


@proves("merge_layers")
@given(op=pairs(), fast_bytes=st.floats(10.2, 13).map(lambda e: int(2**e)))
def test_merging_a_pair_counts_what_the_closed_form_says(op: MergeLayers, fast_bytes: int) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)
