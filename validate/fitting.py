"""Fitting kernel models: robust least squares on log time, with priors and a verdict a constant.

Minimised over the logarithms of the constants, within their bounds, over rows i and constants j:

    sum_i rho(log(predicted_i / measured_i) / C) + sum_j rho((log value_j - log start_j) / spread_j)

rho(z) = 2 (sqrt(1 + z^2) - 1), the soft l1 loss; C = 0.05, an error that counts like one
prior standard deviation. A constant with labels has a factor per label value, with a prior of its
own around 1. Whole models are fitted together where a row runs kernels of several.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hwmodels import catalog
from hwmodels.calibration import FittedConstant
from hwmodels.device import Device
from hwmodels.errors import InputError, UnsupportedError
from simulator.kernel_time.constants import Constant
from simulator.kernel_time.model import KernelModel
from simulator.kernel_time.rates import rates_of
from simulator.kernel_time.registry import model_of
from validate.batches import Batch

Floats: TypeAlias = NDArray[np.float64]
Key: TypeAlias = tuple[str, str]
"""Model name and constant name."""

SCALE: Final = 0.05
FACTOR_SPREAD: Final = 0.5
STEP: Final = 1e-5
AT_BOUND: Final = 1e-3
UNIDENTIFIED: Final = 0.8
"""A constant whose posterior is wider than this share of its prior was not learned."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One number of the fit: the base of a constant, or its factor under one label key."""

    key: Key
    label: str | None
    start: float
    low: float
    high: float
    spread: float


@dataclass(frozen=True)
class Problem:
    """Rows of one device to fit: batches, their models, measured seconds by row.

    `prior` moves the centre of the prior of some constants away from their nominal start, to what
    other devices gave.
    """

    device: Device
    batches: tuple[Batch, ...]
    models: tuple[KernelModel, ...]
    seconds: Floats
    prior: Mapping[Key, float] = field(default_factory=dict)

    @cached_property
    def rows(self) -> NDArray[np.intp]:
        """Rows that some batch holds."""
        return np.unique(np.concatenate([b.where for b in self.batches]))

    @cached_property
    def constants(self) -> Mapping[Key, Constant]:
        """Every constant of every model in use, those that no row can reach left out."""
        eager = any(b.conditions.host for b in self.batches)
        return {
            (model.name, c.name): c
            for model in dict.fromkeys(self.models)
            for c in model.all_constants()
            if c.name != "host_s" or eager
        }

    @cached_property
    def labels(self) -> tuple[Mapping[str, str], ...]:
        """The labels of each batch."""
        return tuple(
            m.labels(b.op, b.conditions) for m, b in zip(self.models, self.batches, strict=True)
        )

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """The free numbers: bases of fitted constants, then factors of labels that occur."""
        free = {k: c for k, c in self.constants.items() if c.fitted}
        bases = [
            Slot(k, None, self._centre(k, c), math.log(c.low), math.log(c.high), c.spread)
            for k, c in free.items()
        ]
        span = math.log(30.0)
        factors = [
            Slot(key, label, 0.0, -span, span, FACTOR_SPREAD)
            for key in sorted(free)
            if len(self.seen[key]) > 1  # a lone label is the base itself
            for label in sorted(filter(None, self.seen[key]))
        ]
        return (*bases, *factors)

    @cached_property
    def seen(self) -> Mapping[Key, frozenset[str | None]]:
        """The labels under which each constant is used; None where a label is left open."""
        found: dict[Key, set[str | None]] = {}
        for i, model in enumerate(self.models):
            for c in model.all_constants():
                found.setdefault((model.name, c.name), set()).add(self.label(i, c))
        return {key: frozenset(labels) for key, labels in found.items()}

    def _centre(self, key: Key, constant: Constant) -> float:
        """Where the prior of a base stands, within the bounds."""
        value = self.prior.get(key, constant.start)
        return math.log(min(max(value, constant.low), constant.high))

    def label(self, i: int, constant: Constant) -> str | None:
        """The factor key of a constant in batch i; None where a label is open."""
        values = [self.labels[i].get(name, "") for name in constant.by]
        return "|".join(values) if values and all(values) else None

    @cached_property
    def index(self) -> Mapping[tuple[Key, str | None], int]:
        """Where each free number stands in the vector."""
        return {(s.key, s.label): n for n, s in enumerate(self.slots)}

    def places(self, i: int, constant: Constant) -> list[int]:
        """Where the numbers stand whose sum is a constant's logarithm in batch i."""
        key = (self.models[i].name, constant.name)
        slots = dict.fromkeys(((key, None), (key, self.label(i, constant))))
        return [self.index[slot] for slot in slots if slot in self.index]

    def values(self, i: int, theta: Floats) -> dict[str, float]:
        """The constants of batch i; never outside their bounds, factor included."""
        model = self.models[i]
        found: dict[str, float] = {}
        for c in model.all_constants():
            key = (model.name, c.name)
            if (key, None) not in self.index:
                found[c.name] = c.start
                continue
            total = sum(theta[n] for n in self.places(i, c))
            found[c.name] = min(max(math.exp(total), c.low), c.high)
        return found

    def predicted(self, theta: Floats) -> Floats:
        """Seconds of every row (NaN for rows in no batch)."""
        total = np.zeros(len(self.seconds))
        rates = rates_of(self.device)
        for i, (batch, model) in enumerate(zip(self.batches, self.models, strict=True)):
            time = model.time(batch.op, rates, self.values(i, theta), batch.conditions)
            np.add.at(total, batch.where, np.broadcast_to(time.seconds, len(batch.where)))
        return total

    def jacobian(self, theta: Floats, total: Floats) -> Floats:
        """d log(predicted) / d theta by row: one evaluation serves base and factor."""
        rates = rates_of(self.device)
        found = np.zeros((len(self.seconds), len(self.slots)))
        for i, (batch, model) in enumerate(zip(self.batches, self.models, strict=True)):
            values = self.values(i, theta)
            base = model.time(batch.op, rates, values, batch.conditions).seconds
            for c in model.all_constants():
                key = (model.name, c.name)
                if (key, None) not in self.index:
                    continue
                sign = -1.0 if values[c.name] * (1 + STEP) > c.high else 1.0
                moved = {**values, c.name: values[c.name] * (1 + sign * STEP)}
                time = model.time(batch.op, rates, moved, batch.conditions).seconds
                slope = (time - base) / (sign * STEP) / total[batch.where]
                for n in self.places(i, c):
                    np.add.at(found, (batch.where, n), slope)
        return found


@dataclass(frozen=True, slots=True)
class Fit:
    """The outcome: the vector, and the covariance of its posterior."""

    problem: Problem
    theta: Floats
    covariance: Floats

    def constants(self, model: KernelModel) -> dict[str, FittedConstant]:
        """What a calibration file says of one model's constants."""
        found: dict[str, FittedConstant] = {}
        for c in model.all_constants():
            key = (model.name, c.name)
            if key not in self.problem.constants:
                continue
            if not c.fitted:
                found[c.name] = FittedConstant(value=c.start, status="fixed", factors={})
                continue
            slots = {s.label: n for n, s in enumerate(self.problem.slots) if s.key == key}
            base = slots.pop(None)
            found[c.name] = FittedConstant(
                value=_digits(math.exp(self.theta[base])),
                status=self._status(base, list(slots.values())),
                factors={
                    label: _digits(math.exp(self.theta[slots[label]])) if label in slots else 1.0
                    for label in sorted(filter(None, self.problem.seen[key]))
                },
            )
        return found

    def _status(self, base: int, factors: Sequence[int]) -> str:
        """A constant is learned where its value is, under the label that pins it best."""
        slot, value = self.problem.slots[base], self.theta[base]
        if min(value - slot.low, slot.high - value) < AT_BOUND:
            return "at bound"
        share = min(self._width_frac([base, *factor]) for factor in ([], *([f] for f in factors)))
        return "unidentified" if share > UNIDENTIFIED else "fitted"

    def _width_frac(self, places: list[int]) -> float:
        """Posterior over prior standard deviation of the sum of some slots."""
        prior = sum(self.problem.slots[n].spread ** 2 for n in places)
        return math.sqrt(self.covariance[np.ix_(places, places)].sum() / prior)


def problem_of(
    device_id: str, batches: Sequence[Batch], seconds: Floats, model: KernelModel | None = None
) -> Problem:
    """The batches of one device, each with its own model (or all with the one given)."""
    device = catalog.device(device_id)
    pairs = [(b, model or model_of(type(b.op))) for b in batches if b.device_id == device_id]
    able = [(b, m) for b, m in pairs if _can_time(device, b, m)]
    return Problem(device, tuple(b for b, _ in able), tuple(m for _, m in able), seconds)


def _can_time(device: Device, batch: Batch, model: KernelModel) -> bool:
    """Has the device every rate that the batch needs?"""
    try:
        model.time(batch.op, rates_of(device), model.nominal(), batch.conditions)
    except (UnsupportedError, InputError):
        return False
    return True


def fit(problem: Problem, rows: NDArray[np.intp] | None = None, start: Floats | None = None) -> Fit:
    """The constants that minimise the loss over `rows` (all of the problem's by default)."""
    from scipy.optimize import least_squares  # a problem is also stated where scipy is missing

    use = problem.rows if rows is None else rows
    slots = problem.slots
    centre = np.array([s.start for s in slots])
    spread = np.array([s.spread for s in slots])
    low, high = np.array([s.low for s in slots]), np.array([s.high for s in slots])
    logs = np.log(problem.seconds[use])

    def residuals(theta: Floats) -> Floats:
        errors = np.log(problem.predicted(theta)[use]) - logs
        return np.concatenate([errors, SCALE * (theta - centre) / spread])

    def slopes(theta: Floats) -> Floats:
        rows_of = problem.jacobian(theta, problem.predicted(theta))[use]
        return np.concatenate([rows_of, np.diag(SCALE / spread)])

    first = np.clip(centre if start is None else start, low + 1e-9, high - 1e-9)
    found = least_squares(
        residuals, first, slopes, bounds=(low, high), loss="soft_l1", f_scale=SCALE,
        max_nfev=60, ftol=1e-5, xtol=1e-4,
    )  # fmt: skip
    return Fit(problem, found.x, _covariance(problem, found.x, use, spread))


def _covariance(problem: Problem, theta: Floats, use: NDArray[np.intp], spread: Floats) -> Floats:
    """Posterior covariance of the slots, at the loss's own scale."""
    slopes = problem.jacobian(theta, problem.predicted(theta))[use] / SCALE
    found: Floats = np.linalg.inv(slopes.T @ slopes + np.diag(1 / spread**2))
    return found


def _digits(value: float) -> float:
    """Four significant digits: more would claim what no timing supports."""
    return float(f"{value:.4g}")
