"""An op known by its counts alone: what is left when nobody has written down the algorithm.

The caller states flops, special functions and bytes; nothing is reused, nothing is tiled. For
estimates of kernels that have no op of their own, and for them only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hwmodels.dtypes import BF16, DType
from workloads.numeric import Num
from workloads.op import Op
from workloads.work import Work


@dataclass(frozen=True, kw_only=True)
class CountedOp(Op):
    """`tensor_flops` in `dtype`, `vector_flops`, bytes moved once; `num_blocks` run at once.

    >>> CountedOp(moved_bytes=2**20, vector_flops=2**19).work(2**16).bytes
    1048576.0
    """

    name: ClassVar[str] = "counted"
    moved_bytes: Num
    tensor_flops: Num = 1
    vector_flops: Num = 1
    num_blocks: Num | None = None
    dtype: DType = BF16

    def compulsory_bytes(self) -> Num:
        """As stated."""
        return self.moved_bytes

    def work(self, fast_bytes: Num) -> Work:
        """As stated, whatever the fast memory."""
        return Work(
            tensor_flops={self.dtype: self.tensor_flops},
            vector_flops=self.vector_flops,
            read_bytes=self.moved_bytes / 2,
            write_bytes=self.moved_bytes / 2,
            launches=1,
        )

    def blocks(self, fast_bytes: Num) -> Num | None:
        """As stated."""
        return self.num_blocks

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """None."""
        return {}
