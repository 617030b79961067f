"""Recurrent layers of DeepBench: the direction is the op, launches are in the step's floor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from hwmodels.dtypes import FP16, FP32, DType
from validate.adapters.part import PLAIN, Part, part, uncounted
from validate.measurement import Measurement
from workloads.ops.rnn import GATES, Rnn

MIXED: Final[Mapping[str, tuple[DType, DType]]] = {
    "fp16_mixed": (FP16, FP16),
    "fp16_fp32math": (FP16, FP32),
}
"""Storage and arithmetic of the labels that name both."""


def rnn(row: Measurement) -> tuple[Part, ...]:
    """One recurrent layer."""
    cell = str(row.params.get("cell", ""))
    if cell not in GATES:
        uncounted(f"a recurrent cell '{cell}' has no count yet")
    if row.dtype not in MIXED and row.dtype not in PLAIN:
        uncounted(f"{row.op} in {row.dtype} mixes formats and has no count yet")
    stored, arithmetic = MIXED.get(row.dtype) or (PLAIN[row.dtype], PLAIN[row.dtype])
    sizes = {
        "hidden": row.params["hidden"],
        "batch": row.params["batch"],
        "num_steps": row.params["timesteps"],
    }
    direction = row.op.removeprefix("rnn_")
    return (
        part(Rnn, sizes, cell=cell, direction=direction, dtype=stored, math_dtype=arithmetic),
    )  # fmt: skip


ADAPTERS: Final[Mapping[str, Callable[[Measurement], tuple[Part, ...]]]] = dict.fromkeys(
    ("rnn_fwd", "rnn_bwd_data", "rnn_bwd_weight", "rnn_bwd_all"), rnn
)
