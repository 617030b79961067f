"""Blocks of an SM against counts by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels import catalog
from hwmodels.errors import UnsupportedError
from simulator.occupancy import TYPICAL, Resources, arch_of, occupancy, waves

A100, H100, B200 = (catalog.device(TYPICAL[arch]) for arch in (80, 90, 100))


def test_registers_come_by_warp_and_by_quarter_of_an_sm() -> None:
    # 255 registers: 8192 a warp after rounding to 256, so 2 warps a quarter, 8 of an SM
    found = occupancy(Resources(registers=255, num_warps=4, smem_bytes=0), H100)
    assert (found.blocks, found.bound, found.warps) == (2, "registers", 8)
    # 134 registers: 4352 a warp, 3 a quarter; 12 warps hold one block of 8
    assert occupancy(Resources(registers=134, num_warps=8, smem_bytes=0), H100).blocks == 1


def test_shared_memory_pays_for_the_system() -> None:
    # 227 KiB is the most one block may have; with the system's KiB it is all of the 228
    most = Resources(registers=32, num_warps=4, smem_bytes=227 * 1024)
    assert occupancy(most, H100).blocks == 1
    half = Resources(registers=32, num_warps=4, smem_bytes=113 * 1024)
    assert occupancy(half, H100).limits["shared memory"] == 2
    more = Resources(registers=32, num_warps=4, smem_bytes=113 * 1024 + 1)
    assert occupancy(more, H100).limits["shared memory"] == 1


def test_tensor_memory_is_shared_by_columns() -> None:
    block = Resources(registers=32, num_warps=4, smem_bytes=0, tensor_columns=256)
    assert (occupancy(block, B200).blocks, occupancy(block, B200).bound) == (2, "tensor memory")


def test_warps_and_slots() -> None:
    assert occupancy(Resources(registers=32, num_warps=1, smem_bytes=0), A100).blocks == 32
    found = occupancy(Resources(registers=16, num_warps=32, smem_bytes=0), A100)
    assert (found.blocks, found.warps_frac) == (2, 1.0)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="gives it 166912"):
        occupancy(Resources(registers=32, num_warps=4, smem_bytes=200 * 1024), A100)
    with pytest.raises(UnsupportedError, match="registers"):
        occupancy(Resources(registers=255, num_warps=32, smem_bytes=0), A100)
    with pytest.raises(UnsupportedError, match=r"max_warps|register_file|smem"):
        occupancy(Resources(registers=32, num_warps=4, smem_bytes=0), catalog.device("tpu-v5e"))


@given(st.integers(16, 255), st.sampled_from([1, 2, 4, 8]), st.integers(0, 160 * 1024))
def test_more_of_anything_never_holds_more_blocks(regs: int, warps: int, smem: int) -> None:
    def blocks(regs: int, warps: int, smem: int) -> int:
        block = Resources(registers=regs, num_warps=warps, smem_bytes=smem)
        try:
            return occupancy(block, A100).blocks
        except UnsupportedError:
            return 0

    here = blocks(regs, warps, smem)
    assert here * warps * regs * 32 <= 65536
    for more in ((min(regs + 1, 255), warps, smem), (regs, 2 * warps, smem),
                 (regs, warps, smem + 64)):  # fmt: skip
        assert blocks(*more) <= here


def test_waves_and_architectures() -> None:
    assert waves(133, 132, 1) > 1
    assert [arch_of(d) for d in (A100, H100, B200)] == [80, 90, 100]
    assert arch_of(catalog.device("rtx-4090")) == 80
    with pytest.raises(UnsupportedError, match="sm_80, sm_90 and sm_100"):
        arch_of(catalog.device("v100-sxm2-16gb"))
