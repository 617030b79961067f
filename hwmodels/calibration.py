"""Calibrations of the kernel-time model: fitted constants of one device, with their provenance.

A file (`hwmodels/data/calibrations/<device>.json`, schema 2, kind `kernel-time`) is written by
`ridgeplan calibrate`; it names the digest of every row it was fitted on, so that these rows can be
refused as evidence. There is no fitting code here. Residuals are log(measured / predicted).
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Final

from hwmodels._json import JsonObject, read_json
from hwmodels.catalog import DATA
from hwmodels.step_ratios import digest_of

SCHEMA: Final = 2
KIND: Final = "kernel-time"
FOLDER: Final = DATA / "calibrations"
LEVELS: Final = tuple(i / 40 for i in range(1, 40))
"""Probabilities at which signed residuals are kept."""
POOLED: Final = "all"
"""The regime that stands for all of a model's rows."""
STATUSES: Final = ("fitted", "at bound", "unidentified", "fixed")

_TOP: Final = frozenset({"schema", "kind", "device", "date", "rows_digest", "rows", "models"})
_MODEL: Final = frozenset(
    {"num_rows", "usual_kernel", "sources", "constants", "residuals", "transfer"}
)
_CONSTANT: Final = frozenset({"value", "status", "factors"})
_RESIDUALS: Final = frozenset({"num_rows", "q80", "q90", "quantiles"})


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedConstant:
    """One constant: its base value, what the data said of it, and factors by label values.

    A factor's key joins the label values with '|'; the value under these labels is
    `value * factor`. `status` is one of `STATUSES`.
    """

    value: float
    status: str
    factors: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Residuals:
    """How far measurements lay from predictions of rows not fitted on, as log ratios.

    `q80`, `q90`: split-conformal quantiles of |log(measured / predicted)|; `quantiles` the
    signed ones at `LEVELS`.
    """

    num_rows: int
    q80: float
    q90: float
    quantiles: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCalibration:
    """The constants of one kernel model on one device.

    `residuals` are cross-validated, by group (a kernel, a regime, both) and under 'all';
    `transfer` those of predicting these rows from the other architectures (None where there is no
    other). `usual_kernel` is the label that most rows carry: what a run of unnamed kernel is taken
    for.
    """

    device_id: str
    date: datetime.date
    num_rows: int
    usual_kernel: str
    sources: tuple[str, ...]
    constants: Mapping[str, FittedConstant]
    residuals: Mapping[str, Residuals]
    transfer: Residuals | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """One device's file: its kernel models and the digests of the rows they were fitted on."""

    device_id: str
    date: datetime.date
    rows_digest: str
    rows: frozenset[str]
    models: Mapping[str, ModelCalibration]


@lru_cache(maxsize=1)
def shipped() -> tuple[Calibration, ...]:
    """The calibrations that come with the package, by device id."""
    found = sorted(FOLDER.glob("*.json"))
    return tuple(read_calibration(f) for f in found if f.name != "steps-bound.json")


def read_calibration(path: Path) -> Calibration:
    """One file, read strictly; whatever is wrong is a `SpecError` that names the key."""
    top = JsonObject(path, "", read_json(path))
    if "schema" in top.values and (
        top.values["schema"] != SCHEMA or isinstance(top.values["schema"], bool)
    ):
        top.fail("schema", f"is not {SCHEMA}", "fit it again with this version's `calibrate`")
    top.expect(_TOP)
    if top.values["kind"] != KIND:
        top.fail("kind", f"is not '{KIND}'", "give a file that `ridgeplan calibrate` wrote")
    rows = top.texts("rows")
    if digest_of(rows) != top.sha256("rows_digest"):
        top.fail("rows_digest", "is not the digest of `rows`", "fit the file again")
    device_id, date = top.text("device"), top.date("date")
    group = top.child("models")
    models = {name: _model(group.child(name), device_id, date) for name in group.values}
    return Calibration(
        device_id=device_id,
        date=date,
        rows_digest=top.text("rows_digest"),
        rows=frozenset(rows),
        models=models,
    )


def _model(entry: JsonObject, device_id: str, date: datetime.date) -> ModelCalibration:
    entry.expect(_MODEL)
    constants, residuals = entry.child("constants"), entry.child("residuals")
    transfer = None if entry.values["transfer"] is None else entry.child("transfer")
    if POOLED not in residuals.values:
        residuals.fail(POOLED, "missing", "fit the file again")
    return ModelCalibration(
        device_id=device_id,
        date=date,
        num_rows=entry.count("num_rows"),
        usual_kernel=str(entry.values["usual_kernel"]),
        sources=entry.texts("sources"),
        constants={name: _constant(constants.child(name)) for name in constants.values},
        residuals={name: _residuals(residuals.child(name)) for name in residuals.values},
        transfer=None if transfer is None else _residuals(transfer),
    )


def _constant(entry: JsonObject) -> FittedConstant:
    entry.expect(_CONSTANT)
    status, factors = entry.text("status"), entry.child("factors")
    if status not in STATUSES:
        entry.fail("status", f"is '{status}'", f"it is one of {', '.join(STATUSES)}")
    return FittedConstant(
        value=entry.positive("value"),
        status=status,
        factors={label: factors.positive(label) for label in factors.values},
    )


def _residuals(entry: JsonObject) -> Residuals:
    entry.expect(_RESIDUALS)
    quantiles = entry.numbers("quantiles")
    if len(quantiles) != len(LEVELS) or any(a > b for a, b in pairwise(quantiles)):
        entry.fail("quantiles", f"are not {len(LEVELS)} rising numbers", "fit the file again")
    q80, q90 = entry.positive("q80"), entry.positive("q90")
    if not q80 <= q90 < math.inf:
        entry.fail("q90", "is below q80", "fit the file again")
    return Residuals(num_rows=entry.count("num_rows"), q80=q80, q90=q90, quantiles=quantiles)
