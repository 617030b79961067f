"""Gradients of RMS and layer normalisation over rows.

Rows are tiled as in the forward pass (`norm`), whose saved statistics come in with them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import FP32
from workloads.machine import Machine, Tile, Values, slices
from workloads.numeric import Num, ceil_div
from workloads.op import Arrays
from workloads.ops.norm import STATISTIC_BYTES, Norm, Slow, truth, truth_statistics
from workloads.ops.streamed import Lanes
from workloads.work import Work


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
        return arrays | truth_statistics(arrays["x"], self.statistics)

    def reference(self, inputs: Arrays) -> Arrays:
        """The forward truth differentiated by complex steps (Squire and Trapp 1998)."""
        x, dy, step = inputs["x"], inputs["dy"], 1e-30
        weights = [inputs["weight"], np.zeros(int(self.cols))][: len(self.weights)]
        moved = x[:, None, :] + 1j * step * np.eye(int(self.cols))
        jacobian = truth(moved, weights, self.statistics).imag / step  # [rows, from, to]
        dx = np.einsum("rij,rj->ri", jacobian, dy)
        ones = [np.ones(int(self.cols)), *weights[1:]]
        outputs = {"dx": dx + inputs["dh"] if self.residual else dx}
        outputs["dweight"] = (dy * truth(x, ones, self.statistics)).sum(axis=0)
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
