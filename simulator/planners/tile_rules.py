"""Which tiles a thread block may take: the integer program of a matmul and of attention on a chip.

One block computes tile_m x tile_n results, `depth` of k at a time from `stages` buffers in shared
memory; `resident` blocks share an SM. A unit is what issues a matrix instruction of mu x nu x 32
bytes of k: a warp (mma.sync, compute capability 8 and 12), a warpgroup (wgmma, 9), the block
(tcgen05, 10). With e bytes an operand, o a result, T = 32 w threads of w warps that hold results:

    mu units_m | tile_m,   nu units_n | tile_n,   tile_n / units_n <= 256 (wgmma, tcgen05)       (1)
    smem   = stages depth (tile_m + tile_n) e + staged(tile_m o)   <= shared memory of a block   (2)
    resident (smem + 1 KiB) <= shared memory of an SM                                           (3)
    regs   = tile_m tile_n / T + fragments + kept  <= registers of a thread                      (4)
    resident (T roundup8(regs) + R_beside) <= registers of an SM                                 (5)
    resident (T + T_beside) <= threads of an SM,  T + T_beside <= threads of a block             (6)
    tcgen05: 2 resident tile_n ceil(tile_m / 128) 512 B <= tensor memory                         (7)

Attention: tile_q query rows stay (their own rows in each unit), tile_k keys and values stream
through `stages` buffers, K and V in turn; d' and v' are widths in whole instructions:

    smem   = tile_q max(d', v') e + stages tile_k max(d', v') e                                  (8)
    regs   = tile_q (v' + tile_k) / T + kept;  tcgen05: one row of scores, tile_k + kept         (9)
    tcgen05: resident ceil(tile_q / 128) (v' + tile_k) 512 B <= tensor memory                   (10)

`fragments` are two sets of operands in flight in registers (mma.sync alone). Beside the consumers,
wgmma and tcgen05 kernels have a producer. Not in the program: pairs of SMs that share one product
(tcgen05's cta_group::2), keys split over blocks, results that stay in registers of idle warps.

Source: PTX ISA 8.7 (shapes of mma, wgmma, tcgen05.mma; tensor memory), CUDA C++ Programming Guide
(table of limits by compute capability; 1 KiB of shared memory a block is the system's), CUTLASS
(results leave Hopper kernels through shared memory), FlashAttention-2's and -3's sources (what is
kept in registers, the producer's 32). `KEPT` is a count of ours: FlashAttention-2's own tiles
(128 x 64 at width 128, 128 x 128 at 64, with 4 warps) fit, the next larger ones, which spill, not;
-3's 192 x 192 at width 64 takes exactly the 160 registers a thread its source sets aside.

    Implemented in: `matmul_rules` (1-7), `attention_rules` (1, 3, 5-10), `Chip.of`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from hwmodels.device import Device
from hwmodels.errors import UnsupportedError
from simulator.planners.integers import DIVIDES, Constraint, Program
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.matmul import Matmul

MMA, WGMMA, TCGEN05 = "mma.sync", "wgmma", "tcgen05"
WARP: Final = 32
STEP_BYTES: Final = 32
"""k that one matrix instruction takes, in bytes: k16 of 16-bit, k32 of 8-bit formats."""
REGISTER_BYTES: Final = 4
REGISTER_STEP: Final = 8
"""Registers of a thread are given out in multiples of it."""
SYSTEM_BYTES: Final = 1024
"""Shared memory of each resident block that the system keeps (compute capability 8 and up)."""
LANES: Final = 128
"""Rows of tensor memory; a column of them is 512 bytes."""
COLUMN_BYTES: Final = 512
STAGED_COLUMNS: Final = 64
"""Columns of results that wait in shared memory to leave (CUTLASS' epilogue: two times 32)."""
KEPT: Final[Mapping[str, int]] = {MMA: 48, WGMMA: 32, TCGEN05: 32}
"""Registers of a thread for addresses, counters, maxima and sums."""
SMEM, SMEM_SM = "shared memory of a block", "shared memory of an SM"
REGISTERS, REGISTER_FILE = "registers of a thread", "registers of an SM"
THREADS, THREADS_SM, BLOCKS = "threads of a block", "threads of an SM", "blocks of an SM"
TENSOR_MEMORY: Final = "tensor memory"
SHARED: Final = (SMEM, SMEM_SM)
TILES: Final = "whole instructions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """A matrix instruction: rows and columns it comes in, warps that issue it as one unit, and
    what a kernel built on it has beside: threads and registers of its producer."""

    kind: str
    rows: int
    columns: int
    warps: int
    units_m: tuple[int, ...]
    units_n: tuple[int, ...]
    producer_threads: int = 0
    producer_registers: int = 0
    clusters: tuple[int, ...] = (1,)

    @property
    def is_async(self) -> bool:
        """Does it read its operands from shared memory by itself?"""
        return self.kind != MMA


_POWERS: Final = (1, 2, 4, 8)
_MMA: Final = Instruction(
    kind=MMA, rows=16, columns=16, warps=1, units_m=_POWERS, units_n=_POWERS
)  # fmt: skip
INSTRUCTIONS: Final[Mapping[str, Instruction]] = {
    "8": _MMA,
    "12": _MMA,
    "9": Instruction(
        kind=WGMMA, rows=64, columns=8, warps=4, units_m=(1, 2, 3), units_n=(1, 2),
        producer_threads=128, producer_registers=32, clusters=(1, 2),
    ),
    "10": Instruction(
        kind=TCGEN05, rows=128, columns=16, warps=4, units_m=(1,), units_n=(1,),
        producer_threads=64, producer_registers=64, clusters=(1, 2),
    ),
}  # fmt: skip
"""By the major compute capability. mma.sync's columns are two instructions of 8: one ldmatrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """What a device allows one SM and one block; shared memory may be moved to ask what if."""

    device: Device
    instruction: Instruction
    smem_bytes: int
    block_smem_bytes: int
    registers: int
    thread_registers: int
    threads: int
    block_threads: int
    blocks: int
    tensor_memory_bytes: int

    @staticmethod
    def of(device: Device, more_smem_bytes: int = 0) -> Chip:
        """The limits of a device, with that much more shared memory an SM and a block."""
        sm = device.sm
        major = (device.compute_capability or "").split(".")[0]
        if major not in INSTRUCTIONS:
            raise UnsupportedError(
                f"tiles: {device.id} has none of mma.sync with asynchronous copies, wgmma and "
                "tcgen05; take an NVIDIA part of compute capability 8, 9, 10 or 12"
            )
        needed = {
            "register_file_bytes": sm.register_file_bytes, "smem_bytes": sm.smem_bytes,
            "max_registers_per_thread": sm.max_registers_per_thread,
            "smem_bytes_per_block": sm.smem_bytes_per_block, "max_warps": sm.max_warps,
            "max_blocks": sm.max_blocks, "max_threads_per_block": sm.max_threads_per_block,
        }  # fmt: skip
        missing = [name for name, value in needed.items() if value is None]
        if missing:
            raise UnsupportedError(
                f"tiles: {device.id} has no sm.{missing[0]}; add it to the device file"
            )
        return Chip(
            device=device, instruction=INSTRUCTIONS[major],
            smem_bytes=int(sm.smem_bytes or 0) + more_smem_bytes,
            block_smem_bytes=int(sm.smem_bytes_per_block or 0) + more_smem_bytes,
            registers=int(sm.register_file_bytes or 0) // REGISTER_BYTES,
            thread_registers=int(sm.max_registers_per_thread or 0),
            threads=int(sm.max_warps or 0) * WARP,
            block_threads=int(sm.max_threads_per_block or 0), blocks=int(sm.max_blocks or 0),
            tensor_memory_bytes=int(sm.tensor_memory_bytes or 0),
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """The largest values that are looked at; all smaller ones of the program are.

    Rows of `step_bytes` of k go to shared memory at a time: half, one or two of its lines, which
    are what libraries have (CUTLASS: k32 and k64 of 16-bit formats).
    """

    rows: int = 256
    columns: int = 256
    step_bytes: tuple[int, ...] = (64, 128, 256)
    stages: int = 8
    resident: int = 8
    splits: tuple[int, ...] = (1, 2, 4, 8, 16)


WHOLE: Final = Space()

Amount = Callable[[Mapping[str, Any]], Any]


def threads_of(chip: Chip, v: Mapping[str, Any]) -> Any:
    """Threads that hold results."""
    units = v["units_m"] * v.get("units_n", 1)
    return WARP * chip.instruction.warps * units


def block_registers(chip: Chip, v: Mapping[str, Any], regs: Any) -> Any:
    """Registers that one block takes of its SM: equation (5)."""
    rounded = -(-regs // REGISTER_STEP) * REGISTER_STEP
    beside = chip.instruction.producer_threads * chip.instruction.producer_registers
    return threads_of(chip, v) * rounded + beside


def _occupancy(
    chip: Chip, uses: tuple[str, ...], smem: Amount, regs: Amount
) -> Iterator[Constraint]:
    """Equations (2) to (6): what a block and all resident ones take."""
    beside = chip.instruction.producer_threads
    units = tuple(name for name in uses if name.startswith("units"))
    tiles = tuple(name for name in uses if name not in ("stages", "depth_bytes"))

    def amount(name: str, of: tuple[str, ...], left: Amount, limit: int) -> Constraint:
        return Constraint(name=name, uses=of, left=left, right=lambda v: limit, resource=True)

    yield amount(THREADS, units, lambda v: threads_of(chip, v) + beside, chip.block_threads)
    yield amount(REGISTERS, tiles, regs, chip.thread_registers)
    yield amount(SMEM, uses, smem, chip.block_smem_bytes)
    yield amount(
        SMEM_SM, (*uses, "resident"), lambda v: v["resident"] * (smem(v) + SYSTEM_BYTES),
        chip.smem_bytes,
    )  # fmt: skip
    yield amount(
        REGISTER_FILE, (*tiles, "resident"),
        lambda v: v["resident"] * block_registers(chip, v, regs(v)), chip.registers,
    )  # fmt: skip
    yield amount(
        THREADS_SM, (*units, "resident"),
        lambda v: v["resident"] * (threads_of(chip, v) + beside), chip.threads,
    )  # fmt: skip
    yield amount(BLOCKS, ("resident",), lambda v: v["resident"], chip.blocks)


def _whole(name: str, size: str, units: str, step: int) -> Constraint:
    return Constraint(
        name=f"{TILES} ({name})", uses=(size, units), relation=DIVIDES,
        left=lambda v: v[size], right=lambda v: step * v[units],
    )  # fmt: skip


def _rows(chip: Chip) -> tuple[int, ...]:
    """Least rows of a tile; tcgen05 has a half-height instruction too."""
    rows = chip.instruction.rows
    return (rows // 2,) if chip.instruction.kind == TCGEN05 else (rows,)


# ---- matrix products ---------------------------------------------------------------------------


def matmul_smem(chip: Chip, op: Matmul, v: Mapping[str, Any]) -> Any:
    """Shared memory of one block: equation (2)."""
    ring = v["stages"] * v["depth_bytes"] * (v["tile_m"] + v["tile_n"])
    out = int(op.written_dtype.bytes_per_element)
    return ring + (v["tile_m"] * STAGED_COLUMNS * out if chip.instruction.is_async else 0)


def matmul_registers(chip: Chip, v: Mapping[str, Any]) -> Any:
    """Registers of a thread: equation (4)."""
    kind = chip.instruction.kind
    if kind == TCGEN05:
        return STAGED_COLUMNS + KEPT[kind] + 0 * v["tile_m"]
    sums = -(-v["tile_m"] * v["tile_n"] // threads_of(chip, v))
    if kind == WGMMA:
        return sums + KEPT[kind]
    fragments = v["tile_m"] // v["units_m"] + v["tile_n"] // v["units_n"]
    return sums + KEPT[kind] // 2 + 2 * fragments * STEP_BYTES // (WARP * REGISTER_BYTES)


def matmul_rules(op: Matmul, chip: Chip, space: Space = WHOLE) -> Program:
    """The program of a matrix product."""
    one = chip.instruction
    least = _rows(chip)[0]
    width = int(op.k) * op.dtype.bits // 8
    uses = ("tile_m", "tile_n", "units_m", "units_n", "depth_bytes", "stages")
    constraints = [
        _whole("rows", "tile_m", "units_m", least),
        _whole("columns", "tile_n", "units_n", one.columns),
        *_occupancy(
            chip, uses, lambda v: matmul_smem(chip, op, v), lambda v: matmul_registers(chip, v)
        ),
    ]  # fmt: skip
    if one.kind == TCGEN05:
        constraints.append(Constraint(
            name=TENSOR_MEMORY, uses=("tile_m", "tile_n", "resident"), resource=True,
            left=lambda v: 2 * v["resident"] * v["tile_n"] * -(-v["tile_m"] // LANES)
            * COLUMN_BYTES,
            right=lambda v: chip.tensor_memory_bytes,
        ))  # fmt: skip
    rows = range(least, _useful(int(op.m), least, space.rows) + 1, least)
    columns = range(one.columns, _useful(int(op.n), one.columns, space.columns) + 1, one.columns)
    most = _useful(width, STEP_BYTES, max(space.step_bytes))
    return Program(
        domains={
            "tile_m": [r for r in rows if one.kind != TCGEN05 or r != 3 * least],
            "units_m": one.units_m,
            "tile_n": columns,
            "units_n": one.units_n,
            "depth_bytes": [b for b in space.step_bytes if b <= most] or [STEP_BYTES],
            "stages": range(1, space.stages + 1),
            "resident": range(1, space.resident + 1),
            "cluster": one.clusters,
            "splits": [s for s in space.splits if s == 1 or s * STEP_BYTES <= width],
        },
        constraints=tuple(constraints),
    )


def _useful(size: int, step: int, most: int) -> int:
    """No tile needs more than the size in whole steps; one step is always looked at."""
    return max(min(-(-size // step) * step, most), step)


# ---- attention ---------------------------------------------------------------------------------


def widths(op: FlashAttention2) -> tuple[int, int]:
    """Widths of keys and values in whole instructions: d' in k, v' in columns."""
    step = max(STEP_BYTES * 8 // op.dtype.bits, 16)
    value = op.head_dim if op.head_dim_v is None else op.head_dim_v
    return -(-int(op.head_dim) // step) * step, -(-int(value) // 16) * 16


def attention_smem(op: FlashAttention2, v: Mapping[str, Any]) -> Any:
    """Shared memory of one block: equation (8)."""
    wide = max(widths(op)) * op.dtype.bits // 8
    return wide * (v["tile_q"] + v["stages"] * v["tile_k"])


def attention_registers(chip: Chip, op: FlashAttention2, v: Mapping[str, Any]) -> Any:
    """Registers of a thread: equation (9)."""
    kept = KEPT[chip.instruction.kind]
    if chip.instruction.kind == TCGEN05:
        return v["tile_k"] + kept + 0 * v["tile_q"]
    held = v["tile_q"] * (widths(op)[1] + v["tile_k"])
    return -(-held // threads_of(chip, v)) + kept


def attention_rules(op: FlashAttention2, chip: Chip, space: Space = WHOLE) -> Program:
    """The program of attention."""
    one = chip.instruction
    least = one.rows
    keys = int(op.len_keys)
    uses = ("tile_q", "tile_k", "units_m", "stages")
    units = (1, 2) if one.kind == TCGEN05 else one.units_m
    constraints = [
        _whole("rows", "tile_q", "units_m", least),
        *_occupancy(
            chip, uses, lambda v: attention_smem(op, v),
            lambda v: attention_registers(chip, op, v),
        ),
    ]  # fmt: skip
    if one.kind == TCGEN05:
        constraints.append(Constraint(
            name=TENSOR_MEMORY, uses=("tile_q", "tile_k", "resident"), resource=True,
            left=lambda v: v["resident"] * -(-v["tile_q"] // LANES) * COLUMN_BYTES
            * (widths(op)[1] + v["tile_k"]),
            right=lambda v: chip.tensor_memory_bytes,
        ))  # fmt: skip
    return Program(
        domains={
            "tile_q": range(
                least, max(_useful(int(op.len_q), least, space.rows), least) + 1, least
            ),
            "units_m": units,
            "tile_k": range(16, _useful(keys, 16, space.columns) + 1, 16),
            "stages": range(2, max(space.stages, 2) + 1),
            "resident": range(1, space.resident + 1),
        },
        constraints=tuple(constraints),
    )
