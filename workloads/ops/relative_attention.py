"""Attention with relative positions: the skewed product, and the gather it took the place of.

Huang et al. 2018 (arXiv 1809.04281, section 3.4): a causal query i sees key j with the score

    S_ij = (q_i k_j + q_i e_(j - i)) / sqrt(d),    j <= i

where e_r is a learned vector for each distance r = -(L - 1) .. 0 and head. Shaw et al. 2018
(arXiv 1803.02155) gather R_ij = e_(j - i) into L x L x d numbers. Here one product of Q with the
L x d matrix E gives every q_i e_r, and skewing moves them to their places: a column is put in
front, [L, L + 1] is read as [L + 1, L] and the first row is dropped.

    relative product   2 L^2 d flops a head          pad, slice   e L (3 L + L + 1) bytes a head
    kept for it        e (H L d + b H L^2)           instead of   e (H L^2 d + b H L^2)

Then the usual unfused attention, the two scores added on the way: seven kernels. What skewing puts
above the diagonal belongs to other rows; the mask drops it, and so all L^2 scores are computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import BF16, DType
from workloads.machine import Machine, SlowArray, Tile, Values, slices
from workloads.numeric import Num, floor, maximum, minimum
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.attention import MASK_FLOPS
from workloads.ops.elementwise import Elementwise, add
from workloads.ops.matmul import BatchedMatmul
from workloads.ops.softmax import Softmax
from workloads.ops.staged import ProvedStagedOp
from workloads.work import Work

ON_READ_FLOPS = 1 + MASK_FLOPS
"""Vector flops a score as softmax reads it: scale, mask."""


@dataclass(frozen=True, kw_only=True)
class Skew(ProvedOp):
    """x[count, len, len] -> y[count, len, len] with y_ij = x_i,(j - i + len - 1) for j <= i.

    Two kernels that copy: a column of zeros in front, then all but the first row of [len + 1, len].

    >>> Skew(count=8, len_seq=100).work(2**16).bytes == 8 * 2 * (3 * 100**2 + 100 * 101)
    True
    """

    name: ClassVar[str] = "skew"
    count: Num = 1
    len_seq: Num
    dtype: DType = BF16

    def stages(self) -> tuple[Stage, ...]:
        """Two copies; the zeros count as read."""
        padded = self.count * self.len_seq * (self.len_seq + 1)
        pad, cut = (
            Elementwise(num_elements=n, vector_flops_per_element=0, dtype=self.dtype)
            for n in (padded, self.count * self.len_seq * self.len_seq)
        )
        return Stage("pad", pad), Stage("slice", cut)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Elements of a row held at a time."""
        e = self.dtype.bytes_per_element
        require_fit(self.name, fast_bytes, e, "one element")
        return {"chunk": maximum(minimum(self.len_seq, floor(fast_bytes / e)), 1)}

    def work(self, fast_bytes: Num) -> Work:
        """Copies: bytes alone."""
        self.tiling(fast_bytes)
        e, square = self.dtype.bytes_per_element, self.count * self.len_seq * self.len_seq
        return Work(
            read_bytes=2 * square * e,
            write_bytes=(2 * square + self.count * self.len_seq) * e,
            launches=2,
        )

    def compulsory_bytes(self) -> Num:
        """In once, out once."""
        return 2 * self.count * self.len_seq * self.len_seq * self.dtype.bytes_per_element

    def min_flops(self) -> Mapping[DType, Num]:
        """No products."""
        return {}

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x[count, len, len]."""
        length = int(self.len_seq)
        return {"x": rng.standard_normal((int(self.count), length, length))}

    def reference(self, inputs: Arrays) -> Arrays:
        """By index. Above the diagonal: zero at j = i + 1, then the next row's first elements."""
        x, length = inputs["x"], int(self.len_seq)
        i, j = np.indices((length, length))
        below = x[:, i, np.clip(j - i + length - 1, 0, length - 1)]
        above = x[:, np.minimum(i + 1, length - 1), np.clip(j - i - 2, 0, length - 1)]
        return {"y": np.where(j <= i, below, np.where(j == i + 1, 0.0, above))}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The two kernels; reading [L, L + 1] as [L + 1, L] moves nothing."""
        x = machine.place(inputs["x"], self.dtype)
        count, length = x.values.shape[:2]
        padded = machine.empty((count, length, length + 1), self.dtype)
        y = machine.empty(x.values.shape, self.dtype)
        parts = slices(length, int(self.tiling(machine.fast_bytes)["chunk"]))
        with machine.kernel():
            for i, row in np.ndindex(count, length):
                with machine.scope():
                    machine.store(machine.full((1,), 0.0, self.dtype), padded, (i, row, slice(1)))
                for part in parts:
                    moved = slice(part.start + 1, part.stop + 1)
                    _copy(machine, (x, (i, row, part)), (padded, (i, row, moved)))
        again = SlowArray(padded.values.reshape(count, length + 1, length), self.dtype)
        with machine.kernel():
            for i, row in np.ndindex(count, length):
                for part in parts:
                    _copy(machine, (again, (i, row + 1, part)), (y, (i, row, part)))
        return {"y": y.values}


@dataclass(frozen=True, kw_only=True)
class RelativeAttention(ProvedStagedOp):
    """Causal Q, K, V, O[batch, num_heads, len_seq, head_dim] with E[num_heads, len_seq, head_dim].

    E's last row is distance 0. Every sequence of the batch uses the same E.

    >>> op = RelativeAttention(num_heads=8, len_seq=2048, head_dim=64, dtype="fp32")
    >>> op.embedding_bytes() / 1e6, op.gathered_bytes() / 1e6      # the paper's 4.2 MB and 8.5 GB
    (4.194304, 8589.934592)
    """

    name: ClassVar[str] = "relative_attention"
    batch: Num = 1
    num_heads: Num
    len_seq: Num
    head_dim: Num
    dtype: DType = BF16

    @property
    def _products(self) -> Num:
        return self.batch * self.num_heads

    def embedding_bytes(self) -> Num:
        """E of all heads: H L d numbers."""
        return self.num_heads * self.len_seq * self.head_dim * self.dtype.bytes_per_element

    def gathered_bytes(self) -> Num:
        """What Shaw's form gathers in its place: one e for every query, key and head."""
        return self.embedding_bytes() * self.len_seq

    def logits_bytes(self) -> Num:
        """The relative scores: b H L^2 numbers."""
        scores = self._products * self.len_seq * self.len_seq
        return scores * self.dtype.bytes_per_element

    def intermediate_bytes(self, *, gathered: bool = False) -> Num:
        """Embeddings and relative scores, skewed or `gathered` (the paper's table 1, a head)."""
        held = self.gathered_bytes() if gathered else self.embedding_bytes()
        return held + self.logits_bytes()

    def relative_product(self) -> BatchedMatmul:
        """Q E^T head by head, all sequences together."""
        return BatchedMatmul(
            batch=self.num_heads, m=self.batch * self.len_seq, n=self.len_seq, k=self.head_dim,
            dtype=self.dtype,
        )  # fmt: skip

    def skew(self) -> Skew:
        """To the places of the keys."""
        return Skew(count=self._products, len_seq=self.len_seq, dtype=self.dtype)

    def score_product(self) -> BatchedMatmul:
        """Q K^T."""
        return BatchedMatmul(
            batch=self._products, m=self.len_seq, n=self.len_seq, k=self.head_dim, dtype=self.dtype
        )

    def addition(self) -> Elementwise:
        """Both scores."""
        return add(self._products * self.len_seq * self.len_seq, self.dtype)

    def softmax(self) -> Softmax:
        """Over each row; it scales and masks what it reads."""
        return Softmax(rows=self._products * self.len_seq, cols=self.len_seq, dtype=self.dtype)

    def output_product(self) -> BatchedMatmul:
        """P V."""
        return BatchedMatmul(
            batch=self._products, m=self.len_seq, n=self.head_dim, k=self.len_seq, dtype=self.dtype
        )

    def stages(self) -> tuple[Stage, ...]:
        """The kernels in order."""
        return (
            Stage("relative", self.relative_product()),
            Stage("skew", self.skew()),
            Stage("scores", self.score_product()),
            Stage("add", self.addition()),
            Stage("softmax", self.softmax()),
            Stage("output", self.output_product()),
        )

    def work(self, fast_bytes: Num) -> Work:
        """The sum of the kernels, and 3 vector flops a score and pass of the softmax."""
        softmax = self.softmax()
        passes = softmax.tiling(fast_bytes)["passes"]
        on_read = ON_READ_FLOPS * passes * softmax.rows * softmax.cols
        return super().work(fast_bytes) + Work(vector_flops=on_read, launches=0)

    def min_flops(self) -> Mapping[DType, Num]:
        """Three products over the pairs of the causal mask: 6 d L (L + 1) / 2 a head."""
        pairs = self._products * (self.len_seq * (self.len_seq + 1) // 2)
        return {self.dtype: 6 * pairs * self.head_dim}

    def compulsory_bytes(self) -> Num:
        """Q, K, V, O and E once."""
        rows = 4 * self._products * self.len_seq * self.head_dim
        return rows * self.dtype.bytes_per_element + self.embedding_bytes()

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, k, v[batch, heads, len, dim] and e[heads, len, dim]."""
        shape = tuple(int(n) for n in (self.batch, self.num_heads, self.len_seq, self.head_dim))
        found = {name: rng.standard_normal(shape) for name in ("q", "k", "v")}
        return {**found, "e": rng.standard_normal(shape[1:])}

    @property
    def _scale(self) -> float:
        return math.pow(float(self.head_dim), -0.5)

    def reference(self, inputs: Arrays) -> Arrays:
        """Shaw's form: the embedding of every pair gathered, then one masked softmax."""
        length = int(self.len_seq)
        i, j = np.indices((length, length))
        gathered = inputs["e"][:, np.clip(j - i + length - 1, 0, length - 1)]
        relative = np.einsum("bhid,hijd->bhij", inputs["q"], gathered)
        scores = (inputs["q"] @ inputs["k"].swapaxes(-1, -2) + relative) * self._scale
        scores = np.where(j <= i, scores, -np.inf)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return {"o": p / p.sum(axis=-1, keepdims=True) @ inputs["v"]}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The programs of the kernels, the softmax scaling and masking what it reads."""
        batch, heads, length, dim = inputs["q"].shape
        q, k, v = (inputs[n].reshape(-1, length, dim) for n in ("q", "k", "v"))
        by_head = inputs["q"].swapaxes(0, 1).reshape(heads, -1, dim)
        turned = {"a": by_head, "b": inputs["e"].swapaxes(-1, -2)}
        relative = self.relative_product().program(machine, turned)["c"]
        relative = relative.reshape(heads, batch, length, length).swapaxes(0, 1)
        skewed = self.skew().program(machine, {"x": relative.reshape(-1, length, length)})["y"]
        scores = self.score_product().program(machine, {"a": q, "b": k.swapaxes(-1, -2)})["c"]
        both = self.addition().program(
            machine, {"x0": scores.reshape(-1), "x1": skewed.reshape(-1)}
        )["y0"]
        p = self._probabilities(machine, both.reshape(-1, length))
        out = self.output_product().program(
            machine, {"a": p.reshape(-1, length, length), "b": v}
        )["c"]  # fmt: skip
        return {"o": out.reshape(inputs["q"].shape)}

    def _probabilities(self, machine: Machine, scores: Values) -> Values:
        x = machine.place(scores, self.dtype)
        p = machine.empty(scores.shape, self.dtype)
        length = int(self.len_seq)

        def scale_and_mask(mc: Machine, tile: Tile, rows: slice, cols: slice) -> None:
            position = np.arange(rows.start, rows.stop)[:, None] % length
            seen = np.arange(cols.start, cols.stop) <= position
            scaled = np.where(seen, tile.values * self._scale, -np.inf)
            mc.vector(scaled, per_element=ON_READ_FLOPS, into=tile)

        self.softmax().run(machine, x, p, scale_and_mask)
        return p.values


def _copy(
    machine: Machine, source: tuple[SlowArray, object], target: tuple[SlowArray, object]
) -> None:
    """From one place in slow memory to another."""
    with machine.scope():
        machine.store(machine.load(*source), *target)
