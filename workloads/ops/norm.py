"""RMS and layer normalisation over rows, forward and backward.

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
from workloads.machine import Machine, SlowArray, Tile, Values
from workloads.numeric import Num, ceil_div, floor, maximum, minimum, where
from workloads.op import Arrays, ProvedOp, require_fit
from workloads.ops.streamed import Lanes, slices
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
        statistics = _truth_statistics(h, self.statistics)
        outputs = {"y": _truth(h, [inputs[key] for key in self.weights], self.statistics)}
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


# ---- backward ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BackwardNorm(Norm):
    """x, dy, statistics and weight in; dx and the gradients of the weights out.

    Where a row fits, one kernel walks the rows with FP32 accumulators of the weight gradients
    in fast memory, and writes them once. Where it does not, one kernel finds the corrections of
    every row and a second one walks column by column, so that its accumulators need only
    cover a chunk of columns. With `residual`, the gradient dh of the summed stream comes in too
    and is added to dx, which is then the gradient of both summands.
    Ignored: one partial gradient per SM and its reduction.
    """

    element_flops: ClassVar[int]

    @abstractmethod
    def _normalised(self, x: Lanes, statistics: Sequence[Lanes]) -> Lanes:
        """x as the forward pass normalised it, before the weights."""

    def held_bytes(self) -> tuple[float, float, float]:
        """Statistics and corrections; x, dy (and dh); the weight and FP32 accumulators."""
        e = self.dtype.bytes_per_element
        return (
            2 * STATISTIC_BYTES * len(self.statistics),
            e * (3 if self.residual else 2),
            e + FP32.bytes_per_element * len(self.weights),
        )

    def work(self, fast_bytes: Num) -> Work:
        """One kernel where a row fits, else two; see the class."""
        tiles = self.tiling(fast_bytes)
        two = tiles["passes"] - 1  # 1 where a row does not fit, else 0
        strips, chunks = ceil_div(self.rows, tiles["tr"]), ceil_div(self.cols, tiles["tc"])
        row_bytes, weight_bytes = self._element_bytes(), self._weight_bytes()
        saved_bytes = self._statistics_bytes()  # the corrections are as many
        streams = 3 if self.residual else 2
        first_read = 2 * row_bytes + strips * weight_bytes + saved_bytes
        last_read = streams * row_bytes + weight_bytes + chunks * saved_bytes * (1 + two)
        flops = self.element_flops + (1 if self.residual else 0)
        return Work(
            vector_flops=self.rows * (flops * self.cols + len(self.statistics)),
            read_bytes=two * first_read + last_read,
            write_bytes=row_bytes + weight_bytes * len(self.weights) + two * saved_bytes,
            launches=1 + two,
        )

    def compulsory_bytes(self) -> Num:
        """x, dy (and dh), statistics and weight in; dx and the weights' gradients out."""
        streams = 4 if self.residual else 3
        weight_bytes = self._weight_bytes() * (1 + len(self.weights))
        return streams * self._element_bytes() + weight_bytes + self._statistics_bytes()

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x, dy (and dh) [rows, cols], weight [cols], and the statistics of x [rows, 1]."""
        shape = self._shape()
        keys = ("x", "dy", "dh") if self.residual else ("x", "dy")
        arrays: dict[str, Values] = {key: rng.standard_normal(shape) for key in keys}
        arrays["weight"] = rng.standard_normal(shape[1])
        return arrays | _truth_statistics(arrays["x"], self.statistics)

    def reference(self, inputs: Arrays) -> Arrays:
        """The forward truth differentiated by complex steps (Squire and Trapp 1998)."""
        x, dy, step = inputs["x"], inputs["dy"], 1e-30
        weights = [inputs["weight"], np.zeros(int(self.cols))][: len(self.weights)]
        moved = x[:, None, :] + 1j * step * np.eye(int(self.cols))
        jacobian = _truth(moved, weights, self.statistics).imag / step  # [rows, from, to]
        dx = np.einsum("rij,rj->ri", jacobian, dy)
        ones = [np.ones(int(self.cols)), *weights[1:]]
        outputs = {"dx": dx + inputs["dh"] if self.residual else dx}
        outputs["dweight"] = (dy * _truth(x, ones, self.statistics)).sum(axis=0)
        return outputs | ({"dbias": dy.sum(axis=0)} if len(self.weights) == 2 else {})

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One fused kernel, or corrections first and gradients next."""
        tiles = {key: int(v) for key, v in self.tiling(machine.fast_bytes).items()}
        rows, cols = self._shape()
        slow = {
            key: machine.place(value, FP32 if key in self.statistics else self.dtype)
            for key, value in inputs.items()
        }
        outputs = {"dx": machine.empty((rows, cols), self.dtype)}
        outputs |= {f"d{key}": machine.empty((cols,), self.dtype) for key in self.weights}
        slow |= outputs
        blocks, parts = slices(rows, tiles["tr"]), slices(cols, tiles["tc"])
        if tiles["passes"] == 2:
            slow |= {key: machine.empty((rows, 1), FP32) for key in self._corrections()}
            with machine.kernel():
                for block in blocks:
                    with machine.scope():
                        self._correct(machine, slow, block, parts)
        with machine.kernel():
            for part in parts:
                with machine.scope():
                    self._column_block(machine, slow, blocks, part, tiles["passes"] == 1)
        return {key: array.values for key, array in outputs.items()}

    def _corrections(self) -> tuple[str, ...]:
        """mean(g xhat), which takes out what changed rstd, and mean(g), what moved the mean."""
        return tuple(f"correction_of_{key}" for key in reversed(self.statistics))

    def _correct(self, machine: Machine, slow: Slow, rows: slice, parts: Sequence[slice]) -> None:
        """First kernel: the corrections of a strip of rows, chunk by chunk."""
        statistics = self._load_rows(machine, slow, rows, self.statistics)
        held = [machine.full((rows.stop - rows.start, 1), 0.0) for _ in self.statistics]
        for cols in parts:
            with machine.scope():
                x, dy, weight = (
                    Lanes(machine, machine.load(slow[key], index).values)
                    for key, index in (("x", (rows, cols)), ("dy", (rows, cols)), ("weight", cols))
                )
                self._gather(x, dy, weight, statistics, held)
        for tile, key in zip(self._means(machine, held), self._corrections(), strict=True):
            machine.store(tile, slow[key], rows)

    def _column_block(
        self, machine: Machine, slow: Slow, blocks: Sequence[slice], cols: slice, fused: bool
    ) -> None:
        """Last kernel: dx of all rows in a chunk of columns, and its weight gradients."""
        weight = Lanes(machine, machine.load(slow["weight"], cols).values)
        sums = [machine.full((1, cols.stop - cols.start), 0.0) for _ in self.weights]
        for rows in blocks:
            with machine.scope():
                x_tile, dy_tile = (machine.load(slow[key], (rows, cols)) for key in ("x", "dy"))
                x, dy = Lanes(machine, x_tile.values), Lanes(machine, dy_tile.values)
                statistics = self._load_rows(machine, slow, rows, self.statistics)
                if fused:
                    held = [machine.full((rows.stop - rows.start, 1), 0.0) for _ in statistics]
                    self._gather(x, dy, weight, statistics, held)
                    means = [Lanes(machine, t.values) for t in self._means(machine, held)]
                else:
                    means = self._load_rows(machine, slow, rows, self._corrections())
                dx = self._gradients(x, dy, weight, statistics, means, sums)
                if self.residual:
                    dx = dx + Lanes(machine, machine.load(slow["dh"], (rows, cols)).values)
                machine.store(dx.into(x_tile), slow["dx"], (rows, cols))
        for total, key in zip(sums, self.weights, strict=True):
            machine.store(total, slow[f"d{key}"], cols)

    def _gather(
        self,
        x: Lanes,
        dy: Lanes,
        weight: Lanes,
        statistics: Sequence[Lanes],
        held: Sequence[Tile],
    ) -> None:
        """Running sums of g xhat and, where a mean was taken off, of g = dy w."""
        g = dy * weight
        (g * self._normalised(x, statistics)).sum(axis=1).gather(held[0])
        if len(held) == 2:
            g.sum(axis=1).gather(held[1])

    def _means(self, machine: Machine, held: Sequence[Tile]) -> list[Tile]:
        return [(Lanes(machine, t.values) * (1 / int(self.cols))).into(t) for t in held]

    def _gradients(
        self,
        x: Lanes,
        dy: Lanes,
        weight: Lanes,
        statistics: Sequence[Lanes],
        means: Sequence[Lanes],
        sums: Sequence[Tile],
    ) -> Lanes:
        """dx = (g - xhat mean(g xhat) - mean(g)) rstd; adds dy xhat and dy to the sums."""
        normalised = self._normalised(x, statistics)
        (dy * normalised).sum(axis=0).gather(sums[0])
        if len(sums) == 2:
            dy.sum(axis=0).gather(sums[1])
        dx = dy * weight - normalised * means[0]
        if len(means) == 2:
            dx = dx - means[1]
        return dx * statistics[-1]

    def _load_rows(
        self, machine: Machine, slow: Slow, rows: slice, keys: Sequence[str]
    ) -> list[Lanes]:
        return [Lanes(machine, machine.load(slow[key], rows).values) for key in keys]


@dataclass(frozen=True, kw_only=True)
class RmsNormBackward(BackwardNorm):
    """Gradients of `RmsNorm`: dx = rstd (g - xhat mean(g xhat)), dw = sum over rows of dy xhat.

    g = dy w, xhat = x rstd. 11 flops per element (4 for the mean, 5 for dx, 2 for dw; one more
    with `residual`) and one per row.

    >>> op = RmsNormBackward(rows=8192, cols=4096)
    >>> op.work(2**18).bytes == 3 * 8192 * 4096 * 2 + 2 * 4096 * 2 + 8192 * 4
    True
    """

    name: ClassVar[str] = "rmsnorm_backward"
    weights: ClassVar[tuple[str, ...]] = ("weight",)
    statistics: ClassVar[tuple[str, ...]] = ("rstd",)
    element_flops: ClassVar[int] = 11

    def _normalised(self, x: Lanes, statistics: Sequence[Lanes]) -> Lanes:
        return x * statistics[0]


@dataclass(frozen=True, kw_only=True)
class LayerNormBackward(BackwardNorm):
    """Gradients of `LayerNorm`: dx = rstd (g - mean(g) - xhat mean(g xhat)), dw and db.

    g = dy w, xhat = (x - mean) rstd. 16 flops per element (6 for the means, 7 for dx, 2 for dw,
    1 for db; one more with `residual`) and two per row.

    >>> LayerNormBackward(rows=1000, cols=512).work(2**18).vector_flops == 1000 * (16 * 512 + 2)
    True
    """

    name: ClassVar[str] = "layernorm_backward"
    weights: ClassVar[tuple[str, ...]] = ("weight", "bias")
    statistics: ClassVar[tuple[str, ...]] = ("mean", "rstd")
    element_flops: ClassVar[int] = 16

    def _normalised(self, x: Lanes, statistics: Sequence[Lanes]) -> Lanes:
        return (x - statistics[0]) * statistics[1]


# ---- shared pieces -------------------------------------------------------------------------


def _rstd(machine: Machine, squares: Tile, cols: int) -> None:
    """1 / sqrt(sum / cols + eps) in place: 2 flops and one rsqrt per row."""
    (Lanes(machine, squares.values) * (1 / cols) + EPSILON).rsqrt().into(squares)


def _truth_statistics(x: Values, statistics: Sequence[str]) -> dict[str, Values]:
    """mean (where the norm takes it off) and rstd over the last axis, which stays."""
    if len(statistics) == 1:
        return {"rstd": (np.mean(x**2, axis=-1, keepdims=True) + EPSILON) ** -0.5}
    mean = np.mean(x, axis=-1, keepdims=True)
    return {
        "mean": mean,
        "rstd": (np.mean((x - mean) ** 2, axis=-1, keepdims=True) + EPSILON) ** -0.5,
    }


def _truth(x: Values, weights: Sequence[Values], statistics: Sequence[str]) -> Values:
    """The norm of whole rows, weights and all; x may be complex."""
    found = _truth_statistics(x, statistics)
    y: Values = (x - found.get("mean", 0)) * found["rstd"] * weights[0]
    return y + weights[1] if len(weights) == 2 else y
