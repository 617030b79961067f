"""FlashAttention as published first (Dao et al. 2022, arXiv 2205.14135, algorithms 1 and 4).

The outer loop runs over blocks of `bc` keys, the inner one over blocks of `br` queries: K and V
are read once, but O and its statistics l and m (backward: dQ) go to slow memory and back for each
of the T_c = ceil(len_kv / bc) key blocks, where FlashAttention-2 exchanges the loops. Blocks are
the paper's for a fast memory of M elements,

    bc = ceil(M / 2 (d + dv)),  br = min(bc, d)              (2 (d + dv) = 4 d for d = dv)

less what does not fit beside fp32 scores, bc rounded down to a multiple of br. The paper counts
scores and accumulators outside M, as they lie in registers: `sram_bytes` states M apart from all
fast memory. Elements moved a head, besides 20 fp32 statistics a row (forward and backward):

    forward  2 N d + (1 + 3 T_c) N d,   backward  4 N d + (1 + 5 T_c) N d       (N = len_q = len_kv)

Lower bound: proposition 3 of the paper says that no exact algorithm moves o(N^2 d^2 / M) elements
for every M in [d, N d]; at M = N d that is the compulsory traffic, and no constant is proved for a
smaller one (nor by Saha and Ye 2024, see `flash_attention`), so the compulsory traffic is printed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np

from hwmodels.dtypes import FP32, DType
from workloads.machine import Machine, SlowArray, Tile, Values, slices
from workloads.numeric import Num, ceil_div, floor, maximum, minimum, sqrt, where
from workloads.op import Arrays, Stage, require_fit
from workloads.ops.attention import MASK_FLOPS, AttentionOp, Sizes, gradients
from workloads.ops.flash_attention import FP32_BYTES, FlashAttention2, transposed
from workloads.ops.flash_attention_backward import FlashAttention2Backward, key_sums
from workloads.ops.softmax import online_update
from workloads.ops.top_k import INDEX
from workloads.work import Work

KERNEL = "figure:fa1"
"""What the kernel models call it: as the published bars of the authors show it."""
EMPTY = (("o", 0.0), ("l", 0.0), ("m", -np.inf))
"""O and its statistics before the first key."""

Step: TypeAlias = tuple[int, Values | None]
"""One of the held key blocks, and what of it the rows see (None: all)."""


class Sums(NamedTuple):
    """Sums over the key blocks of one head.

    `rows`: query rows that meet a block. `loads`: query rows read, one read serving all blocks
    held together. `area`: scores computed. `masked`: those of them in blocks that are masked.
    `listed`: whole numbers read that tell which blocks meet.
    """

    rows: Num
    loads: Num
    area: Num
    masked: Num
    listed: Num = 0


class Visit(NamedTuple):
    """A query block, the steps it takes, and whether its sums start afresh, not read back."""

    rows: slice
    steps: list[Step]
    fresh: bool = False


class Panel(NamedTuple):
    """Key blocks held together, the query blocks that meet them, the part of the list read."""

    cols: list[slice]
    visits: list[Visit]
    listed: slice | None = None


@dataclass(frozen=True, kw_only=True)
class KeyOuterAttention(AttentionOp):
    """Both passes of an attention whose outer loop runs over keys, whichever blocks it visits.

    `clears`: what the inner loop adds to is cleared in slow memory first, by a kernel of its own;
    else a query block starts afresh at the first key block it meets.
    """

    clears: ClassVar[bool] = True

    @abstractmethod
    def sums(self, tiles: Mapping[str, Num]) -> Sums:
        """What `panels` adds up to."""

    @abstractmethod
    def panels(self, s: Sizes, tiles: Mapping[str, int]) -> Iterator[Panel]:
        """The order of the loops, the same for every head."""

    @abstractmethod
    def seen(self) -> Values:
        """Which keys each query sees: [len_q, len_kv]."""

    @property
    def row_bytes(self) -> Num:
        """Bytes of one query row in fast memory beside its scores."""
        d, dv, e = self.head_dim, self.value_dim, self.dtype.bytes_per_element
        return (d + dv) * e + 4 * FP32_BYTES

    @property
    def key_bytes(self) -> Num:
        """Bytes of one key and value in fast memory."""
        return (self.head_dim + self.value_dim) * self.dtype.bytes_per_element

    @property
    def score_bytes(self) -> int:
        """Bytes of fast memory a score takes."""
        return FP32_BYTES

    @property
    def streams(self) -> Num:
        """K and V heads in all."""
        return self.batch * self.kv_heads

    def stages(self) -> tuple[Stage, ...]:
        """Timed as the kernel of the same shape that the models know."""
        return (Stage("attend", FlashAttention2(**self.shape()), kernel=KERNEL),)

    def shape(self) -> dict[str, Any]:
        """The fields of `AttentionOp`."""
        return {
            "batch": self.batch, "num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads,
            "len_q": self.len_q, "len_kv": self.len_kv, "head_dim": self.head_dim,
            "head_dim_v": self.head_dim_v, "causal": self.causal, "dtype": self.dtype,
        }  # fmt: skip

    def compulsory_bytes(self) -> Num:
        """Q, K and V once; O, l and m once."""
        rows = self.batch * self.num_heads * self.len_q
        return super().compulsory_bytes() + 2 * FP32_BYTES * rows

    def counts(self, sums: Sums) -> Work:
        """With `Sums` over key blocks, per K and V head and G heads:

            reads   len_kv (d + dv) e + 4 listed + G loads ((d + dv) e + 8)
            writes  G (len_q + loads) (dv e + 8)          O, l and m are cleared first
                    (else len_q rows of O, l and m less are read and written)
            tensor  2 G area (d + dv)
            vector  G (4 area + 2 masked + (4 + 3 dv) rows),  special G (area + 2 rows)

        Per score: scale, maximum, subtract, sum, one exp; two more to mask. Per row and block: O
        times l, the update of maximum, sum and O, O over the new l.
        """
        d, dv, e = self.head_dim, self.value_dim, self.dtype.bytes_per_element
        heads, streams = self.batch * self.num_heads, self.streams
        state = dv * e + 2 * FP32_BYTES
        lists = streams * sums.listed * INDEX.bytes_per_element
        return Work(
            tensor_flops={self.dtype: 2 * heads * sums.area * (d + dv)},
            vector_flops=heads
            * (4 * sums.area + MASK_FLOPS * sums.masked + (4 + 3 * dv) * sums.rows),
            special_ops=heads * (sums.area + 2 * sums.rows),
            read_bytes=self.kv_elements() * e
            + lists
            + heads * (sums.loads * d * e + self._read_back(sums) * state),
            write_bytes=heads * (self.len_q * self.clears + sums.loads) * state,
            launches=1 + self.clears,
        )

    def work(self, fast_bytes: Num) -> Work:
        """The counts of the loops with the blocks that fit."""
        return self.counts(self.sums(self.tiling(fast_bytes)))

    def _read_back(self, sums: Sums) -> Num:
        """Rows whose sums are read, of `sums.loads`."""
        return sums.loads if self.clears else sums.loads - self.len_q

    def reference(self, inputs: Arrays) -> Arrays:
        """NumPy, whole matrices at a time: O, and the maximum m and sum l of each row."""
        p, total, top = self.exponentials(inputs)
        values = np.repeat(inputs["v"], self.sizes().group, axis=1)
        return {"o": p @ values / total, "l": total, "m": top}

    def exponentials(self, inputs: Arrays) -> tuple[Values, Values, Values]:
        """exp(S - m), l and m, naively."""
        s = self.sizes()
        keys = np.repeat(inputs["k"], s.group, axis=1)
        scores = inputs["q"] @ keys.swapaxes(-1, -2) * s.scale
        scores = np.where(self.seen(), scores, -np.inf)
        top = scores.max(axis=-1, keepdims=True)
        p = np.exp(scores - top)
        return p, p.sum(axis=-1, keepdims=True), top

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Clear O, l and m; then for each key block all query blocks that meet it."""
        s, tiles = self.sizes(), {k: int(v) for k, v in self.tiling(machine.fast_bytes).items()}
        a = self._placed(machine, s, inputs)
        lead = a["q"].values.shape[:3]
        a["o"] = machine.empty((*lead, s.dv), self.dtype)
        a["l"], a["m"] = machine.empty((*lead, 1), FP32), machine.empty((*lead, 1), FP32)
        if self.clears:
            with machine.kernel():
                for name, value in EMPTY:
                    _clear(machine, a[name], value)
        with machine.kernel():
            for place, panel in self._all_panels(s, tiles):
                with machine.scope():
                    self._list(machine, a, panel)
                    held = [_load(machine, a, ("k", "v"), (place, cols)) for cols in panel.cols]
                    for head, visit in _visits(s, panel):
                        with machine.scope():
                            self._rows(machine, s, (place, head, visit.rows), visit, held, a)
        return {n: a[n].values.reshape(s.batch, s.heads, s.len_q, -1) for n in ("o", "l", "m")}

    def _rows(
        self,
        mc: Machine,
        s: Sizes,
        index: tuple[int, int, slice],
        visit: Visit,
        held: list[list[Tile]],
        a: Mapping[str, SlowArray],
    ) -> None:
        """One query block against the key blocks held that it meets."""
        (query,) = _load(mc, a, ("q",), index)
        out, total, top = (_sums(mc, a[n], index, v, fresh=visit.fresh) for n, v in EMPTY)
        for block, seen in visit.steps:
            key, value = held[block]
            with mc.scope():
                scores = _scores(mc, s, query, key, seen, self.dtype)
                mc.vector(out.values * total.values, into=out)
                online_update(mc, scores, top, total, carried=out)
                mc.matmul(scores, value, self.dtype, into=out)
                inverse = mc.special(1 / total.values)
                mc.vector(out.values * inverse.values, into=out)
        for tile, name in ((out, "o"), (total, "l"), (top, "m")):
            mc.store(tile, a[name], index)

    def _placed(self, mc: Machine, s: Sizes, inputs: Arrays) -> dict[str, SlowArray]:
        """Inputs in slow memory: rows as [stream, head of it, position], keys as [stream, key]."""
        streams = s.batch * s.kv_heads
        a = {
            name: mc.place(
                inputs[name].reshape(streams, s.group, s.len_q, -1),
                FP32 if name in ("l", "m") else self.dtype,
            )
            for name in ("q", "o", "do", "l", "m")
            if name in inputs
        }
        a |= {n: mc.place(s.merge(inputs[n]), self.dtype) for n in ("k", "v")}
        if "lists" in inputs:
            a["lists"] = mc.place(inputs["lists"], INDEX)
        return a

    def _all_panels(self, s: Sizes, tiles: Mapping[str, int]) -> Iterator[tuple[int, Panel]]:
        for stream in range(s.batch * s.kv_heads):
            for panel in self.panels(s, tiles):
                yield stream, panel

    def _list(self, mc: Machine, a: Mapping[str, SlowArray], panel: Panel) -> None:
        if panel.listed is not None:
            mc.load(a["lists"], panel.listed)


@dataclass(frozen=True, kw_only=True)
class KeyOuterBackward(KeyOuterAttention):
    """dQ, dK and dV from dO, with P recomputed from Q, K and the statistics l and m."""

    @property
    def row_bytes(self) -> Num:
        """Q, dQ, O, dO, l, m, 1 / l and D, and the fp32 product dO * O that D sums."""
        d, dv, e = self.head_dim, self.value_dim, self.dtype.bytes_per_element
        return 2 * (d + dv) * e + FP32_BYTES * (4 + dv)

    @property
    def key_bytes(self) -> Num:
        """K, V, and fp32 dK, dV."""
        return (self.head_dim + self.value_dim) * (self.dtype.bytes_per_element + FP32_BYTES)

    @property
    def score_bytes(self) -> int:
        """fp32 P and dS."""
        return 2 * FP32_BYTES

    def stages(self) -> tuple[Stage, ...]:
        """Timed as the kernels of the same shape that the models know."""
        return (Stage("attend", FlashAttention2Backward(**self.shape()), kernel=KERNEL),)

    def compulsory_bytes(self) -> Num:
        """Q, K, V, O, dO, l and m once; dQ, dK and dV once."""
        elements = 2 * (self.query_elements() + self.kv_elements() + self.output_elements())
        rows = self.batch * self.num_heads * self.len_q
        return elements * self.dtype.bytes_per_element + 2 * FP32_BYTES * rows

    def min_flops(self) -> Mapping[DType, Num]:
        """Five products over the pairs the mask leaves: 2 pairs (3 head_dim + 2 head_dim_v)."""
        per_pair = 2 * (3 * self.head_dim + 2 * self.value_dim)
        return {self.dtype: self.batch * self.num_heads * self.num_pairs() * per_pair}

    def counts(self, sums: Sums) -> Work:
        """With `Sums` over key blocks, per K and V head and G heads:

            reads   len_kv (d + dv) e + 4 listed + G loads (2 (d + dv) e + 8)
            writes  len_kv (d + dv) e + G (len_q + loads) d e         dQ is cleared first
                    (else len_q rows of dQ less are read and written)
            tensor  2 G area (3 d + 2 dv)
            vector  G (6 area + 2 masked + 2 dv loads),  special G (area + loads)

        Per score: scale, subtract m, times 1 / l, subtract D, times P, scale, one exp; two more to
        mask. Per row read: D = rowsum(dO * O), one reciprocal.
        """
        d, dv, e = self.head_dim, self.value_dim, self.dtype.bytes_per_element
        heads, kv_bytes = self.batch * self.num_heads, self.kv_elements() * e
        lists = self.streams * sums.listed * INDEX.bytes_per_element
        per_load = (d + 2 * dv) * e + 2 * FP32_BYTES
        return Work(
            tensor_flops={self.dtype: 2 * heads * sums.area * (3 * d + 2 * dv)},
            vector_flops=heads * (6 * sums.area + MASK_FLOPS * sums.masked + 2 * dv * sums.loads),
            special_ops=heads * (sums.area + sums.loads),
            read_bytes=kv_bytes
            + lists
            + heads * (sums.loads * per_load + self._read_back(sums) * d * e),
            write_bytes=kv_bytes + heads * (self.len_q * self.clears + sums.loads) * d * e,
            launches=1 + self.clears,
        )

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, k, v and do at random; o, l and m as the forward pass leaves them."""
        forward = super().inputs(rng)
        left = super().reference(forward)
        return {**forward, **left, "do": rng.standard_normal(left["o"].shape)}

    def reference(self, inputs: Arrays) -> Arrays:
        """The chain rule on whole matrices."""
        p, total, _ = self.exponentials(inputs)
        return gradients(self.sizes(), inputs, p / total)

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Clear dQ; then for each key block all query blocks that meet it."""
        s, tiles = self.sizes(), {k: int(v) for k, v in self.tiling(machine.fast_bytes).items()}
        a = self._placed(machine, s, inputs)
        a["dq"] = machine.empty(a["q"].values.shape, self.dtype)
        a["dk"], a["dv"] = (machine.empty(a[n].values.shape, self.dtype) for n in ("k", "v"))
        if self.clears:
            with machine.kernel():
                _clear(machine, a["dq"], 0.0)
        with machine.kernel():
            for stream, panel in self._all_panels(s, tiles):
                with machine.scope():
                    self._panel(machine, s, stream, panel, a)
        return {
            "dq": a["dq"].values.reshape(s.batch, s.heads, s.len_q, s.d),
            "dk": a["dk"].values.reshape(s.batch, s.kv_heads, s.len_kv, s.d),
            "dv": a["dv"].values.reshape(s.batch, s.kv_heads, s.len_kv, s.dv),
        }

    def _panel(
        self, mc: Machine, s: Sizes, stream: int, panel: Panel, a: Mapping[str, SlowArray]
    ) -> None:
        self._list(mc, a, panel)
        held = []
        for cols in panel.cols:
            key, value = _load(mc, a, ("k", "v"), (stream, cols))
            held.append([key, value, mc.full(key.shape, 0.0), mc.full(value.shape, 0.0)])
        for head, visit in _visits(s, panel):
            with mc.scope():
                self._rows(mc, s, (stream, head, visit.rows), visit, held, a)
        for cols, (_, _, dk, dv) in zip(panel.cols, held, strict=True):
            mc.store(dk, a["dk"], (stream, cols))
            mc.store(dv, a["dv"], (stream, cols))

    def _rows(
        self,
        mc: Machine,
        s: Sizes,
        index: tuple[int, int, slice],
        visit: Visit,
        held: list[list[Tile]],
        a: Mapping[str, SlowArray],
    ) -> None:
        query, out, dout, total, top = _load(mc, a, ("q", "o", "do", "l", "m"), index)
        dq = _sums(mc, a["dq"], index, 0.0, fresh=visit.fresh)
        inverse = mc.special(1 / total.values)
        product = mc.vector(dout.values * out.values)
        delta = mc.reduce("sum", product)
        mc.free(product)
        for block, seen in visit.steps:
            key, value, dk, dv = held[block]
            with mc.scope():
                p = _scores(mc, s, query, key, seen, self.dtype)
                mc.vector(p.values - top.values, into=p)
                mc.special(np.exp(p.values), into=p)
                mc.vector(p.values * inverse.values, into=p)
                with transposed(p):
                    mc.matmul(p, dout, self.dtype, into=dv)
                with transposed(value):
                    ds = mc.matmul(dout, value, self.dtype)
                mc.vector(ds.values - delta.values, into=ds)
                mc.vector(ds.values * p.values, into=ds)
                mc.vector(ds.values * s.scale, into=ds)
                mc.matmul(ds, key, self.dtype, into=dq)
                with transposed(ds):
                    mc.matmul(ds, query, self.dtype, into=dk)
        mc.store(dq, a["dq"], index)


@dataclass(frozen=True, kw_only=True)
class _Dense(KeyOuterAttention):
    """The blocks of algorithms 1 and 4; under a causal mask those in the future are skipped."""

    cheaper: ClassVar[tuple[str, ...]] = ("sram_bytes",)
    sram_bytes: Num | None = None

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Queries `br` and keys `bc` of a block."""
        require_fit(self.name, fast_bytes, self._tile_bytes(1, 1), "one query and one key")
        memory = fast_bytes if self.sram_bytes is None else self.sram_bytes
        cap = maximum(ceil_div(floor(memory / self.dtype.bytes_per_element), self._four_d), 1)
        # The largest square: score br^2 + (row + key) br <= fast.
        linear, score = self.row_bytes + self.key_bytes, self.score_bytes
        side = floor((sqrt(linear**2 + 4 * score * fast_bytes) - linear) / (2 * score))
        br = minimum(minimum(cap, self.head_dim), minimum(maximum(side, 1), self.len_q))
        fits = floor((fast_bytes - br * self.row_bytes) / (self.key_bytes + score * br))
        bc = minimum(cap, fits)
        bc = where(bc >= self.len_keys, self.len_keys, maximum(bc // br, 1) * br)
        return {"br": br, "bc": bc}

    @property
    def _four_d(self) -> Num:
        return 2 * (self.head_dim + self.value_dim)

    def _tile_bytes(self, br: Num, bc: Num) -> Num:
        return br * self.row_bytes + bc * (self.key_bytes + br * self.score_bytes)

    def sums(self, tiles: Mapping[str, Num]) -> Sums:
        """Closed forms of the loops of `panels`."""
        found = key_sums(self, tiles["br"], tiles["bc"])
        return Sums(found.rows, found.rows, found.area, found.masked)

    def panels(self, s: Sizes, tiles: Mapping[str, int]) -> Iterator[Panel]:
        """Key block after key block; queries from the diagonal on where causal."""
        br, off = tiles["br"], s.len_kv - s.len_q
        for cols in slices(s.len_kv, tiles["bc"]):
            first = max(cols.start - off, 0) // br * br if self.causal else 0
            visits = []
            for start in range(first, s.len_q, br):
                rows = slice(start, min(start + br, s.len_q))
                crossed = self.causal and cols.stop - 1 > start + off
                seen = np.arange(cols.start, cols.stop) <= np.arange(s.len_q)[rows, None] + off
                visits.append(Visit(rows, [(0, seen if crossed else None)]))
            yield Panel([cols], visits)

    def seen(self) -> Values:
        """All keys, or those of the causal mask."""
        s = self.sizes()
        shape = (s.len_q, s.len_kv)
        return (
            np.tri(*shape, s.len_kv - s.len_q, dtype=bool) if self.causal else np.ones(shape, bool)
        )


@dataclass(frozen=True, kw_only=True)
class FlashAttention1(_Dense):
    """Forward pass, algorithm 1: O, and the maximum m and sum l of each row in fp32.

    O, l and m are cleared by a kernel of their own; the running maximum is joined before the
    exponentials, which spares the paper's second factor exp(m~ - m'). Ignored: dropout.

    >>> op = FlashAttention1(num_heads=16, len_q=1024, head_dim=64, sram_bytes=192 * 1024)
    >>> op.tiling(2**20)                                       # ceil(98304 / (4 64)) keys
    {'br': 64, 'bc': 384}
    >>> elements = 16 * 1024 * 64 * (2 + 1 + 3 * 3)            # T_c = 3
    >>> op.work(2**20).bytes == 2 * elements + 16 * 1024 * 4 * (2 + 4 * 3)
    True
    """

    name: ClassVar[str] = "flash_attention"


@dataclass(frozen=True, kw_only=True)
class FlashAttention1Backward(KeyOuterBackward, _Dense):
    """Backward pass, algorithm 4: dK and dV stay on chip, dQ comes and goes with each key block.

    D = rowsum(dO * O) is computed again for every key block, as there. Ignored: dropout.

    >>> op = FlashAttention1Backward(num_heads=16, len_q=1024, head_dim=64, sram_bytes=192 * 1024)
    >>> elements = 16 * 1024 * 64 * (4 + 1 + 5 * 3)
    >>> op.work(2**20).bytes == 2 * elements + 16 * 1024 * 4 * 2 * 3
    True
    """

    name: ClassVar[str] = "flash_attention_backward"


# ---- the programs' parts -------------------------------------------------------------------


def _visits(s: Sizes, panel: Panel) -> Iterator[tuple[int, Visit]]:
    for head in range(s.group):
        for visit in panel.visits:
            yield head, visit


def _load(
    mc: Machine, a: Mapping[str, SlowArray], names: tuple[str, ...], index: tuple[int | slice, ...]
) -> list[Tile]:
    return [mc.load(a[name], index) for name in names]


def _sums(
    mc: Machine, array: SlowArray, index: tuple[int, int, slice], empty: float, *, fresh: bool
) -> Tile:
    """Sums so far: read back, or where they start afresh empty."""
    if not fresh:
        return mc.load(array, index)
    return mc.full(array.values[index].shape, empty, array.dtype)


def _scores(
    mc: Machine, s: Sizes, query: Tile, key: Tile, seen: Values | None, dtype: DType
) -> Tile:
    """Scaled scores of a block, what is not seen at minus infinity."""
    with transposed(key):
        scores = mc.matmul(query, key, dtype)
    mc.vector(scores.values * s.scale, into=scores)
    if seen is not None:
        mc.vector(np.where(seen, scores.values, -np.inf), per_element=MASK_FLOPS, into=scores)
    return scores


def _clear(mc: Machine, array: SlowArray, value: float) -> None:
    """Fill an array [streams, heads, rows, w] in slow memory."""
    per_row = array.values.shape[-1] * array.dtype.bytes_per_element
    streams, heads, size, width = array.values.shape
    for stream in range(streams):
        for head in range(heads):
            for rows in slices(size, max(int(mc.fast_bytes // per_row), 1)):
                with mc.scope():
                    tile = mc.full((rows.stop - rows.start, width), value, array.dtype)
                    mc.store(tile, array, (stream, head, rows))
