"""Matrix products: what each published label means, and how its benchmark ran."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from hwmodels.dtypes import BF16, FP8, FP16, FP32, INT4, INT8, MXFP4, MXFP8, NVFP4, DType
from simulator.kernel_time.model import COLD, REPLAYED, ROTATED, Conditions
from validate.adapters.part import PLAIN, Part, framework, host_of, part, uncounted
from validate.measurement import Measurement
from workloads.ops.matmul import BatchedMatmul, Matmul
from workloads.ops.quantised_matmul import QuantisedMatmul

Formats = tuple[DType, DType, DType]

CUBLAS: Final = "cublas"
UNALIGNED: Final = "cublas-unaligned"
SEARCHED: Final = "searched"
"""The best of many shapes and layouts, as its publisher says: what a library can at most do."""
ALIGNMENT: Final = 16
"""Bytes of the widest load of a thread (CUDA C++ programming guide, device memory accesses)."""

PRODUCTS: Final[Mapping[str, Formats]] = {
    **{label: (dtype, dtype, dtype) for label, dtype in PLAIN.items()},
    "fp16_mixed": (FP16, FP16, FP16),
    "fp16_fp32math": (FP16, FP16, FP32),
    "fp8_matmul_only": (FP8, BF16, FP8),
}
"""Storage, result and arithmetic format of a product by label."""

QUANTISED: Final[Mapping[str, tuple[DType, DType, str]]] = {
    "fp8": (FP8, FP8, "tensor"),
    "fp8_block": (FP8, FP8, "block"),
    "nvfp4": (NVFP4, NVFP4, "block"),
    "mxfp8": (MXFP8, MXFP8, "block"),
    "mxfp4": (MXFP4, MXFP4, "block"),
    "int8_smoothquant": (INT8, INT8, "tensor"),
    "int8_wo": (BF16, INT8, "weights"),
    "int4_wo": (BF16, INT4, "weights"),
}
"""Format of the product, format of the weights and the way scales are shared, by label."""


def gemm(row: Measurement) -> tuple[Part, ...]:
    """One product, with its quantiser where the label has one."""
    if row.dtype not in QUANTISED:
        return _product(row, Matmul)
    dtype, weight_dtype, scheme = QUANTISED[row.dtype]
    sizes = {name: row.params[name] for name in ("m", "n", "k")}
    return (
        part(
            QuantisedMatmul,
            sizes,
            _conditions(row),
            dtype=dtype,
            weight_dtype=weight_dtype,
            scheme=scheme,
        ),
    )


def bmm(row: Measurement) -> tuple[Part, ...]:
    """A batch of products."""
    return _product(row, BatchedMatmul)


def _product(row: Measurement, op: type[Matmul]) -> tuple[Part, ...]:
    if row.dtype not in PRODUCTS:
        uncounted(f"a product in {row.dtype} has no count yet")
    stored, written, arithmetic = PRODUCTS[row.dtype]
    p = row.params
    sizes = {"batch": p.get("batch", 1), "m": p["m"], "n": p["n"], "k": p["k"]}
    fixed = {"dtype": stored, "out_dtype": written, "math_dtype": arithmetic}
    return (part(op, sizes, _conditions(row, stored), **fixed),)


def _conditions(row: Measurement, dtype: DType | None = None) -> Conditions:
    """Which kernel ran, on which L2: aic rotates the weights, eager loops replay one call."""
    if row.source.startswith("aic/"):
        return Conditions(kernel=framework(row), l2=ROTATED)
    if row.source.startswith("vidur/"):
        return Conditions(kernel="vidur", l2=COLD)  # kernels inside a running model
    kernel = SEARCHED if row.source.startswith("stas00/") else _library(row, dtype)
    return Conditions(kernel=kernel, host=host_of(row), l2=REPLAYED)


def _library(row: Measurement, dtype: DType | None) -> str:
    """cuBLAS, or its kernels for rows that do not begin on 16 bytes and load by the element."""
    if dtype is None:
        return CUBLAS
    rows_bytes = [row.params[name] * dtype.bytes_per_element for name in ("n", "k")]
    return CUBLAS if all(size % ALIGNMENT == 0 for size in rows_bytes) else UNALIGNED


ADAPTERS: Final[Mapping[str, Callable[[Measurement], tuple[Part, ...]]]] = {
    "gemm": gemm,
    "bmm": bmm,
}
