"""The seam between what is timed and who times it.

`validate.cuda_timer.CudaTimer` times on a GPU. `ReplayTimer` answers from stored records, so that
everything above the seam runs and is tested without one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from hwmodels.errors import InputError
from validate.record import Environment, Record, Refused, Trial


class Unmeasured(InputError):
    """A trial that has no record; `kind` is one of `validate.record.KINDS`."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class DeviceLost(Exception):
    """The device answers no more in this process: whatever comes after would fail too."""


class Timer(Protocol):
    """Times one trial."""

    @property
    def environment(self) -> Environment:
        """The machine, before anything was timed."""
        ...

    def measure(self, trial: Trial) -> Record:
        """The measured record of that trial; raises `Unmeasured` where it cannot be had."""
        ...


class ReplayTimer:
    """Replays records; where a trial was recorded more than once, the latest line counts."""

    def __init__(self, records: Iterable[Record], refused: Iterable[Refused] = ()) -> None:
        self._records = {record.trial.key: record for record in records}
        self._refused = {entry.trial.key: entry for entry in refused}
        if not self._records:
            raise InputError("nothing to replay: the file holds no record")

    @property
    def environment(self) -> Environment:
        """That of the first record."""
        return next(iter(self._records.values())).environment

    def measure(self, trial: Trial) -> Record:
        """The stored record of that trial."""
        record = self._records.get(trial.key)
        if record is not None:
            return record
        entry = self._refused.get(trial.key)
        if entry is not None:
            raise Unmeasured(entry.kind, entry.reason)
        raise Unmeasured(
            "unrecorded",
            f"no record of {trial}; measure it on a GPU first, or give the file that holds it",
        )
