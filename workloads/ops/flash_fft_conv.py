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
from typing import ClassVar

import numpy as np

from hwmodels.errors import InputError
from workloads.machine import Machine
from workloads.numeric import Num, maximum, where
from workloads.op import Arrays, require_fit
from workloads.ops.fft_convolution import COMPLEX64, LongConvolution
from workloads.ops.monarch import (
    STRIP,
    MonarchRun,
    complex_format,
    monarch_stages,
    spectra,
    tables_in_slow_memory,
)
from workloads.work import Work

ORDERS = (2, 3, 4)
"""Monarch orders the paper implements."""

LOG2_LEAST_FACTOR = 4
"""log2 of the least useful factor: a 16 x 16 matrix fills a tensor-core instruction."""


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
        return tuple(size for size, _ in monarch_stages(self.log2_points, order))

    def needed_bytes(self, order: int, num_outer: int) -> Num:
        """Fast memory that the fused kernel, and every outer stage around it, asks for.

        Fused: a row and its filter's spectrum, all inner tables, and a strip of operands with
        its fp32 result. Outer stage: one matrix, and one column with its twiddles and result.
        """
        return self._needed_bytes(monarch_stages(self.log2_points, order))[num_outer]

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

    def unmasked(self, work: Work) -> Work:
        """All of it: nothing is masked, though another algorithm needs no matrix product."""
        return work

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
        stages = monarch_stages(log2_points, order)
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
        point = complex_format(self.dtype)
        factored = monarch_stages(self.log2_points, tiles["order"])
        stages = tables_in_slow_memory(machine, factored, point, folded=not self.circular)
        flat = {
            key: machine.place(inputs[key].reshape(-1, length), self.dtype)
            for key in ("u", "v", "w")
            if key in inputs
        }
        flat["y"] = machine.empty((batch * channels, length), self.dtype)
        filters = machine.place(spectra(inputs["k"], m, stages), point)
        points = machine.empty((batch * channels, m), point, is_complex=True)
        run = MonarchRun(machine, self.dtype, point, flat, points)
        for i in range(outer):
            run.outer_forward(stages[i], first=i == 0)
        run.fused(stages[outer:], filters, channels, whole=outer == 0)
        for i in reversed(range(outer)):
            run.outer_inverse(stages[i], last=i == 0)
        return {"y": flat["y"].values.reshape(batch, channels, length)}


def _entries(stages: list[tuple[Num, Num]], i: int) -> Num:
    """Complex entries of a stage's tables: two matrices, and twiddles for all but the last."""
    size, length = stages[i]
    return 2 * size * size + (length if i < len(stages) - 1 else 0)
