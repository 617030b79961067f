"""The errors this project promises, and whether a comparison keeps them.

A bar holds for one family on one GPU, and depends on how well the GPU is known: *fitted* where the
constants are the device's own, *same architecture* and *new architecture* where they are borrowed,
*never fitted* where no device has any (the bar is then that of a new architecture).
The bars are the project's own targets; the noise floors are what its published measurements state
of themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from simulator.kernel_time.basis import ARCHITECTURE, MEAN, NOMINAL, OWN
from validate.compare import Errors, Points, errors

FITTED, SAME, NEW = "fitted", "same architecture", "new architecture"
NEVER = "never fitted"
KINDS: Final[Mapping[str, str]] = {OWN: FITTED, ARCHITECTURE: SAME, MEAN: NEW, NOMINAL: NEVER}
"""How well a GPU is known, by the scope of its constants."""

BIAS_FRAC: Final = 0.05
"""Largest signed bias of a fitted cell, over all rows and over its largest shapes."""
COVERAGE_FRAC: Final[Mapping[str, float]] = {
    FITTED: 0.04, SAME: 0.04, NEW: 0.10, NEVER: 0.10,
}  # fmt: skip
"""How far the coverage of an interval may lie from its level."""
MIN_COVERAGE: Final = 25
"""Fewest rows whose coverage is judged: of 25, one row is 4 points."""
LARGEST_FRAC: Final = 0.1
MIN_LARGEST: Final = 5
"""Fewest rows that the largest tenth of a cell must hold to be judged."""

MAPE, BIAS, LARGEST, COVER_80, COVER_90 = (
    "MAPE", "bias", "bias at size", "80 % interval", "90 % interval",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """Largest MAPE of some rows: a family's, of some `dtypes` or one `publisher` where given.

    `fitted_on` holds bars of single fitted GPUs, by the beginning of the device's id.
    """

    name: str
    family: str
    fitted: float
    same: float
    new: float
    dtypes: tuple[str, ...] = ()
    publisher: str = ""
    fitted_on: Mapping[str, float] = field(default_factory=dict)

    def limit(self, kind: str, device_id: str) -> float:
        """The bar for a device that is so well known."""
        if kind == FITTED:
            own = (v for start, v in self.fitted_on.items() if device_id.startswith(start))
            return next(own, self.fitted)
        return self.same if kind == SAME else self.new

    def of(self, points: Points) -> Points:
        """The rows that the bar is about."""
        mask = points.family == self.family
        if self.dtypes:
            mask &= np.isin(points.dtype.astype(str), self.dtypes)
        if self.publisher:
            mask &= np.array([s.split("/")[0] == self.publisher for s in points.source], dtype=bool)
        return points.at(mask)


_QUANTISED = ("fp8", "fp8_block", "nvfp4")
BARS: Final = (
    Bar(name="GEMM bf16", family="gemm", dtypes=("bf16",), fitted=0.085, same=0.07, new=0.14,
        fitted_on={"a100": 0.085, "h100": 0.065, "b200": 0.07}),
    Bar(name="GEMM fp8, fp8 block, nvfp4", family="gemm", dtypes=_QUANTISED,
        fitted=0.09, same=0.095, new=0.22),
    Bar(name="GEMM, published by LLMCompass", family="gemm", publisher="llmcompass",
        fitted=0.065, same=0.065, new=0.065),
    Bar(name="attention prefill", family="attention_prefill", fitted=0.10, same=0.11, new=0.30,
        fitted_on={"b200": 0.13}),
    Bar(name="attention decode", family="attention_decode", fitted=0.09, same=0.12, new=0.28,
        fitted_on={"h100": 0.12}),
    *(Bar(name=name, family=name, fitted=0.15, same=0.18, new=0.35)
      for name in ("mla", "moe", "bmm", "conv2d", "rnn")),
    Bar(name="scan, short convolution", family="scan_conv1d", fitted=0.07, same=0.10, new=0.40,
        fitted_on={"a100": 0.15}),
    Bar(name="elementwise, softmax, norm", family="elementwise", fitted=0.12, same=0.14, new=0.25),
    Bar(name="collectives", family="collectives", fitted=0.055, same=0.07, new=0.25),
)  # fmt: skip

NOISE_FLOORS: Final[Mapping[tuple[str, str, str], float]] = {
    ("gemm", "bf16", "a100-sxm4-80gb"): 0.042,
    ("gemm", "bf16", "h100-sxm"): 0.037,
    ("gemm", "bf16", "h200-sxm"): 0.045,
    ("gemm", "bf16", "b200-sxm"): 0.046,
}
"""Mean distance of repeated measurements of one shape from their median, where that is known: one
bf16 product timed under several frameworks on one GPU. By family, number format and device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One bar held against one GPU that is known in one way; `missed` names what was not kept.

    `largest_bias` is the bias over the tenth of the rows with the largest bound, None where those
    are too few.
    """

    bar: str
    gpu: str
    kind: str
    limit: float
    errors: Errors
    largest_bias: float | None
    noise_floor: float | None
    missed: tuple[str, ...]


def verdicts(points: Points) -> tuple[Verdict, ...]:
    """Every bar against every GPU that has rows for it."""
    return tuple(
        _verdict(bar, gpu, kind, members)
        for bar in BARS
        for (gpu, kind), members in _by_kind(bar.of(points)).items()
    )


def noise_floor(points: Points) -> float | None:
    """The noise floor of rows that share one; None where it is not known."""
    keys = set(zip(points.family, points.dtype, points.device_id, strict=True))
    return NOISE_FLOORS.get(keys.pop()) if len(keys) == 1 else None


def _by_kind(points: Points) -> dict[tuple[str, str], Points]:
    """The rows by GPU and by how well it is known."""
    return {
        (gpu, kind): members.at(mask)
        for (gpu,), members in points.groups("gpu").items()
        for kind in (FITTED, SAME, NEW, NEVER)
        if (mask := np.array([KINDS[s] == kind for s in members.scope], dtype=bool)).any()
    }


def _verdict(bar: Bar, gpu: str, kind: str, points: Points) -> Verdict:
    found, limit = errors(points), bar.limit(kind, str(points.device_id[0]))
    largest = _largest_bias(points)
    away, judged = COVERAGE_FRAC[kind], found.n >= MIN_COVERAGE
    checks = {
        MAPE: _over(found.mape, 0.0, limit),
        BIAS: kind == FITTED and _over(found.bias, 0.0, BIAS_FRAC),
        LARGEST: kind == FITTED and _over(largest, 0.0, BIAS_FRAC),
        COVER_80: judged and _over(found.coverage_80, 0.8, away),
        COVER_90: judged and _over(found.coverage_90, 0.9, away),
    }
    return Verdict(
        bar=bar.name,
        gpu=gpu,
        kind=kind,
        limit=limit,
        errors=found,
        largest_bias=largest,
        noise_floor=noise_floor(points),
        missed=tuple(name for name, missed in checks.items() if missed),
    )


def _over(value: float | None, wanted: float, tolerance: float) -> bool:
    """Does the value lie further from what is wanted than tolerated?"""
    return value is not None and abs(value - wanted) > tolerance + 1e-12


def _largest_bias(points: Points) -> float | None:
    bounded = points.at(np.isfinite(points.lower_s))
    size = int(len(bounded) * LARGEST_FRAC)
    if size < MIN_LARGEST:
        return None
    return errors(bounded.at(np.argsort(bounded.lower_s, kind="stable")[-size:])).bias
