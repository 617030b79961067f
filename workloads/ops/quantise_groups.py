"""Leaf kernels of cache compression: quantising groups, and ThinK's scores of key channels.

`QuantiseGroups`, groups of g elements of a row rounded to the nearest of 2^b codes, per group

    zero point   lo = min x, scale = (max x - lo) / (2^b - 1),  code = round((x - lo) / scale)
    without      scale = max |x| / (2^(b-1) - 1),               code = round(x / scale)

    vector  5 an element + 3 a group (2 + .. sub, max, mul), without zero point 3 and 2;
    special 1 a group (1 / scale);  a group that fast memory cannot hold is read twice

`ChannelScores` (Xu et al. 2024, arXiv 2407.21018, equation 4): channel i of a head scores
|Q_i K_i^T|_F = |Q_i| |K_i|; its square, which sorts alike, is sum q^2 sum k^2:

    vector  2 (len_q + len_kv) dim + dim a head
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, SlowArray, Tile, Values, slices
from workloads.numeric import Num, any_true, ceil_div, floor, minimum, where
from workloads.op import LIMIT, Arrays, require_fit
from workloads.ops.cache_segment import WHOLE_BITS, code_dtype
from workloads.ops.streamed import StreamedOp
from workloads.work import Work

STATISTICS_BYTES: Final = 24
"""Minimum, maximum, scale and its inverse of a group, and one being reduced."""
TINY: Final = 1e-30
"""Least range of a group, so that a constant one divides by something."""


@dataclass(frozen=True, kw_only=True)
class QuantiseGroups(StreamedOp):
    """x[rows, cols] -> codes of `bits`, scales and zero points of every `group` of a row's columns.

    >>> op = QuantiseGroups(rows=10, cols=128, bits=4, group=64)
    >>> op.work(2**16).write_bytes == 10 * (64 + 2 * 4)
    True
    """

    name: ClassVar[str] = "quantise_groups"
    cheaper: ClassVar[tuple[str, ...]] = ("group",)
    rows: Num
    cols: Num
    bits: Num = 4
    group: Num | None = None
    zero_point: bool = True
    scale_bits: Num = 16
    dtype: DType = BF16

    def check(self) -> None:
        """Codes narrower than what they stand for, and more than a sign."""
        if any_true((self.bits < 2) | (self.bits >= WHOLE_BITS)):
            raise InputError(f"{self.name}: bits = {self.bits} must be from 2 to 15")

    @property
    def run(self) -> Num:
        """Elements of a group: `group`, or a whole row."""
        return self.cols if self.group is None else minimum(self.group, self.cols)

    @property
    def num_groups(self) -> Num:
        """Groups of all rows."""
        return self.rows * ceil_div(self.cols, self.run)

    def elements(self) -> Num:
        """Of x."""
        return self.rows * self.cols

    def read_bytes(self) -> Num:
        """An element."""
        return self.dtype.bytes_per_element

    def write_bytes(self) -> Num:
        """A code and its share of scale and zero point."""
        shared = (1 + self.zero_point) * self.scale_bits / 8
        return self.bits / 8 + self.num_groups * shared / self.elements()

    def steps(self) -> tuple[Num, Num]:
        """The module's counts, shared out over the elements."""
        per_element, per_group = (5, 3) if self.zero_point else (3, 2)
        groups = self.num_groups / self.elements()
        return per_element + per_group * groups, groups

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Elements per `chunk`, and `passes` over a whole group: 1 if a chunk holds it."""
        held = self.dtype.bytes_per_element + self.bits / 8
        require_fit(self.name, fast_bytes, STATISTICS_BYTES + held, "one element and its group's")
        chunk = floor((minimum(fast_bytes, LIMIT) - STATISTICS_BYTES) / held)
        whole = chunk >= self.run
        return {"chunk": minimum(chunk, self.run), "passes": where(whole, 1, 2)}

    def work(self, fast_bytes: Num) -> Work:
        """The module's counts."""
        per_element, per_group = (5, 3) if self.zero_point else (3, 2)
        shared = (1 + self.zero_point) * self.scale_bits / 8
        n, groups = self.elements(), self.num_groups
        return Work(
            vector_flops=per_element * n + per_group * groups,
            special_ops=groups,
            read_bytes=self._read_elements(fast_bytes) * self.dtype.bytes_per_element,
            write_bytes=n * self.bits / 8 + groups * shared,
        )

    def _read_elements(self, fast_bytes: Num) -> Num:
        """Twice where a chunk does not hold a group, but for a ragged last one that it holds."""
        tiles, n = self.tiling(fast_bytes), self.elements()
        last = self.cols - (ceil_div(self.cols, self.run) - 1) * self.run
        again = self.cols - where(last <= tiles["chunk"], last, 0)
        return n + (tiles["passes"] - 1) * self.rows * again

    def compulsory_bytes(self) -> Num:
        """x once, codes and scales once."""
        shared = (1 + self.zero_point) * self.scale_bits / 8
        return self.elements() * (self.read_bytes() + self.bits / 8) + self.num_groups * shared

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random rows."""
        return {"x": rng.standard_normal((int(self.rows), int(self.cols)))}

    def _levels(self) -> int:
        bits = int(self.bits)
        return (1 << bits) - 1 if self.zero_point else (1 << (bits - 1)) - 1

    def reference(self, inputs: Arrays) -> Arrays:
        """Group by group in NumPy."""
        x, parts = inputs["x"], slices(int(self.cols), int(self.run))
        found: dict[str, list[Values]] = {"codes": [], "scale": [], "zero": []}
        for part in parts:
            piece = x[:, part]
            low = piece.min(axis=1) if self.zero_point else np.zeros(x.shape[0])
            top = np.max(piece, axis=1) if self.zero_point else np.abs(piece).max(axis=1)
            scale = np.maximum(top - low, TINY) / self._levels()
            found["codes"].append(np.rint((piece - low[:, None]) * (1 / scale)[:, None]))
            found["scale"].append(scale[:, None])
            found["zero"].append(low[:, None])
        whole = {name: np.concatenate(values, axis=1) for name, values in found.items()}
        return whole if self.zero_point else {k: whole[k] for k in ("codes", "scale")}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel, group after group of every row."""
        x = machine.place(inputs["x"], self.dtype)
        rows, groups = int(self.rows), int(ceil_div(int(self.cols), int(self.run)))
        out = {"codes": machine.empty(x.values.shape, code_dtype(self.bits))}
        for name in ("scale", "zero") if self.zero_point else ("scale",):
            out[name] = machine.empty((rows, groups), code_dtype(self.scale_bits))
        chunk = int(self.tiling(machine.fast_bytes)["chunk"])
        with machine.kernel():
            for row in range(rows):
                for i, part in enumerate(slices(int(self.cols), int(self.run))):
                    pieces = [
                        slice(part.start + s.start, part.start + s.stop)
                        for s in slices(part.stop - part.start, chunk)
                    ]
                    with machine.scope():
                        self._group(machine, x, out, row, i, pieces)
        return {name: array.values for name, array in out.items()}

    def _group(
        self, mc: Machine, x: SlowArray, out: Mapping[str, SlowArray], row: int, number: int,
        pieces: list[slice],
    ) -> None:  # fmt: skip
        """Range, scale, then codes; one piece stays for the second look."""
        low, top = mc.full((1,), np.inf if self.zero_point else 0.0), mc.full((1,), -np.inf)
        held = mc.load(x, (row, pieces[0])) if len(pieces) == 1 else None
        for piece in pieces:
            with mc.scope():
                tile = held or mc.load(x, (row, piece))
                sides = [(low, np.minimum, tile.values)] if self.zero_point else []
                shown = tile.values if self.zero_point else np.abs(tile.values)
                for running, pick, values in [*sides, (top, np.maximum, shown)]:
                    best = pick.reduce(values)
                    mc.vector(pick(running.values, best), per_element=values.size, into=running)
        if self.zero_point:
            mc.vector(top.values - low.values, into=top)
        mc.vector(np.maximum(top.values, TINY), into=top)
        scale = mc.vector(top.values / self._levels(), into=top)
        inverse = mc.special(1 / scale.values)
        for piece in pieces:
            with mc.scope():
                tile = held or mc.load(x, (row, piece))
                codes = np.rint((tile.values - low.values) * inverse.values)
                per_element = 3 if self.zero_point else 2
                done = mc.vector(codes, per_element=per_element, dtype=code_dtype(self.bits))
                mc.store(done, out["codes"], (row, piece))
        mc.store(scale, out["scale"], (row, slice(number, number + 1)))
        if self.zero_point:
            mc.store(low, out["zero"], (row, slice(number, number + 1)))


@dataclass(frozen=True, kw_only=True)
class ChannelScores(StreamedOp):
    """q[streams, len_q, dim], k[streams, len_kv, dim] -> y[streams, dim] in fp32.

    >>> ChannelScores(streams=8, len_q=32, len_kv=1000, dim=128).work(2**16).vector_flops
    2114560
    """

    name: ClassVar[str] = "channel_scores"
    streams: Num = 1
    len_q: Num = 32
    len_kv: Num
    dim: Num
    dtype: DType = BF16

    def elements(self) -> Num:
        """Of q and k."""
        return self.streams * (self.len_q + self.len_kv) * self.dim

    def read_bytes(self) -> Num:
        """An element."""
        return self.dtype.bytes_per_element

    def write_bytes(self) -> Num:
        """Its share of the scores."""
        return FP32.bytes_per_element / (self.len_q + self.len_kv)

    def steps(self) -> tuple[Num, Num]:
        """Square and add, and a share of the product."""
        return 2 + 1 / (self.len_q + self.len_kv), 0

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Channels of a row held beside their two sums."""
        held = self.dtype.bytes_per_element + 2 * FP32.bytes_per_element
        require_fit(self.name, fast_bytes, held, "one channel and its sums")
        return {"cols": minimum(self.dim, floor(minimum(fast_bytes, LIMIT) / held))}

    def work(self, fast_bytes: Num) -> Work:
        """The module's counts."""
        self.tiling(fast_bytes)
        scores = self.streams * self.dim
        return Work(
            vector_flops=2 * self.elements() + scores,
            read_bytes=self.elements() * self.dtype.bytes_per_element,
            write_bytes=scores * FP32.bytes_per_element,
        )

    def compulsory_bytes(self) -> Num:
        """q, k and the scores once."""
        scores = self.streams * self.dim * FP32.bytes_per_element
        return self.elements() * self.dtype.bytes_per_element + scores

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random q and k."""
        streams, dim = int(self.streams), int(self.dim)
        return {
            "q": rng.standard_normal((streams, int(self.len_q), dim)),
            "k": rng.standard_normal((streams, int(self.len_kv), dim)),
        }

    def reference(self, inputs: Arrays) -> Arrays:
        """The Frobenius norm of Q_i K_i^T itself, squared."""
        products = np.einsum("sqd,skd->sdqk", inputs["q"], inputs["k"])
        return {"y": (products**2).sum(axis=(2, 3))}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel, row after row of each block of channels."""
        sides = [machine.place(inputs[name], self.dtype) for name in ("q", "k")]
        y = machine.empty((int(self.streams), int(self.dim)), FP32)
        cols = int(self.tiling(machine.fast_bytes)["cols"])
        with machine.kernel():
            for stream in range(int(self.streams)):
                for col in slices(int(self.dim), cols):
                    with machine.scope():
                        sums = [self._squares(machine, x, stream, col) for x in sides]
                        machine.vector(sums[0].values * sums[1].values, into=sums[0])
                        machine.store(sums[0], y, (stream, col))
        return {"y": y.values}

    def _squares(self, mc: Machine, x: SlowArray, stream: int, col: slice) -> Tile:
        total = mc.full((col.stop - col.start,), 0.0)
        for row in range(x.values.shape[1]):
            with mc.scope():
                tile = mc.load(x, (stream, row, col))
                mc.vector(total.values + tile.values**2, per_element=2, into=total)
        return total
