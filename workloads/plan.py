"""How a model is split over ranks and scheduled: data, not behaviour."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from workloads.axis_order import AxisOrder
from workloads.numeric import Num, where


class Recompute(IntEnum):
    """What the forward pass drops and the backward pass computes again.

    NONE keeps every saved tensor. SELECTIVE recomputes attention scores only (Korthikanti et al.
    2022; nothing to recompute under a fused attention kernel). FULL keeps the layer input only.
    """

    NONE = 0
    SELECTIVE = 1
    FULL = 2


class SequenceSplit(IntEnum):
    """How the `cp` ranks of a sequence share its attention; see `workloads.sequence_plan`.

    The rings pass K and V in three layouts, RING_SELF_ATTENTION without a fused kernel; TOKEN_RING
    passes queries; LIGHTSEQ fetches K and V or computes for others; ULYSSES exchanges heads for
    tokens; HYBRID is Ulysses inside and a zigzag ring outside; LASP2 gathers the states of linear
    attention, LASP2H beside them K and V of softmax layers.
    """

    RING_ZIGZAG = 0
    RING_CONTIGUOUS = 1
    RING_STRIPED = 2
    RING_SELF_ATTENTION = 3
    LIGHTSEQ = 4
    TOKEN_RING = 5
    ULYSSES = 6
    HYBRID = 7
    LASP2 = 8
    LASP2H = 9

    @property
    def label(self) -> str:
        """The name as it is written: 'ring-zigzag'."""
        return self.name.casefold().replace("_", "-")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Degrees of parallelism and the schedule; every field a number, or arrays that broadcast.

    Ranks are laid out in the `order` of the axes, by default tp, cp, dp, pp innermost first
    (`workloads.placement` has the strides). `cp` is context parallelism over the sequence, split as
    `sequence` says, `ulysses` of its ranks by heads where that is a hybrid; with tp > 1 norms and
    residuals are sharded along the sequence. Experts have a layout of their own on the dp * cp * tp
    ranks of a stage: `ep` groups hold a share of them each, `etp` ranks split each expert's width
    (0: as many as tp), and etp * ep divides the ranks: with etp = 0, ep divides dp * cp; with
    etp = 1, ep lies across tp and no expert is split.
    `micro_batch` is sequences per micro-batch and data-parallel rank; `interleave` the model chunks
    per pipeline stage.
    """

    dp: Num = 1
    tp: Num = 1
    pp: Num = 1
    cp: Num = 1
    ep: Num = 1
    micro_batch: Num = 1
    interleave: Num = 1
    recompute: Num = Recompute.NONE
    zero_stage: Num = 0
    sequence: Num = SequenceSplit.RING_ZIGZAG
    ulysses: Num = 1
    etp: Num = 0
    order: Num = AxisOrder.TP_CP_DP_PP

    @property
    def expert_tp(self) -> Num:
        """Ranks that split each expert's width.

        >>> Plan(tp=4).expert_tp, Plan(tp=4, etp=1).expert_tp
        (4, 1)
        """
        return where(self.etp > 0, self.etp, self.tp)

    @property
    def num_ranks(self) -> Num:
        """Accelerators in use."""
        return self.dp * self.tp * self.pp * self.cp

    def num_micro_batches(self, global_batch: Num) -> Num:
        """Micro-batches each pipeline works through in one step."""
        return global_batch / (self.dp * self.micro_batch)

    def at(self, index: int) -> Plan:
        """One plan out of an array of them, as Python ints."""
        shape = np.broadcast_shapes(*(np.shape(getattr(self, f.name)) for f in _FIELDS))
        pick = {
            f.name: int(np.broadcast_to(getattr(self, f.name), shape).reshape(-1)[index])
            for f in _FIELDS
        }
        return Plan(**pick)

    def __str__(self) -> str:
        parts = [f"{n}{int(getattr(self, n))}" for n in ("dp", "tp", "pp", "cp", "ep")
                 if n in ("dp", "tp", "pp") or getattr(self, n) != 1]  # fmt: skip
        if self.sequence != SequenceSplit.RING_ZIGZAG:
            parts.append(SequenceSplit(int(self.sequence)).label)
        if self.ulysses != 1:
            parts.append(f"u{int(self.ulysses)}")
        if self.etp:
            parts.append(f"etp{int(self.etp)}")
        if self.order != AxisOrder.TP_CP_DP_PP:
            parts.append(AxisOrder(int(self.order)).label)
        parts.append(f"mb{int(self.micro_batch)}")
        if self.interleave != 1:
            parts.append(f"v{int(self.interleave)}")
        parts.append(f"recompute-{Recompute(int(self.recompute)).name.lower()}")
        parts.append(f"zero{int(self.zero_stage)}")
        return " ".join(parts)


_FIELDS = dataclasses.fields(Plan)
