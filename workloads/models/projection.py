"""A weight matrix as a rank has it, and the heads of a rank: what all mixers of a layer share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from workloads.numeric import Num, ceil_div


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """One weight matrix of [k, n] on one rank, with a bias of n where it has one."""

    name: str
    k: Num
    n: Num
    bias: bool = False

    @property
    def num_parameters(self) -> Num:
        """Weights and bias."""
        return (self.k + self.bias) * self.n

    @property
    def num_weights(self) -> Num:
        """Weights alone: what a token is multiplied with."""
        return self.k * self.n


def by_name(matrices: Iterable[Projection]) -> dict[str, Projection]:
    """The matrices of one block, in their order."""
    return {matrix.name: matrix for matrix in matrices}


def heads_per_rank(num_heads: int, num_kv_heads: int, tp: Num) -> tuple[Num, Num]:
    """Query heads and K/V heads of one tensor-parallel rank.

    K/V heads are padded to whole heads (one copy per rank where tp is larger than their number),
    query heads to whole groups of equal size.

    >>> heads_per_rank(32, 8, 4), heads_per_rank(32, 8, 16), heads_per_rank(32, 8, 3)
    ((8, 2), (2, 1), (12, 3))
    """
    kv = ceil_div(num_kv_heads, tp)
    return ceil_div(ceil_div(num_heads, tp), kv) * kv, kv
