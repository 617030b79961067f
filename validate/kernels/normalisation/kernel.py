"""How the row reductions are launched: tile sets, workspaces, one call per kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import triton

from validate.kernels.judge import poisoned
from validate.kernels.multiprocessors import multiprocessors
from validate.kernels.normalisation import norm, softmax
from validate.kernels.normalisation.reference import EPSILON
from validate.kernels.spec import Launch

Run = Callable[[], tuple[torch.Tensor, ...]]

THREADS: Final = 1024
"""Per multiprocessor: persistent programs take half of the 2048, their rows live in registers."""
GRADIENT_THREADS: Final = 512
"""The same where a program also keeps a gradient of the weight, one more number per column."""
WARP: Final = 32
SUM_ROWS: Final = 32
SUM_COLS: Final = 64
"""Tile of the last sum of a weight's gradient."""
SLICE_COLS: Final = 512
SLICE_ROWS: Final = 4
"""Tile of the weight's gradient of long rows."""


def _rows(rows: int, cols: int, *, warps: int, stages: int = 2) -> Launch:
    return Launch(meta={"ROWS": rows, "COLS": cols}, num_warps=warps, num_stages=stages)


WHOLE: Final[tuple[Launch, ...]] = (
    _rows(16, 128, warps=4),
    _rows(4, 1024, warps=4),
    _rows(1, 2048, warps=4),
    _rows(1, 4096, warps=4),
    _rows(1, 8192, warps=8),
    _rows(1, 16384, warps=16),
)
"""Rows read once, by the widest row they hold: 16 to 32 numbers per thread, as many rows as that
takes where rows are short; two stages: one tile in the making, one on its way."""

SOFTMAX: Final = (*WHOLE[:-1], _rows(1, 16384, warps=32))
"""Of the softmax: 16384 columns on 16 warps spill 8 bytes on sm_80 and sm_100. The norms have
weights to hold as well and would spill on 32, which leave 64 registers a thread."""

LAYER: Final = WHOLE[:-1]
"""Of the layer norm, which holds two weights: 16384 float32 columns would spill 16 to 48 bytes."""

CHUNKED: Final[tuple[Launch, ...]] = (
    Launch(meta={"CHUNK": 4096}, num_warps=8, num_stages=3),
    Launch(meta={"CHUNK": 8192}, num_warps=16, num_stages=3),
)
"""Rows of any length, read twice: 16 numbers per thread and chunk."""

BACKWARD: Final[tuple[Launch, ...]] = (
    _rows(16, 128, warps=4),
    _rows(4, 1024, warps=8),
    _rows(1, 2048, warps=4),
    _rows(1, 4096, warps=8),
    _rows(1, 8192, warps=16),
)
"""Rows of a gradient: twice the operands of a forward pass, so more warps and shorter rows."""


def whole(launch: Launch) -> bool:
    """Whether the launch reads whole rows."""
    return "COLS" in launch.meta


def fitting(
    launches: tuple[Launch, ...], chunked: tuple[Launch, ...], cols: int
) -> tuple[Launch, ...]:
    """The two tightest launches that hold a row whole, then those in chunks.

    Chunks of more than twice a row are left out, unless nothing else is left.
    """
    rows = [launch for launch in launches if launch.meta["COLS"] >= cols][:2]
    parts = [launch for launch in chunked if launch.meta["CHUNK"] <= 2 * cols]
    return (*rows, *parts) or chunked[:1]


def _programs(rows: int, launch: Launch, device: torch.device, threads: int = THREADS) -> int:
    per = max(1, threads // (WARP * launch.num_warps))
    tiles = triton.cdiv(rows, launch.meta["ROWS"])
    return min(int(tiles), per * multiprocessors(device))


def options(launch: Launch) -> Mapping[str, Any]:
    """Keyword arguments of a launch."""
    return {
        **constants(launch),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


def constants(launch: Launch) -> Mapping[str, int]:
    """Constants of the kernel: the tile, and the stages where whole rows are pipelined."""
    return {**launch.meta, "STAGES": launch.num_stages} if whole(launch) else launch.meta


def prepare_softmax(x: torch.Tensor, launch: Launch) -> Run:
    """A call that takes the softmax of rows."""
    rows, cols = x.shape
    y = poisoned(rows, cols, dtype=x.dtype, device=x.device)
    fixed = options(launch)
    if whole(launch):
        grid = (_programs(rows, launch, x.device),)

        def run() -> tuple[torch.Tensor, ...]:
            softmax.softmax_rows[grid](x, y, rows, cols, **fixed)
            return (y,)
    else:

        def run() -> tuple[torch.Tensor, ...]:
            softmax.softmax_chunks[(rows,)](x, y, cols, **fixed)
            return (y,)

    return run


def prepare_softmax_backward(y: torch.Tensor, dy: torch.Tensor, launch: Launch) -> Run:
    """A call that takes the gradient of a softmax."""
    rows, cols = y.shape
    dx = poisoned(rows, cols, dtype=y.dtype, device=y.device)
    fixed = options(launch)
    if whole(launch):
        grid = (_programs(rows, launch, y.device),)

        def run() -> tuple[torch.Tensor, ...]:
            softmax.softmax_backward_rows[grid](y, dy, dx, rows, cols, **fixed)
            return (dx,)
    else:

        def run() -> tuple[torch.Tensor, ...]:
            softmax.softmax_backward_chunks[(rows,)](y, dy, dx, cols, **fixed)
            return (dx,)

    return run


def prepare_rmsnorm(x: torch.Tensor, w: torch.Tensor, launch: Launch) -> Run:
    """A call that normalises rows and saves their rstd; both are returned."""
    rows, cols = x.shape
    y = poisoned(rows, cols, dtype=x.dtype, device=x.device)
    rstd = poisoned(rows, dtype=torch.float32, device=x.device)
    fixed = options(launch)
    if whole(launch):
        grid = (_programs(rows, launch, x.device),)

        def run() -> tuple[torch.Tensor, ...]:
            norm.rmsnorm_rows[grid](x, w, y, rstd, rows, cols, EPSILON, **fixed)
            return y, rstd
    else:

        def run() -> tuple[torch.Tensor, ...]:
            norm.rmsnorm_chunks[(rows,)](x, w, y, rstd, cols, EPSILON, **fixed)
            return y, rstd

    return run


def prepare_layernorm(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, launch: Launch) -> Run:
    """A call that normalises rows and saves their mean and rstd; all three are returned."""
    rows, cols = x.shape
    y = poisoned(rows, cols, dtype=x.dtype, device=x.device)
    mean = poisoned(rows, dtype=torch.float32, device=x.device)
    rstd = poisoned(rows, dtype=torch.float32, device=x.device)
    fixed = options(launch)
    if whole(launch):
        grid = (_programs(rows, launch, x.device),)

        def run() -> tuple[torch.Tensor, ...]:
            norm.layernorm_rows[grid](x, w, b, y, mean, rstd, rows, cols, EPSILON, **fixed)
            return y, mean, rstd
    else:

        def run() -> tuple[torch.Tensor, ...]:
            norm.layernorm_chunks[(rows,)](x, w, b, y, mean, rstd, cols, EPSILON, **fixed)
            return y, mean, rstd

    return run


def prepare_rmsnorm_backward(
    x: torch.Tensor, w: torch.Tensor, rstd: torch.Tensor, dy: torch.Tensor, launch: Launch
) -> Run:
    """A call that takes the gradients of rows and weight."""
    (rows, cols), device = x.shape, x.device
    dx = poisoned(rows, cols, dtype=x.dtype, device=device)
    dw = poisoned(cols, dtype=w.dtype, device=device)
    fixed, columns = options(launch), triton.cdiv(cols, SUM_COLS)
    if whole(launch):
        parts = _programs(rows, launch, device, GRADIENT_THREADS)
    else:
        parts = min(triton.cdiv(rows, SLICE_ROWS), _slices(cols, device))
    sums = poisoned(parts, cols, dtype=torch.float32, device=device)
    per_slice = triton.cdiv(rows, parts)

    def rows_once() -> None:
        norm.rmsnorm_backward_rows[(parts,)](x, w, rstd, dy, dx, sums, rows, cols, **fixed)

    def rows_twice() -> None:
        norm.rmsnorm_backward_chunks[(rows,)](x, w, rstd, dy, dx, cols, **fixed)
        norm.rmsnorm_weight_sums[(triton.cdiv(cols, SLICE_COLS), parts)](
            x, rstd, dy, sums, rows, cols, per_slice, ROWS=SLICE_ROWS, COLS=SLICE_COLS
        )

    first = rows_once if whole(launch) else rows_twice

    def run() -> tuple[torch.Tensor, ...]:
        first()
        norm.add_sums[(columns,)](sums, dw, parts, cols, ROWS=SUM_ROWS, COLS=SUM_COLS)
        return dx, dw

    return run


def _slices(cols: int, device: torch.device) -> int:
    """Slices of rows that give every multiprocessor eight programs."""
    return int(triton.cdiv(8 * multiprocessors(device), triton.cdiv(cols, SLICE_COLS)))
