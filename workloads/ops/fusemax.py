"""FuseMax: attention's one-pass cascade on a two-dimensional array (arXiv 2406.10491, section 4).

On a GPU-like memory the cascade is FlashAttention-2's: Q, K, V and O cross the chip's border once
a tile, the division waits until the end. What FuseMax adds is where each Einsum runs on an
accelerator with an array of `rows` x `rows` elements and a row of `rows` beside it: those over
M x P (`EINSUMS` with M0) on the array, those over M / M0 x P, the running ones, beside it. With
F = E = head_dim, M0 = rows:

    array    (2 E + 9) M P / rows^2 cycles     beside   (E + 9) (M / rows) P / rows + E P / rows

An exponential is six multiply-adds, one of them beside a subtraction; every other step is one
cycle. They run pipelined, so the longer of the two is the latency.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from workloads.einsum_cascade import ONE_PASS
from workloads.numeric import Num, maximum
from workloads.ops.flash_attention import FlashAttention2

MAC, EXP, SIMPLE = 1, 6, 1
"""Cycles of an element for a multiply-add, an exponential (a polynomial of six), anything else."""

EINSUM_CYCLES: Final[Mapping[str, tuple[int, ...]]] = {
    "QK": (MAC,), "LM": (SIMPLE,), "RM": (SIMPLE,), "SLN": (EXP, SIMPLE), "SLD": (SIMPLE,),
    "SLNV": (MAC,), "PRM": (EXP, SIMPLE), "RD": (MAC,), "RNV": (MAC,),
    "AV": (SIMPLE,),
}  # fmt: skip
"""Steps an element of each Einsum of the cascade: the authors' artifact, accel/proposal.py."""
EMBEDDED: Final = ("QK", "SLNV", "RNV", "AV")
"""Einsums that also run over the head's width, E or F."""
FULL: Final = "M0"


@dataclass(frozen=True, kw_only=True)
class FuseMax(FlashAttention2):
    """Exact attention by the one-pass cascade; counts and time on a GPU are FlashAttention-2's.

    >>> op = FuseMax(num_heads=1, len_q=4096, head_dim=64)
    >>> op.array_frac(256), round(op.over(len_q=64).array_frac(256), 2)
    (1.0, 0.25)
    """

    name: ClassVar[str] = "fusemax"

    def einsum_cycles(self, array_rows: Num) -> Mapping[str, Num]:
        """Element steps of every Einsum of the cascade for one head, M0 = `array_rows` keys."""
        chunks = maximum(self.len_keys / array_rows, 1)
        found = {}
        for einsum in ONE_PASS.einsums:
            ranks = einsum.ranks.split()
            inputs = {r for i in einsum.inputs for r in ONE_PASS.ranks_of(i)} | set(ranks)
            keys = self.len_keys if FULL in inputs else chunks if "M1" in inputs else 1
            keys = 1 if einsum.output == "AV" else keys
            width = self.head_dim if einsum.output in EMBEDDED else 1
            found[einsum.output] = sum(EINSUM_CYCLES[einsum.output]) * keys * width * self.len_q
        return found

    def array_cycles(self, array_rows: Num) -> tuple[Num, Num]:
        """Cycles of the array and of the row beside it, for one head."""
        array: Num = 0
        beside: Num = 0
        cycles = self.einsum_cycles(array_rows)
        for einsum in ONE_PASS.einsums:
            over_keys = any(FULL in ONE_PASS.ranks_of(i) for i in einsum.inputs)
            if over_keys:
                array = array + cycles[einsum.output] / array_rows**2
            else:
                beside = beside + cycles[einsum.output] / array_rows
        return array, beside

    def array_frac(self, array_rows: Num) -> Num:
        """Share of the time in which the array works."""
        array, beside = self.array_cycles(array_rows)
        return array / maximum(array, beside)
