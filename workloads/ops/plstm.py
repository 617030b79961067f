"""pLSTM: a linear recurrence on the edges of a chain or a grid, composed in logarithmic depth.

Poeppel et al. 2025 (arXiv 2506.11997, sections 3 and 4). A node n of a directed acyclic graph has
q_n, k_n [key_dim], v_n [value_dim] and scalar gates; every edge e has a state C_e of key_dim x
value_dim:

    C_e = sum over edges e' into n of T_n[e, e'] C_e' + S_n[e] k_n v_n^T        (n the start of e)
    y_n = q_n^T (sum over edges e' into n of M_n[e'] C_e' + D_n k_n v_n^T)

with Source, Transition, Mark and direct gates. In a chain one edge enters and one leaves a node, in
a grid those from the left and from above enter, those to the right and down leave. A rectangle of
n nodes with E edges in, as many out, is one matrix

    [ T  S ]  edges out           side E + n
    [ M  G ]  nodes               G: what a node sees of the others inside

and two rectangles A before B that share edges make one: with B[:, shared] A[shared, :] where rows
of B meet columns of A, a product of k = shared edges, nothing where rows of A meet columns of B,
and A and B as they are elsewhere. Doubling width and height in turn composes rectangles from nodes
in ceil(log2 width) + ceil(log2 height) products that wait for each other (`depth`); a pass in
topological order waits width + height - 1 times, the longest path of the graph (`line_graph`).

    parallel form (chunk = None)   one rectangle: y = (G * Q K^T) V, from no state
    chunkwise                      rectangles of chunk x chunk nodes (chains: chunk); states of
        key_dim x value_dim on the edges between them, from those given to those left, in the
        order of the grid (`block_edges`):
            starts  S * K, then with V        y = (G * Q K^T) V + sum over edges in of (M * Q) C

Einsums are products, gates and concatenations of their own, as in the authors' code. Lengths are
padded with nodes that hand their states on. Ignored: projections that make q, k, v and the gates,
norms, the several orientations of an undirected grid; gates that are matrices themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from hwmodels.dtypes import FP32, DType
from hwmodels.errors import InputError
from workloads.line_graph import DOWN, RIGHT, Traversal, grid_graph, traversal
from workloads.machine import Machine, Values
from workloads.numeric import (
    Condition,
    Num,
    any_true,
    ceil_div,
    ceil_log2,
    maximum,
    minimum,
    power_of_two,
    where,
)
from workloads.op import Arrays, Op, Stage
from workloads.ops.block_edges import BlockEdges
from workloads.ops.conv_layer import mapped, product
from workloads.ops.elementwise import Elementwise, add, mul
from workloads.ops.matmul import BatchedMatmul
from workloads.ops.staged import ProvedStagedOp

X, Y = "x", "y"


class Rectangle(NamedTuple):
    """Nodes composed so far."""

    width: Num
    height: Num
    above: Num
    """Edges into it from above: its width, 0 in a chain."""

    @property
    def side(self) -> Num:
        """Edges and nodes."""
        return self.height + self.above + self.width * self.height


class Inside(NamedTuple):
    """y = (G * Q K^T) V of every chunk."""

    scores: BatchedMatmul
    gate: Elementwise
    values: BatchedMatmul


class Between(NamedTuple):
    """States from S * K and V, along the edges, to (M * Q) C."""

    source: Elementwise
    starts: BatchedMatmul
    edges: BlockEdges
    mark: Elementwise
    carried: BatchedMatmul
    sum: Elementwise


class Merge(NamedTuple):
    """Rectangles of one size joined in pairs along an axis; `runs` is false where there are none
    to join."""

    axis: str
    level: int
    before: Rectangle
    after: Rectangle
    runs: Condition


@dataclass(frozen=True, kw_only=True)
class Plstm(ProvedStagedOp):
    """One layer over [batch, num_heads, height, width] nodes; a chain where height is None.

    >>> op = Plstm(width=16, height=16, key_dim=64)
    >>> op.depth(), op.longest_path(), op.traversal().depth
    (8, 31, 31)
    >>> Plstm(width=4096, key_dim=64, chunk=64).depth()     # 6 levels inside, 64 chunks in turn
    70
    """

    name: ClassVar[str] = "plstm"
    batch: Num = 1
    num_heads: Num = 1
    width: Num
    height: Num | None = None
    key_dim: Num
    value_dim: Num | None = None
    chunk: int | None = None
    dtype: DType = FP32

    def check(self) -> None:
        """Rectangles double."""
        if self.chunk is None:
            return
        if not isinstance(self.chunk, int) or self.chunk < 1 or self.chunk & (self.chunk - 1):
            raise InputError(
                f"{self.name}: chunk = {self.chunk} must be a power of two, composed by doubling; "
                "take one, lengths are padded to whole chunks"
            )

    # ---- sizes -------------------------------------------------------------------------------

    @property
    def streams(self) -> Num:
        """Heads of all sequences or images."""
        return self.batch * self.num_heads

    @property
    def values(self) -> Num:
        """Value channels: as many as key channels where not told."""
        return self.key_dim if self.value_dim is None else self.value_dim

    @property
    def rows(self) -> Num:
        """Height, 1 of a chain."""
        return 1 if self.height is None else self.height

    @property
    def block(self) -> Rectangle:
        """What the composition ends with: a chunk, or all nodes padded to powers of two."""
        if self.chunk is not None:
            return self._rectangle(self.chunk, 1 if self.height is None else self.chunk)
        wide, high = (power_of_two(ceil_log2(n)) for n in (self.width, self.rows))
        return self._rectangle(wide, high)

    def _rectangle(self, width: Num, height: Num) -> Rectangle:
        return Rectangle(width, height, 0 if self.height is None else width)

    @property
    def blocks_x(self) -> Num:
        """Chunks side by side."""
        return ceil_div(self.width, self.block.width)

    @property
    def blocks_y(self) -> Num:
        """Chunks one above the other."""
        return ceil_div(self.rows, self.block.height)

    @property
    def num_blocks(self) -> Num:
        """Chunks of all streams."""
        return self.streams * self.blocks_x * self.blocks_y

    def state_bytes(self) -> Num:
        """States that a pass in topological order holds: one of a chain, those of the shorter
        side and one more of a grid."""
        held = 1 if self.height is None else minimum(self.width, self.height) + 1
        return self.streams * held * self.key_dim * self.values * self.dtype.bytes_per_element

    def step(self) -> Plstm:
        """One node from the states on its edges."""
        return self.over(width=1, height=None if self.height is None else 1, chunk=1)

    # ---- depth -------------------------------------------------------------------------------

    def depth(self) -> Num:
        """Compositions that wait for each other, and chunks that do."""
        inside = ceil_log2(self.block.width) + ceil_log2(self.block.height)
        between = 0 if self.chunk is None else self.blocks_x + self.blocks_y - 1
        return inside + between

    def longest_path(self) -> Num:
        """Nodes that wait for each other in topological order."""
        return self.width + self.rows - 1

    def traversal(self) -> Traversal:
        """The graph's own counts, for one stream of scalar sizes."""
        return traversal(grid_graph(int(self.width), int(self.rows)))

    def compulsory_bytes(self) -> Num:
        """q, k, v, gates and y once; states that enter and leave the grid."""
        alone = (self.width * self.rows == 1) & (self.chunk is None)  # its direct gate will do
        gates = where(alone, 1, self._rectangle(1, 1).side ** 2)
        nodes = self.width * self.rows * (2 * self.key_dim + 2 * self.values + gates)
        border = self.rows + (0 if self.height is None else self.width)
        states = 0 if self.chunk is None else 2 * border * self.key_dim * self.values
        return self.streams * (nodes + states) * self.dtype.bytes_per_element

    # ---- stages ------------------------------------------------------------------------------

    def merges(self) -> Iterator[Merge]:
        """Width and height doubled in turn, as far as any of the sizes goes."""
        goal = self.block
        now = self._rectangle(1, 1)
        for level in range(int(np.max(ceil_log2(maximum(goal.width, goal.height))))):
            for axis, end in ((X, goal.width), (Y, goal.height)):
                runs = end > 2**level
                wide, high = (
                    where(runs & (axis == this), 2 * n, n) for this, n in ((X, now[0]), (Y, now[1]))
                )
                after = self._rectangle(wide, high)
                if any_true(runs):
                    yield Merge(axis, level, now, after, runs)
                now = after

    def kernels(self, merge: Merge) -> tuple[BatchedMatmul, Elementwise]:
        """The products of shared edges, and the concatenation of what they make."""
        old, new, goal = merge.before, merge.after, self.block
        pairs = goal.width * goal.height // (new.width * new.height)
        pairs = self.num_blocks * maximum(pairs, 1)
        joined = BatchedMatmul(
            batch=pairs, m=old.side, n=old.side, dtype=self.dtype,
            k=old.height if merge.axis == X else maximum(old.above, 1),
        )  # fmt: skip
        return joined, self._copy(pairs * new.side**2)

    def _copy(self, elements: Num) -> Elementwise:
        return Elementwise(num_elements=elements, vector_flops_per_element=0, dtype=self.dtype)

    def inside(self) -> Inside:
        """What a chunk's nodes see of each other."""
        n, count = self.block.width * self.block.height, self.num_blocks
        return Inside(
            scores=BatchedMatmul(batch=count, m=n, n=n, k=self.key_dim, dtype=self.dtype),
            gate=mul(count * n * n, self.dtype),
            values=BatchedMatmul(batch=count, m=n, n=self.values, k=n, dtype=self.dtype),
        )

    def between(self) -> Between:
        """What chunks hand to each other and see of what was handed to them."""
        goal, count, dtype = self.block, self.num_blocks, self.dtype
        edges, n = goal.height + goal.above, goal.width * goal.height
        marked = mul(count * n * edges * self.key_dim, dtype)
        return Between(
            source=marked,
            starts=BatchedMatmul(
                batch=count * edges, m=self.key_dim, n=self.values, k=n, dtype=dtype
            ),
            edges=BlockEdges(
                streams=self.streams, blocks_x=self.blocks_x, blocks_y=self.blocks_y,
                edges_left=goal.height, edges_above=None if self.height is None else goal.above,
                width=self.key_dim * self.values, dtype=dtype,
            ),
            mark=marked,
            carried=BatchedMatmul(
                batch=count, m=n, n=self.values, k=edges * self.key_dim, dtype=dtype
            ),
            sum=add(count * n * self.values, dtype),
        )  # fmt: skip

    def stages(self) -> tuple[Stage, ...]:
        """Composition, states between chunks, outputs."""
        found = []
        for merge in self.merges():
            joined, stack = self.kernels(merge)
            label, times = f"{merge.axis}{merge.level}", where(merge.runs, 1, 0)
            found += [Stage(f"compose_{label}", joined, times)]
            found += [Stage(f"stack_{label}", stack, times)]
        ops: dict[str, Op] = self.inside()._asdict()
        if self.chunk is not None:
            ops |= self.between()._asdict()
        return (*found, *(Stage(name, op) for name, op in ops.items()))

    # ---- the program -------------------------------------------------------------------------

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, k and v[streams, height, width, dim], gates [T S; M D] of every node, and states
        [streams, side, key_dim value_dim] that enter a chunkwise pass."""
        nodes = (self.streams, self.rows, self.width)
        edges = 1 if self.height is None else 2
        shapes: dict[str, tuple[Num, ...]] = {
            "q": (*nodes, self.key_dim), "k": (*nodes, self.key_dim), "v": (*nodes, self.values)
        }  # fmt: skip
        if self.chunk is not None:
            shapes |= {
                name: (self.streams, side, self.key_dim * self.values)
                for name, side in zip(("left", "above")[:edges], nodes[1:], strict=False)
            }
        made = {k: rng.standard_normal([int(n) for n in v]) for k, v in shapes.items()}
        shape = [int(n) for n in (*nodes, edges + 1, edges + 1)]
        return made | {"gates": rng.uniform(0, 1 / edges, shape)}

    def reference(self, inputs: Arrays) -> Arrays:
        """Node after node in topological order."""
        import networkx as nx

        q, k, v = (inputs[name] for name in ("q", "k", "v"))
        states = {RIGHT: self._border(inputs, "left", self.rows)}
        if self.height is not None:
            states[DOWN] = self._border(inputs, "above", self.width)
        y = np.zeros(v.shape)
        for row, col in nx.topological_sort(grid_graph(int(self.width), int(self.rows))):
            at = {RIGHT: row, DOWN: col}
            own = k[:, row, col, :, None] * v[:, row, col, None]
            entered = np.stack([*(held[:, at[d]] for d, held in states.items()), own], axis=1)
            left = np.einsum("sij,sjkv->sikv", inputs["gates"][:, row, col], entered)
            for i, (direction, held) in enumerate(states.items()):
                held[:, at[direction]] = left[:, i]
            y[:, row, col] = np.einsum("sk,skv->sv", q[:, row, col], left[:, -1])
        if self.chunk is None:
            return {"y": y}
        return {"y": y} | {d: held.reshape(*held.shape[:2], -1) for d, held in states.items()}

    def _border(self, inputs: Arrays, name: str, side: Num) -> Values:
        """States on the edges into one side of the grid, one of each row or column."""
        shape = (int(self.streams), int(side), int(self.key_dim), int(self.values))
        return inputs[name].reshape(shape).copy() if name in inputs else np.zeros(shape)

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Rectangles composed, states handed on, outputs read."""
        gates, nodes = self._composed(machine, inputs["gates"])
        edges = int(self.block.height + self.block.above)
        flat = {name: self._gathered(inputs[name], nodes) for name in ("q", "k", "v")}
        by_block = gates.reshape(-1, *gates.shape[3:])
        y = self._seen_inside(machine, by_block[:, edges:, edges:], flat)
        if self.chunk is None:
            return {"y": self._scattered(y, nodes)}
        entered, left = self._handed_on(machine, gates, flat, inputs)
        y = self._seen_before(machine, by_block[:, edges:, :edges], flat, entered, y)
        return {"y": self._scattered(y, nodes)} | left

    def _composed(self, mc: Machine, gates: Values) -> tuple[Values, Values]:
        """Matrices [streams, blocks_y, blocks_x, side, side] and the nodes of every block."""
        wide, high = (int(n) for n in (self.blocks_x * self.block.width, self._padded_rows()))
        before = np.zeros((len(gates), high, wide, *gates.shape[3:]))
        edges = np.arange(gates.shape[3] - 1)
        before[..., edges, edges] = 1.0  # padding hands every state straight on
        before[:, : gates.shape[1], : gates.shape[2]] = gates
        nodes = np.arange(high * wide).reshape(high, wide, 1)
        for merge in self.merges():
            joined, stack = self.kernels(merge)
            early, late = (_every_other(before, merge.axis, 1, start) for start in (0, 1))
            new = _stacked(mc, joined, merge, early, late)
            before = mapped(mc, stack, new)
            halves = [_every_other(nodes, merge.axis, 0, start) for start in (0, 1)]
            nodes = np.concatenate(halves, axis=2)
        return before, nodes

    def _padded_rows(self) -> Num:
        return self.blocks_y * self.block.height

    def _gathered(self, x: Values, nodes: Values) -> Values:
        """Rows of every block's nodes, [blocks, nodes, dim]; zeros where padded."""
        high, wide = int(self._padded_rows()), int(self.blocks_x * self.block.width)
        padded = np.pad(x, ((0, 0), (0, high - x.shape[1]), (0, wide - x.shape[2]), (0, 0)))
        flat = padded.reshape(len(x), high * wide, -1)
        return flat[:, nodes].reshape(-1, nodes.shape[2], x.shape[3])

    def _scattered(self, y: Values, nodes: Values) -> Values:
        """The inverse, without the padding."""
        high, wide = int(self._padded_rows()), int(self.blocks_x * self.block.width)
        flat = np.full((int(self.streams), high * wide, y.shape[-1]), np.nan)
        flat[:, nodes] = y.reshape(len(flat), *nodes.shape, -1)
        grid = flat.reshape(len(flat), high, wide, -1)
        return grid[:, : int(self.rows), : int(self.width)]

    def _seen_inside(self, mc: Machine, seen: Values, flat: dict[str, Values]) -> Values:
        """(G * Q K^T) V of every block."""
        ops = self.inside()
        scores = product(mc, ops.scores, flat["q"], flat["k"].swapaxes(1, 2))
        gated = mapped(mc, ops.gate, scores, seen)
        return product(mc, ops.values, gated, flat["v"])

    def _handed_on(
        self, mc: Machine, gates: Values, flat: dict[str, Values], inputs: Arrays
    ) -> tuple[Values, dict[str, Values]]:
        """States into every block, [blocks, edges, key_dim, value_dim], and out of the grid."""
        ops, (streams, rows, cols) = self.between(), gates.shape[:3]
        high, above = int(self.block.height), int(self.block.above)
        edges, dk, dv = high + above, int(self.key_dim), int(self.values)
        size = flat["k"].shape[1]
        source = gates[..., :edges, edges:].reshape(-1, edges, size, 1)
        keys = np.broadcast_to(flat["k"][:, None], (len(source), edges, size, dk))
        sourced = mapped(mc, ops.source, keys, source * np.ones(dk)).reshape(-1, size, dk)
        values = np.repeat(flat["v"], edges, axis=0)
        starts = product(mc, ops.starts, sourced.swapaxes(1, 2), values)
        given = {
            "t": gates[..., :edges, :edges],
            "starts": starts.reshape(streams, rows, cols, edges, dk * dv),
            "left": self._entering(inputs, "left", rows, high),
            "above": self._entering(inputs, "above", cols, above),
        }
        found = ops.edges.program(mc, given)
        right, down = found["right"], found["down"]
        entered = np.concatenate([right[:, :, :-1], down[:, :-1]], axis=3)
        left = {RIGHT: right[:, :, -1].reshape(streams, -1, dk * dv)[:, : int(self.rows)]}
        if self.height is not None:
            left[DOWN] = down[:, -1].reshape(streams, -1, dk * dv)[:, : int(self.width)]
        return entered.reshape(-1, edges, dk, dv), left

    def _entering(self, inputs: Arrays, name: str, blocks: int, edges: int) -> Values:
        """Given states by block; padded edges start from nothing."""
        width = int(self.key_dim * self.values)
        padded = np.zeros((int(self.streams), blocks * edges, width))
        if name in inputs:
            padded[:, : inputs[name].shape[1]] = inputs[name]
        return padded.reshape(len(padded), blocks, edges, width)

    def _seen_before(
        self, mc: Machine, marks: Values, flat: dict[str, Values], entered: Values, y: Values
    ) -> Values:
        """(M * Q) C beside what is seen inside."""
        ops, dk = self.between(), int(self.key_dim)
        queries = flat["q"][:, :, None] * np.ones((marks.shape[2], 1))
        marked = mapped(mc, ops.mark, queries, marks[..., None] * np.ones(dk))
        states = entered.reshape(len(entered), -1, entered.shape[3])
        carried = product(mc, ops.carried, marked.reshape(*marked.shape[:2], -1), states)
        return mapped(mc, ops.sum, carried, y)


def _every_other(x: Values, axis: str, first: int, start: int) -> Values:
    """Every second rectangle along an axis; rows of rectangles are axis `first`."""
    index = [slice(None)] * x.ndim
    index[first + (axis == X)] = slice(start, None, 2)
    return x[tuple(index)]


def _stacked(
    mc: Machine, joined: BatchedMatmul, merge: Merge, early: Values, late: Values
) -> Values:
    """Matrices of rectangles `early` and `late` as one."""
    high, above = int(merge.before.height), int(merge.before.above)
    side, new = int(merge.before.side), int(merge.after.side)
    shared = np.arange(side)[slice(high) if merge.axis == X else slice(high, high + above)]
    kept = np.setdiff1d(np.arange(side), shared)
    first, second = (_places(merge, late=late) for late in (False, True))
    pairs = (-1, side, len(shared)), (-1, len(shared), side)
    met = product(
        mc, joined, late[..., shared].reshape(pairs[0]), early[..., shared, :].reshape(pairs[1])
    )
    whole = np.zeros((*early.shape[:3], new, new))
    whole[..., second[:, None], first] = met.reshape(*early.shape[:3], side, side)
    whole[..., first[kept][:, None], first] = early[..., kept, :]
    whole[..., second[:, None], second[kept]] = late[..., kept]
    return whole


def _places(merge: Merge, *, late: bool) -> Values:
    """Where edges and nodes of the earlier or the later rectangle stand in the new one."""
    high, above = int(merge.before.height), int(merge.before.above)
    nodes = int(merge.before.width) * high
    flat, deep = (above, 0) if merge.axis == X else (0, high)
    edges = int(merge.after.height + merge.after.above)
    return np.concatenate([
        late * deep + np.arange(high),
        int(merge.after.height) + late * flat + np.arange(above),
        edges + late * nodes + np.arange(nodes),
    ])  # fmt: skip
