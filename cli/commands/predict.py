"""`ridgeplan predict`: rows of measurements, measured or not, with predicted times beside them."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cli import given, show
from cli.files import check_writable, write_all
from cli.options import AsJson
from cli.progress import patience
from cli.quantity import shown
from hwmodels.errors import InputError

if TYPE_CHECKING:
    from hwmodels.calibration import Calibration
    from validate.measurement import Line, Measurement, Records, Refusal

COLUMNS: Final = ("predicted_us", "low_us", "high_us", "rung", "note")
"""What is added to a row; times in microseconds like the column they stand beside."""
FITTED_ON: Final = "the calibration was fitted on this row"
MOST_REASONS: Final = 8
BOM: Final = "\ufeff"


def predict(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A CSV file in the measurement schema.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the CSV here, not to stdout."),
    ] = None,
    calibration: given.Calibrations = None,
    device: given.Devices = None,
    as_json: AsJson = False,
) -> None:
    """Add predicted times to the rows of a CSV file.

    Rows and columns stay as they are; predicted_us, low_us and high_us (the 80 % interval), rung
    and note come behind them. Columns: source,gpu,op,dtype,params,latency_us, where latency_us may
    be empty or missing. A row without a prediction says why in its note.

    \b
    Examples:
      ridgeplan predict measured/kernels_gemm.csv --out predicted.csv
      ridgeplan predict measured/kernels_gemm.csv --device 'My GPU=./my-gpu.toml' --json
    """
    if out is not None:
        check_writable([out])
        if out.exists() and out.samefile(file):
            raise InputError(f"--out {shown(out, 200)} is the file that is read; name another")
    targets = given.devices(device)
    calibrations = given.calibrations(calibration, targets)
    with patience(f"predicting {shown(file)}"):
        from validate.measurement import records

        if file.is_dir():
            raise InputError(f"{shown(file, 200)} is a folder; give one CSV file of it")
        found = records(file, targets, need_seconds=False)
        answers = _answers(found, calibrations)
    if not any(a.predicted for a in answers):
        raise InputError(_nothing(file, found, answers))
    if out is not None:
        write_all({out: _csv(file, found, answers).encode()})
    if as_json:
        show.print_json(_document(file, found, answers))
    elif out is None:
        sys.stdout.flush()
        sys.stdout.buffer.write(_csv(file, found, answers).encode())
        sys.stdout.buffer.flush()
    else:
        print(f"wrote {out}: {_counts(found, answers)}")
    _warn(found, answers)


@dataclass(frozen=True, slots=True)
class Answer:
    """What is added to one line, seconds; `note` is the reason where there is no prediction."""

    seconds: float = math.nan
    low_s: float = math.nan
    high_s: float = math.nan
    rung: str = ""
    note: str = ""
    measured_s: float = math.nan
    """The time a prediction may be held against; NaN where the row has none or was fitted on."""

    @property
    def predicted(self) -> bool:
        """Is there a prediction?"""
        return math.isfinite(self.seconds)

    def cells(self) -> tuple[str, ...]:
        """The added cells of the CSV file."""
        if not self.predicted:
            return "", "", "", "", self.note
        times = (_microseconds(s) for s in (self.seconds, self.low_s, self.high_s))
        return (*times, self.rung, self.note)


def _answers(
    found: Records, calibrations: Sequence[Calibration] | None
) -> list[Answer]:  # fmt: skip
    """One answer a line, in order; an empty one for a blank line."""
    from validate.measurement import Measurement
    from validate.predictions import fitted_on
    from validate.predictions import predict as predict_rows

    rows = [made for _, made in found.lines if isinstance(made, Measurement)]
    predictions = predict_rows(rows, calibrations)
    own = fitted_on(rows, predictions, calibrations)

    def answer(i: int) -> Answer:
        reason = predictions.reasons[i]
        if reason is not None:
            return Answer(note=reason)
        notes = [*predictions.notes(i), *([FITTED_ON] if own[i] else [])]
        measured_s = math.nan if own[i] else float(rows[i].seconds or math.nan)
        return Answer(
            seconds=float(predictions.seconds[i]),
            low_s=float(predictions.low_80_s[i]),
            high_s=float(predictions.high_80_s[i]),
            rung=predictions.rung(i),
            note="; ".join(notes),
            measured_s=measured_s,
        )

    answers = map(answer, range(len(rows)))
    return [_refused(made) or next(answers) for _, made in found.lines]


def _refused(made: Measurement | Refusal | None) -> Answer | None:
    """The answer to a line that holds no row to predict."""
    from validate.measurement import Refusal

    if made is None:
        return Answer()
    return Answer(note=f"refused: {made.reason}") if isinstance(made, Refusal) else None


def _csv(file: Path, found: Records, answers: Sequence[Answer]) -> str:
    """The file's own text, line by line, with the added cells behind it."""
    with file.open("rb") as raw:
        start = BOM if raw.read(3) == BOM.encode() else ""
    width = len(found.columns)
    lines = [start, _extended(found.header, width, COLUMNS, "\n")]
    eol = _eol(found.header) or "\n"
    for (line, made), answer in zip(found.lines, answers, strict=True):
        lines.append(line.text if made is None else _extended(line, width, answer.cells(), eol))
    return "".join(lines)


def _extended(line: Line, width: int, cells: Sequence[str], usual_eol: str) -> str:
    """A line with more cells behind it, its own left as they stand.

    A row that is too short is filled up, the surplus of one that is too long joins its last cell,
    one that is no CSV becomes a cell: else the added cells would stand under the wrong names.
    """
    eol = _eol(line)
    text = line.text.removesuffix(eol)
    if line.problem:
        text = _row([text])
    elif len(line.cells) > width:
        text = _row([*line.cells[: width - 1], ",".join(line.cells[width - 1 :])])
    missing = [""] * (width - max(len(line.cells), 1))
    return f"{text},{_row([*missing, *cells])}{eol or usual_eol}"


def _eol(line: Line) -> str:
    """How a line ends in the file."""
    return next((end for end in ("\r\n", "\n", "\r") if line.text.endswith(end)), "")


def _row(cells: Sequence[str]) -> str:
    """Cells as CSV without an end of line."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue()


def _microseconds(seconds: float) -> str:
    """Seven digits, which is more than any of them deserves.

    >>> _microseconds(1.23456789e-3), _microseconds(0.25e-6), _microseconds(12.5)
    ('1234.568', '0.25', '12500000')
    """
    return f"{float(f'{seconds * 1e6:.7g}'):.12g}"


def _document(file: Path, found: Records, answers: Sequence[Answer]) -> dict[str, Any]:
    """The same as one JSON document: the cells of each row by column, times as numbers."""
    rows = []
    for (line, made), a in zip(found.lines, answers, strict=True):
        if made is None:
            continue
        times = (a.seconds, a.low_s, a.high_s)
        added = (*(s * 1e6 if a.predicted else None for s in times), a.rung or None, a.note)
        cells = dict.fromkeys(found.columns, "") | dict(
            zip(found.columns, line.cells, strict=False)
        )
        rows.append({"line": line.number, **cells, **dict(zip(COLUMNS, added, strict=True))})
    return {
        "file": str(file),
        "num_rows": len(rows),
        "num_predicted": sum(a.predicted for a in answers),
        "mape": _mape(answers),
        "rows": rows,
        "unsupported": [{"reason": r, "n": n, "first_line": at} for r, n, at in
                        _reasons(found, answers)],
    }  # fmt: skip


def _reasons(found: Records, answers: Sequence[Answer]) -> list[tuple[str, int, int]]:
    """Why rows have no prediction: reason, rows, line of the first; the commonest first."""
    counts: Counter[str] = Counter()
    first: dict[str, int] = {}
    for (line, made), answer in zip(found.lines, answers, strict=True):
        if made is not None and not answer.predicted:
            counts[answer.note] += 1
            first.setdefault(answer.note, line.number)
    return [(reason, n, first[reason]) for reason, n in counts.most_common()]


def _mape(answers: Sequence[Answer]) -> float | None:
    """The mean error over rows that state a time the calibration does not know."""
    apes = [
        abs(a.seconds / a.measured_s - 1)
        for a in answers
        if a.predicted and math.isfinite(a.measured_s)
    ]
    return sum(apes) / len(apes) if apes else None


def _counts(found: Records, answers: Sequence[Answer]) -> str:
    """How many rows were predicted, and how well where they state a time."""
    num_rows = sum(made is not None for _, made in found.lines)
    predicted, mape = sum(a.predicted for a in answers), _mape(answers)
    held = sum(a.predicted and math.isfinite(a.measured_s) for a in answers)
    error = "" if mape is None else f"; MAPE {100 * mape:.1f} % on the {held} that state a time"
    return f"{num_rows} rows: {predicted} predicted, {num_rows - predicted} without{error}"


def _warn(found: Records, answers: Sequence[Answer]) -> None:
    """On stderr, by reason, the rows without a prediction; nothing where there are none."""
    reasons = _reasons(found, answers)
    if not reasons:
        return
    print(f"ridgeplan: warning: {_counts(found, answers)}", file=sys.stderr)
    for reason, n, line in reasons[:MOST_REASONS]:
        print(
            f"ridgeplan: warning: {n} rows (first: line {line}): {shown(reason, 300)}",
            file=sys.stderr,
        )
    if len(reasons) > MOST_REASONS:
        print(f"ridgeplan: warning: and {len(reasons) - MOST_REASONS} more reasons; see the notes",
              file=sys.stderr)  # fmt: skip
    hint = _hint(found)
    if hint:
        print(f"ridgeplan: hint: {hint}", file=sys.stderr)


def _hint(found: Records) -> str:
    from cli.readings import unknown_gpu_hint
    from validate.measurement import Refusal

    return unknown_gpu_hint(made for _, made in found.lines if isinstance(made, Refusal))


def _nothing(file: Path, found: Records, answers: Sequence[Answer]) -> str:
    """One line for a file of which no row can be predicted."""
    reasons = _reasons(found, answers)
    num_rows = sum(n for _, n, _ in reasons)
    reason, n, line = reasons[0]
    hint = _hint(found)
    return (
        f"{shown(file, 200)}: none of {num_rows} rows can be predicted; {n} of them "
        f"(first: line {line}): {shown(reason, 300)}{f'. {hint}' if hint else ''}"
    )
