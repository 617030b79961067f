"""Factors of low-precision training, fitted on published steps behind those of 16-bit training.

    narrow/ARCHITECTURE   products in a narrow format over the kernel models' times, beyond what
                          long runs cost products in 16 bits
    quantise              kernels that cast over streaming kernels of the same bytes
    pointwise/fused       maps of stacks that only train in narrow formats here (Megatron-Bridge)

The factors of `validate.step_fit` are fitted first, on 16-bit steps, and stay as they are: rows of
another format must not move them. The same least-squares fit with priors finds the rest.
`python -m validate.low_precision_fit DIR` writes what `hwmodels.step_factors` reads beside the
other file.
"""

from __future__ import annotations

import datetime
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from hwmodels.errors import InputError
from hwmodels.step_factors import LOW_PRECISION_FILE, shipped_factors
from simulator.stack import POINTWISE, factor_names, narrow_factor_names, prior_of, stack
from validate.factor_file import factor_document, run_fit
from validate.measurement import Measurement
from validate.runs import Run, read_runs
from validate.step_fit import DIGITS, ROBUST, SCATTER, predicted_s

MAPS: Final = f"{POINTWISE}/"
"""Of a stack's own factors, only its maps may be free here. All others that 16-bit steps left out
keep their priors: of a device without such steps, `narrow` is fitted beside its products'."""


def group_of(run: Run) -> str:
    """Runs of one framework in one recipe on one GPU."""
    return f"{run.stack} {run.recipe.name} {run.row.gpu}"


def free_names(runs: Iterable[Run], frozen: Mapping[str, float]) -> list[str]:
    """The factors of these runs that 16-bit steps have not settled."""
    names: set[str] = set()
    for run in runs:
        if run.stack is not None:
            device = run.cluster.device
            maps = {n for n in factor_names(stack(run.stack), device) if n.startswith(MAPS)}
            names |= {*maps, *narrow_factor_names(device)}
    return sorted(names - frozen.keys())


def fit(runs: Sequence[Run], frozen: Mapping[str, float]) -> dict[str, float]:
    """The factors that are free, from these runs."""
    names = free_names(runs, frozen)
    priors = np.array([prior_of(n)[0] for n in names])
    spreads = np.array([prior_of(n)[1] for n in names])
    sizes = Counter(group_of(r) for r in runs)
    weights = np.array([sizes[group_of(r)] ** -0.5 for r in runs])
    measured = np.array([r.seconds for r in runs])

    def values_at(logs: NDArray[np.float64]) -> dict[str, float]:
        return dict(zip(names, (priors * np.exp(logs * spreads)).tolist(), strict=True))

    def residuals(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        values = {**frozen, **values_at(logs)}
        off = np.log([predicted_s(r, values) for r in runs] / measured)
        return np.concatenate((off * weights / SCATTER, logs))

    found = least_squares(
        residuals, np.zeros(len(names)), loss="soft_l1", f_scale=ROBUST, diff_step=1e-3,
        ftol=1e-4, xtol=1e-3,
    )  # fmt: skip
    return values_at(found.x)


def left_out(runs: Sequence[Run], frozen: Mapping[str, float]) -> dict[str, NDArray[np.float64]]:
    """Predicted over measured of each publisher's runs where these were fitted without them."""
    found = {}
    for group in sorted({group_of(r) for r in runs}):
        own = [r for r in runs if group_of(r) == group]
        values = {**frozen, **fit([r for r in runs if group_of(r) != group], frozen)}
        found[group] = np.array([predicted_s(r, values) / r.seconds for r in own])
    return found


def low_precision_runs(rows: Iterable[Measurement]) -> list[Run]:
    """Runs in a narrow format by a known framework."""
    runs = read_runs(rows, assume=True)[0]
    return [r for r in runs if r.stack is not None and r.recipe.low is not None]


def document(
    rows: Iterable[Measurement], frozen: Mapping[str, float], *, on: datetime.date
) -> dict[str, Any]:
    """What `hwmodels.step_factors` reads, fitted on these rows."""
    rows = tuple(rows)
    runs = low_precision_runs(rows)
    if not runs:
        raise InputError("no low-precision step among these rows; give a steps_training.csv folder")
    values, without = fit(runs, frozen), left_out(runs, frozen)
    return factor_document(
        rows, runs, values, {name: prior_of(name) for name in values}, without,
        judged=tuple(without), digits=DIGITS, on=on,
    )  # fmt: skip


def _today(rows: Sequence[Measurement]) -> dict[str, Any]:
    frozen = shipped_factors()
    if frozen is None:
        raise InputError("factors of 16-bit steps come first; run python -m validate.step_fit")
    return document(rows, frozen.values, on=datetime.date.today())


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m validate.low_precision_fit DIR`: fit on a folder's steps_training.csv."""
    return run_fit(
        "validate.low_precision_fit", main.__doc__, LOW_PRECISION_FILE, _today, arguments
    )


if __name__ == "__main__":
    sys.exit(main())
