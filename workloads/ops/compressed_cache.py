"""Attention of one new token over a compressed cache of one layer, and what that cache holds.

One parametrised scheme; published systems are settings of it (`ridgeplan systems`):

    GEAR           4-bit codes, low-rank correction, outliers, a buffer of recent tokens
                   (arXiv 2403.05527, section 3)
    ThinK          `pruned_frac` of the key channels left out (arXiv 2407.21018, section 3)
    MatryoshkaKV   keys and values projected onto `key_frac`, `value_frac` of their channels
                   (arXiv 2410.14731, section 3)
    KV heads, SVD  `heads_joined` heads share one of their width (arXiv 2406.07056, section 3)
    MiKV           `full_frac` of the tokens in 16 bits, the others in few (arXiv 2402.18096)
    BFP            mantissas with a shared 8-bit exponent a block (arXiv 2403.20137, section 2)

A cache is made of (a) old tokens, coded; (b) those of them kept whole, round(full_frac n); (c)
blocks of `len_buffer` tokens that generation has compressed, with a rank of their own; (d) the
buffer of latest tokens, whole. Projections of the query and back are products of their own, unless
`absorbed` into the weights beside them:

    2 num_heads head_dim (dk + dv) flops a sequence and step

`CompressCache` counts what compressing takes, once a prompt or a block: a step pays for one in
`len_buffer` of the latter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Final

import numpy as np

from hwmodels.dtypes import BF16, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, Values
from workloads.numeric import Condition, Num, any_true, floor, maximum, minimum
from workloads.op import Arrays, Op, Stage
from workloads.ops.cache_segment import KNOWN_BITS, Coding, Segment, share
from workloads.ops.matmul import BatchedMatmul
from workloads.ops.restoring_attention import RestoringAttention
from workloads.ops.staged import ProvedStagedOp

SCALE_BITS: Final = (8, 16, 32)
"""Shared exponents, and scales in half or single precision."""
_ROUNDING: Final = 1e-9
"""Keeps a fraction such as 0.9 of ten channels from losing one to float64."""


@dataclass(frozen=True, kw_only=True)
class CompressedCacheOp(Op):
    """The fields and the memory of a compressed cache: one layer, `batch` sequences.

    `group_size` elements share a scale: along tokens for keys if `keys_per_channel`, else along
    channels; left out, all there are. `rank_generated` follows `rank`, 0 without one.
    """

    batch: Num = 1
    num_heads: Num
    num_kv_heads: Num | None = None
    len_kv: Num
    head_dim: Num
    key_bits: Num = 4
    value_bits: Num = 4
    group_size: Num | None = None
    keys_per_channel: bool = False
    zero_point: bool = True
    scale_bits: Num = 16
    full_frac: Num = 0.0
    len_buffer: Num | None = None
    len_generated: Num | None = None
    rank: Num | None = None
    rank_generated: Num | None = None
    outlier_frac: Num = 0.0
    pruned_frac: Num = 0.0
    key_frac: Num = 1.0
    value_frac: Num = 1.0
    heads_joined: Num = 1
    absorbed: bool = False
    dtype: DType = BF16

    def check(self) -> None:
        """Refuse what no kernel or cache can be."""
        bits = " ".join(str(b) for b in KNOWN_BITS)
        for field, known in (("key_bits", KNOWN_BITS), ("value_bits", KNOWN_BITS)):
            self._require(np.isin(getattr(self, field), known), field, f"one of {bits}")
        self._require(np.isin(self.scale_bits, SCALE_BITS), "scale_bits", "8, 16 or 32")
        heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        self._require(self.num_heads % heads == 0, "num_kv_heads", "a divisor of num_heads")
        self._require(heads % self.heads_joined == 0, "heads_joined", "a divisor of num_kv_heads")
        self._require(self.pruned_frac < 1, "pruned_frac", "below 1: some channel must stay")
        self._require(self.key_frac > 0, "key_frac", "above 0")
        self._require(self.value_frac > 0, "value_frac", "above 0")
        if self.len_generated is not None:
            if self.len_buffer is None:
                raise InputError(
                    f"{self.name}: len_generated needs len_buffer, the tokens compressed at a time"
                )
            self._require(self.len_generated < self.len_kv, "len_generated", "below len_kv")

    def _require(self, good: Condition, field: str, rule: str) -> None:
        if any_true(np.logical_not(good)):
            raise InputError(f"{self.name}: {field} = {getattr(self, field)} must be {rule}")

    @property
    def kv_heads(self) -> Num:
        """Heads that the uncompressed cache would have: `num_kv_heads`, else `num_heads`."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def cache_heads(self) -> Num:
        """Heads that the cache has."""
        return self.kv_heads // self.heads_joined

    @property
    def key_width(self) -> Num:
        """Channels of a cached key before pruning."""
        return maximum(share(self.key_frac, self.head_dim), 1)

    @property
    def value_width(self) -> Num:
        """Channels of a cached value."""
        return maximum(share(self.value_frac, self.head_dim), 1)

    @property
    def key_width_kept(self) -> Num:
        """Channels of a key that pruning leaves, floor((1 - pruned_frac) key_width)."""
        return maximum(floor((1 - self.pruned_frac) * self.key_width + _ROUNDING), 1)

    @property
    def prunes(self) -> bool:
        """Are channels of keys left out?"""
        return any_true(np.not_equal(self.pruned_frac, 0))

    @property
    def projects_keys(self) -> bool:
        """Do keys and queries pass through a projection?"""
        return any_true(self.key_frac < 1) or any_true(self.heads_joined > 1)

    @property
    def projects_values(self) -> bool:
        """Do values and outputs?"""
        return any_true(self.value_frac < 1) or any_true(self.heads_joined > 1)

    @property
    def len_whole(self) -> Num:
        """Latest tokens that are not compressed yet: the buffer, or what generation has left."""
        if self.len_buffer is None:
            return 0 * self.len_kv
        if self.len_generated is None:
            return minimum(self.len_buffer, self.len_kv)
        return self.len_generated % self.len_buffer

    @property
    def num_blocks(self) -> Num:
        """Blocks that generation has compressed."""
        if self.len_buffer is None or self.len_generated is None:
            return 0 * self.len_kv
        return self.len_generated // self.len_buffer

    @property
    def len_old(self) -> Num:
        """Tokens that were compressed with the prompt."""
        return self.len_kv - self.len_whole - self.num_blocks * self._len_block

    @property
    def len_full(self) -> Num:
        """Those of them that stay in 16 bits."""
        return share(self.full_frac, self.len_old)

    @property
    def _len_block(self) -> Num:
        return 0 if self.len_buffer is None else self.len_buffer

    @property
    def old_rank(self) -> Num:
        """Rank of the prompt's correction, 0 without one."""
        return 0 if self.rank is None else self.rank

    @property
    def block_rank(self) -> Num:
        """Rank of a generated block's."""
        return self.old_rank if self.rank_generated is None else self.rank_generated

    def coding(self, side: str) -> Coding:
        """Of keys ('k') or values ('v')."""
        keys = side == "k"
        return Coding(
            bits=self.key_bits if keys else self.value_bits,
            group=self.group_size,
            by_channel=keys and self.keys_per_channel,
            zero_point=self.zero_point,
            scale_bits=self.scale_bits,
        )

    def coded(self, tokens: Num, num: Num, rank: Num) -> Segment:
        """Runs of compressed tokens."""
        return Segment(
            tokens=tokens, num=num, rank=rank,
            key_width=self.key_width_kept, value_width=self.value_width,
            key=self.coding("k"), value=self.coding("v"), outlier_frac=self.outlier_frac,
            flags=self.key_width if self.prunes else 0,
        )  # fmt: skip

    def segments(self) -> tuple[Segment, ...]:
        """(a), (c) and then (b) with (d) of the module, those that there can be."""
        found = [self.coded(self.len_old - self.len_full, 1, self.old_rank)]
        if self.len_generated is not None:
            found.append(self.coded(self._len_block, self.num_blocks, self.block_rank))
        if self.len_buffer is not None or any_true(np.not_equal(self.full_frac, 0)):
            whole = Segment(
                tokens=self.len_full + self.len_whole,
                key_width=self.key_width, value_width=self.value_width,
            )  # fmt: skip
            found.append(whole)
        return tuple(found)

    def cache_bytes(self) -> Num:
        """Bytes of one sequence in this layer: codes, scales, outliers, factors, whole tokens."""
        e = self.dtype.bytes_per_element
        held = sum((s.num_bytes(e) for s in self.segments()), start=0 * self.len_kv)
        return self.cache_heads * held

    def plain_cache_bytes(self) -> Num:
        """Bytes of the same tokens uncompressed, in `dtype`."""
        return self.kv_heads * self.len_kv * 2 * self.head_dim * self.dtype.bytes_per_element

    def kept_frac(self) -> Num:
        """`cache_bytes` over `plain_cache_bytes`."""
        return self.cache_bytes() / self.plain_cache_bytes()

    def restored_elements(self) -> Num:
        """Elements that a step restores from codes, one sequence: the dequantisations."""
        count: Num = 0 * self.len_kv
        for s in self.segments():
            for coding, width in ((s.key, s.key_width), (s.value, s.value_width)):
                count = count + s.num * s.tokens * width * _some(coding.flops())
        return self.cache_heads * count


def _some(flops: Num) -> Num:
    """1 where anything is to be done, else 0."""
    return np.sign(flops) if isinstance(flops, np.ndarray) else int(flops > 0)


@dataclass(frozen=True, kw_only=True)
class CompressedAttention(CompressedCacheOp, ProvedStagedOp):
    """q[batch, num_heads, head_dim] over the compressed cache of `len_kv` tokens.

    LLaMA-2-7B's layer in 4 bits by whole heads, a 16-bit scale and zero point each:

    >>> op = CompressedAttention(num_heads=32, len_kv=1000, head_dim=128)
    >>> op.cache_bytes() == 32 * 1000 * 2 * (64 + 4), op.kept_frac()
    (True, 0.265625)
    """

    name: ClassVar[str] = "compressed_attention"
    cheaper: ClassVar[tuple[str, ...]] = (
        "heads_joined", "group_size", "len_generated", "num_kv_heads",
    )  # fmt: skip

    @cached_property
    def attend(self) -> RestoringAttention:
        """The kernel over the cache."""
        return RestoringAttention(
            batch=self.batch, num_heads=self.num_heads, num_kv_heads=self.cache_heads,
            len_kv=self.len_kv, head_dim=self.key_width, head_dim_v=self.value_width,
            scale_dim=self.head_dim, segments=self.segments(), dtype=self.dtype,
        )  # fmt: skip

    def _turn(self, *, back: bool) -> BatchedMatmul:
        """Every head's query onto the cached channels, or its output back."""
        n, k = self.key_width, self.head_dim
        if back:
            n, k = self.head_dim, self.value_width
        return BatchedMatmul(batch=self.num_heads, m=self.batch, n=n, k=k, dtype=self.dtype)

    def stages(self) -> tuple[Stage, ...]:
        """Project the query, attend, project the output back."""
        found = [Stage("attend", self.attend)]
        if self.projects_keys and not self.absorbed:
            found.insert(0, Stage("project", self._turn(back=False)))
        if self.projects_values and not self.absorbed:
            found.append(Stage("unproject", self._turn(back=True)))
        return tuple(found)

    def compulsory_bytes(self) -> Num:
        """q and o once, the cache and the projections once."""
        e, heads = self.dtype.bytes_per_element, self.num_heads
        elements: Num = 0
        widths = {"project": self.key_width, "unproject": self.value_width}
        ends = {"project": self.key_width, "unproject": self.value_width}
        for stage in self.stages():
            if stage.name in widths:
                elements = elements + heads * self.head_dim * widths[stage.name]
                ends[stage.name] = self.head_dim
        elements = elements + self.batch * heads * sum(ends.values())
        return self.batch * self.cache_bytes() + elements * e

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, the cache, and the projections w_q[heads, d, dk], w_o[heads, dv, d] where used."""
        heads, d = int(self.num_heads), int(self.head_dim)
        found = dict(self.attend.inputs(rng))
        names = {stage.name for stage in self.stages()}
        if "project" in names:
            found["q"] = rng.standard_normal((int(self.batch), heads, d))
            found["w_q"] = rng.standard_normal((heads, d, int(self.key_width)))
        if "unproject" in names:
            found["w_o"] = rng.standard_normal((heads, int(self.value_width), d))
        return found

    def reference(self, inputs: Arrays) -> Arrays:
        """NumPy: project, attend to the restored cache, project back."""
        q = inputs["q"]
        if "w_q" in inputs:
            q = np.einsum("bhd,hdr->bhr", q, inputs["w_q"])
        o = self.attend.reference({**inputs, "q": q})["o"]
        return {"o": np.einsum("bhr,hrd->bhd", o, inputs["w_o"]) if "w_o" in inputs else o}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The stages' programs in turn."""
        q = inputs["q"]
        if "w_q" in inputs:
            q = self._turned(machine, q, inputs["w_q"], back=False)
        o = self.attend.program(machine, {**inputs, "q": q})["o"]
        if "w_o" in inputs:
            o = self._turned(machine, o, inputs["w_o"], back=True)
        return {"o": o}

    def _turned(self, machine: Machine, x: Values, weights: Values, *, back: bool) -> Values:
        product = {"a": x.swapaxes(0, 1), "b": weights}
        turned: Values = self._turn(back=back).program(machine, product)["c"]
        return turned.swapaxes(0, 1)
