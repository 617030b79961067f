"""Prefix scans: every operator by every algorithm proved, with and without look-back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP32
from hwmodels.errors import InputError, UnknownNameError
from tests.workloads.proof import assert_proved, proves
from workloads.ops.associative_scan import (
    ALGORITHMS,
    BRENT_KUNG,
    KOGGE_STONE,
    OPERATORS,
    SEQUENTIAL,
    AssociativeScan,
)


@st.composite
def scans(draw: st.DrawFn) -> AssociativeScan:
    return AssociativeScan(
        batch=draw(st.integers(1, 2)),
        len_seq=draw(st.integers(1, 40)),
        width=draw(st.integers(1, 4)),
        chunk=draw(st.integers(1, 45)),
        operator=draw(st.sampled_from(sorted(OPERATORS))),
        algorithm=draw(st.sampled_from(ALGORITHMS)),
        lookback=draw(st.booleans()),
        dtype=draw(st.sampled_from([BF16, FP32])),
    )


@proves("associative_scan", shapes=300)
@given(op=scans(), fast_bytes=st.floats(7, 13).map(lambda e: int(2**e)))
def test_scans_count_and_compute_what_the_closed_form_says(
    op: AssociativeScan, fast_bytes: int
) -> None:
    try:
        op.tiling(fast_bytes)
    except InputError:
        assume(False)
    assert_proved(op, fast_bytes)


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_the_operators_are_associative(operator: str) -> None:
    rng = np.random.default_rng(0)
    op = AssociativeScan(len_seq=3, width=5, operator=operator)
    values = list(op.inputs(rng).values())
    a, b, c = (tuple(v[:, i] for v in values) for i in range(3))
    combine = OPERATORS[operator].combine
    left, right = combine(combine(a, b), c), combine(a, combine(b, c))
    assert all(np.allclose(x, y) for x, y in zip(left, right, strict=True))


def test_work_and_depth_of_textbook_scans() -> None:
    found = {name: AssociativeScan(len_seq=1024, chunk=1024, algorithm=name) for name in ALGORITHMS}
    counts = {name: (op.combinations(), op.depth()) for name, op in found.items()}
    assert counts == {
        SEQUENTIAL: (1023, 1023),
        KOGGE_STONE: (1024 * 10 - 1023, 10),
        BRENT_KUNG: (2 * 1024 - 2 - 10, 19),
    }


def test_arrays_count_as_scalars_do() -> None:
    lengths = np.array([1.0, 5.0, 64.0, 1000.0])
    for name in ALGORITHMS:
        many = AssociativeScan(len_seq=lengths, chunk=48, algorithm=name)
        one = [AssociativeScan(len_seq=int(n), chunk=48, algorithm=name) for n in lengths]
        assert np.array_equal(many.combinations(), [op.combinations() for op in one])
        assert np.array_equal(
            many.work(2**20).vector_flops, [o.work(2**20).vector_flops for o in one]
        )


def test_unknown_words_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="operator"):
        AssociativeScan(len_seq=4, operator="maximum")
    with pytest.raises(UnknownNameError, match="algorithm"):
        AssociativeScan(len_seq=4, algorithm="sklansky")
