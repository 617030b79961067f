"""Short causal convolutions of each channel, forward and backward, with bias and SiLU.

    z[t] = b + sum_k w_k x[t + k - (W - 1)],    y = z or z sigmoid(z)
    dz = dy (s + z s (1 - s)), s = sigmoid(z)   (dz = dy without the SiLU)
    dx[t] = sum_o w_{W-1-o} dz[t + o],   dw_k = sum_t dz[t] x[t + k - (W - 1)],   db = sum_t dz[t]

(Dao and Gu 2024, arXiv 2405.21060, section 7.) Arrays are [batch, len_seq, channels]: a program
takes BT steps of BC channels, so that loads are wide and neighbouring steps of a channel come from
the nearest cache: slow memory sees every number once, but for W - 1 steps a tile. The backward pass
makes z again from x, at W places of a tile, rather than reading what forward would have to write;
the 2 W - 1 shifted tiles of x that this needs are loaded once each. Its sums over steps are one
row a tile, which `sums_of_rows` adds up in order: the same result every time. Weights are taken
tap by tap, [W, channels], laid out so beforehand, for the same reason as x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import triton
import triton.language as tl

from validate.kernels.judge import poisoned
from validate.kernels.spec import Launch

MOST_TAPS: Final = 7
"""More would neither fit registers nor be short."""
SUM_ROWS: Final = 32
SUM_COLS: Final = 64
SUM_WARPS: Final = 4


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def _shifted(ptr, start, t, c, len_seq, channels, BY: tl.constexpr):
    """The tile BY steps later; zeros outside the sequence."""
    at = t + BY
    inside = (at >= 0) & (at < len_seq) & (c < channels)
    return tl.load(ptr + start + at.to(tl.int64) * channels + c, mask=inside, other=0.0)


@triton.jit
def _tap(w_ptr, c, channels, K: tl.constexpr):
    return tl.load(w_ptr + K * channels + c, mask=c < channels, other=0.0).to(tl.float32)


@triton.jit
def _before_activation(
    x_ptr, w_ptr, bias_ptr, start, t, c, len_seq, channels,
    BY: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """z of the tile BY steps later."""
    z = tl.zeros((BT, BC), tl.float32)
    if BIAS:
        z += tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    for k in tl.static_range(WIDTH):
        x = _shifted(x_ptr, start, t, c, len_seq, channels, BY + k - (WIDTH - 1))
        z += _tap(w_ptr, c, channels, k) * x.to(tl.float32)
    return z


@triton.jit
def forward(
    x_ptr, w_ptr, bias_ptr, y_ptr, len_seq, channels,
    WIDTH: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y of BT steps of BC channels; channels run fastest."""
    groups, tiles = tl.cdiv(channels, BC), tl.cdiv(len_seq, BT)
    pid = tl.program_id(0)
    c = pid % groups * BC + tl.arange(0, BC)[None, :]
    t = pid // groups % tiles * BT + tl.arange(0, BT)[:, None]
    start = (pid // groups // tiles).to(tl.int64) * len_seq * channels
    y = _before_activation(
        x_ptr, w_ptr, bias_ptr, start, t, c, len_seq, channels, 0, WIDTH, BIAS, BT, BC
    )
    if SILU:
        y *= _sigmoid(y)
    inside = (t < len_seq) & (c < channels)
    at = start + t.to(tl.int64) * channels + c
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    x_ptr, w_ptr, bias_ptr, dy_ptr, dx_ptr, sums_ptr, len_seq, channels,
    WIDTH: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx of a tile, and its row of sums[tiles, WIDTH + 1, channels]: dw by tap, then db."""
    groups, tiles = tl.cdiv(channels, BC), tl.cdiv(len_seq, BT)
    pid = tl.program_id(0)
    lanes = pid % groups * BC + tl.arange(0, BC)
    c = lanes[None, :]
    t = pid // groups % tiles * BT + tl.arange(0, BT)[:, None]
    start = (pid // groups // tiles).to(tl.int64) * len_seq * channels
    sums_at = sums_ptr + (pid // groups).to(tl.int64) * (WIDTH + 1) * channels + lanes
    dx = tl.zeros((BT, BC), tl.float32)
    for o in tl.static_range(WIDTH):
        dz = _shifted(dy_ptr, start, t, c, len_seq, channels, o).to(tl.float32)
        if SILU:
            z = _before_activation(
                x_ptr, w_ptr, bias_ptr, start, t, c, len_seq, channels, o, WIDTH, BIAS, BT, BC
            )
            s = _sigmoid(z)
            dz *= s + z * s * (1.0 - s)
        dx += _tap(w_ptr, c, channels, WIDTH - 1 - o) * dz
        if o == 0:
            for k in tl.static_range(WIDTH):
                x = _shifted(x_ptr, start, t, c, len_seq, channels, k - (WIDTH - 1))
                total = tl.sum(dz * x.to(tl.float32), axis=0)
                tl.store(sums_at + k * channels, total, mask=lanes < channels)
            tl.store(sums_at + WIDTH * channels, tl.sum(dz, axis=0), mask=lanes < channels)
    inside = (t < len_seq) & (c < channels)
    at = start + t.to(tl.int64) * channels + c
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sums_of_rows(sums_ptr, out_ptr, rows, cols, BR: tl.constexpr, BN: tl.constexpr):
    """out[cols]: the sum of sums[rows, cols]."""
    col = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros((BR, BN), tl.float32)
    for first in range(0, rows, BR):
        row = first + tl.arange(0, BR)[:, None]
        inside = (row < rows) & (col[None, :] < cols)
        at = row.to(tl.int64) * cols + col[None, :]
        total += tl.load(sums_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + col, tl.sum(total, axis=0), mask=col < cols)


# ---- tile sets -----------------------------------------------------------------------------


def _launch(steps: int, channels: int, warps: int) -> Launch:
    return Launch(meta={"BT": steps, "BC": channels}, num_warps=warps, num_stages=1)


LAUNCHES: Final = (
    _launch(32, 64, 4), _launch(16, 128, 4), _launch(32, 128, 8), _launch(64, 32, 4),
    _launch(16, 64, 4),
)  # fmt: skip
"""8 to 16 numbers a thread and load, 64 to 256 bytes of channels side by side."""
BACKWARD_LAUNCHES: Final = (
    _launch(32, 64, 8), _launch(16, 64, 4), _launch(64, 32, 8), _launch(32, 32, 4),
)  # fmt: skip
"""8 numbers a thread: up to 13 tiles of x are live at once."""


# ---- launching -----------------------------------------------------------------------------

Run = Callable[[], tuple[torch.Tensor, ...]]


def _tile(launch: Launch) -> dict[str, Any]:
    return {**launch.meta, "num_warps": launch.num_warps, "num_stages": launch.num_stages}


def _tiles(x: torch.Tensor, launch: Launch) -> tuple[int, int]:
    """(tiles of steps of all sequences, tiles of channels)."""
    batch, len_seq, channels = x.shape
    steps = batch * triton.cdiv(len_seq, launch.meta["BT"])
    return steps, triton.cdiv(channels, launch.meta["BC"])


def prepare_forward(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, launch: Launch, *, silu: bool
) -> Run:
    """A call that makes y[batch, len_seq, channels]."""
    y = poisoned(*x.shape, dtype=x.dtype, device=x.device)
    steps, groups = _tiles(x, launch)
    fixed = {"WIDTH": w.shape[1], "BIAS": bias is not None, "SILU": silu, **_tile(launch)}
    taps = w.T.contiguous()
    second = taps if bias is None else bias

    def run() -> tuple[torch.Tensor, ...]:
        forward[(steps * groups,)](x, taps, second, y, x.shape[1], x.shape[2], **fixed)
        return (y,)

    return run


def prepare_backward(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    dy: torch.Tensor,
    launch: Launch,
    *,
    silu: bool,
) -> Run:
    """A call that makes dx, dw and (given a bias) db, the latter two in fp32."""
    channels, width = w.shape
    dx = poisoned(*x.shape, dtype=x.dtype, device=x.device)
    steps, groups = _tiles(x, launch)
    fp32 = {"dtype": torch.float32, "device": x.device}
    sums = poisoned(steps, width + 1, channels, **fp32)
    total = poisoned(width + 1, channels, **fp32)
    fixed = {"WIDTH": width, "BIAS": bias is not None, "SILU": silu, **_tile(launch)}
    taps = w.T.contiguous()
    second = taps if bias is None else bias
    columns = total.numel()

    def run() -> tuple[torch.Tensor, ...]:
        backward[(steps * groups,)](
            x, taps, second, dy, dx, sums, x.shape[1], x.shape[2], **fixed
        )  # fmt: skip
        sums_of_rows[(triton.cdiv(columns, SUM_COLS),)](
            sums, total, steps, columns, BR=SUM_ROWS, BN=SUM_COLS,
            num_warps=SUM_WARPS, num_stages=2,
        )  # fmt: skip
        found = (dx, total[:width].T)
        return found if bias is None else (*found, total[width])

    return run
