"""Training steps on the calibrated rung against published ones: errors by source and GPU.

The factors (`simulator.stack`) were fitted on the runs of one folder; a run among them is no
evidence and is marked so. What a row leaves open is filled in as `validate.trainers` says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hwmodels import catalog
from hwmodels.errors import InputError
from hwmodels.step_factors import StepFactors, shipped_factors, shipped_low_precision
from validate.low_precision_fit import group_of as narrow_group_of
from validate.measurement import Measurement
from validate.published_steps import KORTHIKANTI, korthikanti
from validate.runs import Run, digest, read_runs
from validate.step_fit import group_of, mfu_of, predicted_s, table_of


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAccuracy:
    """Errors of one source's runs on one GPU, as fractions; `bias` is their mean with its sign.

    `coverage_80` is the share of runs in the interval. `fitted` says that the factors have seen
    these runs, `left_out_mape` how far off they are without them. `assumed` counts runs whose
    plan the rows leave open in part. `mfu_mape` is that of one share of the peak for all runs of a
    device, the median of those that the factors were fitted on (None where it has none of 16 bits).
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
    mfu_mape: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Error:
    run: Run
    ratio: float
    mfu_ratio: float | None = None


def step_accuracy(
    rows: Iterable[Measurement], factors: StepFactors | None = None
) -> tuple[StepAccuracy, ...]:
    """Tables of all runs whose framework is known; none where no factors are."""
    narrow = shipped_low_precision() if factors is None else None
    factors = factors or shipped_factors()
    if factors is None:
        return ()
    errors = _errors(read_runs(rows, assume=True)[0], factors, narrow)
    groups: dict[tuple[str, str], list[_Error]] = defaultdict(list)
    for e in errors:
        groups[_table_of(e.run), e.run.row.gpu].append(e)
    tables = [
        _table(*key, members, (narrow or factors) if members[0].run.recipe.low else factors)
        for key, members in sorted(groups.items())
    ]
    return (*tables, *_totals(errors, factors))


def published_accuracy() -> tuple[StepAccuracy, ...]:
    """The same of steps that papers publish (`validate.published_steps`), whatever the files."""
    factors = shipped_factors()
    if factors is None:
        return ()
    errors = _errors(read_runs(korthikanti())[0], factors, None)
    return (_table(KORTHIKANTI, errors[0].run.row.gpu, errors, factors),)


def _errors(runs: Iterable[Run], factors: StepFactors, narrow: StepFactors | None) -> list[_Error]:
    """Predicted over measured of every run whose framework is known."""
    values = {**factors.values, **(narrow.values if narrow is not None else {})}
    found = []
    for run in runs:
        if run.stack is None:
            continue
        try:
            ratio = predicted_s(run, values) / run.seconds
        except InputError:
            continue  # its rows are counted with their reason beside the bound
        found.append(_Error(run=run, ratio=ratio, mfu_ratio=_mfu_ratio(run, factors)))
    return found


def _mfu_ratio(run: Run, factors: StepFactors) -> float | None:
    """Predicted over measured where every run of a device reaches the same share of its peak.

    A device without one takes the mean over its architecture.
    """
    device = run.cluster.device
    kin = [
        v for n, v in factors.mfu.items() if catalog.device(n).architecture == device.architecture
    ]
    mfu = factors.mfu.get(device.id, float(np.mean(kin)) if kin else None)
    return None if mfu is None or run.recipe.low is not None else mfu_of(run) / mfu


def _totals(errors: Sequence[_Error], factors: StepFactors) -> list[StepAccuracy]:
    """All dense runs that no fit has seen, those in 16 bits and with narrow formats."""
    narrow = shipped_low_precision()
    seen = factors.rows | (narrow.rows if narrow is not None else frozenset())
    unseen = [e for e in errors if e.run.config.moe is None and digest(e.run.row) not in seen]
    wide = [e for e in unseen if e.run.recipe.low is None]
    chosen = (("all dense, 16 bits", wide), ("all dense", unseen))
    return [
        _table(name, "all, not fitted", members, factors)
        for name, members in chosen
        if members and (name == chosen[0][0] or len(members) > len(wide))
    ]


def _table_of(run: Run) -> str:
    """The source and its table, without what differs from row to row of one table.

    Steps in a narrow format are families of their own, by recipe.
    """
    if run.recipe.low is not None:
        return f"{run.source} {run.recipe.name}"
    return table_of(run)


def _table(source: str, gpu: str, errors: list[_Error], factors: StepFactors) -> StepAccuracy:
    off = np.array([e.ratio - 1 for e in errors])
    names = {_group(e.run) for e in errors}
    left_out = names & factors.left_out.keys()
    means = [factors.left_out[name] / 100 for name in left_out]
    alone = [e.mfu_ratio for e in errors if e.mfu_ratio is not None]
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
        mfu_mape=float(np.mean(np.abs(np.array(alone) - 1))) if len(alone) == len(errors) else None,
    )


def _group(run: Run) -> str:
    """The name under which a fit left this run's table out."""
    return narrow_group_of(run) if run.recipe.low is not None else group_of(run)


def as_dicts(tables: Iterable[StepAccuracy]) -> list[Mapping[str, Any]]:
    """Plain numbers and strings."""
    return [asdict(t) for t in tables]
