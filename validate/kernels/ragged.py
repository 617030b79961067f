"""The count of one launch that works on problems of different sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from workloads.numeric import Num
from workloads.op import Op, Stage
from workloads.ops.staged import StagedOp
from workloads.work import Work


@dataclass(frozen=True, kw_only=True)
class Together(StagedOp):
    """Problems that one launch works on side by side: the sum of their counts, one launch.

    >>> from workloads.ops.flash_attention import FlashAttention2
    >>> one = FlashAttention2(num_heads=2, len_q=64, head_dim=64)
    >>> both = Together(problems=((one, 2), (one.over(len_q=128), 1)))
    >>> both.compulsory_bytes() == 4 * one.compulsory_bytes()
    True
    """

    name: ClassVar[str] = "together"
    problems: tuple[tuple[Op, int], ...]

    def stages(self) -> tuple[Stage, ...]:
        """Each size, as often as it occurs."""
        return tuple(Stage(f"size_{i}", op, times) for i, (op, times) in enumerate(self.problems))

    def compulsory_bytes(self) -> Num:
        """Each problem reads and writes its own."""
        return sum(op.compulsory_bytes() * times for op, times in self.problems)

    def work(self, fast_bytes: Num) -> Work:
        """The sum of the problems' counts, launched once."""
        return replace(super().work(fast_bytes), launches=1)


def together(sizes: Iterable[tuple[int, ...]], op: Callable[..., Op]) -> Op:
    """One op over all sizes, `op(*size)` each: itself where there is one problem alone."""
    counted = tuple((op(*size), times) for size, times in sorted(Counter(sizes).items()))
    if len(counted) == 1 and counted[0][1] == 1:
        return counted[0][0]
    return Together(problems=counted)
