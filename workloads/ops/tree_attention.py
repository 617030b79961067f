"""Attention over keys that a tree search finds: Hierarchically Pruned Attention (HiP).

Lee et al. 2024 (arXiv 2406.09827). For each block of `block_q` queries of a
head, K = len_selected / block_k of the len_kv / block_k runs of keys are found by halving: K groups
of adjoining runs cover all of them; a round splits every group in two, scores the middle key of
each of the 2 K halves by the best of the block's queries, and keeps the K best halves, until a
group is one run. With T = len_kv:

    rounds      ceil(log2(T / len_selected))
    a round     2 block_q 2 K d flops, 2 K d e bytes of keys a list        K block_k = len_selected
    search      len_q 4 K d rounds flops a head                            O(T log T) for a prompt
    attend      len_q 4 len_selected d flops a head                        O(T)

The paper's values: block_q 32, block_k 2, 512 keys. Ignored: the mask of halves that are empty, the
4 bytes of a group's bounds, the causal mask (a list of a prompt has as many keys as any other), the
sinks and the window that the paper adds, and that its kernel runs all rounds in one launch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from hwmodels.errors import InputError
from workloads.machine import Machine, SlowArray, Values, slices
from workloads.numeric import Num, any_true, ceil_div, ceil_log2, floor, minimum
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.block_pool import BlockPool
from workloads.ops.key_scores import KeyScores
from workloads.ops.selected_attention import SelectedAttention
from workloads.ops.selection import SparseOp
from workloads.ops.staged import Step
from workloads.ops.top_k import TopK
from workloads.work import Work


@dataclass(frozen=True, kw_only=True)
class BlockMax(BlockPool):
    """Maxima over blocks of rows, as `BlockPool` takes means: one compare an element.

    >>> BlockMax(batch=4, len_seq=1000, dim=128, block=8).work(2**16).vector_flops
    512000
    """

    name: ClassVar[str] = "block_max"

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Columns of a block held beside their maxima."""
        held = self.block * self.dtype.bytes_per_element + 4
        require_fit(self.name, fast_bytes, held, "one column of a block")
        return {"cols": minimum(self.dim, floor(fast_bytes / held))}

    def work(self, fast_bytes: Num) -> Work:
        """A compare for each element; no division."""
        flops = self.batch * self.dim * self.len_seq
        return replace(super().work(fast_bytes), vector_flops=flops)

    def reference(self, inputs: Arrays) -> Arrays:
        """NumPy."""
        parts = slices(int(self.len_seq), int(self.block))
        return {"y": np.stack([inputs["x"][:, part].max(axis=1) for part in parts], axis=1)}

    def run(self, machine: Machine, x: SlowArray, y: SlowArray) -> None:
        """From rows to maxima, both in slow memory."""
        cols = int(self.tiling(machine.fast_bytes)["cols"])
        with machine.kernel():
            for batch in range(int(self.batch)):
                for i, part in enumerate(slices(int(self.len_seq), int(self.block))):
                    for col in slices(int(self.dim), cols):
                        with machine.scope():
                            best = machine.reduce("max", machine.load(x, (batch, part, col)), 0)
                            machine.store(best, y, (batch, slice(i, i + 1), col))


@dataclass(frozen=True, kw_only=True)
class TreeAttention(SparseOp):
    """`len_q` queries over `len_selected` of len_kv keys, found by halving; lists of query heads.

    >>> op = TreeAttention(num_heads=32, num_kv_heads=8, len_kv=2**17, head_dim=128)
    >>> op.rounds, op.num_kept
    (8, 256)
    """

    name: ClassVar[str] = "tree_attention"
    cheaper: ClassVar[tuple[str, ...]] = ("num_kv_heads", "block_q", "block_k", "len_selected")
    len_q: Num = 1
    len_kv: Num
    len_selected: Num = 512
    block_q: Num = 32
    block_k: Num = 2

    def check(self) -> None:
        """Blocks that divide, a run that fits."""
        super().check()
        if any_true(self.len_q % self.queries_per_list != 0):
            raise InputError(
                f"{self.name}: block_q = {self.block_q} must divide len_q = {self.len_q}"
            )
        if any_true(self.block_k > self.len_kv):
            raise InputError(
                f"{self.name}: block_k = {self.block_k} is longer than len_kv = {self.len_kv}"
            )

    @property
    def queries_per_list(self) -> Num:
        """`block_q`, no more than there are queries."""
        return minimum(self.block_q, self.len_q)

    @property
    def num_lists(self) -> Num:
        """One a query head and block of queries."""
        return self.batch * self.num_heads * (self.len_q // self.queries_per_list)

    @property
    def num_runs(self) -> Num:
        """Whole runs of keys."""
        return self.len_kv // self.block_k

    @property
    def num_kept(self) -> Num:
        """Runs of a list."""
        return minimum(ceil_div(self.len_selected, self.block_k), self.num_runs)

    @property
    def rounds(self) -> Num:
        """Halvings until a group is one run; none where all runs are kept."""
        return ceil_log2(ceil_div(self.num_runs, self.num_kept))

    def list_bytes(self) -> Num:
        """Memory of the lists, as the search hands them to attention."""
        return self.num_lists * self.attend().index_bytes()

    def cache_bytes(self) -> Num:
        """Keys and values of one layer: nothing is kept beside them."""
        rows = self.batch * self.kv_heads * self.len_kv
        return rows * 2 * self.head_dim * self.dtype.bytes_per_element

    def compulsory_bytes(self) -> Num:
        """Selected keys and values, Q, O and its logsumexp once, as attention reads them."""
        return self.attend().compulsory_bytes() - self.list_bytes()

    def round_ops(self) -> dict[str, ProvedOp]:
        """The kernels of one round."""
        lists, halves, queries = self.num_lists, 2 * self.num_kept, self.queries_per_list
        found: dict[str, ProvedOp] = {
            "score": KeyScores(batch=lists, m=queries, n=halves, k=self.head_dim, dtype=self.dtype)
        }
        if any_true(queries > 1):
            found["best"] = BlockMax(
                batch=lists, len_seq=queries, dim=halves, block=queries, dtype=self.dtype
            )
        found["top"] = TopK(rows=lists, cols=halves, k=self.num_kept, dtype=self.dtype)
        return found

    def attend(self) -> SelectedAttention:
        """The kernel over the lists."""
        return SelectedAttention(
            batch=self.batch, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads,
            len_q=self.len_q, len_kv=self.len_kv, head_dim=self.head_dim,
            len_selected=self.num_kept * self.block_k, block_q=self.queries_per_list,
            block_k=self.block_k, per_head=True, dtype=self.dtype,
        )  # fmt: skip

    def stages(self) -> tuple[Stage, ...]:
        """The rounds, then attention."""
        search = [Stage(name, op, self.rounds) for name, op in self.round_ops().items()]
        return (*search, Stage("attend", self.attend()))

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random q, k and v."""
        return self.random_qkv(rng, self.len_q, self.len_kv)

    def run(self, step: Step, inputs: Arrays, machine: Machine | None) -> Arrays:
        """Groups [lists, K] by first run and size, halved round by round."""
        ops, kept, lists = self.round_ops(), int(self.num_kept), int(self.num_lists)
        bounds = np.arange(kept + 1) * int(self.num_runs) // kept
        first = np.tile(bounds[:-1], (lists, 1))
        size = np.tile(np.diff(bounds), (lists, 1))
        queries = inputs["q"].reshape(lists, int(self.queries_per_list), -1)
        for _ in range(int(self.rounds)):
            left = -(-size // 2)
            first, size = np.hstack([first, first + left]), np.hstack([left, size - left])
            keys = self._middle_keys(inputs["k"], first, size)
            scores = step(ops["score"], {"a": queries, "b": keys.swapaxes(-1, -2)})["c"]
            if "best" in ops:
                scores = step(ops["best"], {"x": scores})["y"]
            scores = np.where(size > 0, scores.reshape(size.shape), -np.inf)
            best = step(ops["top"], {"x": scores})["index"].astype(np.int64)
            first, size = (np.take_along_axis(x, best, axis=1) for x in (first, size))
        return step(self.attend(), {**inputs, "index": first.astype(np.float64)})

    def _middle_keys(self, k: Values, first: Values, size: Values) -> Values:
        """[lists, halves, d]: the first key of each half's middle run."""
        middle = np.minimum(first + size // 2, int(self.num_runs) - 1) * int(self.block_k)
        head = np.arange(len(first)) // int(self.len_q // self.queries_per_list)
        batch, head = head // int(self.num_heads), head % int(self.num_heads)
        found: Values = k[batch[:, None], (head // int(self.group))[:, None], middle]
        return found
