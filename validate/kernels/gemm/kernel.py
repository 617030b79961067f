"""C[m, n] = A[m, k] W[n, k]^T with float32 sums, W as a linear layer stores it.

Classic tiling: a program holds a BLOCK_M x BLOCK_N tile of C in registers (in tensor memory from
sm_100 on) and streams BLOCK_K wide slices of both operands through shared memory, `num_stages`
deep. Both operands are contiguous along k, which is what the fp8 matrix units ask for.

- Tiles are walked in groups of GROUP_M rows of tiles, columns inside a group, so that what runs
  at once covers a near-square part of C and finds its operands in L2.
- PERSISTENT: as many programs as multiprocessors, each walking many tiles; the loops are
  flattened, so that loads of the next tile run under the last products of this one.
- SPLIT_K programs share a tile where C has too few tiles to fill the chip: partial sums go to a
  float32 workspace and a second kernel adds them up, in a fixed order.
- `gemm_tma` (sm_90 and later) moves tiles with the tensor memory accelerator, which masks ragged
  edges itself; `gemm` uses cp.async from sm_80 on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from validate.kernels.judge import poisoned
from validate.kernels.multiprocessors import interpreting, multiprocessors
from validate.kernels.spec import Launch

SLICE_BYTES: Final = 128
"""Bytes of BLOCK_K in most launches: one swizzled row of shared memory, 64 bf16 numbers."""
GROUP_M: Final = 8
REDUCED_AT_ONCE: Final = 1024
FP8_ARCH: Final = 89
"""The first compute capability with E4M3 matrix units."""
WIDTHS: Final = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "fp8": 1}
OUTPUTS: Final = {"fp32": "fp32", "tf32": "fp32", "fp16": "fp16", "bf16": "bf16", "fp8": "bf16"}
"""Format of C by format of the operands."""


@triton.jit
def _tile_of(job, num_m, num_n, GROUP_M: tl.constexpr):
    """Row and column of a tile in the grouped order."""
    per_group = GROUP_M * num_n
    first = (job // per_group) * GROUP_M
    height = min(num_m - first, GROUP_M)
    inside = job % per_group
    return first + inside % height, inside // height


@triton.jit
def _one_tile(
    a_ptr,
    w_ptr,
    c_ptr,
    m,
    n,
    k,
    job,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The `job`-th share of C: tile job // SPLIT_K, slice job % SPLIT_K of its k."""
    tile_m, tile_n = _tile_of(job // SPLIT_K, tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    part = job % SPLIT_K
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_K)
    steps = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLIT_K)
    start = part * steps
    stop = min(start + steps, tl.cdiv(k, BLOCK_K))
    # rows beyond the edge wrap to valid ones: their products are never stored
    a_rows = a_ptr + (rows % m).to(tl.int64)[:, None] * k + lanes[None, :]
    w_rows = w_ptr + (cols % n).to(tl.int64)[:, None] * k + lanes[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(start, stop):
        inside = lanes[None, :] < k - step * BLOCK_K
        a = tl.load(a_rows + step * BLOCK_K, mask=inside, other=0.0)
        w = tl.load(w_rows + step * BLOCK_K, mask=inside, other=0.0)
        if UPCAST:
            a, w = a.to(tl.float32), w.to(tl.float32)
        sums = tl.dot(a, w.T, sums, input_precision=PRECISION)
    kept = (rows[:, None] < m) & (cols[None, :] < n)
    at = (part.to(tl.int64) * m + rows.to(tl.int64))[:, None] * n + cols[None, :]
    tl.store(c_ptr + at, sums.to(c_ptr.dtype.element_ty), mask=kept)


@triton.jit
def gemm(
    a_ptr,
    w_ptr,
    c_ptr,
    m,
    n,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PERSISTENT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """C, or with SPLIT_K > 1 its partial sums [SPLIT_K, m, n], through pointer loads."""
    first = tl.program_id(0)
    if PERSISTENT:
        jobs = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N) * SPLIT_K
        for job in tl.range(first, jobs, tl.num_programs(0), flatten=True):
            _one_tile(
                a_ptr, w_ptr, c_ptr, m, n, k, job,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SPLIT_K, PRECISION, UPCAST,
            )  # fmt: skip
    else:
        _one_tile(
            a_ptr, w_ptr, c_ptr, m, n, k, first,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SPLIT_K, PRECISION, UPCAST,
        )  # fmt: skip


@triton.jit
def add_parts(parts_ptr, c_ptr, num_elements, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr):
    """C from its partial sums, added in the order of k."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    total = tl.zeros((BLOCK,), tl.float32)
    where = at
    for _ in tl.static_range(SPLIT_K):
        total += tl.load(parts_ptr + where, mask=inside, other=0.0)
        where += num_elements
    tl.store(c_ptr + at, total.to(c_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gemm_tma(
    a_desc,
    w_desc,
    c_desc,
    m,
    n,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HALVES: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """C through tensor descriptors, persistent; HALVES stores a tile in two column halves."""
    num_m, num_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    for job in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = _tile_of(job, num_m, num_n, GROUP_M)
        row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(tl.cdiv(k, BLOCK_K)):
            a = a_desc.load([row, step * BLOCK_K])
            w = w_desc.load([col, step * BLOCK_K])
            if UPCAST:
                a, w = a.to(tl.float32), w.to(tl.float32)
            sums = tl.dot(a, w.T, sums, input_precision=PRECISION)
        if HALVES:
            pairs = tl.permute(tl.reshape(sums, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            left, right = tl.split(pairs)
            c_desc.store([row, col], left.to(c_desc.dtype))
            c_desc.store([row, col + BLOCK_N // 2], right.to(c_desc.dtype))
        else:
            c_desc.store([row, col], sums.to(c_desc.dtype))


# ---- tile sets -----------------------------------------------------------------------------


def _pointers(
    block_m: int, block_n: int, *, warps: int, stages: int, split: int = 1,
    persistent: bool = False,
) -> Launch:  # fmt: skip
    return Launch(
        meta={
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": SLICE_BYTES,
            "GROUP_M": GROUP_M,
            "SPLIT_K": split,
            "PERSISTENT": int(persistent),
        },
        num_warps=warps,
        num_stages=stages,
        least_arch=80,
    )


def _descriptors(
    block_m: int, block_n: int, *, warps: int, stages: int, halves: bool = False
) -> Launch:
    return Launch(
        meta={
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": SLICE_BYTES,
            "GROUP_M": GROUP_M,
            "HALVES": int(halves),
        },
        num_warps=warps,
        num_stages=stages,
        least_arch=90,
    )


LAUNCHES: Final[tuple[Launch, ...]] = (
    _pointers(128, 256, warps=8, stages=3, persistent=True),
    _pointers(128, 256, warps=8, stages=3),
    _pointers(128, 128, warps=8, stages=4),
    _pointers(64, 128, warps=4, stages=4),
    _pointers(64, 64, warps=4, stages=4, split=4),
    _pointers(16, 64, warps=4, stages=6),
    _pointers(16, 64, warps=4, stages=6, split=8),
)
"""Of `gemm`, BLOCK_K in bytes. Large tiles for large products (128 x 256 reads 1/85 byte per flop
of its bf16 operands from L2), small ones where C has few tiles; 16 rows are the least that the
matrix units take, and such products only stream the weight, hence the many stages. (Slices twice
as deep spill 8 bytes on sm_100.)"""

TMA_LAUNCHES: Final[tuple[Launch, ...]] = (
    _descriptors(128, 256, warps=8, stages=3),
    _descriptors(128, 256, warps=8, stages=3, halves=True),
    _descriptors(256, 128, warps=8, stages=3),
    _descriptors(128, 128, warps=8, stages=4),
)
"""Of `gemm_tma`, BLOCK_K in bytes."""

EXACT: Final = Launch(
    meta={
        "BLOCK_M": 64,
        "BLOCK_N": 64,
        "BLOCK_K": 16,
        "GROUP_M": GROUP_M,
        "SPLIT_K": 1,
        "PERSISTENT": 0,
    },
    num_warps=8,
    num_stages=2,
    least_arch=80,
)
"""Of `gemm` in float32 proper, on the vector units: for checks, no contender."""


def in_elements(launch: Launch, dtype: str) -> Launch:
    """The launch for a format: BLOCK_K from bytes to elements."""
    meta = {**launch.meta, "BLOCK_K": launch.meta["BLOCK_K"] // WIDTHS[dtype]}
    least = FP8_ARCH if dtype == "fp8" else 0
    return replace(launch, meta=meta, least_arch=max(launch.least_arch, least))


def launches_of(dtype: str) -> tuple[Launch, ...]:
    """The launches of `gemm` shipped for a format.

    A persistent program holds the next tile's operands beside C on its way out, which is twice
    as wide in tf32 and leaves no room for 128 x 256 tiles.
    """
    if dtype == "fp32":
        return (EXACT,)
    kept = (x for x in LAUNCHES if dtype != "tf32" or not x.meta["PERSISTENT"])
    return tuple(in_elements(x, dtype) for x in kept)


def tma_launches_of(dtype: str) -> tuple[Launch, ...]:
    """The launches of `gemm_tma` shipped for a format; none in float32 proper."""
    if dtype == "fp32":
        return ()
    kept = TMA_LAUNCHES[-1:] if dtype == "tf32" else TMA_LAUNCHES
    return tuple(in_elements(x, dtype) for x in kept)


def precision(dtype: str) -> str:
    """How `tl.dot` treats float32 operands of a format: kept whole, or cut to tf32."""
    return "ieee" if dtype == "fp32" else "tf32"


def constants(dtype: str, *, upcast: bool = False) -> Mapping[str, Any]:
    """The constants of both kernels beside those of the launch."""
    return {"PRECISION": precision(dtype), "UPCAST": upcast}


# ---- launching -----------------------------------------------------------------------------


def _upcast(a: torch.Tensor) -> bool:
    return interpreting() and a.dtype == torch.bfloat16


def _tiles(launch: Launch, m: int, n: int) -> int:
    return int(triton.cdiv(m, launch.meta["BLOCK_M"]) * triton.cdiv(n, launch.meta["BLOCK_N"]))


def prepare(
    a: torch.Tensor, w: torch.Tensor, dtype: str, out: torch.dtype, launch: Launch
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A call that computes A W^T with `gemm` into an output of its own."""
    (m, k), n = a.shape, w.shape[0]
    c = poisoned(m, n, dtype=out, device=a.device)
    split = launch.meta["SPLIT_K"]
    jobs = _tiles(launch, m, n) * split
    programs = min(jobs, multiprocessors(a.device)) if launch.meta["PERSISTENT"] else jobs
    target = c if split == 1 else poisoned(split, m, n, dtype=torch.float32, device=a.device)
    fixed = constants(dtype, upcast=_upcast(a))

    def run() -> tuple[torch.Tensor, ...]:
        gemm[(programs,)](
            a, w, target, m, n, k, **launch.meta, **fixed,
            num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
        if split > 1:
            blocks = triton.cdiv(m * n, REDUCED_AT_ONCE)
            add_parts[(blocks,)](target, c, m * n, SPLIT_K=split, BLOCK=REDUCED_AT_ONCE)
        return (c,)

    return run


def prepare_tma(
    a: torch.Tensor, w: torch.Tensor, dtype: str, out: torch.dtype, launch: Launch
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A call that computes A W^T with `gemm_tma` into an output of its own."""
    (m, k), n = a.shape, w.shape[0]
    c = poisoned(m, n, dtype=out, device=a.device)
    meta = launch.meta
    block_m, block_n, block_k = meta["BLOCK_M"], meta["BLOCK_N"], meta["BLOCK_K"]
    stored_n = block_n // 2 if meta["HALVES"] else block_n
    described = (
        TensorDescriptor.from_tensor(a, [block_m, block_k]),
        TensorDescriptor.from_tensor(w, [block_n, block_k]),
        TensorDescriptor.from_tensor(c, [block_m, stored_n]),
    )
    programs = min(_tiles(launch, m, n), multiprocessors(a.device))
    fixed = constants(dtype, upcast=_upcast(a))

    def run() -> tuple[torch.Tensor, ...]:
        gemm_tma[(programs,)](
            *described, m, n, k, **meta, **fixed,
            num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
        return (c,)

    return run
