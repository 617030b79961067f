"""Attention of one new token over a compressed cache, restored chunk by chunk inside the kernel.

A thread block per sequence and K and V head keeps its G = heads_per_kv queries and walks through
the segments of the cache (`cache_segment`). Of each chunk it loads the codes and scales, restores
keys and values in fast memory, and updates an online softmax (FlashAttention-2's). A correction of
rank r never meets the d channels: scores are [q | q R_k] [K | L_k]^T, and the r sums P L_v are
multiplied by R_v^T once a run. Per stream, with n tokens of widths dk, dv in s chunks a run:

    reads   ceil(G / heads) cache + G dk e            writes  G dv e
    tensor  2 G (n (dk + dv + 2 r) + r (dk + dv))     summed over runs
    vector  ceil(G / heads) restoring + G (4 n + (4 + dv + r) s + dv),  + 2 G n of magnitudes
    special G (n + s + 1)

Restoring is 2 flops an element with a zero point, 1 without, and 1 an outlier. Ignored: splitting
the keys over blocks (the kernel model's matter), unpacking of bits, which shares the multiply-add.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Final, NamedTuple

import numpy as np

from hwmodels.dtypes import FP16, INT4, INT8, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, SlowArray, Tile, Values, slices
from workloads.numeric import Num, ceil_div, floor, maximum, minimum
from workloads.op import LIMIT, Arrays, ProvedOp, require_fit
from workloads.ops.cache_segment import (
    FLAG,
    POSITION,
    WHOLE_BITS,
    Segment,
    code_dtype,
)
from workloads.ops.decode_attention import FP32_BYTES, SCORE_FLOPS, DecodeAttention
from workloads.ops.flash_attention import GRANULE, transposed
from workloads.ops.softmax import online_update
from workloads.work import Work

PIECE: Final = 16
"""Outliers loaded at a time."""
EVERY: Final = slice(None)


@dataclass(frozen=True, kw_only=True)
class RestoringAttention(DecodeAttention, ProvedOp):
    """q[batch, num_heads, head_dim] over `segments`; head_dim is the width of unpruned keys.

    Scores are scaled by 1 / sqrt(`scale_dim`), which follows head_dim.

    >>> from workloads.ops.cache_segment import Coding
    >>> codes = Coding(bits=4)
    >>> run = Segment(tokens=100, key_width=64, value_width=64, key=codes, value=codes)
    >>> op = RestoringAttention(num_heads=2, len_kv=100, head_dim=64, segments=(run,))
    >>> op.cache_bytes() == 2 * 100 * 2 * (32 + 4)
    True
    """

    name: ClassVar[str] = "restoring_attention"
    segments: tuple[Segment, ...] = field(default=())
    scale_dim: Num | None = None

    def check(self) -> None:
        """Heads that divide, and no field of the parent that says nothing here."""
        super().check()
        if self.window is not None or not self.segments:
            raise InputError(f"{self.name}: needs segments, and takes no window")
        if any(s.value.by_channel for s in self.segments):
            raise InputError(f"{self.name}: scales of values belong to tokens, not to channels")

    @property
    def cache_dtype(self) -> DType:
        """The nearest common format, for the kernel model: bytes are the segments'."""
        bits = [max(np.max(s.key.bits), np.max(s.value.bits)) for s in self.segments]
        if all(s.is_plain() for s in self.segments):
            return self.dtype
        return INT4 if min(bits) <= INT4.bits else INT8

    @property
    def row_elements(self) -> Num:
        """Mean bytes of a cached token and head, in elements of `cache_dtype`."""
        return self._stream_bytes() / self.len_kv / self.cache_dtype.bytes_per_element

    def _stream_bytes(self) -> Num:
        e = self.dtype.bytes_per_element
        return sum((s.num_bytes(e) for s in self.segments), start=0 * self.len_kv)

    def cache_bytes(self) -> Num:
        """All segments of all sequences and heads."""
        return self.batch * self.cache_heads * self._stream_bytes()

    def min_flops(self) -> Mapping[DType, Num]:
        """Products with restored keys and values, and with the factors of corrections."""
        per_head = sum(
            (s.num * (s.tokens * (s.widths + 2 * s.rank) + s.used * s.rank * s.widths)
             for s in self.segments), start=0 * self.len_kv,
        )  # fmt: skip
        return {self.dtype: 2 * self.batch * self.num_heads * per_head}

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Query `heads` in a block and tokens in a `chunk`.

        Sized as if every element had 16 bits and a scale and zero point of its own.
        """
        e, dk, dv = self.dtype.bytes_per_element, self.key_dim, self.value_dim
        rank = _largest([s.rank for s in self.segments])
        scales = 2 * _largest([c.scale_bits for s in self.segments for c in (s.key, s.value)]) / 8
        wide = maximum(dk, dv)
        fixed = wide * (rank * e + scales + 1) + 6 * PIECE + FP32_BYTES
        head = e * (3 * dk + rank) + FP32_BYTES * (2 * dv + 2 * rank + 6)
        token = wide * (2 + 2 * scales + 2 * e) + 2 * rank * e + 2 * e
        least = fixed + head + token + FP32_BYTES
        require_fit(self.name, fast_bytes, least, "one query head and one cached row")
        room = minimum(fast_bytes, LIMIT) - fixed
        heads = minimum(self.heads_per_kv, floor((room - token) / (head + FP32_BYTES)))
        chunk = floor((room - heads * head) / (token + FP32_BYTES * heads))
        return {"heads": heads, "chunk": minimum(GRANULE, chunk)}

    def work(self, fast_bytes: Num) -> Work:
        """The module's equations."""
        tiles, group, dv = self.tiling(fast_bytes), self.heads_per_kv, self.value_dim
        passes = ceil_div(group, tiles["heads"])
        vector, special = group * dv, group
        for s in self.segments:
            steps, tokens = s.num * s.steps(tiles["chunk"]), s.num * s.tokens
            scores = SCORE_FLOPS + 2 * s.magnitudes
            vector = vector + group * (scores * tokens + (4 + dv + s.rank) * steps)
            vector = vector + passes * s.vector_flops()
            special = special + group * (tokens + steps)
        streams, e = self.batch * self.cache_heads, self.dtype.bytes_per_element
        return Work(
            tensor_flops=dict(self.min_flops()),
            vector_flops=streams * vector,
            special_ops=streams * special,
            read_bytes=streams * (passes * self._stream_bytes() + group * self.key_dim * e),
            write_bytes=streams * group * dv * e,
        )

    # ---- the proof --------------------------------------------------------------------------

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q and the contents of the segments, their names prefixed with the segment's number."""
        found = {
            "q": rng.standard_normal((int(self.batch), int(self.num_heads), int(self.key_dim)))
        }
        for i, segment in enumerate(self.segments):
            stored = segment.inputs(rng, int(self.batch * self.cache_heads))
            found |= {f"{i}_{name}": value for name, value in stored.items()}
        return found

    def _queries(self, inputs: Arrays) -> Values:
        """q[streams, heads_per_kv, head_dim]: a view of the layout."""
        streams = int(self.batch * self.cache_heads)
        return inputs["q"].reshape(streams, int(self.heads_per_kv), -1)

    def reference(self, inputs: Arrays) -> Arrays:
        """Attention over everything restored, in NumPy."""
        parts = [s.dense(_of_segment(inputs, i)) for i, s in enumerate(self.segments)]
        keys, values = (np.concatenate(side, axis=1) for side in zip(*parts, strict=True))
        scores = self._queries(inputs) @ keys.swapaxes(-1, -2) * self.scale
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        o = p @ values / p.sum(axis=-1, keepdims=True)
        return {"o": o.reshape(int(self.batch), int(self.num_heads), -1)}

    @property
    def scale(self) -> float:
        """1 / sqrt(scale_dim)."""
        return float(1 / np.sqrt(self.key_dim if self.scale_dim is None else self.scale_dim))

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel: each stream's heads walk through all segments."""
        queries = self._queries(inputs)
        q = machine.place(queries, self.dtype)
        o = machine.empty((*queries.shape[:2], int(self.value_dim)), self.dtype)
        tiles = {name: int(v) for name, v in self.tiling(machine.fast_bytes).items()}
        stored = [self._placed(machine, i, inputs) for i in range(len(self.segments))]
        with machine.kernel():
            for stream in range(queries.shape[0]):
                for rows in slices(queries.shape[1], tiles["heads"]):
                    with machine.scope():
                        self._rows(machine, stored, stream, rows, tiles["chunk"], q, o)
        return {"o": o.values.reshape(int(self.batch), int(self.num_heads), -1)}

    def _placed(self, machine: Machine, number: int, inputs: Arrays) -> Mapping[str, SlowArray]:
        segment = self.segments[number]
        formats = {"token": POSITION, "channel": POSITION, "outlier": FP16, "kept": FLAG}
        for side, coding in (("k", segment.key), ("v", segment.value)):
            whole = coding.bits >= WHOLE_BITS
            formats[f"{side}_codes"] = self.dtype if whole else code_dtype(coding.bits)
            formats[f"{side}_scale"] = formats[f"{side}_zero"] = code_dtype(coding.scale_bits)
        return {
            name: machine.place(
                value, formats.get(name, formats.get(name.split("_")[-1], self.dtype))
            )
            for name, value in _of_segment(inputs, number).items()
        }

    def _rows(
        self, mc: Machine, stored: list[Mapping[str, SlowArray]], stream: int, rows: slice,
        chunk: int, q: SlowArray, o: SlowArray,
    ) -> None:  # fmt: skip
        query, num_rows = mc.load(q, (stream, rows)), rows.stop - rows.start
        out = mc.full((num_rows, int(self.value_dim)), 0.0)
        top, total = mc.full((num_rows, 1), -np.inf), mc.full((num_rows, 1), 0.0)
        for segment, arrays in zip(self.segments, stored, strict=True):
            for run in range(int(segment.num) if segment.tokens else 0):
                with mc.scope():
                    held = _Held(mc, segment, arrays, (stream, run), self.scale, self.dtype)
                    self._run(held, query, out, top, total, chunk)
        mc.special(1 / total.values, into=total)
        mc.vector(out.values * total.values, into=out)
        mc.store(out, o, (stream, rows))

    def _run(self, held: _Held, query: Tile, out: Tile, top: Tile, total: Tile, chunk: int) -> None:
        """One run of a segment: its chunks, then what its correction adds to `out`."""
        mc, rank = held.mc, int(held.segment.rank)
        wide = self._widened(held, query)
        carried = out
        if rank:
            room = np.zeros((out.shape[0], rank))
            carried = mc.vector(np.concatenate([out.values, room], axis=1), per_element=0)
        for outer, inner in held.segment.chunks(chunk):
            with mc.scope():
                scales = held.scales("k", outer)
                for tokens in inner:
                    with mc.scope():
                        key = held.restored("k", tokens, scales, tokens.start - outer.start)
                        held.chunk(wide, carried, top, total, key, tokens)
        if rank:
            mc.vector(carried.values[:, :-rank], per_element=0, into=out)
            sums = mc.vector(carried.values[:, -rank:], per_element=0)
            right = held.load("v_right")
            with transposed(right):
                mc.matmul(sums, right, self.dtype, into=out)

    def _widened(self, held: _Held, query: Tile) -> Tile:
        """[q | q R_k], of kept channels alone where some are pruned."""
        mc = held.mc
        if "kept" in held.arrays:
            kept = mc.load(held.arrays["kept"], held.at[0])
            query = mc.vector(query.values[:, kept.values > 0], per_element=0, dtype=self.dtype)
        if not int(held.segment.rank):
            return query
        right = held.load("k_right")
        turned = mc.matmul(query, right, self.dtype)
        both = np.concatenate([query.values, turned.values], axis=1)
        wide = mc.vector(both, per_element=0, dtype=self.dtype)
        mc.free(right, turned)
        return wide


class _Held(NamedTuple):
    """One run of a segment as a kernel sees it: `at` is its stream and number."""

    mc: Machine
    segment: Segment
    arrays: Mapping[str, SlowArray]
    at: tuple[int, int]
    scale: float
    dtype: DType

    def load(self, name: str, index: slice = EVERY) -> Tile:
        """Rows of one of the run's arrays."""
        return self.mc.load(self.arrays[name], (*self.at, index))

    def scales(self, side: str, tokens: slice) -> list[Tile]:
        """Scales and zero points of the tokens' groups."""
        coding = self.segment.key if side == "k" else self.segment.value
        run = int(coding.token_run(self.segment.tokens))
        groups = slice(tokens.start // run, -(-tokens.stop // run))
        names = [f"{side}_{name}" for name in ("scale", "zero")]
        return [self.load(name, groups) for name in names if name in self.arrays]

    def chunk(
        self, query: Tile, carried: Tile, top: Tile, total: Tile, key: Tile, tokens: slice
    ) -> None:
        """Scores of a chunk of restored keys, and what its values add to the carried sums."""
        mc, scaled = self.mc, self.segment.magnitudes
        with transposed(key):
            scores = mc.matmul(query, key, self.dtype)
        mc.free(key)
        mc.vector(scores.values * self.scale, into=scores)
        if scaled:
            mc.vector(scores.values * self.load("k_length", tokens).values.T, into=scores)
        online_update(mc, scores, top, total, carried=carried)
        if scaled:
            mc.vector(scores.values * self.load("v_length", tokens).values.T, into=scores)
        value = self.restored("v", tokens, self.scales("v", tokens))
        mc.matmul(scores, value, self.dtype, into=carried)

    def restored(self, side: str, tokens: slice, scales: list[Tile], skipped: int = 0) -> Tile:
        """[x | left] of a chunk; its first group of scales begins `skipped` tokens before it."""
        mc, segment = self.mc, self.segment
        coding = segment.key if side == "k" else segment.value
        tile, length = self.load(f"{side}_codes", tokens), tokens.stop - tokens.start
        if scales:
            codes, n, d = tile, skipped + length, tile.shape[-1]
            run = int(coding.run(segment.tokens, d))
            spread = [coding.spread(t.values, n, d, run)[-length:] for t in scales]
            values = sum(spread[1:], start=codes.values * spread[0])
            tile = mc.vector(values, per_element=float(coding.flops()), dtype=self.dtype)
            mc.free(codes)
        self._add_outliers(side, tokens, tile)
        if not int(segment.rank):
            return tile
        left = self.load(f"{side}_left", tokens)
        both = np.concatenate([tile.values, left.values], axis=1)
        wide = mc.vector(both, per_element=0, dtype=self.dtype)
        mc.free(tile, left)
        return wide

    def _add_outliers(self, side: str, tokens: slice, tile: Tile) -> None:
        """They are sorted by token, so that a chunk's adjoin."""
        mc, owner = self.mc, self.arrays[f"{side}_token"].values[self.at]
        first, end = np.searchsorted(owner, [tokens.start, tokens.stop])
        for part in slices(int(end - first), PIECE):
            with mc.scope():
                at = slice(int(first) + part.start, int(first) + part.stop)
                token, channel, outlier = (
                    self.load(f"{side}_{name}", at) for name in ("token", "channel", "outlier")
                )
                rows = token.values.astype(np.int64) - tokens.start
                np.add.at(tile.values, (rows, channel.values.astype(np.int64)), outlier.values)
                mc.count(vector=outlier.values.size)


def _of_segment(inputs: Arrays, number: int) -> Arrays:
    prefix = f"{number}_"
    return {k.removeprefix(prefix): v for k, v in inputs.items() if k.startswith(prefix)}


def _largest(values: list[Num]) -> Num:
    largest: Num = 0
    for value in values:
        largest = maximum(largest, value)
    return largest
