"""Routed experts as live tokens choose them: each token for itself, so that experts stay unhit.

`MoeFfn` counts the loads of a benchmark, which deals whole rows out. In serving a token chooses an
expert of mean load r among T tokens with probability r / T, and tokens choose independently:

    hit_frac = 1 - (1 - r / T)^T

of such experts have a row, whose weights must be read. The loads are those of the routing law.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from workloads.ops.moe_ffn import Loads, MoeFfn


@dataclass(frozen=True, kw_only=True)
class ServedExperts(MoeFfn):
    """`MoeFfn` with independent choices.

    >>> op = ServedExperts(num_tokens=16, hidden=8, inter=8, topk=4, num_experts=128)
    >>> round(op.experts_hit(), 2)  # 128 (1 - (1 - 4 / 128)^16)
    50.98
    """

    name: ClassVar[str] = "served_experts"

    def _spread_loads(self) -> Loads:
        found = super()._spread_loads()
        tokens = np.asarray(self.num_tokens, dtype=np.float64)[..., None]
        missed = (1 - np.minimum(found.rows / tokens, 1.0)) ** tokens
        return Loads(found.experts, found.rows, 1 - missed)
