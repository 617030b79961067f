"""Scalars stay scalar and exact; arrays give the same answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workloads import numeric


@given(a=st.integers(0, 2**52), b=st.integers(1, 2**26))
def test_ceil_div_is_exact(a: int, b: int) -> None:
    expected = (a + b - 1) // b
    assert numeric.ceil_div(a, b) == expected
    assert isinstance(numeric.ceil_div(a, b), int)
    assert numeric.ceil_div(np.array([float(a)]), b)[0] == expected


@given(a=st.floats(1e-3, 1e12), b=st.floats(1e-3, 1e12))
def test_arrays_agree_with_scalars(a: float, b: float) -> None:
    for function in (numeric.minimum, numeric.maximum):
        assert function(np.array([a]), b)[0] == function(a, b)
    for function in (numeric.floor, numeric.sqrt):
        assert function(np.array([a]))[0] == function(a)
    assert numeric.log2(np.array([a]))[0] == pytest.approx(math.log2(a), rel=1e-15, abs=1e-15)
    assert numeric.where(np.array([a < b]), a, b)[0] == numeric.where(a < b, a, b)


def test_numpy_scalars_become_python_numbers() -> None:
    assert type(numeric.as_num(np.int64(3))) is int
    assert type(numeric.as_num(np.float32(0.5))) is float
    assert numeric.as_num([1, 2]).dtype == np.float64
    with pytest.raises((TypeError, ValueError)):
        numeric.as_num("many")


def test_large_counts_do_not_wrap() -> None:
    big = numeric.as_num(np.array([2**21]))
    assert (2 * big * big * big)[0] == 2.0**64
