"""Combiner: full attention with most keys behind abstractions of the spans they lie in.

Ren et al. 2021 (arXiv 2107.05768, sections 3 and 4). Every query sees some keys directly and all
other earlier ones through spans that cover them. A span S has a pooled query q_S and key k_S
(maxima, section 4.2) and a summary, the attention of q_S over its own keys; one softmax is over the
direct keys and the spans,

    o = sum over direct j of p_j v_j + sum over spans S of p_S (sum over j in S of p(j | S) v_j)
    p_j ~ exp(q k_j),   p_S ~ exp(q k_S),   p(j | S) ~ exp(q_S k_j)

so every earlier key has a positive weight. Causal, with L tokens in pieces of `span`, S = L / span:

    pattern     direct            spans of a query                        pairs
    fixed       own piece         every earlier piece                     L (span + S) / 2 + L
    axial       own row           the rows above of every column          L (3 span + S) / 2
                                  (rows of `span` tokens)
    logsparse   own piece         dyadic runs of pieces: one for each     L (span / 2 + log2 S)
                                  one in the binary number of its piece,
                                  the shortest nearest

At span = sqrt(L), the default of the first two, these are O(L sqrt L); logsparse, default span 1,
O(L log L). Queries at one place of their pieces share one triangle over the pieces, so the causal
mask over spans is FlashAttention's own. Ignored: the paper's other mixtures of patterns; logsparse
runs one kernel for each number of spans a query has, where one over ragged lists would do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb
from typing import ClassVar, Final

import numpy as np

from hwmodels.dtypes import FP32
from hwmodels.errors import InputError
from workloads.machine import Machine, Values, slices
from workloads.numeric import (
    Num,
    any_true,
    floor_log2,
    maximum,
    power_of_two,
    where,
)
from workloads.op import Arrays, ProvedOp, Stage
from workloads.ops.block_pool import BlockPool
from workloads.ops.elementwise import Elementwise
from workloads.ops.shared_prefix import CombineParts
from workloads.ops.staged import Step
from workloads.ops.structured import StructuredAttention, attended

FIXED, AXIAL, LOGSPARSE = "fixed", "axial", "logsparse"
PATTERNS: Final = (FIXED, AXIAL, LOGSPARSE)


@dataclass(frozen=True, kw_only=True)
class Combiner(StructuredAttention):
    """Causal self-attention of `len_seq` tokens under one of the three patterns.

    >>> op = Combiner(num_heads=1, len_seq=4096, head_dim=64)
    >>> op.pieces_long, op.min_flops()[op.dtype] == 4 * 64 * (
    ...     4096 * 65 / 2 + 64 * (63 * 64 / 2) + 63 * 64)
    (64, True)
    """

    name: ClassVar[str] = "combiner"
    cheaper: ClassVar[tuple[str, ...]] = ("span",)
    pattern: str = FIXED
    span: Num | None = None

    def check(self) -> None:
        """A known pattern, whole pieces, dyadic runs of them."""
        if self.pattern not in PATTERNS:
            raise InputError(
                f"{self.name}: pattern = '{self.pattern}' must be one of {', '.join(PATTERNS)}"
            )
        self.must_divide("span", self.pieces_long, self.len_seq)
        if self.pattern == LOGSPARSE and any_true(power_of_two(self.levels) != self.num_pieces):
            raise InputError(
                f"{self.name}: logsparse needs a power of two of pieces, len_seq / span = "
                f"{self.num_pieces} is none; pad the sequence or change span"
            )

    @property
    def pieces_long(self) -> Num:
        """Tokens of a piece: `span`, else 1 (logsparse) or the power of two below sqrt(L)."""
        if self.span is not None:
            return self.span
        return 1 if self.single_tokens else power_of_two(floor_log2(self.len_seq) // 2)

    @property
    def single_tokens(self) -> bool:
        """Pieces of one token, as logsparse has them unless told otherwise."""
        return self.pattern == LOGSPARSE and self.span is None

    @property
    def num_pieces(self) -> Num:
        """Pieces of a sequence."""
        return self.len_seq // self.pieces_long

    @property
    def levels(self) -> Num:
        """Lengths of dyadic runs."""
        return floor_log2(self.num_pieces)

    # ---- kernels ---------------------------------------------------------------------------

    def local(self) -> ProvedOp:
        """Each piece's own triangle; a piece of one token is a list of one key."""
        count, length = self.streams * self.num_pieces, self.pieces_long
        if self.single_tokens:
            return self.single(count, 1)
        return self.pieces(count, length, length, causal=True)

    def merge(self) -> CombineParts:
        """Direct keys and spans, of all pieces but the first."""
        rows = self.streams * (self.num_pieces - 1) * self.pieces_long
        return CombineParts(rows=maximum(rows, 1), dim=self.head_dim, dtype=self.dtype)

    def _pool(self, length: Num, block: Num) -> BlockPool:
        return BlockPool(
            batch=self.streams, len_seq=length, dim=self.head_dim, block=block, kind="max",
            dtype=self.dtype,
        )  # fmt: skip

    def fixed_ops(self) -> dict[str, ProvedOp]:
        """Pooled queries and keys of a piece, its summary, queries over earlier pieces."""
        before, length = maximum(self.num_pieces - 1, 1), self.pieces_long
        return {
            "pool": self._pool(before * length, length),
            "summary": self.single(self.streams * before, length),
            "far": self.pieces(self.streams, before, before, causal=True, group=length),
        }

    def axial_ops(self) -> dict[str, ProvedOp]:
        """Running maxima down the columns, what lies above summed up, rows over columns."""
        above, width = maximum(self.num_pieces - 1, 1), self.pieces_long
        cells = self.streams * above * width
        return {
            "pool": Elementwise(num_elements=cells * self.head_dim, dtype=self.dtype),
            "summary": self.pieces(self.streams * width, above, above, causal=True),
            "far": self.pieces(self.streams * above, width, width),
        }

    def level_ops(self) -> Iterator[tuple[str, ProvedOp, Num]]:
        """Name, kernel and times of logsparse: level by level, then by number of spans."""
        levels, length = self.levels, self.pieces_long
        deepest = int(np.max(levels))
        for level in range(deepest):
            there = where(level < levels, 1, 0)
            runs = maximum(self.num_pieces // 2**level, 2)
            pool = self._pool(runs * length, length) if not level else self._pool(2 * runs, 2)
            yield f"pool_{level}", pool, 2 * there
            summary = self.single(self.streams * (runs // 2), length * 2**level)
            yield f"summary_{level}", summary, there
        for ones in range(1, deepest + 1):
            count = maximum(_choose(levels, ones), 1)
            yield f"far_{ones}", self._listed(count, ones), where(ones <= levels, 1, 0)

    def _listed(self, count: Num, ones: int) -> ProvedOp:
        """The queries of `count` pieces over that many spans each."""
        if self.single_tokens:
            return self.single(self.streams * count, ones)
        return self.pieces(self.streams * count, self.pieces_long, ones)

    def stages(self) -> tuple[Stage, ...]:
        """Direct keys; where there is more than one piece, spans and both put together."""
        several = where(self.num_pieces > 1, 1, 0)
        found = [Stage("local", self.local())]
        if self.pattern == LOGSPARSE:
            found += [Stage(name, op, times) for name, op, times in self.level_ops()]
        else:
            ops = self.fixed_ops() if self.pattern == FIXED else self.axial_ops()
            found += [Stage(n, op, several * (1 + (n == "pool"))) for n, op in ops.items()]
        return (*found, Stage("merge", self.merge(), several))

    # ---- truth and program -----------------------------------------------------------------

    def run(self, step: Step, inputs: Arrays, machine: Machine | None) -> Arrays:
        """Direct keys, spans, one softmax over both."""
        count, length = int(self.num_pieces), int(self.pieces_long)
        rows = {name: x.reshape(-1, count, length, x.shape[-1]) for name, x in inputs.items()}
        q = rows["q"]
        flat = [x.reshape(-1, length, x.shape[-1]) for x in rows.values()]
        o, lse = (x.reshape(*q.shape[:3], -1) for x in attended(step, self.local(), *flat))
        if count > 1:
            how = {FIXED: self._fixed, AXIAL: self._axial, LOGSPARSE: self._logsparse}
            far = how[self.pattern](step, rows, machine)
            pairs = zip((o[:, 1:], lse[:, 1:]), far, strict=True)
            parts, sums = (np.stack([x.reshape(-1, x.shape[-1]) for x in pair]) for pair in pairs)
            merged = step(self.merge(), {"parts": parts, "lse": sums})["o"]
            o = np.concatenate([o[:, :1], merged.reshape(q[:, 1:].shape)], axis=1)
        return {"o": o.reshape(inputs["q"].shape)}

    def _pooled(self, step: Step, pool: ProvedOp, rows: dict[str, Values]) -> list[Values]:
        """Pooled queries and keys [streams, blocks, d] of [streams, ..., d]."""
        flat = (rows[n].reshape(int(self.streams), -1, rows[n].shape[-1]) for n in ("q", "k"))
        return [step(pool, {"x": x})["y"] for x in flat]

    def _fixed(
        self, step: Step, rows: dict[str, Values], machine: Machine | None
    ) -> tuple[Values, Values]:
        ops, q = self.fixed_ops(), rows["q"]
        early = {name: x[:, :-1] for name, x in rows.items()}
        pooled_q, pooled_k = self._pooled(step, ops["pool"], early)
        summary = self._summaries(step, ops["summary"], pooled_q, early)
        later = q[:, 1:].swapaxes(1, 2)  # queries by their place in the piece
        o, lse = attended(step, ops["far"], later, pooled_k, summary)
        return o.swapaxes(1, 2), lse.swapaxes(1, 2)

    def _summaries(
        self, step: Step, op: ProvedOp, pooled: Values, rows: dict[str, Values]
    ) -> Values:
        """[streams, spans, d]: each pooled query over the keys of rows[streams, spans, keys, d]."""
        k, v = (rows[n].reshape(-1, *rows[n].shape[2:]) for n in ("k", "v"))
        return attended(step, op, pooled.reshape(-1, 1, k.shape[-1]), k, v)[0].reshape(pooled.shape)

    def _axial(
        self, step: Step, rows: dict[str, Values], machine: Machine | None
    ) -> tuple[Values, Values]:
        ops, q = self.axial_ops(), rows["q"]
        above = {name: x[:, :-1] for name, x in rows.items()}
        pooled = {n: self._running_max(above[n], machine) for n in ("q", "k")}
        down = [x.swapaxes(1, 2) for x in (pooled["q"], above["k"], above["v"])]
        flat = [x.reshape(-1, *x.shape[2:]) for x in down]
        summary = attended(step, ops["summary"], *flat)[0].reshape(down[0].shape).swapaxes(1, 2)
        across = [x.reshape(-1, *x.shape[2:]) for x in (q[:, 1:], pooled["k"], summary)]
        o, lse = attended(step, ops["far"], *across)
        return o.reshape(q[:, 1:].shape), lse.reshape(*q[:, 1:].shape[:3], 1)

    def _running_max(self, x: Values, machine: Machine | None) -> Values:
        """Maxima down axis 1: a kernel that keeps some columns and goes through the rows."""
        found = np.maximum.accumulate(x, axis=1)
        if machine is None:
            return found
        flat = x.swapaxes(0, 1).reshape(x.shape[1], -1)
        source, target = machine.place(flat, self.dtype), machine.empty(flat.shape, self.dtype)
        held = self.dtype.bytes_per_element + FP32.bytes_per_element
        with machine.kernel():
            for cols in slices(flat.shape[1], int(machine.fast_bytes // held)):
                with machine.scope():
                    best = machine.full((cols.stop - cols.start,), -np.inf, FP32)
                    for row in range(len(flat)):
                        with machine.scope():
                            tile = machine.load(source, (row, cols))
                            machine.vector(np.maximum(best.values, tile.values), into=best)
                        machine.store(best, target, (row, cols))
        result: Values = target.values.reshape(x.shape[1], x.shape[0], *x.shape[2:])
        return result.swapaxes(0, 1)

    def _logsparse(
        self, step: Step, rows: dict[str, Values], machine: Machine | None
    ) -> tuple[Values, Values]:
        ops = {name: op for name, op, _ in self.level_ops()}
        keys, values, pooled = [], [], {n: rows[n] for n in ("q", "k")}
        for level in range(int(self.levels)):
            both = self._pooled(step, ops[f"pool_{level}"], pooled)
            pooled = dict(zip(("q", "k"), both, strict=True))
            split = {
                n: x.reshape(len(x), len(both[0][0]), -1, x.shape[-1]) for n, x in rows.items()
            }
            left = {n: x[:, ::2] for n, x in split.items()}
            summary = self._summaries(step, ops[f"summary_{level}"], both[0][:, ::2], left)
            keys.append(both[1][:, ::2])
            values.append(summary)
        return self._over_runs(step, ops, rows["q"], keys, values)

    def _over_runs(
        self,
        step: Step,
        ops: dict[str, ProvedOp],
        q: Values,
        keys: list[Values],
        values: list[Values],
    ) -> tuple[Values, Values]:
        """Queries of every piece over the left siblings of the runs that it lies in."""
        o, lse = np.empty_like(q), np.empty((*q.shape[:3], 1))
        for ones in range(1, len(keys) + 1):
            pieces = [t for t in range(1, q.shape[1]) if t.bit_count() == ones]
            lists = [[(lv, t >> lv + 1) for lv in range(len(keys)) if t >> lv & 1] for t in pieces]
            k, v = (
                np.stack(
                    [np.stack([x[lv][:, i] for lv, i in own], axis=1) for own in lists], axis=1
                )
                for x in (keys, values)
            )
            picked = q[:, pieces]
            flat = [x.reshape(-1, *x.shape[2:]) for x in (picked, k, v)]
            parts = attended(step, ops[f"far_{ones}"], *flat)
            o[:, pieces] = parts[0].reshape(picked.shape)
            lse[:, pieces] = parts[1].reshape(*picked.shape[:3], 1)
        return o[:, 1:], lse[:, 1:]


def _choose(items: Num, count: int) -> Num:
    """Binomial coefficients, of arrays too.

    >>> _choose(4, 2), _choose(np.array([1.0, 4.0]), 2)
    (6, array([0., 6.]))
    """
    if isinstance(items, np.ndarray):
        return np.array([float(comb(int(n), count)) for n in items.flat]).reshape(items.shape)
    return comb(int(items), count)
