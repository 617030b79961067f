"""What calibrations are worth elsewhere: on other architectures, and after a few measurements."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from hwmodels import catalog
from hwmodels.calibration import Calibration, Residuals
from simulator.kernel_time import general
from simulator.kernel_time.basis import basis, kin
from simulator.kernel_time.rates import rates_of
from validate.batches import batches
from validate.calibrate import MIN_ROWS, SEED, components, fold, residuals_of, with_prior
from validate.fitting import Floats, Problem, fit, problem_of
from validate.measurement import Measurement

HELD_OUT: Final = 3
"""One shape in this many is held out of a ladder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Errors of one model on rows of one device that no fit saw, by how much was measured there.

    MAPEs as fractions over the same `num_held_out` rows: nothing measured (constants borrowed from
    other architectures), `num_fitted` rows, and all rows but those held out.
    """

    device_id: str
    model: str
    num_fitted: int
    num_held_out: int
    borrowed_mape: float | None
    few_mape: float
    all_mape: float


def ladder(
    rows: Sequence[Measurement],
    device_id: str,
    num_rows: int,
    *,
    models: Iterable[str] | None = None,
    donors: Sequence[Calibration],
) -> tuple[Step, ...]:
    """What `num_rows` measurements a model would buy on a device, by model.

    A third of the shapes is held out; the few are drawn from the rest, evenly at random.
    """
    mine = [r for r in rows if r.device_id == device_id]
    seconds = np.array([r.seconds or math.nan for r in mine], dtype=np.float64)
    family = kin(catalog.device(device_id))
    others = [c for c in donors if kin(catalog.device(c.device_id)) != family]
    found, _ = batches(mine)
    steps = []
    for part in components(problem_of(device_id, found, seconds)):
        names = {m.name for m in part.models}
        if models is not None and not names & set(models):
            continue
        step = _step(with_prior(part, others), mine, num_rows, others)
        if step is not None:
            steps.append(step)
    return tuple(steps)


def _step(
    problem: Problem, rows: Sequence[Measurement], num_rows: int, others: Sequence[Calibration]
) -> Step | None:
    """One rung of the ladder; None where too few rows are left to hold out."""
    held_out = np.array([fold(rows[i], HELD_OUT) == 0 for i in problem.rows], dtype=bool)
    held, kept = problem.rows[held_out], problem.rows[~held_out]
    if len(held) < MIN_ROWS or len(kept) <= num_rows:
        return None
    few = np.random.default_rng(SEED).choice(kept, num_rows, replace=False)
    thetas = [fit(problem, few).theta, fit(problem, kept).theta]
    few_mape, all_mape = (
        _mape(problem.predicted(theta), problem.seconds, held) for theta in thetas
    )
    borrowed = _borrowed_seconds(problem, others)
    return Step(
        device_id=problem.device.id,
        model="+".join(dict.fromkeys(m.name for m in problem.models)),
        num_fitted=num_rows,
        num_held_out=len(held),
        borrowed_mape=None if borrowed is None else _mape(borrowed, problem.seconds, held),
        few_mape=few_mape,
        all_mape=all_mape,
    )


def _mape(predicted: Floats, measured: Floats, where: Any) -> float:
    return float(np.mean(np.abs(predicted[where] / measured[where] - 1)))


def _borrowed_seconds(problem: Problem, others: Sequence[Calibration]) -> Floats | None:
    """Seconds of the problem's rows under other calibrations; None where a model is missing."""
    have = {name for c in others for name in c.models}
    if not all(m.name in have for m in problem.models):
        return None
    total = np.zeros(len(problem.seconds))
    rates = rates_of(problem.device)
    for batch, model in zip(problem.batches, problem.models, strict=True):
        labels = model.labels(batch.op, batch.conditions)
        constants = basis(problem.device, model, others).narrowed(labels).constants(labels)
        time = model.time(batch.op, rates, constants, batch.conditions)
        np.add.at(total, batch.where, np.broadcast_to(time.seconds, len(batch.where)))
    return total


def with_transfer(
    calibrations: Sequence[Calibration],
    rows: Sequence[Measurement],
    more_donors: Sequence[Calibration] = (),
) -> tuple[Calibration, ...]:
    """Each file with the residuals of predicting its rows from other architectures only.

    These are the other files given, and `more_donors`.
    """
    done = []
    for mine in calibrations:
        family = kin(catalog.device(mine.device_id))
        others = [
            c for c in (*calibrations, *more_donors) if kin(catalog.device(c.device_id)) != family
        ]
        models = {
            name: replace(entry, transfer=_transfer(mine.device_id, name, others, rows))
            for name, entry in mine.models.items()
        }
        done.append(replace(mine, models=models))
    return tuple(done)


def _transfer(
    device_id: str, name: str, others: Sequence[Calibration], rows: Sequence[Measurement]
) -> Residuals | None:
    """Residuals of one model's rows under the other architectures' constants."""
    if not any(name in c.models for c in others):
        return None
    mine = [r for r in rows if r.device_id == device_id]
    seconds = np.array([r.seconds or math.nan for r in mine], dtype=np.float64)
    found, _ = batches(mine)
    forced = general.MODEL if name == general.MODEL.name else None
    whole = problem_of(device_id, found, seconds, forced)
    keep = [i for i, m in enumerate(whole.models) if m.name == name]
    if not keep:
        return None
    part = replace(
        whole,
        batches=tuple(whole.batches[i] for i in keep),
        models=tuple(whole.models[i] for i in keep),
    )
    total = _borrowed_seconds(part, others)
    if total is None:
        return None
    return residuals_of(np.log(seconds[part.rows] / total[part.rows]))
