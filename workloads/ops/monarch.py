"""Monarch transforms executed: FFTs as matrix products, on a `Machine` that counts.

`FlashFFTConv` runs its program with these; the stages, their tables and the folding of real rows
are described in `flash_fft_conv`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwmodels.dtypes import DType
from workloads.machine import Machine, SlowArray, Tile, slices
from workloads.numeric import Num, power_of_two
from workloads.ops.fft_convolution import COMPLEX64, Complex

STRIP = 16
"""Columns that one matrix product takes at a time: the least n of a tensor-core tile."""


def monarch_stages(log2_points: Num, order: int) -> list[tuple[Num, Num]]:
    """(n_i, n_i n_{i+1} ... n_p) of every stage; log2 m split evenly, the remainder first."""
    stages: list[tuple[Num, Num]] = []
    left = log2_points
    for i in range(order):
        exponent = (log2_points + order - 1 - i) // order
        stages.append((power_of_two(exponent), power_of_two(left)))
        left = left - exponent
    return stages


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One Monarch stage along the middle axis of [before, size, after], tables in slow memory."""

    size: int
    after: int
    matrix: SlowArray
    undo: SlowArray
    twiddle: SlowArray | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """A stage's tables in fast memory."""

    stage: Stage
    matrix: Tile
    undo: Tile
    twiddle: Tile | None


@dataclass(frozen=True, slots=True)
class MonarchRun:
    """One run of the convolution: the machine, the formats, and the arrays in slow memory.

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
        """Complex points of a row."""
        return int(self.points.values.shape[-1])

    # ---- outer stages: a kernel each --------------------------------------------------------

    def outer_forward(self, stage: Stage, *, first: bool) -> None:
        """Matrix, then twiddles; the first one folds what it reads."""
        mc = self.mc
        with mc.kernel():
            matrix = mc.load(stage.matrix)
            for twiddle, row, places in self._blocks(stage):
                if first:
                    block = mc.hold(np.zeros(places.shape, np.complex128), self.point)
                    self._fold(row, places, block.values)
                else:
                    block = mc.load(self.points, (row, places))
                out = self._product(matrix, block)
                mc.vector(out.values * twiddle.values, per_element=6, into=out)
                mc.store(out, self.points, (row, places))

    def outer_inverse(self, stage: Stage, *, last: bool) -> None:
        """Conjugate twiddles, then the inverse matrix; the last one unfolds and gates."""
        mc = self.mc
        with mc.kernel():
            undo = mc.load(stage.undo)
            for twiddle, row, places in self._blocks(stage):
                block = mc.load(self.points, (row, places))
                mc.vector(block.values * twiddle.values.conj(), per_element=6, into=block)
                out = self._product(undo, block)
                if not last:
                    mc.store(out, self.points, (row, places))
                    continue
                mc.free(block)
                self._unfold(row, places, out.values)

    def _blocks(self, stage: Stage) -> Iterator[tuple[Tile, int, NDArray[np.int64]]]:
        """Twiddles, row and places of each block; the twiddles stay while all rows pass by.

        What the caller holds for a block is freed when it asks for the next one.
        """
        for part in self._column_blocks(stage):
            with self.mc.scope():
                assert stage.twiddle is not None, "only the last stage has none, never an outer"
                twiddle = self.mc.load(stage.twiddle, (slice(None), part))
                for row, before in self._rows(stage):
                    with self.mc.scope():
                        yield twiddle, row, _places(stage, before, part)

    def _column_blocks(self, stage: Stage) -> list[slice]:
        """Columns that fit beside the matrix, each with twiddles, operand and result."""
        column = stage.size * (2 * self.point.bytes_per_element + COMPLEX64.bytes_per_element)
        room = self.mc.fast_bytes - stage.size**2 * self.point.bytes_per_element
        return slices(stage.after, max(int(room // column), 1))

    def _rows(self, stage: Stage) -> list[tuple[int, int]]:
        before = self.num_points // (stage.size * stage.after)
        return [(r, b) for r in range(len(self.points.values)) for b in range(before)]

    def _product(self, matrix: Tile, block: Tile) -> Tile:
        out = self.mc.hold(np.zeros(block.shape, dtype=np.complex128), COMPLEX64)
        return self.mc.matmul(matrix, block, self.dtype, into=out)

    # ---- the fused kernel -------------------------------------------------------------------

    def fused(self, stages: list[Stage], spectra: SlowArray, channels: int, whole: bool) -> None:
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
                for part in slices(self.num_points, length):
                    with mc.scope():
                        k = mc.load(spectra, (c, part))
                        for row in range(c, len(self.points.values), channels):
                            with mc.scope():
                                self._convolve(held, k, row, part, whole)

    def _convolve(self, held: list[_Held], k: Tile, row: int, part: slice, whole: bool) -> None:
        mc = self.mc
        pieces = slices(k.shape[0], STRIP * held[0].stage.size)
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
        for part in slices(len(columns), STRIP):
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


def tables_in_slow_memory(
    mc: Machine, stages: Sequence[tuple[Num, Num]], point: DType, *, folded: bool = True
) -> list[Stage]:
    """DFT matrices and twiddles of every stage; the fold's twist is in the first one's."""
    placed = []
    for i, (size, length) in enumerate(stages):
        n, after = int(size), int(length) // int(size)
        k, r = np.arange(n)[:, None], np.arange(after)
        matrix = np.exp(-2j * np.pi * k * np.arange(n) / n)
        twiddle = np.exp(-2j * np.pi * k * r / (n * after))
        if i == 0 and folded:
            matrix = matrix * np.exp(0.5j * np.pi * np.arange(n) / n)
            twiddle = twiddle * np.exp(0.5j * np.pi * r / (n * after))
        placed.append(
            Stage(
                size=n,
                after=after,
                matrix=mc.place(matrix, point),
                undo=mc.place(matrix.conj().T / n, point),
                twiddle=mc.place(twiddle, point) if i < len(stages) - 1 else None,
            )
        )
    return placed


def complex_format(dtype: DType) -> DType:
    """Two parts of that format, block scales included."""
    return DType(
        name=f"complex_{dtype}",
        bits=2 * dtype.bits,
        accumulator=dtype.accumulator,
        scale_bits=2 * dtype.scale_bits,
        scale_block=dtype.scale_block,
    )


def spectra(filters: NDArray[np.float64], m: int, stages: list[Stage]) -> Complex:
    """Spectra of real filters [channels, taps] in the order the stages leave frequencies in."""
    padded = np.zeros((len(filters), 2 * m))
    padded[:, : filters.shape[1]] = filters
    points = padded[:, :m] + 1j * padded[:, m:]
    for stage in stages:
        view = points.reshape(-1, stage.size, stage.after)
        view = stage.matrix.values @ view
        points = view if stage.twiddle is None else view * stage.twiddle.values
    return points.reshape(len(filters), m)


def _places(stage: Stage, before: int, part: slice) -> NDArray[np.int64]:
    """Index in the row of a block's elements, [size, columns]."""
    inside = np.arange(stage.size)[:, None] * stage.after + np.arange(part.start, part.stop)
    return before * stage.size * stage.after + inside
