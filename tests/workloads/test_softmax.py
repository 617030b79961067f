from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP8, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.ops.softmax import Softmax

shapes = st.builds(
    Softmax,
    rows=st.integers(1, 12),
    cols=st.integers(1, 90),
    dtype=st.sampled_from([BF16, FP8, FP32]),
    out_dtype=st.sampled_from([None, BF16, FP32]),
)
memories = st.integers(24, 3000)


@proves("softmax", shapes=300)
@given(op=shapes, fast_bytes=memories)
def test_program_counts_what_the_closed_form_says(op: Softmax, fast_bytes: int) -> None:
    assert_proved(op, fast_bytes)


@pytest.mark.parametrize(("fast_bytes", "passes"), [(6 * 50 + 8, 1), (6 * 50 + 7, 2), (24, 2)])
def test_each_pass_count_is_reached_and_proved(fast_bytes: int, passes: int) -> None:
    op = Softmax(rows=3, cols=50)
    assert op.tiling(fast_bytes)["passes"] == passes
    assert_proved(op, fast_bytes)


@settings(max_examples=200, deadline=None)
@given(op=shapes, fast_bytes=memories, more=st.integers(0, 3000))
def test_a_larger_fast_memory_never_moves_more(op: Softmax, fast_bytes: int, more: int) -> None:
    assert op.work(fast_bytes + more).bytes <= op.work(fast_bytes).bytes


def test_arrays_agree_with_scalars() -> None:
    rng = np.random.default_rng(2)
    rows, cols = rng.integers(1, 5000, 300), rng.integers(1, 20_000, 300)
    many = Softmax(rows=rows, cols=cols).work(2**16)
    for i in range(0, 300, 5):
        one = Softmax(rows=int(rows[i]), cols=int(cols[i])).work(2**16)
        for field in ("vector_flops", "special_ops", "read_bytes", "write_bytes"):
            assert getattr(one, field) == getattr(many, field)[i]


def test_known_numbers() -> None:
    one = Softmax(rows=2, cols=100).work(10_000)
    assert (one.vector_flops, one.special_ops) == (800, 202)
    two = Softmax(rows=2, cols=100).work(16 + 6 * 40)
    assert (two.vector_flops, two.special_ops) == (2 * (500 + 4 * 3), 2 * (200 + 3 + 1))


def test_too_small_a_fast_memory_is_refused() -> None:
    with pytest.raises(InputError, match="cannot hold"):
        Softmax(rows=1, cols=9).work(21)
