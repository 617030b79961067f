"""Scores of a few queries against many rows of an index: a product that streams its right side.

S[batch, m, n] = Q[batch, m, k] X[batch, n, k]^T with m the query rows that share an index (the
heads of a group while decoding) and n its rows: keys, channels of keys, block means, centroids.
Counts are those of the matrix product. While m is small the index is read once at the rate of the
memory, each row by the lanes that multiply and add it, as the scoring kernels of sparse attention
do; from more than `FEW` query rows on it is a product on the matrix units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from workloads.numeric import Num, any_true, where
from workloads.op import Stage
from workloads.ops.matmul import BatchedMatmul

FEW: Final = 16
"""Query rows up to which lanes keep pace with the memory: the rows of one matrix instruction."""


@dataclass(frozen=True, kw_only=True)
class StreamedScores(BatchedMatmul):
    """The kernel for few query rows: timed as the stream that it is."""

    name: ClassVar[str] = "streamed_scores"

    def streamed_elements(self) -> Num:
        """Elements of the indices."""
        return self.batch * self.n * self.k


@dataclass(frozen=True, kw_only=True)
class KeyScores(BatchedMatmul):
    """`m` queries against the `n` rows of width `k` of each of `batch` indices.

    >>> labels = KeyScores(batch=32, m=1, n=4096, k=8)
    >>> labels.compulsory_bytes() == 32 * 2 * (8 + 8 * 4096 + 4096)
    True
    """

    name: ClassVar[str] = "key_scores"

    def stages(self) -> tuple[Stage, ...]:
        """Lanes that stream the index, or a product on the matrix units; which one depends on m."""
        few = np.less_equal(self.m, FEW)
        found = []
        for name, kind, chosen in (
            ("stream", StreamedScores, few),
            ("product", BatchedMatmul, np.logical_not(few)),
        ):
            if any_true(chosen):
                op = kind(
                    batch=self.batch, m=self.m, n=self.n, k=self.k, dtype=self.dtype,
                    out_dtype=self.out_dtype, math_dtype=self.math_dtype,
                )  # fmt: skip
                times = 1 if np.all(chosen) else where(chosen, 1, 0)
                found.append(Stage(name, op, times))
        return tuple(found)
