"""Attention over a cache of heavy hitters and recent tokens: H2O.

Zhang et al. 2023 (arXiv 2306.14048, section 4.2, algorithm 1). Of N tokens a cache keeps
k = `budget_frac` N: the most recent ones, and those whose attention probabilities, added up over
all queries so far, are largest. Each new token's K and V take the slot of the least of these:

    decode    S = q K^T, P = softmax(S), o = P V over k rows      unfused: P must be in memory
              acc += P (summed over the query heads of a list);   evict argmin acc
    prefill   the same over all N rows, causal; acc = column sums of P; keep the top k - recent

    score flops   G k (sum over a list's G heads) + k (add) + k_heavy (compare) a list and token
    cache         2 k d e + 4 k bytes a list instead of 2 N d e

Lists belong to K and V heads. The mechanism needs P, which fused attention never writes: a step
moves 4 G k e + 8 k bytes a list more than one that reads K and V alone, a prompt 5 G N^2 e.

Ignored: writing the new K and V into the freed slot; that a recent token leaving the window joins
the candidates without moving (a ring of slots).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, SlowArray, Values, slices
from workloads.numeric import Num, any_true, ceil_div, floor, maximum, minimum
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.attention import StandardAttention, probabilities
from workloads.ops.block_pool import BlockPool
from workloads.ops.elementwise import Elementwise, cast
from workloads.ops.row_map import RowMap
from workloads.ops.staged import ProvedStagedOp
from workloads.ops.top_k import INDEX, TopK
from workloads.work import Work

SCORE: DType = FP32
"""Format of an accumulated score."""


@dataclass(frozen=True, kw_only=True)
class EvictLeast(ProvedOp):
    """acc[rows, cols] += sum over `group` of P[rows, group, cols]; the least of the first ones.

    Writes acc, and for each row the index of the least among its first `num_candidates` columns.

    >>> EvictLeast(rows=4, cols=100, num_candidates=50).work(2**16).vector_flops
    1000
    """

    name: ClassVar[str] = "evict_least"
    rows: Num
    cols: Num
    num_candidates: Num
    group: Num = 1
    dtype: DType = BF16

    def check(self) -> None:
        """Candidates are columns."""
        if any_true(self.num_candidates > self.cols):
            raise InputError(
                f"{self.name}: num_candidates = {self.num_candidates} is more than "
                f"cols = {self.cols}"
            )

    def stages(self) -> tuple[Stage, ...]:
        """A kernel that gives rows to thread blocks; the index is one more column."""
        inputs = self.group + ceil_div(SCORE.bytes_per_element, self.dtype.bytes_per_element)
        kernel = RowMap(
            rows=self.rows, cols=self.cols + 1, num_inputs=inputs, dtype=self.dtype,
            out_dtype=SCORE, vector_flops_per_element=self.group + 2,
        )  # fmt: skip
        return (Stage("evict", kernel),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Columns held together: their probabilities, sum and score, beside the least so far."""
        kept = SCORE.bytes_per_element + INDEX.bytes_per_element
        column = self.group * self.dtype.bytes_per_element + 2 * SCORE.bytes_per_element
        require_fit(self.name, fast_bytes, column + kept, "one column and the least so far")
        return {"chunk": minimum(self.cols, floor((fast_bytes - kept) / column))}

    def work(self, fast_bytes: Num) -> Work:
        """Every array once."""
        self.tiling(fast_bytes)
        scores = self.rows * self.cols * SCORE.bytes_per_element
        return Work(
            vector_flops=self.rows * ((self.group + 1) * self.cols + self.num_candidates),
            read_bytes=self.rows * self.group * self.cols * self.dtype.bytes_per_element + scores,
            write_bytes=scores + self.rows * INDEX.bytes_per_element,
        )

    def compulsory_bytes(self) -> Num:
        """Nothing moves twice."""
        p = self.rows * self.group * self.cols * self.dtype.bytes_per_element
        both = 2 * self.cols * SCORE.bytes_per_element + INDEX.bytes_per_element
        return p + self.rows * both

    def min_flops(self) -> Mapping[DType, Num]:
        """No products."""
        return {}

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random probabilities and scores."""
        rows, group, cols = int(self.rows), int(self.group), int(self.cols)
        return {"p": rng.random((rows, group, cols)), "acc": rng.random((rows, cols))}

    def reference(self, inputs: Arrays) -> Arrays:
        """NumPy."""
        acc = inputs["acc"] + inputs["p"].sum(axis=1)
        least = acc[:, : int(self.num_candidates)].argmin(axis=1)
        return {"acc": acc, "evict": least.astype(np.float64)[:, None]}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel, row by row."""
        p, acc = machine.place(inputs["p"], self.dtype), machine.place(inputs["acc"], SCORE)
        evict = machine.empty((int(self.rows), 1), INDEX)
        self.run(machine, p, acc, evict)
        return {"acc": acc.values, "evict": evict.values}

    def run(self, machine: Machine, p: SlowArray, acc: SlowArray, evict: SlowArray) -> None:
        """P[rows, group, cols] into acc[rows, cols]; evict[rows, 1]; all in slow memory."""
        chunk = int(self.tiling(machine.fast_bytes)["chunk"])
        with machine.kernel():
            for row in range(int(self.rows)):
                with machine.scope():
                    least, index = machine.full((1,), np.inf), machine.full((1,), 0.0, INDEX)
                    for part in slices(int(self.cols), chunk):
                        with machine.scope():
                            added = machine.reduce("sum", machine.load(p, (row, ..., part)), axis=0)
                            score = machine.load(acc, (row, part))
                            machine.vector(score.values + added.values[0], into=score)
                            machine.store(score, acc, (row, part))
                            tried = score.values[: max(int(self.num_candidates) - part.start, 0)]
                            machine.count(vector=tried.size)
                            if tried.size and tried.min() < least.values[0]:
                                least.values[0] = tried.min()
                                index.values[0] = part.start + tried.argmin()
                    machine.store(index, evict, row)


@dataclass(frozen=True, kw_only=True)
class HeavyHitterCache(ProvedStagedOp):
    """The kept tokens, whatever the phase. Sizes in positions, heads and elements.

    Of `len_kv` tokens ceil(budget_frac len_kv) are kept, at least one; `recent_frac` of them are
    the most recent ones, the others (at least one) heavy hitters.
    """

    cheaper: ClassVar[tuple[str, ...]] = ("num_kv_heads",)
    batch: Num = 1
    num_heads: Num
    num_kv_heads: Num | None = None
    len_kv: Num
    head_dim: Num
    budget_frac: Num = 0.2
    recent_frac: Num = 0.5
    dtype: DType = BF16

    def check(self) -> None:
        """Heads that divide."""
        if any_true(self.num_heads % self.kv_heads != 0):
            raise InputError(
                f"{self.name}: num_kv_heads = {self.num_kv_heads} must divide "
                f"num_heads = {self.num_heads}"
            )

    @property
    def kv_heads(self) -> Num:
        """`num_kv_heads`, else `num_heads`."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def num_lists(self) -> Num:
        """Lists of kept tokens: one a sequence and K and V head."""
        return self.batch * self.kv_heads

    @property
    def len_kept(self) -> Num:
        """Tokens of a list."""
        return maximum(-floor(1e-9 - self.budget_frac * self.len_kv), 1)

    @property
    def num_heavy(self) -> Num:
        """Kept for their scores, and candidates for eviction."""
        return maximum(self.len_kept - floor(self.recent_frac * self.len_kept + 1e-9), 1)

    @property
    def num_recent(self) -> Num:
        """Kept for being recent; may be none."""
        return self.len_kept - self.num_heavy

    def cache_bytes(self) -> Num:
        """Kept keys and values with their scores, of one layer."""
        row = 2 * self.head_dim * self.dtype.bytes_per_element + SCORE.bytes_per_element
        return self.num_lists * self.len_kept * row

    def full_cache_bytes(self) -> Num:
        """All keys and values, of one layer."""
        row = 2 * self.head_dim * self.dtype.bytes_per_element
        return self.num_lists * self.len_kv * row

    def _attention(self, len_q: Num, len_kv: Num) -> StandardAttention:
        return StandardAttention(
            batch=self.batch, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads,
            len_q=len_q, len_kv=len_kv, head_dim=self.head_dim, causal=True, dtype=self.dtype,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HeavyHitterDecode(HeavyHitterCache):
    """One new token over the kept rows of a sequence of `len_kv` tokens, itself among them.

    Slots of heavy hitters come first. Returns o, the scores and the slot that falls free.

    >>> op = HeavyHitterDecode(num_heads=32, len_kv=1000, head_dim=128)
    >>> op.len_kept, op.num_heavy, op.full_cache_bytes() / op.cache_bytes()
    (200, 100, 4.961240310077519)
    """

    name: ClassVar[str] = "heavy_hitter_decode"

    def attention(self) -> StandardAttention:
        """Over the kept rows, P in slow memory; one query sees them all."""
        return self._attention(1, self.len_kept).over(causal=False)

    def evict(self) -> EvictLeast:
        """The kernel that adds up scores and finds the least."""
        return EvictLeast(
            rows=self.num_lists, cols=self.len_kept, num_candidates=self.num_heavy,
            group=self.num_heads // self.kv_heads, dtype=self.dtype,
        )  # fmt: skip

    def stages(self) -> tuple[Stage, ...]:
        """Unfused attention, then the scores."""
        return Stage("attend", self.attention()), Stage("evict", self.evict())

    def compulsory_bytes(self) -> Num:
        """q, o, the kept rows, their scores there and back, the freed slots."""
        lists = self.num_lists * (self.len_kept * SCORE.bytes_per_element + INDEX.bytes_per_element)
        return self.attention().compulsory_bytes() + self.cache_bytes() - self._rows() + lists

    def _rows(self) -> Num:
        """Bytes of the kept keys and values alone."""
        return self.cache_bytes() - self.num_lists * self.len_kept * SCORE.bytes_per_element

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, the kept k and v, and their scores so far."""
        acc = rng.random((int(self.num_lists), int(self.len_kept)))
        return dict(self.attention().inputs(rng)) | {"acc": acc}

    def reference(self, inputs: Arrays) -> Arrays:
        """NumPy."""
        attention = self.attention()
        p = attention.sizes().pack(probabilities(attention, inputs)[0])
        found = self.evict().reference({"p": p, "acc": inputs["acc"]})
        return dict(attention.reference(inputs)) | dict(found)

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Attention leaves P in slow memory for the scores."""
        attention, evict = self.attention(), self.evict()
        o, p = attention.run(machine, inputs)
        acc = machine.place(inputs["acc"], SCORE)
        slot = machine.empty((int(self.num_lists), 1), INDEX)
        evict.run(machine, p, acc, slot)
        o_values = attention.sizes().unpack(o.values)
        return {"o": o_values, "acc": acc.values, "evict": slot.values}


@dataclass(frozen=True, kw_only=True)
class HeavyHitterPrefill(HeavyHitterCache):
    """Causal attention over a prompt of `len_kv` tokens, and the rows that it leaves in the cache.

    >>> op = HeavyHitterPrefill(num_heads=32, len_kv=512, head_dim=128)
    >>> [stage.name for stage in op.stages()]
    ['attend', 'scores', 'heavy', 'keep']
    """

    name: ClassVar[str] = "heavy_hitter_prefill"

    def attention(self) -> StandardAttention:
        """Over the whole prompt, P in slow memory."""
        return self._attention(self.len_kv, self.len_kv)

    def scores(self) -> BlockPool:
        """Column sums of P over the queries of a list."""
        rows = self.num_heads // self.kv_heads * self.len_kv
        return BlockPool(
            batch=self.num_lists, len_seq=rows, dim=self.len_kv, block=rows, dtype=self.dtype,
            out_dtype=SCORE, kind="sum",
        )  # fmt: skip

    def heavy(self) -> TopK:
        """The heavy hitters among what is not recent."""
        cols = self.len_kv - self.num_recent
        return TopK(rows=self.num_lists, cols=cols, k=self.num_heavy, dtype=SCORE)

    def keep(self) -> Elementwise:
        """The copy of kept keys and values into the cache."""
        elements = self.num_lists * self.len_kept * 2 * self.head_dim
        return cast(elements, self.dtype, self.dtype)

    def stages(self) -> tuple[Stage, ...]:
        """Unfused attention, scores, selection, copy."""
        return (
            Stage("attend", self.attention()), Stage("scores", self.scores()),
            Stage("heavy", self.heavy()), Stage("keep", self.keep()),
        )  # fmt: skip

    def compulsory_bytes(self) -> Num:
        """Q, K, V and O, and the kept rows with their scores."""
        return self.attention().compulsory_bytes() + self.cache_bytes()

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, k and v of the prompt."""
        return self.attention().inputs(rng)

    def _kept(self, chosen: Values, rows: Values) -> Values:
        """Of rows [lists, len_kv, ...] the chosen ones, then the recent ones."""
        start = int(self.len_kv) - int(self.num_recent)
        heavy = np.take_along_axis(rows, chosen.astype(np.int64)[..., None], axis=1)
        return np.concatenate([heavy, rows[:, start:]], axis=1)

    def reference(self, inputs: Arrays) -> Arrays:
        """NumPy."""
        attention = self.attention()
        s = attention.sizes()
        acc = s.pack(probabilities(attention, inputs)[0]).sum(axis=1)
        chosen = self.heavy().reference({"x": acc[:, : int(self.heavy().cols)]})["index"]
        kept = {n: self._kept(chosen, s.merge(inputs[n])) for n in ("k", "v")}
        return dict(attention.reference(inputs)) | {"index": chosen, "acc": acc} | kept

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Attention, column sums, the largest of them, a copy of their rows."""
        attention, scores, heavy = self.attention(), self.scores(), self.heavy()
        s = attention.sizes()
        o, p = attention.run(machine, inputs)
        acc = machine.empty((int(self.num_lists), 1, int(self.len_kv)), SCORE)
        scores.run(machine, p, acc)
        index = machine.empty((int(heavy.rows), int(heavy.k)), INDEX)
        candidates = SlowArray(acc.values[:, 0, : int(heavy.cols)], SCORE)
        heavy.run(machine, candidates, index)
        rows = np.stack([self._kept(index.values, s.merge(inputs[n])) for n in ("k", "v")])
        copied = self.keep().program(machine, {"x0": rows.ravel()})["y0"].reshape(rows.shape)
        o_values = s.unpack(o.values)
        return {
            "o": o_values, "index": index.values, "acc": acc.values[:, 0],
            "k": copied[0], "v": copied[1],
        }  # fmt: skip
