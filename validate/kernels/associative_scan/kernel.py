"""h_t = a_t h_{t-1} + b_t along rows held contiguously: one pass, or reduce-carry-scan.

Pairs (a, b) stand for the map h -> a h + b; applying one map after another is associative

    (a, b) then (a', b') = (a' a, a' b + b')

so a tile of BLOCK steps is scanned in registers (Blelloch 1990, "Prefix sums and their
applications"). Each program walks ROWS rows from left to right and carries h from tile to tile:
every element is read once and written once. Where there are too few rows to fill a GPU, a row is
cut into segments: `segment_totals` composes each segment's maps to one pair, those pairs are
scanned as rows themselves, and the segments are scanned from the states before them: two reads and
a half instead of one and a half, with all segments at once.

Backward, with e the gradient of h taken through all later steps, runs from right to left:

    e_t = dh_t + a_{t+1} e_{t+1},     db_t = e_t,     da_t = e_t h_{t-1}

Sums are fp32 whatever the format.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from validate.kernels.judge import poisoned
from validate.kernels.spec import Launch

SEGMENTS_WANTED = 1056
"""Programs that fill a large GPU: eight on each of 132 multiprocessors."""
CARRIED = (
    Launch(meta={"BLOCK": 1024, "ROWS": 1, "CUT": 0}, num_warps=4, num_stages=3),
    Launch(meta={"BLOCK": 4096, "ROWS": 1, "CUT": 0}, num_warps=8, num_stages=3),
    Launch(meta={"BLOCK": 1024, "ROWS": 1, "CUT": 0}, num_warps=2, num_stages=2),
    Launch(meta={"BLOCK": 256, "ROWS": 4, "CUT": 0}, num_warps=4, num_stages=3),
)
"""Tiles of 8 to 16 steps a thread: 16-byte accesses in every format, few steps through shared
memory. Several short rows together where a row would leave lanes without work."""
CUT = (
    Launch(meta={"BLOCK": 2048, "ROWS": 1, "CUT": 1}, num_warps=4, num_stages=3),
    Launch(meta={"BLOCK": 4096, "ROWS": 1, "CUT": 1}, num_warps=8, num_stages=2),
)
"""The same over segments of a row."""
LAUNCHES = CARRIED + CUT


@triton.jit
def _then(a0, h0, a1, h1):
    return a0 * a1, a1 * h0 + h1


@triton.jit
def _last(values, column, WHICH: tl.constexpr):
    """Column WHICH of a tile, as a sum with one term."""
    return tl.sum(tl.where(column[None, :] == WHICH, values, 0.0), axis=1)


@triton.jit
def _pairs(a_ptr, b_ptr, row_at, t, inside, len_seq, REVERSE: tl.constexpr):
    """The maps of steps t, identities outside; run backwards a step uses the next one's a."""
    if REVERSE:
        a_inside = inside & (t + 1 < len_seq)[None, :]
        a = tl.load(a_ptr + row_at[:, None] + (t + 1)[None, :], mask=a_inside, other=1.0)
    else:
        a = tl.load(a_ptr + row_at[:, None] + t[None, :], mask=inside, other=1.0)
    b = tl.load(b_ptr + row_at[:, None] + t[None, :], mask=inside, other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def segment_totals(
    a_ptr, b_ptr, total_a_ptr, total_b_ptr, num_rows, len_seq, len_segment, num_segments,
    REVERSE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Each segment's maps composed into one pair; backwards, segments are counted from the end."""
    program = tl.program_id(0)
    segment = program % num_segments
    row = (program // num_segments) * ROWS + tl.arange(0, ROWS)
    row_at = row.to(tl.int64) * len_seq
    place = segment
    if REVERSE:
        place = num_segments - 1 - segment
    start = place * len_segment
    stop = tl.minimum(start + len_segment, len_seq)
    blocks = tl.cdiv(len_segment, BLOCK)
    column = tl.arange(0, BLOCK)
    product = tl.full([ROWS], 1.0, tl.float32)
    carry = tl.zeros([ROWS], tl.float32)
    for i in tl.range(0, blocks, num_stages=STAGES):
        index = i
        if REVERSE:
            index = blocks - 1 - i
        t = start + index * BLOCK + column
        inside = (row < num_rows)[:, None] & (t < stop)[None, :]
        a, b = _pairs(a_ptr, b_ptr, row_at, t, inside, len_seq, REVERSE)
        a, b = tl.associative_scan((a, b), 1, _then, reverse=REVERSE)
        ends: tl.constexpr = 0 if REVERSE else BLOCK - 1
        last_a = _last(a, column, ends)
        carry = last_a * carry + _last(b, column, ends)
        product = last_a * product
    out_at = row.to(tl.int64) * num_segments + segment
    tl.store(total_a_ptr + out_at, product, mask=row < num_rows)
    tl.store(total_b_ptr + out_at, carry, mask=row < num_rows)


@triton.jit
def scan_rows(
    a_ptr, b_ptr, state_ptr, before_ptr, out_ptr, da_ptr,
    num_rows, len_seq, len_segment, num_segments,
    CUT: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The states of a segment from the state before it (`before_ptr`, where CUT); run backwards
    the gradients: `b_ptr` holds dh, `state_ptr` h, `out_ptr` db."""
    program = tl.program_id(0)
    segment = program % num_segments
    row = (program // num_segments) * ROWS + tl.arange(0, ROWS)
    row_at = row.to(tl.int64) * len_seq
    place = segment
    if REVERSE:
        place = num_segments - 1 - segment
    start = place * len_segment
    stop = tl.minimum(start + len_segment, len_seq)
    blocks = tl.cdiv(len_segment, BLOCK)
    column = tl.arange(0, BLOCK)
    carry = tl.zeros([ROWS], tl.float32)
    if CUT:
        before_at = row.to(tl.int64) * num_segments + segment - 1
        carry = tl.load(before_ptr + before_at, mask=(row < num_rows) & (segment > 0), other=0.0)
    for i in tl.range(0, blocks, num_stages=STAGES):
        index = i
        if REVERSE:
            index = blocks - 1 - i
        t = start + index * BLOCK + column
        inside = (row < num_rows)[:, None] & (t < stop)[None, :]
        a, b = _pairs(a_ptr, b_ptr, row_at, t, inside, len_seq, REVERSE)
        a, b = tl.associative_scan((a, b), 1, _then, reverse=REVERSE)
        h = a * carry[:, None] + b
        carry = _last(h, column, 0 if REVERSE else BLOCK - 1)
        at = row_at[:, None] + t[None, :]
        tl.store(out_ptr + at, h.to(out_ptr.dtype.element_ty), mask=inside)
        if REVERSE:
            past = tl.load(state_ptr + at - 1, mask=inside & (t > 0)[None, :], other=0.0)
            da = h * past.to(tl.float32)
            tl.store(da_ptr + at, da.to(da_ptr.dtype.element_ty), mask=inside)


def len_segments(rows: int, len_seq: int, launch: Launch) -> int:
    """Steps of a segment: whole tiles, enough segments to fill a GPU; the row where not cut."""
    block = launch.meta["BLOCK"]
    if not launch.meta["CUT"]:
        return len_seq
    tiles = triton.cdiv(len_seq, block)
    wanted = triton.cdiv(SEGMENTS_WANTED, triton.cdiv(rows, launch.meta["ROWS"]))
    return int(triton.cdiv(tiles, min(wanted, tiles))) * block


class Scan:
    """Workspace and launches of one shape; call it to run, forward or (given h) backward."""

    def __init__(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        launch: Launch,
        *,
        state: torch.Tensor | None = None,
    ) -> None:
        """`b` is dh and `state` h where the gradients are asked for."""
        self.a, self.b, self.launch, self.state = a, b, launch, state
        self.rows, self.len_seq = a.shape
        self.segment = len_segments(self.rows, self.len_seq, launch)
        self.segments = triton.cdiv(self.len_seq, self.segment)
        self.totals = [
            poisoned(self.rows, self.segments, dtype=torch.float32, device=a.device)
            for _ in range(3)
        ]
        self.out = poisoned(*a.shape, dtype=a.dtype, device=a.device)
        self.da = poisoned(*a.shape, dtype=a.dtype, device=a.device) if self.reverse else self.out

    @property
    def reverse(self) -> bool:
        """Whether it runs backwards."""
        return self.state is not None

    def __call__(self) -> tuple[torch.Tensor, ...]:
        """h; or da and db."""
        sizes = (self.rows, self.len_seq, self.segment, self.segments)
        cut = self.segments > 1
        if cut:
            totals_a, totals_b, before = self.totals
            segment_totals[self._grid](
                self.a, self.b, totals_a, totals_b, *sizes, REVERSE=self.reverse, **self._tile()
            )
            self._carry(totals_a, totals_b, before)
        state = self.b if self.state is None else self.state
        scan_rows[self._grid](
            self.a, self.b, state, self.totals[2], self.out, self.da, *sizes,
            CUT=cut, REVERSE=self.reverse, **self._tile(),
        )  # fmt: skip
        return (self.da, self.out) if self.reverse else (self.out,)

    @property
    def _grid(self) -> tuple[int]:
        return (triton.cdiv(self.rows, self.launch.meta["ROWS"]) * self.segments,)

    def _tile(self) -> dict[str, int]:
        meta, stages = self.launch.meta, self.launch.num_stages
        return {
            "BLOCK": meta["BLOCK"], "ROWS": meta["ROWS"], "STAGES": stages,
            "num_warps": self.launch.num_warps, "num_stages": stages,
        }  # fmt: skip

    def _carry(self, a: torch.Tensor, b: torch.Tensor, before: torch.Tensor) -> None:
        """Scan the segments' totals, rows of them, forwards whatever the direction."""
        scan_rows[(self.rows,)](
            a, b, b, b, before, before, self.rows, self.segments, self.segments, 1,
            CUT=False, REVERSE=False, **self._carry_tile(),
        )  # fmt: skip

    def _carry_tile(self) -> dict[str, int]:
        block = min(CARRY.meta["BLOCK"], max(16, triton.next_power_of_2(self.segments)))
        return {
            "BLOCK": block, "ROWS": 1, "STAGES": CARRY.num_stages,
            "num_warps": CARRY.num_warps, "num_stages": CARRY.num_stages,
        }  # fmt: skip


CARRY = Launch(meta={"BLOCK": 1024, "ROWS": 1, "CUT": 0}, num_warps=4, num_stages=1)
"""The scan of segments' totals: few and short rows."""
