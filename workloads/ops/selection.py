"""Attention over keys that a cheap score picks for each query: score, combine heads, top-k, attend.

An index has a row for every run of `block_k` adjoining keys (after clusters are laid side by side).
Its rows are narrower than keys (channels), fewer (means of runs) or stored in a narrower format:

    score     s = q X^T / sqrt(d)          X[num_runs, width] of each K and V head, e_x bytes
    combine   softmax over the runs (`vote`), mean over the heads that share a list
    top-k     the `num_kept` best runs of a list
    attend    exact softmax attention over L = num_kept block_k keys

    bytes a K and V head, one new token   num_runs width e_x + 2 L d e      instead of 2 len_kv d e

Lists belong to each query head (`share` 'head'), to a K and V head ('group') or to all heads of a
layer ('layer'). Systems, as presets of `SelectiveAttention` (workloads/data/systems.toml):

    double_sparsity     Yang et al. 2024 (arXiv 2408.07092): labels of d / 16 channels,
                        one in 16 tokens; `offload`: their K and V come from the host one layer
                        ahead, beside the layer
    tokenselect         Wu et al. 2024 (arXiv 2411.02886; pzs19/TokenSelect): all channels of all
                        keys, soft vote of the heads, one list a layer, for a chunk of a prompt
                        by its mean query; 2048 tokens beside 128 first and 512 last ones; a share
                        `hit_frac` of the queries is near enough to the last one to keep its list
    squeezed_attention  Hooper et al. 2024 (arXiv 2411.09688, sections 3.2, 3.3): centroids of
                        clusters of 20 keys (5 % of them); `coarse` of these have a centroid above
                        them, and only those below the best `coarse_frac` are scored
    longheads           Lu et al. 2024 (arXiv 2402.10685; LuLuLuyi/LongHeads): chunks of 256 keys
                        under one representative, 16 of them a head and query, first and last
                        always among them
    infllm              Xiao et al. 2024 (arXiv 2402.04617; thunlp/InfLLM, its Mistral setting):
                        blocks of 128 under the sum of 4 representative keys, scored by the mean of
                        512 queries and the sum over heads; 16 blocks beside 128 first and 4096
                        last tokens; `offload`: every block comes from the host (what its cache of
                        recent blocks holds is data, and left out)

The clusters' threshold (a calibrated percentile of the scores) is run as the top-k of the share it
keeps, clusters of equal size. `len_local` keys more (a window, a user's input) are attended in full
and put together with the rest by their logsumexps. Ignored: writing the new token into the index,
comparing a query with the cached one, the 4 bytes of a candidate that the coarse level passes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple

import numpy as np

from hwmodels.dtypes import BF16, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, Values, slices
from workloads.numeric import Num, any_true, ceil_div, floor, maximum, minimum
from workloads.op import Arrays, ProvedOp, Stage
from workloads.ops.block_pool import BlockPool
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.host_copy import HostCopy
from workloads.ops.key_scores import KeyScores
from workloads.ops.selected_attention import SelectedAttention
from workloads.ops.shared_prefix import CombineParts
from workloads.ops.softmax import Softmax
from workloads.ops.staged import Step, SteppedOp
from workloads.ops.top_k import TopK

HEAD, GROUP, LAYER = "head", "group", "layer"
SHARES: Final = (HEAD, GROUP, LAYER)


def rounded(count: Num) -> Num:
    """The nearest whole number, at least 1.

    >>> rounded(0.1 * 30), rounded(0.2)
    (3, 1)
    """
    return maximum(floor(count + 0.5), 1)


class Ranking(NamedTuple):
    """One level of an index: its scores, put together over the heads of a list, and the best.

    `product` gives [streams, rows, n] scores, of which `members` heads belong to each of `lists`.
    """

    product: KeyScores
    lists: Num
    members: Num
    kept: Num
    vote: bool

    def ops(self) -> dict[str, ProvedOp]:
        """The kernels by name, in the order they run."""
        product = self.product
        found: dict[str, ProvedOp] = {"score": product}
        if self.vote:
            rows = product.batch * product.m
            found["softmax"] = Softmax(rows=rows, cols=product.n, dtype=product.written_dtype)
        if any_true(self.members > 1):
            found["combine"] = BlockPool(
                batch=self.lists, len_seq=self.members, dim=product.n, block=self.members,
                dtype=product.written_dtype,
            )  # fmt: skip
        found["top"] = TopK(
            rows=self.lists, cols=product.n, k=self.kept, dtype=product.written_dtype
        )
        return found

    def run(
        self, step: Step, q: Values, index: Values, to_lists: Callable[[Values], Values]
    ) -> Values:
        """Numbers of the best rows [lists, kept] of index[streams, n, width] for q[streams, m, w].

        `to_lists` brings the scores of a list's heads together: addressing, not work.
        """
        ops = self.ops()
        scores = step(ops["score"], {"a": q, "b": index.swapaxes(-1, -2)})["c"]
        if "softmax" in ops:
            flat = scores.reshape(-1, scores.shape[-1])
            scores = step(ops["softmax"], {"x": flat})["y"].reshape(scores.shape)
        scores = to_lists(scores)
        if "combine" in ops:
            scores = step(ops["combine"], {"x": scores})["y"]
        found = step(ops["top"], {"x": scores.reshape(int(self.lists), -1)})["index"]
        return found.astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class SparseOp(SteppedOp):
    """What attentions over selected keys share: shapes, the final kernel, running stages.

    Q[batch, num_heads, len_q, head_dim], K and V[batch, num_kv_heads, keys, head_dim]; O and its
    logsumexp like Q. `num_kv_heads` left out follows `num_heads`.
    """

    batch: Num = 1
    num_heads: Num
    num_kv_heads: Num | None = None
    head_dim: Num
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
    def group(self) -> Num:
        """Query heads that share K and V."""
        return self.num_heads // self.kv_heads

    def random_qkv(self, rng: np.random.Generator, len_q: Num, keys: Num) -> dict[str, Values]:
        """Random q, k and v."""
        batch, dim = int(self.batch), int(self.head_dim)
        shape = (batch, int(self.kv_heads), int(keys), dim)
        return {
            "q": rng.standard_normal((batch, int(self.num_heads), int(len_q), dim)),
            "k": rng.standard_normal(shape),
            "v": rng.standard_normal(shape),
        }


@dataclass(frozen=True, kw_only=True)
class SelectiveAttention(SparseOp):
    """`len_q` new tokens over `num_kept` of the runs of len_kv keys, and `len_local` keys more.

    `len_selected` keys a list, or else the share `kept_frac` of them; `channel_frac` of a key's
    channels are in the index, in `index_dtype` or else `dtype`. `block_q` adjoining queries share
    a list, chosen by their mean. `len_local` keys count apart from len_kv; the new tokens are the
    last of them (causal).

    Double Sparsity on one token of a 7B model, 16-bit labels: 3 / 32 of the bytes of K and V.

    >>> op = SelectiveAttention(num_heads=32, len_kv=2**17, head_dim=128, channel_frac=1 / 16)
    >>> op.kv_bytes_read() / (32 * 2**17 * 2 * 128 * 2) == 3 / 32
    True
    """

    name: ClassVar[str] = "selective_attention"
    cheaper: ClassVar[tuple[str, ...]] = ("num_kv_heads", "block_q", "block_k", "coarse")
    len_q: Num = 1
    len_kv: Num
    len_local: Num | None = None
    len_selected: Num | None = None
    kept_frac: Num = 1 / 16
    channel_frac: Num = 1.0
    block_q: Num = 1
    block_k: Num = 1
    coarse: Num | None = None
    coarse_frac: Num = 0.3
    share: str = GROUP
    vote: bool = False
    hit_frac: Num = 0.0
    offload: bool = False
    index_dtype: DType | None = None

    def check(self) -> None:
        """Lists that exist, queries that see a key, buffers that can be shared."""
        super().check()
        if self.share not in SHARES:
            raise InputError(f"{self.name}: share = '{self.share}' must be one of {SHARES}")
        if any_true(self.len_q % self.queries_per_list != 0):
            raise InputError(
                f"{self.name}: block_q = {self.block_q} must divide len_q = {self.len_q}"
            )
        if self.len_local is not None and any_true(self.len_q > self.len_local):
            raise InputError(
                f"{self.name}: len_local = {self.len_local} counts the len_q = {self.len_q} new "
                f"tokens; give at least as many, or leave len_local out"
            )
        own_lists = self.share == HEAD and any_true(self.group > 1)
        if self.offload and (own_lists or any_true(self.num_blocks > 1)):
            raise InputError(
                f"{self.name}: offload keeps one buffer a K and V head; give share='group' or "
                f"'layer' and a block_q of len_q"
            )

    # ---- sizes -----------------------------------------------------------------------------

    @property
    def queries_per_list(self) -> Num:
        """`block_q`, no more than there are queries."""
        return minimum(self.block_q, self.len_q)

    @property
    def num_blocks(self) -> Num:
        """Blocks of queries of a sequence."""
        return self.len_q // self.queries_per_list

    @property
    def run_length(self) -> Num:
        """`block_k`, no more than there are keys."""
        return minimum(self.block_k, self.len_kv)

    @property
    def num_runs(self) -> Num:
        """Whole runs of keys: rows of the index."""
        return self.len_kv // self.run_length

    @property
    def fan_out(self) -> Num:
        """Runs below a row of the coarse level."""
        return 1 if self.coarse is None else minimum(self.coarse, self.num_runs)

    @property
    def num_kept(self) -> Num:
        """Runs of a list."""
        reachable = self.num_runs // self.fan_out * self.fan_out
        if self.len_selected is not None:
            return minimum(ceil_div(self.len_selected, self.run_length), reachable)
        return minimum(rounded(self.kept_frac * self.num_runs), reachable)

    @property
    def num_coarse_kept(self) -> Num:
        """Rows of the coarse level whose runs are scored."""
        rows = self.num_runs // self.fan_out
        needed = ceil_div(self.num_kept, self.fan_out)
        return minimum(maximum(rounded(self.coarse_frac * rows), needed), rows)

    @property
    def width(self) -> Num:
        """Channels of an index row."""
        return rounded(self.channel_frac * self.head_dim)

    @property
    def stored_dtype(self) -> DType:
        """Format of the index."""
        return self.index_dtype or self.dtype

    @property
    def num_lists(self) -> Num:
        """Lists that are chosen."""
        heads = {HEAD: self.num_heads, GROUP: self.kv_heads, LAYER: 1}[self.share]
        return self.batch * heads * self.num_blocks

    @property
    def members(self) -> Num:
        """Query heads that share a list."""
        return {HEAD: 1, GROUP: self.group, LAYER: self.num_heads}[self.share]

    # ---- bytes -----------------------------------------------------------------------------

    def index_bytes(self) -> Num:
        """All levels of the index, of one layer."""
        rows = self.num_runs + (0 if self.coarse is None else self.num_runs // self.fan_out)
        row_bytes = self.width * self.stored_dtype.bytes_per_element
        return self.batch * self.kv_heads * rows * row_bytes

    def scored_bytes(self) -> Num:
        """Index rows that one new token reads, where no coarse level differs between heads."""
        rows = self.num_runs
        if self.coarse is not None:
            rows = self.num_runs // self.fan_out + self.num_coarse_kept * self.fan_out
        row_bytes = self.width * self.stored_dtype.bytes_per_element
        return (1 - self.hit_frac) * self.batch * self.kv_heads * rows * row_bytes

    def kv_bytes_read(self) -> Num:
        """Index rows, keys and values that one new token reads for each K and V head."""
        local = 0 if self.len_local is None else self.len_local
        keys = self.num_kept * self.run_length + local
        rows = self.batch * self.kv_heads * keys
        return self.scored_bytes() + rows * 2 * self.head_dim * self.dtype.bytes_per_element

    def cache_bytes(self) -> Num:
        """Device memory of one layer: index, keys and values; offloaded, those of len_kv not."""
        keys = 0 if self.offload else self.len_kv
        keys = keys + (0 if self.len_local is None else self.len_local)
        row_bytes = 2 * self.head_dim * self.dtype.bytes_per_element
        return self.index_bytes() + self.batch * self.kv_heads * keys * row_bytes

    def buffer_bytes(self) -> Num:
        """What offloading takes once for all layers: the lists in use and those under way."""
        return 2 * self.fetched_bytes()

    def fetched_bytes(self) -> Num:
        """K and V of all lists, as they come from the host."""
        keys = self.attend().num_lists * self.num_kept * self.run_length
        return keys * 2 * self.head_dim * self.dtype.bytes_per_element

    def compulsory_bytes(self) -> Num:
        """Scored rows of the index, selected keys and values, Q, O and its logsumexp, once."""
        attend = self.attend()
        total = attend.compulsory_bytes() - attend.num_lists * attend.index_bytes()
        local = 0 if self.len_local is None else self.batch * self.kv_heads * self.len_local
        rows = local * 2 * self.head_dim * self.dtype.bytes_per_element
        return total + self.scored_bytes() + rows

    # ---- kernels ---------------------------------------------------------------------------

    def pool(self) -> BlockPool | None:
        """Means of the queries of a block, where a block has more than one."""
        if not any_true(self.queries_per_list > 1):
            return None
        return BlockPool(
            batch=self.batch * self.num_heads, len_seq=self.len_q, dim=self.width,
            block=self.queries_per_list, dtype=self.dtype,
        )  # fmt: skip

    def rankings(self) -> dict[str, Ranking]:
        """The levels of the index by the prefix of their kernels' names, from the top."""
        whole = self.num_runs if self.coarse is None else self.num_runs // self.fan_out
        streams, rows = self.batch * self.kv_heads, self.group * self.num_blocks
        if self.coarse is None:
            return {"": self._ranking(streams, rows, whole, self.num_kept)}
        heads_of_index = self.kv_heads if self.share == LAYER else 1
        below = self.num_coarse_kept * self.fan_out
        return {
            "coarse_": self._ranking(streams, rows, whole, self.num_coarse_kept),
            "": self._ranking(
                self.num_lists * heads_of_index, self.members // heads_of_index, below,
                self.num_kept,
            ),
        }  # fmt: skip

    def _ranking(self, streams: Num, rows: Num, index_rows: Num, kept: Num) -> Ranking:
        product = KeyScores(
            batch=streams, m=rows, n=index_rows, k=self.width, dtype=self.stored_dtype,
            out_dtype=self.dtype, math_dtype=self.dtype,
        )  # fmt: skip
        return Ranking(product, self.num_lists, self.members, kept, self.vote)

    def attend(self) -> SelectedAttention:
        """The kernel over the lists."""
        return SelectedAttention(
            batch=self.batch, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads,
            len_q=self.len_q, len_kv=self.len_kv, head_dim=self.head_dim,
            len_selected=self.num_kept * self.run_length, block_q=self.queries_per_list,
            block_k=self.run_length, per_head=self.share == HEAD, dtype=self.dtype,
        )  # fmt: skip

    def local(self) -> tuple[ProvedOp, CombineParts] | None:
        """Attention over the local keys, and putting both parts together.

        One new token decodes over them as over a list with a single run.
        """
        if self.len_local is None:
            return None
        own: ProvedOp
        if any_true(self.len_q > 1):
            own = FlashAttention2(
                batch=self.batch, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads,
                len_q=self.len_q, len_kv=self.len_local, head_dim=self.head_dim, causal=True,
                dtype=self.dtype,
            )  # fmt: skip
        else:
            own = SelectedAttention(
                batch=self.batch, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads,
                len_kv=self.len_local, head_dim=self.head_dim, len_selected=self.len_local,
                block_k=self.len_local, dtype=self.dtype,
            )  # fmt: skip
        rows = self.batch * self.num_heads * self.len_q
        return own, CombineParts(rows=rows, dim=self.head_dim, num_parts=2, dtype=self.dtype)

    def stages(self) -> tuple[Stage, ...]:
        """Selection as often as the selection cache misses, then attention."""
        missed = 1 - self.hit_frac
        pool, local = self.pool(), self.local()
        found = [] if pool is None else [Stage("pool", pool, missed)]
        for prefix, ranking in self.rankings().items():
            found += [Stage(prefix + name, op, missed) for name, op in ranking.ops().items()]
        if self.offload:
            found.append(Stage("prefetch", HostCopy(num_bytes=self.fetched_bytes()), beside=True))
        found.append(Stage("attend", self.attend()))
        if local is not None:
            found += [Stage("local", local[0]), Stage("merge", local[1])]
        return tuple(found)

    # ---- proof -----------------------------------------------------------------------------

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, k, v, local keys and values, and the last query's lists, `cached`.

        The index is made of them: the first channels stand for the heavy ones.
        """
        found = self.random_qkv(rng, self.len_q, self.len_kv)
        if self.len_local is not None:
            local = self.random_qkv(rng, 1, self.len_local)
            found |= {"k_local": local["k"], "v_local": local["v"]}
        lists = [
            rng.permutation(int(self.num_runs))[: int(self.num_kept)]
            for _ in range(int(self.num_lists))
        ]
        return found | {"cached": np.stack(lists).astype(np.float64)}

    def run(self, step: Step, inputs: Arrays, machine: Machine | None) -> Arrays:
        """Lists, then attention over them; needs a `hit_frac` of 0 or 1."""
        if self.hit_frac not in (0, 1):
            raise InputError(f"{self.name}: a program needs hit_frac 0 or 1, not {self.hit_frac}")
        lists = inputs["cached"] if self.hit_frac else self._chosen(step, inputs)
        given = {name: inputs[name] for name in ("q", "k", "v")}
        outputs = self._attended(step, given | {"index": self._of_heads(lists)}, machine)
        local = self.local()
        if local is None:
            return outputs
        mine = {"q": inputs["q"], "k": inputs["k_local"], "v": inputs["v_local"]}
        if isinstance(local[0], SelectedAttention):
            mine["index"] = np.zeros((int(local[0].num_lists), 1))
        parts = (outputs, step(local[0], mine))
        both = {
            name: np.stack([part[key].reshape(-1, part[key].shape[-1]) for part in parts])
            for name, key in (("parts", "o"), ("lse", "lse"))
        }
        merged = step(local[1], both)
        return {name: x.reshape(outputs[name].shape) for name, x in merged.items()}

    def _chosen(self, step: Step, inputs: Arrays) -> Values:
        batch, heads, width = int(self.batch), int(self.kv_heads), int(self.width)
        runs, length = int(self.num_runs), int(self.run_length)
        queries = inputs["q"][..., :width] * float(self.head_dim) ** -0.5
        pool = self.pool()
        if pool is not None:
            flat = queries.reshape(-1, int(self.len_q), width)
            queries = step(pool, {"x": flat})["y"]
        queries = queries.reshape(batch, heads, int(self.group), int(self.num_blocks), width)
        keys = inputs["k"][:, :, : runs * length, :width]
        index = keys.reshape(batch, heads, runs, length, width).mean(axis=3)

        def to_lists(values: Values) -> Values:
            shape = (*queries.shape[:4], values.shape[-1])
            axes = {HEAD: (0, 1, 2, 3, 4), GROUP: (0, 1, 3, 2, 4), LAYER: (0, 3, 1, 2, 4)}
            turned = values.reshape(shape).transpose(axes[self.share])
            return turned.reshape(int(self.num_lists), int(self.members), -1)

        levels = self.rankings()
        rows = queries.reshape(batch * heads, -1, width)
        if self.coarse is None:
            return levels[""].run(step, rows, index.reshape(batch * heads, -1, width), to_lists)
        fan_out = int(self.fan_out)
        above = index[:, :, : runs // fan_out * fan_out]
        above = above.reshape(batch * heads, -1, fan_out, width).mean(axis=2)
        best = levels["coarse_"].run(step, rows, above, to_lists)
        below = (best[:, :, None] * fan_out + np.arange(fan_out)).reshape(len(best), -1)
        product = levels[""].product
        found = levels[""].run(
            step,
            to_lists(queries).reshape(int(product.batch), int(product.m), width),
            self._gathered(index, below),
            lambda scores: scores.reshape(int(self.num_lists), int(self.members), -1),
        )
        return np.take_along_axis(below, found, axis=1)

    def _gathered(self, index: Values, rows: Values) -> Values:
        """Index rows of each list, and of each K and V head where these share one."""
        lists, heads = np.arange(len(rows)), int(self.kv_heads)
        blocks = int(self.num_blocks)
        if self.share == LAYER:
            found = index[(lists // blocks)[:, None], :, rows]  # [lists, rows, heads, width]
            return found.swapaxes(1, 2).reshape(len(rows) * heads, rows.shape[1], -1)
        per_kv = int(self.group) if self.share == HEAD else 1
        owner = lists // (blocks * per_kv)
        return index[(owner // heads)[:, None], (owner % heads)[:, None], rows]

    def _of_heads(self, lists: Values) -> Values:
        """A list for each K and V head where a layer shares them."""
        if self.share != LAYER:
            return lists.astype(np.float64)
        split = lists.reshape(int(self.batch), 1, int(self.num_blocks), -1)
        every = np.repeat(split, int(self.kv_heads), axis=1)
        return every.reshape(-1, lists.shape[-1]).astype(np.float64)

    def _attended(self, step: Step, given: dict[str, Values], machine: Machine | None) -> Arrays:
        """Attention over the lists; offloaded, over buffers that a copy has filled."""
        attend = self.attend()
        if not self.offload:
            return step(attend, given)
        keys = given["index"].astype(np.int64)[:, :, None] * int(self.run_length)
        keys = (keys + np.arange(int(self.run_length))).reshape(len(keys), -1)
        held = attend.over(len_kv=keys.shape[1])
        buffers = {n: self._fetched(given[n], keys, machine) for n in ("k", "v")}
        if machine is not None:
            _copy(machine, buffers, self.dtype)
        order = np.tile(np.arange(given["index"].shape[1], dtype=np.float64), (len(keys), 1))
        return step(held, {"q": given["q"], **buffers, "index": order})

    def _fetched(self, rows: Values, keys: Values, machine: Machine | None) -> Values:
        owner = np.arange(len(keys))
        heads = int(self.kv_heads)
        found = rows[(owner // heads)[:, None], (owner % heads)[:, None], keys]
        return found.reshape(int(self.batch), heads, keys.shape[1], -1)


def _copy(machine: Machine, buffers: dict[str, Values], dtype: DType) -> None:
    """One copy from the host: what it brings is written to slow memory, chunk by chunk."""
    chunk = max(int(machine.fast_bytes // dtype.bytes_per_element), 1)
    with machine.kernel():
        for name, values in buffers.items():
            target = machine.empty((values.size,), dtype)
            for part in slices(values.size, chunk):
                with machine.scope():
                    machine.store(machine.hold(values.reshape(-1)[part], dtype), target, part)
            buffers[name] = target.values.reshape(values.shape)
