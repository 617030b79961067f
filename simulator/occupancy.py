"""How many blocks of a compiled kernel one SM holds, and how many waves a grid takes.

    registers  warps_block = ceil(threads / 32),  per warp roundup(32 regs, 256)                 (1)
               blocks <= 4 floor(R / 4 / per warp) // warps_block
    shared     blocks <= S / roundup(smem_block + 1024, 128)      (1 KiB is the system's)        (2)
    warps      blocks <= max_warps / warps_block                                                 (3)
    slots      blocks <= max_blocks                                                              (4)
    tensor     blocks <= 512 / columns                            (tensor memory, sm_100)        (5)
    waves      ceil(grid / (SMs blocks))                                                         (6)

R registers and S bytes of shared memory are one SM's. Limits come from the device file, whose
sources are the "Technical specifications per compute capability" of the CUDA programming guide as
NVIDIA/cccl's arch_traits.h restates it; the granules of (1) and (2) are those of NVIDIA's occupancy
calculator for compute capability 8.0 to 10.0. Ignored: clusters, dynamic register allocation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from hwmodels.device import Device
from hwmodels.errors import UnsupportedError

WARP: Final = 32
REGISTER_BYTES: Final = 4
REGISTER_GRANULE: Final = 256
"""Registers are given to a warp in these units: NVIDIA's occupancy calculator, 5.0 and later."""
SMEM_GRANULE_BYTES: Final = 128
"""Shared memory of a block comes in these units: the same source, 8.0 and later."""
SYSTEM_SMEM_BYTES: Final = 1024
"""What the system takes of shared memory for every block: CUDA programming guide, 8.0 and later."""
SUBPARTITIONS: Final = 4
"""Schedulers of one SM, each with a quarter of the registers: CUDA programming guide."""
TENSOR_COLUMNS: Final = 512
"""Columns of one SM's tensor memory: PTX manual, tcgen05."""

TYPICAL: Final[Mapping[int, str]] = {80: "a100-sxm4-80gb", 90: "h100-sxm", 100: "b200-sxm"}
"""A device of each compute capability (times ten) that kernels are compiled for; the limits of its
SM are those of every device of that capability."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one block of a compiled kernel takes. `tensor_columns`: of tensor memory, sm_100."""

    registers: int
    num_warps: int
    smem_bytes: int
    tensor_columns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupancy:
    """Blocks of one SM, the limit that each resource sets, and the share of its warps in use."""

    blocks: int
    limits: Mapping[str, int]
    warps: int
    warps_frac: float

    @property
    def bound(self) -> str:
        """The resource that runs out first."""
        return min(self.limits, key=lambda name: self.limits[name])


def occupancy(block: Resources, device: Device) -> Occupancy:
    """Equations (1) to (5) on a device; raises where its file lacks a limit or no block fits.

    >>> from hwmodels import catalog
    >>> found = occupancy(Resources(registers=128, num_warps=8, smem_bytes=100 * 1024),
    ...                   catalog.device("h100-sxm"))
    >>> found.blocks, dict(found.limits)
    (2, {'registers': 2, 'shared memory': 2, 'warps': 8, 'block slots': 32})
    """
    sm = {
        name: _limit(device, name)
        for name in (
            "register_file_bytes", "smem_bytes", "smem_bytes_per_block", "max_warps", "max_blocks"
        )
    }  # fmt: skip
    if block.smem_bytes > sm["smem_bytes_per_block"]:
        raise UnsupportedError(
            f"one block takes {block.smem_bytes} bytes of shared memory, {device.id} gives it "
            f"{sm['smem_bytes_per_block']}; choose smaller tiles or fewer stages"
        )
    file = sm["register_file_bytes"] // REGISTER_BYTES
    per_warp = max(_rounded(block.registers * WARP, REGISTER_GRANULE), REGISTER_GRANULE)
    warps = SUBPARTITIONS * (file // SUBPARTITIONS // per_warp)
    smem = _rounded(block.smem_bytes + SYSTEM_SMEM_BYTES, SMEM_GRANULE_BYTES)
    limits = {
        "registers": warps // block.num_warps,
        "shared memory": sm["smem_bytes"] // smem,
        "warps": sm["max_warps"] // block.num_warps,
        "block slots": sm["max_blocks"],
    }
    if block.tensor_columns:
        limits["tensor memory"] = TENSOR_COLUMNS // block.tensor_columns
    blocks = min(limits.values())
    if blocks < 1:
        short = min(limits, key=lambda name: limits[name])
        raise UnsupportedError(f"not one block fits an SM of {device.id}: too little of {short}")
    used = blocks * block.num_warps
    return Occupancy(
        blocks=blocks, limits=limits, warps=used, warps_frac=used / sm["max_warps"]
    )  # fmt: skip


def arch_of(device: Device) -> int:
    """The architecture whose binaries a device runs, of those kernels are compiled for.

    A binary for 8.0 runs on every 8.x; those for 9.0 and 10.0 use instructions of these alone.

    >>> from hwmodels import catalog
    >>> arch_of(catalog.device("a100-sxm4-80gb")), arch_of(catalog.device("l40s"))
    (80, 80)
    """
    found = {"8": 80, "9.0": 90, "10.0": 100}
    capability = device.compute_capability or ""
    arch = found.get(capability) or found.get(capability.split(".")[0])
    if arch is None:
        raise UnsupportedError(
            f"{device.id} runs none of the binaries for sm_80, sm_90 and sm_100; take a device "
            "of compute capability 8.x, 9.0 or 10.0"
        )
    return arch


def waves(num_blocks: float, num_sms: int, resident: int) -> float:
    """Equation (6) before rounding up: how many times over the grid fills the device.

    >>> waves(264, 132, 1)
    2.0
    """
    return num_blocks / (num_sms * resident)


def _rounded(value: int, granule: int) -> int:
    return -(-value // granule) * granule


def _limit(device: Device, name: str) -> int:
    found = getattr(device.sm, name)
    if found is None:
        raise UnsupportedError(
            f"{device.id} has no sm.{name}, so its occupancy is unknown; add it to the device file"
        )
    return int(found)
