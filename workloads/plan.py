"""How a model is split over ranks and scheduled: data, not behaviour."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from workloads.numeric import Num


class Recompute(IntEnum):
    """What the forward pass drops and the backward pass computes again.

    NONE keeps every saved tensor. SELECTIVE recomputes attention scores only (Korthikanti et al.
    2022; nothing to recompute under a fused attention kernel). FULL keeps the layer input only.
    """

    NONE = 0
    SELECTIVE = 1
    FULL = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Degrees of parallelism and the schedule; every field a number, or arrays that broadcast.

    Ranks are laid out innermost first: tp, cp, ep within dp, dp, pp. `cp` is context parallelism
    over the sequence (ring exchange of K and V); `ep` divides dp * cp and shards the experts;
    with tp > 1 norms and residuals are sharded along the sequence. `micro_batch` is sequences
    per micro-batch and data-parallel rank; `interleave` the model chunks per pipeline stage.
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
        parts.append(f"mb{int(self.micro_batch)}")
        if self.interleave != 1:
            parts.append(f"v{int(self.interleave)}")
        parts.append(f"recompute-{Recompute(int(self.recompute)).name.lower()}")
        parts.append(f"zero{int(self.zero_stage)}")
        return " ".join(parts)


_FIELDS = dataclasses.fields(Plan)
