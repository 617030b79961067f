"""The terms that kernel times are put together from. All take numbers or arrays.

Rates may be complex (see `rates`), so nothing here rounds or compares anything but real parts.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any, Final

import numpy as np

from workloads.numeric import Num

RAMP_BYTES: Final = 2**20
"""Traffic from which the latency of filling the DRAM pipeline counts in full."""
WARM_POWER: Final = 4
"""Sharpness of the transition between a working set that stays in the L2 and one that does not."""


def real(value: Num) -> Any:
    """The real part, for rounding and comparing."""
    return value.real if isinstance(value, (complex, np.ndarray, np.generic)) else value


def larger(a: Num, b: Num) -> Num:
    """The one with the larger real part, elementwise."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.maximum(a, b)
    return a if real(a) >= real(b) else b


def smaller(a: Num, b: Num) -> Num:
    """The one with the smaller real part, elementwise."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.minimum(a, b)
    return a if real(a) <= real(b) else b


def ceil(value: Num) -> Any:
    """The least integer not below the real part."""
    value = real(value)
    return np.ceil(value) if isinstance(value, np.ndarray) else math.ceil(value)


def overlap(*times: Num) -> Num:
    """Times of resources that mostly overlap: the 4-norm, max <= result <= sum.

        t = (t1^4 + t2^4 + ...)^(1/4)

    The power 4 is that of the published fits (4.5 on GEMMs) rounded to squarings.

    >>> round(overlap(3.0, 4.0), 3), overlap(2.0, 0.0)
    (4.285, 2.0)
    """
    top = reduce(larger, times)
    scale = np.where(real(top) > 0, top, 1.0) if isinstance(top, np.ndarray) else (top or 1.0)
    total: Num = 0.0
    for t in times:
        square = (t / scale) ** 2
        total = total + square * square
    return scale * (np.sqrt(np.sqrt(total)) if isinstance(total, np.ndarray) else total**0.25)


def norm(power: float, *times: Num) -> Num:
    """The p-norm of times, for powers other than 4; scaled so that nothing overflows."""
    top = reduce(larger, times)
    scale = np.where(real(top) > 0, top, 1.0) if isinstance(top, np.ndarray) else (top or 1.0)
    total: Num = 0.0
    for t in times:
        total = total + (t / scale) ** power
    return scale * total ** (1.0 / power)


def waves(blocks: Num, slots: Num, ragged_frac: float) -> Num:
    """Rounds of thread blocks: 1 up to a full round, then part whole rounds, part the mean.

        W = 1 if b <= s else (1 - q) b / s + q ceil(b / s)

    >>> waves(100, 108, 0.15), round(waves(109, 108, 0.15), 3)
    (1.0, 1.158)
    """
    w = blocks / slots
    rounds = (1 - ragged_frac) * w + ragged_frac * ceil(w)
    if isinstance(w, np.ndarray):
        return np.where(real(w) <= 1, 1.0, rounds)
    return rounds if real(w) > 1 else 1.0


def cold_frac(footprint_bytes: Num, capacity_bytes: Num) -> Num:
    """Share of a replayed working set that comes from device memory: x^4 / (1 + x^4).

    >>> cold_frac(1.0, 1.0), cold_frac(0.0, 1.0)
    (0.5, 0.0)
    """
    x = (footprint_bytes / larger(capacity_bytes, 1.0)) ** WARM_POWER
    return x / (1 + x)


def dram_seconds(moved_bytes: Num, rate_bytes_per_s: Num, ramp_s: Num) -> Num:
    """Bytes over bandwidth, plus the latency of the first round trip: ramped in over 1 MiB."""
    return moved_bytes / rate_bytes_per_s + ramp_s * smaller(moved_bytes / RAMP_BYTES, 1.0)
