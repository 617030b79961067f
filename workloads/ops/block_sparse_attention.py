"""Block-sparse FlashAttention (Dao et al. 2022, arXiv 2205.14135, algorithm 5 and proposition 4).

FlashAttention's loops over the blocks of a mask that are not zero. Blocks are `block_q` queries by
`block_k` keys, as in the authors' kernel 16 by 256; every query sees c = ceil(keys_per_query /
block_k) blocks, in a fixed butterfly (Dao et al. 2022, Pixelated Butterfly, arXiv 2112.00029): of
n_k key blocks, block r of block_k queries sees r xor {0, 1, 2, 4, ...}, or r + {0, 1, 2, ...}
modulo n_k where n_k is no power of two. c is a constant of the mask, so that all counts but the
compulsory ones are linear in the sequence. With N = len_q = len_kv and N^2 d s of the paper's
s = c block_k / N, a head moves, besides statistics,

    forward  2 N d + (3 c - 1) N d,   backward  4 N d + (5 c - 1) N d      elements,

as sums start afresh at the first block that a query sees, which the kernel's lists mark. Where K
and V of a head fit fast memory together, c becomes 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hwmodels.errors import InputError
from workloads.machine import Values, slices
from workloads.numeric import Num, any_true, ceil_div, floor, minimum, where
from workloads.op import Arrays, Stage, require_fit
from workloads.ops.attention import Sizes
from workloads.ops.elementwise import Elementwise
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.flash_attention_1 import (
    KERNEL,
    KeyOuterAttention,
    KeyOuterBackward,
    Panel,
    Step,
    Sums,
    Visit,
)
from workloads.ops.flash_attention_backward import FlashAttention2Backward
from workloads.ops.top_k import INDEX

PARTS = (16, 8, 4, 2, 1)
"""Parts that a block of the mask may be cut into along its keys, to fit fast memory."""


@dataclass(frozen=True, kw_only=True)
class _Butterfly(KeyOuterAttention):
    """The mask and its loops. A sequence of at most block_k positions is one block, all seen.

    `keys_per_query`: 256, one block of the authors' kernel: the least that it can keep, and what
    the published times of sequences beyond 2,048 are in proportion to (256 to 320 keys a query).
    """

    cheaper: ClassVar[tuple[str, ...]] = ("block_q", "block_k")
    clears: ClassVar[bool] = False
    keys_per_query: Num = 256
    block_q: Num = 16
    block_k: Num = 256

    def check(self) -> None:
        """One sequence, whole blocks, no other mask."""
        super().check()
        if self.causal:
            raise InputError(
                f"{self.name}: the block mask takes the place of causal; leave causal out, or take "
                f"flash_attention"
            )
        if self.len_kv is not None and any_true(self.len_kv != self.len_q):
            raise InputError(
                f"{self.name}: len_kv = {self.len_kv} must be len_q = {self.len_q}; the mask is "
                f"over one sequence: leave len_kv out"
            )
        if any_true(self.len_q % self.bk != 0):
            raise InputError(
                f"{self.name}: block_k = {self.block_k} must divide len_q = {self.len_q}; pad the "
                f"sequence, as the kernel does"
            )
        if any_true(self.bk % self.bq != 0):
            raise InputError(
                f"{self.name}: block_q = {self.block_q} must divide block_k = {self.block_k} (or "
                f"the sequence, where that is shorter)"
            )

    @property
    def bk(self) -> Num:
        """Keys of a block, no more than there are."""
        return minimum(self.block_k, self.len_q)

    @property
    def bq(self) -> Num:
        """Queries of a block, no more than keys."""
        return minimum(self.block_q, self.bk)

    @property
    def num_key_blocks(self) -> Num:
        """n_k."""
        return self.len_q // self.bk

    @property
    def kept_blocks(self) -> Num:
        """c, key blocks that a query sees."""
        return minimum(ceil_div(self.keys_per_query, self.bk), self.num_key_blocks)

    @property
    def kept_keys(self) -> Num:
        """Keys that a query sees: whole blocks."""
        return self.kept_blocks * self.bk

    @property
    def kept_frac(self) -> Num:
        """The paper's s."""
        return self.kept_keys / self.len_q

    def traffic(self) -> Stage:
        """What the loops move where keys are held block by block, under the products.

        Q and its sums come and go with every block that a query sees.
        """
        tiles = {"br": self.bq, "bc": self.bk, "held": 1}
        in_and_out = 2 * self.dtype.bytes_per_element
        moved = floor(self.counts(self.sums(tiles)).bytes / in_and_out) + 1
        stream = Elementwise(num_elements=moved, dtype=self.dtype)
        return Stage("traffic", stream, beside=True)

    def num_pairs(self) -> Num:
        """(query, key) pairs of one head in blocks that are not zero."""
        return self.len_q * self.kept_keys

    def dense(self) -> dict[str, Any]:
        """Fields of an attention of every block of block_k queries over its keys."""
        return {
            **self.shape(), "batch": self.batch * self.num_key_blocks, "len_q": self.bk,
            "len_kv": self.kept_keys,
        }  # fmt: skip

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Queries `br` and keys `bc` of a tile, and how many key tiles are `held` together.

        A tile is a block of the mask, or where that does not fit a half, a quarter, ... of its
        keys. All keys are held where they fit.
        """
        parts: Num = 0
        for count in PARTS:
            divides = self.bk % count == 0
            parts = where(divides & (self._tile_bytes(1, count) <= fast_bytes), count, parts)
        if any_true(np.equal(parts, 0)):
            least = self._tile_bytes(1, 1)
            for count in PARTS:
                least = where(
                    self.bk % count == 0, minimum(least, self._tile_bytes(1, count)), least
                )
            require_fit(self.name, fast_bytes, least, "one part of a block of the mask")
        together = self._tile_bytes(self.num_key_blocks, 1) <= fast_bytes
        return {
            "br": self.bq,
            "bc": self.bk // parts,
            "held": where(together, self.num_key_blocks, 1),
        }

    def _tile_bytes(self, held: Num, parts: Num) -> Num:
        lists = held * self._listed_per_block * INDEX.bytes_per_element
        keys = self.bk / parts
        scores = self.bq * (self.row_bytes + keys * self.score_bytes)
        return lists + held * keys * self.key_bytes + scores

    @property
    def _listed_per_block(self) -> Num:
        """Query blocks that a key block meets: as many for each."""
        return self.kept_blocks * (self.bk // self.bq)

    def sums(self, tiles: Mapping[str, Num]) -> Sums:
        """What `panels` adds up to; every key block is seen by as many queries as it has keys."""
        parts = self.bk // tiles["bc"]
        rows = self.len_q * self.kept_blocks * parts
        together = tiles["held"] >= self.num_key_blocks * parts
        return Sums(
            rows=rows,
            loads=where(together, self.len_q, rows),
            area=self.num_pairs(),
            masked=0,
            listed=self.num_key_blocks * self._listed_per_block * parts,
        )

    def panels(self, s: Sizes, tiles: Mapping[str, int]) -> Iterator[Panel]:
        """Key tiles in order, each with the query blocks that see it."""
        cols, entries = slices(s.len_q, tiles["bc"]), int(self._listed_per_block)
        parts, per_block = int(self.bk) // tiles["bc"], int(self.bk) // tiles["br"]
        mask = np.repeat(self.mask(), parts, axis=1)
        first = mask.argmax(axis=1)
        for start in range(0, len(cols), tiles["held"]):
            held = range(start, start + tiles["held"])
            visits = []
            for row, rows in enumerate(slices(s.len_q, tiles["br"])):
                block = row // per_block
                steps: list[Step] = [(b - start, None) for b in held if mask[block, b]]
                if steps:
                    visits.append(Visit(rows, steps, fresh=bool(first[block] >= start)))
            part = slice(start // parts * entries, (held.stop - 1) // parts * entries + entries)
            yield Panel([cols[b] for b in held], visits, part)

    def mask(self) -> Values:
        """The butterfly over blocks: [n_k, n_k], c ones a row and a column.

        >>> op = BlockSparseAttention(num_heads=1, len_q=64, head_dim=4, keys_per_query=24,
        ...                           block_q=8, block_k=8)
        >>> op.mask()[5].nonzero()[0].tolist()        # 5, 5 xor 1, 5 xor 2
        [4, 5, 7]
        """
        n, kept = int(self.num_key_blocks), int(self.kept_blocks)
        strides = sorted(range(n), key=lambda i: (i & (i - 1) != 0, i))[:kept]
        rows = np.arange(n)[:, None]
        cols = rows ^ np.array(strides) if n & (n - 1) == 0 else (rows + np.array(strides)) % n
        found = np.zeros((n, n), dtype=bool)
        found[rows, cols] = True
        return found

    def seen(self) -> Values:
        """The mask by positions."""
        side = int(self.bk)
        return np.kron(self.mask(), np.ones((side, side), dtype=bool))

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """As without a mask; and the query blocks of each key block, one list after another."""
        per_block = int(self.bk // self.bq)
        lists = [
            row * per_block + part
            for column in self.mask().T
            for row in column.nonzero()[0]
            for part in range(per_block)
        ]
        return {**super().inputs(rng), "lists": np.array(lists, dtype=np.float64)}


@dataclass(frozen=True, kw_only=True)
class BlockSparseAttention(_Butterfly):
    """Forward pass: O, and the maximum m and sum l of each row in fp32.

    >>> op = BlockSparseAttention(num_heads=8, len_q=65536, head_dim=64)
    >>> op.kept_frac, op.min_flops()[op.dtype] == 4 * 8 * 65536 * 256 * 64
    (0.00390625, True)
    >>> rows = 8 * 65536                                # Q, K, V read once, O, l and m written
    >>> op.work(256 * 1024).bytes == rows * (4 * 64 * 2 + 8) + 8 * (65536 // 16) * 4
    True
    """

    name: ClassVar[str] = "block_sparse_attention"

    def stages(self) -> tuple[Stage, ...]:
        """Timed as short attentions, one for each block of block_k queries, over the traffic."""
        attend = Stage("attend", FlashAttention2(**self.dense()), kernel=KERNEL)
        return (attend, self.traffic())


@dataclass(frozen=True, kw_only=True)
class BlockSparseAttentionBackward(KeyOuterBackward, _Butterfly):
    """Backward pass: dQ, dK and dV, over the same blocks.

    >>> op = BlockSparseAttentionBackward(num_heads=8, len_q=65536, head_dim=64)
    >>> op.min_flops()[op.dtype] == 10 * 8 * 65536 * 256 * 64
    True
    """

    name: ClassVar[str] = "block_sparse_attention_backward"

    def stages(self) -> tuple[Stage, ...]:
        """Timed as short attentions: every block of keys meets as many queries as it has keys."""
        fields = self.dense() | {"len_q": self.kept_keys, "len_kv": self.bk}
        attend = Stage("attend", FlashAttention2Backward(**fields), kernel=KERNEL)
        return (attend, self.traffic())
