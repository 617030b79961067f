"""Products of several groups of rows, each with a matrix of its own, in one kernel.

What routed experts run in training: y_g = x_g W_g of the forward pass and of input gradients, and
W'_g = x_g^T dy_g of weight gradients, for each expert g that has rows. Counts are those of a
batched product (`Matmul`) with `batch` groups of `m` rows (weight gradients: of depth `k`); what
sets it apart is the kernel, which walks a list of problems and needs no padding between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from workloads.ops.matmul import Matmul


@dataclass(frozen=True, kw_only=True)
class GroupedMatmul(Matmul):
    """`batch` experts' products [m, k] by [k, n] in one kernel.

    >>> from hwmodels.dtypes import BF16
    >>> op = GroupedMatmul(batch=16, m=2048, n=1536, k=2048)
    >>> op.min_flops()[BF16] == 16 * 2 * 2048 * 1536 * 2048
    True
    """

    name: ClassVar[str] = "grouped_matmul"
