"""Records of our own measurements: append-only JSON lines, each with its environment.

One line is one record. A writer that is killed leaves at most one torn line; the next writer
starts a new line and the reader reports the torn one, so nothing else is lost. A line that is
JSON but no record is a defect of the file and raises. What could not be measured is a line of a
second file of the same kind, `Refused`.

Version 1 held no kernel, no implementation and no interval; its lines are read as records of the
kernel that their op names, by an unnamed implementation. A file of a later version is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO, Final, Protocol, Self, TypeVar

from hwmodels.errors import InputError

VERSION: Final = 2
OLD: Final = 1
COLD, WARM, ROTATED, UNKNOWN = "cold", "warm", "rotated", "unknown"
L2_STATES: Final = (COLD, WARM, ROTATED, UNKNOWN)
NOISY, THROTTLED, IMPORTED = "noisy", "throttled", "imported"
FLAGS: Final = (NOISY, THROTTLED, IMPORTED)
GRAPH, EVENTS = "graph", "events"
"""How launches were timed: replayed from a captured graph, or launched one by one."""
LOST, HUNG = "lost", "hung"
KINDS: Final = (
    "unsupported", "memory", "compile", "wrong", "failed", LOST, HUNG, "unrecorded",
)  # fmt: skip
"""Why a trial has no record: not meant to run there; out of memory; no tile set compiles; wrong
results; an error while it ran; it, or one like it, took the device or the process along; no end in
time; a replay that holds no record of it."""
NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The fingerprint of the machine at the time of a measurement.

    `l2_state`: 'cold' where the cache was flushed before each repetition, 'rotated' where copies
    of inputs and outputs larger than it took turns, 'warm' where one small set stayed in it.
    `versions` names the libraries that matter, e.g. {"cuda": "12.8", "torch": "2.9.0"}. Clocks,
    power and temperature (degrees Celsius) are those under load, None where nothing told them;
    `throttle` joins the driver's reasons by '+', 'none' or 'unknown'.
    """

    gpu: str
    sm_clock_hz: float | None
    memory_clock_hz: float | None
    driver: str
    versions: Mapping[str, str]
    l2_state: str
    power_w: float | None = None
    temperature_celsius: float | None = None
    throttle: str = UNKNOWN

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
        return canonical(plain(self))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One thing to measure: a case of a kernel of the suite, by one of its implementations."""

    kernel: str
    implementation: str
    case: Case

    @property
    def key(self) -> str:
        """Canonical text, equal for equal trials."""
        return canonical(plain(self))

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.case.params.items())
        return f"{self.kernel}/{self.implementation} {self.case.dtype} {sizes}"


@dataclass(frozen=True, kw_only=True)
class Record:
    """The median time of one case over `repetitions`, with its spread.

    `spread_frac` is (90th - 10th percentile) / median of the repetitions; `low_s`, `high_s` the
    ends of the 95 % interval of the median by order statistics. `launch` is the label of the tile
    configuration that was kept of those `tried` (label to seconds, briefly timed), `method` how
    the launches were timed. `error` is the relative error that was found against `judge`
    ('reference', or the implementation it was held against). `row` is the case as public tables
    name it: its family, op and params. `vendor` is the library that the implementation stands
    for, `source` the publisher of an imported record, empty for our own.
    """

    case: Case
    environment: Environment
    seconds: float
    repetitions: int
    spread_frac: float
    measured_at: str
    kernel: str = ""
    implementation: str = ""
    vendor: str = ""
    launch: str = ""
    method: str = UNKNOWN
    low_s: float | None = None
    high_s: float | None = None
    attempts: int = 1
    flags: tuple[str, ...] = ()
    error: float | None = None
    judge: str = ""
    tried: Mapping[str, float] = field(default_factory=lambda: NOTHING)
    row: Mapping[str, Any] | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise InputError(f"a record's seconds = {self.seconds} must be positive and finite")
        if self.repetitions < 1:
            raise InputError(f"a record's repetitions = {self.repetitions} must be at least 1")
        if not 0 <= self.spread_frac < float("inf"):
            raise InputError(f"a record's spread_frac = {self.spread_frac} must not be negative")
        if self.row is not None and set(self.row) != {"family", "op", "params"}:
            raise InputError("a record's row must hold family, op and params")

    @property
    def trial(self) -> Trial:
        """What was measured."""
        kernel = self.kernel or self.case.op
        return Trial(kernel=kernel, implementation=self.implementation, case=self.case)

    @property
    def half_width_frac(self) -> float | None:
        """Half the interval of the median over the median; None where it is not known."""
        if self.low_s is None or self.high_s is None:
            return None
        return (self.high_s - self.low_s) / 2 / self.seconds

    def line(self) -> str:
        """The record as one line of JSON, without the line's end."""
        return canonical({"version": VERSION, **plain(self)})

    @property
    def digest(self) -> str:
        """sha256 of the line, in hex: what a calibration names as its evidence."""
        return hashlib.sha256(self.line().encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A trial without a record, and why; `kind` is one of `KINDS`."""

    trial: Trial
    gpu: str
    kind: str
    reason: str
    measured_at: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"refusal kind '{self.kind}' is unknown; it is {', '.join(KINDS)}")

    def line(self) -> str:
        """The refusal as one line of JSON, without the line's end."""
        return canonical({"version": VERSION, **plain(self)})


T = TypeVar("T", Record, Refused)


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
    found, torn = _read(path, _record)
    return RecordFile(tuple(found), tuple(torn))


def read_refused(path: Path) -> tuple[Refused, ...]:
    """Every refusal of a file; none where there is no file. Torn lines are passed over."""
    return tuple(_read(path, _refused)[0]) if path.exists() else ()


def _read(path: Path, parse: Callable[[object, str], T]) -> tuple[list[T], list[int]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    found: list[T] = []
    torn: list[int] = []
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        try:
            document = json.loads(raw)
        except (ValueError, RecursionError):  # includes a UTF-8 sequence cut in two
            torn.append(number)
            continue
        found.append(parse(document, f"{path}: line {number}"))
    return found, torn


class Entry(Protocol):
    """What a file of JSON lines holds."""

    def line(self) -> str:
        """The entry as one line, without the line's end."""
        ...


class RecordWriter:
    """Appends records or refusals to a file; each is on the disk when `append` returns.

    A context manager. Where the file ends in a torn line, a new line is begun first.
    """

    def __init__(self, path: Path) -> None:
        torn = path.exists() and not _ends_a_line(path)
        self._file: BinaryIO = path.open("ab", buffering=0)
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

    def append(self, entry: Entry) -> None:
        """Write one entry and wait until the operating system has it on the disk."""
        left = memoryview(entry.line().encode() + b"\n")
        while left:
            left = left[self._file.write(left) :]
        os.fsync(self._file.fileno())


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return True
        file.seek(size - 1)
        return file.read(1) == b"\n"


_ADDED: Final = {
    f.name for f in fields(Record) if f.default is not MISSING or f.default_factory is not MISSING
}
_ADDED_TO_ENVIRONMENT: Final = {f.name for f in fields(Environment) if f.default is not MISSING}
"""Fields that version 1 had not."""


def _version(found: object, where: str) -> int:
    """The version of a line; raises where it is none that this reads."""
    version = found.get("version", VERSION) if isinstance(found, dict) else VERSION
    if version not in (OLD, VERSION):
        raise InputError(
            f"{where}: version {version!r} is unknown; this reads {OLD} and {VERSION}, "
            "a later program wrote the file"
        )
    return int(version)


def _record(found: object, where: str) -> Record:
    """A record from parsed JSON; `where` begins the message of any complaint."""
    old = _version(found, where) == OLD
    names = {f.name for f in fields(Record)} - (_ADDED if old else set())
    top = _checked(found, {"version", *names}, where)
    case = _case(top["case"], where)
    machine = {f.name for f in fields(Environment)} - (_ADDED_TO_ENVIRONMENT if old else set())
    environment = _checked(top["environment"], machine, f"{where}: environment")
    if not isinstance(environment["versions"], dict):
        raise InputError(f"{where}: versions is no JSON object; mend or remove the line")
    rest = {name: top[name] for name in names - {"case", "environment"}}
    if not old:
        if not isinstance(rest["flags"], list) or not isinstance(rest["tried"], dict):
            raise InputError(f"{where}: flags or tried has no known form; mend or remove the line")
        rest["flags"] = tuple(rest["flags"])
    try:
        return Record(case=case, environment=Environment(**environment), **rest)
    except (TypeError, InputError) as error:
        raise InputError(f"{where}: {error}; mend or remove the line") from None


def _refused(found: object, where: str) -> Refused:
    """A refusal from parsed JSON."""
    _version(found, where)
    top = _checked(found, {"version", *(f.name for f in fields(Refused))}, where)
    trial = _checked(top["trial"], {f.name for f in fields(Trial)}, f"{where}: trial")
    case = _case(trial["case"], where)
    rest = {name: str(top[name]) for name in ("gpu", "kind", "reason", "measured_at")}
    try:
        return Refused(trial=Trial(**{**trial, "case": case}), **rest)
    except (TypeError, InputError) as error:
        raise InputError(f"{where}: {error}; mend or remove the line") from None


def _case(found: object, where: str) -> Case:
    case = _checked(found, {f.name for f in fields(Case)}, f"{where}: case")
    if not isinstance(case["params"], dict):
        raise InputError(f"{where}: params is no JSON object; mend or remove the line")
    return Case(**case)


def _checked(found: object, names: set[str], where: str) -> dict[str, Any]:
    if not isinstance(found, dict) or set(found) != names:
        keys = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise InputError(f"{where}: expected the fields {', '.join(sorted(names))}, found {keys}")
    return found


def plain(value: Any) -> Any:
    """Dataclasses and read-only mappings as JSON's own types."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def canonical(value: object) -> str:
    """JSON with sorted keys and no blanks: equal for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
