"""Predicted against measured: errors by family, GPU, op and dtype.

Every row that was read ends up in exactly one of four places: predicted (`n`), without a
prediction (`unsupported`, with a reason), refused by the reader, or refused as evidence because a
calibration its prediction rests on was fitted on it (both also `unsupported`, with that reason).

    ape      = |predicted - measured| / measured
    bias     = exp(mean(log(predicted / measured))) - 1
    coverage = share of rows with low <= measured <= high, for the 80 and the 90 % interval

All figures are fractions. Predictions stand on the best rung there is; `roofline_mape` is the
error of the bound rung on the same rows. That one is no prediction: a row measured faster than the
bound is a finding. `faster_than_bound` counts them all, `faster_than_bound_warm` those of them
that a warm L2 explains (`validate.predictions`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hwmodels.calibration import Calibration
from simulator.estimate import BEST
from validate.measurement import Measurement, Refusal
from validate.predictions import ENDS, SCOPES, Predictions, fitted_on, predict

__all__ = [
    "Ablation", "Comparison", "Errors", "Points", "Table", "Unsupported", "compare", "errors",
    "predict",
]  # fmt: skip

VERSION = 1
SLACK_FRAC = 1e-9
"""A row this little below the bound equals it; rounding of the sum of a few terms."""
OWN_ROW = "own row: the calibration was fitted on it"

Group: TypeAlias = tuple[str, str, str, str]
Floats: TypeAlias = NDArray[np.float64]
Texts: TypeAlias = NDArray[np.object_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Errors over some rows, fractions; None where there are no rows (or none with a bound)."""

    n: int
    mape: float | None = None
    median_ape: float | None = None
    p90_ape: float | None = None
    bias: float | None = None
    coverage_80: float | None = None
    coverage_90: float | None = None
    roofline_mape: float | None = None
    faster_than_bound: int = 0
    faster_than_bound_warm: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Errors of one family, GPU, op and dtype; None where no row was predicted.

    `calibration` joins the ids of the devices whose constants were used with '+'; `rung`, `scope`
    and `model` join what occurs among the rows in the same way. `flagged` counts predicted rows
    that were recognised by the names of their params alone.
    """

    family: str
    gpu: str
    op: str
    dtype: str
    n: int
    unsupported: int
    mape: float | None = None
    median_ape: float | None = None
    p90_ape: float | None = None
    bias: float | None = None
    coverage_80: float | None = None
    coverage_90: float | None = None
    calibration: str | None = None
    roofline_mape: float | None = None
    faster_than_bound: int = 0
    faster_than_bound_warm: int = 0
    rung: str | None = None
    scope: str | None = None
    model: str | None = None
    flagged: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsupported:
    """How many rows of one family, GPU, op and dtype had no prediction for one reason."""

    family: str
    gpu: str
    op: str
    dtype: str
    reason: str
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """The rows that count as evidence, one entry each; seconds, `lower_s` NaN without a bound."""

    family: Texts
    gpu: Texts
    device_id: Texts
    op: Texts
    dtype: Texts
    source: Texts
    rung: Texts
    scope: Texts
    model: Texts
    calibration: Texts
    flagged: NDArray[np.bool_]
    measured_s: Floats
    predicted_s: Floats
    low_80_s: Floats
    high_80_s: Floats
    low_90_s: Floats
    high_90_s: Floats
    lower_s: Floats
    warm_s: Floats

    def __len__(self) -> int:
        return len(self.measured_s)

    def at(self, where: Any) -> Points:
        """The entries that a mask or an array of indices picks."""
        return Points(**{f.name: getattr(self, f.name)[where] for f in fields(self)})

    def groups(self, *names: str) -> dict[tuple[str, ...], Points]:
        """The entries by the values of the columns named, sorted."""
        members: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for i, key in enumerate(zip(*(getattr(self, n) for n in names), strict=True)):
            members[key].append(i)
        return {key: self.at(np.array(members[key])) for key in sorted(members)}

    def joined(self, name: str) -> str | None:
        """The distinct values of a column of '+'-joined texts, joined; None where there is none."""
        found = {part for text in set(getattr(self, name)) for part in text.split("+") if part}
        listed = [s for s in SCOPES if s in found] if name == "scope" else sorted(found)
        return "+".join(listed) or None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """What each step of calibration is worth: errors (MAPE) of one family on one GPU, same rows.

    `bound`: the roofline; `nominal`: the model with its constants' start values; `borrowed`: with
    the constants of other devices only; `best`: with the device's own calibration if it has one.
    """

    family: str
    gpu: str
    n: int
    bound: float | None
    nominal: float
    borrowed: float
    best: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome of `compare`; `n` and `unsupported` of the tables add up to the rows given."""

    tables: tuple[Table, ...]
    unsupported: tuple[Unsupported, ...]
    points: Points
    rung: str = BEST

    def as_dict(self) -> dict[str, Any]:
        """The one JSON document: plain numbers, strings and None."""
        return {
            "version": VERSION,
            "rung": self.rung,
            "tables": [asdict(t) for t in self.tables],
            "unsupported": [asdict(u) for u in self.unsupported],
        }


def compare(
    rows: Sequence[Measurement],
    refused: Iterable[Refusal] = (),
    calibrations: Sequence[Calibration] | None = None,
) -> Comparison:
    """Predict every row and hold it against its measurement.

    `calibrations` replace the shipped ones.
    """
    found = predict(rows, calibrations)
    reasons = _reasons(rows, found, calibrations)
    counted: Counter[tuple[Group, str]] = Counter()
    for row, reason in zip(rows, reasons, strict=True):
        if reason is not None:
            counted[_group(row), reason] += 1
    for refusal in refused:
        counted[_group(refusal), f"refused: {refusal.reason}"] += 1
    points = _points(rows, found, [i for i, reason in enumerate(reasons) if reason is None])
    return Comparison(
        tables=tuple(_tables(points, counted)),
        unsupported=tuple(
            Unsupported(**_labels(group), reason=reason, n=n)
            for (group, reason), n in sorted(counted.items())
        ),
        points=points,
    )


def ablate(
    rows: Sequence[Measurement], calibrations: Sequence[Calibration] | None = None
) -> tuple[Ablation, ...]:
    """The error on each rung of calibration, over the rows that count as evidence for the last."""
    best = predict(rows, calibrations)
    reasons = _reasons(rows, best, calibrations)
    nominal = predict(rows, ())
    borrowed = predict(rows, calibrations, withhold_own=True)
    members: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        if reasons[i] is None:
            members[row.family, row.gpu].append(i)
    return tuple(
        _ablation(key, np.array(members[key]), rows, (nominal, borrowed, best))
        for key in sorted(members)
    )


def errors(points: Points) -> Errors:
    """The errors over all of some points."""
    if len(points) == 0:
        return Errors(n=0)
    measured, predicted = points.measured_s, points.predicted_s
    ape = np.abs(predicted - measured) / measured
    bounded = np.isfinite(points.lower_s)
    roofline = np.abs(points.lower_s - measured)[bounded] / measured[bounded]
    faster = measured < points.lower_s * (1 - SLACK_FRAC)
    warm = faster & (measured >= points.warm_s * (1 - SLACK_FRAC))
    inside = {
        level: (getattr(points, f"low_{level}_s") <= measured)
        & (measured <= getattr(points, f"high_{level}_s"))
        for level in (80, 90)
    }
    return Errors(
        n=len(points),
        mape=float(ape.mean()),
        median_ape=float(np.median(ape)),
        p90_ape=float(np.quantile(ape, 0.9)),
        bias=float(np.expm1(np.log(predicted / measured).mean())),
        coverage_80=float(inside[80].mean()),
        coverage_90=float(inside[90].mean()),
        roofline_mape=float(roofline.mean()) if len(roofline) else None,
        faster_than_bound=int(faster.sum()),
        faster_than_bound_warm=int(warm.sum()),
    )


def _reasons(
    rows: Sequence[Measurement],
    found: Predictions,
    calibrations: Sequence[Calibration] | None,
) -> list[str | None]:
    """By row why it is no evidence; None where it is."""
    own = fitted_on(rows, found, calibrations)
    return [
        reason or (OWN_ROW if donor is not None else None)
        for reason, donor in zip(found.reasons, own, strict=True)
    ]


def _points(rows: Sequence[Measurement], found: Predictions, where: Sequence[int]) -> Points:
    """The evidence as columns."""

    def texts(value: Callable[[int], str]) -> Texts:
        column = np.empty(len(where), dtype=object)
        column[:] = [value(i) for i in where]
        return column

    def said(name: str) -> Texts:
        return texts(lambda i: getattr(rows[i], name))

    index = np.array(where, dtype=np.intp)
    labels: dict[str, Any] = {n: said(n) for n in ("family", "gpu", "device_id", "op", "dtype")}
    figures: dict[str, Any] = {n: getattr(found, n)[index] for n in (*ENDS, "lower_s", "warm_s")}
    return Points(
        **labels,
        source=said("source"),
        rung=texts(found.rung),
        scope=texts(found.scope),
        model=texts(lambda i: "+".join(found.models(i))),
        calibration=texts(lambda i: "+".join(found.donors(i))),
        flagged=np.array([bool(found.flags(i)) for i in where], dtype=bool),
        measured_s=np.array([rows[i].seconds for i in where], dtype=np.float64),
        predicted_s=found.seconds[index],
        **figures,
    )


def _tables(points: Points, counted: Mapping[tuple[Group, str], int]) -> Iterator[Table]:
    """One table a family, GPU, op and dtype that has rows of any kind."""
    without: Counter[Group] = Counter()
    for (group, _), n in counted.items():
        without[group] += n
    members: Mapping[Any, Points] = points.groups("family", "gpu", "op", "dtype")
    for group in sorted(members.keys() | without.keys()):
        if group not in members:
            yield Table(**_labels(group), n=0, unsupported=without[group])
            continue
        mine = members[group]
        yield Table(
            **_labels(group),
            **asdict(errors(mine)),
            unsupported=without[group],
            calibration=mine.joined("calibration"),
            rung=mine.joined("rung"),
            scope=mine.joined("scope"),
            model=mine.joined("model"),
            flagged=int(mine.flagged.sum()),
        )


def _ablation(
    key: tuple[str, str],
    where: NDArray[np.intp],
    rows: Sequence[Measurement],
    rungs: tuple[Predictions, Predictions, Predictions],
) -> Ablation:
    measured = np.array([rows[i].seconds for i in where], dtype=np.float64)
    nominal, borrowed, best = (
        float(np.mean(np.abs(found.seconds[where] / measured - 1))) for found in rungs
    )
    bound = np.abs(rungs[-1].lower_s[where] / measured - 1)
    bound = bound[np.isfinite(bound)]
    return Ablation(
        family=key[0],
        gpu=key[1],
        n=len(where),
        bound=float(bound.mean()) if len(bound) else None,
        nominal=nominal,
        borrowed=borrowed,
        best=best,
    )


def _group(row: Measurement | Refusal) -> Group:
    return row.family, row.gpu, row.op, row.dtype


def _labels(group: Group) -> dict[str, Any]:
    return dict(zip(("family", "gpu", "op", "dtype"), group, strict=True))
