"""The terms that kernel times are made of."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.kernel_time.terms import (
    ceil,
    cold_frac,
    dram_seconds,
    larger,
    norm,
    overlap,
    real,
    smaller,
    waves,
)

SECONDS = st.floats(1e-9, 1e3)


@given(st.lists(SECONDS, min_size=1, max_size=5))
def test_an_overlap_lies_between_the_longest_and_the_sum(times: list[float]) -> None:
    together = overlap(*times)
    assert max(times) * (1 - 1e-12) <= together <= sum(times) * (1 + 1e-12)
    assert norm(4, *times) == pytest.approx(together, rel=1e-12)
    assert overlap(*(np.array([t]) for t in times))[0] == pytest.approx(together, rel=1e-12)


def test_nothing_takes_no_time() -> None:
    assert overlap(0.0, 0.0) == norm(3, 0.0, 0.0) == 0.0
    assert overlap(np.zeros(2), 1.0).tolist() == [1.0, 1.0]


@given(SECONDS, SECONDS, st.floats(1.0, 10.0))
def test_an_overlap_never_falls_when_a_part_grows(a: float, b: float, factor: float) -> None:
    assert overlap(a * factor, b) >= overlap(a, b) * (1 - 1e-12)


@given(st.integers(1, 10_000), st.integers(1, 200), st.floats(0, 1))
def test_waves_are_between_the_mean_and_whole_rounds(blocks: int, slots: int, q: float) -> None:
    found = waves(blocks, slots, q)
    assert max(1.0, blocks / slots) * (1 - 1e-12) <= found <= -(-blocks // slots) * (1 + 1e-12)
    assert waves(np.array([float(blocks)]), slots, q)[0] == pytest.approx(found, rel=1e-12)
    assert waves(blocks + 1, slots, q) >= found - 1e-12


@pytest.mark.parametrize("footprint", [0.0, 1e3, 1e6, 1e9])
def test_a_larger_working_set_is_colder(footprint: float) -> None:
    assert 0 <= cold_frac(footprint, 1e6) <= cold_frac(2 * footprint, 1e6) <= 1
    assert cold_frac(footprint, 2e6) <= cold_frac(footprint, 1e6)
    assert cold_frac(1.0, 0.0) == 0.5  # a device without that cache: one byte counts as its size


def test_memory_time_has_its_latency_ramped_in() -> None:
    assert dram_seconds(0.0, 1e12, 1e-6) == 0
    assert dram_seconds(2.0**19, 1e12, 1e-6) == pytest.approx(2**19 / 1e12 + 0.5e-6)
    assert dram_seconds(2.0**30, 1e12, 1e-6) == pytest.approx(2**30 / 1e12 + 1e-6)


def test_comparisons_look_at_real_parts() -> None:
    low, high = 1 + 1e-30j, 2 - 1e-30j
    assert larger(low, high) == high and smaller(low, high) == low
    assert larger(np.array([low]), high)[0] == high
    assert ceil(1.2 + 5j) == 2 and ceil(np.array([1.2 + 5j])).tolist() == [2.0]
    assert real(3) == 3 and real(1 + 2j) == 1


def test_derivatives_pass_through_every_term() -> None:
    step = 1e-30
    moved = 3e-6 * (1 + 1j * step)
    for term in (
        lambda t: overlap(t, 2e-6), lambda t: norm(3, t, 2e-6), lambda t: larger(t, 1e-9),
        lambda t: waves(200, 132 * t / 3e-6, 0.2), lambda t: cold_frac(1e6 * t / 3e-6, 1e6),
        lambda t: dram_seconds(1e6, 1e12 / (t / 3e-6), 1e-6),
    ):  # fmt: skip
        exact = np.imag(term(np.asarray(moved))) / step
        by_difference = (term(3e-6 * (1 + 1e-6)) - term(3e-6 * (1 - 1e-6))) / 2e-6
        assert exact == pytest.approx(by_difference, rel=1e-6)
