"""Training steps: how far published ones lie above the bound, fitted as ratios and reported.

    ratio = measured step / bound-rung step

`step_ratios` takes the median and the 10th and 90th percentile of the ratio over published runs,
by device and by architecture, from nine runs on; `python -m validate.steps DIR` writes them where
`hwmodels.step_ratios` reads them. `compare_steps` holds other runs against both: the bound, which
no run may beat, and the ratios, by which

    predicted = bound * median,    bound * p10 <= measured <= bound * p90  in 80 % of the runs

A run whose rows the ratios were fitted on is no evidence for them and left out of the last two.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hwmodels.errors import InputError
from hwmodels.step_ratios import (
    KIND,
    SCHEMA,
    STEPS_FILE,
    StepRatio,
    StepRatios,
    digest_of,
    shipped_ratios,
)
from simulator.estimate import BOUND
from simulator.step import training_step
from validate.adapters import TRAINING_FAMILY
from validate.measurement import Measurement, csv_files, read
from validate.runs import METRICS, Run, digest, identity, read_runs

K = TypeVar("K")

DIGITS = 4
ALL = "all"
NARROW = "trained in a narrow format: held against the calibrated rung, not the bound"
MIN_RUNS = 9
"""Fewest runs a ratio is fitted on: the range of n draws holds the next with (n - 1) / (n + 1),
which reaches 80 % at n = 9. A device with fewer runs is left to its architecture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A run beside its bound: the rung's answer, and the kernels alone (all exchange hidden)."""

    run: Run
    bound_s: float
    lower_s: float

    @property
    def ratio(self) -> float:
        """Measured over bound."""
        return self.run.seconds / self.bound_s


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTable:
    """Ratios of one publisher's runs on one GPU; the errors are over the `n_unseen` runs.

    `bound_mape` is that of the bound itself, `mape` that of bound * median. `scope` says whose
    ratios they are held against, None where there are none.
    """

    source: str
    gpu: str
    n: int
    median: float
    p10: float
    p90: float
    least: float
    faster_than_bound: int
    n_unseen: int = 0
    bound_mape: float | None = None
    mape: float | None = None
    coverage_80: float | None = None
    scope: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepComparison:
    """Tables by publisher and GPU, all of them together, and the other rows by reason.

    The runs of the tables and the rows by reason add up to the training rows given.
    """

    tables: tuple[StepTable, ...] = ()
    overall: StepTable | None = None
    reasons: tuple[tuple[str, int], ...] = ()

    @property
    def num_rows(self) -> int:
        """Training rows that were looked at."""
        return sum(t.n for t in self.tables) + sum(n for _, n in self.reasons)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and None."""
        return {
            "tables": [asdict(t) for t in self.tables],
            "overall": asdict(self.overall) if self.overall else None,
            "unsupported": [{"reason": reason, "n": n} for reason, n in self.reasons],
        }


def sample(run: Run) -> Sample:
    """The bound of a run; raises `InputError` where the device or a size allows none."""
    e = training_step(run.step, plan=run.plan, on=run.cluster, recipe=run.recipe)
    return Sample(run=run, bound_s=float(e.seconds), lower_s=float(e.lower_s))


def samples(rows: Iterable[Measurement]) -> tuple[tuple[Sample, ...], tuple[tuple[str, int], ...]]:
    """Every run among training rows with its bound; the other rows by reason, commonest first."""
    runs, others = read_runs(rows)
    reasons = Counter(reason for _, reason in others)
    found: list[Sample] = []
    for run in runs:
        if run.recipe.low is not None:
            reasons[NARROW] += 1
            continue
        try:
            found.append(sample(run))
        except InputError as why:
            reasons[str(why)] += 1
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return tuple(found), tuple(ordered)


# ---- fitting -------------------------------------------------------------------------------


def step_ratios(calib_rows: Iterable[Measurement], *, on: datetime.date) -> dict[str, Any]:
    """The document that `hwmodels.step_ratios` reads, fitted on these rows."""
    rows = tuple(calib_rows)
    found, _ = samples(rows)
    if not found:
        raise InputError("no training run among these rows; give a folder with steps_training.csv")
    runs = {identity(s.run.row) for s in found}
    # Every row that times a fitted run: its siblings are the same evidence in other words.
    used = sorted({digest(r) for r in rows if r.op in METRICS and identity(r) in runs})
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "rung": BOUND,
        "date": on.isoformat(),
        "rows_digest": digest_of(used),
        "devices": _fitted(found, lambda s: s.run.row.device_id),
        "architectures": _fitted(found, lambda s: s.run.cluster.device.architecture),
        "rows": used,
    }


def _fitted(
    found: Iterable[Sample], key: Callable[[Sample], str]
) -> dict[str, dict[str, Any]]:  # fmt: skip
    return {
        name: {
            "num_rows": len(members),
            **{k: round(v, DIGITS) for k, v in _quantiles(members).items()},
            "sources": sorted({s.run.row.source for s in members}),
        }
        for name, members in sorted(_grouped(found, key).items())
        if len(members) >= MIN_RUNS
    }


def _grouped(found: Iterable[Sample], key: Callable[[Sample], K]) -> dict[K, list[Sample]]:
    groups: dict[K, list[Sample]] = defaultdict(list)
    for s in found:
        groups[key(s)].append(s)
    return groups


def _quantiles(members: Sequence[Sample]) -> dict[str, float]:
    p10, median, p90 = np.quantile([s.ratio for s in members], (0.1, 0.5, 0.9))
    return {"median": float(median), "p10": float(p10), "p90": float(p90)}


# ---- comparing -----------------------------------------------------------------------------


def compare_steps(
    rows: Iterable[Measurement], *, ratios: StepRatios | None = None
) -> StepComparison:
    """Hold the training rows among `rows` against the bound and the ratios (default: shipped)."""
    ratios = ratios or shipped_ratios()
    found, reasons = samples(rows)
    groups = _grouped(found, lambda s: (s.run.source, s.run.row.gpu))
    return StepComparison(
        tables=tuple(
            _table(source, gpu, members, ratios)
            for (source, gpu), members in sorted(groups.items())
        ),
        overall=_table(ALL, ALL, found, ratios) if found else None,
        reasons=reasons,
    )


def _table(
    source: str, gpu: str, members: Sequence[Sample], ratios: StepRatios | None
) -> StepTable:
    spread = _quantiles(members)
    table = StepTable(
        source=source,
        gpu=gpu,
        n=len(members),
        median=spread["median"],
        p10=spread["p10"],
        p90=spread["p90"],
        least=min(s.ratio for s in members),
        faster_than_bound=sum(s.run.seconds < s.lower_s for s in members),
    )
    held = [(s, r) for s in members if (r := _evidence(s, ratios)) is not None]
    if not held:
        return table
    measured = np.array([s.ratio for s, _ in held])
    median, p10, p90 = np.array([(r.median, r.p10, r.p90) for _, r in held]).T
    return replace(
        table,
        n_unseen=len(held),
        bound_mape=float(np.mean(np.abs(1 - measured) / measured)),
        mape=float(np.mean(np.abs(median - measured) / measured)),
        coverage_80=float(np.mean((p10 <= measured) & (measured <= p90))),
        scope=" and ".join(sorted({r.scope for _, r in held})),
    )


def _evidence(s: Sample, ratios: StepRatios | None) -> StepRatio | None:
    """The ratio to hold a run against; None where it was fitted on that run, or is missing."""
    if ratios is None or digest(s.run.row) in ratios.rows:
        return None
    return ratios.ratio(s.run.row.device_id, s.run.cluster.device.architecture)


# ---- the command ---------------------------------------------------------------------------


def write_atomically(path: Path, document: Mapping[str, Any]) -> None:
    """JSON under that name, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m validate.steps DIR`: fit the ratios on a folder's steps_training.csv."""
    parser = argparse.ArgumentParser(prog="python -m validate.steps", description=main.__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="rows a calibration may use")
    parser.add_argument("--output", metavar="FILE", type=Path, default=STEPS_FILE)
    given = parser.parse_args(arguments)
    try:
        rows = [row for f in csv_files(given.folder, TRAINING_FAMILY) for row in read(f).rows]
        document = step_ratios(rows, on=datetime.date.today())
        write_atomically(given.output, document)
    except (InputError, OSError) as error:
        print(f"validate.steps: error: {error}", file=sys.stderr)
        return 2
    for name, entry in [*document["devices"].items(), *document["architectures"].items()]:
        figures = "  ".join(f"{k} {entry[k]:.2f}" for k in ("p10", "median", "p90"))
        print(f"{name:16} {entry['num_rows']:4} runs  {figures}")
    print(f"{given.output}: {document['rows_digest']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
