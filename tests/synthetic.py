"""Timings made up from the kernel model itself: what a fit must find again."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hwmodels import catalog
from simulator.kernel_time.gemm import MODEL
from simulator.kernel_time.model import ROTATED, Conditions
from simulator.kernel_time.rates import rates_of
from validate.measurement import KERNELS, Measurement
from workloads.numeric import Array
from workloads.ops.matmul import Matmul

SOURCE = "aic/vllm-1/linear"
GPU = "H100-SXM-80GB"


def shapes(count: int, seed: int = 7) -> Array:
    """m, n, k of `count` products, from single rows to large squares."""
    rng = np.random.default_rng(seed)
    m = 2 ** rng.uniform(0, 13, count)
    n, k = 2 ** rng.uniform(6, 14, (2, count))
    return np.round(np.stack([m, n, k]))


def gemm_seconds(
    sizes: Array, device_id: str = "h100-sxm", noise: float = 0.0, **constants: float
) -> Array:
    """Model seconds of those products with some constants changed, times log-normal noise."""
    m, n, k = sizes
    values: Mapping[str, float] = MODEL.nominal() | constants
    on = rates_of(catalog.device(device_id))
    conditions = Conditions(kernel="vllm", l2=ROTATED)
    seconds = MODEL.time(Matmul(m=m, n=n, k=k), on, values, conditions).seconds
    found: Array = seconds * np.exp(np.random.default_rng(3).normal(0, noise, len(m)))
    return found


def gemm_rows(
    device_id: str = "h100-sxm", count: int = 300, noise: float = 0.02, **constants: float
) -> list[Measurement]:
    """The same as measurements."""
    sizes = shapes(count)
    seconds = gemm_seconds(sizes, device_id, noise, **constants)
    return [
        Measurement(
            family="gemm",
            source=SOURCE,
            gpu=GPU,
            device_id=device_id,
            op="gemm",
            dtype="bf16",
            params={"m": int(m), "n": int(n), "k": int(k)},
            seconds=float(s),
        )
        for (m, n, k), s in zip(sizes.T, seconds, strict=True)
    ]


def write_rows(path: Path, rows: Sequence[Measurement]) -> Path:
    """A file of the kernel schema."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(KERNELS)
        for r in rows:
            assert r.seconds is not None
            params = json.dumps(dict(r.params))
            writer.writerow([r.source, r.gpu, r.op, r.dtype, params, r.seconds * 1e6])
    return path
