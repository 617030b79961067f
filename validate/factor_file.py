"""Fitted factors of training steps as the file that `hwmodels.step_factors` reads.

Three fits write one each: dense models in 16 bits, narrow formats, mixtures of experts. What a file
says, and what the command around a fit does, is the same for all.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmodels.errors import InputError
from hwmodels.step_factors import KIND, SCHEMA
from hwmodels.step_ratios import digest_of
from validate.adapters import TRAINING_FAMILY
from validate.measurement import Measurement, csv_files, read
from validate.runs import METRICS, Run, digest, identity
from validate.steps import write_atomically

Ratios = NDArray[np.float64]


def factor_document(
    rows: Iterable[Measurement],
    runs: Sequence[Run],
    values: Mapping[str, float],
    priors: Mapping[str, tuple[float, float]],
    left_out: Mapping[str, Ratios],
    *,
    judged: Sequence[str],
    digits: int,
    on: datetime.date,
    **more: object,
) -> dict[str, Any]:
    """The file of factors fitted on `runs` of those rows.

    `priors` by factor as (value, spread); `left_out` has, by group of runs, predicted over measured
    where the fit had not seen the group; the groups `judged` give the intervals.
    """
    known = {identity(r.row) for r in runs}
    used = sorted({digest(r) for r in rows if r.op in METRICS and identity(r) in known})
    off = np.abs(np.log(np.concatenate([left_out[name] for name in judged])))
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "date": on.isoformat(),
        "rows_digest": digest_of(used),
        "num_runs": len(runs),
        "sources": sorted({r.row.source for r in runs}),
        "factors": {
            name: {
                "value": round(value, digits),
                "prior": priors[name][0],
                "spread": priors[name][1],
            }
            for name, value in values.items()
        },
        "half_80": round(float(np.quantile(off, 0.8)), digits),
        "half_90": round(float(np.quantile(off, 0.9)), digits),
        "left_out": {
            group: round(100 * float(np.mean(np.abs(ratios - 1))), 2)
            for group, ratios in left_out.items()
        },
        **more,
        "rows": used,
    }


def run_fit(
    module: str,
    description: str | None,
    output: Path,
    document: Callable[[Sequence[Measurement]], dict[str, Any]],
    arguments: Sequence[str] | None,
) -> int:
    """Fit on the folder given and write the file; 2, with one line, where that cannot be done."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("folder", metavar="DIR", type=Path, help="rows a calibration may use")
    parser.add_argument("--output", metavar="FILE", type=Path, default=output)
    given = parser.parse_args(arguments)
    try:
        rows = [row for f in csv_files(given.folder, TRAINING_FAMILY) for row in read(f).rows]
        written = document(rows)
        write_atomically(given.output, written)
    except (InputError, OSError) as error:
        print(f"{module}: error: {error}", file=sys.stderr)
        return 2
    for name, entry in written["factors"].items():
        print(f"{name:28} {entry['value']:8.5g}  prior {entry['prior']:g} +- {entry['spread']:g}")
    for name, mape in written["left_out"].items():
        print(f"left out {name:48} {mape:5.1f} %")
    return 0
