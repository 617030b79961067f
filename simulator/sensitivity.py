"""How an op's time answers to every figure of its device: exact derivatives by the complex step.

    dT / dx = Im T(x + i h) / h,   h far below rounding (Squire and Trapp 1998)

All figures are moved in one call, each in an entry of its own. Where the best tile or split
changes at the very point, the derivative is that of the choice made there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from hwmodels.calibration import Calibration
from hwmodels.device import Device
from simulator.kernel_time.basis import basis
from simulator.kernel_time.model import USUAL, Conditions
from simulator.kernel_time.predict import combined, of_stage
from simulator.kernel_time.rates import PATHS, Rates, rates_of
from simulator.kernel_time.registry import model_of
from simulator.kernel_time.terms import larger
from workloads.numeric import Num
from workloads.op import Op

STEP: Final = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """The answer to one figure, named by its path in the device's spec.

    `elasticity` is d ln T / d ln x: -1 where doubling the figure halves the time. For rates that
    differ by number format (`tensor_flops_per_s`) it is that of moving all of them together.
    """

    path: str
    elasticity: Num


def sensitivities(
    op: Op,
    *,
    on: Device,
    conditions: Conditions = USUAL,
    calibrations: Sequence[Calibration] | None = None,
) -> tuple[Sensitivity, ...]:
    """Elasticities of the op's time, in the order of `PATHS`; they broadcast over the op's arrays.

    >>> from hwmodels import catalog
    >>> from workloads.ops.elementwise import Elementwise
    >>> found = sensitivities(Elementwise(num_elements=2**30), on=catalog.device("h100-sxm"))
    >>> next(s for s in found if s.path == "memory.hbm.bytes_per_s").elasticity < -0.5
    True
    """
    rates = rates_of(on)
    seconds = np.asarray(seconds_at(op, rates, conditions, calibrations))
    moved = _moved(rates, seconds.ndim)
    slopes = np.imag(np.asarray(seconds_at(op, moved, conditions, calibrations))) / STEP
    slopes = np.broadcast_to(slopes, (len(PATHS), *seconds.shape)) / seconds
    return tuple(
        Sensitivity(path=path, elasticity=slope if slope.ndim else float(slope))
        for path, slope in zip(PATHS.values(), slopes, strict=True)
    )


def seconds_at(
    op: Op, rates: Rates, conditions: Conditions, calibrations: Sequence[Calibration] | None
) -> Any:
    """Seconds at those rates, of an op or of its stages together."""
    stages = op.stages()
    if stages:
        parts = [
            (s.beside, s.times * seconds_at(s.op, rates, of_stage(s, conditions), calibrations))
            for s in stages
        ]
        return combined(parts, longer=larger)
    model = model_of(type(op))
    labels = model.labels(op, conditions)
    constants = basis(rates.device, model, calibrations).narrowed(labels).constants(labels)
    return model.time(op, rates, constants, conditions).seconds


def _moved(rates: Rates, num_axes: int) -> Rates:
    """Rates with a leading axis: entry i has figure i moved by a relative imaginary step."""
    shape = (len(PATHS), *(1 for _ in range(num_axes)))
    changes = {}
    for i, name in enumerate(PATHS):
        factor = np.ones(shape, dtype=np.complex128)
        factor[i] += 1j * STEP
        changes[name] = getattr(rates, name) * factor
    return dataclasses.replace(rates, **changes)
