"""Measured rows predicted: bound, best rung and interval of each, and where the numbers come from.

Rows alike become one array-valued op, priced in one call. A row of several parts runs them one
after the other: their seconds add up, and so do the ends of their intervals,

    low = sum of the parts' low ends,    high = sum of the parts' high ends

which is as wide as if all parts erred in the same direction: the sure side.

The bound of a replayed kernel allows for what its last run left in the L2, one L2 full at most:

    warm_s = max(every other resource, (device memory bytes - L2 capacity) / bandwidth)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from hwmodels import catalog
from hwmodels.calibration import Calibration, shipped
from hwmodels.device import Device
from hwmodels.errors import InputError, UnsupportedError
from simulator.estimate import BOUND, Estimate, estimate
from simulator.kernel_time.basis import ARCHITECTURE, MEAN, NOMINAL, OWN
from simulator.kernel_time.predict import CALIBRATED, MODEL, Prediction
from simulator.kernel_time.predict import predict as predict_op
from validate.batches import Batch, batches
from validate.calibrate import short_digest
from validate.measurement import Measurement
from workloads.numeric import Num, maximum

Floats: TypeAlias = NDArray[np.float64]

ENDS = ("low_80_s", "high_80_s", "low_90_s", "high_90_s")
NO_TIME = "the model gives no positive finite time"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the prediction of one part of a row comes from; `flag` is a doubt about its reading."""

    rung: str
    model: str
    scope: str
    donors: tuple[str, ...]
    notes: tuple[str, ...] = ()
    flag: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """Figures in row order, seconds throughout.

    All are NaN where `reasons` says why there is no prediction; `lower_s` and `warm_s`, the bound
    of a cold and of a replayed kernel, also where the device lacks a rate that only they need.
    """

    lower_s: Floats
    warm_s: Floats
    seconds: Floats
    low_80_s: Floats
    high_80_s: Floats
    low_90_s: Floats
    high_90_s: Floats
    origins: tuple[tuple[Origin, ...], ...]
    reasons: tuple[str | None, ...]

    def rung(self, i: int) -> str:
        """The rung of row i: calibrated where every part is."""
        return CALIBRATED if all(o.rung == CALIBRATED for o in self.origins[i]) else MODEL

    def scope(self, i: int) -> str:
        """The widest scope among the parts of row i: 'own', 'architecture', 'mean', 'nominal'."""
        return max((o.scope for o in self.origins[i]), key=SCOPES.index)

    def models(self, i: int) -> tuple[str, ...]:
        """The kernel models of row i, each once."""
        return tuple(dict.fromkeys(o.model for o in self.origins[i]))

    def donors(self, i: int) -> tuple[str, ...]:
        """Ids of the devices whose constants row i rests on, each once."""
        return tuple(dict.fromkeys(d for o in self.origins[i] for d in o.donors))

    def flags(self, i: int) -> tuple[str, ...]:
        """Doubts about how row i was read."""
        return tuple(dict.fromkeys(o.flag for o in self.origins[i] if o.flag))

    def notes(self, i: int) -> tuple[str, ...]:
        """What a reader must know beside the number of row i, each sentence once."""
        said = [n for o in self.origins[i] for n in o.notes]
        return tuple(dict.fromkeys([*self.flags(i), *said]))


SCOPES = (OWN, ARCHITECTURE, MEAN, NOMINAL)
"""From the surest to the least sure."""


def predict(
    rows: Sequence[Measurement],
    calibrations: Sequence[Calibration] | None = None,
    *,
    withhold_own: bool = False,
) -> Predictions:
    """Every row's bound and best prediction.

    `calibrations` replace the shipped ones. With `withhold_own` every device is predicted without
    its own calibration, as if it had none.
    """
    found, reasons = batches(rows)
    sums = _Sums(len(rows), list(reasons))
    devices = {device_id: catalog.device(device_id) for device_id in {b.device_id for b in found}}
    for batch in found:
        device = devices[batch.device_id]
        donors = calibrations
        if withhold_own:
            known = shipped() if calibrations is None else calibrations
            donors = tuple(c for c in known if c.device_id != device.id)
        _price(sums, batch, device, donors)
    return sums.predictions()


def fitted_on(
    rows: Sequence[Measurement],
    predictions: Predictions,
    calibrations: Sequence[Calibration] | None = None,
) -> tuple[str | None, ...]:
    """By row the device whose calibration was fitted on it and is a donor of its prediction."""
    known = shipped() if calibrations is None else calibrations
    used: Mapping[str, frozenset[str]] = {c.device_id: c.rows for c in known}

    def donor(i: int) -> str | None:
        if predictions.reasons[i] is not None:
            return None
        digest = short_digest(rows[i])
        return next((d for d in predictions.donors(i) if digest in used.get(d, ())), None)

    return tuple(map(donor, range(len(rows))))


class _Sums:
    """Figures being added up, part by part."""

    def __init__(self, num_rows: int, reasons: list[str | None]) -> None:
        names = ("lower_s", "warm_s", "seconds", *ENDS)
        self.figures = {name: np.zeros(num_rows) for name in names}
        self.origins: list[list[Origin]] = [[] for _ in range(num_rows)]
        self.reasons = reasons

    def add(self, name: str, where: NDArray[np.intp], values: Num) -> None:
        # add.at and not +=: a row may hold the same op twice
        np.add.at(self.figures[name], where, np.broadcast_to(values, len(where)))

    def give_up(self, where: NDArray[np.intp], reason: str) -> None:
        for i in where:
            self.reasons[i] = self.reasons[i] or reason

    def predictions(self) -> Predictions:
        seconds = self.figures["seconds"]
        for i in np.flatnonzero(~(np.isfinite(seconds) & (seconds > 0))):
            self.reasons[i] = self.reasons[i] or NO_TIME
        missing = np.array([r is not None for r in self.reasons], dtype=bool)
        for values in self.figures.values():
            values[missing] = np.nan
        return Predictions(
            **self.figures,
            origins=tuple(map(tuple, self.origins)),
            reasons=tuple(self.reasons),
        )


def _price(
    sums: _Sums, batch: Batch, device: Device, calibrations: Sequence[Calibration] | None
) -> None:
    """Add one batch, or its halves until rows that a model refuses stand alone."""
    try:
        found = predict_op(
            batch.op, on=device, conditions=batch.conditions, calibrations=calibrations
        )
        bound = _bound(batch, device)
    except UnsupportedError as why:
        sums.give_up(batch.where, str(why))
    except InputError as why:
        if len(batch.where) == 1:
            sums.give_up(batch.where, f"{batch.op.name} refuses the sizes: {why}")
            return
        for half in _halves(batch):
            _price(sums, half, device, calibrations)
    else:
        _add(sums, batch, found, bound)


def _add(sums: _Sums, batch: Batch, found: Prediction, bound: Estimate | None) -> None:
    sums.add("lower_s", batch.where, np.nan if bound is None else bound.lower_s)
    sums.add("warm_s", batch.where, np.nan if bound is None else replayed_s(bound))
    sums.add("seconds", batch.where, found.seconds)
    for level in (80, 90):
        for end, seconds in zip(("low", "high"), found.interval(level), strict=True):
            sums.add(f"{end}_{level}_s", batch.where, seconds)
    origin = Origin(
        rung=found.rung,
        model=found.model,
        scope=found.basis.scope,
        donors=tuple(d.device_id for d in found.basis.donors),
        notes=found.notes,
        flag=batch.flag,
    )
    for i in batch.where:
        sums.origins[i].append(origin)


def _bound(batch: Batch, device: Device) -> Estimate | None:
    """The bound rung; None where the device lacks a rate that only the bound needs."""
    try:
        return estimate(batch.op, on=device, rung=BOUND)
    except UnsupportedError:
        return None


def _halves(batch: Batch) -> tuple[Batch, Batch]:
    """The first and the second half of a batch's rows."""
    middle, num_rows = len(batch.where) // 2, len(batch.where)

    def part(rows: slice) -> Batch:
        sizes = {
            f.name: value[rows]
            for f in fields(batch.op)
            if isinstance(value := getattr(batch.op, f.name), np.ndarray)
            and value.shape == (num_rows,)
        }
        return replace(batch, op=replace(batch.op, **sizes), where=batch.where[rows])

    return part(slice(None, middle)), part(slice(middle, None))


def replayed_s(e: Estimate) -> Num:
    """The bound of a kernel that finds one L2 full of its bytes in the L2: `warm_s` above."""
    above, memory = e.device.memory[-2], e.device.hbm
    longest: Num = 0.0
    for resource, seconds in e.seconds_by_resource.items():
        if resource == memory.name and memory.bytes_per_s is not None:
            seconds = seconds - above.capacity_bytes * above.num_units / memory.bytes_per_s
        longest = maximum(longest, seconds)
    return longest
