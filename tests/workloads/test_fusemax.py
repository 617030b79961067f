"""FuseMax: passes derived from cascades, the one-pass cascade proved, its array's share of work."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.einsum_cascade import CASCADES, ONE_PASS, TWO_PASS, Einsum, passes
from workloads.ops.fusemax import EINSUM_CYCLES, FuseMax


@st.composite
def shapes(draw: st.DrawFn) -> FuseMax:
    kv_heads = draw(st.integers(1, 2))
    length = draw(st.integers(1, 40))
    return FuseMax(
        num_heads=kv_heads * draw(st.integers(1, 3)), num_kv_heads=kv_heads, len_q=length,
        len_kv=length + draw(st.integers(0, 30)), head_dim=draw(st.integers(1, 12)),
        causal=draw(st.booleans()),
    )  # fmt: skip


@proves("fusemax")
@given(op=shapes(), fast_bytes=st.floats(9, 15).map(lambda e: int(2**e)))
def test_the_one_pass_cascade_counts_what_the_closed_form_says(
    op: FuseMax, fast_bytes: int
) -> None:
    try:
        op.tiling(fast_bytes)
    except InputError:
        assume(False)
    assert_proved(op, fast_bytes)


def test_passes_come_out_of_the_cascades() -> None:
    assert [passes(c) for c in CASCADES] == [3, 2, 1]


def test_what_waits_for_a_reduction_needs_another_pass() -> None:
    """A softmax with a temperature that depends on the row's sum needs a fourth pass."""
    three = CASCADES[0]
    more = (Einsum("T", "P", ("A",)), Einsum("B", "M P", ("A", "T")))
    assert passes(replace(three, einsums=(*three.einsums, *more))) == 4


def test_the_order_of_the_einsums_does_not_matter() -> None:
    for cascade in CASCADES:
        assert passes(replace(cascade, einsums=cascade.einsums[::-1])) == passes(cascade)


def test_reading_the_values_once_more_is_a_pass_of_its_own() -> None:
    late = Einsum("AVV", "F P", ("AV", "V"))
    assert passes(replace(ONE_PASS, einsums=(*ONE_PASS.einsums, late))) == 2
    assert passes(replace(TWO_PASS, einsums=(*TWO_PASS.einsums, late))) == 3


def test_every_einsum_has_its_steps() -> None:
    assert set(EINSUM_CYCLES) == {e.output for e in ONE_PASS.einsums}


@pytest.mark.parametrize(("length", "share"), [(64, 0.25), (8192, 1.0)])
def test_long_sequences_keep_the_array_busy(length: int, share: float) -> None:
    op = FuseMax(num_heads=1, len_q=length, head_dim=64)
    assert float(op.array_frac(256)) == pytest.approx(share, abs=0.01)
    array, _ = op.array_cycles(256)
    chunked = length * length * (2 * 64 + 9) / 256**2
    assert float(array) == pytest.approx(chunked)
