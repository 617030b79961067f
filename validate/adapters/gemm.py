"""Matrix products: what each published label means, and how its benchmark ran."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from hwmodels.dtypes import BF16, FP8, FP16, DType
from simulator.kernel_time.model import COLD, REPLAYED, ROTATED, Conditions
from validate.adapters.part import PLAIN, Part, framework, host_of, part, uncounted
from validate.measurement import Measurement
from workloads.ops.matmul import Matmul

QUANTISED = "the row includes a quantisation kernel that has no count yet"
WEIGHT_ONLY = "a product with quantised weights has no count yet"

DTYPES: Mapping[str, tuple[DType, DType] | str] = {
    **{label: (dtype, dtype) for label, dtype in PLAIN.items()},
    "fp16_mixed": (FP16, FP16),
    "fp8_matmul_only": (FP8, BF16),
    "fp16_fp32math": "fp16 storage with fp32 arithmetic has no count yet",
    **dict.fromkeys(("fp8", "fp8_block", "nvfp4", "mxfp8", "mxfp4", "int8_smoothquant"), QUANTISED),
    **dict.fromkeys(("int4_wo", "int8_wo"), WEIGHT_ONLY),
}
"""Input and output format of a product by label, or why it has no count."""


def matmul(row: Measurement) -> tuple[Part, ...]:
    """One product; its formats by the row's label."""
    formats = DTYPES.get(row.dtype, f"a product in {row.dtype} has no count yet")
    if isinstance(formats, str):
        uncounted(formats)
    p = row.params
    sizes = {"batch": p.get("batch", 1), "m": p["m"], "n": p["n"], "k": p["k"]}
    conditions = _conditions(row)
    return (part(Matmul, sizes, conditions, dtype=formats[0], out_dtype=formats[1]),)


def _conditions(row: Measurement) -> Conditions:
    """Which kernel ran, on which L2: aic rotates the weights, eager loops replay one call."""
    if row.source.startswith("aic/"):
        return Conditions(kernel=framework(row), l2=ROTATED)
    if row.source.startswith("vidur/"):
        return Conditions(kernel="vidur", l2=COLD)  # kernels inside a running model
    return Conditions(host=host_of(row), l2=REPLAYED)


ADAPTERS: Final[Mapping[str, Callable[[Measurement], tuple[Part, ...]]]] = {
    "gemm": matmul,
    "bmm": matmul,
}
