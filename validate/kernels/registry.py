"""Every kernel of the suite by name; a folder's `suite.py` is imported when it is asked for."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Final

from hwmodels.errors import UnknownNameError
from validate.kernels.spec import KernelSpec

FOLDERS: Final = (
    "tensor_core",
    "streaming",
    "gemm",
    "sparse_gemm",
    "normalisation",
    "fft_convolution",
    "short_convolution",
    "recurrent_step",
    "vendor_convolution",
    "vendor_rnn",
    "flash_attention",
    "decode_attention",
    "shared_prefix",
    "gated_linear_attention",
    "delta_rule",
    "selective_scan",
    "ssd_scan",
    "associative_scan",
)
"""Folders of this package, in the order in which the suite runs."""


@lru_cache(maxsize=1)
def specs() -> tuple[KernelSpec, ...]:
    """Every kernel, ceilings first."""
    suites = (import_module(f"validate.kernels.{folder}.suite") for folder in FOLDERS)
    return tuple(spec for suite in suites for spec in suite.SPECS)


def spec(name: str) -> KernelSpec:
    """The kernel of that name; raises `UnknownNameError`."""
    for found in specs():
        if found.name == name:
            return found
    raise UnknownNameError("kernel", name, [s.name for s in specs()])
