"""Backward pass of the row softmax: dx = y * (dy - rowsum(y * dy)), fused in one kernel.

Where rows of y and dy and their fp32 copies fit fast memory, they are read once. Where they do
not, a row is streamed twice in column chunks: for the sum, then for the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np

from hwmodels.dtypes import BF16, DType
from workloads.machine import Machine, SlowArray, Tile, slices
from workloads.numeric import Num, ceil_div, floor, minimum, where
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.row_map import RowMap
from workloads.ops.softmax import WORK_BYTES
from workloads.work import Work

Finish: TypeAlias = Callable[[Machine, Tile], None]
"""Changes a tile of results in place before it is stored."""


@dataclass(frozen=True, kw_only=True)
class SoftmaxBackward(ProvedOp):
    """Gradient over the last axis of [rows, cols] from the softmax y and its gradient dy.

    Arithmetic is fp32. Ignored: the padding of ragged chunks.

    >>> op = SoftmaxBackward(rows=1024, cols=4096)
    >>> op.work(2**18).bytes == 3 * 1024 * 4096 * 2
    True
    >>> op.work(2**14).bytes == 5 * 1024 * 4096 * 2     # 4096 * (4 + 8) bytes exceed 16 KiB
    True
    """

    name: ClassVar[str] = "softmax_backward"
    rows: Num
    cols: Num
    dtype: DType = BF16

    def stages(self) -> tuple[Stage, ...]:
        """Timed as a map of two inputs with a row to a thread block."""
        rows = RowMap(
            rows=self.rows, cols=self.cols, num_inputs=2, vector_flops_per_element=4,
            dtype=self.dtype,
        )  # fmt: skip
        return (Stage("rows", rows),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Rows `tr` and columns `tc` of a tile, and the `passes` (1 or 2) over each row.

        >>> SoftmaxBackward(rows=1024, cols=4096).tiling(2**14)
        {'tr': 1, 'tc': 1364, 'passes': 2}
        """
        element = 2 * (self.dtype.bytes_per_element + WORK_BYTES)
        require_fit(self.name, fast_bytes, element + 2 * WORK_BYTES, "one element and its sums")
        tr = floor(fast_bytes / (self.cols * element + 2 * WORK_BYTES))
        chunk = floor((fast_bytes - 2 * WORK_BYTES) / element)
        fits = tr >= 1
        return {
            "tr": where(fits, minimum(self.rows, tr), 1),
            "tc": where(fits, self.cols, chunk),
            "passes": where(fits, 1, 2),
        }

    def work(self, fast_bytes: Num) -> Work:
        """Per element: multiply, sum, subtract, multiply; in chunks one more a chunk."""
        tiles, elements = self.tiling(fast_bytes), self.rows * self.cols
        passes, e = tiles["passes"], self.dtype.bytes_per_element
        chunks = (passes - 1) * self.rows * ceil_div(self.cols, tiles["tc"])
        return Work(
            vector_flops=4 * elements + chunks,
            read_bytes=passes * 2 * elements * e,
            write_bytes=elements * e,
        )

    def compulsory_bytes(self) -> Num:
        """y and dy once, dx once."""
        return 3 * self.rows * self.cols * self.dtype.bytes_per_element

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """y[rows, cols], positive with rows of sum 1, and dy[rows, cols]."""
        shape = (int(self.rows), int(self.cols))
        y = rng.uniform(0.1, 1.0, shape)
        return {"y": y / y.sum(axis=-1, keepdims=True), "dy": rng.standard_normal(shape)}

    def reference(self, inputs: Arrays) -> Arrays:
        """The Jacobian diag(y) - y y^T of each row, applied to dy."""
        y, dy = inputs["y"], inputs["dy"]
        jacobian = np.einsum("ri,ij->rij", y, np.eye(y.shape[-1])) - np.einsum("ri,rj->rij", y, y)
        return {"dx": np.einsum("rij,rj->ri", jacobian, dy)}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel over tiles of rows, or over single rows in chunks."""
        y, dy = (machine.place(inputs[name], self.dtype) for name in ("y", "dy"))
        dx = machine.empty(y.values.shape, self.dtype)
        self.run(machine, y, dy, dx)
        return {"dx": dx.values}

    def run(
        self,
        machine: Machine,
        y: SlowArray,
        dy: SlowArray,
        dx: SlowArray,
        finish: Finish | None = None,
    ) -> None:
        """The kernel on given slow arrays [rows, cols]; `finish` acts on each tile of dx."""
        tiles = {key: int(v) for key, v in self.tiling(machine.fast_bytes).items()}
        one_tile = _whole_rows if tiles["passes"] == 1 else _row_in_chunks
        with machine.kernel():
            for rows in slices(int(self.rows), tiles["tr"]):
                with machine.scope():
                    one_tile(machine, (y, dy, dx), rows, tiles["tc"], finish)


Arrays3: TypeAlias = tuple[SlowArray, SlowArray, SlowArray]


def _read(mc: Machine, x: SlowArray, rows: slice, cols: slice) -> Tile:
    """The fp32 copy of a tile; converting is no flop."""
    raw = mc.load(x, (rows, cols))
    tile = mc.vector(raw.values, per_element=0)
    mc.free(raw)
    return tile


def _finish(
    mc: Machine, y: Tile, dy: Tile, total: Tile, to: SlowArray, at: tuple[slice, slice],
    finish: Finish | None,
) -> None:  # fmt: skip
    mc.vector(dy.values - total.values, into=dy)
    mc.vector(dy.values * y.values, into=dy)
    if finish is not None:
        finish(mc, dy)
    mc.store(dy, to, at)


def _sum(mc: Machine, y: Tile, dy: Tile) -> Tile:
    """rowsum(y * dy), the products in registers."""
    mc.count(vector=2 * dy.values.size)
    return mc.hold((y.values * dy.values).sum(axis=-1, keepdims=True))


def _whole_rows(
    mc: Machine, arrays: Arrays3, rows: slice, width: int, finish: Finish | None
) -> None:
    y, dy = (_read(mc, x, rows, slice(0, width)) for x in arrays[:2])
    _finish(mc, y, dy, _sum(mc, y, dy), arrays[2], (rows, slice(0, width)), finish)


def _row_in_chunks(
    mc: Machine, arrays: Arrays3, rows: slice, width: int, finish: Finish | None
) -> None:
    chunks = slices(arrays[0].values.shape[1], width)
    total = mc.full((1, 1), 0.0)
    for cols in chunks:
        with mc.scope():
            y, dy = (_read(mc, x, rows, cols) for x in arrays[:2])
            mc.vector(total.values + _sum(mc, y, dy).values, into=total)
    for cols in chunks:
        with mc.scope():
            y, dy = (_read(mc, x, rows, cols) for x in arrays[:2])
            _finish(mc, y, dy, total, arrays[2], (rows, cols), finish)
