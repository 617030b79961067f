"""Factors of training steps, fitted on published ones: a weighted least-squares fit with priors.

    minimise  sum over sources of the root of their runs times the mean of robust(z)^2
              + sum over factors of (ln factor / prior / spread)^2
    z         ln (predicted / measured) / SCATTER
    robust(z) R sqrt(ln(1 + (z / R)^2)): a run that lies far from its table's others (an allocator
              short of memory, a busy network) counts little, in a long table as in a short one

Every source and GPU weighs as much as the root of its runs, so that a table of seventy rows does
not drown one of four. `python -m validate.step_fit DIR` writes what `hwmodels.step_factors` reads.
"""

from __future__ import annotations

import datetime
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from hwmodels.errors import InputError
from hwmodels.step_factors import FACTORS_FILE
from simulator.stack import OnDevice, factor_names, factors_of, prior_of, stack
from simulator.step import training_step
from validate.factor_file import factor_document, run_fit
from validate.measurement import Measurement
from validate.runs import Run, read_runs

SCATTER: Final = 0.05
"""Half of what two releases of one framework differ by on one configuration (dense models)."""
ROBUST: Final = 2.0
_SEVERAL_TABLES: Final = ("megatron-lm", "torchtitan")
"""Publishers whose tables are years or releases apart."""
DIGITS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Factors by name, and the runs they were fitted on with ln(predicted / measured)."""

    values: Mapping[str, float]
    runs: tuple[Run, ...]
    errors: NDArray[np.float64]


def predicted_s(run: Run, values: Mapping[str, float]) -> float:
    """Seconds of a run on the calibrated rung: of its possible plans, the fastest."""
    assert run.stack is not None
    framework = stack(run.stack)
    device = run.cluster.device
    on_device = OnDevice(stack=framework, factors=factors_of(framework, device, values))
    e = training_step(run.step, plan=run.plan, on=run.cluster, recipe=run.recipe, stack=on_device)
    return float(np.min(e.seconds))


def group_of(run: Run) -> str:
    """Runs that share a publisher's table and a GPU."""
    return f"{table_of(run)} {run.row.gpu}"


def table_of(run: Run) -> str:
    """The publisher and its table, without what differs from row to row of one table."""
    publisher, _, rest = run.row.source.partition("/")
    return f"{publisher} {rest.split('/')[0]}" if publisher in _SEVERAL_TABLES else publisher


def fit(runs: Sequence[Run], start: Mapping[str, float] | None = None) -> Fit:
    """The factors that the runs' frameworks and devices use, from these runs.

    The search starts at `start`, at the priors where that says nothing.
    """
    names = sorted(
        {n for r in runs if r.stack for n in factor_names(stack(r.stack), r.cluster.device)}
    )
    priors = np.array([prior_of(n)[0] for n in names])
    spreads = np.array([prior_of(n)[1] for n in names])
    sizes = Counter(group_of(r) for r in runs)
    weights = np.array([sizes[group_of(r)] ** -0.25 for r in runs])
    measured = np.array([r.seconds for r in runs])

    def errors(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        values = dict(zip(names, (priors * np.exp(logs * spreads)).tolist(), strict=True))
        found: NDArray[np.float64] = np.log([predicted_s(r, values) for r in runs] / measured)
        return found

    def residuals(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate((robust(errors(logs) / SCATTER) * weights, logs))

    found = least_squares(
        residuals,
        [
            math.log((start or {}).get(n, p) / p) / s
            for n, p, s in zip(names, priors, spreads, strict=True)
        ],
        diff_step=1e-3,
        ftol=1e-4,
        xtol=1e-3,
    )
    best = priors * np.exp(found.x * spreads)
    return Fit(
        values=dict(zip(names, best.tolist(), strict=True)),
        runs=tuple(runs),
        errors=errors(found.x),
    )


def robust(z: NDArray[np.float64]) -> NDArray[np.float64]:
    """Residuals whose squares grow as a logarithm beyond ROBUST (Cauchy's loss)."""
    found: NDArray[np.float64] = np.sign(z) * ROBUST * np.sqrt(np.log1p((z / ROBUST) ** 2))
    return found


def left_out(
    runs: Sequence[Run], start: Mapping[str, float] | None = None
) -> dict[str, NDArray[np.float64]]:
    """Predicted over measured of each group's runs where the factors were fitted without them."""
    found = {}
    for group in sorted({group_of(r) for r in runs}):
        values = fit([r for r in runs if group_of(r) != group], start).values
        own = [r for r in runs if group_of(r) == group]
        found[group] = np.array([predicted_s(r, values) / r.seconds for r in own])
    return found


def fitted_runs(rows: Iterable[Measurement]) -> list[Run]:
    """Runs of dense models in 16 bits by a known framework: what the factors are fitted on."""
    runs = read_runs(rows, assume=True)[0]
    return [
        r for r in runs if r.stack is not None and r.recipe.low is None and r.config.moe is None
    ]


def mfu_of(run: Run) -> float:
    """Share of the peak that the run's model flops took; causal attention counts half."""
    peak = run.cluster.device.matmul_rate_flops_per_s(run.recipe.dtype)[0]
    ranks = float(np.max(run.plan.num_ranks))
    return float(run.step.model_flops) / (run.seconds * ranks * peak)


def median_mfu(runs: Sequence[Run]) -> dict[str, float]:
    """The median by device, by the id of the device."""
    found: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        found[run.cluster.device.id].append(mfu_of(run))
    return {name: float(np.median(values)) for name, values in sorted(found.items())}


def document(rows: Iterable[Measurement], *, on: datetime.date) -> dict[str, Any]:
    """What `hwmodels.step_factors` reads, fitted on these rows."""
    rows = tuple(rows)
    runs = fitted_runs(rows)
    runs = [r for r in runs if r.recipe.low is None]  # those have a fit of their own
    if not runs:
        raise InputError("no training run among these rows; give a folder with steps_training.csv")
    found = fit(runs)
    without = left_out(runs, found.values)
    return factor_document(
        rows, runs, found.values, {name: prior_of(name) for name in found.values}, without,
        judged=tuple(without), digits=DIGITS, on=on,
        mfu={name: round(value, DIGITS) for name, value in median_mfu(runs).items()},
    )  # fmt: skip


def _today(rows: Sequence[Measurement]) -> dict[str, Any]:
    return document(rows, on=datetime.date.today())


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m validate.step_fit DIR`: fit the factors on a folder's steps_training.csv."""
    return run_fit("validate.step_fit", main.__doc__, FACTORS_FILE, _today, arguments)


if __name__ == "__main__":
    sys.exit(main())
