"""Number formats of cases, as torch and as Triton name them."""

from __future__ import annotations

from typing import Final

import torch

TORCH: Final = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
"""The torch dtype that holds each format; fp8 is E4M3."""
TRITON: Final = {
    "fp32": "fp32",
    "tf32": "fp32",
    "fp16": "fp16",
    "bf16": "bf16",
    "fp8": "fp8e4nv",
    "int8": "i8",
}
"""Triton's name of each format in a signature: '*' + name is a pointer to it."""


def random(
    *shape: int, dtype: str, generator: torch.Generator, device: torch.device, scale: float = 1.0
) -> torch.Tensor:
    """Normal random numbers in a format, drawn where the generator lives."""
    where = generator.device
    drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device=where) * scale
    return drawn.to(TORCH[dtype]).to(device)
