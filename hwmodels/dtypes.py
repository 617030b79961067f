"""Number formats: a name and a width in bits (fp4 is half a byte, hence bits and not bytes)."""

from __future__ import annotations

from dataclasses import dataclass

from hwmodels.errors import UnknownNameError


@dataclass(frozen=True, slots=True)
class DType:
    """A number format.

    `bits` is the payload width; block scales (nvfp4, mxfp8) are `scale_bits` per `scale_block`
    elements and count in `bytes_per_element`.
    """

    name: str
    bits: int
    accumulator: str
    scale_bits: int = 0
    scale_block: int = 1

    @property
    def bytes_per_element(self) -> float:
        """Stored bytes per element, block scales included: NVFP4 is 4/8 + (8/8)/16 = 0.5625."""
        return self.bits / 8 + self.scale_bits / 8 / self.scale_block

    def __str__(self) -> str:
        return self.name


FP64 = DType("fp64", 64, "fp64")
FP32 = DType("fp32", 32, "fp32")
TF32 = DType("tf32", 32, "fp32")
BF16 = DType("bf16", 16, "fp32")
FP16 = DType("fp16", 16, "fp32")
FP8 = DType("fp8", 8, "fp32")
FP6 = DType("fp6", 6, "fp32")
FP4 = DType("fp4", 4, "fp32")
NVFP4 = DType("nvfp4", 4, "fp32", scale_bits=8, scale_block=16)
MXFP8 = DType("mxfp8", 8, "fp32", scale_bits=8, scale_block=32)
MXFP4 = DType("mxfp4", 4, "fp32", scale_bits=8, scale_block=32)
INT8 = DType("int8", 8, "int32")
INT4 = DType("int4", 4, "int32")
INT32 = DType("int32", 32, "int32")
INT64 = DType("int64", 64, "int64")

ALL: dict[str, DType] = {
    d.name: d
    for d in (
        FP64, FP32, TF32, BF16, FP16, FP8, FP6, FP4, NVFP4, MXFP8, MXFP4, INT8, INT4, INT32, INT64,
    )
}  # fmt: skip

ALIASES = {
    "float64": "fp64", "double": "fp64", "float32": "fp32", "float": "fp32",
    "bfloat16": "bf16", "float16": "fp16", "half": "fp16",
    "float8_e4m3fn": "fp8", "float8_e5m2": "fp8", "fp8_e4m3": "fp8", "e4m3": "fp8",
}  # fmt: skip


def dtype(name: str | DType) -> DType:
    """The number format of that name (torch spellings accepted).

    >>> dtype("bfloat16").bits
    16
    """
    if isinstance(name, DType):
        return name
    key = name.casefold().removeprefix("torch.")
    key = ALIASES.get(key, key)
    if key not in ALL:
        raise UnknownNameError("dtype", name, [*ALL, *ALIASES])
    return ALL[key]
