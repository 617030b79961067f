"""Row softmax y[i, j] = exp(x[i, j] - max_j x) / sum_j exp(x[i, j] - max_j x), fused in one kernel.

Where a row and its fp32 copy fit fast memory, it is read once and written once. Where they do
not, the row is streamed twice in column chunks: the first pass keeps a running maximum m and a
running sum l (Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3),

    m' = max(m, max chunk),   l' = l exp(m - m') + sum exp(chunk - m'),

the second recomputes exp(x - m) and scales it by 1 / l. A row thus costs 2 reads and 1 write
instead of the 3 reads and 1 write of the textbook's three passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from workloads.machine import Machine, SlowArray, Tile, slices
from workloads.numeric import Num, ceil_div, floor, minimum, where
from workloads.op import Arrays, ProvedOp, require_fit
from workloads.work import Work

WORK_BYTES = FP32.bits // 8
"""Bytes of one element's fp32 copy, and of one row statistic."""

Prepare: TypeAlias = Callable[[Machine, Tile, slice, slice], None]
"""Changes a freshly read fp32 tile in place (scales it, masks it): machine, tile, rows, columns."""


@dataclass(frozen=True, kw_only=True)
class Softmax(ProvedOp):
    """Softmax over the last axis of [rows, cols]; sizes in elements.

    Statistics and exponentials are fp32. Ignored: nothing but the padding of ragged chunks.

    >>> op = Softmax(rows=1024, cols=4096)
    >>> op.work(2**18).bytes == 2 * 1024 * 4096 * 2
    True
    >>> op.work(2**14).bytes == 3 * 1024 * 4096 * 2     # 4096 * (2 + 4) bytes exceed 16 KiB
    True
    """

    name: ClassVar[str] = "softmax"
    rows: Num
    cols: Num
    dtype: DType = BF16
    out_dtype: DType | None = None

    @property
    def written_dtype(self) -> DType:
        """Format in which y goes to slow memory: `out_dtype`, else the input format."""
        return self.out_dtype or self.dtype

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Rows `tr` and columns `tc` of a tile, and the `passes` (1 or 2) over each row.

        >>> Softmax(rows=1024, cols=4096).tiling(2**14)
        {'tr': 1, 'tc': 2728, 'passes': 2}
        """
        element = self.dtype.bytes_per_element + WORK_BYTES
        require_fit(self.name, fast_bytes, element + 4 * WORK_BYTES, "one element and its sums")
        row_bytes = self.cols * element + 2 * WORK_BYTES
        tr = floor(fast_bytes / row_bytes)
        chunk = floor((fast_bytes - 4 * WORK_BYTES) / element)
        fits = tr >= 1
        return {
            "tr": where(fits, minimum(self.rows, tr), 1),
            "tc": where(fits, self.cols, chunk),
            "passes": where(fits, 1, 2),
        }

    def work(self, fast_bytes: Num) -> Work:
        """Per row of c columns in k chunks.

        One pass: 4 c vector flops (maximum, subtract, sum, scale), c + 1 special (exp, 1 / l).
        Two passes: 5 c + 4 k vector flops (the second pass subtracts again; m and l are updated
        once a chunk), 2 c + k + 1 special.
        """
        tiles, elements = self.tiling(fast_bytes), self.rows * self.cols
        passes = tiles["passes"]
        online = passes - 1
        updates = online * self.rows * ceil_div(self.cols, tiles["tc"])
        return Work(
            vector_flops=(4 + online) * elements + 4 * updates,
            special_ops=passes * elements + updates + self.rows,
            read_bytes=passes * elements * self.dtype.bytes_per_element,
            write_bytes=elements * self.written_dtype.bytes_per_element,
        )

    def compulsory_bytes(self) -> Num:
        """x once, y once."""
        per_element = self.dtype.bytes_per_element + self.written_dtype.bytes_per_element
        return self.rows * self.cols * per_element

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x[rows, cols], spread widely enough that a missing maximum would overflow."""
        return {"x": 300 * rng.standard_normal((int(self.rows), int(self.cols)))}

    def reference(self, inputs: Arrays) -> Arrays:
        """NumPy, whole rows at a time."""
        shifted = np.exp(inputs["x"] - inputs["x"].max(axis=-1, keepdims=True))
        return {"y": shifted / shifted.sum(axis=-1, keepdims=True)}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel over tiles of rows, or over single rows in chunks."""
        x = machine.place(inputs["x"], self.dtype)
        y = machine.empty(x.values.shape, self.written_dtype)
        self.run(machine, x, y)
        return {"y": y.values}

    def run(
        self, machine: Machine, x: SlowArray, y: SlowArray, prepare: Prepare | None = None
    ) -> None:
        """The kernel on given slow arrays [rows, cols]; `prepare` acts on each tile once read."""
        tiles = {key: int(v) for key, v in self.tiling(machine.fast_bytes).items()}
        one_tile = _whole_rows if tiles["passes"] == 1 else _row_in_chunks
        with machine.kernel():
            for rows in slices(int(self.rows), tiles["tr"]):
                with machine.scope():
                    one_tile(machine, x, y, rows, tiles["tc"], prepare)


def _read(mc: Machine, x: SlowArray, rows: slice, cols: slice, prepare: Prepare | None) -> Tile:
    raw = mc.load(x, (rows, cols))
    tile = mc.vector(raw.values, per_element=0)  # the fp32 copy; converting is no flop
    mc.free(raw)
    if prepare is not None:
        prepare(mc, tile, rows, cols)
    return tile


def _whole_rows(
    mc: Machine, x: SlowArray, y: SlowArray, rows: slice, width: int, prepare: Prepare | None
) -> None:
    tile = _read(mc, x, rows, slice(0, width), prepare)
    top = mc.reduce("max", tile)
    mc.vector(tile.values - top.values, into=tile)
    mc.special(np.exp(tile.values), into=tile)
    total = mc.reduce("sum", tile)
    mc.special(1 / total.values, into=total)
    mc.vector(tile.values * total.values, into=tile)
    mc.store(tile, y, (rows, slice(0, width)))


def _row_in_chunks(
    mc: Machine, x: SlowArray, y: SlowArray, rows: slice, width: int, prepare: Prepare | None
) -> None:
    chunks = slices(x.values.shape[1], width)
    top, total = mc.full((1, 1), -np.inf), mc.full((1, 1), 0.0)
    for cols in chunks:
        with mc.scope():
            tile = _read(mc, x, rows, cols, prepare)
            online_update(mc, tile, top, total)
    mc.special(1 / total.values, into=total)
    for cols in chunks:
        with mc.scope():
            tile = _read(mc, x, rows, cols, prepare)
            mc.vector(tile.values - top.values, into=tile)
            mc.special(np.exp(tile.values), into=tile)
            mc.vector(tile.values * total.values, into=tile)
            mc.store(tile, y, (rows, cols))


def online_update(
    mc: Machine, scores: Tile, top: Tile, total: Tile, carried: Tile | None = None
) -> None:
    """One online-softmax step: `scores` [r, c] become exp(scores - m'), `top` and `total` move on.

    `carried` [r, w] holds sums weighted by the exponentials so far and is scaled by
    exp(m - m') as `total` is. Counts 3 r c + 4 r + r w vector flops and r c + r special-function
    results; needs two fp32 statistics per row beside its arguments.
    """
    peak = mc.reduce("max", scores)
    mc.vector(np.maximum(peak.values, top.values), into=peak)
    mc.vector(top.values - peak.values, into=top)
    decay = mc.special(np.exp(top.values), into=top)
    mc.vector(total.values * decay.values, into=total)
    if carried is not None:
        mc.vector(carried.values * decay.values, into=carried)
    mc.vector(scores.values - peak.values, into=scores)
    mc.special(np.exp(scores.values), into=scores)
    added = mc.reduce("sum", scores)
    mc.vector(total.values + added.values, into=total)
    mc.vector(peak.values, per_element=0, into=top)  # a register move
    mc.free(peak, added)
