"""Casting a tensor to a narrow format: program against closed form, and numbers by hand."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP8, FP32, NVFP4
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from tests.workloads.test_selection import fits
from workloads.ops.quantise_tensor import QuantiseTensor


@st.composite
def casts(draw: st.DrawFn) -> QuantiseTensor:
    scale = draw(st.sampled_from(["known", "largest", "local"]))
    return QuantiseTensor(
        num_elements=draw(st.integers(1, 200)),
        copies=draw(st.sampled_from([1, 2])),
        largest=scale == "largest",
        local=scale == "local",
        split=draw(st.booleans()),
        dtype=draw(st.sampled_from([BF16, FP32])),
        out_dtype=draw(st.sampled_from([FP8, BF16])),
    )


@proves("quantise_tensor")
@given(op=casts(), fast_bytes=st.integers(16, 400))
def test_casting_counts_what_the_closed_form_says(op: QuantiseTensor, fast_bytes: int) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@pytest.mark.parametrize(
    ("op", "bytes_per_element", "launches"),
    [
        (QuantiseTensor(num_elements=1000), 2 + 1, 1),  # delayed scaling, along only
        (QuantiseTensor(num_elements=1000, copies=2), 2 + 1 + 1, 1),  # cast and transposed
        (QuantiseTensor(num_elements=1000, copies=2, largest=True), 2 + 2 + 1 + 1, 2),
        (QuantiseTensor(num_elements=1000, copies=2, largest=True, split=True), 3 * 2 + 2, 3),
        (QuantiseTensor(num_elements=1000, dtype=FP8), 1 + 1, 1),  # a transposition
        (QuantiseTensor(num_elements=1000, copies=2, local=True, out_dtype=NVFP4),
         2 + 2 * 0.5625, 1),
    ],
)  # fmt: skip
def test_bytes_and_launches_by_hand(
    op: QuantiseTensor, bytes_per_element: float, launches: int
) -> None:
    work = op.work(2**16)
    assert work.bytes == pytest.approx(1000 * bytes_per_element)
    assert work.launches == launches


def test_three_copies_and_two_kinds_of_scales_are_refused() -> None:
    with pytest.raises(InputError, match="neither 1 nor 2"):
        QuantiseTensor(num_elements=1, copies=3)
    with pytest.raises(InputError, match="not both"):
        QuantiseTensor(num_elements=1, largest=True, local=True)
