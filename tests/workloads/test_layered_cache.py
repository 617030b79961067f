"""Caches compressed across layers: merged in pairs, budgets by layer."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from tests.workloads.test_selection import fits
from workloads.ops.cache_segment import KNOWN_BITS
from workloads.ops.layered_cache import (
    LayerBudgetAttention,
    LayerBudgetSelection,
    MergedLayersAttention,
)
from workloads.ops.merge_layers import MergeLayers, SlerpMerge

SHAPE = {"num_heads": 32, "len_kv": 1000, "head_dim": 128}
memories = st.floats(10, 15).map(lambda exponent: int(2**exponent))


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


def test_merged_layers_by_hand() -> None:
    """Eight layers: four of their own, two pairs; four bits, a scale a head and token."""
    op = MergedLayersAttention(**SHAPE, num_layers=8)  # type: ignore[arg-type]
    codes = 32 * 2 * (64 + 2)
    pair = 1000 * codes + 2 * 50 * codes + 1000 * 8 + 50 * 4
    assert op.cache_bytes() == 4 * 1000 * codes + 2 * pair
    own, paired = op.stages()
    assert (own.times, paired.times) == (4, 4)
    # The directions are read by both layers, with 16 bits of length a key and value and head.
    merged = 950 * (codes + 32 * 4) + 50 * codes
    assert op.compulsory_bytes() == 4 * (1000 * codes + merged + 2 * 2 * 2 * 4096)


def test_impossible_layers_are_refused() -> None:
    with pytest.raises(InputError, match=r"budget_frac = 0.0001 leaves some layer without a token"):
        LayerBudgetAttention(**SHAPE, budget_frac=0.0001)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="bits = 5 must be one of"):
        MergedLayersAttention(**SHAPE, bits=5)  # type: ignore[arg-type]
