"""Attention of sequences of different lengths without padding: ByteTransformer's two kernels.

Zhai et al. 2022 (arXiv 2210.03052, section III). The tokens of all sequences lie packed behind each
other, each head of each sequence is a problem of its own length n, and no kernel sees padding:

    tokens   sum n             instead of b len_max
    flops    4 H d sum n^2     instead of 4 H d b len_max^2

Where the longest length allowed, `len_max`, is at most `len_short` (algorithm III.1), one kernel
holds all keys of a sequence in fast memory, then its values in the same place, beside a tile of
query rows and their whole rows of scores. Longer sequences (section III-E) take two grouped matrix
products with the softmax partly inside them; the scores go through slow memory once:

    scores   S = Q K^T / sqrt(d), and per row and block of keys the maximum and the sum of exp
    reduce   per row the maximum over all blocks, and 1 / sum
    output   O = exp(S - maximum) / sum V, the exponential taken as S is read

Lengths. With mean_frac = f they are spread evenly over [max(2 f - 1, 0), min(2 f, 1)] of `len_max`,
at `NUM_LENGTHS` = 9 places, length j of 0 .. 8 being round(len_max (low + (high - low) (j + 1/2) /
9)), at least 1; the places share the batch as evenly as whole sequences allow, a single sequence
having the mean. The paper draws lengths of 0.6 len_max on average.

Ignored: the prefix sum over the mask that finds where sequences start (once a forward pass), the
bias of Q, K and V (added where they are produced or loaded).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from workloads.machine import Machine, SlowArray, slices
from workloads.numeric import Num, ceil_div, floor, is_scalar, maximum, minimum, sqrt, where
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.block_pool import BlockPool
from workloads.ops.flash_attention import FlashAttention2, transposed
from workloads.ops.matmul import BatchedMatmul
from workloads.work import Work

NUM_LENGTHS: Final = 9
"""Different lengths of a batch: odd, so that one of them is the mean."""
LEN_SHORT: Final = 384
"""Longest `len_max` of the short kernel (paper, section III-E)."""
KEY_BLOCK: Final = 64
"""Keys of a block of the long kernel: columns of a tile of its products."""
FP32_BYTES: Final = 4
PAIR: Final = 2
"""A maximum and a sum."""
FUSED_KERNEL: Final = "fa2"
"""The short kernel is timed as FlashAttention-2's, which also keeps its scores on chip."""


class _Tile(NamedTuple):
    """Query rows and keys of a tile."""

    rows: Num
    keys: Num


@dataclass(frozen=True, kw_only=True)
class PackedAttention(ProvedOp):
    """Q, K, V, O[tokens, num_heads, head_dim], the sequences behind each other; no mask.

    `len_max` is what padding would fill up to, `mean_frac` the mean length in parts of it.

    >>> op = PackedAttention(batch=16, num_heads=12, len_max=1024, head_dim=64)
    >>> op.num_tokens(), round(op.num_pairs() / op.padded_pairs(), 3)     # 0.36 + 0.8^2 / 12
    (9824, 0.415)
    """

    name: ClassVar[str] = "packed_attention"
    cheaper: ClassVar[tuple[str, ...]] = ("len_short",)
    batch: Num = 1
    num_heads: Num
    len_max: Num
    mean_frac: Num = 0.6
    head_dim: Num
    len_short: Num = LEN_SHORT
    dtype: DType = BF16

    # ---- lengths ---------------------------------------------------------------------------

    def lengths(self) -> tuple[tuple[Num, Num], ...]:
        """Each length with the number of sequences that have it.

        >>> PackedAttention(batch=1, num_heads=1, len_max=100, head_dim=1).lengths()[4]
        (60, 1)
        """
        low = maximum(2 * self.mean_frac - 1, 0)
        high = minimum(2 * self.mean_frac, 1)
        found = []
        for j in range(NUM_LENGTHS):
            share = low + (high - low) * ((2 * j + 1) / (2 * NUM_LENGTHS))
            found.append((maximum(floor(self.len_max * share + 0.5), 1), self._count_at(j)))
        return tuple(found)

    def _count_at(self, j: int) -> Num:
        """Sequences at place j: round((j + 1) b / 9) - round(j b / 9); no multiple is a tie."""
        ends = [(2 * k * self.batch + NUM_LENGTHS) // (2 * NUM_LENGTHS) for k in (j, j + 1)]
        return ends[1] - ends[0]

    def num_tokens(self) -> Num:
        """Tokens of all sequences."""
        return sum(count * length for length, count in self.lengths())

    def num_pairs(self) -> Num:
        """(query, key) pairs of one head in all sequences."""
        return sum(count * length * length for length, count in self.lengths())

    def padded_pairs(self) -> Num:
        """The same where every sequence is padded to `len_max`."""
        return self.batch * self.len_max * self.len_max

    def sequence_lengths(self) -> list[int]:
        """The length of every sequence, for programs; needs scalar fields."""
        return [int(n) for n, count in self.lengths() for _ in range(int(count))]

    # ---- time ------------------------------------------------------------------------------

    def stages(self) -> tuple[Stage, ...]:
        """One fused kernel, or three; every sequence as long as the root of the mean square.

        That has the flops and scores of the real lengths, and no fewer bytes.
        """
        length = floor(sqrt(ceil_div(self.num_pairs(), self.batch)) + 1 - 1e-9)
        short = self.len_max <= self.len_short
        fused, unfused = where(short, 1, 0), where(short, 0, 1)
        products = self.batch * self.num_heads
        blocks = ceil_div(length, KEY_BLOCK)
        found = (
            Stage("fused", FlashAttention2(
                batch=self.batch, num_heads=self.num_heads, len_q=length, head_dim=self.head_dim,
                dtype=self.dtype,
            ), fused, kernel=FUSED_KERNEL),
            Stage("scores", BatchedMatmul(
                batch=products, m=length, n=length, k=self.head_dim, dtype=self.dtype,
            ), unfused),
            Stage("reduce", BlockPool(
                batch=products * length, len_seq=blocks, block=blocks, dim=PAIR, dtype=FP32,
            ), unfused),
            Stage("output", BatchedMatmul(
                batch=products, m=length, n=self.head_dim, k=length, dtype=self.dtype,
            ), unfused),
        )  # fmt: skip
        return tuple(s for s in found if not is_scalar(s.times) or s.times)

    # ---- counts ----------------------------------------------------------------------------

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Tile of the longest sequence: query `rows` and `keys` (all of them: short kernel)."""
        length = self.lengths()[-1][0]
        short, long = self._short_tile(length, fast_bytes), self._long_tile(length, fast_bytes)
        is_short = self.len_max <= self.len_short
        blocks = ceil_div(length, long.keys)
        least = self._key_bytes() + self._long_row_bytes(1)
        least = maximum(least, _sums_bytes(blocks))
        smallest = where(is_short, self._short_bytes(_Tile(1, length)), least)
        require_fit(self.name, fast_bytes, smallest, "one query row and the keys beside it")
        return {
            "rows": where(is_short, short.rows, long.rows),
            "keys": where(is_short, short.keys, long.keys),
        }

    def _key_bytes(self) -> Num:
        return self.head_dim * self.dtype.bytes_per_element

    def _short_row_bytes(self, keys: Num) -> Num:
        """A query, its output, its scores and three statistics."""
        return self._key_bytes() + FP32_BYTES * (self.head_dim + keys + 3)

    def _short_bytes(self, tile: _Tile) -> Num:
        return tile.keys * self._key_bytes() + tile.rows * self._short_row_bytes(tile.keys)

    def _short_tile(self, length: Num, fast_bytes: Num) -> _Tile:
        room = maximum(fast_bytes - length * self._key_bytes(), 0)
        rows = floor(room / self._short_row_bytes(length))
        return _Tile(minimum(maximum(rows, 1), length), length)

    def _long_row_bytes(self, keys: Num) -> Num:
        """Query, output, scores twice in fp32 and once as stored, six statistics."""
        stored = self.dtype.bytes_per_element
        return self._key_bytes() + FP32_BYTES * (self.head_dim + 6) + (8 + stored) * keys

    def _long_tile(self, length: Num, fast_bytes: Num) -> _Tile:
        """As many keys as fit beside one row, up to a block; then as many rows as fit."""
        row, per_key = self._long_row_bytes(0), self._long_row_bytes(1) - self._long_row_bytes(0)
        room = maximum(fast_bytes - row, 0)
        keys = minimum(minimum(KEY_BLOCK, length), floor(room / (self._key_bytes() + per_key)))
        keys = maximum(keys, 1)
        left = maximum(fast_bytes - keys * self._key_bytes(), 0)
        rows = floor(left / self._long_row_bytes(keys))
        return _Tile(minimum(maximum(rows, 1), length), keys)

    def work(self, fast_bytes: Num) -> Work:
        """Per head and sequence of n tokens, T = ceil(n / rows), J = ceil(n / keys):

        short   tensor 4 n^2 d                    reads  e n d (1 + 2 T)
                vector 5 n^2                      writes e n d
                special n^2 + n
        long    tensor 4 n^2 d                    reads  e (n d (1 + 2 T) + n^2) + 8 n (J + 1)
                vector 6 n^2 + 4 n J              writes e (n d + n^2) + 8 n (J + 1)
                special 2 n^2 + n J + n

        Per score: scale, maximum, subtract, sum, and in the short kernel the product with 1 / sum;
        the long one subtracts the maximum and multiplies once more as it reads the scores.
        """
        self.tiling(fast_bytes)
        short = self.len_max <= self.len_short
        total = Work(launches=where(short, 1, 3))
        for length, count in self.lengths():
            times = count * self.num_heads
            fused = self._short_work(length, fast_bytes).times(times * where(short, 1, 0))
            unfused = self._long_work(length, fast_bytes).times(times * where(short, 0, 1))
            total = total + fused + unfused
        return total

    def _short_work(self, n: Num, fast_bytes: Num) -> Work:
        one = n * self._key_bytes()
        return Work(
            tensor_flops={self.dtype: 4 * n * n * self.head_dim},
            vector_flops=5 * n * n,
            special_ops=n * n + n,
            read_bytes=one * (1 + 2 * ceil_div(n, self._short_tile(n, fast_bytes).rows)),
            write_bytes=one,
            launches=0,
        )

    def _long_work(self, n: Num, fast_bytes: Num) -> Work:
        tile = self._long_tile(n, fast_bytes)
        one, blocks = n * self._key_bytes(), ceil_div(n, tile.keys)
        scores = n * n * self.dtype.bytes_per_element
        sums = PAIR * FP32_BYTES * n * (blocks + 1)
        return Work(
            tensor_flops={self.dtype: 4 * n * n * self.head_dim},
            vector_flops=6 * n * n + 4 * n * blocks,
            special_ops=2 * n * n + n * blocks + n,
            read_bytes=one * (1 + 2 * ceil_div(n, tile.rows)) + scores + sums,
            write_bytes=one + scores + sums,
            launches=0,
        )

    def compulsory_bytes(self) -> Num:
        """Q, K, V and O of the real tokens once."""
        return 4 * self.num_tokens() * self.num_heads * self._key_bytes()

    def min_flops(self) -> Mapping[DType, Num]:
        """4 d for every pair of a head."""
        return {self.dtype: 4 * self.num_heads * self.num_pairs() * self.head_dim}

    # ---- program ---------------------------------------------------------------------------

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random q, k and v[num_heads, tokens, head_dim]."""
        shape = (int(self.num_heads), sum(self.sequence_lengths()), int(self.head_dim))
        return {name: rng.standard_normal(shape) for name in ("q", "k", "v")}

    def _sequences(self) -> Iterator[slice]:
        """Where each sequence lies: the prefix sum of the lengths."""
        ends = np.cumsum(self.sequence_lengths()).tolist()
        return (slice(a, b) for a, b in zip([0, *ends], ends, strict=False))

    @property
    def _scale(self) -> float:
        return math.pow(float(self.head_dim), -0.5)

    def reference(self, inputs: Arrays) -> Arrays:
        """NumPy, sequence by sequence."""
        o = np.empty_like(inputs["q"])
        for own in self._sequences():
            q, k, v = (inputs[name][:, own] for name in ("q", "k", "v"))
            scores = q @ k.swapaxes(-1, -2) * self._scale
            p = np.exp(scores - scores.max(axis=-1, keepdims=True))
            o[:, own] = p / p.sum(axis=-1, keepdims=True) @ v
        return {"o": o}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The short kernel, or the three of the long one, over every head of every sequence."""
        self.tiling(machine.fast_bytes)
        arrays = {name: machine.place(x, self.dtype) for name, x in inputs.items()}
        arrays["o"] = machine.empty(inputs["q"].shape, self.dtype)
        problems = [(h, own) for own in self._sequences() for h in range(int(self.num_heads))]
        if self.len_max <= self.len_short:
            with machine.kernel():
                for head, own in problems:
                    self._short(machine, arrays, head, own)
            return {"o": arrays["o"].values}
        tiles = [self._tile_of(own, machine) for _, own in problems]
        work = [
            _Problem(machine, self.dtype, head, own, *tile)
            for (head, own), tile in zip(problems, tiles, strict=True)
        ]
        for kernel in (self._scores, self._reduce, self._output):
            with machine.kernel():
                for problem in work:
                    kernel(machine, arrays, problem)
        return {"o": arrays["o"].values}

    def _tile_of(self, own: slice, machine: Machine) -> tuple[int, int]:
        tile = self._long_tile(own.stop - own.start, machine.fast_bytes)
        return int(tile.rows), int(tile.keys)

    def _short(self, mc: Machine, arrays: Mapping[str, SlowArray], head: int, own: slice) -> None:
        """Query tiles of one sequence and head beside all its keys, then all its values."""
        length = own.stop - own.start
        step = int(self._short_tile(length, mc.fast_bytes).rows)
        for part in slices(length, step):
            rows = _shifted(part, own)
            with mc.scope():
                query = mc.load(arrays["q"], (head, rows))
                held = mc.load(arrays["k"], (head, own))
                with transposed(held):
                    scores = mc.matmul(query, held, self.dtype)
                mc.vector(scores.values * self._scale, into=scores)
                top = mc.reduce("max", scores)
                mc.vector(scores.values - top.values, into=scores)
                mc.special(np.exp(scores.values), into=scores)
                total = mc.reduce("sum", scores)
                mc.special(1 / total.values, into=total)
                mc.vector(scores.values * total.values, into=scores)
                mc.reload(arrays["v"], (head, own), held)
                out = mc.matmul(scores, held, self.dtype)
                mc.store(out, arrays["o"], (head, rows))

    def _scores(self, mc: Machine, arrays: Mapping[str, SlowArray], p: _Problem) -> None:
        """Scores, and each block's maximum and sum of exponentials."""
        for part in slices(p.length, p.rows):
            with mc.scope():
                query = mc.load(arrays["q"], (p.head, _shifted(part, p.own)))
                for j, cols in enumerate(slices(p.length, p.keys)):
                    with mc.scope():
                        key = mc.load(arrays["k"], (p.head, _shifted(cols, p.own)))
                        with transposed(key):
                            scores = mc.matmul(query, key, self.dtype)
                        mc.vector(scores.values * self._scale, into=scores)
                        mc.store(scores, p.scores, (part, cols))
                        top = mc.reduce("max", scores)
                        mc.vector(scores.values - top.values, into=scores)
                        mc.special(np.exp(scores.values), into=scores)
                        total = mc.reduce("sum", scores)
                        mc.store(top, p.tops, (part, slice(j, j + 1)))
                        mc.store(total, p.totals, (part, slice(j, j + 1)))

    def _reduce(self, mc: Machine, arrays: Mapping[str, SlowArray], p: _Problem) -> None:
        """Over all blocks, row by row."""
        for row in range(p.length):
            one = slice(row, row + 1)
            with mc.scope():
                tops, totals = mc.load(p.tops, one), mc.load(p.totals, one)
                top = mc.reduce("max", tops)
                mc.vector(tops.values - top.values, into=tops)
                mc.special(np.exp(tops.values), into=tops)
                mc.vector(totals.values * tops.values, into=totals)
                total = mc.reduce("sum", totals)
                mc.special(1 / total.values, into=total)
                mc.store(top, p.top, one)
                mc.store(total, p.inverse, one)

    def _output(self, mc: Machine, arrays: Mapping[str, SlowArray], p: _Problem) -> None:
        """Probabilities as the scores are read, times the values."""
        for part in slices(p.length, p.rows):
            with mc.scope():
                out = mc.full((part.stop - part.start, int(self.head_dim)), 0.0)
                top, inverse = mc.load(p.top, part), mc.load(p.inverse, part)
                for cols in slices(p.length, p.keys):
                    with mc.scope():
                        raw = mc.load(p.scores, (part, cols))
                        prob = mc.vector(raw.values - top.values)
                        mc.special(np.exp(prob.values), into=prob)
                        mc.vector(prob.values * inverse.values, into=prob)
                        value = mc.load(arrays["v"], (p.head, _shifted(cols, p.own)))
                        mc.matmul(prob, value, self.dtype, into=out)
                mc.store(out, arrays["o"], (p.head, _shifted(part, p.own)))


class _Problem:
    """One head of one sequence in the long kernel, and what its three kernels hand on."""

    def __init__(
        self, machine: Machine, dtype: DType, head: int, own: slice, rows: int, keys: int
    ) -> None:
        self.head, self.own, self.rows, self.keys = head, own, rows, keys
        self.length = own.stop - own.start
        blocks = -(-self.length // keys)
        self.scores = machine.empty((self.length, self.length), dtype)
        self.tops, self.totals = (machine.empty((self.length, blocks), FP32) for _ in range(2))
        self.top, self.inverse = (machine.empty((self.length, 1), FP32) for _ in range(2))


def _sums_bytes(blocks: Num) -> Num:
    """One row of maxima and sums over as many blocks, and the two results."""
    return FP32_BYTES * PAIR * (blocks + 1)


def _shifted(part: slice, own: slice) -> slice:
    """A part of a sequence as a range of packed tokens."""
    return slice(own.start + part.start, own.start + part.stop)
