"""Attentions that select keys by an index, a tree search or block masses: proofs and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP8, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.machine import Values
from workloads.op import Arrays, Op
from workloads.ops.flex_prefill import POOLED, VERTICAL_SLASH, FlexPrefillAttention
from workloads.ops.key_scores import KeyScores
from workloads.ops.selection import GROUP, HEAD, LAYER, SelectiveAttention
from workloads.ops.tree_attention import BlockMax, TreeAttention

memories = st.floats(11, 16).map(lambda exponent: int(2**exponent))


def fits(op: Op, fast_bytes: int) -> bool:
    try:
        op.tiling(fast_bytes)
    except InputError:
        return False
    return True


@proves("key_scores")
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 90), st.integers(1, 30)),
    dtype=st.sampled_from([BF16, FP8]),
    fast_bytes=memories,
)
def test_scores_of_an_index_count_what_the_closed_form_says(
    sizes: tuple[int, int, int, int], dtype: object, fast_bytes: int
) -> None:
    batch, m, n, k = sizes
    op = KeyScores(batch=batch, m=m, n=n, k=k, dtype=dtype, out_dtype=BF16, math_dtype=BF16)  # type: ignore[arg-type]
    assert_proved(op, fast_bytes)


@st.composite
def maxima(draw: st.DrawFn) -> BlockMax:
    length = draw(st.integers(1, 60))
    return BlockMax(
        batch=draw(st.integers(1, 3)), len_seq=length, dim=draw(st.integers(1, 20)),
        block=draw(st.integers(1, length)), dtype=draw(st.sampled_from([BF16, FP32])),
    )  # fmt: skip


@proves("block_max")
@given(op=maxima(), fast_bytes=memories)
def test_block_maxima_count_what_the_closed_form_says(op: BlockMax, fast_bytes: int) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@st.composite
def shapes(draw: st.DrawFn, most_queries: int = 3) -> dict[str, Any]:
    kv_heads, block = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    return {
        "batch": draw(st.integers(1, 2)),
        "num_heads": kv_heads * draw(st.integers(1, 3)),
        "num_kv_heads": kv_heads,
        "len_q": block * draw(st.integers(1, most_queries)),
        "head_dim": draw(st.integers(1, 9)),
        "block_q": block,
    }


@st.composite
def selective(draw: st.DrawFn) -> SelectiveAttention:
    shape = draw(shapes())
    len_kv = draw(st.integers(1, 50))
    op = SelectiveAttention(
        **shape,
        len_kv=len_kv,
        len_local=draw(st.none() | st.integers(shape["len_q"], shape["len_q"] + 9)),
        len_selected=draw(st.none() | st.integers(1, len_kv)),
        kept_frac=draw(st.floats(0, 1)),
        channel_frac=draw(st.floats(0, 1)),
        block_k=draw(st.integers(1, 6)),
        coarse=draw(st.none() | st.integers(1, 5)),
        coarse_frac=draw(st.floats(0, 1)),
        share=draw(st.sampled_from([HEAD, GROUP, LAYER])),
        vote=draw(st.booleans()),
        hit_frac=draw(st.sampled_from([0.0, 0.0, 1.0])),
        index_dtype=draw(st.sampled_from([None, FP8])),
    )
    may = op.num_blocks == 1 and (op.share != HEAD or op.group == 1)
    return replace(op, offload=bool(may and draw(st.booleans())))


@proves("selective_attention")
@given(op=selective(), fast_bytes=memories)
def test_selection_by_an_index_counts_what_the_closed_form_says(
    op: SelectiveAttention, fast_bytes: int
) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@st.composite
def trees(draw: st.DrawFn) -> TreeAttention:
    block_k = draw(st.integers(1, 3))
    return TreeAttention(
        **draw(shapes()),
        len_kv=draw(st.integers(block_k, 70)),
        len_selected=draw(st.integers(1, 20)),
        block_k=block_k,
    )


@proves("tree_attention")
@given(op=trees(), fast_bytes=memories)
def test_the_tree_search_counts_what_the_closed_form_says(
    op: TreeAttention, fast_bytes: int
) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@st.composite
def prefills(draw: st.DrawFn) -> FlexPrefillAttention:
    shape = draw(shapes(most_queries=5))
    shape["block"] = shape.pop("block_q")
    return FlexPrefillAttention(
        **shape,
        len_kv=draw(st.none() | st.integers(shape["len_q"], 30)),
        kept_frac=draw(st.floats(0, 1)),
        len_least=draw(st.integers(1, 8)),
        pattern=draw(st.sampled_from([POOLED, VERTICAL_SLASH])),
        causal=draw(st.booleans()),
    )


@proves("flex_prefill_attention")
@given(op=prefills(), fast_bytes=memories)
def test_a_prompts_blocks_count_what_the_closed_form_says(
    op: FlexPrefillAttention, fast_bytes: int
) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


# ---- against attention under a mask --------------------------------------------------------


def masked(inputs: Arrays, seen: Values) -> Values:
    """Plain attention where `seen`[batch, heads, len_q, len_kv], written without any op."""
    group = inputs["q"].shape[1] // inputs["k"].shape[1]
    keys, values = (np.repeat(inputs[name], group, axis=1) for name in ("k", "v"))
    scores = np.einsum("bhqd,bhkd->bhqk", inputs["q"], keys) * keys.shape[-1] ** -0.5
    weights = np.where(seen, np.exp(scores), 0.0)
    found: Values = weights @ values / weights.sum(axis=-1, keepdims=True)
    return found


def test_labels_pick_the_tokens_with_the_largest_partial_scores() -> None:
    op = SelectiveAttention(
        batch=2, num_heads=4, num_kv_heads=2, len_kv=40, head_dim=8, channel_frac=0.25,
        kept_frac=0.2, share=HEAD,
    )  # fmt: skip
    inputs = op.inputs(np.random.default_rng(1))
    keys = np.repeat(inputs["k"], 2, axis=1)[..., :2]
    partial = np.einsum("bhqd,bhkd->bhqk", inputs["q"][..., :2], keys)
    least = np.sort(partial, axis=-1)[..., -8:-7]
    np.testing.assert_allclose(op.reference(inputs)["o"], masked(inputs, partial >= least))


def test_all_heads_of_a_layer_vote_for_one_list() -> None:
    op = SelectiveAttention(
        num_heads=4, num_kv_heads=2, len_kv=30, head_dim=8, len_selected=5, share=LAYER, vote=True,
    )  # fmt: skip
    inputs = op.inputs(np.random.default_rng(2))
    keys = np.repeat(inputs["k"], 2, axis=1)
    votes = np.exp(np.einsum("bhqd,bhkd->bhqk", inputs["q"], keys) * 8**-0.5)
    votes = (votes / votes.sum(axis=-1, keepdims=True)).sum(axis=1, keepdims=True)
    seen = np.repeat(votes >= np.sort(votes, axis=-1)[..., -5:-4], 4, axis=1)
    np.testing.assert_allclose(op.reference(inputs)["o"], masked(inputs, seen))


def test_whoever_keeps_everything_is_exact() -> None:
    everything: list[Op] = [
        SelectiveAttention(num_heads=4, num_kv_heads=2, len_kv=24, head_dim=8, kept_frac=1.0,
                           block_k=3, coarse=2),
        TreeAttention(num_heads=4, num_kv_heads=2, len_kv=24, head_dim=8, len_selected=24),
        FlexPrefillAttention(num_heads=4, num_kv_heads=2, len_q=24, head_dim=8, kept_frac=1.0,
                             block=4, causal=False),
    ]  # fmt: skip
    for op in everything:
        assert isinstance(op, (SelectiveAttention, TreeAttention, FlexPrefillAttention))
        inputs = op.inputs(np.random.default_rng(3))
        seen = np.ones((1, 4, int(op.len_q), 24), dtype=bool)
        np.testing.assert_allclose(op.reference(inputs)["o"], masked(inputs, seen))


def test_a_coarse_level_that_keeps_everything_changes_no_list() -> None:
    flat = SelectiveAttention(num_heads=4, num_kv_heads=2, len_kv=60, head_dim=8, block_k=3,
                              kept_frac=0.3)  # fmt: skip
    tree = flat.over(coarse=5, coarse_frac=1.0)
    inputs = flat.inputs(np.random.default_rng(4))
    np.testing.assert_allclose(flat.reference(inputs)["o"], tree.reference(inputs)["o"])


def test_the_search_finds_a_key_that_stands_out_with_its_neighbours() -> None:
    op = TreeAttention(num_heads=1, len_kv=64, head_dim=4, len_selected=8, block_k=1)
    inputs = dict(op.inputs(np.random.default_rng(5)))
    slope = 1 - np.abs(np.arange(64) - 41) / 64  # locality: near keys score alike
    inputs["q"], inputs["k"] = np.ones((1, 1, 1, 4)), np.tile(slope[:, None], (1, 1, 1, 4))
    seen = np.abs(np.arange(64) - 41) <= 1
    alone = TreeAttention(num_heads=1, len_kv=64, head_dim=4, len_selected=8, block_k=1)
    inputs["v"] = np.where(seen, 1.0, 0.0)[None, None, :, None] * np.ones((1, 1, 64, 4))
    assert alone.reference(inputs)["o"].min() > 2.5 / 8


# ---- by hand -------------------------------------------------------------------------------


def test_label_bytes_by_hand() -> None:
    """1 / 16 of the tokens and channels: (1 / 16 + 2 / 16) / 2 of the bytes, 4-bit labels less."""
    op = SelectiveAttention(num_heads=32, len_kv=2**16, head_dim=128, channel_frac=1 / 16)
    full = 32 * 2**16 * 2 * 128 * 2
    assert full / op.kv_bytes_read() == pytest.approx(32 / 3)
    assert full / op.over(index_dtype="int4").kv_bytes_read() == pytest.approx(128 / 9)
    assert op.cache_bytes() == full * (1 + 1 / 32)
    away = op.over(offload=True)
    assert (away.cache_bytes(), away.buffer_bytes()) == (full / 32, full / 8)


def test_centroid_bytes_by_hand() -> None:
    """5 % centroids and a tenth of the keys: 1 / (0.05 / 2 + 0.1) = 8."""
    op = SelectiveAttention(num_heads=32, len_kv=20 * 2**12, head_dim=128, block_k=20,
                            kept_frac=0.1, share=HEAD, vote=True)  # fmt: skip
    full = 32 * 20 * 2**12 * 2 * 128 * 2
    assert full / op.kv_bytes_read() == pytest.approx(8, rel=1e-3)
    coarse = op.over(coarse=5, coarse_frac=0.4)
    assert full / coarse.kv_bytes_read() == pytest.approx(1 / (0.005 + 0.01 + 0.1), rel=1e-3)


def test_rounds_by_hand() -> None:
    op = TreeAttention(num_heads=2, len_q=64, len_kv=2**14, head_dim=128)
    assert (op.rounds, op.num_kept, op.num_lists) == (5, 256, 4)
    search = 5 * 2 * 64 * 4 * 256 * 128
    assert op.min_flops()[BF16] == search + 2 * 64 * 512 * 4 * 128
    assert op.over(len_kv=512).rounds == 0


def test_hits_skip_the_selection() -> None:
    op = SelectiveAttention(num_heads=8, len_kv=4096, head_dim=64, len_selected=256, share=LAYER)
    missed, hit = (op.over(hit_frac=f).work(2**18).read_bytes for f in (0, 1))
    half = op.over(hit_frac=0.5).work(2**18).read_bytes
    assert half == (missed + hit) / 2
    assert hit == op.attend().work(2**18).read_bytes


def test_a_fetch_runs_beside() -> None:
    op = SelectiveAttention(num_heads=8, len_kv=4096, head_dim=64, offload=True)
    (fetch,) = (stage for stage in op.stages() if stage.beside)
    assert fetch.op.work(2**20).host_bytes == 8 * 256 * 2 * 64 * 2
    assert op.work(2**20).host_bytes == fetch.op.work(2**20).host_bytes


def test_a_prompt_keeps_a_share_of_what_it_sees() -> None:
    op = FlexPrefillAttention(num_heads=2, len_q=128 * 101, head_dim=64, kept_frac=0.5)
    assert (op.mean_visible, op.num_kept) == (51, 26)
    assert op.over(causal=False).num_kept == 51
    assert op.over(kept_frac=0.01).num_kept == 8
    assert op.over(pattern=VERTICAL_SLASH, kept_frac=0.2).num_kept == 10


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        (SelectiveAttention, {"num_kv_heads": 3}, "num_kv_heads = 3 must divide num_heads = 8"),
        (SelectiveAttention, {"share": "all"}, "share = 'all' must be one of"),
        (SelectiveAttention, {"len_q": 6, "block_q": 4}, "block_q = 4 must divide len_q = 6"),
        (SelectiveAttention, {"len_q": 6, "len_local": 4}, "len_local = 4 counts the len_q = 6"),
        (SelectiveAttention, {"offload": True, "len_q": 2}, "offload keeps one buffer"),
        (TreeAttention, {"len_q": 33}, "block_q = 32 must divide len_q = 33"),
        (TreeAttention, {"block_k": 65}, "block_k = 65 is longer than len_kv = 64"),
        (FlexPrefillAttention, {"len_q": 65, "block": 4}, "block = 4 must divide len_q = 65"),
        (FlexPrefillAttention, {"len_q": 128}, "len_kv = 64 is less than len_q = 128"),
        (FlexPrefillAttention, {"pattern": "dots"}, "pattern = 'dots' must be one of"),
    ],
)
def test_impossible_selections_are_refused(
    kind: type[Op], change: dict[str, object], says: str
) -> None:
    fields = {"num_heads": 8, "len_q": 1, "len_kv": 64, "head_dim": 8} | change
    with pytest.raises(InputError, match=says):
        kind(**fields)


def test_a_program_needs_a_query_that_hits_or_misses() -> None:
    op = SelectiveAttention(num_heads=1, len_kv=8, head_dim=2, hit_frac=0.5)
    with pytest.raises(InputError, match="needs hit_frac 0 or 1"):
        op.reference(op.inputs(np.random.default_rng(0)))
