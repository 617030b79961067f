"""Chains of products on operands that are already on the chip: the real matrix rate.

Each program loads one tile of A and one of B, multiplies them `rounds` x FOLD times, adds every
product up and stores one tile of C. The loop touches no memory but shared memory, from which the
matrix units of sm_90 and later read their operands anyway. A sum is folded into a second
accumulator after FOLD products, because fp8 sums of a chain keep 13 bits or so on Hopper: an
accumulator that only grows would stop growing. The fold costs one addition per element of C in
FOLD products, 1 / (2 FOLD K) of the flops: under 0.03 % of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import triton
import triton.language as tl

from validate.kernels.judge import poisoned
from validate.kernels.multiprocessors import interpreting
from validate.kernels.spec import Launch

BLOCK: Final = 128
"""Rows and columns of a tile of C: two accumulators of it fit the registers of 8 warps."""
FOLD: Final = 32
"""Products added up by the matrix units before their sum is taken over."""


@triton.jit
def chained_dots(
    a_ptr,
    b_ptr,
    c_ptr,
    rounds,
    fold,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """C[p] = rounds fold A[p] B[p]^T for the tile p of this program."""
    program = tl.program_id(0).to(tl.int64)
    rows, depth = tl.arange(0, BLOCK), tl.arange(0, K)
    at = program * (BLOCK * K) + rows[:, None] * K + depth[None, :]
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in tl.range(rounds, num_stages=1):
        sums = tl.zeros((BLOCK, BLOCK), tl.float32)
        for _ in tl.range(fold):
            sums = tl.dot(a, b.T, sums, input_precision="tf32")
        total += sums
    tile = program * (BLOCK * BLOCK) + rows[:, None] * BLOCK + rows[None, :]
    tl.store(c_ptr + tile, total)


LAUNCHES: Final[tuple[Launch, ...]] = (
    Launch(num_warps=8, num_stages=1, least_arch=80),
    Launch(num_warps=16, num_stages=1, least_arch=80, most_arch=90),
)
"""8 warps: two groups of four, each of which hides the other's waits on sm_90; with 16, sm_100
would fall back to the units of before."""


def constants(k: int, *, upcast: bool = False) -> Mapping[str, Any]:
    """The kernel's constants."""
    return {"BLOCK": BLOCK, "K": k, "UPCAST": upcast}


def prepare(
    a: torch.Tensor, b: torch.Tensor, iterations: int, launch: Launch, fold: int = FOLD
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A call that multiplies every tile of A with its tile of B, `iterations` times."""
    programs, _, k = a.shape
    c = poisoned(programs, BLOCK, BLOCK, dtype=torch.float32, device=a.device)
    fixed = constants(k, upcast=interpreting() and a.dtype == torch.bfloat16)

    def run() -> tuple[torch.Tensor, ...]:
        chained_dots[(programs,)](
            a, b, c, iterations // fold, fold, **fixed,
            num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
        return (c,)

    return run
