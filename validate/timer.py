"""The seam between what is timed and who times it.

`ReplayTimer` answers from stored records, so that everything above the seam runs and is tested
without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from hwmodels.errors import InputError
from validate.record import Case, Record


class Timer(Protocol):
    """Times one case."""

    def measure(self, case: Case) -> Record:
        """The measured record of that case; raises `InputError` where it cannot be had."""
        ...


class ReplayTimer:
    """Replays records; where a case was recorded more than once, the latest line counts."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._by_case = {record.case.key: record for record in records}

    def measure(self, case: Case) -> Record:
        """The stored record of that case."""
        record = self._by_case.get(case.key)
        if record is None:
            raise InputError(
                f"no record of {case.op} {case.dtype} {dict(case.params)}; "
                "measure it on a GPU first, or give the file that holds it"
            )
        return record
