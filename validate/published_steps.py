"""Published training steps that stand in no measurement file: facts of papers, with their source.

Korthikanti et al. 2022 (arXiv 2205.05198): models and parallelism from its table 3, seconds of an
iteration from its table 5, on A100-80GB; interleaved schedule with three chunks for 175B and 530B.
'full' recomputes all of a layer without sequence parallelism; 'present work' has sequence
parallelism and selective recomputation. The two smaller models stand in calculon's quotation too,
whose rows some fits have seen; 530B and 1T no fit has.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from validate.adapters import TRAINING_FAMILY
from validate.measurement import Measurement

KORTHIKANTI: Final = "Korthikanti 2022, table 5"
_SOURCE: Final = "calculon/korthikanti2022_tab5"
_VOCABULARY: Final = 51200
_SEQUENCE: Final = 2048


class _Case(NamedTuple):
    name: str
    layers: int
    hidden: int
    heads: int
    pp: int
    micro_batch: int
    batch: int
    chunks: int
    full_s: float
    present_s: float


_CASES: Final = (
    _Case("megatron-22B", 48, 6144, 64, 1, 4, 4, 1, 1.42, 1.10),
    _Case("gpt3-175B", 96, 12288, 96, 8, 1, 64, 3, 18.13, 13.75),
    _Case("turing-530B", 105, 20480, 128, 35, 1, 280, 3, 49.05, 37.83),
    _Case("megatron-1T", 128, 25600, 160, 64, 1, 512, 1, 94.42, 71.49),
)


def korthikanti() -> tuple[Measurement, ...]:
    """All eight steps of the paper's table 5, as rows of a measurement file would state them."""
    return tuple(
        _row(case, recompute, sequence_parallel, seconds)
        for case in _CASES
        for recompute, sequence_parallel, seconds in (
            ("full", 0, case.full_s),
            ("selective", 1, case.present_s),
        )
    )


def _row(case: _Case, recompute: str, sequence_parallel: int, seconds: float) -> Measurement:
    model: dict[str, Any] = {
        "name": case.name, "layers": case.layers, "hidden": case.hidden, "heads": case.heads,
        "kv_heads": case.heads, "ffn": 4 * case.hidden, "gated": 0, "vocab": _VOCABULARY,
        "seq": _SEQUENCE,
    }  # fmt: skip
    layout: dict[str, Any] = {
        "dp": 1, "tp": 8, "pp": case.pp, "cp": 1, "microbatch": case.micro_batch,
        "globalbatch": case.batch, "interleave": case.chunks, "recompute": recompute,
        "seq_par": sequence_parallel, "zero": 0,
    }  # fmt: skip
    return Measurement(
        family=TRAINING_FAMILY,
        source=_SOURCE,
        gpu="A100-SXM4-80GB",
        device_id="a100-sxm4-80gb",
        op="step_time_s",
        dtype="fp16",
        params={
            "num_gpus": 8 * case.pp,
            "model": model,
            "parallelism": layout,
            "value": seconds,
        },
        seconds=seconds,
    )
