"""How far real training steps lie above the bound: ratios fitted on published steps, as data.

    r = measured step / bound-rung step

`data/calibrations/steps-bound.json` holds the median and the 10th and 90th percentile of r for
each device and each architecture, with the digests of the rows they were fitted on, so that those
rows can be refused as evidence. It is written by `python -m validate.steps`; there is no fitting
code here.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from hwmodels._json import JsonObject, read_json
from hwmodels.catalog import DATA

SCHEMA: Final = 1
KIND: Final = "step-ratio"
STEPS_FILE: Final = DATA / "calibrations" / "steps-bound.json"
DEVICE, ARCHITECTURE = "device", "architecture"

_TOP: Final = frozenset(
    {"schema", "kind", "rung", "date", "rows_digest", "rows", "devices", "architectures"}
)
_ENTRY: Final = frozenset({"num_rows", "median", "p10", "p90", "sources"})


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRatio:
    """Measured over bound-rung seconds of `num_rows` published training steps.

    A step that the bound rung puts at t took `median` t in the middle case, and between `p10` t
    and `p90` t in four of five. `scope` says what the rows have in common with the device that
    was asked for: 'device', or 'architecture' only. `rows_digest` is the sha256 of the rows of
    the whole file, `source` names where they were published.
    """

    num_rows: int
    median: float
    p10: float
    p90: float
    rows_digest: str
    source: str
    scope: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRatios:
    """One file: ratios by device id and by architecture, and the digest of every row used."""

    date: datetime.date
    rung: str
    rows_digest: str
    rows: frozenset[str]
    devices: Mapping[str, StepRatio]
    architectures: Mapping[str, StepRatio]

    def ratio(self, device_id: str, architecture: str) -> StepRatio | None:
        """The ratio of that device, else of its architecture, else None."""
        return self.devices.get(device_id) or self.architectures.get(architecture)


def step_ratio(device_id: str, architecture: str) -> StepRatio | None:
    """What the shipped file holds for that device, else for its architecture, else None.

    >>> found = step_ratio("a100-sxm4-80gb", "Ampere")
    >>> found.scope, 1 < found.p10 <= found.median <= found.p90
    ('device', True)
    >>> step_ratio("mi300x", "CDNA3") is None
    True
    """
    ratios = shipped_ratios()
    return None if ratios is None else ratios.ratio(device_id, architecture)


@lru_cache(maxsize=1)
def shipped_ratios() -> StepRatios | None:
    """The shipped file; None where none was ever fitted."""
    return read_step_ratios(STEPS_FILE) if STEPS_FILE.exists() else None


def digest_of(rows: Iterable[str]) -> str:
    """sha256 of a set of row digests, the same in any order."""
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()


def read_step_ratios(path: Path) -> StepRatios:
    """One file, read strictly; whatever is wrong is a `SpecError` that names the key."""
    top = JsonObject(path, "", read_json(path))
    top.expect(_TOP)
    if top.values["schema"] != SCHEMA or isinstance(top.values["schema"], bool):
        top.fail("schema", f"is not {SCHEMA}", "write it with this version's `validate.steps`")
    if top.values["kind"] != KIND:
        top.fail("kind", f"is not '{KIND}'", "give a file of training-step ratios")
    rows_digest, rows = top.sha256("rows_digest"), top.digests("rows")
    if digest_of(rows) != rows_digest:
        top.fail("rows_digest", "is not the digest of `rows`", "fit the file again")
    return StepRatios(
        date=top.date("date"),
        rung=top.text("rung"),
        rows_digest=rows_digest,
        rows=frozenset(rows),
        devices=_ratios(top, "devices", rows_digest, DEVICE),
        architectures=_ratios(top, "architectures", rows_digest, ARCHITECTURE),
    )


def _ratios(top: JsonObject, key: str, rows_digest: str, scope: str) -> Mapping[str, StepRatio]:
    group = top.child(key)
    found: dict[str, StepRatio] = {}
    for name in group.values:
        entry = group.child(name)
        entry.expect(_ENTRY)
        p10, median, p90 = (entry.positive(k) for k in ("p10", "median", "p90"))
        if not p10 <= median <= p90:
            entry.fail("median", "is not between p10 and p90", "fit the file again")
        found[name] = StepRatio(
            num_rows=entry.count("num_rows"),
            median=median,
            p10=p10,
            p90=p90,
            rows_digest=rows_digest,
            source=", ".join(entry.texts("sources")),
            scope=scope,
        )
    return found
