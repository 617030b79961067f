"""FlashFFTConv: long causal convolution with FFTs as matrix products (arXiv 2311.05908).

A transform of m = n_1 n_2 ... n_p points is a Monarch decomposition of order p: stage i multiplies
by an n_i x n_i DFT matrix along one axis, and every stage but the last by twiddle factors. One
stage costs 8 m n_i tensor flops (a complex product is four real ones, a multiply-add is two), so
that forward and inverse together take, per row,

    tensor flops = 16 m (n_1 + ... + n_p)                        (the compute term of eq. 2)
    vector flops = 12 m (p - 1) + 6 m       twiddles both ways, and the product with the filter

Rows are real and carried by half as many complex points, folded as in `fft_convolution`; the
fold's twist costs nothing here, since it merges into the first DFT matrix and first twiddles.
Factors are powers of two as even as possible, larger ones first, which minimises the flops of an
order. `order=None` takes the order with the least tensor flops among those whose factors all
reach 16, the depth of a tensor-core instruction: 2 below 2**12 points, 3 below 2**16, else 4.

**Fusion.** If a row fits, one kernel does everything: u is read once, y written once, the filter's
spectrum (precomputed, complex in the op's format) once per channel, the matrices and twiddles once.
If not, the outermost `num_outer` stages run as kernels of their own before and after the fused
one, each moving all m points through slow memory, as the paper does beyond 32K.

Ignored: computing the filter's spectrum (done when the weights change), skipping products with
known zeros (the paper's partial convolutions and its shortcut for padding), and the cost of
making the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hwmodels.dtypes import DType
from hwmodels.errors import InputError
from workloads.machine import Machine, SlowArray, Tile
from workloads.numeric import Num, maximum, where
from workloads.op import Arrays, require_fit
from workloads.ops.fft_convolution import COMPLEX64, LongConvolution, power_of_two
from workloads.work import Work

ORDERS = (2, 3, 4)
"""Monarch orders the paper implements."""

LOG2_LEAST_FACTOR = 4
"""log2 of the least useful factor: a 16 x 16 matrix fills a tensor-core instruction."""

STRIP = 16
"""Columns that one matrix product takes at a time: the least n of a tensor-core tile."""

Complex: TypeAlias = NDArray[np.complex128]


@dataclass(frozen=True, kw_only=True)
class FlashFFTConv(LongConvolution):
    """Fused causal convolution on tensor cores; fields as `LongConvolution`, plus the `order`.

    With R = batch * channels rows of L elements, e bytes each, m points, s outer stages and t
    table entries (`tiling`):

        reads  = R (e L + 2 s (2 e m)) + 2 e m channels + 2 e t        gated: + 2 e L R
        writes = R (e L + 2 s (2 e m))
        launches = 2 s + 1

    >>> op = FlashFFTConv(batch=1, channels=1, len_seq=16384)
    >>> op.factors(3), op.work(227 * 1024).tensor_flops[op.dtype] == 16 * 16384 * (32 + 32 + 16)
    ((32, 32, 16), True)

    A padded length of 32K, 16384 complex points, is the longest that one H100 thread block (227
    KiB of shared memory) can fuse, which is where the paper's kernel stops fusing too:

    >>> op.tiling(227 * 1024)["num_outer"], op.over(len_seq=32768).tiling(227 * 1024)["num_outer"]
    (0, 1)
    """

    name: ClassVar[str] = "flashfftconv"
    order: int | None = None

    def check(self) -> None:
        """The order is one that exists, beside what every long convolution checks."""
        super().check()
        if self.order is not None and not (isinstance(self.order, int) and self.order in ORDERS):
            raise InputError(f"{self.name}: order = {self.order} must be 2, 3, 4 or None")

    @property
    def point_bytes(self) -> float:
        """One complex point in the op's format."""
        return 2 * self.dtype.bytes_per_element

    def factors(self, order: int) -> tuple[Num, ...]:
        """The factors n_1, ..., n_order of m, larger ones first."""
        return tuple(size for size, _ in _stages(self.log2_points, order))

    def needed_bytes(self, order: int, num_outer: int) -> Num:
        """Fast memory that the fused kernel, and every outer stage around it, asks for.

        Fused: a row and its filter's spectrum, all inner tables, and a strip of operands with
        its fp32 result. Outer stage: one matrix, and one column with its twiddles and result.
        """
        return self._needed_bytes(_stages(self.log2_points, order))[num_outer]

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """How the transform is factored, and how much of it is fused.

        `num_points` m, the `order` p, `factor_sum` n_1 + ... + n_p, `num_outer` stages through
        slow memory, `table_entries` read, and `least_bytes`, the least fast memory that will do.
        The tables of a stage are two matrices of n_i**2 and, for each stage but the last, twiddles
        n_i * (points after it); an outer stage's twiddles are read by both of its kernels.
        """
        split = self._split(fast_bytes)
        require_fit(self.name, fast_bytes, split["least_bytes"], "the innermost stage of one row")
        return split

    def work(self, fast_bytes: Num) -> Work:
        """Counts as in the class docstring and eq. 2."""
        t = self.tiling(fast_bytes)
        m, rows, gates = t["num_points"], self.rows, int(self.gated)
        through = rows * 2 * t["num_outer"] * self.point_bytes * m
        tables = self.point_bytes * (self.channels * m + t["table_entries"])
        sequence = self.sequence_bytes
        return Work(
            tensor_flops={self.dtype: rows * 16 * m * t["factor_sum"]},
            vector_flops=rows * (12 * m * t["order"] - 6 * m + 2 * gates * self.len_seq),
            read_bytes=sequence * (1 + 2 * gates) + through + tables,
            write_bytes=sequence + through,
            launches=2 * t["num_outer"] + 1,
        )

    def compulsory_bytes(self) -> Num:
        """u, the gates and y, and the filters' spectra, once each; tables are not inputs."""
        spectra = self.point_bytes * self.channels * self.num_points
        return self.sequence_bytes * (2 + 2 * int(self.gated)) + spectra

    # ---- which order, which split ----------------------------------------------------------

    def _split(self, fast_bytes: Num) -> dict[str, Num]:
        """What `tiling` returns, at the op's order or at the best one for each length."""
        q = self.log2_points
        if self.order is not None:
            return self._split_at(self.order, q, fast_bytes)
        if not isinstance(q, np.ndarray):
            return self._split_at(min(max(int(q) // LOG2_LEAST_FACTOR, 2), 4), q, fast_bytes)
        two, three, four = (self._split_at(order, q, fast_bytes) for order in ORDERS)
        return {
            key: where(
                q >= 3 * LOG2_LEAST_FACTOR,
                where(q >= 4 * LOG2_LEAST_FACTOR, four[key], three[key]),
                two[key],
            )
            for key in two
        }

    def _split_at(self, order: int, log2_points: Num, fast_bytes: Num) -> dict[str, Num]:
        """The counts of one order: the fewest outer stages that let the rest be fused."""
        stages = _stages(log2_points, order)
        needed = self._needed_bytes(stages)
        tables = sum((_entries(stages, i) for i in range(1, order)), start=_entries(stages, 0))
        outer: Num = 0
        repeated: Num = 0
        for s in range(order - 1):
            streams = where(needed[s] > fast_bytes, 1, 0)
            outer = outer + streams
            repeated = repeated + streams * stages[s][1]
        return {
            "num_points": stages[0][1],
            "order": order,
            "factor_sum": sum((size for size, _ in stages[1:]), start=stages[0][0]),
            "num_outer": outer,
            "table_entries": tables + repeated,
            "least_bytes": needed[-1],
        }

    def _needed_bytes(self, stages: list[tuple[Num, Num]]) -> list[Num]:
        """`needed_bytes` for 0, 1, ... outer stages; never increasing."""
        c, acc = self.point_bytes, COMPLEX64.bytes_per_element
        inner: list[Num] = []
        tables: Num = 0
        for i in reversed(range(len(stages))):
            size, length = stages[i]
            tables = tables + _entries(stages, i)
            inner.append(c * (2 * length + tables) + size * STRIP * (c + acc))
        needed: list[Num] = []
        outer: Num = 0
        for fused, (size, _) in zip(reversed(inner), stages, strict=True):
            needed.append(maximum(fused, outer))
            outer = maximum(outer, c * size * size + size * (2 * c + acc))
        return needed

    # ---- the program -----------------------------------------------------------------------

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Outer stages, the fused kernel over what is left, outer stages undone."""
        batch, channels, length = inputs["u"].shape
        tiles = {key: int(v) for key, v in self.tiling(machine.fast_bytes).items()}
        m, outer = tiles["num_points"], tiles["num_outer"]
        point = _complex_format(self.dtype)
        stages = self._tables_in_slow_memory(machine, tiles["order"], point)
        flat = {
            key: machine.place(inputs[key].reshape(-1, length), self.dtype)
            for key in ("u", "v", "w")
            if key in inputs
        }
        flat["y"] = machine.empty((batch * channels, length), self.dtype)
        spectra = machine.place(_spectra(inputs["k"], m, stages), point)
        points = machine.empty((batch * channels, m), point, is_complex=True)
        run = _Run(machine, self.dtype, point, flat, points)
        for i in range(outer):
            run.outer_forward(stages[i], first=i == 0)
        run.fused(stages[outer:], spectra, channels, whole=outer == 0)
        for i in reversed(range(outer)):
            run.outer_inverse(stages[i], last=i == 0)
        return {"y": flat["y"].values.reshape(batch, channels, length)}

    def _tables_in_slow_memory(self, mc: Machine, order: int, point: DType) -> list[_Stage]:
        """DFT matrices and twiddles of every stage; the fold's twist is in the first one's."""
        stages = []
        for i, (size, length) in enumerate(_stages(self.log2_points, order)):
            n, after = int(size), int(length) // int(size)
            k, r = np.arange(n)[:, None], np.arange(after)
            matrix = np.exp(-2j * np.pi * k * np.arange(n) / n)
            twiddle = np.exp(-2j * np.pi * k * r / (n * after))
            if i == 0:
                matrix = matrix * np.exp(0.5j * np.pi * np.arange(n) / n)
                twiddle = twiddle * np.exp(0.5j * np.pi * r / (n * after))
            stages.append(
                _Stage(
                    size=n,
                    after=after,
                    matrix=mc.place(matrix, point),
                    undo=mc.place(matrix.conj().T / n, point),
                    twiddle=mc.place(twiddle, point) if i < order - 1 else None,
                )
            )
        return stages


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """One Monarch stage along the middle axis of [before, size, after], tables in slow memory."""

    size: int
    after: int
    matrix: SlowArray
    undo: SlowArray
    twiddle: SlowArray | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """A stage's tables in fast memory."""

    stage: _Stage
    matrix: Tile
    undo: Tile
    twiddle: Tile | None


@dataclass(frozen=True, slots=True)
class _Run:
    """One run of the program: the machine, the formats, and the arrays in slow memory.

    `flat` holds u, y (and gates v, w) as [rows, len_seq]; `points` [rows, m] is what the outer
    stages leave for the next kernel.
    """

    mc: Machine
    dtype: DType
    point: DType
    flat: dict[str, SlowArray]
    points: SlowArray

    @property
    def num_points(self) -> int:
        return int(self.points.values.shape[-1])

    # ---- outer stages: a kernel each --------------------------------------------------------

    def outer_forward(self, stage: _Stage, *, first: bool) -> None:
        """Matrix, then twiddles, on blocks of columns; tables stay while all rows pass by."""
        mc = self.mc
        with mc.kernel():
            matrix = mc.load(stage.matrix)
            for part in self._column_blocks(stage):
                with mc.scope():
                    twiddle = self._twiddle(stage, part)
                    for row, before in self._rows(stage):
                        with mc.scope():
                            places = _places(stage, before, part)
                            if first:
                                block = mc.hold(np.zeros(places.shape, np.complex128), self.point)
                                self._fold(row, places, block.values)
                            else:
                                block = mc.load(self.points, (row, places))
                            out = self._product(matrix, block)
                            mc.vector(out.values * twiddle.values, per_element=6, into=out)
                            mc.store(out, self.points, (row, places))

    def outer_inverse(self, stage: _Stage, *, last: bool) -> None:
        """Conjugate twiddles, then the inverse matrix; the last one unfolds and gates."""
        mc = self.mc
        with mc.kernel():
            undo = mc.load(stage.undo)
            for part in self._column_blocks(stage):
                with mc.scope():
                    twiddle = self._twiddle(stage, part)
                    for row, before in self._rows(stage):
                        with mc.scope():
                            places = _places(stage, before, part)
                            block = mc.load(self.points, (row, places))
                            back = block.values * twiddle.values.conj()
                            mc.vector(back, per_element=6, into=block)
                            out = self._product(undo, block)
                            if not last:
                                mc.store(out, self.points, (row, places))
                                continue
                            mc.free(block)
                            self._unfold(row, places, out.values)

    def _column_blocks(self, stage: _Stage) -> list[slice]:
        """Columns that fit beside the matrix, each with twiddles, operand and result."""
        column = stage.size * (2 * self.point.bytes_per_element + COMPLEX64.bytes_per_element)
        room = self.mc.fast_bytes - stage.size**2 * self.point.bytes_per_element
        return _slices(stage.after, max(int(room // column), 1))

    def _rows(self, stage: _Stage) -> list[tuple[int, int]]:
        before = self.num_points // (stage.size * stage.after)
        return [(r, b) for r in range(len(self.points.values)) for b in range(before)]

    def _twiddle(self, stage: _Stage, part: slice) -> Tile:
        assert stage.twiddle is not None, "only the last stage has none, and it is never an outer"
        return self.mc.load(stage.twiddle, (slice(None), part))

    def _product(self, matrix: Tile, block: Tile) -> Tile:
        out = self.mc.hold(np.zeros(block.shape, dtype=np.complex128), COMPLEX64)
        return self.mc.matmul(matrix, block, self.dtype, into=out)

    # ---- the fused kernel -------------------------------------------------------------------

    def fused(self, stages: list[_Stage], spectra: SlowArray, channels: int, whole: bool) -> None:
        """All stages left, product with the spectrum, all stages back, block by block.

        A block is a whole row (`whole`), or one of the contiguous runs of points that the outer
        stages left independent. The spectrum's block stays while the batch passes by.
        """
        mc = self.mc
        length = stages[0].size * stages[0].after
        with mc.kernel():
            held = [
                _Held(
                    stage=s,
                    matrix=mc.load(s.matrix),
                    undo=mc.load(s.undo),
                    twiddle=None if s.twiddle is None else mc.load(s.twiddle),
                )
                for s in stages
            ]
            for c in range(channels):
                for part in _slices(self.num_points, length):
                    with mc.scope():
                        k = mc.load(spectra, (c, part))
                        for row in range(c, len(self.points.values), channels):
                            with mc.scope():
                                self._convolve(held, k, row, part, whole)

    def _convolve(self, held: list[_Held], k: Tile, row: int, part: slice, whole: bool) -> None:
        mc = self.mc
        pieces = _slices(k.shape[0], STRIP * held[0].stage.size)
        if whole:
            data = mc.hold(np.zeros(k.shape, dtype=np.complex128), self.point)
            for piece in pieces:
                self._fold(row, np.arange(piece.start, piece.stop), data.values[piece])
        else:
            data = mc.load(self.points, (row, part))
        for stage in held:
            self._stage(stage, data)
        mc.vector(data.values * k.values, per_element=6, into=data)
        for stage in reversed(held):
            self._stage(stage, data, inverse=True)
        if not whole:
            mc.store(data, self.points, (row, part))
            return
        for piece in pieces:
            self._unfold(row, np.arange(piece.start, piece.stop), data.values[piece])

    def _stage(self, held: _Held, data: Tile, *, inverse: bool = False) -> None:
        """One stage in place, a strip of columns at a time."""
        mc, n, after = self.mc, held.stage.size, held.stage.after
        view = data.values.reshape(-1, n, after)
        columns = np.arange(view.shape[0] * after)
        for part in _slices(len(columns), STRIP):
            before, rest = np.divmod(columns[part], after)
            with mc.scope():
                strip = mc.hold(view[before, :, rest].T, self.point)
                twiddle = None if held.twiddle is None else held.twiddle.values[:, rest]
                if inverse and twiddle is not None:
                    mc.vector(strip.values * twiddle.conj(), per_element=6, into=strip)
                out = self._product(held.undo if inverse else held.matrix, strip)
                if not inverse and twiddle is not None:
                    mc.vector(out.values * twiddle, per_element=6, into=out)
                view[before, :, rest] = out.values.T

    # ---- reals in, reals out ----------------------------------------------------------------

    def _fold(self, row: int, places: NDArray[np.int64], into: Complex) -> None:
        """u[j] + i u[j + m], gated by w if there is one, onto held zeros; padding is not read."""
        for half, start in ((into.real, 0), (into.imag, self.num_points)):
            inside = places + start < self.flat["u"].values.shape[-1]
            with self.mc.scope():
                index = (row, places[inside] + start)
                tile = self.mc.load(self.flat["u"], index)
                if "w" in self.flat:
                    gate = self.mc.load(self.flat["w"], index)
                    self.mc.vector(tile.values * gate.values, into=tile)
                half[inside] = tile.values

    def _unfold(self, row: int, places: NDArray[np.int64], values: Complex) -> None:
        """Real parts to y[j], imaginary ones to y[j + m], gated by v; the padding is dropped."""
        for half, start in ((values.real, 0), (values.imag, self.num_points)):
            inside = places + start < self.flat["y"].values.shape[-1]
            with self.mc.scope():
                index = (row, places[inside] + start)
                tile = self.mc.hold(half[inside], self.dtype)
                if "v" in self.flat:
                    gate = self.mc.load(self.flat["v"], index)
                    self.mc.vector(tile.values * gate.values, into=tile)
                self.mc.store(tile, self.flat["y"], index)


def _stages(log2_points: Num, order: int) -> list[tuple[Num, Num]]:
    """(n_i, n_i n_{i+1} ... n_p) of every stage; log2 m split evenly, the remainder first."""
    stages: list[tuple[Num, Num]] = []
    left = log2_points
    for i in range(order):
        exponent = (log2_points + order - 1 - i) // order
        stages.append((power_of_two(exponent), power_of_two(left)))
        left = left - exponent
    return stages


def _entries(stages: list[tuple[Num, Num]], i: int) -> Num:
    """Complex entries of a stage's tables: two matrices, and twiddles for all but the last."""
    size, length = stages[i]
    return 2 * size * size + (length if i < len(stages) - 1 else 0)


def _complex_format(dtype: DType) -> DType:
    """Two parts of that format, block scales included."""
    return DType(
        name=f"complex_{dtype}",
        bits=2 * dtype.bits,
        accumulator=dtype.accumulator,
        scale_bits=2 * dtype.scale_bits,
        scale_block=dtype.scale_block,
    )


def _spectra(filters: NDArray[np.float64], m: int, stages: list[_Stage]) -> Complex:
    """Spectra of real filters [channels, taps] in the order the stages leave frequencies in."""
    padded = np.zeros((len(filters), 2 * m))
    padded[:, : filters.shape[1]] = filters
    points = padded[:, :m] + 1j * padded[:, m:]
    for stage in stages:
        view = points.reshape(-1, stage.size, stage.after)
        view = stage.matrix.values @ view
        points = view if stage.twiddle is None else view * stage.twiddle.values
    return points.reshape(len(filters), m)


def _places(stage: _Stage, before: int, part: slice) -> NDArray[np.int64]:
    """Index in the row of a block's elements, [size, columns]."""
    inside = np.arange(stage.size)[:, None] * stage.after + np.arange(part.start, part.stop)
    return before * stage.size * stage.after + inside


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
