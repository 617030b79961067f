"""What each publisher's trainer does that its rows do not say: the framework, and assumptions.

    calculon      quotes Korthikanti et al. 2022 (arXiv 2205.05198), table 5: Megatron-LM before
                  fused attention
    sc21_table    Narayanan et al. 2021 (arXiv 2104.04473), table 1: the same; data parallel
                  without ZeRO; micro-batch and model chunks not stated
    model_table   Megatron-LM's README, release 0.8: Megatron Core with overlap; nothing recomputed;
                  micro-batch and model chunks not stated
    torchtitan    eager, compiled or with asynchronous tensor parallelism, as the row says

Where micro-batch or chunks are not stated, the publishers took the best they found: so the run is
timed with every choice that fits the memory, and the fastest counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from hwmodels.frozen import FrozenDict

MICRO_BATCHES: Final = (1, 2, 4, 8, 16)
CHUNKS: Final = (1, 2, 3, 4, 5, 6, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """A framework by name (`simulator.stack`), what is assumed of a row's plan, and of what."""

    stack: str
    assumed: Mapping[str, Any] = field(default_factory=FrozenDict)


_TRAINERS: Final[tuple[tuple[str, Trainer], ...]] = (
    ("llm-foundry/", Trainer(stack="llm-foundry")),
    ("calculon/", Trainer(stack="megatron-2022")),
    ("megatron-lm/sc21", Trainer(stack="megatron-2022", assumed=FrozenDict({"zero": 0}))),
    ("megatron-lm/model_table", Trainer(stack="megatron", assumed=FrozenDict(recompute="none"))),
)


def trainer_of(source: str, layout: Mapping[str, Any]) -> Trainer | None:
    """The trainer behind a row, None where no framework is known.

    >>> trainer_of("torchtitan/2024-12", {"compile": 1}).stack
    'torchtitan-compiled'
    """
    if source.startswith("torchtitan/"):
        if layout.get("async_tp"):
            return Trainer(stack="torchtitan-async-tp")
        return Trainer(stack="torchtitan-compiled" if layout.get("compile") else "torchtitan")
    return next((t for prefix, t in _TRAINERS if source.startswith(prefix)), None)
