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
    broadcast       B         B

`CollectiveTransfer` is that of a communication library on one node, `ClusterCollective` the same on
several, `StagedCollective` where the network reads no accelerator's memory, `CustomAllReduce` the
all-reduce kernels that serving frameworks bring along.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from hwmodels.dtypes import BF16, DType
from hwmodels.errors import InputError, UnknownNameError
from workloads.numeric import Num, any_true, maximum, minimum, where
from workloads.op import Op
from workloads.ops.collective import Collective
from workloads.work import Work

KINDS: Final = (
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv", "broadcast",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CollectiveTransfer(Op):
    """A collective of `num_bytes` over the `num_ranks` ranks of one node, seen by one rank.

    Ranks lie `stride` places apart. Cards whose rings pass from one PCI Express root to another
    have `root_bytes_per_s` between these (0: not stated). In a mesh of point-to-point links
    `mesh_frac` of a rank's links lead to others of the group. `skew` more than the mean is what the
    busiest rank of an uneven all-to-all sends (experts that are liked more than others).

    >>> op = CollectiveTransfer(kind="all_reduce", num_bytes=2**20, num_ranks=8)
    >>> op.wire_bytes() == 2 * 7 * 2**20 / 8, op.num_steps(), op.compulsory_bytes() == 2**21
    (True, 14, True)
    """

    name: ClassVar[str] = "collective"
    kind: str = "all_reduce"
    num_bytes: Num
    num_ranks: Num
    stride: Num = 1
    mesh_frac: Num = 1.0
    skew: float = 0.0
    root_bytes_per_s: float = 0.0
    dtype: DType = BF16

    def check(self) -> None:
        """A known kind, shares that are shares."""
        if self.kind not in KINDS:
            raise UnknownNameError("collective", self.kind, KINDS)
        if any_true(np.less_equal(self.mesh_frac, 0)):
            raise InputError(f"{self.name}: mesh_frac = 0 leaves no link; give 0 < x <= 1")
        if self.skew < 0:
            raise InputError(f"{self.name}: skew is what exceeds the mean; give 0 or more")

    def wire_bytes(self) -> Num:
        """Bytes the busiest rank sends (ring, or directly)."""
        sent = Collective(self.kind, self.num_bytes, self.num_ranks).wire_bytes()
        return sent * (1 + self.skew) if self.kind == "all_to_all" else sent

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

    A node has `ports_per_node` network ports for the group (0: one a rank) of `port_bytes_per_s`
    each, per direction (50 GB/s: 400 Gbit/s). `hop_s` is one message's way through the network
    (0: what the library takes it for). The network reads and writes the accelerators' memory.

    >>> op = ClusterCollective(num_bytes=2**20, num_ranks=16, num_nodes=2)
    >>> op.num_rounds(), op.crossing_bytes() == 2 * 15 * 2**20 / 16, op.crossing_bytes("tree")
    (2, True, 1048576.0)
    """

    name: ClassVar[str] = "cluster_collective"
    num_nodes: Num = 1
    ports_per_node: int = 0
    port_bytes_per_s: float = 50e9
    hop_s: float = 0.0

    def check(self) -> None:
        """No more nodes than ranks."""
        super().check()
        if any_true(np.greater(self.num_nodes, self.num_ranks)):
            raise InputError(f"{self.name}: more nodes than ranks; give num_nodes <= num_ranks")

    def ranks_per_node(self) -> Num:
        """Ranks of the group on one node."""
        return self.num_ranks / self.num_nodes

    def num_ports(self) -> Num:
        """Network ports of a node that the group uses; a plain send has one."""
        each = self.ranks_per_node()
        if self.kind == "send_recv":
            return 1.0
        return float(self.ports_per_node) if self.ports_per_node else each

    def num_rounds(self) -> Num:
        """Dependent steps from node to node."""
        return Collective(self.kind, self.num_bytes, self.num_nodes).num_steps()

    def crossing_bytes(self, algorithm: str = "ring") -> Num:
        """Bytes that the busiest node sends to others, by the algorithm.

        A ring passes what each of its links carries. Two binary trees over the nodes, with half
        of the buffer each, pass min(N, 4) halves. An all-to-all sends what its ranks address
        beyond the node.
        """
        if self.kind == "all_to_all":
            away = (self.num_nodes - 1) / self.num_nodes
            return self.num_bytes * (1 + self.skew) * away * self.ranks_per_node()
        crosses = np.greater(self.num_nodes, 1)
        if algorithm == "tree":
            return where(crosses, minimum(self.num_nodes, 4) / 2 * self.num_bytes, 0.0)
        return where(crosses, self.wire_bytes(), 0.0)


@dataclass(frozen=True, kw_only=True)
class StagedCollective(ClusterCollective):
    """The same where the network cannot reach the accelerators' memory: messages are copied to
    the host's and from there, over PCI Express. `sockets`: by TCP, whose buffers take up a short
    message faster than the network does.

    >>> StagedCollective(num_bytes=2**20, num_ranks=4, num_nodes=2).num_ports()
    2.0
    """

    name: ClassVar[str] = "staged_collective"
    sockets: bool = False


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
