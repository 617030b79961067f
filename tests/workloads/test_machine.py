"""The two-level memory: what it counts, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from hwmodels.dtypes import BF16, FP32, FP64, NVFP4
from workloads.machine import FastMemoryOverflow, Machine, slices


def machine(fast_bytes: float = 4096) -> Machine:
    return Machine(fast_bytes)


def test_loads_and_stores_count_the_bytes_of_their_formats() -> None:
    mc = machine()
    source = mc.place(np.arange(64.0).reshape(8, 8), BF16)
    target = mc.empty((8, 8), FP64)
    tile = mc.load(source, (slice(0, 4), slice(0, 8)))
    mc.store(tile, target, (slice(0, 4), slice(0, 8)))
    counted = mc.counted()
    assert (counted.read_bytes, counted.write_bytes) == (32 * 2, 32 * 8)
    assert (target.values[:4] == source.values[:4]).all()
    assert np.isnan(target.values[4:]).all()


def test_block_scales_count_as_bytes() -> None:
    mc = machine()
    mc.load(mc.place(np.ones(64), NVFP4))
    assert mc.counted().read_bytes == 64 * (0.5 + 1 / 16)


def test_fast_memory_refuses_to_overflow() -> None:
    mc = machine(100)
    held = mc.full((25,), 0.0)
    assert mc.used_bytes == mc.peak_bytes == 100
    with pytest.raises(FastMemoryOverflow, match="4 bytes for"):
        mc.full((1,), 0.0)
    mc.free(held)
    assert mc.used_bytes == 0
    mc.full((25,), 0.0)


def test_a_refused_tile_is_not_counted_as_held() -> None:
    mc = machine(8)
    with pytest.raises(FastMemoryOverflow):
        mc.full((3,), 0.0)
    assert mc.used_bytes == 0
    mc.full((2,), 0.0)


def test_a_freed_tile_cannot_be_used() -> None:
    mc = machine()
    tile = mc.full((2, 2), 1.0)
    mc.free(tile)
    for use in (
        lambda: mc.free(tile),
        lambda: mc.matmul(tile, tile, BF16),
        lambda: mc.store(tile, mc.empty((2, 2), FP32)),
        lambda: mc.reduce("sum", tile),
        lambda: mc.vector(np.zeros((2, 2)), into=tile),
    ):
        with pytest.raises(RuntimeError, match="not in fast memory"):
            use()


def test_products_count_two_flops_a_multiply_add() -> None:
    mc = machine()
    a, b = mc.hold(np.ones((2, 3))), mc.hold(np.ones((3, 5)))
    acc = mc.full((2, 5), 1.0)
    assert mc.matmul(a, b, BF16, into=acc) is acc
    assert (acc.values == 4).all()
    assert mc.counted().tensor_flops == {BF16: 2 * 2 * 3 * 5}


def test_complex_products_are_four_real_ones() -> None:
    mc = machine()
    a = mc.hold(np.full((2, 2), 1j))
    mc.matmul(a, a, FP32)
    assert mc.counted().tensor_flops == {FP32: 4 * 2 * 8}


def test_lanes_and_special_functions_count_per_element() -> None:
    mc = machine()
    tile = mc.full((4, 4), 2.0)
    mc.vector(tile.values * 2, per_element=3, into=tile)
    mc.special(np.exp(tile.values))
    total = mc.reduce("sum", tile)
    largest = mc.reduce("max", tile, axis=0)
    assert total.shape == (4, 1) and largest.shape == (1, 4)
    assert (total.values == 16).all() and (largest.values == 4).all()
    counted = mc.counted()
    assert (counted.vector_flops, counted.special_ops) == (16 * 3 + 16 + 16, 16)
    with pytest.raises(ValueError, match="reduce knows"):
        mc.reduce("mean", tile)


def test_kernels_start_and_end_with_an_empty_fast_memory() -> None:
    mc = machine()
    for _ in range(2):
        with mc.kernel():
            mc.full((4,), 0.0)
            with mc.scope():
                mc.full((8,), 0.0)
            assert mc.used_bytes == 16
        assert mc.used_bytes == 0
    assert mc.counted().launches == 2
    mc.full((1,), 0.0)
    with pytest.raises(RuntimeError, match="must be empty"), mc.kernel():
        pass


def test_slices_cover_a_ragged_range_once() -> None:
    parts = list(slices(10, 4))
    assert [(p.start, p.stop) for p in parts] == [(0, 4), (4, 8), (8, 10)]
