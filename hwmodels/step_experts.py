"""What steps of mixtures of experts add to the factors of dense steps: two fitted factors.

`data/steps/experts.json` has the form of `step_factors`; `python -m validate.moe_fit` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from hwmodels.catalog import DATA
from hwmodels.step_factors import StepFactors, read_step_factors

EXPERTS_FILE: Final = DATA / "steps" / "experts.json"
KERNELS, HOST_S = "experts/kernels", "experts/host_s"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFactors:
    """`kernels`: a framework's kernels of experts over the same by themselves. `host_s`: host time
    of a layer of experts, forward and backward.
    """

    kernels: float = 1.0
    host_s: float = 0.0

    @classmethod
    def of(cls, values: Mapping[str, float]) -> ExpertFactors:
        """Those of a file's values by name."""
        return cls(kernels=values[KERNELS], host_s=values[HOST_S])


@lru_cache(maxsize=1)
def shipped_experts() -> StepFactors | None:
    """The shipped file; None where none was ever fitted."""
    return read_step_factors(EXPERTS_FILE) if EXPERTS_FILE.exists() else None


def shipped_expert_factors() -> ExpertFactors:
    """The shipped factors; those that change nothing where none were ever fitted."""
    found = shipped_experts()
    return ExpertFactors() if found is None else ExpertFactors.of(found.values)
