"""Prefix scans of an associative operator: who combines what, how often and how deep.

y_i = x_0 * x_1 * ... * x_i along a sequence, for the operators that sequence models are made of
(an element is a tuple of values, the vectors among them `width` lanes wide):

    linear    (a, b): h -> a h + b           S4's, S5's and Mamba's recurrences   3 flops a lane
    complex   the same with complex a, b     diagonal S5 (Smith et al. 2023)     14 flops a lane
    reset     (a, b, c): c forgets the past  Lu et al. 2023, arXiv 2303.03982     6 flops a lane
    softmax   (m, u, w): maximum, sum, sum of values; attention with one fixed query
              (Feng et al. 2024, arXiv 2405.13956, section 3.2)    3 flops a lane + 4, 2 exp

A chunk of c elements in fast memory is scanned in one of three ways:

    way            combinations                                   dependent steps
    sequential     c - 1                                          c - 1
    kogge_stone    c L - 2^L + 1,  L = ceil(log2 c)               L        (Kogge and Stone 1973)
    brent_kung     sum over d = 1, 2, 4 ... below c of
                   floor(c / 2d) + floor((c - d) / 2d)            2 L - 1  (Brent and Kung 1982)

Chunks hand on what came before them either one after another, folded into the next chunk's first
element (one more combination a chunk), or, with `lookback`, as thread blocks at once by decoupled
look-back (Merrill and Garland 2016): a block publishes its total, reads its predecessor's prefix,
publishes its own, and combines that prefix with its c elements. Ignored: waiting, and looking back
further than one block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, TypeAlias

import numpy as np

from hwmodels.dtypes import FP32, DType
from hwmodels.errors import UnknownNameError
from workloads.machine import Machine, SlowArray, Tile, Values, slices
from workloads.numeric import Num, ceil_div, ceil_log2, floor, maximum, minimum, power_of_two, where
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.elementwise import Elementwise
from workloads.work import Work

SEQUENTIAL, KOGGE_STONE, BRENT_KUNG = "sequential", "kogge_stone", "brent_kung"
ALGORITHMS: Final = (SEQUENTIAL, KOGGE_STONE, BRENT_KUNG)

Element: TypeAlias = tuple[Values, ...]


@dataclass(frozen=True, slots=True)
class Operator:
    """An associative operator: numbers of an element, and the cost of one combination.

    `scalars` and `vectors` count its values; `flops` and `special` are (fixed, a lane).
    """

    scalars: int
    vectors: int
    flops: tuple[int, int]
    special: tuple[int, int]
    combine: Callable[[Element, Element], Element]


def _linear(x: Element, y: Element) -> Element:
    return y[0] * x[0], y[0] * x[1] + y[1]


def _complex(x: Element, y: Element) -> Element:
    ar, ai, br, bi = x
    cr, ci, dr, di = y
    return (
        cr * ar - ci * ai, cr * ai + ci * ar,
        cr * br - ci * bi + dr, cr * bi + ci * br + di,
    )  # fmt: skip


def _reset(x: Element, y: Element) -> Element:
    a, b = _linear((x[0], x[1]), (y[0], y[1]))
    forget = y[2] > 0
    return np.where(forget, y[0], a), np.where(forget, y[1], b), np.maximum(x[2], y[2])


def _softmax(x: Element, y: Element) -> Element:
    top = np.maximum(x[0], y[0])
    p, q = np.exp(x[0] - top), np.exp(y[0] - top)
    return top, p * x[1] + q * y[1], p * x[2] + q * y[2]


OPERATORS: Final[Mapping[str, Operator]] = {
    "linear": Operator(0, 2, (0, 3), (0, 0), _linear),
    "complex": Operator(0, 4, (0, 14), (0, 0), _complex),
    "reset": Operator(0, 3, (0, 6), (0, 0), _reset),
    "softmax": Operator(2, 1, (6, 3), (2, 0), _softmax),
}
"""softmax: a maximum, two differences, and 3 flops for u as for every lane of w."""


@dataclass(frozen=True, kw_only=True)
class AssociativeScan(ProvedOp):
    """Inclusive scan of `batch` sequences of `len_seq` elements with `width` lanes.

    >>> op = AssociativeScan(len_seq=1024, width=16, chunk=1024, algorithm="brent_kung")
    >>> op.combinations(), op.depth(), op.over(algorithm="kogge_stone").combinations()
    (2036, 19, 9217)
    """

    name: ClassVar[str] = "associative_scan"
    cheaper: ClassVar[tuple[str, ...]] = ("chunk",)
    batch: Num = 1
    len_seq: Num
    width: Num = 1
    chunk: Num = 1024
    operator: str = "linear"
    algorithm: str = KOGGE_STONE
    lookback: bool = False
    dtype: DType = FP32

    def check(self) -> None:
        """Known operators and algorithms."""
        if self.operator not in OPERATORS:
            raise UnknownNameError("operator", self.operator, list(OPERATORS))
        if self.algorithm not in ALGORITHMS:
            raise UnknownNameError("algorithm", self.algorithm, ALGORITHMS)

    @property
    def kind(self) -> Operator:
        """The operator."""
        return OPERATORS[self.operator]

    @property
    def element_values(self) -> Num:
        """Numbers in an element."""
        return self.kind.scalars + self.kind.vectors * self.width

    @property
    def num_chunks(self) -> Num:
        """Chunks of a sequence."""
        return ceil_div(self.len_seq, self.chunk)

    def combinations(self) -> Num:
        """Applications of the operator along one sequence."""
        inside = self._over_chunks(self._of_chunk)
        if not self.lookback:
            return inside + self.num_chunks - 1
        return inside + self.len_seq - minimum(self.chunk, self.len_seq) + self.num_chunks - 1

    def depth(self) -> Num:
        """Dependent combinations along one sequence: chunk after chunk, or look-back's chain."""
        if self.lookback:
            return self._depth_of(minimum(self.chunk, self.len_seq)) + self.num_chunks
        return self._over_chunks(self._depth_of) + self.num_chunks - 1

    def _over_chunks(self, count: Callable[[Num], Num]) -> Num:
        """A count of every whole chunk and of what is left."""
        whole = self.len_seq // self.chunk
        rest = self.len_seq - whole * self.chunk
        return whole * count(self.chunk) + where(rest > 0, count(maximum(rest, 1)), 0)

    def _of_chunk(self, c: Num) -> Num:
        if self.algorithm == SEQUENTIAL:
            return c - 1
        levels = ceil_log2(c)
        if self.algorithm == KOGGE_STONE:
            return c * levels - (power_of_two(levels) - 1)
        total: Num = 0
        for level in range(int(np.max(levels))):
            d = 2**level
            up, down = floor(c / (2 * d)), floor((c - d) / (2 * d))
            total = total + where(d < c, up + maximum(down, 0), 0)
        return total

    def _depth_of(self, c: Num) -> Num:
        if self.algorithm == SEQUENTIAL:
            return c - 1
        levels = ceil_log2(c)
        return levels if self.algorithm == KOGGE_STONE else maximum(2 * levels - 1, 0)

    def _flops(self) -> tuple[Num, Num]:
        """Vector flops and special functions of one combination."""
        (fixed, lane), (exps, exp_lane) = self.kind.flops, self.kind.special
        return fixed + lane * self.width, exps + exp_lane * self.width

    def stages(self) -> tuple[Stage, ...]:
        """Timed as one pass over the elements; the chain of dependent steps is not."""
        elements = self.len_seq * self.element_values
        flops, special = (self.combinations() * f / elements for f in self._flops())
        one = Elementwise(
            num_elements=self.batch * elements, vector_flops_per_element=flops,
            special_ops_per_element=special, dtype=self.dtype,
        )  # fmt: skip
        return (Stage("scan", one),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """`chunk` elements held at a time, beside a carried one and a second prefix."""
        chunk = minimum(self.chunk, self.len_seq)
        least = (chunk + 2) * self.element_values * self.dtype.bytes_per_element
        require_fit(self.name, fast_bytes, least, "one chunk of elements")
        return {"chunk": chunk}

    def work(self, fast_bytes: Num) -> Work:
        """Elements in and out once, combinations as in the module's table, look-back's traffic."""
        self.tiling(fast_bytes)
        times = self.batch * self.combinations()
        flops, special = self._flops()
        element_bytes = self.element_values * self.dtype.bytes_per_element
        moved, several = self.batch * self.len_seq * element_bytes, self.num_chunks > 1
        element = self.batch * element_bytes * self.lookback
        return Work(
            vector_flops=times * flops,
            special_ops=times * special,
            read_bytes=moved + element * (self.num_chunks - 1),
            write_bytes=moved + element * where(several, 2 * self.num_chunks - 1, 0),
        )

    def compulsory_bytes(self) -> Num:
        """Elements in and out once."""
        values = self.batch * self.len_seq * self.element_values
        return 2 * values * self.dtype.bytes_per_element

    def min_flops(self) -> Mapping[DType, Num]:
        """No products."""
        return {}

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random elements; decays in (0, 1), resets one time in eight."""
        shape, width = (int(self.batch), int(self.len_seq)), int(self.width)
        found = {f"s{i}": rng.standard_normal((*shape, 1)) for i in range(self.kind.scalars)}
        for i in range(self.kind.vectors):
            found[f"v{i}"] = rng.uniform(0.1, 0.9, (*shape, width))
        if self.operator == "reset":
            found["v2"] = np.repeat((rng.random((*shape, 1)) < 1 / 8) * 1.0, width, axis=2)
        if self.operator == "softmax":
            found["s1"] = np.abs(found["s1"]) + 0.1
        return found

    def reference(self, inputs: Arrays) -> Arrays:
        """Element after element."""
        out = {name: np.array(values) for name, values in inputs.items()}
        for t in range(1, int(self.len_seq)):
            before = tuple(values[:, t - 1] for values in out.values())
            here = tuple(values[:, t] for values in inputs.values())
            for values, value in zip(out.values(), self.kind.combine(before, here), strict=True):
                values[:, t] = value
        return out

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel: sequences in turn, chunk after chunk."""
        x = [machine.place(values, self.dtype) for values in inputs.values()]
        y = [machine.empty(values.shape, self.dtype) for values in inputs.values()]
        with machine.kernel():
            for row in range(int(self.batch)):
                with machine.scope():
                    self._sequence(machine, row, x, y)
        return {name: array.values for name, array in zip(inputs, y, strict=True)}

    def _sequence(self, mc: Machine, row: int, x: list[SlowArray], y: list[SlowArray]) -> None:
        carried = [mc.full((1, a.values.shape[2]), 0.0, self.dtype) for a in x]
        published = [mc.empty((1, a.values.shape[2]), self.dtype) for a in x]
        parts = slices(int(self.len_seq), int(self.chunk))
        for part in parts:
            with mc.scope():
                held = [mc.load(a, (row, part)) for a in x]
                if part.start and not self.lookback:
                    self._combine(mc, [t.values for t in carried], held, [0])
                self._scan(mc, held)
                if self.lookback and len(parts) > 1:
                    self._look_back(mc, held, carried, published, first=part.start == 0)
                for tile, target, last in zip(held, y, carried, strict=True):
                    mc.store(tile, target, (row, part))
                    last.values[...] = tile.values[-1:]

    def _look_back(
        self,
        mc: Machine,
        held: list[Tile],
        prefix: list[Tile],
        published: list[SlowArray],
        *,
        first: bool,
    ) -> None:
        """Publish the total, read the prefix before it, publish the own, combine it with all."""
        size = held[0].shape[0]
        total = [t.values[-1:].copy() for t in held]
        if not first:
            for tile, value, place in zip(prefix, total, published, strict=True):
                kept, tile.values[...] = tile.values.copy(), value
                mc.store(tile, place)
                place.values[...] = kept
            for tile, place in zip(prefix, published, strict=True):
                mc.reload(place, ..., tile)
            before = [t.values.copy() for t in prefix]
            self._count(mc, 1)  # the own prefix from the predecessor's and the total
            own = self.kind.combine(tuple(before), tuple(total))
            self._combine(mc, before, held, list(range(size)))
            total = list(own)
        for tile, value, place in zip(prefix, total, published, strict=True):
            tile.values[...] = value
            mc.store(tile, place)

    def _scan(self, mc: Machine, held: list[Tile]) -> None:
        """The chunk in place, in the algorithm's order."""
        size = held[0].shape[0]
        if self.algorithm == SEQUENTIAL:
            for i in range(1, size):
                self._combine(mc, [t.values[i - 1 : i] for t in held], held, [i])
            return
        levels = int(ceil_log2(size))
        if self.algorithm == KOGGE_STONE:
            for d in (2**level for level in range(levels)):
                before = [t.values[: size - d].copy() for t in held]
                self._combine(mc, before, held, list(range(d, size)))
            return
        steps = [2**level for level in range(levels)]
        for d in steps:
            self._pairs(mc, held, d, range(2 * d - 1, size, 2 * d))
        for d in reversed(steps):
            self._pairs(mc, held, d, range(3 * d - 1, size, 2 * d))

    def _pairs(self, mc: Machine, held: list[Tile], d: int, ends: range) -> None:
        if ends:
            ahead = [t.values[[i - d for i in ends]] for t in held]
            self._combine(mc, ahead, held, list(ends))

    def _combine(self, mc: Machine, before: list[Values], held: list[Tile], at: list[int]) -> None:
        """Elements `at` become `before` combined with them."""
        here = tuple(t.values[at] for t in held)
        for tile, value in zip(held, self.kind.combine(tuple(before), here), strict=True):
            tile.values[at] = value
        self._count(mc, len(at))

    def _count(self, mc: Machine, times: int) -> None:
        flops, special = self._flops()
        mc.count(vector=float(times * flops), special=float(times * special))
