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
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, NoReturn

from hwmodels._toml import one_line
from hwmodels.catalog import DATA
from hwmodels.errors import SpecError

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
    top = _Object(path, "", _json(path))
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


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
        raise SpecError(path, "file", problem, "check the path and its rights") from None
    except (ValueError, RecursionError) as error:
        problem = f"is not valid JSON: {one_line(error, 120)}"
        raise SpecError(path, "file", problem, "fit the file again") from None


def _ratios(top: _Object, key: str, rows_digest: str, scope: str) -> Mapping[str, StepRatio]:
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


class _Object:
    """One JSON object of the file, with typed access to its keys."""

    __slots__ = ("path", "prefix", "values")

    def __init__(self, path: Path, prefix: str, value: object) -> None:
        self.path, self.prefix = path, prefix
        self.values: dict[str, object] = value if isinstance(value, dict) else {}
        if not isinstance(value, dict):
            self.fail("", "is not an object", "fit the file again")

    def fail(self, key: str, problem: str, mend: str) -> NoReturn:
        where = ".".join(part for part in (self.prefix, key) if part) or "file"
        raise SpecError(self.path, one_line(where, 100), problem, mend)

    def expect(self, keys: frozenset[str]) -> None:
        for key in sorted(keys ^ self.values.keys()):
            self.fail(key, "missing" if key in keys else "unknown key", "fit the file again")

    def child(self, key: str) -> _Object:
        prefix = f"{self.prefix}.{key}" if self.prefix else key
        return _Object(self.path, prefix, self.values[key])

    def text(self, key: str) -> str:
        value = self.values[key]
        if not isinstance(value, str) or not value.strip():
            self.fail(key, "is not a text", "write it in quotes")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.values[key]
        if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
            self.fail(key, "is not a list of texts", 'write it as ["..."]')
        return tuple(value)

    def digests(self, key: str) -> tuple[str, ...]:
        found = self.texts(key)
        if len(set(found)) != len(found) or not all(_is_sha256(text) for text in found):
            self.fail(key, "is not a list of different sha256 digests", "fit the file again")
        return found

    def sha256(self, key: str) -> str:
        value = self.text(key)
        if not _is_sha256(value):
            self.fail(key, "is not a sha256 digest", "fit the file again")
        return value

    def date(self, key: str) -> datetime.date:
        text = self.text(key)
        try:
            return datetime.date.fromisoformat(text)
        except ValueError:
            self.fail(key, f"is {one_line(text)}, not a date", "write it as 2026-11-21")

    def count(self, key: str) -> int:
        value = self.values[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.fail(key, f"is {one_line(value)}", "give a whole number from 1")
        return value

    def positive(self, key: str) -> float:
        value = self.values[key]
        plain = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not plain or not 0 < float(str(value)) < math.inf:
            self.fail(key, f"is {one_line(value)}", "give a positive finite number")
        return float(str(value))


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")
