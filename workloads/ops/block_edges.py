"""States on the edges between blocks of a grid: from block to block in topological order.

A block of a grid of bw x bh blocks has incoming edges (on its left, and in two dimensions above
it) and as many outgoing ones. With T of the block [edges, edges], what enters it C_in
[edges, width] and what starts inside it L [edges, width],

    C_out = T C_in + L

goes on to the blocks on its right and below. Blocks on one anti-diagonal do not depend on each
other: bw + bh - 1 launches in turn, one for every block of the longest path through the grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from hwmodels.dtypes import FP32, DType
from workloads.machine import Machine, SlowArray, Values, slices
from workloads.numeric import Num, ceil_div, floor, minimum
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.elementwise import add
from workloads.ops.matmul import BatchedMatmul
from workloads.work import Work

ACCUMULATOR_BYTES: Final = 4
Block = tuple[int, int, int]
"""Stream, row and column of a block."""


@dataclass(frozen=True, kw_only=True)
class BlockEdges(ProvedOp):
    """`streams` grids of `blocks_x` x `blocks_y` blocks; a state is `width` numbers an edge.

    `edges_left` edges enter a block from the left, `edges_above` from above; None makes chains.
    States that enter the grid are given, those of every edge come out.

    >>> op = BlockEdges(blocks_x=3, blocks_y=2, edges_left=4, edges_above=4, width=10)
    >>> op.work(2**16).launches, op.work(2**16).tensor_flops[FP32] == 6 * 2 * 8 * 8 * 10
    (4, True)
    """

    name: ClassVar[str] = "block_edges"
    streams: Num = 1
    blocks_x: Num
    blocks_y: Num = 1
    edges_left: Num = 1
    edges_above: Num | None = None
    width: Num
    dtype: DType = FP32

    @property
    def edges(self) -> Num:
        """Edges into a block, and out of it."""
        return self.edges_left + (0 if self.edges_above is None else self.edges_above)

    @property
    def num_blocks(self) -> Num:
        """Blocks of all grids."""
        return self.streams * self.blocks_x * self.blocks_y

    def depth(self) -> Num:
        """Blocks of the longest path."""
        return self.blocks_x + self.blocks_y - 1

    def stages(self) -> tuple[Stage, ...]:
        """Timed as a product and a sum for every diagonal, all as long as the mean one."""
        times = self.depth()
        each = ceil_div(self.num_blocks, times)
        product = BatchedMatmul(
            batch=each, m=self.edges, n=self.width, k=self.edges, dtype=self.dtype
        )
        total = add(each * self.edges * self.width, self.dtype)
        return Stage("product", product, times), Stage("sum", total, times)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """T of a block beside `columns` of its states."""
        e, held = self.dtype.bytes_per_element, self.edges**2 * self.dtype.bytes_per_element
        column = self.edges * (2 * e + ACCUMULATOR_BYTES)
        require_fit(self.name, fast_bytes, held + column, "a block's transitions; take less edges")
        return {"columns": minimum(self.width, floor((fast_bytes - held) / column))}

    def work(self, fast_bytes: Num) -> Work:
        """For every block T, C_in and L read, C_out written; a launch for every diagonal."""
        self.tiling(fast_bytes)
        e, states = self.dtype.bytes_per_element, self.num_blocks * self.edges * self.width
        return Work(
            tensor_flops={self.dtype: 2 * states * self.edges},
            vector_flops=states,
            read_bytes=(2 * states + self.num_blocks * self.edges**2) * e,
            write_bytes=states * e,
            launches=self.depth(),
        )

    def compulsory_bytes(self) -> Num:
        """T, L, and C_out of every block; what enters the grid."""
        above = 0 if self.edges_above is None else self.edges_above
        entering = self.streams * (self.blocks_y * self.edges_left + self.blocks_x * above)
        numbers = self.num_blocks * self.edges * (self.edges + 2 * self.width)
        return (numbers + entering * self.width) * self.dtype.bytes_per_element

    # ---- the program -------------------------------------------------------------------------

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """t[streams, blocks_y, blocks_x, out, in], starts[..., out, width], left and above."""
        grid = (self.streams, self.blocks_y, self.blocks_x)
        above = 0 if self.edges_above is None else self.edges_above
        shapes = {
            "t": (*grid, self.edges, self.edges),
            "starts": (*grid, self.edges, self.width),
            "left": (self.streams, self.blocks_y, self.edges_left, self.width),
            "above": (self.streams, self.blocks_x, above, self.width),
        }
        return {k: rng.standard_normal([int(n) for n in v]) for k, v in shapes.items()}

    def _entered(self, inputs: Arrays) -> dict[str, Values]:
        """States before every block, and behind the last ones: the given ones, else unknown."""
        rows, cols = int(self.blocks_y), int(self.blocks_x)
        left, above = inputs["left"], inputs["above"]
        right = np.full((len(left), rows, cols + 1, *left.shape[2:]), np.nan)
        down = np.full((len(left), rows + 1, cols, *above.shape[2:]), np.nan)
        right[:, :, 0], down[:, 0] = left, above
        return {"right": right, "down": down}

    def reference(self, inputs: Arrays) -> Arrays:
        """Row after row of blocks."""
        out, cut = self._entered(inputs), int(self.edges_left)
        for y in range(int(self.blocks_y)):
            for x in range(int(self.blocks_x)):
                entering = np.concatenate([out["right"][:, y, x], out["down"][:, y, x]], axis=1)
                leaving = inputs["t"][:, y, x] @ entering + inputs["starts"][:, y, x]
                out["right"][:, y, x + 1], out["down"][:, y + 1, x] = np.split(leaving, [cut], 1)
        return out

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """A kernel a diagonal, block after block."""
        slow = {name: machine.place(inputs[name], self.dtype) for name in ("t", "starts")}
        slow |= {k: machine.place(v, self.dtype) for k, v in self._entered(inputs).items()}
        for diagonal in range(int(self.depth())):
            with machine.kernel():
                for y in range(int(self.blocks_y)):
                    if 0 <= diagonal - y < int(self.blocks_x):
                        for stream in range(int(self.streams)):
                            self._block(machine, slow, (stream, y, diagonal - y))
        return {name: slow[name].values for name in ("right", "down")}

    def _block(self, mc: Machine, slow: dict[str, SlowArray], at: Block) -> None:
        """One block: its states, columns at a time."""
        stream, y, x = at
        cut = int(self.edges_left)
        sides = {"right": slice(0, cut), "down": slice(cut, int(self.edges))}
        onward = {"right": (stream, y, x + 1), "down": (stream, y + 1, x)}
        columns = int(self.tiling(mc.fast_bytes)["columns"])
        with mc.scope():
            t = {
                (o, i): mc.load(slow["t"], (*at, sides[o], sides[i])) for o in sides for i in sides
            }
            for part in slices(int(self.width), columns):
                with mc.scope():
                    entered = {i: mc.load(slow[i], (*at, slice(None), part)) for i in sides}
                    for o, rows in sides.items():
                        leaving = mc.full((rows.stop - rows.start, part.stop - part.start), 0.0)
                        for i, tile in entered.items():
                            mc.matmul(t[o, i], tile, self.dtype, into=leaving)
                        starts = mc.load(slow["starts"], (*at, rows, part))
                        mc.vector(leaving.values + starts.values, into=leaving)
                        mc.store(leaving, slow[o], (*onward[o], slice(None), part))
