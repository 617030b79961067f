"""Recurrent layers of several heads: one persistent kernel, or two kernels a time step.

Every head of d units carries its own state (a block-diagonal recurrent matrix). With x = W x_t made
beforehand for all steps, G_r gates that take the state and the cell of `rnn_cell`:

    r = R y_(t-1),   (y, ...)_t = cell(x_t, r, b, (...)_(t-1))        2 G_r d^2 flops a head and row

    alternating   T times a batched product and a pointwise kernel: R and the states are read,
                  r written and read again every step
    fused         one launch; n blocks a head hold d / n units each, all G_r d columns of them, for
                  all T steps, and wait for each other after every step:
                      reads   R, b once; x once; y_0 and the other first states once
                              n > 1:  n B d T  of y, that each block takes whole
                      writes  all states (and gates, where training) of all steps

Both are exact. Ignored: splits of R by rows (the authors' last resort; they add sums across
blocks), padding of batches to 8 and of heads to whole tiles, and that the L2 keeps R between the
steps of the alternating kernels. Whether the blocks of a device hold R together is for its time to
tell (`simulator.planners.rnn_tiling`): here a head takes as many blocks as it needs.
Source: Poeppel et al. 2024, arXiv 2412.07752, section 3, and NX-AI/flashrnn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from workloads.machine import Machine, SlowArray, Tile, slices
from workloads.numeric import Num, ceil_div, floor, minimum, where
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.matmul import BatchedMatmul
from workloads.ops.rnn_cell import Cell, RnnCell, cell_of, naive_step, split, store
from workloads.ops.staged import ProvedStagedOp
from workloads.ops.streamed import Lanes
from workloads.work import Work

ROWS: Final = 16
"""Sequences that a block carries through all steps together: rows of a matrix tile."""
FP32_BYTES: Final = FP32.bits // 8


@dataclass(frozen=True, kw_only=True)
class MultiHeadRnn(ProvedOp):
    """What both kernels compute: x[len_seq, batch, num_heads, head_dim, gates],
    R[num_heads, head_dim, head_dim, gates], b[num_heads, head_dim, gates], first states
    s[batch, num_heads, head_dim, states]; the states of all steps come out."""

    cell: str = "lstm"
    batch: Num = 1
    num_heads: Num = 1
    head_dim: Num
    len_seq: Num
    training: bool = False
    dtype: DType = BF16

    def check(self) -> None:
        """A known cell."""
        cell_of(self.cell)

    @property
    def kind(self) -> Cell:
        """The cell."""
        return cell_of(self.cell)

    @property
    def hidden(self) -> Num:
        """Units of all heads."""
        return self.num_heads * self.head_dim

    def weight_bytes(self) -> Num:
        """R of all heads."""
        return self.kind.from_state * self.hidden * self.head_dim * self.dtype.bytes_per_element

    def state_bytes(self) -> Num:
        """States after one step, what decoding a token holds."""
        return self.kind.states * self.batch * self.hidden * self.dtype.bytes_per_element

    def written_bytes(self) -> Num:
        """States of all steps, and the gates that the backward pass needs."""
        arrays = self.kind.states + int(self.training) * self.kind.kept
        return arrays * self.len_seq * self.batch * self.hidden * self.dtype.bytes_per_element

    def compulsory_bytes(self) -> Num:
        """R, b, x and first states once; states (and gates) of all steps once."""
        cell, e = self.kind, self.dtype.bytes_per_element
        first = (1 + sum(i > 0 for i in cell.read)) * self.batch
        rows = cell.from_input * self.len_seq * self.batch + first + cell.biases
        return self.weight_bytes() + rows * self.hidden * e + self.written_bytes()

    def min_flops(self) -> Mapping[DType, Num]:
        """2 G_r d^2 a head, row and step."""
        products = self.len_seq * self.batch * self.hidden * self.head_dim
        return {self.dtype: 2 * self.kind.from_state * products}

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random x, b, states; R scaled so that states stay of order one."""
        cell, d = self.kind, int(self.head_dim)
        heads, rows, steps = int(self.num_heads), int(self.batch), int(self.len_seq)
        return {
            "x": rng.standard_normal((steps, rows, heads, d, cell.from_input)),
            "r": rng.standard_normal((heads, d, d, cell.from_state)) / np.sqrt(d),
            "b": rng.standard_normal((heads, d, cell.biases)),
            "s": rng.standard_normal((rows, heads, d, cell.states)),
        }

    def reference(self, inputs: Arrays) -> Arrays:
        """Step by step over all heads at once."""
        states, found = inputs["s"], []
        for x in inputs["x"]:
            r = np.einsum("bhi,hijg->bhjg", states[..., 0], inputs["r"])
            states = naive_step(self.kind, x, r, inputs["b"], states)
            found.append(states)
        return {"s": np.stack(found)}


@dataclass(frozen=True, kw_only=True)
class FusedRnn(MultiHeadRnn):
    """All steps in one kernel whose blocks hold R.

    >>> op = FusedRnn(cell="lstm", batch=16, num_heads=12, head_dim=64, len_seq=1024)
    >>> op.min_flops()[BF16] == 2 * 4 * 64**2 * 12 * 16 * 1024
    True
    >>> op.work(2**18).bytes == op.compulsory_bytes(), op.tiling(2**18)["blocks"]
    (True, 1)
    """

    name: ClassVar[str] = "fused_rnn"

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """`units` of a head that a block holds, `rows` it carries at once, `blocks` of a head."""
        cell, e, d = self.kind, self.dtype.bytes_per_element, self.head_dim
        rows = minimum(self.batch, ROWS)
        sums = (cell.from_state + len(cell.read) + cell.kept + cell.states) * FP32_BYTES
        row = sums + (cell.from_input + len(cell.read)) * e
        unit = (d * cell.from_state + cell.biases) * e + rows * row
        require_fit(
            self.name, fast_bytes, rows * d * e + unit, "a head's state and the weights of a unit",
            "split the width into more heads (num_heads up, head_dim down) or take alternating_rnn",
        )  # fmt: skip
        units = minimum(d, floor((fast_bytes - rows * d * e) / unit))
        return {"units": units, "rows": rows, "blocks": ceil_div(d, units)}

    def blocks(self, fast_bytes: Num) -> Num:
        """Blocks of all heads."""
        return self.num_heads * self.tiling(fast_bytes)["blocks"]

    def work(self, fast_bytes: Num) -> Work:
        """The module's equations."""
        cell, blocks = self.kind, self.tiling(fast_bytes)["blocks"]
        state = self.batch * self.hidden * self.dtype.bytes_per_element
        exchanged = where(blocks > 1, blocks * self.len_seq - 1, 0) * state
        elements = self.len_seq * self.batch * self.hidden
        return Work(
            tensor_flops=dict(self.min_flops()),
            vector_flops=elements * cell.vector_flops,
            special_ops=elements * cell.special_ops,
            read_bytes=self._read_once() + exchanged,
            write_bytes=self.written_bytes(),
        )

    def _read_once(self) -> Num:
        """What is read however many blocks there are: a gru's state as y and as itself."""
        cell, e = self.kind, self.dtype.bytes_per_element
        rows = cell.from_input * self.len_seq * self.batch + cell.biases
        rows = rows + (1 + len(cell.read)) * self.batch
        return self.weight_bytes() + rows * self.hidden * e

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Blocks that stay resident: heads side by side, all steps of some sequences in turn."""
        tiles = self.tiling(machine.fast_bytes)
        steps, batch, heads, d, _ = inputs["x"].shape
        columns = inputs["r"].reshape(heads, d, -1)
        a = {
            name: machine.place(columns if name == "r" else values, self.dtype)
            for name, values in inputs.items()
        }
        a["out"] = machine.empty((steps, batch, heads, d, self.kind.states), self.dtype)
        a["kept"] = machine.empty((steps, batch, heads, d, self.kind.kept), self.dtype)
        parts = slices(d, int(tiles["units"]))
        with machine.grid(heads * len(parts)) as blocks:
            for head in range(heads):
                own = blocks[head * len(parts) : (head + 1) * len(parts)]
                work = [
                    _Block(self, mc, a, head, cols) for mc, cols in zip(own, parts, strict=True)
                ]
                for rows in slices(batch, int(tiles["rows"])):
                    for block in work:
                        block.begin(rows)
                    for t in range(steps):  # a grid barrier stands between two steps
                        for block in work:
                            block.step(t)
                    for block in work:
                        block.end()
        return {"s": a["out"].values}


class _Block:
    """One resident block: `cols` of a head, their weights held for all steps."""

    def __init__(
        self, op: MultiHeadRnn, machine: Machine, a: Mapping[str, SlowArray], head: int, cols: slice
    ) -> None:
        self.op, self.machine, self.a, self.head, self.cols = op, machine, a, head, cols
        gates = op.kind.from_state
        self.weights = machine.load(
            a["r"], (head, slice(None), slice(cols.start * gates, cols.stop * gates))
        )
        self.biases = split(machine, machine.load(a["b"], (head, cols)).values)
        self.alone = cols.stop - cols.start == int(op.head_dim)

    def begin(self, rows: slice) -> None:
        """First states of the sequences that this block carries next."""
        mc, read = self.machine, self.op.kind.read_slice
        self.rows = rows
        loaded = mc.load(self.a["s"], (rows, self.head, self.cols, read))
        self.held: Tile = mc.vector(loaded.values, per_element=0)
        mc.free(loaded)
        self.y: Tile = mc.load(self.a["s"], (rows, self.head, slice(None), 0))

    def step(self, t: int) -> None:
        """One time step: y of all blocks, the product, the cell, the new states."""
        mc, op, place = self.machine, self.op, (t, self.rows, self.head, self.cols)
        if t and not self.alone:
            mc.reload(self.a["out"], (t - 1, self.rows, self.head, slice(None), 0), self.y)
        with mc.scope():
            product = mc.matmul(self.y, self.weights, op.dtype)
            r = product.values.reshape(*product.shape[:-1], -1, op.kind.from_state)
            x = mc.load(self.a["x"], place).values
            states = split(mc, self.held.values)
            after, gates = op.kind.run(split(mc, x), split(mc, r), self.biases, states)
            store(mc, after, self.a["out"], place)
            if op.training:
                store(mc, gates, self.a["kept"], place)
            self._keep(after)

    def _keep(self, after: Sequence[Lanes]) -> None:
        """States that the next step reads, in registers."""
        for i, state in enumerate(self.op.kind.read):
            self.held.values[..., i] = after[state].values
        if self.alone:
            self.machine.vector(after[0].values, per_element=0, into=self.y)

    def end(self) -> None:
        """Give the states' memory back; the weights stay."""
        self.machine.free(self.held, self.y)


@dataclass(frozen=True, kw_only=True)
class AlternatingRnn(MultiHeadRnn, ProvedStagedOp):
    """A batched product and a pointwise kernel a step.

    >>> op = AlternatingRnn(cell="lstm", batch=16, num_heads=12, head_dim=64, len_seq=1024)
    >>> op.work(2**26).launches
    2048
    """

    name: ClassVar[str] = "alternating_rnn"

    @property
    def product(self) -> BatchedMatmul:
        """All heads' R y of one step."""
        return BatchedMatmul(
            batch=self.num_heads, m=self.batch, k=self.head_dim,
            n=self.head_dim * self.kind.from_state, dtype=self.dtype,
        )  # fmt: skip

    @property
    def pointwise(self) -> RnnCell:
        """The cell of one step."""
        return RnnCell(
            cell=self.cell, batch=self.batch, units=self.hidden, training=self.training,
            dtype=self.dtype,
        )  # fmt: skip

    def stages(self) -> tuple[Stage, ...]:
        """Both kernels, as often as there are steps."""
        return (
            Stage("product", self.product, self.len_seq),
            Stage("cell", self.pointwise, self.len_seq),
        )

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The kernels in turn; arrays are addressed by head or by unit as each of them needs."""
        _, batch, heads, d, _ = inputs["x"].shape
        gates, dtype, units = self.kind.from_state, self.dtype, heads * d
        weights = machine.place(inputs["r"].reshape(heads, d, d * gates), dtype)
        biases = machine.place(inputs["b"].reshape(units, -1), dtype)
        before = machine.place(inputs["s"].reshape(batch, units, -1), dtype)
        found = []
        for x in inputs["x"]:
            y = before.values[..., 0].reshape(batch, heads, d).swapaxes(0, 1)
            product = machine.empty((heads, batch, d * gates), dtype)
            self.product.run(machine, SlowArray(y, dtype), weights, product)
            r = product.values.swapaxes(0, 1).reshape(batch, units, gates)
            after = machine.empty(before.values.shape, dtype)
            self.pointwise.run(
                machine, machine.place(x.reshape(batch, units, -1), dtype), SlowArray(r, dtype),
                biases, before, after,
            )  # fmt: skip
            before = after
            found.append(after.values.reshape(batch, heads, d, -1))
        return {"s": np.stack(found)}
