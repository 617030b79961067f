"""Matrix product C[m, n] = A[m, k] B[k, n], batched, tiled for a fast memory.

Three dataflows, the one that moves fewest bytes is taken:

    tile of C stays      reads  e (m k ceil(n / tn) + k n ceil(m / tm))
    row panel of A stays reads  e (m k + k n ceil(m / tm))
    col panel of B stays reads  e (k n + m k ceil(n / tn))

and C is written once in each. Operands stream through fast memory in slices of `tk` along k,
the accumulator is held in the accumulator's format. Lower bound: Smith et al. 2019,
arXiv 1702.02017, eq. 1, which improves Hong and Kung's constant: 2 m n k / sqrt(S) - 2 S
elements for a fast memory of S elements, never below the compulsory traffic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import BF16, FP32, FP64, DType
from workloads.machine import Machine, SlowArray, slices
from workloads.numeric import Num, ceil_div, floor, maximum, minimum, sqrt, where
from workloads.op import Arrays, ProvedOp, require_fit
from workloads.work import Work

SLICE_K = 16
"""Depth of one operand slice: the k of one tensor-core instruction on 16-bit inputs."""

STRIP = 16
"""Width of the strip that streams past a resident panel: the least n of a tensor-core tile."""

C_STAYS, A_STAYS, B_STAYS = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Matmul(ProvedOp):
    """`batch` independent products of [m, k] by [k, n]; sizes in elements.

    Stored in `dtype`, computed in `math_dtype` and written in `out_dtype` (else in `dtype`).

    >>> op = Matmul(m=4096, n=4096, k=4096)
    >>> op.work(50 * 2**20).tensor_flops[BF16] == 2 * 4096**3
    True
    """

    name: ClassVar[str] = "matmul"
    m: Num
    n: Num
    k: Num
    batch: Num = 1
    dtype: DType = BF16
    out_dtype: DType | None = None
    math_dtype: DType | None = None

    @property
    def computed_dtype(self) -> DType:
        """Format that the products are computed in: `math_dtype`, else the input format."""
        return self.math_dtype or self.dtype

    @property
    def accumulator_bytes(self) -> int:
        """Bytes of one partial sum held in fast memory."""
        return 8 if self.dtype == FP64 else 4

    @property
    def written_dtype(self) -> DType:
        """Format in which C goes to slow memory: `out_dtype`, else the input format."""
        return self.out_dtype or self.dtype

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Tile sizes `tm`, `tn`, `tk` and the `dataflow` with the least traffic."""
        e, acc = self.dtype.bytes_per_element, self.accumulator_bytes
        m, n, k = self.m, self.n, self.k
        tk = minimum(k, SLICE_K)
        require_fit(self.name, fast_bytes, acc + 2 * tk * e, "a 1 x 1 tile and its operand slices")
        tm_c, tn_c = _stationary_tile(m, n, tk * e, acc, fast_bytes)
        tm_a = _panel(m, minimum(n, STRIP), k * e, tk * e, acc, fast_bytes)
        tn_b = _panel(n, minimum(m, STRIP), k * e, tk * e, acc, fast_bytes)
        reads_c = m * k * ceil_div(n, tn_c) + k * n * ceil_div(m, tm_c)
        reads_a = m * k + k * n * ceil_div(m, maximum(tm_a, 1))
        reads_b = k * n + m * k * ceil_div(n, maximum(tn_b, 1))
        use_a = (tm_a >= 1) & (reads_a < reads_c)
        best = where(use_a, reads_a, reads_c)
        use_b = (tn_b >= 1) & (reads_b < best)
        return {
            "tm": where(use_b, minimum(m, STRIP), where(use_a, tm_a, tm_c)),
            "tn": where(use_b, tn_b, where(use_a, minimum(n, STRIP), tn_c)),
            "tk": tk,
            "dataflow": where(use_b, B_STAYS, where(use_a, A_STAYS, C_STAYS)),
            "read_elements": where(use_b, reads_b, best),
        }

    def work(self, fast_bytes: Num) -> Work:
        """2 m n k flops per product; reads per the dataflow, C written once; no masking waste."""
        reads = self.tiling(fast_bytes)["read_elements"]
        return Work(
            tensor_flops=dict(self.min_flops()),
            read_bytes=self.batch * reads * self.dtype.bytes_per_element,
            write_bytes=self.batch * self.m * self.n * self.written_dtype.bytes_per_element,
            launches=1,
        )

    def min_flops(self) -> Mapping[DType, Num]:
        """2 m n k per product."""
        return {self.computed_dtype: 2 * self.batch * self.m * self.n * self.k}

    def compulsory_bytes(self) -> Num:
        """A and B once, C once."""
        inputs = (self.m * self.k + self.k * self.n) * self.dtype.bytes_per_element
        return self.batch * (inputs + self.m * self.n * self.written_dtype.bytes_per_element)

    def io_lower_bound_bytes(self, fast_bytes: Num) -> Num:
        """2 m n k / sqrt(S) - 2 S elements per product, S in the narrowest format involved."""
        e = min(self.dtype.bytes_per_element, self.written_dtype.bytes_per_element)
        elements = fast_bytes / e
        smith = 2 * self.m * self.n * self.k / sqrt(elements) - 2 * elements
        return maximum(self.compulsory_bytes(), self.batch * smith * e)

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """A[batch, m, k] and B[batch, k, n]."""
        b, m, n, k = (int(v) for v in (self.batch, self.m, self.n, self.k))
        return {"a": rng.standard_normal((b, m, k)), "b": rng.standard_normal((b, k, n))}

    def reference(self, inputs: Arrays) -> Arrays:
        """NumPy's product."""
        return {"c": inputs["a"] @ inputs["b"]}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The tiled loops of the chosen dataflow, one kernel for the whole batch."""
        a = machine.place(inputs["a"], self.dtype)
        b = machine.place(inputs["b"], self.dtype)
        c = machine.empty((int(self.batch), int(self.m), int(self.n)), self.written_dtype)
        self.run(machine, a, b, c)
        return {"c": c.values}

    def run(self, machine: Machine, a: SlowArray, b: SlowArray, c: SlowArray) -> None:
        """One kernel: c[batch, m, n] = a[batch, m, k] b[batch, k, n], all in slow memory."""
        tiles = {key: int(v) for key, v in self.tiling(machine.fast_bytes).items()}
        run = {C_STAYS: self._c_stays, A_STAYS: self._a_stays, B_STAYS: self._b_stays}
        with machine.kernel():
            for i in range(int(self.batch)):
                run[tiles["dataflow"]](machine, tiles, i, a, b, c)

    def _c_stays(
        self, mc: Machine, t: Mapping[str, int], i: int, a: SlowArray, b: SlowArray, c: SlowArray
    ) -> None:
        for rows in slices(int(self.m), t["tm"]):
            for cols in slices(int(self.n), t["tn"]):
                with mc.scope():
                    acc = mc.full((_len(rows), _len(cols)), 0.0, _accumulator(self.dtype))
                    for depth in slices(int(self.k), t["tk"]):
                        with mc.scope():
                            left, right = mc.load(a, (i, rows, depth)), mc.load(b, (i, depth, cols))
                            mc.matmul(left, right, self.computed_dtype, into=acc)
                    mc.store(acc, c, (i, rows, cols))

    def _a_stays(
        self, mc: Machine, t: Mapping[str, int], i: int, a: SlowArray, b: SlowArray, c: SlowArray
    ) -> None:
        """A row panel of A beside strips of B; the sizes are those of the arrays given."""
        num_rows, num_cols = c.values.shape[-2:]
        depths = slices(int(self.k), t["tk"])
        for rows in slices(num_rows, t["tm"]):
            with mc.scope():
                panel = [mc.load(a, (i, rows, depth)) for depth in depths]
                for cols in slices(num_cols, t["tn"]):
                    with mc.scope():
                        acc = mc.full((_len(rows), _len(cols)), 0.0, _accumulator(self.dtype))
                        for left, depth in zip(panel, depths, strict=True):
                            with mc.scope():
                                right = mc.load(b, (i, depth, cols))
                                mc.matmul(left, right, self.computed_dtype, into=acc)
                        mc.store(acc, c, (i, rows, cols))

    def _b_stays(
        self, mc: Machine, t: Mapping[str, int], i: int, a: SlowArray, b: SlowArray, c: SlowArray
    ) -> None:
        """C^T = B^T A^T: a panel of columns of B is a panel of rows of its transpose."""
        turned = {**t, "tm": t["tn"], "tn": t["tm"]}
        self._a_stays(mc, turned, i, _transposed(b), _transposed(a), _transposed(c))


@dataclass(frozen=True, kw_only=True)
class BatchedMatmul(Matmul):
    """The same where the batch is the point: many small products in one kernel.

    >>> BatchedMatmul(batch=64, m=8, n=512, k=128).min_flops()[BF16] == 2 * 64 * 8 * 512 * 128
    True
    """

    name: ClassVar[str] = "batched_matmul"


def _stationary_tile(
    m: Num, n: Num, slice_bytes: Num, acc: float, fast_bytes: Num
) -> tuple[Num, Num]:
    """Largest near-square tile with acc tm tn + slice (tm + tn) <= fast, then grown into slack."""
    side = floor((sqrt(slice_bytes**2 + acc * fast_bytes) - slice_bytes) / acc)
    tm = minimum(m, maximum(side, 1))
    tn = minimum(n, floor((fast_bytes - slice_bytes * tm) / (acc * tm + slice_bytes)))
    tn = maximum(tn, 1)
    tm = minimum(m, floor((fast_bytes - slice_bytes * tn) / (acc * tn + slice_bytes)))
    return maximum(tm, 1), tn


def _panel(rows: Num, strip: Num, row_bytes: Num, slice_bytes: Num, acc: float, fast: Num) -> Num:
    """Rows of a resident panel beside one strip's accumulator and slice; 0 where none fits."""
    return minimum(
        rows, maximum(floor((fast - slice_bytes * strip) / (row_bytes + acc * strip)), 0)
    )


def _len(part: slice) -> int:
    return int(part.stop - part.start)


def _accumulator(dtype: DType) -> DType:
    return FP64 if dtype == FP64 else FP32


def _transposed(array: SlowArray) -> SlowArray:
    """The same slow memory with its last two axes exchanged: addressing, not traffic."""
    return SlowArray(array.values.swapaxes(-1, -2), array.dtype)
