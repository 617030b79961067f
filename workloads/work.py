"""Counts, and only counts: what one op computes and what it moves across one memory boundary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hwmodels.dtypes import DType
from workloads.numeric import Num


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What an op does when its fast memory has a stated size.

    `tensor_flops`: flops of matrix products by input format (one multiply-add is two).
    `vector_flops`: flops of everything else that an ordinary lane does: an add, multiply,
    compare or select is one; a reduction of n elements is n.
    `special_ops`: exp, reciprocal, rsqrt, log, tanh, sin: one each.
    `read_bytes`, `write_bytes`: slow memory to fast memory and back. Bytes at several levels of
    a hierarchy are several Works, one per boundary, each with that boundary's fast memory.
    `host_bytes`: over the link to the host's memory, in either direction.
    `launches`: kernels started; fast memory is empty between two of them.
    Every field is a number or an array; they broadcast.
    """

    tensor_flops: Mapping[DType, Num] = field(default_factory=dict)
    vector_flops: Num = 0
    special_ops: Num = 0
    read_bytes: Num = 0
    write_bytes: Num = 0
    host_bytes: Num = 0
    launches: Num = 1

    @property
    def bytes(self) -> Num:
        """Read plus written."""
        return self.read_bytes + self.write_bytes

    @property
    def flops(self) -> Num:
        """Matrix and vector flops together; special-function results are not flops."""
        return sum(self.tensor_flops.values(), start=self.vector_flops)

    def __add__(self, other: Work) -> Work:
        tensor = dict(self.tensor_flops)
        for dtype, flops in other.tensor_flops.items():
            tensor[dtype] = tensor.get(dtype, 0) + flops
        return Work(
            tensor_flops=tensor,
            vector_flops=self.vector_flops + other.vector_flops,
            special_ops=self.special_ops + other.special_ops,
            read_bytes=self.read_bytes + other.read_bytes,
            write_bytes=self.write_bytes + other.write_bytes,
            host_bytes=self.host_bytes + other.host_bytes,
            launches=self.launches + other.launches,
        )

    def times(self, count: Num) -> Work:
        """The same work done `count` times.

        >>> Work(read_bytes=8).times(3).read_bytes
        24
        """
        return Work(
            tensor_flops={d: f * count for d, f in self.tensor_flops.items()},
            vector_flops=self.vector_flops * count,
            special_ops=self.special_ops * count,
            read_bytes=self.read_bytes * count,
            write_bytes=self.write_bytes * count,
            host_bytes=self.host_bytes * count,
            launches=self.launches * count,
        )
