"""Routed, pooled, grouped, gated and segmented attention: proved, and counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.ops.structured_attention import (
    ActivatedAttention,
    CombinerAttention,
    FitAttention,
    RoutingAttention,
    SegmentedPrefill,
    StructuredAttention,
)

memories = st.floats(11, 15).map(lambda exponent: int(2**exponent))


def prove(op: StructuredAttention, fast_bytes: int) -> None:
    try:
        op.tiling(fast_bytes)
    except InputError:
        assume(False)
    assert_proved(op, fast_bytes)


@st.composite
def common(draw: st.DrawFn) -> dict[str, int]:
    return {
        "batch": draw(st.integers(1, 2)),
        "num_heads": draw(st.integers(1, 2)),
        "head_dim": draw(st.integers(1, 8)),
    }


@proves("routing_attention")
@given(st.data(), common(), memories)
def test_routing_is_proved(data: st.DataObject, shape: dict[str, int], fast_bytes: int) -> None:
    length = data.draw(st.integers(1, 20))
    clusters = data.draw(st.one_of(st.none(), st.integers(1, length)))
    prove(RoutingAttention(**shape, len_seq=length, num_clusters=clusters), fast_bytes)


@proves("combiner_attention")
@given(st.data(), common(), memories)
def test_pooling_is_proved(data: st.DataObject, shape: dict[str, int], fast_bytes: int) -> None:
    block, blocks = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    prove(CombinerAttention(**shape, len_seq=block * blocks, block=block), fast_bytes)


@proves("fit_attention")
@given(st.data(), common(), memories)
def test_groups_are_proved(data: st.DataObject, shape: dict[str, int], fast_bytes: int) -> None:
    group, groups = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    latents = data.draw(st.integers(1, 3))
    op = FitAttention(**shape, len_seq=group * groups, group=group, num_latents=latents)
    prove(op, fast_bytes)


@proves("activated_attention")
@given(st.data(), common(), memories)
def test_gates_are_proved(data: st.DataObject, shape: dict[str, int], fast_bytes: int) -> None:
    window = data.draw(st.integers(1, 6))
    length = data.draw(st.integers(1, 20))
    share = data.draw(st.sampled_from([0.1, 0.3, 0.5, 1.0]))
    prove(ActivatedAttention(**shape, len_seq=length, window=window, active_frac=share), fast_bytes)


@proves("segmented_prefill")
@given(st.data(), common(), memories)
def test_segments_are_proved(data: st.DataObject, shape: dict[str, int], fast_bytes: int) -> None:
    segment, number = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    op = SegmentedPrefill(
        **shape, len_seq=segment * number, segment=segment,
        len_question=data.draw(st.integers(1, 3)), num_kept=data.draw(st.integers(1, 5)),
    )  # fmt: skip
    prove(op, fast_bytes)


def test_routing_costs_least_at_the_square_root() -> None:
    costs = [
        sum(RoutingAttention(num_heads=1, len_seq=4096, head_dim=64, num_clusters=k)
            .min_flops().values())
        for k in (16, 64, 256)
    ]  # fmt: skip
    assert costs[1] == min(costs)
    by_hand = 2 * 2 * 64 * 4096 * 64 + 4 * 64 * 64 * 64 * 64  # two scores, pairs inside clusters
    assert costs[1] == by_hand


def test_pooling_and_grouping_by_hand() -> None:
    combiner = CombinerAttention(num_heads=2, len_seq=1024, head_dim=64, block=32)
    pairs = 32 * (32 * 33 // 2) + 1024 * 32
    assert combiner.min_flops()[BF16] == 2 * 4 * 64 * pairs
    fit = FitAttention(num_heads=2, len_seq=1024, head_dim=64, group=32, num_latents=4)
    assert fit.min_flops()[BF16] == 2 * 4 * 64 * (1024 * 32 + 128**2 + 2 * 1024 * 4)


def test_arrays_count_as_scalars_do() -> None:
    lengths = np.array([256.0, 1024.0])
    for kind in (RoutingAttention, CombinerAttention, FitAttention, ActivatedAttention):
        many = kind(num_heads=2, len_seq=lengths, head_dim=16).work(2**18)
        for i, n in enumerate((256, 1024)):
            one = kind(num_heads=2, len_seq=n, head_dim=16).work(2**18)
            assert np.asarray(many.read_bytes)[i] == one.read_bytes


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        (RoutingAttention, {"num_clusters": 65}, "num_clusters = 65 is more than len_seq = 64"),
        (CombinerAttention, {"block": 48}, "block = 48 must divide 64; pad the sequence"),
        (FitAttention, {"group": 48}, "group = 48 must divide 64"),
        (SegmentedPrefill, {"segment": 48}, "segment = 48 must divide 64"),
    ],
)
def test_impossible_structures_are_refused(
    kind: type[StructuredAttention], fields: dict[str, int], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        kind(num_heads=1, len_seq=64, head_dim=8, **fields)
