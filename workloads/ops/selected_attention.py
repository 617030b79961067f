"""Attention over keys that were selected: each block of queries reads its own list of them.

`block_q` query positions share a list of `len_selected` keys, which come in runs of `block_k`
adjoining ones; lists belong to a K and V head, or to each query head (`per_head`). With
N = batch kv_heads ceil(len_q / block_q) lists (times heads_per_kv if per_head), L = len_selected:

    counts of FlashAttention-2 without a mask, N sequences of block_q queries against L keys
    + 4 N ceil(L / block_k) bytes of indices

Every selected key is one that its queries may see: a causal mask is the selection's matter. The
kernel is exact for the list; what the list leaves out is the scheme's error, not counted here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, Values
from workloads.numeric import Num, any_true, ceil_div
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.attention import probabilities
from workloads.ops.decode_attention import DecodeAttention
from workloads.ops.flash_attention import FlashAttention2, row_tiles
from workloads.ops.top_k import INDEX
from workloads.work import Work


@dataclass(frozen=True, kw_only=True)
class SelectedAttention(ProvedOp):
    """Q[batch, num_heads, len_q, head_dim] over `len_selected` of len_kv keys a query block.

    `index`[lists, ceil(len_selected / block_k)] holds numbers of key runs. `block_q` must divide
    len_q. Default: one list per query position and K and V head, single keys.

    >>> op = SelectedAttention(num_heads=32, num_kv_heads=8, len_q=1, len_kv=2**17, head_dim=128,
    ...                        len_selected=2048)
    >>> op.work(2**18).read_bytes == 8 * (2 * 2048 * 256 + 4 * 2048) + 32 * 256
    True
    """

    name: ClassVar[str] = "selected_attention"
    cheaper: ClassVar[tuple[str, ...]] = ("num_kv_heads", "block_q", "block_k")
    batch: Num = 1
    num_heads: Num
    num_kv_heads: Num | None = None
    len_q: Num = 1
    len_kv: Num
    head_dim: Num
    head_dim_v: Num | None = None
    len_selected: Num
    block_q: Num = 1
    block_k: Num = 1
    per_head: bool = False
    dtype: DType = BF16

    def check(self) -> None:
        """Heads and blocks that divide, no more keys than there are."""
        if any_true(self.num_heads % self.kv_heads != 0):
            raise InputError(
                f"{self.name}: num_kv_heads = {self.num_kv_heads} must divide "
                f"num_heads = {self.num_heads}"
            )
        if any_true(self.len_selected > self.len_kv):
            raise InputError(
                f"{self.name}: len_selected = {self.len_selected} is more than the "
                f"len_kv = {self.len_kv} keys there are"
            )
        if any_true(self.len_q % self.block_q != 0):
            raise InputError(
                f"{self.name}: block_q = {self.block_q} must divide len_q = {self.len_q}"
            )

    @property
    def kv_heads(self) -> Num:
        """`num_kv_heads`, else `num_heads`."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def list_heads(self) -> Num:
        """Heads that have lists of their own."""
        return self.num_heads if self.per_head else self.kv_heads

    @property
    def num_lists(self) -> Num:
        """Lists of keys in all."""
        return self.batch * self.list_heads * (self.len_q // self.block_q)

    def dense(self) -> FlashAttention2:
        """The same counts as an attention of every list's queries over its keys."""
        return FlashAttention2(
            batch=self.num_lists,
            num_heads=self.num_heads // self.list_heads,
            num_kv_heads=1,
            len_q=self.block_q,
            len_kv=self.len_selected,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim_v,
            dtype=self.dtype,
        )

    def stages(self) -> tuple[Stage, ...]:
        """Timed as decoding over the selected keys, or as a prompt's attention with such lists."""
        if any_true(self.len_q > 1):
            return (Stage("attend", self.dense()),)
        decode = DecodeAttention(
            batch=self.batch, num_heads=self.num_heads, num_kv_heads=self.list_heads,
            len_kv=self.len_selected, head_dim=self.head_dim, head_dim_v=self.head_dim_v,
            dtype=self.dtype,
        )  # fmt: skip
        return (Stage("attend", decode),)

    def index_bytes(self) -> Num:
        """Bytes of one list."""
        return ceil_div(self.len_selected, self.block_k) * INDEX.bytes_per_element

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """FlashAttention-2's tile in what the list leaves of fast memory."""
        require_fit(self.name, fast_bytes, self.index_bytes() + 1, "one list of keys")
        return self.dense().tiling(fast_bytes - self.index_bytes())

    def work(self, fast_bytes: Num) -> Work:
        """The dense counts and the lists, each read once."""
        self.tiling(fast_bytes)
        lists = self.num_lists * self.index_bytes()
        work = self.dense().work(fast_bytes - self.index_bytes())
        return replace(work, read_bytes=work.read_bytes + lists)

    def compulsory_bytes(self) -> Num:
        """Q, O, its logsumexp, the lists and the selected keys and values, once a list."""
        return self.dense().compulsory_bytes() + self.num_lists * self.index_bytes()

    def min_flops(self) -> Mapping[DType, Num]:
        """Those of the dense form."""
        return self.dense().min_flops()

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random q, k, v and lists without repetition."""
        batch, heads, len_kv = int(self.batch), int(self.kv_heads), int(self.len_kv)
        runs, wanted = len_kv // int(self.block_k), self._runs()
        width = self.head_dim if self.head_dim_v is None else self.head_dim_v
        lists = [rng.permutation(max(runs, wanted))[:wanted] for _ in range(int(self.num_lists))]
        return {
            "q": rng.standard_normal(
                (batch, int(self.num_heads), int(self.len_q), int(self.head_dim))
            ),
            "k": rng.standard_normal((batch, heads, len_kv, int(self.head_dim))),
            "v": rng.standard_normal((batch, heads, len_kv, int(width))),
            "index": np.stack(lists).astype(np.float64),
        }

    def _runs(self) -> int:
        return int(ceil_div(int(self.len_selected), int(self.block_k)))

    def gathered(self, inputs: Arrays) -> Arrays:
        """Q, K and V of every list, as its kernel addresses them: layout, not work."""
        lists, runs = int(self.num_lists), inputs["index"].astype(np.int64)
        keys = runs[:, :, None] * int(self.block_k) + np.arange(int(self.block_k))
        keys = keys.reshape(lists, -1)[:, : int(self.len_selected)]
        blocks = int(self.len_q) // int(self.block_q)
        owner = np.arange(lists) // blocks
        batch, head = owner // int(self.list_heads), owner % int(self.list_heads)
        head = head * int(self.kv_heads) // int(self.list_heads)
        found = {n: inputs[n][batch[:, None], head[:, None], keys][:, None] for n in ("k", "v")}
        group = int(self.num_heads // self.list_heads)
        q = inputs["q"].reshape(int(self.batch), int(self.list_heads), group, blocks,
                                int(self.block_q), -1)  # fmt: skip
        q = q.transpose(0, 1, 3, 2, 4, 5).reshape(lists, group, int(self.block_q), -1)
        return {"q": q, **found}

    def _ungathered(self, o: Values) -> Values:
        blocks = int(self.len_q) // int(self.block_q)
        group = int(self.num_heads // self.list_heads)
        split = o.reshape(int(self.batch), int(self.list_heads), blocks, group,
                          int(self.block_q), -1)  # fmt: skip
        return split.transpose(0, 1, 3, 2, 4, 5).reshape(
            int(self.batch), int(self.num_heads), int(self.len_q), -1
        )

    def reference(self, inputs: Arrays) -> Arrays:
        """NumPy over the gathered keys."""
        found = self.gathered(inputs)
        values = np.repeat(found["v"], found["q"].shape[1], axis=1)
        p, lse = probabilities(self.dense(), found)
        return {"o": self._ungathered(p @ values), "lse": self._ungathered(lse)}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel: each list is loaded, then its queries' tiles run over its keys."""
        dense, found = self.dense(), self.gathered(inputs)
        tiles = {k: int(v) for k, v in self.tiling(machine.fast_bytes).items()}
        s = dense.sizes()
        q = machine.place(s.pack(found["q"]), self.dtype)
        k, v = (machine.place(s.merge(found[n]), self.dtype) for n in ("k", "v"))
        index = machine.place(inputs["index"], INDEX)
        o = machine.empty((*q.values.shape[:2], s.dv), self.dtype)
        lse = machine.empty((*q.values.shape[:2], 1), FP32)
        with machine.kernel():
            for one in range(int(self.num_lists)):
                with machine.scope():
                    machine.load(index, one)
                    for rows in row_tiles(s, tiles["br"], tiles["heads"]):
                        with machine.scope():
                            dense.tile(machine, s, tiles, one, rows, (q, k, v, o, lse))
        outputs = {"o": s.unpack(o.values), "lse": s.unpack(lse.values)}
        return {key: self._ungathered(value) for key, value in outputs.items()}
