"""Dispatch and combine of routed experts as ops of one rank: tokens to their experts and back.

Each of T tokens of h elements goes to K of the E experts, spread evenly over n ranks on N nodes.
With uniform routing (and choices taken as independent) over the m = n M / N ranks of
M = min(N, max_nodes) nodes, the copies of a token that leave its rank and its node are

    throughput kernels   (n - 1)/n m (1 - (1 - 1/m)^K)  (N - 1)/N M (1 - (1 - 1/M)^K)  one a place
    low-latency kernels  K (n - 1) / n                  K (N - 1) / N                  one an expert

The two kinds of kernel are those of DeepSeek's DeepEP (its README and kernels' documentation). Its
routing limits a token to so many nodes (DeepSeek-V3, arXiv 2412.19437, section 2.1.2: 4); so do
the tests of the throughput kernels, not those of the low-latency ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from hwmodels.dtypes import BF16, DType
from hwmodels.errors import InputError, UnknownNameError
from workloads.numeric import Num, any_true, minimum
from workloads.op import Op
from workloads.work import Work

DIRECTIONS: Final = ("dispatch", "combine")


@dataclass(frozen=True, kw_only=True)
class ExpertExchange(Op):
    """`num_tokens` tokens of one rank sent to their experts, or their results brought back.

    Each rank has a network port of `port_bytes_per_s` per direction (50 GB/s: 400 Gbit/s).

    >>> op = ExpertExchange(num_tokens=128, hidden=4096, topk=8, num_experts=64, num_ranks=8)
    >>> round(op.copies(), 3), op.wire_bytes() == 128 * 4096 * 2 * op.copies()
    (4.595, True)
    """

    name: ClassVar[str] = "expert_exchange"
    num_tokens: Num
    hidden: Num
    topk: Num
    num_experts: Num
    num_ranks: Num
    num_nodes: Num = 1
    max_nodes: Num = 4
    direction: str = "dispatch"
    low_latency: bool = False
    port_bytes_per_s: float = 50e9
    dtype: DType = BF16

    def check(self) -> None:
        """A known direction, no more choices than experts, no more nodes than ranks."""
        if self.direction not in DIRECTIONS:
            raise UnknownNameError("direction", self.direction, DIRECTIONS)
        if any_true(self.topk > self.num_experts):
            raise InputError(f"{self.name}: topk is more than num_experts; give fewer choices")
        if any_true(self.num_nodes > self.num_ranks):
            raise InputError(f"{self.name}: more nodes than ranks; give num_nodes <= num_ranks")

    def row_bytes(self) -> Num:
        """Bytes of one token."""
        return self.hidden * self.dtype.bytes_per_element

    def copies(self) -> Num:
        """Copies of a token that leave its rank, on average."""
        return self._copies(self.num_ranks, self._reached() * self.num_ranks / self.num_nodes)

    def node_copies(self) -> Num:
        """Copies of a token that leave its node, on average."""
        return self._copies(self.num_nodes, self._reached())

    def copied_bytes(self) -> Num:
        """Bytes of all copies of the rank's tokens, those that stay on it included."""
        places = self._reached() * self.num_ranks / self.num_nodes
        return self.num_tokens * self.row_bytes() * self._chosen(places)

    def _reached(self) -> Num:
        """Nodes that a token may be sent to."""
        return minimum(self.num_nodes, self.max_nodes)

    def _copies(self, places: Num, reached: Num) -> Num:
        return (places - 1) / places * self._chosen(reached)

    def _chosen(self, places: Num) -> Num:
        """Copies of a token over so many places."""
        if self.low_latency:
            return self.topk
        return places * (1 - (1 - 1 / places) ** self.topk)

    def wire_bytes(self) -> Num:
        """Bytes a rank sends over its link."""
        return self.num_tokens * self.row_bytes() * self.copies()

    def crossing_bytes(self) -> Num:
        """Bytes a rank sends over the network."""
        return self.num_tokens * self.row_bytes() * self.node_copies()

    def compulsory_bytes(self) -> Num:
        """The rank's tokens once in its memory on this side of the exchange."""
        return self.num_tokens * self.row_bytes()

    def work(self, fast_bytes: Num) -> Work:
        """Tokens read once and their copies written, or the reverse with their sums."""
        few, many = self.compulsory_bytes(), self.wire_bytes()
        out = self.direction == "dispatch"
        additions = 0.0 if out else many / self.dtype.bytes_per_element
        return Work(
            vector_flops=additions,
            read_bytes=few if out else many,
            write_bytes=many if out else few,
            launches=1,
        )

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Nothing is kept: tokens stream through."""
        return {}
