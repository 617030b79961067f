"""How many multiprocessors a launch may count on, and whether kernels are interpreted."""

from __future__ import annotations

from typing import Final

import torch
import triton

OF_ARCHITECTURE: Final = {80: 108, 90: 132, 100: 148}
"""Multiprocessors of the SXM parts (NVIDIA's A100, H100 and B200 architecture papers)."""
INTERPRETED: Final = 2
"""What the interpreter stands for: few, so that persistent programs take more than one tile."""


def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU: bf16 arithmetic is wrong there."""
    return bool(triton.knobs.runtime.interpret)


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type != "cuda":
        return INTERPRETED
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def typical_multiprocessors(arch: int) -> int:
    """Multiprocessors of the largest part of an architecture, for choices made without it."""
    known = [number for least, number in OF_ARCHITECTURE.items() if least <= arch]
    return known[-1] if known else OF_ARCHITECTURE[80]
