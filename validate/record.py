"""Records of our own measurements: append-only JSON lines, each with its environment.

One line is one record. A writer that is killed leaves at most one torn line; the next writer
starts a new line and the reader reports the torn one, so nothing else is lost. A line that is
JSON but no record is a defect of the file and raises.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from hwmodels.errors import InputError

VERSION = 1
L2_STATES = ("cold", "warm")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The fingerprint of the machine at the time of a measurement.

    `l2_state`: 'cold' where the cache was flushed before each repetition, else 'warm'.
    `versions` names the libraries that matter, e.g. {"cuda": "12.8", "torch": "2.9.0"}.
    """

    gpu: str
    sm_clock_hz: float
    memory_clock_hz: float
    driver: str
    versions: Mapping[str, str]
    l2_state: str

    def __post_init__(self) -> None:
        if self.l2_state not in L2_STATES:
            raise InputError(
                f"l2_state '{self.l2_state}' is unknown; it is {' or '.join(L2_STATES)}"
            )


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is timed: an op's name, its number format and its sizes."""

    op: str
    dtype: str
    params: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Canonical text of the case, equal for equal cases whatever the order of `params`."""
        return _canonical(asdict(self))


@dataclass(frozen=True, kw_only=True)
class Record:
    """The median time of one case over `repetitions`, with its spread.

    `spread_frac` is (90th - 10th percentile) / median of the repetitions.
    """

    case: Case
    environment: Environment
    seconds: float
    repetitions: int
    spread_frac: float
    measured_at: str

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise InputError(f"a record's seconds = {self.seconds} must be positive and finite")
        if self.repetitions < 1:
            raise InputError(f"a record's repetitions = {self.repetitions} must be at least 1")
        if not 0 <= self.spread_frac < float("inf"):
            raise InputError(f"a record's spread_frac = {self.spread_frac} must not be negative")

    def line(self) -> str:
        """The record as one line of JSON, without the line's end."""
        return _canonical({"version": VERSION, **asdict(self)})

    @property
    def digest(self) -> str:
        """sha256 of the line, in hex: what a calibration names as its evidence."""
        return hashlib.sha256(self.line().encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class RecordFile:
    """What a file of records held; `torn` are the numbers of lines a killed writer left."""

    records: tuple[Record, ...]
    torn: tuple[int, ...] = ()


def digest(records: Iterable[Record]) -> str:
    """sha256 of a set of records, the same in any order."""
    joined = "\n".join(sorted(r.digest for r in records))
    return hashlib.sha256(joined.encode()).hexdigest()


def read_records(path: Path) -> RecordFile:
    """Every record of a file; torn lines are reported, anything else odd raises `InputError`."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    records: list[Record] = []
    torn: list[int] = []
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        try:
            fields_found = json.loads(raw)
        except ValueError:  # includes a UTF-8 sequence cut in two
            torn.append(number)
            continue
        records.append(_record(fields_found, f"{path}: line {number}"))
    return RecordFile(tuple(records), tuple(torn))


class RecordWriter:
    """Appends records to a file; each is on the disk when `append` returns.

    A context manager. Where the file ends in a torn line, a new line is begun first.
    """

    def __init__(self, path: Path) -> None:
        torn = path.exists() and not _ends_a_line(path)
        self._file: BinaryIO = path.open("ab")
        if torn:
            self._file.write(b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, record: Record) -> None:
        """Write one record and wait until the operating system has it on the disk."""
        self._file.write(record.line().encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return True
        file.seek(size - 1)
        return file.read(1) == b"\n"


def _record(found: object, where: str) -> Record:
    """A record from parsed JSON; `where` begins the message of any complaint."""
    top = _checked(found, {"version", *(f.name for f in fields(Record))}, where)
    if top["version"] != VERSION:
        raise InputError(f"{where}: version {top['version']!r} is unknown; this reads {VERSION}")
    case = _checked(top["case"], {f.name for f in fields(Case)}, f"{where}: case")
    names = {f.name for f in fields(Environment)}
    environment = _checked(top["environment"], names, f"{where}: environment")
    for owner, name in ((case, "params"), (environment, "versions")):
        if not isinstance(owner[name], dict):
            raise InputError(f"{where}: {name} is no JSON object; mend or remove the line")
    rest = {name: top[name] for name in ("seconds", "repetitions", "spread_frac", "measured_at")}
    try:
        return Record(case=Case(**case), environment=Environment(**environment), **rest)
    except (TypeError, InputError) as error:
        raise InputError(f"{where}: {error}; mend or remove the line") from None


def _checked(found: object, names: set[str], where: str) -> dict[str, Any]:
    if not isinstance(found, dict) or set(found) != names:
        keys = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise InputError(f"{where}: expected the fields {', '.join(sorted(names))}, found {keys}")
    return found


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
