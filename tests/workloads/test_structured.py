"""Routed, pooled, grouped, gated and segmented attention: proofs, hand counts, other truths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads import registry
from workloads.machine import Values
from workloads.op import Op, ProvedOp
from workloads.ops.combiner import AXIAL, FIXED, LOGSPARSE, Combiner
from workloads.ops.fit_attention import FitAttention
from workloads.ops.routed_attention import RoutedAttention
from workloads.ops.segmented_prefill import RowEntropy, SegmentedPrefill
from workloads.ops.selection import SelectiveAttention
from workloads.ops.seqboat import SeqBoat

memories = st.floats(11, 15).map(lambda exponent: int(2**exponent))


def prove(op: ProvedOp, fast_bytes: int) -> None:
    try:
        op.work(fast_bytes)
    except InputError:
        assume(False)
    assert_proved(op, fast_bytes)


@st.composite
def heads(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "batch": draw(st.integers(1, 2)),
        "num_heads": draw(st.integers(1, 2)),
        "head_dim": draw(st.integers(1, 8)),
        "dtype": draw(st.sampled_from([BF16, FP32])),
    }


@proves("routed_attention")
@given(data=st.data(), shape=heads(), fast_bytes=memories)
def test_routing_counts_what_the_closed_form_says(
    data: st.DataObject, shape: dict[str, Any], fast_bytes: int
) -> None:
    length, shared = data.draw(st.integers(1, 30)), data.draw(st.booleans())
    op = RoutedAttention(
        **shape, len_seq=length, shared_qk=shared, causal=shared and data.draw(st.booleans()),
        num_clusters=data.draw(st.none() | st.integers(1, length)),
    )  # fmt: skip
    prove(op, fast_bytes)


@proves("combiner")
@given(data=st.data(), shape=heads(), fast_bytes=memories)
def test_pooled_spans_count_what_the_closed_form_says(
    data: st.DataObject, shape: dict[str, Any], fast_bytes: int
) -> None:
    pattern, span = (
        data.draw(st.sampled_from([FIXED, AXIAL, LOGSPARSE])),
        data.draw(st.integers(1, 5)),
    )
    dyadic = st.sampled_from([1, 2, 4, 8, 16])
    pieces = data.draw(dyadic if pattern == LOGSPARSE else st.integers(1, 6))
    prove(Combiner(**shape, len_seq=span * pieces, span=span, pattern=pattern), fast_bytes)


@proves("fit_attention")
@given(data=st.data(), shape=heads(), fast_bytes=memories)
def test_groups_count_what_the_closed_form_says(
    data: st.DataObject, shape: dict[str, Any], fast_bytes: int
) -> None:
    sizes = {n: data.draw(st.integers(1, 3)) for n in ("num_latents", "num_local", "num_global")}
    groups = data.draw(st.integers(1, 4))
    length = groups * data.draw(st.integers(1, 6))
    given_groups = data.draw(st.sampled_from([None, groups]))
    prove(FitAttention(**shape, **sizes, len_seq=length, num_groups=given_groups), fast_bytes)


@proves("seqboat")
@given(data=st.data(), fast_bytes=st.floats(12, 15).map(lambda e: int(2**e)))
def test_a_gated_layer_counts_what_the_closed_form_says(
    data: st.DataObject, fast_bytes: int
) -> None:
    op = SeqBoat(
        batch=data.draw(st.integers(1, 2)), len_seq=data.draw(st.integers(1, 20)),
        dim=data.draw(st.integers(1, 8)), active_frac=data.draw(st.floats(0, 1)),
        window=data.draw(st.integers(1, 12)), expansion=data.draw(st.integers(1, 2)),
        qk_dim=data.draw(st.none() | st.integers(1, 4)),
        dtype=data.draw(st.sampled_from([BF16, FP32])),
    )  # fmt: skip
    prove(op, fast_bytes)


@proves("row_entropy")
@given(
    rows=st.integers(1, 6), cols=st.integers(1, 90), fast_bytes=st.integers(60, 500),
    dtype=st.sampled_from([BF16, FP32]),
)  # fmt: skip
def test_entropies_count_what_the_closed_form_says(
    rows: int, cols: int, fast_bytes: int, dtype: Any
) -> None:
    prove(RowEntropy(rows=rows, cols=cols, dtype=dtype), fast_bytes)


@proves("segmented_prefill")
@given(data=st.data(), shape=heads(), fast_bytes=memories)
def test_segments_count_what_the_closed_form_says(
    data: st.DataObject, shape: dict[str, Any], fast_bytes: int
) -> None:
    segment, kv_heads = data.draw(st.integers(1, 6)), shape["num_heads"]
    shape["num_heads"] = kv_heads * data.draw(st.integers(1, 2))
    op = SegmentedPrefill(
        **shape, num_kv_heads=kv_heads, len_seq=segment * data.draw(st.integers(1, 4)),
        segment=segment, len_question=data.draw(st.integers(1, 3)),
        num_kept=data.draw(st.integers(1, 5)), vocab_size=data.draw(st.integers(2, 12)),
    )  # fmt: skip
    prove(op, fast_bytes)


# ---- against truths written without any op -------------------------------------------------


def softmax(scores: Values) -> Values:
    weights: Values = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def spans(pattern: str, length: int, span: int, query: int) -> tuple[list[int], list[list[int]]]:
    """Direct keys and spans of a query, from the definitions of the patterns."""
    piece = query // span
    direct = list(range(piece * span, query + 1))
    if pattern == FIXED:
        return direct, [list(range(p * span, (p + 1) * span)) for p in range(piece)]
    if pattern == AXIAL:
        columns = range(span) if piece else range(0)
        return direct, [[row * span + c for row in range(piece)] for c in columns]
    found, end = [], piece
    while end:
        run = end & -end
        found.append(list(range((end - run) * span, end * span)))
        end -= run
    return direct, found


@pytest.mark.parametrize("pattern", [FIXED, AXIAL, LOGSPARSE])
def test_combiner_is_one_softmax_over_keys_and_spans(pattern: str) -> None:
    op = Combiner(num_heads=2, len_seq=24 if pattern != LOGSPARSE else 32, head_dim=6,
                  span=4, pattern=pattern)  # fmt: skip
    inputs = op.inputs(np.random.default_rng(1))
    got = op.reference(inputs)["o"]
    for head in range(2):
        q, k, v = (inputs[n][0, head] for n in "qkv")
        for i in range(int(op.len_seq)):
            direct, covered = spans(pattern, int(op.len_seq), 4, i)
            assert sorted(direct + [j for s in covered for j in s]) == list(range(i + 1))
            keys, values = [k[j] for j in direct], [v[j] for j in direct]
            for s in covered:
                inner = softmax(k[s] @ q[s].max(axis=0) * 6**-0.5)
                keys.append(k[s].max(axis=0))
                values.append(inner @ v[s])
            weights = softmax(np.stack(keys) @ q[i] * 6**-0.5)
            np.testing.assert_allclose(got[0, head, i], weights @ np.stack(values))


def test_a_routed_token_attends_inside_its_last_cluster() -> None:
    op = RoutedAttention(num_heads=1, len_seq=20, head_dim=4, num_clusters=3)
    inputs = op.inputs(np.random.default_rng(2))
    q, v, centroids = (inputs[n][0, 0] for n in ("q", "v", "centroids"))
    expected = np.zeros_like(q)
    for centroid in centroids:
        members = np.sort(np.argsort(-(q @ centroid))[:6])
        for i in members:
            seen = members[members <= i]
            expected[i] = softmax(q[seen] @ q[i] / 2) @ v[seen]
    np.testing.assert_allclose(op.reference(inputs)["o"][0, 0], expected)


def test_the_segments_with_the_least_entropy_are_read_again() -> None:
    op = SegmentedPrefill(num_heads=1, len_seq=20, head_dim=4, segment=5, len_question=2,
                          num_kept=2, vocab_size=9)  # fmt: skip
    inputs = op.inputs(np.random.default_rng(3))
    context, question = (
        {n: inputs[pre + n][0, 0] for n in "qkv"} for pre in ("", "question_")
    )  # fmt: skip

    def read(parts: list[int]) -> Values:
        q, k, v = (
            np.concatenate([*(context[n][5 * p : 5 * p + 5] for p in parts), question[n]])
            for n in "qkv"
        )
        scores = np.where(np.tri(len(q)) > 0, q @ k.T / 2, -np.inf)
        return softmax(scores) @ v

    entropies = []
    for part in range(4):
        p = softmax(read([part])[-2:] @ inputs["head"])
        entropies.append(-(p * np.log(p)).sum(axis=1).mean())
    best = sorted(np.argsort(entropies)[:2].tolist())
    np.testing.assert_allclose(op.reference(inputs)["o"][0, 0], read(best))


def test_only_active_tokens_change_and_all_of_them_do() -> None:
    op = SeqBoat(len_seq=12, dim=8, active_frac=0.25, window=2)
    inputs = dict(op.inputs(np.random.default_rng(4)))
    mixed = np.zeros((12, 8))
    state = np.zeros(8)
    for t, x in enumerate(inputs["x"][0]):
        state = state * inputs["decay"] + x
        mixed[t] = state @ inputs["mix"]
    changed = np.abs(op.reference(inputs)["y"][0] - mixed).max(axis=1) > 1e-12
    best = np.argsort(-(mixed @ inputs["gate"])[:, 0])[:3]
    assert sorted(np.flatnonzero(changed)) == sorted(best)


# ---- by hand -------------------------------------------------------------------------------


def test_pairs_by_hand() -> None:
    def pairs(op: Op) -> float:
        return float(op.min_flops()[BF16]) / (4 * 16)

    shape: dict[str, Any] = {"num_heads": 1, "len_seq": 64, "head_dim": 16}
    local = 8 * (8 * 9 // 2)
    assert pairs(Combiner(**shape)) == local + 7 * 8 + 8 * (7 * 8 // 2)
    assert pairs(Combiner(**shape, pattern=AXIAL)) == local + 8 * (7 * 8 // 2) + 7 * 64
    assert pairs(Combiner(**shape, pattern=LOGSPARSE)) == 64 + 6 * 32 + 6 * 32
    fit = FitAttention(**shape, num_groups=16, num_latents=2, num_local=3)
    assert pairs(fit) == 3 * 64 * 4 + 32**2 + 2 * 64 * 2
    routed = RoutedAttention(**shape, num_clusters=4)
    assert pairs(routed) == 64 * 4 / 2 + 4 * (16 * 17 // 2)
    read = SegmentedPrefill(**shape, segment=16, len_question=4, num_kept=2, vocab_size=10)
    logits = 4 * 4 * 16 * 10 * 2 / 64
    assert pairs(read) == 4 * (20 * 21 // 2) + 36 * 37 // 2 + logits


def test_groups_left_out_cost_least_among_the_powers_of_two() -> None:
    for length, latents in ((2**12, 1), (2**15, 4), (3 * 2**10, 2)):
        shape: dict[str, Any] = {
            "num_heads": 1, "len_seq": length, "head_dim": 8, "num_latents": latents,
        }  # fmt: skip
        found = FitAttention(**shape)
        tried = {g: FitAttention(**shape, num_groups=g) for g in (2**n for n in range(11))}
        costs = {g: sum(op.min_flops().values()) for g, op in tried.items()}
        assert costs[found.groups] <= 1.1 * min(costs.values())


def test_memory_of_segments_does_not_grow_with_the_context() -> None:
    short, long = (SegmentedPrefill(num_heads=32, len_seq=n, head_dim=128) for n in (2**16, 2**24))
    assert short.cache_bytes() == long.cache_bytes() == 2 * 2 * 32 * 128 * (4 * 2048 + 64)
    assert long.full_cache_bytes() == 2 * 2 * 32 * 128 * (2**24 + 64)


def test_chunk_systems_have_the_sizes_of_their_papers() -> None:
    shape = {"num_heads": 32, "num_kv_heads": 8, "len_kv": 2**17, "head_dim": 128}
    infllm, longheads = (registry.build(n, shape) for n in ("infllm", "longheads"))
    assert isinstance(infllm, SelectiveAttention) and isinstance(longheads, SelectiveAttention)
    assert (infllm.num_runs, infllm.num_kept, infllm.num_lists) == (1024, 16, 1)
    assert infllm.fetched_bytes() == 8 * 2048 * 2 * 128 * 2
    assert (longheads.num_runs, longheads.num_kept, longheads.num_lists) == (512, 14, 32)
    assert longheads.num_kept * longheads.run_length + 512 == 4096


def test_arrays_count_as_scalars_do() -> None:
    lengths = [1, 64, 1024]
    shape: dict[str, Any] = {"num_heads": 2, "head_dim": 16}
    kinds: list[Op] = [
        RoutedAttention(len_seq=64, **shape), FitAttention(len_seq=64, **shape),
        *(Combiner(len_seq=64, pattern=p, **shape) for p in (FIXED, AXIAL, LOGSPARSE)),
        SegmentedPrefill(len_seq=64, segment=32, **shape), SeqBoat(len_seq=64, dim=32),
    ]  # fmt: skip
    for op in kinds:
        many = op.over(len_seq=np.array(lengths, dtype=np.float64)).work(2**18)
        for counter in ("flops", "bytes", "special_ops", "launches"):
            ones = [getattr(op.over(len_seq=n).work(2**18), counter) for n in lengths]
            assert np.broadcast_to(getattr(many, counter), 3).tolist() == ones, (op.name, counter)


@pytest.mark.parametrize(
    ("system", "fields", "says"),
    [
        ("routed_attention", {"num_clusters": 65}, "num_clusters = 65 is more than the len_seq"),
        ("routed_attention", {"shared_qk": False}, "causal needs shared_qk=true"),
        ("combiner", {"span": 48}, "span = 48 must divide len_seq = 64; pad"),
        ("combiner", {"pattern": "star"}, "pattern = 'star' must be one of"),
        ("combiner", {"pattern": LOGSPARSE, "len_seq": 48}, "48 is none; pad the sequence"),
        ("fit_attention", {"num_groups": 48}, "num_groups = 48 must divide len_seq = 64"),
        ("segmented_prefill", {"segment": 48}, "segment = 48 must divide len_seq = 64"),
        ("segmented_prefill", {"num_kv_heads": 3}, "must divide num_heads"),
    ],
)
def test_impossible_structures_are_refused(
    system: str, fields: dict[str, object], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        registry.build(system, {"num_heads": 4, "len_seq": 64, "head_dim": 8} | fields)
