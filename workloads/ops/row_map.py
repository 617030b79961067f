"""Pointwise maps whose kernels give every row a thread block: gates, rotations, quantisers.

The counts are those of `Elementwise` over rows x cols elements; what the rows add is how the work
is divided, which decides the time where rows are few and long or many and short.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hwmodels.dtypes import BF16, DType
from workloads.numeric import Array, Num
from workloads.op import Op, checked_number
from workloads.work import Work


@dataclass(frozen=True, kw_only=True)
class RowMap(Op):
    """One output [rows, cols] from `num_inputs` inputs of that shape, element by element.

    Flops and special functions are per element and may be zero or fractional. Inputs are stored
    in `dtype`, the output in `out_dtype` or else `dtype`.

    >>> RowMap(rows=512, cols=14336, num_inputs=2).work(2**16).bytes == 3 * 2 * 512 * 14336
    True
    """

    name: ClassVar[str] = "row_map"
    rows: Num
    cols: Num
    num_inputs: Num = 1
    vector_flops_per_element: float | Array = 1
    special_ops_per_element: float | Array = 0
    dtype: DType = BF16
    out_dtype: DType | None = None

    def check(self) -> None:
        """Counts per element must not be negative."""
        for field in ("vector_flops_per_element", "special_ops_per_element"):
            value = getattr(self, field)
            number = checked_number(self.name, field, value, lambda n: n >= 0, "at least 0")
            object.__setattr__(self, field, number)

    @property
    def written_dtype(self) -> DType:
        """Format of the output: `out_dtype`, else the input format."""
        return self.out_dtype or self.dtype

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """No choice that changes the traffic: nothing is used twice."""
        return {}

    def work(self, fast_bytes: Num) -> Work:
        """Every input read once, the output written once, one launch."""
        n = self.rows * self.cols
        return Work(
            vector_flops=n * self.vector_flops_per_element,
            special_ops=n * self.special_ops_per_element,
            read_bytes=n * self.num_inputs * self.dtype.bytes_per_element,
            write_bytes=n * self.written_dtype.bytes_per_element,
        )

    def compulsory_bytes(self) -> Num:
        """Each input once, the output once."""
        e, out = self.dtype.bytes_per_element, self.written_dtype.bytes_per_element
        return self.rows * self.cols * (self.num_inputs * e + out)
