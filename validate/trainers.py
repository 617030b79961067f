"""What each publisher's trainer does that its rows do not say: the framework, and assumptions.

    calculon      quotes Korthikanti et al. 2022 (arXiv 2205.05198), table 5: Megatron-LM before
                  fused attention, with sequence parallelism where the row says so
    sc21_table    Narayanan et al. 2021 (arXiv 2104.04473), table 1: the same without sequence
                  parallelism; data parallel without ZeRO; micro-batch and model chunks from the
                  authors' script for that table
    model_table   Megatron-LM's README, release 0.8: Megatron Core with overlap; nothing recomputed;
                  micro-batch and model chunks not stated
    llm-foundry   PyTorch 2.1 where the row says amp_bf16 (the tables of October 2023), else 1.13
    bridge        Megatron-Bridge's performance summary: Megatron Core; parallel optimizer, or fully
                  sharded where the table says so; nothing recomputed, as its own scripts have it
                  for the dense models of these tables (scripts/performance/configs/llama)
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
BOARD_RANKS: Final = 8
CHUNKS: Final = tuple(range(1, 33))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """A framework by name (`simulator.stack`), what is assumed of a row's plan, and of what."""

    stack: str
    assumed: Mapping[str, Any] = field(default_factory=FrozenDict)


_SC21_SCRIPT: Final[Mapping[tuple[int, int], tuple[int, int]]] = FrozenDict(
    {
        (1, 1): (16, 1),
        (2, 1): (16, 1),
        (4, 1): (16, 1),
        (8, 1): (8, 1),
        (8, 2): (4, 1),
        (8, 4): (2, 3),
        (8, 8): (2, 2),
        (8, 16): (1, 2),
        (8, 35): (1, 3),
        (8, 64): (1, 1),
    }
)
"""(tp, pp) to micro-batch and model chunks: Megatron-LM, examples/sc21/run_table_1.sh."""


def trainer_of(source: str, layout: Mapping[str, Any], precision: str = "") -> Trainer | None:
    """The trainer behind a row, None where no framework is known.

    >>> trainer_of("torchtitan/2024-12", {"compile": 1}).stack
    'torchtitan-compiled'
    """
    if source.startswith("torchtitan/"):
        if layout.get("async_tp"):
            return Trainer(stack="torchtitan-async-tp")
        return Trainer(stack="torchtitan-compiled" if layout.get("compile") else "torchtitan")
    if source.startswith("llm-foundry/"):
        new = precision.startswith(("amp_", "fp8"))
        return Trainer(stack="llm-foundry" if new else "llm-foundry-torch1")
    if source.startswith("calculon/"):
        return Trainer(stack="megatron-2022" if layout.get("seq_par") else "megatron-2022-whole")
    if source.startswith("megatron-lm/sc21"):
        name = "megatron-2021" if layout.get("pp", 1) > 1 else "megatron-2021-ddp"
        return Trainer(stack=name, assumed=_sc21(layout))
    if source.startswith("megatron-lm/model_table"):
        return Trainer(stack="megatron", assumed=FrozenDict(recompute="none"))
    if source.startswith("megatron-bridge/"):
        return _bridge(layout.get("fsdp") or 0, precision)
    return None


def _bridge(sharded_over: int, precision: str) -> Trainer:
    """Its scripts overlap no tensor parallelism in nvfp4; on one board, FSDP has NCCL's user
    buffers (`nccl_ub`), whose collectives take few processors, as those of a parallel optimizer."""
    if precision == "nvfp4":
        stack = "megatron-bridge-fp4"
    else:
        stack = "megatron-bridge-fsdp" if sharded_over > BOARD_RANKS else "megatron-bridge"
    zero = 3 if sharded_over else 1
    return Trainer(stack=stack, assumed=FrozenDict(recompute="none", zero=zero))


def _sc21(layout: Mapping[str, Any]) -> Mapping[str, Any]:
    stated = _SC21_SCRIPT.get((layout.get("tp", 1), layout.get("pp", 1)))
    if stated is None:
        return FrozenDict({"zero": 0})
    return FrozenDict({"zero": 0, "microbatch": stated[0], "interleave": stated[1]})
