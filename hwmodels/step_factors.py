"""Factors of training steps: what frameworks and long runs add to kernels, fitted, as data.

`data/steps/factors.json` holds a value for each factor of `simulator.stack`, by the
name that devices or frameworks share, with its prior, how it was found and how far runs scatter
around the model. It is written by `python -m validate.step_fit`; there is no fitting code here.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Final

from hwmodels._json import JsonObject, read_json
from hwmodels.catalog import DATA
from hwmodels.frozen import FrozenDict
from hwmodels.step_ratios import digest_of

SCHEMA: Final = 1
KIND: Final = "step-factors"
FACTORS_FILE: Final = DATA / "steps" / "factors.json"
LOW_PRECISION_FILE: Final = DATA / "steps" / "low_precision.json"
"""Factors that only recipes of low-precision training use, fitted behind the others."""
_TOP: Final = frozenset(
    {"schema", "kind", "date", "rows_digest", "rows", "num_runs", "sources", "factors",
     "half_80", "half_90", "left_out"}
)  # fmt: skip
_MFU: Final = frozenset({"mfu"})
_ENTRY: Final = frozenset({"value", "prior", "spread"})


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFactors:
    """One file. `values` by 'class/name' ('product/h100-sxm', 'pointwise/eager').

    `priors` and `spreads` are what the fit held them to. `left_out` is the mean error in % of each
    table's runs where the factors were fitted without it; `half_80` and `half_90`, half widths of
    a step's interval in log time, hold that share of those errors. `mfu`, where it is given, is the
    median share of the peak that the runs of a device reach: the constant of the simplest model.
    """

    date: datetime.date
    num_runs: int
    sources: tuple[str, ...]
    rows_digest: str
    rows: frozenset[str]
    values: Mapping[str, float]
    priors: Mapping[str, float]
    spreads: Mapping[str, float]
    half_80: float
    half_90: float
    left_out: Mapping[str, float]
    mfu: Mapping[str, float] = field(default_factory=FrozenDict)


@lru_cache(maxsize=1)
def shipped_factors() -> StepFactors | None:
    """The shipped file; None where none was ever fitted."""
    return read_step_factors(FACTORS_FILE) if FACTORS_FILE.exists() else None


@lru_cache(maxsize=1)
def shipped_low_precision() -> StepFactors | None:
    """The shipped factors of low-precision training; None where none were ever fitted."""
    return read_step_factors(LOW_PRECISION_FILE) if LOW_PRECISION_FILE.exists() else None


def shipped_values() -> Mapping[str, float]:
    """Every shipped factor by name; none of one file is in the other."""
    files = (shipped_factors(), shipped_low_precision())
    return {name: v for file in files if file is not None for name, v in file.values.items()}


def read_step_factors(path: Path) -> StepFactors:
    """One file, read strictly; whatever is wrong is a `SpecError` that names the key."""
    top = JsonObject(path, "", read_json(path))
    top.expect(_TOP | (_MFU & top.values.keys()))
    if top.values["schema"] != SCHEMA or isinstance(top.values["schema"], bool):
        top.fail("schema", f"is not {SCHEMA}", "write it with this version's `validate.step_fit`")
    if top.values["kind"] != KIND:
        top.fail("kind", f"is not '{KIND}'", "give a file of training-step factors")
    rows_digest, rows = top.sha256("rows_digest"), top.digests("rows")
    if digest_of(rows) != rows_digest:
        top.fail("rows_digest", "is not the digest of `rows`", "fit the file again")
    group = top.child("factors")
    entries = {name: group.child(name) for name in group.values}
    for entry in entries.values():
        entry.expect(_ENTRY)
    left_out = top.child("left_out")
    mfu = top.child("mfu") if "mfu" in top.values else None
    return StepFactors(
        date=top.date("date"),
        num_runs=top.count("num_runs"),
        sources=top.texts("sources"),
        rows_digest=rows_digest,
        rows=frozenset(rows),
        values={name: entry.positive("value") for name, entry in entries.items()},
        priors={name: entry.positive("prior") for name, entry in entries.items()},
        spreads={name: entry.positive("spread") for name, entry in entries.items()},
        half_80=top.positive("half_80"),
        half_90=top.positive("half_90"),
        left_out={name: left_out.positive(name) for name in left_out.values},
        mfu={name: mfu.positive(name) for name in mfu.values} if mfu is not None else FrozenDict(),
    )
