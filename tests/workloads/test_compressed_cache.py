"""Compressed caches: codes restored inside the kernel, and what compressing them takes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from tests.workloads.test_selection import fits
from workloads import registry
from workloads.ops.cache_segment import KNOWN_BITS, Coding, Segment
from workloads.ops.compress_cache import CompressCache
from workloads.ops.compressed_cache import CompressedAttention
from workloads.ops.layered_cache import LayerBudgetAttention
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


# ---- by hand -------------------------------------------------------------------------------

SHAPE = {"num_heads": 32, "len_kv": 1020, "head_dim": 128}


def test_gear_by_hand() -> None:
    """1000 old tokens of 32 heads: codes, channel and token scales, factors, 2 % outliers."""
    op = registry.build("gear", SHAPE)
    assert isinstance(op, CompressedAttention)
    codes, scales = 2 * 1000 * 128 / 2, (128 + 1000) * 2 * 2
    factors, outliers = 2 * 4 * (1000 + 128) * 2, 2 * 2560 * 6
    buffer = 20 * 2 * 128 * 2
    assert op.cache_bytes() == 32 * (codes + scales + factors + outliers + buffer)
    assert op.restored_elements() == 32 * 1000 * 256
    later = op.over(len_generated=49)  # two blocks, nine tokens in the buffer
    blocks = 2 * (2 * 20 * 64 + (128 + 20) * 4 + 2 * 2 * (20 + 128) * 2 + 2 * 51 * 6)
    old = 971 * 128 + (128 + 971) * 4 + 2 * 4 * (971 + 128) * 2 + 2 * 2486 * 6
    assert later.cache_bytes() == 32 * (old + blocks + 9 * 512)


def test_think_keeps_its_window_and_a_mask() -> None:
    op = registry.build("think", SHAPE)
    assert isinstance(op, CompressedAttention)
    assert op.cache_bytes() == 32 * ((1020 - 32) * (76 + 128) * 2 + 16 + 32 * 512)


@pytest.mark.parametrize(
    ("system", "kept"),
    [
        ("kv_heads_svd", 0.5),
        ("matryoshkakv", 51 / 128),
        ("bfp_kv", (4 + 8 / 64) / 16),
        ("mikv", 0.2 + 0.8 * (2 + 32 / 64) / 16),
        ("prefixkv", 0.2),
    ],
)
def test_shares_kept_by_hand(system: str, kept: float) -> None:
    op = registry.build(system, SHAPE | {"len_kv": 1000})
    assert isinstance(op, (CompressedAttention, LayerBudgetAttention))
    assert op.kept_frac() == pytest.approx(kept, rel=1e-12)


def test_projections_are_two_products_a_head() -> None:
    op = registry.build("matryoshkakv", SHAPE)
    plain = op.over(absorbed=True)
    more = op.min_flops()[BF16] - plain.min_flops()[BF16]
    assert more == 32 * 2 * 128 * (51 + 51)
    assert [stage.name for stage in plain.stages()] == ["attend"]


def test_arrays_broadcast_through_segments() -> None:
    lengths = np.array([100.0, 1000, 5000])
    op = registry.build("gear", SHAPE)
    many = op.over(len_kv=lengths, rank=np.array([4.0, 4, 2]))
    for i, length in enumerate(lengths):
        one = op.over(len_kv=length, rank=(4, 4, 2)[i])
        assert np.asarray(many.work(2**17).bytes)[i] == one.work(2**17).bytes


# ---- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"key_bits": 5}, "key_bits = 5 must be one of 2 3 4 8 16"),
        ({"value_bits": 32}, "value_bits = 32 must be one of 2 3 4 8 16"),
        ({"scale_bits": 4}, "scale_bits = 4 must be 8, 16 or 32"),
        ({"heads_joined": 5}, "heads_joined = 5 must be a divisor of num_kv_heads"),
        ({"num_kv_heads": 5}, "num_kv_heads = 5 must be a divisor of num_heads"),
        ({"pruned_frac": 1.0}, "pruned_frac = 1.0 must be below 1"),
        ({"key_frac": 0.0}, "key_frac = 0.0 must be above 0"),
        ({"len_generated": 9}, "len_generated needs len_buffer"),
        ({"len_generated": 1020, "len_buffer": 4}, "len_generated = 1020 must be below len_kv"),
    ],
)
def test_impossible_caches_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        CompressedAttention(**SHAPE | change)  # type: ignore[arg-type]


def test_other_impossible_schemes_are_refused() -> None:
    whole = {"key_bits": 16, "value_bits": 16}
    with pytest.raises(InputError, match="nothing is compressed"):
        CompressCache(**SHAPE | whole)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="leave no token to compress"):
        CompressCache(**SHAPE, full_frac=1.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="bits = 16 must be from 2 to 15"):
        QuantiseGroups(rows=1, cols=1, bits=16)
    run = Segment(tokens=1, key_width=1, value_width=1, value=Coding(bits=4, by_channel=True))
    with pytest.raises(InputError, match="scales of values belong to tokens"):
        RestoringAttention(num_heads=1, len_kv=1, head_dim=1, segments=(run,))
