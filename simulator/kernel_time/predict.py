"""The calibrated rung: an op's time on a device, its interval, and where both come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from hwmodels.calibration import Calibration, Residuals
from hwmodels.device import Device
from simulator.kernel_time.basis import NOMINAL_Q80, NOMINAL_Q90, Basis, basis, remembered
from simulator.kernel_time.model import USUAL, Conditions, KernelModel, KernelTime
from simulator.kernel_time.rates import rates_of
from simulator.kernel_time.registry import model_of
from workloads.numeric import Num, any_true, maximum
from workloads.op import Op, Stage

MODEL: Final = "model"
CALIBRATED: Final = "calibrated"

_rates = remembered(rates_of)


class Part(NamedTuple):
    """The prediction of one stage of an op, how often it runs, and whether beside the others."""

    name: str
    prediction: Prediction
    times: Num
    beside: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One op's time on one device. Seconds broadcast over the op's arrays.

    `rung` is 'calibrated' where constants were fitted (here or on the device's donors), 'model'
    where they are nominal. `half_80`, `half_90` are half widths of the interval in log time;
    `terms` the parts of the time, `regime` the name of the largest; `kernel` the label of what
    ran, `known` whether some donor had rows of it and of its format. `parts` are the predictions
    of an op's stages, of which it is made.
    """

    seconds: Num
    half_80: Num
    half_90: Num
    terms: Mapping[str, Num]
    regime: Any
    rung: str
    model: str
    basis: Basis
    kernel: str
    known: bool
    notes: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()

    def interval(self, level: int = 80) -> tuple[Num, Num]:
        """Low and high seconds that hold `level` (80 or 90) per cent of measurements."""
        half = {80: self.half_80, 90: self.half_90}[level]
        factor = np.exp(half) if isinstance(half, np.ndarray) else math.exp(half)
        return self.seconds / factor, self.seconds * factor


def predict(
    op: Op,
    *,
    on: Device,
    conditions: Conditions = USUAL,
    calibrations: Sequence[Calibration] | None = None,
) -> Prediction:
    """The best estimate of a kernel's time that the calibrations allow.

    Raises `UnsupportedError` where the device has no rate the op needs.
    """
    stages = op.stages()
    if stages:
        return _staged(stages, on, conditions, calibrations)
    model = model_of(type(op))
    labels = model.labels(op, conditions)
    if calibrations is None:
        found, constants, known, notes = _shipped(model, on, tuple(labels.items()))
    else:
        found, constants, known, notes = _resolved(model, on, labels, calibrations)
    time = model.time(op, _rates(on), constants, conditions)
    regime = time.regime()
    half_80, half_90 = _halves(found, regime, kernel=conditions.kernel, known=known)
    return Prediction(
        seconds=time.seconds,
        half_80=half_80,
        half_90=half_90,
        terms=time.terms,
        regime=regime,
        rung=CALIBRATED if found.calibrated else MODEL,
        model=model.name,
        basis=found,
        kernel=conditions.kernel,
        known=known,
        notes=notes,
    )


def _staged(
    stages: Sequence[Stage],
    on: Device,
    conditions: Conditions,
    calibrations: Sequence[Calibration] | None,
) -> Prediction:
    """Stages one after another, those beside them hidden behind: seconds, and the widest doubt.

    Errors of the stages are taken to go together, which makes the interval no narrower than it is.
    """
    parts = tuple(
        Part(
            stage.name,
            predict(
                stage.op,
                on=on,
                conditions=of_stage(stage, conditions),
                calibrations=calibrations,
            ),
            stage.times,
            stage.beside,
        )
        for stage in stages
        if any_true(np.greater(stage.times, 0))  # a stage that never runs costs no prediction
    )
    terms = {part.name: part.prediction.seconds * part.times for part in parts}
    seconds = combined([(part.beside, terms[part.name]) for part in parts])
    high, wide = (
        combined([(p.beside, p.prediction.interval(level)[1] * p.times) for p in parts])
        for level in (80, 90)
    )
    main = max(parts, key=lambda part: float(np.mean(terms[part.name]))).prediction
    rungs = {part.prediction.rung for part in parts}
    bases = dict.fromkeys(note for part in parts for note in part.prediction.notes)
    return Prediction(
        seconds=seconds,
        half_80=_log(high / seconds),
        half_90=_log(wide / seconds),
        terms=terms,
        regime=KernelTime(seconds, terms).regime(),
        rung=CALIBRATED if rungs == {CALIBRATED} else MODEL,
        model="+".join(dict.fromkeys(part.prediction.model for part in parts)),
        basis=main.basis,
        kernel=conditions.kernel,
        known=all(part.prediction.known for part in parts),
        notes=(*main.notes, *(note for note in bases if note not in main.notes)),
        parts=parts,
    )


def of_stage(stage: Stage, conditions: Conditions) -> Conditions:
    """The run of an op as one of its stages sees it."""
    return replace(conditions, kernel=stage.kernel or conditions.kernel)


def combined(parts: Sequence[tuple[bool, Any]], longer: Callable[[Any, Any], Any] = maximum) -> Any:
    """Sum of the parts that run in turn, or of those beside them where that is longer.

    >>> combined([(False, 2.0), (False, 1.0), (True, 4.0)])
    4.0
    """
    turns = [seconds for beside, seconds in parts if not beside]
    besides = [seconds for beside, seconds in parts if beside]
    if not (turns and besides):
        return sum(turns or besides)
    return longer(sum(turns), sum(besides))


def _log(ratio: Num) -> Num:
    return np.log(ratio) if isinstance(ratio, np.ndarray) else float(np.log(ratio))


Resolved: TypeAlias = tuple[Basis, Mapping[str, float], bool, tuple[str, ...]]


def _resolved(
    model: KernelModel,
    on: Device,
    labels: Mapping[str, str],
    calibrations: Sequence[Calibration] | None,
) -> Resolved:
    """Donors, constants, whether they know the labels, and what to say of it."""
    found = basis(on, model, calibrations).narrowed(labels)
    known = found.knows(labels)
    return found, found.constants(labels), known, _notes(model, found, known=known)


def _shipped(model: KernelModel, on: Device, labels: tuple[tuple[str, str], ...]) -> Resolved:
    """The same on the shipped calibrations, which never change: looked up once."""
    key = (model.name, on.id, on.architecture, on.compute_capability, labels)
    found = _KEPT.get(key)
    if found is None:
        if len(_KEPT) >= MOST_KEPT:
            _KEPT.clear()
        found = _KEPT[key] = _resolved(model, on, dict(labels), None)
    return found


_KEPT: dict[tuple[object, ...], Resolved] = {}
MOST_KEPT: Final = 4096


def _halves(found: Basis, regimes: Any, *, kernel: str, known: bool) -> tuple[Num, Num]:
    """Half widths by regime; an array of regimes is looked up name by name."""
    if isinstance(regimes, str):
        return _half_pair(found.residuals(regimes, kernel=kernel, known=known))
    q80, q90 = np.empty(regimes.shape), np.empty(regimes.shape)
    for name in np.unique(regimes):
        here = regimes == name
        q80[here], q90[here] = _half_pair(found.residuals(str(name), kernel=kernel, known=known))
    return q80, q90


def _half_pair(residuals: Residuals | None) -> tuple[float, float]:
    if residuals is None:
        return NOMINAL_Q80, NOMINAL_Q90
    return residuals.q80, residuals.q90


def _notes(model: KernelModel, found: Basis, *, known: bool) -> tuple[str, ...]:
    """What a reader must know beside the number."""
    notes = [found.describe()]
    if model.name == "general":
        notes.append("no kernel model of its own: the general path, from counts alone")
    if not known:
        notes.append("no fitted row ran this kernel or format: usual factors")
    return tuple(notes)
