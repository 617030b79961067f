"""Mamba's selective scan: states in registers, time walked through once or in segments at once.

Gu and Dao 2023, arXiv 2312.00752, section 3.3. For each channel, with N states,

    d_t = softplus(delta_t + bias),   h_t = e^(d_t A) h_{t-1} + d_t B_t x_t
    y_t = (C_t . h_t + D x_t) z_t sigmoid(z_t)

A lane holds whole channels with all their states, so that C . h needs no exchange between lanes
and a warp's accesses to x, delta, z, y are contiguous; the inputs of the step after next are asked
for before a step is computed. Nothing of size len x channels x N reaches memory.

Where batch x channels does not fill a GPU, time is cut into segments that run at once: a first
pass keeps only each segment's last state from an empty one and its sum of d, whose effect on any
earlier state is known,

    h_end = e^(A sum(d)) h_start + h_local

then states are handed from segment to segment, and a second pass computes y from them.
N exponentials a step bind this kernel on most GPUs rather than its bytes. `one` is 1, unknown to
the compiler: where it sees states lie side by side it deals them out to lanes for wide accesses,
and C . h then costs exchanges in every step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from validate.kernels.judge import poisoned
from validate.kernels.spec import Launch

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LANES_WANTED = 132 * 512
"""Channels in flight that hide the latency of a large GPU: 8 warps of 64 a multiprocessor."""
LEAST_SEGMENT = 64
"""Steps below which a segment's own beginning and end outweigh it."""
LAUNCHES = (
    Launch(meta={"BLOCK": 64, "CUT": 1}, num_warps=1, num_stages=1),
    Launch(meta={"BLOCK": 32, "CUT": 1}, num_warps=1, num_stages=1),
    Launch(meta={"BLOCK": 128, "CUT": 0}, num_warps=1, num_stages=1),
    Launch(meta={"BLOCK": 64, "CUT": 0}, num_warps=1, num_stages=1),
    Launch(meta={"BLOCK": 32, "CUT": 0}, num_warps=1, num_stages=1),
)
"""Whole channels a lane, one warp a program: no barrier in the loop. Two and four channels a lane
share the reads of B and C (200 and 170 instructions a channel and step on sm_90 against 245 with
one, 152 of them what the exponentials take); one spreads few channels over more processors. Four
with states from memory spill, so segments take two at most."""


@triton.jit
def _softplus(x):
    """log(1 + e^x): x itself where e^x leaves nothing of the 1, and the series of the logarithm
    where the 1 would leave little of e^x (four terms are fp32's accuracy below 1/50)."""
    u = tl.exp2(tl.minimum(x, 20.0) * LOG2E)
    small = u * (1.0 - u * (0.5 - u * (0.33333334 - u * 0.25)))
    return tl.where(x > 20.0, x, tl.where(u < 0.02, small, LN2 * tl.log2(1.0 + u)))


@triton.jit
def _take(ptr, at, width, ok, stop, t):
    """Row t of an array as fp32, zero past the end and outside `ok`."""
    return tl.load(ptr + at + t * width, mask=ok & (t < stop), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["one"])
def scan_segments(  # noqa: PLR0915 - one loop and what it carries
    x_ptr, delta_ptr, bias_ptr, a_ptr, b_ptr, c_ptr, d_ptr, z_ptr,
    y_ptr, start_ptr, end_ptr, sum_ptr,
    len_seq, channels, states, len_segment, num_segments, num_blocks, one,
    OUTPUT: tl.constexpr, CUT: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of channels through one segment: y from the state before it (where CUT) and the
    state after it; without OUTPUT only the latter, from an empty state, and the sum of d."""
    program = tl.program_id(0)
    block = program % num_blocks
    segment = (program // num_blocks) % num_segments
    batch = (program // num_blocks // num_segments).to(tl.int64)
    channel = block * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATES)
    inside, real = channel < channels, n < states
    both = real[:, None] & inside[None, :]
    a_at = channel[None, :] * states + n[:, None] * one
    a = tl.load(a_ptr + a_at, mask=both, other=0.0) * LOG2E
    bias = tl.load(bias_ptr + channel, mask=inside, other=0.0)
    skip = tl.load(d_ptr + channel, mask=inside, other=0.0)
    first = segment * len_segment
    stop = tl.minimum(first + len_segment, len_seq)
    wide = batch * len_seq * channels + channel
    narrow = batch * len_seq * states + n
    state_at = ((batch * num_segments + segment) * states + n[:, None]) * channels
    state_at += channel[None, :] * one
    h = tl.zeros([STATES, BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    if CUT and OUTPUT:
        h = tl.load(start_ptr + state_at, mask=both, other=0.0)
    step = first.to(tl.int64)
    x0 = _take(x_ptr, wide, channels, inside, stop, step)
    d0 = _take(delta_ptr, wide, channels, inside, stop, step)
    b0 = _take(b_ptr, narrow, states, real, stop, step)
    x1 = _take(x_ptr, wide, channels, inside, stop, step + 1)
    d1 = _take(delta_ptr, wide, channels, inside, stop, step + 1)
    if OUTPUT:
        z0 = _take(z_ptr, wide, channels, inside, stop, step)
        z1 = _take(z_ptr, wide, channels, inside, stop, step + 1)
        c0 = _take(c_ptr, narrow, states, real, stop, step)
    for _ in range(first, stop):
        x2 = _take(x_ptr, wide, channels, inside, stop, step + 2)
        d2 = _take(delta_ptr, wide, channels, inside, stop, step + 2)
        b1 = _take(b_ptr, narrow, states, real, stop, step + 1)
        if OUTPUT:
            z2 = _take(z_ptr, wide, channels, inside, stop, step + 2)
            c1 = _take(c_ptr, narrow, states, real, stop, step + 1)
        d = _softplus(d0 + bias)
        h = tl.exp2(a * d[None, :]) * h + b0[:, None] * (d * x0)[None, :]
        total += d
        if OUTPUT:
            y = tl.sum(h * c0[:, None], axis=0) + skip * x0
            y = y * z0 / (1.0 + tl.exp2(-z0 * LOG2E))
            tl.store(y_ptr + wide + step * channels, y.to(y_ptr.dtype.element_ty), mask=inside)
            z0, z1, c0 = z1, z2, c1
        x0, x1, d0, d1, b0 = x1, x2, d1, d2, b1
        step += 1
    tl.store(end_ptr + state_at, h, mask=both)
    if not OUTPUT:
        sum_at = (batch * num_segments + segment) * channels + channel
        tl.store(sum_ptr + sum_at, total, mask=inside)


@triton.jit
def hand_on(
    a_ptr, end_ptr, sum_ptr, start_ptr, channels, states, num_segments, num_blocks,
    STATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The state before every segment, from the segments' own last states."""
    program = tl.program_id(0)
    batch = (program // num_blocks).to(tl.int64)
    channel = (program % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATES)
    inside = channel < channels
    both = (n < states)[:, None] & inside[None, :]
    a = tl.load(a_ptr + channel[None, :] * states + n[:, None], mask=both, other=0.0) * LOG2E
    h = tl.zeros([STATES, BLOCK], tl.float32)
    for segment in range(num_segments):
        row = batch * num_segments + segment
        at = (row * states + n[:, None]) * channels + channel[None, :]
        tl.store(start_ptr + at, h, mask=both)
        d = tl.load(sum_ptr + row * channels + channel, mask=inside, other=0.0)
        h = tl.exp2(a * d[None, :]) * h + tl.load(end_ptr + at, mask=both, other=0.0)


def len_segments(batch: int, len_seq: int, channels: int, launch: Launch) -> int:
    """Steps of a segment: as many segments as fill a GPU, none too short; all where not cut."""
    if not launch.meta["CUT"]:
        return len_seq
    wanted = triton.cdiv(LANES_WANTED, batch * channels)
    longest = max(1, len_seq // LEAST_SEGMENT)
    return int(triton.cdiv(len_seq, min(wanted, longest)))


class SelectiveScan:
    """Workspace and launches of one shape; call it to run: y and the last states."""

    def __init__(
        self, inputs: dict[str, torch.Tensor], launch: Launch, len_segment: int | None = None
    ) -> None:
        """`inputs`: x, delta, bias, a, b, c, d, z, as the reference takes them."""
        self.inputs, self.launch = inputs, launch
        x, a = inputs["x"], inputs["a"]
        self.batch, self.len_seq, self.channels = x.shape
        self.states = a.shape[1]
        self.segment = len_segment or len_segments(self.batch, self.len_seq, self.channels, launch)
        self.segments = triton.cdiv(self.len_seq, self.segment)
        self.blocks = triton.cdiv(self.channels, launch.meta["BLOCK"])
        shape = (self.batch, self.segments, self.states, self.channels)
        self.y = poisoned(*x.shape, dtype=x.dtype, device=x.device)
        self.end = poisoned(*shape, dtype=torch.float32, device=x.device)
        self.start = self.end.clone()
        sums = (self.batch, self.segments, self.channels)
        self.sums = poisoned(*sums, dtype=torch.float32, device=x.device)

    def __call__(self) -> tuple[torch.Tensor, ...]:
        """y[batch, len, channels] and the state[batch, channels, states]."""
        if self.segments > 1:
            self._scan(output=False)
            hand_on[(self.batch * self.blocks,)](
                self.inputs["a"], self.end, self.sums, self.start,
                self.channels, self.states, self.segments, self.blocks, **self._tile(),
            )  # fmt: skip
        self._scan(output=True)
        return self.y, self.end[:, -1].transpose(1, 2)

    def _scan(self, *, output: bool) -> None:
        arrays = [self.inputs[name] for name in ("x", "delta", "bias", "a", "b", "c", "d", "z")]
        scan_segments[(self.batch * self.segments * self.blocks,)](
            *arrays, self.y, self.start, self.end, self.sums,
            self.len_seq, self.channels, self.states, self.segment, self.segments, self.blocks, 1,
            OUTPUT=output, CUT=self.segments > 1, **self._tile(),
        )  # fmt: skip

    def _tile(self) -> dict[str, int]:
        return {
            "STATES": triton.next_power_of_2(self.states), "BLOCK": self.launch.meta["BLOCK"],
            "num_warps": self.launch.num_warps, "num_stages": self.launch.num_stages,
        }  # fmt: skip
