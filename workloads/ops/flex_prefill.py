"""A prompt's attention over the blocks of keys that hold a share of its mass: FlexPrefill.

Lai et al. 2025 (arXiv 2502.20766). Every head first looks at the true probabilities of
its last block of `block` queries (the probe). They tell, against pooled scores (Jensen-Shannon
divergence), which pattern the head takes, and with N keys, n = N / block blocks:

    probe            2 block N d flops a head, softmax, mean over the queries, means over blocks
    pooled           means of Q and K over blocks, n x n scores, softmax, best blocks of each row
    vertical_slash   the best columns of the probe and the best diagonals, for all blocks of queries
    attend           2 block L 2 d flops a list of L = num_kept block keys

The paper keeps the fewest blocks that hold a share gamma of the mass, at least 1024 keys; how many
these are depends on the data: `kept_frac` of the blocks a query sees, a list of mean length for
every block of queries. Taken as a top-k of that number. `causal`: the mean is over (n + 1) / 2
visible blocks. Ignored: the divergence (3 n logarithms a head), masks inside blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from hwmodels.errors import InputError
from workloads.machine import Machine, Values
from workloads.numeric import Num, any_true, ceil_div, floor, maximum, minimum
from workloads.op import Arrays, ProvedOp, Stage
from workloads.ops.block_pool import BlockPool
from workloads.ops.key_scores import KeyScores
from workloads.ops.selected_attention import SelectedAttention
from workloads.ops.selection import SparseOp, rounded
from workloads.ops.softmax import Softmax
from workloads.ops.staged import Step
from workloads.ops.top_k import TopK

POOLED, VERTICAL_SLASH = "pooled", "vertical_slash"
PATTERNS: Final = (POOLED, VERTICAL_SLASH)


@dataclass(frozen=True, kw_only=True)
class FlexPrefillAttention(SparseOp):
    """`len_q` queries over the blocks kept of len_kv keys (else the same); lists of query heads.

    `kept_frac` is the share of the visible blocks that gamma leaves. The default is no figure of
    the paper, which gives none: it is what a speedup of four in flops corresponds to.

    >>> op = FlexPrefillAttention(num_heads=32, num_kv_heads=8, len_q=2**17, head_dim=128)
    >>> op.num_kept, op.num_blocks      # a quarter of (1024 + 1) / 2 blocks
    (128, 1024)
    """

    name: ClassVar[str] = "flex_prefill_attention"
    cheaper: ClassVar[tuple[str, ...]] = ("num_kv_heads", "block")
    len_q: Num
    len_kv: Num | None = None
    kept_frac: Num = 0.25
    len_least: Num = 1024
    block: Num = 128
    pattern: str = POOLED
    causal: bool = True

    def check(self) -> None:
        """A known pattern, whole blocks, causal queries that see a key."""
        super().check()
        if self.pattern not in PATTERNS:
            raise InputError(f"{self.name}: pattern = '{self.pattern}' must be one of {PATTERNS}")
        if any_true(self.len_q % self.queries_per_list != 0):
            raise InputError(f"{self.name}: block = {self.block} must divide len_q = {self.len_q}")
        if any_true(self.len_keys < self.len_q):
            raise InputError(
                f"{self.name}: len_kv = {self.len_kv} is less than len_q = {self.len_q}; leave it "
                f"out to make it follow len_q"
            )

    @property
    def len_keys(self) -> Num:
        """`len_kv`, else `len_q`."""
        return self.len_q if self.len_kv is None else self.len_kv

    @property
    def queries_per_list(self) -> Num:
        """`block`, no more than there are queries."""
        return minimum(self.block, self.len_q)

    @property
    def num_query_blocks(self) -> Num:
        """Blocks of queries of a sequence."""
        return self.len_q // self.queries_per_list

    @property
    def num_blocks(self) -> Num:
        """Whole blocks of keys."""
        return self.len_keys // self.queries_per_list

    @property
    def mean_visible(self) -> Num:
        """Blocks of keys that a block of queries sees on average."""
        if not self.causal:
            return self.num_blocks
        return self.num_blocks - (self.num_query_blocks - 1) / 2

    @property
    def num_kept(self) -> Num:
        """Blocks of a list; halves of it are columns and diagonals in the other pattern."""
        least = ceil_div(self.len_least, self.queries_per_list)
        kept = maximum(rounded(self.kept_frac * self.mean_visible), least)
        kept = minimum(kept, maximum(floor(self.mean_visible), 1))
        if self.pattern == VERTICAL_SLASH:
            return minimum(2 * ceil_div(kept, 2), self.num_blocks)
        return kept

    @property
    def num_columns(self) -> Num:
        """Blocks of a list that are columns."""
        return ceil_div(self.num_kept, 2)

    @property
    def num_diagonals(self) -> Num:
        """Blocks of a list that are diagonals; one is looked for even where none is left."""
        return maximum(self.num_kept - self.num_columns, 1)

    def compulsory_bytes(self) -> Num:
        """Q, O, its logsumexp, and each list's keys and values once."""
        attend = self.attend()
        return attend.compulsory_bytes() - attend.num_lists * attend.index_bytes()

    def _pool(self, batch: Num, length: Num, dim: Num, block: Num) -> BlockPool:
        return BlockPool(batch=batch, len_seq=length, dim=dim, block=block, dtype=self.dtype)

    def _scores(self, rows: Num, keys: Num) -> KeyScores:
        return KeyScores(
            batch=self.batch * self.kv_heads, m=self.group * rows, n=keys, k=self.head_dim,
            dtype=self.dtype,
        )  # fmt: skip

    def probe_ops(self) -> dict[str, ProvedOp]:
        """True probabilities of the last block of queries, per key and per block of keys."""
        heads, length = self.batch * self.num_heads, self.queries_per_list
        return {
            "probe": self._scores(length, self.len_keys),
            "probe_softmax": Softmax(rows=heads * length, cols=self.len_keys, dtype=self.dtype),
            "columns": self._pool(heads, length, self.len_keys, length),
            "column_blocks": self._pool(heads, self.len_keys, 1, length),
        }

    def pattern_ops(self) -> dict[str, ProvedOp]:
        """The kernels that find the lists of a pattern."""
        heads, block = self.batch * self.num_heads, self.queries_per_list
        runs, rows = self.num_blocks, self.num_query_blocks
        if self.pattern == VERTICAL_SLASH:
            return {
                "diagonals": self._pool(heads, block, self.len_keys, block),
                "diagonal_blocks": self._pool(heads, self.len_keys, 1, block),
                "top_columns": TopK(rows=heads, cols=runs, k=self.num_columns, dtype=self.dtype),
                "top_diagonals": TopK(
                    rows=heads, cols=runs, k=self.num_diagonals, dtype=self.dtype
                ),
            }
        return {
            "pool_q": self._pool(heads, self.len_q, self.head_dim, block),
            "pool_k": self._pool(
                self.batch * self.kv_heads, self.len_keys, self.head_dim, block
            ),
            "pooled_scores": self._scores(rows, runs),
            "pooled_softmax": Softmax(rows=heads * rows, cols=runs, dtype=self.dtype),
            "top": TopK(rows=heads * rows, cols=runs, k=self.num_kept, dtype=self.dtype),
        }  # fmt: skip

    def attend(self) -> SelectedAttention:
        """The block-sparse kernel."""
        return SelectedAttention(
            batch=self.batch, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads,
            len_q=self.len_q, len_kv=self.len_keys, head_dim=self.head_dim,
            len_selected=self.num_kept * self.queries_per_list, block_q=self.queries_per_list,
            block_k=self.queries_per_list, per_head=True, dtype=self.dtype,
        )  # fmt: skip

    def stages(self) -> tuple[Stage, ...]:
        """The probe, the pattern's lists, attention."""
        ops = {**self.probe_ops(), **self.pattern_ops(), "attend": self.attend()}
        return tuple(Stage(name, op) for name, op in ops.items())

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random q, k and v."""
        return self.random_qkv(rng, self.len_q, self.len_keys)

    def run(self, step: Step, inputs: Arrays, machine: Machine | None) -> Arrays:
        """The probe, the lists, attention over them."""
        probabilities, columns = self._probed(step, inputs)
        if self.pattern == VERTICAL_SLASH:
            lists = self._of_probe(step, probabilities, columns)
        else:
            lists = self._pooled(step, inputs)
        return step(self.attend(), {**inputs, "index": lists.astype(np.float64)})

    def _scored(self, step: Step, op: ProvedOp, q: Values, k: Values) -> Values:
        """Scores [batch num_heads, rows, keys] of q[batch num_heads, rows, d]."""
        streams = int(self.batch) * int(self.kv_heads)
        a = q.reshape(streams, -1, q.shape[-1]) * float(self.head_dim) ** -0.5
        b = k.reshape(streams, -1, k.shape[-1]).swapaxes(-1, -2)
        return step(op, {"a": a, "b": b})["c"].reshape(*q.shape[:2], -1)

    def _softmax(self, step: Step, op: ProvedOp, scores: Values) -> Values:
        return step(op, {"x": scores.reshape(-1, scores.shape[-1])})["y"].reshape(scores.shape)

    def _probed(self, step: Step, inputs: Arrays) -> tuple[Values, Values]:
        """Probabilities [heads, block, keys] of the probe, its mass a block of keys."""
        ops, length = self.probe_ops(), int(self.queries_per_list)
        last = inputs["q"][:, :, -length:].reshape(-1, length, int(self.head_dim))
        scores = self._scored(step, ops["probe"], last, inputs["k"])
        probabilities = self._softmax(step, ops["probe_softmax"], scores)
        columns = step(ops["columns"], {"x": probabilities})["y"]
        blocks = step(ops["column_blocks"], {"x": columns.reshape(len(columns), -1, 1)})["y"]
        return probabilities, blocks[:, : int(self.num_blocks), 0]

    def _pooled(self, step: Step, inputs: Arrays) -> Values:
        ops, runs = self.pattern_ops(), int(self.num_blocks)
        dim = int(self.head_dim)
        q = step(ops["pool_q"], {"x": inputs["q"].reshape(-1, int(self.len_q), dim)})["y"]
        k = step(ops["pool_k"], {"x": inputs["k"].reshape(-1, int(self.len_keys), dim)})["y"]
        scores = self._scored(step, ops["pooled_scores"], q, k[:, :runs])
        mass = self._softmax(step, ops["pooled_softmax"], scores)
        return step(ops["top"], {"x": mass.reshape(-1, runs)})["index"]

    def _of_probe(self, step: Step, probabilities: Values, columns: Values) -> Values:
        """Lists [heads query blocks, kept]: kept columns, and diagonals seen from each block."""
        ops, runs = self.pattern_ops(), int(self.num_blocks)
        skewed = np.stack(
            [np.roll(probabilities[:, i], -i, axis=-1) for i in range(probabilities.shape[1])], 1
        )
        sums = step(ops["diagonals"], {"x": skewed})["y"]
        masses = step(ops["diagonal_blocks"], {"x": sums.reshape(len(sums), -1, 1)})["y"]
        best = step(ops["top_columns"], {"x": columns})["index"].astype(np.int64)
        slopes = step(ops["top_diagonals"], {"x": masses[:, :runs, 0]})["index"].astype(np.int64)
        wanted = int(self.num_kept) - best.shape[1]
        lists = []
        for head in range(len(best)):
            for row in range(int(self.num_query_blocks)):
                back = int(self.num_query_blocks) - 1 - row  # blocks above the probed one
                seen = (slopes[head, :wanted] - back) % runs
                lists.append(_distinct(best[head], seen, runs))
        return np.stack(lists)


def _distinct(columns: Values, others: Values, count: int) -> Values:
    """Columns and others; a block that is there already gives way to the next that is not.

    >>> _distinct(np.array([0, 2]), np.array([2, 1]), 4)
    array([0, 2, 3, 1])
    """
    found = [int(column) for column in columns]
    for block in others:
        while int(block) in found:
            block = (block + 1) % count
        found.append(int(block))
    return np.array(found)
