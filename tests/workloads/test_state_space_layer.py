"""State spaces by convolution and step by step: proofs, hand counts, other truths, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP32, TF32
from hwmodels.errors import InputError, UnknownNameError
from tests.workloads.proof import assert_proved, proves
from workloads.machine import Machine
from workloads.op import ProvedOp
from workloads.ops.row_fft import RowFFT, root_points
from workloads.ops.state_kernel import METHODS, CauchySums, CompanionSpectrum, StateKernel
from workloads.ops.state_space_layer import SkipTerm, StateSpaceLayer
from workloads.ops.state_spaces import (
    COMPANION,
    DENSE,
    LOW_RANK,
    STRUCTURES,
    dense_form,
    kernels,
    random_system,
    truncated,
)
from workloads.ops.state_step import KINDS, StateStep

formats = st.sampled_from([BF16, FP32])
methods = st.sampled_from(list(METHODS))
few = st.integers(1, 3)
states = st.integers(1, 6).map(lambda pairs: 2 * pairs)


def memories(low: float, high: float = 14.0) -> st.SearchStrategy[int]:
    return st.floats(low, high).map(lambda exponent: int(2**exponent))


def prove(op: ProvedOp, fast_bytes: int) -> None:
    try:
        op.work(fast_bytes)
    except InputError:
        assume(False)
    assert_proved(op, fast_bytes)


@proves("row_fft")
@given(rows=few, length=st.integers(1, 70), more=st.integers(0, 40), inverse=st.booleans(),
       dtype=formats, fast_bytes=memories(5, 11))  # fmt: skip
def test_a_transform_counts_what_the_closed_form_says(
    rows: int, length: int, more: int, inverse: bool, dtype: Any, fast_bytes: int
) -> None:
    longest = length + more if more else None
    prove(
        RowFFT(rows=rows, len_seq=length, len_transform=longest, inverse=inverse, dtype=dtype),
        fast_bytes,
    )


@proves("cauchy_sums")
@given(channels=few, states=states, log2=st.integers(0, 6), fast_bytes=memories(7))
def test_cauchy_sums_count_what_the_closed_form_says(
    channels: int, states: int, log2: int, fast_bytes: int
) -> None:
    prove(CauchySums(channels=channels, state_dim=states, num_points=2**log2), fast_bytes)


@proves("companion_spectrum")
@given(channels=few, log2=st.integers(0, 6), fast_bytes=memories(6))
def test_a_companions_spectrum_counts_what_the_closed_form_says(
    channels: int, log2: int, fast_bytes: int
) -> None:
    prove(CompanionSpectrum(channels=channels, num_points=2**log2), fast_bytes)


@proves("state_kernel")
@given(method=methods, channels=few, states=st.integers(1, 12), length=st.integers(1, 40),
       fast_bytes=memories(9), math=st.sampled_from([None, TF32]))  # fmt: skip
def test_a_kernel_counts_what_the_closed_form_says(
    method: str, channels: int, states: int, length: int, fast_bytes: int, math: Any
) -> None:
    op = StateKernel(
        method=method, channels=channels, len_seq=length,
        state_dim=2 * states if method == "cauchy" else states,
        math_dtype=math if method == "krylov" else None,
    )  # fmt: skip
    prove(op, fast_bytes)


@proves("state_step")
@given(kind=st.sampled_from(list(KINDS)), batch=few, channels=few, states=states, dtype=formats,
       fast_bytes=memories(8))  # fmt: skip
def test_a_step_counts_what_the_closed_form_says(
    kind: str, batch: int, channels: int, states: int, dtype: Any, fast_bytes: int
) -> None:
    op = StateStep(
        structure=kind, batch=batch, channels=channels, state_dim=states, dtype=dtype
    )  # fmt: skip
    prove(op, fast_bytes)


@proves("skip_term")
@given(batch=few, channels=few, length=st.integers(1, 40), dtype=formats, fast_bytes=memories(4))
def test_a_skip_counts_what_the_closed_form_says(
    batch: int, channels: int, length: int, dtype: Any, fast_bytes: int
) -> None:
    prove(SkipTerm(batch=batch, channels=channels, len_seq=length, dtype=dtype), fast_bytes)


@proves("state_space_layer")
@given(method=methods, batch=few, channels=few, states=states, length=st.integers(1, 40),
       way=st.sampled_from(["recurrent", "kernel_kept", ""]), dtype=formats,
       fast_bytes=memories(9))  # fmt: skip
def test_a_layer_counts_what_the_closed_form_says(
    method: str, batch: int, channels: int, states: int, length: int, way: str, dtype: Any,
    fast_bytes: int,
) -> None:  # fmt: skip
    op = StateSpaceLayer(
        method=method, batch=batch, channels=channels, state_dim=states, dtype=dtype,
        len_seq=min(length, 9) if way == "recurrent" else length, **({way: True} if way else {}),
    )  # fmt: skip
    prove(op, fast_bytes)


# ---- other truths --------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_convolution_is_its_recurrence_token_by_token(method: str) -> None:
    whole = StateSpaceLayer(batch=2, channels=3, len_seq=21, state_dim=8, method=method)
    inputs = dict(whole.inputs(np.random.default_rng(1)))
    got = whole.program(Machine(2**16), inputs)["y"]
    step = whole.over(recurrent=True, len_seq=1)
    state, seen = np.zeros((2, 3, 8)), []
    for t in range(21):
        given_now = inputs | {"u": inputs["u"][:, :, t : t + 1], "x": state}
        found = step.program(Machine(2**16), given_now)
        state = found["x"]
        seen.append(found["y"])
    np.testing.assert_allclose(got, np.concatenate(seen, axis=2), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_generating_function_is_the_polynomial_of_its_kernel(structure: str) -> None:
    system = random_system(structure, np.random.default_rng(2), 2, 6)
    found, points = dense_form(structure, system), 8
    row = truncated(structure, system, points)
    if structure == LOW_RANK:
        row = np.concatenate([row, row.conj()], axis=1)
    terms = kernels(structure, system, 2 * points)
    for w in root_points(points):
        inverse = np.linalg.inv(np.eye(6) - found.a * w)
        expected = (terms * w ** np.arange(2 * points)).sum(axis=1)
        got = np.einsum("hi,hij,hj->h", row, inverse, found.b)
        np.testing.assert_allclose(got, expected, rtol=1e-9)


@pytest.mark.parametrize("decay", [1e-8, 1e-3, 1.0, 1e3, 1e8])
def test_decays_close_to_one_and_to_nothing(decay: float) -> None:
    op = StateKernel(channels=2, state_dim=6, len_seq=64)
    inputs = dict(op.inputs(np.random.default_rng(3)))
    vectors = inputs["p"].copy()
    vectors[:, 0, 0], vectors[:, 1:3] = -decay, vectors[:, 1:3] * 1e-3
    inputs["p"] = vectors
    expected = op.reference(inputs)["k"]
    got = op.program(Machine(2**16), inputs)["k"]
    np.testing.assert_allclose(got, expected, atol=1e-7 * np.abs(expected).max())


@pytest.mark.parametrize("radius", [0.0, 1e-9, 1 - 1e-9, 1.0])
def test_a_companion_without_damping_and_without_memory(radius: float) -> None:
    op = StateKernel(channels=1, state_dim=5, len_seq=48, method=COMPANION)
    inputs = dict(op.inputs(np.random.default_rng(4)))
    inputs["a"] = radius * np.array([[1.0, 0, 0, 0, 0]])  # a cyclic shift: roots on the circle
    expected = op.reference(inputs)["k"]
    got = op.program(Machine(2**16), inputs)["k"]
    np.testing.assert_allclose(got, expected, atol=1e-7)


def test_a_state_longer_than_the_sequence() -> None:
    op = StateKernel(channels=2, state_dim=40, len_seq=5, method=COMPANION)
    assert op.len_transform == 64
    assert_proved(op, 2**14)


# ---- by hand -------------------------------------------------------------------------------


def test_a_krylov_kernel_by_hand() -> None:
    op = StateKernel(channels=3, state_dim=16, len_seq=10, method="krylov")
    extend = 1 + 2 + 4 + 2
    assert op.min_flops()[FP32] == 3 * 2 * (16**2 * extend + 3 * 16**3 + 16 * 10)
    assert op.work(2**20).launches == 4 + 3 + 1
    once = op.over(len_seq=1)
    assert once.min_flops()[FP32] == 3 * 2 * 16


def test_a_cauchy_kernel_by_hand() -> None:
    work = StateKernel(channels=1, state_dim=2, len_seq=3).work(2**20)
    sums = 2 * (2 * 45 + 36) + 4 * 6 + 1  # two points, two states, products of one pair
    assert work.vector_flops == sums + 5 * 2 * 1 + 6 * 2
    assert work.special_ops == 2 * 3 + 1
    assert work.read_bytes == 4 * (5 * 2 + 1) + 8 * 2
    assert work.write_bytes == 8 * 2 + 4 * 4


def test_a_dense_step_costs_a_matrix_a_channel() -> None:
    op = StateSpaceLayer(
        channels=5, len_seq=1, state_dim=8, method="krylov", recurrent=True, batch=2
    )
    assert op.min_flops()[FP32] == 2 * 5 * 2 * (8 * 9 + 9)
    assert op.over(len_seq=7).min_flops()[FP32] == 7 * op.min_flops()[FP32]
    assert op.state_bytes() == op.over(len_seq=99).state_bytes() == 4 * 2 * 5 * 8


def test_a_kept_kernel_saves_its_making() -> None:
    op = StateSpaceLayer(channels=4, len_seq=64, state_dim=16)
    kept = op.over(kernel_kept=True).work(2**16)
    assert op.work(2**16).flops == kept.flops + op.kernel().work(2**16).flops
    assert op.num_parameters() == 4 * (5 * 16 + 2)


def test_sizes_take_arrays() -> None:
    lengths = np.array([1.0, 2.0, 5.0, 64.0, 1000.0])
    for method in METHODS:
        op = StateKernel(channels=2, state_dim=4, len_seq=lengths, method=method)
        many = op.work(2.0**16)
        for i, length in enumerate(lengths):
            one = op.over(len_seq=int(length)).work(2**16)
            assert np.broadcast_to(many.bytes, 5)[i] == one.bytes
            assert np.broadcast_to(many.flops, 5)[i] == one.flops
            assert np.broadcast_to(many.launches, 5)[i] == one.launches


# ---- refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "why"),
    [({"state_dim": 7}, "must be even"),
     ({"math_dtype": TF32}, "leave math_dtype out"),
     ({"recurrent": True, "kernel_kept": True}, "a recurrence has no kernel")],
)  # fmt: skip
def test_impossible_layers_are_refused(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        StateSpaceLayer(**{"channels": 2, "len_seq": 8, "state_dim": 8} | fields)


def test_unknown_ways_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="guess"):
        StateKernel(channels=1, state_dim=2, len_seq=2, method="guess")
    with pytest.raises(UnknownNameError, match="dense"):
        StateStep(channels=1, state_dim=2, structure=DENSE)


def test_systems_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="make state_dim smaller"):
        StateStep(channels=1, state_dim=2**14).work(2**16)
    with pytest.raises(InputError, match="make state_dim smaller"):
        CauchySums(channels=1, state_dim=2**14, num_points=2).work(2**16)
    with pytest.raises(InputError, match="must be a power of two"):
        CauchySums(channels=1, state_dim=2, num_points=3)
    with pytest.raises(InputError, match="leave len_transform out"):
        RowFFT(rows=1, len_seq=9, len_transform=8)
