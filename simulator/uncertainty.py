"""Predictions as samples: how sure a sum, a maximum or a comparison is.

A prediction's error is drawn from the residuals of its calibration (the empirical distribution of
log(measured / predicted) on rows not fitted on). One kernel has one error: its repetitions in a
step are off by the same factor, so samples are seeded by what ran, and sums over layers do not
average an error away that every layer shares. Different kernels err independently.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from hwmodels.calibration import LEVELS, Residuals
from simulator.kernel_time.basis import NOMINAL_Q80
from simulator.kernel_time.predict import Prediction, combined
from workloads.numeric import Array, Num

NUM_SAMPLES: Final = 4000
Z80: Final = 1.2815515655446004
"""Standard normal quantile of 0.9: 80 % of a normal distribution lie within it."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Equally likely values of one time, in seconds, the last axis the samples.

    Sums and maxima are taken sample by sample: `a + b`, `a.longest(b)`, `a.times(3)`.
    """

    seconds: Array

    def __add__(self, other: Samples) -> Samples:
        return Samples(self.seconds + other.seconds)

    def times(self, count: Num) -> Samples:
        """The same kernel `count` times, off by the same factor every time."""
        scale = count[..., None] if isinstance(count, np.ndarray) else count
        return Samples(self.seconds * scale)

    def longest(self, other: Samples) -> Samples:
        """The longer of two that run side by side."""
        return Samples(np.maximum(self.seconds, other.seconds))

    def interval(self, level: int = 80) -> tuple[Num, Num]:
        """Low and high seconds that leave equal shares out on both sides."""
        tail = (1 - level / 100) / 2
        low, high = np.quantile(self.seconds, (tail, 1 - tail), axis=-1)
        return (low, high) if low.ndim else (float(low), float(high))

    def faster_frac(self, other: Samples) -> Num:
        """Probability that this one is the faster: ties count half."""
        less, same = self.seconds < other.seconds, self.seconds == other.seconds
        share = (less + 0.5 * same).mean(axis=-1)
        return share if share.ndim else float(share)


def samples(
    prediction: Prediction, *, key: str, seed: int = 0, num_samples: int = NUM_SAMPLES
) -> Samples:
    """The prediction as samples; the same `key` (what ran) and seed give the same errors.

    >>> from hwmodels import catalog
    >>> from simulator.kernel_time.predict import predict
    >>> from workloads.ops.matmul import Matmul
    >>> on = catalog.device("h100-sxm")
    >>> fast, slow = (predict(Matmul(m=m, n=4096, k=4096), on=on) for m in (1024, 8192))
    >>> samples(fast, key="fast").faster_frac(samples(slow, key="slow")) > 0.99
    True
    """
    if prediction.parts:
        drawn = [
            (
                part.beside,
                samples(
                    part.prediction, key=f"{key}|{part.name}", seed=seed, num_samples=num_samples
                )
                .times(part.times)
                .seconds,
            )
            for part in prediction.parts
        ]
        return Samples(combined(drawn))
    digest = hashlib.sha256(f"{seed}|{key}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    levels = rng.random(num_samples)
    seconds = np.asarray(prediction.seconds, dtype=np.float64)
    regimes = np.broadcast_to(np.asarray(prediction.regime), seconds.shape)
    errors = np.empty((*seconds.shape, num_samples))
    for name in np.unique(regimes):
        found = prediction.basis.residuals(
            str(name), kernel=prediction.kernel, known=prediction.known
        )
        errors[regimes == name] = _errors(found, levels)
    return Samples(seconds[..., None] * np.exp(errors))


def _errors(residuals: Residuals | None, levels: Array) -> Array:
    """Log errors at those probabilities, the outer tails continued at their last slope."""
    if residuals is None:
        width = NOMINAL_Q80 / Z80 * math.sqrt(3) / math.pi
        return width * np.log(levels / (1 - levels))  # a logistic of that standard deviation
    known, values = np.array(LEVELS), np.array(residuals.quantiles)
    inner = np.interp(levels, known, values)
    low = values[0] + (levels - known[0]) * _slope(values[:5], known[:5])
    high = values[-1] + (levels - known[-1]) * _slope(values[-5:], known[-5:])
    found: Array = np.where(levels < known[0], low, np.where(levels > known[-1], high, inner))
    return found


def _slope(values: Array, levels: Array) -> float:
    return float((values[-1] - values[0]) / (levels[-1] - levels[0]))
