"""Attention over prompts: pairs counted one by one, flops and bytes by hand."""

from __future__ import annotations

import numpy as np
import pytest

from hwmodels.dtypes import BF16, FP8
from hwmodels.errors import InputError
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.prefill_attention import MlaPrefill, PrefillAttention


def counted(len_q: int, len_kv: int, window: int, *, causal: bool) -> int:
    """Pairs of one head, by looking at every one."""
    seen = 0
    for q in range(len_q):
        last = len_kv - len_q + q if causal else len_kv - 1
        seen += sum(1 for k in range(len_kv) if k <= last and (not causal or k > last - window))
    return seen


@pytest.mark.parametrize(("len_q", "len_kv"), [(1, 1), (7, 7), (5, 12), (12, 12), (1, 9)])
@pytest.mark.parametrize("window", [1, 2, 5, 8, 11, 12, 40])
def test_pairs_are_those_the_mask_leaves(len_q: int, len_kv: int, window: int) -> None:
    op = PrefillAttention(num_heads=1, len_q=len_q, len_kv=len_kv, head_dim=8, window=window)
    assert op.pairs() == counted(len_q, len_kv, window, causal=True)
    full = PrefillAttention(num_heads=1, len_q=len_q, len_kv=len_kv, head_dim=8, causal=False)
    assert full.pairs() == counted(len_q, len_kv, len_kv, causal=False)


def test_counts_by_hand() -> None:
    op = PrefillAttention(
        batch=2, num_heads=6, num_kv_heads=3, len_q=4, len_kv=10, head_dim=16, value_dim=8,
        dtype=FP8, out_dtype=BF16,
    )  # fmt: skip
    pairs = 7 + 8 + 9 + 10
    assert op.min_flops() == {FP8: 2 * 2 * 6 * pairs * (16 + 8)}
    assert op.query_bytes() == 2 * 6 * 4 * 16
    assert op.kv_bytes() == 2 * 3 * 10 * (16 + 8)
    assert op.output_bytes() == 2 * 6 * 4 * 8 * 2
    work = op.work(1e5)
    assert work.read_bytes + work.write_bytes == op.compulsory_bytes()
    assert work.special_ops == 2 * 6 * pairs and work.vector_flops == 4 * work.special_ops
    assert work.launches == 1


def test_without_a_window_the_flops_are_flash_attentions() -> None:
    for causal in (True, False):
        shape = {"num_heads": 8, "num_kv_heads": 2, "len_q": 96, "len_kv": 128, "head_dim": 64}
        ours = PrefillAttention(**shape, causal=causal)
        assert ours.min_flops() == FlashAttention2(**shape, causal=causal).min_flops()
        assert ours.compulsory_bytes() <= FlashAttention2(**shape, causal=causal).compulsory_bytes()


def test_arrays_agree_with_scalars() -> None:
    lengths = np.array([1.0, 5, 64, 1000])
    many = PrefillAttention(num_heads=4, len_q=lengths, head_dim=64, window=50)
    for i, n in enumerate(lengths):
        one = many.over(len_q=float(n))
        assert np.asarray(many.pairs())[i] == one.pairs()
        assert np.asarray(many.compulsory_bytes())[i] == one.compulsory_bytes()


def test_latent_attention_is_wider_in_keys_than_in_values() -> None:
    op = MlaPrefill(num_heads=2, len_q=3, head_dim=192, value_dim=128)
    assert op.min_flops() == {BF16: 2 * 2 * 6 * 320}
    assert op.kv_bytes() == 2 * 3 * 320 * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"len_kv": 3}, "len_q > len_kv"),
        ({"window": 2, "causal": False}, "a window needs causal"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PrefillAttention(**({"num_heads": 4, "len_q": 8, "head_dim": 16} | changes))
