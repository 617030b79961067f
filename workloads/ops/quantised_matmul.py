"""A linear layer in a narrow format: activations quantised on the fly, weights stored quantised.

    kernel 1 (dynamic schemes)   reads x [m, k] in `in_dtype`, writes it in `dtype` with its scales
    kernel 2                     C[m, n] = A[m, k] B[k, n]: A in `dtype`, B in `weight_dtype`

Weight-only schemes (`dtype` equal to `in_dtype`) have no first kernel: B is unpacked inside the
product. Flops are 2 m n k in `dtype`; the quantiser needs one maximum and one multiplication an
element. Block scales are part of a format's bytes; a scale for every 128 elements (blockwise fp8)
or a tensor is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hwmodels.dtypes import BF16, FP8, DType
from workloads.numeric import Num
from workloads.op import Op
from workloads.work import Work


@dataclass(frozen=True, kw_only=True)
class QuantisedMatmul(Op):
    """One product of quantised operands; `scheme` names how scales are shared, for kernels' sake.

    >>> op = QuantisedMatmul(m=16, n=4096, k=4096)
    >>> op.weight_bytes() == 4096 * 4096, op.quantises, op.work(2**20).launches
    (True, True, 2)
    """

    name: ClassVar[str] = "quantised_matmul"
    m: Num
    n: Num
    k: Num
    dtype: DType = FP8
    weight_dtype: DType | None = None
    in_dtype: DType = BF16
    out_dtype: DType = BF16
    scheme: str = "tensor"

    @property
    def stored_dtype(self) -> DType:
        """Format of the weights: `weight_dtype`, else that of the product."""
        return self.weight_dtype or self.dtype

    @property
    def quantises(self) -> bool:
        """Are the activations converted first?"""
        return self.dtype != self.in_dtype

    def weight_bytes(self) -> Num:
        """B once."""
        return self.k * self.n * self.stored_dtype.bytes_per_element

    def activation_bytes(self) -> Num:
        """A once, as the product reads it."""
        return self.m * self.k * self.dtype.bytes_per_element

    def quantiser_bytes(self) -> Num:
        """What the first kernel reads and writes; nothing without one."""
        if not self.quantises:
            return 0 * self.m
        return self.m * self.k * self.in_dtype.bytes_per_element + self.activation_bytes()

    def min_flops(self) -> Mapping[DType, Num]:
        """2 m n k."""
        return {self.dtype: 2 * self.m * self.n * self.k}

    def compulsory_bytes(self) -> Num:
        """Activations as they come, weights as stored, the result."""
        inputs = self.m * self.k * self.in_dtype.bytes_per_element + self.weight_bytes()
        return inputs + self.m * self.n * self.out_dtype.bytes_per_element

    def work(self, fast_bytes: Num) -> Work:
        """Every array once: the quantised copy counts as kept in fast memory."""
        outputs = self.m * self.n * self.out_dtype.bytes_per_element
        return Work(
            tensor_flops=dict(self.min_flops()),
            vector_flops=2 * self.m * self.k if self.quantises else 0,
            read_bytes=self.compulsory_bytes() - outputs,
            write_bytes=outputs,
            launches=2 if self.quantises else 1,
        )

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """No tile is chosen: the counts do not depend on one."""
        return {}
