"""Training steps on the calibrated rung against published ones: errors by source and GPU.

The factors (`simulator.stack`) were fitted on the runs of one folder; a run among them is no
evidence and is marked so. What a row leaves open is filled in as `validate.trainers` says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hwmodels.errors import InputError
from hwmodels.step_factors import StepFactors, shipped_factors
from validate.measurement import Measurement
from validate.runs import Run, digest, read_runs
from validate.step_fit import predicted_s


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAccuracy:
    """Errors of one source's runs on one GPU, as fractions; `bias` is their mean with its sign.

    `coverage_80` is the share of runs in the interval. `fitted` says that the factors have seen
    these runs, `left_out_mape` how far off they are without them. `assumed` counts runs whose
    plan the rows leave open in part.
    """

    source: str
    gpu: str
    n: int
    mape: float
    median_ape: float
    max_ape: float
    bias: float
    coverage_80: float
    fitted: int
    assumed: int
    left_out_mape: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Error:
    run: Run
    ratio: float


def step_accuracy(
    rows: Iterable[Measurement], factors: StepFactors | None = None
) -> tuple[StepAccuracy, ...]:
    """Tables of all runs whose framework is known; none where no factors are."""
    factors = factors or shipped_factors()
    if factors is None:
        return ()
    groups: dict[tuple[str, str], list[_Error]] = defaultdict(list)
    for run in read_runs(rows, assume=True)[0]:
        if run.stack is None:
            continue
        try:
            ratio = predicted_s(run, factors.values) / run.seconds
        except InputError:
            continue  # its rows are counted with their reason beside the bound
        groups[_table_of(run), run.row.gpu].append(_Error(run=run, ratio=ratio))
    return tuple(_table(*key, errors, factors) for key, errors in sorted(groups.items()))


def _table_of(run: Run) -> str:
    """The source and its table, without what differs from row to row of one table."""
    publisher, _, rest = run.row.source.partition("/")
    return f"{publisher} {rest.split('/')[0]}" if publisher.startswith("megatron") else publisher


def _table(source: str, gpu: str, errors: list[_Error], factors: StepFactors) -> StepAccuracy:
    off = np.array([e.ratio - 1 for e in errors])
    left_out = {f"{e.run.stack} {gpu}" for e in errors} & factors.left_out.keys()
    means = [factors.left_out[name] / 100 for name in left_out]
    return StepAccuracy(
        source=source,
        gpu=gpu,
        n=len(errors),
        mape=float(np.mean(np.abs(off))),
        median_ape=float(np.median(np.abs(off))),
        max_ape=float(np.max(np.abs(off))),
        bias=float(np.mean(off)),
        coverage_80=float(np.mean(np.abs(np.log1p(off)) <= factors.half_80)),
        fitted=sum(digest(e.run.row) in factors.rows for e in errors),
        assumed=sum(bool(e.run.assumed) for e in errors),
        left_out_mape=float(np.mean(means)) if means else None,
    )


def as_dicts(tables: Iterable[StepAccuracy]) -> list[Mapping[str, Any]]:
    """Plain numbers and strings."""
    return [asdict(t) for t in tables]
