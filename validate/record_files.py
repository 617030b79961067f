"""Files of records put together, looked over, and laid beside the bound."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hwmodels.errors import InputError
from validate.predictions import predict
from validate.record import UNKNOWN, WARM, Record, read_records
from validate.recorded import device_of, recorded
from validate.session import RECORDS

SLACK_FRAC: Final = 0.01
"""A record may be this much faster than the bound: clocks and counts are no better known."""


@dataclass(frozen=True, slots=True)
class Held:
    """A record and what counts say of it: the bound of its kernel, cold or as warm as it ran.

    `bound_s` is NaN where no op counts the record.
    """

    record: Record
    bound_s: float

    @property
    def bound_frac(self) -> float:
        """The share of the bound that was achieved; above 1 is faster than the device can be."""
        return self.bound_s / self.record.seconds


@dataclass(frozen=True, slots=True)
class Finding:
    """Something odd in a file: what kind, where, in words. An `error` file should not be used."""

    kind: str
    file: str
    line: int | None
    text: str
    error: bool


def path_of(path: Path) -> Path:
    """The file of records: the path itself, or a profile's folder's."""
    found = path / RECORDS if path.is_dir() else path
    if not found.is_file():
        raise InputError(f"{path}: no such file of records; give records.jsonl or its folder")
    return found


def holds_records(path: Path) -> bool:
    """Is it a file of records, or a folder that holds some and no table of measurements?"""
    if path.suffix == ".jsonl":
        return True
    if not path.is_dir():
        return False
    return (path / RECORDS).is_file() or (
        not any(path.glob("*.csv")) and any(path.rglob(RECORDS))
    )  # fmt: skip


def files_of(path: Path) -> list[Path]:
    """The files of records there: the path itself, a profile's, or those of several profiles."""
    if not path.is_dir() or (path / RECORDS).is_file():
        return [path_of(path)]
    return sorted(path.rglob(RECORDS)) or [path_of(path)]


def held(records: Sequence[Record]) -> list[Held]:
    """Every record with its bound."""
    found = recorded(records)
    bounds = {id(r): math.nan for r in records}
    if found.rows:
        seen = predict(found.rows)
        for i, record in enumerate(found.records):
            warm = record.environment.l2_state in (WARM, UNKNOWN)
            bounds[id(record)] = float((seen.warm_s if warm else seen.lower_s)[i])
    return [Held(record, bounds[id(record)]) for record in records]


def merged(files: Iterable[Path]) -> tuple[list[Record], int]:
    """The union of files in their order without doubled lines; how many were doubled.

    Two records of one trial are both kept where anything in them differs: they are two timings.
    """
    found: dict[str, Record] = {}
    total = 0
    for file in files:
        for record in read_records(path_of(file)).records:
            found.setdefault(record.digest, record)
            total += 1
    return list(found.values()), total - len(found)


def findings(file: Path) -> list[Finding]:
    """Torn and doubled lines, unknown devices, several devices, times faster than the bound."""
    name = str(file)
    read = read_records(file)
    found = [
        Finding("torn", name, line, "half a line, left by a writer that was killed", False)
        for line in read.torn
    ]
    lines = [n for n in range(1, len(read.records) + len(read.torn) + 1) if n not in read.torn]
    found += _doubled(name, read.records, lines)
    found += _devices(name, read.records)
    for each, line in zip(held(read.records), lines, strict=True):
        if each.bound_frac > 1 + SLACK_FRAC:
            text = (
                f"{each.record.trial} takes {each.record.seconds:.3g} s, "
                f"the bound is {each.bound_s:.3g} s"
            )
            found.append(Finding("implausible", name, line, text, True))
    return found


def _doubled(name: str, records: Sequence[Record], lines: Sequence[int]) -> list[Finding]:
    """Lines that say what an earlier one said, and second timings of one trial."""
    whole: dict[str, int] = {}
    trials: dict[str, int] = {}
    found = []
    for record, line in zip(records, lines, strict=True):
        first = whole.setdefault(record.digest, line)
        if first != line:
            found.append(Finding("doubled", name, line, f"the same as line {first}", True))
            continue
        earlier = trials.setdefault(f"{record.environment.gpu} {record.trial.key}", line)
        if earlier != line and not record.source:
            text = f"{record.trial} was timed in line {earlier} too"
            found.append(Finding("repeated", name, line, text, False))
    return found


def _devices(name: str, records: Sequence[Record]) -> list[Finding]:
    """GPUs that no catalogue knows, and files of more than one."""
    gpus = dict.fromkeys(r.environment.gpu for r in records)
    found = [
        Finding("device", name, None, f"GPU '{gpu}' is in no catalogue", True)
        for gpu in gpus
        if device_of(gpu) is None
    ]
    if len(gpus) > 1:
        found.append(Finding("device", name, None, f"several GPUs: {', '.join(gpus)}", False))
    return found


def counts(records: Iterable[Record]) -> Mapping[str, int]:
    """How many records each GPU has."""
    found: dict[str, int] = {}
    for record in records:
        gpu = record.environment.gpu
        found[gpu] = found.get(gpu, 0) + 1
    return found
