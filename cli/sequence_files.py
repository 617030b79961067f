"""What `plan sequences --lengths` reads: one length a line, or a histogram of 'length,count'."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from cli.plans import MOST
from cli.quantity import count_text, shown
from hwmodels.errors import InputError

if TYPE_CHECKING:
    from simulator.variable_length import Ints

MOST_SEQUENCES: Final = 100_000


def load_lengths(path: Path) -> tuple[Ints, Ints]:
    """Lengths in the order of the file, and the line that each stands in.

    Empty lines, and what follows a '#', say nothing.
    """
    import numpy as np

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read {shown(path, 200)}: {shown(error, 80)}; give a text file with one length "
            "a line"
        ) from None
    lengths: list[int] = []
    counts: list[int] = []
    numbers: list[int] = []
    total = 0
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        length, count = _entry(text, f"line {number} of {shown(path.name, 80)}")
        lengths.append(length)
        counts.append(count)
        numbers.append(number)
        total += count
        if total > MOST_SEQUENCES:
            raise InputError(
                f"{shown(path.name, 80)} has more than {MOST_SEQUENCES:,} sequences; give one "
                "step's"
            )
    if not total:
        raise InputError(
            f"{shown(path.name, 80)} has no sequences; give one length, or 'length,count', a line"
        )
    return (
        np.repeat(np.array(lengths, dtype=np.int64), counts),
        np.repeat(np.array(numbers, dtype=np.int64), counts),
    )


def _entry(text: str, where: str) -> tuple[int, int]:
    """Length and count of a line."""
    fields = [field.strip() for field in text.split(",")]
    if len(fields) > 2:
        raise InputError(f"{where} = '{shown(text)}' has more than 'length,count'; mend the file")
    length = _whole(fields[0], "length", where, text, least=1)
    count = _whole(fields[1], "count", where, text, least=0) if len(fields) == 2 else 1
    return length, count


def _whole(field: str, what: str, where: str, text: str, *, least: int) -> int:
    try:
        number = int(field) if len(field) <= 20 else None
    except ValueError:
        number = None
    if number is None:
        raise InputError(
            f"{where} = '{shown(text)}': the {what} is not a whole number; give digits only"
        )
    if not least <= number <= MOST:
        raise InputError(
            f"{where} = '{shown(text)}': the {what} is not from {least} to {count_text(MOST)}; "
            "mend the file"
        )
    return number
