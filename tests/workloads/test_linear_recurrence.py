"""Chunked linear recurrences: every decay and rule proved, and delicate decays exercised."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.machine import Machine
from workloads.ops.linear_recurrence import CHANNEL, DELTA, NONE, SCALAR, LinearRecurrence
from workloads.ops.linear_recurrence_backward import DELTA_PASSES, LinearRecurrenceBackward

FORMS = [
    {"decay": decay, "normalised": normalised}
    for decay in (NONE, SCALAR, CHANNEL)
    for normalised in (False, True)
] + [{"decay": decay, "rule": DELTA} for decay in (NONE, SCALAR)]


@st.composite
def recurrences(draw: st.DrawFn) -> LinearRecurrence:
    chunk = draw(st.integers(1, 12))
    return LinearRecurrence(
        batch=draw(st.integers(1, 2)),
        num_heads=draw(st.integers(1, 2)),
        len_seq=draw(st.integers(1, 40)),
        key_dim=draw(st.integers(1, 8)),
        value_dim=draw(st.integers(1, 8)),
        chunk=chunk,
        sub_chunk=draw(st.integers(1, chunk)),
        dtype=draw(st.sampled_from([BF16, FP32])),
        **draw(st.sampled_from(FORMS)),
    )


@proves("linear_recurrence", shapes=300)
@given(op=recurrences(), fast_bytes=st.floats(9, 15).map(lambda e: int(2**e)))
def test_chunks_count_and_compute_what_the_recurrence_does(
    op: LinearRecurrence, fast_bytes: int
) -> None:
    try:
        op.tiling(fast_bytes)
    except InputError:
        assume(False)
    assert_proved(op, fast_bytes, rtol=1e-8)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("strength", [-1e-12, -1e-3, -50.0, -700.0])
def test_decays_close_to_one_and_to_zero_stay_finite(
    form: dict[str, object], strength: float
) -> None:
    op = LinearRecurrence(num_heads=1, len_seq=70, key_dim=4, chunk=32, **form)  # type: ignore[arg-type]
    inputs = dict(op.inputs(np.random.default_rng(1)))
    if "g" in inputs:
        inputs["g"] = np.full_like(inputs["g"], strength)
    found, expected = op.program(Machine(2**20), inputs)["o"], op.reference(inputs)["o"]
    assert np.isfinite(found).all()
    assert np.allclose(found, expected, rtol=1e-7, atol=1e-9)


def test_counts_by_hand() -> None:
    op = LinearRecurrence(num_heads=2, len_seq=96, key_dim=32, value_dim=16, chunk=64, decay=SCALAR)
    work = op.work(2**20)
    squares = 64**2 + 32**2
    assert work.tensor_flops[BF16] == 2 * (2 * squares * (32 + 16) + 4 * 96 * 32 * 16)
    assert work.read_bytes == 2 * 96 * ((2 * 32 + 16) * 2 + 4)
    assert work.write_bytes == 2 * 96 * 16 * 2
    assert op.state_bytes() == 2 * 32 * 16 * 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"decay": "gentle"}, "gentle"),
        ({"rule": "gamma"}, "gamma"),
        ({"rule": DELTA, "decay": CHANNEL}, "counted without a normaliser"),
        ({"sub_chunk": 65}, "sub_chunk = 65 is longer than chunk = 64"),
    ],
)
def test_forms_that_do_not_exist_are_refused(change: dict[str, object], says: str) -> None:
    fields: dict[str, object] = {"num_heads": 1, "len_seq": 64, "key_dim": 8} | change
    with pytest.raises(InputError, match=says):
        LinearRecurrence(**fields)  # type: ignore[arg-type]


def test_a_chunk_that_does_not_fit_is_refused_with_its_size() -> None:
    with pytest.raises(InputError, match=r"chunk of 512 tokens .* take a smaller chunk"):
        LinearRecurrence(num_heads=1, len_seq=512, key_dim=128, chunk=512).tiling(2**18)


def test_the_backward_pass_counts_its_products_and_keeps_to_the_forms() -> None:
    op = LinearRecurrenceBackward(num_heads=2, len_seq=96, key_dim=32, value_dim=16, chunk=64)
    squares, n = 64**2 + 32**2, 96
    products = 10 * n * 32 * 16 + squares * (6 * 32 + 4 * 16)
    assert op.work(2**20).tensor_flops[BF16] == 2 * products
    assert op.work(2**20).bytes == op.compulsory_bytes() == 2 * n * 2 * (4 * 32 + 3 * 16)
    assert not op.stages() and op.over(rule=DELTA).stages()[0].times == DELTA_PASSES
    with pytest.raises(InputError, match="gentle"):
        op.over(decay="gentle")
