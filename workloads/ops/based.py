"""Based linear attention, fused: chunks of tokens, the feature map only ever in registers.

    phi(x) = [1, x, x x^T] on d dims,  w_ij = phi(q_i) . phi'(k_j) = 1 + s + s^2 / 2,
    s = q_i . k_j / sqrt(d),           o_i = sum_{j <= i} w_ij v_j  (/ sum_{j <= i} w_ij)

the second-order Taylor series of softmax's exponential (Arora et al. 2024, arXiv 2402.18668,
section 4; kernel: HazyResearch/ThunderKittens, examples/based/linear_attn_forward). A state has
three parts, a0 = sum v, a1 = sum k v^T and a2 = sum (k x k) v^T of F rows: d^2, or d (d + 1) / 2
where each product k_i k_j is kept once (`symmetric`). A chunk of c tokens is worked on as

    O  = W V + a0 + Q a1 + sum_i (q_i Q / 2) a2[i],         W = 1 + s + s^2 / 2 for j <= i
    a0 += sum V,   a1 += K^T V,   a2[i] += (k_i K)^T V      for every column i of Q and K

so that nothing of the width of phi is ever written. The normaliser is a column of ones beside V.
State columns that fast memory cannot hold are further passes, which read Q and K again. Per head,
n tokens, u columns of V and of ones over P passes, S = sum c^2:

    products   2 P S d + u (2 S + 4 n (d + F))
    vector     P (2 n d + 2 n F + 6 S) + u (2 n + chunks) + n dv where normalised
    special    P n where normalised

Ignored: storing the final state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from workloads.machine import Machine, SlowArray, Tile, Values, slices
from workloads.numeric import Num, ceil_div, floor, maximum, minimum
from workloads.op import CHUNKED, Arrays, ProvedOp, require_fit
from workloads.ops.attention import MASK_FLOPS
from workloads.ops.feature_map import TAYLOR, KernelFeatures
from workloads.ops.flash_attention import transposed
from workloads.ops.recurrent_step import RecurrentStep
from workloads.work import Work

FP32_BYTES: Final = FP32.bits // 8
TAYLOR_FLOPS: Final = 4
"""(s / 2 + 1) s + 1 of one score."""
ENCODED: Final = "_enc"
"""Ends the names of the arrays of an encoder region."""


@dataclass(frozen=True, slots=True)
class State:
    """Running sums in fast memory: a0[1, u], a1[d, u] and, by column i of K, the rows of a2."""

    a0: Tile
    a1: Tile
    a2: tuple[Tile, ...]


@dataclass(frozen=True, kw_only=True)
class Based(ProvedOp):
    """Q, K[batch, num_heads, len_seq, feature_dim], V, O[..., value_dim], from an empty state.

    >>> op = Based(num_heads=1, len_seq=128, normalised=False)
    >>> op.work(2**18).tensor_flops[BF16] == 2 * 8192 * (16 + 64) + 4 * 128 * 272 * 64
    True
    """

    name: ClassVar[str] = "based"
    tunable: ClassVar[Mapping[str, tuple[int, ...]]] = CHUNKED
    batch: Num = 1
    num_heads: Num
    len_seq: Num
    feature_dim: Num = 16
    value_dim: Num = 64
    chunk: Num = 64
    symmetric: bool = False
    normalised: bool = True
    dtype: DType = BF16

    @property
    def streams(self) -> Num:
        """Heads of all sequences."""
        return self.batch * self.num_heads

    @property
    def encoded(self) -> Num:
        """Tokens of a region whose keys and values every query sees; none here."""
        return 0

    @property
    def num_products(self) -> Num:
        """F, rows of the state's quadratic part."""
        d = self.feature_dim
        return d * (d + 1) // 2 if self.symmetric else d * d

    @property
    def num_features(self) -> Num:
        """Width of phi: 1 + d + F."""
        return 1 + self.feature_dim + self.num_products

    def chunks(self) -> Num:
        """Chunks in which outputs are made."""
        return ceil_div(self.len_seq, self.chunk)

    def encoder_chunks(self) -> Num:
        """Chunks that only add to the state."""
        return ceil_div(self.encoded, self.chunk)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Columns of the state held at a time: all, or what fits beside one chunk."""
        c = minimum(self.chunk, maximum(self.len_seq, self.encoded))
        d, e = self.feature_dim, self.dtype.bytes_per_element
        beside = 2 * c * d * e + FP32_BYTES * (3 * c * d + c * c + c)
        column = 2 * c * e + FP32_BYTES * (self.num_features + 2 * c + 2)
        ones = self.normalised * column
        what = f"a chunk of {np.max(self.chunk):g} tokens and a column of the state"
        require_fit(self.name, fast_bytes, beside + ones + column, what, "take a smaller chunk")
        return {"width": minimum(self.value_dim, floor((fast_bytes - beside - ones) / column))}

    def passes(self, fast_bytes: Num) -> Num:
        """Times that Q and K are gone through."""
        return ceil_div(self.value_dim, self.tiling(fast_bytes)["width"])

    def chunk_squares(self) -> Num:
        """S, the sum of c^2 over the chunks of a sequence."""
        whole = self.len_seq // self.chunk
        rest = self.len_seq - whole * self.chunk
        return whole * self.chunk * self.chunk + rest * rest

    def work(self, fast_bytes: Num) -> Work:
        """The module's table, the encoder's tokens counted where only the state is made."""
        n, m, d, dv = self.len_seq, self.encoded, self.feature_dim, self.value_dim
        passes, squares, pairs = self.passes(fast_bytes), self.chunk_squares(), self.num_products
        columns = dv + passes * self.normalised
        products = 2 * passes * squares * d + columns * (
            2 * squares + (4 * n + 2 * m) * (d + pairs)
        )
        each = 2 * n * d + (2 * n + m) * pairs + (TAYLOR_FLOPS + MASK_FLOPS) * squares
        sums = 2 * n + m + self.chunks() + self.encoder_chunks()
        e = self.dtype.bytes_per_element
        return Work(
            tensor_flops={self.dtype: self.streams * products},
            vector_flops=self.streams * (passes * each + columns * sums + self.normalised * n * dv),
            special_ops=self.streams * passes * n * self.normalised,
            read_bytes=self.streams * (passes * (2 * n + m) * d + (n + m) * dv) * e,
            write_bytes=self.streams * n * dv * e,
        )

    def compulsory_bytes(self) -> Num:
        """Q, K, V and O once, K and V of an encoder region once."""
        n, m, d, dv = self.len_seq, self.encoded, self.feature_dim, self.value_dim
        elements = 2 * n * (d + dv) + m * (d + dv)
        return self.streams * elements * self.dtype.bytes_per_element

    def min_flops(self) -> Mapping[DType, Num]:
        """The recurrence: update and output, 2 (d + F) a column each; encoders only update."""
        rows = (self.feature_dim + self.num_products) * (self.value_dim + self.normalised)
        return {self.dtype: self.streams * (4 * self.len_seq + 2 * self.encoded) * rows}

    def state_bytes(self) -> Num:
        """What decoding keeps of all heads, in fp32."""
        columns = self.value_dim + self.normalised
        return self.streams * self.num_features * columns * FP32_BYTES

    def features(self) -> KernelFeatures:
        """phi of one token of all heads, which decoding writes out."""
        return KernelFeatures(
            rows=self.streams, dim=self.feature_dim, feature=TAYLOR, dtype=self.dtype
        )

    def step(self) -> RecurrentStep:
        """The step of decoding on those features: one new token from the state."""
        return RecurrentStep(
            batch=self.batch, num_heads=self.num_heads, key_dim=self.features().width,
            value_dim=self.value_dim, normalised=self.normalised, dtype=self.dtype,
        )  # fmt: skip

    # ---- program -------------------------------------------------------------------------------

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random q, k, v, and k, v of an encoder region."""
        lead = int(self.batch), int(self.num_heads)
        widths = {"q": self.feature_dim, "k": self.feature_dim, "v": self.value_dim}
        found = {
            name: rng.standard_normal((*lead, int(self.len_seq), int(w)))
            for name, w in widths.items()
        }
        if self.encoded:
            for name in ("k", "v"):
                shape = (*lead, int(self.encoded), int(widths[name]))
                found[name + ENCODED] = rng.standard_normal(shape)
        return found

    def reference(self, inputs: Arrays) -> Arrays:
        """Token by token, on features written out."""
        q = _features(inputs["q"] / inputs["q"].shape[-1] ** 0.5, 0.5)
        k, v = _features(inputs["k"], 1.0), _with_ones(inputs["v"])
        state = np.zeros((*q.shape[:2], q.shape[3], v.shape[3]))
        if self.encoded:
            encoder = _features(inputs["k" + ENCODED], 1.0)
            state += np.einsum("bhnf,bhne->bhfe", encoder, _with_ones(inputs["v" + ENCODED]))
        o = np.empty_like(v)
        for t in range(q.shape[2]):
            state = state + k[:, :, t, :, None] * v[:, :, t, None]
            o[:, :, t] = np.einsum("bhf,bhfe->bhe", q[:, :, t], state)
        return {"o": o[..., :-1] / o[..., -1:] if self.normalised else o[..., :-1]}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel: each head and block of columns through the encoder's chunks, then its own."""
        placed = {
            name: machine.place(x.reshape(-1, *x.shape[2:]), self.dtype)
            for name, x in inputs.items()
        }
        o = machine.empty(placed["v"].values.shape, self.dtype)
        width = int(self.tiling(machine.fast_bytes)["width"])
        with machine.kernel():
            for stream in range(len(o.values)):
                for cols in slices(int(self.value_dim), width):
                    with machine.scope():
                        self._pass(machine, placed, o, stream, cols)
        return {"o": o.values.reshape(inputs["v"].shape)}

    def _pass(
        self, mc: Machine, a: Mapping[str, SlowArray], o: SlowArray, stream: int, cols: slice
    ) -> None:
        d = int(self.feature_dim)
        width = cols.stop - cols.start + self.normalised
        state = State(
            mc.full((1, width), 0.0),
            mc.full((d, width), 0.0),
            tuple(mc.full((d - first, width), 0.0) for first in self._first_columns()),
        )
        for rows in slices(int(self.encoded), int(self.chunk)):
            with mc.scope():
                k = mc.load(a["k" + ENCODED], (stream, rows))
                self._add(mc, k, self._values(mc, a["v" + ENCODED], (stream, rows, cols)), state)
        for rows in slices(int(self.len_seq), int(self.chunk)):
            with mc.scope():
                q, k = (mc.load(a[name], (stream, rows)) for name in ("q", "k"))
                v = self._values(mc, a["v"], (stream, rows, cols))
                out = self._outputs(mc, (q, k, v), state)
                mc.store(out, o, (stream, rows, cols))
                self._add(mc, k, v, state)

    def _first_columns(self) -> list[int]:
        """The first j of the products x_i x_j that are kept, for every i."""
        return [i * self.symmetric for i in range(int(self.feature_dim))]

    def _values(self, mc: Machine, v: SlowArray, index: tuple[object, ...]) -> Tile:
        """Some values, a column of ones beside them for the normaliser."""
        tile = mc.load(v, index)
        if not self.normalised:
            return tile
        wide = mc.hold(_with_ones(tile.values), self.dtype)
        mc.free(tile)
        return wide

    def _outputs(self, mc: Machine, chunk: tuple[Tile, Tile, Tile], state: State) -> Tile:
        """What the chunk's queries read from the state and from the chunk itself."""
        q, k, v = chunk
        scaled = mc.vector(q.values * q.shape[1] ** -0.5)
        out = mc.full(v.shape, 0.0)
        with mc.scope():
            with transposed(k):
                scores = mc.matmul(scaled, k, self.dtype)
            s = scores.values
            mc.vector((s / 2 + 1) * s + 1, per_element=TAYLOR_FLOPS, into=scores)
            mc.vector(np.tril(scores.values), per_element=MASK_FLOPS, into=scores)
            mc.matmul(scores, v, self.dtype, into=out)
        mc.vector(out.values + state.a0.values, into=out)
        mc.matmul(scaled, state.a1, self.dtype, into=out)
        with mc.scope():
            halves = mc.vector(scaled.values / 2)
            for i, part in enumerate(state.a2):
                with mc.scope():
                    # of the products kept once, x_i x_j counts for x_j x_i as well
                    first = i * self.symmetric
                    right = scaled.values[:, first:]
                    if self.symmetric:
                        right = np.concatenate([halves.values[:, i : i + 1], right[:, 1:]], axis=1)
                    left = (scaled if self.symmetric else halves).values[:, i : i + 1]
                    mc.matmul(mc.vector(left * right), part, self.dtype, into=out)
        return self._normalised(mc, out) if self.normalised else out

    def _normalised(self, mc: Machine, out: Tile) -> Tile:
        inverse = mc.special(1 / out.values[:, -1:])
        return mc.vector(out.values[:, :-1] * inverse.values)

    def _add(self, mc: Machine, k: Tile, v: Tile, state: State) -> None:
        """The chunk's keys and values into the state."""
        with mc.scope():
            total = mc.reduce("sum", v, axis=0)
            mc.vector(state.a0.values + total.values, into=state.a0)
        with transposed(k):
            mc.matmul(k, v, self.dtype, into=state.a1)
        for i, (first, part) in enumerate(zip(self._first_columns(), state.a2, strict=True)):
            with mc.scope():
                product = mc.vector(k.values[:, i : i + 1] * k.values[:, first:])
                with transposed(product):
                    mc.matmul(product, v, self.dtype, into=part)


def _with_ones(v: Values) -> Values:
    return np.concatenate([v, np.ones((*v.shape[:-1], 1))], axis=-1)


def _features(x: Values, factor: float) -> Values:
    """[1, x, factor x x^T], rows flattened."""
    pairs = factor * np.einsum("...i,...j->...ij", x, x)
    return np.concatenate([np.ones_like(x[..., :1]), x, pairs.reshape(*x.shape[:-1], -1)], axis=-1)
