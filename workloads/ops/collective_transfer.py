"""Collectives as ops of one rank: what each kernel sends over its link, moves in memory and adds.

With n ranks and B bytes (nccl-tests' size, see `workloads.ops.collective`), the ring algorithm's
busiest rank sends `wire_bytes` over its link, in `num_steps` dependent steps. From and to its own
memory a rank reads what it gives and writes what it gets:

    kind            read      written   additions per element
    all_reduce      B         B         (n - 1) / n
    all_gather      B / n     B
    reduce_scatter  B         B / n     (n - 1) / n
    all_to_all      B         B
    send_recv       B         B

`CollectiveTransfer` is that of a communication library on one node, `ClusterCollective` the same on
several, `CustomAllReduce` the all-reduce kernels that serving frameworks bring along.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from hwmodels.dtypes import BF16, DType
from hwmodels.errors import InputError, UnknownNameError
from workloads.numeric import Num, any_true, maximum, where
from workloads.op import Op
from workloads.ops.collective import Collective
from workloads.work import Work

KINDS: Final = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv")


@dataclass(frozen=True, kw_only=True)
class CollectiveTransfer(Op):
    """A collective of `num_bytes` over the `num_ranks` ranks of one node, seen by one rank.

    >>> op = CollectiveTransfer(kind="all_reduce", num_bytes=2**20, num_ranks=8)
    >>> op.wire_bytes() == 2 * 7 * 2**20 / 8, op.num_steps(), op.compulsory_bytes() == 2**21
    (True, 14, True)
    """

    name: ClassVar[str] = "collective"
    kind: str = "all_reduce"
    num_bytes: Num
    num_ranks: Num
    dtype: DType = BF16

    def check(self) -> None:
        """A known kind."""
        if self.kind not in KINDS:
            raise UnknownNameError("collective", self.kind, KINDS)

    def wire_bytes(self) -> Num:
        """Bytes the busiest rank sends (ring, or directly)."""
        return Collective(self.kind, self.num_bytes, self.num_ranks).wire_bytes()

    def num_steps(self) -> Num:
        """Dependent steps (ring)."""
        return Collective(self.kind, self.num_bytes, self.num_ranks).num_steps()

    def compulsory_bytes(self) -> Num:
        """Own memory: what the rank gives and what it gets."""
        return self._read() + self._written()

    def work(self, fast_bytes: Num) -> Work:
        """The compulsory traffic and the additions of a reduction."""
        return Work(
            vector_flops=self._additions(),
            read_bytes=self._read(),
            write_bytes=self._written(),
            launches=1,
        )

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Nothing is kept: buffers stream through."""
        return {}

    def _read(self) -> Num:
        return self.num_bytes / self.num_ranks if self.kind == "all_gather" else self.num_bytes

    def _written(self) -> Num:
        return self.num_bytes / self.num_ranks if self.kind == "reduce_scatter" else self.num_bytes

    def _additions(self) -> Num:
        if self.kind not in ("all_reduce", "reduce_scatter"):
            return 0.0
        elements = self.num_bytes / self.dtype.bytes_per_element
        return elements * maximum(self.num_ranks - 1, 0) / self.num_ranks


@dataclass(frozen=True, kw_only=True)
class ClusterCollective(CollectiveTransfer):
    """The same over `num_ranks` ranks spread evenly over `num_nodes` nodes.

    Each rank has a network port of `port_bytes_per_s` per direction (50 GB/s: 400 Gbit/s).

    >>> op = ClusterCollective(num_bytes=2**20, num_ranks=16, num_nodes=2)
    >>> op.num_rounds(), op.crossing_bytes() == 2 * 15 * 2**20 / 16
    (2, True)
    """

    name: ClassVar[str] = "cluster_collective"
    num_nodes: Num = 1
    port_bytes_per_s: float = 50e9

    def check(self) -> None:
        """No more nodes than ranks."""
        super().check()
        if any_true(self.num_nodes > self.num_ranks):
            raise InputError(f"{self.name}: more nodes than ranks; give num_nodes <= num_ranks")

    def num_rounds(self) -> Num:
        """Dependent steps from node to node."""
        return Collective(self.kind, self.num_bytes, self.num_nodes).num_steps()

    def crossing_bytes(self) -> Num:
        """Bytes that leave a node: what one ring sends over each of its links, or addresses
        beyond the node for all its ranks together.
        """
        if self.kind != "all_to_all":
            return where(self.num_nodes > 1, self.wire_bytes(), 0.0)
        away = (self.num_nodes - 1) / self.num_nodes
        return self.num_bytes * away * self.num_ranks / self.num_nodes


@dataclass(frozen=True, kw_only=True)
class CustomAllReduce(CollectiveTransfer):
    """The all-reduce kernels of serving frameworks: peers' buffers are read directly.

    One-shot reads all n - 1 buffers, two-shot a part of each and then the others' sums:

    >>> op = CustomAllReduce(num_bytes=2**20, num_ranks=8)
    >>> op.one_shot_bytes() == 7 * 2**20, op.two_shot_bytes() == 2 * 7 * 2**20 / 8
    (True, True)
    """

    name: ClassVar[str] = "custom_all_reduce"

    def check(self) -> None:
        """All-reduce is what these kernels do."""
        if self.kind != "all_reduce":
            raise UnknownNameError(self.name, self.kind, ("all_reduce",))

    def one_shot_bytes(self) -> Num:
        """Bytes a rank reads over its link where it reads whole buffers."""
        return maximum(self.num_ranks - 1, 0) * self.num_bytes

    def two_shot_bytes(self) -> Num:
        """The same where it reads its part of each, then the sums."""
        return 2 * maximum(self.num_ranks - 1, 0) / self.num_ranks * self.num_bytes
