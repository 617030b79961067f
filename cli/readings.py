"""Measured rows from the command line: what could not be believed is counted on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cli.quantity import shown
from hwmodels.errors import InputError

if TYPE_CHECKING:
    from validate.measurement import Readings, Refusal
    from validate.record import Record, Refused


def read_all(
    path: Path, family: str | None = None, devices: Mapping[str, str] | None = None
) -> Readings:
    """All readable files; the unreadable ones are named on stderr unless there are no others.

    `devices` says what GPU names of the files mean, as `cli.given.devices` made it.
    """
    from validate.measurement import Readings, csv_files, read

    readings, errors = Readings(), []
    for file in csv_files(path, family):
        try:
            readings += read(file, devices or {})
        except InputError as error:
            errors.append(str(error))
    if not readings.rows and not readings.refused:
        more = f" (and {len(errors) - 1} more such files)" if len(errors) > 1 else ""
        raise InputError(f"{errors[0]}{more}")
    for message in errors:
        print(f"ridgeplan: warning: left out: {shown(message, 2000)}", file=sys.stderr)
    if readings.refused:
        first = readings.refused[0]
        print(
            f"ridgeplan: warning: refused {len(readings.refused)} rows; the first is "
            f"{shown(first.file, 200)}, line {first.line}: {shown(first.reason, 200)}",
            file=sys.stderr,
        )
    return readings


def read_profiles(path: Path) -> tuple[list[Record], list[Refused]]:
    """The records of a file or folder, each once, and the trials that gave none.

    Half lines left by killed writers are named on stderr; all others are used.
    """
    from validate.record import read_records, read_refused
    from validate.record_files import files_of
    from validate.session import REFUSALS

    found: dict[str, Record] = {}
    refused: list[Refused] = []
    for file in files_of(path):
        read = read_records(file)
        found |= {record.digest: record for record in read.records}
        refused += read_refused(file.parent / REFUSALS)
        for line in read.torn:
            print(
                f"ridgeplan: warning: {shown(file, 200)}, line {line}: half a line, left by a "
                "writer that was killed; the rest is used",
                file=sys.stderr,
            )
    if not found:
        raise InputError(f"{shown(path, 200)}: holds no record; profile first")
    return list(found.values()), refused


def record_readings(
    path: Path, family: str | None = None, devices: Mapping[str, str] | None = None
) -> Readings:
    """Records as rows; those that are none are refused with the reason."""
    from validate.measurement import Readings, Refusal
    from validate.recorded import recorded

    records, _ = read_profiles(path)
    found = recorded(records, devices or {})
    rows = tuple(r for r in found.rows if family in (None, r.family))
    if family is not None and not rows:
        known = ", ".join(sorted({r.family for r in found.rows}))
        raise InputError(f"{shown(path, 200)}: no family '{shown(family)}'; it has {known}")
    refused = tuple(
        Refusal(
            family=record.trial.kernel, gpu=record.environment.gpu, op=record.case.op,
            dtype=record.case.dtype, file=str(path), line=0, reason=reason,
        )
        for record, reason in found.left_out
    )  # fmt: skip
    return Readings(rows, refused)


def unknown_gpu_hint(refused: Iterable[Refusal]) -> str:
    """How to go on where rows name a GPU that no catalogue holds; empty where none does."""
    from validate.measurement import UNKNOWN_GPU

    names = dict.fromkeys(r.gpu for r in refused if r.reason == UNKNOWN_GPU)
    if not names:
        return ""
    first = shown(next(iter(names)))
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return (
        f"GPU {first!r}{more} is in no catalogue; describe it in a TOML file like those "
        f"of hwmodels/data/devices and give --device '{first}=FILE.toml'"
    )
