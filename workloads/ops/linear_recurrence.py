"""Linear recurrences on a matrix state, computed in chunks: one core for every decay and rule.

Per head, with a state S of key_dim x value_dim (dk, dv) and a decay a_t in (0, 1]:

    additive   S_t = diag(a_t) S_{t-1} + k_t v_t^T
    delta      S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T
    output     o_t = S_t^T q_t,   divided by q_t . z_t where normalised, z_t = a_t z_{t-1} + k_t

`decay` is 'none' (linear attention, Katharopoulos et al. 2020), 'scalar' (retention, Lightning
Attention, Mamba-2: one a head and step) or 'channel' (GLA, Yang et al. 2024, arXiv 2312.06635: one
a key channel); `rule` 'additive' or 'delta' (DeltaNet, Yang et al. 2024, arXiv 2406.06484, section
3.2; gated: arXiv 2412.06464, section 3.3). Decays come as logarithms g <= 0, fp32.

A chunk of c tokens, G its running sums of g, is worked on as

    O = (Q e^G) S + A V,                     A_ij = (q_i . k_j) e^(G_i - G_j)  for j <= i
    S = e^(G_c) S + (K e^(G_c - G))^T V

under the delta rule with V replaced by U - W S, where T = (I + tril(b K K^T e^(G_i - G_j), -1))^-1,
U = T (b V), W = T (b K e^G). No exponent is ever positive: under 'channel' the scores are taken in
blocks of `sub_chunk` rows, left of the diagonal block by products relative to the block's first
row, inside it element by element (GLA, section 4.3).

One kernel runs through a sequence's chunks with `width` columns of S in fast memory; more columns
are further passes, which read Q and K and compute A again. Ignored: storing the final state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from hwmodels.errors import InputError, UnknownNameError
from workloads.machine import Machine, SlowArray, Tile, Values, slices
from workloads.numeric import Num, any_true, ceil_div, floor, minimum
from workloads.op import CHUNKED, Arrays, ProvedOp, Stage, require_fit
from workloads.ops.attention import MASK_FLOPS
from workloads.ops.delta_rule import GatedDeltaRule
from workloads.ops.flash_attention import transposed
from workloads.work import Work

NONE, SCALAR, CHANNEL = "none", "scalar", "channel"
DECAYS = (NONE, SCALAR, CHANNEL)
ADDITIVE, DELTA = "additive", "delta"
RULES = (ADDITIVE, DELTA)


class _Sums(NamedTuple):
    """Sums over a sequence's chunks, c their lengths and s the lengths of their sub-chunks.

    `chunks`: how many. `squares`: c^2. `inverses`: c (c - 1) (2 c - 1) / 3, the substitution of a
    triangular inverse. `diagonal`: s^2. `later`: rows behind the first sub-chunk. `before`: over
    sub-chunks, the rows before each.
    """

    chunks: Num
    squares: Num
    inverses: Num
    diagonal: Num
    later: Num
    before: Num


@dataclass(frozen=True, kw_only=True)
class LinearRecurrence(ProvedOp):
    """Q, K[batch, num_heads, len_seq, key_dim], V[..., value_dim], from an empty state.

    `value_dim` left out follows `key_dim`.

    >>> op = LinearRecurrence(num_heads=1, len_seq=128, key_dim=64, chunk=64)
    >>> op.work(2**18).tensor_flops[BF16] == 2 * (2 * 64**2 * 128 + 4 * 64 * 64 * 64)
    True
    """

    name: ClassVar[str] = "linear_recurrence"
    tunable: ClassVar[Mapping[str, tuple[int, ...]]] = CHUNKED
    batch: Num = 1
    num_heads: Num
    len_seq: Num
    key_dim: Num
    value_dim: Num | None = None
    chunk: Num = 64
    sub_chunk: Num = 16
    decay: str = NONE
    rule: str = ADDITIVE
    normalised: bool = False
    dtype: DType = BF16

    def check(self) -> None:
        """Known words, and forms that the chunked algorithm has."""
        if self.decay not in DECAYS:
            raise UnknownNameError("decay", self.decay, DECAYS)
        if self.rule not in RULES:
            raise UnknownNameError("rule", self.rule, RULES)
        if self.rule == DELTA and (self.decay == CHANNEL or self.normalised):
            raise InputError(
                f"{self.name}: the delta rule is counted without a normaliser and with decay "
                "'none' or 'scalar'; change decay or rule"
            )
        if any_true(np.greater(self.sub_chunk, self.chunk)):
            longest, shortest = np.max(self.sub_chunk), np.min(self.chunk)
            raise InputError(
                f"{self.name}: sub_chunk = {longest} is longer than chunk = {shortest}"
            )

    @property
    def width_v(self) -> Num:
        """`value_dim`, else `key_dim`."""
        return self.key_dim if self.value_dim is None else self.value_dim

    @property
    def rows(self) -> Num:
        """Tokens of the longest chunk."""
        return minimum(self.chunk, self.len_seq)

    @property
    def num_chunks(self) -> Num:
        """Chunks of a sequence."""
        return ceil_div(self.len_seq, self.chunk)

    def stages(self) -> tuple[Stage, ...]:
        """A delta rule is timed as the gated one; additive rules by a kernel model of their own."""
        if self.rule == ADDITIVE:
            return ()
        delta = GatedDeltaRule(
            batch=self.batch, len_seq=self.len_seq, num_heads=self.num_heads,
            num_key_heads=self.num_heads, key_dim=self.key_dim, value_dim=self.width_v,
            chunk=self.chunk, dtype=self.dtype,
        )  # fmt: skip
        return (Stage("chunks", delta),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Columns of the state held at a time: all, or what fits beside one chunk."""
        c, dk, e, delta = self.rows, self.key_dim, self.dtype.bytes_per_element, self.rule == DELTA
        scores = 1 + (self.decay == SCALAR) + 2 * delta  # c x c arrays held together
        copies = {NONE: 0, SCALAR: 1, CHANNEL: 3}[self.decay] + 2 * delta  # c x dk, of q or k
        small = 8 * c + 4 * dk
        beside = 2 * c * dk * e + FP32_BYTES * (scores * c * c + copies * c * dk + small)
        column = c * e + FP32_BYTES * (dk + c + 3 * delta * c)
        what = f"a chunk of {np.max(self.chunk):g} tokens and a column of the state"
        require_fit(self.name, fast_bytes, beside + column, what, "take a smaller chunk")
        return {"width": minimum(self.width_v, floor((fast_bytes - beside) / column))}

    def _sums(self) -> _Sums:
        c, n = self.chunk, self.len_seq
        whole = n // c
        rest = n - whole * c
        subs, last = _sub_sums(c, self.sub_chunk), _sub_sums(rest, self.sub_chunk)
        return _Sums(
            chunks=ceil_div(n, c),
            squares=whole * c * c + rest * rest,
            inverses=whole * _inverse(c) + _inverse(rest),
            diagonal=whole * subs[0] + last[0],
            later=whole * subs[1] + last[1],
            before=whole * subs[2] + last[2],
        )

    def work(self, fast_bytes: Num) -> Work:
        """Sums over chunks of the module's equations; what a pass repeats, times the passes.

        products   a pass: 2 c^2 dk (A);  once: 2 c^2 dv + 4 c dk dv
                   delta: 4 c^2 dk more a pass, 2 c^2 dv + 2 c dk dv more once
        """
        streams = self.batch * self.num_heads
        sums, dk, dv, n = self._sums(), self.key_dim, self.width_v, self.len_seq
        passes = ceil_div(dv, self.tiling(fast_bytes)["width"])
        e, delta = self.dtype.bytes_per_element, self.rule == DELTA
        scores = dk * (sums.squares - sums.diagonal) if self.decay == CHANNEL else (
            2 * sums.squares * dk
        )  # fmt: skip
        each = scores + delta * 4 * sums.squares * dk + self.normalised * 2 * n * dk
        once = (2 + 2 * delta) * sums.squares * dv + (4 + 2 * delta) * n * dk * dv
        vector, special = self._lanes(sums)
        gates = {NONE: 0, SCALAR: n, CHANNEL: n * dk}[self.decay] * FP32_BYTES
        gates = gates + delta * n * e
        decayed = self.decay != NONE
        totals = decayed * sums.chunks * dk * dv + (self.normalised + 2 * delta) * n * dv
        return Work(
            tensor_flops={self.dtype: streams * (passes * each + once)},
            vector_flops=streams * (passes * vector + totals),
            special_ops=streams * passes * special,
            read_bytes=streams * (passes * (2 * n * dk * e + gates) + n * dv * e),
            write_bytes=streams * n * dv * e,
        )

    def _lanes(self, s: _Sums) -> tuple[Num, Num]:
        """Vector flops and special functions of one pass over one sequence and head."""
        n, dk = self.len_seq, self.key_dim
        vector: Num = MASK_FLOPS * s.squares
        special: Num = 0
        if self.decay == SCALAR:
            vector = (2 + MASK_FLOPS) * s.squares + 2 * n + 2 * n * dk
            special = s.squares + 2 * n + s.chunks
        elif self.decay == CHANNEL:
            vector = (4 * dk + MASK_FLOPS) * s.diagonal + 4 * n * dk
            vector = vector + 2 * dk * (s.later + s.before)
            special = dk * (s.diagonal + 2 * n + s.chunks + s.later + s.before)
        if self.rule == DELTA:
            scaled = 2 if self.decay == SCALAR else 1
            vector = vector + (MASK_FLOPS + scaled) * s.squares + s.inverses + scaled * n * dk
        if self.normalised:
            vector = vector + s.squares + n + n * dk + s.chunks * dk * (1 + (self.decay != NONE))
            special = special + n
        return vector, special

    def compulsory_bytes(self) -> Num:
        """Q, K, V, gates and O once."""
        n, dk, e = self.len_seq, self.key_dim, self.dtype.bytes_per_element
        gates = {NONE: 0, SCALAR: 1, CHANNEL: dk}[self.decay] * FP32_BYTES + (
            self.rule == DELTA
        ) * e
        per_token = 2 * (dk + self.width_v) * e + gates
        return self.batch * self.num_heads * n * per_token

    def min_flops(self) -> Mapping[DType, Num]:
        """The recurrence itself: update and output, 2 dk dv each; S^T k besides for delta."""
        products = 6 if self.rule == DELTA else 4
        state = self.batch * self.num_heads * self.key_dim * self.width_v
        return {self.dtype: products * state * self.len_seq}

    def chunk_squares(self) -> Num:
        """Sum of c^2 over the chunks of a sequence."""
        return self._sums().squares

    def state_bytes(self) -> Num:
        """The state of all sequences and heads in fp32: what decoding keeps."""
        return self.batch * self.num_heads * self.key_dim * self.width_v * FP32_BYTES

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random q, k, v; log decays from near 0 to strong; b in (0, 1) on unit keys for delta."""
        shape = int(self.batch), int(self.num_heads), int(self.len_seq)
        dk, dv = int(self.key_dim), int(self.width_v)
        q, k = (rng.standard_normal((*shape, dk)) for _ in range(2))
        found = {"q": q, "k": k, "v": rng.standard_normal((*shape, dv))}
        if self.normalised:  # features are positive
            found |= {"q": np.abs(q) + 0.1, "k": np.abs(k) + 0.1}
        if self.rule == DELTA:
            found |= {"k": k / np.linalg.norm(k, axis=-1, keepdims=True), "b": rng.random(shape)}
        if self.decay == SCALAR:
            found["g"] = -(10 ** rng.uniform(-6, 1.5, shape))
        elif self.decay == CHANNEL:
            found["g"] = -(10 ** rng.uniform(-6, 1.5, (*shape, dk)))
        return found

    def reference(self, inputs: Arrays) -> Arrays:
        """Token by token."""
        q, k, v = (inputs[name] for name in ("q", "k", "v"))
        state = np.zeros((*q.shape[:2], q.shape[3], v.shape[3]))
        total = np.zeros((*q.shape[:2], q.shape[3]))
        o = np.empty_like(v)
        for t in range(q.shape[2]):
            kt, vt = k[:, :, t], v[:, :, t]
            if self.decay != NONE:
                a = np.exp(inputs["g"][:, :, t])
                a = a if self.decay == CHANNEL else a[..., None]
                state, total = a[..., None] * state, a * total
            if self.rule == DELTA:
                seen = np.einsum("bhd,bhde->bhe", kt, state)
                vt = inputs["b"][:, :, t, None] * (vt - seen)
            state = state + kt[..., None] * vt[:, :, None]
            total = total + kt
            o[:, :, t] = np.einsum("bhd,bhde->bhe", q[:, :, t], state)
            if self.normalised:
                o[:, :, t] /= np.einsum("bhd,bhd->bh", q[:, :, t], total)[..., None]
        return {"o": o}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel: for each sequence, head and column block, through the chunks."""
        placed = {
            name: machine.place(
                values.reshape(-1, int(self.len_seq), values.shape[3] if values.ndim == 4 else 1),
                FP32 if name == "g" else self.dtype,
            )
            for name, values in inputs.items()
        }
        o = machine.empty(placed["v"].values.shape, self.dtype)
        width = int(self.tiling(machine.fast_bytes)["width"])
        with machine.kernel():
            for stream in range(o.values.shape[0]):
                for cols in slices(o.values.shape[2], width):
                    with machine.scope():
                        self._pass(machine, placed, o, stream, cols)
        return {"o": o.values.reshape(inputs["v"].shape)}

    def _pass(
        self, mc: Machine, a: Mapping[str, SlowArray], o: SlowArray, stream: int, cols: slice
    ) -> None:
        """All chunks of one sequence and head, for some columns of its state."""
        dk = int(self.key_dim)
        state, total = mc.full((dk, cols.stop - cols.start), 0.0), mc.full((dk, 1), 0.0)
        for rows in slices(int(self.len_seq), int(self.chunk)):
            with mc.scope():
                q, k = (mc.load(a[name], (stream, rows)) for name in ("q", "k"))
                v = mc.load(a["v"], (stream, rows, cols))
                decays = self._decays(mc, a, stream, rows)
                scores = self._scores(mc, q, k, decays)
                if self.rule == DELTA:
                    b = mc.load(a["b"], (stream, rows))
                    v = self._corrected(mc, k, v, b, state, decays)
                out = mc.full(v.shape, 0.0)
                with mc.scope():
                    q_in = decays.inward(mc, q)
                    mc.matmul(q_in, state, self.dtype, into=out)
                    mc.matmul(scores, v, self.dtype, into=out)
                    if self.normalised:
                        self._normalise(mc, out, scores, q_in, total)
                mc.store(out, o, (stream, rows, cols))
                self._advance(mc, decays.outward(mc, k), v, decays, (state, total))

    def _advance(
        self, mc: Machine, k: Tile, v: Tile, decays: _Decays, held: tuple[Tile, Tile]
    ) -> None:
        """The state, and the normaliser's sums, at the end of the chunk."""
        state, total = held
        if self.normalised:
            decays.shrink(mc, total)
            added = mc.reduce("sum", k, axis=0)
            mc.vector(total.values + added.values.T, into=total)
        decays.shrink(mc, state)
        with transposed(k):
            mc.matmul(k, v, self.dtype, into=state)

    def _decays(self, mc: Machine, a: Mapping[str, SlowArray], stream: int, rows: slice) -> _Decays:
        """A chunk's log decays summed up, and e^ of them; nothing without decay."""
        if self.decay == NONE:
            return _Decays(None, None, None)
        g = mc.load(a["g"], (stream, rows))
        mc.vector(np.cumsum(g.values, axis=0), into=g)
        return _Decays(g, mc.special(np.exp(g.values)), mc.special(np.exp(g.values[-1:])))

    def _scores(self, mc: Machine, q: Tile, k: Tile, decays: _Decays) -> Tile:
        """A of the chunk, decayed and masked."""
        if self.decay == CHANNEL:
            return self._channel_scores(mc, q, k, decays)
        with transposed(k):
            scores = mc.matmul(q, k, self.dtype)
        if decays.between is None and self.decay == SCALAR:
            decays.between = _between(mc, decays)
        if decays.between is not None:
            mc.vector(scores.values * decays.between.values, into=scores)
        return mc.vector(np.tril(scores.values), per_element=MASK_FLOPS, into=scores)

    def _channel_scores(self, mc: Machine, q: Tile, k: Tile, decays: _Decays) -> Tile:
        """Blocks of `sub_chunk` rows: products to the left, element by element on the diagonal."""
        assert decays.sums is not None
        sums, scores = decays.sums.values, mc.full((q.shape[0], q.shape[0]), 0.0)
        for block in slices(q.shape[0], int(self.sub_chunk)):
            if block.start:
                with mc.scope():
                    left = slice(0, block.start)
                    first = sums[block.start : block.start + 1]
                    near = _relative(mc, q.values[block], sums[block] - first)
                    far = _relative(mc, k.values[left], first - sums[left])
                    with transposed(far):
                        product = mc.matmul(near, far, self.dtype)
                    scores.values[block, left] = product.values
            gap = sums[block][:, None] - sums[block][None]
            inside = np.einsum("id,jd,ijd->ij", q.values[block], k.values[block],
                               np.exp(np.minimum(gap, 0)))  # fmt: skip
            mc.count(vector=4 * gap.size + MASK_FLOPS * inside.size, special=gap.size)
            scores.values[block, block] = np.tril(inside)
        return scores

    def _corrected(
        self, mc: Machine, k: Tile, v: Tile, b: Tile, state: Tile, decays: _Decays
    ) -> Tile:
        """U - W S: what the delta rule adds in place of V."""
        new = mc.full(v.shape, 0.0)
        with mc.scope():
            self._correct(mc, k, v, b, (state, new), decays)
        return new

    def _correct(
        self,
        mc: Machine,
        k: Tile,
        v: Tile,
        b: Tile,
        held: tuple[Tile, Tile],
        decays: _Decays,
    ) -> None:
        """Overwrite `new` by U - W S, with what that needs held beside."""
        state, new = held
        inner = mc.full((k.shape[0], k.shape[0]), 0.0)
        with mc.scope():
            again = mc.hold(k.values, k.dtype)  # the other operand: the same bytes, seen transposed
            with transposed(again):
                mc.matmul(k, again, self.dtype, into=inner)
        if decays.between is not None:
            mc.vector(inner.values * decays.between.values, into=inner)
        mc.vector(inner.values * b.values, into=inner)
        mc.vector(np.tril(inner.values, -1), per_element=MASK_FLOPS, into=inner)
        inverse = _unit_inverse(mc, inner)
        keys = mc.vector(k.values * b.values)
        if decays.factor is not None:
            mc.vector(keys.values * decays.factor.values, into=keys)
        mc.matmul(inverse, mc.vector(v.values * b.values), self.dtype, into=new)
        known = mc.matmul(mc.matmul(inverse, keys, self.dtype), state, self.dtype)
        mc.vector(new.values - known.values, into=new)

    def _normalise(self, mc: Machine, out: Tile, scores: Tile, q_in: Tile, total: Tile) -> None:
        """Divide by q . z: keys before the chunk through their sum, those in it row by row."""
        weight = mc.matmul(q_in, total, self.dtype)
        inside = mc.reduce("sum", scores)
        mc.vector(weight.values + inside.values, into=weight)
        mc.special(1 / weight.values, into=weight)
        mc.vector(out.values * weight.values, into=out)


FP32_BYTES = FP32.bits // 8


class _Decays:
    """The decays of one chunk: running sums G (c x 1 or c x dk), e^G, e^(G_c); None without.

    `between` holds e^(G_i - G_j) once it was computed.
    """

    __slots__ = ("between", "factor", "last", "sums")

    def __init__(self, sums: Tile | None, factor: Tile | None, last: Tile | None) -> None:
        self.sums, self.factor, self.last = sums, factor, last
        self.between: Tile | None = None

    def inward(self, mc: Machine, q: Tile) -> Tile:
        """Q e^G: what a query sees of the state before the chunk."""
        if self.factor is None:
            return q
        into = self.factor if self.factor.shape == q.shape else None
        return mc.vector(q.values * self.factor.values, into=into)

    def outward(self, mc: Machine, k: Tile) -> Tile:
        """K e^(G_c - G): what is left of a key at the chunk's end."""
        if self.sums is None:
            return k
        left = mc.vector(self.sums.values[-1:] - self.sums.values)
        mc.special(np.exp(left.values), into=left)
        return mc.vector(k.values * left.values, into=left if left.shape == k.shape else None)

    def shrink(self, mc: Machine, state: Tile) -> None:
        """S e^(G_c), or the normaliser's sums."""
        if self.last is not None:
            mc.vector(state.values * self.last.values.T, into=state)


def _between(mc: Machine, decays: _Decays) -> Tile:
    """e^(G_i - G_j); above the diagonal, which is masked, the exponent is cut at zero."""
    assert decays.sums is not None
    gap = mc.vector(np.minimum(decays.sums.values - decays.sums.values.T, 0))
    return mc.special(np.exp(gap.values), into=gap)


def _relative(mc: Machine, values: Values, exponents: Values) -> Tile:
    """Rows times e^exponents, the exponents a difference taken here."""
    mc.count(vector=2 * values.size, special=values.size)
    return mc.hold(values * np.exp(exponents))


def _unit_inverse(mc: Machine, lower: Tile) -> Tile:
    """(I + L)^-1 by forward substitution, 2 i^2 flops for row i."""
    size = lower.shape[0]
    found = mc.hold(np.eye(size))
    for i in range(1, size):
        found.values[i, :i] = -lower.values[i, :i] @ found.values[:i, :i]
        mc.count(vector=2 * i * i)
    return found


def _inverse(c: Num) -> Num:
    """Flops of `_unit_inverse`: the sum of 2 i^2 for i = 1 .. c - 1."""
    return c * (c - 1) * (2 * c - 1) // 3


def _sub_sums(c: Num, sub: Num) -> tuple[Num, Num, Num]:
    """Of one chunk of c rows: squares of its sub-chunks, rows behind the first, rows before each.

    >>> _sub_sums(40, 16), _sub_sums(0, 16)
    ((576, 24, 48), (0, 0, 0))
    """
    whole = c // sub
    rest = c - whole * sub
    number = ceil_div(c, sub)
    return (
        whole * sub * sub + rest * rest,
        c - minimum(c, sub),
        sub * (number * (number - 1) // 2),
    )
