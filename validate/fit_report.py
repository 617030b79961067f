"""A fit made visible: what each model learned, how far each row lies, which rows were left out.

The error of a row is as wide as that of a new timing of its shape would be
(`validate.calibrate.fresh_errors`): the residual of the fit alone flatters it. Its interval is the
one that the calibration gives to rows of its regime.
"""

from __future__ import annotations

import datetime
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from hwmodels.calibration import Calibration
from hwmodels.errors import InputError
from simulator.kernel_time import general
from validate.batches import batches
from validate.calibrate import FEW_ROWS, Trace, calibrate
from validate.compare import Points, errors
from validate.fitting import Fit
from validate.measurement import Measurement
from validate.predictions import Predictions, predict
from validate.record import Record
from validate.recorded import recorded

SLACK_FRAC: Final = 0.01
"""A time may be this much below the bound: clocks and counts are no better known."""
IMPLAUSIBLE: Final = "implausible: faster than the bound of the device"
FEW: Final = f"fewer than {FEW_ROWS} records of its kernel model"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFit:
    """What the rows said of one kernel model. Errors are fractions, of new timings.

    `learned` are the fitted constants with the posterior's standard deviation of their logarithm;
    `open` those that the rows could not tell, `at_bound` those that they push to a bound.
    """

    model: str
    n: int
    mape: float | None
    bias: float | None
    coverage_90: float | None
    learned: Mapping[str, tuple[float, float]]
    open: tuple[str, ...]
    at_bound: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """A calibration, the rows it was fitted on, and how many were left out for each reason.

    `regimes` name the largest term of each point's time.
    """

    calibration: Calibration
    models: tuple[ModelFit, ...]
    points: Points
    regimes: tuple[str, ...]
    left_out: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Usable:
    """Rows of records fit to calibrate on, and how many were left out for each reason."""

    rows: tuple[Measurement, ...]
    left_out: Mapping[str, int]


def usable(records: Iterable[Record], devices: Mapping[str, str]) -> Usable:
    """The rows of records without the noisy, the throttled, the uncounted and the impossible."""
    found = recorded(records, devices, noisy=False)
    left_out = Counter(reason for _, reason in found.left_out)
    seen = predict(found.rows)
    kept = []
    for i, row in enumerate(found.rows):
        reason = seen.reasons[i] or _impossible(row, seen, i)
        if reason:
            left_out[reason] += 1
        else:
            kept.append(row)
    return Usable(tuple(kept), dict(left_out))


def _impossible(row: Measurement, seen: Predictions, i: int) -> str:
    """A kernel whose inputs stay in the L2 has the lower bound of a warm one."""
    state = row.source.rsplit("/", 1)[-1].split("-")[0]
    bound = seen.lower_s[i] if state in ("cold", "rotated") else seen.warm_s[i]
    assert row.seconds is not None
    return IMPLAUSIBLE if row.seconds < bound * (1 - SLACK_FRAC) else ""


def fit_report(
    rows: Sequence[Measurement],
    device_id: str,
    *,
    models: Iterable[str] | None = None,
    donors: Sequence[Calibration] = (),
    left_out: Mapping[str, int] | None = None,
    on: datetime.date | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> FitReport:
    """Fit the rows of one device and look at the fit; `left_out` are those dropped before."""
    mine = [r for r in rows if r.device_id == device_id]
    traces: list[Trace] = []
    fitted = calibrate(
        mine, device_id, models=models, donors=donors, on=on, progress=progress,
        designed=True, trace=traces.append,
    )  # fmt: skip
    if not fitted.models:
        raise InputError(
            f"no kernel model has {FEW_ROWS} records of {device_id}; profile more of them"
        )
    traces = [t for t in traces if {m.name for m in t.fit.problem.models} <= fitted.models.keys()]
    log_errors, regimes = _merged(traces, len(mine))
    where = np.flatnonzero(np.isfinite(log_errors))
    points = _points(mine, where, log_errors, fitted)
    counted = Counter(left_out or {})
    counted.update(_unfitted(mine, log_errors))
    fits = {m.name: trace.fit for trace in traces for m in trace.fit.problem.models}
    return FitReport(
        calibration=fitted,
        models=tuple(_model_fit(name, fitted, fits[name], points) for name in fitted.models),
        points=points,
        regimes=tuple(_regime(regimes[i]) for i in where),
        left_out={reason: n for reason, n in counted.items() if n},
    )


def _merged(traces: Sequence[Trace], num_rows: int) -> tuple[Any, Any]:
    """Errors and regimes by row: a model of the row's own op before the general path."""
    errors_of = np.full(num_rows, np.nan)
    regimes = np.full(num_rows, None, dtype=object)
    for trace in sorted(traces, key=lambda t: general.MODEL in t.fit.problem.models):
        free = np.isnan(errors_of) & np.isfinite(trace.errors)
        errors_of[free], regimes[free] = trace.errors[free], trace.regimes[free]
    return errors_of, regimes


def _regime(found: tuple[str, str] | None) -> str:
    return "general" if found is None else found[1]


def _unfitted(rows: Sequence[Measurement], log_errors: Any) -> dict[str, int]:
    """Rows that reached no fit, by reason."""
    _, reasons = batches(rows)
    counted: Counter[str] = Counter()
    for reason, error in zip(reasons, log_errors, strict=True):
        if reason is not None or not math.isfinite(error):
            counted[reason or FEW] += 1
    return counted


def _points(
    rows: Sequence[Measurement], where: Any, log_errors: Any, fitted: Calibration
) -> Points:
    """The rows as evidence: predictions off by these errors, intervals of the calibration."""
    mine = [rows[i] for i in where]
    seen = predict(mine, (fitted,))
    measured = np.array([r.seconds for r in mine], dtype=np.float64)
    predicted = measured / np.exp(log_errors[where])
    scale = predicted / seen.seconds

    def texts(values: Iterable[str]) -> Any:
        column = np.empty(len(mine), dtype=object)
        column[:] = list(values)
        return column

    labels: dict[str, Any] = {
        name: texts(getattr(r, name) for r in mine)
        for name in ("family", "gpu", "device_id", "op", "dtype", "source")
    }
    ends = {
        name: getattr(seen, name) * scale
        for name in ("low_80_s", "high_80_s", "low_90_s", "high_90_s")
    }
    count = range(len(mine))
    return Points(
        **labels, **ends,
        rung=texts(seen.rung(i) for i in count),
        scope=texts(seen.scope(i) for i in count),
        model=texts("+".join(seen.models(i)) for i in count),
        calibration=texts("+".join(seen.donors(i)) for i in count),
        flagged=np.zeros(len(mine), dtype=bool),
        measured_s=measured, predicted_s=predicted, lower_s=seen.lower_s, warm_s=seen.warm_s,
    )  # fmt: skip


def _model_fit(name: str, fitted: Calibration, whole: Fit, points: Points) -> ModelFit:
    """One model's constants with their doubt, and the errors of the rows it times."""
    entry = fitted.models[name]
    mine = points.at(np.array([name in text.split("+") for text in points.model], dtype=bool))
    found = errors(mine)
    widths = log_widths(whole)
    status = {key: c.status for key, c in entry.constants.items()}
    return ModelFit(
        model=name,
        n=entry.num_rows,
        mape=found.mape,
        bias=found.bias,
        coverage_90=found.coverage_90,
        learned={
            key: (entry.constants[key].value, widths.get((name, key), math.nan))
            for key, said in status.items()
            if said == "fitted"
        },
        open=tuple(key for key, said in status.items() if said == "unidentified"),
        at_bound=tuple(key for key, said in status.items() if said == "at bound"),
    )


def log_widths(whole: Fit) -> dict[tuple[str, str], float]:
    """The posterior standard deviation of the logarithm of every constant's base."""
    slots = whole.problem.slots
    return {
        slot.key: float(math.sqrt(whole.covariance[n, n]))
        for n, slot in enumerate(slots)
        if slot.label is None
    }


def by_regime(report: FitReport) -> Points:
    """The points with their regime in place of the family."""
    column = np.empty(len(report.regimes), dtype=object)
    column[:] = report.regimes
    return replace(report.points, family=column)
