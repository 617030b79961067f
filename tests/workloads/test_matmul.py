from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP8, FP16, FP32, FP64
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.ops.grouped_matmul import GroupedMatmul
from workloads.ops.matmul import A_STAYS, B_STAYS, C_STAYS, BatchedMatmul, Matmul

shapes = st.builds(
    Matmul,
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    k=st.integers(1, 70),
    batch=st.integers(1, 3),
    dtype=st.sampled_from([BF16, FP8, FP32, FP64]),
    out_dtype=st.sampled_from([None, BF16, FP32]),
)

batches = st.builds(
    BatchedMatmul,
    m=st.integers(1, 30),
    n=st.integers(1, 30),
    k=st.integers(1, 30),
    batch=st.integers(1, 5),
    dtype=st.sampled_from([BF16, FP16]),
    math_dtype=st.sampled_from([None, FP32]),
)


@proves("matmul", shapes=300)
@given(op=shapes, fast_bytes=st.integers(600, 40_000))
def test_program_counts_what_the_closed_form_says(op: Matmul, fast_bytes: int) -> None:
    assert_proved(op, fast_bytes)


@proves("batched_matmul", shapes=200)
@given(op=batches, fast_bytes=st.integers(600, 20_000))
def test_batches_are_counted_like_their_products(op: BatchedMatmul, fast_bytes: int) -> None:
    assert_proved(op, fast_bytes)


@pytest.mark.parametrize(
    ("op", "fast_bytes", "dataflow"),
    [
        (Matmul(m=64, n=64, k=64), 2_000, C_STAYS),
        (Matmul(m=200, n=200, k=16), 5_000, A_STAYS),
        (Matmul(m=300, n=92, k=16), 5_000, B_STAYS),
    ],
)
def test_each_dataflow_is_reached_and_proved(op: Matmul, fast_bytes: int, dataflow: int) -> None:
    assert op.tiling(fast_bytes)["dataflow"] == dataflow
    assert_proved(op, fast_bytes)


def test_arrays_agree_with_scalars() -> None:
    rng = np.random.default_rng(1)
    m, n, k = (rng.integers(1, 9000, 500) for _ in range(3))
    for fast in (2**16, 50 * 2**20):
        many = Matmul(m=m, n=n, k=k).work(fast)
        for i in range(0, 500, 7):
            one = Matmul(m=int(m[i]), n=int(n[i]), k=int(k[i])).work(fast)
            assert one.read_bytes == np.asarray(many.read_bytes)[i]
            assert one.tensor_flops[BF16] == np.asarray(many.tensor_flops[BF16])[i]


@settings(max_examples=200, deadline=None)
@given(op=shapes, fast_bytes=st.integers(600, 40_000))
def test_a_larger_fast_memory_never_moves_much_more(op: Matmul, fast_bytes: int) -> None:
    small, large = op.work(fast_bytes).bytes, op.work(4 * fast_bytes).bytes
    assert large <= small * (1 + 1e-12)


def test_everything_that_fits_moves_once() -> None:
    op = Matmul(m=128, n=128, k=128)
    assert op.work(2**20).bytes == op.compulsory_bytes()


@pytest.mark.parametrize("bad", [0, -4, 2.5, float("nan"), float("inf"), 2**60, "many"])
def test_bad_sizes_are_refused(bad: object) -> None:
    with pytest.raises(InputError, match="matmul: m = "):
        Matmul(m=bad, n=1, k=1)  # type: ignore[arg-type]


def test_too_small_a_fast_memory_is_refused() -> None:
    with pytest.raises(InputError, match="cannot hold"):
        Matmul(m=8, n=8, k=8).work(16)


@proves("grouped_matmul", shapes=200)
@given(
    op=st.builds(
        GroupedMatmul,
        m=st.integers(1, 20),
        n=st.integers(1, 20),
        k=st.integers(1, 20),
        batch=st.integers(1, 4),
        dtype=st.sampled_from([BF16, FP8]),
        out_dtype=st.sampled_from([None, FP32]),
    ),
    fast_bytes=st.integers(600, 20_000),
)
def test_groups_are_counted_like_their_products(op: GroupedMatmul, fast_bytes: int) -> None:
    assert_proved(op, fast_bytes)
