"""The two factors of mixtures of experts, fitted on published steps behind those of dense ones.

    minimise  sum over runs of (ln predicted / measured / SCATTER)^2, made robust,
              + sum over factors of (ln factor / prior / spread)^2

Every factor of dense and of low-precision steps stays as it is. Runs weigh alike, whatever their
release: the same configuration drifts by 1.0 to 1.7 between releases of the framework, which no
factor of ours knows. `python -m validate.moe_fit DIR` writes what `hwmodels.step_experts` reads.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from hwmodels.errors import InputError
from hwmodels.step_experts import EXPERTS_FILE, HOST_S, KERNELS, ExpertFactors
from hwmodels.step_factors import shipped_values
from validate.factor_file import factor_document, run_fit
from validate.measurement import Measurement
from validate.moe_runs import MoeRun, predictable, predicted_s, read_moe_runs

SCATTER: Final = 0.15
"""Half of what two releases differ by on one configuration: 1.15 to 1.68 (docs/accuracy.md)."""
PRIORS: Final[Mapping[str, tuple[float, float]]] = {KERNELS: (1.5, 0.7), HOST_S: (5e-3, 1.0)}
"""Value and spread of the logarithm: a framework's kernels are slower than serving's fused ones by
less than two or three times; a layer has several hundred launches of some ten microseconds each."""
STARTS: Final = ((0.0, 0.0), (0.0, 0.7), (0.4, 0.7))
"""Logarithms of factors over priors that the fit begins at."""
DIGITS: Final = 5


def fit(runs: Sequence[MoeRun], dense: Mapping[str, float]) -> ExpertFactors:
    """The factors that suit these runs best."""
    names = tuple(PRIORS)
    priors = np.array([PRIORS[name][0] for name in names])
    spreads = np.array([PRIORS[name][1] for name in names])

    def factors(logs: NDArray[np.float64]) -> ExpertFactors:
        return ExpertFactors.of(dict(zip(names, (priors * np.exp(logs)).tolist(), strict=True)))

    def residuals(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        off = np.log(ratios(runs, dense, factors(logs)))
        return np.concatenate((off / SCATTER, logs / spreads))

    # A run waits for the host or it does not: one begun on the wrong side may stay there.
    tried = [
        least_squares(residuals, start, loss="soft_l1", diff_step=1e-2, xtol=1e-4, ftol=1e-5)
        for start in STARTS
    ]
    return factors(min(tried, key=lambda found: float(found.cost)).x)


def ratios(
    runs: Sequence[MoeRun], dense: Mapping[str, float], experts: ExpertFactors
) -> NDArray[np.float64]:
    """Predicted over measured seconds."""
    return np.array([predicted_s(one, dense, experts) / one.run.seconds for one in runs])


GROUPS: Final[Mapping[str, Callable[[MoeRun], str]]] = {
    "release": lambda one: one.release,
    "model": lambda one: one.run.config.name,
    "gpu": lambda one: one.run.row.gpu,
}


def left_out(runs: Sequence[MoeRun], dense: Mapping[str, float]) -> dict[str, NDArray[np.float64]]:
    """Ratios of each release's, model's and GPU's runs where the factors were fitted without it."""
    found = {}
    for kind, group_of in GROUPS.items():
        for name in sorted({group_of(one) for one in runs}):
            others = [one for one in runs if group_of(one) != name]
            own = [one for one in runs if group_of(one) == name]
            if others:
                found[f"{kind} {name}"] = ratios(own, dense, fit(others, dense))
    return found


def document(rows: Iterable[Measurement], *, on: datetime.date) -> dict[str, Any]:
    """What `hwmodels.step_experts` reads, fitted on these rows."""
    rows, dense = tuple(rows), shipped_values()
    runs, _ = predictable(read_moe_runs(rows)[0], dense)
    if not runs:
        raise InputError(
            "no step of a mixture of experts among these rows; give steps_training.csv"
        )
    found, without = fit(runs, dense), left_out(runs, dense)
    return factor_document(
        rows, [one.run for one in runs], {KERNELS: found.kernels, HOST_S: found.host_s}, PRIORS,
        without, judged=[n for n in without if n.startswith("release")], digits=DIGITS, on=on,
    )  # fmt: skip


def _today(rows: Sequence[Measurement]) -> dict[str, Any]:
    return document(rows, on=datetime.date.today())


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m validate.moe_fit DIR`: fit the factors on a folder's steps_training.csv."""
    return run_fit("validate.moe_fit", main.__doc__, EXPERTS_FILE, _today, arguments)


if __name__ == "__main__":
    sys.exit(main())
