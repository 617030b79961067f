"""RMS and layer normalisation over rows, forward, and what the backward pass shares.

A row that fits in fast memory beside the weights is read once and the weights stay for all rows.
A longer row is read twice: once for its statistics, once to be normalised, in strips of `STRIP`
rows, and the weights are read again for every strip. Statistics are FP32; the forward pass saves
them for the backward pass, 4 bytes a row each. Weights, and their gradients, are stored in the
format of the rows. Lanes keep what they loaded, not what they derived: the second pass over an
element computes its normalised value again.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, TypeAlias

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from workloads.machine import Machine, SlowArray, Tile, Values, slices
from workloads.numeric import Num, ceil_div, floor, maximum, minimum, where
from workloads.op import Arrays, ProvedOp, require_fit
from workloads.ops.streamed import Lanes
from workloads.work import Work

EPSILON: Final = 1e-5
STRIP: Final = 16
"""Rows that share one reading of the weights when a row does not fit."""

STATISTIC_BYTES: Final = FP32.bytes_per_element

Slow: TypeAlias = Mapping[str, SlowArray]


@dataclass(frozen=True, kw_only=True)
class Norm(ProvedOp):
    """What the four norms share: [rows, cols], an optional residual stream, and the tiling.

    `weights` and `statistics` name the arrays of a norm, [cols] and [rows] each.
    """

    weights: ClassVar[tuple[str, ...]]
    statistics: ClassVar[tuple[str, ...]]
    rows: Num
    cols: Num
    dtype: DType = BF16
    residual: bool = False

    @abstractmethod
    def held_bytes(self) -> tuple[float, float, float]:
        """Fast memory per row, per element and per column of a tile."""

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Tile sizes `tr` and `tc`, and `passes` over a row: 1 where it fits, else 2."""
        per_row, per_element, per_col = self.held_bytes()
        fit = floor((fast_bytes - per_col * self.cols) / (per_element * self.cols + per_row))
        single = fit >= 1
        strip = minimum(self.rows, STRIP)
        needed_bytes = strip * (per_row + per_element) + per_col
        what = f"{STRIP} rows of one column and their statistics"
        require_fit(self.name, fast_bytes, where(single, 0, needed_bytes), what)
        tc = floor((fast_bytes - per_row * strip) / (per_element * strip + per_col))
        return {
            "tr": where(single, minimum(self.rows, maximum(fit, 1)), strip),
            "tc": where(single, self.cols, minimum(self.cols, maximum(tc, 1))),
            "passes": where(single, 1, 2),
        }

    def min_flops(self) -> Mapping[DType, Num]:
        """No matrix products."""
        return {}

    def _shape(self) -> tuple[int, int]:
        return int(self.rows), int(self.cols)

    def _element_bytes(self) -> Num:
        return self.rows * self.cols * self.dtype.bytes_per_element

    def _statistics_bytes(self) -> Num:
        return self.rows * STATISTIC_BYTES * len(self.statistics)

    def _weight_bytes(self) -> Num:
        return self.cols * self.dtype.bytes_per_element


def truth_statistics(x: Values, statistics: Sequence[str]) -> dict[str, Values]:
    """mean (where the norm takes it off) and rstd over the last axis, which stays."""
    if len(statistics) == 1:
        return {"rstd": (np.mean(x**2, axis=-1, keepdims=True) + EPSILON) ** -0.5}
    mean = np.mean(x, axis=-1, keepdims=True)
    return {
        "mean": mean,
        "rstd": (np.mean((x - mean) ** 2, axis=-1, keepdims=True) + EPSILON) ** -0.5,
    }


def truth(x: Values, weights: Sequence[Values], statistics: Sequence[str]) -> Values:
    """The norm of whole rows, weights and all; x may be complex."""
    found = truth_statistics(x, statistics)
    y: Values = (x - found.get("mean", 0)) * found["rstd"] * weights[0]
    return y + weights[1] if len(weights) == 2 else y


# ---- forward -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ForwardNorm(Norm):
    """Rows in, normalised rows and saved statistics out; with `residual`, h = x + r as well."""

    @abstractmethod
    def flops(self, chunks: Num) -> Num:
        """Vector flops when each row is cut into that many chunks; the residual is not in it."""

    @abstractmethod
    def _gather(self, x: Lanes, held: Sequence[Tile], seen: int) -> None:
        """Fold a chunk of columns into the running statistics; `seen` columns came before."""

    @abstractmethod
    def _finish(self, machine: Machine, held: Sequence[Tile]) -> None:
        """Turn running statistics into those that normalise."""

    @abstractmethod
    def _normalise(self, x: Lanes, held: Sequence[Lanes], weights: Sequence[Lanes]) -> Lanes:
        """A chunk's result."""

    def held_bytes(self) -> tuple[float, float, float]:
        """Statistics; the row and, while it is added, its residual; the weights."""
        e = self.dtype.bytes_per_element
        streams = 2 if self.residual else 1
        return STATISTIC_BYTES * len(self.statistics), e * streams, e * len(self.weights)

    def work(self, fast_bytes: Num) -> Work:
        """Rows read once, or twice where a row does not fit; everything written once."""
        tiles = self.tiling(fast_bytes)
        again = tiles["passes"] - 1
        strips = where(tiles["passes"] == 2, ceil_div(self.rows, tiles["tr"]), 1)
        streams = 2 if self.residual else 1
        row_bytes, weight_bytes = self._element_bytes(), self._weight_bytes() * len(self.weights)
        added = self.rows * self.cols if self.residual else 0
        return Work(
            vector_flops=self.flops(ceil_div(self.cols, tiles["tc"])) + added,
            special_ops=self.rows,
            read_bytes=row_bytes * (streams + again) + weight_bytes * strips,
            write_bytes=row_bytes * streams + self._statistics_bytes(),
        )

    def compulsory_bytes(self) -> Num:
        """Rows and residual in and out, weights in, statistics out."""
        streams = 2 if self.residual else 1
        weight_bytes = self._weight_bytes() * len(self.weights)
        return 2 * streams * self._element_bytes() + weight_bytes + self._statistics_bytes()

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x and, if asked for, r [rows, cols]; weight (and bias) [cols]."""
        shape = self._shape()
        rows = ("x", "r") if self.residual else ("x",)
        arrays = {key: rng.standard_normal(shape) for key in rows}
        return arrays | {key: rng.standard_normal(shape[1]) for key in self.weights}

    def reference(self, inputs: Arrays) -> Arrays:
        """Statistics of whole rows with NumPy's mean and variance."""
        h = inputs["x"] + inputs["r"] if self.residual else inputs["x"]
        statistics = truth_statistics(h, self.statistics)
        outputs = {"y": truth(h, [inputs[key] for key in self.weights], self.statistics)}
        outputs |= {"h": h} if self.residual else {}
        return outputs | statistics

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel; weights stay where a row fits."""
        tiles = {key: int(v) for key, v in self.tiling(machine.fast_bytes).items()}
        rows, cols = self._shape()
        written = {key: machine.empty((rows, cols), self.dtype) for key in self._written_rows()}
        saved = {key: machine.empty((rows, 1), FP32) for key in self.statistics}
        slow = {k: machine.place(v, self.dtype) for k, v in inputs.items()} | written | saved
        parts = slices(cols, tiles["tc"])
        with machine.kernel():
            resident = self._load_weights(machine, slow, ...) if tiles["passes"] == 1 else None
            for block in slices(rows, tiles["tr"]):
                with machine.scope():
                    self._block(machine, slow, block, parts, resident)
        return {key: array.values for key, array in (written | saved).items()}

    def _written_rows(self) -> tuple[str, ...]:
        return ("y", "h") if self.residual else ("y",)

    def _block(
        self,
        machine: Machine,
        slow: Slow,
        rows: slice,
        parts: Sequence[slice],
        resident: list[Lanes] | None,
    ) -> None:
        """Statistics of a block of rows, then its result; `resident` weights mean one pass."""
        num_rows = rows.stop - rows.start
        held = [machine.full((num_rows, 1), 0.0) for _ in self.statistics]
        for cols in parts:
            tile = self._load_sum(machine, slow, (rows, cols))
            self._gather(Lanes(machine, tile.values), held, cols.start)
            if resident is None:
                machine.free(tile)
        self._finish(machine, held)
        for statistic, name in zip(held, self.statistics, strict=True):
            machine.store(statistic, slow[name], rows)
        lanes = [Lanes(machine, statistic.values) for statistic in held]
        for cols in parts:
            with machine.scope():
                weights = resident
                if weights is None:
                    tile = machine.load(slow["h" if self.residual else "x"], (rows, cols))
                    weights = self._load_weights(machine, slow, cols)
                y = self._normalise(Lanes(machine, tile.values), lanes, weights)
                machine.store(y.into(tile), slow["y"], (rows, cols))

    def _load_sum(self, machine: Machine, slow: Slow, index: tuple[slice, slice]) -> Tile:
        """A tile of rows; with a residual, the sum, which is also written."""
        tile = machine.load(slow["x"], index)
        if self.residual:
            added = machine.load(slow["r"], index)
            total = Lanes(machine, tile.values) + Lanes(machine, added.values)
            machine.store(total.into(tile), slow["h"], index)
            machine.free(added)
        return tile

    def _load_weights(self, machine: Machine, slow: Slow, cols: object) -> list[Lanes]:
        return [Lanes(machine, machine.load(slow[key], cols).values) for key in self.weights]


@dataclass(frozen=True, kw_only=True)
class RmsNorm(ForwardNorm):
    """y = x rstd w with rstd = 1 / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, eq. 4).

    4 flops per element (square, sum, two products), 2 flops and one rsqrt per row. With
    `residual` it reads r too, normalises h = x + r and writes h: one more flop per element.

    >>> op = RmsNorm(rows=8192, cols=4096)
    >>> op.work(2**16).bytes == 2 * 8192 * 4096 * 2 + 4096 * 2 + 8192 * 4
    True
    """

    name: ClassVar[str] = "rmsnorm"
    weights: ClassVar[tuple[str, ...]] = ("weight",)
    statistics: ClassVar[tuple[str, ...]] = ("rstd",)

    def flops(self, chunks: Num) -> Num:
        """Running sums cost nothing extra: n elements into a sum are n additions."""
        return self.rows * (4 * self.cols + 2)

    def _gather(self, x: Lanes, held: Sequence[Tile], seen: int) -> None:
        (x * x).sum(axis=1).gather(held[0])

    def _finish(self, machine: Machine, held: Sequence[Tile]) -> None:
        _rstd(machine, held[0], int(self.cols))

    def _normalise(self, x: Lanes, held: Sequence[Lanes], weights: Sequence[Lanes]) -> Lanes:
        return x * held[0] * weights[0]


@dataclass(frozen=True, kw_only=True)
class LayerNorm(ForwardNorm):
    """y = (x - mean) rstd w + b with rstd = 1 / sqrt(var + eps) (Ba et al. 2016).

    8 flops per element: 4 for a mean and a sum of squared differences of each chunk of columns,
    4 to normalise. Chunks merge by Chan, Golub and LeVeque 1979, eq. 2.1: 7 flops per row and
    merge. 2 flops and one rsqrt per row, one flop per row and chunk for its mean.

    >>> op = LayerNorm(rows=8192, cols=4096)
    >>> op.work(2**16).vector_flops == 8192 * (8 * 4096 + 1 + 2)
    True
    """

    name: ClassVar[str] = "layernorm"
    weights: ClassVar[tuple[str, ...]] = ("weight", "bias")
    statistics: ClassVar[tuple[str, ...]] = ("mean", "rstd")

    def flops(self, chunks: Num) -> Num:
        """8 per element; a mean per chunk; a merge per chunk but the first; 2 to finish."""
        return self.rows * (8 * self.cols + chunks + 7 * (chunks - 1) + 2)

    def _gather(self, x: Lanes, held: Sequence[Tile], seen: int) -> None:
        new = x.values.shape[1]
        chunk_mean = x.sum(axis=1) * (1 / new)
        centred = x - chunk_mean
        squares = (centred * centred).sum(axis=1)
        if not seen:
            chunk_mean.into(held[0])
            squares.into(held[1])
            return
        mean, total = (Lanes(x.machine, tile.values.copy()) for tile in held)
        moved = chunk_mean - mean
        (mean + moved * (new / (seen + new))).into(held[0])
        (total + squares + moved * moved * (seen * new / (seen + new))).into(held[1])

    def _finish(self, machine: Machine, held: Sequence[Tile]) -> None:
        _rstd(machine, held[1], int(self.cols))

    def _normalise(self, x: Lanes, held: Sequence[Lanes], weights: Sequence[Lanes]) -> Lanes:
        mean, rstd = held
        return (x - mean) * rstd * weights[0] + weights[1]


def _rstd(machine: Machine, squares: Tile, cols: int) -> None:
    """1 / sqrt(sum / cols + eps) in place: 2 flops and one rsqrt per row."""
    (Lanes(machine, squares.values) * (1 / cols) + EPSILON).rsqrt().into(squares)
