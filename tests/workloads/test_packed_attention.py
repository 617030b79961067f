"""Attention without padding: both kernels proved, lengths, counts by hand, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP16, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.op import Op
from workloads.ops.packed_attention import PackedAttention

SHAPE: dict[str, Any] = {"batch": 16, "num_heads": 12, "head_dim": 64, "dtype": FP16}


def fits(op: Op, fast_bytes: int) -> bool:
    try:
        op.tiling(fast_bytes)
    except InputError:
        return False
    return True


@st.composite
def packed(draw: st.DrawFn) -> PackedAttention:
    len_max = draw(st.integers(1, 40))
    return PackedAttention(
        batch=draw(st.integers(1, 12)),
        num_heads=draw(st.integers(1, 2)),
        len_max=len_max,
        mean_frac=draw(st.floats(0, 1)),
        head_dim=draw(st.integers(1, 8)),
        len_short=draw(st.sampled_from([1, len_max])),
        dtype=draw(st.sampled_from([BF16, FP32])),
    )


@proves("packed_attention")
@given(op=packed(), fast_bytes=st.floats(8, 14).map(lambda e: int(2**e)))
def test_packed_attention_counts_what_the_closed_form_says(
    op: PackedAttention, fast_bytes: int
) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@pytest.mark.parametrize("mean_frac", [0.3, 0.5, 0.6, 1.0])
@pytest.mark.parametrize("batch", [1, 7, 16, 90])
def test_lengths_have_the_mean_asked_for(mean_frac: float, batch: int) -> None:
    op = PackedAttention(**(SHAPE | {"batch": batch}), len_max=10_000, mean_frac=mean_frac)
    lengths = op.sequence_lengths()
    assert len(lengths) == batch
    assert np.mean(lengths) == pytest.approx(mean_frac * 10_000, rel=1e-3)
    assert sum(lengths) == op.num_tokens()
    assert sum(n * n for n in lengths) == op.num_pairs()
    assert max(lengths) <= 10_000


def test_many_lengths_spread_as_a_uniform_draw() -> None:
    """Variance (0.8 max)^2 / 12, less 1 / 81 of it for nine places."""
    op = PackedAttention(**(SHAPE | {"batch": 900}), len_max=10_000)
    variance = op.num_pairs() / 900 - (op.num_tokens() / 900) ** 2
    assert variance == pytest.approx(8000**2 / 12 * (1 - 1 / 81), rel=1e-3)


def test_the_short_kernel_by_hand() -> None:
    op = PackedAttention(num_heads=1, len_max=100, mean_frac=1, head_dim=8, dtype=FP16)
    work = op.work(2**20)
    one = 100 * 8 * 2
    assert (work.read_bytes, work.write_bytes, work.launches) == (3 * one, one, 1)
    assert work.tensor_flops[FP16] == 4 * 100**2 * 8
    assert work.special_ops == 100**2 + 100


def test_the_long_kernel_by_hand() -> None:
    """Scores and two blocks of sums go out and come back, and one pair a row."""
    op = PackedAttention(
        num_heads=1, len_max=100, mean_frac=1, head_dim=8, len_short=99, dtype=FP16
    )
    work = op.work(2**20)
    one, scores, sums = 100 * 8 * 2, 100**2 * 2, 100 * 8 * (2 + 1)
    assert work.read_bytes == 3 * one + scores + sums
    assert work.write_bytes == one + scores + sums
    assert (work.special_ops, work.launches) == (2 * 100**2 + 100 * 2 + 100, 3)


def test_stages_follow_the_longest_length() -> None:
    short, long = (PackedAttention(**SHAPE, len_max=n) for n in (384, 385))
    assert [s.name for s in short.stages()] == ["fused"]
    assert [s.name for s in long.stages()] == ["scores", "reduce", "output"]
    for op in (short, long):
        flops = sum(s.op.min_flops().get(FP16, 0) * s.times for s in op.stages())
        assert 1 <= flops / op.min_flops()[FP16] < 1.02


def test_counts_broadcast_over_both_kernels() -> None:
    many = PackedAttention(**SHAPE, len_max=np.array([128.0, 1024.0])).work(2**18)
    ones = [PackedAttention(**SHAPE, len_max=n).work(2**18) for n in (128, 1024)]
    assert np.asarray(many.bytes).tolist() == [w.bytes for w in ones]
    assert np.asarray(many.launches).tolist() == [1, 3]


def test_a_sequence_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="one query row and the keys beside it"):
        PackedAttention(**SHAPE, len_max=384).work(2**14)
    with pytest.raises(InputError, match=r"a fraction in \[0, 1\]"):
        PackedAttention(**SHAPE, len_max=384, mean_frac=1.5)
