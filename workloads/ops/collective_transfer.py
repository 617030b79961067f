"""One collective of a communication library as an op of one rank: what its kernel moves and adds.

With n ranks on N nodes and B bytes (nccl-tests' size, see `workloads.ops.collective`), the ring
algorithm's busiest rank sends `wire_bytes` over its link, in `num_steps` dependent steps. From and
to its own memory a rank reads what it gives and writes what it gets:

    kind            read      written   additions per element
    all_reduce      B         B         (n - 1) / n
    all_gather      B / n     B
    reduce_scatter  B         B / n     (n - 1) / n
    all_to_all      B         B
    send_recv       B         B

Mixture-of-experts dispatch and combine are all_to_all with the bytes their publisher counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from hwmodels.dtypes import BF16, DType
from hwmodels.errors import InputError, UnknownNameError
from workloads.numeric import Num, any_true, maximum
from workloads.op import Op
from workloads.ops.collective import Collective
from workloads.work import Work

KINDS: Final = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv")


@dataclass(frozen=True, kw_only=True)
class CollectiveTransfer(Op):
    """A collective of `num_bytes` over `num_ranks` ranks on `num_nodes` nodes, seen by one rank.

    >>> op = CollectiveTransfer(kind="all_reduce", num_bytes=2**20, num_ranks=8)
    >>> op.wire_bytes() == 2 * 7 * 2**20 / 8, op.num_steps(), op.compulsory_bytes() == 2**21
    (True, 14, True)
    """

    name: ClassVar[str] = "collective"
    kind: str = "all_reduce"
    num_bytes: Num
    num_ranks: Num
    num_nodes: Num = 1
    dtype: DType = BF16

    def check(self) -> None:
        """A known kind, and no more nodes than ranks."""
        if self.kind not in KINDS:
            raise UnknownNameError("collective", self.kind, KINDS)
        if any_true(self.num_nodes > self.num_ranks):
            raise InputError(f"{self.name}: more nodes than ranks; give num_nodes <= num_ranks")

    def wire_bytes(self) -> Num:
        """Bytes the busiest rank sends (ring)."""
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
