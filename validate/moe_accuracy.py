"""Steps of mixtures of experts against published ones: errors by release, algorithm and GPU.

Each release of a framework is told apart: one configuration drifts by 1.0 to 1.7 between two of
them, which no model of the configuration can know. Rows that drop tokens run another algorithm and
stand by themselves; so do the totals of both. Runs that the two factors were fitted on are counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from hwmodels.step_experts import ExpertFactors, shipped_experts
from hwmodels.step_factors import StepFactors, shipped_values
from validate.measurement import Measurement
from validate.moe_runs import DROPPING, MoeRun, predictable, predicted_s, read_moe_runs
from validate.runs import digest
from validate.step_accuracy import StepAccuracy

ALL: Final = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Error:
    one: MoeRun
    ratio: float


def moe_accuracy(
    rows: Iterable[Measurement],
    factors: StepFactors | None = None,
    dense: Mapping[str, float] | None = None,
) -> tuple[StepAccuracy, ...]:
    """Tables by publisher, release, algorithm and GPU, then totals; none where no factors are."""
    factors = factors or shipped_experts()
    if factors is None:
        return ()
    dense, experts = dense or shipped_values(), ExpertFactors.of(factors.values)
    runs, _ = predictable(read_moe_runs(rows)[0], dense)
    groups: dict[tuple[str, str], list[_Error]] = defaultdict(list)
    for one in runs:
        error = _Error(one=one, ratio=predicted_s(one, dense, experts) / one.run.seconds)
        for key in _tables_of(one):
            groups[key].append(error)
    totals = [key for key in groups if key[1] == ALL]
    apart = [key for key in groups if key[1] != ALL]
    return tuple(_table(*key, groups[key], factors) for key in (*sorted(apart), *sorted(totals)))


def _tables_of(one: MoeRun) -> tuple[tuple[str, str], tuple[str, str]]:
    """The table of a run, and the total that it is part of."""
    kind = "MoE, token drop" if one.algorithm == DROPPING else "MoE"
    source = f"{one.run.source} {one.release} {kind}"
    return (source, one.run.row.gpu), (f"{one.run.source} {kind}", ALL)


def _table(source: str, gpu: str, errors: list[_Error], factors: StepFactors) -> StepAccuracy:
    off = np.array([e.ratio - 1 for e in errors])
    return StepAccuracy(
        source=source,
        gpu=gpu,
        n=len(errors),
        mape=float(np.mean(np.abs(off))),
        median_ape=float(np.median(np.abs(off))),
        max_ape=float(np.max(np.abs(off))),
        bias=float(np.mean(off)),
        coverage_80=float(np.mean(np.abs(np.log1p(off)) <= factors.half_80)),
        fitted=sum(digest(e.one.run.row) in factors.rows for e in errors),
        assumed=len(errors),
        left_out_mape=_left_out(errors, factors),
    )


def _left_out(errors: list[_Error], factors: StepFactors) -> float | None:
    """Mean error of these releases' runs that a calibration may use, fitted without them."""
    means = [
        factors.left_out[name] / 100
        for name in sorted({f"release {e.one.release}" for e in errors})
        if name in factors.left_out
    ]
    return float(np.mean(means)) if means else None
