"""Attention O = softmax(Q K^T / sqrt(d)) V: the shape all attention ops share, and the plain way.

`AttentionOp` holds the fields, the reference and the counts that no algorithm changes;
`StandardAttention` is the algorithm that writes the scores to slow memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hwmodels.dtypes import BF16, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, SlowArray, Tile, Values
from workloads.numeric import Num, any_true
from workloads.op import Arrays, ProvedOp, Stage
from workloads.ops.matmul import BatchedMatmul, Matmul
from workloads.ops.softmax import Softmax
from workloads.work import Work

MASK_FLOPS = 2
"""Vector flops to mask one score: compare its indices, select."""


@dataclass(frozen=True, kw_only=True)
class AttentionOp(ProvedOp):
    """Shape of one attention; sizes in positions, heads and elements.

    Q[batch, num_heads, len_q, head_dim], K[batch, num_kv_heads, len_kv, head_dim],
    V[batch, num_kv_heads, len_kv, head_dim_v], O[batch, num_heads, len_q, head_dim_v].
    Query head h uses K and V of head h // heads_per_kv. Left out, `num_kv_heads` follows
    `num_heads`, `len_kv` follows `len_q` and `head_dim_v` follows `head_dim`, also in `over()`.
    `causal` is aligned bottom right: query i sees keys 0 .. len_kv - len_q + i.
    """

    batch: Num = 1
    num_heads: Num
    num_kv_heads: Num | None = None
    len_q: Num
    len_kv: Num | None = None
    head_dim: Num
    head_dim_v: Num | None = None
    causal: bool = False
    dtype: DType = BF16

    def check(self) -> None:
        """Refuse heads that do not divide, and causal queries that would see no key."""
        if any_true(self.num_heads % self.kv_heads != 0):
            raise InputError(
                f"{self.name}: num_kv_heads = {self.num_kv_heads} must divide "
                f"num_heads = {self.num_heads}"
            )
        if self.causal and any_true(self.len_q > self.len_keys):
            raise InputError(
                f"{self.name}: causal with len_q above len_kv leaves queries without a key; "
                f"give len_kv >= len_q, or leave len_kv out to make it follow len_q"
            )

    @property
    def kv_heads(self) -> Num:
        """`num_kv_heads`, else `num_heads`."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def len_keys(self) -> Num:
        """`len_kv`, else `len_q`."""
        return self.len_q if self.len_kv is None else self.len_kv

    @property
    def value_dim(self) -> Num:
        """`head_dim_v`, else `head_dim`."""
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def heads_per_kv(self) -> Num:
        """Query heads that share one K and V."""
        return self.num_heads // self.kv_heads

    def num_pairs(self) -> Num:
        """(query, key) pairs of one head that the mask leaves.

        Causal: sum over i of len_kv - len_q + i + 1 = len_q (len_kv - len_q) + len_q (len_q + 1)/2.

        >>> StandardAttention(num_heads=1, len_q=3, len_kv=5, head_dim=1, causal=True).num_pairs()
        12
        """
        if not self.causal:
            return self.len_q * self.len_keys
        return self.len_q * (self.len_keys - self.len_q) + self.len_q * (self.len_q + 1) // 2

    def query_elements(self) -> Num:
        """Elements of Q."""
        return self.batch * self.num_heads * self.len_q * self.head_dim

    def output_elements(self) -> Num:
        """Elements of O."""
        return self.batch * self.num_heads * self.len_q * self.value_dim

    def kv_elements(self) -> Num:
        """Elements of K and V together."""
        return self.batch * self.kv_heads * self.len_keys * (self.head_dim + self.value_dim)

    def compulsory_bytes(self) -> Num:
        """Q, K and V once, O once."""
        elements = self.query_elements() + self.kv_elements() + self.output_elements()
        return elements * self.dtype.bytes_per_element

    def min_flops(self) -> Mapping[DType, Num]:
        """Q K^T and P V over the pairs the mask leaves: 2 pairs (head_dim + head_dim_v) a head."""
        per_pair = 2 * (self.head_dim + self.value_dim)
        return {self.dtype: self.batch * self.num_heads * self.num_pairs() * per_pair}

    def unmasked(self, work: Work) -> Work:
        """Without what tiles compute beyond the mask: all counts by the share of pairs it leaves.

        Work per row (rescaling, normalising) shrinks with the rest, which keeps this a minimum.
        """
        needed = self.min_flops()
        frac = needed[self.dtype] / work.tensor_flops[self.dtype]
        return replace(
            work,
            tensor_flops=needed,
            vector_flops=work.vector_flops * frac,
            special_ops=work.special_ops * frac,
        )

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random q, k and v in the layouts of the class docstring."""
        s = self.sizes()
        return {
            "q": rng.standard_normal((s.batch, s.heads, s.len_q, s.d)),
            "k": rng.standard_normal((s.batch, s.kv_heads, s.len_kv, s.d)),
            "v": rng.standard_normal((s.batch, s.kv_heads, s.len_kv, s.dv)),
        }

    def sizes(self) -> Sizes:
        """Every size as a Python int, for programs; needs scalar fields."""
        numbers = (
            self.batch, self.num_heads, self.kv_heads, self.heads_per_kv,
            self.len_q, self.len_keys, self.head_dim, self.value_dim,
        )  # fmt: skip
        return Sizes(*(int(n) for n in numbers))


class Sizes(NamedTuple):
    """The sizes of an attention as its program uses them; `group` is `heads_per_kv`."""

    batch: int
    heads: int
    kv_heads: int
    group: int
    len_q: int
    len_kv: int
    d: int
    dv: int

    @property
    def scale(self) -> float:
        """1 / sqrt(head_dim)."""
        return float(self.d**-0.5)

    def pack(self, values: Values) -> Values:
        """[batch, heads, len_q, w] as [batch kv_heads, len_q group, w]: heads of a position adjoin.

        Row r holds position r // group, so that a tile of rows can share one K and V. A choice
        of layout, not a computation.
        """
        split = values.reshape(self.batch, self.kv_heads, self.group, self.len_q, -1)
        return split.swapaxes(2, 3).reshape(self.batch * self.kv_heads, self.len_q * self.group, -1)

    def unpack(self, values: Values) -> Values:
        """The inverse of `pack`."""
        split = values.reshape(self.batch, self.kv_heads, self.len_q, self.group, -1)
        return split.swapaxes(2, 3).reshape(self.batch, self.heads, self.len_q, -1)

    def merge(self, values: Values) -> Values:
        """[batch, kv_heads, len_kv, w] as [batch kv_heads, len_kv, w]."""
        return values.reshape(self.batch * self.kv_heads, self.len_kv, -1)

    def visible(self, rows: slice, cols: slice) -> NDArray[np.bool_]:
        """Which keys `cols` the packed rows `rows` may see under the causal mask.

        Rows may run on over several [len_q group] blocks.
        """
        position = np.arange(rows.start, rows.stop) % (self.len_q * self.group) // self.group
        last_key = position + self.len_kv - self.len_q
        mask: NDArray[np.bool_] = np.arange(cols.start, cols.stop) <= last_key[:, None]
        return mask


def probabilities(op: AttentionOp, inputs: Arrays) -> tuple[Values, Values]:
    """P[batch, num_heads, len_q, len_kv] and its logsumexp [batch, num_heads, len_q, 1]; naive."""
    s = op.sizes()
    keys = np.repeat(inputs["k"], s.group, axis=1)
    scores = inputs["q"] @ keys.swapaxes(-1, -2) * s.scale
    if op.causal:
        seen = np.tri(s.len_q, s.len_kv, s.len_kv - s.len_q, dtype=bool)
        scores = np.where(seen, scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    exponentials = np.exp(scores - top)
    total = exponentials.sum(axis=-1, keepdims=True)
    return exponentials / total, top + np.log(total)


def gradients(s: Sizes, inputs: Arrays, p: Values) -> dict[str, Values]:
    """dQ, dK, dV from `do` and P; naive: dS = P * (dP - rowsum(P * dP)), heads summed last."""
    do = inputs["do"]
    keys, values = (np.repeat(inputs[name], s.group, axis=1) for name in ("k", "v"))
    dp = do @ values.swapaxes(-1, -2)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) * s.scale

    def over_group(per_head: Values) -> Values:
        split = per_head.reshape(s.batch, s.kv_heads, s.group, s.len_kv, -1)
        summed: Values = split.sum(axis=2)
        return summed

    return {
        "dq": ds @ keys,
        "dk": over_group(ds.swapaxes(-1, -2) @ inputs["q"]),
        "dv": over_group(p.swapaxes(-1, -2) @ do),
    }


@dataclass(frozen=True, kw_only=True)
class StandardAttention(AttentionOp):
    """Three kernels with S and P in slow memory, each in `dtype`: S = Q K^T, P = softmax, O = P V.

    The heads that share K and V are one product of len_q heads_per_kv rows. The softmax kernel
    scales S (1 flop) and masks it (2) as it reads it; under a causal mask all of S is computed,
    written and read all the same, which wastes about half of the work for len_q = len_kv.

    >>> op = StandardAttention(num_heads=32, len_q=8192, head_dim=128)
    >>> op.work(228 * 1024).tensor_flops[BF16] == 4 * 32 * 8192**2 * 128
    True
    >>> op.work(50 * 2**20).bytes >= 4 * 32 * 8192**2 * 2       # S and P, each written and read
    True
    """

    name: ClassVar[str] = "attention"

    @cached_property
    def kernels(self) -> tuple[Matmul, Softmax, Matmul]:
        """The three kernels as ops, with the tilings that the counts are proved for."""
        products, rows = self.batch * self.kv_heads, self.heads_per_kv * self.len_q
        d, dv, keys = self.head_dim, self.value_dim, self.len_keys
        return (
            Matmul(batch=products, m=rows, n=keys, k=d, dtype=self.dtype),
            Softmax(rows=products * rows, cols=keys, dtype=self.dtype),
            Matmul(batch=products, m=rows, n=dv, k=keys, dtype=self.dtype),
        )

    def stages(self) -> tuple[Stage, ...]:
        """The three kernels, the products batched as libraries run them."""
        scores, softmax, output = self.kernels
        qk, pv = (
            BatchedMatmul(batch=o.batch, m=o.m, n=o.n, k=o.k, dtype=o.dtype)
            for o in (scores, output)
        )
        return Stage("scores", qk), Stage("softmax", softmax), Stage("output", pv)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """The tilings of the three kernels, prefixed `scores_`, `softmax_` and `output_`."""
        return {
            f"{stage}_{key}": value
            for stage, op in zip(("scores", "softmax", "output"), self.kernels, strict=True)
            for key, value in op.tiling(fast_bytes).items()
        }

    def work(self, fast_bytes: Num) -> Work:
        """The sum of the three kernels, and 1 (causal: 3) vector flops per score and pass."""
        scores, softmax, output = self.kernels
        passes = softmax.tiling(fast_bytes)["passes"]
        on_read = passes * softmax.rows * softmax.cols * (1 + MASK_FLOPS * self.causal)
        total = scores.work(fast_bytes) + softmax.work(fast_bytes) + output.work(fast_bytes)
        return total + Work(vector_flops=on_read, launches=0)

    def reference(self, inputs: Arrays) -> Arrays:
        """NumPy, whole matrices at a time."""
        values = np.repeat(inputs["v"], self.sizes().group, axis=1)
        return {"o": probabilities(self, inputs)[0] @ values}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The programs of the three kernels, one after the other."""
        return {"o": self.sizes().unpack(self.run(machine, inputs)[0].values)}

    def run(self, machine: Machine, inputs: Arrays) -> tuple[SlowArray, SlowArray]:
        """O and P as they lie in slow memory, rows packed: [batch kv_heads, len_q group, ...]."""
        s = self.sizes()
        matmul_qk, softmax, matmul_pv = self.kernels
        q = machine.place(s.pack(inputs["q"]), self.dtype)
        k = machine.place(s.merge(inputs["k"]).swapaxes(-1, -2), self.dtype)
        v = machine.place(s.merge(inputs["v"]), self.dtype)
        products, rows = q.values.shape[:2]
        scores = machine.empty((products, rows, s.len_kv), self.dtype)
        p = machine.empty((products, rows, s.len_kv), self.dtype)
        o = machine.empty((products, rows, s.dv), self.dtype)

        def scale_and_mask(mc: Machine, tile: Tile, rows: slice, cols: slice) -> None:
            mc.vector(tile.values * s.scale, into=tile)
            if self.causal:
                masked = np.where(s.visible(rows, cols), tile.values, -np.inf)
                mc.vector(masked, per_element=MASK_FLOPS, into=tile)

        matmul_qk.run(machine, q, k, scores)
        softmax.run(machine, _flat(scores), _flat(p), scale_and_mask)
        matmul_pv.run(machine, p, v, o)
        return o, p


def _flat(array: SlowArray) -> SlowArray:
    """The same slow memory seen as [rows, cols]."""
    return SlowArray(array.values.reshape(-1, array.values.shape[-1]), array.dtype)
