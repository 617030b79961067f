"""The k largest of each row, by radix selection: what every selection of keys runs after scoring.

Alabi et al. 2012 (ACM JEA 17, fast k-selection on GPUs): scores become sortable integers, whose
digits of eight bits are looked at from the top. Each pass counts how often each digit occurs among
the candidates that agree with the digits found so far, and walks the histogram to the digit of the
k-th largest; a last pass writes the indices of what lies above it. For scores of B bits

    passes   D = B / 8
    vector   rows (D (2 cols + 256) + cols)      compare prefix, add to bin; walk bins; compare
    reads    cols e a row where the row fits fast memory, else (D + 1) cols e
    writes   4 k a row (indices)

Ignored: the shrinking of candidates from pass to pass, which real kernels may use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from hwmodels.dtypes import FP32, INT32, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, SlowArray, Values, slices
from workloads.numeric import Num, any_true, floor, maximum, minimum, where
from workloads.op import Arrays, ProvedOp, require_fit
from workloads.work import Work

DIGIT_BITS: Final = 8
BINS: Final = 2**DIGIT_BITS
INDEX: Final = INT32
"""Number format of an index."""


@dataclass(frozen=True, kw_only=True)
class TopK(ProvedOp):
    """x[rows, cols] -> indices[rows, k], ascending in each row. `dtype` is the scores' format.

    >>> TopK(rows=2, cols=1000, k=10).work(2**20).bytes == 2 * (4000 + 40)
    True
    """

    name: ClassVar[str] = "top_k"
    rows: Num
    cols: Num
    k: Num
    dtype: DType = FP32

    def check(self) -> None:
        """No more than there are."""
        if any_true(self.k > self.cols):
            raise InputError(f"{self.name}: k = {self.k} is more than cols = {self.cols}")

    @property
    def num_digits(self) -> int:
        """Passes over the candidates."""
        return max(self.dtype.bits // DIGIT_BITS, 1)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Elements per `chunk` beside the bins; `passes` 1 where the row stays in fast memory."""
        bins, e = BINS * INDEX.bytes_per_element, self.dtype.bytes_per_element
        held = e + 2 * INDEX.bytes_per_element  # a score, its sortable form, an index
        require_fit(self.name, fast_bytes, bins + held, "the bins and one score")
        room = floor((fast_bytes - bins) / held)
        whole = room >= self.cols
        return {
            "chunk": minimum(self.cols, maximum(room, 1)),
            "passes": where(whole, 1, self.num_digits + 1),
        }

    def work(self, fast_bytes: Num) -> Work:
        """The module's equations."""
        passes, digits = self.tiling(fast_bytes)["passes"], self.num_digits
        per_row = digits * (2 * self.cols + BINS) + self.cols
        return Work(
            vector_flops=self.rows * per_row,
            read_bytes=self.rows * self.cols * passes * self.dtype.bytes_per_element,
            write_bytes=self.rows * self.k * INDEX.bytes_per_element,
        )

    def compulsory_bytes(self) -> Num:
        """The scores once, the indices once."""
        scores = self.rows * self.cols * self.dtype.bytes_per_element
        return scores + self.rows * self.k * INDEX.bytes_per_element

    def min_flops(self) -> Mapping[DType, Num]:
        """No products."""
        return {}

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random scores."""
        return {"x": rng.standard_normal((int(self.rows), int(self.cols)))}

    def reference(self, inputs: Arrays) -> Arrays:
        """By sorting."""
        order = np.argsort(-inputs["x"], axis=-1, kind="stable")[:, : int(self.k)]
        return {"index": np.sort(order, axis=-1).astype(np.float64)}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel, row by row."""
        x = machine.place(inputs["x"], self.dtype)
        index = machine.empty((int(self.rows), int(self.k)), INDEX)
        self.run(machine, x, index)
        return {"index": index.values}

    def run(self, machine: Machine, x: SlowArray, index: SlowArray) -> None:
        """From scores to indices, both in slow memory."""
        tiles = self.tiling(machine.fast_bytes)
        parts = slices(int(self.cols), int(tiles["chunk"]))
        with machine.kernel():
            for row in range(int(self.rows)):
                with machine.scope():
                    self._row(machine, x, index, row, parts)

    def _row(
        self, mc: Machine, x: SlowArray, index: SlowArray, row: int, parts: list[slice]
    ) -> None:
        stays = len(parts) == 1
        keys = _sortable(mc.load(x, (row, parts[0])).values) if stays else None
        mc.full((BINS,), 0.0, INDEX)
        prefix, wanted = np.uint64(0), int(self.k)
        shift, width = 64, 64 // self.num_digits
        for _ in range(self.num_digits):
            alike, shift = [], shift - width
            for part in parts:
                with mc.scope():
                    held = keys if keys is not None else _sortable(mc.load(x, (row, part)).values)
                    mc.count(vector=2 * held.size)
                    digits = _shifted(held, shift)
                    alike.append(digits[_shifted(digits, width) == prefix])
            mc.count(vector=BINS)
            values, counts = np.unique(np.concatenate(alike), return_counts=True)
            above = np.cumsum(counts[::-1])[::-1] - counts  # candidates with a larger digit
            found = np.flatnonzero((above < wanted) & (above + counts >= wanted))[-1]
            wanted -= int(above[found])
            prefix = values[found]
        chosen: list[Values] = []
        for part in parts:
            with mc.scope():
                held = keys if keys is not None else _sortable(mc.load(x, (row, part)).values)
                mc.count(vector=held.size)
                chosen.append(np.flatnonzero(held >= prefix) + part.start)
        flat = np.concatenate(chosen)[: int(self.k)]
        for part in slices(flat.size, max(int(self.tiling(mc.fast_bytes)["chunk"]), 1)):
            with mc.scope():
                mc.store(mc.hold(flat[part], INDEX), index, (row, part))


def _shifted(values: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
    """Without the lowest bits; nothing is left of a whole word."""
    return values >> np.uint64(bits) if bits < 64 else np.zeros_like(values)


def _sortable(values: Values) -> NDArray[np.uint64]:
    """float64 as unsigned integers of the same order."""
    bits = np.ascontiguousarray(values, dtype=np.float64).view(np.uint64)
    sign = np.uint64(1) << np.uint64(63)
    return np.where(bits & sign, ~bits, bits | sign)
