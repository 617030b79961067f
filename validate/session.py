"""One profiling session: a folder of records that only grows, and a clock that is kept to.

    records.jsonl      a line a measured trial, on the disk before the next one begins
    refusals.jsonl     a line a trial that could not be measured, with its reason
    environment.json   the machine of every session that wrote here
    current.json       the trial that is running; gone when no session is

A session that is killed loses the trial it was in and nothing else; the next one passes over what
has a line. A folder belongs to one GPU and to one session at a time.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

from hwmodels.errors import InputError
from validate.record import (
    HUNG,
    LOST,
    NOISY,
    Environment,
    Record,
    RecordFile,
    RecordWriter,
    Refused,
    Trial,
    plain,
    read_records,
    read_refused,
)
from validate.timer import DeviceLost, Timer, Unmeasured

RECORDS, REFUSALS = "records.jsonl", "refusals.jsonl"
ENVIRONMENT, CURRENT, LOCK = "environment.json", "current.json", ".lock"
VERSION: Final = 1
MARGIN: Final = 20.0
"""Most by which predicted costs are taken to be off; learned by kernel as the session goes."""
FATAL: Final = (LOST, HUNG)
Kind: TypeAlias = tuple[str, str, str]


class Planned(Protocol):
    """A trial and the seconds that measuring it takes."""

    @property
    def trial(self) -> Trial: ...  # noqa: D102

    @property
    def cost_s(self) -> float: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Event:
    """What happened to one trial: a record, a refusal, or nothing for want of time."""

    number: int
    total: int
    trial: Trial
    record: Record | None = None
    refused: Refused | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """How a session ended: counts of trials, and whether the device was lost on the way."""

    measured: int = 0
    noisy: int = 0
    refused: int = 0
    known: int = 0
    late: int = 0
    lost: bool = False

    def __add__(self, other: Summary) -> Summary:
        mine, theirs = asdict(self), asdict(other)
        return Summary(**{k: mine[k] + theirs[k] for k in mine if k != "lost"}, lost=other.lost)


@dataclass(frozen=True, slots=True)
class Store:
    """What a folder holds."""

    records: tuple[Record, ...]
    refused: tuple[Refused, ...]
    torn: tuple[int, ...]

    @property
    def known(self) -> set[str]:
        """The keys of all trials that have a line."""
        return {r.trial.key for r in self.records} | {r.trial.key for r in self.refused}


def read_store(folder: Path) -> Store:
    """The records and refusals of a folder; empty where there are none."""
    path = folder / RECORDS
    found = read_records(path) if path.exists() else RecordFile(())
    return Store(found.records, read_refused(folder / REFUSALS), found.torn)


def free_store(folder: Path, *, resume: bool) -> Store:
    """The folder's content; raises `InputError` where there is some and none is to be added to."""
    store = read_store(folder)
    if (store.records or store.refused) and not resume:
        raise InputError(
            f"{folder} holds {len(store.records)} records already; "
            "give --resume to go on, or another folder"
        )
    return store


def opened(folder: Path, *, resume: bool, gpu: str) -> Store:
    """The folder's content, checked: it may be written to by a session on that GPU."""
    store = free_store(folder, resume=resume)
    others = {r.environment.gpu for r in store.records} | {r.gpu for r in store.refused}
    for other in sorted(others - {gpu}):
        raise InputError(f"{folder} holds records of {other}, this is {gpu}; give another folder")
    return store


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the system lets go of it however the process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("ab")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; choose another") from None
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # no such locks on this system
            pass
        except OSError:
            raise InputError(f"{folder}: another profile is writing there; wait for it") from None
        yield


def session(
    plan: Sequence[Planned],
    timer: Timer,
    folder: Path,
    *,
    deadline_s: float,
    resume: bool = False,
    retry_before: str = "",
    say: Callable[[Event], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
    notes: dict[str, Any] | None = None,
) -> Summary:
    """Measure the trials in order until all have a line or `deadline_s` (of `clock`) is near.

    A trial that no longer fits is left out for a shorter one. Refusals older than `retry_before`
    (UTC, as `now` writes it) are tried again. What took the device along once is not run again in
    that format: its other trials are refused unseen. Raises `InputError` where the folder may not
    be written to.
    """
    with locked(folder):
        gpu = timer.environment.gpu
        store = opened(folder, resume=resume, gpu=gpu)
        _note_environment(folder, timer.environment, notes or {})
        refused = [entry for entry in store.refused if entry.measured_at >= retry_before]
        known = {r.trial.key for r in store.records} | {entry.trial.key for entry in refused}
        fatal = {kind_of(entry.trial): entry.reason for entry in refused if entry.kind in FATAL}
        with (
            RecordWriter(folder / RECORDS) as records,
            RecordWriter(folder / REFUSALS) as refusals,
        ):
            run = _Run(timer, folder, gpu, known, fatal, records, refusals)
            done = run.all(plan, deadline_s, say, clock)
        (folder / CURRENT).unlink(missing_ok=True)
        return done


@dataclass(frozen=True)
class _Run:
    """What a session works with while it lasts; `known` grows by the trials that get a line.

    `fatal` are the kernels, implementations and formats that took a device along, and how.
    """

    timer: Timer
    folder: Path
    gpu: str
    known: set[str]
    fatal: Mapping[Kind, str]
    records: RecordWriter
    refusals: RecordWriter

    def all(
        self,
        plan: Sequence[Planned],
        deadline_s: float,
        say: Callable[[Event], None],
        clock: Callable[[], float],
    ) -> Summary:
        """Every trial once; ends early where the device is lost."""
        done, paces = Summary(), dict[str, float]()
        for number, item in enumerate(plan, start=1):
            start = clock()
            if item.trial.key in self.known:
                done += Summary(known=1)
            elif start + item.cost_s * paces.get(item.trial.kernel, 1.0) > deadline_s:
                done += Summary(late=1)
            else:
                event, lost = self.one(item.trial, number, len(plan))
                done += _counted(event)
                say(event)
                if lost:
                    return replace(done, lost=True)
                paces[item.trial.kernel] = _pace(
                    paces.get(item.trial.kernel, 1.0), (clock() - start) / item.cost_s
                )
        return done

    def one(self, trial: Trial, number: int, total: int) -> tuple[Event, bool]:
        """Measure one trial and write its line; was the device lost over it?"""
        event, lost = self._measured(trial, number, total)
        if event.record is not None:
            self.records.append(event.record)
        elif event.refused is not None:
            self.refusals.append(event.refused)
        self.known.add(trial.key)
        return event, lost

    def _measured(self, trial: Trial, number: int, total: int) -> tuple[Event, bool]:
        """The result of one trial; while it runs, the folder says so."""
        if kind_of(trial) in self.fatal:
            reason = f"not run: one like it {self.fatal[kind_of(trial)]}"
            return self._refused(trial, number, total, LOST, reason), False
        write_whole(self.folder / CURRENT, {"trial": plain(trial), "started_at": now()})
        try:
            return Event(number, total, trial, record=self.timer.measure(trial)), False
        except Unmeasured as why:
            return self._refused(trial, number, total, why.kind, str(why)), False
        except DeviceLost as why:
            return self._refused(trial, number, total, LOST, str(why)), True

    def _refused(self, trial: Trial, number: int, total: int, kind: str, reason: str) -> Event:
        return Event(number, total, trial, refused=refusal(trial, self.gpu, kind, reason))


def refusal(trial: Trial, gpu: str, kind: str, reason: str) -> Refused:
    """A refusal of now; the reason is one line."""
    line = " ".join(reason.split())[:400]
    return Refused(trial=trial, gpu=gpu, kind=kind, reason=line, measured_at=now())


def kind_of(trial: Trial) -> Kind:
    """Kernel, implementation and format: one binary, or nearly so."""
    return trial.kernel, trial.implementation, trial.case.dtype


def _counted(event: Event) -> Summary:
    if event.record is None:
        return Summary(refused=1)
    return Summary(measured=1, noisy=int(NOISY in event.record.flags))


def _pace(pace: float, ratio: float) -> float:
    """Real over predicted cost: what the last trials of that kernel took, half by half."""
    return 0.5 * pace + 0.5 * min(max(ratio, 1 / MARGIN), MARGIN)


def running(folder: Path) -> Trial | None:
    """The trial that a session was in when it ended; None where it ended between trials."""
    from validate.record import Case

    try:
        found = json.loads((folder / CURRENT).read_text())["trial"]
        return Trial(**{**found, "case": Case(**found["case"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def refuse(folder: Path, entry: Refused) -> None:
    """Add a refusal from outside a session."""
    with locked(folder), RecordWriter(folder / REFUSALS) as writer:
        writer.append(entry)


def _note_environment(folder: Path, environment: Environment, notes: dict[str, Any]) -> None:
    """Add this session to environment.json; the file is there whole at any time."""
    path = folder / ENVIRONMENT
    try:
        sessions = json.loads(path.read_text())["sessions"]
    except (OSError, ValueError, KeyError, TypeError):
        sessions = []
    entry = {"started_at": now(), **notes, "environment": plain(environment)}
    write_whole(path, {"version": VERSION, "sessions": [*sessions, entry]})


def write_whole(path: Path, document: object) -> None:
    """Write JSON so that a reader meets the old file or the new one, never a half."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    os.replace(part, path)


def now() -> str:
    """UTC in ISO format, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
